// Writing a chunk of a memory with momentum: the stages of titans_commit.h, with keys of their own for what is erased.
// With A = gamma B, where B[t,s] = prod_{s<j<=t} beta_j and the row B[0,.] is left out (hope_kernels/ops/titans/
// README.md):
//
//     X_s  = eta_s (gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) X_t)              back substitution
//     Kg_s = A[C,s] k_s - sum_{t>s} A[t-1,s] (k_t.k_s) X_t
//     delta2 <- gamma[C,0] delta2 - A[C,0] s2 - sum_t gain_t d_t Kg_t^T
//                                             - sum_t (gamma[t-1,0] delta2 k_t - A[t-1,0] s2 k_t) X_t^T
//     delta1 <- gamma[C,0] delta1 - A[C,0] s1 - sum_t gain_t A[C,t] e_t a_t^T
//     s2 <- B[C,0] s2 + sum_t gain_t d_t (B[C,t] k_t)^T,   s1 <- B[C,0] s1 + sum_t gain_t B[C,t] e_t a_t^T
#pragma once
#include "titans_commit.h"

template <int ACT>
class MomentumCommit : private Commit<ACT> {
  using Base = Commit<ACT>;
  using Base::h, Base::c, Base::w, Base::g, Base::D, Base::N, Base::hid, Base::R, Base::ld, Base::m, Base::C, Base::P,
      Base::first, Base::k_rows, Base::rows, Base::outs;

 public:
  using Base::Base;

  void run() {
    Base::tokens();
    h.team.sync();
    Base::evaluate();
    if (c.dgd) along_keys();
    if (c.dgd || c.step_clip) Base::key_products();
    h.sync_rows();
    Base::errors();
    Base::decays();
    arrivals();
    Base::gradients();
    keys();
    h.team.sync();
    Base::all_step_sizes();
    update_inputs();
    update_outputs();
    h.sync_rows();
  }

 private:
  // s2 k, of this thread's rows
  void along_keys() {
    auto product = [&](Range r, int64_t p) { Base::product(r, g.s2, w.k, p, w.s2_k + p * R * PANEL); };
    for_blocks(rows, 0, P, product);
    if (skips())
      for (int64_t p = 0; p < P; p++) product({hid + m.s0, hid + m.s1}, p);
  }

  bool skips() const { return c.scalar_skip && h.team.id == h.team.size - 1; }

  // A, and B[C,.]: every thread for itself
  void arrivals() {
    const float *alpha = w.alpha + first, *beta = w.beta + first;
    float* before = h.carried;  // row t - 1 of B, then row t
    for (int64_t s = 0; s <= C; s++) h.arrival[s] = 0;
    before[0] = 1;
    for (int64_t t = 1; t <= C; t++) {
      float *row = h.arrival + t * ld, *last = row - ld;
      for (int64_t s = 0; s < t; s++) {
        before[s] *= beta[t - 1];
        row[s] = std::fma(alpha[t - 1], last[s], before[s]);
      }
      if (t < ld) before[t] = row[t] = 1;
    }
  }

  // The numbers A[C,t] and B[C,t] of the chunk's tokens, which count from 0 here: 1 for the last.
  float arrived(int64_t t) const { return t + 1 == C ? 1 : h.arrival[C * ld + t + 1]; }
  float carried(int64_t t) const { return t + 1 == C ? 1 : h.carried[t + 1]; }

  // Kg, X and B[C,t] k_t, this thread's columns
  void keys() {
    const Range cols = h.clock_share(D, 8);
    for (int64_t d = cols.begin; d < cols.end; d += 8)
      for (int64_t s = C - 1; s >= 0; s--) {
        const f8 k = load(k_rows + s * D + d);
        f8 x = all(h.decay_after[s]) * k, kg = all(arrived(s)) * k;
        for (int64_t t = C - 1; c.dgd && t > s; t--) {
          const f8 solved = load(w.solved + t * D + d);
          x = fnma(all(h.gamma[t * ld + s + 1] * w.gram[t * ld + s]), solved, x);
          kg = fnma(all(h.arrival[t * ld + s + 1] * w.gram[t * ld + s]), solved, kg);
        }
        store(w.solved + s * D + d, all(h.eta[s]) * x);
        store(w.keys + s * D + d, kg);
        store(w.carried_k + s * D + d, all(carried(s)) * k);
      }
  }

