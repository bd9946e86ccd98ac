// Gradients by the parameters around the memories (called by hope_kernels/ops/{conv,output_gate}/cpp_training.py).
// fp32, row-major, contiguous; d = H D and D are multiples of 8. Each returns 0; or, before anything is written, 1
// when memory runs out and 2 for arguments that do not fit each other (check.h).
#pragma once
#include <cstdint>

extern "C" {
// dweight [d, W] of hope_conv's y for all T tokens of x [B, T, d], from dy [B, T, d]; tail [B, W - 1, d]
int hope_conv_weight_backward(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads, const float* x,
                              const float* tail, const float* dy, float* dweight);
// dgain [H, D] of hope_output_gate from dy [tokens, H, D]; gate null: no gate
int hope_output_gate_gain_backward(int64_t tokens, int64_t H, int64_t D, int64_t threads, const float* o,
                                   const float* gate, const float* dy, float* dgain);
}
