// Matrix products on panels. A panel holds 16 tokens: element (feature i, token j) at [i * 16 + j], so that
// the inner loop reads it straight through. Every output is one chain of FMAs over the inner index in
// ascending order, whatever the tile, so a value depends on neither the number of tokens beside it nor the
// number of threads.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int PANEL = 16;

// acc[r][v] += sum_k A[r, k] B[k, v]; A element (r, k) at A[r * rs + k * ks], B row k at B + k * ldb, in vectors V.
template <int MR, int NV, class V>
HK_INLINE void accumulate(int64_t K, const float* A, int64_t rs, int64_t ks, const float* B, int64_t ldb,
                          V (&acc)[MR][NV]) {
  for (int64_t k = 0; k < K; k++, A += ks, B += ldb) {
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = load_as<V>(B + LANES<V> * v);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      const V a = all_as<V>(A[r * rs]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
}

// Rows [r0, r1) of A B for one panel B [K][16] of which the first NV vectors of tokens are wanted, MR rows at a
// time: done(r, acc) gets rows r .. r + MR - 1. The first row that is left.
template <class V, int MR, int NV, class Done>
HK_INLINE int64_t tile_rows(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                            const float* B, Done done) {
  for (; r0 + MR <= r1; r0 += MR) {
    V acc[MR][NV] = {};
    accumulate<MR, NV, V>(K, A + r0 * rs, rs, ks, B, PANEL, acc);
    done(r0, acc);
  }
  return r0;
}

// half: of the panel's tokens only the first 8 are wanted
template <class Done>
HK_INLINE void panel_product(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                             const float* B, bool half, Done done) {
  if (half) {
    r0 = tile_rows<f8, 8, 1>(r0, r1, K, A, rs, ks, B, done);
    tile_rows<f8, 1, 1>(r0, r1, K, A, rs, ks, B, done);
    return;
  }
#ifdef HOPE_WIDE
  r0 = tile_rows<f16, 8, 1>(r0, r1, K, A, rs, ks, B, done);
  tile_rows<f16, 1, 1>(r0, r1, K, A, rs, ks, B, done);
#else
  r0 = tile_rows<f8, 4, 2>(r0, r1, K, A, rs, ks, B, done);
  tile_rows<f8, 1, 2>(r0, r1, K, A, rs, ks, B, done);
#endif
}

#ifdef HOPE_WIDE
// tile_rows for two panels, which share every broadcast of A
template <int MR, class First, class Second>
HK_INLINE int64_t tile_pairs(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                             const float* B, const float* C, First first, Second second) {
  for (; r0 + MR <= r1; r0 += MR) {
    f16 x[MR][1] = {}, y[MR][1] = {};
    const float* a = A + r0 * rs;
    for (int64_t k = 0; k < K; k++, a += ks) {
      const f16 b = load_as<f16>(B + k * PANEL), c = load_as<f16>(C + k * PANEL);
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++) {
        const f16 v = all_as<f16>(a[r * rs]);
        x[r][0] = fma(v, b, x[r][0]), y[r][0] = fma(v, c, y[r][0]);
      }
    }
    first(r0, x), second(r0, y);
  }
  return r0;
}
#endif

// panel_product for two whole panels
template <class First, class Second>
HK_INLINE void panel_products(int64_t r0, int64_t r1, int64_t K, const float* A, int64_t rs, int64_t ks,
                              const float* B, const float* C, First first, Second second) {
#ifdef HOPE_WIDE
  r0 = tile_pairs<8>(r0, r1, K, A, rs, ks, B, C, first, second);
  tile_pairs<1>(r0, r1, K, A, rs, ks, B, C, first, second);
#else
  panel_product(r0, r1, K, A, rs, ks, B, false, first);
  panel_product(r0, r1, K, A, rs, ks, C, false, second);
#endif
}

// out(r, c, acc) for rows [r0, r1) and all columns of sum over panels p of U_p [rows][16] V[16 p .., cols],
// tokens counted by C: the update of a weight by C tokens. U element (r, token) at U + p * stride + r * 16 +
// token % 16; V [C, cols], rows ldv apart.
template <class T, int MR, int NV, class Done>
HK_INLINE void outer_tile(int64_t r, int64_t c, int64_t C, const float* U, int64_t stride, const float* V,
                          int64_t ldv, Done done) {
  T acc[MR][NV] = {};
  for (int64_t t = 0; t < C; t += PANEL, U += stride)
    accumulate<MR, NV, T>(std::min<int64_t>(PANEL, C - t), U + r * PANEL, PANEL, 1, V + t * ldv + c, ldv, acc);
  done(r, c, acc);
}

// MR rows from r, all columns
template <int MR, class Done>
HK_INLINE void outer_rows(int64_t r, int64_t cols, int64_t C, const float* U, int64_t stride, const float* V,
                          int64_t ldv, Done done) {
  int64_t c = 0;
#ifdef HOPE_WIDE
  for (; c + 32 <= cols; c += 32) outer_tile<f16, MR, 2>(r, c, C, U, stride, V, ldv, done);
  for (; c + 16 <= cols; c += 16) outer_tile<f16, MR, 1>(r, c, C, U, stride, V, ldv, done);
#else
  for (; c + 16 <= cols; c += 16) outer_tile<f8, MR, 2>(r, c, C, U, stride, V, ldv, done);
#endif
  for (; c < cols; c += 8) outer_tile<f8, MR, 1>(r, c, C, U, stride, V, ldv, done);
}

template <class Done>
HK_INLINE void outer_product(int64_t r0, int64_t r1, int64_t cols, int64_t C, const float* U, int64_t stride,
                             const float* V, int64_t ldv, Done done) {
#ifdef HOPE_WIDE
  for (; r0 + 8 <= r1; r0 += 8) outer_rows<8>(r0, cols, C, U, stride, V, ldv, done);
#endif
  for (; r0 + 4 <= r1; r0 += 4) outer_rows<4>(r0, cols, C, U, stride, V, ldv, done);
  for (; r0 < r1; r0++) outer_rows<1>(r0, cols, C, U, stride, V, ldv, done);
}
