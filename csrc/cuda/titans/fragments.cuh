// Weights and tokens as tensor cores want them.
//
// POSITIONS. Along D and along hidden units, place p of a fragment or of a shared-memory row holds index
// P(p), within every 16:
//     p   0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14 15
//     P   0  1  4  5  8  9 12 13 | 2  3  6  7 10 11 14 15
// Any order is as good as another where it is summed over, as long as both operands share it; in this one the
// four numbers that a lane holds of a row of a 16 x 16 block are neighbours in memory: 16 bytes of a
// deviation, 8 of a base weight, whole 32-byte sectors a row. Tokens keep their order.
//
// BLOCKS. A 16 x 16 block of a weight matrix is eight floats of a lane: f[0..3] are the accumulators c of mma
// for columns 0..7, f[4..7] for columns 8..15. Rounded to T it is a Word4 {rows 0-7, cols 0-7 | rows 8-15,
// cols 0-7 | rows 0-7, cols 8-15 | rows 8-15, cols 8-15}: as it stands the operand a of mma (rows = m,
// columns = k), and the two operands b for n = rows 0..7 (x, z) and 8..15 (y, w), k = columns. So a weight is
// accumulator of its update and operand of every product without leaving the warp; for k = rows its quarters
// are transposed.
#pragma once
#include "../simt.cuh"
#include "plan.h"

namespace hope {

// Index of the first of a lane's four numbers in row `half` (0: row g, 1: row g + 8) of a block of a matrix
// with `stride` numbers a row.
HOPE_DEVICE int block_offset(int lane, int half, int stride) {
  const int g = lane >> 2, t = lane & 3;
  return (4 * (g >> 1) + (g & 1) + 2 * half) * stride + 4 * t;
}

HOPE_DEVICE void load_block(float (&f)[8], const float* p, int stride, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Float4 r = *reinterpret_cast<const Float4*>(p + block_offset(lane, half, stride));
    f[2 * half] = r.x, f[2 * half + 1] = r.y, f[2 * half + 4] = r.z, f[2 * half + 5] = r.w;
  }
}

HOPE_DEVICE void store_block(const float (&f)[8], float* p, int stride, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    *reinterpret_cast<Float4*>(p + block_offset(lane, half, stride)) = {f[2 * half], f[2 * half + 1],
                                                                        f[2 * half + 4], f[2 * half + 5]};
}

// A block of the transposed matrix: rows become columns.
HOPE_DEVICE int transposed_offset(int lane, int stride) {
  const int g = lane >> 2, t = lane & 3;
  return 4 * t * stride + 4 * (g >> 1) + (g & 1);
}
HOPE_DEVICE int transposed_step(int i, int stride) { return ((i & 1) + 2 * (i >> 2)) * stride + 2 * (i >> 1 & 1); }
HOPE_DEVICE void load_block_transposed(float (&f)[8], const float* p, int stride, int lane) {
  p += transposed_offset(lane, stride);
#pragma unroll
  for (int i = 0; i < 8; ++i) f[i] = p[transposed_step(i, stride)];
}
HOPE_DEVICE void store_block_transposed(const float (&f)[8], float* p, int stride, int lane) {
  p += transposed_offset(lane, stride);
#pragma unroll
  for (int i = 0; i < 8; ++i) p[transposed_step(i, stride)] = f[i];
}

template <class T> HOPE_DEVICE Word4 load_block16(const T* p, int stride, int lane) {
  const Word2 r0 = *reinterpret_cast<const Word2*>(p + block_offset(lane, 0, stride));
  const Word2 r1 = *reinterpret_cast<const Word2*>(p + block_offset(lane, 1, stride));
  return {r0.x, r1.x, r0.y, r1.y};
}

template <class T> HOPE_DEVICE Word4 round_block(const float (&f)[8]) {
  return {pack2<T>(f[0], f[1]), pack2<T>(f[2], f[3]), pack2<T>(f[4], f[5]), pack2<T>(f[6], f[7])};
}

// The converse: the numbers of a rounded block.
template <class T> HOPE_DEVICE void unpack_block(float (&f)[8], Word4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Float2 pair = unpack2<T>(words[i]);
    f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
  }
}

// base + deviation, rounded.
template <class T> HOPE_DEVICE Word4 round_block(const float (&f)[8], Word4 base) {
  float sum[8];
  unpack_block<T>(sum, base);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += f[i];
  return round_block<T>(sum);
}

// Two numbers as sums of two bf16 each: the product of two such sums without that of the lower halves is right to
// 2^-16, whatever T is.
struct Halves {
  uint32_t high, low;
};
HOPE_DEVICE Halves halves(float a, float b) {
  const uint32_t high = pack2<bf16>(a, b);
  const Float2 rounded = unpack2<bf16>(high);
  return {high, pack2<bf16>(a - rounded.x, b - rounded.y)};
}

// Where index i, an even one, and i + 1 lie along D: position.
HOPE_DEVICE int position_of(int i) { return (i & ~15) + 8 * ((i >> 1) & 1) + 2 * ((i & 15) >> 2); }
// The index of an even position.
HOPE_DEVICE int index_of(int p) { return (p & ~15) + 2 * (p & 6) + 2 * ((p >> 3) & 1); }

// 16 tokens (rows) x 16 positions from column `c` of a tile: the operand a with tokens as m, and its transpose.
template <int D, class T> HOPE_DEVICE const T* corner(const T* tile, int c, int lane) {
  return tile + (lane & 15) * Width<D>::kRow + c + (lane >> 4) * 8;
}
// The same with the quarters in the order of operand b for n = tokens, k = positions; transposed, of operand
// a for m = positions, k = tokens.
template <int D, class T> HOPE_DEVICE const T* corner_b(const T* tile, int c, int lane) {
  return tile + ((lane & 7) + (lane >> 4) * 8) * Width<D>::kRow + c + ((lane >> 3) & 1) * 8;
}

}  // namespace hope
