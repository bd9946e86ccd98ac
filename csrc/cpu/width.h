// Which vectors the products and activations of a call are computed in. Every number is the same chain of operations in
// all, so it has the same bits.
#pragma once
#include "call.h"

#if defined(__x86_64__) && !defined(__clang__)  // whose pragma lets a file be compiled for other CPUs
#define HOPE_AVX512
#endif

namespace avx512 {  // titans_avx512.cpp: the same code, compiled for sixteen floats at a time
void all_heads(const TitansCall& c);
void all_heads_backward(const TitansBackward& a);
void commit_open(const TitansCall& c, int64_t b, int64_t h, int64_t end, float* scratch, float* own);
}  // namespace avx512

bool wide();  // whether they are taken: where the CPU has them, unless hope_cpu_width has said otherwise
