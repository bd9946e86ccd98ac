// A segment on panels of 16 tokens (panel.h): what is compiled for each width of vectors (width.h).
//
// Between memories and attention, which read and write token rows, everything is a product of a weight with panels, and
// what happens to its outputs while they are in the cache. A number is one chain of operations over its own row of
// the batch and its own tokens: company in a panel or a batch, and threads, do not change it.
#pragma once
#include "segment_attention.h"

class Segment : public SegmentAttention {
 public:
  using SegmentAttention::SegmentAttention;

  void read() {
    over(B * P, d, [&](int64_t i) { embed(i / P, i % P); });
    for (int64_t i = 0; i < c.blocks; i++) {
      c.block[i].attention ? attention(i) : mixer(i);
      levels(i);
    }
  }

  void head() {
    const float* h = stream(streams - 1);
    if (c.h)
      over(B * P, d, [&](int64_t i) {
        const int64_t b = i / P, p = i % P;
        store_lanes(h + i * d * PANEL, c.h + (b * c.stride + p * PANEL) * d, d, d, 0, tokens(b, p));
      });
    if (!c.logits && !c.nats && !c.last && !c.learns && !c.finite) return;
    over(B * P, c.vocab * d, [&](int64_t i) { head_of(h, i / P, i % P); });
  }

  void learn() {
    if (first == c.blocks) return;
    if (c.slopes) over(B * P, d, [&](int64_t i) { from_rows(c.slopes, slope, d, i / P, i % P); });
    for (int64_t i = c.blocks - 1; i >= first; i--) {
      levels_backward(i);
      if (i == first) break;
      c.block[i].attention ? attention_backward(i) : mixer_backward(i);
    }
  }

 private:
  // -- forward ----------------------------------------------------------------------------------------------

  void embed(int64_t b, int64_t p) const {
    const int64_t n = tokens(b, p);
    float *to = stream(0) + (b * P + p) * d * PANEL, *rows = ra + (b * T + p * PANEL) * d;
    if (n == 0) return;
    if (n < PANEL) std::memset(to, 0, d * PANEL * sizeof(float));
    for (int64_t t = 0; t < n; t++)
      std::memcpy(rows + t * d, c.embed + c.ids[b * c.stride + p * PANEL + t] * d, d * sizeof(float));
    for (int64_t i = 0; c.scale != 1 && i < n * d; i += 8) store(rows + i, load(rows + i) * all(c.scale));
    load_lanes(to, rows, d, d, 0, n);
  }

  // The call of a block's memories, which are those before it once more.
  TitansCall memory(const SegmentBlock& block) const {
    TitansCall t = block.titans;
    const SegmentMemory &from = block.before, &to = block.after;
    const int64_t heads = B * t.H, slots = heads * std::max(t.chunk_memory, t.chunk_other);
    auto copy = [](float* a, const float* b, int64_t n) {
      if (b) std::memcpy(a, b, n * sizeof(float));
    };
    const int64_t rows = weight_rows(t);
    copy(to.delta2, from.delta2, heads * rows * t.D), copy(to.s2, from.s2, heads * rows * t.D);
    copy(to.delta1, from.delta1, heads * t.Mf * t.D * t.N), copy(to.s1, from.s1, heads * t.Mf * t.D * t.N);
    copy(to.delta1s, from.delta1s, heads * t.Ms * t.N), copy(to.s1s, from.s1s, heads * t.Ms * t.N);
    copy(to.pending_k, from.pending_k, slots * t.D), copy(to.pending_v, from.pending_v, slots * t.D);
    copy(to.pending_eta, from.pending_eta, slots), copy(to.pending_alpha, from.pending_alpha, slots);
    copy(to.pending_beta, from.pending_beta, slots);
    t.delta2 = to.delta2, t.delta1 = to.delta1, t.delta1s = to.delta1s, t.s2 = to.s2, t.s1 = to.s1, t.s1s = to.s1s;
    t.pending_k = to.pending_k, t.pending_v = to.pending_v, t.pending_eta = to.pending_eta;
    t.pending_alpha = to.pending_alpha, t.pending_beta = to.pending_beta;
    return t;
  }

