// The memory's kernels for heads of width 128, operands in fp16.
#include "launch.cuh"

namespace hope {
const char* launch_128_fp16(const TitansParams& p, const Device& device, void* stream) {
  return launch_activation<128, fp16>(p, device, stream);
}
}  // namespace hope
