// Everything the kernels ask of the machine, in one place: threads, barriers, tensor cores, asynchronous
// copies, clusters.
//
// nvcc compiles the PTX below. A host compiler takes the same names from csrc/emulator/, which runs the
// threads of a grid as fibers, so that the kernels' index maps, barriers and arithmetic are tested where
// there is no GPU. Kernels therefore contain no CUDA of their own: no threadIdx, no __syncthreads, no
// intrinsic.
#pragma once
#include <cstdint>

#include "params.h"

namespace hope {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
template <class T> constexpr bool kWideExponent = false;  // as wide as that of fp32
template <> constexpr bool kWideExponent<bf16> = true;
struct alignas(8) Float2 { float x, y; };
struct alignas(16) Float4 { float x, y, z, w; };
struct alignas(8) Word2 { uint32_t x, y; };
struct alignas(16) Word4 { uint32_t x, y, z, w; };

}  // namespace hope

#ifndef __CUDACC__
#include "../emulator/simt.h"
#else
#define HOPE_DEVICE __device__ __forceinline__
#define HOPE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
namespace hope {

// --- who am I ----------------------------------------------------------------------------------------------
HOPE_DEVICE int thread_index() { return threadIdx.x; }
HOPE_DEVICE int lane_index() { return threadIdx.x & 31; }
// The shuffle tells the compiler that a warp agrees on it.
HOPE_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }
HOPE_DEVICE int block_index() { return blockIdx.x; }
HOPE_DEVICE unsigned char* shared_memory() {  // the block's dynamic shared memory, aligned to 128 bytes
  extern __shared__ __align__(128) unsigned char hope_shared[];
  return hope_shared;
}

// thread_index() as something the compiler has not seen before: what follows from it is computed again where
// it is needed instead of being kept in registers meanwhile.
HOPE_DEVICE int thread_index_again() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}

// --- barriers ----------------------------------------------------------------------------------------------
HOPE_DEVICE void sync_block() { __syncthreads(); }
HOPE_DEVICE void sync_warp() { __syncwarp(); }
// Named barrier of `threads` threads, whole warps; id 1..15 (0 is sync_block's).
HOPE_DEVICE void sync_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- exchange within a warp; all 32 lanes call -------------------------------------------------------------
HOPE_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
HOPE_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// 8 x 8 numbers of 16 bits, lane l holding (row l / 4, columns 2 (l % 4) and + 1): the transposed matrix,
// held likewise.
HOPE_DEVICE uint32_t transpose8x8(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// --- memory ------------------------------------------------------------------------------------------------
// Shared memory that other threads see is read and written through these two (V of 2, 4, 8 or 16 bytes, aligned
// to its size).
template <class V> HOPE_DEVICE V load_shared(const V* p) { return *p; }
template <class V> HOPE_DEVICE void store_shared(V* p, V v) { *p = v; }
// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 (16 bytes)
// of matrix l / 8, and r[i] is matrix i as mma wants it (lane l: row l / 4, columns 2 (l % 4) and + 1);
// transposed: that of the transposed matrix.
HOPE_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
HOPE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
// Copies 4 bytes from global to shared memory while the thread goes on; zeros if not `valid` (then src is not
// read). They are there, for this thread, after wait_copies(), and for others after a barrier that follows it.
HOPE_DEVICE void copy_async4(void* shared, const void* src, bool valid) {
  uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(a), "l"(src), "r"(bytes) : "memory");
}
HOPE_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- between blocks, through global memory -----------------------------------------------------------------
HOPE_DEVICE unsigned int fetch_add_release(unsigned int* p, unsigned int v) {  // also acquires
  unsigned int old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
HOPE_DEVICE unsigned int load_acquire(const unsigned int* p) {
  unsigned int v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
HOPE_DEVICE void assume(bool what) { __builtin_assume(what); }  // for the compiler
HOPE_DEVICE void trap() { asm volatile("trap;"); }  // ends the launch with an error
HOPE_DEVICE void pause() { __nanosleep(20); }  // in a loop that waits for another block
// What another block has written since this one began: never from a cache of this multiprocessor.
HOPE_DEVICE uint32_t load_fresh(const uint32_t* p) { return __ldcg(p); }
HOPE_DEVICE float load_fresh(const float* p) { return __ldcg(p); }
HOPE_DEVICE Float4 load_fresh(const Float4* p) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  return {v.x, v.y, v.z, v.w};
}
// Requested here and now, even if what comes before its use may return.
HOPE_DEVICE uint32_t load_ahead(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
HOPE_DEVICE Word4 load_ahead(const Word4* p) {
  Word4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// --- clusters (compute capability 9.0 and up) --------------------------------------------------------------
// Only in code for 9.0 and up: a kernel that may not be there asks with `if constexpr`.
// v to the place that `p` has in this block's shared memory, in block `rank` of the cluster.
HOPE_DEVICE void store_remote(uint32_t* p, int rank, uint32_t v) {
  uint32_t a = static_cast<uint32_t>(__cvta_generic_to_shared(p)), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(a), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(v) : "memory");
}
// A barrier of all threads of a cluster in two halves: what was written before arriving is seen after waiting.
HOPE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Where nothing that the warp has written is for others: it does not wait until its stores are done.
HOPE_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
HOPE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// --- numbers -----------------------------------------------------------------------------------------------
// Two floats rounded to T (to nearest, ties to even), lo in the lower half of the word; and back.
template <class T> HOPE_DEVICE uint32_t pack2(float lo, float hi);
template <> HOPE_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <> HOPE_DEVICE uint32_t pack2<fp16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <class T> HOPE_DEVICE Float2 unpack2(uint32_t w);
template <>
HOPE_DEVICE Float2 unpack2<bf16>(uint32_t w) {
  return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)};
}
template <> HOPE_DEVICE Float2 unpack2<fp16>(uint32_t w) {
  Float2 r;
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(w));
  return r;
}
HOPE_DEVICE float tanh_fast(float x) {  // relative error 2^-11
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
HOPE_DEVICE float exp_(float x) { return __expf(x); }
HOPE_DEVICE float log1p_(float x) { return log1pf(x); }
HOPE_DEVICE float sqrt_(float x) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
HOPE_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
HOPE_DEVICE float fma_(float a, float b, float c) { return fmaf(a, b, c); }

// --- tensor cores ------------------------------------------------------------------------------------------
// c[16 x 8] += a[16 x 16] b[16 x 8], operands of T, sums in fp32. With g = lane / 4, t = lane % 4:
//   a[0]: (row g, columns 2t, 2t+1)   a[1]: row g + 8   a[2]: row g, columns + 8   a[3]: row g + 8, columns + 8
//   b0: (rows 2t, 2t+1; column g)     b1: rows + 8      c: (row g, columns 2t, 2t+1), then row g + 8
template <class T> HOPE_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> HOPE_DEVICE void mma<bf16>(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> HOPE_DEVICE void mma<fp16>(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c = a b: no registers have to be cleared before.
template <class T> HOPE_DEVICE void mma_first(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> HOPE_DEVICE void mma_first<bf16>(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
template <> HOPE_DEVICE void mma_first<fp16>(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

}  // namespace hope
#endif  // __CUDACC__

namespace hope {

// c += a b, or c = a b where it is the first of a sum. For loops that are unrolled.
template <class T>
HOPE_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool first) {
  if (first)
    mma_first<T>(c, a, b0, b1);
  else
    mma<T>(c, a, b0, b1);
}

}  // namespace hope