  void mixer(int64_t i) const {
    const SegmentBlock& block = c.block[i];
    const float* h = stream(stream_of(i));
    float* next = stream(stream_of(i) + 1);
    const int64_t size = d * PANEL;
    // n: panels in one, rows in ra; u: panels in two, rows in rb
    over(B * P, d, [&](int64_t j) {
      norm(h + j * size, block.gain, one + j * size);
      to_rows(one, ra, d, j / P, j % P);
    });
    float *x = ra, *panel = one;
    if (block.conv) {
      must(hope_conv(B, T, d, c.W, c.threads, ra, block.before.tail, block.conv, c.len, rb, block.after.tail));
      all_from_rows(rb, two, All());
      x = rb, panel = two;
    }
    if (block.in_proj) {
      project(false, block.in_proj, panel, wide, All());
      all_to_rows(wide, rb, All());
      x = rb, panel = wide;
    }
    TitansCall t = memory(block);
    if (block.q_proj) {
      float* q = c.keep ? kept_rows(i, 0) : t.qk_l2norm ? re : rd;
      project(false, block.q_proj, panel, slope, All());
      all_to_rows(slope, q, All());
      if (t.qk_l2norm) must(hope_unit(B * T * t.H, t.D, c.threads, q, rd));
      t.q = t.qk_l2norm ? rd : q;
    }
    float* gate = block.gate_proj ? c.keep ? kept_rows(i, 2) : rc : nullptr;
    if (gate) {
      project(false, block.gate_proj, one, slope, All());
      all_to_rows(slope, gate, All());
    }
    float* o = c.keep ? kept_rows(i, 1) : re;
    t.o = o;
    if (t.self_modifying) t.x = x;
    else give(block, panel, t);
    if (t.s2) {
      if (block.beta_proj) gates(block.beta_proj, block.beta_bias, t.H, false, 1, panel, beta);
      else std::fill_n(beta, B * T * t.H, block.beta);
      t.beta = beta;
    }
    if (c.keep && i > first) keep_weights(i, t);
    must(hope_titans_scan(&t));
    must(hope_output_gate(B * T, t.H, t.D, c.threads, o, block.out_gain, gate, ra));
    float* y = block.out_proj ? one : mixed(i);
    all_from_rows(ra, y, All());
    if (block.out_proj)
      add_product(d, [&](int64_t) { return block.out_proj; }, y, h, next, {nullptr, block.post_gain, mixed(i), 1});
    else
      add(y, block.post_gain, h, next);
  }

  // Where the scan t puts what the gradient by q, or by x, takes.
  void keep_weights(int64_t i, TitansCall& t) const {
    const SegmentBlock& block = c.block[i];
    auto w1_of = [&](int which) { return t.N ? kept_of(i, which) : nullptr; };
    t.kept = chunks(block), t.kept2 = kept_of(i, 0), t.kept1 = w1_of(1);
    if (block.q_proj) return;
    t.kept_q = chunks_q(block), t.kept_q2 = kept_of(i, 2), t.kept_q1 = w1_of(3), t.made_q = kept_rows(i, 0);
    std::memcpy(kept_rows(i, 3), t.x, row_floats() * sizeof(float));
  }

  // k, v, eta and alpha of memories that do not make their own; from: panels. Writes slope and ra.
  void give(const SegmentBlock& block, const float* from, TitansCall& t) const {
    project(false, block.k_proj, from, slope, All());
    all_to_rows(slope, t.qk_l2norm ? ra : rk, All());
    if (t.qk_l2norm) must(hope_unit(B * T * t.H, t.D, c.threads, ra, rk));
    project(false, block.v_proj, from, slope, All());
    all_to_rows(slope, rv, All());
    gates(block.eta_proj, t.eta_bias, t.H, t.softplus, t.eta_scale, from, eta);
    if (t.retention) gates(block.alpha_proj, t.alpha_bias, t.H, false, 1, from, alpha);
    t.k = rk, t.v = rv, t.eta = eta, t.alpha = t.retention ? alpha : nullptr;
  }

