// The self-modifying memory on a CPU: a whole call in one pass per (row, head), fp32, AVX2.
//
// What is computed: hope_kernels/ops/titans/README.md. Without momentum the chunk's update is of rank C,
//
//     Kg_s = gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) eta_t Kg_t          back substitution, gamma[t,s] = prod_{s<j<=t} alpha_j
//     delta2 <- gamma[C,0] delta2 - U^T Kg,   U_t = gain_t d_t + eta_t gamma[t-1,0] delta2 k_t
//     delta1 <- gamma[C,0] delta1 - sum_t gain_t gamma[C,t] e_t a_t^T
//
// Schedule: stages, each a product over rows of weights that the threads of a team share out; a barrier
// between them. Rows are owned, never sums: every number is one chain of operations whose order follows from
// shapes and the token's place in its chunk. So results are bit-identical for any number of threads, any
// split of the sequence, any company in the batch. Where a (row, head) is enough work for one thread and
// there are as many as threads, each team is one thread.
//
// Per token and head 64 D N + 3 C D FLOPs and less; 70 D N with target norms, 80 with deviations kept beside
// a base as well. The weights stream from L2 or L3 once per product; a tile reuses each for 16 tokens, so
// that the FMA units are the limit.

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "call.h"
#include "check.h"
#include "panel.h"
#include "team.h"
#include "workspace.h"

