// What one warp is to its (row, head).
#pragma once
#include "simt.cuh"
#include "titans_plan.h"

namespace hope {

enum Memory : int { kMemory = 0, kKeys = 1, kValues = 2, kEta = 3, kAlpha = 4 };

struct Role {
  const Plan& plan;
  int memory;  // one of Memory, or past the last one: nothing to do (no alpha)
  int within;  // which of the memory's warps
  int warp;    // in its block

  // Warp `warp` of block `rank`, in blocks of `warps`.
  static HOPE_DEVICE Role of(const Plan& plan, int rank, int warp, int warps = kWarps) {
    const int i = rank * warps + warp, scalars = 3 * plan.full_warps;
    if (i < scalars) return {plan, i / plan.full_warps, i % plan.full_warps, warp};
    return {plan, kEta + (i - scalars) / plan.scalar_warps, (i - scalars) % plan.scalar_warps, warp};
  }
  HOPE_DEVICE bool full() const { return memory < kEta; }                // D outputs, else one
  HOPE_DEVICE bool idle() const { return memory >= plan.memories; }
  HOPE_DEVICE int warps() const { return full() ? plan.full_warps : plan.scalar_warps; }  // of the memory, all of them in this block
  HOPE_DEVICE int first() const { return warp - within; }                // of them, as a warp of this block
};

}  // namespace hope
