// What the entry points of cms_whole.h check, the choice of vectors (width.h), and what becomes of the sum of squares.

#include "cms_whole.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "aligned.h"
#include "check.h"
#include "newton_schulz.h"
#include "width.h"

namespace avx512 {  // cms_whole_avx512.cpp
void newton_schulz(int64_t r, int64_t c, int64_t team, const float* from, float norm, float* to, float* work);
}  // namespace avx512

namespace {

constexpr int64_t BLOCK = 1 << 12;  // squares that are summed in fp32, of which come sums in fp64
constexpr float TINY = 1e-30f;      // gradients of this size or below count as zero

double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += BLOCK) {
    float rest[BLOCK];
    const float* block = x + i;
    if (n - i < BLOCK) {
      std::memcpy(rest, block, (n - i) * sizeof(float));
      std::fill(rest + (n - i), rest + BLOCK, 0.0f);
      block = rest;
    }
    f8 s[4] = {all(0), all(0), all(0), all(0)};
    for (int64_t k = 0; k < BLOCK; k += 32)
      for (int j = 0; j < 4; j++) {
        const f8 v = load(block + k + 8 * j);
        s[j] = fma(v, v, s[j]);
      }
    sum += total((s[0] + s[1]) + (s[2] + s[3]));
  }
  return sum;
}

}  // namespace

extern "C" int hope_newton_schulz(int64_t count, int64_t r, int64_t c, int64_t threads, const float* from,
                                  float* to) try {
  if (!extents({count, r, c}) || !extents({r + PANEL, c + PANEL, 3}) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (count == 0 || r == 0 || c == 0) return DONE;
  if (!all_given({from, to})) return BAD_ARGUMENT;
  const NewtonSchulz here(r, c);
  const int64_t team = NewtonSchulz::team(r, c, threads), floats = here.floats(team);
  const AlignedFloats work(floats);
  for (int64_t i = 0; i < count; i++) {
    const float* g = from + i * r * c;
    float* y = to + i * r * c;
    const float norm = static_cast<float>(std::sqrt(sum_of_squares(g, r * c)));
    if (i > 0) std::fill_n(work.data, floats, 0.0f);
    wide() ? avx512::newton_schulz(r, c, team, g, norm, y, work.data) : here.run(team, g, norm, y, work.data);
  }
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

extern "C" int hope_normalise(int64_t n, int64_t threads, float* x) {
  if (n < 0 || n > MOST_FLOATS || !threads_fit(threads) || (n && !x)) return BAD_ARGUMENT;
  if (n == 0) return DONE;
  const float rms = std::max(std::sqrt(static_cast<float>(sum_of_squares(x, n) / n)), TINY);  // NaN stays NaN
  const int64_t count = (n + BLOCK - 1) / BLOCK;
  const int team = team_for(n, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < count; block++) {
    const FlushDenormals flush;
    const int64_t end = std::min(n, (block + 1) * BLOCK);
    int64_t i = block * BLOCK;
    for (; i + 8 <= end; i += 8) store(x + i, load(x + i) / all(rms));
    for (; i < end; i++) x[i] /= rms;
  }
  return DONE;
}
