// The memories of a block in a decoder's step: the bits of hope_titans_scan, and the chunks are committed by its code.
#pragma once
#include "titans_heads.h"
#include "token_state.h"
#include "width.h"

class MemoriesStep {
 public:
  // tails: [B, W - 1, d] of the work space, what the next token's convolution needs
  MemoriesStep(const TokenState& step, const TokenMemories& memories, float* tails)
      : s(step), c(step.c), w(step.w), m(memories), t(memories.titans), tails(tails), B(step.B), d(step.d) {}

  void read(const float* gain) const {
    s.norm(w.h, gain);
    const float *u = w.n, *x = w.n;
    if (m.conv) {
      s.each(B, [&](int64_t b) { convolve(b); });
      u = x = w.u;
      s.team.sync();
    }
    if (m.in_proj) {
      s.project(d, d, u, m.in_proj, w.x);
      x = w.x;
      s.team.sync();
    }
    if (m.q_proj) s.project(d, d, x, m.q_proj, w.q);
    if (m.k_proj) s.project(d, d, x, m.k_proj, w.k), s.project(d, d, x, m.v_proj, w.v);
    if (m.eta_proj) s.project(t.H, d, x, m.eta_proj, w.eta);
    if (m.alpha_proj) s.project(t.H, d, x, m.alpha_proj, w.alpha);
    if (m.beta_proj) s.project(t.H, d, x, m.beta_proj, w.beta);
    if (m.gate_proj) s.project(d, d, w.n, m.gate_proj, w.gate);
    s.team.sync();
    s.each(B * t.H, [&](int64_t g) { head(g, x); });
    s.team.sync();
    // the heads of a row, [H, D], are its d numbers
    if (m.post_gain) {
      if (m.out_proj) s.project(d, d, w.o, m.out_proj, w.x);
      s.join(m.out_proj ? w.x : w.o, m.post_gain);
    } else if (m.out_proj) {
      product(s.team, B, d, d, w.o, shared(m.out_proj), [&](int64_t b, int64_t r, float y) { w.h[b * d + r] += y; });
    } else {
      s.each(B, [&](int64_t b) {
        const FlushDenormals flush;
        for (int64_t i = b * d; i < (b + 1) * d; i += 8) store(w.h + i, load(w.h + i) + load(w.o + i));
      });
    }
  }

  // Commits the chunks that are full, and keeps the inputs of the next token's convolution. scratch: what a scan
  // works with, and own: what each of its threads has to itself; null where no chunk is full.
  void advance(float* scratch, float* own) const {
    s.each(B * t.H, [&](int64_t g) {
      const int64_t b = g / t.H, h = g % t.H;
      if (!closes(t, b)) return;
      (wide() ? avx512::commit_open : commit_open)(t, b, h, slot(t, b) + 1, scratch, own);
      pack(t, b, h, m.packed + g * packed_floats(t));
    });
    for (int64_t b = 0; m.count && s.team.id == 0 && b < B; b++) m.count[b]++;
    const int64_t n = (c.W - 1) * d;
    if (m.conv && n) s.each(B, [&](int64_t b) { std::memcpy(m.tail + b * n, tails + b * n, n * sizeof(float)); });
  }

  // Takes the token out of the open chunks again.
  void undo() const {
    s.each(B * t.H, [&](int64_t g) {
      const TokenRead to = place(g);
      std::memset(to.k, 0, t.D * sizeof(float));
      std::memset(to.v, 0, t.D * sizeof(float));
      *to.eta = 0;
      if (t.retention) *to.alpha = 0;
      if (t.s2) *beta(g) = 0;
    });
  }

  // Whether row b's token closes a chunk.
  static bool closes(const TitansCall& t, int64_t b) {
    return (slot(t, b) + 1) % std::min(t.chunk_memory, t.chunk_other) == 0;
  }

 private:
  const TokenState& s;
  const TokenCall& c;
  const TokenBuffers& w;
  const TokenMemories& m;
  const TitansCall& t;
  float* const tails;
  const int64_t B, d;

  static int64_t slot(const TitansCall& t, int64_t b) { return t.pos[b] % std::max(t.chunk_memory, t.chunk_other); }

  // w.u_b: as hope_conv has it.
  void convolve(int64_t b) const {
    const int64_t W = c.W;
    const float *before = m.tail + b * (W - 1) * d, *now = w.n + b * d;
    for (int64_t i = 0; i < d; i++) {
      const float* weight = m.conv + i * W;
      float sum = weight[0] * (W > 1 ? before[i] : now[i]);
      for (int64_t j = 1; j < W; j++) sum = std::fma(weight[j], j < W - 1 ? before[j * d + i] : now[i], sum);
      w.u[b * d + i] = sum;
    }
    if (W == 1) return;
    float* next = tails + b * (W - 1) * d;
    std::memcpy(next, before + d, (W - 2) * d * sizeof(float));
    std::memcpy(next + (W - 2) * d, now, d * sizeof(float));
  }

  // Head g's slot of the open chunk.
  int64_t place_of(int64_t g) const {
    const int64_t b = g / t.H;
    return (b * std::max(t.chunk_memory, t.chunk_other) + slot(t, b)) * t.H + g % t.H;
  }

  float* beta(int64_t g) const { return t.pending_beta + place_of(g); }

  // Where head g of the batch reads and writes.
  TokenRead place(int64_t g) const {
    const int64_t h = g % t.H, at = place_of(g);
    return {w.q + g * t.D, nullptr, w.o + g * t.D, t.pending_k + at * t.D, t.pending_v + at * t.D,
            t.pending_eta + at, t.retention ? t.pending_alpha + at : nullptr, t.eta_bias[h],
            t.retention ? t.alpha_bias[h] : 0};
  }

  void head(int64_t g, const float* x) const {
    TokenRead to = place(g);
    to.x = x + g * t.D;
    if (m.q_proj && t.qk_l2norm) unit_row(to.q, t.D, to.q);
    const FlushDenormals flush;
    float* hidden = w.own + s.team.id * w.ahead;
    read_token(t, m.packed + g * packed_floats(t), to, hidden);
    if (!t.self_modifying) give(g, to);
    if (t.s2) *beta(g) = m.beta_proj ? sigmoid(w.beta[g] + m.beta_bias[g % t.H]) : m.beta;
    const float* gain = m.out_gain ? m.out_gain + g % t.H * t.D : nullptr;
    gate_row(to.o, gain, m.gate_proj ? w.gate + g * t.D : nullptr, t.D, to.o);
  }

  // k, v, eta and alpha of memories that do not make their own
  void give(int64_t g, const TokenRead& to) const {
    const float* k = w.k + g * t.D;
    if (t.qk_l2norm) unit_row(k, t.D, to.k);
    else std::memcpy(to.k, k, t.D * sizeof(float));
    std::memcpy(to.v, w.v + g * t.D, t.D * sizeof(float));
    *to.eta = eta_of(t, w.eta[g], to.eta_bias);
    if (t.retention) *to.alpha = alpha_of(t, w.alpha[g], to.alpha_bias);
  }
};
