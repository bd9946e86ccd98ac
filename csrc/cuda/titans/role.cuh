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

// What prefill, or a step that commits, knows of its block between stages, in shared memory: registers are for
// the state.
struct Call {
  int group, rank;        // which (row, head), which of its blocks
  int n;                  // tokens to read
  int opened;             // slot of the first of them
  int chunk;              // C
  int arrived;            // blocks of the group that had read the tokens of a commit before this one
  int head;               // of the group
  uint32_t next;          // where rounded weights are kept, the mark of those that a commit leaves (rounded.cuh)
  int64_t first_token;    // where it lies in x, q and o: numbers
  int64_t scratch;        // where the block's part of the scratch begins: bytes
  int roles[kWarps];      // of each warp; also, in the upper half, its first block of a (and of d)
  int tokens[kWarps];     // how many tokens each warp has read

  // What is known before anything is read: by all warps of the block, before its barrier.
  template <int D> HOPE_DEVICE void enter(const TitansParams& p, const Plan& plan, int group_, int rank_) {
    const int lane = lane_index(), warp = warp_index();
    if (thread_index() == 0) {
      store_shared(&group, group_), store_shared(&rank, rank_);
      store_shared(&chunk, p.C), store_shared(&head, group_ % p.H);
      store_shared(&scratch, (static_cast<int64_t>(group_) * plan.blocks + rank_) * plan.scratch_bytes);
    }
    if (lane == 0) {
      const Role role = Role::of(plan, rank_, warp);
      const int fragments = role.template fragments_before<D>(rank_) * (p.C / kPanel);
      store_shared(roles + warp, fragments << 16 | role.packed());
    }
  }
  HOPE_DEVICE Role role(const Plan& plan, int warp) const {
    const int word = load_shared(roles + warp);
    return {plan, word >> 8 & 255, word & 255, warp};
  }
  HOPE_DEVICE int first_fragment(int warp) const { return load_shared(roles + warp) >> 16; }
};
static_assert(sizeof(Call) <= 128);  // Plan::call

// Where a row stands in its open chunk. Kernels read the lower word of `pos` only.
HOPE_DEVICE int slot_of(const TitansParams& p, int64_t b) {
  return static_cast<int>(reinterpret_cast<const uint32_t*>(p.pos)[2 * b] & (p.C - 1));
}

// With kCount: called by one thread of each block, when all threads of the block know where row b stands, in
// a launch with `blocks` blocks a head. The row's last block advances pos by n. Until then the upper word of
// pos (positions are less than 2^44) counts the blocks in its upper bits: no counter has to be cleared first.
HOPE_DEVICE void count_tokens(const TitansParams& p, int64_t b, int n, int blocks) {
  if (!(p.flags & kCount)) return;
  constexpr uint32_t kOne = 1 << 12;
  uint32_t* words = reinterpret_cast<uint32_t*>(p.pos + b);
  const uint32_t before = fetch_add_release(words + 1, kOne);
  if (before / kOne != static_cast<uint32_t>(p.H * blocks - 1)) return;
  const uint32_t next = words[0] + n;
  words[1] = before % kOne + (next < static_cast<uint32_t>(n));
  words[0] = next;
}

}  // namespace hope
