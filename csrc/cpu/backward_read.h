// The reads of one chunk of the faster clock backwards: o_bar becomes q_bar, and the adjoints of the k, v,
// eta and alpha that the memories made become x_bar; all of them go into those of the weights.
//
//     y = x + w1 sigma(w2 x):    z_bar = sigma'(w2 x) (w1^T y_bar)      x_bar = y_bar + w2^T z_bar
//                                w1_bar = y_bar a^T                      w2_bar = z_bar x^T
#pragma once
#include "backward_workspace.h"
#include "outer.h"

struct TokenBars {  // of the call's tensors from the chunk's first token on, H D floats from token to token
  const float* o;
  float *q, *x;
  double *eta_bias, *alpha_bias;  // the head's, added to
};

template <int ACT>
class ReadBackward {
 public:
  // n tokens from the call's token `token` on; bars: of the state, their tokens begin with the first of them.
  // k, k_sizes, eta, alpha: what the forward made of them; null where it made nothing
  ReadBackward(const Head& head, int64_t token, int64_t n, const BackwardSpace& space, const Bars& bars,
               const TokenBars& tokens, const float* k, const float* k_sizes, const float* eta,
                   const float* alpha)
      : h(head), c(h.c), s(space), bar(bars), to(tokens), D(h.D), N(h.N), hid(h.hid), step(c.H * D),
          token(token),
        n(n), k(k), k_sizes(k_sizes), eta(eta), alpha(alpha) {}

  void run() {
    const float* q = h.g.q + token * step;
    inputs(q, true);
    for (int64_t p = 0; p < panels(n); p++) {
      from_rows(s.y_bar, to.o + p * PANEL * step, p, step);
      full(0, p);
    }
    outputs(to.q, 0, 1);
    weights(q, 0, 1);
    if (!k) return;
    const float* x = h.g.x + token * step;
    inputs(x, false);
    for (int64_t p = 0; p < panels(n); p++) {
      from_rows(s.y_bar + D * PANEL, bar.k + p * PANEL * D, p, D);
      from_rows(s.y_bar + 2 * D * PANEL, bar.v + p * PANEL * D, p, D);
      if (c.qk_l2norm) unit(p);
      full(1, p), full(2, p), gates(p);
      for (int64_t i = 0; i < c.Ms; i++) scalar(i, p);
    }
    outputs(to.x, 1, h.M);
    weights(x, 1, h.M);
  }

 private:
  const Head& h;
  const TitansCall& c;
  const BackwardSpace& s;
  const Bars& bar;
  const TokenBars& to;
  const int64_t D, N, hid, step, token, n;
  const float *k, *k_sizes, *eta, *alpha;

  bool half(int64_t p) const { return n - p * PANEL <= 8; }
  int64_t tokens(int64_t p) const { return std::min<int64_t>(PANEL, n - p * PANEL); }
  float* y_bar(int64_t f, int64_t p) const { return s.y_bar + (p * c.Mf + f) * D * PANEL; }

  // The input as panels in s.keys, and sigma and sigma' of its hidden units in s.hidden and s.z
  void inputs(const float* rows, bool memory) {
    const int64_t a = memory ? 0 : N, b = memory ? N : hid;
    for (int64_t p = 0; p < panels(n); p++) {
      load_lanes(s.keys, rows + p * PANEL * step, step, D, 0, tokens(p));
      float *z = s.z + p * hid * PANEL, *hidden = s.hidden + p * hid * PANEL;
      panel_product(a, b, D, h.w2, D, 1, s.keys, half(p),
                    [&](int64_t i, auto& acc) { store_rows(z, i, acc); });
      for (int64_t i = a * PANEL; i < b * PANEL; i += step_of(half(p))) {
        f8 slope;
        store(hidden + i, sigma<ACT>(load(z + i), slope));
        store(z + i, slope);
      }
      for (int64_t i = a; i < b; i += 8)
        for (int64_t t = 0; t < tokens(p); t += 8)
          transpose8(hidden + i * PANEL + t, PANEL, s.values_rows + (p * PANEL + t) * hid + i, hid);
    }
  }

  void from_rows(float* panel, const float* rows, int64_t p, int64_t ld) const {
    load_lanes(panel + p * c.Mf * D * PANEL, rows, ld, D, 0, tokens(p));
  }

