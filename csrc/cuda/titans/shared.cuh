// A block's shared memory by name (plan.h says what lies where), and a lane's own data wherever the plan has
// put it.
#pragma once
#include "fragments.cuh"
#include "role.cuh"

namespace hope {

// How the keys, values and errors of a chunk lie: rows one after another, or as a product of warpgroups reads them
// (../warpgroup.cuh), in pieces of 8 tokens by 8 positions; the pieces of 8 positions are a column of tokens, and 16
// bytes more keep stores of one token to several columns free of bank conflicts.
template <int D> struct PaddedRows {
  static constexpr bool kPieces = false;
  static constexpr int kRow = Width<D>::kRow;
  HOPE_DEVICE static int hidden(const TitansParams& p) { return p.N; }
  HOPE_DEVICE static int at(int position) { return position; }
  HOPE_DEVICE static int tile(int C) { return C * kRow; }  // numbers of a tile
};
// Of 64 tokens, in heads with N hidden units: a constant for the compiler.
constexpr int kPieceColumn = 64 * 8 + 8;
template <int N> struct PieceRows {
  static constexpr bool kPieces = true;
  static constexpr int kRow = 8;
  HOPE_DEVICE static int hidden(const TitansParams&) { return N; }
  HOPE_DEVICE static int at(int position) { return (position >> 3) * kPieceColumn + (position & 7); }
  HOPE_DEVICE static int tile(int) { return 8 * kPieceColumn; }
};

template <int D, class T, class Rows = PaddedRows<D>> struct Shared {
  const Plan& plan;
  static constexpr int kRow = Rows::kRow;

  template <class V> HOPE_DEVICE V* at(int offset) const { return reinterpret_cast<V*>(shared_memory() + offset); }

  HOPE_DEVICE Call& call() const { return *at<Call>(plan.call); }
  HOPE_DEVICE T* input(bool query, int buffer) const {
    return at<T>(query ? plan.q : plan.x) + buffer * kPanel * Width<D>::kRow;
  }
  HOPE_DEVICE T* k(int slot) const { return at<T>(plan.k) + slot * kRow; }
  HOPE_DEVICE T* v(int slot) const { return at<T>(plan.v) + slot * kRow; }
  HOPE_DEVICE T* kg(int slot) const { return v(slot); }
  // Of k, v and e: as corner and corner_b of fragments.cuh.
  HOPE_DEVICE static const T* rows(const T* tile, int c, int lane) {
    return tile + (lane & 15) * kRow + Rows::at(c + (lane >> 4) * 8);
  }
  HOPE_DEVICE static const T* rows_b(const T* tile, int c, int lane) {
    return tile + ((lane & 7) + (lane >> 4) * 8) * kRow + Rows::at(c + ((lane >> 3) & 1) * 8);
  }
  HOPE_DEVICE T* e(int tile, int slot, int C) const { return at<T>(plan.e) + tile * Rows::tile(C) + slot * kRow; }
  HOPE_DEVICE float* eta() const { return at<float>(plan.eta); }
  HOPE_DEVICE float* alpha() const { return at<float>(plan.alpha); }
  HOPE_DEVICE Word4* solve(int p, int q) const { return at<Word4>(plan.solve) + 64 * (q * (q + 1) / 2 + p); }
  HOPE_DEVICE float* before() const { return at<float>(plan.before); }
  HOPE_DEVICE float* after() const { return at<float>(plan.after); }
  HOPE_DEVICE float* decay_panel() const { return at<float>(plan.decay_panel); }
  HOPE_DEVICE float* erase() const { return at<float>(plan.erase); }
  HOPE_DEVICE float* decay_after() const { return at<float>(plan.decay_after); }
  HOPE_DEVICE float* decay_chunk(int C) const { return decay_after() + C; }
  HOPE_DEVICE float* e2(int warp, int C) const { return at<float>(plan.e2) + warp * C; }
  HOPE_DEVICE float* es(int warp, int C) const { return at<float>(plan.es) + warp * C; }
  HOPE_DEVICE float* norms(int warp, int kind, int C) const { return at<float>(plan.norms) + (2 * warp + kind) * C; }
  HOPE_DEVICE float* gain(int warp, int C) const { return at<float>(plan.gain) + warp * C; }
  HOPE_DEVICE float* sums(int warp, int kind) const { return at<float>(plan.sums) + (2 * warp + kind) * kPanel; }
  HOPE_DEVICE float* delta1s(int warp) const { return at<float>(plan.delta1s) + warp * Width<D>::kScalarUnits; }
  HOPE_DEVICE float* base1s(int warp) const { return at<float>(plan.base1s) + warp * Width<D>::kScalarUnits; }
  // Partial outputs of a warp: 4 D Float4. Where there is one buffer only, buffer 1 is buffer 0.
  static constexpr int kPart = 4 * D;
  HOPE_DEVICE Float4* part(int warp, int buffer) const {
    return at<Float4>(plan.parts) + (warp + (plan.one_buffer ? 0 : buffer) * kWarps) * kPart;
  }
};

// Data that no other lane ever sees, read and written by plain loads and stores: in shared memory or, where
// that is full, in the block's part of the scratch.
struct Own {
  const TitansParams& p;
  const Plan& plan;
  const Call& call;
  int warp, lane;
  HOPE_DEVICE Word4* at(int offset) const {
    unsigned char* base = shared_memory() + offset;
    if (offset < 0)
      base = p.scratch + load_shared(&call.scratch) + (-1 - offset);
    return reinterpret_cast<Word4*>(base) + lane;
  }
};

// A warp's rounded weights. ON_CHIP: in shared memory, known to the compiler. They lie as {x, z, y, w}: x and z, y
// and w are operands b of mma, which takes neighbouring registers, so nothing has to be moved after a load.
template <int D, bool ON_CHIP> struct StoredWeights {
  Own own;
  static constexpr int kUnroll = 1;  // groups of scalar memories: a loop, weights are in memory
  HOPE_DEVICE Word4& block(int i) const {
    if constexpr (ON_CHIP)
      return reinterpret_cast<Word4*>(shared_memory() + own.plan.weights)[512 * own.warp + 32 * i + own.lane];
    else
      return own.at(own.plan.weights)[512 * own.warp + 32 * i];
  }
  HOPE_DEVICE void put(int i, Word4 v) const { block(i) = {v.x, v.z, v.y, v.w}; }
  HOPE_DEVICE Word4 get(int i) const {
    const Word4 v = block(i);
    return {v.x, v.z, v.y, v.w};
  }
  HOPE_DEVICE Word4 w2(int g, int s) const { return get(g * Width<D>::kSteps + s); }
  HOPE_DEVICE Word4 w1(int i, int g) const { return get(8 + i * Width<D>::kGroups + g); }
};

}  // namespace hope
