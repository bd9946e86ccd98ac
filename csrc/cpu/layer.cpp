// What a layer does around its memories, one pass over the tokens each: the causal convolution, unit vectors,
// the output gate, and their gradients by what flows through them. fp32, contiguous; d = H D, a multiple of
// 8. Bandwidth-bound, and small: a call of PyTorch for every sum and product took more time than all of them
// here. A token's value depends on its own inputs alone, whatever lies beside it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "check.h"
#include "layer.h"
#include "rows.h"
#include "team.h"

namespace {

template <class Row>
void for_rows(int64_t rows, int64_t width, int64_t threads, Row row) {
  const int n = team_for(1.0 * rows * width, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(n) schedule(static)
  for (int64_t r = 0; r < rows; r++) row(r);
}

// weight [d, W] as W rows of d
std::vector<float> taps(const float* weight, int64_t d, int64_t W) {
  std::vector<float> found(W * d);
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < W; j++) found[j * d + i] = weight[i * W + j];
  return found;
}

}  // namespace

extern "C" int hope_conv(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads, const float* x,
                         const float* tail, const float* weight, const int64_t* len, float* y,
                         float* new_tail) try {
  if (!width(d) || W < 1 || !extents({B, T, d}) || !extents({B, W, d}) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (B == 0) return DONE;
  if (!all_given({weight, len}) || (T && !all_given({x, y})) || (W > 1 && !all_given({tail, new_tail})) ||
      !rows_fit(B, T, nullptr, len)) {
    return BAD_ARGUMENT;
  }
  const std::vector<float> w = taps(weight, d, W);
  auto input = [&](int64_t b, int64_t i) {  // the i-th of a row's inputs, its tail's W - 1 first
    return i < W - 1 ? tail + (b * (W - 1) + i) * d : x + (b * T + i - W + 1) * d;
  };
  for_rows(B * T, W * d, threads, [&](int64_t r) {
    const int64_t b = r / T, t = r % T;
    if (t >= len[b]) {
      std::memset(y + r * d, 0, d * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < d; i += 8) {
      f8 s = load(w.data() + i) * load(input(b, t) + i);
      for (int64_t j = 1; j < W; j++) s = fma(load(w.data() + j * d + i), load(input(b, t + j) + i), s);
      store(y + r * d + i, s);
    }
  });
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < W - 1; i++)
      std::memcpy(new_tail + (b * (W - 1) + i) * d, input(b, len[b] + i), d * sizeof(float));
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

extern "C" int hope_conv_backward(int64_t B, int64_t T, int64_t d, int64_t W, int64_t threads,
                                  const float* weight, const float* dy, float* dx) try {
  if (!width(d) || W < 1 || !extents({B, T, d}) || !extents({W, d}) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (B * T == 0) return DONE;
  if (!all_given({weight, dy, dx})) return BAD_ARGUMENT;
  const std::vector<float> w = taps(weight, d, W);
  for_rows(B * T, W * d, threads, [&](int64_t r) {
    const int64_t ahead = std::min(W, T - r % T);  // outputs that saw this input
    for (int64_t i = 0; i < d; i += 8) {
      f8 s = all(0);
      for (int64_t a = 0; a < ahead; a++) s = fma(load(w.data() + (W - 1 - a) * d + i), load(dy + (r + a) * d + i), s);
      store(dx + r * d + i, s);
    }
  });
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

extern "C" int hope_unit(int64_t rows, int64_t D, int64_t threads, const float* x, float* y) {
  if (!rows_of_width(rows, D, threads)) return BAD_ARGUMENT;
  if (rows && !all_given({x, y})) return BAD_ARGUMENT;
  for_rows(rows, D, threads, [&](int64_t r) {
    unit_row(x + r * D, D, y + r * D);
  });
  return DONE;
}

// (dy - y (y . dy)) / |x|; below the lower limit the norm is a constant
extern "C" int hope_unit_backward(int64_t rows, int64_t D, int64_t threads, const float* x, const float* dy,
                                  float* dx) {
  if (!rows_of_width(rows, D, threads)) return BAD_ARGUMENT;
  if (rows && !all_given({x, dy, dx})) return BAD_ARGUMENT;
  for_rows(rows, D, threads, [&](int64_t r) {
    const float *xr = x + r * D, *g = dy + r * D, norm = std::sqrt(dot(xr, xr, D)), n = 1 / std::max(NORM_EPS, norm);
    const f8 along = all(norm <= NORM_EPS ? 0 : n * n * dot(xr, g, D));
    for (int64_t i = 0; i < D; i += 8) store(dx + r * D + i, fnma(along, load(xr + i), load(g + i)) * all(n));
  });
  return DONE;
}

extern "C" int hope_output_gate(int64_t tokens, int64_t H, int64_t D, int64_t threads, const float* o,
                                const float* gain, const float* gate, float* y) {
  if (!extents({tokens, H}) || !rows_of_width(tokens * H, D, threads)) return BAD_ARGUMENT;
  if (tokens * H > 0 && !all_given({o, y})) return BAD_ARGUMENT;
  for_rows(tokens * H, D, threads, [&](int64_t r) {
    const FlushDenormals flush;  // for sigma
    gate_row(o + r * D, gain ? gain + r % H * D : nullptr, gate ? gate + r * D : nullptr, D, y + r * D);
  });
  return DONE;
}

extern "C" int hope_output_gate_backward(int64_t tokens, int64_t H, int64_t D, int64_t threads,
                                         const float* o, const float* gain, const float* gate,
                                         const float* dy, float* d_o, float* dgate) {
  if (!extents({tokens, H}) || !rows_of_width(tokens * H, D, threads)) return BAD_ARGUMENT;
  if (tokens * H > 0 && (!all_given({o, dy, d_o}) || !gate != !dgate)) return BAD_ARGUMENT;
  for_rows(tokens * H, D, threads, [&](int64_t r) {
    const FlushDenormals flush;
    const float *x = o + r * D, *weight = gain ? gain + r % H * D : nullptr, factor = gain ? rms_factor(x, D) : 1;
    float* to = d_o + r * D;
    f8 sum = all(0);
    for (int64_t i = 0; i < D; i += 8) {
      f8 g = load(dy + r * D + i), normed = load(x + i) * all(factor);
      const f8 unscaled = normed;
      if (gain) normed = normed * load(weight + i);
      if (gate) {
        f8 slope, open = sigma<SILU>(load(gate + r * D + i), slope);
        store(dgate + r * D + i, g * normed * slope);
        g = g * open;
      }
      if (gain) g = g * load(weight + i);
      sum = fma(g, unscaled, sum);
      store(to + i, g);
    }
    if (!gain) return;
    const f8 along = all(total(sum) / D * factor);  // mean(g n), times n = factor x
    for (int64_t i = 0; i < D; i += 8) store(to + i, fnma(along, load(x + i), load(to + i)) * all(factor));
  });
  return DONE;
}
