// Drawing the next token from logits (called by hope_kernels/engine/sampling.py).
#pragma once
#include <cstdint>

extern "C" {
// tokens [B]: of every row of logits [B, V] (doubles where wide, else floats) one token from softmax(logits /
// temperature), among the top_k likeliest and of these among the likeliest whose mass reaches top_p; of equals the
// lowest ids are the likelier ones. u [B], in [0, 1): where the draw falls. temperature > 0, 1 <= top_k <= V,
// 0 < top_p; from 1 on all have a place. A row with NaN, or all at -inf, gets -1. Returns 0, 1 where there is no
// memory, or 2 for arguments that do not fit each other.
int hope_draw(int64_t B, int64_t V, int64_t wide, const void* logits, double temperature, int64_t top_k, double top_p,
              const double* u, int64_t* tokens);
}
