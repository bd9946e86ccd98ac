// titans_decode: one token a row. Reads every weight once, at the bandwidth of the memory, and appends the
// token to its chunk.
//
// EQUATIONS   As prefill's reads, for one token. A chunk that is now full is committed by titans_prefill,
//             launched after this kernel for the purpose (kCommitOnly). The device alone decides, so both
//             launches are the same for every token and can be replayed from a graph.
// OWNERSHIP   As in prefill: warps own hidden units, and use the same instructions in the same order on a panel
//             of 16 slots of which one is live: outputs have the bits of a prefill. Memories exchange nothing
//             before the commit, so each has a block of its own (eta and alpha share one): 4 B H blocks of
//             N D / 2048 warps, no cluster, two barriers. Memories of two blocks decode through prefill.
// BYTES       6 a weight (fp32 deviation, 16-bit base): 24 KB a warp, all of them requested before the first
//             is needed.
// FLOPS       16 times what one token needs, on tensor cores that would be idle.
#pragma once
#include "prefill.cuh"

namespace hope {

// Rounded weights in registers.
template <int D> struct HeldWeights {
  const Word4 (&blocks)[16];
  static constexpr int kUnroll = 8;
  HOPE_DEVICE Word4 w2(int g, int s) const { return blocks[g * Width<D>::kSteps + s]; }
  HOPE_DEVICE Word4 w1(int i, int g) const { return blocks[8 + i * Width<D>::kGroups + g]; }
};

template <int D, class T> struct DecodeSink {
  const TitansParams& p;
  T* o;        // this token's
  int64_t at;  // its row of pending k and v
  HOPE_DEVICE void pair(int memory, int, int position, uint32_t value) {
    T* to = memory == kMemory ? o : static_cast<T*>(memory == kKeys ? p.pending_k : p.pending_v) + at * D;
    *reinterpret_cast<uint32_t*>(to + index_of(position)) = value;
  }
  HOPE_DEVICE void scalar(int memory, int, float value) {
    (memory == kEta ? p.pending_eta : p.pending_alpha)[at] = value;
  }
};

template <int D, class T, int ACT> HOPE_DEVICE void decode(const TitansParams& p, const Plan& plan) {
  const int lane = lane_index(), warp = warp_index();
  const int group = block_index() / 4, rank = block_index() % 4;
  const int64_t b = group / p.H;
  const int h = group % p.H;
  if (p.lengths[b] <= 0 || (rank > 0 && !(p.flags & kUpdate))) return;
  const Shared<D, T> shared{plan};
  const Role role = Role::of(plan, rank, warp, plan.full_warps);
  const Place<D> place = Place<D>::of(p, role);
  const Deviations deviations = Deviations::of(p, group, D, plan.memories);
  const Bases<T> bases = Bases<T>::of(p, h, D, plan.memories);
  const int slot = static_cast<int>(p.pos[b] & (p.C - 1)), row = slot % kPanel;

  T* tile = shared.input(false, 0);
  const T* from = static_cast<const T*>(rank == 0 ? p.q : p.x) + (b * p.H + h) * D;
  fetch_panel<D>(tile, from - row * D, D, row, row + 1, 32 * plan.full_warps);
  Word4 blocks[16] = {};
  if (!role.idle()) {
    for_blocks<D>(place, role.full(), p.N, [&](int i, int first, int stride, bool w1) {
      float f[8];
      load_block(f, (w1 ? deviations.w1 : deviations.w2) + first, stride, lane);
      blocks[i] = round_block<T>(f, base_block<T>(bases, role, w1, first, stride, lane));
    });
  }
  load_scalar_weights<D, T>(shared, deviations, bases, place, role, warp, lane);
  wait_copies();
  sync_block();
  read_shares<D, T, ACT>(shared, role, tile, HeldWeights<D>{blocks}, warp, lane);
  sync_block();
  DecodeSink<D, T> sink{p, static_cast<T*>(p.o) + (b * p.H + h) * D, (b * p.C + slot) * p.H + h};
  read_results<D, T>(p, shared, role, tile, h, row, row + 1, lane, sink);
}

template <int D, class T, int ACT>
HOPE_KERNEL(kThreads) titans_decode(const TitansParams p, const Plan plan) {
#ifndef __CUDACC__
  if constexpr (!in_fibers(D, ACT)) emulator::grid.fail("heads of width 128 run with gelu_tanh only");
  else
#endif
  decode<D, T, ACT>(p, plan);
}

}  // namespace hope
