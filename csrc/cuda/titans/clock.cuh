// What all memories share in a chunk: products of keys, decays, and the transformed keys of the rank-C update
// (hope_kernels/ops/titans/README.md), with gamma[t,s] = prod_{s<j<=t} alpha_j:
//
//     Kg_s = gamma[C,s] k_s - sum_{t>s} L[t,s] Kg_t,   L[t,s] = gamma[t-1,s] (k_t.k_s) eta_t
//
// Products of keys come from tensor cores (exact products, fp32 sums). Decays are plain products: alpha = 0
// and 1e-30 need no care. The solve is substitution from the last token, in fp32: a warp has 8 (D = 64)
// columns of Kg to itself, four lanes a column, four of a panel's 16 rows a lane. Every block of a (row,
// head) does all of it: that is cheaper than an exchange. FLOPs: C^2 D for the products (tensor cores), C^2 D
// for the solve (2 C^2 D / 256 FMA a thread).
#pragma once
#include "shared.cuh"

namespace hope {

// Pairs of panels p <= q, dealt out to the warps: gram[s][t] for s of p, t of q.
template <int D, class T> HOPE_DEVICE void key_products(const Shared<D, T>& shared, int C) {
  const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
  const int panels = C / kPanel;
  int turn = 0;
#pragma unroll 1
  for (int p = 0; p < panels; ++p)
#pragma unroll 1
    for (int q = p; q < panels; ++q) {
      if (turn++ % kWarps != warp) continue;
      float c[8] = {};
#pragma unroll
      for (int s = 0; s < Width<D>::kSteps; ++s) {
        uint32_t a[4], b[4];
        load_matrices(a, corner<D>(shared.k(p * kPanel), 16 * s, lane));
        load_matrices(b, corner_b<D>(shared.k(q * kPanel), 16 * s, lane));
        mma<T>(c, a, b[0], b[1]);
        mma<T>(c + 4, a, b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int s = (lane >> 2) + 8 * ((i >> 1) & 1), t = 2 * (lane & 3) + (i & 1) + 8 * (i >> 2);
        // below the diagonal of the chunk L will be written
        if (p < q || s <= t) store_shared(shared.gram(p * kPanel + s, q * kPanel + t, C), c[i]);
      }
    }
}

// L below the diagonal of gram; decay_after[s] = gamma[C,s]: one thread a token. erase[t] = eta_t gamma[t-1,0]
// and decay_chunk = gamma[C,0]: one more thread.
template <int D, class T> HOPE_DEVICE void decays(const Shared<D, T>& shared, int C, bool retention, bool dgd) {
  const int thread = thread_index_again();
  if (thread < C) {
    float decay = 1.f;
#pragma unroll 1
    for (int t = thread + 1; t < C; ++t) {
      if (dgd)
        store_shared(shared.gram(t, thread, C),
                     load_shared(shared.gram(thread, t, C)) * (decay * load_shared(shared.eta() + t)));
      if (retention) decay *= load_shared(shared.alpha() + t);
    }
    store_shared(shared.decay_after() + thread, decay);
  } else if (thread == kThreads - 1) {
    float decay = 1.f;
#pragma unroll 1
    for (int t = 0; t < C; ++t) {
      store_shared(shared.erase() + t, dgd ? load_shared(shared.eta() + t) * decay : 0.f);
      if (retention) decay *= load_shared(shared.alpha() + t);
    }
    store_shared(shared.decay_chunk(C), decay);
  }
}

// Kg, rounded to T, in the place of v. Uses the warp's place for partial outputs.
template <int D, class T> HOPE_DEVICE void transformed_keys(const Shared<D, T>& shared, int C, bool dgd) {
  const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
  float* solved = reinterpret_cast<float*>(shared.part(warp, 0));  // [C][8], this warp's
  sync_warp();
  const int column = lane & 7, rows = 4 * (lane >> 3);
#pragma unroll 1
  for (int p0 = 8 * warp; p0 < D; p0 += 8 * kWarps) {
#pragma unroll 1
    for (int s0 = C - kPanel; s0 >= 0; s0 -= kPanel) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = load_shared(reinterpret_cast<const uint16_t*>(shared.k(s0 + rows + i) + p0 + column));
        x[i] = load_shared(shared.decay_after() + s0 + rows + i) * unpack2<T>(bits).x;
      }
      if (dgd) {
#pragma unroll 4
        for (int t = s0 + kPanel; t < C; ++t) {
          const float later = load_shared(solved + 8 * t + column);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = fma_(-load_shared(shared.gram(t, s0 + rows + i, C)), later, x[i]);
        }
#pragma unroll
        for (int t = kPanel - 1; t > 0; --t) {
          const float later = shuffle(x[t & 3], (t >> 2) * 8 + column);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (rows + i < t) x[i] = fma_(-load_shared(shared.gram(s0 + t, s0 + rows + i, C)), later, x[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (s0 > 0) store_shared(solved + 8 * (s0 + rows + i) + column, x[i]);
        store_shared(reinterpret_cast<uint16_t*>(shared.kg(s0 + rows + i) + p0 + column),
                     static_cast<uint16_t>(pack2<T>(x[i], 0.f)));
      }
      sync_warp();
    }
  }
}

}  // namespace hope
