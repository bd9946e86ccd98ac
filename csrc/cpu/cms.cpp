// A CMS level between its products (its norm: linear.h): the activation with its derivative from one exponential, and
// the norm's backward in two passes over a row. fp32. A number's value depends on its own inputs, or its row's, alone.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "check.h"
#include "cms.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t BLOCK = 1 << 12;  // numbers a thread takes at a time
constexpr int64_t PART = 64;        // rows whose parts in a sum are added up first

}  // namespace

extern "C" int hope_cms_gelu(int64_t n, int64_t threads, int32_t erf, const float* z, float* a, float* slope) {
  if (n < 0 || n > MOST_FLOATS || n % 8 || !threads_fit(threads) || (n && !all_given({z, a}))) return BAD_ARGUMENT;
  const int64_t count = (n + BLOCK - 1) / BLOCK;
  const int team = team_for(n, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < count; block++) {
    const FlushDenormals flush;
    for (int64_t i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i += 8) {
      f8 s;  // gelu has other bits without its slope
      store(a + i, erf ? sigma<GELU>(load(z + i), s) : sigma<GELU_TANH>(load(z + i), s));
      if (slope) store(slope + i, s);
    }
  }
  return DONE;
}

extern "C" int hope_cms_gate(int64_t n, int64_t threads, int32_t silu, const float* g, const float* z, float* a) {
  if (n < 0 || n > MOST_FLOATS || n % 8 || !threads_fit(threads) || (n && !all_given({g, z, a}))) return BAD_ARGUMENT;
  const int64_t count = (n + BLOCK - 1) / BLOCK;
  const int team = team_for(n, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < count; block++) {
    const FlushDenormals flush;
    for (int64_t i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i += 8)
      store(a + i, (silu ? sigma<SILU>(load(g + i)) : sigma<GELU_TANH>(load(g + i))) * load(z + i));
  }
  return DONE;
}

extern "C" int hope_cms_norm_backward(int64_t rows, int64_t d, int64_t threads, float eps, const float* x,
                                      const float* gain, const float* dn, const float* dy, float* dx,
                                      float* dgain) try {
  if (!rows_of_width(rows, d, threads) || (rows && !all_given({x, gain, dn, dx}))) return BAD_ARGUMENT;
  const int64_t parts = (rows + PART - 1) / PART;
  std::vector<float> sums(dgain ? parts * d : 0);
  const int team = team_for(1.0 * rows * d, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    const FlushDenormals flush;
    for (int64_t r = part * PART; r < std::min(rows, (part + 1) * PART); r++) {
      const float *xr = x + r * d, *g = dn + r * d;
      float* sum = dgain ? sums.data() + part * d : nullptr;
      f8 square[2] = {}, along[2] = {};  // two chains each: one would wait for every addition
      for (int64_t i = 0, j = 0; i < d; i += 8, j ^= 1) {
        const f8 v = load(xr + i);
        square[j] = fma(v, v, square[j]);
        along[j] = fma(v, load(g + i) * load(gain + i), along[j]);
      }
      const float factor = 1 / std::sqrt(total(square[0] + square[1]) / d + eps);
      const float mean = total(along[0] + along[1]) / d;
      const f8 f = all(factor), m = all(factor * factor * mean);
      for (int64_t i = 0; i < d; i += 8) {
        const f8 back = fnma(m, load(xr + i), load(g + i) * load(gain + i)) * f;
        if (sum) store(sum + i, fma(load(g + i), load(xr + i) * f, load(sum + i)));
        store(dx + r * d + i, dy ? back + load(dy + r * d + i) : back);
      }
    }
  }
  if (!dgain) return DONE;
  std::fill_n(dgain, d, 0);
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < d; i += 8) store(dgain + i, load(dgain + i) + load(sums.data() + part * d + i));
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
