// The attention of a segment's blocks: projections on panels, and between them the heads on token rows, as
// attention_model.cpp has them, bit for bit.
#pragma once
#include "attention_rows.h"
#include "segment_levels.h"

class SegmentAttention : public SegmentLevels {
 protected:
  using SegmentLevels::SegmentLevels;

  void attention(int64_t i) const {
    const AttentionMixer& m = *c.block[i].attention;
    const KeptHeads kept = kept_heads(i);
    const float* h = stream(stream_of(i));
    float* next = stream(stream_of(i) + 1);
    const int64_t size = d * PANEL, wide_heads = m.attention.H * m.attention.D;
    over(B * P, d, [&](int64_t j) { norm(h + j * size, m.gain, one + j * size); });
    heads(m.q_proj, m.q_bias, wide_heads, kept.q);
    heads(m.k_proj, m.k_bias, m.attention.Hkv * m.attention.D, kept.k);
    heads(m.v_proj, m.v_bias, m.attention.Hkv * m.attention.D, hv);
    queries(m, kept.q);
    normed(m.k_gain, m.attention.Hkv, m.attention.D, kept.k, hk);
    turn(m, m.attention.Hkv)(hk, m.cos, m.sin, false, hk);
    append(m.attention, hk, m.k), append(m.attention, hv, m.v);
    AttentionCall t = call(m);
    t.y = kept.y, t.most = kept.most, t.sum = kept.sum;
    must(hope_attention(&t));
    over(B * P, wide_heads, [&](int64_t j) { from_rows(kept.y, wide, wide_heads, j / P, j % P); });
    add_product(wide_heads, [&](int64_t) { return m.o_proj; }, wide, h, next,
                {nullptr, c.block[i].post_gain, mixed(i), 1});
  }

  // dL/d its input is added to the slope by its output.
  void attention_backward(int64_t i) const {
    const AttentionMixer& m = *c.block[i].attention;
    const KeptHeads kept = kept_heads(i);
    const float *h = stream(stream_of(i)), *from = slope_before(c.block[i].post_gain, mixed(i), slope);
    const int64_t size = d * PANEL, H = m.attention.H, Hkv = m.attention.Hkv, D = m.attention.D;
    const Learning rows{*this};
    product(H * D, d, rows, [&](int64_t) { return m.o_proj; }, 1, H * D, from,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              store_rows(wide + (b * P + p) * H * D * PANEL, r, acc);
            }, Nothing());
    over(B * P, H * D, [&](int64_t j) { if (rows(j / P)) to_rows(wide, hy, H * D, j / P, j % P); });
    queries(m, kept.q);
    AttentionBackward back{call(m), hy, c.learns, m.attention.sinks ? hdfar : nullptr, hdq, hk, hv};
    back.call.y = kept.y, back.call.most = kept.most, back.call.sum = kept.sum;
    must(hope_attention_backward(&back));
    turn(m, H)(hdq, m.cos, m.sin, true, hdq), turn(m, Hkv)(hk, m.cos, m.sin, true, hk);
    if (m.attention.sinks) {
      const bool far = m.far_cos;
      turn(m, H)(hdfar, far ? m.far_cos : m.cos, far ? m.far_sin : m.sin, true, hdfar);
      for (int64_t j = 0; j < B * T * H * D; j++) hdq[j] += hdfar[j];
    }
    normed_backward(m.q_gain, H, D, kept.q, hdq), normed_backward(m.k_gain, Hkv, D, kept.k, hk);
    heads_backward(m.q_proj, H * D, hdq, false);
    heads_backward(m.k_proj, Hkv * D, hk, true), heads_backward(m.v_proj, Hkv * D, hv, true);
    over(B * P, d, [&](int64_t j) {
      if (learning(j / P)) norm_backward(h + j * size, m.gain, two + j * size, slope + j * size, true);
    });
  }

 private:
  Rotation turn(const AttentionMixer& m, int64_t heads) const {
    const int64_t D = m.attention.D;
    return {B, T, heads, D, c.threads, c.rotations == 1 ? 0 : c.stride * D / 2, c.len};
  }

  // What the gradient has in common with the call: queries are in hq, and in hfar as they see the sinks.
  AttentionCall call(const AttentionMixer& m) const {
    AttentionCall t = m.attention;
    t.T = T, t.threads = c.threads, t.len = c.len, t.q = hq, t.far = m.far_cos ? hfar : nullptr, t.k = m.k, t.v = m.v;
    return t;
  }

  // Token rows [R] of what is in panels in one. Writes wide.
  void heads(const float* W, const float* bias, int64_t R, float* to) const {
    product(R, d, All(), [&](int64_t) { return W; }, d, 1, one,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) { store_rows(wide + (b * P + p) * R * PANEL, r, acc); },
            Nothing());
    over(B * P, R, [&](int64_t j) { to_rows(wide, to, R, j / P, j % P); });
    add_bias(B * T, R, bias, to);
  }

  // two, in panels, (+ two, if more) = W^T from; W [R, d], from: token rows. Writes wide.
  void heads_backward(const float* W, int64_t R, const float* from, bool more) const {
    const Learning rows{*this};
    over(B * P, R, [&](int64_t j) { if (rows(j / P)) from_rows(from, wide, R, j / P, j % P); });
    product(d, R, rows, [&](int64_t) { return W; }, 1, d, wide,
            [&](int64_t b, int64_t p, int64_t r, auto& acc) {
              float* to = two + (b * P + p) * d * PANEL;
              if (more) add_rows(acc, to, r);
              store_rows(to, r, acc);
            }, Nothing());
  }

  // hq, and hfar, of queries as they are before norm and rotation
  void queries(const AttentionMixer& m, const float* raw) const {
    const Rotation way = turn(m, m.attention.H);
    normed(m.q_gain, m.attention.H, m.attention.D, raw, hq);
    if (m.far_cos) way(hq, m.far_cos, m.far_sin, false, hfar);
    way(hq, m.cos, m.sin, false, hq);
  }

  void normed(const float* gain, int64_t heads, int64_t D, const float* from, float* to) const {
    const int64_t rows = B * T * heads;
    if (gain) must(hope_rms_norm(rows, D, c.threads, c.eps, from, gain, to));
    else if (from != to) std::memcpy(to, from, rows * D * sizeof(float));
  }

  void normed_backward(const float* gain, int64_t heads, int64_t D, const float* from, float* bar) const {
    if (gain) must(hope_cms_norm_backward(B * T * heads, D, c.threads, c.eps, from, gain, bar, nullptr, bar, nullptr));
  }

  // The tokens of every row, behind those in its cache.
  void append(const AttentionCall& t, const float* rows, float* cache) const {
    const int64_t wide_keys = t.Hkv * t.D;
    for (int64_t b = 0; b < B; b++)
      std::memcpy(cache + (b * t.slots + t.used[b]) * wide_keys, rows + b * T * wide_keys,
                  c.len[b] * wide_keys * sizeof(float));
  }
};
