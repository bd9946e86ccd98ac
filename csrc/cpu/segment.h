// A segment through a whole model of memories or of attention, and its loss back through it (called by
// hope_kernels/engine/native_reading.py). All fp32, row-major, contiguous; widths are multiples of 8.
#pragma once
#include "attention_mixer.h"
#include "call.h"
#include "cms.h"
#include "precondition.h"

constexpr int64_t HEAD_MOST = 4096;  // tokens of a vocabulary whose logits are panels of the work space

// What a row does with the gradient of one of its matrices, as cms_step.h has it; weight null: nothing. whole: what the
// gradient becomes before (cms_whole.h), once it is in total.
struct SegmentStep {
  int64_t rule, whole;
  float lr, mu, beta2, first, second, root, eps;
  float *total, *weight, *moment, *square;
};

struct SegmentLevel {
  int64_t kind, N;                               // a LevelKind
  int64_t learns, preconditioned;                // whether its gradient is wanted; whether rows may have a P
  LevelVectors vectors;
  // [B]: every row's own matrix, or its shared one: [N, d], [N, d] (null without a gate), [d, N]
  const float *const *up, *const *gate, *const *down;
  LevelLowRank low;                              // steps are those of L then
  const SegmentStep *up_step, *gate_step, *down_step;  // [B], for hope_segment_learn, where it learns; and of what up and
  const RowInverse *inverse, *inverse_down;            // gate, or down, are given; null: no row has any P
  float share;                                   // of what it adds to the stream: 1, but of a mixture's levels
};

// What a mixer has of B rows: as in TitansCall, and the convolution's last inputs [B, W - 1, d].
struct SegmentMemory {
  float *delta2, *delta1, *delta1s, *s2, *s1, *s1s;
  float *pending_k, *pending_v, *pending_eta, *pending_alpha, *pending_beta, *tail;
};

struct SegmentBlock {
  // Of a block with attention, whose angles are [rotations, stride, D / 2]; of the others null. Its caches hold the
  // tokens that are read from their slots on, and are the same from segment to segment.
  const AttentionMixer* attention;
  const float* post_gain;                  // [d], of the norm behind the mixer, or null
  // Of one with memories; with attention, up to `levels`, not looked at.
  const float* gain;                       // [d], of the norm before the mixer
  const float* conv;                       // [d, W], or null: no convolution
  const float *in_proj, *q_proj, *gate_proj, *out_proj;  // [d, d]; null where there is none
  const float *k_proj, *v_proj;            // [d, d], for memories that are given theirs; else null, as these [H, d]:
  const float *eta_proj, *alpha_proj, *beta_proj;        // alpha's with retention; beta's for a learned momentum,
  const float* beta_bias;                  // with its bias [H]
  float beta;                              // the momentum, if there is one that is not learned
  const float* out_gain;                   // [H, D], or null
  // T tokens; q, x, k, v, eta, alpha, beta, o, kept weights, and what a SegmentMemory has are not looked at
  TitansCall titans;
  SegmentMemory before, after;             // the second becomes what a reading makes of the first
  int64_t levels;
  const SegmentLevel* level;
  int64_t mixture;                         // 1: every level reads what the first one does
};

struct SegmentCall {
  int64_t B, T, d, W, vocab, blocks, threads;
  int64_t stride;                          // from a row's first token to the next row's, in all but slopes
  int64_t rotations;                       // 1: all rows stand at one place; or B
  int32_t keep;                            // whether hope_segment_learn is to follow
  float eps;                               // of the norms of blocks, levels and model
  float scale;                             // of the vectors of `embed` as they are read, not of those of a head
  const int64_t *ids, *len;                // [B, T], of which len [B] tokens a row count
  const float *embed, *gain, *head;        // [vocab, d], [d], [vocab, d]
  const SegmentBlock* block;
  float* work;                             // hope_segment_floats numbers, from a reading to what follows it
  // The head's, for vocabularies of at most HEAD_MOST; each but for known may be null. Past known[b] no loss is
  // written, past len[b] no logits are.
  const int64_t *targets, *known;          // [B, T], [B]
  float *logits, *nats, *last;             // [B, T, vocab], [B, T], [B, vocab]: after each row's last token
  float* h;                                // [B, T, d], what the head is given (before its norm)
  int32_t* finite;                         // [B]: becomes 0 where a logit of a row's tokens is not
  // Rows whose loss is differentiated [B]; null: none is.
  const int32_t* learns;
  const float* slopes;                     // [B, T, d], dL/dh from elsewhere; null: hope_segment_head has them
};

// Segments one after another, each read, then its head, and learned where there are steps.
struct SegmentsCall {
  SegmentCall first;                       // len and known are those of all; without slopes
  int64_t count;
  const SegmentMemory* other;              // [blocks], of memories: what `after` is to the first, to the second
  // [count, levels of all blocks, 5]: up_, gate_ and down_step, inverse and inverse_down, as SegmentLevel has them; or
  // null
  const void* const* steps;
  // The running mean of a row's loss a token, and the rise above it that ends the reading; null: nothing does.
  double *mean, rise, share;               // mean <- (1 - share) mean + share loss
};

extern "C" {
int64_t hope_segment_floats(const SegmentCall*);  // -1 for arguments that do not fit each other
// Reads ids through all blocks.
int hope_segment_read(const SegmentCall*);
// What follows a reading with the same work: h, logits, losses, and of `learns` the slopes, dL/dh.
int hope_segment_head(const SegmentCall*);
// What follows a head, or slopes, after a reading with keep: takes them back through the model, level after level,
// and the steps of `learns`, each once the backward has left its level. Its weights may be those that were read.
int hope_segment_learn(const SegmentCall*);
// All of it; or as far as logits are finite (if first.finite is given) and losses even. done: how many segments; the
// memories after them are `after` of an odd number, `other` of an even one. Of the one behind them, memories, losses
// and logits may have been written.
int hope_segments(const SegmentsCall*, int64_t* done);
}