  // to [B, T, H]: a gate of every head. Writes slope.
  void gates(const float* W, const float* bias, int64_t H, bool softplus, float scale, const float* from,
             float* to) const {
    product(H, d, All(), [&](int64_t) { return W; }, d, 1, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { store_rows(slope + (b * P + p) * H * PANEL, r, acc); },
            Nothing());
    over(B * P, H, [&](int64_t i) { to_rows(slope, raw, H, i / P, i % P); });
    must(hope_gate(B * T, H, softplus, scale, raw, bias, to));
  }

  // -- head -------------------------------------------------------------------------------------------------

  // Whether n tokens of a panel are, in all its rows.
  static bool finite(const float* panel, int64_t rows, int64_t n) {
    float sum[PANEL] = {};  // of zeros, and of NaN where a number is no finite one
    for (int v = 0; v < n; v += 8) {
      f8 s = all(0);
      for (int64_t r = 0; r < rows; r++) s = fma(load(panel + r * PANEL + v), all(0), s);
      store(sum + v, s);
    }
    return std::all_of(sum, sum + n, [](float s) { return s == 0; });
  }

  // One panel: logits, losses p = softmax(logits), and head^T (p - onehot) back through the norm.
  void head_of(const float* h, int64_t b, int64_t p) const {
    const int64_t n = tokens(b, p), V = c.vocab, first = b * c.stride + p * PANEL, at = (b * P + p) * d * PANEL;
    if (n == 0) return;
    float* logits = wide + (b * P + p) * V * PANEL;
    norm(h + at, c.gain, one + at);
    panel_product(0, V, d, c.head, d, 1, one + at, n <= 8,
                  [&](int64_t r, auto& acc) { store_rows(logits, r, acc); });
    if (c.logits) store_lanes(logits, c.logits + first * V, V, V, 0, n);
    if (c.finite && !finite(logits, V, n)) c.finite[b] = 0;
    const int64_t end = c.len[b] - 1 - p * PANEL;
    if (c.last && end >= 0 && end < PANEL)
      for (int64_t r = 0; r < V; r++) c.last[b * V + r] = logits[r * PANEL + end];
    if (!c.targets) return;
    const int64_t known = std::clamp<int64_t>(c.known[b] - p * PANEL, 0, n);
    const bool back = learning(b);
    for (int64_t v = 0; v < (n <= 8 ? 8 : PANEL); v += 8) {
      f8 highest = load(logits + v);
      for (int64_t r = 1; r < V; r++) highest = most(load(logits + r * PANEL + v), highest);
      f8 sum[4] = {};
      float before[8], size[8], top[8];
      for (int64_t j = v; j < std::min(v + 8, known); j++)
        before[j - v] = logits[c.targets[first + j] * PANEL + j];
      for (int64_t r = 0; r < V; r++) {
        const f8 e = exp2((load(logits + r * PANEL + v) - highest) * all(LOG2_E));
        store(logits + r * PANEL + v, e);
        sum[r % 4] = sum[r % 4] + e;
      }
      const f8 total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      store(size, total), store(top, highest);
      for (int64_t j = v; c.nats && j < std::min(v + 8, known); j++)
        c.nats[first + j] = static_cast<float>(log1p_of(size[j - v] - 1.0)) - (before[j - v] - top[j - v]);
      if (!back) continue;
      float counts[8];
      for (int64_t j = 0; j < 8; j++) counts[j] = v + j < known ? 1 : 0;
      const f8 counted = load(counts), inverse = all(1) / total;
      for (int64_t r = 0; r < V; r++)
        store(logits + r * PANEL + v, unless_below(counted, 0, load(logits + r * PANEL + v) * inverse));
      for (int64_t j = v; j < std::min(v + 8, known); j++) logits[c.targets[first + j] * PANEL + j] -= 1;
    }
    if (!back) return;
    panel_product(0, d, V, c.head, 1, d, logits, n <= 8,
                  [&](int64_t r, auto& acc) { store_rows(one + at, r, acc); });
    norm_backward(h + at, c.gain, one + at, slope + at, false);
  }

