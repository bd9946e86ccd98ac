// The CMS levels of a segment's blocks: forward, and backward with the steps of their matrices.
#pragma once
#include "segment_steps.h"

class SegmentLevels : public SegmentSteps {
 protected:
  using SegmentSteps::SegmentSteps;

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
    const LevelLowRank& low = level.low;
    across(level, low.across, low.up, d, to.n, to.s);
    switch (level.kind) {
      case GELU_LEVEL: ungated<GELU_TANH>(level, to); break;
      case GELU_ERF_LEVEL: ungated<GELU>(level, to); break;
      default:
        inner(level, level.up, low.up, v.up_bias, to, to.by_up, [](int64_t) {});
        if (level.kind == SWIGLU_LEVEL) gated<SILU>(level, to);
        else gated<GELU_TANH>(level, to);
    }
    across(level, low.across_down, low.down, N, to.a, to.s_down);
    learned(level, low.down, d, to.s_down, v.post_gain ? to.out : next);
    add_product(N, [&](int64_t b) { return level.down[b]; }, to.a, h, next,
                {v.down_bias, v.post_gain, to.out, level.share, low.down});
  }

  // on: whether dL/d its input is wanted, which is added to the slope by its output.
  void level_backward(int64_t i, int64_t l, bool on) const {
    const SegmentLevel& level = c.block[i].level[l];
    const bool mixture = c.block[i].mixture;
    const int64_t N = level.N, size = d * PANEL;
    const float* x = stream(stream_of(i) + 1 + (mixture ? 0 : l));
    const Kept of = kept(i, l);
    const Learning rows{*this};
    const LevelLowRank& low = level.low;
    const float* errors = slope_before(level.vectors.post_gain, of.out, mixture ? apart : slope, level.share);
    learned_back(level, low.down, d, errors, false);
    across_back(level, low.across_down, low.down, N, [&](int64_t at, int64_t r, auto& acc) {
      store_rows(wide + at, r, acc);
    });
    product(N, d, rows, [&](int64_t b) { return level.down[b]; }, 1, N, errors,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              const int64_t at = (b * P + p) * N * PANEL;
              if (low.rank && low.down[b]) add_rows(acc, wide + at, r);
              if (of.by_gate) store_products(wide_gate + at, r, acc, of.by_gate + at);
              multiply_rows(acc, of.by_up + at, r);
              store_rows(wide + at, r, acc);
            }, Nothing());
    const bool thin_ones = low.rank;
    if (level.learns) {
      const int64_t K = thin_ones ? low.rank : N;
      const float *inputs = thin_ones ? of.s_down : of.a, *given = before(level.inverse_down, K, inputs);
      steps(d, K, level.down_step, level.inverse_down, errors, given);
      after(level.inverse_down, K, inputs);
    }
    if (on) inner_backward(level);
    if (level.learns) {
      const int64_t K = thin_ones ? low.rank : d;
      const float *inputs = thin_ones ? of.s : of.n, *given = before(level.inverse, K, inputs);
      steps(N, K, level.up_step, level.inverse, wide, given);
      if (level.gate) steps(N, K, level.gate_step, level.inverse, wide_gate, given);
      after(level.inverse, K, inputs);
    }
    if (!on) return;
    over(B * P, d, [&](int64_t j) {
      if (!learning(j / P)) return;
      if (level.vectors.shift) layer_norm_backward(x + j * size, level.vectors, one + j * size, slope + j * size);
      else norm_backward(x + j * size, level.vectors.gain, one + j * size, slope + j * size, true);
    });
  }

  // -- what rows have learned as products of two thin matrices L S; without any, these do nothing -----------------

  struct Having {  // rows that learn and have an L
    const SegmentPanels& s;
    const float* const* L;
    bool operator()(int64_t b) const { return Learning{s}(b) && L[b]; }
  };

  // s = S x, panels [K] to [rank], where a row's L, or the gradient by it, asks for it
  void across(const SegmentLevel& level, const float* S, const float* const* L, int64_t K, const float* x,
              float* s) const {
    const int64_t rank = level.low.rank;
    if (rank == 0) return;
    const bool kept = c.keep && level.learns;
    product(rank, K, [=](int64_t b) { return kept || L[b]; }, [=](int64_t) { return S; }, K, 1, x,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { store_rows(s + (b * P + p) * rank * PANEL, r, acc); },
            Nothing());
  }

  // to = L s, panels [R], in rows with an L
  void learned(const SegmentLevel& level, const float* const* L, int64_t R, const float* s, float* to) const {
    const int64_t rank = level.low.rank;
    if (rank == 0) return;
    product(R, rank, [=](int64_t b) { return L[b] != nullptr; }, [=](int64_t b) { return L[b]; }, rank, 1, s,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { store_rows(to + (b * P + p) * R * PANEL, r, acc); },
            Nothing());
  }

  // thin = L^T from (+ thin, if more), panels [R] to [rank]
  void learned_back(const SegmentLevel& level, const float* const* L, int64_t R, const float* from, bool more) const {
    const int64_t rank = level.low.rank;
    if (rank == 0) return;
    product(rank, R, Having{*this, L}, [=](int64_t b) { return L[b]; }, 1, rank, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              float* to = thin + (b * P + p) * rank * PANEL;
              if (more) add_rows(acc, to, r);
              store_rows(to, r, acc);
            }, Nothing());
  }

  // done(place of a panel [K], r, acc) of S^T thin
  template <class Done>
  void across_back(const SegmentLevel& level, const float* S, const float* const* L, int64_t K, Done done) const {
    const int64_t rank = level.low.rank;
    if (rank == 0) return;
    product(K, rank, Having{*this, L}, [=](int64_t) { return S; }, 1, K, thin,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { done((b * P + p) * K * PANEL, r, acc); }, Nothing());
  }

  // -- products ---------------------------------------------------------------------------------------------------

  // to = W n + L s + bias; then activate(k) of eight numbers from place k on, while they are in the cache
  template <class Activate>
  void inner(const SegmentLevel& level, const float* const* W, const float* const* L, const float* bias,
             const Kept& from, float* to, Activate activate) const {
    const int64_t N = level.N;
    const bool rank = level.low.rank;
    learned(level, L, N, from.s, to);
    product(N, d, All(), [&](int64_t b) { return W[b]; }, d, 1, from.n,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              float* panel = to + (b * P + p) * N * PANEL;
              if (rank && L[b]) add_rows(acc, panel, r);
              if (bias) bias_rows(acc, bias, r);
              store_rows(panel, r, acc);
            },
            [&](int64_t b, int64_t p, int64_t r0, int64_t r1) {
              const int64_t at = (b * P + p) * N * PANEL;
              for (int64_t k = r0 * PANEL; k < r1 * PANEL; k += half(b, p) ? PANEL : 8) activate(at + k);
            });
  }

  // a = sigma(up n)
  template <int ACT>
  void ungated(const SegmentLevel& level, const Kept& to) const {
    inner(level, level.up, level.low.up, level.vectors.up_bias, to, to.a, [&](int64_t k) {
      f8 slope;
      store(to.a + k, sigma<ACT>(load(to.a + k), slope));
      if (to.by_up) store(to.by_up + k, slope);
    });
  }

  // a = sigma(gate n) z, for z = up n in by_up
  template <int ACT>
  void gated(const SegmentLevel& level, const Kept& to) const {
    inner(level, level.gate, level.low.gate, level.vectors.gate_bias, to, to.a, [&](int64_t k) {
      f8 slope;
      const f8 gate = sigma<ACT>(load(to.a + k), slope), z = load(to.by_up + k);
      store(to.a + k, gate * z);
      if (!to.by_gate) return;
      store(to.by_up + k, gate);
      store(to.by_gate + k, slope * z);
    });
  }

  // one = dL/dn, from dL/d(up n) in wide and dL/d(gate n) in wide_gate
  void inner_backward(const SegmentLevel& level) const {
    const LevelLowRank& low = level.low;
    back(level, level.up, wide, false);
    learned_back(level, low.up, level.N, wide, false);
    if (level.gate) {
      back(level, level.gate, wide_gate, true);
      learned_back(level, low.gate, level.N, wide_gate, true);
    }
    across_back(level, low.across, low.up, d, [&](int64_t at, int64_t r, auto& acc) {
      add_rows(acc, one + at, r);
      store_rows(one + at, r, acc);
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
};
