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
//
// What is added to s is what an update subtracts, with its sign changed.
#pragma once
#include "titans_commit.h"
#include "titans_linear.h"

// Base: Commit or LinearCommit
template <class Base>
class MomentumCommit : private Base {
  using Base::h, Base::c, Base::w, Base::g, Base::D, Base::N, Base::R, Base::ld, Base::m, Base::C, Base::P, Base::first,
      Base::k_rows, Base::clock;

 public:
  using Base::Base;

  void run() {
    Base::tokens();
    h.team.sync();
    Base::evaluate();
    if (c.dgd) along_keys();
    if (c.dgd || c.step_clip) clock.key_products();
    h.sync_rows();
    Base::errors();
    clock.decays();
    arrivals();
    Base::gradients();
    keys();
    h.team.sync();
    Base::all_step_sizes();
    update_inputs();
    if constexpr (!std::is_same_v<Base, LinearCommit>) update_outputs();
    h.sync_rows();
  }

 private:
  // s2 k, of this thread's rows
  void along_keys() {
    Base::for_inputs([&](Range r, int64_t) {
      for (int64_t p = 0; p < P; p++) {
        float* to = w.s2_k + p * R * PANEL;
        Base::product(r, g.s2, w.k, p, [&](int64_t i, auto& x) { store_rows(to, i, x); });
      }
    });
  }

  // A, the last row of B, and what they are at the tokens: every thread for itself
  void arrivals() {
    const float *alpha = w.alpha + first, *beta = w.beta + first;
    for (int64_t s = 0; s < ld; s++) h.arrival[s] = 0;
    h.carried[0] = 1;
    for (int64_t t = 1; t <= C; t++) {
      float *row = h.arrival + t * ld, *last = row - ld;
      for (int64_t s = 0; s < t; s++) {
        h.carried[s] *= beta[t - 1];  // row t of B
        row[s] = std::fma(alpha[t - 1], last[s], h.carried[s]);
      }
      if (t < ld) h.carried[t] = row[t] = 1;
    }
    for (int64_t t = 0; t < C; t++) {
      h.decay_before[t] = h.gamma[t * ld], h.arrived_before[t] = h.arrival[t * ld];
      h.arrived_after[t] = t + 1 == C ? 1 : h.arrival[C * ld + t + 1];
      h.carried_after[t] = t + 1 == C ? -1 : -h.carried[t + 1];
    }
  }

  float arrived_chunk() const { return h.arrival[C * ld]; }
  float carried_chunk() const { return h.carried[0]; }

  // Kg, X and -B[C,t] k_t, this thread's columns
  void keys() {
    const Range cols = h.clock_share(D, 8);
    for (int64_t d = cols.begin; d < cols.end; d += 8)
      for (int64_t s = C - 1; s >= 0; s--) {
        const f8 k = load(k_rows + s * D + d);
        f8 x = all(h.decay_after[s]) * k, kg = all(h.arrived_after[s]) * k;
        for (int64_t t = C - 1; c.dgd && t > s; t--) {
          const f8 solved = load(w.solved + t * D + d);
          x = fnma(all(h.gamma[t * ld + s + 1] * w.gram[t * ld + s]), solved, x);
          kg = fnma(all(h.arrival[t * ld + s + 1] * w.gram[t * ld + s]), solved, kg);
        }
        store(w.solved + s * D + d, all(h.eta[s]) * x);
        store(w.keys + s * D + d, kg);
        store(w.carried_k + s * D + d, all(h.carried_after[s]) * k);
      }
  }

  void update_inputs() {
    Base::for_inputs([&](Range r, int64_t memory) {
      for (int64_t p = 0; p < P; p++) left_factors(r, memory, p);
      fade(g.delta2, g.s2, r.begin * D, r.end * D);
      const FastWeight last{g.delta2, g.base2, w.w2, D, 1}, more{g.delta2, nullptr, nullptr, D, 1};
      update(c.dgd ? more : last, {w.d, R * PANEL, w.keys, D}, C, r.begin, r.end);
      if (c.dgd) update(last, {w.delta2_k, R * PANEL, w.solved, D}, C, r.begin, r.end);
      update({g.s2, nullptr, nullptr, D, carried_chunk()}, {w.d, R * PANEL, w.carried_k, D}, C, r.begin, r.end);
    });
  }

  // gain d, rows of a panel, in the place of d; and in that of delta2 k what is erased
  void left_factors(Range r, int64_t memory, int64_t p) {
    for (int64_t v = 0; v < PANEL; v += LANES<widest>) {
      const int64_t t = p * PANEL + v;
      const widest gain = load_as<widest>(h.gain + memory * ld + t), decayed = load_as<widest>(h.decay_before + t);
      const widest arrived = load_as<widest>(h.arrived_before + t);
      for (int64_t i = r.begin; i < r.end; i++) {
        const int64_t at = (p * R + i) * PANEL + v;
        store(w.d + at, gain * load_as<widest>(w.d + at));
        if (!c.dgd) continue;
        const widest known = decayed * load_as<widest>(w.delta2_k + at);
        store(w.delta2_k + at, fnma(arrived, load_as<widest>(w.s2_k + at), known));
      }
    }
  }

  // w1 and w1s
  void update_outputs() {
    Base::for_outputs([&](Range own, int64_t memory, const Errors& e, const FastWeight& weight, float* s) {
      fade(weight.delta, s, own.begin * N, own.end * N);
      Base::scale_errors(own, memory, e, h.arrived_after);
      update({weight.delta, weight.base, weight.w, N, 1}, e.factors(), C, own.begin, own.end);
      Base::scale_errors(own, memory, e, h.carried_after);
      update({s, nullptr, nullptr, N, carried_chunk()}, e.factors(), C, own.begin, own.end);
    });
  }

  // delta <- gamma[C,0] delta - A[C,0] s
  void fade(float* delta, const float* s, int64_t begin, int64_t end) const {
    const f8 decay = all(Base::decay_chunk()), arrived = all(arrived_chunk());
    for (int64_t i = begin; i < end; i += 8)
      store(delta + i, fnma(arrived, load(s + i), decay * load(delta + i)));
  }
};
