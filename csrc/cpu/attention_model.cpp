// The functions that a layer calls, one after another, on a few tokens at a time, so that what these are on the way
// stays in the cache. Every number has the bits that it has layer by layer.

#include "attention_model.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "attention_rows.h"
#include "check.h"
#include "cms.h"
#include "linear.h"

namespace {

class Reader {
 public:
  explicit Reader(const AttentionReading& call) : c(call), len(c.B), used(c.B) {
    int64_t queries = 0, keys = 0, hidden = 0;
    for (int64_t i = 0; i < c.blocks; i++) {
      const AttentionBlock& b = c.block[i];
      queries = std::max(queries, b.attention.H * b.attention.D);
      keys = std::max(keys, b.attention.Hkv * b.attention.D);
      for (int64_t l = 0; l < b.levels; l++) hidden = std::max(hidden, b.level[l].N);
    }
    const int64_t rows = c.B * std::min(c.piece, c.T);
    int64_t floats = 0;
    for (int64_t n : {c.d, c.d, c.d, queries, queries, queries, keys, keys, hidden}) floats += rows * n + 16;
    work.reset(new float[floats]);
    float* at = work.get();
    auto take = [&](float*& p, int64_t n) { p = at, at += rows * n + 16; };
    take(x, c.d), take(next, c.d), take(normed, c.d), take(q, queries), take(far, queries), take(y, queries);
    take(k, keys), take(v, keys), take(a, hidden);
  }

  void run() {
    for (first = 0; first < c.T; first += n) {
      n = std::min(c.piece, c.T - first), rows = c.B * n;
      for (int64_t b = 0; b < c.B; b++) {
        len[b] = std::clamp<int64_t>(c.len[b] - first, 0, n);
        std::memcpy(x + b * n * c.d, c.h + (b * c.T + first) * c.d, n * c.d * sizeof(float));
      }
      for (int64_t i = 0; i < c.blocks; i++) {
        mixer(c.block[i]);
        for (int64_t l = 0; l < c.block[i].levels; l++) level(c.block[i].level[l]);
      }
      for (int64_t b = 0; b < c.B; b++)
        std::memcpy(c.h + (b * c.T + first) * c.d, x + b * n * c.d, n * c.d * sizeof(float));
    }
  }

 private:
  const AttentionReading& c;
  std::vector<int64_t> len, used;  // of this piece
  std::unique_ptr<float[]> work;
  float *x, *next, *normed, *q, *far, *y, *k, *v, *a;
  int64_t first = 0, n = 0, rows = 0;

  void mixer(const AttentionBlock& b) {
    AttentionCall t = b.attention;
    const int64_t D = t.D, wide = t.H * D, kv = t.Hkv * D;
    must(hope_rms_norm(rows, c.d, c.threads, c.eps, x, b.gain, normed));
    project(b.q_proj, b.q_bias, b.q_gain, wide, D, q);
    project(b.k_proj, b.k_bias, b.k_gain, kv, D, k);
    project(b.v_proj, b.v_bias, nullptr, kv, D, v);
    const int64_t angle = first * D / 2, apart = c.rotations == 1 ? 0 : c.T * D / 2;
    const Rotation queries{c.B, n, t.H, D, c.threads, apart, len.data()};
    const Rotation keys{c.B, n, t.Hkv, D, c.threads, apart, len.data()};
    if (b.far_cos) queries(q, b.far_cos + angle, b.far_sin + angle, false, far);
    queries(q, b.cos + angle, b.sin + angle, false, q), keys(k, b.cos + angle, b.sin + angle, false, k);
    for (int64_t r = 0; r < c.B; r++) {
      used[r] = t.used[r] + std::min(c.len[r], first);
      const int64_t to = (r * t.slots + used[r]) * kv;
      std::memcpy(b.k + to, k + r * n * kv, len[r] * kv * sizeof(float));
      std::memcpy(b.v + to, v + r * n * kv, len[r] * kv * sizeof(float));
    }
    t.T = n, t.q = q, t.far = b.far_cos ? far : nullptr, t.k = b.k, t.v = b.v, t.y = y;
    t.used = used.data(), t.len = len.data();
    must(hope_attention(&t));
    must(hope_linear(rows, wide, c.d, c.threads, y, b.o_proj, x, next));
    std::swap(x, next);
  }

  void project(const float* W, const float* bias, const float* gain, int64_t wide, int64_t D, float* to) const {
    must(hope_linear(rows, c.d, wide, c.threads, normed, W, nullptr, to));
    add_bias(rows, wide, bias, to);
    if (gain) must(hope_rms_norm(rows * wide / D, D, c.threads, c.eps, to, gain, to));
  }

  void level(const AttentionLevel& l) {
    must(hope_rms_norm(rows, c.d, c.threads, c.eps, x, l.gain, normed));
    product(l.up, c.d, l.N, normed, nullptr, a);
    must(hope_cms_gelu(rows * l.N, c.threads, l.kind == GELU_ERF_LEVEL, a, a, nullptr));
    product(l.down, l.N, c.d, a, x, next);
    std::swap(x, next);
  }

  // to = from W^T (+ more), by every row's W [R, K]
  void product(const float* const* W, int64_t K, int64_t R, const float* from, const float* more, float* to) const {
    const bool shared = std::count(W, W + c.B, W[0]) == c.B;
    const int64_t parts = shared ? 1 : c.B, tokens = rows / parts;
    for (int64_t b = 0; b < parts; b++)
      must(hope_linear(tokens, K, R, c.threads, from + b * tokens * K, W[b], more ? more + b * tokens * R : nullptr,
                       to + b * tokens * R));
  }
};

bool block_fits(const AttentionBlock& b, const AttentionReading& c) {
  if (!mixer_fits(b, c.B, c.T, c.d, c.len) || b.levels < 0 || (b.levels && !b.level)) return false;
  for (int64_t l = 0; l < b.levels; l++) {
    const AttentionLevel& level = b.level[l];
    if (!width(level.N) || !extents({c.B, c.T + 1, level.N}) || !kind_fits(level.kind, false) ||
        !all_given({level.gain, level.up, level.down}))
      return false;
    for (int64_t r = 0; r < c.B; r++)
      if (!all_given({level.up[r], level.down[r]})) return false;
  }
  return true;
}

bool fits(const AttentionReading* c) {
  if (!c || !extent(c->T) || !extents({c->B, c->T + 1, c->d}) || !width(c->d) || c->blocks < 0 || c->piece < 1 ||
      !threads_fit(c->threads) || (c->rotations != 1 && c->rotations != c->B) || (c->blocks && !c->block))
    return false;
  if (c->B * c->T == 0) return true;
  if (!all_given({c->len, c->h}) || !rows_fit(c->B, c->T, nullptr, c->len)) return false;
  for (int64_t i = 0; i < c->blocks; i++)
    if (!block_fits(c->block[i], *c)) return false;
  return true;
}

}  // namespace

extern "C" int hope_attention_read(const AttentionReading* c) {
  if (!fits(c)) return BAD_ARGUMENT;
  return c->B * c->T == 0 ? int{DONE} : outcome_of([c] { Reader(*c).run(); });
}
