// What the entry points of segment.h check, and the choice of vectors (width.h).

#include "segment_run.h"
#include "titans_check.h"
#include "width.h"

namespace avx512 {  // segment_avx512.cpp
void segment_read(const SegmentCall& c);
void segment_head(const SegmentCall& c);
void segment_learn(const SegmentCall& c);
}  // namespace avx512

namespace {

bool titans_fit(const TitansCall& t, const SegmentCall& c) {
  const int64_t small = std::min(t.chunk_memory, t.chunk_other);
  return memory_sizes_fit(t) && t.B == c.B && t.T == c.T && t.H * t.D == c.d && t.update && !t.kept2 &&
         extents({c.B, t.H, c.T / small + 2, memory_rows(t), t.D, c.blocks}) && t.len == c.len && t.pos;
}

// Two memories of one kind, which share nothing.
bool memories_fit(const SegmentBlock& b, const SegmentCall& c) {
  auto one = [&](const SegmentMemory& m) {
    return all_given({m.delta2, m.pending_k, m.pending_v, m.pending_eta}) &&
           weights_fit(b.titans, m.delta2, m.delta1, m.delta1s) && (!b.titans.retention || m.pending_alpha) &&
           (!b.conv || c.W == 1 || m.tail) && !m.s2 == !b.before.s2 && weights_fit(b.titans, m.s2, m.s1, m.s1s) &&
           (!m.s2 || m.pending_beta);
  };
  return one(b.before) && one(b.after) && b.before.delta2 != b.after.delta2;
}

bool memory_fits(const SegmentBlock& b, const SegmentCall& c) {
  if (!titans_fit(b.titans, c) || !b.gain || !b.q_proj != adaptive_q(b.titans)) return false;
  if ((b.conv && c.W < 1) || !memories_fit(b, c) || (b.beta_proj && !b.beta_bias)) return false;
  return b.titans.self_modifying || (all_given({b.k_proj, b.v_proj, b.eta_proj, b.titans.eta_bias}) &&
                                     (!b.titans.retention || all_given({b.alpha_proj, b.titans.alpha_bias})));
}

bool level_fits(const SegmentLevel& level, const SegmentCall& c, int64_t streams) {
  if (!width(level.N) || !extents({c.B, c.T + PANEL, level.N, streams}) || !kind_fits(level.kind, level.gate) ||
      !low_rank_fits(level.low, c.d, level.N, level.gate) || !all_given({level.vectors.gain, level.up, level.down}))
    return false;
  for (int64_t i = 0; i < c.B; i++)
    if (!all_given({level.up[i], level.down[i]}) || (level.gate && !level.gate[i])) return false;
  return true;
}

bool attention_fits(const AttentionMixer& m, const SegmentCall& c) {
  return mixer_fits(m, c.B, c.T, c.d, c.len) &&
         extents({c.B, c.T + PANEL, m.attention.H, m.attention.D, c.blocks});
}

bool block_fits(const SegmentBlock& b, const SegmentCall& c, int64_t streams) {
  const bool all = !c.block->attention == !b.attention;  // blocks are of one kind
  if (!all || !(b.attention ? attention_fits(*b.attention, c) : memory_fits(b, c))) return false;
  if (b.levels && !b.level) return false;
  for (int64_t l = 0; l < b.levels; l++)
    if (!level_fits(b.level[l], c, streams)) return false;
  return true;
}

bool fits(const SegmentCall* c) {
  if (!c || !extent(c->T) || !width(c->d) || c->W < 0 || !extent(c->blocks) || c->vocab < 1 ||
      !threads_fit(c->threads) || !extents({c->vocab, c->d}) || !extents({c->B, c->T + PANEL, c->vocab}) ||
      c->stride < c->T || !extents({c->B, c->stride, c->vocab}))
    return false;
  if (c->blocks && c->block && c->block->attention && c->rotations != 1 && c->rotations != c->B) return false;
  if (c->B && c->T && !all_given({c->ids, c->len, c->embed, c->gain, c->head})) return false;
  if ((c->blocks && !c->block) || (c->B && !c->len) || !rows_fit(c->B, c->T, nullptr, c->len)) return false;
  for (int64_t b = 0; b < c->B; b++)
    for (int64_t t = 0; t < c->len[b]; t++)
      if (c->ids[b * c->stride + t] < 0 || c->ids[b * c->stride + t] >= c->vocab) return false;
  int64_t streams = 1;  // the residual stream before, between and behind mixers and levels
  for (int64_t i = 0; i < c->blocks; i++) {
    if (!extent(c->block[i].levels)) return false;
    streams += 1 + c->block[i].levels;
  }
  if (!extents({c->B, c->T + PANEL, c->d, streams})) return false;
  for (int64_t i = 0; i < c->blocks; i++)
    if (!block_fits(c->block[i], *c, streams)) return false;
  return true;
}

bool head_fits(const SegmentCall& c) {
  if (c.vocab > HEAD_MOST) return !c.logits && !c.nats && !c.last && !c.learns && !c.finite;
  if (!c.targets) return !c.nats && !c.learns;
  if (!c.known) return false;
  for (int64_t b = 0; b < c.B; b++) {
    if (c.known[b] < 0 || c.known[b] > c.len[b]) return false;
    for (int64_t t = 0; t < c.known[b]; t++)
      if (c.targets[b * c.stride + t] < 0 || c.targets[b * c.stride + t] >= c.vocab) return false;
  }
  return true;
}

bool steps_fit(const SegmentStep* steps, int64_t B) {
  for (int64_t b = 0; steps && b < B; b++) {
    const SegmentStep& s = steps[b];
    if (s.weight && (!step_fits({s.rule, s.lr, s.mu, s.beta2, s.first, s.second, s.root, s.eps},
                                {s.weight, s.moment, s.square, s.total, nullptr}) ||
                     s.whole < AS_IT_IS || s.whole > NORMALISED || (s.whole && !s.total)))
      return false;
  }
  return steps;
}

// Of what `step` and, unless it is null, `other` are given.
bool inverses_fit(const RowInverse* inverses, const SegmentStep* step, const SegmentStep* other, int64_t B) {
  for (int64_t b = 0; inverses && b < B; b++) {
    if (!inverse_fits(inverses[b])) return false;
    for (const SegmentStep* s : {step, other})
      if (s && inverses[b].how == BY_THE_SUM && s[b].weight && !s[b].total) return false;
  }
  return true;
}

bool learning_fits(const SegmentCall& c) {
  for (int64_t i = 0; i < c.blocks; i++)
    for (int64_t l = 0; l < c.block[i].levels; l++) {
      const SegmentLevel& level = c.block[i].level[l];
      if (!level.learns) continue;
      const SegmentStep* gate = level.gate ? level.gate_step : nullptr;
      if (!steps_fit(level.up_step, c.B) || !steps_fit(level.down_step, c.B) || (level.gate && !steps_fit(gate, c.B)))
        return false;
      if (!level.preconditioned && (level.inverse || level.inverse_down)) return false;
      if (!inverses_fit(level.inverse, level.up_step, gate, c.B) ||
          !inverses_fit(level.inverse_down, level.down_step, nullptr, c.B))
        return false;
    }
  return c.keep && all_given({c.work, c.learns});
}

bool empty(const SegmentCall& c) { return c.B * c.T == 0; }

}  // namespace

extern "C" int64_t hope_segment_floats(const SegmentCall* c) {
  int64_t floats = -1;
  if (fits(c)) outcome_of([&] { floats = Segment(*c, nullptr).floats(); });
  return floats;
}

extern "C" int hope_segment_read(const SegmentCall* c) {
  if (!fits(c) || !c->work) return BAD_ARGUMENT;
  if (empty(*c)) return DONE;
  return outcome_of([c] { wide() ? avx512::segment_read(*c) : segment_read(*c); });
}

extern "C" int hope_segment_head(const SegmentCall* c) {
  if (!fits(c) || !c->work || !head_fits(*c)) return BAD_ARGUMENT;
  if (empty(*c)) return DONE;
  return outcome_of([c] { wide() ? avx512::segment_head(*c) : segment_head(*c); });
}

extern "C" int hope_segment_learn(const SegmentCall* c) {
  if (!fits(c) || !learning_fits(*c)) return BAD_ARGUMENT;
  if (empty(*c)) return DONE;
  return outcome_of([c] { wide() ? avx512::segment_learn(*c) : segment_learn(*c); });
}
