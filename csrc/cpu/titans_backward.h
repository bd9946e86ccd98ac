// One (row, head) of a call backwards: its spans from the last one. The writes of a span are replayed from the
// state that the call kept, with the forward's own stages and so with its bits, which leaves the deviations at the
// start of every step (chunk of the faster clock); what the memories made of its tokens was kept as well. Then its
// steps from the last one: first the commits that close a step, then its reads.
#pragma once
#include <cstring>

#include "aligned.h"
#include "backward_commit.h"
#include "backward_read.h"
#include "titans_scan.h"

class ScanBackward {
 public:
  // One thread for itself: space and work carved in memory of its own, own: Head::own_floats
  ScanBackward(const TitansBackward& back, Workspace& work, const BackwardSpace& space, const Team& alone,
      float* own)
      : a(back), c(back.call), w(work), s(space), h(c, work, alone, own), D(h.D), N(h.N), M(h.M), big(h.big),
        small(h.small), n2(h.R * D), n1(c.Mf * D * N), n1s(c.Ms * N), state(n2 + n1 + n1s),
        produces(c.update && c.self_modifying) {
  }

  template <int ACT>
  void run(int64_t b, int64_t head) {
    row = b * c.H + head, phase = c.pos[b] % big, n = c.len[b];
    if (n == 0) return;
    h.at(b, head);
    eta_bias = alpha_bias = 0;
    adjoints(b, head);
    const int64_t last = phase + n, spans = (last - 1) / c.span;
    for (int64_t span = spans; span >= 0; span--) {
      lo = std::max<int64_t>(0, phase - span * c.span), hi = std::min(c.span, last - span * c.span);
      start(span);
      open(b, head, span, span == spans);
      const int64_t steps = replay<ACT>(span);
      keep(true);
      for (int64_t i = steps - 1; i >= 0; i--) {
        if (i < steps - 1) turn_to(i);  // the replay has left off at the last one
        back<ACT>(span, i);
      }
      keep(false);
      close(b, head, span);
    }
    if (a.eta_bias_bar) a.eta_bias_bar[row] = static_cast<float>(eta_bias);
    if (a.alpha_bias_bar) a.alpha_bias_bar[row] = static_cast<float>(alpha_bias);
  }

 private:
  const TitansBackward& a;
  const TitansCall& c;
  Workspace& w;
  const BackwardSpace& s;
  Head h;
  const int64_t D, N, M, big, small, n2, n1, n1s, state;
  const bool produces;
  Bars bar;
  double eta_bias, alpha_bias;
  // slots of the span: what it reads is [lo, hi); slots before are pending tokens
  int64_t row, phase, n, lo, hi;

  static float* from(float* p, int64_t offset) { return p ? p + offset : nullptr; }

  void adjoints(int64_t b, int64_t head) {
    bar = {a.delta2_bar + row * n2, a.delta1_bar + row * n1, from(a.delta1s_bar, row * n1s),
        from(a.base2_bar, row * n2),
           from(a.base1_bar, row * n1), from(a.base1s_bar, row * n1s), nullptr, nullptr, nullptr, nullptr};
  }

  // -- the span's state and tokens --------------------------------------------------------------------------

  // The deviations at the start of the span become those of its first step.
  void start(int64_t span) {
    const int64_t at = row * c.spans + span - 1;
    if (!c.update) span = 0;
    const float* d2 = span ? c.spans2 + at * n2 : c.delta2 + row * n2;
    const float* d1 = span ? c.spans1 + at * n1 : c.delta1 + row * n1;
    std::memcpy(s.states, d2, n2 * sizeof(float)), std::memcpy(s.states + n2, d1, n1 * sizeof(float));
    if (n1s) std::memcpy(s.states + n2 + n1, span ? c.spans1s + at * n1s : c.delta1s + row * n1s,
        n1s * sizeof(float));
  }

  // The deviations of step i are in force.
  void turn_to(int64_t i) {
    float* at = s.states + i * state;
    h.g.delta2 = at, h.g.delta1 = at + n2, h.g.delta1s = n1s ? at + n2 + n1 : nullptr;
    h.w2 = c.base2 ? w.w2 : h.g.delta2, h.w1 = c.base1 ? w.w1 : h.g.delta1,
        h.w1s = c.base1s ? w.w1s : h.g.delta1s;
    if (!c.base2) return;
    sum(w.w2, h.g.base2, h.g.delta2, n2), sum(w.w1, h.g.base1, h.g.delta1, n1);
    if (n1s) sum(w.w1s, h.g.base1s, h.g.delta1s, n1s);
  }

