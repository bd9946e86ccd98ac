// Rounded weights where commits are by warpgroups: w2 as each lane's fragments, w1 as a matrix of the block.
#pragma once
#include "../../warpgroup.cuh"
#include "../exchange.cuh"
#include "../state.cuh"
#include "plan.h"

namespace hope {

// The plan of a kernel for its code: constants where all calls have one plan but for a number; else a copy, which
// the compiler keeps in registers, where it would load a kernel's parameter anew at every use.
template <int MODE> HOPE_DEVICE Plan plan_of_kernel(const Plan& given) {
  if constexpr (kByWarpgroups<MODE>) {
    constexpr Plan fixed = kWarpgroupPlan<MODE == kOneBlock ? 64 : 256>;
    Plan p = fixed;
    p.memories = given.memories;
    return p;
  } else {
    return given;
  }
}

// Where a lane finds its row of the four 8 x 8 pieces in the first 16 rows of the first two columns of a matrix
// [columns][rows][8]. ACROSS: the second piece is that of the next column, else that of the next 8 rows.
template <bool ACROSS, class T> HOPE_DEVICE T* four_pieces(T* matrix, int rows, int lane) {
  const int right = ACROSS ? lane >> 3 & 1 : lane >> 4, below = ACROSS ? lane >> 4 : lane >> 3 & 1;
  return matrix + 8 * (rows * right + 8 * below + (lane & 7));
}

// In the place of StoredWeights, of heads with N hidden units: the same weights, at other places.
template <int N> struct WarpgroupWeights {
  static constexpr int kFull = N == 64 ? 6 : kWarps;  // warps of a block with memories of D outputs
  static constexpr int kUnits = 32 * kFull;                        // of w1
  static constexpr int kUnroll = 1;
  Word4* blocks;  // a lane's, of w2
  uint16_t* w1_;  // the warp's first unit in w1: number 8 r + 8 kUnits c is row r of column c
  int lane;
  bool full;

  HOPE_DEVICE WarpgroupWeights(const Own& own) : lane(own.lane) {
    full = N == 64 ? own.warp < kFull : load_shared(&own.call.rank) < 3;
    blocks = reinterpret_cast<Word4*>(shared_memory() + own.plan.weights) + lane;
    blocks += 32 * (full ? 8 * own.warp : 16 * own.warp - 8 * (kFull % kWarps));
    w1_ = w1_matrix<uint16_t>(own.plan) + (full ? 8 * 32 * own.warp : 0);
  }
  template <class T> HOPE_DEVICE static T* w1_matrix(const Plan& plan) {
    return reinterpret_cast<T*>(shared_memory() + plan.w1);
  }
  // As {x, z, y, w}: x and z, y and w are operands b of mma.
  HOPE_DEVICE Word4 w2(int g, int s) const {
    const Word4 v = blocks[32 * (4 * g + s)];
    return {v.x, v.z, v.y, v.w};
  }
  // 16 positions i of D by units of group g, as StoredWeights has them.
  HOPE_DEVICE Word4 w1(int i, int g) const {
    uint32_t r[4];
    load_matrices_transposed(r, four_pieces<true>(w1_, kUnits, lane) + 8 * (16 * g + kUnits * 2 * i));
    return {r[0], r[1], r[2], r[3]};
  }
  // The same as operand a, units as m.
  HOPE_DEVICE void w1_rows(uint32_t (&r)[4], int i, int g) const {
    load_matrices(r, four_pieces<false>(w1_, kUnits, lane) + 8 * (16 * g + kUnits * 2 * i));
  }
  HOPE_DEVICE void put(int b, Word4 v) const {
    if (b < 8 || !full) {
      blocks[32 * b] = {v.x, v.z, v.y, v.w};
    } else {
      const int g = (b - 8) / 4, i = (b - 8) % 4;
      store_matrices(four_pieces<false>(w1_, kUnits, lane) + 8 * (16 * g + kUnits * 2 * i),
                     {v.x, v.y, v.z, v.w});
    }
  }
};

// As round_weights. Base weights of w1 are loaded as they lie and transposed in registers.
template <class T, int N>
HOPE_DEVICE void round_weights_by_units(const float (&state)[16][8], const WarpgroupWeights<N>& weights,
                                        const Bases<T>& bases, const Place<64>& place, const Role& role,
                                        int lane) {
  constexpr int kBatch = 8;
  Word4 base[kBatch];
  sync_warp();
  for_blocks<64, true>(place, role.full(), N, [&](int i, int at, int row, bool w1) {
    base[i % kBatch] = base_block<T>(bases, role, w1, at, row, lane);
    if (i % kBatch < kBatch - 1) return;
    const int first = i - (kBatch - 1);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      Word4 b = base[k];
      if (w1) b = {transpose8x8(b.x), transpose8x8(b.z), transpose8x8(b.y), transpose8x8(b.w)};
      weights.put(first + k, round_block<T>(state[first + k], b));
    }
  });
  fence_proxy();
  sync_warp();
}

template <int D, int MODE, bool ON_CHIP> struct WeightsFor { using type = StoredWeights<D, ON_CHIP>; };
template <int D, bool ON_CHIP> struct WeightsFor<D, kWarpgroups, ON_CHIP> { using type = WarpgroupWeights<256>; };
template <int D, bool ON_CHIP> struct WeightsFor<D, kOneBlock, ON_CHIP> { using type = WarpgroupWeights<64>; };
template <int D, int MODE, bool ON_CHIP> using WeightsOf = typename WeightsFor<D, MODE, ON_CHIP>::type;

}  // namespace hope
