// The attention of a block, with everything that lies between the residual stream and its cache.
#pragma once
#include "attention.h"
#include "check.h"

struct AttentionMixer {
  const float* gain;                       // [d], of the norm before
  const float *q_proj, *k_proj, *v_proj, *o_proj;  // [H D, d], [Hkv D, d] twice, [d, H D]
  const float *q_bias, *k_bias, *v_bias;   // of the first three, or null
  const float *q_gain, *k_gain;            // [D], of the norms of heads, or both null
  // [rotations, T, D / 2]: of the pairs of a head, by the token's place; far: as it sees the sinks, or both null
  const float *cos, *sin, *far_cos, *far_sin;
  float *k, *v;                            // the caches, where the tokens that are read are put
  AttentionCall attention;                 // but for T, q, far, k, v, len, y; used and base are those before the call
};

// Whether it reads T tokens of B rows, of which len count.
inline bool mixer_fits(const AttentionMixer& m, int64_t B, int64_t T, int64_t d, const int64_t* len) {
  AttentionCall t = m.attention;
  t.T = T, t.q = m.gain, t.y = m.k, t.k = m.k, t.v = m.v, t.len = len;
  return attention_fits(t) && t.B == B && t.D % 2 == 0 && extents({B, T + 16, t.H, t.D}) && extents({d, t.H, t.D}) &&
         all_given({m.gain, m.q_proj, m.k_proj, m.v_proj, m.o_proj, m.cos, m.sin, m.k, m.v}) &&
         !m.far_cos == !m.far_sin && !m.q_gain == !m.k_gain && (!m.q_gain || width(t.D));
}
