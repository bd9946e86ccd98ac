// Eight floats at a time as two NEON vectors (aarch64): the same chains of operations as vec_x86.h, so the same bits.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#define HK_INLINE inline __attribute__((always_inline))

struct f8 {
  float32x4_t low, high;
};

HK_INLINE f8 operator+(f8 a, f8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
HK_INLINE f8 operator-(f8 a, f8 b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
HK_INLINE f8 operator*(f8 a, f8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
HK_INLINE f8 operator/(f8 a, f8 b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
HK_INLINE f8 operator-(f8 a) { return {vnegq_f32(a.low), vnegq_f32(a.high)}; }
HK_INLINE f8& operator+=(f8& a, f8 b) { return a = a + b; }
HK_INLINE f8& operator-=(f8& a, f8 b) { return a = a - b; }
HK_INLINE f8& operator*=(f8& a, f8 b) { return a = a * b; }

HK_INLINE f8 all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
HK_INLINE f8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
HK_INLINE void store(float* p, f8 x) {
  vst1q_f32(p, x.low);
  vst1q_f32(p + 4, x.high);
}
HK_INLINE f8 fma(f8 a, f8 b, f8 c) {  // a b + c
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
HK_INLINE f8 fnma(f8 a, f8 b, f8 c) {  // c - a b
  return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
HK_INLINE f8 fms(f8 a, f8 b, f8 c) { return fma(a, b, -c); }  // a b - c
HK_INLINE f8 abs(f8 x) { return {vabsq_f32(x.low), vabsq_f32(x.high)}; }
HK_INLINE f8 root(f8 x) { return {vsqrtq_f32(x.low), vsqrtq_f32(x.high)}; }
// The smaller, the larger; b where one of them is NaN.
HK_INLINE f8 least(f8 a, f8 b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
HK_INLINE f8 most(f8 a, f8 b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}

HK_INLINE int32x4_t bits(float32x4_t x) { return vreinterpretq_s32_f32(x); }
HK_INLINE float32x4_t number(int32x4_t x) { return vreinterpretq_f32_s32(x); }

// a, or b where the sign of z is set.
HK_INLINE f8 by_sign(f8 z, f8 a, f8 b) {
  return {vbslq_f32(vcltzq_s32(bits(z.low)), b.low, a.low), vbslq_f32(vcltzq_s32(bits(z.high)), b.high, a.high)};
}
// a, or 0 where z <= limit.
HK_INLINE f8 unless_below(f8 z, float limit, f8 a) {
  const float32x4_t most = vdupq_n_f32(limit), zero = vdupq_n_f32(0);
  return {vbslq_f32(vcleq_f32(z.low, most), zero, a.low), vbslq_f32(vcleq_f32(z.high, most), zero, a.high)};
}
// x with the low bits of n added to its exponent.
HK_INLINE f8 scaled(f8 x, f8 n) {
  return {number(vaddq_s32(bits(x.low), vshlq_n_s32(bits(n.low), 23))),
          number(vaddq_s32(bits(x.high), vshlq_n_s32(bits(n.high), 23)))};
}

// The sum of the eight: of those four apart, then of those two apart, then of two neighbours.
HK_INLINE float total(f8 x) {
  const float32x4_t a = vaddq_f32(x.low, x.high);
  const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}

// Denormal numbers count as zero while one of these lives, in operands and results.
class FlushDenormals {
 public:
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" ::"r"(before_ | uint64_t{1} << 24));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
};

HK_INLINE void pause() { __asm__ volatile("yield"); }

// Four numbers as bf16, rounded to the nearest, ties to even; NaN stays NaN.
HK_INLINE uint16x4_t bf16_of(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t top = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), top, vdupq_n_u32(0x7FC0)));
}
HK_INLINE void store_bf16(uint16_t* p, f8 x) {
  vst1_u16(p, bf16_of(x.low));
  vst1_u16(p + 4, bf16_of(x.high));
}

// A 4 x 4 block: dst[j][i] = src[i][j].
HK_INLINE void transpose4(const float* src, int64_t lds, float* dst, int64_t ldd) {
  const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + lds), c = vld1q_f32(src + 2 * lds),
                    d = vld1q_f32(src + 3 * lds);
  const float32x4x2_t ab = vtrnq_f32(a, b), cd = vtrnq_f32(c, d);
  for (int i = 0; i < 2; i++) {
    vst1q_f32(dst + i * ldd, vcombine_f32(vget_low_f32(ab.val[i]), vget_low_f32(cd.val[i])));
    vst1q_f32(dst + (i + 2) * ldd, vcombine_f32(vget_high_f32(ab.val[i]), vget_high_f32(cd.val[i])));
  }
}
// An 8 x 8 block, rows lds and ldd floats apart.
HK_INLINE void transpose8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 8; j += 4) transpose4(src + i * lds + j, lds, dst + j * ldd + i, ldd);
}
