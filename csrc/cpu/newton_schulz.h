// Newton-Schulz of one matrix: what is compiled for each width of vectors (width.h).
//
//     x = g / max(|g|, 1e-7), transposed if it is tall;  five times  G = x x^T,  P = b G + c G^2,  x <- P x + a x
//
// x [m, n] lies in rows, padded to whole panels, and is replaced in place: a product reads columns of what it is
// multiplied by, which are first copied into panels, two at a time. G and P are symmetric bit for bit (fma(p, q, s) is
// fma(q, p, s)), so of their columns in two panels only the rows from there on are computed, and mirrored. Every number
// is one chain in ascending order, whatever the threads, which share the columns of a product and wait for each other
// after it. m n (2 m + m) + m^3 FMAs a step, of which half of G and G^2 are spared.
#pragma once
#include <algorithm>
#include <cstring>

#include "panel.h"
#include "team.h"

class NewtonSchulz {
 public:
  NewtonSchulz(int64_t r, int64_t c)
      : r(r), c(c), m(std::min(r, c)), n(std::max(r, c)), mp(padded(m)), np(padded(n)) {}

  static int64_t team(int64_t r, int64_t c, int64_t threads) {
    const int64_t m = std::min(r, c), n = std::max(r, c);
    return team_for(1.0 * m * m * n, ALONE_ORTHOGONAL, std::clamp<int64_t>((n + PAIR - 1) / PAIR, 1, threads));
  }
  int64_t floats(int64_t team) const { return m * (np + 2 * mp) + team * n * PAIR; }

  // to = NS(from), whose norm is given; `to` may be `from`. work: floats(team) zeros.
  void run(int64_t team, const float* from, float norm, float* to, float* work) const {
    Barrier barrier;
    in_parallel(static_cast<int>(team), [&](int id, int size) { part({id, size, &barrier}, from, norm, to, work); });
  }

 private:
  static constexpr int STEPS = 5;
  static constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;
  static constexpr int64_t PAIR = 2 * PANEL;
  const int64_t r, c, m, n, mp, np;

  static int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

  void part(const Team& team, const float* from, float norm, float* to, float* work) const {
    const FlushDenormals flush;
    float *x = work, *g = x + m * np, *p = g + m * mp, *panels = p + m * mp + team.id * n * PAIR;
    take_in(team, from, norm, x, panels);
    for (int step = 0; step < STEPS; step++) {
      team.sync();
      gram(team, x, panels, g);
      team.sync();
      polynomial(team, g, panels, p);
      team.sync();
      apply(team, p, panels, x);
    }
    team.sync();
    give_out(team, x, panels, to);
  }

  // f(at) for this thread's panels, or pairs of them, of n columns. Every second round goes the other way: the later
  // columns of a symmetric matrix are less work.
  template <class F>
  static void share(const Team& team, int64_t n, int64_t width, F f) {
    for (int64_t round = 0;; round++) {
      const int64_t place = round % 2 ? team.size - 1 - team.id : team.id;
      const int64_t at = (round * team.size + place) * width;
      if (at < n) f(at);
      if (round * team.size * width >= n) return;
    }
  }

