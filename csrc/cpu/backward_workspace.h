// Buffers of one (row, head) going backwards, beside those of the forward (workspace.h).
#pragma once
#include "titans_head.h"

// The adjoints of one (row, head): pointers into the call's tensors, and of the tokens of a span by slot.
struct Bars {
  float *delta2, *delta1, *delta1s, *base2, *base1, *base1s;  // as the weights; base null without one
  float *k, *v, *eta, *alpha;                                 // [S, D] and [S]
};

struct BackwardSpace {
  // Of a span of S slots and its steps, of `small` tokens each:
  float *states;                               // the deviations at the start of every step
  float *k, *v, *eta, *alpha, *k_sizes;        // its tokens, [S, D] and [S]; |k| before it was normalised
  float *k_bar, *v_bar, *eta_bar, *alpha_bar;
  // Of a chunk, panels [M N] unless said otherwise:
  float *z, *values, *back, *target_sizes;     // what the forward keeps (workspace.h)
  float *u_bar;            // [R]; then that of delta2 k, erase u_bar
  float *hidden;           // delta1'_bar^T e
  float *slope_d;          // sigma' d_bar
  float *z_bar, *values_bar;   // [R] adjoints of w2 k and w2 v; the latter sigma' at v before
  float *e_bar, *y_bar, *target_bar;           // [Mf D]
  float *ys_bar, *targets_bar;                 // [Ms]
  float *keys, *keys_bar, *in_bar;             // [D]: Kg, its adjoint; that of k, v or x
  float *values_rows, *slope_d_rows;           // tokens as rows, [C, M N]
  float *keys_bar_rows, *solved, *rows;        // [C, D]
  // Of a chunk's tokens, [C padded]: adjoints of erase, decay_after, eta, a memory's gain and its q; m_bar /
  // m, and that over |e|^2. Of every memory: gain decay_after, and what e is multiplied with in its own
  // adjoint
  float *erase_bar, *after_bar, *gain_bar, *ratio, *by_d, *gain_after, *by_e;
  double *eta_bar_sum, *q;                     // q's adjoint follows it
  float* skip_bar;                             // [Ms]: e's, through a row that skips the hidden layer
  float *products, *products_bar, *gram_bar, *solved_panel;  // [C, C padded]; panel [D]

  int64_t carve(const TitansCall& c, int64_t span, float* base) {
    const int64_t D = c.D, N = c.N, hid = (c.Mf + c.Ms) * N, R = hid + (c.scalar_skip ? c.Ms : 0);
    const int64_t C = c.chunk_memory > c.chunk_other ? c.chunk_memory : c.chunk_other;
    const int64_t small = c.chunk_memory + c.chunk_other - C, P = panels(C) * PANEL, S = span + PANEL;
    const int64_t state = R * D + c.Mf * D * N + c.Ms * N;
    int64_t used = 0;
    auto take = [&](int64_t n, auto&... buffers) {
      for (float** p : {&buffers...}) {
        *p = base ? base + used : nullptr;
        used += (n + 15) / 16 * 16 + 16;
      }
    };
    take(state * (span / small + 1), states);
    take(S * D, k, v, k_bar, v_bar), take(S, eta, alpha, k_sizes, eta_bar, alpha_bar);
    take(P * hid, z, values, back, hidden, slope_d, values_rows, slope_d_rows);
    take(P * R, u_bar, z_bar, values_bar), take(P * (c.Mf + c.Ms), target_sizes, gain_after, by_e);
    take(P, erase_bar, after_bar, gain_bar, ratio, by_d);
    float *eta_sum, *q_and_bar;
    take(2 * P, eta_sum), take(4 * P, q_and_bar);
    eta_bar_sum = reinterpret_cast<double*>(eta_sum), q = reinterpret_cast<double*>(q_and_bar);
    take(P * c.Mf * D, e_bar, y_bar, target_bar), take(P * (c.Ms + 1), ys_bar, targets_bar, skip_bar);
    take(P * D, keys, keys_bar, in_bar, keys_bar_rows, solved, rows, solved_panel);
    take(P * P, products, products_bar, gram_bar);
    return used;
  }
};
