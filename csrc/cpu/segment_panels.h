// What a segment's work is done on and with: the panels that are kept of it, products of weights with them, and token
// rows in and out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cms.h"
#include "cms_step.h"
#include "cms_whole.h"
#include "layer.h"
#include "linear.h"
#include "panel.h"
#include "rows.h"
#include "segment.h"
#include "team.h"
#include "titans_head.h"

class SegmentPanels {
 public:
  SegmentPanels(const SegmentCall& call, float* base)
      : c(call), B(c.B), T(c.T), d(c.d), P(panels(c.T)), places(c.blocks) {
    for (; first < c.blocks && lowest < 0; first++)
      for (int64_t l = c.block[first].levels - 1; l >= 0; l--)
        if (c.block[first].level[l].learns) lowest = l;
    first -= lowest >= 0;
    carve(base);
  }

  int64_t floats() const { return used; }

 protected:
  const SegmentCall& c;
  const int64_t B, T, d, P;
  int64_t first = 0, lowest = -1;  // what a gradient is taken back to: the first level that learns
  int64_t used = 0, streams = 1, kept_floats = 0;
  struct Place {
    int64_t stream;         // the number of a block's input
    int64_t levels, heads;  // where what is kept of its levels, and of its attention, begins
  };
  std::vector<Place> places;  // of blocks
  bool adaptive = false;  // whether memories of a block make q
  float *streams_ = nullptr, *levels_ = nullptr, *mixers_ = nullptr, *kept_ = nullptr, *heads_ = nullptr;
  float *mixed_ = nullptr, *apart = nullptr;  // apart: of a mixture, what its levels read, or the slope behind them
  float *slope, *one, *two, *wide, *strips;   // panels of d, d, d and of the widest level (or vocabulary)
  float* wide_gate;                           // panels of the widest level with a gate
  float* thin;                                // panels of the highest rank
  float *made, *taken;  // where steps are preconditioned: panels of the widest inputs, and token rows of a row of them
  float *ra, *rb, *rc, *rd, *re;              // token rows of d
  float *rk, *rv, *raw, *eta, *alpha, *beta;  // of d, d, and H for every head, where memories are given theirs
  float *hq, *hfar, *hy, *hdq, *hdfar, *hk, *hv;  // of H D and Hkv D, for attention
  static constexpr int64_t STRIP = 32;        // rows of a weight that meet all panels of a row of the batch
  static constexpr int64_t COLUMNS_MOST = 512;  // of a transposed weight that are copied to lie beside each other
  static constexpr int64_t FETCH = 32;        // lines of the next strip of a weight that are asked for at a time
  static constexpr int64_t COLUMNS = 32;      // of a weight that take their step together

  static int64_t round(int64_t n) { return (n + 15) / 16 * 16 + 16; }
  int64_t panel_floats() const { return B * P * PANEL * d; }
  int64_t row_floats() const { return B * T * d; }

  // that a row's tokens may lie in, of the clock of M_memory, and of the others
  int64_t chunks(const SegmentBlock& b) const { return T / b.titans.chunk_memory + 2; }
  int64_t chunks_q(const SegmentBlock& b) const { return T / b.titans.chunk_other + 2; }

