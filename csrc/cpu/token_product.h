// Products of a decoder's step: every row of the batch with its matrix, which lies input by input in strips of outputs,
// so that a step reads it straight through.
#pragma once
#include <algorithm>

#include "team.h"

constexpr int64_t STRIP = 64;  // outputs of a weight that lie beside each other, input by input; the last has fewer

// The strip of `count` rows of W, K apart; of outputs that fill no vector the others are zero.
inline void turn_strip(const float* W, int64_t count, int64_t K, float* to) {
  const int64_t w = (count + 7) / 8 * 8, full = count / 8 * 8, even = K / 8 * 8;
  for (int64_t k = 0; k < even; k += 8)
    for (int64_t n = 0; n < full; n += 8) transpose8(W + n * K + k, K, to + k * w + n, w);
  for (int64_t k = 0; k < K; k++)
    for (int64_t n = k < even ? full : 0; n < w; n++) to[k * w + n] = n < count ? W[n * K + k] : 0;
}

// Outputs [j, j + 8 NV) of a strip `w` wide for NB rows x, K apart: one chain over the inputs each, as in panels.
template <int NB, int NV>
HK_INLINE void columns(int64_t K, const float* W, int64_t w, int64_t j, const float* x, float (*y)[STRIP]) {
  f8 acc[NB][NV] = {};
  W += j;
  for (int64_t k = 0; k < K; k++, W += w) {
    f8 a[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) a[v] = load(W + 8 * v);
#pragma GCC unroll 4
    for (int b = 0; b < NB; b++) {
      const f8 in = all(x[b * K + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[b][v] = fma(a[v], in, acc[b][v]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(y[b] + j + 8 * v, acc[b][v]);
}

template <int NB>
HK_INLINE void strip_product(int64_t K, const float* W, int64_t w, const float* x, float (*y)[STRIP]) {
  int64_t j = 0;
  if constexpr (NB == 1) {
    for (; j + 64 <= w; j += 64) columns<1, 8>(K, W, w, j, x, y);
    for (; j + 32 <= w; j += 32) columns<1, 4>(K, W, w, j, x, y);
  }
  for (; j + 16 <= w; j += 16) columns<NB, 2>(K, W, w, j, x, y);
  for (; j < w; j += 8) columns<NB, 1>(K, W, w, j, x, y);
}

// y_b = W_b x_b for every row b: done(b, r, the sum). weights(b): W_b [rows, K] in strips, or null: of this row nothing
// is wanted. Rows of the batch that share W take it together.
template <class Weights, class Done>
void product(const Team& team, int64_t B, int64_t rows, int64_t K, const float* x, Weights weights, Done done) {
  const FlushDenormals flush;
  const Range own = team.share(0, rows, STRIP);
  for (int64_t r = own.begin; r < own.end; r += STRIP) {
    const int64_t count = std::min(STRIP, rows - r), w = (count + 7) / 8 * 8;
    for (int64_t b = 0; b < B;) {
      const float* W = weights(b);
      if (!W) {
        b++;
        continue;
      }
      const bool four = b + 4 <= B && weights(b + 1) == W && weights(b + 2) == W && weights(b + 3) == W;
      float y[4][STRIP];
      four ? strip_product<4>(K, W + r * K, w, x + b * K, y) : strip_product<1>(K, W + r * K, w, x + b * K, y);
      for (int64_t i = 0; i < (four ? 4 : 1); i++, b++)
        for (int64_t n = 0; n < count; n++) done(b, r + n, y[i][n]);
    }
  }
}

// W, for every row
inline auto shared(const float* W) {
  return [W](int64_t) { return W; };
}
