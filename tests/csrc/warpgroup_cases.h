// Cases of csrc/cuda/warpgroup.cuh; part of cases.cpp, after its helpers.
#pragma once
#include "cuda/warpgroup.cuh"

namespace hope {
namespace {

// The byte of element (m or n, k) in pieces.
template <Pieces P> int byte_of(int number, int k, int along, int across) {
  const int row = P == Pieces::kRows ? number % 8 : k % 8, column = P == Pieces::kRows ? k % 8 : number % 8;
  return number / 8 * across + k / 8 * along + 16 * row + 2 * column;
}

// a[64][16], b[N][16], then c[64][N] of fp32. Pieces of a are neighbours along k, those of b across it, with
// gaps.
template <Pieces A, Pieces B, int N, bool REGISTERS>
HOPE_KERNEL(128) warpgroup_product(const uint16_t* a, const uint16_t* b, const float* c, float* out) {
  unsigned char *a_at = shared_memory(), *b_at = shared_memory() + 4096;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  for (int i = thread; i < 64 * 16; i += 128)
    store_shared(reinterpret_cast<uint16_t*>(a_at + byte_of<A>(i / 16, i % 16, 144, 320)), a[i]);
  for (int i = thread; i < N * 16; i += 128)
    store_shared(reinterpret_cast<uint16_t*>(b_at + byte_of<B>(i / 16, i % 16, 1040, 128)), b[i]);
  fence_proxy();
  sync_block();
  float sums[N / 2];
  const auto at = [&](int i) {
    return N * (16 * warp + lane / 4 + 8 * (i % 4 / 2)) + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
  };
  for (int i = 0; i < N / 2; ++i) sums[i] = c[at(i)];
  const auto matrix_a = shared_matrix<A>(a_at, 144, 320);
  const auto matrix_b = shared_matrix<B>(b_at, 1040, 128);
  warpgroup_fence();
  if constexpr (REGISTERS) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const uint16_t* from = a + 16 * (16 * warp + lane / 4 + 8 * (i % 2)) + 2 * (lane % 4) + 8 * (i / 2);
      words[i] = from[0] | static_cast<uint32_t>(from[1]) << 16;
    }
    warpgroup_mma(sums, words, matrix_b, false);
  } else if constexpr (N == 64) {
    warpgroup_mma(sums, matrix_a, matrix_b, false);
  } else {
    warpgroup_mma_narrow(sums, matrix_a, matrix_b, false);
  }
  warpgroup_commit();
  warpgroup_wait();
  for (int i = 0; i < N / 2; ++i) out[at(i)] = sums[i];
}

template <Pieces A, Pieces B, int N, bool REGISTERS = false> void warpgroup_case() {
  const auto in = input<uint16_t>();
  std::vector<float> c(64 * N), out(64 * N);
  std::memcpy(c.data(), &in[(64 + N) * 16], c.size() * 4);
  launch(1, 128, 1, 8192, [&] {
    warpgroup_product<A, B, N, REGISTERS>(in.data(), in.data() + 64 * 16, c.data(), out.data());
  });
  output(out);
}

// 32 rows of 16 bytes as load_matrices reads them: stored, they are the rows again.
HOPE_KERNEL(32) store_rows(const Word4* rows, Word4* out) {
  Word4* shared = reinterpret_cast<Word4*>(shared_memory());
  store_shared(shared + lane_index(), rows[lane_index()]);
  sync_warp();
  uint32_t r[4];
  load_matrices(r, shared + lane_index());
  sync_warp();
  store_matrices(shared + 32 + lane_index(), r);
  sync_warp();
  out[lane_index()] = load_shared(shared + 32 + lane_index());
}

void store_case() {
  const auto in = input<Word4>();
  std::vector<Word4> out(32);
  launch(1, 32, 1, 1024, [&] { store_rows(in.data(), out.data()); });
  output(out);
}

}  // namespace
}  // namespace hope