  void take_in(const Team& team, const float* from, float norm, float* x, float* panel) const {
    const f8 divisor = all(std::max(norm, 1e-7f));  // NaN stays NaN
    if (r <= c) {
      const Range rows = team.share(0, m, 1);
      for (int64_t i = rows.begin; i < rows.end; i++) {
        std::memcpy(x + i * np, from + i * c, c * sizeof(float));
        for (int64_t j = 0; j < np; j += 8) store(x + i * np + j, load(x + i * np + j) / divisor);
      }
      return;
    }
    share(team, n, PANEL, [&](int64_t at) {
      load_lanes(panel, from + at * c, c, c, 0, std::min<int64_t>(PANEL, n - at));
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < PANEL; j += 8)
          store(x + i * np + at + j, load(panel + i * PANEL + j) / divisor);
    });
  }

  void give_out(const Team& team, const float* x, float* panel, float* to) const {
    if (r <= c) {
      const Range rows = team.share(0, m, 1);
      for (int64_t i = rows.begin; i < rows.end; i++) std::memcpy(to + i * c, x + i * np, c * sizeof(float));
      return;
    }
    share(team, n, PANEL, [&](int64_t at) {
      columns(x, np, at, panel);
      store_lanes(panel, to + at * c, c, c, 0, std::min<int64_t>(PANEL, n - at));
    });
  }

  void gram(const Team& team, const float* x, float* panels, float* g) const {
    share(team, m, PAIR, [&](int64_t at) {
      for (int64_t p = 0, i = at; p < 2 && i < m; p++, i += PANEL)
        load_lanes(panels + p * n * PANEL, x + i * np, np, n, 0, std::min<int64_t>(PANEL, m - i));
      product(at, at, m, n, x, np, panels,
              [&](int64_t row, int64_t column, auto v) { store(g + row * mp + column, v); });
      mirror(at, g);
    });
  }

  void polynomial(const Team& team, const float* g, float* panels, float* p) const {
    share(team, m, PAIR, [&](int64_t at) {
      for (int64_t i = 0; i < 2 && at + i * PANEL < m; i++) columns(g, mp, at + i * PANEL, panels + i * m * PANEL);
      product(at, at, m, m, g, mp, panels, [&](int64_t row, int64_t column, auto v) {
        using V = decltype(v);
        store(p + row * mp + column, fma(all_as<V>(C), v, all_as<V>(B) * load_as<V>(g + row * mp + column)));
      });
      mirror(at, p);
    });
  }

  void apply(const Team& team, const float* p, float* panels, float* x) const {
    share(team, n, PAIR, [&](int64_t at) {
      for (int64_t i = 0; i < 2 && at + i * PANEL < n; i++) columns(x, np, at + i * PANEL, panels + i * m * PANEL);
      product(at, 0, n, m, p, mp, panels, [&](int64_t row, int64_t column, auto v) {
        using V = decltype(v);
        float* to = x + row * np + column;
        store(to, fma(all_as<V>(A), load_as<V>(to), v));
      });
    });
  }

  // A panel of the columns from `at` on.
  void columns(const float* rows, int64_t ld, int64_t at, float* panel) const {
    for (int64_t i = 0; i < m; i++) std::memcpy(panel + i * PANEL, rows + i * ld + at, PANEL * sizeof(float));
  }

  // done(row, column, vector) of the product of rows [first, m) of L [m, K] and one or two panels [K], which are the
  // columns from `at` on of `end`.
  template <class Done>
  void product(int64_t at, int64_t first, int64_t end, int64_t K, const float* L, int64_t ld, const float* panels,
               Done done) const {
    auto tile = [&](int64_t p) {
      return [&, p](int64_t row, auto& acc) { each(row, at + p * PANEL, acc, done); };
    };
    if (at + PANEL < end) panel_products(first, m, K, L, ld, 1, panels, panels + K * PANEL, tile(0), tile(1));
    else panel_product(first, m, K, L, ld, 1, panels, false, tile(0));
  }

  template <class V, int MR, int NV, class Done>
  static HK_INLINE void each(int64_t row, int64_t column, const V (&acc)[MR][NV], Done& done) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) done(row + i, column + LANES<V> * v, acc[i][v]);
  }

  // Of a symmetric matrix [m, m] in rows mp apart, the rows from `at` on of two panels of columns, below the blocks
  // that are there, as columns of those rows.
  void mirror(int64_t at, float* s) const {
    for (int64_t i = at + PAIR; i < m; i += 8)
      for (int64_t j = at; j < at + PAIR; j += 8) {
        if (i + 8 <= m) transpose8(s + i * mp + j, mp, s + j * mp + i, mp);
        else
          for (int64_t row = i; row < m; row++)
            for (int64_t k = j; k < j + 8; k++) s[k * mp + row] = s[row * mp + k];
      }
  }
};