namespace {

constexpr int64_t BLOCK = 32;  // rows that meet every panel of tokens before the next rows do
constexpr float NORM_EPS = 1e-6f;

struct Head {  // one (row, head): pointers into the call's tensors
  float *delta2, *delta1, *delta1s;
  const float *base2, *base1, *base1s;
  const float *q, *x, *k, *v, *eta, *alpha;
  float *o, *pending_k, *pending_v, *pending_eta, *pending_alpha;
  float eta_bias, alpha_bias;
};

struct Group {  // memories [m0, m1) that commit together; full ones [f0, f1), scalar ones [s0, s1)
  int64_t m0, m1, f0, f1, s0, s1;
};

// Sums over n rows (a multiple of 4) in four interleaved chains: a single one would wait for the latency of
// every addition.
HK_INLINE f8 four_chains(const float* A, const float* B, int64_t n) {
  f8 s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[j] = fma(all(A[i + j]), load(B + (i + j) * PANEL), s[j]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

HK_INLINE f8 squares(const float* x, int64_t n) {
  f8 s[4] = {};
  for (int64_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[j] = fma(load(x + (i + j) * PANEL), load(x + (i + j) * PANEL), s[j]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// Eight lanes x of [D][16], divided by max(|x|, 1e-6).
void normalize_lanes(float* x, int64_t D) {
  const f8 n = all(1) / _mm256_max_ps(all(NORM_EPS), _mm256_sqrt_ps(squares(x, D)));
  for (int64_t d = 0; d < D; d++) store(x + d * PANEL, load(x + d * PANEL) * n);
}

class Scan {
 public:
  // Floats that each thread has to itself.
  static int64_t own_floats(const TitansCall& c) {
    const int64_t big = std::max(c.chunk_memory, c.chunk_other);
    return (big + 1 + c.Mf + c.Ms + 4) * panels(big) * PANEL;
  }

  Scan(const TitansCall& call, const Workspace& work, const Team& team, float* mine)
      : c(call), w(work), team(team), D(c.D), N(c.N), M(c.Mf + c.Ms), hid(M * N), R(hid + (c.scalar_skip ? c.Ms : 0)),
        big(std::max(c.chunk_memory, c.chunk_other)), small(std::min(c.chunk_memory, c.chunk_other)),
        by_memory(team.size == 2 && c.update && c.Mf == 3 && big == small) {
    const int64_t padded = panels(big) * PANEL;
    decay = mine;
    gain = decay + (big + 1) * padded;
    size = gain + M * padded, weight = size + padded, eta = weight + padded;
    ld = padded;
    x = by_memory && team.id ? w.x_second : w.x;
  }

  template <int ACT>
  void run(int64_t b, int64_t h) {
    const int64_t phase = c.pos[b] % big, n = c.len[b];
    if (n == 0) return;
    at(b, h);
    open(phase);
    int64_t chunk = 0;
    keep(b, h, chunk);
    for (int64_t slot = phase; slot < phase + n;) {
      const int64_t end = std::min((slot / small + 1) * small, phase + n);
      read<ACT>(slot, end, phase);
      if (c.update) {
        const bool memory = end % c.chunk_memory == 0, other = M > 1 && end % c.chunk_other == 0;
        if (memory && other && c.chunk_memory == c.chunk_other) {
          commit<ACT>({0, M, 0, c.Mf, 0, c.Ms}, big, end);
        } else {
          if (memory) commit<ACT>({0, 1, 0, 1, 0, 0}, c.chunk_memory, end);
          if (other) commit<ACT>({1, M, 1, c.Mf, 0, c.Ms}, c.chunk_other, end);
        }
        if (memory && end < phase + n) keep(b, h, ++chunk);
      }
      slot = end;
    }
    // no barrier: until the one in open(), the next head touches only what this thread left here itself
    if (c.update) close((phase + n) % big);
  }

 private:
  const TitansCall& c;
  const Workspace& w;
  const Team& team;
  const int64_t D, N, M, hid, R, big, small;
  // Two threads share the work evenly by memories: {memory, k} and {v, eta, alpha}. Then activations and
  // errors stay with the thread that made them. Otherwise every stage is shared by rows.
  const bool by_memory;
  Head g;
  const float *w2, *w1, *w1s;
  float *decay, *gain, *size, *weight, *eta;  // private: gamma[t,s] [C + 1, ld], step sizes [M, ld], and three times [ld]
  float* x;                                   // the memories' input, a panel
  int64_t ld;

  void at(int64_t b, int64_t h) {
    const int64_t row = b * c.H + h, token = b * c.T * c.H + h, slot = b * big * c.H + h;
    auto from = [](auto* p, int64_t offset) { return p ? p + offset : nullptr; };
    g.delta2 = c.delta2 + row * R * D, g.delta1 = c.delta1 + row * c.Mf * D * N, g.delta1s = from(c.delta1s, row * c.Ms * N);
    g.base2 = from(c.base2, h * R * D), g.base1 = from(c.base1, h * c.Mf * D * N), g.base1s = from(c.base1s, h * c.Ms * N);
    g.q = c.q + token * D, g.o = c.o + token * D;
    g.x = from(c.x, token * D), g.k = from(c.k, token * D), g.v = from(c.v, token * D);
    g.eta = from(c.eta, token), g.alpha = from(c.alpha, token);
    g.pending_k = c.pending_k + slot * D, g.pending_v = c.pending_v + slot * D;
    g.pending_eta = c.pending_eta + slot, g.pending_alpha = from(c.pending_alpha, slot);
    g.eta_bias = c.eta_bias ? c.eta_bias[h] : 0, g.alpha_bias = c.alpha_bias ? c.alpha_bias[h] : 0;
    w2 = c.base2 ? w.w2 : g.delta2, w1 = c.base1 ? w.w1 : g.delta1, w1s = c.base1s ? w.w1s : g.delta1s;
  }

  Range hidden_rows(int64_t a, int64_t b) const {  // this thread's hidden rows of [a, b)
    if (!by_memory) return team.share(a, b, 8);
    return team.id == 0 ? Range{0, 2 * N} : Range{2 * N, b};
  }

  Range output_rows(int64_t a, int64_t b) const {  // this thread's outputs: D per full memory, one per scalar memory
    if (!by_memory) return team.share(a, b, 8);
    return team.id == 0 ? Range{0, 2 * D} : Range{2 * D, b};
  }

  // This thread's tokens in stages that treat tokens apart: groups of eight; with by_memory all of them, of
  // its own tensors.
  Range own_lanes(int64_t tokens) const { return by_memory ? Range{0, tokens} : team.share(0, panels(tokens) * PANEL, 8).within(0, tokens); }
  bool owns_k() const { return !by_memory || team.id == 0; }
  bool owns_v() const { return !by_memory || team.id == 1; }

  void sync_rows() const {  // where one thread's rows are about to be read by another
    if (!by_memory) team.sync();
  }

  // -- start and end of a call ------------------------------------------------------------------------------------------------

  void open(int64_t phase) {
    if (c.base2) {
      sum(w.w2, g.base2, g.delta2, R * D);
      sum(w.w1, g.base1, g.delta1, c.Mf * D * N);
      sum(w.w1s, g.base1s, g.delta1s, c.Ms * N);
    }
    const int64_t step = c.H * D;
    for (int64_t t = team.id; c.update && t < phase; t += team.size) {
      std::memcpy(w.k_rows + t * D, g.pending_k + t * step, D * sizeof(float));
      std::memcpy(w.v_rows + t * D, g.pending_v + t * step, D * sizeof(float));
      w.eta[t] = g.pending_eta[t * c.H];
      w.alpha[t] = g.pending_alpha ? g.pending_alpha[t * c.H] : 1;
    }
    team.sync();
  }

  void sum(float* to, const float* a, const float* b, int64_t n) {
    Range r = team.share(0, n, 8);
    for (int64_t i = r.begin; i < r.end; i += 8) store(to + i, load(a + i) + load(b + i));
  }

  // M_memory's weights as the reads of the call's chunk number `chunk` see them
  void keep(int64_t b, int64_t h, int64_t chunk) {
    if (!c.kept2) return;
    const int64_t n = N * D, at = ((b * c.H + h) * c.kept + chunk) * n;
    // with by_memory they are thread 0's: nobody else may look at them between two barriers
    const Range own = !by_memory ? team.share(0, n, 8) : Range{0, team.id == 0 ? n : 0};
    std::memcpy(c.kept2 + at + own.begin, w2 + own.begin, (own.end - own.begin) * sizeof(float));
    std::memcpy(c.kept1 + at + own.begin, w1 + own.begin, (own.end - own.begin) * sizeof(float));
  }

  void close(int64_t fill) {
    team.sync();
    const int64_t step = c.H * D;
    for (int64_t t = team.id; t < big; t += team.size) {
      const bool kept = t < fill;
      if (kept) {
        std::memcpy(g.pending_k + t * step, w.k_rows + t * D, D * sizeof(float));
        std::memcpy(g.pending_v + t * step, w.v_rows + t * D, D * sizeof(float));
      } else {
        std::memset(g.pending_k + t * step, 0, D * sizeof(float));
        std::memset(g.pending_v + t * step, 0, D * sizeof(float));
      }
      g.pending_eta[t * c.H] = kept ? w.eta[t] : 0;
      if (g.pending_alpha) g.pending_alpha[t * c.H] = kept ? w.alpha[t] : 0;
    }
  }

  // -- reads: slots [slot, end) of one chunk of the faster clock --------------------------------------------------------------

  template <int ACT>
  void read(int64_t slot, int64_t end, int64_t phase) {
    const int64_t step = c.H * D, lane0 = slot % small, lane1 = lane0 + end - slot, token = slot - phase;
    const bool produce = c.update && c.self_modifying;
    const Range lanes = own_lanes(small).within(lane0, lane1);
    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      const int64_t t = token + p * PANEL + a - lane0;
      if (owns_k()) load_lanes(w.q + p * D * PANEL, g.q + t * step, step, D, a, b);
      if (produce) load_lanes(x + p * D * PANEL, g.x + t * step, step, D, a, b);
    });
    sync_rows();

    const int64_t p0 = lane0 / PANEL, p1 = panels(lane1);
    auto half = [&](int64_t p) { return lane1 - p * PANEL <= 8; };
    const Range rows = hidden_rows(0, produce ? hid : N);
    for_blocks(rows.within(0, N), p0, p1, [&](Range r, int64_t p) { activate<ACT>(r, w.q + p * D * PANEL, w.hidden + p * hid * PANEL, half(p)); });
    if (produce) {
      for_blocks(rows.within(N, hid), p0, p1, [&](Range r, int64_t p) { activate<ACT>(r, x + p * D * PANEL, w.hidden + p * hid * PANEL, half(p)); });
    }
    sync_rows();

    const int64_t full = produce ? 3 * D : D, total = full + (produce ? c.Ms : 0);
    const Range outs = output_rows(0, total);
    for (int64_t f = 0; f < full / D; f++) {
      for_blocks(outs.within(f * D, (f + 1) * D), p0, p1, [&](Range r, int64_t p) {
        const float *in = (f == 0 ? w.q : x) + p * D * PANEL, *hidden = w.hidden + (p * hid + f * N) * PANEL;
        float* out = w.out + p * c.Mf * D * PANEL;
        panel_product(r.begin, r.end, N, w1, N, 1, hidden, half(p), [&](int64_t i, auto& acc) {
          add_rows(acc, in, i - f * D);
          store_rows(out, i, acc);
        });
      });
    }
    if (outs.within(full, total).begin < outs.end && produce) {
      for (int64_t p = p0; p < p1; p++)
        for (int64_t s = outs.within(full, total).begin - full; s < outs.end - full; s++)
          scalar_output(s, w.hidden + (p * hid + (c.Mf + s) * N) * PANEL, x + p * D * PANEL, w.gates + (p * c.Ms + s) * PANEL);
    }
    sync_rows();

    for_panels(lanes, [&](int64_t p, int64_t a, int64_t b) {
      float* out = w.out + p * c.Mf * D * PANEL;
      const int64_t lane = p * PANEL + a, t = token + lane - lane0, s = (slot + lane - lane0) % big;
      if (owns_k()) store_lanes(out, g.o + t * step, step, D, a, b);
      if (produce && owns_k()) {
        if (c.qk_l2norm) normalize_lanes(out + D * PANEL + a / 8 * 8, D);
        store_lanes(out + D * PANEL, w.k_rows + s * D, D, D, a, b);
      }
      if (produce && owns_v()) {
        store_lanes(out + 2 * D * PANEL, w.v_rows + s * D, D, D, a, b);
        for (int64_t j = a; j < b; j++) gates(s + j - a, w.gates + p * c.Ms * PANEL + j);
      }
      for (int64_t j = 0; c.update && !produce && j < b - a; j++) {
        std::memcpy(w.k_rows + (s + j) * D, g.k + (t + j) * step, D * sizeof(float));
        std::memcpy(w.v_rows + (s + j) * D, g.v + (t + j) * step, D * sizeof(float));
        w.eta[s + j] = g.eta[(t + j) * c.H];
        w.alpha[s + j] = g.alpha ? g.alpha[(t + j) * c.H] : 1;
      }
    });
    if (big != small) team.sync();  // else the next stage keeps to the same lanes
  }

  // w.eta[s], w.alpha[s] from the scalar memories' outputs, 16 floats apart
  void gates(int64_t s, const float* raw) {
    const float eta = raw[0] + g.eta_bias;
    const float act = c.softplus ? (eta > 20 ? eta : std::log1p(std::exp(eta))) : 1 / (1 + std::exp(-eta));
    w.eta[s] = c.eta_scale * act;
    w.alpha[s] = c.retention ? 1 / (1 + std::exp(-(raw[PANEL] + g.alpha_bias))) : 1;
  }

  template <int ACT>
  void activate(Range r, const float* in, float* hidden, bool half) {
    panel_product(r.begin, r.end, D, w2, D, 1, in, half, [&](int64_t i, auto& acc) { store_rows(hidden, i, acc); });
    for (int64_t i = r.begin * PANEL; i < r.end * PANEL; i += step_of(half)) store(hidden + i, sigma<ACT>(load(hidden + i)));
  }

  // M(x) of scalar memory s for one panel: w1s a, plus the skip row
  void scalar_output(int64_t s, const float* a, const float* in, float* out) {
    for (int v = 0; v < PANEL; v += 8) {
      f8 y = four_chains(w1s + s * N, a + v, N);
      if (c.scalar_skip) y = y + four_chains(w2 + (hid + s) * D, in + v, D);
      store(out + v, y);
    }
  }

  // -- the write: C tokens up to slot `end` into the memories of a group ---------------------------------------------------------

  template <int ACT>
  void commit(const Group& m, int64_t C, int64_t end) {
    const int64_t first = (end - C) % big, P = panels(C);
    const float *k_rows = w.k_rows + first * D, *v_rows = w.v_rows + first * D;
    auto half = [&](int64_t p) { return C - p * PANEL <= 8; };
    const int64_t lead = m.f0 * D, full = m.f1 * D, h0 = m.m0 * N, h1 = m.m1 * N;
    const float scale = c.objective_dot ? 1 : c.grad_scale;
    const bool delta_form = c.own_values && !c.target_norm && !c.objective_dot;  // M(k) - M(v) with one product

    for_panels(own_lanes(C), [&](int64_t p, int64_t a, int64_t b) {
      if (owns_k()) load_lanes(w.k + p * D * PANEL, k_rows + (p * PANEL + a) * D, D, D, a, b);
      if (owns_v()) load_lanes(w.v + p * D * PANEL, v_rows + (p * PANEL + a) * D, D, D, a, b);
    });
    team.sync();
    products(w.alpha + first, C);
    std::memcpy(eta, w.eta + first, C * sizeof(float));

    // z, sigma, sigma' at the keys; sigma at the values; delta2 k
    const Range rows = hidden_rows(h0, h1);
    for_blocks(rows, 0, P, [&](Range r, int64_t p) {
      float *a = w.a + p * hid * PANEL, *av = w.av + p * hid * PANEL, *slope = w.d + p * R * PANEL, *zd = w.zd + p * R * PANEL;
      auto into = [&](float* to) { return [to](int64_t i, auto& acc) { store_rows(to, i, acc); }; };
      panel_product(r.begin, r.end, D, w2, D, 1, w.k + p * D * PANEL, half(p), into(a));
      if (c.dgd && c.base2) panel_product(r.begin, r.end, D, g.delta2, D, 1, w.k + p * D * PANEL, half(p), into(zd));
      if (c.dgd && !c.base2) std::memcpy(zd + r.begin * PANEL, a + r.begin * PANEL, (r.end - r.begin) * PANEL * sizeof(float));
      const Range values = c.own_values ? r : r.within(m.f1 * N, h1);
      panel_product(values.begin, values.end, D, w2, D, 1, w.v + p * D * PANEL, half(p), into(av));
      for (int64_t i = r.begin * PANEL; i < r.end * PANEL; i += step_of(half(p))) {
        f8 s, x = sigma<ACT>(load(a + i), s);
        store(a + i, x);
        store(slope + i, s);
      }
      const int64_t split = delta_form ? std::max(values.begin, std::min(values.end, m.f1 * N)) : values.begin;
      for (int64_t i = values.begin * PANEL; i < split * PANEL; i += step_of(half(p))) store(av + i, load(a + i) - sigma<ACT>(load(av + i)));
      for (int64_t i = split * PANEL; i < values.end * PANEL; i += step_of(half(p))) store(av + i, sigma<ACT>(load(av + i)));
      for (int64_t i = r.begin; i < r.end; i += 8)
        for (int64_t t = 0; t < PANEL && p * PANEL + t < C; t += 8) transpose8(a + i * PANEL + t, PANEL, w.at + (p * PANEL + t) * hid + i, hid);
    });
    if (c.dgd && c.scalar_skip && team.id == team.size - 1) {  // delta2 k of the skip rows
      for (int64_t p = 0; p < P; p++)
        panel_product(hid + m.s0, hid + m.s1, D, g.delta2, D, 1, w.k + p * D * PANEL, half(p), [&](int64_t i, auto& acc) {
          store_rows(w.zd + p * R * PANEL, i, acc);
        });
    }
    if (c.dgd || c.step_clip) {
      const Range own = clock_share(C, 4);
      for (int64_t p = 0; p < P; p++)
        panel_product(own.begin, own.end, D, k_rows, D, 1, w.k + p * D * PANEL, half(p), [&](int64_t i, auto& acc) {
          for (size_t j = 0; j < sizeof(acc) / sizeof(acc[0]); j++)
            for (size_t v = 0; v < sizeof(acc[0]) / sizeof(f8); v++) store(w.gram + (i + j) * ld + p * PANEL + 8 * v, acc[j][v]);
        });
    }
    sync_rows();

    // errors at the outputs
    const Range outs = output_rows(lead, full + (m.s1 - m.s0));
    for (int64_t f = m.f0; f < m.f1; f++) {
      for_blocks(outs.within(f * D, (f + 1) * D), 0, P, [&](Range r, int64_t p) {
        const float *k = w.k + p * D * PANEL, *v = w.v + p * D * PANEL;
        float *e = w.e + p * c.Mf * D * PANEL, *target = w.target + p * c.Mf * D * PANEL;
        const float *a = w.a + (p * hid + f * N) * PANEL, *av = w.av + (p * hid + f * N) * PANEL;
        if (delta_form) {
          panel_product(r.begin, r.end, N, w1, N, 1, av, half(p), [&](int64_t i, auto& acc) {
            add_rows(acc, k, i - f * D);
            finish(acc, v, i - f * D, scale);
            store_rows(e, i, acc);
          });
          return;
        }
        if (c.own_values) {
          panel_product(r.begin, r.end, N, w1, N, 1, av, half(p), [&](int64_t i, auto& acc) {
            add_rows(acc, v, i - f * D);
            store_rows(target, i, acc);
          });
        } else {
          for (int64_t i = r.begin; i < r.end; i++) std::memcpy(target + i * PANEL, v + (i - f * D) * PANEL, PANEL * sizeof(float));
        }
        if (!c.objective_dot)
          panel_product(r.begin, r.end, N, w1, N, 1, a, half(p), [&](int64_t i, auto& acc) {
            add_rows(acc, k, i - f * D);
            store_rows(e, i, acc);
          });
      });
    }
    const Range scalars = outs.within(full, full + m.s1 - m.s0);
    for (int64_t i = scalars.begin; i < scalars.end; i++)
      for (int64_t p = 0; p < P; p++) scalar_error(m.s0 + i - full, p, scale);
    sync_rows();
    if (!delta_form) {
      const Range owned = by_memory ? Range{outs.begin / D, std::min(outs.end / D, m.f1)} : Range{m.f0, m.f1};
      for_panels(own_lanes(C), [&](int64_t p, int64_t a, int64_t) { target_errors(owned, p, a / 8 * 8, scale); });
      sync_rows();
    }

    // d at the hidden layer, and the sums the clip needs
    for (int64_t f = m.f0; f < m.f1; f++) {
      const Range own = rows.within(f * N, (f + 1) * N);
      for_blocks(own, 0, P, [&](Range r, int64_t p) {
        float* d = w.d + p * R * PANEL;
        panel_product(r.begin - f * N, r.end - f * N, D, w1 + f * D * N, 1, N, w.e + (p * c.Mf + f) * D * PANEL, half(p), [&](int64_t i, auto& acc) {
          multiply_rows(acc, d, i + f * N);
          store_rows(d, i + f * N, acc);
        });
      });
    }
    for (int64_t s = m.s0; s < m.s1; s++) {
      const int64_t top = (c.Mf + s) * N;
      const Range own = rows.within(top, top + N);
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = own.begin; i < own.end; i++)
          for (int64_t v = 0; v < PANEL; v += 8) {
            float* d = w.d + (p * R + i) * PANEL + v;
            store(d, load(d) * (all(w1s[i - top + s * N]) * load(w.es + (p * c.Ms + s) * PANEL + v)));
          }
    }
    if (c.step_clip) {
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = rows.begin; i < rows.end; i += 8) {
          partial_norm(w.a + (p * hid + i) * PANEL, w.norms + i / 8 * ld + p * PANEL);
          partial_norm(w.d + (p * R + i) * PANEL, w.norms + (hid / 8 + i / 8) * ld + p * PANEL);
        }
    }
    transform_keys(k_rows, C);
    team.sync();

    for (int64_t i = by_memory ? rows.begin / N : m.m0; i < (by_memory ? rows.end / N : m.m1); i++) step_sizes(i, C, scale);
    update_inputs(m, rows, C);
    update_outputs(m, outs, C);
    sync_rows();
  }

  // scale * (acc - v)
  template <int MR, int NV>
  static HK_INLINE void finish(f8 (&acc)[MR][NV], const float* panel, int64_t r, float scale) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[i][v] = (acc[i][v] - load(panel + (r + i) * PANEL + 8 * v)) * all(scale);
  }

  static HK_INLINE void partial_norm(const float* rows, float* to) {
    for (int v = 0; v < PANEL; v += 8) {
      f8 s = all(0);
      for (int i = 0; i < 8; i++) s = fma(load(rows + i * PANEL + v), load(rows + i * PANEL + v), s);
      store(to + v, s);
    }
  }

  // decay[t * ld + s] = gamma[t,s] for 0 <= s <= t <= C
  void products(const float* alpha, int64_t C) {
    for (int64_t t = 0; t <= C; t++) {
      for (int64_t s = 0; s < t; s++) decay[t * ld + s] = alpha[t - 1] * decay[(t - 1) * ld + s];
      if (t < ld) decay[t * ld + t] = 1;
    }
  }

  // gamma[C, t] for t = 1 .. C (tokens counted from 0: t + 1)
  float kept(int64_t C, int64_t t) const { return t + 1 == C ? 1 : decay[C * ld + t + 1]; }

  // Shares of what all memories have in common. With by_memory thread 0 does it: it has a memory's
  // activations less to compute.
  Range clock_share(int64_t n, int64_t unit) const {
    if (!by_memory) return team.share(0, n, unit);
    return team.id == 0 ? Range{0, n} : Range{0, 0};
  }

  // Kg by back substitution, this thread's columns
  void transform_keys(const float* k_rows, int64_t C) {
    const Range cols = clock_share(D, 8);
    int64_t d = cols.begin;
    for (; d + 32 <= cols.end; d += 32) substitute<4>(k_rows + d, w.keys + d, C);
    for (; d < cols.end; d += 8) substitute<1>(k_rows + d, w.keys + d, C);
  }

  template <int NV>
  void substitute(const float* k, float* keys, int64_t C) {
    for (int64_t s = C - 1; s >= 0; s--) {
      f8 x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) x[v] = all(kept(C, s)) * load(k + s * D + 8 * v);
      for (int64_t t = C - 1; c.dgd && t > s; t--) {
        // tokens s, t from 0: gamma[t-1, s] of the README is decay[t, s + 1]
        const f8 y = all(decay[t * ld + s + 1] * w.gram[t * ld + s] * eta[t]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) x[v] = fnma(y, load(keys + t * D + 8 * v), x[v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) store(keys + s * D + 8 * v, x[v]);
    }
  }

  void scalar_error(int64_t s, int64_t p, float scale) {
    const float *k = w.k + p * D * PANEL, *v = w.v + p * D * PANEL;
    float *e = w.es + (p * c.Ms + s) * PANEL, *target = w.target_s + (p * c.Ms + s) * PANEL;
    scalar_output(s, w.av + (p * hid + (c.Mf + s) * N) * PANEL, v, target);
    if (!c.objective_dot) scalar_output(s, w.a + (p * hid + (c.Mf + s) * N) * PANEL, k, e);
    for (int i = 0; i < PANEL; i += 8) {
      f8 t = load(target + i);
      if (c.target_norm) t = _mm256_max_ps(all(-1), _mm256_min_ps(all(1), t));
      store(e + i, c.objective_dot ? -t : (load(e + i) - t) * all(scale));
    }
  }

  // e = scale (M(k) - target) or -target, the target normalised, for eight lanes
  void target_errors(Range full, int64_t p, int64_t lane, float scale) {
    for (int64_t f = full.begin; f < full.end; f++) {
      float *e = w.e + (p * c.Mf + f) * D * PANEL + lane, *target = w.target + (p * c.Mf + f) * D * PANEL + lane;
      if (c.target_norm) normalize_lanes(target, D);
      for (int64_t d = 0; d < D; d++) {
        f8 t = load(target + d * PANEL);
        store(e + d * PANEL, c.objective_dot ? -t : (load(e + d * PANEL) - t) * all(scale));
      }
    }
  }

  // gain[i] = eta~ of memory i; every thread for itself
  void step_sizes(int64_t i, int64_t C, float scale) {
    float* to = gain + i * ld;
    if (!c.step_clip) {
      std::memcpy(to, eta, C * sizeof(float));
      return;
    }
    for (int64_t t = 0; t < C; t += 8) {
      const int64_t p = t / PANEL, lane = t % PANEL;
      f8 a2 = all(0), d2 = all(0), e2;
      for (int64_t r = i * N / 8; r < (i + 1) * N / 8; r++) {
        a2 = a2 + load(w.norms + r * ld + t);
        d2 = d2 + load(w.norms + (hid / 8 + r) * ld + t);
      }
      if (i < c.Mf) {
        e2 = squares(w.e + (p * c.Mf + i) * D * PANEL + lane, D);
      } else {
        f8 e = load(w.es + (p * c.Ms + i - c.Mf) * PANEL + lane);
        e2 = e * e;
      }
      // where a square overflows S does and the step is 0; bounds, since inf / inf and 0 inf would be NaN
      const f8 m = _mm256_sqrt_ps(a2 + d2 / (_mm256_min_ps(all(FLT_MAX), e2) + all(1e-9f)) + all(1e-12f));
      store(size + t, _mm256_min_ps(all(1e30f), m));
    }
    for (int64_t t = 0; t < C; t++) weight[t] = eta[t] * size[t] > FLT_MAX ? FLT_MAX : eta[t] * size[t];
    for (int64_t t = 0; t < C; t += 8) {
      f8 s = all(0);
      for (int64_t j = 0; j < C; j++) {
        f8 k = load(w.gram + j * ld + t);
        s = fma(all(weight[j]), k * k, s);
      }
      f8 S = all(scale) * load(size + t) * s;
      store(to + t, load(eta + t) / _mm256_max_ps(all(1), S));
    }
  }

  // w2 and its skip rows: delta2 <- gamma[C,0] delta2 - U^T Kg
  void update_inputs(const Group& m, Range rows, int64_t C) {
    const int64_t P = panels(C);
    const float g_end = decay[C * ld];
    float* erase = weight;  // eta_t gamma[t-1,0]
    for (int64_t t = 0; t < C; t++) erase[t] = eta[t] * decay[t * ld];
    auto factor = [&](int64_t row, int64_t memory, const float* grad, int64_t p) {
      float *u = w.d + (p * R + row) * PANEL, *zd = w.zd + (p * R + row) * PANEL;
      for (int64_t v = 0; v < PANEL; v += 8) {
        f8 x = load(gain + memory * ld + p * PANEL + v) * load(grad + v);
        store(u + v, c.dgd ? fma(load(erase + p * PANEL + v), load(zd + v), x) : x);
      }
    };
    auto done = [&](int64_t r, int64_t col, auto& acc) { advance(g.delta2, g.base2, w.w2, g_end, r * D + col, D, acc); };
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK) {
      const int64_t stop = std::min(r + BLOCK, rows.end);
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = r; i < stop; i++) factor(i, i / N, w.d + (p * R + i) * PANEL, p);
      outer_product(r, stop, D, C, w.d, R * PANEL, w.keys, D, done);
    }
    if (c.scalar_skip && team.id == team.size - 1) {
      for (int64_t p = 0; p < P; p++)
        for (int64_t s = m.s0; s < m.s1; s++) factor(hid + s, c.Mf + s, w.es + (p * c.Ms + s) * PANEL, p);
      outer_product(hid + m.s0, hid + m.s1, D, C, w.d, R * PANEL, w.keys, D, done);
    }
  }

