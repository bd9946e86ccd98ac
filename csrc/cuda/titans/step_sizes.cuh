// The step sizes of a chunk: gain_t = eta_t / max(1, S_t), S_t = c m_t sum_s eta_s m_s (k_t.k_s)^2, with m_t^2 =
// |a_t|^2 + |d_t|^2 / |e_t|^2 of a memory, c = grad_scale (dot: 1). Without a clip the gains are eta.
//
// Products of keys are those of all memories. So every memory's warps have its m first, and after a barrier a warp
// has the products of eight keys with all of the chunk, for all memories of the block or, where there are warps
// enough, for every other one. FLOPs a block: 2 C^2 D, or twice that.
#pragma once
#include "clock.cuh"

namespace hope {

// m and eta m [2][C] of the memory whose first warp here is `first`, where its partial outputs were.
template <class S> HOPE_DEVICE float* sizes_of(const S& shared, int first) {
  return reinterpret_cast<float*>(shared.part(first, 0));
}

// Of the warp's memory.
template <int D, class T, class Exchange>
HOPE_DEVICE void sizes(const TitansParams& p, const Shared<D, T>& shared, const Exchange& exchange) {
  const int thread = thread_index_again(), C = load_shared(&shared.call().chunk);
  const Role role = shared.call().role(shared.plan, thread >> 5);
  if (role.idle()) return;
  const int first = role.first();
  const bool clip = p.flags & kClip;
#pragma unroll 1
  for (int t = 32 * role.within + (thread & 31); t < C; t += 32 * role.warps()) {
    const float eta = load_shared(shared.eta() + t);
    if (!clip) {
      store_shared(shared.gain(first, C) + t, eta);
      continue;
    }
    float a2 = 0.f, d2 = 0.f;
    if (Exchange::kSharded && role.full()) {
      a2 = exchange.sum_of_norms(0, t), d2 = exchange.sum_of_norms(1, t);
    } else {
      const float* norms = shared.norms(first, 0, C) + t;
#pragma unroll 2
      for (int w = role.warps(); w > 0; --w, norms += 2 * C) a2 += load_shared(norms), d2 += load_shared(norms + C);
    }
    const float e2 = load_shared(shared.e2(first, C) + t);
    const float m = sqrt_(a2 + divide(d2, e2 + 1e-9f) + 1e-12f);
    store_shared(sizes_of(shared, first) + t, m), store_shared(sizes_of(shared, first) + C + t, eta * m);
  }
}

// All warps of the block; the gains are there after a barrier.
template <int D, class T, class Exchange>
HOPE_DEVICE void step_sizes(const TitansParams& p, const Shared<D, T>& shared, const Exchange& exchange) {
  sizes<D, T>(p, shared, exchange);
  if (!(p.flags & kClip)) return;
  sync_block();
  constexpr int kSteps = Width<D>::kSteps;
  const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
  const int C = load_shared(&shared.call().chunk), eights = C / 8, t = 8 * (warp % eights);
  const int turns = eights < kWarps ? 2 : 1;  // of every other memory, or of all
  if (warp >= turns * eights) return;
  uint32_t keys[kSteps / 2][4];  // operands b of steps 2 i and 2 i + 1
#pragma unroll
  for (int i = 0; i < kSteps / 2; ++i) load_matrices(keys[i], shared.k(t + (lane & 7)) + 32 * i + 8 * (lane >> 3));
  float c[kMostPanels][4];  // (k_s.k_t)^2
#pragma unroll
  for (int panel = 0; panel < kMostPanels; ++panel) {
    if (panel * kPanel >= C) break;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t rows[4];
      load_matrices(rows, corner<D>(shared.k(panel * kPanel), 16 * s, lane));
      mma<T>(c[panel], rows, keys[s / 2][2 * (s & 1)], keys[s / 2][2 * (s & 1) + 1], s == 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[panel][i] *= c[panel][i];
  }
  const float factor = p.flags & kDot ? 1.f : p.grad_scale;
  int turn = warp / eights;
#pragma unroll 1
  for (int first = 0; first < kWarps;) {  // memory after memory
    const Role role = shared.call().role(shared.plan, first);
    if (role.idle()) break;
    if (turn-- == 0) {
      turn += turns;
      const float *size = sizes_of(shared, first), *weight = size + C + (lane >> 2);
      float sums[2] = {};
#pragma unroll
      for (int panel = 0; panel < kMostPanels; ++panel) {
        if (panel * kPanel >= C) break;
        const float w0 = load_shared(weight + panel * kPanel), w1 = load_shared(weight + panel * kPanel + 8);
        sums[0] = fma_(w1, c[panel][2], fma_(w0, c[panel][0], sums[0]));
        sums[1] = fma_(w1, c[panel][3], fma_(w0, c[panel][1], sums[1]));
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        sums[0] += shuffle_xor(sums[0], mask), sums[1] += shuffle_xor(sums[1], mask);
      if (lane < 4) {
        const Float2 m = load_shared(reinterpret_cast<const Float2*>(size + t) + lane);
        const Float2 eta = load_shared(reinterpret_cast<const Float2*>(shared.eta() + t) + lane);
        const float clip[2] = {factor * m.x * sums[0], factor * m.y * sums[1]};
        store_shared(reinterpret_cast<Float2*>(shared.gain(first, C) + t) + lane,
                     Float2{divide(eta.x, clip[0] <= 1.f ? 1.f : clip[0]),
                            divide(eta.y, clip[1] <= 1.f ? 1.f : clip[1])});
      }
    }
    first += role.warps();
  }
}

}  // namespace hope
