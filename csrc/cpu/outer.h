// Products that the backward of the memory adds up: adjoints of weights, and rows of panels on their way
// through a function.
#pragma once
#include <initializer_list>

#include "panel.h"

// Rows of a product that meet vectors of their own on the way into a panel: f(row, lane, value) for each
// vector.
template <class V, int MR, int NV, class F>
HK_INLINE void map_rows(float* panel, int64_t r, const V (&acc)[MR][NV], F f) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++)
      store(panel + (r + i) * PANEL + LANES<V> * v, f(r + i, LANES<V> * v, acc[i][v]));
}

// One factor pair of a sum of outer products: U panels (the rows' factors), V [C, cols] in rows ldv apart.
struct Outer {
  const float* U;
  int64_t stride;
  const float* V;
  int64_t ldv;
};

// For rows [r0, r1): sum of U V over both lists of factors and C tokens, the first list also added to
// `shared`. to = decay to + sum. Matrices in rows of `cols` floats; V of a factor has as many columns.
template <class T, int MR, int NV>
HK_INLINE void outer_sums(int64_t r, int64_t col, int64_t cols, int64_t C, const Outer* a, int na,
    const Outer* b,
                          int nb, float decay, float* to, float* shared) {
  T acc[MR][NV] = {};
  auto add = [&](const Outer& o) {
    const float* U = o.U;
    for (int64_t t = 0; t < C; t += PANEL, U += o.stride)
      accumulate<MR, NV, T>(std::min<int64_t>(PANEL, C - t), U + r * PANEL, PANEL, 1, o.V + t * o.ldv + col,
          o.ldv,
                            acc);
  };
  for (int j = 0; j < na; j++) add(a[j]);
  if (shared)
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < NV; v++) {
        float* p = shared + (r + i) * cols + col + LANES<T> * v;
        store(p, acc[i][v] + load_as<T>(p));
      }
  for (int j = 0; j < nb; j++) add(b[j]);
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) {
      float* p = to + (r + i) * cols + col + LANES<T> * v;
      store(p, fma(all_as<T>(decay), load_as<T>(p), acc[i][v]));
    }
}

template <int MR>
HK_INLINE void outer_strip(int64_t r, int64_t cols, int64_t C, const Outer* a, int na, const Outer* b, int nb,
                           float decay, float* to, float* shared) {
  int64_t c = 0;
#ifdef HOPE_WIDE
  for (; c + 32 <= cols; c += 32) outer_sums<f16, MR, 2>(r, c, cols, C, a, na, b, nb, decay, to, shared);
  for (; c + 16 <= cols; c += 16) outer_sums<f16, MR, 1>(r, c, cols, C, a, na, b, nb, decay, to, shared);
#else
  for (; c + 16 <= cols; c += 16) outer_sums<f8, MR, 2>(r, c, cols, C, a, na, b, nb, decay, to, shared);
#endif
  for (; c < cols; c += 8) outer_sums<f8, MR, 1>(r, c, cols, C, a, na, b, nb, decay, to, shared);
}

inline void add_outer(int64_t r0, int64_t r1, int64_t cols, int64_t C, std::initializer_list<Outer> a,
                      std::initializer_list<Outer> b, float decay, float* to, float* shared) {
  const int na = static_cast<int>(a.size()), nb = static_cast<int>(b.size());
#ifdef HOPE_WIDE
  for (; r0 + 8 <= r1; r0 += 8) outer_strip<8>(r0, cols, C, a.begin(), na, b.begin(), nb, decay, to, shared);
#endif
  for (; r0 + 4 <= r1; r0 += 4) outer_strip<4>(r0, cols, C, a.begin(), na, b.begin(), nb, decay, to, shared);
  for (; r0 < r1; r0++) outer_strip<1>(r0, cols, C, a.begin(), na, b.begin(), nb, decay, to, shared);
}
