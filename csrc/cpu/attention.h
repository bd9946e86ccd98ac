// Causal softmax attention of a call's queries to a cache of keys and values (called by
// hope_kernels/ops/attention/cpp.py). All fp32, row-major, contiguous.
#pragma once
#include <cstdint>

struct AttentionCall {
  int64_t B, T, H, Hkv, D, slots;  // rows, tokens, heads of queries and of keys, width of a head, slots of a row
  int64_t window, sinks, threads;  // window 0: every token before is seen, and sinks is 0
  float scale;                     // of the scores
  const float *q, *far;            // [B, T, H, D]; far: q as it sees the sinks; null: it is q
  const float *k, *v;              // [B, slots, Hkv, D]
  // [B]: query t of row b stands at slot used[b] + t; base[b]: tokens dropped between the sinks and the slots after
  // them; len[b]: queries that count. The others' outputs are zero.
  const int64_t *used, *base, *len;
  float* y;                        // [B, T, H, D]
  // [B, T, H], for a gradient: a query's largest score, in powers of two, and the sum of 2^(score - largest); or null
  float *most, *sum;
};

// The gradient of what a call has made, which is here once more, by its queries, and by the keys and values at slots
// used[b] + t: those before are constants. y, most and sum are as the call left them.
struct AttentionBackward {
  AttentionCall call;
  const float* dy;                 // [B, T, H, D]
  const int32_t* rows;             // [B]: which rows; those of others are left as they are; null: all
  // [B, T, H, D]: by the queries as they see the sinks, if there are any, and as they see all else. Zero past len, as
  // these:
  float *dfar, *dq;
  float *dk, *dv;                  // [B, T, Hkv, D]
};

extern "C" {
int hope_attention(const AttentionCall* call);
int hope_attention_backward(const AttentionBackward* call);
}
bool attention_fits(const AttentionCall& c);  // whether it takes the call
