// y = x W^T on token rows: what is compiled for each width of vectors (width.h).
//
// Every output is one chain of FMAs over the inner index in ascending order, as on panels (product.h), so that a
// token has the same bits in any company. The lanes of a vector are outputs: rows of W are turned into strips of up
// to 64 outputs, [inputs][64], DEEP inputs at a time, in a buffer that stays in the cache while all tokens meet it. So
// weights lie nowhere twice, and nobody has to find out that they have changed. A chain goes on from what it has left
// in y.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "check.h"
#include "linear.h"
#include "panel.h"
#include "team.h"

class Linear {
 public:
  Linear(int64_t n, int64_t K, int64_t R, const float* x, const float* W, const float* more, float* y)
      : n(n), K(K), R(R), x(x), W(W), more(more), y(y) {}

  void run(int64_t threads) const {
    const int team = team_for(1.0 * n * K * R, ALONE_PRODUCTS, threads);
    // every task turns its own strip: not for fewer tokens than that pays for
    const int64_t strips = (R + WIDEST - 1) / WIDEST;
    const int64_t parts = team == 1 ? 1 : std::clamp<int64_t>(n / FEW, 1, (4 * team + strips - 1) / strips);
    auto task = [&](int64_t i) {
      const int64_t part = i % parts;
      strip(i / parts * WIDEST, n * part / parts, n * (part + 1) / parts);
    };
    if (team == 1) {
      for (int64_t i = 0; i < strips; i++) task(i);
      return;
    }
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < strips * parts; i++) task(i);
  }

 private:
  static constexpr int64_t WIDEST = 64, DEEP = 512, SHALLOW = 64, SHORT = 1024, FEW = 96, TILE = 6;
  const int64_t n, K, R;
  const float *x, *W, *more;
  float* y;

  // tokens [t0, t1) of the outputs from r on
  void strip(int64_t r, int64_t t0, int64_t t1) const {
    const FlushDenormals flush;
    alignas(64) static thread_local float turned[DEEP * WIDEST];
    const int64_t end = std::min(R, r + WIDEST), deep = t1 - t0 <= 4 * TILE && K <= SHORT ? SHALLOW : DEEP;
    for (; r + 16 <= end;) {
      const int64_t w = end - r >= 64 ? 64 : end - r >= 32 ? 32 : 16;
      each(r, w, w, deep, t0, t1, y + t0 * R + r, R, turned);
      r += w;
    }
    if (r == end) return;
    const int64_t rows = end - r;
    for (int64_t t = t0; t < t1; t += FEW) {  // outputs that fill no vector
      const int64_t stop = std::min(t1, t + FEW);
      alignas(64) float edge[FEW * 16];
      each(r, 16, rows, deep, t, stop, edge, 16, turned);
      for (int64_t i = t; i < stop; i++)
        for (int64_t j = 0; j < rows; j++)
          y[i * R + r + j] = edge[(i - t) * 16 + j] + (more ? more[i * R + r + j] : 0);
    }
  }

  // A strip of w outputs, of which there are `rows`, to `to`: [t1 - t0] rows ldy apart.
  void each(int64_t r, int64_t w, int64_t rows, int64_t deep, int64_t t0, int64_t t1, float* to, int64_t ldy,
            float* turned) const {
    for (int64_t k = 0; k < K; k += deep) {
      const int64_t depth = std::min(deep, K - k);
      turn(W + r * K + k, rows, depth, w, turned);
      const float* add = more && rows == w && k + depth == K ? more + t0 * R + r : nullptr;
      int64_t t = t0;
      auto tiles = [&](auto height) {
        constexpr int MR = decltype(height)::value;
        for (; t + MR <= t1; t += MR) {
          const int64_t at = t - t0;
          tile<MR>(depth, x + t * K + k, turned, w, to + at * ldy, ldy, k > 0, add ? add + at * R : nullptr);
        }
      };
      tiles(std::integral_constant<int, TILE>()), tiles(std::integral_constant<int, 2>());
      tiles(std::integral_constant<int, 1>());
    }
  }

  // to[k][w] = rows of W, K apart; zero where there is none
  void turn(const float* from, int64_t rows, int64_t depth, int64_t w, float* to) const {
    if (rows < w) std::memset(to, 0, depth * w * sizeof(float));
    const int64_t even = depth / 8 * 8;
    int64_t j = 0;
    for (; j + 8 <= rows; j += 8)
      for (int64_t k = 0; k < even; k += 8) transpose8(from + j * K + k, K, to + k * w + j, w);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = i < j ? even : 0; k < depth; k++) to[k * w + i] = from[i * K + k];
  }

  template <int MR>
  void tile(int64_t depth, const float* from, const float* strip, int64_t w, float* to, int64_t ldy, bool goes_on,
            const float* add) const {
    int64_t c = 0;
#ifdef HOPE_WIDE
    c = vectors<f16, MR, 4>(c, depth, from, strip, w, to, ldy, goes_on, add);
    c = vectors<f16, MR, 2>(c, depth, from, strip, w, to, ldy, goes_on, add);
    vectors<f16, MR, 1>(c, depth, from, strip, w, to, ldy, goes_on, add);
#else
    if (MR < TILE) c = vectors<f8, MR, 4>(c, depth, from, strip, w, to, ldy, goes_on, add);
    vectors<f8, MR, 2>(c, depth, from, strip, w, to, ldy, goes_on, add);
#endif
  }

  template <class V, int MR, int NV>
  HK_INLINE int64_t vectors(int64_t c, int64_t depth, const float* from, const float* strip, int64_t w, float* to,
                            int64_t ldy, bool goes_on, const float* add) const {
    for (; c + NV * LANES<V> <= w; c += NV * LANES<V>) {
      V acc[MR][NV] = {};
      if (goes_on) each_vector(acc, to + c, ldy, [](V& a, float* p) { a = load_as<V>(p); });
      accumulate<MR, NV, V>(depth, from, K, 1, strip + c, w, acc);
      if (add) each_vector(acc, add + c, R, [](V& a, const float* p) { a = a + load_as<V>(p); });
      each_vector(acc, to + c, ldy, [](V& a, float* p) { store(p, a); });
    }
    return c;
  }

  template <class V, int MR, int NV, class P, class F>
  static HK_INLINE void each_vector(V (&acc)[MR][NV], P* p, int64_t ld, F f) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) f(acc[i][v], p + i * ld + v * LANES<V>);
  }
};
