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
  float* q;  // made here by M_q, where there is one
  const float* x;
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

// y [outputs] = W x, W in strips
inline void times_strips(int64_t outputs, int64_t inputs, const float* W, const float* x, float* y) {
  int64_t r = 0;
  for (; r + 64 <= outputs; r += 64) W = strip<8>(inputs, W, x, y + r);
  if (outputs - r >= 32) W = strip<4>(inputs, W, x, y + r), r += 32;
  if (outputs - r >= 16) W = strip<2>(inputs, W, x, y + r), r += 16;
  if (outputs - r >= 8) W = strip<1>(inputs, W, x, y + r);
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

// The weights of one (row, head) as ``read_token`` takes them, packed_floats(c) numbers: strips of w2, memory by memory
// where linear, else of M_memory and of all others; strips of w1, memory by memory; w1s; and the rows of w2 that a
// scalar memory has for itself.
inline int64_t packed_floats(const TitansCall& c) { return weight_rows(c) * c.D + c.Mf * c.D * c.N + c.Ms * c.N; }

inline void pack(const TitansCall& c, int64_t b, int64_t h, float* to) {
  const int64_t D = c.D, N = c.N, hid = hidden_units(c), R = weight_rows(c), row = b * c.H + h;
  const int64_t rows = N ? hid : c.Mf * D;  // that are strips
  auto from = [](const float* p, int64_t n) { return p ? p + n : nullptr; };
  const float *d2 = c.delta2 + row * R * D, *b2 = from(c.base2, h * R * D);
  for (int64_t r = 0, n = 0; r < rows; r += n) {
    n = N && r ? rows - r : memory_rows(c);
    to = to_strips(n, D, d2 + r * D, from(b2, r * D), to);
  }
  for (int64_t f = 0; N && f < c.Mf; f++)
    to = to_strips(D, N, c.delta1 + (row * c.Mf + f) * D * N, from(c.base1, (h * c.Mf + f) * D * N), to);
  auto as_they_are = [&](int64_t n, const float* delta, const float* base) {
    for (int64_t i = 0; i < n; i++) *to++ = base ? base[i] + delta[i] : delta[i];
  };
  as_they_are(c.Ms * N, from(c.delta1s, row * c.Ms * N), from(c.base1s, h * c.Ms * N));
  as_they_are((R - rows) * D, d2 + rows * D, from(b2, rows * D));
}

// four_chains and squares of titans_head.h for one token
inline float four_chains_of(const float* a, const float* b, int64_t n) {
  float s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
    for (int j = 0; j < 4; j++) s[j] = std::fma(a[i + j], b[i + j], s[j]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// One head's token, with weights W as `pack` leaves them. hidden: hid numbers of the caller's. k, v, eta and alpha are
// made by memories that make their own.
template <int ACT>
class TokenReader {
 public:
  TokenReader(const TitansCall& call, const float* W, const TokenRead& token, float* hidden)
      : c(call), t(token), W(W), hidden(hidden), D(c.D), N(c.N), hid(hidden_units(c)),
        w1(W + (N ? hid : c.Mf * D) * D), w1s(w1 + c.Mf * D * N), rows(w1s + c.Ms * N) {}

  void run() const {
    if (c.self_modifying) {
      if constexpr (ACT != LINEAR) activations(N, hid, t.x);
      full(1, t.x, t.k);
      full(2, t.x, t.v);
      if (c.qk_l2norm) unit(t.k);
      if (adaptive_q(c)) {
        full(3, t.x, t.q);
        if (c.qk_l2norm) unit(t.q);
      }
      *t.eta = eta_of(c, scalar(0), t.eta_bias);
      if (c.retention) *t.alpha = alpha_of(c, scalar(1), t.alpha_bias);
    }
    if constexpr (ACT != LINEAR) activations(0, N, t.q);
    full(0, t.q, t.o);
  }

 private:
  const TitansCall& c;
  const TokenRead& t;
  const float* const W;
  float* const hidden;
  const int64_t D, N, hid;
  const float *const w1, *const w1s, *const rows;

  // Hidden units [a, b), which lie in strips of their own
  void activations(int64_t a, int64_t b, const float* in) const {
    times_strips(b - a, D, W + a * D, in, hidden + a);
    for (int64_t i = a; i < b; i += 8) store(hidden + i, sigma<ACT>(load(hidden + i)));
  }

  // M(in) of memory f
  void full(int64_t f, const float* in, float* out) const {
    if constexpr (ACT == LINEAR) return times_strips(D, D, W + f * D * D, in, out);
    times_strips(D, N, w1 + f * D * N, hidden + f * N, out);
    for (int64_t i = 0; i < D; i += 8) store(out + i, load(out + i) + load(in + i));
  }

  float scalar(int64_t s) const {
    if constexpr (ACT == LINEAR) return four_chains_of(rows + s * D, t.x, D);
    const float y = four_chains_of(w1s + s * N, hidden + (c.Mf + s) * N, N);
    return c.scalar_skip ? y + four_chains_of(rows + s * D, t.x, D) : y;
  }

  void unit(float* x) const {
    const f8 n = all(1 / std::max(NORM_EPS, std::sqrt(four_chains_of(x, x, D))));
    for (int64_t i = 0; i < D; i += 8) store(x + i, load(x + i) * n);
  }
};

inline void read_token(const TitansCall& c, const float* W, const TokenRead& t, float* hidden) {
  with_kind(c, [&](auto kind) { TokenReader<kind>(c, W, t, hidden).run(); });
}
