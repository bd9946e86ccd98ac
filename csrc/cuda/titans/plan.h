// Who owns what, and where it lies: the plan of a (row, head), the same for every kernel of the memory. It is
// made on the host.
//
// A WARP OWNS HIDDEN UNITS. A warp keeps 4096 fp32 deviations in registers, 128 a thread: of a memory with D
// outputs 2048 / D hidden units, their rows of delta2 and columns of delta1; of a scalar memory (eta, alpha)
// 4096 / D units, their rows of delta2 (their delta1, one number a unit, lies in shared memory). Whatever
// concerns a unit stays in its warp: z, a, d, the update. What crosses warps is a memory's output, summed
// over its warps, and the tokens.
//
//   D = 64     N = 64      8 warps   1 block
//              N = 128    16 warps   2 blocks
//              N = 256    32 warps   4 blocks: memory | k | v | eta, alpha
//   D = 128    N = 128    32 warps   4 blocks
//              N = 256    64 warps   8 blocks: memory, memory | k, k | v, v | eta | alpha
//
// Registers cannot hold more, so a block is 8 warps and a multiprocessor holds one block. Blocks of a (row,
// head) exchange k, v, eta, alpha of 16 tokens at a time, nothing else. SHARDED: where a memory has two
// blocks, each has half of the hidden units. These also exchange their shares of its output and of the norms
// of a and d, and both add them up, the lower rank's first, and compute what follows from the sums.
#pragma once
#include "../launch.h"

