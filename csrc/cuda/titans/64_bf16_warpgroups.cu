// The memory's kernels for heads of width 64, operands in bf16, whose chunks are committed by products of
// warpgroups.
#include "launch.cuh"

namespace hope {
const char* launch_64_bf16_warpgroups(const TitansParams& p, const Device& device, void* stream) {
  return p.activation == kGeluTanh ? launch_warpgroups<kGeluTanh>(p, device, stream)
                                   : launch_warpgroups<kSilu>(p, device, stream);
}
}  // namespace hope
