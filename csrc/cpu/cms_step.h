// One optimizer step of weights that lie one after another, in one pass: gradient, averages, weight and 16-bit
// copy are read and written once. fp32; a weight's value depends on its own numbers alone.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

enum StepRule { GD = 0, MOMENTUM = 1, ADAM = 2 };

// w <- w - lr f(g):  GD f = g;  MOMENTUM m <- mu m + g, f = m;  ADAM m <- mu m + first g,
// v <- beta2 v + second g^2, f = m / (root sqrt(v) + eps)
struct Step {
  int64_t rule;
  float lr, mu, beta2, first, second, root, eps;
};

// Where they lie; null: moment, square not needed by the rule, no copy, no total. The copy is bf16. total joins
// the gradient, and becomes 0.
struct Weights {
  float *weight, *moment, *square, *total;
  uint16_t* copy;
  Weights from(int64_t i) const {
    return {weight + i, moment ? moment + i : moment, square ? square + i : square, total ? total + i : total,
            copy ? copy + i : copy};
  }
};

// Eight weights at p, with the gradient g without total.
template <int RULE>
HK_INLINE void step8(const Step& s, f8 g, const Weights& p) {
  if (p.total) {
    g = g + load(p.total);
    store(p.total, all(0.0f));
  }
  if constexpr (RULE == MOMENTUM) {
    g = fma(all(s.mu), load(p.moment), g);
    store(p.moment, g);
  }
  if constexpr (RULE == ADAM) {
    const f8 v = fma(all(s.beta2), load(p.square), all(s.second) * (g * g));
    const f8 m = fma(all(s.mu), load(p.moment), all(s.first) * g);
    store(p.square, v);
    store(p.moment, m);
    g = m / fma(all(s.root), root(v), all(s.eps));
  }
  const f8 w = fnma(all(s.lr), g, load(p.weight));
  store(p.weight, w);
  if (p.copy) store_bf16(p.copy, w);
}

// n weights, with the gradient at g (null: total alone).
template <int RULE>
inline void step_many(const Step& s, int64_t n, const float* g, const Weights& p) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) step8<RULE>(s, g ? load(g + i) : all(0.0f), p.from(i));
  if (i == n) return;
  float given[8] = {}, weight[8] = {}, moment[8] = {}, square[8] = {}, total[8] = {};
  uint16_t copy[8];
  const Weights last = p.from(i);
  const size_t rest = 4 * (n - i);
  if (g) std::memcpy(given, g + i, rest);
  std::memcpy(weight, last.weight, rest);
  if (p.moment) std::memcpy(moment, last.moment, rest);
  if (p.square) std::memcpy(square, last.square, rest);
  if (p.total) std::memcpy(total, last.total, rest);
  step8<RULE>(s, load(given), {weight, moment, square, p.total ? total : nullptr, copy});
  std::memcpy(last.weight, weight, rest);
  if (p.moment) std::memcpy(last.moment, moment, rest);
  if (p.square) std::memcpy(last.square, square, rest);
  if (p.total) std::memcpy(last.total, total, rest);
  if (p.copy) std::memcpy(last.copy, copy, rest / 2);
}

inline void step_weights(const Step& s, int64_t n, const float* g, const Weights& p) {
  if (s.rule == GD) step_many<GD>(s, n, g, p);
  else if (s.rule == MOMENTUM) step_many<MOMENTUM>(s, n, g, p);
  else step_many<ADAM>(s, n, g, p);
}

inline bool step_fits(const Step& s, const Weights& p) {
  return s.rule >= GD && s.rule <= ADAM && p.weight && (s.rule == GD || p.moment) && (s.rule != ADAM || p.square);
}
