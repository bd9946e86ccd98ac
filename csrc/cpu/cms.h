// What a CMS level does between its products (called by hope_kernels/ops/cms/cpp.py). All fp32, contiguous;
// n and d are multiples of 8. Each returns 0; or, before anything is written, 2 for arguments that do not fit
// each other (check.h).
#pragma once
#include <cstdint>

extern "C" {
// a = gelu_tanh(z); slope = its derivative, null: not wanted
int hope_cms_gelu(int64_t n, int64_t threads, const float* z, float* a, float* slope);
// dx [rows, d] = dy + the gradient of rms_norm(x) gain by x, for dn at its output; dy null: 0
int hope_cms_norm_backward(int64_t rows, int64_t d, int64_t threads, float eps, const float* x,
                           const float* gain, const float* dn, const float* dy, float* dx);
}
