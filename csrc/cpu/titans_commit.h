// Writing a chunk: C tokens up to slot `end` into the memories of a group. The stages are those of
// csrc/cuda/titans/commit.cuh, in the same order:
//
//     evaluate         a, sigma' and delta2 k at the keys; a at the values
//     key_products     gram
//     errors           e, es
//     decays           gamma, erase, decay_after                            every thread for itself
//     gradients        d, and the partial sums of |a|^2 and |d|^2
//     transformed_keys Kg
//     step_sizes       gain                                                 every thread for itself
//     update_inputs    delta2 <- gamma[C,0] delta2 - U^T Kg
//     update_outputs   delta1 <- gamma[C,0] delta1 - sum_t gain_t gamma[C,t] e_t a_t^T
#pragma once
#include <cfloat>
#include <cstring>

#include "titans_write.h"

// What an output's update is made of: errors e [height] in panels, a place as large for them to be scaled in, and the
// activations, tokens as rows.
struct Errors {
  const float* e;
  float* scaled;
  int64_t height;
  const float* a;
  int64_t lda;
  Factors factors() const { return {scaled, height * PANEL, a, lda}; }
};

template <int ACT>
class Commit : protected ChunkWrite {
 public:
  Commit(const Head& head, const Group& group, int64_t C, int64_t end)
      : ChunkWrite(head, group, C, end), hid(h.hid), rows(h.hidden_rows(m.m0 * N, m.m1 * N)),
        outs(h.output_rows(m.f0 * D, m.f1 * D + m.s1 - m.s0)),
        delta_form(c.own_values && !c.target_norm && !c.objective_dot) {}

  void run() {
    prepare();
    all_step_sizes();
    update_inputs();
    update_outputs();
    h.sync_rows();
  }

 protected:
  // everything at the chunk-start weights, up to the step sizes
  void prepare() {
    tokens();
    h.team.sync();
    evaluate();
    if (c.dgd || c.step_clip) clock.key_products();
    h.sync_rows();
    errors();
    clock.decays();
    gradients();
    clock.transformed_keys(c.dgd);
    h.team.sync();
  }

  const int64_t hid;
  const Range rows, outs;            // hidden rows and outputs of this thread
  const bool delta_form;             // M(k) - M(v) with one product

  // -- evaluate ---------------------------------------------------------------------------------------------

  void evaluate() {
    for_blocks(rows, 0, P, [&](Range r, int64_t p) { evaluate_block(r, p); });
    if (c.dgd && writes_skips()) {
      for (int64_t p = 0; p < P; p++)
        product({hid + m.s0, hid + m.s1}, g.delta2, w.k, p,
                [&](int64_t i, auto& x) { store_rows(w.delta2_k + p * R * PANEL, i, x); });
    }
  }

  void evaluate_block(Range r, int64_t p) {
    float *a = w.a + p * hid * PANEL, *a_values = w.a_values + p * hid * PANEL;
    float *slope = w.d + p * R * PANEL, *delta2_k = w.delta2_k + p * R * PANEL;
    auto at_keys = [&](int64_t i, auto& z) {
      if (w.z) store_rows(w.z + p * hid * PANEL, i, z);
      if (c.dgd && !c.base2) store_rows(delta2_k, i, z);
      activate_rows<ACT>(z, slope, i);
      if (c.step_clip) add_squares(z, i, w.norms + i / 8 * ld + p * PANEL);
      store_rows(a, i, z);
    };
    auto at_values = [&](int64_t i, auto& z) {
      if (w.values) keep_values(z, i, p);
      else activate<ACT>(z);
      if (delta_form && i < m.f1 * N) subtract_from_rows(z, a, i);
      store_rows(a_values, i, z);
    };
    const Range values = c.own_values ? r : r.within(m.f1 * N, m.m1 * N);
    if (c.own_values && !half(p)) {  // one reading of the weights
      panel_products(r.begin, r.end, D, h.w2, D, 1, w.k + p * D * PANEL, w.v + p * D * PANEL, at_keys, at_values);
    } else {
      product(r, h.w2, w.k, p, at_keys);
      product(values, h.w2, w.v, p, at_values);
    }
    if (c.dgd && c.base2) product(r, g.delta2, w.k, p, [&](int64_t i, auto& x) { store_rows(delta2_k, i, x); });
    for (int64_t i = r.begin; i < r.end; i += 8)
      for (int64_t t = 0; t < PANEL && p * PANEL + t < C; t += 8)
        transpose8(a + i * PANEL + t, PANEL, w.a_rows + (p * PANEL + t) * hid + i, hid);
  }

