// What compute capability 9.0 has beside simt.cuh: products of a warpgroup (four warps whose first one is a
// multiple of four) on matrices in shared memory, which are under way until they are waited for.
//
//     warpgroup_fence();                                 registers of sums and operands are written
//     warpgroup_mma...(sums, a, b, first), several
//     warpgroup_commit();                                what was issued since the last one is a batch
//     warpgroup_wait<N>();                               all batches but the last N are done: their sums are
//                                                        there, and what they read may be written
//
// All threads of the warpgroup call. Products see shared memory through another proxy: between a store and a
// product that reads it lies a fence_proxy(), of the writer before the barrier or of the reader after it.
#pragma once
#include "simt.cuh"

namespace hope {

// A matrix of 16-bit numbers in shared memory, in pieces of 8 x 8: eight rows of 16 bytes, one after
// another. Pieces lie `along` bytes apart along k (the index that is summed over) and `across` bytes apart
// across it.
//     rows:     a row of a piece is eight k of one m or n          (PTX calls it K-major)
//     columns:  a row of a piece is eight m or n of one k          (MN-major)
enum class Pieces : int { kRows = 0, kColumns = 1 };

}  // namespace hope

#ifndef __CUDACC__
#include "../emulator/warpgroup.h"
#else
namespace hope {

template <Pieces P> struct SharedMatrix {
  uint64_t descriptor;
  // The matrix that begins some bytes further on.
  HOPE_DEVICE SharedMatrix operator+(int bytes) const { return {descriptor + (bytes >> 4)}; }
};
template <Pieces P> HOPE_DEVICE SharedMatrix<P> shared_matrix(const void* start, int along, int across) {
  // of matrices that are not swizzled, "leading" is along k and "stride" across it, whichever the pieces
  const uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(start));
  return {static_cast<uint64_t>(a >> 4 & 0x3fff) | static_cast<uint64_t>(along >> 4) << 16 |
          static_cast<uint64_t>(across >> 4) << 32};
}

// The same matrix, named as by the warp's first lane: tells the compiler that a warp agrees on it.
template <Pieces P> HOPE_DEVICE SharedMatrix<P> agreed(SharedMatrix<P> m) {
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(m.descriptor), 0);
  return {(m.descriptor & 0xffffffff00000000u) | low};
}

HOPE_DEVICE void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
HOPE_DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HOPE_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N = 0> HOPE_DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers to shared memory: the converse of load_matrices.
HOPE_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
  const uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(a), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

#define HOPE_SUMS4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define HOPE_SUMS16 HOPE_SUMS4(0), HOPE_SUMS4(4), HOPE_SUMS4(8), HOPE_SUMS4(12)
#define HOPE_SUMS32 HOPE_SUMS16, HOPE_SUMS4(16), HOPE_SUMS4(20), HOPE_SUMS4(24), HOPE_SUMS4(28)
#define HOPE_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HOPE_NAMES32 \
  HOPE_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// c[64 x 64] += a[64 x 16] b[16 x 64], or = if it is the first of a sum; bf16, sums in fp32. Warp w has rows
// 16 w to 16 w + 15; a: its fragment, as mma's; c[4 j] to c[4 j + 3]: as mma's, of columns 8 j to 8 j + 7.
template <Pieces B>
HOPE_DEVICE void warpgroup_mma(float* c, const uint32_t (&a)[4], SharedMatrix<B> b, bool first) {
  asm volatile("{.reg .pred p;\n setp.eq.b32 p, %37, 0;\n"
               " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HOPE_NAMES32 "}, "
               "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
               : HOPE_SUMS32
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(static_cast<int>(first)),
                 "n"(static_cast<int>(B)));
}
// The same with a in shared memory.
template <Pieces A, Pieces B>
HOPE_DEVICE void warpgroup_mma(float* c, SharedMatrix<A> a, SharedMatrix<B> b, bool first) {
  asm volatile("{.reg .pred p;\n setp.eq.b32 p, %34, 0;\n"
               " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HOPE_NAMES32 "}, "
               "%32, %33, p, 1, 1, %35, %36;}"
               : HOPE_SUMS32
               : "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<int>(first)), "n"(static_cast<int>(A)),
                 "n"(static_cast<int>(B)));
}
// And 32 columns.
template <Pieces A, Pieces B>
HOPE_DEVICE void warpgroup_mma_narrow(float* c, SharedMatrix<A> a, SharedMatrix<B> b, bool first) {
  asm volatile("{.reg .pred p;\n setp.eq.b32 p, %18, 0;\n"
               " wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" HOPE_NAMES16 "}, "
               "%16, %17, p, 1, 1, %19, %20;}"
               : HOPE_SUMS16
               : "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<int>(first)), "n"(static_cast<int>(A)),
                 "n"(static_cast<int>(B)));
}
#undef HOPE_SUMS4
#undef HOPE_SUMS16
#undef HOPE_SUMS32
#undef HOPE_NAMES16
#undef HOPE_NAMES32

}  // namespace hope
#endif  // __CUDACC__
