// The attention of a block in a decoder's step. Every number is the chain of operations that calls of
// hope_kernels/layers/attention.py make of it: hope_linear, hope_rms_norm and hope_attention, and between them, of
// PyTorch's, the bias, the rotation and the residual, which flush no denormals.
#pragma once
#include "token_state.h"

class AttentionStep {
 public:
  AttentionStep(const TokenState& step, const TokenAttention& attention)
      : s(step), w(step.w), m(attention), a(attention.call), B(step.B), D(a.D) {
    a.threads = s.team.size;
    a.q = w.q, a.far = m.far_cos ? w.far : nullptr, a.k = m.k, a.v = m.v, a.y = w.o;
  }

  void read(const float* gain) const {
    const int64_t d = s.d, wide = a.H * D, kv = a.Hkv * D;
    s.norm(w.h, gain);
    s.project(wide, d, w.n, m.q_proj, w.q);
    auto append = [&](const float* W, float* cache) {
      product(s.team, B, kv, d, w.n, shared(W),
              [&](int64_t b, int64_t r, float sum) { cache[slot(b) * kv + r] = sum; });
    };
    append(m.k_proj, m.k), append(m.v_proj, m.v);
    s.team.sync();
    s.each(B * a.H, [&](int64_t g) { query(g / a.H, g % a.H); });
    s.each(B * a.Hkv, [&](int64_t g) { key(g / a.Hkv, g % a.Hkv); });
    s.team.sync();
    s.each(attention_tasks(a), [&](int64_t i) { attention_task(a, i, w.own + s.team.id * w.ahead); });
    s.team.sync();
    s.project(d, wide, w.o, m.o_proj, w.x);
    s.join(w.x, m.post_gain);
  }

  // The slots of the token are as if it had never been there: of a NaN that nobody sees PyTorch makes a NaN.
  void undo() const {
    const int64_t kv = a.Hkv * D;
    s.each(B, [&](int64_t b) {
      std::memset(m.k + slot(b) * kv, 0, kv * sizeof(float));
      std::memset(m.v + slot(b) * kv, 0, kv * sizeof(float));
    });
  }

 private:
  const TokenState& s;
  const TokenBuffers& w;
  const TokenAttention& m;
  AttentionCall a;
  const int64_t B, D;

  // The token's, among those of all rows.
  int64_t slot(int64_t b) const { return b * a.slots + a.used[b]; }

  void query(int64_t b, int64_t head) const {
    float* q = w.q + (b * a.H + head) * D;
    prepare(q, m.q_bias ? m.q_bias + head * D : nullptr, m.q_gain);
    if (a.far) rotate(q, m.far_cos + b * m.ahead, m.far_sin + b * m.ahead, w.far + (b * a.H + head) * D);
    rotate(q, m.cos + b * m.ahead, m.sin + b * m.ahead, q);
  }

  void key(int64_t b, int64_t head) const {
    float *k = m.k + (slot(b) * a.Hkv + head) * D, *v = m.v + (slot(b) * a.Hkv + head) * D;
    prepare(k, m.k_bias ? m.k_bias + head * D : nullptr, m.k_gain);
    rotate(k, m.cos + b * m.ahead, m.sin + b * m.ahead, k);
    prepare(v, m.v_bias ? m.v_bias + head * D : nullptr, nullptr);
  }

  void prepare(float* x, const float* bias, const float* gain) const {
    for (int64_t i = 0; bias && i < D; i++) x[i] += bias[i];
    if (gain) rms_row(x, D, s.c.eps, gain, x);
  }

  // Pairs (i, i + D / 2) turned by angle i.
  void rotate(const float* x, const float* cos, const float* sin, float* y) const {
    const int64_t half = D / 2;
    for (int64_t i = 0; i < half; i++) {
      const float first = x[i], second = x[i + half];
      y[i] = first * cos[i] - second * sin[i], y[i + half] = second * cos[i] + first * sin[i];
    }
  }
};
