// The entry points of launch.h.
#include "launch.cuh"

namespace hope {

const char* titans_unserved(int D, int N, int C, const Device& device) {
  if (device.capability < 80) return "needs compute capability 8.0 or more";
  if (device.image == 0) return "the library holds no code for this device; build it there";
  const bool width = (D == 64 && (N == 64 || N == 128 || N == 256)) || (D == 128 && (N == 128 || N == 256));
  if (!width) return "serves heads of width 64 with 64, 128 or 256 hidden units and of width 128 with 128 or 256";
  if (C != 16 && C != 32 && C != 64) return "serves chunks of 16, 32 and 64 tokens";
  const Plan plan = make_plan(D, N, C, true, true, device);
  if (plan.shared_bytes > device.shared_bytes) return "needs more shared memory a block than the device has";
  if (plan.weights < 0 && !may_be_off_chip(device.image))
    return "the library's code expects more shared memory than the device has; build it there";
  return nullptr;
}

Workspace titans_workspace(const TitansParams& p, int D, const Device& device) {
  const Plan plan = make_plan(D, p.N, p.C, p.flags & kRetention, p.flags & kUpdate, device);
  const int64_t groups = static_cast<int64_t>(p.B) * p.H;
  int64_t scratch = plan.scratch_bytes;
  if (by_warpgroups(p, D, true, device)) {  // as of bf16: what the tensors are is not known here
    const int64_t other = make_warpgroup_plan(p.N, p.flags & kRetention).scratch_bytes;
    scratch = other > scratch ? other : scratch;
  }
  return {groups * plan.blocks * scratch, 1 + groups};
}

const char* titans_at_once(int D, int N, int C, Device device, int* found) {
  TitansParams p{};
  p.T = 2, p.B = p.H = 1, p.N = N, p.C = C, p.flags = kRetention | kUpdate;
  device.at_once = found;
  return D == 64 ? launch_64_bf16(p, device, nullptr) : launch_128_bf16(p, device, nullptr);
}

const char* titans_scan(TitansParams p, int D, Element element, const Device& device, void* stream) {
  if (p.T > INT32_MAX) return "serves up to 2^31 - 1 tokens a call";
  const int64_t groups = static_cast<int64_t>(p.B) * p.H;
  if (groups == 0 || p.T == 0) return nullptr;
  if (element == Element::kBf16)
    return D == 64 ? launch_64_bf16(p, device, stream) : launch_128_bf16(p, device, stream);
  return D == 64 ? launch_64_fp16(p, device, stream) : launch_128_fp16(p, device, stream);
}

}  // namespace hope
