// What one token reads of the weights, kept beside a state for the tokens to come: base + deviation, rounded.
// With it a token reads 2 bytes a weight in place of 6, in loads of 16 bytes a lane, and rounds nothing.
// Rounding is deterministic: no bit of any result depends on whether a copy is kept.
//
// LAYOUT   [B, H, warps of a head, kKeptNumbers] of T. Of each warp: its 16 blocks, 16 bytes a lane, {x, z, y,
//          w} of each as in StoredWeights; of a scalar memory base + deviation of w1, in fp32; a mark.
// TRUTH    Kernels change weights where a chunk is committed and nowhere else, so `pos` says which chunk's
//          weights they are: the mark is the position of the chunk's first token, plus one (so that 0 marks
//          nothing). A commit of titans_step keeps what it leaves, but for one by warpgroups. A token that finds
//          another mark rounds anew and keeps that: the first one, and any after other kernels (prefill, another
//          graph) have read on. Positions count modulo 2^32 here. Weights that are written without a commit are
//          the host's to find (hope_kernels/ops/titans/rounded.py), which then clears the marks.
#pragma once
#include "fragments.cuh"
#include "role.cuh"
#include "shared.cuh"

namespace hope {

template <int D> struct Rounded {
  uint32_t* words;  // of a warp; null: no copy is kept
  static constexpr int kEach = Width<D>::kScalarUnits / 32;
  static constexpr int kScalars = 2048, kMark = kScalars + 64;
  static_assert(2 * (kMark + 4) == kKeptNumbers && Width<D>::kScalarUnits <= 64);

  // What a lane has of it.
  struct Held {
    Word4 blocks[16];
    uint32_t scalars[kEach];
    uint32_t mark;
  };

  static HOPE_DEVICE Rounded of(const TitansParams& p, int64_t warp) {
    return {p.rounded ? static_cast<uint32_t*>(p.rounded) + warp * (kKeptNumbers / 2) : nullptr};
  }
  // Of the open chunk; C more is that of the next one.
  static HOPE_DEVICE uint32_t mark_of(const TitansParams& p, int64_t b) {
    return (reinterpret_cast<const uint32_t*>(p.pos)[2 * b] & ~static_cast<uint32_t>(p.C - 1)) + 1;
  }

  HOPE_DEVICE Word4& block(int i, int lane) const { return reinterpret_cast<Word4*>(words)[32 * i + lane]; }
  // What is kept, whatever it is true of.
  HOPE_DEVICE void load(Held& held, int lane) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const Word4 v = load_ahead(&block(i, lane));
      held.blocks[i] = {v.x, v.z, v.y, v.w};
    }
    held.mark = load_ahead(words + kMark);
  }
  HOPE_DEVICE void load_scalars(Held& held, int lane) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) held.scalars[i] = load_ahead(words + kScalars + 32 * i + lane);
  }
  // To where load_scalar_weights puts base and deviation.
  template <class T>
  HOPE_DEVICE void put_scalars(const Shared<D, T>& shared, const Held& held, int warp, int lane) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      store_shared(reinterpret_cast<uint32_t*>(shared.delta1s(warp)) + 32 * i + lane, held.scalars[i]);
      store_shared(shared.base1s(warp) + 32 * i + lane, 0.f);
    }
    sync_warp();
  }
  // One of a lane's blocks, for round_weights too.
  HOPE_DEVICE void put(int i, Word4 v) const { block(i, lane_index()) = {v.x, v.z, v.y, v.w}; }
  // After all of them: what load_scalar_weights has put into shared memory, and what the copy is true of.
  template <class T>
  HOPE_DEVICE void finish(const Shared<D, T>& shared, uint32_t mark, bool full, int warp, int lane) const {
    if (!full) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int unit = 32 * i + lane;
        reinterpret_cast<float*>(words + kScalars)[unit] =
            load_shared(shared.delta1s(warp) + unit) + load_shared(shared.base1s(warp) + unit);
      }
    }
    sync_warp();  // all lanes have seen the old mark
    if (lane == 0) words[kMark] = mark;
  }
};

}  // namespace hope