  static void sum(float* to, const float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) store(to + i, load(x + i) + load(y + i));
  }

  // Pending tokens in slots [0, lo), and the adjoints of all slots: zero, or those of the state after the
  // call.
  void open(int64_t b, int64_t head, int64_t span, bool last) {
    const int64_t slots = (hi + big - 1) / big * big + PANEL;
    for (float* x : {s.k_bar, s.v_bar}) std::memset(x, 0, slots * D * sizeof(float));
    for (float* x : {s.eta_bar, s.alpha_bar}) std::memset(x, 0, slots * sizeof(float));
    const int64_t pending = b * big * c.H + head, step = c.H;
    if (last && c.update)
      for (int64_t t = 0, first = hi / big * big; first + t < hi; t++) {
        const int64_t at = pending + t * step, slot = first + t;
        std::memcpy(s.k_bar + slot * D, a.pending_k_bar + at * D, D * sizeof(float));
        std::memcpy(s.v_bar + slot * D, a.pending_v_bar + at * D, D * sizeof(float));
        s.eta_bar[slot] = a.pending_eta_bar[at];
        if (a.pending_alpha_bar) s.alpha_bar[slot] = a.pending_alpha_bar[at];
      }
    for (int64_t t = 0; c.update && t < lo; t++) {
      const int64_t at = pending + t * step;
      std::memcpy(s.k + t * D, c.pending_k + at * D, D * sizeof(float));
      std::memcpy(s.v + t * D, c.pending_v + at * D, D * sizeof(float));
      s.eta[t] = c.pending_eta[at];
      s.alpha[t] = c.pending_alpha ? c.pending_alpha[at] : 1;
    }
  }

  // What was pending before the call has its adjoint; those of given keys leave.
  void close(int64_t b, int64_t head, int64_t span) {
    if (!c.update) return;
    const int64_t token = b * c.T * c.H + head, first = span * c.span + lo - phase;
    for (int64_t t = 0; !produces && t < hi - lo; t++) {
      const int64_t at = token + (first + t) * c.H, slot = lo + t;
      std::memcpy(a.k_bar + at * D, s.k_bar + slot * D, D * sizeof(float));
      std::memcpy(a.v_bar + at * D, s.v_bar + slot * D, D * sizeof(float));
      a.eta_bar[at] = s.eta_bar[slot];
      if (a.alpha_bar) a.alpha_bar[at] = s.alpha_bar[slot];
    }
    for (int64_t t = 0; span == 0 && t < big; t++) {
      const int64_t at = b * big * c.H + head + t * c.H;
      if (t < lo) {
        std::memcpy(a.pending_k_bar + at * D, s.k_bar + t * D, D * sizeof(float));
        std::memcpy(a.pending_v_bar + at * D, s.v_bar + t * D, D * sizeof(float));
      } else {
        std::memset(a.pending_k_bar + at * D, 0, D * sizeof(float));
        std::memset(a.pending_v_bar + at * D, 0, D * sizeof(float));
      }
      a.pending_eta_bar[at] = t < lo ? s.eta_bar[t] : 0;
      if (a.pending_alpha_bar) a.pending_alpha_bar[at] = t < lo ? s.alpha_bar[t] : 0;
    }
  }

  // The open chunk of the forward's stages is the span's chunk of the slower clock that slot `slot` lies in.
  void turn_to_slot(int64_t slot) {
    const int64_t at = slot / big * big;
    w.k_rows = s.k + at * D, w.v_rows = s.v + at * D, w.eta = s.eta + at, w.alpha = s.alpha + at;
  }

  // -- the span again, and in reverse -----------------------------------------------------------------------

  // Whether the forward's stages keep what only the backward wants to know.
  void keep(bool on) {
    auto to = [&](float* p) { return on ? p : nullptr; };
    w.z = to(s.z), w.values = to(s.values), w.values_slope = to(s.values_bar), w.back = to(s.back);
    w.target_sizes = to(s.target_sizes);
  }

  // The span's tokens, as they were given or made.
  void tokens(int64_t span) {
    for (int64_t slot = lo; slot < hi; slot++) {
      const int64_t t = span * c.span + slot - phase, one = t * c.H, row = one * D;
      std::memcpy(s.k + slot * D, (produces ? h.g.made_k : h.g.k) + row, D * sizeof(float));
      std::memcpy(s.v + slot * D, (produces ? h.g.made_v : h.g.v) + row, D * sizeof(float));
      s.eta[slot] = produces ? h.g.made_eta[one] : h.g.eta[one];
      const float* alpha = produces ? h.g.made_alpha : h.g.alpha;
      s.alpha[slot] = alpha ? alpha[one] : 1;
      if (produces) s.k_sizes[slot] = h.g.made_size[one];
    }
  }

  // The steps of the span; step 0 holds slot lo.
  template <int ACT>
  int64_t replay(int64_t span) {
    int64_t i = 0;
    turn_to(0);
    if (c.update) tokens(span);
    for (int64_t slot = lo; slot < hi; i++) {
      const int64_t end = std::min((slot / small + 1) * small, hi);
      turn_to_slot(slot);
      if (end < hi) {
        std::memcpy(s.states + (i + 1) * state, s.states + i * state, state * sizeof(float));
        if (c.update) {
          point_to(i + 1);
          for_groups(end, [&](const Group& group, int64_t C) { Commit<ACT>(h, group, C, end).run(); });
        }
      }
      slot = end;
    }
    return i;
  }

  // As turn_to, but the weights in force are those of the step before: the commits make the new ones.
  void point_to(int64_t i) {
    float* at = s.states + i * state;
    h.g.delta2 = at, h.g.delta1 = at + n2, h.g.delta1s = n1s ? at + n2 + n1 : nullptr;
    if (!c.base2) h.w2 = h.g.delta2, h.w1 = h.g.delta1, h.w1s = h.g.delta1s;
  }

  // f(group, C) for the clocks whose chunk ends with slot `end`
  template <class F>
  void for_groups(int64_t end, F f) {
    const bool memory = end % c.chunk_memory == 0, other = M > 1 && end % c.chunk_other == 0;
    if (memory && other && c.chunk_memory == c.chunk_other) return f(Group{0, M, 0, c.Mf, 0, c.Ms}, big);
    if (memory) f(Group{0, 1, 0, 1, 0, 0}, c.chunk_memory);
    if (other) f(Group{1, M, 1, c.Mf, 0, c.Ms}, c.chunk_other);
  }

  Bars from_slot(int64_t slot) const {
    Bars at = bar;
    at.k = s.k_bar + slot * D, at.v = s.v_bar + slot * D, at.eta = s.eta_bar + slot;
    at.alpha = c.pending_alpha || c.alpha ? s.alpha_bar + slot : nullptr;
    return at;
  }

  template <int ACT>
  void back(int64_t span, int64_t i) {
    const int64_t first = lo / small + i, slot = std::max(lo, first * small),
        end = std::min((first + 1) * small, hi);
    turn_to_slot(slot);
    if (c.update && end % small == 0)
      for_groups(end, [&](const Group& group, int64_t C) {
        const Bars at = from_slot(end - C);
        CommitBackward<ACT>(h, group, C, end, s, at).run();
      });
    const int64_t token = span * c.span + slot - phase, b = row / c.H, head = row % c.H;
    const int64_t offset = ((b * c.T + token) * c.H + head) * D;
    const Bars at = from_slot(slot);
    const TokenBars tokens{a.o_bar + offset, from(a.q_bar, offset), from(a.x_bar, offset),
                           &eta_bias, &alpha_bias};
    ReadBackward<ACT>(h, token, end - slot, s, at, tokens, produces ? s.k + slot * D : nullptr, s.k_sizes + slot,
                      s.eta + slot, s.alpha + slot)
        .run();
  }
};

inline void all_heads_backward(const TitansBackward& a) {
  const TitansCall& c = a.call;
  Workspace sizes;
  BackwardSpace spaces;
  const int64_t groups = c.B * c.H, forward = sizes.carve(c, nullptr),
                more = spaces.carve(c, c.span, nullptr);
  const int64_t own = Head::own_floats(c), each = (forward + more + own + 15) / 16 * 16 + 16;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, groups)));
  const AlignedFloats memory(each, threads);
  in_parallel(threads, [&](int id, int n) {
    const FlushDenormals guard;
    float* mine = memory.data + id * each;
    Workspace work;
    BackwardSpace space;
    work.carve(c, mine), space.carve(c, c.span, mine + forward);
    const Team alone{0, 1, nullptr};
    ScanBackward scan(a, work, space, alone, mine + forward + more);
    for (int64_t i = id; i < groups; i += n) switch (c.activation) {
        case GELU: scan.run<GELU>(i / c.H, i % c.H); break;
        case SILU: scan.run<SILU>(i / c.H, i % c.H); break;
        default: scan.run<GELU_TANH>(i / c.H, i % c.H);
      }
  });
}