  // Through k = y / max(|y|, 1e-6): y_bar = (k_bar - k <k, k_bar>) / |y|
  void unit(int64_t p) {
    float* k_bar = y_bar(1, p);
    load_lanes(s.keys, k + p * PANEL * D, D, D, 0, tokens(p));
    for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) {
      const f8 size = load(k_sizes + p * PANEL + v), divided = all(1) / most(all(NORM_EPS), size);
      f8 along = all(0);
      for (int64_t d = v; d < D * PANEL; d += PANEL) along = fma(load(s.keys + d), load(k_bar + d), along);
      along = unless_below(size, NORM_EPS, along);
      for (int64_t d = v; d < D * PANEL; d += PANEL)
        store(k_bar + d, fnma(load(s.keys + d), along, load(k_bar + d)) * divided);
    }
  }

  // z_bar of full memory f
  void full(int64_t f, int64_t p) {
    const float* slope = s.z + p * hid * PANEL;
    float* z_bar = s.z_bar + p * h.R * PANEL;
    panel_product(0, N, D, h.w1 + f * D * N, 1, N, y_bar(f, p), half(p), [&](int64_t i, auto& acc) {
      multiply_rows(acc, slope, f * N + i);
      store_rows(z_bar, f * N + i, acc);
    });
  }

  // eta_bar and alpha_bar as adjoints of what the memories returned, with the biases'
  void gates(int64_t p) {
    for (int64_t j = 0; j < tokens(p); j++) {
      const int64_t t = p * PANEL + j;
      const float by_eta = bar.eta[t] * eta_slope(eta[t]);
      s.ys_bar[p * c.Ms * PANEL + j] = by_eta;
      *to.eta_bias += by_eta;
      if (!c.retention) continue;
      const float by_alpha = bar.alpha[t] * (alpha[t] * (1 - alpha[t]));
      s.ys_bar[(p * c.Ms + 1) * PANEL + j] = by_alpha;
      *to.alpha_bias += by_alpha;
    }
  }

  float eta_slope(float value) const {
    if (c.eta_scale == 0) return 0;
    const float y = value / c.eta_scale;
    return c.softplus ? c.eta_scale * static_cast<float>(1 - exp_of(-y)) : value * (1 - y);
  }

  void scalar(int64_t i, int64_t p) {
    const float *slope = s.z + p * hid * PANEL, *y = s.ys_bar + (p * c.Ms + i) * PANEL;
    float* z_bar = s.z_bar + p * h.R * PANEL;
    for (int v = 0; v < (half(p) ? 8 : PANEL); v += 8) {
      for (int64_t j = (c.Mf + i) * N; j < (c.Mf + i + 1) * N; j++) {
        const f8 back = all(h.w1s[j - c.Mf * N]) * load(y + v);
        store(z_bar + j * PANEL + v, load(slope + j * PANEL + v) * back);
      }
      if (c.scalar_skip) store(z_bar + (hid + i) * PANEL + v, load(y + v));
    }
  }

  // Token rows of the input's adjoint: w2^T z_bar of memories [m0, m1), and y_bar
  void outputs(float* rows, int64_t m0, int64_t m1) {
    if (!rows) return;
    for (int64_t p = 0; p < panels(n); p++) {
      const float* z_bar = s.z_bar + p * h.R * PANEL;
      panel_product(0, D, (m1 - m0) * N, h.w2 + m0 * N * D, 1, D, z_bar + m0 * N * PANEL, half(p),
                    [&](int64_t i, auto& acc) {
                      for (int64_t f = m0; f < std::min(m1, c.Mf); f++) add_rows(acc, y_bar(f, p), i);
                      store_rows(s.in_bar, i, acc);
                    });
      if (c.scalar_skip && m1 > c.Mf)
        panel_product(0, D, c.Ms, h.w2 + hid * D, 1, D, z_bar + hid * PANEL, half(p),
                      [&](int64_t i, auto& acc) {
          add_rows(acc, s.in_bar, i);
          store_rows(s.in_bar, i, acc);
        });
      store_lanes(s.in_bar, rows + p * PANEL * step, step, D, 0, tokens(p));
    }
  }

  void weights(const float* rows, int64_t m0, int64_t m1) {
    const Outer by_input{s.z_bar, h.R * PANEL, rows, step};
    add_outer(m0 * N, m1 * N, D, n, {by_input}, {}, 1, bar.delta2, bar.base2);
    if (c.scalar_skip && m1 > c.Mf) add_outer(hid, h.R, D, n, {by_input}, {}, 1, bar.delta2, bar.base2);
    for (int64_t f = m0; f < std::min(m1, c.Mf); f++) {
      const int64_t at = f * D * N;
      add_outer(0, D, N, n, {{s.y_bar + f * D * PANEL, c.Mf * D * PANEL, s.values_rows + f * N, hid}}, {}, 1,
                bar.delta1 + at, bar.base1 ? bar.base1 + at : nullptr);
    }
    for (int64_t i = 0; m1 > c.Mf && i < c.Ms; i++)
      add_outer(i, i + 1, N, n, {{s.ys_bar, c.Ms * PANEL, s.values_rows + (c.Mf + i) * N, hid}}, {}, 1,
          bar.delta1s,
                bar.base1s);
  }
};
