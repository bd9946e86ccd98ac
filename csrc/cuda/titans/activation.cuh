// sigma of the memories' hidden layer, and its derivative, on eight numbers of a thread.
#pragma once
#include "../simt.cuh"

namespace hope {

HOPE_DEVICE float sigmoid(float x) { return divide(1.f, 1.f + exp_(-x)); }

// z becomes sigma(z); slope, if wanted, sigma'(z). About 10 instructions a number with gelu_tanh: one tanh
// gives both.
template <int ACT, bool SLOPE> HOPE_DEVICE void activate(float (&z)[8], float (&slope)[8]) {
  if constexpr (ACT == kGeluTanh) {
    constexpr float c = 0.7978845608028654f, b = 0.044715f;  // sqrt(2 / pi)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = z[i], x2 = x * x;
      const float t = tanh_fast(x * fma_(c * b, x2, c)), cdf = fma_(0.5f, t, 0.5f);
      if (SLOPE) slope[i] = fma_(0.5f * x * fma_(-t, t, 1.f), fma_(3.f * c * b, x2, c), cdf);
      z[i] = x * cdf;
    }
  } else if constexpr (ACT == kGelu) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // erfc by Abramowitz and Stegun 7.1.26 (error 1.5e-7), whose exponential is the density's
      const float x = z[i], y = 0.7071067811865476f * (x < 0.f ? -x : x), density = exp_(-y * y);
      const float t = divide(1.f, fma_(0.3275911f, y, 1.f));
      const float series =
          fma_(fma_(fma_(fma_(1.061405429f, t, -1.453152027f), t, 1.421413741f), t, -0.284496736f), t,
               0.254829592f);
      const float tail = 0.5f * series * t * density, cdf = x < 0.f ? tail : 1.f - tail;
      if (SLOPE) slope[i] = fma_(x * 0.3989422804014327f, density, cdf);  // 1 / sqrt(2 pi)
      z[i] = x * cdf;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = z[i], s = sigmoid(x);
      if (SLOPE) slope[i] = s * fma_(x, 1.f - s, 1.f);
      z[i] = x * s;
    }
  }
}

}  // namespace hope
