// How the blocks of a (row, head) give each other the tokens they have read: k, v [16, D], eta, alpha [16] of
// one panel; and, SHARDED, how the two blocks of a memory exchange their shares of its output and norms.
//
// kCluster: the blocks are a cluster. A number is stored into the shared memory of each of them, and a barrier
// of the cluster makes it visible. Once a block has committed, it reads its chunk no longer, and the others may
// write the next chunk's tokens over it: a second barrier, at which blocks arrive after the commit and wait
// before their next writes, a whole read later.
// kGlobal: the blocks belong to one grid and exchange through mail in global memory, double-buffered, and a
// counter of arrivals. They have taken their places in the order of an atomic ticket, so the blocks a block
// waits for have started or will: no order of scheduling deadlocks as long as the device holds one (row, head)
// at a time.
// With one block to a (row, head) both are a barrier of the block. A launch that only commits exchanges
// nothing.
//
// SHARES go through the scratch in either mode (shared memory has no room for them on every device) and are
// read, in the order of ranks, by the lanes of both blocks that have the sender's place in theirs. Three or
// four barriers a panel order them: between the barrier at which a place's readers have waited and the next
// write to it lies another barrier. One of these barriers lies between a commit and the next tokens to arrive,
// so begin, acquire and release have nothing left to do.
#pragma once
#include "role.cuh"
#include "shared.cuh"

