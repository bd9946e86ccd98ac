// Reading slots [slot, end) of one chunk of the faster clock: o from M_memory at q, and k, v, eta, alpha from
// the other memories at x, into the open chunk; with adaptive_q first q from M_q at x.
#pragma once
#include <algorithm>
#include <cstring>

#include "titans_head.h"

template <int ACT>
class Read {
 public:
  // phase: the slot of the call's first token
  Read(const Head& head, int64_t slot, int64_t end, int64_t phase)
      : h(head), c(h.c), w(h.w), g(h.g), D(h.D), N(h.N), hid(h.hid), step(c.H * D), slot(slot),
        first(slot % h.small), last(first + end - slot), token(slot - phase), p0(first / PANEL),
        p1(panels(last)), produce(c.update && c.self_modifying), adaptive(adaptive_q(c)),
        lanes(h.own_lanes(h.small).within(first, last)) {}

  void run() {
    inputs();
    h.sync_rows();
    if (adaptive) {
      evaluate(produce ? 1 : QUERIES, produce ? h.M : QUERIES + 1);
      queries();
      h.team.sync();
      evaluate(0, 1);
    } else {
      evaluate(0, produce ? h.M : 1);
    }
    results();
    if (h.big != h.small) h.team.sync();  // else the next stage keeps to the same lanes
  }

 private:
  static constexpr int64_t QUERIES = 3;     // which memory M_q is
  const Head& h;
  const TitansCall& c;
  const Workspace& w;
  const Tensors& g;
  const int64_t D, N, hid, step;            // step: floats from token to token in q, x, k, v and o
  const int64_t slot, first, last, token;   // lanes [first, last); the first token of them in the call
  const int64_t p0, p1;                     // panels
  const bool produce;                       // the memories make k, v, eta, alpha
  const bool adaptive;                      // M_q makes q
  const Range lanes;

  bool half(int64_t p) const { return last - p * PANEL <= 8; }

