// One token read by one head: what titans_read.h does for panels, with every weight met once.
//
// A value is the same chain of FMAs as there (product.h), so both give the same bits: here the eight lanes of a
// vector are eight outputs, there eight tokens. For that, weights lie by input, not by output, in strips of up
// to 64 outputs that are read straight through:
//
//     strip of w outputs: [inputs][w]      w = 64, and for what is left 32, 16, 8
//
// and with the base added, which a scan would do in every call. They change when a chunk is committed only.
#pragma once
#include "titans_head.h"

// The inputs and outputs of one head; k, v, eta, alpha are the slot of the open chunk that the token takes.
struct TokenRead {
  const float *q, *x;
  float *o, *k, *v, *eta, *alpha;
  float eta_bias, alpha_bias;
};

template <int NV>
HK_INLINE const float* strip(int64_t inputs, const float* W, const float* x, float* y) {
  f8 acc[NV] = {};
  for (int64_t i = 0; i < inputs; i++, W += 8 * NV) {
    const f8 v = all(x[i]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) acc[j] = fma(load(W + 8 * j), v, acc[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) store(y + 8 * j, acc[j]);
  return W;
}

// y [outputs] = W x, W in strips; what lies behind W.
inline const float* times_strips(int64_t outputs, int64_t inputs, const float* W, const float* x, float* y) {
  int64_t r = 0;
  for (; r + 64 <= outputs; r += 64) W = strip<8>(inputs, W, x, y + r);
  if (outputs - r >= 32) W = strip<4>(inputs, W, x, y + r), r += 32;
  if (outputs - r >= 16) W = strip<2>(inputs, W, x, y + r), r += 16;
  if (outputs - r >= 8) W = strip<1>(inputs, W, x, y + r);
  return W;
}

// A [outputs, inputs] (+ B, unless null), both multiples of 8, in strips to `to`; what lies behind them.
inline float* to_strips(int64_t outputs, int64_t inputs, const float* A, const float* B, float* to) {
  for (int64_t r = 0; r < outputs;) {
    const int64_t left = outputs - r, w = left >= 64 ? 64 : left >= 32 ? 32 : left >= 16 ? 16 : 8;
    for (int64_t j = 0; j < w; j += 8)
      for (int64_t i = 0; i < inputs; i += 8) {
        float sum[64];
        const float* a = A + (r + j) * inputs + i;
        for (int64_t n = 0; n < 8; n++) {
          const f8 v = load(a + n * inputs);
          store(sum + 8 * n, B ? load(B + (a - A) + n * inputs) + v : v);
        }
        transpose8(sum, 8, to + i * w + j, w);
      }
    to += inputs * w, r += w;
  }
  return to;
}

// The weights of one (row, head) as ``read_token`` takes them: packed_floats(c) numbers.
inline int64_t packed_floats(const TitansCall& c) {
  return (c.Mf + c.Ms) * c.N * c.D + c.Mf * c.D * c.N + c.Ms * c.N + (c.scalar_skip ? c.Ms * c.D : 0);
}

inline void pack(const TitansCall& c, int64_t b, int64_t h, float* to) {
  const int64_t D = c.D, N = c.N, hid = (c.Mf + c.Ms) * N, skips = c.scalar_skip ? c.Ms : 0, row = b * c.H + h;
  auto base = [&](const float* p, int64_t n) { return p ? p + h * n : nullptr; };
  const float *d2 = c.delta2 + row * (hid + skips) * D, *d1 = c.delta1 + row * c.Mf * D * N;
  const float *b2 = base(c.base2, (hid + skips) * D), *b1 = base(c.base1, c.Mf * D * N);
  to = to_strips(N, D, d2, b2, to);
  to = to_strips(hid - N, D, d2 + N * D, b2 ? b2 + N * D : nullptr, to);
  for (int64_t f = 0; f < c.Mf; f++)
    to = to_strips(D, N, d1 + f * D * N, b1 ? b1 + f * D * N : nullptr, to);
  auto as_they_are = [&](int64_t n, const float* delta, const float* base) {
    for (int64_t i = 0; i < n; i++) *to++ = base ? base[i] + delta[i] : delta[i];
  };
  if (c.Ms) as_they_are(c.Ms * N, c.delta1s + row * c.Ms * N, base(c.base1s, c.Ms * N));
  as_they_are(skips * D, d2 + hid * D, b2 ? b2 + hid * D : nullptr);
}

// four_chains and squares of titans_head.h for one token
inline float four_chains_of(const float* a, const float* b, int64_t n) {
  float s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
    for (int j = 0; j < 4; j++) s[j] = std::fma(a[i + j], b[i + j], s[j]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// hidden: hid numbers of the caller's. k, v, eta and alpha are made by memories that make their own.
template <int ACT>
void read_token(const TitansCall& c, const float* W, const TokenRead& t, float* hidden) {
  const int64_t D = c.D, N = c.N, hid = (c.Mf + c.Ms) * N;
  W = times_strips(N, D, W, t.q, hidden);
  if (c.self_modifying) W = times_strips(hid - N, D, W, t.x, hidden + N);
  for (int64_t i = 0; i < hid; i += 8) store(hidden + i, sigma<ACT>(load(hidden + i)));
  float* const out[3] = {t.o, t.k, t.v};
  for (int f = 0; f < c.Mf; f++) {
    const float* in = f == 0 ? t.q : t.x;
    W = times_strips(D, N, W, hidden + f * N, out[f]);
    for (int64_t i = 0; i < D; i += 8) store(out[f] + i, load(out[f] + i) + load(in + i));
  }
  if (!c.self_modifying) return;
  if (c.qk_l2norm) {
    const f8 n = all(1 / std::max(NORM_EPS, std::sqrt(four_chains_of(t.k, t.k, D))));
    for (int64_t i = 0; i < D; i += 8) store(t.k + i, load(t.k + i) * n);
  }
  auto scalar = [&](int64_t s) {
    const float y = four_chains_of(W + s * N, hidden + (c.Mf + s) * N, N);
    return c.scalar_skip ? y + four_chains_of(W + c.Ms * N + s * D, t.x, D) : y;
  };
  *t.eta = eta_of(c, scalar(0), t.eta_bias);
  if (c.retention) *t.alpha = alpha_of(c, scalar(1), t.alpha_bias);
}
