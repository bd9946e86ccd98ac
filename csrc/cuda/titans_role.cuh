// What one warp is to its (row, head).
#pragma once
#include "simt.cuh"
#include "titans_plan.h"

namespace hope {

enum Memory : int { kMemory = 0, kKeys = 1, kValues = 2, kEta = 3, kAlpha = 4 };

struct Role {
  int memory;  // one of Memory, or past the last one: nothing to do (no alpha)
  int within;  // which of the memory's warps
  int warps;   // how many it has; all of them are in this block
  int first;   // the first of them, as a warp of this block
  bool full;   // D outputs, else one

  // Warp `warp` of block `rank`, in blocks of `warps`.
  static HOPE_DEVICE Role of(const Plan& plan, int rank, int warp, int warps = kWarps) {
    const int i = rank * warps + warp, scalars = 3 * plan.full_warps;
    Role r;
    r.full = i < scalars;
    r.warps = r.full ? plan.full_warps : plan.scalar_warps;
    r.memory = r.full ? i / plan.full_warps : kEta + (i - scalars) / plan.scalar_warps;
    r.within = (r.full ? i : i - scalars) % r.warps;
    r.first = warp - r.within;
    return r;
  }
};

}  // namespace hope
