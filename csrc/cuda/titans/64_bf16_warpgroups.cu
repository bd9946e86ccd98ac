// The memory's kernels for heads of width 64, operands in bf16, whose chunks are committed by products of
// warpgroups.
#include "launch.cuh"

namespace hope {
const char* launch_64_bf16_warpgroups(const TitansParams& p, const Device& device, void* stream) {
  if (p.N == 64)
    return p.activation == kGeluTanh ? launch_warpgroups<kGeluTanh, kOneBlock>(p, device, stream)
                                     : launch_warpgroups<kSilu, kOneBlock>(p, device, stream);
  return p.activation == kGeluTanh ? launch_warpgroups<kGeluTanh, kWarpgroups>(p, device, stream)
                                   : launch_warpgroups<kSilu, kWarpgroups>(p, device, stream);
}
}  // namespace hope
