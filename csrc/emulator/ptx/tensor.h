// mma.sync: d[16][8] = a[16][16] b[16][8] + c, products and sums in fp32 (numbers.h).
#pragma once
#include "exchange.h"

namespace hope::ptx {

// operands: d x 4, a x 4, b x 2, c x 4
template <class T> inline Next product_16x8x16(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  const int32_t* o = i.operands;
  float a[16][16], b[16][8], c[16][8];
  for (int k = 0; k < 4; ++k) {
    const uint32_t* s = lanes_of<uint32_t>(w, o[4 + k]);
    const float* acc = static_cast<float*>(w.lanes(o[10 + k]));
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      a[g + 8 * (k % 2)][t + 8 * (k / 2)] = value(T{static_cast<uint16_t>(s[lane])});
      a[g + 8 * (k % 2)][t + 1 + 8 * (k / 2)] = value(T{static_cast<uint16_t>(s[lane] >> 16)});
      c[g + 8 * (k / 2)][t + k % 2] = acc[lane];
    }
  }
  for (int k = 0; k < 2; ++k) {
    const uint32_t* s = lanes_of<uint32_t>(w, o[8 + k]);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      b[t + 8 * k][g] = value(T{static_cast<uint16_t>(s[lane])});
      b[t + 1 + 8 * k][g] = value(T{static_cast<uint16_t>(s[lane] >> 16)});
    }
  }
  emulator::product_16x8x16(c, a, b);
  for (int k = 0; k < 4; ++k) {
    float* d = static_cast<float*>(w.lanes(o[k]));
    for (int lane = 0; lane < 32; ++lane) d[lane] = c[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2];
  }
  return Next::kFollowing;
}

inline void add_tensor(Forms& f) {
  f["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {product_16x8x16<Brain>, true};
  f["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {product_16x8x16<Half>, true};
}

}  // namespace hope::ptx
