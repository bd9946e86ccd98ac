// What the memories of a clock share when they write a chunk of C tokens, whose keys, eta and alpha it is made of:
//
//     gram[t,s] = k_t.k_s      gamma[t,s] = prod_{s<j<=t} alpha_j      erase_t = eta_t gamma[t-1,0]
//     Kg_s = gamma[C,s] k_s - sum_{t>s} L[t,s] Kg_t,      L[t,s] = gamma[t-1,s] (k_t.k_s) eta_t
#pragma once
#include <cstring>

#include "titans_head.h"

class Clock {
 public:
  // first: the chunk's first slot; k_rows: its keys, [C, D]
  Clock(const Head& head, int64_t C, int64_t first, const float* k_rows)
      : h(head), w(h.w), D(h.D), ld(h.ld), C(C), first(first), k_rows(k_rows) {}

  // Every thread for itself
  void decays() const {
    const float* alpha = w.alpha + first;
    for (int64_t t = 0; t <= C; t++) {
      float* row = h.gamma + t * ld;
      for (int64_t s = 0; s < t; s++) row[s] = alpha[t - 1] * (row - ld)[s];
      if (t < ld) row[t] = 1;
    }
    std::memcpy(h.eta, w.eta + first, C * sizeof(float));
    for (int64_t t = 0; t < C; t++) {
      h.erase[t] = h.eta[t] * h.gamma[t * ld];
      h.decay_after[t] = t + 1 == C ? 1 : h.gamma[C * ld + t + 1];
    }
  }

  // gram, this thread's rows: panels up to the rows' own, since the others hold the same products.
  void key_products() const {
    const Range own = h.clock_share(C, PANEL);
    for (int64_t r = own.begin; r < own.end; r += PANEL) {
      const int64_t end = std::min(own.end, r + PANEL);
      for (int64_t p = 0; p <= r / PANEL; p++) {
        float* gram = w.gram + p * PANEL;
        panel_product(r, end, D, k_rows, D, 1, w.k + p * D * PANEL, C - p * PANEL <= 8, [&](int64_t i, auto& acc) {
          with_rows(acc, gram, ld, i, [](auto& x, float* to) { store(to, x); });
        });
        if (p < r / PANEL) mirror(r, end, p);
      }
    }
  }

  // Kg by back substitution, this thread's columns
  void transformed_keys(bool dgd) const {
    const Range columns = h.clock_share(D, 8);
    if (columns.begin == columns.end) return;
    for (int64_t s = (C - 1) / BLOCKED * BLOCKED; s >= 0; s -= BLOCKED) {
      if (dgd) factors(s);
      int64_t d = columns.begin;
      for (; d + 2 * LANES<widest> <= columns.end; d += 2 * LANES<widest>) substitute<widest, 2>(s, d, dgd);
      for (; d + LANES<widest> <= columns.end; d += LANES<widest>) substitute<widest, 1>(s, d, dgd);
      for (; d < columns.end; d += 8) substitute<f8, 1>(s, d, dgd);
    }
  }

 private:
  static constexpr int BLOCKED = 8;  // rows of a block; Head::factors has as many columns
  const Head& h;
  const Workspace& w;
  const int64_t D, ld, C, first;
  const float* k_rows;

  // Rows [r, end) of gram's panel p become columns of its rows.
  void mirror(int64_t r, int64_t end, int64_t p) const {
    for (int64_t s = p * PANEL; s < (p + 1) * PANEL; s += 8) {
      int64_t t = r;
      for (; t + 8 <= end; t += 8) transpose8(w.gram + t * ld + s, ld, w.gram + s * ld + t, ld);
      for (; t < end; t++)
        for (int64_t i = s; i < s + 8; i++) w.gram[i * ld + t] = w.gram[t * ld + i];
    }
  }

  // L[t, s ..] for all t > s; where t <= s it has no meaning.
  void factors(int64_t s) const {
    for (int64_t t = s + 1; t < C; t++) {
      const f8 decayed = load(h.gamma + t * ld + s + 1) * load(w.gram + t * ld + s);
      store(h.factors + t * BLOCKED, decayed * all(h.eta[t]));
    }
  }

  // Columns d .. of the rows from s on: first what all later rows take away, then the block's own.
  template <class V, int NV>
  HK_INLINE void substitute(int64_t s, int64_t d, bool dgd) const {
    const float* L = h.factors;
    float* keys = w.keys + d;
    const int64_t n = std::min<int64_t>(BLOCKED, C - s);
    V x[BLOCKED][NV];
#pragma GCC unroll 8
    for (int i = 0; i < BLOCKED; i++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++)
        x[i][v] = i < n ? all_as<V>(h.decay_after[s + i]) * load_as<V>(k_rows + (s + i) * D + d + LANES<V> * v) : V{};
    auto take = [&](int64_t t, int rows, const V (&y)[NV]) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) x[i][v] = fnma(all_as<V>(L[t * BLOCKED + i]), y[v], x[i][v]);
    };
    for (int64_t t = C - 1; dgd && t >= s + BLOCKED; t--) {
      V y[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) y[v] = load_as<V>(keys + t * D + LANES<V> * v);
      take(t, BLOCKED, y);
    }
#pragma GCC unroll 8
    for (int i = BLOCKED - 1; i >= 0; i--) {
      if (i >= n) continue;
      if (dgd) take(s + i, i, x[i]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) store(keys + (s + i) * D + LANES<V> * v, x[i][v]);
    }
  }
};
