// What hope_kernels/ops/titans/cpp.py hands over: plain pointers and sizes; tensors are row-major, contiguous
// and fp32.
//
// B rows, T tokens, H heads of width D, N hidden units per memory; N = 0: memories are linear, M(z) = w2 z, and what
// belongs to w1 is null. Memories come in the order memory, k, v, q, eta, alpha ("full" ones with D outputs first, then
// the scalar ones): M in total, Mf full, Ms scalar; there is one for q (adaptive_q) where Mf is 4. w2 has R rows: M N
// hidden ones (+ Ms skip rows), or those of linear memories, Mf D + Ms.
#pragma once
#include <cstdint>

struct TitansCall {
  int64_t B, T, H, D, N, Mf, Ms, chunk_memory, chunk_other, kept, threads;
  int32_t activation;       // 0 gelu_tanh, 1 gelu (erf), 2 silu
  int32_t self_modifying;   // 0: k, v, eta, alpha are given, there is one memory
  int32_t objective_dot, dgd, retention, own_values, target_norm, step_clip, scalar_skip, qk_l2norm;
  int32_t softplus;         // eta gate: softplus instead of sigmoid
  int32_t update;           // 0: a pure read of M_memory (at M_q's reading of x, where there is one)
  float grad_scale, eta_scale;
  // initial weights [H, R, D], [H, Mf, D, N], [H, Ms, N]; null: zero (retain_to="zero")
  const float *base2, *base1, *base1s;
  float *delta2, *delta1, *delta1s;                  // deviations [B, H, ...], advanced in place
  float *s2, *s1, *s1s;                              // their momentum, likewise; null: there is none
  // [B, T, H, D] and [B, T, H]; beta with momentum, no q with adaptive_q
  const float *q, *x, *k, *v, *eta, *alpha, *beta;
  const float *eta_bias, *alpha_bias;                // [H]
  // the open chunk, advanced in place: [B, C, H, D], C = max(chunk_memory, chunk_other)
  float *pending_k, *pending_v;
  // [B, C, H]; alpha null without retention, beta without momentum
  float *pending_eta, *pending_alpha, *pending_beta;
  const int64_t *pos, *len;                          // [B] tokens read before this call, and in it
  float* o;                                          // [B, T, H, D]; tokens past len are not written
  // M_memory's weights in each chunk read, in order: [B, H, kept, N, D] (D for N where linear), [B, H, kept, D, N]; or
  // null
  float *kept2, *kept1;
  // The deviations at the start of every span but the first: [B, H, spans, ...]. A span is `span` tokens, a
  // multiple of both chunks, counted from the start of the open chunk; 0: nothing is kept.
  int64_t span, spans;
  float *spans2, *spans1, *spans1s;
  // What the memories made of each token of x, as k, v, eta and alpha, and |k| before it was normalised [B, T, H]: for
  // a call that keeps spans, so that its backward need not read again; or null
  float *made_k, *made_v, *made_eta, *made_alpha, *made_size;
  // With adaptive_q, beside kept2: M_q's weights likewise, in each chunk of its own clock, and M_q(x) before it is
  // normalised [B, T, H, D]
  int64_t kept_q;
  float *kept_q2, *kept_q1, *made_q;
};

// Of one head: hidden units, and rows of w2; of one memory of those with D outputs: rows of w2.
inline int64_t hidden_units(const TitansCall& c) { return (c.Mf + c.Ms) * c.N; }
inline int64_t weight_rows(const TitansCall& c) {
  return c.N ? hidden_units(c) + (c.scalar_skip ? c.Ms : 0) : c.Mf * c.D + c.Ms;
}
inline int64_t memory_rows(const TitansCall& c) { return c.N ? c.N : c.D; }

inline bool adaptive_q(const TitansCall& c) { return c.Mf == 4; }

// The gradient of hope_titans_scan by everything that it was given. `call` is the same call: the state that it
// began with, which is not written, and the spans that it kept; o is not looked at.
struct TitansBackward {
  TitansCall call;
  const float* o_bar;                                  // [B, T, H, D]; x_bar is the gradient by x
  // [B, H, ...]: by the deviations after the call, in place of which come those before it
  float *delta2_bar, *delta1_bar, *delta1s_bar;
  float *base2_bar, *base1_bar, *base1s_bar;           // [B, H, ...], added to; null without a base
  float *pending_k_bar, *pending_v_bar, *pending_eta_bar, *pending_alpha_bar;  // in place, as the deviations
  float *q_bar, *x_bar, *k_bar, *v_bar, *eta_bar, *alpha_bar;  // as q, x, ...; tokens past len are not written
  float *eta_bias_bar, *alpha_bias_bar;                // [B, H]; those of rows without tokens are not written
};

// The gradient of the reads o = q + w1 sigma(w2 q) by q, or of o = w2 q (N = 0, without kept1), at the weights that
// hope_titans_scan kept; or that of M_q's reads, where q and o are x and M_q(x).
struct TitansReadBackward {
  int64_t B, T, H, D, N, chunk, kept, threads;         // chunk: tokens that share weights, counted from pos
  int32_t activation;
  const float *kept2, *kept1;
  const float *q, *grad;                             // [B, T, H, D]; grad: by o
  const int64_t *pos, *len;                          // as in the scan
  float* dq;                                         // [B, T, H, D]; tokens past len are not written
};

extern "C" {
int hope_titans_abi();                               // changes whenever what the library offers does
int hope_titans_supported();                         // 1 if this CPU can run the library
// The bits of the vectors that products are computed in: 256 or 512, the most that the CPU has, or as asked, which
// changes no result; 128 with NEON. Other numbers only ask.
int hope_cpu_width(int asked);
// 0; or, before anything is written, 1 when memory runs out and 2 for arguments that do not fit each other
// (check.h)
int hope_titans_scan(const TitansCall*);
int hope_titans_read_backward(const TitansReadBackward*);
int hope_titans_backward(const TitansBackward*);
}