  // w2 and its skip rows
  void update_inputs() {
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK) {
      const int64_t stop = std::min(r + BLOCK, rows.end);
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = r; i < stop; i++) left_factors(i, i / N, w.d + (p * R + i) * PANEL, p);
      update_rows(r, stop);
    }
    if (!skips()) return;
    for (int64_t p = 0; p < P; p++)
      for (int64_t s = m.s0; s < m.s1; s++)
        left_factors(hid + s, c.Mf + s, w.es + (p * c.Ms + s) * PANEL, p);
    update_rows(hid + m.s0, hid + m.s1);
  }

  // gain d in the place of d, and what is erased in that of delta2 k
  void left_factors(int64_t row, int64_t memory, const float* d, int64_t p) {
    const int64_t at = (p * R + row) * PANEL;
    for (int64_t v = 0; v < PANEL; v += 8) {
      const int64_t t = p * PANEL + v;
      store(w.d + at + v, load(h.gain + memory * ld + t) * load(d + v));
      if (!c.dgd) continue;
      float decayed[8], arrived[8];
      for (int64_t i = 0; i < 8; i++) {
        decayed[i] = t + i < C ? h.gamma[(t + i) * ld] : 0;
        arrived[i] = t + i < C ? h.arrival[(t + i) * ld] : 0;
      }
      float* erased = w.delta2_k + at + v;
      store(erased, fnma(load(arrived), load(w.s2_k + at + v), load(decayed) * load(erased)));
    }
  }

  void update_rows(int64_t r, int64_t stop) {
    const float decay = Base::decay_chunk();
    const float* base = c.dgd ? nullptr : g.base2;  // w2 is made of the deviations once, at last
    outer_product(r, stop, D, C, w.d, R * PANEL, w.keys, D, [&](int64_t i, int64_t col, auto& acc) {
      advance(g.delta2, base, w.w2, decay, g.s2, i * D + col, D, acc);
    });
    if (c.dgd)
      outer_product(r, stop, D, C, w.delta2_k, R * PANEL, w.solved, D, [&](int64_t i, int64_t col, auto& acc) {
        Base::advance(g.delta2, g.base2, w.w2, 1, i * D + col, D, acc);
      });
    outer_product(r, stop, D, C, w.d, R * PANEL, w.carried_k, D, [&](int64_t i, int64_t col, auto& acc) {
      carry(g.s2, i * D + col, D, acc);
    });
  }

  // w1 and w1s
  void update_outputs() {
    for (int64_t f = m.f0; f < m.f1; f++) {
      const Range own = outs.within(f * D, (f + 1) * D);
      outputs(own, f, w.e, w.target, c.Mf * D, w.a_rows + f * N, g.delta1, g.base1, w.w1, g.s1);
    }
    const Range scalars = outs.within(m.f1 * D, outs.end);
    for (int64_t i = scalars.begin; i < scalars.end; i++) {
      const int64_t s = m.s0 + i - m.f1 * D;
      outputs({s, s + 1}, c.Mf + s, w.es, w.target_s, c.Ms, w.a_rows + (c.Mf + s) * N, g.delta1s, g.base1s, w.w1s,
              g.s1s);
    }
  }

  // Rows `own`, of one memory: e [height] in panels, a in rows. steps: a place as large as e.
  void outputs(Range own, int64_t memory, const float* e, float* steps, int64_t height, const float* a, float* delta,
               const float* base, float* to, float* s) {
    const float decay = Base::decay_chunk();
    auto scaled = [&](auto factor) {
      for (int64_t t = 0; t < P * PANEL; t += 8) {
        float step[8];
        for (int64_t i = 0; i < 8; i++) step[i] = t + i < C ? h.gain[memory * ld + t + i] * factor(t + i) : 0;
        for (int64_t i = own.begin; i < own.end; i++) {
          const int64_t at = (t / PANEL * height + i) * PANEL + t % PANEL;
          store(steps + at, load(step) * load(e + at));
        }
      }
    };
    scaled([&](int64_t t) { return arrived(t); });
    outer_product(own.begin, own.end, N, C, steps, height * PANEL, a, hid, [&](int64_t r, int64_t col, auto& acc) {
      advance(delta, base, to, decay, s, r * N + col, N, acc);
    });
    scaled([&](int64_t t) { return carried(t); });
    outer_product(own.begin, own.end, N, C, steps, height * PANEL, a, hid, [&](int64_t r, int64_t col, auto& acc) {
      carry(s, r * N + col, N, acc);
    });
  }

  // delta <- decay delta - A[C,0] s - acc, w <- base + delta
  template <class V, int MR, int NV>
  HK_INLINE void advance(float* delta, const float* base, float* to, float decay, const float* s, int64_t at,
                         int64_t step, V (&acc)[MR][NV]) const {
    const V arrived = all_as<V>(h.arrival[C * ld]);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        acc[i][v] = fma(arrived, load_as<V>(s + at + i * step + LANES<V> * v), acc[i][v]);
    Base::advance(delta, base, to, decay, at, step, acc);
  }

  // s <- B[C,0] s + acc
  template <class V, int MR, int NV>
  HK_INLINE void carry(float* s, int64_t at, int64_t step, const V (&acc)[MR][NV]) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        float* to = s + at + i * step + LANES<V> * v;
        store(to, fma(all_as<V>(h.carried[0]), load_as<V>(to), acc[i][v]));
      }
  }
};
