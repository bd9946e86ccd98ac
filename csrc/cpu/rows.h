// A row of numbers at a time, of a width that is a multiple of 8: what surrounds the memories, for one token.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

constexpr float NORM_EPS = 1e-6f;

HK_INLINE float dot(const float* a, const float* b, int64_t n) {
  f8 s = all(0);
  for (int64_t i = 0; i < n; i += 8) s = fma(load(a + i), load(b + i), s);
  return total(s);
}

// 1 / sqrt(mean(x^2) + eps)
HK_INLINE float rms_factor(const float* x, int64_t n, float eps = NORM_EPS) {
  return 1 / std::sqrt(dot(x, x, n) / n + eps);
}

// y = layernorm(x) gain + shift, its sums in the order that a panel has them: four chains each
inline void layer_norm_row(const float* x, int64_t n, float eps, const float* gain, const float* shift, float* y) {
  const FlushDenormals flush;
  float sum[4] = {}, squares[4] = {};
  for (int64_t i = 0; i < n; i++) sum[i % 4] += x[i];
  const f8 mean = all(((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n));
  for (int64_t i = 0; i < n; i += 8) store(y + i, load(x + i) - mean);
  for (int64_t i = 0; i < n; i++) squares[i % 4] = std::fma(y[i], y[i], squares[i % 4]);
  const float variance = ((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  const f8 factor = all(1 / std::sqrt(variance + eps));
  for (int64_t i = 0; i < n; i += 8) store(y + i, load(y + i) * factor * load(gain + i) + load(shift + i));
}

// y = x / max(|x|, 1e-6)
HK_INLINE void unit_row(const float* x, int64_t n, float* y) {
  const f8 factor = all(1 / std::max(NORM_EPS, std::sqrt(dot(x, x, n))));
  for (int64_t i = 0; i < n; i += 8) store(y + i, load(x + i) * factor);
}

// y = rmsnorm(o) gain silu(gate) of one head; gain null: no norm; gate null: no gate
HK_INLINE void gate_row(const float* o, const float* gain, const float* gate, int64_t n, float* y) {
  const f8 factor = all(gain ? rms_factor(o, n) : 1);
  for (int64_t i = 0; i < n; i += 8) {
    f8 x = load(o + i) * factor;
    if (gain) x = x * load(gain + i);
    if (gate) x = x * sigma<SILU>(load(gate + i));
    store(y + i, x);
  }
}
