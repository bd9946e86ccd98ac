// What a launch of the memory's kernels is told: plain pointers and numbers, the same for nvcc and for a host
// compiler.
//
// B rows, T tokens, H heads of width D, N hidden units, M memories (in the order memory, k, v, eta[, alpha]),
// Mf = 3 of them with D outputs, Ms = M - 3 with one, C tokens a chunk. T (the type): bf16 or fp16; all
// tensors contiguous, batch first.
#pragma once
#include <cstdint>

namespace hope {

enum Activation : int { kGeluTanh = 0, kGelu = 1, kSilu = 2 };

// Bits of TitansParams::flags: the switches of the configuration (TitansConfig's names in parentheses).
enum Flag : int {
  kUnitK = 1,        // k is normalised (qk_l2norm)
  kSoftplus = 2,     // eta_activation == "softplus", else sigmoid
  kOwnValues = 4,    // own_values
  kTargetNorm = 8,   // target_norm
  kDot = 16,         // objective == "dot", else "l2"
  kDgd = 32,         // dgd
  kClip = 64,        // step_clip
  kRetention = 128,  // alpha is a memory of its own (retention)
  kUpdate = 256,     // tokens are appended and chunks committed; without it a pure read
  kFloatBias = 512,  // eta_bias and alpha_bias are fp32
};

struct TitansParams {
  const void* x;              // [B, T, H, D] T
  const void* q;              // [B, T, H, D] T
  void* o;                    // [B, T, H, D] T, zero past a row's length
  const void* base2;          // [H, M N, D] T, or null (retain_to == "zero")
  const void* base1;          // [H, Mf, D, N] T, or null
  const void* base1s;         // [H, Ms, N] T, or null
  float* delta2;              // [B, H, M N, D]
  float* delta1;              // [B, H, Mf, D, N]
  float* delta1s;             // [B, H, Ms, N]
  void* pending_k;            // [B, C, H, D] T
  void* pending_v;            // [B, C, H, D] T
  float* pending_eta;         // [B, C, H]
  float* pending_alpha;       // [B, C, H], or null
  const void* eta_bias;       // [H] T, or fp32 with kFloatBias
  const void* alpha_bias;     // [H] likewise, or null
  int64_t* pos;               // [B] tokens read before this call; advanced with kCount (launch.h)
  const int64_t* lengths;     // [B] tokens of this call, clamped to 0 .. T
  void* rounded;              // [B, H, warps, 4232] T: a token's weights (launch.h), or null
  unsigned char* scratch;     // what does not fit shared memory: Workspace::scratch_bytes
  unsigned int* arrivals;     // [1 + B H]: a ticket, and blocks that have arrived, a (row, head)
  int64_t T;
  int B, H, N, C;
  int activation, flags;
  float eta_scale, grad_scale;
};

}  // namespace hope