  // -- backward ---------------------------------------------------------------------------------------------

  void mixer_backward(int64_t i) const {
    const SegmentBlock& block = c.block[i];
    const TitansCall& t = block.titans;
    const float *h = stream(stream_of(i)), *from = slope_before(block.post_gain, mixed(i), slope);
    const int64_t size = d * PANEL, H = t.H;
    const Learning rows{*this};
    if (block.out_proj) {
      project(true, block.out_proj, from, one, rows);
      from = one;
    }
    // rows that do not learn, and padding, go through what follows as zeros
    std::memset(ra, 0, row_floats() * sizeof(float));
    all_to_rows(from, ra, rows);
    float* gate = block.gate_proj ? kept_rows(i, 2) : nullptr;
    must(hope_output_gate_backward(B * T, H, t.D, c.threads, kept_rows(i, 1), block.out_gain, gate, ra, rb,
                                   gate ? rc : nullptr));
    float* q = kept_rows(i, 0);
    if (t.qk_l2norm) must(hope_unit(B * T * H, t.D, c.threads, q, rd));
    // dL/din of what was read with weights `which`, from dL/dout
    auto back = [&](int64_t chunk, int64_t kept, int which, const float* in, const float* out_bar, float* in_bar) {
      const TitansReadBackward call{B, T, H, t.D, t.N, chunk, kept, c.threads, t.activation, kept_of(i, which),
                                    t.N ? kept_of(i, which + 1) : nullptr, in, out_bar, t.pos, c.len, in_bar};
      must(hope_titans_read_backward(&call));
    };
    const float* asked = t.qk_l2norm ? rd : q;
    back(t.chunk_memory, chunks(block), 0, asked, rb, re);
    if (t.qk_l2norm) must(hope_unit_backward(B * T * H, t.D, c.threads, q, re, re));
    float *dx = two, *other = one;
    if (block.q_proj) {
      all_from_rows(re, one, rows);
      project(true, block.q_proj, one, dx, rows);
    } else {
      back(t.chunk_other, chunks_q(block), 2, kept_rows(i, 3), re, rd);
      all_from_rows(rd, dx, rows);
    }
    if (block.in_proj) {
      std::swap(dx, other);
      project(true, block.in_proj, other, dx, rows);
    }
    if (block.conv) {
      std::memset(ra, 0, row_floats() * sizeof(float));
      all_to_rows(dx, ra, rows);
      must(hope_conv_backward(B, T, d, c.W, c.threads, block.conv, ra, rb));
      all_from_rows(rb, dx, rows);
    }
    if (gate) {
      all_from_rows(rc, other, rows);
      product(d, d, rows, [&](int64_t) { return block.gate_proj; }, 1, d, other,
              [&](int64_t b, int64_t p, int64_t r, auto& acc) {
                add_rows(acc, dx + (b * P + p) * size, r);
                store_rows(dx + (b * P + p) * size, r, acc);
              }, Nothing());
    }
    over(B * P, d, [&](int64_t j) {
      if (learning(j / P)) norm_backward(h + j * size, block.gain, dx + j * size, slope + j * size, true);
    });
  }
};

inline int64_t segment_floats(const SegmentCall& c) { return Segment(c, nullptr).floats(); }
inline void segment_read(const SegmentCall& c) { Segment(c, c.work).read(); }
inline void segment_head(const SegmentCall& c) { Segment(c, c.work).head(); }
inline void segment_learn(const SegmentCall& c) { Segment(c, c.work).learn(); }
