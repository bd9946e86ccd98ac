// A fast weight and what a chunk of C tokens writes into it:
//
//     delta <- decay delta - sum_t u_t v_t^T        w <- base + delta
//
// The stores of a tile queue up in front of the next tile's FMAs and cost a third of their time at C = 16. So, 16
// floats at a time, a tile is written vector by vector between the products of the one that follows.
#pragma once
#include "panel.h"

struct FastWeight {  // rows of `cols` floats
  float* delta;
  const float* base;  // or null: then delta is in force, and w is not written
  float* w;
  int64_t cols;
  float decay;
};

struct Factors {  // u in panels `stride` apart, v in token rows ldv apart
  const float* u;
  int64_t stride;
  const float* v;
  int64_t ldv;
};

template <bool BASED, class V>
HK_INLINE void advance(const FastWeight& weight, int64_t at, V sum) {
  const V x = fms(all_as<V>(weight.decay), load_as<V>(weight.delta + at), sum);
  store(weight.delta + at, x);
  if (BASED) store(weight.w + at, x + load_as<V>(weight.base + at));
}

#ifdef HOPE_WIDE
// f(0), f(1), ... f(TALL - 1) between the products of PANEL tokens
template <int TALL, class F>
HK_INLINE void products_between(const float* u, const float* v, int64_t ldv, f16 (&sum)[TALL][1], F f) {
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++, u += PANEL / TALL, v += PANEL / TALL * ldv) {
    accumulate<TALL, 1, f16>(PANEL / TALL, u, PANEL, 1, v, ldv, sum);
    f(i);
  }
}

// Tiles of 8 rows and a vector, as many as there are, of at least PANEL tokens; the first row that is left. Arguments
// are values: a reference would be read again after every store.
template <bool BASED>
inline int64_t update_tiles(const FastWeight weight, const Factors f, int64_t C, int64_t r, int64_t end) {
  constexpr int TALL = 8;
  f16 before[TALL];
  int64_t at = -1;  // where the tile before lies
  for (; r + TALL <= end; r += TALL)
    for (int64_t col = 0; col < weight.cols; col += LANES<f16>) {
      const float *u = f.u + r * PANEL, *v = f.v + col;
      f16 sum[TALL][1] = {};
      if (at < 0) accumulate<TALL, 1, f16>(PANEL, u, PANEL, 1, v, f.ldv, sum);
      else products_between(u, v, f.ldv, sum, [&](int i) { advance<BASED>(weight, at + i * weight.cols, before[i]); });
      for (int64_t t = PANEL; t < C; t += PANEL)
        accumulate<TALL, 1, f16>(std::min<int64_t>(PANEL, C - t), u += f.stride, PANEL, 1, v + t * f.ldv, f.ldv, sum);
#pragma GCC unroll 8
      for (int i = 0; i < TALL; i++) before[i] = sum[i][0];
      at = r * weight.cols + col;
    }
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
    if (at >= 0) advance<BASED>(weight, at + i * weight.cols, before[i]);
  return r;
}
#endif

template <bool BASED>
inline void update_rows(const FastWeight weight, const Factors f, int64_t C, int64_t r, int64_t end) {
#ifdef HOPE_WIDE
  if (C >= PANEL && weight.cols % LANES<f16> == 0) r = update_tiles<BASED>(weight, f, C, r, end);
#endif
  outer_product(r, end, weight.cols, C, f.u, f.stride, f.v, f.ldv, [&](int64_t i, int64_t col, auto& sum) {
    constexpr int MR = sizeof(sum) / sizeof(sum[0]), NV = sizeof(sum[0]) / sizeof(sum[0][0]);
#pragma GCC unroll 8
    for (int j = 0; j < MR; j++)
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++)
        advance<BASED>(weight, (i + j) * weight.cols + col + LANES<decltype(sum[0][0] + sum[0][0])> * n, sum[j][n]);
  });
}

// Rows [begin, end) of the weight, with the factors' C tokens.
inline void update(const FastWeight& weight, const Factors& f, int64_t C, int64_t begin, int64_t end) {
  weight.base ? update_rows<true>(weight, f, C, begin, end) : update_rows<false>(weight, f, C, begin, end);
}
