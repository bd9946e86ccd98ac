// The CMS levels of a segment's blocks: forward, backward, and the steps of their matrices.
#pragma once
#include "segment_panels.h"

class SegmentLevels : public SegmentPanels {
 protected:
  using SegmentPanels::SegmentPanels;

  void levels(int64_t i) const {
    const int64_t at = stream_of(i) + 1;
    const bool mixture = c.block[i].mixture;
    const float* read = stream(at);  // by the levels of a mixture
    if (mixture && !c.keep) copy(read, apart), read = apart;  // the stream goes back and forth between two
    for (int64_t l = 0; l < c.block[i].levels; l++) level(i, l, mixture ? read : stream(at + l));
  }

  void levels_backward(int64_t i) const {
    const SegmentBlock& block = c.block[i];
    if (block.mixture) copy(slope, apart);
    for (int64_t l = block.levels - 1; l >= (i == first ? lowest : 0); l--)
      level_backward(i, l, i > first || (l > lowest && !block.mixture));
  }

 private:
  // x: panels that it reads
  void level(int64_t i, int64_t l, const float* x) const {
    const SegmentLevel& level = c.block[i].level[l];
    const int64_t at = stream_of(i) + 1 + l, N = level.N, size = d * PANEL;
    const float* h = stream(at);
    float* next = stream(at + 1);
    const LevelVectors& v = level.vectors;
    const Kept to = kept(i, l);
    over(B * P, d, [&](int64_t j) {
      if (v.shift) layer_norm(x + j * size, v, to.n + j * size);
      else norm(x + j * size, v.gain, to.n + j * size);
    });
    if (level.kind == GELU_LEVEL) {
      inner(level, level.up, v.up_bias, to.n, to.a, [&](int64_t k) {
        f8 slope;
        store(to.a + k, sigma<GELU_TANH>(load(to.a + k), slope));
        if (to.by_up) store(to.by_up + k, slope);
      });
    } else {
      inner(level, level.up, v.up_bias, to.n, to.by_up, [](int64_t) {});
      if (level.kind == SWIGLU_LEVEL) gated<SILU>(level, to);
      else gated<GELU_TANH>(level, to);
    }
    add_product(N, [&](int64_t b) { return level.down[b]; }, to.a, h, next,
                {v.down_bias, v.post_gain, to.out, level.share});
  }

