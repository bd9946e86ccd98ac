// Eight floats at a time (AVX2 + FMA), and the activations on them; with HOPE_WIDE also sixteen (AVX-512), for products.
#pragma once
#include <immintrin.h>

#define HK_INLINE inline __attribute__((always_inline))

using f8 = __m256;

HK_INLINE f8 all(float x) { return _mm256_set1_ps(x); }
HK_INLINE f8 load(const float* p) { return _mm256_loadu_ps(p); }
HK_INLINE void store(float* p, f8 x) { _mm256_storeu_ps(p, x); }
HK_INLINE f8 fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
HK_INLINE f8 fnma(f8 a, f8 b, f8 c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
HK_INLINE f8 abs(f8 x) { return _mm256_andnot_ps(all(-0.0f), x); }

HK_INLINE f8 fms(f8 a, f8 b, f8 c) { return _mm256_fmsub_ps(a, b, c); }    // a b - c

// The same for a vector type V: a value is the same chain of operations in a vector of any width.
template <class V> constexpr int LANES = sizeof(V) / sizeof(float);
template <class V> V load_as(const float* p);
template <class V> V all_as(float x);
template <> HK_INLINE f8 load_as<f8>(const float* p) { return load(p); }
template <> HK_INLINE f8 all_as<f8>(float x) { return all(x); }
#ifdef HOPE_WIDE
using f16 = __m512;
template <> HK_INLINE f16 load_as<f16>(const float* p) { return _mm512_loadu_ps(p); }
template <> HK_INLINE f16 all_as<f16>(float x) { return _mm512_set1_ps(x); }
HK_INLINE void store(float* p, f16 x) { _mm512_storeu_ps(p, x); }
HK_INLINE f16 fma(f16 a, f16 b, f16 c) { return _mm512_fmadd_ps(a, b, c); }
HK_INLINE f16 fms(f16 a, f16 b, f16 c) { return _mm512_fmsub_ps(a, b, c); }
#endif

// The sum of the eight.
HK_INLINE float total(f8 x) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

// Denormal numbers count as zero while one of these lives: they would cost a hundred times as much, and exp2
// relies on it.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// 1 / x to an ulp or so: the hardware's 12 bits, doubled by a Newton step. A division would take as long as
// ten of the products around it. 0 from 2^126 on, where the hardware flushes; NaN stays NaN.
HK_INLINE f8 reciprocal(f8 x) {
  f8 r = _mm256_rcp_ps(x);
  return fma(r, fnma(x, r, all(1.0f)), r);
}

// 2^y with relative error 8e-8: a polynomial fitted on [-1/2, 1/2], its exponent moved by the rest. 0 below
// -126.4 (a flushed denormal), as at 127.4 above it. NaN stays NaN: min and max return their second operand
// for it, and its low bits are zero.
HK_INLINE f8 exp2(f8 y) {
  y = _mm256_max_ps(all(-126.4f), _mm256_min_ps(all(127.4f), y));
  const f8 magic = all(12582912.0f), shifted = y + magic;  // 1.5 2^23: the nearest integer is in the low bits
  const f8 f = y - (shifted - magic);
  f8 p = all(1.32764028e-3f);
  p = fma(p, f, all(9.67554079e-3f));
  p = fma(p, f, all(5.55071349e-2f));
  p = fma(p, f, all(2.40221197e-1f));
  p = fma(p, f, all(6.93146967e-1f));
  p = fma(p, f, all(1.00000007f));
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

constexpr float LOG2_E = 1.44269504f;

enum Activation { GELU_TANH = 0, GELU = 1, SILU = 2 };

// e^-x for the sigmoid whose product with z is sigma(z); gelu_tanh(z) = z sigmoid(1.5957691 z + 0.0713548 z^3).
template <int ACT>
HK_INLINE f8 decay_of(f8 z) {
  if constexpr (ACT == GELU_TANH)
    return exp2(z * fma(z * z, all(-0.07135481628f * LOG2_E), all(-1.595769122f * LOG2_E)));
  return exp2(z * all(-LOG2_E));
}

// Phi(z) = 1/2 + z P(z^2) / Q(z^2) on |z| <= 5.54, a fit with error 2e-8; 1 - Phi(5.54) = 1.5e-8. Exactly 0
// below, where the fit's error times z would grow without bound; NaN stays NaN.
HK_INLINE f8 normal_cdf(f8 z) {
  const f8 c = _mm256_max_ps(all(-5.54f), _mm256_min_ps(all(5.54f), z)), u = c * c;
  f8 p = all(1.10191847e-10f);
  p = fma(p, u, all(-2.20367280e-8f));
  p = fma(p, u, all(3.28741935e-6f));
  p = fma(p, u, all(1.75107593e-4f));
  p = fma(p, u, all(4.53987728e-3f));
  p = fma(p, u, all(3.63899474e-2f));
  p = fma(p, u, all(3.98942144e-1f));
  f8 q = all(6.38543912e-5f);
  q = fma(q, u, all(1.85839950e-3f));
  q = fma(q, u, all(2.93641608e-2f));
  q = fma(q, u, all(2.57880474e-1f));
  q = fma(q, u, all(1.0f));
  return _mm256_and_ps(fma(c * p, reciprocal(q), all(0.5f)), _mm256_cmp_ps(z, all(-5.54f), _CMP_NLE_UQ));
}

template <int ACT>
HK_INLINE f8 sigma(f8 z) {
  if constexpr (ACT == GELU) return z * normal_cdf(z);
  return z * reciprocal(all(1.0f) + decay_of<ACT>(z));
}

// sigma and sigma' together.
template <int ACT>
HK_INLINE f8 sigma(f8 z, f8& slope) {
  if constexpr (ACT == GELU) {
    // the density is needed anyway, and Phi(-y) = density(y) P(y) / Q(y): Mills' ratio, a fit with error 9e-9
    // in Phi
    const f8 y = _mm256_min_ps(all(20), abs(z)), density = all(0.39894228f) * exp2(z * z * all(-0.5f * LOG2_E));
    const f8 p = fma(fma(all(8.89502496e-2f), y, all(4.66484117e-1f)), y, all(1.25331416f));
    f8 q = all(3.65479940e-4f);
    q = fma(q, y, all(8.35882678e-2f));
    q = fma(q, y, all(5.04545709e-1f));
    q = fma(q, y, all(1.17008658f));
    q = fma(q, y, all(1.0f));
    const f8 tail = density * p * reciprocal(q), gate = _mm256_blendv_ps(all(1.0f) - tail, tail, z);
    slope = fma(z, density, gate);
    return z * gate;
  }
  const f8 e = decay_of<ACT>(z), gate = reciprocal(all(1.0f) + e), a = z * gate;
  f8 inner = all(1.0f);  // derivative of the sigmoid's argument
  // where z^2 overflows, e gate is 0 and would meet an infinity
  if constexpr (ACT == GELU_TANH)
    inner = fma(_mm256_min_ps(all(1e30f), z * z), all(3 * 0.07135481628f), all(1.595769122f));
  slope = fma(a * (e * gate), inner, gate);  // e gate is 1 - gate without its cancellation
  return a;
}

// An 8 x 8 block: dst[j][i] = src[i][j], rows lds and ldd floats apart.
HK_INLINE void transpose8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  f8 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = load(src + i * lds);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    store(dst + i * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store(dst + (i + 4) * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
