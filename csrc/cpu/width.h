// Which vectors the products of a call are computed in. Every number is the same chain of operations in both, so it
// has the same bits.
#pragma once
#include "call.h"

namespace avx512 {  // titans_avx512.cpp: the same code, compiled for sixteen floats at a time
void all_heads(const TitansCall& c);
void commit_open(const TitansCall& c, int64_t b, int64_t h, int64_t end, float* scratch, float* own);
}  // namespace avx512

bool wide();  // whether they are taken: where the CPU has them, unless hope_cpu_width has said otherwise
