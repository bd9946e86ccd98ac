// Eight floats at a time with AVX2 and FMA; with HOPE_WIDE also sixteen (AVX-512).
#pragma once
#include <immintrin.h>

#include <cstdint>

#define HK_INLINE inline __attribute__((always_inline))

using f8 = __m256;

HK_INLINE f8 all(float x) { return _mm256_set1_ps(x); }
HK_INLINE f8 load(const float* p) { return _mm256_loadu_ps(p); }
HK_INLINE void store(float* p, f8 x) { _mm256_storeu_ps(p, x); }
HK_INLINE f8 fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
HK_INLINE f8 fnma(f8 a, f8 b, f8 c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
HK_INLINE f8 fms(f8 a, f8 b, f8 c) { return _mm256_fmsub_ps(a, b, c); }    // a b - c
HK_INLINE f8 abs(f8 x) { return _mm256_andnot_ps(all(-0.0f), x); }
HK_INLINE f8 root(f8 x) { return _mm256_sqrt_ps(x); }
// The smaller, the larger; b where one of them is NaN.
HK_INLINE f8 least(f8 a, f8 b) { return _mm256_min_ps(a, b); }
HK_INLINE f8 most(f8 a, f8 b) { return _mm256_max_ps(a, b); }
// a, or b where the sign of z is set.
HK_INLINE f8 by_sign(f8 z, f8 a, f8 b) { return _mm256_blendv_ps(a, b, z); }
// a, or 0 where z <= limit.
HK_INLINE f8 unless_below(f8 z, float limit, f8 a) {
  return _mm256_and_ps(a, _mm256_cmp_ps(z, all(limit), _CMP_NLE_UQ));
}
// x with the low bits of n added to its exponent.
HK_INLINE f8 scaled(f8 x, f8 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}

#ifdef HOPE_WIDE
using f16 = __m512;
HK_INLINE void store(float* p, f16 x) { _mm512_storeu_ps(p, x); }
HK_INLINE f16 fma(f16 a, f16 b, f16 c) { return _mm512_fmadd_ps(a, b, c); }
HK_INLINE f16 fnma(f16 a, f16 b, f16 c) { return _mm512_fnmadd_ps(a, b, c); }
HK_INLINE f16 fms(f16 a, f16 b, f16 c) { return _mm512_fmsub_ps(a, b, c); }
HK_INLINE f16 abs(f16 x) { return _mm512_abs_ps(x); }
HK_INLINE f16 root(f16 x) { return _mm512_sqrt_ps(x); }
HK_INLINE f16 least(f16 a, f16 b) { return _mm512_min_ps(a, b); }
HK_INLINE f16 most(f16 a, f16 b) { return _mm512_max_ps(a, b); }
HK_INLINE f16 by_sign(f16 z, f16 a, f16 b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(z)), a, b);
}
HK_INLINE f16 unless_below(f16 z, float limit, f16 a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_set1_ps(limit), _CMP_NLE_UQ), a);
}
HK_INLINE f16 scaled(f16 x, f16 n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
#endif

// The sum of the eight: of those four apart, then of those two apart, then of two neighbours.
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

HK_INLINE void pause() { _mm_pause(); }

// Eight numbers as bf16, rounded to the nearest, ties to even; NaN stays NaN.
HK_INLINE void store_bf16(uint16_t* p, f8 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i top = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// An 8 x 8 block: dst[j][i] = src[i][j], rows lds and ldd floats apart.
HK_INLINE void transpose8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  f8 r[8], s[8];  // r: rows i and i + 4, first their columns 0 .. 3, then 4 .. 7
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const float *low = src + i * lds, *high = low + 4 * lds;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
    r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    store(dst + i * ldd, _mm256_shuffle_ps(s[i], s[i + 2], 0x44));
    store(dst + (i + 1) * ldd, _mm256_shuffle_ps(s[i], s[i + 2], 0xEE));
    store(dst + (i + 2) * ldd, _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44));
    store(dst + (i + 3) * ldd, _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE));
  }
}
