// The layer around the memories (called by hope_kernels/ops/{conv,unit,output_gate}/cpp.py). All fp32, row-major,
// contiguous; d = H D and D are multiples of 8. Each returns 0; or, before anything is written, 1 when memory
// runs out and 2 for arguments that do not fit each other (check.h).
#pragma once
#include <cstdint>

extern "C" {
// y [B, T, d]: y_t = sum_j weight[:, j] input_{t+j} over [tail, x]; zero from len[b] on. weight [d, W], tails
// [B, W - 1, d], x [B, T, d].
int hope_conv(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads, const float* x, const float* tail,
              const float* weight, const int64_t* len, float* y, float* new_tail);
// dx from dy [B, T, d], which is zero past a row's length
int hope_conv_backward(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads, const float* weight,
                       const float* dy, float* dx);
// y = x / max(|x|, 1e-6) for rows of D
int hope_unit(int64_t rows, int64_t D, int64_t threads, const float* x, float* y);
int hope_unit_backward(int64_t rows, int64_t D, int64_t threads, const float* x, const float* dy, float* dx);
// y = rmsnorm(o) gain silu(gate) for [tokens, H, D]; gain [H, D] null: no norm; gate null: no gate
int hope_output_gate(int64_t tokens, int64_t H, int64_t D, int64_t threads, const float* o, const float* gain,
                     const float* gate, float* y);
int hope_output_gate_backward(int64_t tokens, int64_t H, int64_t D, int64_t threads, const float* o,
                              const float* gain, const float* gate, const float* dy, float* d_o,
                              float* dgate);
}
