// The names of cuda/warpgroup.cuh on a host. A warp computes its own 16 of the 64 rows when it issues a
// product; that products are under way until they are waited for, and read through a proxy, shows in the PTX
// machine (ptx/wgmma.h).
#pragma once
#include <type_traits>

#include "simt.h"

#define HOPE_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace hope {

template <Pieces P> struct SharedMatrix {
  const unsigned char* start;
  int along, across;
  SharedMatrix operator+(int bytes) const { return {start + bytes, along, across}; }
};
template <Pieces P> SharedMatrix<P> shared_matrix(const void* start, int along, int across) {
  return {static_cast<const unsigned char*>(start), along, across};
}

template <Pieces P> SharedMatrix<P> agreed(SharedMatrix<P> m) { return m; }

inline void fence_proxy() {}
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int N = 0> void warpgroup_wait() {}

namespace emulator {

// Numbers `first` to first + COUNT - 1 of m or n, by 16 of k: to[k][number].
template <int COUNT, Pieces P>
void gather_matrix(float (&to)[16][COUNT], const SharedMatrix<P>& matrix, int first, const char* kind,
                   Place place) {
  for (int piece = 0; piece < COUNT / 8 * 2; ++piece) {
    const int k = 8 * (piece % 2), number = 8 * (piece / 2);
    const unsigned char* from =
        matrix.start + k / 8 * matrix.along + (first + number) / 8 * static_cast<ptrdiff_t>(matrix.across);
    const size_t at = grid.offset(from, 128, 16, kind, place);
    grid.read(*grid.now, at, 128, kind, place);
    uint16_t bits[8][8];
    std::memcpy(bits, from, sizeof bits);
    for (int row = 0; row < 8; ++row)
      for (int i = 0; i < 8; ++i) {
        const float value = bf16_value(bits[row][i]);
        if (P == Pieces::kRows)
          to[k + i][number + row] = value;
        else
          to[k + row][number + i] = value;
      }
  }
}

template <class A, class B> struct WarpgroupProduct {
  float* c;
  A a;  // SharedMatrix, or four words
  B b;
  bool first;
};

// For every k in order, product and sum in fp32.
template <int COLUMNS, class A, class B> void warpgroup_product(Warp& w, const char* kind, Place place) {
  using One = WarpgroupProduct<A, B>;
  float a[16][16], b[16][COLUMNS];
  const One& own = *static_cast<One*>(w.arguments[0]);
  if constexpr (std::is_same_v<A, const uint32_t*>) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = static_cast<One*>(w.arguments[lane])->a[i];
        const int row = lane / 4 + 8 * (i % 2), k = 2 * (lane % 4) + 8 * (i / 2);
        a[k][row] = bf16_value(word & 0xffffu), a[k + 1][row] = bf16_value(word >> 16);
      }
  } else {
    gather_matrix(a, own.a, 16 * (w.index % 4), kind, place);
  }
  gather_matrix(b, own.b, 0, kind, place);
  float sums[16][COLUMNS];
  const auto each = [&](auto f) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < COLUMNS / 2; ++i)
        f(static_cast<One*>(w.arguments[lane])->c[i],
          sums[lane / 4 + 8 * (i % 4 / 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2]);
  };
  each([&](float& c, float& sum) { sum = own.first ? 0.f : c; });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < COLUMNS; ++column) sums[row][column] += a[k][row] * b[k][column];
  each([&](float& c, float& sum) { c = sum; });
  grid.progress();
}

template <int COLUMNS, class A, class B>
void warpgroup_mma(float* c, A a, B b, bool first, const char* kind, Place place) {
  if (grid.threads % 128) grid.fail(std::string(kind) + ": a block of other than whole warpgroups");
  WarpgroupProduct<A, B> mine{c, a, b, first};
  grid.gather(kind, &mine, place, [=](Warp& w) {
    warpgroup_product<COLUMNS, A, B>(w, kind, place);
    return true;
  });
}

}  // namespace emulator

inline void store_matrices(void* row, const uint32_t (&r)[4], HOPE_FROM) {
  const emulator::Place place{file, line};
  struct Rows {
    unsigned char* row;
    const uint32_t* r;
  } mine{static_cast<unsigned char*>(row), r};
  const size_t at = emulator::grid.offset(row, 16, 16, "store_matrices", place);
  emulator::grid.write(emulator::grid.block(), at, 16, "store_matrices", place);
  emulator::grid.gather("store_matrices", &mine, place, [](emulator::Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        std::memcpy(static_cast<Rows*>(w.arguments[8 * i + lane / 4])->row + 4 * (lane % 4),
                    &static_cast<Rows*>(w.arguments[lane])->r[i], 4);
    emulator::grid.progress();
    return true;
  });
}

template <Pieces B>
void warpgroup_mma(float* c, const uint32_t (&a)[4], SharedMatrix<B> b, bool first, HOPE_FROM) {
  emulator::warpgroup_mma<64, const uint32_t*>(c, a, b, first, "warpgroup_mma", {file, line});
}
template <Pieces A, Pieces B>
void warpgroup_mma(float* c, SharedMatrix<A> a, SharedMatrix<B> b, bool first, HOPE_FROM) {
  emulator::warpgroup_mma<64>(c, a, b, first, "warpgroup_mma", {file, line});
}
template <Pieces A, Pieces B>
void warpgroup_mma_narrow(float* c, SharedMatrix<A> a, SharedMatrix<B> b, bool first, HOPE_FROM) {
  emulator::warpgroup_mma<32>(c, a, b, first, "warpgroup_mma_narrow", {file, line});
}

}  // namespace hope

#undef HOPE_FROM
