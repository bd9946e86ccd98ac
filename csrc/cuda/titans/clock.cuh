// What all memories share in a chunk: decays, products of keys, and the transformed keys of the rank-C update
// (hope_kernels/ops/titans/README.md), with gamma[t,s] = prod_{s<j<=t} alpha_j:
//
//     Kg_s = gamma[C,s] k_s - sum_{t>s} L[t,s] Kg_t,   L[t,s] = gamma[t-1,s] (k_t.k_s) eta_t
//
// In panels of 16 tokens, with M[p,q] = the transpose of L's rows of panel q and columns of panel p:
//
//     Kg[p] = (I + M[p,p])^-1 (diag(gamma[C,.]) K[p] - sum_{q>p} M[p,q] Kg[q])
//
// Three stages: decays by one warp (a scan); then the inverses by one or two warps, by substitution in fp32, a row
// a lane, and -M[p,q] by others; then every warp 8 columns of Kg (D = 64). All products but the substitution's are
// those of tensor cores, exact where both operands are keys, else of numbers in two halves (fragments.cuh). Decays
// are plain products, divided by nothing: alpha = 0 and 1e-30 need no care. Every block of a (row, head) does all
// of it: that is cheaper than an exchange. FLOPs a block: C^2 D for the products, 3 (C + 16) C D for the solve.
#pragma once
#include "shared.cuh"

namespace hope {

constexpr int kMostPanels = 4;  // of a chunk

// One warp. before[t] = eta_t times the decays before t in its panel, after[s] the decays after s in it;
// decay_after[s] = gamma[C,s], erase[t] = eta_t gamma[t-1,0], decay_chunk = gamma[C,0].
template <int D, class T, class R>
HOPE_DEVICE void decays(const Shared<D, T, R>& shared, int C, bool retention, bool dgd, int lane) {
  const int place = lane & 15;  // in the panel
  const bool second = lane >= kPanel;
  float to[2] = {1.f, 1.f}, from[2] = {1.f, 1.f};  // products up to a token, and from it on
  float panel[kMostPanels] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (32 * n >= C) break;
    const int t = lane + 32 * n;
    if (retention && t < C) to[n] = from[n] = load_shared(shared.alpha() + t);
#pragma unroll
    for (int by = 1; by < kPanel; by *= 2) {
      const float left = shuffle(to[n], (lane - by) & 31), right = shuffle(from[n], (lane + by) & 31);
      if (place >= by) to[n] *= left;
      if (place + by < kPanel) from[n] *= right;
    }
    panel[2 * n] = shuffle(to[n], 15), panel[2 * n + 1] = shuffle(to[n], 31);
  }
  const float first_half = panel[0] * panel[1], last_half = panel[2] * panel[3];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (32 * n >= C) break;
    const int t = lane + 32 * n;
    const float left = shuffle(to[n], (lane - 1) & 31), right = shuffle(from[n], (lane + 1) & 31);
    const float before = place > 0 ? left : 1.f, after = place < 15 ? right : 1.f;
    float panels_before = second ? panel[2 * n] : 1.f, panels_after = second ? 1.f : panel[2 * n + 1];
    if (n == 0) panels_after *= last_half;
    if (n == 1) panels_before *= first_half;
    if (t < C) {
      const float eta = load_shared(shared.eta() + t);
      store_shared(shared.before() + t, before * eta);
      store_shared(shared.after() + t, after);
      store_shared(shared.erase() + t, dgd ? before * panels_before * eta : 0.f);
      store_shared(shared.decay_after() + t, after * panels_after);
      const float whole = second ? panel[2 * n + 1] : panel[2 * n];
      if (place == 0) store_shared(shared.decay_panel() + t / kPanel, whole);
    }
  }
  if (lane == 0) store_shared(shared.decay_chunk(C), first_half * last_half);
}

// k_s.k_t for s of panel p (rows), t of panel q.
template <int D, class T, class R>
HOPE_DEVICE void gram(float (&c)[8], const Shared<D, T, R>& shared, int p, int q, int lane) {
#pragma unroll
  for (int s = 0; s < Width<D>::kSteps; ++s) {
    uint32_t a[4], b[4];
    load_matrices(a, shared.rows(shared.k(p * kPanel), 16 * s, lane));
    load_matrices(b, shared.rows_b(shared.k(q * kPanel), 16 * s, lane));
    mma<T>(c, a, b[0], b[1], s == 0);
    mma<T>(c + 4, a, b[2], b[3], s == 0);
  }
}

