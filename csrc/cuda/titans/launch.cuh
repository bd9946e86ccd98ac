// Which kernel serves a call, and its launch. Included by one source file for each width and type.
#pragma once
#include "decode.cuh"

#ifdef __CUDACC__
#include <atomic>
#endif

namespace hope {

#ifdef __CUDACC__
// What Device::at_once asks for.
template <class Kernel>
cudaError_t count(Kernel kernel, const cudaLaunchConfig_t& config, const Plan& plan, int device, int* found) {
  if (config.numAttrs) return cudaOccupancyMaxActiveClusters(found, kernel, &config);
  int blocks = 0, multiprocessors = 0;
  cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, config.blockDim.x,
                                                                    config.dynamicSmemBytes);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *found = blocks * multiprocessors / plan.blocks;
  return error;
}

// A kernel of `blocks` blocks, in clusters of `cluster` if that is more than one. Null, or CUDA's error.
template <class Kernel>
const char* launch(Kernel kernel, std::atomic<uint64_t>& prepared, const TitansParams& p, const Plan& plan,
                   int64_t blocks, int threads, int cluster, const Device& device, void* stream) {
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const uint64_t bit = uint64_t{1} << (ordinal & 63);
  if (error == cudaSuccess && !(prepared.load(std::memory_order_relaxed) & bit)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = device.at_once ? count(kernel, config, plan, ordinal, device.at_once)
                           : cudaLaunchKernelEx(&config, kernel, p, plan);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#define HOPE_LAUNCH(kernel, ...)                         \
  [&](auto... arguments) {                               \
    static std::atomic<uint64_t> prepared{0};            \
    return launch(kernel, prepared, p, plan, arguments...); \
  }(__VA_ARGS__)
#else
inline const char* launch(void (*kernel)(TitansParams, Plan), const TitansParams& p, const Plan& plan,
                          int64_t blocks, int threads, int cluster, const Device& device, void*) {
  if (plan.shared_bytes > device.shared_bytes) return "more shared memory than the device has";
  if (device.at_once) {
    *device.at_once = emulator::options().resident / plan.blocks;
    return nullptr;
  }
  if (emulator::executor) {
    const struct { TitansParams p; Plan plan; } parameters{p, plan};
    const emulator::Launch what{emulator::place_of(kernel), &parameters, sizeof parameters,
                                emulator::regions.data(), static_cast<int64_t>(emulator::regions.size()),
                                blocks, threads, cluster, plan.shared_bytes};
    return emulator::executor(&what);
  }
  emulator::launch(static_cast<int>(blocks), threads, cluster, plan.shared_bytes, [&] { kernel(p, plan); });
  return nullptr;
}
#define HOPE_LAUNCH(kernel, ...) launch(kernel, p, plan, __VA_ARGS__)
#endif

// Blocks that meet through memory count their arrivals, from zero. Null, or CUDA's error.
inline const char* clear_arrivals([[maybe_unused]] const TitansParams& p, [[maybe_unused]] void* stream) {
  const int64_t counters = 1 + static_cast<int64_t>(p.B) * p.H;
#ifdef __CUDACC__
  const cudaError_t error =
      cudaMemsetAsync(p.arrivals, 0, counters * sizeof(unsigned int), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  for (int64_t i = 0; i < counters; ++i) p.arrivals[i] = 0;
  return nullptr;
#endif
}

template <int D, class T, int ACT, int MODE, bool SHARDED>
const char* launch_prefill(const TitansParams& p, const Plan& plan, const Device& device, void* stream) {
  const int64_t blocks = static_cast<int64_t>(p.B) * p.H * plan.blocks;
  const int cluster = MODE != kGlobal ? plan.blocks : 1;
  if (MODE == kGlobal && plan.blocks > 1 && device.at_once == nullptr)
    if (const char* error = clear_arrivals(p, stream)) return error;
  if constexpr (!kByWarpgroups<MODE>) {
    if (plan.weights < 0)
      return HOPE_LAUNCH((titans_prefill<D, T, ACT, MODE, false, SHARDED>), blocks, kThreads, cluster, device,
                         stream);
  }
  return HOPE_LAUNCH((titans_prefill<D, T, ACT, MODE, true, SHARDED>), blocks, kThreads, cluster, device, stream);
}

template <int D, class T, int ACT, int MODE>
const char* launch_step(const TitansParams& p, const Plan& plan, const Device& device, void* stream) {
  const int64_t blocks = static_cast<int64_t>(p.B) * p.H * plan.blocks;
  const int cluster = MODE != kGlobal ? plan.blocks : 1;
  if constexpr (!kByWarpgroups<MODE>) {
    if (plan.weights < 0)
      return HOPE_LAUNCH((titans_step<D, T, ACT, MODE, false>), blocks, kThreads, cluster, device, stream);
  }
  return HOPE_LAUNCH((titans_step<D, T, ACT, MODE, true>), blocks, kThreads, cluster, device, stream);
}

template <int D, class T, int ACT, bool SHARDED>
const char* launch_mode(const TitansParams& p, const Plan& plan, const Device& device, void* stream) {
  if (in_clusters(device.image)) return launch_prefill<D, T, ACT, kCluster, SHARDED>(p, plan, device, stream);
  return launch_prefill<D, T, ACT, kGlobal, SHARDED>(p, plan, device, stream);
}

// Whether one launch reads a token and commits. Blocks of a (row, head) that are no cluster could wait for
// others that never start. A block of titans_step has a multiprocessor for itself. Where those of
// titans_decode are as large, nothing is lost; smaller ones share one, so that some load while others compute:
// taken to be worth more than a launch where there are more heads than multiprocessors.
inline bool in_one_launch(const TitansParams& p, const Plan& plan, const Device& device) {
  if (plan.blocks > 1 && !in_clusters(device.image)) return false;
  return plan.full_warps == kWarps ||
         static_cast<int64_t>(p.B) * p.H * plan.blocks <= device.multiprocessors;
}

// Reads a token, and leaves the commit, which counts, to the next launch.
template <int D, class T, int ACT> const char* launch_decode(TitansParams& p, const Device& device, void* stream) {
  const Plan plan = make_decode_plan(D, p.N, p.flags & kRetention);
  const int flags = p.flags;
  p.flags &= ~kCount;
  const char* error = HOPE_LAUNCH((titans_decode<D, T, ACT>), static_cast<int64_t>(p.B) * p.H * 4, 32 * plan.full_warps,
                                  1, device, stream);
  p.flags = flags | kCommitOnly;
  return error;
}

template <int D, class T, int ACT> const char* launch_call(TitansParams p, const Device& device, void* stream) {
  const bool retention = p.flags & kRetention, update = p.flags & kUpdate;
  const Plan plan_of_all = make_plan(D, p.N, p.C, retention, update, device);
  if constexpr (D == 128) {  // a token's outputs need both blocks of a memory, so prefill decodes as well
    if (plan_of_all.shards > 1) return launch_mode<D, T, ACT, true>(p, plan_of_all, device, stream);
  }
  if (p.T > 1) return launch_mode<D, T, ACT, false>(p, plan_of_all, device, stream);
  if (!update || !in_one_launch(p, plan_of_all, device)) {
    const char* error = launch_decode<D, T, ACT>(p, device, stream);
    if (error != nullptr || !update) return error;
  }
  if (in_clusters(device.image)) return launch_step<D, T, ACT, kCluster>(p, plan_of_all, device, stream);
  return launch_step<D, T, ACT, kGlobal>(p, plan_of_all, device, stream);
}

// A call that by_warpgroups allows: a prefill, or a token that titans_decode has not read or has (kCommitOnly).
template <int ACT, int MODE>
const char* launch_warpgroups(const TitansParams& p, const Device& device, void* stream) {
  const Plan plan = make_warpgroup_plan(p.N, p.flags & kRetention);
  return p.T > 1 ? launch_prefill<64, bf16, ACT, MODE, false>(p, plan, device, stream)
                 : launch_step<64, bf16, ACT, MODE>(p, plan, device, stream);
}

template <int D, class T> const char* launch_activation(const TitansParams& p, const Device& device, void* stream) {
  if (p.activation == kGeluTanh) return launch_call<D, T, kGeluTanh>(p, device, stream);
  return p.activation == kGelu ? launch_call<D, T, kGelu>(p, device, stream)
                               : launch_call<D, T, kSilu>(p, device, stream);
}

// One for each source file: 64_bf16.cu and so on.
const char* launch_64_bf16(const TitansParams& p, const Device& device, void* stream);
const char* launch_64_bf16_warpgroups(const TitansParams& p, const Device& device, void* stream);
const char* launch_64_fp16(const TitansParams& p, const Device& device, void* stream);
const char* launch_128_bf16(const TitansParams& p, const Device& device, void* stream);
const char* launch_128_fp16(const TitansParams& p, const Device& device, void* stream);

}  // namespace hope