  // w1 and w1s: delta1 <- gamma[C,0] delta1 - sum gain gamma[C,t] e a^T
  void update_outputs(const Group& m, Range outs, int64_t C) {
    const int64_t P = panels(C);
    const float g_end = decay[C * ld];
    float* end = weight;
    for (int64_t t = 0; t < C; t++) end[t] = kept(C, t);
    for (int64_t f = m.f0; f < m.f1; f++) {
      const Range own = outs.within(f * D, (f + 1) * D);
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = own.begin; i < own.end; i++) step_rows(w.target, w.e, p, c.Mf * D, i, f, end);
      outer_product(own.begin, own.end, N, C, w.target, c.Mf * D * PANEL, w.at + f * N, hid, [&](int64_t r, int64_t col, auto& acc) {
        advance(g.delta1, g.base1, w.w1, g_end, r * N + col, N, acc);
      });
    }
    const Range scalars = outs.within(m.f1 * D, outs.end);
    for (int64_t i = scalars.begin; i < scalars.end; i++) {
      const int64_t s = m.s0 + i - m.f1 * D;
      for (int64_t p = 0; p < P; p++) step_rows(w.target_s, w.es, p, c.Ms, s, c.Mf + s, end);
      outer_product(s, s + 1, N, C, w.target_s, c.Ms * PANEL, w.at + (c.Mf + s) * N, hid, [&](int64_t r, int64_t col, auto& acc) {
        advance(g.delta1s, g.base1s, w.w1s, g_end, r * N + col, N, acc);
      });
    }
  }

  // to = gain end e for row i of a panel
  void step_rows(float* to, const float* e, int64_t p, int64_t height, int64_t i, int64_t memory, const float* end) {
    for (int64_t v = 0; v < PANEL; v += 8) {
      const int64_t at = (p * height + i) * PANEL + v;
      store(to + at, load(gain + memory * ld + p * PANEL + v) * load(end + p * PANEL + v) * load(e + at));
    }
  }

  // delta <- keep * delta - acc, w <- base + delta, for a tile whose first element is at `at`
  template <int MR, int NV>
  static HK_INLINE void advance(float* delta, const float* base, float* to, float keep, int64_t at, int64_t step, f8 (&acc)[MR][NV]) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        const int64_t j = at + i * step + 8 * v;
        f8 x = _mm256_fmsub_ps(all(keep), load(delta + j), acc[i][v]);
        store(delta + j, x);
        if (base) store(to + j, x + load(base + j));
      }
  }

  // A panel's vectors: both halves of its rows, or the first ones only.
  static int64_t step_of(bool half) { return half ? PANEL : 8; }

  // -- loops ---------------------------------------------------------------------------------------------------------------------

  // f(panel, first lane, last lane) over a range of lanes, cut where lane groups of eight and panels end
  template <class F>
  static void for_panels(Range lanes, F f) {
    for (int64_t a = lanes.begin; a < lanes.end;) {
      const int64_t b = std::min(lanes.end, a / 8 * 8 + 8), p = a / PANEL;
      f(p, a - p * PANEL, b - p * PANEL);
      a = b;
    }
  }

  // f(rows, panel): a block of rows meets every panel while it is in the cache
  template <class F>
  static void for_blocks(Range rows, int64_t p0, int64_t p1, F f) {
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK)
      for (int64_t p = p0; p < p1; p++) f(Range{r, std::min(r + BLOCK, rows.end)}, p);
  }
};

