// Projections of token rows, the norm before them, and gates of what they make (called by
// hope_kernels/ops/linear/cpp.py). All fp32, row-major, contiguous.
#pragma once
#include <cstdint>

extern "C" {
// y [n, R] = x [n, K] W^T (+ more [n, R], unless null), W [R, K]
int hope_linear(int64_t n, int64_t K, int64_t R, int64_t threads, const float* x, const float* W, const float* more,
                float* y);
// y = scale sigmoid(x + bias) for n rows of H, or with softplus 1 scale log(1 + e^(x + bias)): as scans have eta, alpha
int hope_gate(int64_t n, int64_t H, int32_t softplus, float scale, const float* x, const float* bias, float* y);
// y = x / sqrt(mean(x^2) + eps) gain for n rows of d, a multiple of 8
int hope_rms_norm(int64_t n, int64_t d, int64_t threads, float eps, const float* x, const float* gain, float* y);
// y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) gain + shift, for the same
int hope_layer_norm(int64_t n, int64_t d, int64_t threads, float eps, const float* x, const float* gain,
                    const float* shift, float* y);
}
