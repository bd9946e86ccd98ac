// Buffers of one (row, head), carved out of one allocation. Panels: [16-token panel][feature][16]; see product.h.
#pragma once
#include <cstdint>

#include "call.h"
#include "product.h"

inline int64_t panels(int64_t tokens) { return (tokens + PANEL - 1) / PANEL; }

struct Workspace {
  float *w2, *w1, *w1s;          // base + delta, only if there is a base
  // One step of reads, panels:
  float *x, *x_second, *q;       // inputs [D]; x once more for a second thread
  float *hidden, *out, *gates;   // activations [M N], outputs [Mf D], eta and alpha before their gates [Ms]
  // The open chunk:
  float *k_rows, *v_rows;        // its tokens, [C, D]
  float *eta, *alpha, *beta;     // [C]; beta only with momentum, as these:
  float *s2_k;                   // s2 k, panels [R]
  float *solved, *carried_k;     // the keys X and -B[C,t] k_t of titans_momentum.h [C, D]
  // The chunk to commit, panels but for a_rows:
  float *k, *v;                  // [D]
  float *a, *a_values;           // sigma at k [M N]; at v, or sigma(k) - sigma(v)
  float *d, *delta2_k;           // sigma', then d, then u [R]; delta2 k [R]
  float *a_rows;                 // a, tokens as rows [C, M N]
  float *e, *target;             // errors [Mf D]; the target, later gain gamma[C,t] e. Linear: e is d, targets [R]
  float *es, *target_s;          // the same for the scalar memories [Ms]
  float *gram, *keys;            // k_t.k_s [C, C padded]; transformed keys Kg [C, D]
  float *norms;                  // partial sums of a^2 and d^2 over 8 rows, [2][M N / 8][C padded]
  // What only the backward wants to know, in buffers of its own (titans_backward.h):
  float *z = nullptr, *back = nullptr;                       // w2 k and w1^T e, panels [M N]
  float *values = nullptr, *values_slope = nullptr;          // sigma and sigma' at v, panels [M N] and [R]
  float* target_sizes = nullptr;                             // |M(v)| [Mf, C padded]

  // Assigns every buffer in `base`; returns the number of floats (base may be null to ask for it).
  int64_t carve(const TitansCall& c, float* base) {
    const int64_t D = c.D, N = c.N, hid = hidden_units(c), R = weight_rows(c);
    const int64_t big = c.chunk_memory > c.chunk_other ? c.chunk_memory : c.chunk_other;
    const int64_t small = c.chunk_memory + c.chunk_other - big;
    const int64_t Pb = panels(big) * PANEL, Ps = panels(small) * PANEL;
    int64_t used = 0;
    auto take = [&](float*& p, int64_t n) {
      p = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16 + 16;  // 64-byte aligned, and a line apart
    };
    const bool own = c.base2 != nullptr;
    take(w2, own ? R * D : 0), take(w1, own ? c.Mf * D * N : 0), take(w1s, own ? c.Ms * N : 0);
    take(x, Ps * D), take(x_second, Ps * D), take(q, Ps * D);
    take(hidden, Ps * hid), take(out, Ps * c.Mf * D), take(gates, Ps * (c.Ms + 1));
    take(k_rows, Pb * D), take(v_rows, Pb * D), take(eta, Pb), take(alpha, Pb);
    const bool momentum = c.s2 != nullptr;
    take(beta, momentum ? Pb : 0), take(s2_k, momentum ? Pb * R : 0);
    take(solved, momentum ? Pb * D : 0), take(carried_k, momentum ? Pb * D : 0);
    take(k, Pb * D), take(v, Pb * D);
    take(a, Pb * hid), take(a_values, Pb * hid), take(d, Pb * R), take(delta2_k, Pb * R), take(a_rows, Pb * hid);
    take(e, N ? Pb * c.Mf * D : 0), take(target, Pb * (N ? c.Mf * D : R));
    take(es, Pb * (c.Ms + 1)), take(target_s, Pb * (c.Ms + 1));
    take(gram, Pb * Pb), take(keys, Pb * D), take(norms, 2 * hid / 8 * Pb);
    return used;
  }
};
