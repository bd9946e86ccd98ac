// The gradient of softmax(q k^T) v on the tiles of attention_tiles.h: what is compiled for each width of vectors
// (width.h).
//
// A task is a row's key head: its panels of queries one after another, each against the blocks of keys that it sees.
// With p = softmax(s) of a query's scores s = scale q k, ds = p (dy v - dy y); dq is a sum of ds k over keys, block by
// block as the output is one of p v, and dk and dv are sums of ds q and p dy over queries, panel by panel. What a sum
// takes, and in which order, is a matter of a row's tokens and window alone.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention_tiles.h"
#include "check.h"

class AttentionGradient : AttentionTiles {
 public:
  explicit AttentionGradient(const AttentionBackward& a)
      : AttentionTiles(a.call), a(a), whole((c.D + 7) / 8 * 8) {}

  void run() const {
    on_team(4, c.B * c.Hkv, floats(), [&](int64_t i, float* work) {
      const FlushDenormals flush;
      if (!a.rows || a.rows[i / c.Hkv]) head(i / c.Hkv, i % c.Hkv, work);
    });
  }

 private:
  const AttentionBackward& a;
  const int64_t whole;  // numbers of a head, and zeros up to whole vectors

  int64_t floats() const {
    return (2 * BLOCK + 5 * c.D + 3 * whole + 3) * PANEL + 2 * c.T * whole + 16;
  }

  struct Queries : Tile {
    float *q, *far, *dy, *dq, *dfar;          // panels [D]
    float *q_rows, *far_rows, *dy_rows;       // [16, whole]
    float *most, *inverse, *along;            // [16]: largest score, 1 / sum of its powers, dy y
  };

  void head(int64_t b, int64_t h, float* work) const {
    const int64_t real = c.len[b] * group;
    auto take = [&](int64_t n) { return work += n, work - n; };
    float *const p = take(BLOCK * PANEL), *const ds = take(BLOCK * PANEL);
    float *const dk = take(c.T * whole), *const dv = take(c.T * whole);
    std::memset(dk, 0, 2 * c.T * whole * sizeof(float));
    Queries t;
    for (float** panel : {&t.q, &t.far, &t.dy, &t.dq, &t.dfar}) *panel = take(PANEL * c.D);
    for (float** rows : {&t.q_rows, &t.far_rows, &t.dy_rows}) *rows = take(PANEL * whole);
    for (float** row : {&t.most, &t.inverse, &t.along}) *row = take(PANEL);
    for (int64_t n = 0; n < real; n += PANEL) {
      static_cast<Tile&>(t) = tile(b, n);
      start(b, h, t);
      blocks(b, t.begin, t.end, [&](int64_t from, int64_t to, bool sinks) {
        block(b, h, t, span(t, from, to, sinks), sinks, p, ds, dk, dv);
      });
      finish(b, h, t, t.dq, t.q_rows, a.dq);
      if (c.sinks) finish(b, h, t, t.dfar, t.far_rows, a.dfar);
    }
    for (int64_t n = real; n < c.T * group; n++) {
      std::memset(a.dq + at(b, h, n), 0, c.D * sizeof(float));
      if (c.sinks) std::memset(a.dfar + at(b, h, n), 0, c.D * sizeof(float));
    }
    for (int64_t i = 0; i < c.T; i++) {
      const int64_t to = ((b * c.T + i) * c.Hkv + h) * c.D;
      for (int64_t d = 0; d < c.D; d++) a.dk[to + d] = dk[i * whole + d] * c.scale;
      std::memcpy(a.dv + to, dv + i * whole, c.D * sizeof(float));
    }
  }

