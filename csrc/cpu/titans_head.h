// One (row, head) as a thread of its team sees it: the tensors, the buffers, and which rows and tokens are
// the thread's own.
#pragma once
#include <cmath>
#include <type_traits>

#include "call.h"
#include "gates.h"
#include "panel.h"
#include "rows.h"
#include "team.h"
#include "workspace.h"

constexpr int64_t BLOCK = 32;  // rows that meet every panel of tokens before the next rows do
constexpr int LINEAR = -1;     // in the place of an activation: memories have none

// f with the activation of the memories, or LINEAR, as the value of its argument's type
template <class F>
inline auto with_kind(const TitansCall& c, F f) {
  if (!c.N) return f(std::integral_constant<int, LINEAR>());
  switch (c.activation) {
    case GELU: return f(std::integral_constant<int, GELU>());
    case SILU: return f(std::integral_constant<int, SILU>());
    default: return f(std::integral_constant<int, GELU_TANH>());
  }
}

struct Tensors {  // of one (row, head): pointers into the call's
  float *delta2, *delta1, *delta1s, *s2, *s1, *s1s;
  const float *base2, *base1, *base1s;
  const float *q, *x, *k, *v, *eta, *alpha, *beta;
  float *o, *pending_k, *pending_v, *pending_eta, *pending_alpha, *pending_beta;
  float *made_k, *made_v, *made_q, *made_eta, *made_alpha, *made_size;
  float eta_bias, alpha_bias;
};

// A panel's vectors: both halves of its rows, or the first ones only.
inline int64_t step_of(bool half) { return half ? PANEL : 8; }

