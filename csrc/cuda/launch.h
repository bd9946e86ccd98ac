// The host side of the memory's kernels: what they serve, what they need, and how they start. No torch in it.
#pragma once
#include <cstdint>

#include "params.h"

namespace hope {

enum class Element { kBf16, kFp16 };

// A flag beside those of params.h, with kUpdate: pos is advanced as well.
constexpr int kCount = 1 << 16;

// TitansParams::rounded (titans/rounded.cuh): 16-bit numbers that are kept of a warp, and the warps of a head;
// none where a memory has two blocks. hope_kernels/ops/titans/rounded.py counts likewise.
constexpr int kKeptNumbers = 4096 + 2 * 64 + 8;
constexpr int64_t kept_warps(int64_t D, int64_t N) { return N * D <= 16384 ? 4 * N * D / 2048 : 0; }

struct Device {
  int capability;    // 80, 86, 90, 100, ..
  int shared_bytes;  // the most dynamic shared memory a block may have
  int image;         // the architecture that its code was compiled for, as capability (titans_image); 0: no code
  int multiprocessors;
  int* at_once = nullptr;  // a launch only answers here: how many (row, head) pairs it would run at once
};

// Of the current device.
int titans_image();

// What a call needs beyond its tensors.
struct Workspace {
  int64_t scratch_bytes;  // TitansParams::scratch
  int64_t arrivals;       // TitansParams::arrivals, unsigned ints
};

// Why heads of width D, hidden width N and chunks of C tokens are not served on the device, or null.
const char* titans_unserved(int D, int N, int C, const Device& device);

Workspace titans_workspace(const TitansParams& params, int D, const Device& device);

// How many (row, head) pairs of a prefill the device runs at once; their blocks are a cluster each where the
// architecture has clusters. For what titans_unserved does not refuse. Null, or CUDA's error.
const char* titans_at_once(int D, int N, int C, Device device, int* found);

// One call: T tokens of every row are read and written. One token a row has kernels of its own
// (titans/decode.cuh), with the same bits. For what titans_unserved does not refuse. Null, or CUDA's error.
const char* titans_scan(TitansParams params, int D, Element element, const Device& device, void* stream);

}  // namespace hope
