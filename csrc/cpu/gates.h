// eta and alpha of a token from the outputs of their memories, in double precision and with operations that IEEE 754
// rounds in one way: exp and log1p of the system's library have other bits on other machines.
#pragma once
#include <cmath>
#include <cstring>

#include "call.h"

// e^z to an ulp of a float and better, for |z| up to 700; NaN stays NaN.
inline double exp_of(double z) {
  constexpr double COEFFICIENTS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                     1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1, 1};
  if (z != z) return z;
  z = z < -700 ? -700 : z > 700 ? 700 : z;
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 2^52: the nearest integer is in the low bits
  const double n = z * 1.4426950408889634 + MAGIC - MAGIC, f = z - n * 0.6931471805599453;
  double sum = 0, power;
  for (double c : COEFFICIENTS) sum = sum * f + c;
  const int64_t bits = (static_cast<int64_t>(n) + 1023) << 52;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// log(1 + y) for y >= 0, as exact; NaN stays NaN.
inline double log1p_of(double y) {
  if (!(y > 1e-5)) return y - y * y / 2;
  int exponent;
  double m = std::frexp(1 + y, &exponent);
  if (m < 0.7071067811865476) m *= 2, exponent--;
  const double s = (m - 1) / (m + 1), u = s * s;
  double sum = 0;
  for (int k = 19; k > 0; k -= 2) sum = sum * u + 1.0 / k;
  return exponent * 0.6931471805599453 + 2 * s * sum;
}

inline float sigmoid(float z) { return static_cast<float>(1 / (1 + exp_of(-z))); }

inline float eta_of(const TitansCall& c, float raw, float bias) {
  const float z = raw + bias;
  if (!c.softplus) return c.eta_scale * sigmoid(z);
  return c.eta_scale * (z > 20 ? z : static_cast<float>(log1p_of(exp_of(z))));
}

inline float alpha_of(const TitansCall& c, float raw, float bias) { return c.retention ? sigmoid(raw + bias) : 1; }
