// What happens to the heads of queries and keys between projection and attention, on token rows. The bias and the
// rotation are PyTorch's where layers are called one by one, and flush no denormals.
#pragma once
#include <cstdint>

#include "linear.h"
#include "team.h"
#include "vec.h"

// x [rows, n] += bias; null: there is none
inline void add_bias(int64_t rows, int64_t n, const float* bias, float* x) {
  for (int64_t i = 0; bias && i < rows; i++)
    for (int64_t j = 0; j < n; j++) x[i * n + j] += bias[j];
}

// RoPE of B rows of n tokens of H heads of D: pairs (i, i + D / 2) of a head are turned by angle i of the token, or
// back. Angles of a row of the batch lie `apart` numbers behind those of the one before; tokens past len[row] have none,
// and stay as they are.
struct Rotation {
  int64_t B, n, H, D, threads, apart;
  const int64_t* len;

  // from and to may be the same
  void operator()(const float* from, const float* cos, const float* sin, bool back, float* to) const {
    const int64_t half = D / 2, heads = B * n * H;
    const float way = back ? -1 : 1;
    const int team = team_for(1.0 * heads * D, ALONE_NUMBERS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < heads; i++) {
      const int64_t token = i / H, row = token / n, at = row * apart + token % n * half;
      if (token % n >= len[row]) continue;
      const float *p = from + i * D, *u = cos + at, *w = sin + at;
      float* y = to + i * D;
      int64_t j = 0;
      for (; j + 8 <= half; j += 8)
        turn(load(p + j), load(p + half + j), load(u + j), load(w + j) * all(way), y + j, half);
      for (; j < half; j++) {
        const float one = p[j], other = p[half + j], by = w[j] * way;
        y[j] = one * u[j] - other * by, y[half + j] = other * u[j] + one * by;
      }
    }
  }

 private:
  static void turn(f8 one, f8 other, f8 u, f8 w, float* y, int64_t half) {
    store(y, one * u - other * w), store(y + half, other * u + one * w);
  }
};
