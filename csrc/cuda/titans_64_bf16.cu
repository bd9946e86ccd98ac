// The memory's kernels for heads of width 64, operands in bf16.
#include "titans_launch.cuh"

namespace hope {
const char* launch_64_bf16(const TitansParams& p, const Device& device, void* stream) { return launch_activation<64, bf16>(p, device, stream); }
}  // namespace hope
