// Writing a chunk of linear memories, M(z) = w2 z. The error at an output is the gradient's factor at its row, so the
// stages of titans_commit.h are fewer:
//
//     evaluate         M(k), M(v) and delta2 k
//     key_products     gram
//     errors           d = e
//     decays           gamma, erase, decay_after      every thread for itself
//     transformed_keys Kg
//     step_sizes       gain, one for all memories: m_t = |k_t|      likewise
//     update_inputs    delta2 <- gamma[C,0] delta2 - U^T Kg
#pragma once
#include "titans_write.h"

class LinearCommit : protected ChunkWrite {
 public:
  LinearCommit(const Head& head, const Group& group, int64_t C, int64_t end)
      : ChunkWrite(head, group, C, end), full(c.Mf * D), rows(h.team.share(m.m0 * D, m.s1 ? R : m.f1 * D, 8)) {}

  void run() {
    tokens();
    h.team.sync();
    evaluate();
    if (c.dgd || c.step_clip) clock.key_products();
    h.team.sync();
    errors();
    clock.decays();
    clock.transformed_keys(c.dgd);
    h.team.sync();
    all_step_sizes();
    update_inputs();
    h.team.sync();
  }

 protected:
  const int64_t full;  // rows of memories with D outputs; behind them are those of scalar ones
  const Range rows;    // of this thread

  // M(k) in w.d, M(v) in w.target
  void evaluate() {
    const bool dot = c.objective_dot, same = !dot && !c.base2;  // delta2 is in force
    for_blocks(rows, 0, P, [&](Range r, int64_t p) {
      const int64_t at = p * R * PANEL;
      float *e = w.d + at, *target = w.target + at, *delta2_k = w.delta2_k + at;
      if (!dot)
        product(r, h.w2, w.k, p, [&](int64_t i, auto& y) {
          if (same) store_rows(delta2_k, i, y);
          store_rows(e, i, y);
        });
      if (c.dgd && !same) product(r, g.delta2, w.k, p, [&](int64_t i, auto& y) { store_rows(delta2_k, i, y); });
      const Range values = c.own_values ? r : r.within(full, R);
      product(values, h.w2, w.v, p, [&](int64_t i, auto& y) { store_rows(target, i, y); });
      for (int64_t i = r.begin; i < values.begin && i < r.end; i++)
        std::memcpy(target + i * PANEL, w.v + (p * D + i % D) * PANEL, PANEL * sizeof(float));
    });
  }

  void errors() {
    for_lanes(h.own_lanes(C), [&](int64_t t, auto v) {
      using V = decltype(v);
      const int64_t at = t / PANEL * R * PANEL + t % PANEL;
      for (int64_t f = m.f0; f < m.f1; f++)
        full_error<V>(w.d + at + f * D * PANEL, w.target + at + f * D * PANEL, nullptr);
      for (int64_t i = full + m.s0; i < full + m.s1; i++)
        scalar_error<V>(w.d + at + i * PANEL, w.target + at + i * PANEL);
    });
  }

  void gradients() {}  // the errors are

  void all_step_sizes() {
    if (!c.step_clip) {
      std::memcpy(h.gain, h.eta, C * sizeof(float));
      return;
    }
    for_lanes({0, C}, [&](int64_t t, auto v) {
      using V = decltype(v);
      keep_size(t, root(squares<V>(w.k + t / PANEL * D * PANEL + t % PANEL, D) + all_as<V>(1e-12f)));
    });
    gains(h.gain);
  }

  void update_inputs() {
    for_inputs([&](Range r, int64_t gain) { update_rows(r, gain); });
  }

  // f(rows, whose gains) for this thread's rows, in blocks
  template <class F>
  void for_inputs(F f) {
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK) f(Range{r, std::min(r + BLOCK, rows.end)}, 0);
  }
};
