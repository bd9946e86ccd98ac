// softmax(q k^T) v on panels (product.h): what is compiled for each width of vectors (width.h).
//
// A panel is 16 queries of one key head: tokens one after another, of each the heads of its group. Keys meet it in
// blocks of 64, whose ends are multiples of 64 of the token's place in its sequence (and the end of the sinks), not of
// the call or of the cache, which may have been trimmed. A query's numbers are then one chain of operations over what
// it sees, in any company: a score is a chain over D; a block's sum and its part of the output are chains over its
// keys in order, from which keys that a query does not see are left out; and what the blocks made is put together in
// order, scaled by the largest score so far (an online softmax: of sums over blocks, which round less than one chain
// over a long cache, and of a work space that does not grow with it).
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_tiles.h"
#include "check.h"

class Attention : AttentionTiles {
 public:
  explicit Attention(const AttentionCall& c) : AttentionTiles(c) {}

  void run() const {
    on_team(2, tasks(), floats(), [&](int64_t i, float* work) { task(i, work); });
  }

  int64_t tasks() const { return c.B * shares() * parts(); }

  // work: floats() of the caller's
  void task(int64_t i, float* work) const {
    const FlushDenormals flush;
    const int64_t share = i / parts() % shares();
    part(i / parts() / shares(), share * together(), i % parts() * PART, work);
  }

  int64_t floats() const { return ((3 * TILES + 1) * c.D + 2 * TILES + BLOCK) * PANEL + 16; }

 private:
  static constexpr int64_t PART = 4 * PANEL;  // queries that meet a block of keys while it is in the cache
  static constexpr int64_t TILES = 8;         // of a task, at most
  static constexpr int64_t FEW = 3;

  struct Queries : Tile {
    int64_t head;        // of keys
    float *q, *far, *o;  // panels [D]; o: sum of p v
    float *m, *l;        // [16]: the largest score so far, sum of p
  };

  int64_t parts() const { return (c.T * group + PART - 1) / PART; }

  // Key heads of a task: where a few queries wait for memory, they share the pages of several heads, which lie beside
  // each other; but every thread has a task.
  int64_t together() const {
    return c.T * group > FEW ? 1 : std::clamp<int64_t>(c.B * c.Hkv / c.threads, 1, std::min(c.Hkv, TILES));
  }
  int64_t shares() const { return (c.Hkv + together() - 1) / together(); }

  // Queries [n, n + PART) of (row, key heads from `head`)
  void part(int64_t b, int64_t head, int64_t n, float* work) const {
    const int64_t all = c.T * group, real = c.len[b] * group, stop = std::min(n + PART, all);
    const int64_t heads = std::min(c.Hkv, head + together());
    for (int64_t h = head; h < heads; h++)
      for (int64_t i = std::max(n, real); i < stop; i++) std::memset(output(b, h, i), 0, c.D * sizeof(float));
    if (n >= real) return;
    float *const p = work, *const rows = p + BLOCK * PANEL;
    work = rows + PANEL * c.D;
    Queries tiles[TILES];
    int count = 0;
    for (int64_t h = head; h < heads; h++)
      for (int64_t first = n; first < std::min(real, stop); first += PANEL) {
        Queries& t = tiles[count++];
        static_cast<Tile&>(t) = tile(b, first), t.head = h;
        for (float** panel : {&t.q, &t.far, &t.o}) *panel = work, work += PANEL * c.D;
        for (float** row : {&t.m, &t.l}) *row = work, work += PANEL;
        start(b, t, rows);
      }
    const int64_t end = tiles[count - 1].end + 1;
    blocks(b, tiles[0].begin, tiles[count - 1].end, [&](int64_t a, int64_t z, bool sinks) {
      if (tiles[0].lanes <= FEW) ahead(b, head, heads, a, z, end);
      for (int i = 0; i < count; i++) block(b, tiles[i], span(tiles[i], a, z, sinks), sinks, p);
    });
    for (int i = 0; i < count; i++) finish(b, tiles[i], rows);
  }

  // A few queries wait for memory, which is fastest in its own order: of key heads [h, g), the values of slots [a, z) and
  // the keys of as many after them come nearer. By loads: what fetches ahead of a program is not set off by prefetches.
  void ahead(int64_t b, int64_t h, int64_t g, int64_t a, int64_t z, int64_t end) const {
    auto touch = [&](const float* of, int64_t i) {
      const volatile float* row = of + ((b * c.slots + i) * c.Hkv + h) * c.D;
      for (int64_t d = 0; d < (g - h) * c.D; d += 16) static_cast<void>(row[d]);
    };
    for (int64_t i = a; i < z; i++) touch(c.v, i);
    for (int64_t i = z; i < std::min(2 * z - a, end); i++) touch(c.k, i);
  }

  float* output(int64_t b, int64_t head, int64_t n) const { return c.y + at(b, head, n); }

  void start(int64_t b, const Queries& t, float* rows) const {
    scaled_panel(c.q, b, t.head, t, rows, t.q);
    if (c.far) scaled_panel(c.far, b, t.head, t, rows, t.far);
    std::memset(t.o, 0, PANEL * c.D * sizeof(float));
    std::fill_n(t.m, PANEL, -FLT_MAX), std::fill_n(t.l, PANEL, 0.0f);
  }

