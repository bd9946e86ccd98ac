// The memory's kernels for heads of width 64, operands in bf16.
#include "launch.cuh"

namespace hope {
const char* launch_64_bf16(const TitansParams& params, const Device& device, void* stream) {
  TitansParams p = params;
  if (by_warpgroups(p, 64, true, device)) {
    if (p.T == 1 && !in_one_launch(p, make_warpgroup_plan(p.N, true), device)) {
      const char* error = p.activation == kGeluTanh ? launch_decode<64, bf16, kGeluTanh>(p, device, stream)
                                                    : launch_decode<64, bf16, kSilu>(p, device, stream);
      if (error != nullptr) return error;
    }
    return launch_64_bf16_warpgroups(p, device, stream);
  }
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
