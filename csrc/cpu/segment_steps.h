// The steps of the levels' matrices in a segment, from errors and inputs in panels.
#pragma once
#include "segment_panels.h"

class SegmentSteps : public SegmentPanels {
 protected:
  using SegmentPanels::SegmentPanels;

  // What a step is given for the inputs [K] of a matrix: X P in rows that take it up at once; the others as they are.
  const float* before(const RowInverse* inverse, int64_t K, const float* inputs) const {
    if (!inverse) return inputs;
    auto at_once = [&](int64_t b) { return learning(b) && inverse[b].how == AT_ONCE; };
    product(K, K, at_once, [&](int64_t b) { return inverse[b].now; }, K, 1, inputs,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { store_rows(made + (b * P + p) * K * PANEL, r, acc); },
            Nothing());
    const int64_t size = K * P * PANEL;
    for (int64_t b = 0; b < B; b++)
      if (!at_once(b)) std::memcpy(made + b * size, inputs + b * size, size * sizeof(float));
    return made;
  }

  // What becomes of a row's P once its steps have been taken.
  void after(const RowInverse* inverse, int64_t K, const float* inputs) const {
    for (int64_t b = 0; inverse && b < B; b++) {
      const RowInverse& of = inverse[b];
      if (!learning(b) || of.how == NOT_AT_ALL) continue;
      for (int64_t p = 0; p * PANEL < c.len[b]; p++)
        store_lanes(inputs + (b * P + p) * K * PANEL, taken + p * PANEL * K, K, K, 0, tokens(b, p));
      must(hope_take_up(c.len[b], K, c.threads, of.ridge, taken, of.how == AT_ONCE ? of.now : of.next));
      const size_t size = K * K * sizeof(float);
      if (of.how == BY_THE_SUM) std::memcpy(of.now, of.next, size);
      else if (of.how == AT_ONCE && of.next) std::memcpy(of.next, of.now, size);
    }
  }

  // The steps of a matrix [R, K] of all rows that learn: its gradient is a sum over tokens, of errors [R] and inputs
  // [K] in panels, one chain for every weight. It is in memory as a whole only where a step asks for that.
  void steps(int64_t R, int64_t K, const SegmentStep* step, const RowInverse* inverse, const float* errors,
             const float* inputs) const {
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
      if (collects(s, inverse, b)) rule = {GD, -1, 0, 0, 0, 0, 0, 0}, weights = {s.total, nullptr, nullptr, nullptr, nullptr};
      outer_product(0, R, w, n, errors + b * P * R * PANEL, R * PANEL, rows, w,
                    [&](int64_t r, int64_t at, auto& acc) {
                      const int64_t place = r * K + k + at;
                      step_tile(rule, weights.from(place), K, R * K - 1 - place, acc);
                    });
    });
    for (int64_t b = 0; b < B; b++)
      if (learning(b) && step[b].weight && collects(step[b], inverse, b)) step_of(step[b], inverse, b, R, K);
  }

 private:
  static bool by_the_sum(const RowInverse* inverse, int64_t b) { return inverse && inverse[b].how == BY_THE_SUM; }
  static bool collects(const SegmentStep& s, const RowInverse* inverse, int64_t b) {
    return s.whole || by_the_sum(inverse, b);
  }

  // The step from the gradient as a whole, which total has.
  void step_of(const SegmentStep& s, const RowInverse* inverse, int64_t b, int64_t R, int64_t K) const {
    if (s.whole == NORMALISED) must(hope_normalise(R * K, c.threads, s.total));
    if (by_the_sum(inverse, b)) must(hope_precondition(R, K, c.threads, inverse[b].now, s.total));
    if (s.whole == ORTHOGONAL) must(hope_newton_schulz(1, R, K, c.threads, s.total, s.total));
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
