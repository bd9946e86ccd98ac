// Whether the sizes and pointers of a decoder's step fit each other (check.h).
#pragma once
#include "attention_call.h"
#include "titans_check.h"
#include "token.h"

inline bool memories_fit(const TokenMemories& m, const TokenCall& c) {
  const TitansCall& t = m.titans;
  if (!t.self_modifying && (!all_given({m.k_proj, m.v_proj, m.eta_proj}) || (t.retention && !m.alpha_proj)))
    return false;
  if (!t.s2 != !t.pending_beta || (m.beta_proj && !m.beta_bias)) return false;
  return memory_sizes_fit(t) && m.packed && !m.q_proj == adaptive_q(t) &&
         (!m.conv || (c.W >= 1 && (c.W == 1 || m.tail))) && t.B == c.B && t.T == 1 && t.H * t.D == c.d && t.update &&
         !t.kept2 && all_given({t.delta2, t.pending_k, t.pending_v, t.pending_eta, t.eta_bias, t.pos, t.len}) &&
         rows_fit(c.B, 1, t.pos, t.len) && weights_fit(t, t.delta2, t.delta1, t.delta1s) &&
         weights_fit(t, t.base2, t.base1, t.base1s) && weights_fit(t, t.s2, t.s1, t.s1s) &&
         (!t.retention || all_given({t.pending_alpha, t.alpha_bias}));
}

// But for the caches, which may be full until the token is read.
inline bool attention_fits(const TokenAttention& m, const TokenCall& c) {
  const AttentionCall& a = m.call;
  return attention_sizes_fit(a) && a.B == c.B && a.T == 1 && a.D % 2 == 0 && a.D <= 1 << 16 && a.H <= 1 << 16 &&
         extents({c.d, a.H, a.D}) && all_given({m.q_proj, m.k_proj, m.v_proj, m.o_proj}) && !m.q_gain == !m.k_gain &&
         (!m.q_gain || width(a.D));
}

inline bool level_fits(const TokenLevel& level, const TokenCall& c) {
  if (!width(level.N) || !kind_fits(level.kind, level.gate) ||
      !low_rank_fits(level.low, c.d, level.N, level.gate) || !all_given({level.vectors.gain, level.up, level.down}))
    return false;
  for (int64_t b = 0; b < c.B; b++)
    if (!all_given({level.up[b], level.down[b]}) || (level.gate && !level.gate[b])) return false;
  return true;
}

inline bool block_fits(const TokenBlock& block, const TokenCall& c) {
  if (!block.gain || !block.memories == !block.attention || block.levels < 0 || (block.levels && !block.level))
    return false;
  if (block.memories ? !memories_fit(*block.memories, c) : !attention_fits(*block.attention, c)) return false;
  for (int64_t l = 0; l < block.levels; l++)
    if (!level_fits(block.level[l], c)) return false;
  return true;
}

inline bool step_fits(const TokenCall* c) {
  if (!c || !width(c->d) || !extent(c->W) || !extent(c->blocks) || c->vocab < 1 || !threads_fit(c->threads) ||
      !extents({c->B, c->W + 1, c->d, c->blocks + 1}) || !extents({c->vocab, c->d}) || !extents({c->B, c->vocab}))
    return false;
  if (!all_given({c->ids, c->embed, c->gain, c->head, c->logits}) || (c->blocks && !c->block)) return false;
  for (int64_t b = 0; b < c->B; b++)
    if (c->ids[b] < 0 || c->ids[b] >= c->vocab) return false;
  for (int64_t i = 0; i < c->blocks; i++)
    if (!block_fits(c->block[i], *c)) return false;
  return true;
}

// Whether every row has angles, and a slot for the token.
inline bool caches_fit(const TokenCall& c) {
  for (int64_t i = 0; i < c.blocks; i++) {
    const TokenAttention* m = c.block[i].attention;
    if (!m) continue;
    if (!all_given({m->cos, m->sin, m->k, m->v, m->call.used, m->call.base, m->call.len}) ||
        !m->far_cos != !m->call.sinks || !m->far_sin != !m->call.sinks || !extent(m->ahead) ||
        !attention_rows_fit(m->call))
      return false;
    for (int64_t b = 0; b < c.B; b++)
      if (m->call.len[b] != 1) return false;
  }
  return true;
}