  void carve(float* base) {
    auto take = [&](float*& p, int64_t n) { p = base ? base + used : nullptr, used += round(n); };
    int64_t deepest = d, levels = 0, kept = 0, given = 0, gates = 0, memories = 0;
    int64_t heads = 0, keys = 0, kept_heads = 0, gated = 0, mixed = 0, mixtures = 0, rank = 0, widest = 0;
    for (int64_t i = 0; i < c.blocks; i++) {
      const SegmentBlock& b = c.block[i];
      places[i] = {streams - 1, levels, kept_heads};
      streams += 1 + b.levels;
      for (int64_t l = 0; l < b.levels; l++) {
        deepest = std::max(deepest, b.level[l].N), levels += level_floats(b.level[l]);
        if (b.level[l].gate) gated = std::max(gated, b.level[l].N);
        rank = std::max(rank, b.level[l].low.rank);
        if (b.level[l].preconditioned) widest = std::max({widest, d, b.level[l].N});
      }
      if (b.post_gain) mixed = c.blocks * round(panel_floats());
      if (b.mixture) mixtures = panel_floats();
      if (b.attention) {
        const AttentionCall& t = b.attention->attention;
        heads = std::max(heads, t.H * t.D), keys = std::max(keys, t.Hkv * t.D);
        if (i > first) kept_heads += heads_floats(*b.attention);
        continue;
      }
      memories = row_floats();
      adaptive = adaptive || adaptive_q(b.titans);
      const int64_t most = std::max(chunks(b), adaptive ? chunks_q(b) : 0);
      kept = std::max(kept, round(B * b.titans.H * most * memory_rows(b.titans) * b.titans.D));
      if (!b.titans.self_modifying) given = row_floats();
      if (!b.titans.self_modifying || b.before.s2) gates = std::max(gates, B * T * b.titans.H);
    }
    kept_floats = kept;
    take(streams_, (c.keep ? streams : 2) * round(panel_floats()));
    take(levels_, c.keep ? levels : 0);
    take(mixers_, c.keep && memories ? c.blocks * (adaptive ? 4 : 3) * round(row_floats()) : 0);
    take(kept_, c.keep ? c.blocks * (adaptive ? 4 : 2) * kept : 0);
    take(slope, panel_floats()), take(one, panel_floats()), take(two, panel_floats()), take(apart, mixtures);
    take(heads_, c.keep ? kept_heads : 0), take(mixed_, c.keep ? mixed : 0), take(wide_gate, B * P * PANEL * gated);
    take(thin, B * P * PANEL * rank), take(made, c.keep ? B * P * PANEL * widest : 0), take(taken, c.keep ? T * widest : 0);
    take(wide, B * P * PANEL * std::max({c.vocab <= HEAD_MOST ? c.vocab : 0, deepest, heads, keys}));
    take(strips, c.keep ? B * P * PANEL * (deepest + COLUMNS) : 0);
    take(ra, row_floats());
    for (float** p : {&rb, &rc, &rd, &re}) take(*p, memories);
    for (float** p : {&rk, &rv}) take(*p, given);
    for (float** p : {&raw, &eta, &alpha, &beta}) take(*p, gates);
    for (float** p : {&hq, &hfar, &hy, &hdq, &hdfar}) take(*p, B * T * heads);
    for (float** p : {&hk, &hv}) take(*p, B * T * keys);
  }

  // -- what is kept of a reading ----------------------------------------------------------------------------

  float* stream(int64_t at) const { return streams_ + (c.keep ? at : at % 2) * round(panel_floats()); }
  int64_t stream_of(int64_t block) const { return places[block].stream; }
  // of a level, panels: its inputs after the norm, [d], its hidden units a, da by up n and by gate n (null where not
  // wanted, or without a gate), [N], what is normed behind it, [d], and S n and S a, [rank]
  struct Kept {
    float *n, *a, *by_up, *by_gate, *out, *s, *s_down;
  };
  int64_t level_floats(const SegmentLevel& level) const {
    return B * P * PANEL * ((level.vectors.post_gain ? 2 : 1) * d + (level.gate ? 3 : 2) * level.N +
                            2 * level.low.rank) + 16;
  }
  Kept kept(int64_t block, int64_t l) const {
    const SegmentLevel& level = c.block[block].level[l];
    if (!c.keep) return {one, wide, level.gate ? wide_gate : nullptr, nullptr, two, thin, thin};
    float* at = levels_ + places[block].levels;
    for (int64_t j = 0; j < l; j++) at += level_floats(c.block[block].level[j]);
    const int64_t inner = B * P * PANEL * level.N;
    float *a = at + panel_floats(), *by_gate = a + 2 * inner, *out = level.gate ? by_gate + inner : by_gate;
    float* s = level.vectors.post_gain ? out + panel_floats() : out;
    return {at, a, a + inner, level.gate ? by_gate : nullptr, out, s, s + B * P * PANEL * level.low.rank};
  }
  // of a block's mixer, panels: its output, where that is normed
  float* mixed(int64_t block) const {
    return c.keep && c.block[block].post_gain ? mixed_ + block * round(panel_floats()) : two;
  }
  // of a block's memory, its weights in every chunk that was read: 0 w2, 1 w1; and of the one that makes q: 2 w2, 3 w1
  float* kept_of(int64_t block, int which) const {
    return kept_ + ((adaptive ? 4 : 2) * block + which) * kept_floats;
  }
  // of a block's mixer: 0 what q is before it is a unit vector, 1 the memory's answers, 2 the gate, 3 what q is made of
  // by a memory
  float* kept_rows(int64_t block, int which) const {
    return mixers_ + ((adaptive ? 4 : 3) * block + which) * round(row_floats());
  }

  // of a block's attention, token rows: queries and, where they are normed, keys as they are before; its output; and
  // what the gradient takes for the softmax [B, T, H]
  struct KeptHeads {
    float *q, *k, *y, *most, *sum;
  };
  static int64_t kept_keys(const AttentionMixer& m) { return m.k_gain ? m.attention.Hkv * m.attention.D : 0; }
  int64_t heads_floats(const AttentionMixer& m) const {
    const AttentionCall& t = m.attention;
    return round(B * T * (2 * t.H * (t.D + 1) + kept_keys(m)));
  }
  // Those of a block that a gradient goes through; else q and k may be scratch, and the softmax is forgotten.
  KeptHeads kept_heads(int64_t block) const {
    if (!c.keep || block <= first) return {hq, hk, hy, nullptr, nullptr};
    float* at = heads_ + places[block].heads;
    const AttentionMixer& m = *c.block[block].attention;
    const int64_t n = B * T, wide = n * m.attention.H * m.attention.D;
    float *y = at + wide, *most = y + wide, *sum = most + n * m.attention.H, *k = sum + n * m.attention.H;
    return {at, m.k_gain ? k : hk, y, most, sum};
  }

