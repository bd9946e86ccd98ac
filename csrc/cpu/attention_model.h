// Tokens through the blocks of a model with attention, without learning (called by
// hope_kernels/engine/native_attention.py). All fp32, row-major, contiguous; d, hidden widths, and D where heads are
// normed, are multiples of 8; D is even.
#pragma once
#include "attention_mixer.h"

struct AttentionLevel {  // x + down sigma(up (rmsnorm(x) gain))
  int64_t kind, N;                       // GELU_LEVEL or GELU_ERF_LEVEL
  const float* gain;                     // [d]
  const float *const *up, *const *down;  // [B]: every row's own matrix, or its shared one: [N, d], [d, N]
};

struct AttentionBlock : AttentionMixer {
  int64_t levels;
  const AttentionLevel* level;
};

struct AttentionReading {
  int64_t B, T, d, blocks, threads;
  int64_t piece;      // tokens of a row that go through all blocks together
  int64_t rotations;  // 1: all rows stand at one place; or B
  float eps;          // of all norms
  const int64_t* len;  // [B], tokens that count; what becomes of the others means nothing
  const AttentionBlock* block;
  float* h;           // [B, T, d], what the first block is given; becomes what the last one makes
};

extern "C" int hope_attention_read(const AttentionReading* c);
