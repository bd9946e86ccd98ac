// The memory's kernels for heads of width 128, operands in bf16.
#include "launch.cuh"

namespace hope {
const char* launch_128_bf16(const TitansParams& p, const Device& device, void* stream) {
  return launch_activation<128, bf16>(p, device, stream);
}
}  // namespace hope