  // -- who does what ----------------------------------------------------------------------------------------

  bool half(int64_t b, int64_t p) const { return c.len[b] - p * PANEL <= 8; }
  int64_t tokens(int64_t b, int64_t p) const {  // of a panel
    return std::clamp<int64_t>(c.len[b] - p * PANEL, 0, PANEL);
  }
  bool learning(int64_t b) const { return c.learns && c.learns[b]; }

  // f(i) for i in [0, n), each some `work` numbers for every token of a panel
  template <class F>
  void over(int64_t n, int64_t work, F f) const {
    const int team = team_for(1.0 * n * work * PANEL, ALONE_SEGMENT, c.threads);
    if (team == 1) {
      const FlushDenormals flush;
      for (int64_t i = 0; i < n; i++) f(i);
      return;
    }
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < n; i++) {
      const FlushDenormals flush;
      f(i);
    }
  }

  // out = W x for every panel x of `from` [K], of rows of the batch for which `wanted`: done(b, p, r, acc) with
  // rows r.. of W; then after(b, p, r0, r1), when those rows are done. weights(b): its W, element (r, k) at
  // r rs + k ks.
  template <class Wanted, class Weights, class Done, class After>
  void product(int64_t R, int64_t K, Wanted wanted, Weights weights, int64_t rs, int64_t ks, const float* from,
               Done done, After after) const {
    const int64_t strip = rs == 1 ? PANEL : STRIP, strips = (R + strip - 1) / strip;
    over(B * strips, strip * K * P, [&](int64_t i) {
      const int64_t b = i / strips, r0 = i % strips * strip, r1 = std::min(R, r0 + strip);
      if (!wanted(b)) return;
      const float *W = weights(b) + r0 * rs, *x = from + b * P * K * PANEL;
      int64_t next = ks;
      alignas(64) float columns[PANEL * COLUMNS_MOST];
      if (rs == 1 && K <= COLUMNS_MOST && r1 - r0 == PANEL) {  // whose lines would evict each other, ks apart
        for (int64_t k = 0; k < K; k++) std::memcpy(columns + k * PANEL, W + k * ks, PANEL * sizeof(float));
        W = columns, next = PANEL;
      }
      // the next strip, if any, comes nearer while this one is multiplied: all weights together do not fit into the
      // second cache
      const float* ahead = weights(b) + r1 * rs;
      const int64_t left = std::min(strip, R - r1);
      const int64_t line = rs == 1 ? ks : 16, lines = left == 0 ? 0 : rs == 1 ? K : left * K / 16;
      int64_t fetched = 0;
      auto to = [&](int64_t p) {
        return [&, p](int64_t r, auto& acc) {
          for (int64_t end = std::min(lines, fetched + FETCH); fetched < end; fetched++)
            __builtin_prefetch(ahead + fetched * line, 0, 2);
          done(b, p, r0 + r, acc);
        };
      };
      for (int64_t p = 0; p * PANEL < c.len[b]; p++, x += K * PANEL) {
        if (tokens(b, p + 1) > 8) {
          panel_products(0, r1 - r0, K, W, rs, next, x, x + K * PANEL, to(p), to(p + 1));
          after(b, p++, r0, r1), x += K * PANEL;
        } else {
          panel_product(0, r1 - r0, K, W, rs, next, x, half(b, p), to(p));
        }
        after(b, p, r0, r1);
      }
    });
  }

  struct All {
    bool operator()(int64_t) const { return true; }
  };
  struct Nothing {
    void operator()(int64_t, int64_t, int64_t, int64_t) const {}
  };
  struct Learning {
    const SegmentPanels& s;
    bool operator()(int64_t b) const { return s.learning(b); }
  };

  // panels [K] of `to` = W x, for a W [R, K] that all rows share, or with back its transposed, [K, R]
  template <class Wanted>
  void project(bool back, const float* W, const float* from, float* to, Wanted wanted) const {
    product(d, d, wanted, [&](int64_t) { return W; }, back ? 1 : d, back ? d : 1, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              store_rows(to + (b * P + p) * d * PANEL, r, acc);
            }, Nothing());
  }

  // What y = W x is on its way into the stream: share (y + bias), or share rmsnorm(y + bias) gain, where y + bias goes to
  // `out`. Null: without. added: of rows where it is not null y joins what is in the place of `out`, or of next.
  struct Joining {
    const float *bias, *gain;
    float* out;
    float share;
    const float* const* added = nullptr;
  };

  // The residual stream: panels [d] of next = h + W from, by every row's W [d, K], as `how` says.
  template <class Weights>
  void add_product(int64_t K, Weights weights, const float* from, const float* h, float* next,
                   const Joining& how) const {
    product(d, K, All(), weights, K, 1, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              const int64_t at = (b * P + p) * d * PANEL;
              if (how.added && how.added[b]) add_rows(acc, (how.gain ? how.out : next) + at, r);
              if (how.bias) bias_rows(acc, how.bias, r);
              if (how.gain) return store_rows(how.out + at, r, acc);
              if (how.share != 1) scale_rows(acc, how.share);
              add_rows(acc, h + at, r);
              store_rows(next + at, r, acc);
            }, Nothing());
    if (how.gain) add(how.out, how.gain, h, next, how.share);
  }

  // next = h + share from, or h + share rmsnorm(from) gain
  void add(const float* from, const float* gain, const float* h, float* next, float share = 1) const {
    over(B * P, d, [&](int64_t j) {
      const int64_t size = d * PANEL, at = j * size;
      if (gain) norm(from + at, gain, next + at);
      const float* y = gain ? next : from;
      for (int64_t k = at; k < at + size; k += 8) store(next + k, load(h + k) + all(share) * load(y + k));
    });
  }

  // dL/dx for the slope dy behind share x, or behind share rmsnorm(x) gain: dy itself, or in two.
  const float* slope_before(const float* gain, const float* x, const float* dy, float share = 1) const {
    if (!gain && share == 1) return dy;
    over(B * P, d, [&](int64_t j) {
      const int64_t size = d * PANEL, at = j * size;
      if (!learning(j / P)) return;
      if (gain) norm_backward(x + at, gain, dy + at, two + at, false);
      const float* y = gain ? two : dy;
      for (int64_t k = at; share != 1 && k < at + size; k += 8) store(two + k, all(share) * load(y + k));
    });
    return two;
  }

  // panels of d
  void copy(const float* from, float* to) const {
    const int64_t size = d * PANEL;
    over(B * P, d, [&](int64_t j) { std::memcpy(to + j * size, from + j * size, size * sizeof(float)); });
  }

  f8 norm_factor(const float* x) const {
    return all(1) / root(squares(x, d) / all(static_cast<float>(d)) + all(c.eps));
  }

  // one panel: n = rmsnorm(x) gain
  void norm(const float* x, const float* gain, float* n) const {
    for (int v = 0; v < PANEL; v += 8) {
      const f8 factor = norm_factor(x + v);
      for (int64_t i = 0; i < d; i++) store(n + i * PANEL + v, load(x + i * PANEL + v) * factor * all(gain[i]));
    }
  }

  // one panel: dx (+ dx, if more) for dn at the norm's output
  void norm_backward(const float* x, const float* gain, const float* dn, float* dx, bool more) const {
    for (int v = 0; v < PANEL; v += 8) {
      const f8 factor = norm_factor(x + v);
      f8 along[4] = {};
      for (int64_t i = 0; i < d; i += 4)
        for (int j = 0; j < 4; j++) {
          const int64_t at = (i + j) * PANEL + v;
          along[j] = fma(load(x + at), load(dn + at) * all(gain[i + j]), along[j]);
        }
      const f8 mean = ((along[0] + along[1]) + (along[2] + along[3])) / all(static_cast<float>(d));
      const f8 m = factor * factor * mean;
      for (int64_t i = 0; i < d; i++) {
        const int64_t at = i * PANEL + v;
        const f8 back = fnma(m, load(x + at), load(dn + at) * all(gain[i])) * factor;
        store(dx + at, more ? back + load(dx + at) : back);
      }
    }
  }

  void to_rows(const float* from, float* to, int64_t K, int64_t b, int64_t p) const {
    store_lanes(from + (b * P + p) * K * PANEL, to + (b * T + p * PANEL) * K, K, K, 0, tokens(b, p));
  }
  void from_rows(const float* from, float* to, int64_t K, int64_t b, int64_t p) const {
    load_lanes(to + (b * P + p) * K * PANEL, from + (b * T + p * PANEL) * K, K, K, 0, tokens(b, p));
  }
  template <class Wanted>
  void all_to_rows(const float* from, float* to, Wanted wanted) const {
    over(B * P, d, [&](int64_t i) { if (wanted(i / P)) to_rows(from, to, d, i / P, i % P); });
  }
  template <class Wanted>
  void all_from_rows(const float* from, float* to, Wanted wanted) const {
    over(B * P, d, [&](int64_t i) { if (wanted(i / P)) from_rows(from, to, d, i / P, i % P); });
  }
};
