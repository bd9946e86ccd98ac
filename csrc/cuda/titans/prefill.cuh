// titans_prefill: a whole call in one launch, the state in registers from its first token to its last.
//
// EQUATIONS   hope_kernels/ops/titans/README.md for one (row, head): every panel of up to 16 tokens is read with
//             the weights of the chunk's start; a full chunk is committed (commit.cuh).
// OWNERSHIP   Warps own hidden units (plan.h). Registers: 128 fp32 deviations a thread, which are the
//             accumulators of their own update. Shared memory: tokens, their keys and errors, partial outputs,
//             and each lane's rounded weights, refreshed once a chunk, as 16-byte fragments. With several blocks
//             a (row, head), k, v, eta, alpha of 16 tokens at a time go from one to the others.
// SCHEDULE    per panel   read shares | barrier | results to all blocks | barrier (of the cluster)
//             per chunk   + three barriers a panel, and one more (commit.cuh)
//             Shards add barriers of the (row, head): one a panel, and for a chunk one a panel and one more
//             (exchange.cuh). The next panel's x and q are fetched while this one is computed.
// BYTES       a call: the state in and out, 12 d T for x, q, o. Nothing else goes to memory in between (see Plan
//             for what overflows).
// FLOPS       80 D N + 6 C D a token and head, for which a warp issues 160 mma a panel with its commit (D = 64).
//             At 4 cycles an mma and 2 warps a scheduler that is 1300 cycles of tensor cores, beside 2500 to 3400
//             other instructions a warp (../README.md counts them): the kernel is bound by issue slots, not by
//             tensor cores.
#pragma once
#include <type_traits>

#include "commit.cuh"
#include "exchange.cuh"
#include "state.cuh"
#include "warpgroups/commit.cuh"
#include "warpgroups/one_block.cuh"
#include "warpgroups/weights.cuh"

namespace hope {

// Where a panel's results go: o to memory, the rest to every block's shared memory.
template <int D, class T, class Exchange> struct PrefillSink {
  const Exchange& exchange;
  T* o;  // row 0 of the panel, this head
  int64_t stride;
  int round, slot;
  bool update;
  HOPE_DEVICE void pair(int memory, int r, int position, uint32_t value) {
    if (memory == kMemory)
      *reinterpret_cast<uint32_t*>(o + r * stride + index_of(position)) = value;
    else if (update)
      exchange.put_pair(round, memory - kKeys, slot, r, position, value);
  }
  HOPE_DEVICE void scalar(int memory, int r, float value) {
    union { float f; uint32_t bits; } both{value};
    if (update) exchange.put_scalar(round, memory - kEta, slot, r, both.bits);
  }
};

// This row's slots first <= s < stop of the open chunk, from the pending tensors to shared memory, or back.
template <int D, class T, bool LOAD, class R>
HOPE_DEVICE void move_pending(const TitansParams& p, const Shared<D, T, R>& shared, int64_t b, int h, int first,
                              int stop) {
  for (int i = thread_index() + first * (D / 2); i < stop * (D / 2); i += kThreads) {
    const int slot = i / (D / 2), index = 2 * (i % (D / 2));
    const int64_t at = ((b * p.C + slot) * p.H + h) * D + index;
    uint32_t* k = reinterpret_cast<uint32_t*>(shared.k(slot) + R::at(position_of(index)));
    uint32_t* v = reinterpret_cast<uint32_t*>(shared.v(slot) + R::at(position_of(index)));
    uint32_t& k_there = *reinterpret_cast<uint32_t*>(static_cast<T*>(p.pending_k) + at);
    uint32_t& v_there = *reinterpret_cast<uint32_t*>(static_cast<T*>(p.pending_v) + at);
    if (LOAD) {
      store_shared(k, k_there), store_shared(v, v_there);
    } else {
      k_there = load_shared(k), v_there = load_shared(v);
    }
  }
  for (int slot = thread_index() + first; slot < stop; slot += kThreads) {
    const int64_t at = (b * p.C + slot) * p.H + h;
    if (LOAD) {
      store_shared(shared.eta() + slot, p.pending_eta[at]);
      if (p.pending_alpha) store_shared(shared.alpha() + slot, p.pending_alpha[at]);
    } else {
      p.pending_eta[at] = load_shared(shared.eta() + slot);
      if (p.pending_alpha) p.pending_alpha[at] = load_shared(shared.alpha() + slot);
    }
  }
}

template <int D, class T> HOPE_DEVICE void clear_pending(const TitansParams& p, int64_t b, int h, int first) {
  for (int i = thread_index() + first * (D / 2); i < p.C * (D / 2); i += kThreads) {
    const int64_t at = ((b * p.C + i / (D / 2)) * p.H + h) * D + 2 * (i % (D / 2));
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.pending_k) + at) = 0;
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.pending_v) + at) = 0;
  }
  for (int slot = thread_index() + first; slot < p.C; slot += kThreads) {
    p.pending_eta[(b * p.C + slot) * p.H + h] = 0.f;
    if (p.pending_alpha) p.pending_alpha[(b * p.C + slot) * p.H + h] = 0.f;
  }
}

