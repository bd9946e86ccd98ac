// What PyTorch sees of the kernels: five operators through LibTorch's stable ABI (2.11 and later, one
// library for all of them).
//
// Every argument that could lead to a wrong address is checked here; launch.h declares the launch itself. With
// HOPE_EMULATED a host compiler builds this file and the kernels for CPU tensors, on the GPU
// that `emulate` describes (csrc/emulator/).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

#ifdef HOPE_EMULATED
#include "simt.cuh"
#else
#include <cuda_runtime.h>
// weak, so that a PyTorch without CUDA can load the library, and say what it lacks
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace {

using hope::TitansParams;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "titans_scan: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

std::string brackets(const Shape& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

struct Expected {
  int device;
  bool on_cpu;

  void operator()(const char* name, const Tensor& t, const Shape& shape, ScalarType type) const {
    if (shape_of(t) != shape)
      fail("argument ", name, " has shape ", brackets(shape_of(t)), ", expected ", brackets(shape));
    if (t.scalar_type() != type) {
      fail("argument ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected ",
           torch::headeronly::toString(type));
    }
    if (t.is_cpu() != on_cpu || (!on_cpu && t.get_device_index() != device))
      fail("argument ", name, " is on another device than x");
  }
};

// t, contiguous and starting at a multiple of 16 bytes, which is what the kernels load at once.
Tensor aligned(const Tensor& t) {
  Tensor own = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(own.data_ptr()) % 16 ? torch::stable::clone(own) : own;
}

// Keeps the tensors that a launch reads or writes alive until it has begun, and copies back what it wrote into
// copies.
class Arguments {
 public:
  const void* read(const char* name, const std::optional<Tensor>& t) {
    return t ? lent(name, *t).data_ptr() : nullptr;
  }
  template <class V> V* written(const char* name, const std::optional<Tensor>& t) {
    if (!t) return nullptr;
    Tensor own = lent(name, *t);
    if (own.data_ptr() != t->data_ptr()) copies_.push_back({*t, own});
    return static_cast<V*>(own.data_ptr());
  }
  void take_back() {
    for (auto& [theirs, own] : copies_) torch::stable::copy_(theirs, own);
  }

 private:
  Tensor lent([[maybe_unused]] const char* name, const Tensor& t) {
    Tensor own = kept_.emplace_back(aligned(t));
#ifdef HOPE_EMULATED
    if (kept_.size() == 1) hope::emulator::regions.clear();
    const int64_t bytes = own.numel() * static_cast<int64_t>(own.element_size());
    hope::emulator::regions.push_back({own.data_ptr(), bytes, name});
#endif
    return own;
  }

  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

#ifdef HOPE_EMULATED
hope::Device emulated_gpu{90, 227 * 1024, 90, 8};

hope::Device device_of(int) { return emulated_gpu; }
void* stream_of(int) { return nullptr; }
#else
hope::Device look_at(int index) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
    return value;
  };
  int before = 0;  // the image is the current device's
  if (cudaError_t error = cudaGetDevice(&before); error != cudaSuccess) fail(cudaGetErrorString(error));
  cudaSetDevice(index);
  const int image = hope::titans_image();
  cudaSetDevice(before);
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), image,
          attribute(cudaDevAttrMultiProcessorCount)};
}
hope::Device device_of(int index) {  // looked at once
  static std::mutex one_at_a_time;
  static std::map<int, hope::Device> known;
  std::lock_guard<std::mutex> guard(one_at_a_time);
  auto found = known.find(index);
  return (found == known.end() ? known.emplace(index, look_at(index)).first : found)->second;
}
void* stream_of(int index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this PyTorch was built without CUDA");
  if (aoti_torch_get_current_cuda_stream(index, &stream)) fail("PyTorch names no current stream");
  return stream;
}
#endif

