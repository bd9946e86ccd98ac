// eta and alpha of a token from the outputs of their memories, in double precision and with operations that IEEE 754
// rounds in one way: exp and log1p of the system's library have other bits on other machines.
#pragma once
#include <cmath>
#include <cstring>

#include "call.h"

// Four at a time, which the vectors of every CPU that runs this hold.
typedef double doubles __attribute__((vector_size(32)));
typedef uint64_t words __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(16)));

// e^z to an ulp of a float and better, for |z| up to 700; NaN stays NaN.
inline __attribute__((always_inline)) doubles exp_of(doubles z) {
  constexpr double COEFFICIENTS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                     1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1, 1};
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 2^52: the nearest integer is in the low bits
  z = z < -700.0 ? doubles{} - 700.0 : z;
  z = z > 700.0 ? doubles{} + 700.0 : z;
  const doubles shifted = z * 1.4426950408889634 + MAGIC, f = z - (shifted - MAGIC) * 0.6931471805599453;
  doubles sum{};
  for (double c : COEFFICIENTS) sum = sum * f + c;
  return sum * (doubles)(((words)shifted + 1023) << 52);
}

inline double exp_of(double z) { return exp_of(doubles{z, z, z, z})[0]; }

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

// scale sigmoid(raw + bias) of n tokens
inline void sigmoids(const float* raw, float bias, float scale, int64_t n, float* to) {
  for (; n >= 4; n -= 4, raw += 4, to += 4) {
    floats z;
    std::memcpy(&z, raw, sizeof z);
    const doubles y = 1.0 / (1.0 + exp_of(__builtin_convertvector(-(z + bias), doubles)));
    z = scale * __builtin_convertvector(y, floats);
    std::memcpy(to, &z, sizeof z);
  }
  for (int64_t i = 0; i < n; i++) to[i] = scale * sigmoid(raw[i] + bias);
}

// eta_of and alpha_of of n tokens
inline void etas_of(const TitansCall& c, const float* raw, float bias, int64_t n, float* to) {
  if (!c.softplus) return sigmoids(raw, bias, c.eta_scale, n, to);
  for (int64_t i = 0; i < n; i++) to[i] = eta_of(c, raw[i], bias);
}

inline void alphas_of(const TitansCall& c, const float* raw, float bias, int64_t n, float* to) {
  if (c.retention) return sigmoids(raw, bias, 1, n, to);
  for (int64_t i = 0; i < n; i++) to[i] = 1;
}
