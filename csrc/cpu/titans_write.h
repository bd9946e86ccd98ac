// What memories of either kind (titans_commit.h, titans_linear.h) have in common when they write a chunk.
#pragma once
#include <cfloat>
#include <cstring>

#include "titans_clock.h"
#include "titans_update.h"

// Memories [m0, m1), which commit together: [f0, f1) with D outputs, scalar ones [s0, s1).
struct Group {
  int64_t m0, m1, f0, f1, s0, s1;
};

class ChunkWrite {
 protected:
  // C tokens up to slot `end`
  ChunkWrite(const Head& head, const Group& group, int64_t C, int64_t end)
      : h(head), c(h.c), w(h.w), g(h.g), D(h.D), N(h.N), R(h.R), ld(h.ld), m(group), C(C), P(panels(C)),
        first((end - C) % h.big), k_rows(w.k_rows + first * D), v_rows(w.v_rows + first * D),
        clock(head, C, first, k_rows), scale(c.objective_dot ? 1 : c.grad_scale) {}

  const Head& h;
  const TitansCall& c;
  const Workspace& w;
  const Tensors& g;
  const int64_t D, N, R, ld;
  const Group m;
  const int64_t C, P;                // tokens, and their panels
  const int64_t first;               // the chunk's first slot
  const float *k_rows, *v_rows;      // the chunk's tokens, [C, D]
  const Clock clock;
  const float scale;

  bool half(int64_t p) const { return C - p * PANEL <= 8; }

  // Rows `own` of A times panel p of `in`
  template <class Done>
  HK_INLINE void product(Range own, const float* A, const float* in, int64_t p, Done done) const {
    panel_product(own.begin, own.end, D, A, D, 1, in + p * D * PANEL, half(p), done);
  }

  void tokens() {
    for_panels(h.own_lanes(C), [&](int64_t p, int64_t a, int64_t b) {
      if (h.owns_k()) load_lanes(w.k + p * D * PANEL, k_rows + (p * PANEL + a) * D, D, D, a, b);
      if (h.owns_v()) load_lanes(w.v + p * D * PANEL, v_rows + (p * PANEL + a) * D, D, D, a, b);
    });
  }

  float decay_chunk() const { return h.gamma[C * ld]; }

  // Columns of a panel, e being M(k): e = scale (e - target) or -target, the target normalised. size: becomes what it
  // was, or null.
  template <class V>
  void full_error(float* e, float* target, float* size) const {
    const bool norm = c.target_norm, dot = c.objective_dot;
    V factor = all_as<V>(1);
    if (norm) {
      const V found = root(squares<V>(target, D));
      if (size) store(size, found);
      factor = unit_factor(found);
    }
    for (int64_t i = 0; i < D * PANEL; i += PANEL) {
      V x = load_as<V>(target + i);
      if (norm) x = x * factor, store(target + i, x);
      store(e + i, dot ? -x : (load_as<V>(e + i) - x) * all_as<V>(scale));
    }
  }

  // The same of a scalar memory, whose target is bounded.
  template <class V>
  void scalar_error(float* e, const float* target) const {
    V t = load_as<V>(target);
    if (c.target_norm) t = most(all_as<V>(-1), least(all_as<V>(1), t));
    store(e, c.objective_dot ? -t : (load_as<V>(e) - t) * all_as<V>(scale));
  }

  // -- step sizes -------------------------------------------------------------------------------------------

  // m_t of tokens t .., for `gains`. Where a square has overflown S does and the step is 0; bounds, since inf / inf and
  // 0 inf would be NaN.
  template <class V>
  void keep_size(int64_t t, V found) const {
    const V size = least(all_as<V>(1e30f), found);
    store(h.size + t, size);
    store(h.eta_size + t, least(all_as<V>(FLT_MAX), load_as<V>(h.eta + t) * size));
  }

  // gain_t = eta_t / max(1, S_t), S_t = scale m_t sum_s eta_s m_s (k_t.k_s)^2
  void gains(float* gain) const {
    int64_t t = 0;
    for (; t + 4 * LANES<widest> <= C; t += 4 * LANES<widest>) gains_at<4>(gain, t);
    for (; t < C; t += LANES<widest>) gains_at<1>(gain, t);
  }

  template <int NV>
  void gains_at(float* gain, int64_t t) const {
    widest s[NV] = {};
    for (int64_t j = 0; j < C; j++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const widest gram = load_as<widest>(w.gram + j * ld + t + LANES<widest> * v);
        s[v] = fma(all_as<widest>(h.eta_size[j]), gram * gram, s[v]);
      }
    for (int v = 0; v < NV; v++, t += LANES<widest>) {
      const widest clip = all_as<widest>(scale) * load_as<widest>(h.size + t) * s[v];
      store(gain + t, load_as<widest>(h.eta + t) / most(all_as<widest>(1), clip));
    }
  }

  // -- update -----------------------------------------------------------------------------------------------

  // Rows of w2, which take the gains of a memory; their d is in w.d.
  void update_rows(Range r, int64_t memory) const {
    for (int64_t p = 0; p < P; p++) left_factors(r, memory, p);
    update({g.delta2, g.base2, w.w2, D, decay_chunk()}, {w.d, R * PANEL, w.keys, D}, C, r.begin, r.end);
  }

  // u = gain d + erase (delta2 k), rows of a panel, in the place of d
  void left_factors(Range r, int64_t memory, int64_t p) const {
    float* d = w.d + p * R * PANEL;
    const float* delta2_k = w.delta2_k + p * R * PANEL;
    const bool dgd = c.dgd;
    for (int64_t v = 0; v < PANEL; v += LANES<widest>) {
      const widest gain = load_as<widest>(h.gain + memory * ld + p * PANEL + v);
      const widest erase = load_as<widest>(h.erase + p * PANEL + v);
      for (int64_t i = r.begin * PANEL + v; i < r.end * PANEL; i += PANEL) {
        const widest step = gain * load_as<widest>(d + i);
        store(d + i, dgd ? fma(erase, load_as<widest>(delta2_k + i), step) : step);
      }
    }
  }
};
