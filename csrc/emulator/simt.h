// The names of cuda/simt.cuh on a host: a kernel runs with its threads as fibers (grid.h), the rest is plain
// arithmetic.
//
// A kernel's main includes the kernel and calls
//     hope::emulator::options().seed = 7;                                      // and resident, races: grid.h
//     hope::emulator::launch(blocks, threads, cluster, shared_bytes, [&] { hope::some_kernel(params); });
// which throws std::runtime_error on a race, a deadlock, an address outside shared memory or lanes that go
// different ways.
//
// The functions take the place they were called from as two more arguments, which callers leave out.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "executor.h"
#include "grid.h"
#include "numbers.h"

#define HOPE_DEVICE inline
#define HOPE_KERNEL(threads) inline void
#define HOPE_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace hope {

// --- who am I ----------------------------------------------------------------------------------------------
inline int thread_index() { return emulator::grid.warp().index * 32 + emulator::grid.now->lane; }
inline int lane_index() { return emulator::grid.now->lane; }
inline int warp_index() { return emulator::grid.warp().index; }
inline int block_index() { return emulator::grid.block().index; }
inline unsigned char* shared_memory() { return emulator::grid.block().shared.get(); }

inline void assume(bool) {}
inline void trap() { emulator::grid.fail("trap"); }
inline int thread_index_again() { return thread_index(); }

// --- barriers ----------------------------------------------------------------------------------------------
inline void sync_block(HOPE_FROM) { emulator::grid.sync(0, 0, "sync_block", {file, line}); }
inline void sync_warp(HOPE_FROM) { emulator::grid.sync_warp({file, line}); }
inline void sync_some(int id, int threads, HOPE_FROM) {
  if (id == 0) emulator::grid.fail("sync_some(0, ..): that barrier is sync_block's");
  emulator::grid.sync(id, threads, "sync_some", {file, line});
}

// --- exchange within a warp --------------------------------------------------------------------------------
namespace emulator {

struct Exchange {
  float given, got;
  int from;
};

inline float exchange(float v, int from, const char* kind, Place place) {
  Exchange mine{v, 0, from};
  grid.gather(kind, &mine, place, [](Warp& w) {
    for (void* p : w.arguments) {
      Exchange& e = *static_cast<Exchange*>(p);
      e.got = static_cast<Exchange*>(w.arguments[e.from & 31])->given;
    }
    return true;
  });
  return mine.got;
}

// Element (row, column) of 8 x 8 numbers of 16 bits whose words `word(lane)` tells.
template <class Word> uint32_t transposed_word(int lane, Word word) {
  const int row = lane / 4, column = 2 * (lane % 4);
  auto at = [&](int r, int c) { return (word(4 * r + c / 2) >> (16 * (c % 2))) & 0xffffu; };
  return at(column, row) | at(column + 1, row) << 16;
}

struct Matrices {
  uint32_t* r;
  const unsigned char* row;
};

inline void load_matrices(uint32_t* r, const void* row, bool transposed, const char* kind, Place place) {
  Matrices mine{r, static_cast<const unsigned char*>(row)};
  const size_t at = grid.offset(row, 16, 16, kind, place);
  grid.read(*grid.now, at, 16, kind, place);
  grid.gather(kind, &mine, place, [transposed](Warp& w) {
    uint32_t words[4][32];
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < 8; ++row)
        std::memcpy(&words[i][4 * row], static_cast<Matrices*>(w.arguments[8 * i + row])->row, 16);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<Matrices*>(w.arguments[lane])->r[i] =
            transposed ? transposed_word(lane, [&](int l) { return words[i][l]; }) : words[i][lane];
    grid.progress();
    return true;
  });
}

}  // namespace emulator

inline float shuffle_xor(float v, int mask, HOPE_FROM) {
  return emulator::exchange(v, lane_index() ^ mask, "shuffle_xor", {file, line});
}
inline float shuffle(float v, int lane, HOPE_FROM) { return emulator::exchange(v, lane, "shuffle", {file, line}); }
inline uint32_t transpose8x8(uint32_t v, HOPE_FROM) {
  uint32_t words[2] = {v, 0};
  emulator::grid.gather("transpose8x8", words, {file, line}, [](emulator::Warp& w) {
    auto word = [&](int l) { return static_cast<uint32_t*>(w.arguments[l])[0]; };
    for (int lane = 0; lane < 32; ++lane)
      static_cast<uint32_t*>(w.arguments[lane])[1] = emulator::transposed_word(lane, word);
    return true;
  });
  return words[1];
}

