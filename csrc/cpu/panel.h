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

// f(vector, place) for every vector of rows r .. r + MR - 1 of a tile, in a matrix of rows ld floats apart.
template <class V, int MR, int NV, class P, class F>
HK_INLINE void with_rows(V (&acc)[MR][NV], P* matrix, int64_t ld, int64_t r, F f) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) f(acc[i][v], matrix + (r + i) * ld + LANES<V> * v);
}

// The same in a panel: all of its tokens, or the first half.
template <class V, int MR, int NV, class P, class F>
HK_INLINE void with_rows(V (&acc)[MR][NV], P* panel, int64_t r, F f) {
  with_rows(acc, panel, PANEL, r, f);
}

template <class V, int MR, int NV>
HK_INLINE void store_rows(float* panel, int64_t r, V (&acc)[MR][NV]) {
  with_rows(acc, panel, r, [](V& x, float* p) { store(p, x); });
}

template <class V, int MR, int NV>
HK_INLINE void load_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
  with_rows(acc, panel, r, [](V& x, const float* p) { x = load_as<V>(p); });
}

template <class V, int MR, int NV>
HK_INLINE void add_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
  with_rows(acc, panel, r, [](V& x, const float* p) { x = x + load_as<V>(p); });
}

template <class V, int MR, int NV>
HK_INLINE void subtract_from_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
  with_rows(acc, panel, r, [](V& x, const float* p) { x = load_as<V>(p) - x; });
}

template <class V, int MR, int NV>
HK_INLINE void multiply_rows(V (&acc)[MR][NV], const float* panel, int64_t r) {
  with_rows(acc, panel, r, [](V& x, const float* p) { x = x * load_as<V>(p); });
}

// Row r + i gets bias[r + i].
template <class V, int MR, int NV>
HK_INLINE void bias_rows(V (&acc)[MR][NV], const float* bias, int64_t r) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[i][v] = acc[i][v] + all_as<V>(bias[r + i]);
}

template <class V, int MR, int NV>
HK_INLINE void scale_rows(V (&acc)[MR][NV], float by) {
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[r][v] = acc[r][v] * all_as<V>(by);
}

// A tile times rows of a panel, to those of another one.
template <class V, int MR, int NV>
HK_INLINE void store_products(float* to, int64_t r, V (&acc)[MR][NV], const float* panel) {
  with_rows(acc, to, r, [to, panel](V& x, float* p) { store(p, x * load_as<V>(panel + (p - to))); });
}

// to += the squares of a tile's rows; from zero where the first of a group of eight rows is among them
template <class V, int MR, int NV>
HK_INLINE void add_squares(const V (&acc)[MR][NV], int64_t r, float* to) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) {
    V s = r % 8 == 0 ? V{} : load_as<V>(to + LANES<V> * v);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) s = fma(acc[i][v], acc[i][v], s);
    store(to + LANES<V> * v, s);
  }
}

// sigma of a tile, and its slope to rows of a panel
template <int ACT, class V, int MR, int NV>
HK_INLINE void activate(V (&acc)[MR][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[i][v] = sigma<ACT>(acc[i][v]);
}

template <int ACT, class V, int MR, int NV>
HK_INLINE void activate_rows(V (&acc)[MR][NV], float* slope, int64_t r) {
  with_rows(acc, slope, r, [](V& x, float* p) {
    V s;
    x = sigma<ACT>(x, s);
    store(p, s);
  });
}