// COUNT: `pos` is advanced as well.
template <bool COUNT>
Tensor titans_scan(Tensor x, Tensor q, std::optional<Tensor> base2, std::optional<Tensor> base1,
                   std::optional<Tensor> base1s, Tensor delta2, Tensor delta1, Tensor delta1s,
                   Tensor pending_k, Tensor pending_v, Tensor pending_eta,
                   std::optional<Tensor> pending_alpha, Tensor eta_bias, std::optional<Tensor> alpha_bias,
                   Tensor pos, Tensor lengths, std::optional<Tensor> rounded, int64_t activation,
                   int64_t flags, double eta_scale, double grad_scale) {
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::BFloat16 && type != ScalarType::Half) {
    fail("argument x has dtype ", torch::headeronly::toString(type), ", expected BFloat16 or Half");
  }
  if (x.dim() != 4) fail("argument x has shape ", brackets(shape_of(x)), ", expected [B, T, H, D]");
  if (delta1.dim() != 5) fail("argument delta1 has shape ", brackets(shape_of(delta1)), ", expected [B, H, 3, D, N]");
  if (pending_k.dim() != 4)
    fail("argument pending_k has shape ", brackets(shape_of(pending_k)), ", expected [B, C, H, D]");
  if (activation < hope::kGeluTanh || activation > hope::kSilu)
    fail("argument activation is ", activation, ", expected 0, 1 or 2");
  if (flags < 0 || flags >= 2 * hope::kFloatBias) fail("argument flags is ", flags, ", which no configuration has");
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), D = x.size(3), N = delta1.size(4), C = pending_k.size(1);
  const int64_t Ms = flags & hope::kRetention ? 2 : 1, M = 3 + Ms;
  if (std::max({D, N, C, H}) > 65536 || B * H > INT_MAX / 8)
    fail("rows, heads or widths of x, delta1 or pending_k are too many");
  const bool emulated = x.is_cpu();
#ifndef HOPE_EMULATED
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
#else
  const int index = 0;
#endif
  const hope::Device device = device_of(index);
  if (const char* reason = hope::titans_unserved(D, N, C, device)) {
    fail("heads of width ", D, " with ", N, " hidden units and chunks of ", C,
         " tokens (as x, delta1 and pending_k have them): ", reason);
  }

  const Expected expect{index, emulated};
  const ScalarType bias = flags & hope::kFloatBias ? ScalarType::Float : type;
  auto given = [](const char* name, const std::optional<Tensor>& t, bool wanted) {
    if (t.has_value() != wanted)
      fail("argument ", name, wanted ? " is missing" : " is given, but what belongs to it is not");
    return wanted;
  };
  expect("q", q, {B, T, H, D}, type);
  const bool based = base2.has_value();
  if (based) expect("base2", *base2, {H, M * N, D}, type);
  if (given("base1", base1, based)) expect("base1", *base1, {H, 3, D, N}, type);
  if (given("base1s", base1s, based)) expect("base1s", *base1s, {H, Ms, N}, type);
  expect("delta2", delta2, {B, H, M * N, D}, ScalarType::Float);
  expect("delta1", delta1, {B, H, 3, D, N}, ScalarType::Float);
  expect("delta1s", delta1s, {B, H, Ms, N}, ScalarType::Float);
  expect("pending_k", pending_k, {B, C, H, D}, type);
  expect("pending_v", pending_v, {B, C, H, D}, type);
  expect("pending_eta", pending_eta, {B, C, H}, ScalarType::Float);
  if (given("pending_alpha", pending_alpha, Ms == 2))
    expect("pending_alpha", *pending_alpha, {B, C, H}, ScalarType::Float);
  expect("eta_bias", eta_bias, {H}, bias);
  if (given("alpha_bias", alpha_bias, Ms == 2)) expect("alpha_bias", *alpha_bias, {H}, bias);
  expect("pos", pos, {B}, ScalarType::Long);
  expect("lengths", lengths, {B}, ScalarType::Long);
  if (rounded) {
    const int64_t warps = hope::kept_warps(D, N);
    if (warps == 0)
      fail("argument rounded is given, but heads of width ", D, " with ", N, " hidden units keep none");
    expect("rounded", *rounded, {B, H, warps, hope::kKeptNumbers}, type);
  }

  const Shape shape = {B, T, H, D};
  Tensor o = torch::stable::new_empty(x, shape);  // of which the kernels write every number
  if (B * T == 0) return o;
  Arguments use;
  TitansParams params{};
  params.x = use.read("x", x), params.q = use.read("q", q), params.o = use.written<void>("o", o);
  params.base2 = use.read("base2", base2), params.base1 = use.read("base1", base1);
  params.base1s = use.read("base1s", base1s);
  params.delta2 = use.written<float>("delta2", delta2), params.delta1 = use.written<float>("delta1", delta1);
  params.delta1s = use.written<float>("delta1s", delta1s);
  params.pending_k = use.written<void>("pending_k", pending_k);
  params.pending_v = use.written<void>("pending_v", pending_v);
  params.pending_eta = use.written<float>("pending_eta", pending_eta);
  params.pending_alpha = use.written<float>("pending_alpha", pending_alpha);
  params.eta_bias = use.read("eta_bias", eta_bias), params.alpha_bias = use.read("alpha_bias", alpha_bias);
  params.pos = COUNT ? use.written<int64_t>("pos", pos)
                     : static_cast<int64_t*>(const_cast<void*>(use.read("pos", pos)));
  params.lengths = static_cast<const int64_t*>(use.read("lengths", lengths));
  params.rounded = use.written<void>("rounded", rounded);
  params.T = T, params.B = B, params.H = H, params.N = N, params.C = C;
  params.activation = activation, params.eta_scale = eta_scale, params.grad_scale = grad_scale;
  params.flags = COUNT && flags & hope::kUpdate ? flags | hope::kCount : flags;
  const hope::Workspace work = hope::titans_workspace(params, D, device);
  const Shape bytes = {std::max<int64_t>(work.scratch_bytes, 1)}, counters = {std::max<int64_t>(work.arrivals, 1)};
  Tensor scratch = torch::stable::new_empty(x, bytes, ScalarType::Byte);
  Tensor arrivals = torch::stable::new_empty(x, counters, ScalarType::Int);
  params.scratch = use.written<unsigned char>("scratch", scratch);
  params.arrivals = use.written<unsigned int>("arrivals", arrivals);
  const hope::Element element = type == ScalarType::Half ? hope::Element::kFp16 : hope::Element::kBf16;
  if (const char* error = hope::titans_scan(params, D, element, device, stream_of(index))) fail(error);
  use.take_back();
  return o;
}

