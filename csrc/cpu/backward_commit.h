// One chunk's write backwards, for the memories of a group (hope_kernels/ops/titans/BACKWARD.md, "The
// commit"). The forward's stages come first, again, at the chunk-start weights; then, x_bar being the adjoint
// of x:
//
//     sums      u_bar = -delta2'_bar Kg^T, delta1'_bar^T e; the adjoints of gain, erase, decay_after
//     hidden    d_bar, sigma' d_bar, u, and the adjoint of Kg
//     errors    e_bar, y_bar, the target's
//     inputs    z_bar of k and v, and from them k_bar and v_bar
//     weights   delta_bar = decay_chunk delta'_bar + w_bar + (erase u_bar) k^T, base_bar += w_bar
#pragma once
#include "backward_clock.h"
#include "outer.h"
#include "titans_commit.h"

template <int ACT>
class CommitBackward : private Commit<ACT> {
  using Base = Commit<ACT>;
  using Base::h, Base::c, Base::w, Base::g, Base::D, Base::N, Base::hid, Base::R, Base::ld, Base::m,
      Base::C, Base::P,
      Base::k_rows, Base::v_rows, Base::scale, Base::delta_form, Base::half;

 public:
  // bars: of the state; their tokens begin with the chunk's
  CommitBackward(const Head& head, const Group& group, int64_t C, int64_t end, const BackwardSpace& space,
                 const Bars& bars)
      : Base(head, group, C, end), s(space), bar(bars) {}

  void run() {
    Base::prepare();
    for (int64_t p = 0; p < P; p++)
      load_lanes(s.keys + p * D * PANEL, w.keys + p * PANEL * D, D, D, 0,
                 std::min<int64_t>(PANEL, C - p * PANEL));
    std::memset(s.gram_bar, 0, C * ld * sizeof(float));
    for (float* x : {s.erase_bar, s.after_bar}) std::memset(x, 0, ld * sizeof(float));
    std::memset(s.eta_bar_sum, 0, ld * sizeof(double));
    write_sums();
    for (int64_t i = m.m0; i < m.m1; i++) memory(i);
    if (c.scalar_skip) skip_rows();
    keys_adjoint();
    for (int64_t f = m.f0; f < m.f1; f++) full_errors(f);
    for (int64_t i = m.s0; i < m.s1; i++) scalar_errors(i);
    for (int64_t p = 0; p < P; p++) inputs(p);
    const float chunk_bar = decayed();
    weights();
    for (int64_t t = 0; t < C; t++) bar.eta[t] += static_cast<float>(s.eta_bar_sum[t]);
    ClockBackward(h, s, C, k_rows, s.erase_bar, s.after_bar, chunk_bar).run(bar.k, bar.eta, bar.alpha);
  }

 private:
  const BackwardSpace& s;
  const Bars& bar;

  // -- sums -------------------------------------------------------------------------------------------------

  void write_sums() {
    auto product = [&](int64_t a, int64_t b, int64_t p) {
      panel_product(a, b, D, bar.delta2, D, 1, s.keys + p * D * PANEL, half(p), [&](int64_t i, auto& acc) {
        map_rows(s.u_bar + p * R * PANEL, i, acc, [](int64_t, int64_t, auto x) { return -x; });
      });
    };
    for (int64_t p = 0; p < P; p++) {
      product(m.m0 * N, m.m1 * N, p);
      if (c.scalar_skip) product(hid + m.s0, hid + m.s1, p);
      float* hidden = s.hidden + p * hid * PANEL;
      for (int64_t f = m.f0; f < m.f1; f++)
        panel_product(0, N, D, bar.delta1 + f * D * N, 1, N, w.e + (p * c.Mf + f) * D * PANEL, half(p),
                      [&](int64_t i, auto& acc) { store_rows(hidden + f * N * PANEL, i, acc); });
      for (int64_t i = m.s0; i < m.s1; i++) {
        const float* e = w.es + (p * c.Ms + i) * PANEL;
        for (int64_t n = 0; n < N; n++)
          for (int v = 0; v < PANEL; v += 8)
            store(hidden + ((c.Mf + i) * N + n) * PANEL + v, all(bar.delta1s[i * N + n]) * load(e + v));
      }
    }
  }