// Zeros to o from token `first` of the call on.
template <int D, class T>
HOPE_DEVICE void clear_outputs(const TitansParams& p, int64_t b, int h, int64_t first) {
  for (int64_t i = thread_index() + first * (D / 2); i < p.T * (D / 2); i += kThreads) {
    const int64_t at = ((b * p.T + i / (D / 2)) * p.H + h) * D + 2 * (i % (D / 2));
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.o) + at) = 0;
  }
}

// What a warp reads next: a panel whose rows first <= r < stop are tokens of the call.
struct Panel {
  int token, slot, first, stop, round;
  static HOPE_DEVICE Panel of(const Call& call, int warp, int C) {
    Panel p;
    const int opened = load_shared(&call.opened), n = load_shared(&call.n);
    p.token = load_shared(call.tokens + warp);
    const unsigned at = opened + p.token;
    p.slot = at & (C - 1), p.first = at % kPanel;
    p.stop = n - p.token < kPanel - p.first ? p.first + n - p.token : kPanel;
    p.round = at / kPanel - static_cast<unsigned>(opened) / kPanel;
    return p;
  }
};

// The memory's output, from both blocks.
template <class Exchange> struct SumOfShares {
  const Exchange& exchange;
  int round;
  template <class E, int D, class T, class R>
  HOPE_DEVICE Float4 at(const Shared<D, T, R>&, const Role&, int, int i, int) const {
    return exchange.sum_of_shares(round, 0, i);
  }
};

// After the barrier that follows read_shares: results go where they belong, and the warp goes on to the next
// panel. Of two shards the first one has the results.
template <int D, class T, class Exchange, class R>
HOPE_DEVICE void finish_panel(const TitansParams& p, const Shared<D, T, R>& shared, const Exchange& exchange) {
  const int thread = thread_index_again(), lane = thread & 31, warp = thread >> 5;
  const bool update = p.flags & kUpdate;
  Call& call = shared.call();
  const Panel now = Panel::of(call, warp, p.C);
  const int slot = update ? now.slot - now.first : 0;
  const Role role = call.role(shared.plan, warp);
  const T* tile = shared.input(role.memory == kMemory, now.round & 1);
  const int64_t stride = static_cast<int64_t>(p.H) * D;
  T* o = static_cast<T*>(p.o) + load_shared(&call.first_token) + (now.token - now.first) * stride;
  PrefillSink<D, T, Exchange> sink{exchange, o, stride, now.round, slot, update};
  const int h = load_shared(&call.head);
  if constexpr (Exchange::kSharded) {
    if (role.full()) {
#pragma unroll
      for (int i = 0; i < D / 64; ++i)
        exchange.put_share(now.round, 0, i, Gathered{}.at<Epilogue<D, kWarps>>(shared, role, role.within, i, lane));
    }
    exchange.barrier();
    if (!role.full() || exchange.shard() == 0)
      read_results<D, T>(p, shared, role, tile, h, now.first, now.stop, lane, sink,
                         SumOfShares<Exchange>{exchange, now.round});
  } else if (update || role.memory == kMemory) {
    read_results<D, T>(p, shared, role, tile, h, now.first, now.stop, lane, sink);
  }
  wait_copies();
  if (update)
    exchange.finish(now.round, slot, now.first, now.stop, role.memory != kMemory);
  else
    sync_block();
  if (lane == 0) store_shared(call.tokens + warp, now.token + now.stop - now.first);
  sync_warp();
}

// The chunk that is full now, by the way of the launch.
template <int D, class T, int ACT, bool ON_CHIP, int MODE, bool SHARDED>
HOPE_DEVICE void commit_chunk(float (&state)[16][8], const TitansParams& p,
                              const Shared<D, T, typename RowsOf<D, MODE>::type>& shared,
                              const Exchange<D, T, MODE, SHARDED>& exchange) {
  if constexpr (MODE == kWarpgroups)
    WarpgroupCommit<T, ACT>{{p, shared}}.run(state);
  else if constexpr (MODE == kOneBlock)
    OneBlockCommit<T, ACT>{{p, shared}}.run(state);
  else
    Commit<D, T, ACT, ON_CHIP, Exchange<D, T, MODE, SHARDED>>{p, shared, exchange}.run(state);
}