  void start(int64_t b, int64_t h, const Queries& t) const {
    scaled_panel(c.q, b, h, t, t.q_rows, t.q);
    if (c.far) scaled_panel(c.far, b, h, t, t.far_rows, t.far);
    copied(c.y, b, h, t, t.q_rows), load_lanes(t.dq, t.q_rows, whole, c.D, 0, PANEL);  // y, for a moment
    copied(a.dy, b, h, t, t.dy_rows), load_lanes(t.dy, t.dy_rows, whole, c.D, 0, PANEL);
    copied(c.q, b, h, t, t.q_rows);
    if (c.far) copied(c.far, b, h, t, t.far_rows);
    for (int64_t v = 0; v < PANEL; v += 8) {
      f8 sum = all(0);
      for (int64_t d = 0; d < c.D; d++) sum = fma(load(t.dy + d * PANEL + v), load(t.dq + d * PANEL + v), sum);
      store(t.along + v, sum);
    }
    for (int64_t j = 0; j < PANEL; j++) {
      const int64_t query = at(b, h, t.first + std::min(j, t.lanes - 1)) / c.D;
      t.most[j] = c.most[query], t.inverse[j] = j < t.lanes ? 1 / c.sum[query] : 0;
    }
    std::memset(t.dq, 0, PANEL * c.D * sizeof(float)), std::memset(t.dfar, 0, PANEL * c.D * sizeof(float));
  }

  void copied(const float* from, int64_t b, int64_t h, const Queries& t, float* rows) const {
    std::memset(rows, 0, PANEL * whole * sizeof(float));
    for (int64_t j = 0; j < t.lanes; j++)
      std::memcpy(rows + j * whole, from + at(b, h, t.first + j), c.D * sizeof(float));
  }

  void block(int64_t b, int64_t h, const Queries& t, const Span& s, bool sinks, float* p, float* ds,
             float* dk, float* dv) const {
    if (s.empty()) return;
    const bool half = t.lanes <= 8, far = sinks && c.far;
    const int64_t ld = c.Hkv * c.D, from = keys(b, h, s), n = s.z - s.a;
    auto products = [&](const float* with, const float* queries, float* to) {
      panel_product(0, rows(s), c.D, with + from, ld, 1, queries, half,
                    [&](int64_t r, auto& acc) { store_rows(to, r, acc); });
    };
    products(c.k, far ? t.far : t.q, p), products(c.v, t.dy, ds);
    for (int64_t v = 0; v < (half ? 8 : PANEL); v += 8) {
      const f8 most = load(t.most + v), inverse = load(t.inverse + v), along = load(t.along + v);
      const f8 late = load(t.late + v);
      for (int64_t i = v; i < n * PANEL; i += PANEL) {
        const f8 share = abs(exp2(load(p + i) - most) * inverse);
        store(p + i, share), store(ds + i, share * (load(ds + i) - along));
      }
      s.edges([&](int64_t i) {
        const f8 z = hidden(s, t, late, i);
        float *share = p + i * PANEL + v, *slope = ds + i * PANEL + v;
        store(share, by_sign(z, load(share), all(-0.0f))), store(slope, by_sign(z, load(slope), all(0)));
      });
    }
    float* dq = sinks ? t.dfar : t.dq;  // apart, whether or not queries look another way: so has any company it
    weighed(s, c.k + from, ld, ds, p, half, [&](int64_t r, auto& acc) {
      with_rows(acc, dq, r, [](auto& x, float* to) { store(to, load_as<std::decay_t<decltype(x)>>(to) + x); });
    });
    const int64_t own = std::max(s.a, c.used[b]), count = s.z - own;
    if (count <= 0) return;
    const int64_t first = (own - s.a) * PANEL, to = (own - c.used[b]) * whole;
    auto outer = [&](const float* errors, const float* queries, float* sum) {
      outer_product(0, count, whole, t.lanes, errors + first, 0, queries, whole, [&](int64_t r, int64_t k, auto& acc) {
        with_rows(acc, sum + to + k, whole, r, [](auto& x, float* at) {
          store(at, load_as<std::decay_t<decltype(x)>>(at) + x);
        });
      });
    };
    outer(ds, far ? t.far_rows : t.q_rows, dk), outer(p, t.dy_rows, dv);
  }

  void finish(int64_t b, int64_t h, const Queries& t, const float* panel, float* rows, float* to) const {
    store_lanes(panel, rows, whole, c.D, 0, PANEL);
    for (int64_t j = 0; j < t.lanes; j++) {
      float* row = to + at(b, h, t.first + j);
      for (int64_t d = 0; d < c.D; d++) row[d] = rows[j * whole + d] * c.scale;
    }
  }
};