namespace hope {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPanel = 16;  // tokens on one side of a tensor-core instruction
// A flag beside those of params.h and launch.h, for titans_step: tokens have been read and appended already,
// commit what is full.
constexpr int kCommitOnly = 1 << 17;

// Which of the kernels that commit have a body in code for an architecture (10 * major + minor): the others
// would only take time to compile. Blocks form clusters, or exchange through global memory; shared memory may
// have room for rounded weights, or may have none.
constexpr bool in_clusters(int arch) { return arch >= 90; }
constexpr bool may_be_on_chip(int arch) { return arch < 120; }
constexpr bool may_be_off_chip(int arch) { return arch < 90 || arch >= 120; }

template <int D> struct Width {
  static constexpr int kSteps = D / 16;                // 16 x 16 blocks of weights across D
  static constexpr int kUnits = 2048 / D;              // hidden units a warp owns, of a memory with D outputs
  static constexpr int kGroups = kUnits / 16;
  static constexpr int kScalarUnits = 2 * kUnits;      // and of a scalar one
  static constexpr int kScalarGroups = 2 * kGroups;
  // Numbers from row to row of a tile in shared memory: no bank conflicts in ldmatrix.
  static constexpr int kRow = D + 8;
};

struct Plan {
  int blocks;        // of a (row, head)
  int shards;        // blocks of a memory with D outputs: 2, or 1 where it fits one
  int full_warps;    // of a block that share a memory with D outputs
  int scalar_warps;  // that share a scalar one
  int memories;      // M: 5, or 4 without alpha
  int one_buffer;    // partial outputs of M(k) and M(v) take turns in one buffer
  int shared_bytes;  // a block's shared memory
  // Bytes from the start of shared memory:
  int call;                 // struct Call (role.cuh)
  // x, q: what the panel reads, and what is being fetched for the next one. One place if no block needs both.
  int x, q;                 // [2][16][kRow] T
  // k, v: the open chunk. When v has been read, the transformed keys Kg take its place.
  int k, v;                 // [C][kRow] T
  int e;                    // [memories here][C][kRow] T
  int eta, alpha;           // [C] fp32
  // Panels p <= q of the chunk, pair q (q + 1) / 2 + p (clock.cuh): operands of the solve for the transformed keys
  int solve;                // [pairs][1024 bytes]
  int before, after;        // [C] fp32          eta_t times the decays before t in its panel; decays after t in it
  int erase;                // [C] fp32          eta_t gamma[t-1,0]
  int decay_after;          // [C + 1] fp32      gamma[C,t]; the last one is decay_chunk, gamma[C,0]
  int decay_panel;          // [C / 16] fp32     the product of a panel's decays
  int e2, es;               // [8][C] fp32       by the memory's first warp here
  int norms;                // [8][2][C] fp32    |a|^2 and |d|^2 over a warp's units
  int gain;                 // [8][C] fp32       by the memory's first warp here
  int sums;                 // [8][2][16] fp32   a scalar warp's partial outputs
  int delta1s, base1s;      // [8][kScalarUnits] fp32
  // parts: M(k) of every warp, then M(v); a scalar memory's warps keep sigma' there.
  int parts;                // [8 + 0 or full warps][16 x D] fp32
  // A lane's own data, in the order of its fragments: 512 bytes for each 16 x 16 block of a warp. In shared
  // memory, or (negative: -1 - offset) in the block's part of the scratch, where L2 holds it:
  int weights;              // [8][16] blocks    base + deviation, rounded to T
  int a, d;                 // [units / 16][C / 16] blocks
  int at_k;                 // [8][8 / full_warps][D / 64]  M(k), while M(v) has the one buffer
  // In shared memory, or (negative) read from the tensors every time:
  int base;                 // as weights
  // The block's part of the scratch:
  // mail: what blocks without a cluster send one another; rank 0's is the group's.
  int mail;                 // [2][16 D + 32] words
  // Of shards, summed over the block's warps: M(k), M(v) of even panels, of odd ones; |a|^2 and |d|^2.
  int shares;               // [2][2][D / 64][8] blocks
  int norm_shares;          // [2][C] fp32
  int64_t scratch_bytes;
  // Of commits by warpgroups (warpgroups/plan.h), whose weights, a and d have places of their own:
  int w1, at_v, more_d, solved, partial;
};

// Fragment blocks of `a` (and of `d`) that the 8 warps of a block own in a panel: the most that any block
// needs.
constexpr int panel_blocks(int D, int full_warps) {
  int groups = 2048 / D / 16;
  int full = full_warps == 2 ? 6 : full_warps == 4 ? 4 : 0;  // in the block with the scalar memories
  return (full + 2 * (kWarps - full)) * groups;
}

inline Plan make_plan(int D, int N, int C, bool retention, bool update, const Device& device) {
  Plan p{};
  const int warps = N * D / 2048;
  p.shards = warps > kWarps ? warps / kWarps : 1;
  p.full_warps = warps / p.shards;
  p.scalar_warps = warps / 2;
  // without an update M_memory is all there is to read
  p.blocks = p.shards > 1 && !update ? p.shards : 4 * warps / kWarps;
  p.memories = retention ? 5 : 4;
  int at = 0;
  auto take = [&](int bytes) {
    int here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  const int row = (D + 8) * 2, slots = update ? C : kPanel;
  const int full_here = p.full_warps == 2 ? 6 : kWarps;
  const int tiles_here = full_here / (p.full_warps < kWarps ? p.full_warps : kWarps);
  p.call = take(128);
  p.x = take(2 * kPanel * row), p.q = p.full_warps == kWarps ? p.x : take(2 * kPanel * row);
  p.k = take(slots * row), p.v = take(slots * row), p.e = take(tiles_here * slots * row);
  p.eta = take(4 * slots), p.alpha = take(4 * slots), p.erase = take(4 * slots), p.decay_after = take(4 * slots + 4);
  const int panels = slots / kPanel;
  p.solve = take(1024 * panels * (panels + 1) / 2), p.before = take(4 * slots), p.after = take(4 * slots);
  p.decay_panel = take(4 * panels), p.e2 = take(32 * slots), p.es = take(32 * slots);
  p.norms = take(64 * slots), p.gain = take(32 * slots), p.sums = take(4 * kWarps * 2 * kPanel);
  p.delta1s = take(4 * kWarps * 4096 / D), p.base1s = take(4 * kWarps * 4096 / D);
  const int part = kPanel * D * 4, private_blocks = panel_blocks(D, p.full_warps) * (slots / kPanel);
  const int weights = kWarps * 16 * 512;
  // Base weights in shared memory save more than a second buffer, which saves two barriers a panel.
  const auto fits = [&](int buffers, int kept) {
    return at + (kWarps + (buffers - 1) * full_here) * part + kept * weights + 2 * 512 * private_blocks <=
           device.shared_bytes;
  };
  p.one_buffer = p.shards > 1 || (!fits(2, 2) && (fits(1, 2) || !fits(2, 1)));
  p.parts = take((p.one_buffer ? kWarps : kWarps + full_here) * part);
  const bool mail = p.blocks > 1 && !in_clusters(device.image);
  int scratch = mail ? 2 * 4 * (kPanel * D + 2 * kPanel) : 0;
  if (p.shards > 1) {
    p.shares = scratch, p.norm_shares = scratch + 2 * 2 * kWarps * D / 64 * 512;
    scratch = p.norm_shares + 2 * 4 * slots;
  }
  auto place = [&](int bytes, bool allowed = true) {
    if (allowed && at + bytes <= device.shared_bytes) return take(bytes);
    int here = scratch;
    scratch += bytes;
    return -1 - here;
  };
  p.weights = place(weights, may_be_on_chip(device.image));
  p.a = place(512 * private_blocks), p.d = place(512 * private_blocks);
  p.at_k = p.one_buffer && p.shards == 1 ? place(kWarps * 8 / p.full_warps * D / 64 * 512) : 0;
  p.base = at + weights <= device.shared_bytes ? take(weights) : -1;
  p.shared_bytes = at;
  p.scratch_bytes = scratch;
  return p;
}

// Decode without shards: one block for each memory with D outputs and one for eta and alpha; full_warps warps
// each.
inline Plan make_decode_plan(int D, int N, bool retention) {
  Plan p{};
  p.shards = 1, p.full_warps = N * D / 2048, p.scalar_warps = p.full_warps / 2;
  p.blocks = 4, p.memories = retention ? 5 : 4, p.one_buffer = 1;
  int at = 0;
  auto take = [&](int bytes) {
    int here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  p.x = p.q = take(kPanel * (D + 8) * 2);
  p.sums = take(4 * kWarps * 2 * kPanel);
  p.delta1s = take(4 * kWarps * 4096 / D), p.base1s = take(4 * kWarps * 4096 / D);
  p.parts = take(p.full_warps * kPanel * D * 4);
  p.shared_bytes = at;
  return p;
}

}  // namespace hope
