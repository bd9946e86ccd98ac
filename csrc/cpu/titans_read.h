// Reading slots [slot, end) of one chunk of the faster clock: o from M_memory at q, and k, v, eta, alpha from
// the other memories at x, into the open chunk.
#pragma once
#include <cstring>

#include "titans_head.h"

template <int ACT>
class Read {
 public:
  // phase: the slot of the call's first token
  Read(const Head& head, int64_t slot, int64_t end, int64_t phase)
      : h(head), c(h.c), w(h.w), g(h.g), D(h.D), N(h.N), hid(h.hid), step(c.H * D), slot(slot),
        first(slot % h.small), last(first + end - slot), token(slot - phase), p0(first / PANEL),
        p1(panels(last)), produce(c.update && c.self_modifying),
        lanes(h.own_lanes(h.small).within(first, last)) {}

  void run() {
    inputs();
    h.sync_rows();
    activations();
    h.sync_rows();
    outputs();
    h.sync_rows();
    results();
    if (h.big != h.small) h.team.sync();  // else the next stage keeps to the same lanes
  }

 private:
  const Head& h;
  const TitansCall& c;
  const Workspace& w;
  const Tensors& g;
  const int64_t D, N, hid, step;            // step: floats from token to token in q, x, k, v and o
  const int64_t slot, first, last, token;   // lanes [first, last); the first token of them in the call
  const int64_t p0, p1;                     // panels
  const bool produce;                       // the memories make k, v, eta, alpha
  const Range lanes;

  bool half(int64_t p) const { return last - p * PANEL <= 8; }

  void inputs() {
    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      const int64_t t = token + p * PANEL + a - first;
      if (h.owns_k()) load_lanes(w.q + p * D * PANEL, g.q + t * step, step, D, a, b);
      if (produce) load_lanes(h.x + p * D * PANEL, g.x + t * step, step, D, a, b);
    });
  }

  void activations() {
    const Range rows = h.hidden_rows(0, produce ? hid : N);
    auto rows_at = [&](Range own, const float* in) {
      for_blocks(own, p0, p1, [&](Range r, int64_t p) {
        float* hidden = w.hidden + p * hid * PANEL;
        panel_product(r.begin, r.end, D, h.w2, D, 1, in + p * D * PANEL, half(p), [&](int64_t i, auto& acc) {
          activate<ACT>(acc);
          store_rows(hidden, i, acc);
        });
      });
    };
    rows_at(rows.within(0, N), w.q);
    if (produce) rows_at(rows.within(N, hid), h.x);
  }

  void outputs() {
    const int64_t full = produce ? 3 * D : D, total = full + (produce ? c.Ms : 0);
    const Range outs = h.output_rows(0, total), scalars = outs.within(full, total);
    for (int64_t f = 0; f < full / D; f++) {
      for_blocks(outs.within(f * D, (f + 1) * D), p0, p1, [&](Range r, int64_t p) {
        const float* in = (f == 0 ? w.q : h.x) + p * D * PANEL;
        float* out = w.out + p * c.Mf * D * PANEL;
        panel_product(r.begin, r.end, N, h.w1, N, 1, w.hidden + (p * hid + f * N) * PANEL, half(p),
                      [&](int64_t i, auto& acc) {
                        add_rows(acc, in, i - f * D);
                        store_rows(out, i, acc);
                      });
      });
    }
    if (!produce) return;
    for (int64_t p = p0; p < p1; p++)
      for (int64_t s = scalars.begin - full; s < scalars.end - full; s++)
        h.scalar_output(s, w.hidden + (p * hid + (c.Mf + s) * N) * PANEL, h.x + p * D * PANEL,
                        w.gates + (p * c.Ms + s) * PANEL);
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
    if (!c.qk_l2norm) return;
    const V factor = unit_factor(size);
    for (int64_t i = 0; i < D * PANEL; i += PANEL) store(k + i, load_as<V>(k + i) * factor);
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
