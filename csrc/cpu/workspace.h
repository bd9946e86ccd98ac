// Buffers of one (row, head), carved out of one allocation. Panels: [16-token panel][feature][16]; see product.h.
#pragma once
#include <cstdint>

#include "call.h"
#include "product.h"

inline int64_t panels(int64_t tokens) { return (tokens + PANEL - 1) / PANEL; }

struct Workspace {
  float *w2, *w1, *w1s;          // w_base + delta, only if there is a base
  float *x, *x_second, *q, *hidden, *out, *gates;  // one step of reads: inputs [D] (x once for a second thread), activations [M N], outputs [Mf D], eta and alpha before their gates [Ms]
  float *k_rows, *v_rows;        // the open chunk's tokens, [C, D]
  float *eta, *alpha;            // [C]
  float *k, *v;                  // the chunk to commit as panels [D]
  float *a, *av, *d, *zd;        // at k: sigma [M N]; at v (or sigma(k) - sigma(v)); sigma', then d, then the update's left factor [R]; delta2 k [R]
  float *at;                     // a, tokens as rows [C, M N]
  float *e, *target;             // errors [Mf D]; M(v), later the update's left factor for w1
  float *es, *target_s;          // the same for the scalar memories [Ms]
  float *gram, *keys;            // k_t.k_s [C, C padded]; transformed keys Kg [C, D]
  float *norms;                  // partial sums of a^2 and d^2 over 8 rows, [2][M N / 8][C padded]

  // Assigns every buffer in `base`; returns the number of floats (base may be null to ask for it).
  int64_t carve(const TitansCall& c, float* base) {
    const int64_t D = c.D, N = c.N, M = c.Mf + c.Ms, hid = M * N, R = hid + (c.scalar_skip ? c.Ms : 0);
    const int64_t big = c.chunk_memory > c.chunk_other ? c.chunk_memory : c.chunk_other, small = c.chunk_memory + c.chunk_other - big;
    const int64_t Pb = panels(big) * PANEL, Ps = panels(small) * PANEL;
    int64_t used = 0;
    auto take = [&](float*& p, int64_t n) {
      p = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16 + 16;  // 64-byte aligned, and a line apart
    };
    const bool own = c.base2 != nullptr;
    take(w2, own ? R * D : 0), take(w1, own ? c.Mf * D * N : 0), take(w1s, own ? c.Ms * N : 0);
    take(x, Ps * D), take(x_second, Ps * D), take(q, Ps * D), take(hidden, Ps * hid), take(out, Ps * c.Mf * D), take(gates, Ps * (c.Ms + 1));
    take(k_rows, Pb * D), take(v_rows, Pb * D), take(eta, Pb), take(alpha, Pb);
    take(k, Pb * D), take(v, Pb * D);
    take(a, Pb * hid), take(av, Pb * hid), take(d, Pb * R), take(zd, Pb * R), take(at, Pb * hid);
    take(e, Pb * c.Mf * D), take(target, Pb * c.Mf * D), take(es, Pb * (c.Ms + 1)), take(target_s, Pb * (c.Ms + 1));
    take(gram, Pb * Pb), take(keys, Pb * D), take(norms, 2 * hid / 8 * Pb);
    return used;
  }
};
