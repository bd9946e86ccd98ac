// One token a row: reads every weight once, at the bandwidth of the memory, and appends the token to its
// chunk.
//
// EQUATIONS   As prefill's reads, for one token. The device alone knows whether that fills the chunk, so what
//             is launched is the same for every token and can be replayed from a graph.
//             titans_step     reads, and commits a chunk that is now full, in one launch
//             titans_decode   reads; titans_step is launched after it for the commit alone (kCommitOnly)
// OWNERSHIP   As in prefill: warps own hidden units, and use the same instructions in the same order on a panel
//             of 16 slots of which one is live: outputs have the bits of a prefill. Memories exchange nothing
//             before the commit, so titans_decode has a block for each (eta and alpha share one): 4 B H of N D
//             / 2048 warps, no cluster, two barriers. The blocks of titans_step are those of prefill, since
//             they commit. A commit needs the token's k, v, eta and alpha of all of them: several blocks of a
//             (row, head) are a cluster, which meets where the chunk is full and nowhere else. launch.cuh says
//             which of the two serves a call. Memories of two blocks decode through prefill.
// BYTES       6 a weight (fp32 deviation, 16-bit base): 24 KB a warp, all of them requested before the first
//             is needed; 2, or 8 KB, where a rounded copy is kept (rounded.cuh), requested before anything is
//             known of the row. A commit reads 6 once more, and writes 4; to renew the copy it reads the base
//             again and writes 2.
// FLOPS       16 times what one token needs, on tensor cores that would be idle.
#pragma once
#include "prefill.cuh"
#include "rounded.cuh"

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

// Block `rank` of a (row, head), of `warps` warps, reads the row's token. If that fills the chunk: the mark of
// the next one (rounded.cuh), else 0.
template <int D, class T, int ACT>
HOPE_DEVICE uint32_t decode(const TitansParams& p, const Plan& plan, int group, int rank, int warps) {
  const int lane = lane_index(), warp = warp_index();
  const int64_t b = group / p.H;
  const int h = group % p.H;
  const bool update = p.flags & kUpdate;
  if (rank > 0 && !update) return 0;
  // Requested before anything is known of the row, and first of all. A head has as many warps in either plan.
  const auto rounded = Rounded<D>::of(p, static_cast<int64_t>(block_index()) * warps + warp);
  typename Rounded<D>::Held held;
  if (rounded.words != nullptr) rounded.load(held, lane);
  const Role role = Role::of(plan, rank, warp, warps);
  const bool keeps = rounded.words != nullptr && !role.idle();
  if (keeps && !role.full()) rounded.load_scalars(held, lane);
  if (p.lengths[b] <= 0) {
    if (rank == 0 && warp == 0)
      for (int i = lane; i < D / 2; i += 32) static_cast<uint32_t*>(p.o)[(b * p.H + h) * (D / 2) + i] = 0;
    return 0;
  }
  const Shared<D, T> shared{plan};
  const Place<D> place = Place<D>::of(p, role);
  const Deviations deviations = Deviations::of(p, group, D, plan.memories);
  const Bases<T> bases = Bases<T>::of(p, h, D, plan.memories);
  const int slot = slot_of(p, b), row = slot % kPanel;
  const int64_t token = (b * p.H + h) * D;

  // M_memory is in the first block, alone or with others
  const auto fetch = [&](T* tile, const void* from) {
    fetch_panel<D>(tile, static_cast<const T*>(from) + token - row * D, D, row, row + 1, 32 * warps);
  };
  if (rank == 0) fetch(shared.input(true, 0), p.q);
  if (rank > 0 || plan.full_warps < warps) fetch(shared.input(false, 0), p.x);
  const uint32_t mark = Rounded<D>::mark_of(p, b);
  if (keeps && held.mark == mark) {
    if (!role.full()) rounded.put_scalars(shared, held, warp, lane);
  } else {
    if (role.idle()) {
#pragma unroll
      for (int i = 0; i < 16; ++i) held.blocks[i] = {0, 0, 0, 0};
    } else {
      for_blocks<D>(place, role.full(), p.N, [&](int i, int first, int stride, bool w1) {
        float f[8];
        load_block(f, (w1 ? deviations.w1 : deviations.w2) + first, stride, lane);
        held.blocks[i] = round_block<T>(f, base_block<T>(bases, role, w1, first, stride, lane));
      });
    }
    load_scalar_weights<D, T>(shared, deviations, bases, place, role, warp, lane);
    if (keeps) {
#pragma unroll
      for (int i = 0; i < 16; ++i) rounded.put(i, held.blocks[i]);
      rounded.finish(shared, mark, role.full(), warp, lane);
    }
  }
  wait_copies();
  sync_block();
  const T* tile = shared.input(role.memory == kMemory, 0);
  read_shares<D, T, ACT>(shared, role, tile, HeldWeights<D>{held.blocks}, warp, lane);
  sync_block();
  // by a warp that has no part of the output, if there is one
  const int writer = epilogue_warp(plan.full_warps, row);
  if (warp == (writer + 1) % plan.full_warps && lane == 0) count_tokens(p, b, 1, plan.blocks);
  DecodeSink<D, T> sink{p, static_cast<T*>(p.o) + token, (b * p.C + slot) * p.H + h};
  if (!role.full() || role.within == writer)
    read_results<D, T>(p, shared, role, tile, h, row, row + 1, lane, sink);
  return slot == p.C - 1 ? mark + p.C : 0;
}

