// A warp's share of M(x) for 16 tokens: z = w2 x, a = sigma(z), y = w1 a, over the hidden units it owns.
//
// Tokens are the rows of every product (m = 16), so z leaves the tensor cores as what the next product takes
// for its operand a: only tokens come from shared memory. `Weights` says where rounded weights are: w2(g, s),
// units of group g by 16 positions s of D; w1(i, g), 16 positions i of D by units of group g. Prefill and
// decode differ in it and in nothing else, which is why they have the same bits. 4 D units x 16 FLOPs x 2; D
// / 16 ldmatrix a group.
#pragma once
#include "activation.cuh"
#include "fragments.cuh"

namespace hope {

// sigma of one group's 16 units: z[0..3] units 0..7, z[4..7] units 8..15 (as mma's c); slope likewise.
template <int D, class T, int ACT, bool SLOPE, class Weights>
HOPE_DEVICE void hidden_group(float (&z)[8], float (&slope)[8], const T* tile, const Weights& weights, int g,
                              int lane) {
  sync_warp();  // keeps loads of a group after the arithmetic of the one before: registers are short
#pragma unroll
  for (int s = 0; s < Width<D>::kSteps; ++s) {
    uint32_t x[4];
    load_matrices(x, corner<D>(tile, 16 * s, lane));
    const Word4 w = weights.w2(g, s);
    mma<T>(z, x, w.x, w.z, s == 0);
    mma<T>(z + 4, x, w.y, w.w, s == 0);
  }
  activate<ACT, SLOPE>(z, slope);
}

// Sums of squares of rows g and g + 8 over a lane's columns, added to `sums`.
HOPE_DEVICE void add_squares(float (&sums)[2], const float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[(i >> 1) & 1] = fma_(z[i], z[i], sums[(i >> 1) & 1]);
}

// The operand a (tokens x units) of a group's activations.
template <class T> HOPE_DEVICE void as_operand(uint32_t (&h)[4], const float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) h[i] = pack2<T>(z[2 * i], z[2 * i + 1]);
}

// Where a lane's four numbers of rows g, g + 8 of columns 8 j .. 8 j + 7 lie in a warp's partial output; the
// shift by half a line for odd j keeps readers (one row, all columns) free of bank conflicts as well as
// writers (all rows, 8 columns).
HOPE_DEVICE int part_offset(int j, int lane) { return 32 * j + (lane ^ ((j & 1) << 2)); }

// The share of w1 a, 64 columns at a time, to `part` (shared memory, this warp's).
template <int D, class T, class Weights>
HOPE_DEVICE void output_part(Float4* part, const uint32_t (&h)[Width<D>::kGroups][4], const Weights& weights,
                             int lane) {
#pragma unroll
  for (int i0 = 0; i0 < Width<D>::kSteps; i0 += 4) {
    float y[8][4];
#pragma unroll
    for (int g = 0; g < Width<D>::kGroups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Word4 w = weights.w1(i0 + i, g);
        mma<T>(y[2 * i], h[g], w.x, w.z, g == 0);
        mma<T>(y[2 * i + 1], h[g], w.y, w.w, g == 0);
      }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      store_shared(part + part_offset(2 * i0 + j, lane), Float4{y[j][0], y[j][1], y[j][2], y[j][3]});
  }
}

// How the W warps of a memory with D outputs (in one block) share its output for 16 tokens: a warp has 8 / W
// pairs of tokens r and r + 8, all at once; 4 W lanes have a pair. A lane has kEach times four numbers: i is
// columns 8 j + 2 t and + 1 of r (x, y) and r + 8 (z, w), with j = column(lane, i), t = lane % 4.
template <int D, int W> struct Epilogue {
  static constexpr int kEach = 8 / W * (D / 64);
  static constexpr int kLanes = 4 * W;
  HOPE_DEVICE static int pair(int within, int lane) { return within * (8 / W) + lane / kLanes; }
  HOPE_DEVICE static int column(int lane, int i) { return (lane >> 2) % W + W * i; }
  // Sum over the lanes of a pair.
  HOPE_DEVICE static float sum(float v) {
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) v += shuffle_xor(v, mask);
    return v;
  }
  // The sum of all warps' partial outputs, in their order. parts: of the first one; stride: Float4 from warp to
  // warp.
  HOPE_DEVICE static Float4 gather(const Float4* parts, int stride, int r, int j, int lane) {
    const Float4* p = parts + part_offset(j, 4 * r + (lane & 3));
    Float4 sum = load_shared(p);
#pragma unroll(D == 64 ? W : 1)  // registers are short with D = 128
    for (int w = 1; w < W; ++w) {
      const Float4 more = load_shared(p + w * stride);
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    return sum;
  }
};

// Which of the memory's warps has token r.
HOPE_DEVICE int epilogue_warp(int warps, int r) { return r % 8 / (8 / warps); }

// f(Epilogue<D, W>{}) for the number of warps that the plan has found.
template <int D, class F> HOPE_DEVICE void with_epilogue(int warps, F f) {
  if constexpr (D == 128) {
    f(Epilogue<D, 8>{});
  } else if (warps == 8) {
    f(Epilogue<D, 8>{});
  } else if (warps == 4) {
    f(Epilogue<D, 4>{});
  } else {
    f(Epilogue<D, 2>{});
  }
}

// A scalar memory: the weights w1 (deviation + base, fp32, shared memory) of a lane's four units of group g:
// w1 for z[0], z[1], z[4], z[5].
HOPE_DEVICE Float4 scalar_weights(const float* delta1s, const float* base1s, int g, int lane) {
  const Float4 d = load_shared(reinterpret_cast<const Float4*>(delta1s + 16 * g) + (lane & 3));
  const Float4 b = load_shared(reinterpret_cast<const Float4*>(base1s + 16 * g) + (lane & 3));
  return {d.x + b.x, d.y + b.y, d.z + b.z, d.w + b.w};
}

// Adds w1 a of one group to y: rows g and g + 8.
HOPE_DEVICE void add_scalar(float (&y)[2], const float (&z)[8], Float4 w) {
  y[0] = fma_(z[5], w.w, fma_(z[4], w.z, fma_(z[1], w.y, fma_(z[0], w.x, y[0]))));
  y[1] = fma_(z[7], w.w, fma_(z[6], w.z, fma_(z[3], w.y, fma_(z[2], w.x, y[1]))));
}

// Sum over the four lanes that share a row.
HOPE_DEVICE float row_sum4(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

// A warp's partial outputs of a scalar memory for 16 tokens to sums[16].
HOPE_DEVICE void store_sums(float* sums, float (&y)[2], int lane) {
  const float y0 = row_sum4(y[0]), y1 = row_sum4(y[1]);
  if ((lane & 3) == 0) {
    store_shared(sums + (lane >> 2), y0);
    store_shared(sums + (lane >> 2) + 8, y1);
  }
}

}  // namespace hope
