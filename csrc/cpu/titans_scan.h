// One (row, head) through a call: its chunks one after the other, read and committed.
#pragma once
#include <cstring>

#include "titans_commit.h"
#include "titans_momentum.h"
#include "titans_read.h"

// All tokens of a call, head after head.
class Scan {
 public:
  Scan(const TitansCall& call, const Workspace& work, const Team& team, float* own)
      : h(call, work, team, own), c(h.c), w(h.w), g(h.g), team(team), D(h.D), N(h.N), M(h.M), big(h.big),
        small(h.small) {}

  template <int ACT>
  void run(int64_t b, int64_t head) {
    const int64_t phase = c.pos[b] % big, n = c.len[b];
    if (n == 0) return;
    h.at(b, head);
    open(phase);
    const int64_t row = b * c.H + head;
    int64_t chunk = 0, chunk_q = 0;
    keep_memory(row * c.kept);
    keep_queries(row * c.kept_q);
    for (int64_t slot = phase; slot < phase + n;) {
      const int64_t end = std::min((slot / small + 1) * small, phase + n);
      Read<ACT>(h, slot, end, phase).run();
      if (c.update) {
        commit<ACT>(end);
        if (end % c.chunk_memory == 0 && end < phase + n) keep_memory(row * c.kept + ++chunk);
        if (end % c.chunk_other == 0 && end < phase + n) keep_queries(row * c.kept_q + ++chunk_q);
        if (c.span && end % c.span == 0 && end < phase + n) keep_state(row * c.spans + end / c.span - 1);
      }
      slot = end;
    }
    // no barrier: until the one in open(), the next head touches only what this thread left here itself
    if (c.update) close((phase + n) % big);
  }

  // What is due with an open chunk of `end` tokens, which others have put into the state.
  template <int ACT>
  void commit_open(int64_t b, int64_t head, int64_t end) {
    h.at(b, head);
    open(end);
    commit<ACT>(end);
    close(end % big);
  }

 private:
  Head h;
  const TitansCall& c;
  const Workspace& w;
  const Tensors& g;
  const Team& team;
  const int64_t D, N, M, big, small;

  // The chunks that end with slot `end`, of one clock or of both.
  template <int ACT>
  void commit(int64_t end) {
    const bool memory = end % c.chunk_memory == 0, other = M > 1 && end % c.chunk_other == 0;
    if (memory && other && c.chunk_memory == c.chunk_other) {
      commit<ACT>({0, M, 0, c.Mf, 0, c.Ms}, big, end);
    } else {
      if (memory) commit<ACT>({0, 1, 0, 1, 0, 0}, c.chunk_memory, end);
      if (other) commit<ACT>({1, M, 1, c.Mf, 0, c.Ms}, c.chunk_other, end);
    }
  }

  template <int ACT>
  void commit(const Group& group, int64_t C, int64_t end) {
    using Write = std::conditional_t<ACT == LINEAR, LinearCommit, Commit<ACT>>;
    c.s2 ? MomentumCommit<Write>(h, group, C, end).run() : Write(h, group, C, end).run();
  }

  // The weights in force, and the open chunk's tokens.
  void open(int64_t phase) {
    if (c.base2) {
      sum(w.w2, g.base2, g.delta2, h.R * D);
      sum(w.w1, g.base1, g.delta1, c.Mf * D * N);
      sum(w.w1s, g.base1s, g.delta1s, c.Ms * N);
    }
    const int64_t step = c.H * D;
    for (int64_t t = team.id; c.update && t < phase; t += team.size) {
      std::memcpy(w.k_rows + t * D, g.pending_k + t * step, D * sizeof(float));
      std::memcpy(w.v_rows + t * D, g.pending_v + t * step, D * sizeof(float));
      w.eta[t] = g.pending_eta[t * c.H];
      w.alpha[t] = g.pending_alpha ? g.pending_alpha[t * c.H] : 1;
      if (c.s2) w.beta[t] = g.pending_beta[t * c.H];
    }
    team.sync();
  }

  void sum(float* to, const float* a, const float* b, int64_t n) {
    Range r = team.share(0, n, 8);
    for (int64_t i = r.begin; i < r.end; i += 8) store(to + i, load(a + i) + load(b + i));
  }

  // The weights of M_memory, and of M_q, as the reads of a chunk see them, become those of number `at`.
  void keep_memory(int64_t at) {
    keep(c.kept2, h.w2, memory_rows(c) * D, at);
    keep(c.kept1, h.w1, N * D, at);
  }

  void keep_queries(int64_t at) {
    if (!c.kept_q2) return;
    keep(c.kept_q2, h.w2 + 3 * memory_rows(c) * D, memory_rows(c) * D, at);
    keep(c.kept_q1, h.w1 + 3 * N * D, N * D, at);
  }

  void keep(float* to, const float* from, int64_t n, int64_t at) {
    if (!to) return;
    // with by_memory they are thread 0's: the other one may not look at them between two barriers
    const Range own = !h.by_memory ? team.share(0, n, 8) : Range{0, team.id == 0 ? n : 0};
    std::memcpy(to + at * n + own.begin, from + own.begin, (own.end - own.begin) * sizeof(float));
  }

  // The deviations at the start of a span
  void keep_state(int64_t at) {
    const int64_t n2 = h.R * D, n1 = c.Mf * D * N, n1s = c.Ms * N;
    if (h.by_memory) team.sync();
    auto copy = [&](float* to, const float* from, int64_t n) {
      const Range own = team.share(0, n, 8);
      if (n) std::memcpy(to + at * n + own.begin, from + own.begin, (own.end - own.begin) * sizeof(float));
    };
    copy(c.spans2, g.delta2, n2), copy(c.spans1, g.delta1, n1), copy(c.spans1s, g.delta1s, n1s);
    team.sync();
  }

  // The open chunk's first `fill` slots as the state keeps them; the others are zero.
  void close(int64_t fill) {
    team.sync();
    const int64_t step = c.H * D;
    for (int64_t t = team.id; t < big; t += team.size) {
      const bool filled = t < fill;
      if (filled) {
        std::memcpy(g.pending_k + t * step, w.k_rows + t * D, D * sizeof(float));
        std::memcpy(g.pending_v + t * step, w.v_rows + t * D, D * sizeof(float));
      } else {
        std::memset(g.pending_k + t * step, 0, D * sizeof(float));
        std::memset(g.pending_v + t * step, 0, D * sizeof(float));
      }
      g.pending_eta[t * c.H] = filled ? w.eta[t] : 0;
      if (g.pending_alpha) g.pending_alpha[t * c.H] = filled ? w.alpha[t] : 0;
      if (c.s2) g.pending_beta[t * c.H] = filled ? w.beta[t] : 0;
    }
  }
};