void scan(const TitansCall& c, const Workspace& work, const Team& team, float* mine, int64_t b, int64_t h) {
  Scan s(c, work, team, mine);
  switch (c.activation) {
    case GELU: return s.run<GELU>(b, h);
    case SILU: return s.run<SILU>(b, h);
    default: return s.run<GELU_TANH>(b, h);
  }
}

struct Memory {  // zeroed, 64-byte aligned
  float* data;
  explicit Memory(int64_t floats)
      : data(floats > MOST_FLOATS ? nullptr : static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, floats * sizeof(float));
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

void all_heads(const TitansCall& c) {
  const int64_t groups = c.B * c.H;
  Workspace sizes;
  const int64_t floats = sizes.carve(c, nullptr);
  const int threads = static_cast<int>(c.threads);
  const bool together = groups < threads;  // all threads on one (row, head), or one on each
  const int works = together ? 1 : threads;
  Memory memory(floats > MOST_FLOATS ? floats : floats * works);
  std::vector<Workspace> work(works);
  for (int i = 0; i < works; i++) work[i].carve(c, memory.data + i * floats);
  // every thread's own floats are asked for here, since an exception must not leave the parallel region;
  // pages come as they are touched
  const int64_t own = Scan::own_floats(c);
  const std::unique_ptr<float, void (*)(void*)> mine(static_cast<float*>(std::calloc(own * threads, sizeof(float))), std::free);
  if (!mine) throw std::bad_alloc();
  Barrier barrier;
  in_parallel(threads, [&](int id, int n) {
    const FlushDenormals guard;
    const Team team = together ? Team{id, n, &barrier} : Team{0, 1, nullptr};
    for (int64_t i = together ? 0 : id; i < groups; i += together ? 1 : n) {
      scan(c, work[together ? 0 : id], team, mine.get() + id * own, i / c.H, i % c.H);
    }
  });
}

bool sizes_fit(const TitansCall& c) {
  const int64_t big = std::max(c.chunk_memory, c.chunk_other), small = std::min(c.chunk_memory, c.chunk_other);
  const int64_t scalars = c.self_modifying ? 1 + (c.retention != 0) : 0;
  return width(c.D) && width(c.N) && c.H > 0 && c.Mf == (c.self_modifying ? 3 : 1) && c.Ms == scalars && small > 0 && big <= LARGEST &&
         big % small == 0 && extents({c.B, c.T, c.H, c.D}) && extents({c.B, c.H, c.Mf + c.Ms, c.N + 1, c.D}) && extents({c.B, big, c.H, c.D}) &&
         extents({c.B, c.H, c.kept, c.N, c.D}) && extents({big, c.Mf + c.Ms, c.N + 1}) && threads_fit(c.threads) &&
         c.activation >= GELU_TANH && c.activation <= SILU;
}

// for a call that has tokens
bool pointers_fit(const TitansCall& c) {
  if (!all_given({c.delta2, c.delta1, c.q, c.o, c.pos, c.len, c.pending_k, c.pending_v, c.pending_eta})) return false;
  if ((c.Ms && !c.delta1s) || !c.base2 != !c.base1 || !(c.base2 && c.Ms) != !c.base1s || !c.kept2 != !c.kept1) return false;
  if (!rows_fit(c.B, c.T, c.pos, c.len)) return false;
  if (c.kept2 && !(c.update ? kept_fit(c.B, c.kept, c.chunk_memory, c.pos, c.len) : c.kept > 0)) return false;
  return !c.update || (c.self_modifying ? c.x != nullptr : all_given({c.k, c.v, c.eta}));
}

}  // namespace

extern "C" int hope_titans_abi() { return 4; }

extern "C" int hope_titans_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern "C" int hope_titans_scan(const TitansCall* call) {
  if (!call || !sizes_fit(*call)) return BAD_ARGUMENT;
  if (call->B * call->T == 0) return DONE;
  if (!pointers_fit(*call)) return BAD_ARGUMENT;
  try {
    all_heads(*call);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