namespace hope {

// Where chunks are committed by products of warpgroups, the blocks of a cluster are four, one or two memories each
// (kWarpgroups, warpgroups/commit.cuh), or one block has all memories (kOneBlock, warpgroups/one_block.cuh).
enum Mode : int { kCluster, kGlobal, kWarpgroups, kOneBlock };
template <int MODE> constexpr bool kByWarpgroups = MODE == kWarpgroups || MODE == kOneBlock;
template <int D, int MODE> struct RowsOf { using type = PaddedRows<D>; };
template <int D> struct RowsOf<D, kWarpgroups> { using type = PieceRows<256>; };
template <int D> struct RowsOf<D, kOneBlock> { using type = PieceRows<64>; };

template <int D, class T, int MODE, bool SHARDED> struct Exchange {
  using Rows = typename RowsOf<D, MODE>::type;
  const Shared<D, T, Rows> shared;
  const TitansParams& p;
  const Plan& plan;
  static constexpr bool kSharded = SHARDED;
  static constexpr int kShards = SHARDED ? 2 : 1;

  static constexpr int kMail = kPanel * D + 2 * kPanel;
  HOPE_DEVICE uint32_t* mail(int round) const {
    const int group = load_shared(&shared.call().group);
    return reinterpret_cast<uint32_t*>(p.scratch + group * plan.blocks * plan.scratch_bytes) + (round & 1) * kMail;
  }

  // --- shares ---
  HOPE_DEVICE int shard() const { return SHARDED ? load_shared(&shared.call().rank) & 1 : 0; }
  // The memory's warps in blocks of lower rank.
  HOPE_DEVICE int warps_before(const Role& role) const { return SHARDED && role.full() ? shard() * kWarps : 0; }
  // What block `which` of this block's memory has at an offset of its scratch.
  template <class V> HOPE_DEVICE V* of_shard(int which, int offset) const {
    const int first = load_shared(&shared.call().group) * plan.blocks + (load_shared(&shared.call().rank) & ~1);
    return reinterpret_cast<V*>(p.scratch + (first + which) * plan.scratch_bytes + offset);
  }
  // A lane's i-th four numbers of M(k) (kind 0) or M(v) (1) of a panel.
  HOPE_DEVICE Float4* share(int which, int panel, int kind, int i) const {
    const int thread = thread_index_again();
    return of_shard<Float4>(which, plan.shares) + ((2 * (panel & 1) + kind) * (D / 64) + i) * kThreads + thread;
  }
  HOPE_DEVICE void put_share(int panel, int kind, int i, Float4 sum) const { *share(shard(), panel, kind, i) = sum; }
  HOPE_DEVICE Float4 sum_of_shares(int panel, int kind, int i) const {
    const Float4 a = load_fresh(share(0, panel, kind, i)), b = load_fresh(share(1, panel, kind, i));
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // |a|^2 (kind 0) or |d|^2 (1) of token t of the chunk.
  HOPE_DEVICE float* norm_share(int which, int kind, int t) const {
    return of_shard<float>(which, plan.norm_shares) + kind * p.C + t;
  }
  HOPE_DEVICE float sum_of_norms(int kind, int t) const {
    return load_fresh(norm_share(0, kind, t)) + load_fresh(norm_share(1, kind, t));
  }
  // What the blocks have put before this barrier is there for all of them after it.
  HOPE_DEVICE void barrier() const {
    if constexpr (MODE != kGlobal) {
      cluster_arrive();
      cluster_wait();
    } else {
      sync_block();
      arrive_and_wait();
      sync_block();
    }
  }

  // --- tokens ---
  // Blocks of a cluster may be written to once they have started.
  HOPE_DEVICE void begin() const { release(); }
  // Before the puts of the first panel after begin() or release().
  HOPE_DEVICE void acquire() const {
    if constexpr (MODE != kGlobal && !SHARDED) {
      if (plan.blocks > 1) cluster_wait();
    }
  }
  HOPE_DEVICE void put(int round, uint32_t* place, int word, uint32_t value) const {
    if constexpr (MODE != kGlobal) {
      if (plan.blocks > 1) {
#pragma unroll 1
        for (int r = 0; r < plan.blocks; ++r) store_remote(place, r, value);
        return;
      }
    } else if (plan.blocks > 1) {
      mail(round)[word] = value;
    }
    store_shared(place, value);
  }
  // Two numbers of k (kind 0) or v (1) at row r of the panel that starts at `slot`.
  HOPE_DEVICE void put_pair(int round, int kind, int slot, int r, int position, uint32_t pair) const {
    T* tile = kind == 0 ? shared.k(slot + r) : shared.v(slot + r);
    put(round, reinterpret_cast<uint32_t*>(tile + Rows::at(position)),
        (kind * kPanel + r) * (D / 2) + position / 2, pair);
  }
  // eta (kind 0) or alpha (1).
  HOPE_DEVICE void put_scalar(int round, int kind, int slot, int r, uint32_t bits) const {
    float* place = (kind == 0 ? shared.eta() : shared.alpha()) + slot + r;
    put(round, reinterpret_cast<uint32_t*>(place), kPanel * D + kind * kPanel + r, bits);
  }
  // Afterwards what all blocks have put into rows first <= r < stop of the panel is in this block's shared
  // memory. Also a barrier of the block. puts: whether the warp has put anything. One that has stored o and nothing
  // else would wait for global memory before it arrives (a release is MEMBAR.ALL.GPU, at the scope of a cluster too);
  // what it has done for its own block is ordered by a barrier of that block.
  HOPE_DEVICE void finish(int round, int slot, int first, int stop, bool puts) const {
    if constexpr (MODE != kGlobal) {
      if (plan.blocks > 1) {
        if (!SHARDED && load_shared(&shared.call().rank) == 0) sync_block();  // where M_memory is
        if (SHARDED || puts)
          cluster_arrive();
        else
          cluster_arrive_relaxed();
        cluster_wait();
        return;
      }
      sync_block();
    } else {
      sync_block();
      if (plan.blocks == 1) return;
      arrive_and_wait();
      sync_block();
      const uint32_t* letter = mail(round);
      const int rank = load_shared(&shared.call().rank);
      // memories with D outputs fill blocks of their own, or two a block, so a word is this block's or another's
      // as a whole; of two shards the first one puts
      for (int i = thread_index_again(); i < kMail; i += kThreads) {
        const bool scalar = i >= kPanel * D;
        const int kind = scalar ? (i - kPanel * D) / kPanel : i / (kPanel * D / 2);
        const int first_warp =
            kShards * plan.full_warps * (scalar ? 3 : 1 + kind) + (scalar ? kind * plan.scalar_warps : 0);
        const int r = scalar ? i % kPanel : i / (D / 2) % kPanel;
        if (first_warp / kWarps == rank || (scalar && kEta + kind >= plan.memories) || r < first || r >= stop) continue;
        const uint32_t word = load_fresh(letter + i);
        if (scalar) {
          store_shared(reinterpret_cast<uint32_t*>((kind == 0 ? shared.eta() : shared.alpha()) + slot + r), word);
        } else {
          const int position = 2 * (i % (D / 2));
          store_shared(
              reinterpret_cast<uint32_t*>((kind == 0 ? shared.k(slot + r) : shared.v(slot + r)) + Rows::at(position)),
              word);
        }
      }
      sync_block();
    }
  }
  // This block reads the chunk's tokens no longer. `mail` needs no such signal: a block reads it before it
  // arrives at the next round, and no block writes the round after that before all have arrived.
  HOPE_DEVICE void release() const {
    if constexpr (MODE != kGlobal && !SHARDED) {
      if (plan.blocks > 1) cluster_arrive();
    }
  }

 private:
  // One thread of each block, for the block: the number of arrivals tells which barrier of the call this is.
  HOPE_DEVICE void arrive_and_wait() const {
    if (thread_index_again() != 0) return;
    unsigned int* arrivals = p.arrivals + 1 + load_shared(&shared.call().group);
    const unsigned int blocks = plan.blocks, all = (fetch_add_release(arrivals, 1) / blocks + 1) * blocks;
    while (load_acquire(arrivals) < all) pause();
  }
};

}  // namespace hope
