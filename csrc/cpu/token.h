// One token a row through a whole model of self-modifying blocks (called by hope_kernels/engine/native.py). All
// fp32, contiguous; row-major but for matrices, which are hope_token_strips; widths are multiples of 8.
#pragma once
#include "call.h"

struct TokenLevel {  // x + down gelu_tanh(up (rmsnorm(x) gain))
  int64_t N;
  const float* gain;                       // [d]
  const float *const *up, *const *down;    // [B]: every row's own matrix, or the one it shares: [N, d], [d, N]
};

struct TokenBlock {
  const float* gain;                       // [d], of the norm before the mixer
  const float* conv;                       // [d, W], or null: no convolution
  float* tail;                             // [B, W - 1, d], advanced in place
  const float *in_proj, *q_proj, *gate_proj, *out_proj;  // [d, d]; but for q_proj null where there is none
  const float* out_gain;                   // [H, D], or null
  // T = 1, memories that make their own k, v, eta, alpha; q, x, o, len and kept are not looked at
  TitansCall titans;
  float* packed;                           // hope_token_packed floats, written by hope_token_pack
  int64_t levels;
  const TokenLevel* level;
  int64_t* count;                          // [B], tokens read, advanced in place; or null
};

struct TokenCall {
  int64_t B, d, W, vocab, blocks, threads;
  int32_t finite;                          // 1: refuse logits that are not
  float eps;                               // of the norms of blocks, levels and model
  const int64_t* ids;                      // [B]
  const float *embed, *gain, *head;        // [vocab, d] (row-major), [d], [vocab, d]
  const TokenBlock* block;
  float *logits, *work;                    // [B, vocab]; hope_token_work floats
};

extern "C" {
int64_t hope_token_packed(const TitansCall*);  // floats that a block's weights in force take, packed
int64_t hope_token_work(const TokenCall*);     // floats; both -1 for arguments that do not fit each other
// W [rows, K] as a step takes it: K times as many floats as rows, rounded up to a multiple of 8.
int hope_token_strips(int64_t rows, int64_t K, const float* W, float* to);
// Packs the weights in force of every block: before the first step, and whenever others have changed them.
int hope_token_pack(const TokenCall*);
// Reads ids: writes logits and advances what the blocks point to. Or, before anything is advanced, 1 when memory
// runs out, 2 for arguments that do not fit each other, 3 for logits that are not finite.
int hope_token_step(const TokenCall*);
}
