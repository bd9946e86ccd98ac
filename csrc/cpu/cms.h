// What a CMS level does between its products, and its updates (called by hope_kernels/ops/cms/cpp.py and
// cpp_step.py). fp32 but where said otherwise, contiguous; but for updates n and d are multiples of 8. Each
// returns 0; 1 where memory ran out; or, before anything is written, 2 for arguments that do not fit each other
// (check.h).
#pragma once
#include <cstdint>

// a = gelu_tanh(up n), silu(gate n) (up n), gelu_tanh(gate n) (up n) or gelu(up n), where n is the norm of x; and a
// level makes x + share y of it, y = down a or rmsnorm(down a) post_gain
enum LevelKind { GELU_LEVEL = 0, SWIGLU_LEVEL = 1, GEGLU_LEVEL = 2, GELU_ERF_LEVEL = 3 };

inline bool kind_fits(int64_t kind, bool gate) {
  return kind >= GELU_LEVEL && kind <= GELU_ERF_LEVEL && gate == (kind == SWIGLU_LEVEL || kind == GEGLU_LEVEL);
}

// Of a level, all but gain null where it has none. n = rmsnorm(x) gain, or with a shift layernorm(x) gain + shift; the
// biases join what the matrices make.
struct LevelVectors {
  const float *gain, *shift, *post_gain;           // [d]
  const float *up_bias, *gate_bias, *down_bias;    // [N], [N], [d]
};

// What rows have learned of a level's matrices as products of two thin ones: W_b = W + L_b S.
struct LevelLowRank {
  int64_t rank;                                    // a width; 0: they learn whole matrices, and all else is null
  const float *across, *across_down;               // S of what reads n, [rank, d], and of `down`, [rank, N]
  // [B]: every row's L [N, rank], [N, rank] (null without a gate), [d, rank], or null where it has learned nothing
  const float *const *up, *const *gate, *const *down;
};

inline bool low_rank_fits(const LevelLowRank& low, int64_t d, int64_t N, bool gate) {
  if (low.rank == 0) return true;
  return low.rank > 0 && low.rank % 8 == 0 && low.rank <= d && low.rank <= N && low.across && low.across_down &&
         low.up && low.down && !low.gate == !gate;
}

extern "C" {
// a = gelu_tanh(z), or with erf 1 gelu(z); slope = its derivative, null: not wanted
int hope_cms_gelu(int64_t n, int64_t threads, int32_t erf, const float* z, float* a, float* slope);
// a = silu(g) z, or with silu 0 gelu_tanh(g) z
int hope_cms_gate(int64_t n, int64_t threads, int32_t silu, const float* g, const float* z, float* a);
// dx [rows, d] = dy + the gradient of rms_norm(x) gain by x, for dn at its output; dy null: 0. dgain [d]: the gradient
// by gain; null: not wanted
int hope_cms_norm_backward(int64_t rows, int64_t d, int64_t threads, float eps, const float* x,
                           const float* gain, const float* dn, const float* dy, float* dx, float* dgain);
// One step of n weights from the gradient grad + total, of which one may be null: cms_step.h says what the rules
// are. copy: bf16, or null.
int hope_cms_step(int64_t n, int64_t threads, int64_t rule, float lr, float mu, float beta2, float first,
                  float second, float root, float eps, const float* grad, float* total, float* weight,
                  float* moment, float* square, uint16_t* copy);
// The same for a matrix [r, c] with left^T right in the place of grad: bf16 factors [C, r] and [C, c]. Where
// hope_cms_bf16() is not 0.
int hope_cms_step_bf16(int64_t C, int64_t r, int64_t c, int64_t threads, int64_t rule, float lr, float mu,
                       float beta2, float first, float second, float root, float eps, const uint16_t* left,
                       const uint16_t* right, float* total, float* weight, float* moment, float* square,
                       uint16_t* copy);
int hope_cms_bf16();  // whether the CPU multiplies bf16 numbers
}