// -M[p,q], p < q, as two operands a: higher halves of all lanes, then the lower ones.
template <int D, class T, class R>
HOPE_DEVICE void mix_panels(const Shared<D, T, R>& shared, int p, int q, int lane) {
  float c[8];
  gram<D>(c, shared, p, q, lane);
  float between = -1.f;
#pragma unroll 1
  for (int r = p + 1; r < q; ++r) between *= load_shared(shared.decay_panel() + r);
  const float* after = shared.after() + p * kPanel + (lane >> 2);
  const float rows[2] = {between * load_shared(after), between * load_shared(after + 8)};
  const Float2* before = reinterpret_cast<const Float2*>(shared.before() + q * kPanel) + (lane & 3);
  const Float2 columns[2] = {load_shared(before), load_shared(before + 4)};
  Halves h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    h[i] = halves(c[2 * i] * (rows[i & 1] * columns[i >> 1].x),
                  c[2 * i + 1] * (rows[i & 1] * columns[i >> 1].y));
  store_shared(shared.solve(p, q) + lane, Word4{h[0].high, h[1].high, h[2].high, h[3].high});
  store_shared(shared.solve(p, q) + 32 + lane, Word4{h[0].low, h[1].low, h[2].low, h[3].low});
}

// Row r of a 16 x 16 matrix of 16-bit numbers has two pieces of 16 bytes; they lie so that ldmatrix finds no
// bank conflicts.
HOPE_DEVICE int piece(int r, int half) { return 2 * r + (half ^ (r >> 2 & 1)); }

// The inverses of I + M[p,p] for the panels first and first + 1 (if there is one), 16 lanes each: two matrices
// of 16-bit numbers, the higher halves and the lower ones.
template <int D, class T, class R>
HOPE_DEVICE void invert_panels(const Shared<D, T, R>& shared, int first, int panels, bool retention, int lane) {
#pragma unroll 1
  for (int p = first; p < first + 2 && p < panels; ++p) {
    float c[8];
    gram<D>(c, shared, p, p, lane);
    Float2* to = reinterpret_cast<Float2*>(shared.solve(p, p)) + 8 * (lane >> 2) + (lane & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_shared(to + 64 * (i & 1) + 4 * (i >> 1), Float2{c[2 * i], c[2 * i + 1]});
  }
  sync_warp();
  const int row = lane & 15, other = first + (lane >> 4);
  const bool there = other < panels;  // else these lanes do what the others do and keep it to themselves
  const int p = there ? other : first;
  Float4* rows = reinterpret_cast<Float4*>(shared.solve(p, p));
  const Float4* alpha = reinterpret_cast<const Float4*>(shared.alpha() + p * kPanel);
  const Float4* eta = reinterpret_cast<const Float4*>(shared.eta() + p * kPanel);
  Float4 products[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) products[j] = load_shared(rows + 4 * row + j);
  sync_warp();
  float decay = 1.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // M's row
    const Float4 g = products[j], by = load_shared(eta + j);
    const Float4 keep = retention ? load_shared(alpha + j) : Float4{1.f, 1.f, 1.f, 1.f};
    float m[4] = {g.x, g.y, g.z, g.w};
    const float etas[4] = {by.x, by.y, by.z, by.w}, alphas[4] = {keep.x, keep.y, keep.z, keep.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool later = 4 * j + i > row;
      m[i] = later ? m[i] * (decay * etas[i]) : 0.f;
      if (later) decay *= alphas[i];
    }
    if (there) store_shared(rows + 4 * row + j, Float4{m[0], m[1], m[2], m[3]});
  }
  sync_warp();
  float y[kPanel];  // the row of the inverse: y (I + M) = a row of I
#pragma unroll
  for (int t = 0; t < kPanel; ++t) y[t] = t == row ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < kPanel - 1; ++s)
