// Panels and what is around them: token rows in and out, and what a product's rows meet on their way into one.
#pragma once
#include "product.h"

// Lanes [a, b) of a panel from token rows: lane j is row j - a of `rows`.
inline void load_lanes(float* panel, const float* rows, int64_t ld, int64_t D, int64_t a, int64_t b) {
  for (int64_t j = a; j < b;) {
    if (j + 8 <= b && j % 8 == 0) {
      int64_t d = 0;
      for (; d + 8 <= D; d += 8) transpose8(rows + (j - a) * ld + d, ld, panel + d * PANEL + j, PANEL);
      for (; d < D; d++)
        for (int64_t i = 0; i < 8; i++) panel[d * PANEL + j + i] = rows[(j - a + i) * ld + d];
      j += 8;
    } else {
      for (int64_t d = 0; d < D; d++) panel[d * PANEL + j] = rows[(j - a) * ld + d];
      j++;
    }
  }
}

// Token rows from lanes [a, b) of a panel.
inline void store_lanes(const float* panel, float* rows, int64_t ld, int64_t D, int64_t a, int64_t b) {
  for (int64_t j = a; j < b;) {
    if (j + 8 <= b && j % 8 == 0) {
      int64_t d = 0;
      for (; d + 8 <= D; d += 8) transpose8(panel + d * PANEL + j, PANEL, rows + (j - a) * ld + d, ld);
      for (; d < D; d++)
        for (int64_t i = 0; i < 8; i++) rows[(j - a + i) * ld + d] = panel[d * PANEL + j + i];
      j += 8;
    } else {
      for (int64_t d = 0; d < D; d++) rows[(j - a) * ld + d] = panel[d * PANEL + j];
      j++;
    }
  }
}

// Rows r .. r + MR - 1 of a tile's accumulators: stored to a panel, or with a panel's rows added to them, or
// multiplied into them. The vectors of a row that the tile has: all of a panel's tokens, or the first half.
template <class V, int MR, int NV>
HK_INLINE void store_rows(float* p, int64_t r, const V (&acc)[MR][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(p + (r + i) * PANEL + LANES<V> * v, acc[i][v]);
}

template <class V, int MR, int NV>
HK_INLINE void add_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[i][v] = acc[i][v] + load_as<V>(panel + (r + i) * PANEL + LANES<V> * v);
}

template <class V, int MR, int NV>
HK_INLINE void multiply_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[i][v] = acc[i][v] * load_as<V>(panel + (r + i) * PANEL + LANES<V> * v);
}