// Commits the full chunk of a (row, head), of which all tokens are among the pending ones: block `rank` the
// weights that are its own. Blocks of a cluster clear the tokens once all have read them; of others, which a
// counter tells in which order they have read them, the last one does. next: the mark of the next chunk.
template <int D, class T, int ACT, int MODE, bool ON_CHIP>
HOPE_DEVICE void commit_pending(const TitansParams& p, const Plan& plan, int group, int rank, uint32_t next) {
  using Blocks = Exchange<D, T, MODE, false>;
  const Shared<D, T, typename Blocks::Rows> shared{plan};
  Call& call = shared.call();
  call.enter<D>(p, plan, group, rank);
  if (thread_index() == 0) store_shared(&call.next, next);
  move_pending<D, T, true>(p, shared, group / p.H, group % p.H, 0, p.C);
  sync_block();
  if (plan.blocks > 1) {
    if constexpr (MODE != kGlobal) {
      cluster_arrive();
    } else if (thread_index() == 0) {
      store_shared(&call.arrived, static_cast<int>(fetch_add_release(p.arrivals + 1 + group, 1)));
    }
  }
  float state[16][8];
  {
    const int lane = lane_index(), warp = warp_index();
    const Role role = call.role(plan, warp);
    load_state<D, T>(state, p, shared, role, 0, group, warp, lane);
    const Own own{p, plan, call, warp, lane};
    const Bases<T> bases = Bases<T>::of(p, group % p.H, D, plan.memories);
    const WeightsOf<D, MODE, ON_CHIP> weights{own};
    if constexpr (kByWarpgroups<MODE>)
      round_weights_by_units<T>(state, weights, bases, Place<D>::of(p, role), role, lane);
    else
      round_weights<D, T>(state, weights, own, bases, Place<D>::of(p, role), role, p.N, lane);
  }
  commit_chunk<D, T, ACT, ON_CHIP>(state, p, shared, Blocks{shared, p, plan});
  const int thread = thread_index_again(), lane = thread & 31, warp = thread >> 5;
  const int g = load_shared(&call.group);
  const Role role = call.role(plan, warp);
  store_state<D, T>(state, p, shared, role, 0, g, warp, lane);
  if constexpr (!kByWarpgroups<MODE>) {  // whose state has other blocks: the next token makes the copy anew
    const auto rounded = Rounded<D>::of(p, static_cast<int64_t>(block_index()) * kWarps + warp);
    if (rounded.words != nullptr && !role.idle()) {
      const Bases<T> bases = Bases<T>::of(p, g % p.H, D, plan.memories);
      const Own own{p, plan, call, warp, lane};
      round_weights<D, T>(state, rounded, own, bases, Place<D>::of(p, role), role, p.N, lane);
      rounded.finish(shared, load_shared(&call.next), role.full(), warp, lane);
    }
  }
  bool last = load_shared(&call.rank) == 0;
  if (plan.blocks > 1) {
    if constexpr (MODE != kGlobal) cluster_wait();
    else last = load_shared(&call.arrived) == plan.blocks - 1;
  }
  if (last) clear_pending<D, T>(p, g / p.H, g % p.H, 0);
}

template <int D, class T, int ACT, int MODE, bool ON_CHIP>
HOPE_DEVICE void step(const TitansParams& p, const Plan& plan) {
  if constexpr (kByWarpgroups<MODE>) assume(p.N == RowsOf<D, MODE>::type::hidden(p) && p.C == 64);
  // 1, 2 or 4 blocks; a division would come before the first request
  const int group = block_index() >> (plan.blocks / 2), rank = block_index() & (plan.blocks - 1);
  const bool commit_only = p.flags & kCommitOnly;
  uint32_t next = 0;  // the same for all blocks that meet
  if (!commit_only) {
    next = decode<D, T, ACT>(p, plan, group, rank, kWarps);
  } else if (const int64_t b = group / p.H; p.lengths[b] > 0) {
    if (slot_of(p, b) == p.C - 1) next = Rounded<D>::mark_of(p, b) + p.C;
    sync_block();
    if (thread_index() == 0) count_tokens(p, b, 1, plan.blocks);
  }
  if (next == 0) return;
  if (!commit_only) {  // the other blocks' part of the token
    sync_block();
    if constexpr (MODE != kGlobal) {
      if (plan.blocks > 1) {
        cluster_arrive();
        cluster_wait();
      }
    }
  }
  commit_pending<D, T, ACT, MODE, ON_CHIP>(p, plan, group, rank, next);
}

template <int D, class T, int ACT>
HOPE_KERNEL(kThreads) titans_decode(const TitansParams p, const Plan given) {
#ifndef __CUDACC__
  if constexpr (!in_fibers(D, ACT)) emulator::grid.fail("heads of width 128 run with gelu_tanh only");
  else
#endif
  {
    const Plan plan = given;  // as in plan_of_kernel
    const int group = block_index() / 4, rank = block_index() % 4;
    // nobody has arrived in the launch that commits
    if (rank == 0 && thread_index() == 0 && (p.flags & kUpdate)) p.arrivals[1 + group] = 0;
    decode<D, T, ACT>(p, plan, group, rank, plan.full_warps);
  }
}

template <int D, class T, int ACT, int MODE, bool ON_CHIP>
HOPE_KERNEL(kThreads) titans_step(const TitansParams p, const Plan plan) {
#ifdef __CUDA_ARCH__
  if constexpr (!kHasMode<MODE> || !(ON_CHIP ? kMayBeOnChip : kMayBeOffChip))
    trap();  // the launch chose a kernel that this code does not have
  else
    step<D, T, ACT, MODE, ON_CHIP>(p, plan_of_kernel<MODE>(plan));
#elif !defined(__CUDACC__)
  if constexpr (in_fibers(D, ACT)) step<D, T, ACT, MODE, ON_CHIP>(p, plan);
  else emulator::grid.fail("heads of width 128 run with gelu_tanh only");
#endif
}

}  // namespace hope