  void inputs() {
    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      const int64_t t = token + p * PANEL + a - first;
      if (!adaptive && h.owns_k()) load_lanes(w.q + p * D * PANEL, g.q + t * step, step, D, a, b);
      if (produce || adaptive) load_lanes(h.x + p * D * PANEL, g.x + t * step, step, D, a, b);
    });
  }

  float* output(int64_t m, int64_t p) const { return w.out + (p * c.Mf + m) * D * PANEL; }

  // What memory m reads of panel p
  const float* input(int64_t m, int64_t p) const {
    if (m) return h.x + p * D * PANEL;
    return adaptive ? output(QUERIES, p) : w.q + p * D * PANEL;
  }

  // Memories [m0, m1); their outputs are whole to everyone afterwards.
  void evaluate(int64_t m0, int64_t m1) {
    if constexpr (ACT != LINEAR) {
      const Range rows = h.hidden_rows(m0 * N, m1 * N);
      activations(rows.within(0, N), 0);
      activations(rows.within(N, hid), 1);
      h.sync_rows();
    }
    outputs(m0, m1);
    h.sync_rows();
  }

  // Hidden rows of memories that read what m does
  void activations(Range own, int64_t m) {
    for_blocks(own, p0, p1, [&](Range r, int64_t p) {
      float* hidden = w.hidden + p * hid * PANEL;
      panel_product(r.begin, r.end, D, h.w2, D, 1, input(m, p), half(p), [&](int64_t i, auto& acc) {
        activate<ACT>(acc);
        store_rows(hidden, i, acc);
      });
    });
  }

  void outputs(int64_t m0, int64_t m1) {
    const int64_t f1 = std::min(m1, c.Mf), full = f1 * D;
    const Range outs = h.output_rows(m0 * D, full + m1 - f1), scalars = outs.within(full, full + m1 - f1);
    for (int64_t f = m0; f < f1; f++) {
      for_blocks(outs.within(f * D, (f + 1) * D), p0, p1, [&](Range r, int64_t p) {
        const float* in = input(f, p);
        float* out = output(0, p);
        if constexpr (ACT == LINEAR) {
          panel_product(r.begin, r.end, D, h.w2, D, 1, in, half(p),
                        [&](int64_t i, auto& acc) { store_rows(out, i, acc); });
        } else {
          panel_product(r.begin, r.end, N, h.w1, N, 1, w.hidden + (p * hid + f * N) * PANEL, half(p),
                        [&](int64_t i, auto& acc) {
                          add_rows(acc, in, i - f * D);
                          store_rows(out, i, acc);
                        });
        }
      });
    }
    for (int64_t p = p0; p < p1; p++)
      for (int64_t s = scalars.begin - full; s < scalars.end - full; s++)
        h.scalar_output(s, w.hidden + (p * hid + (c.Mf + s) * N) * PANEL, h.x + p * D * PANEL,
                        w.gates + (p * c.Ms + s) * PANEL);
  }

  // What M_q has made, as unit vectors, this thread's lanes
  void queries() {
    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      const int64_t t = token + p * PANEL + a - first;
      if (g.made_q) store_lanes(output(QUERIES, p), g.made_q + t * step, step, D, a, b);
    });
    if (!c.qk_l2norm) return;
    for_lanes(lanes, [&](int64_t t, auto v) {
      float* q = output(QUERIES, t / PANEL) + t % PANEL;
      scale(q, unit_factor(root(squares<decltype(v)>(q, D))));
    });
  }

  // A column of a panel times a factor
  template <class V>
  void scale(float* x, V factor) const {
    for (int64_t i = 0; i < D * PANEL; i += PANEL) store(x + i, load_as<V>(x + i) * factor);
  }

  void results() {
    if (produce && h.owns_k()) for_lanes(lanes, [&](int64_t t, auto v) { unit_keys<decltype(v)>(t); });
    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      const float* out = w.out + p * c.Mf * D * PANEL;
      const int64_t lane = p * PANEL + a, t = token + lane - first, s = (slot + lane - first) % h.big;
      if (h.owns_k()) store_lanes(out, g.o + t * step, step, D, a, b);
      if (produce && h.owns_k()) {
        store_lanes(out + D * PANEL, w.k_rows + s * D, D, D, a, b);
        if (g.made_k) store_lanes(out + D * PANEL, g.made_k + t * step, step, D, a, b);
      }
      if (produce && h.owns_v()) {
        store_lanes(out + 2 * D * PANEL, w.v_rows + s * D, D, D, a, b);
        if (g.made_v) store_lanes(out + 2 * D * PANEL, g.made_v + t * step, step, D, a, b);
        gates(s, t, w.gates + p * c.Ms * PANEL + a, b - a);
      }
      for (int64_t j = 0; c.update && c.s2 && h.owns_v() && j < b - a; j++) w.beta[s + j] = g.beta[(t + j) * c.H];
      for (int64_t j = 0; c.update && !produce && j < b - a; j++) given(s + j, t + j);
    });
  }

  // The keys of lanes t .. as unit vectors, and what their sizes were
  template <class V>
  void unit_keys(int64_t t) {
    if (!g.made_size && !c.qk_l2norm) return;
    float* k = w.out + (t / PANEL * c.Mf + 1) * D * PANEL + t % PANEL;
    const V size = root(squares<V>(k, D));
    if (g.made_size) {
      float found[LANES<V>];
      store(found, size);
      const Range own = lanes.within(t, t + LANES<V>);
      for (int64_t i = own.begin; i < own.end; i++) g.made_size[(token + i - first) * c.H] = found[i - t];
    }
    if (c.qk_l2norm) scale(k, unit_factor(size));
  }

  // w.eta and w.alpha of n slots from s on, and token t's .., from the scalar memories' outputs
  void gates(int64_t s, int64_t t, const float* raw, int64_t n) {
    etas_of(c, raw, g.eta_bias, n, w.eta + s);
    alphas_of(c, raw + PANEL, g.alpha_bias, n, w.alpha + s);
    for (int64_t j = 0; j < n; j++) {
      if (g.made_eta) g.made_eta[(t + j) * c.H] = w.eta[s + j];
      if (g.made_alpha) g.made_alpha[(t + j) * c.H] = w.alpha[s + j];
    }
  }

  // k, v, eta, alpha of slot s as the call brings them with token t
  void given(int64_t s, int64_t t) {
    std::memcpy(w.k_rows + s * D, g.k + t * step, D * sizeof(float));
    std::memcpy(w.v_rows + s * D, g.v + t * step, D * sizeof(float));
    w.eta[s] = g.eta[t * c.H];
    w.alpha[s] = g.alpha ? g.alpha[t * c.H] : 1;
  }
};
