// Who runs a launch: the fibers of grid.h, or whoever has set `executor`. That one is told what a driver would
// be told: which kernel, by its place in the library (the symbol there is its name, the same for nvcc and for a
// host compiler, since both mangle as the Itanium C++ ABI says), and the bytes of its parameters; and which
// memory the call has lent it. tools/ptx runs the PTX that nvcc made of the kernel there.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <vector>

namespace hope::emulator {

struct Region {  // a tensor, as it lies in memory
  const void* address;
  int64_t bytes;
  const char* name;
};

struct Launch {
  int64_t kernel;          // its place in the library
  const void* parameters;  // one after the other, each aligned as its type is
  int64_t parameter_bytes;
  const Region* regions;
  int64_t region_count;
  int64_t blocks;
  int threads, cluster, shared_bytes;
};

// Null, or why the launch failed.
using Executor = const char* (*)(const Launch*);
inline Executor executor = nullptr;

inline std::vector<Region> regions;  // of the call that launches

template <class... Parameters> int64_t place_of(void (*kernel)(Parameters...)) {
  Dl_info library{};
  dladdr(reinterpret_cast<void*>(kernel), &library);
  return reinterpret_cast<char*>(kernel) - static_cast<char*>(library.dli_fbase);
}

}  // namespace hope::emulator