template <int D, class T, int ACT, int MODE, bool ON_CHIP, bool SHARDED>
HOPE_DEVICE void prefill(const TitansParams& p, const Plan& plan) {
  if constexpr (kByWarpgroups<MODE>) assume(p.N == RowsOf<D, MODE>::type::hidden(p) && p.C == 64);
  const bool update = p.flags & kUpdate;

  // --- which (row, head), and which of its blocks ---
  int group = block_index() / plan.blocks, rank = block_index() % plan.blocks;
  if constexpr (MODE == kGlobal) {
    if (plan.blocks > 1) {
      uint32_t* ticket = reinterpret_cast<uint32_t*>(shared_memory());
      if (thread_index() == 0) store_shared(ticket, static_cast<uint32_t>(fetch_add_release(p.arrivals, 1)));
      sync_block();
      group = load_shared(ticket) / plan.blocks, rank = load_shared(ticket) % plan.blocks;
      sync_block();
    }
  }
  using Blocks = Exchange<D, T, MODE, SHARDED>;
  const Shared<D, T, typename Blocks::Rows> shared{plan};
  Call& call = shared.call();
  {
    const int lane = lane_index(), warp = warp_index();
    const int64_t b = group / p.H, asked = p.lengths[b];
    const int h = group % p.H;
    const int n = static_cast<int>(asked < 0 ? 0 : asked > p.T ? p.T : asked);
    const int opened = slot_of(p, b);
    if (rank == 0 && n < p.T) clear_outputs<D, T>(p, b, h, n);
    // the same for all blocks of the group; where they only read, the blocks of M_memory alone stay
    if (n == 0 || (!update && rank >= plan.shards)) return;
    call.enter<D>(p, plan, group, rank);
    if (thread_index() == 0) {
      store_shared(&call.n, n), store_shared(&call.opened, opened);
      store_shared(&call.first_token, (b * p.T * p.H + h) * static_cast<int64_t>(D));
    }
    if (lane == 0) store_shared(call.tokens + warp, 0);
    // for a commit
    if (update && opened + n >= p.C) move_pending<D, T, true>(p, shared, b, h, 0, opened);
  }
  sync_block();
  if (thread_index() == 0) count_tokens(p, group / p.H, load_shared(&call.n), plan.blocks);
  const Blocks exchange{shared, p, plan};
  if (update) exchange.begin();

  // Tokens from `token` on, up to the end of the panel, to the buffer of their round.
  const auto fetch = [&](int token) {
    const int n = load_shared(&call.n), opened = load_shared(&call.opened), rank_ = load_shared(&call.rank);
    if (token >= n) return;
    const unsigned at = opened + token;
    const int first = at % kPanel, buffer = (at / kPanel - static_cast<unsigned>(opened) / kPanel) & 1;
    const int stop = n - token < kPanel - first ? first + n - token : kPanel;
    const int64_t stride = static_cast<int64_t>(p.H) * D;
    const int64_t from = load_shared(&call.first_token) + (token - first) * stride;
    if (rank_ < Blocks::kShards)
      fetch_panel<D>(shared.input(true, buffer), static_cast<const T*>(p.q) + from, stride, first, stop,
                     kThreads);
    if (update && (plan.blocks == 1 || rank_ >= Blocks::kShards || plan.full_warps < kWarps))
      fetch_panel<D>(shared.input(false, buffer), static_cast<const T*>(p.x) + from, stride, first, stop, kThreads);
  };
  fetch(0);

  // --- the state ---
  float state[16][8];
  {
    const int lane = lane_index(), warp = warp_index();
    const Role role = call.role(plan, warp);
    load_state<D, T>(state, p, shared, role, exchange.warps_before(role), group, warp, lane);
  }
  wait_copies();
  sync_block();

  // --- panel after panel ---
  bool first_round = true;
  for (;;) {
    const int thread = thread_index_again(), lane = thread & 31, warp = thread >> 5;
    const Own own{p, plan, call, warp, lane};
    const WeightsOf<D, MODE, ON_CHIP> weights{own};
    const Panel now = Panel::of(call, warp, p.C);
    // a new chunk: rounded weights, and the exchange, are those of the one before
    const bool fresh = first_round || (update && now.slot == 0);
    first_round = false;
    if (fresh) {
      const Role role = call.role(plan, warp);
      const Bases<T> bases = Bases<T>::of(p, load_shared(&call.head), D, plan.memories);
      const Place<D> place = Place<D>::of(p, role, exchange.warps_before(role));
      if constexpr (kByWarpgroups<MODE>)
        round_weights_by_units<T>(state, weights, bases, place, role, lane);
      else
        round_weights<D, T>(state, weights, own, bases, place, role, p.N, lane);
    }
    fetch(now.token + now.stop - now.first);
    {
      const Role role = call.role(plan, warp);
      const T* tile = shared.input(role.memory == kMemory, now.round & 1);
      if (update || role.memory == kMemory) read_shares<D, T, ACT>(shared, role, tile, weights, warp, lane);
    }
    sync_block();
    if (update && fresh) exchange.acquire();
    finish_panel<D, T>(p, shared, exchange);
    if (update && Panel::of(call, thread_index_again() >> 5, p.C).slot == 0) {
      commit_chunk<D, T, ACT, ON_CHIP>(state, p, shared, exchange);
      if (load_shared(call.tokens + (thread_index_again() >> 5)) < load_shared(&call.n)) exchange.release();
    }
    if (load_shared(call.tokens + (thread_index_again() >> 5)) >= load_shared(&call.n)) break;
  }

  // --- the state again ---
  const int g = load_shared(&call.group), opened = load_shared(&call.opened), end = opened + load_shared(&call.n);
  if (!update) return;
  const bool committed = end >= p.C;
  if (load_shared(&call.rank) == 0) {  // which keeps the pending tokens
    move_pending<D, T, false>(p, shared, g / p.H, g % p.H, committed ? 0 : opened, end & (p.C - 1));
    if (committed) clear_pending<D, T>(p, g / p.H, g % p.H, end & (p.C - 1));
  }
  const int thread = thread_index_again(), lane = thread & 31, warp = thread >> 5;
  const Role role = call.role(plan, warp);
  if (committed) store_state<D, T>(state, p, shared, role, exchange.warps_before(role), g, warp, lane);
}

