// The update of a CMS level's matrix: in one pass from a gradient that is there (fp32), or in the epilogue of
// the product of bf16 factors that would have been the gradient, which then never exists in memory.
//
//     g = left^T right, left [C, r], right [C, c] bf16, products and sums in fp32 (AVX512-BF16)
//
// Two tokens lie beside each other in a 32-bit word, as the instruction takes them: a word of left, one output
// and two tokens, meets 16 words of right. A tile of 8 outputs by 48 inputs stays in 24 registers over all
// tokens, in order, so that bits depend on the token's place alone; then its 8 rows take their step while
// they are in the first cache. Of C tokens the 48 inputs are 96 C bytes: with C = 256 they stay there too.
// 2 C FLOPs a weight; 10 bytes for gd with a copy, 18 with momentum, 26 for adam.

#include <algorithm>
#include <memory>
#include <new>

#include "check.h"
#include "cms_step.h"
#include "cms.h"
#include "team.h"

namespace {

constexpr int64_t BLOCK = 1 << 12;  // weights a thread takes at a time
constexpr int64_t MR = 8, LANES = 16, NV = 3, NR = NV * LANES, GROUP = 16;  // a tile; tiles of rows in a task

}  // namespace

extern "C" int hope_cms_step(int64_t n, int64_t threads, int64_t rule, float lr, float mu, float beta2, float first,
                             float second, float root, float eps, const float* grad, float* total, float* weight,
                             float* moment, float* square, uint16_t* copy) {
  const Step s{rule, lr, mu, beta2, first, second, root, eps};
  const Weights p{weight, moment, square, total, copy};
  if (n < 0 || n > MOST_FLOATS || !threads_fit(threads) || (n && (!step_fits(s, p) || (!grad && !total))))
    return BAD_ARGUMENT;
  const int64_t count = (n + BLOCK - 1) / BLOCK;
  const int team = team_for(n, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < count; block++) {
    const FlushDenormals flush;
    const int64_t i = block * BLOCK;
    step_weights(s, std::min(n - i, BLOCK), grad ? grad + i : grad, p.from(i));
  }
  return DONE;
}

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define HK_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

// Two rows of `columns` bf16 numbers as words, second null: zeros; `padded` words, zero past the columns.
HK_BF16 void pair_rows(const uint16_t* first, const uint16_t* second, int64_t columns, int64_t padded,
                       uint32_t* words) {
  int64_t j = 0;
  for (; j + LANES <= columns; j += LANES) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + j)));
    if (second) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + j)));
      w = _mm512_or_si512(w, _mm512_slli_epi32(high, 16));
    }
    _mm512_storeu_si512(words + j, w);
  }
  for (; j < padded; j++)
    words[j] = j < columns ? first[j] | (second ? uint32_t{second[j]} << 16 : 0) : 0;
}

// out [MR, NR] = the tile's product over `pairs` of tokens: left [pairs, ldl] at its MR words, right [pairs, ldr]
// at its NR.
HK_BF16 void tile(int64_t pairs, const uint32_t* left, int64_t ldl, const uint32_t* right, int64_t ldr, float* out) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
    for (int v = 0; v < NV; v++) acc[i][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh r[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; v++) r[v] = (__m512bh)_mm512_loadu_si512(right + k * ldr + LANES * v);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512bh l = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[k * ldl + i]));
#pragma GCC unroll 3
      for (int v = 0; v < NV; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], l, r[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 3
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + i * NR + LANES * v, acc[i][v]);
}

// Words of two tokens of t [C, columns] in panels `width` wide: [panels, pairs, width].
void panels(const uint16_t* t, int64_t C, int64_t columns, int64_t width, uint32_t* words, int team) {
  const int64_t pairs = (C + 1) / 2, count = (columns + width - 1) / width;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t i = 0; i < count * pairs; i++) {
    const int64_t p = i / pairs, k = i % pairs;
    const uint16_t* first = t + 2 * k * columns + p * width;
    pair_rows(first, 2 * k + 1 < C ? first + columns : nullptr, std::min(width, columns - p * width), width,
              words + i * width);
  }
}

}  // namespace

extern "C" int hope_cms_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

extern "C" int hope_cms_step_bf16(int64_t C, int64_t r, int64_t c, int64_t threads, int64_t rule, float lr, float mu,
                                  float beta2, float first, float second, float root, float eps, const uint16_t* left,
                                  const uint16_t* right, float* total, float* weight, float* moment, float* square,
                                  uint16_t* copy) {
  const Step s{rule, lr, mu, beta2, first, second, root, eps};
  const Weights p{weight, moment, square, total, copy};
  if (!hope_cms_bf16() || !extents({C, r}) || !extents({C, c}) || !extents({r, c}) || !threads_fit(threads) ||
      (r && c && !step_fits(s, p)) || (C && r && c && !all_given({left, right})))
    return BAD_ARGUMENT;
  const int64_t pairs = (C + 1) / 2, tall = (r + MR - 1) / MR, wide = (c + NR - 1) / NR;
  std::unique_ptr<uint32_t[]> a(new (std::nothrow) uint32_t[pairs * tall * MR + 1]);
  std::unique_ptr<uint32_t[]> b(new (std::nothrow) uint32_t[pairs * wide * NR + 1]);
  if (!a || !b) return NO_MEMORY;
  const int team = team_for(r * c, ALONE_NUMBERS, threads);
  panels(left, C, r, MR, a.get(), team);
  panels(right, C, c, NR, b.get(), team);
  const int64_t groups = (tall + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t task = 0; task < wide * groups; task++) {
    const FlushDenormals flush;
    const int64_t j = task / groups, columns = std::min(NR, c - j * NR);
    alignas(64) float grad[MR * NR];
    for (int64_t i = task % groups * GROUP; i < std::min(tall, (task % groups + 1) * GROUP); i++) {
      tile(pairs, a.get() + i * pairs * MR, MR, b.get() + j * pairs * NR, NR, grad);
      for (int64_t row = i * MR; row < std::min(r, (i + 1) * MR); row++)
        step_weights(s, columns, grad + (row - i * MR) * NR, p.from(row * c + j * NR));
    }
  }
  return DONE;
}

#else

extern "C" int hope_cms_bf16() { return 0; }

extern "C" int hope_cms_step_bf16(int64_t, int64_t, int64_t, int64_t, int64_t, float, float, float, float, float,
                                  float, float, const uint16_t*, const uint16_t*, float*, float*, float*, float*,
                                  uint16_t*) {
  return BAD_ARGUMENT;
}

#endif