// --- memory ------------------------------------------------------------------------------------------------
template <class V> V load_shared(const V* p, HOPE_FROM) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  emulator::grid.interrupt();
  const size_t at = emulator::grid.offset(p, sizeof(V), sizeof(V), "load_shared", {file, line});
  emulator::grid.read(*emulator::grid.now, at, sizeof(V), "load_shared", {file, line});
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V> void store_shared(V* p, V v, HOPE_FROM) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  const size_t at = emulator::grid.offset(p, sizeof(V), sizeof(V), "store_shared", {file, line});
  emulator::grid.write(emulator::grid.block(), at, sizeof(V), "store_shared", {file, line});
  std::memcpy(static_cast<void*>(p), &v, sizeof(V));
  emulator::grid.interrupt();
}
inline void load_matrices(uint32_t (&r)[4], const void* row, HOPE_FROM) {
  emulator::load_matrices(r, row, false, "load_matrices", {file, line});
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, HOPE_FROM) {
  emulator::load_matrices(r, row, true, "load_matrices_transposed", {file, line});
}
// Done at some time before wait_copies() returns: there, or at a random one.
inline void copy_async4(void* shared, const void* src, bool valid, HOPE_FROM) {
  emulator::grid.copy_async(shared, src, valid, {file, line});
}
inline void wait_copies() { emulator::grid.wait_copies(); }

// --- between blocks, through global memory -----------------------------------------------------------------
inline unsigned int fetch_add_release(unsigned int* p, unsigned int v) {
  emulator::grid.interrupt();
  emulator::grid.acquire(p);
  emulator::grid.release_to(p);
  const unsigned int old = *p;
  *p = old + v;
  emulator::grid.progress();
  emulator::grid.interrupt();
  return old;
}
inline unsigned int load_acquire(const unsigned int* p) {
  emulator::grid.interrupt();
  emulator::grid.acquire(p);
  return *static_cast<const volatile unsigned int*>(p);
}
inline void pause(HOPE_FROM) { emulator::grid.pause({file, line}); }
template <class V> V load_fresh(const V* p) {
  emulator::grid.interrupt();
  return *p;
}
template <class V> V load_ahead(const V* p) { return *p; }

// --- clusters ----------------------------------------------------------------------------------------------
inline int cluster_rank() { return emulator::grid.block().rank; }
inline void store_remote(uint32_t* p, int rank, uint32_t v, HOPE_FROM) {
  emulator::grid.store_remote(p, rank, v, {file, line});
}
inline void cluster_arrive(HOPE_FROM) { emulator::grid.cluster_arrive({file, line}); }
inline void cluster_arrive_relaxed(HOPE_FROM) { emulator::grid.cluster_arrive({file, line}, true); }
inline void cluster_wait(HOPE_FROM) { emulator::grid.cluster_wait({file, line}); }

// --- numbers -----------------------------------------------------------------------------------------------
template <class T> uint32_t pack2(float lo, float hi);
template <>
inline uint32_t pack2<bf16>(float lo, float hi) {
  return emulator::bf16_of(lo) | emulator::bf16_of(hi) << 16;
}
template <>
inline uint32_t pack2<fp16>(float lo, float hi) {
  return emulator::fp16_of(lo) | emulator::fp16_of(hi) << 16;
}
template <class T> Float2 unpack2(uint32_t w);
template <>
inline Float2 unpack2<bf16>(uint32_t w) {
  return {emulator::bf16_value(w & 0xffffu), emulator::bf16_value(w >> 16)};
}
template <>
inline Float2 unpack2<fp16>(uint32_t w) {
  return {emulator::fp16_value(w & 0xffffu), emulator::fp16_value(w >> 16)};
}
// 11 significant bits, as few as the instruction may leave.
inline float tanh_fast(float x) {
  const uint32_t u = emulator::bits_of(std::tanh(x));
  if ((u & 0x7fffffffu) > 0x7f800000u) return x;
  return emulator::float_of((u + 0x7ffu + ((u >> 12) & 1)) & ~0xfffu);
}
inline float exp_(float x) { return std::exp2(x * 1.442695041f); }  // as the device has it
inline float log1p_(float x) { return std::log1p(x); }
inline float sqrt_(float x) { return std::sqrt(x); }
inline float divide(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.f : a / b; }  // 0, as on the device
inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }

// --- tensor cores ------------------------------------------------------------------------------------------
namespace emulator {

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};

template <class T> void product(Warp& w) {
  float a[16][16], b[16][8], c[16][8];
  auto put = [](float* to, int step, uint32_t word) {
    const Float2 f = unpack2<T>(word);
    to[0] = f.x, to[step] = f.y;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(w.arguments[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) put(&a[g + 8 * (i % 2)][t + 8 * (i / 2)], 1, p.a[i]);
    put(&b[t][g], 8, p.b0);
    put(&b[t + 8][g], 8, p.b1);
    for (int i = 0; i < 4; ++i) c[g + 8 * (i / 2)][t + i % 2] = p.c[i];
  }
  product_16x8x16(c, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(w.arguments[lane]);
    for (int i = 0; i < 4; ++i) p.c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace emulator

template <class T> void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HOPE_FROM) {
  emulator::Product mine{c, a, b0, b1};
  emulator::grid.gather("mma", &mine, {file, line}, [](emulator::Warp& w) {
    emulator::product<T>(w);
    emulator::grid.progress();
    return true;
  });
}
template <class T> void mma_first(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HOPE_FROM) {
  for (int i = 0; i < 4; ++i) c[i] = 0.f;
  mma<T>(c, a, b0, b1, file, line);
}

}  // namespace hope

#undef HOPE_FROM