  // z = sigma(z), after sigma and sigma' for the backward; gelu's sigma alone has other bits than beside its slope
  template <class Tile>
  HK_INLINE void keep_values(Tile& z, int64_t i, int64_t p) const {
    float *values = w.values + p * hid * PANEL, *slope = w.values_slope + p * R * PANEL;
    if constexpr (ACT == GELU) store_rows(w.a_values + p * hid * PANEL, i, z);
    activate_rows<ACT>(z, slope, i);
    store_rows(values, i, z);
    if constexpr (ACT == GELU) load_rows(z, w.a_values + p * hid * PANEL, i), activate<ACT>(z);
  }

  // -- errors -----------------------------------------------------------------------------------------------

  void errors() {
    for (int64_t f = m.f0; f < m.f1; f++)
      for_blocks(outs.within(f * D, (f + 1) * D), 0, P, [&](Range r, int64_t p) { outputs(f, r, p); });
    const int64_t full = m.f1 * D;
    const Range scalars = outs.within(full, full + m.s1 - m.s0);
    for (int64_t i = scalars.begin; i < scalars.end; i++)
      for (int64_t p = 0; p < P; p++) scalar_errors(m.s0 + i - full, p);
    h.sync_rows();
    if (delta_form) return;
    const Range owned = h.by_memory ? Range{outs.begin / D, std::min(outs.end / D, m.f1)} : Range{m.f0, m.f1};
    for_lanes(h.own_lanes(C), [&](int64_t t, auto v) {
      for (int64_t f = owned.begin; f < owned.end; f++) {
        const int64_t at = (t / PANEL * c.Mf + f) * D * PANEL + t % PANEL;
        full_error<decltype(v)>(w.e + at, w.target + at, w.target_sizes ? w.target_sizes + f * ld + t : nullptr);
      }
    });
    h.sync_rows();
  }

  // Rows r of memory f: e itself where one product gives it, else M(k), and M(v) or v as the target.
  void outputs(int64_t f, Range r, int64_t p) {
    const float *k = w.k + p * D * PANEL, *v = w.v + p * D * PANEL;
    float *e = w.e + p * c.Mf * D * PANEL, *target = w.target + p * c.Mf * D * PANEL;
    const float *a = w.a + (p * hid + f * N) * PANEL, *a_values = w.a_values + (p * hid + f * N) * PANEL;
    if (delta_form) {
      panel_product(r.begin, r.end, N, h.w1, N, 1, a_values, half(p), [&](int64_t i, auto& acc) {
        add_rows(acc, k, i - f * D);
        scaled_difference(acc, v, i - f * D, scale);
        store_rows(e, i, acc);
      });
      return;
    }
    if (c.own_values) {
      panel_product(r.begin, r.end, N, h.w1, N, 1, a_values, half(p), [&](int64_t i, auto& acc) {
        add_rows(acc, v, i - f * D);
        store_rows(target, i, acc);
      });
    } else {
      for (int64_t i = r.begin; i < r.end; i++)
        std::memcpy(target + i * PANEL, v + (i - f * D) * PANEL, PANEL * sizeof(float));
    }
    if (!c.objective_dot)
      panel_product(r.begin, r.end, N, h.w1, N, 1, a, half(p), [&](int64_t i, auto& acc) {
        add_rows(acc, k, i - f * D);
        store_rows(e, i, acc);
      });
  }

