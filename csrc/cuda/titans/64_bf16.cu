// The memory's kernels for heads of width 64, operands in bf16.
#include "launch.cuh"

namespace hope {
const char* launch_64_bf16(const TitansParams& p, const Device& device, void* stream) {
  if (by_warpgroups(p, 64, true, device)) return launch_64_bf16_warpgroups(p, device, stream);
  return launch_activation<64, bf16>(p, device, stream);
}

#ifdef __CUDACC__
int titans_image() {
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, titans_decode<64, bf16, kGeluTanh>) == cudaSuccess) return found.ptxVersion;
  cudaGetLastError();  // clears the error, so that no later call reports it
  return 0;
}
#endif
}  // namespace hope