  // Slots of one block meet a tile: those that some of its queries see.
  void block(int64_t b, const Queries& t, const Span& s, bool sinks, float* p) const {
    if (s.empty()) return;
    const bool half = t.lanes <= 8;
    const int64_t ld = c.Hkv * c.D, from = keys(b, t.head, s), n = s.z - s.a;
    panel_product(0, rows(s), c.D, c.k + from, ld, 1, sinks && c.far ? t.far : t.q, half,
                  [&](int64_t r, auto& acc) { store_rows(p, r, acc); });
    float shrink[PANEL];
    for (int64_t v = 0; v < (half ? 8 : PANEL); v += 8) {
      const f8 late = load(t.late + v);
      softmax(p + v, n, t.m + v, t.l + v, shrink + v, s, [&](int64_t i) { return hidden(s, t, late, i); });
    }
    if (t.lanes <= FEW) return weigh_few(t, c.v + from, ld, p, n, shrink);
    weighed(s, c.v + from, ld, p, p, half, [&](int64_t r, auto& acc) { join(t.o + r * PANEL, shrink, acc); });
  }

  // rows of o <- shrink o + acc
  template <class V, int MR, int NV>
  static HK_INLINE void join(float* o, const float* shrink, const V (&acc)[MR][NV]) {
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < NV; v++) {
        float* to = o + i * PANEL + v * LANES<V>;
        store(to, fma(load_as<V>(to), load_as<V>(shrink + v * LANES<V>), acc[i][v]));
      }
  }

  // Scores s [n][16], of 8 lanes, become p = 2^(s - m), -0 where hidden; shrink: 2^(m before - m now).
  template <class Hidden>
  static HK_INLINE void softmax(float* s, int64_t n, float* m, float* l, float* shrink, const Span& span,
                                Hidden hidden) {
    span.edges([&](int64_t i) { store(s + i * PANEL, by_sign(hidden(i), load(s + i * PANEL), all(-INFINITY))); });
    const f8 before = load(m);
    f8 now = before, sum = all(0);
    for (int64_t i = 0; i < n; i++) now = most(load(s + i * PANEL), now);
    for (int64_t i = 0; i < n; i++) {
      const f8 x = abs(exp2(load(s + i * PANEL) - now));  // a NaN has any sign
      sum += x;
      store(s + i * PANEL, x);
    }
    span.edges([&](int64_t i) { store(s + i * PANEL, by_sign(hidden(i), load(s + i * PANEL), all(-0.0f))); });
    const f8 factor = by_sign(before - now, all(1), exp2(before - now));  // exp2(0) is not 1 to the last bit
    store(l, fma(load(l), factor, sum));
    store(m, now);
    store(shrink, factor);
  }

  // o <- shrink o + sum of p v for a few lanes, as when a token is decoded: the lanes of a vector are numbers of v.
  void weigh_few(const Queries& t, const float* values, int64_t ld, const float* p, int64_t n,
                 const float* shrink) const {
    for (int64_t j = 0; j < t.lanes; j++) {
      int64_t d = 0;
      auto columns = [&](auto count) {
        constexpr int NV = decltype(count)::value;
        for (; d + 8 * NV <= c.D; d += 8 * NV) {
          f8 acc[NV] = {};
          for (int64_t i = 0; i < n; i++) {
            const float weight = p[i * PANEL + j];
            if (std::signbit(weight)) continue;
            for (int v = 0; v < NV; v++) acc[v] = fma(all(weight), load(values + i * ld + d + 8 * v), acc[v]);
          }
          float sums[8 * NV];
          for (int v = 0; v < NV; v++) store(sums + 8 * v, acc[v]);
          for (int i = 0; i < 8 * NV; i++) {
            float& to = t.o[(d + i) * PANEL + j];
            to = std::fma(to, shrink[j], sums[i]);
          }
        }
      };
      columns(std::integral_constant<int, 4>()), columns(std::integral_constant<int, 1>());
      for (; d < c.D; d++) {
        float sum = 0, &to = t.o[d * PANEL + j];
        for (int64_t i = 0; i < n; i++)
          if (!std::signbit(p[i * PANEL + j])) sum = std::fma(p[i * PANEL + j], values[i * ld + d], sum);
        to = std::fma(to, shrink[j], sum);
      }
    }
  }

  void finish(int64_t b, const Queries& t, float* rows) const {
    for (int64_t v = 0; v < PANEL; v += 8) {
      const f8 factor = all(1) / load(t.l + v);
      for (int64_t d = 0; d < c.D; d++) store(t.o + d * PANEL + v, load(t.o + d * PANEL + v) * factor);
    }
    store_lanes(t.o, rows, c.D, c.D, 0, PANEL);
    for (int64_t j = 0; j < t.lanes; j++)
      std::memcpy(output(b, t.head, t.first + j), rows + j * c.D, c.D * sizeof(float));
    for (int64_t j = 0; c.most && j < t.lanes; j++) {
      const int64_t query = at(b, t.head, t.first + j) / c.D;
      c.most[query] = t.m[j], c.sum[query] = t.l[j];
    }
  }
};
