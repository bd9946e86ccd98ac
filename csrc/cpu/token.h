// One token a row through a whole model in one call (called by hope_kernels/engine/native.py). All fp32, contiguous;
// row-major but for matrices, which are hope_token_strips; d, and what is said to be a width, are multiples of 8.
#pragma once
#include "attention.h"
#include "call.h"
#include "cms.h"

struct TokenLevel {
  int64_t kind, N;                                   // a LevelKind; N: a width
  LevelVectors vectors;
  // [B]: every row's own matrix, or the one it shares: [N, d], [N, d] (null without a gate), [d, N]
  const float *const *up, *const *gate, *const *down;
  LevelLowRank low;                                  // whose matrices are strips, too
  float share;                                       // of what it adds to the stream: 1, but of a mixture's levels
};

// A mixer of memories.
struct TokenMemories {
  const float* conv;                                 // [d, W], or null: no convolution
  float* tail;                                       // [B, W - 1, d], advanced in place
  const float *in_proj, *q_proj, *gate_proj, *out_proj;  // [d, d]; null where there is none
  const float *k_proj, *v_proj;                      // [d, d], of memories that are given theirs; else null, as these
  const float *eta_proj, *alpha_proj, *beta_proj;    // [H, d]; beta's for a learned momentum, with
  const float* beta_bias;                            // [H]
  float beta;                                        // the momentum, if there is one that is not learned
  const float *out_gain, *post_gain;                 // [H, D] and [d], of the norm behind the mixer, or null
  TitansCall titans;                                 // T = 1; q, x, k, v, eta, alpha, beta, o and kept are not looked at
  float* packed;                                     // hope_token_packed floats, written by hope_token_pack
  int64_t* count;                                    // [B], tokens read, advanced in place; or null
};

// A mixer of attention to cached keys and values, to which the token's are appended: they are written at slot used[b].
struct TokenAttention {
  AttentionCall call;                                // T = 1, len 1; q, far, k, v, y and threads are not looked at
  float *k, *v;                                      // [B, slots, Hkv, D]
  const float *q_proj, *k_proj, *v_proj, *o_proj;    // [H D, d], twice [Hkv D, d], and [d, H D]
  const float *q_bias, *k_bias, *v_bias;             // [H D], [Hkv D], or null
  const float *q_gain, *k_gain;                      // [D], a width then; both null: no norm of heads
  const float* post_gain;                            // [d], of the norm behind the mixer, or null
  // [D / 2] of row b at b `ahead`: the angles of its position, and those from which it sees the sinks (null without)
  const float *cos, *sin, *far_cos, *far_sin;
  int64_t ahead;
};

struct TokenBlock {
  const float* gain;                                 // [d], of the norm before the mixer
  const TokenMemories* memories;                     // the mixer, and the other one null
  const TokenAttention* attention;
  int64_t levels;
  const TokenLevel* level;
  int64_t mixture;                                   // 1: every level reads what the first one does
};

struct TokenCall {
  int64_t B, d, W, vocab, blocks, threads;
  int32_t finite;                                    // 1: refuse logits that are not
  float eps, scale;                                  // of the norms of heads, blocks, levels and model; of embeddings
  const int64_t* ids;                                // [B]
  const float *embed, *gain, *head;                  // [vocab, d] (row-major), [d], [vocab, d]
  const TokenBlock* block;
  float *logits, *work;                              // [B, vocab]; hope_token_work floats
};

extern "C" {
int64_t hope_token_packed(const TitansCall*);  // floats that a block's weights in force take, packed
int64_t hope_token_work(const TokenCall*);     // floats; both -1 for arguments that do not fit each other
// W [rows, K] as a step takes it: K times as many floats as rows, rounded up to a multiple of 8.
int hope_token_strips(int64_t rows, int64_t K, const float* W, float* to);
// Packs the weights in force of all memories: before the first step, and whenever others have changed them.
int hope_token_pack(const TokenCall*);
// Reads ids: writes logits and advances what the blocks point to. Or, before anything is advanced, 1 when memory
// runs out, 2 for arguments that do not fit each other, 3 for logits that are not finite: the slots that keys and
// values of the token would have are then zero.
int hope_token_step(const TokenCall*);
}