#ifdef __CUDA_ARCH__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif
// Whether this code has kernels of a mode.
template <int MODE>
constexpr bool kHasMode = kByWarpgroups<MODE> ? kHasWarpgroups : (MODE == kCluster) == in_clusters(__CUDA_ARCH__ / 10);
constexpr bool kMayBeOnChip = may_be_on_chip(__CUDA_ARCH__ / 10), kMayBeOffChip = may_be_off_chip(__CUDA_ARCH__ / 10);
#elif !defined(__CUDACC__)
// Less for a host to compile: another activation's code is that of width 64.
constexpr bool in_fibers(int D, int act) { return D == 64 || act == kGeluTanh; }
#endif

// Kernels that spill a few words beside a copy of their plan.
template <int D, class T, int ACT, int MODE, bool ON_CHIP, bool SHARDED>
constexpr bool kSpillsWithCopy = D == 64 ? ACT == kGelu && MODE == kGlobal && !ON_CHIP
                                         : std::is_same_v<T, fp16> && MODE == kCluster && ON_CHIP && SHARDED;

// T: bf16, fp16. ON_CHIP: the plan has found room for the rounded weights in shared memory. SHARDED:
// plan.shards is 2.
template <int D, class T, int ACT, int MODE, bool ON_CHIP, bool SHARDED>
HOPE_KERNEL(kThreads) titans_prefill(const TitansParams p, const Plan plan) {
#ifdef __CUDA_ARCH__
  if constexpr (!kHasMode<MODE> || !(ON_CHIP ? kMayBeOnChip : kMayBeOffChip))
    trap();  // the launch chose a kernel that this code does not have
  else if constexpr (kSpillsWithCopy<D, T, ACT, MODE, ON_CHIP, SHARDED>)
    prefill<D, T, ACT, MODE, ON_CHIP, SHARDED>(p, plan);
  else
    prefill<D, T, ACT, MODE, ON_CHIP, SHARDED>(p, plan_of_kernel<MODE>(plan));
#elif !defined(__CUDACC__)
  if constexpr (in_fibers(D, ACT)) prefill<D, T, ACT, MODE, ON_CHIP, SHARDED>(p, plan);
  else emulator::grid.fail("heads of width 128 run with gelu_tanh only");
#endif
}

}  // namespace hope
