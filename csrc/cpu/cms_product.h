// The step of a matrix in the epilogue of the product of its fp32 factors, compiled for each width of vectors
// (width.h): the gradient left^T right, left [C, r], right [C, c], is never in memory as a whole. A weight's gradient
// is one chain of C products, token after token.
#pragma once
#include <algorithm>

#include "cms.h"
#include "cms_step.h"
#include "product.h"
#include "team.h"

constexpr int64_t TILE_ROWS = 8, TILE_COLUMNS = 32;

// t [C, columns] in panels `w` wide: [panels][C][w], zeros past the columns
inline void pack_columns(const float* t, int64_t C, int64_t columns, int64_t w, float* to) {
  for (int64_t j = 0; j < columns; j += w)
    for (int64_t k = 0; k < C; k++, to += w) {
      const int64_t n = std::min(w, columns - j);
      for (int64_t i = 0; i < n; i++) to[i] = t[k * columns + j + i];
      for (int64_t i = n; i < w; i++) to[i] = 0;
    }
}

// grad [8][32] = the product over C tokens of 8 columns of one panel with 32 of the other
inline void product_tile(int64_t C, const float* left, const float* right, float* grad) {
#ifdef HOPE_WIDE
  f16 acc[TILE_ROWS][2] = {};
  accumulate<TILE_ROWS, 2, f16>(C, left, 1, TILE_ROWS, right, TILE_COLUMNS, acc);
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) store(grad + i * TILE_COLUMNS + 16 * v, acc[i][v]);
#else
  for (int64_t i = 0; i < TILE_ROWS; i += 4)
    for (int64_t j = 0; j < TILE_COLUMNS; j += 16) {
      f8 acc[4][2] = {};
      accumulate<4, 2, f8>(C, left + i, 1, TILE_ROWS, right + j, TILE_COLUMNS, acc);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) store(grad + (i + k) * TILE_COLUMNS + j + 8 * v, acc[k][v]);
    }
#endif
}

// packed: product_floats(c) numbers of scratch
inline int64_t product_floats(const CmsProduct& c) {
  return c.C * ((c.r + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS + (c.c + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS);
}

inline void step_product(const CmsProduct& p, float* packed) {
  const int64_t tall = (p.r + TILE_ROWS - 1) / TILE_ROWS, flat = (p.c + TILE_COLUMNS - 1) / TILE_COLUMNS;
  float* rights = packed + p.C * tall * TILE_ROWS;
  pack_columns(p.left, p.C, p.r, TILE_ROWS, packed);
  pack_columns(p.right, p.C, p.c, TILE_COLUMNS, rights);
  const Step s{p.rule, p.lr, p.mu, p.beta2, p.first, p.second, p.root, p.eps};
  const Weights weights{p.weight, p.moment, p.square, p.total, nullptr};
  const int team = p.C * p.r * p.c < (1 << 22) ? 1 : static_cast<int>(p.threads);
  in_parallel(team, [&](int id, int n) {
    const FlushDenormals flush;
    const Range own = Team{id, n, nullptr}.share(0, tall, 1);
    alignas(64) float grad[TILE_ROWS * TILE_COLUMNS];
    for (int64_t j = 0; j < flat; j++)
      for (int64_t i = own.begin; i < own.end; i++) {
        product_tile(p.C, packed + i * p.C * TILE_ROWS, rights + j * p.C * TILE_COLUMNS, grad);
        const int64_t columns = std::min(TILE_COLUMNS, p.c - j * TILE_COLUMNS);
        for (int64_t r = i * TILE_ROWS; r < std::min(p.r, (i + 1) * TILE_ROWS); r++)
          step_weights(s, columns, grad + (r - i * TILE_ROWS) * TILE_COLUMNS,
                       weights.from(r * p.c + j * TILE_COLUMNS));
      }
  });
}
