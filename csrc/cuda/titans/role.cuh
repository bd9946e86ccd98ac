// What a warp does for its (row, head), and what a block was launched for.
#pragma once
#include "../simt.cuh"
#include "plan.h"

namespace hope {

enum Memory : int { kMemory = 0, kKeys = 1, kValues = 2, kEta = 3, kAlpha = 4 };

struct Role {
  const Plan& plan;
  int memory;  // one of Memory, or past the last one: nothing to do (no alpha)
  int within;  // which of the memory's warps in this block
  int warp;    // in its block

  // Warp `warp` of block `rank`, in blocks of `warps`.
  static HOPE_DEVICE Role of(const Plan& plan, int rank, int warp, int warps = kWarps) {
    const int i = rank * warps + warp, scalars = 3 * plan.shards * plan.full_warps;
    if (i < scalars) return {plan, i / (plan.shards * plan.full_warps), i % plan.full_warps, warp};
    return {plan, kEta + (i - scalars) / plan.scalar_warps, (i - scalars) % plan.scalar_warps, warp};
  }
  HOPE_DEVICE int packed() const { return memory << 8 | within; }
  // 16 x 16 blocks of a (and of d) that the warps before this one in its block have of 16 tokens; a warp of a
  // scalar memory has twice as many as others.
  template <int D> HOPE_DEVICE int fragments_before(int rank) const {
    const int full_here = 3 * plan.shards * plan.full_warps - rank * kWarps;
    const int scalar = warp - (full_here < 0 ? 0 : full_here);
    return (warp + (scalar < 0 ? 0 : scalar)) * Width<D>::kGroups;
  }
  HOPE_DEVICE bool full() const { return memory < kEta; }                // D outputs, else one
  HOPE_DEVICE bool idle() const { return memory >= plan.memories; }
  HOPE_DEVICE int warps() const { return full() ? plan.full_warps : plan.scalar_warps; }  // of the memory in this block
  HOPE_DEVICE int first() const { return warp - within; }                // of them, as a warp of this block
};

// What prefill knows of its block between stages, in shared memory: registers are for the state.
struct Call {
  int group, rank;        // which (row, head), which of its blocks
  int n;                  // tokens to read
  int opened;             // slot of the first of them
  int chunk;              // C
  int arrived;            // blocks of the group that have finished before this one (kCommitOnly)
  int head;               // of the group
  int64_t first_token;    // where it lies in x, q and o: numbers
  int64_t scratch;        // where the block's part of the scratch begins: bytes
  int roles[kWarps];      // of each warp; also, in the upper half, its first block of a (and of d)
  int tokens[kWarps];     // how many tokens each warp has read

  HOPE_DEVICE Role role(const Plan& plan, int warp) const {
    const int word = load_shared(roles + warp);
    return {plan, word >> 8 & 255, word & 255, warp};
  }
  HOPE_DEVICE int first_fragment(int warp) const { return load_shared(roles + warp) >> 16; }
};
static_assert(sizeof(Call) <= 128);  // Plan::call

}  // namespace hope
