// Sums over all tokens of a call. Tokens are taken by parts, each added up by one thread, and the parts are added in
// order: the bits depend on neither the number of threads nor the chance of who was first.

#include "layer_parameters.h"

#include <algorithm>
#include <new>
#include <vector>

#include "aligned.h"
#include "check.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t PART = 64;  // tokens

// to [n] = the sum over parts of what row(r, sum [n]) adds for the rows of a part; width: numbers of a row
template <class Row>
void sum_of_parts(int64_t rows, int64_t width, int64_t n, int64_t threads, float* to, Row row) {
  const int64_t parts = (rows + PART - 1) / PART;
  const AlignedFloats sums(n, parts);
  const int team = team_for(1.0 * rows * width, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    const FlushDenormals flush;
    for (int64_t r = part * PART; r < std::min(rows, (part + 1) * PART); r++) row(r, sums.data + part * n);
  }
  std::fill_n(to, n, 0);
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < n; i += 8) store(to + i, load(to + i) + load(sums.data + part * n + i));
}

}  // namespace

extern "C" int hope_conv_weight_backward(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads, const float* x,
                                         const float* tail, const float* dy, float* dweight) try {
  if (!width(d) || W < 1 || !extents({B, T, d}) || !extents({B, W, d}) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (!dweight || (B * T && !all_given({x, dy})) || (B * T && W > 1 && !tail)) return BAD_ARGUMENT;
  std::vector<float> taps(W * d);  // W rows of d
  sum_of_parts(B * T, W * d, W * d, threads, taps.data(), [&](int64_t r, float* sum) {
    const int64_t b = r / T, t = r % T;
    for (int64_t j = 0; j < W; j++) {
      const int64_t i = t + j - (W - 1);  // the token that tap j met; the tail's before the first one
      const float* input = i < 0 ? tail + (b * (W - 1) + t + j) * d : x + (b * T + i) * d;
      for (int64_t k = 0; k < d; k += 8)
        store(sum + j * d + k, fma(load(dy + r * d + k), load(input + k), load(sum + j * d + k)));
    }
  });
  for (int64_t k = 0; k < d; k++)
    for (int64_t j = 0; j < W; j++) dweight[k * W + j] = taps[j * d + k];
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

extern "C" int hope_output_gate_gain_backward(int64_t tokens, int64_t H, int64_t D, int64_t threads, const float* o,
                                              const float* gate, const float* dy, float* dgain) try {
  if (!width(D) || H < 1 || !extents({tokens, H, D}) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (!dgain || (tokens && !all_given({o, dy}))) return BAD_ARGUMENT;
  sum_of_parts(tokens, H * D, H * D, threads, dgain, [&](int64_t t, float* sum) {
    for (int64_t h = 0; h < H; h++) {
      const int64_t at = (t * H + h) * D;
      const f8 factor = all(rms_factor(o + at, D));
      for (int64_t i = 0; i < D; i += 8) {
        f8 by = load(dy + at + i) * (load(o + at + i) * factor);
        if (gate) by = by * sigma<SILU>(load(gate + at + i));
        store(sum + h * D + i, load(sum + h * D + i) + by);
      }
    }
  });
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