// Sums over n rows (a multiple of 4) in four interleaved chains: a single one would wait for the latency of
// every addition.
template <class V = f8>
HK_INLINE V four_chains(const float* A, const float* B, int64_t n) {
  V s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[j] = fma(all_as<V>(A[i + j]), load_as<V>(B + (i + j) * PANEL), s[j]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

template <class V = f8>
HK_INLINE V squares(const float* x, int64_t n) {
  V s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const V y = load_as<V>(x + (i + j) * PANEL);
      s[j] = fma(y, y, s[j]);
    }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// What a vector of this size is multiplied with to become a unit vector.
template <class V>
HK_INLINE V unit_factor(V size) {
  return all_as<V>(1) / most(all_as<V>(NORM_EPS), size);
}

// f(first lane, a vector to say how many) over a range of tokens: panels at once where the CPU can and they hold more
// than eight.
template <class F>
HK_INLINE void for_lanes(Range tokens, F f) {
  if (tokens.begin >= tokens.end) return;  // another thread's may lie in the same eight
  for (int64_t t = tokens.begin / 8 * 8; t < tokens.end;) {
    if (LANES<widest> == PANEL && t % PANEL == 0 && tokens.end - t > 8) f(t, widest()), t += PANEL;
    else f(t, f8()), t += 8;
  }
}

// f(panel, first lane, last lane) over a range of lanes, cut where groups of eight lanes and panels end
template <class F>
void for_panels(Range lanes, F f) {
  for (int64_t a = lanes.begin; a < lanes.end;) {
    const int64_t b = std::min(lanes.end, a / 8 * 8 + 8), p = a / PANEL;
    f(p, a - p * PANEL, b - p * PANEL);
    a = b;
  }
}

// f(rows, panel): a block of rows meets every panel while it is in the cache
template <class F>
void for_blocks(Range rows, int64_t p0, int64_t p1, F f) {
  for (int64_t r = rows.begin; r < rows.end; r += BLOCK)
    for (int64_t p = p0; p < p1; p++) f(Range{r, std::min(r + BLOCK, rows.end)}, p);
}

struct Head {
  const TitansCall& c;
  const Workspace& w;
  const Team& team;
  const int64_t D, N, M, hid, R;  // hid = M N hidden units, R rows of w2
  const int64_t big, small;       // tokens a chunk of the slower and of the faster clock
  // Two threads share the work evenly by memories: {memory, k} and {v, eta, alpha}. Then activations and
  // errors stay with the thread that made them. Otherwise every stage is shared by rows.
  const bool by_memory;
  const int64_t ld;  // tokens of a chunk, rounded up to whole panels
  Tensors g;
  const float *w2, *w1, *w1s;  // weights in force
  float* x;                    // the memories' input, panels
  // What every thread computes for itself. gamma[t,s] with 0 <= s <= t <= C, 0 being the chunk's start, is at
  // gamma[t * ld + s]; everywhere else tokens count from 0.
  float* gamma;                         // [C + 1, ld]
  float* gain;                          // [M, ld]
  float *size, *eta_size;               // [ld]: m_t of a memory, and eta_t m_t
  float *eta, *erase, *decay_after;     // [ld]
  float* factors;                       // [ld, 8], see Clock
  // With momentum (titans_momentum.h): A [C + 1, ld]; row C of B, and of each token gamma[t-1,0], A[t-1,0], A[C,t] and
  // -B[C,t] [ld].
  float *arrival, *carried, *decay_before, *arrived_before, *arrived_after, *carried_after;

  // Floats that each thread has to itself.
  static int64_t own_floats(const TitansCall& c) {
    const int64_t C = std::max(c.chunk_memory, c.chunk_other);
    return (C + 1 + c.Mf + c.Ms + 5 + 8 + (c.s2 ? C + 6 : 0)) * panels(C) * PANEL;
  }

  Head(const TitansCall& call, const Workspace& work, const Team& team, float* own)
      : c(call), w(work), team(team), D(c.D), N(c.N), M(c.Mf + c.Ms), hid(hidden_units(c)),
        R(weight_rows(c)), big(std::max(c.chunk_memory, c.chunk_other)),
        small(std::min(c.chunk_memory, c.chunk_other)),
        by_memory(team.size == 2 && c.update && c.Mf == 3 && c.N && big == small), ld(panels(big) * PANEL) {
    gamma = own;
    gain = gamma + (big + 1) * ld;
    size = gain + M * ld, eta_size = size + ld;
    eta = eta_size + ld, erase = eta + ld, decay_after = erase + ld, factors = decay_after + ld;
    arrival = factors + 8 * ld, carried = arrival + (big + 1) * ld, decay_before = carried + ld;
    arrived_before = decay_before + ld, arrived_after = arrived_before + ld, carried_after = arrived_after + ld;
    x = by_memory && team.id ? w.x_second : w.x;
  }

  // Turns to head h of row b.
  void at(int64_t b, int64_t h) {
    const int64_t row = b * c.H + h, token = b * c.T * c.H + h, slot = b * big * c.H + h;
    auto from = [](auto* p, int64_t offset) { return p ? p + offset : nullptr; };
    g.delta2 = c.delta2 + row * R * D, g.delta1 = from(c.delta1, row * c.Mf * D * N);
    g.delta1s = from(c.delta1s, row * c.Ms * N);
    g.s2 = from(c.s2, row * R * D), g.s1 = from(c.s1, row * c.Mf * D * N), g.s1s = from(c.s1s, row * c.Ms * N);
    g.base2 = from(c.base2, h * R * D), g.base1 = from(c.base1, h * c.Mf * D * N);
    g.base1s = from(c.base1s, h * c.Ms * N);
    g.q = from(c.q, token * D), g.o = from(c.o, token * D);
    g.x = from(c.x, token * D), g.k = from(c.k, token * D), g.v = from(c.v, token * D);
    g.eta = from(c.eta, token), g.alpha = from(c.alpha, token), g.beta = from(c.beta, token);
    g.made_k = from(c.made_k, token * D), g.made_v = from(c.made_v, token * D);
    g.made_q = from(c.made_q, token * D), g.made_eta = from(c.made_eta, token);
    g.made_alpha = from(c.made_alpha, token), g.made_size = from(c.made_size, token);
    g.pending_k = c.pending_k + slot * D, g.pending_v = c.pending_v + slot * D;
    g.pending_eta = c.pending_eta + slot, g.pending_alpha = from(c.pending_alpha, slot);
    g.pending_beta = from(c.pending_beta, slot);
    g.eta_bias = c.eta_bias ? c.eta_bias[h] : 0, g.alpha_bias = c.alpha_bias ? c.alpha_bias[h] : 0;
    w2 = c.base2 ? w.w2 : g.delta2, w1 = c.base1 ? w.w1 : g.delta1, w1s = c.base1s ? w.w1s : g.delta1s;
  }

  // -- who does what ----------------------------------------------------------------------------------------

  Range hidden_rows(int64_t a, int64_t b) const {  // this thread's hidden rows of [a, b)
    if (!by_memory) return team.share(a, b, 8);
    return team.id == 0 ? Range{0, 2 * N} : Range{2 * N, b};
  }

  // This thread's outputs of [a, b): D for each full memory, then one for each scalar memory.
  Range output_rows(int64_t a, int64_t b) const {
    if (!by_memory) return team.share(a, b, 8);
    return team.id == 0 ? Range{0, 2 * D} : Range{2 * D, b};
  }

  // This thread's tokens in stages that treat tokens apart: groups of eight; with by_memory all of them, of
  // its own tensors.
  Range own_lanes(int64_t tokens) const {
    if (by_memory) return {0, tokens};
    return team.share(0, panels(tokens) * PANEL, 8).within(0, tokens);
  }
  bool owns_k() const { return !by_memory || team.id == 0; }
  bool owns_v() const { return !by_memory || team.id == 1; }

  // This thread's share of what all memories have in common. With by_memory thread 0 does it: it has one
  // memory's activations fewer to compute.
  Range clock_share(int64_t n, int64_t unit) const {
    if (!by_memory) return team.share(0, n, unit);
    return team.id == 0 ? Range{0, n} : Range{0, 0};
  }

  void sync_rows() const {  // where one thread's rows are about to be read by another
    if (!by_memory) team.sync();
  }

  // -- what reading and writing have in common --------------------------------------------------------------

  // M(x) of scalar memory s for one panel: w1s a, plus the skip row; of a linear one its row
  void scalar_output(int64_t s, const float* a, const float* in, float* out) const {
    const float* row = w2 + (R - c.Ms + s) * D;
    for (int v = 0; v < PANEL; v += LANES<widest>) {
      if (!N) {
        store(out + v, four_chains<widest>(row, in + v, D));
        continue;
      }
      widest y = four_chains<widest>(w1s + s * N, a + v, N);
      if (c.scalar_skip) y = y + four_chains<widest>(row, in + v, D);
      store(out + v, y);
    }
  }
};
