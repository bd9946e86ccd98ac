// Steps that keep what was learned (hope_kernels/ops/cms/precondition.py): P = (I + sum X^T X / ridge)^-1 over the inputs
// X of a matrix, symmetric to the bit as it is handed over and given back. fp32, row-major, contiguous; returns as cms.h
// has it.
#pragma once
#include <cstdint>

// What a row does with the P of a matrix's inputs in a step.
enum Preconditioning {
  NOT_AT_ALL = 0,
  AT_ONCE = 1,      // the step is taken with X P in the place of X; P takes X up, and `next`, if given, becomes P
  LATER = 2,        // `next` takes X up
  BY_THE_SUM = 3,   // `next` takes X up; the step is taken with the sum of gradients times P; P becomes `next`
};

struct RowInverse {
  int64_t how;
  float ridge;
  float *now, *next;  // [inputs, inputs]
};

inline bool inverse_fits(const RowInverse& of) {
  if (of.how < NOT_AT_ALL || of.how > BY_THE_SUM || (of.how && !(of.ridge > 0))) return false;
  return (of.how == NOT_AT_ALL || of.how == LATER || of.now) && (of.how < LATER || of.next);
}

extern "C" {
// P [c, c] takes the inputs X [n, c] up; c is a multiple of 8.
int hope_take_up(int64_t n, int64_t c, int64_t threads, float ridge, const float* X, float* P);
// G [r, c] = G P
int hope_precondition(int64_t r, int64_t c, int64_t threads, const float* P, float* G);
}