  // One memory: the adjoints of its gains, then of what they were multiplied with.
  void memory(int64_t i) {
    if (c.step_clip) Base::step_sizes(i);
    else std::memcpy(h.gain + i * ld, h.eta, C * sizeof(float));
    for (int64_t t = 0; t < C; t += 8) token_sums(i, t);
    if (c.step_clip) clip(i);
    else
      for (int64_t t = 0; t < C; t++) s.eta_bar_sum[t] += s.gain_bar[t];
    for (int64_t t = 0; t < C; t += 8) factors(i, t);
    for (int64_t p = 0; p < P; p++)
      for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) hidden(i, p, v);
  }

  // Eight tokens: gain_bar, and what the memory adds to the adjoints of erase and decay_after; sums of eight
  // rows are added up, which is more exact than one long chain
  void token_sums(int64_t i, int64_t t) {
    const int64_t p = t / PANEL, v = t % PANEL;
    f8 gain = all(0), erase = all(0), after = all(0);
    for (int64_t row = i * N; row < (i + 1) * N; row += 8) {
      f8 by_u = all(0), by_erased = all(0), by_a = all(0);
      for (int64_t r = row; r < row + 8; r++) {
        const int64_t at = (p * R + r) * PANEL + v, hidden = (p * hid + r) * PANEL + v;
        const f8 u = load(s.u_bar + at);
        by_u = fma(u, load(w.d + at), by_u);
        if (c.dgd) by_erased = fma(u, load(w.delta2_k + at), by_erased);
        by_a = fma(load(w.a + hidden), load(s.hidden + hidden), by_a);
      }
      gain = gain + by_u, erase = erase + by_erased, after = after + by_a;
    }
    if (c.scalar_skip && i >= c.Mf) {
      const int64_t at = (p * R + hid + i - c.Mf) * PANEL + v;
      gain = fma(load(s.u_bar + at), load(w.es + (p * c.Ms + i - c.Mf) * PANEL + v), gain);
      if (c.dgd) erase = fma(load(s.u_bar + at), load(w.delta2_k + at), erase);
    }
    store(s.gain_bar + t, fnma(load(h.decay_after + t), after, gain));
    store(s.erase_bar + t, load(s.erase_bar + t) + erase);
    store(s.after_bar + t, fnma(load(h.gain + i * ld + t), after, load(s.after_bar + t)));
  }

  // gain_t = eta_t / max(1, S_t), S_t = scale m_t q_t, q_t = sum_s eta_s m_s (k_t.k_s)^2. Leaves m_bar / m in
  // s.ratio. In double precision: where every token is clipped a common factor of eta changes nothing, and
  // terms cancel.
  void clip(int64_t i) {
    double *q = s.q, *q_bar = s.q + ld;
    std::memset(q, 0, ld * sizeof(double));
    for (int64_t j = 0; j < C; j++) {
      const double weight = h.eta_size[j];
      const float* gram = w.gram + j * ld;
      for (int64_t t = 0; t < C; t++) q[t] += weight * (double(gram[t]) * gram[t]);
    }
    for (int64_t t = 0; t < C; t++) {
      const double S = double(scale) * h.size[t] * q[t], by_gain = s.gain_bar[t];
      const double S_bar = S > 1 ? -by_gain * h.eta[t] / (S * S) : 0;
      s.eta_bar_sum[t] += S > 1 ? by_gain / S : by_gain;
      q_bar[t] = scale * S_bar * h.size[t];
      q[t] *= scale * S_bar;  // m_bar
    }
    for (int64_t j = 0; j < C; j++) {
      const float* gram = w.gram + j * ld;
      float* gram_bar = s.gram_bar + j * ld;
      const double weight = 2 * h.eta_size[j];
      double by_product[4] = {};  // the adjoint of eta_j m_j
      for (int64_t t = 0; t < C; t++) {
        by_product[t % 4] += double(gram[t]) * gram[t] * q_bar[t];
        gram_bar[t] += static_cast<float>(weight * gram[t] * q_bar[t]);
      }
      const double sum = (by_product[0] + by_product[1]) + (by_product[2] + by_product[3]);
      s.eta_bar_sum[j] += h.size[j] * sum;
      s.ratio[j] = h.size[j] < 1e30f ? static_cast<float>((q[j] + h.eta[j] * sum) / h.size[j]) : 0;
    }
  }

  // ratio / (e2 + 1e-9), ratio d2 / (e2 + 1e-9)^2, and gain decay_after
  void factors(int64_t i, int64_t t) {
    store(s.gain_after + i * ld + t, load(h.gain + i * ld + t) * load(h.decay_after + t));
    if (!c.step_clip) {
      for (float* x : {s.ratio, s.by_d}) store(x + t, all(0));
      store(s.by_e + i * ld + t, all(0));
      return;
    }
    const int64_t p = t / PANEL, v = t % PANEL;
    f8 d2 = all(0), e2;
    for (int64_t r = i * N / 8; r < (i + 1) * N / 8; r++) d2 = d2 + load(w.norms + (hid / 8 + r) * ld + t);
    if (i < c.Mf) {
      e2 = squares(w.e + (p * c.Mf + i) * D * PANEL + v, D);
    } else {
      const f8 e = load(w.es + (p * c.Ms + i - c.Mf) * PANEL + v);
      e2 = e * e;
    }
    e2 = least(all(FLT_MAX), e2) + all(1e-9f);
    const f8 by_d = load(s.ratio + t) / e2;
    store(s.by_d + t, by_d);
    store(s.by_e + i * ld + t, by_d * (d2 / e2));
  }

  // -- hidden -----------------------------------------------------------------------------------------------

  // Eight tokens of memory i. Afterwards z holds sigma' and d holds u; z_bar is what comes through d, u_bar
  // the adjoint of delta2 k, hidden that of a without y_bar.
  void hidden(int64_t i, int64_t p, int v) {
    const int64_t t = p * PANEL + v;
    const f8 gain = load(h.gain + i * ld + t), erase = load(h.erase + t), ratio = load(s.ratio + t);
    const f8 by_d = load(s.by_d + t), after = load(s.gain_after + i * ld + t);
    for (int64_t r = i * N; r < (i + 1) * N; r++) {
      const int64_t at = (p * R + r) * PANEL + v, j = (p * hid + r) * PANEL + v;
      f8 curve;
      const f8 slope = slopes<ACT>(load(w.z + j), curve);
      const f8 u_bar = load(s.u_bar + at), d = load(w.d + at),
          back = i < c.Mf ? load(w.back + j) : scalar_back(r, p, v);
      const f8 d_bar = fma(gain, u_bar, by_d * d);
      store(w.z + j, slope);
      store(s.slope_d + j, slope * d_bar);
      store(s.z_bar + at, curve * back * d_bar);
      store(s.hidden + j, fms(ratio, load(w.a + j), after * load(s.hidden + j)));
      store(w.d + at, c.dgd ? fma(erase, load(w.delta2_k + at), gain * d) : gain * d);
      store(s.u_bar + at, c.dgd ? erase * u_bar : all(0));
    }
  }

  f8 scalar_back(int64_t r, int64_t p, int v) const {
    return all(h.w1s[r - c.Mf * N]) * load(w.es + (p * c.Ms + r / N - c.Mf) * PANEL + v);
  }

  // The rows of w2 that skip the hidden layer: their d is e.
  void skip_rows() {
    for (int64_t p = 0; p < P; p++)
      for (int64_t i = m.s0; i < m.s1; i++)
        for (int v = 0; v < PANEL; v += 8) {
          const int64_t t = p * PANEL + v, at = (p * R + hid + i) * PANEL + v;
          const f8 gain = load(h.gain + (c.Mf + i) * ld + t), erase = load(h.erase + t),
              u_bar = load(s.u_bar + at);
          const f8 step = gain * load(w.es + (p * c.Ms + i) * PANEL + v);
          store(s.skip_bar + (p * c.Ms + i) * PANEL + v, gain * u_bar);
          store(w.d + at, c.dgd ? fma(erase, load(w.delta2_k + at), step) : step);
          store(s.u_bar + at, c.dgd ? erase * u_bar : all(0));
        }
  }

  // to = sign A^T U over the group's rows of w2 from row r0 on; more: added to what is there
  void back_product(const float* A, const float* U, int64_t r0, int64_t p, float* to, bool more) const {
    auto part = [&](int64_t a, int64_t b, bool add) {
      panel_product(0, D, b - a, A + a * D, 1, D, U + (p * R + a) * PANEL, half(p),
                    [&](int64_t i, auto& acc) {
        if (add) add_rows(acc, to, i);
        store_rows(to, i, acc);
      });
    };
    part(r0, m.m1 * N, more);
    if (c.scalar_skip && m.s1 > m.s0) part(hid + m.s0, hid + m.s1, true);
  }

  // Kg_bar = -u^T delta2'_bar, tokens as rows
  void keys_adjoint() {
    for (int64_t p = 0; p < P; p++) {
      float* to = s.keys_bar + p * D * PANEL;
      back_product(bar.delta2, w.d, m.m0 * N, p, to, false);
      for (int64_t i = 0; i < D * PANEL; i += 8) store(to + i, -load(to + i));
      store_lanes(to, s.keys_bar_rows + p * PANEL * D, D, D, 0, std::min<int64_t>(PANEL, C - p * PANEL));
    }
  }

  // -- errors -----------------------------------------------------------------------------------------------

  void full_errors(int64_t f) {
    for (int64_t p = 0; p < P; p++) {
      const int64_t at = (p * c.Mf + f) * D * PANEL, j = (p * hid + f * N) * PANEL;
      float* e_bar = s.e_bar + at;
      panel_product(0, D, N, h.w1 + f * D * N, N, 1, s.slope_d + j, half(p),
                    [&](int64_t i, auto& acc) { store_rows(e_bar, i, acc); });
      const float* after = s.gain_after + f * ld + p * PANEL;
      panel_product(0, D, N, bar.delta1 + f * D * N, N, 1, w.a + j, half(p), [&](int64_t i, auto& acc) {
        map_rows(e_bar, i, acc, [&](int64_t r, int64_t lane, auto x) {
          using V = decltype(x);
          return load_as<V>(e_bar + r * PANEL + lane) - load_as<V>(after + lane) * x;
        });
      });
      for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) targets(f, p, v, at + v);
    }
  }

  void targets(int64_t f, int64_t p, int v, int64_t at) {
    const f8 by_e = load(s.by_e + f * ld + p * PANEL + v), factor = all(c.objective_dot ? 0 : scale);
    const bool norm = c.target_norm;
    f8 along = all(0);  // <tau, tau_bar>
    for (int64_t d = 0; d < D * PANEL; d += PANEL) {
      const f8 e_bar = fnma(by_e, load(w.e + at + d), load(s.e_bar + at + d));
      const f8 target_bar = c.objective_dot ? -e_bar : -(factor * e_bar);
      store(s.y_bar + at + d, factor * e_bar);
      store(s.target_bar + at + d, target_bar);
      if (norm) along = fma(load(w.target + at + d), target_bar, along);
    }
    if (!norm) return;
    // max(|M(v)|, 1e-6) is a constant below it
    const f8 size = load(w.target_sizes + f * ld + p * PANEL + v),
             divided = all(1) / most(all(NORM_EPS), size);
    along = unless_small(size, along);
    for (int64_t d = 0; d < D * PANEL; d += PANEL) {
      float* to = s.target_bar + at + d;
      store(to, fnma(load(w.target + at + d), along, load(to)) * divided);
    }
  }

  static HK_INLINE f8 unless_small(f8 size, f8 x) { return unless_below(size, NORM_EPS, x); }

  void scalar_errors(int64_t i) {
    for (int64_t p = 0; p < P; p++)
      for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) {
        const int64_t at = (p * c.Ms + i) * PANEL + v, j = (p * hid + (c.Mf + i) * N) * PANEL + v;
        const int64_t t = p * PANEL + v;
        f8 e_bar = four_chains(h.w1s + i * N, s.slope_d + j, N);
        e_bar = fnma(load(s.gain_after + (c.Mf + i) * ld + t), four_chains(bar.delta1s + i * N, w.a + j, N),
            e_bar);
        e_bar = fnma(load(s.by_e + (c.Mf + i) * ld + t), load(w.es + at), e_bar);
        if (c.scalar_skip) e_bar = e_bar + load(s.skip_bar + at);
        const f8 y_bar = c.objective_dot ? all(0) : all(scale) * e_bar;
        f8 target_bar = c.objective_dot ? -e_bar : -y_bar;
        if (c.target_norm) target_bar = within_one(load(w.target_s + at), target_bar);
        store(s.ys_bar + at, y_bar);
        store(s.targets_bar + at, target_bar);
      }
  }

  // x, or 0 where |target| is beyond 1 and was cut off there
  static HK_INLINE f8 within_one(f8 target, f8 x) {
    f8 size = abs(target);
    return x - unless_below(size, 1.0f, x);
  }

  // -- inputs -----------------------------------------------------------------------------------------------

  void inputs(int64_t p) {
    const int64_t n = std::min<int64_t>(PANEL, C - p * PANEL);
    const int64_t values0 = c.own_values ? m.m0 : std::max(m.m0, m.f1);
    float *z_bar = s.z_bar + p * R * PANEL, *values_bar = s.values_bar + p * R * PANEL;  // sigma' at v so far
    for (int64_t f = m.f0; f < m.f1; f++) {
      const float *y_bar = s.y_bar + (p * c.Mf + f) * D * PANEL,
          *target = s.target_bar + (p * c.Mf + f) * D * PANEL;
      through_outputs(f, p, y_bar, z_bar);
      if (c.own_values)
        panel_product(0, N, D, h.w1 + f * D * N, 1, N, target, half(p), [&](int64_t i, auto& acc) {
          multiply_rows(acc, values_bar, f * N + i);
          store_rows(values_bar, f * N + i, acc);
        });
    }
    for (int64_t i = m.s0; i < m.s1; i++) scalar_inputs(i, p, z_bar, values_bar);
    transpose(s.values, s.values_rows, values0, p), transpose(s.slope_d, s.slope_d_rows, m.m0, p);
    float* in_bar = s.in_bar;
    back_product(h.w2, s.z_bar, m.m0 * N, p, in_bar, false);
    if (c.dgd) back_product(g.delta2, s.u_bar, m.m0 * N, p, in_bar, true);
    collect(s.y_bar, p, n, in_bar, bar.k);
    if (values0 < m.m1) back_product(h.w2, s.values_bar, values0 * N, p, in_bar, false);
    else std::memset(in_bar, 0, D * PANEL * sizeof(float));
    collect(s.target_bar, p, n, in_bar, bar.v);
  }

  // z_bar of full memory f: what comes through d, and sigma' a_bar
  void through_outputs(int64_t f, int64_t p, const float* y_bar, float* z_bar) {
    const float *slope = w.z + p * hid * PANEL, *a_bar = s.hidden + p * hid * PANEL;
    panel_product(0, N, D, h.w1 + f * D * N, 1, N, y_bar, half(p), [&](int64_t i, auto& acc) {
      map_rows(z_bar, f * N + i, acc, [&](int64_t r, int64_t lane, auto x) {
        using V = decltype(x);
        const int64_t j = r * PANEL + lane;
        return fma(load_as<V>(slope + j), x + load_as<V>(a_bar + j), load_as<V>(z_bar + j));
      });
    });
  }

  void scalar_inputs(int64_t i, int64_t p, float* z_bar, float* values_bar) {
    const float *slope = w.z + p * hid * PANEL, *a_bar = s.hidden + p * hid * PANEL;
    const float *y = s.ys_bar + (p * c.Ms + i) * PANEL, *target = s.targets_bar + (p * c.Ms + i) * PANEL;
    for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) {
      for (int64_t n = 0; n < N; n++) {
        const int64_t j = ((c.Mf + i) * N + n) * PANEL + v;
        const f8 w1 = all(h.w1s[i * N + n]);
        store(z_bar + j, fma(load(slope + j), fma(w1, load(y + v), load(a_bar + j)), load(z_bar + j)));
        store(values_bar + j, load(values_bar + j) * (w1 * load(target + v)));
      }
      if (!c.scalar_skip) continue;
      store(z_bar + (hid + i) * PANEL + v, load(y + v));
      store(values_bar + (hid + i) * PANEL + v, load(target + v));
    }
  }

  void transpose(const float* from, float* to, int64_t m0, int64_t p) const {
    for (int64_t i = m0 * N; i < m.m1 * N; i += 8)
      for (int64_t t = 0; t < PANEL && p * PANEL + t < C; t += 8)
        transpose8(from + (p * hid + i) * PANEL + t, PANEL, to + (p * PANEL + t) * hid + i, hid);
  }

  // tokens += in_bar + the full memories' of panel p, which reach the input past the hidden layer
  void collect(const float* outputs, int64_t p, int64_t n, float* in_bar, float* tokens) {
    for (int64_t f = m.f0; f < m.f1; f++)
      for (int64_t i = 0; i < D * PANEL; i += 8)
        store(in_bar + i, load(in_bar + i) + load(outputs + (p * c.Mf + f) * D * PANEL + i));
    store_lanes(in_bar, s.rows, D, D, 0, n);
    float* to = tokens + p * PANEL * D;
    for (int64_t i = 0; i < n * D; i += 8) store(to + i, load(to + i) + load(s.rows + i));
  }

  // -- weights ----------------------------------------------------------------------------------------------

  // <delta'_bar, delta>, the adjoint of decay_chunk. Its terms cancel, so they are added up in double
  // precision, in which products of two floats are exact.
  float decayed() const {
    double sums[8] = {};
    auto add = [&](const float* a, const float* b, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += double(a[i + j]) * double(b[i + j]);
    };
    add(bar.delta2, g.delta2, m.m0 * N * D, m.m1 * N * D);
    if (c.scalar_skip) add(bar.delta2, g.delta2, (hid + m.s0) * D, (hid + m.s1) * D);
    add(bar.delta1, g.delta1, m.f0 * D * N, m.f1 * D * N);
    if (m.s1 > m.s0) add(bar.delta1s, g.delta1s, m.s0 * N, m.s1 * N);
    const double low = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const double high = (sums[4] + sums[5]) + (sums[6] + sums[7]);
    return static_cast<float>(low + high);
  }

  void weights() {
    const float decay = Base::decay_chunk();
    const int64_t tall = R * PANEL, values0 = c.own_values ? m.m0 : std::max(m.m0, m.f1);
    const Outer by_k{s.z_bar, tall, k_rows, D}, by_v{s.values_bar, tall, v_rows, D},
        erased{s.u_bar, tall, k_rows, D};
    auto rows = [&](int64_t a, int64_t b, bool values) {
      if (values) add_outer(a, b, D, C, {by_k, by_v}, {erased}, decay, bar.delta2, bar.base2);
      else add_outer(a, b, D, C, {by_k}, {erased}, decay, bar.delta2, bar.base2);
    };
    rows(m.m0 * N, std::min(values0, m.m1) * N, false), rows(std::min(values0, m.m1) * N, m.m1 * N, true);
    if (c.scalar_skip) rows(hid + m.s0, hid + m.s1, true);
    for (int64_t f = m.f0; f < m.f1; f++) {
      const int64_t high = c.Mf * D * PANEL, at = f * D * PANEL, n = f * N;
      const Outer by_d{w.e + at, high, s.slope_d_rows + n, hid}, by_a{s.y_bar + at, high, w.a_rows + n, hid};
      const Outer by_values{s.target_bar + at, high, s.values_rows + n, hid};
      float* shared = bar.base1 ? bar.base1 + f * D * N : nullptr;
      float* own = bar.delta1 + f * D * N;
      if (c.own_values) add_outer(0, D, N, C, {by_d, by_a, by_values}, {}, decay, own, shared);
      else add_outer(0, D, N, C, {by_d, by_a}, {}, decay, own, shared);
    }
    const int64_t low = c.Ms * PANEL;
    for (int64_t i = m.s0; i < m.s1; i++) {
      const int64_t n = (c.Mf + i) * N;
      const Outer by_d{w.es, low, s.slope_d_rows + n, hid}, by_a{s.ys_bar, low, w.a_rows + n, hid};
      const Outer by_values{s.targets_bar, low, s.values_rows + n, hid};
      add_outer(i, i + 1, N, C, {by_d, by_a, by_values}, {}, decay, bar.delta1s, bar.base1s);
    }
  }
};
