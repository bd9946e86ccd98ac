// What a step asks of its gradient as a whole, and not weight by weight (called by hope_kernels/ops/cms/cpp_step.py).
// fp32, row-major, contiguous; returns as cms.h has it.
#pragma once
#include <cstdint>

enum Whole { AS_IT_IS = 0, ORTHOGONAL = 1, NORMALISED = 2 };

extern "C" {
// Of each of `count` matrices [r, c] of `from`, about U V^T of its singular value decomposition, to `to`, which may be
// `from`: Newton-Schulz, the five steps of level.py
int hope_newton_schulz(int64_t count, int64_t r, int64_t c, int64_t threads, const float* from, float* to);
// x = x / rms(x), n numbers; those of RMS 1e-30 and below divided by that
int hope_normalise(int64_t n, int64_t threads, float* x);
}