// Why heads of width D, hidden width N and chunks of C tokens are not served on a device, or "".
std::string unserved(int64_t D, int64_t N, int64_t C, int64_t device) {
  const char* reason = hope::titans_unserved(D, N, C, device_of(device));
  return reason ? reason : "";
}

// How many (row, head) pairs of a prefill with bf16 a device runs at once.
int64_t at_once(int64_t D, int64_t N, int64_t C, int64_t index) {
  const hope::Device device = device_of(index);
  if (const char* reason = hope::titans_unserved(D, N, C, device)) fail(reason);
#ifndef HOPE_EMULATED
  torch::stable::accelerator::DeviceGuard guard(index);
#endif
  int found = 0;
  if (const char* error = hope::titans_at_once(D, N, C, device, &found)) fail(error);
  return found;
}

std::string build() { return HOPE_BUILD; }

#ifdef HOPE_EMULATED
void emulate(int64_t capability, int64_t shared_bytes, int64_t image, int64_t seed, int64_t resident, bool races) {
  emulated_gpu = {static_cast<int>(capability), static_cast<int>(shared_bytes), static_cast<int>(image),
                  static_cast<int>(resident)};
  hope::emulator::options() = {static_cast<unsigned>(seed), static_cast<int>(resident), races};
}

void execute_by(int64_t address) {
  hope::emulator::executor = reinterpret_cast<hope::emulator::Executor>(address);
}
#endif

}  // namespace

#define HOPE_SCHEMA(name, pos)                                                                           \
  name "(Tensor x, Tensor q, Tensor? base2, Tensor? base1, Tensor? base1s, Tensor(a!) delta2, "          \
       "Tensor(b!) delta1, Tensor(c!) delta1s, Tensor(d!) pending_k, Tensor(e!) pending_v, "             \
       "Tensor(f!) pending_eta, Tensor(g!)? pending_alpha, Tensor eta_bias, Tensor? alpha_bias, " pos    \
       " pos, Tensor lengths, Tensor(i!)? rounded, int activation, int flags, float eta_scale, "         \
       "float grad_scale) -> Tensor"

STABLE_TORCH_LIBRARY(hope_kernels_cuda, m) {
  m.def(HOPE_SCHEMA("titans_scan", "Tensor"));
  m.def(HOPE_SCHEMA("titans_advance", "Tensor(h!)"));
  m.def("unserved(int D, int N, int C, int device) -> str");
  m.def("at_once(int D, int N, int C, int device) -> int");
  m.def("build() -> str");
#ifdef HOPE_EMULATED
  // What the next calls run on. image: the architecture of the code; resident: blocks at a time; seed: the
  // order in which threads run; races: whether unordered accesses fail.
  m.def("emulate(int capability, int shared_bytes, int image, int seed, int resident, bool races) -> ()");
  // The address of a function that runs the next launches instead (emulator/executor.h); 0: none.
  m.def("execute_by(int address) -> ()");
#endif
}

#ifdef HOPE_EMULATED
STABLE_TORCH_LIBRARY_IMPL(hope_kernels_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(hope_kernels_cuda, CUDA, m) {
#endif
  m.impl("titans_scan", TORCH_BOX(&titans_scan<false>));
  m.impl("titans_advance", TORCH_BOX(&titans_scan<true>));
}

STABLE_TORCH_LIBRARY_IMPL(hope_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("unserved", TORCH_BOX(&unserved));
  m.impl("at_once", TORCH_BOX(&at_once));
  m.impl("build", TORCH_BOX(&build));
#ifdef HOPE_EMULATED
  m.impl("emulate", TORCH_BOX(&emulate));
  m.impl("execute_by", TORCH_BOX(&execute_by));
#endif
}
