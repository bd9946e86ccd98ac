// What the parts of a decoder's step share: the call, its buffers, the team that computes it, and rows of the stream.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_call.h"
#include "titans_token.h"
#include "token.h"
#include "token_product.h"

// h: the residual stream [B, d]; n: its norm; the others: of one mixer or level, `wide` or `hidden` numbers a row.
struct TokenBuffers {
  float *h, *n, *u, *x, *q, *far, *gate, *o, *hidden, *gates, *thin, *tails, *own;
  float *k, *v, *eta, *alpha, *beta;  // of memories that are given theirs: of a row, d, d and H, H, H before their gates
  int64_t ahead;  // floats between two threads' part of `own`

  // Assigns every buffer in `base`; returns the number of floats (base may be null to ask for it).
  int64_t carve(const TokenCall& c, float* base) {
    int64_t used = 0, wide = c.d, hidden_units = 8, gated = 0, rank = 0, tail = 0, given = 0, heads = 0;
    ahead = 16;
    for (int64_t i = 0; i < c.blocks; i++) {
      const TokenBlock& block = c.block[i];
      if (const TokenMemories* m = block.memories) {
        ahead = std::max(ahead, (m->titans.Mf + m->titans.Ms) * m->titans.N), tail = c.W - 1;
        if (m->k_proj) given = c.d;
        if (m->k_proj || m->beta_proj) heads = std::max(heads, m->titans.H);
      } else {
        const AttentionCall& a = block.attention->call;
        ahead = std::max(ahead, attention_floats(a)), wide = std::max(wide, a.H * a.D);
      }
      for (int64_t l = 0; l < block.levels; l++) {
        hidden_units = std::max(hidden_units, block.level[l].N);
        if (block.level[l].gate) gated = std::max(gated, block.level[l].N);
        rank = std::max(rank, block.level[l].low.rank);
      }
    }
    ahead = (ahead + 15) / 16 * 16 + 16;
    auto take = [&](float*& p, int64_t n) {
      p = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16 + 16;
    };
    const int64_t n = c.B * c.d;
    take(h, n), take(this->n, n), take(u, n), take(x, n), take(gate, n);
    take(k, c.B * given), take(v, c.B * given);
    for (float** of : {&eta, &alpha, &beta}) take(*of, c.B * heads);
    take(q, c.B * wide), take(far, c.B * wide), take(o, c.B * wide);
    take(hidden, c.B * hidden_units), take(gates, c.B * gated), take(thin, c.B * rank);
    take(tails, c.blocks * n * std::max<int64_t>(tail, 0)), take(own, c.threads * ahead);
    return used;
  }
};

// y = rmsnorm(x) gain, of n numbers: as hope_rms_norm has it
inline void rms_row(const float* x, int64_t n, float eps, const float* gain, float* y) {
  const FlushDenormals flush;
  const f8 factor = all(1 / std::sqrt(four_chains_of(x, x, n) / n + eps));
  for (int64_t i = 0; i < n; i += 8) store(y + i, load(x + i) * factor * load(gain + i));
}

struct TokenState {
  const TokenCall& c;
  const TokenBuffers& w;
  const Team& team;
  const int64_t B, d;

  TokenState(const TokenCall& call, const TokenBuffers& buffers, const Team& team)
      : c(call), w(buffers), team(team), B(c.B), d(c.d) {}

  // f(i) for i in [0, n), shared out
  template <class F>
  void each(int64_t n, F f) const {
    for (int64_t i = team.id; i < n; i += team.size) f(i);
  }

  // y [B, rows] = W x, of rows x of K
  void project(int64_t rows, int64_t K, const float* x, const float* W, float* y) const {
    product(team, B, rows, K, x, shared(W), [=](int64_t b, int64_t r, float sum) { y[b * rows + r] = sum; });
  }

  // w.n = rmsnorm(x) gain, or with a shift layernorm(x) gain + shift, x [B, d]; whole to everyone afterwards
  void norm(const float* x, const float* gain, const float* shift = nullptr) const {
    team.sync();
    each(B, [&](int64_t b) {
      if (shift) layer_norm_row(x + b * d, d, c.eps, gain, shift, w.n + b * d);
      else rms_row(x + b * d, d, c.eps, gain, w.n + b * d);
    });
    team.sync();
  }

  // h += y, or share rmsnorm(y) gain; y [B, d] as `project` has shared it out
  void join(float* y, const float* gain, float share = 1) const {
    if (!gain) {
      const Range own = team.share(0, d, STRIP);
      for (int64_t b = 0; b < B; b++)
        for (int64_t i = own.begin; i < own.end; i++) w.h[b * d + i] += y[b * d + i];
      return;
    }
    team.sync();
    each(B, [&](int64_t b) {
      float* row = y + b * d;
      rms_row(row, d, c.eps, gain, row);
      for (int64_t i = 0; i < d; i++) w.h[b * d + i] += share * row[i];
    });
  }
};
