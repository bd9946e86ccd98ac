// What commits by warpgroups serve, and where their data lies: heads of width 64 with 256 hidden units,
// chunks of 64 tokens, bf16, on compute capability 9.0, with sigma of one tanh or exponential (registers are
// too few for an exact gelu). Calls that only read take the kernels of ../prefill.cuh. Four blocks a (row,
// head), owned as in ../plan.h.
//
// Beside what ../plan.h has, a block keeps one kind of matrix in shared memory for several uses:
//     w1      [8 columns of D][256 units][8]   rounded: operand of M(x) of all warps, and of each one's gradients
//     a, at_v [8 columns of tokens][units][8]  sigma of the chunk's keys and values: operand of M(k) and M(v); a
//                                              also of the update
// Blocks of eta and alpha have twice the units and no w1, no errors with D numbers, no at_v.
#pragma once
#include "../plan.h"

namespace hope {

inline bool by_warpgroups(const TitansParams& p, int D, bool bf16, const Device& device) {
  return device.capability == 90 && device.image == 90 && D == 64 && p.N == 256 && p.C == 64 && bf16 &&
         p.activation != kGelu && (p.flags & kUpdate);
}

constexpr Plan make_warpgroup_plan(bool retention) {
  Plan p{};
  p.blocks = 4, p.shards = 1, p.memories = retention ? 5 : 4;
  p.full_warps = kWarps, p.scalar_warps = kWarps / 2;
  constexpr int C = 64, D = 64, tile = 8 * (C * 16 + 16), panels = C / kPanel;
  int at = 0;
  auto take = [&](int bytes) {
    int here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  p.call = take(128);
  p.x = p.q = take(2 * kPanel * (D + 8) * 2);
  p.k = take(tile), p.v = take(tile);
  p.eta = take(4 * C), p.alpha = take(4 * C), p.erase = take(4 * C), p.decay_after = take(4 * C + 4);
  p.solve = take(1024 * panels * (panels + 1) / 2), p.before = take(4 * C), p.after = take(4 * C);
  p.decay_panel = take(4 * panels), p.e2 = take(32 * C), p.es = take(32 * C);
  p.norms = take(64 * C), p.gain = take(32 * C), p.sums = take(4 * kWarps * 2 * kPanel);
  p.partial = take(4 * kWarps * 2 * C);
  p.delta1s = take(4 * kWarps * 4096 / D), p.base1s = take(4 * kWarps * 4096 / D);
  p.weights = take(kWarps * 16 * 512), p.w1 = p.weights + kWarps * 8 * 512;
  p.a = take(64 << 10), p.at_v = p.parts = p.a + (32 << 10);
  p.d = take(32 << 10);
  // a scalar memory's warps have no errors of D numbers, the others have partial outputs that nobody needs
  // meanwhile
  p.e = p.solved = take(kWarps * (panels - 1) * 512);
  p.base = -1;
  p.more_d = -1, p.scratch_bytes = 32 << 10;
  p.shared_bytes = at;
  return p;
}

constexpr Plan kWarpgroupPlan = make_warpgroup_plan(true);

}  // namespace hope
