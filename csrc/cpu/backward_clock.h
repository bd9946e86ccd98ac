// What all memories of a clock share, backwards: the adjoints of Kg, erase, decay_after and decay_chunk
// become those of k, eta and alpha (hope_kernels/ops/titans/BACKWARD.md, "The clock").
//
//     Y = (I + L)^-1 Kg_bar      L[t,s] = eta_t P[t,s] k_t.k_s      P[t,s] = gamma[t-1,s], s < t
//     L_bar[t,s] = -Kg_t.Y_s     decay_after_bar_t += Y_t.k_t       k_bar_t += decay_after_t Y_t
#pragma once
#include <cstring>

#include "backward_workspace.h"

class ClockBackward {
 public:
  // w: the chunk's gram and keys. The adjoints so far, by token: keys_bar_rows and gram_bar (s.), erase,
  // decay_after.
  ClockBackward(const Head& head, const BackwardSpace& space, int64_t C, const float* k_rows,
      const float* erase_bar,
                float* after_bar, float chunk_bar)
      : h(head), c(h.c), w(h.w), s(space), D(h.D), ld(h.ld), C(C), k_rows(k_rows), erase_bar(erase_bar),
        after_bar(after_bar), chunk_bar(chunk_bar) {}

  // Adds to k_bar [C, D], eta_bar and alpha_bar [C]; alpha_bar may be null.
  void run(float* k_bar, float* eta_bar, float* alpha_bar) {
    factors();
    solve(k_bar);
    std::memset(s.products_bar, 0, C * ld * sizeof(float));
    if (c.dgd) products(eta_bar);
    if (c.dgd || c.step_clip) keys_of_gram(k_bar);
    for (int64_t t = 0; c.dgd && t < C; t++) eta_bar[t] += erase_bar[t] * before(t);
    if (alpha_bar) decays(alpha_bar);
  }

 private:
  const Head& h;
  const TitansCall& c;
  const Workspace& w;
  const BackwardSpace& s;
  const int64_t D, ld, C;
  const float *k_rows, *erase_bar;
  float* after_bar;
  const float chunk_bar;

  float before(int64_t t) const { return h.gamma[t * ld]; }

  // P[t,s], 0 where t <= s
  void factors() {
    std::memset(s.products, 0, C * ld * sizeof(float));
    for (int64_t t = 1; t < C; t++) std::memcpy(s.products + t * ld, h.gamma + t * ld + 1, t * sizeof(float));
  }

  void solve(float* k_bar) {
    for (int64_t t = 0; t < C; t++) {
      float *y = s.solved + t * D, *out = k_bar + t * D;
      std::memcpy(y, s.keys_bar_rows + t * D, D * sizeof(float));
      for (int64_t j = 0; c.dgd && j < t; j++)
        subtract(y, h.eta[t] * s.products[t * ld + j] * w.gram[t * ld + j], s.solved + j * D);
      after_bar[t] += dot(y, k_rows + t * D, D);
      const f8 after = all(h.decay_after[t]);
      for (int64_t d = 0; d < D; d += 8) store(out + d, fma(after, load(y + d), load(out + d)));
    }
  }

  void subtract(float* y, float factor, const float* x) const {
    for (int64_t d = 0; d < D; d += 8) store(y + d, fnma(all(factor), load(x + d), load(y + d)));
  }

  // From L_bar: products_bar, and what is added to gram_bar and eta_bar
  void products(float* eta_bar) {
    const int64_t P = panels(C);
    for (int64_t p = 0; p < P; p++) {
      const int64_t n = std::min<int64_t>(PANEL, C - p * PANEL);
      load_lanes(s.solved_panel, s.solved + p * PANEL * D, D, D, 0, n);
      panel_product(0, C, D, w.keys, D, 1, s.solved_panel, n <= 8, [&](int64_t t, auto& acc) {
        store_factor(s.products_bar + t * ld + p * PANEL, acc);
      });
    }
    for (int64_t t = 0; t < C; t++) {
      float sum = 0;
      for (int64_t j = 0; j < ld; j++) {
        float& at = s.products_bar[t * ld + j];
        if (j >= t) {
          at = 0;
          continue;
        }
        const float gram = w.gram[t * ld + j], P = s.products[t * ld + j];
        sum -= at * gram * P;
        s.gram_bar[t * ld + j] -= at * h.eta[t] * P;
        at *= -h.eta[t] * gram;
      }
      eta_bar[t] += sum;
    }
  }

  template <class V, int MR, int NV>
  HK_INLINE void store_factor(float* to, const V (&acc)[MR][NV]) const {
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < NV; v++) store(to + i * ld + LANES<V> * v, acc[i][v]);
  }

  // k_bar_t += sum_s (gram_bar[t,s] + gram_bar[s,t]) k_s
  void keys_of_gram(float* k_bar) {
    for (int64_t t = 0; t < C; t++)
      for (int64_t j = 0; j < C; j++) {
        const f8 factor = all(s.gram_bar[t * ld + j] + s.gram_bar[j * ld + t]);
        float* out = k_bar + t * D;
        for (int64_t d = 0; d < D; d += 8)
          store(out + d, fma(factor, load(k_rows + j * D + d), load(out + d)));
      }
  }

  // alpha_bar_t = sum_{s<t} P[t,s] ((P^T P_bar)[t,s] + decay_after_t decay_after_bar_s)
  //               + decay_before_t ((P^T decay_before_bar)_t + decay_after_t decay_chunk_bar)
  void decays(float* alpha_bar) {
    for (int64_t t = 0; t < C; t++) {
      f8 sum = all(0);
      for (int64_t j = 0; j < t; j += 8) {
        f8 inner = all(h.decay_after[t]) * load(after_bar + j);
        for (int64_t l = t + 1; l < C; l++)
          inner = fma(all(s.products[l * ld + t]), load(s.products_bar + l * ld + j), inner);
        sum = fma(load(s.products + t * ld + j), inner, sum);  // P is 0 from t on
      }
      float before_bar = h.decay_after[t] * chunk_bar;
      for (int64_t l = t + 1; c.dgd && l < C; l++)
        before_bar += s.products[l * ld + t] * (erase_bar[l] * h.eta[l]);
      alpha_bar[t] += total(sum) + before(t) * before_bar;
    }
  }
};
