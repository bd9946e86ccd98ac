// Matrix products on panels. A panel holds 16 tokens: element (feature i, token j) at [i * 16 + j], so that
// the inner loop reads it straight through. Every output is one chain of FMAs over the inner index in
// ascending order, whatever the tile, so a value depends on neither the number of tokens beside it nor the
// number of threads.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int PANEL = 16;

// acc[r][v] += sum_k A[r, k] B[k, 8 v ..]; A element (r, k) at A[r * rs + k * ks], B row k at B + k * ldb.
template <int MR, int NV>
HK_INLINE void accumulate(int64_t K, const float* A, int64_t rs, int64_t ks, const float* B, int64_t ldb,
                          f8 (&acc)[MR][NV]) {
  for (int64_t k = 0; k < K; k++, A += ks, B += ldb) {
    f8 b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = load(B + 8 * v);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      f8 a = _mm256_broadcast_ss(A + r * rs);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
}

// Rows [r0, r1) of A B for one panel B [K][16] of which the first 8 or all 16 tokens are wanted:
// done(r, acc) gets rows r .. r + MR - 1, each NV vectors.
template <int MR, int NV, class Done>
HK_INLINE void tile_rows(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                         const float* B, Done done) {
  for (int64_t r = r0; r + MR <= r1; r += MR) {
    f8 acc[MR][NV] = {};
    accumulate<MR, NV>(K, A + r * rs, rs, ks, B, PANEL, acc);
    done(r, acc);
  }
}

template <class Done>
HK_INLINE void panel_product(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                             const float* B, bool half, Done done) {
  int64_t even = half ? r0 + (r1 - r0) / 8 * 8 : r0 + (r1 - r0) / 4 * 4;
  if (half) {
    tile_rows<8, 1>(r0, even, K, A, rs, ks, B, done);
    tile_rows<1, 1>(even, r1, K, A, rs, ks, B, done);
  } else {
    tile_rows<4, 2>(r0, even, K, A, rs, ks, B, done);
    tile_rows<1, 2>(even, r1, K, A, rs, ks, B, done);
  }
}

// out(r, c, acc) for rows [r0, r1) and all columns of sum over panels p of U_p [rows][16] V[16 p .., cols],
// tokens counted by C: the update of a weight by C tokens. U element (r, token) at U + p * stride + r * 16 +
// token % 16; V [C, cols], rows ldv apart.
template <int MR, int NV, class Done>
HK_INLINE void outer_tile(int64_t r, int64_t c, int64_t C, const float* U, int64_t stride, const float* V,
                          int64_t ldv, Done done) {
  f8 acc[MR][NV] = {};
  for (int64_t t = 0; t < C; t += PANEL, U += stride)
    accumulate<MR, NV>(std::min<int64_t>(PANEL, C - t), U + r * PANEL, PANEL, 1, V + t * ldv + c, ldv, acc);
  done(r, c, acc);
}

template <class Done>
HK_INLINE void outer_product(int64_t r0, int64_t r1, int64_t cols, int64_t C, const float* U, int64_t stride,
                             const float* V, int64_t ldv, Done done) {
  for (int64_t r = r0; r < r1;) {
    bool four = r + 4 <= r1;
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16)
      four ? outer_tile<4, 2>(r, c, C, U, stride, V, ldv, done)
           : outer_tile<1, 2>(r, c, C, U, stride, V, ldv, done);
    for (; c < cols; c += 8)
      four ? outer_tile<4, 1>(r, c, C, U, stride, V, ldv, done)
           : outer_tile<1, 1>(r, c, C, U, stride, V, ldv, done);
    r += four ? 4 : 1;
  }
}
