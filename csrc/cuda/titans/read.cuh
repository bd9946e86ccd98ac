// Reading 16 tokens: o from M_memory (q), k, v, eta, alpha from the others (x'). Two stages with a barrier
// between them: every warp its share of its memory's output, then the memory's warps some tokens each (Epilogue):
// sum, skip connection, norm.
#pragma once
#include "forward.cuh"
#include "role.cuh"
#include "shared.cuh"

namespace hope {

// Copies rows first <= r < stop of a panel, two numbers at a time; row 0 would lie at `from`. Other rows
// become zero. threads: of the block, all of which call.
template <int D, class T>
HOPE_DEVICE void fetch_panel(T* tile, const T* from, int64_t stride, int first, int stop, int threads) {
  for (int i = thread_index_again(); i < kPanel * D / 2; i += threads) {
    const int r = i / (D / 2), index = 2 * (i % (D / 2));
    const bool valid = first <= r && r < stop;
    copy_async4(tile + r * Width<D>::kRow + position_of(index), valid ? from + r * stride + index : from, valid);
  }
}

// Stage 1: partial outputs to shared memory.
template <int D, class T, int ACT, class R, class Weights>
HOPE_DEVICE void read_shares(const Shared<D, T, R>& shared, const Role& role, const T* tile,
                             const Weights& weights, int warp, int lane) {
  float z[8], unused[8];
  if (role.full()) {
    uint32_t h[Width<D>::kGroups][4];
#pragma unroll
    for (int g = 0; g < Width<D>::kGroups; ++g) {
      hidden_group<D, T, ACT, false>(z, unused, tile, weights, g, lane);
      as_operand<T>(h[g], z);
    }
    output_part<D, T>(shared.part(warp, 0), h, weights, lane);
  } else {
    float y[2] = {};
#pragma unroll Weights::kUnroll
    for (int g = 0; g < Width<D>::kScalarGroups; ++g) {
      hidden_group<D, T, ACT, false>(z, unused, tile, weights, g, lane);
      add_scalar(y, z, scalar_weights(shared.delta1s(warp), shared.base1s(warp), g, lane));
    }
    store_sums(shared.sums(warp, 0), y, lane);
  }
}

// A lane's two numbers at `position` of a tile's rows r (x, y) and r + 8 (z, w).
template <int D, class T> HOPE_DEVICE Float4 two_rows(const T* tile, int r, int position) {
  const Float2 a = unpack2<T>(load_shared(reinterpret_cast<const uint32_t*>(tile + r * Width<D>::kRow + position)));
  const Float2 b =
      unpack2<T>(load_shared(reinterpret_cast<const uint32_t*>(tile + (r + 8) * Width<D>::kRow + position)));
  return {a.x, a.y, b.x, b.y};
}

HOPE_DEVICE Float4 operator+(Float4 a, Float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// 1 / max(|row|, 1e-6) of rows r and r + 8, each spread over the lanes of a pair.
template <class E> HOPE_DEVICE Float2 inverse_norms(const Float4 (&rows)[E::kEach]) {
  float a = 0.f, b = 0.f;
#pragma unroll
  for (int i = 0; i < E::kEach; ++i) {
    a = fma_(rows[i].x, rows[i].x, fma_(rows[i].y, rows[i].y, a));
    b = fma_(rows[i].z, rows[i].z, fma_(rows[i].w, rows[i].w, b));
  }
  a = sqrt_(E::sum(a)), b = sqrt_(E::sum(b));
  return {divide(1.f, a > 1e-6f ? a : 1e-6f), divide(1.f, b > 1e-6f ? b : 1e-6f)};
}

HOPE_DEVICE Float4 scaled(Float4 v, Float2 by) { return {v.x * by.x, v.y * by.x, v.z * by.y, v.w * by.y}; }

template <class T> HOPE_DEVICE float bias_of(const void* p, int h, bool fp32) {
  return fp32 ? static_cast<const float*>(p)[h] : unpack2<T>(static_cast<const uint16_t*>(p)[h]).x;
}

// A lane's i-th four numbers of the memory's output, from the partial ones of this block's warps.
struct Gathered {
  template <class E, int D, class T, class R>
  HOPE_DEVICE Float4 at(const Shared<D, T, R>& shared, const Role& role, int r, int i, int lane) const {
    return E::gather(shared.part(role.first(), 0), Shared<D, T, R>::kPart, r, E::column(lane, i), lane);
  }
};

template <class E, int D, class T, class R, class Sink, class Outputs>
HOPE_DEVICE void full_results(const TitansParams& p, const Shared<D, T, R>& shared, const Role& role, const T* tile,
                              int first, int stop, int lane, Sink& sink, const Outputs& outputs) {
  const int r = E::pair(role.within, lane);
  Float4 y[E::kEach];
#pragma unroll
  for (int i = 0; i < E::kEach; ++i)
    y[i] = two_rows<D, T>(tile, r, 8 * E::column(lane, i) + 2 * (lane & 3)) +
           outputs.template at<E>(shared, role, r, i, lane);
  Float2 by{1.f, 1.f};
  if (role.memory == kKeys && (p.flags & kUnitK)) by = inverse_norms<E>(y);
#pragma unroll
  for (int i = 0; i < E::kEach; ++i) {
    const int position = 8 * E::column(lane, i) + 2 * (lane & 3);
    const Float4 out = scaled(y[i], by);
    if (first <= r && r < stop) sink.pair(role.memory, r, position, pack2<T>(out.x, out.y));
    if (first <= r + 8 && r + 8 < stop) sink.pair(role.memory, r + 8, position, pack2<T>(out.z, out.w));
  }
}

// Stage 2: sink.pair(memory, r, position, two numbers of T) and sink.scalar(memory, r, number) for the rows
// first <= r < stop that are read.
template <int D, class T, class R, class Sink, class Outputs = Gathered>
HOPE_DEVICE void read_results(const TitansParams& p, const Shared<D, T, R>& shared, const Role& role,
                              const T* tile, int h, int first, int stop, int lane, Sink& sink, const Outputs& outputs = {}) {
  if (role.full()) {
    with_epilogue<D>(role.warps(), [&](auto e) {
      full_results<decltype(e)>(p, shared, role, tile, first, stop, lane, sink, outputs);
    });
  } else if (!role.idle() && role.within == 0 && first <= lane && lane < stop) {
    float y = bias_of<T>(role.memory == kEta ? p.eta_bias : p.alpha_bias, h, p.flags & kFloatBias);
    for (int w = 0; w < role.warps(); ++w) y += load_shared(shared.sums(role.first() + w, 0) + lane);
    float gate = sigmoid(y);
    if (role.memory == kEta) {
      if (p.flags & kSoftplus) gate = (y > 0.f ? y : 0.f) + log1p_(exp_(y > 0.f ? -y : y));
      gate *= p.eta_scale;
    }
    sink.scalar(role.memory, lane, gate);
  }
}

}  // namespace hope
