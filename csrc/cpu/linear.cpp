// What the entry points of linear.h check, the choice of vectors (width.h), norm and gates.

#include "linear.h"

#include <algorithm>
#include <cmath>

#include "gates.h"
#include "linear_run.h"
#include "rows.h"
#include "width.h"

namespace avx512 {  // linear_avx512.cpp
void linear(int64_t n, int64_t K, int64_t R, int64_t threads, const float* x, const float* W, const float* more,
            float* y);
}  // namespace avx512

namespace {

// The sums of squares of up to eight rows of d, in the order that a panel has them (`squares` of titans_head.h): four
// chains each.
void squares_of(const float* x, int64_t rows, int64_t d, float* sums) {
  if (rows == 8) {
    f8 s[4] = {};
    for (int64_t i = 0; i < d; i += 8) {
      float columns[64];
      transpose8(x + i, d, columns, 8);
      for (int j = 0; j < 8; j++) s[j % 4] = fma(load(columns + 8 * j), load(columns + 8 * j), s[j % 4]);
    }
    return store(sums, (s[0] + s[1]) + (s[2] + s[3]));
  }
  for (int64_t r = 0; r < rows; r++, x += d) {
    float s[4] = {};
    for (int64_t i = 0; i < d; i += 4)
      for (int j = 0; j < 4; j++) s[j] = std::fma(x[i + j], x[i + j], s[j]);
    sums[r] = (s[0] + s[1]) + (s[2] + s[3]);
  }
}

}  // namespace

extern "C" int hope_linear(int64_t n, int64_t K, int64_t R, int64_t threads, const float* x, const float* W,
                           const float* more, float* y) {
  if (!extents({n, K, R}) || K < 1 || !threads_fit(threads)) return BAD_ARGUMENT;
  if (n * R == 0) return DONE;
  if (!all_given({x, W, y})) return BAD_ARGUMENT;
  if (wide()) avx512::linear(n, K, R, threads, x, W, more, y);
  else Linear(n, K, R, x, W, more, y).run(threads);
  return DONE;
}

extern "C" int hope_rms_norm(int64_t n, int64_t d, int64_t threads, float eps, const float* x, const float* gain,
                             float* y) {
  if (!rows_of_width(n, d, threads) || (n && !all_given({x, gain, y}))) return BAD_ARGUMENT;
  const int team = team_for(1.0 * n * d, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < n; r += 8) {
    const FlushDenormals flush;
    const int64_t rows = std::min<int64_t>(8, n - r);
    float sums[8];
    squares_of(x + r * d, rows, d, sums);
    for (int64_t j = 0; j < rows; j++) {
      const float* row = x + (r + j) * d;
      const f8 factor = all(1 / std::sqrt(sums[j] / static_cast<float>(d) + eps));
      for (int64_t i = 0; i < d; i += 8) store(y + (r + j) * d + i, load(row + i) * factor * load(gain + i));
    }
  }
  return DONE;
}

extern "C" int hope_layer_norm(int64_t n, int64_t d, int64_t threads, float eps, const float* x, const float* gain,
                               const float* shift, float* y) {
  if (!rows_of_width(n, d, threads) || (n && !all_given({x, gain, shift, y}))) return BAD_ARGUMENT;
  const int team = team_for(1.0 * n * d, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < n; r++) layer_norm_row(x + r * d, d, eps, gain, shift, y + r * d);
  return DONE;
}

extern "C" int hope_gate(int64_t n, int64_t H, int32_t softplus, float scale, const float* x, const float* bias,
                         float* y) {
  if (!extents({n, H})) return BAD_ARGUMENT;
  if (n * H && !all_given({x, bias, y})) return BAD_ARGUMENT;
  TitansCall c{};
  c.softplus = softplus, c.eta_scale = scale;
  for (int64_t i = 0; i < n * H; i++) y[i] = eta_of(c, x[i], bias[i % H]);
  return DONE;
}
