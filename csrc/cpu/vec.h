// Vectors of eight floats, on whatever the machine has, and the activations on them. A value is the same chain of
// operations on every machine, each rounded as IEEE 754 has it, so it has the same bits.
#pragma once
#if defined(__aarch64__)
#include "vec_neon.h"
#else
#include "vec_x86.h"
#endif

// The same for a vector type V: a value is the same chain of operations in a vector of any width.
template <class V> constexpr int LANES = sizeof(V) / sizeof(float);
template <class V> V load_as(const float* p);
template <class V> V all_as(float x);
template <> HK_INLINE f8 load_as<f8>(const float* p) { return load(p); }
template <> HK_INLINE f8 all_as<f8>(float x) { return all(x); }
#ifdef HOPE_WIDE
template <> HK_INLINE f16 load_as<f16>(const float* p) { return _mm512_loadu_ps(p); }
template <> HK_INLINE f16 all_as<f16>(float x) { return _mm512_set1_ps(x); }
using widest = f16;
#else
using widest = f8;
#endif

// 2^y with relative error 8e-8: a polynomial fitted on [-1/2, 1/2], its exponent moved by the rest. 0 below
// -126.4 (a flushed denormal), as at 127.4 above it. NaN stays NaN: min and max return their second operand
// for it, and its low bits are zero.
template <class V>
HK_INLINE V exp2(V y) {
  y = most(all_as<V>(-126.4f), least(all_as<V>(127.4f), y));
  const V magic = all_as<V>(12582912.0f), shifted = y + magic;  // 1.5 2^23: the nearest integer is in the low bits
  const V f = y - (shifted - magic);
  V p = all_as<V>(1.32764028e-3f);
  p = fma(p, f, all_as<V>(9.67554079e-3f));
  p = fma(p, f, all_as<V>(5.55071349e-2f));
  p = fma(p, f, all_as<V>(2.40221197e-1f));
  p = fma(p, f, all_as<V>(6.93146967e-1f));
  p = fma(p, f, all_as<V>(1.00000007f));
  return scaled(p, shifted);
}

constexpr float LOG2_E = 1.44269504f;

enum Activation { GELU_TANH = 0, GELU = 1, SILU = 2 };

// e^-x for the sigmoid whose product with z is sigma(z); gelu_tanh(z) = z sigmoid(1.5957691 z + 0.0713548 z^3).
template <int ACT, class V>
HK_INLINE V decay_of(V z) {
  if constexpr (ACT == GELU_TANH)
    return exp2(z * fma(z * z, all_as<V>(-0.07135481628f * LOG2_E), all_as<V>(-1.595769122f * LOG2_E)));
  return exp2(z * all_as<V>(-LOG2_E));
}

// Phi(z) = 1/2 + z P(z^2) / Q(z^2) on |z| <= 5.54, a fit with error 2e-8; 1 - Phi(5.54) = 1.5e-8. Exactly 0
// below, where the fit's error times z would grow without bound; NaN stays NaN.
template <class V>
HK_INLINE V normal_cdf(V z) {
  const V c = most(all_as<V>(-5.54f), least(all_as<V>(5.54f), z)), u = c * c;
  V p = all_as<V>(1.10191847e-10f);
  p = fma(p, u, all_as<V>(-2.20367280e-8f));
  p = fma(p, u, all_as<V>(3.28741935e-6f));
  p = fma(p, u, all_as<V>(1.75107593e-4f));
  p = fma(p, u, all_as<V>(4.53987728e-3f));
  p = fma(p, u, all_as<V>(3.63899474e-2f));
  p = fma(p, u, all_as<V>(3.98942144e-1f));
  V q = all_as<V>(6.38543912e-5f);
  q = fma(q, u, all_as<V>(1.85839950e-3f));
  q = fma(q, u, all_as<V>(2.93641608e-2f));
  q = fma(q, u, all_as<V>(2.57880474e-1f));
  q = fma(q, u, all_as<V>(1.0f));
  return unless_below(z, -5.54f, all_as<V>(0.5f) + c * p / q);
}

template <int ACT, class V>
HK_INLINE V sigma(V z) {
  if constexpr (ACT == GELU) return z * normal_cdf(z);
  return z * (all_as<V>(1.0f) / (all_as<V>(1.0f) + decay_of<ACT>(z)));
}

// sigma and sigma' together.
template <int ACT, class V>
HK_INLINE V sigma(V z, V& slope) {
  if constexpr (ACT == GELU) {
    // the density is needed anyway, and Phi(-y) = density(y) P(y) / Q(y): Mills' ratio, a fit with error 9e-9
    // in Phi
    const V y = least(all_as<V>(20), abs(z));
    const V density = all_as<V>(0.39894228f) * exp2(z * z * all_as<V>(-0.5f * LOG2_E));
    const V p = fma(fma(all_as<V>(8.89502496e-2f), y, all_as<V>(4.66484117e-1f)), y, all_as<V>(1.25331416f));
    V q = all_as<V>(3.65479940e-4f);
    q = fma(q, y, all_as<V>(8.35882678e-2f));
    q = fma(q, y, all_as<V>(5.04545709e-1f));
    q = fma(q, y, all_as<V>(1.17008658f));
    q = fma(q, y, all_as<V>(1.0f));
    const V tail = density * p / q, gate = by_sign(z, all_as<V>(1.0f) - tail, tail);
    slope = fma(z, density, gate);
    return z * gate;
  }
  const V e = decay_of<ACT>(z), gate = all_as<V>(1.0f) / (all_as<V>(1.0f) + e), a = z * gate;
  V inner = all_as<V>(1.0f);  // derivative of the sigmoid's argument
  // where z^2 overflows, e gate is 0 and would meet an infinity
  if constexpr (ACT == GELU_TANH)
    inner = fma(least(all_as<V>(1e30f), z * z), all_as<V>(3 * 0.07135481628f), all_as<V>(1.595769122f));
  slope = fma(a * (e * gate), inner, gate);  // e gate is 1 - gate without its cancellation
  return a;
}

// sigma' and sigma'' together.
template <int ACT, class V>
HK_INLINE V slopes(V z, V& curve) {
  // beyond 30 sigma' is 0 or 1 and sigma'' is 0 in fp32, and their factors would meet as 0 and infinity
  const V c = most(all_as<V>(-30), least(all_as<V>(30), z)), square = c * c;
  if constexpr (ACT == GELU) {
    V slope;
    sigma<ACT>(c, slope);
    curve = all_as<V>(0.39894228f) * exp2(square * all_as<V>(-0.5f * LOG2_E)) * (all_as<V>(2) - square);
    return slope;
  }
  // with s = sigmoid(w(z)): s + z s (1 - s) w', and s (1 - s) (2 w' + z w'' + z (1 - 2 s) w'^2)
  const V e = decay_of<ACT>(c), gate = all_as<V>(1.0f) / (all_as<V>(1.0f) + e), rest = e * gate, both = gate * rest;
  if constexpr (ACT == GELU_TANH) {
    const V first = fma(square, all_as<V>(3 * 0.07135481628f), all_as<V>(1.595769122f));
    const V even = fma(square, all_as<V>(6 * 0.07135481628f), first + first);  // 2 w' + z w''
    curve = both * fma(c * (rest - gate), first * first, even);
    return fma(c * both, first, gate);
  }
  curve = both * fma(c, rest - gate, all_as<V>(2));
  return fma(c, both, gate);
}
