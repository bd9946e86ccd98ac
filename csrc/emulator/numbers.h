// Numbers of 16 bits and the tensor cores' product, on a host.
#pragma once
#include <cstdint>
#include <cstring>

namespace hope::emulator {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// To nearest, ties to even. Every NaN becomes 0x7fff, as on the device.
inline uint32_t bf16_of(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}

inline uint32_t fp16_of(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // from half way between the largest number and the next power of two
  if (a >= 0x38800000u) {                       // normal: the exponent is rebased, a carry of the rounding runs into it
    const uint32_t rebased = a - 0x38000000u;
    return sign | ((rebased + 0xfffu + ((rebased >> 13) & 1)) >> 13);
  }
  const uint32_t exponent = a >> 23;  // subnormal: a multiple of 2^-24
  if (exponent < 102) return sign;    // below 2^-25
  const uint32_t shift = 126 - exponent, m = (a & 0x7fffffu) | 0x800000u;
  const uint32_t whole = m >> shift, low = m & ((1u << shift) - 1), half = 1u << (shift - 1);
  return sign | (whole + (low > half || (low == half && (whole & 1))));
}

inline float bf16_value(uint32_t h) { return float_of(h << 16); }

inline float fp16_value(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, a = h & 0x7fffu;
  if (a >= 0x7c00u) return float_of(sign | 0x7f800000u | ((a & 0x3ffu) << 13));
  if (a < 0x400u) return float_of(sign | bits_of(static_cast<float>(a) * 0x1p-24f));
  return float_of(sign | ((a << 13) + 0x38000000u));
}

// c[16][8] += a[16][16] b[16][8]: for every k in order, product and sum in fp32 (products of 8 or 11 bits are
// exact in its range).
inline void product_16x8x16(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  typedef float Four __attribute__((vector_size(16)));
  Four rows[16][2];
  std::memcpy(rows, b, sizeof rows);
  for (int m = 0; m < 16; ++m) {
    Four sums[2];
    std::memcpy(sums, c[m], sizeof sums);
    for (int k = 0; k < 16; ++k) {
      sums[0] += a[m][k] * rows[k][0];
      sums[1] += a[m][k] * rows[k][1];
    }
    std::memcpy(c[m], sums, sizeof sums);
  }
}

}  // namespace hope::emulator