#pragma unroll
    for (int j = (s + 1) / 4; j < 4; ++j) {
      const Float4 v = load_shared(rows + 4 * s + j);
      const float m[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (4 * j + i > s) y[4 * j + i] = fma_(-y[s], m[i], y[4 * j + i]);
    }
  sync_warp();
  if (!there) return;
  Word4* to = shared.solve(p, p);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Halves h[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) h[i] = halves(y[8 * half + 2 * i], y[8 * half + 2 * i + 1]);
    store_shared(to + piece(row, half), Word4{h[0].high, h[1].high, h[2].high, h[3].high});
    store_shared(to + 32 + piece(row, half), Word4{h[0].low, h[1].low, h[2].low, h[3].low});
  }
}

// What the solve needs of the keys and decays, dealt out to the warps: inverses to the last ones, which have
// little else to do where a memory with one output is here.
template <int D, class T, class R>
HOPE_DEVICE void key_products(const Shared<D, T, R>& shared, int C, bool retention) {
  const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
  const int panels = C / kPanel;
  if (const int first = 2 * (kWarps - 1 - warp); first < panels) {
    invert_panels<D>(shared, first, panels, retention, lane);
  } else {
    int q = 1, p = warp;  // the warp's pair in the order of plan.h, without pairs p = q
    for (; p >= q; ++q) p -= q;
    if (q < panels) mix_panels<D>(shared, p, q, lane);
  }
}

// a[16 x 16] b[16 x 8], both in two halves, added to c, or c if it is the `first` of a sum.
HOPE_DEVICE void mma_halves(float (&c)[4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                            const Halves (&b)[2], bool first) {
  mma<bf16>(c, low, b[0].high, b[1].high, first);
  mma<bf16>(c, high, b[0].low, b[1].low);
  mma<bf16>(c, high, b[0].high, b[1].high);
}

// The accumulators of 16 tokens x 8 columns as operand b (k = tokens).
HOPE_DEVICE void as_operand_b(Halves (&b)[2], const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Halves h = halves(x[2 * i], x[2 * i + 1]);
    b[i] = {transpose8x8(h.high), transpose8x8(h.low)};
  }
}

// Kg, rounded to T, in the place of v. What earlier panels are made of waits in `solved`, the warp's own 512 bytes for
// each panel but the first, each lane's own: registers are short, and so are these loops.
template <int D, class T, class R>
HOPE_DEVICE void transformed_keys(const Shared<D, T, R>& shared, int C, bool dgd, Word4* solved) {
  const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
  const int panels = C / kPanel;
  solved += lane - 32;  // of panel q: number 32 q
  sync_warp();
#pragma unroll 1
  for (int column = 8 * warp; column < D; column += 8 * kWarps) {
#pragma unroll 1
    for (int p = panels - 1; p >= 0; --p) {
      const int row = p * kPanel + (lane >> 2), at = column + 2 * (lane & 3);
      float x[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* key = reinterpret_cast<const uint32_t*>(shared.k(row + 8 * i) + R::at(at));
        const Float2 k = unpack2<T>(load_shared(key));
        const float decay = load_shared(shared.decay_after() + row + 8 * i);
        x[2 * i] = decay * k.x, x[2 * i + 1] = decay * k.y;
      }
      if (dgd) {
#pragma unroll 1
        for (int q = p + 1; q < panels; ++q) {
          const Word4* mix = shared.solve(p, q) + lane;
          const Word4 a = load_shared(mix), b = load_shared(mix + 32), later = load_shared(solved + 32 * q);
          mma_halves(x, {a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}, {{later.x, later.y}, {later.z, later.w}}, false);
        }
        uint32_t high[4], low[4];
        const Word4* inverse = shared.solve(p, p) + piece(lane & 15, lane >> 4);
        load_matrices(high, inverse);
        load_matrices(low, inverse + 32);
        Halves right[2];
        as_operand_b(right, x);
        mma_halves(x, high, low, right, true);
        if (p > 0) {
          as_operand_b(right, x);
          store_shared(solved + 32 * p, Word4{right[0].high, right[0].low, right[1].high, right[1].low});
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store_shared(reinterpret_cast<uint32_t*>(shared.kg(row + 8 * i) + R::at(at)),
                     pack2<T>(x[2 * i], x[2 * i + 1]));
    }
  }
}

}  // namespace hope