  // on: whether dL/d its input is wanted, which is added to the slope by its output.
  void level_backward(int64_t i, int64_t l, bool on) const {
    const SegmentLevel& level = c.block[i].level[l];
    const bool mixture = c.block[i].mixture;
    const int64_t N = level.N, size = d * PANEL;
    const float* x = stream(stream_of(i) + 1 + (mixture ? 0 : l));
    const Kept of = kept(i, l);
    const Learning rows{*this};
    const float* errors = slope_before(level.vectors.post_gain, of.out, mixture ? apart : slope, level.share);
    product(N, d, rows, [&](int64_t b) { return level.down[b]; }, 1, N, errors,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              const int64_t at = (b * P + p) * N * PANEL;
              if (of.by_gate) store_products(wide_gate + at, r, acc, of.by_gate + at);
              multiply_rows(acc, of.by_up + at, r);
              store_rows(wide + at, r, acc);
            }, Nothing());
    if (level.learns) steps(d, N, level.down_step, errors, of.a);
    if (on) back(level, level.up, wide, false);
    if (on && level.gate) back(level, level.gate, wide_gate, true);
    if (level.learns) steps(N, d, level.up_step, wide, of.n);
    if (level.learns && level.gate) steps(N, d, level.gate_step, wide_gate, of.n);
    if (!on) return;
    over(B * P, d, [&](int64_t j) {
      if (!learning(j / P)) return;
      if (level.vectors.shift) layer_norm_backward(x + j * size, level.vectors, one + j * size, slope + j * size);
      else norm_backward(x + j * size, level.vectors.gain, one + j * size, slope + j * size, true);
    });
  }

  // to = W n + bias; then activate(k) of eight numbers from place k on, while they are in the cache
  template <class Activate>
  void inner(const SegmentLevel& level, const float* const* W, const float* bias, const float* n, float* to,
             Activate activate) const {
    const int64_t N = level.N;
    product(N, d, All(), [&](int64_t b) { return W[b]; }, d, 1, n,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              if (bias) bias_rows(acc, bias, r);
              store_rows(to + (b * P + p) * N * PANEL, r, acc);
            },
            [&](int64_t b, int64_t p, int64_t r0, int64_t r1) {
              const int64_t at = (b * P + p) * N * PANEL;
              for (int64_t k = r0 * PANEL; k < r1 * PANEL; k += half(b, p) ? PANEL : 8) activate(at + k);
            });
  }

  // a = sigma(gate n) z, for z = up n in by_up
  template <int ACT>
  void gated(const SegmentLevel& level, const Kept& to) const {
    inner(level, level.gate, level.vectors.gate_bias, to.n, to.a, [&](int64_t k) {
      f8 slope;
      const f8 gate = sigma<ACT>(load(to.a + k), slope), z = load(to.by_up + k);
      store(to.a + k, gate * z);
      if (!to.by_gate) return;
      store(to.by_up + k, gate);
      store(to.by_gate + k, slope * z);
    });
  }

  // one = W^T from (+ one, if more)
  void back(const SegmentLevel& level, const float* const* W, const float* from, bool more) const {
    product(d, level.N, Learning{*this}, [&](int64_t b) { return W[b]; }, 1, d, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              float* to = one + (b * P + p) * d * PANEL;
              if (more) add_rows(acc, to, r);
              store_rows(to, r, acc);
            }, Nothing());
  }

  // The mean of f(i) over the rows i of eight tokens of a panel, in four chains.
  template <class F>
  f8 mean(F f) const {
    f8 s[4] = {};
    for (int64_t i = 0; i < d; i++) s[i % 4] = f(i, s[i % 4]);
    return ((s[0] + s[1]) + (s[2] + s[3])) / all(static_cast<float>(d));
  }

  f8 mean_of(const float* x) const {
    return mean([x](int64_t i, f8 sum) { return sum + load(x + i * PANEL); });
  }

  // one panel: n = layernorm(x) gain + shift
  void layer_norm(const float* x, const LevelVectors& vectors, float* n) const {
    for (int v = 0; v < PANEL; v += 8) {
      const f8 middle = mean_of(x + v);
      for (int64_t k = v; k < d * PANEL; k += PANEL) store(n + k, load(x + k) - middle);
      const f8 factor = norm_factor(n + v);
      for (int64_t i = 0; i < d; i++) {
        const int64_t k = i * PANEL + v;
        store(n + k, load(n + k) * factor * all(vectors.gain[i]) + all(vectors.shift[i]));
      }
    }
  }

  // one panel: dx += dL/dx for dn at the norm's output
  void layer_norm_backward(const float* x, const LevelVectors& vectors, const float* dn, float* dx) const {
    for (int v = 0; v < PANEL; v += 8) {
      auto at = [v](int64_t i) { return i * PANEL + v; };
      auto g = [&](int64_t i) { return load(dn + at(i)) * all(vectors.gain[i]); };
      const f8 middle = mean_of(x + v), level = mean([&](int64_t i, f8 sum) { return sum + g(i); });
      auto centred = [&](int64_t i) { return load(x + at(i)) - middle; };
      const f8 variance = mean([&](int64_t i, f8 sum) { return fma(centred(i), centred(i), sum); });
      const f8 factor = all(1) / root(variance + all(c.eps));
      const f8 m = factor * factor * mean([&](int64_t i, f8 sum) { return fma(centred(i), g(i) - level, sum); });
      for (int64_t i = 0; i < d; i++)
        store(dx + at(i), fnma(m, centred(i), g(i) - level) * factor + load(dx + at(i)));
    }
  }

  // The steps of a matrix [R, K] of all rows that learn: its gradient is a sum over tokens, of errors [R] and inputs
  // [K] in panels, one chain for every weight. It is in memory as a whole only where a step asks for that.
  void steps(int64_t R, int64_t K, const SegmentStep* step, const float* errors, const float* inputs) const {
    const int64_t count = (K + COLUMNS - 1) / COLUMNS;
    over(B * count, COLUMNS * R * P, [&](int64_t i) {
      const int64_t b = i / count, k = i % count * COLUMNS, w = std::min(COLUMNS, K - k), n = c.len[b];
      if (!learning(b) || !step[b].weight) return;
      float* rows = strips + (b * count + i % count) * COLUMNS * P * PANEL;  // the inputs here, [n, w]
      for (int64_t p = 0; p * PANEL < n; p++)
        store_lanes(inputs + ((b * P + p) * K + k) * PANEL, rows + p * PANEL * w, w, w, 0, tokens(b, p));
      const SegmentStep& s = step[b];
      Step rule{s.rule, s.lr, s.mu, s.beta2, s.first, s.second, s.root, s.eps};
      Weights weights{s.weight, s.moment, s.square, s.total, nullptr};
      if (s.whole) rule = {GD, -1, 0, 0, 0, 0, 0, 0}, weights = {s.total, nullptr, nullptr, nullptr, nullptr};
      outer_product(0, R, w, n, errors + b * P * R * PANEL, R * PANEL, rows, w,
                    [&](int64_t r, int64_t at, auto& acc) {
                      const int64_t place = r * K + k + at;
                      step_tile(rule, weights.from(place), K, R * K - 1 - place, acc);
                    });
    });
    for (int64_t b = 0; b < B; b++)
      if (learning(b) && step[b].weight && step[b].whole) step_of(step[b], R, K);
  }

  // The step from the gradient as a whole, which total has.
  void step_of(const SegmentStep& s, int64_t R, int64_t K) const {
    must(s.whole == ORTHOGONAL ? hope_newton_schulz(1, R, K, c.threads, s.total, s.total)
                               : hope_normalise(R * K, c.threads, s.total));
    must(hope_cms_step(R * K, c.threads, s.rule, s.lr, s.mu, s.beta2, s.first, s.second, s.root, s.eps, nullptr,
                       s.total, s.weight, s.moment, s.square, nullptr));
  }

  // A tile of gradients, whose rows lie K apart; `last` numbers behind its first one is the matrix's last.
  template <class V, int MR, int NV>
  static void step_tile(const Step& s, const Weights& p, int64_t K, int64_t last, const V (&acc)[MR][NV]) {
#pragma GCC unroll 8
    for (int r = MR; r < 2 * MR; r++)  // the tile below
      for (int64_t at : {r * K, r * K + 16}) __builtin_prefetch(p.weight + std::min(at, last), 1);
    if (s.rule == GD && !p.total) {
      const V lr = all_as<V>(s.lr);
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
          float* w = p.weight + r * K + LANES<V> * v;
          store(w, fnma(lr, acc[r][v], load_as<V>(w)));
        }
      return;
    }
    alignas(64) float grad[MR][NV * LANES<V>];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) store(grad[r] + LANES<V> * v, acc[r][v]);
    for (int r = 0; r < MR; r++) step_weights(s, NV * LANES<V>, grad[r], p.from(r * K));
  }
};