  // acc = scale (acc - v)
  template <class V, int MR, int NV>
  static HK_INLINE void scaled_difference(V (&acc)[MR][NV], const float* panel, int64_t r, float scale) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        acc[i][v] = (acc[i][v] - load_as<V>(panel + (r + i) * PANEL + LANES<V> * v)) * all_as<V>(scale);
  }

  void scalar_errors(int64_t s, int64_t p) {
    const float *k = w.k + p * D * PANEL, *v = w.v + p * D * PANEL;
    float *e = w.es + (p * c.Ms + s) * PANEL, *target = w.target_s + (p * c.Ms + s) * PANEL;
    h.scalar_output(s, w.a_values + (p * hid + (c.Mf + s) * N) * PANEL, v, target);
    if (!c.objective_dot) h.scalar_output(s, w.a + (p * hid + (c.Mf + s) * N) * PANEL, k, e);
    for (int i = 0; i < PANEL; i += LANES<widest>) scalar_error<widest>(e + i, target + i);
  }

  // -- gradients --------------------------------------------------------------------------------------------

  void gradients() {
    for (int64_t f = m.f0; f < m.f1; f++) {
      for_blocks(rows.within(f * N, (f + 1) * N), 0, P, [&](Range r, int64_t p) {
        float* d = w.d + p * R * PANEL;
        const float* e = w.e + (p * c.Mf + f) * D * PANEL;
        panel_product(r.begin - f * N, r.end - f * N, D, h.w1 + f * D * N, 1, N, e, half(p),
                      [&](int64_t i, auto& acc) {
                        if (w.back) store_rows(w.back + p * hid * PANEL, i + f * N, acc);
                        multiply_rows(acc, d, i + f * N);
                        if (c.step_clip) add_squares(acc, i + f * N, d_norms(i + f * N, p));
                        store_rows(d, i + f * N, acc);
                      });
      });
    }
    for (int64_t s = m.s0; s < m.s1; s++) {
      scalar_gradients(s);
      for (int64_t p = 0; writes_skips() && p < P; p++)
        std::memcpy(w.d + (p * R + hid + s) * PANEL, w.es + (p * c.Ms + s) * PANEL, PANEL * sizeof(float));
    }
  }

  float* d_norms(int64_t row, int64_t p) const { return w.norms + (hid / 8 + row / 8) * ld + p * PANEL; }

  void scalar_gradients(int64_t s) {
    const int64_t top = (c.Mf + s) * N;
    const Range own = rows.within(top, top + N);
    if (own.begin == own.end) return;
    const float* w1s = h.w1s + s * N;
    for (int64_t p = 0; p < P; p++)
      for (int64_t v = 0; v < PANEL; v += LANES<widest>) {
        const widest e = load_as<widest>(w.es + (p * c.Ms + s) * PANEL + v);
        float* d = w.d + p * R * PANEL + v;
        for (int64_t i = own.begin; i < own.end; i += 8) {
          widest sum{};
#pragma GCC unroll 8
          for (int64_t j = i; j < i + 8; j++) {
            const widest x = load_as<widest>(d + j * PANEL) * (all_as<widest>(w1s[j - top]) * e);
            store(d + j * PANEL, x);
            sum = fma(x, x, sum);
          }
          if (c.step_clip) store(d_norms(i, p) + v, sum);
        }
      }
  }

  // -- step sizes -------------------------------------------------------------------------------------------

  void all_step_sizes() {
    const int64_t begin = h.by_memory ? rows.begin / N : m.m0, end = h.by_memory ? rows.end / N : m.m1;
    for (int64_t i = begin; i < end; i++) step_sizes(i);
  }

  // Of memory i: gain_t = eta_t / max(1, S_t), S_t = scale m_t sum_s eta_s m_s (k_t.k_s)^2.
  void step_sizes(int64_t i) {
    float* gain = h.gain + i * ld;
    if (!c.step_clip) {
      std::memcpy(gain, h.eta, C * sizeof(float));
      return;
    }
    for_lanes({0, C}, [&](int64_t t, auto v) { sizes<decltype(v)>(i, t); });
    gains(gain);
  }

  // m_t and eta_t m_t of memory i, for tokens t ..
  template <class V>
  void sizes(int64_t i, int64_t t) {
    V a2{}, d2{}, e2;
    for (int64_t r = i * N / 8; r < (i + 1) * N / 8; r++) {
      a2 = a2 + load_as<V>(w.norms + r * ld + t);
      d2 = d2 + load_as<V>(w.norms + (hid / 8 + r) * ld + t);
    }
    const int64_t p = t / PANEL, lane = t % PANEL;
    if (i < c.Mf) {
      e2 = squares<V>(w.e + (p * c.Mf + i) * D * PANEL + lane, D);
    } else {
      const V e = load_as<V>(w.es + (p * c.Ms + i - c.Mf) * PANEL + lane);
      e2 = e * e;
    }
    keep_size(t, root(a2 + d2 / (least(all_as<V>(FLT_MAX), e2) + all_as<V>(1e-9f)) + all_as<V>(1e-12f)));
  }

  // -- updates ----------------------------------------------------------------------------------------------

  // w2 and its skip rows
  void update_inputs() {
    for_inputs([&](Range r, int64_t memory) { update_rows(r, memory); });
  }

  // f(rows, memory) for the rows of w2 that this thread writes, in blocks
  template <class F>
  void for_inputs(F f) {
    for (int64_t r = rows.begin; r < rows.end;) {
      const int64_t stop = std::min({r + BLOCK, rows.end, (r / N + 1) * N});
      f(Range{r, stop}, r / N);
      r = stop;
    }
    for (int64_t s = m.s0; writes_skips() && s < m.s1; s++) f(Range{hid + s, hid + s + 1}, c.Mf + s);
  }

  bool writes_skips() const { return c.scalar_skip && h.team.id == h.team.size - 1; }

  // w1 and w1s
  void update_outputs() {
    for_outputs([&](Range own, int64_t memory, const Errors& e, const FastWeight& weight, float*) {
      scale_errors(own, memory, e, h.decay_after);
      update(weight, e.factors(), C, own.begin, own.end);
    });
  }

  // f(rows, memory, errors, weight, its momentum) for the rows of w1 and w1s that this thread writes
  template <class F>
  void for_outputs(F f) {
    const FastWeight full{g.delta1, g.base1, w.w1, N, decay_chunk()};
    for (int64_t i = m.f0; i < m.f1; i++)
      f(outs.within(i * D, (i + 1) * D), i, Errors{w.e, w.target, c.Mf * D, w.a_rows + i * N, hid}, full, g.s1);
    const FastWeight scalar{g.delta1s, g.base1s, w.w1s, N, decay_chunk()};
    const Range scalars = outs.within(m.f1 * D, outs.end);
    for (int64_t i = scalars.begin; i < scalars.end; i++) {
      const int64_t s = m.s0 + i - m.f1 * D;
      f(Range{s, s + 1}, c.Mf + s, Errors{w.es, w.target_s, c.Ms, w.a_rows + (c.Mf + s) * N, hid}, scalar, g.s1s);
    }
  }

  // scaled = gain after[t] e
  void scale_errors(Range own, int64_t memory, const Errors& errors, const float* after) const {
    for (int64_t p = 0; p < P; p++)
      for (int64_t v = 0; v < PANEL; v += LANES<widest>) {
        const int64_t t = p * PANEL + v, begin = (p * errors.height + own.begin) * PANEL;
        const int64_t end = begin + (own.end - own.begin) * PANEL;
        const widest factor = load_as<widest>(h.gain + memory * ld + t) * load_as<widest>(after + t);
        for (int64_t i = begin + v; i < end; i += PANEL)
          store(errors.scaled + i, factor * load_as<widest>(errors.e + i));
      }
  }
};
