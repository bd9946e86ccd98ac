// P takes X up as P - Z^T Z, Z = L^-1 X P, with the Cholesky factor L of ridge I + X P X^T, at most `c` rows of X at a
// time. Its products are those of projections, so a number is one chain of operations whatever the width and the
// threads; and as a product of two numbers is the same either way round, P stays symmetric.

#include "precondition.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "aligned.h"
#include "check.h"
#include "linear.h"
#include "team.h"
#include "vec.h"

namespace {

constexpr int64_t ROWS = 64;  // of G that are multiplied at a time

int64_t rounded(int64_t n) { return (n + 7) / 8 * 8; }

class TakingUp {
 public:
  TakingUp(int64_t most, int64_t c, int64_t threads)
      : c(c), threads(threads), memory(rounded(most) * (4 * c + rounded(most)) + c * c) {
    float* at = memory.data;
    const int64_t m = rounded(most);
    x = at, xp = x + m * c, z = xp + m * c, minus = z + m * c, system = minus + m * c, next = system + m * m;
  }

  void part(int64_t n, float ridge, const float* X, float* P) {
    m = rounded(n);
    std::memcpy(x, X, n * c * sizeof(float));
    std::fill(x + n * c, x + m * c, 0.0f);
    must(hope_linear(m, c, c, threads, x, P, nullptr, xp));
    must(hope_linear(m, c, m, threads, x, xp, nullptr, system));
    for (int64_t i = 0; i < m; i++) system[i * m + i] += ridge;
    factorise();
    solve();
    must(hope_linear(c, m, c, threads, minus, z, P, next));
    std::memcpy(P, next, c * c * sizeof(float));
  }

 private:
  const int64_t c, threads;
  const AlignedFloats memory;
  int64_t m = 0;
  // of a part: X and X P [m, c], Z^T and -Z^T [c, m], the system and then L^T in its upper half [m, m], and P [c, c]
  float *x, *xp, *z, *minus, *system, *next;

  void factorise() const {
    const FlushDenormals flush;
    for (int64_t k = 0; k < m; k++) {
      float* row = system + k * m;
      row[k] = std::sqrt(row[k]);
      for (int64_t j = k + 1; j < m; j++) row[j] /= row[k];
      for (int64_t i = k + 1; i < m; i++)
        for (int64_t j = i / 8 * 8; j < m; j += 8)
          store(system + i * m + j, fnma(all(row[i]), load(row + j), load(system + i * m + j)));
      std::fill(row + k / 8 * 8, row + k, 0.0f);  // before the diagonal, in its vector
    }
  }

  // z = L^-1 X P, of each column of X P by itself
  void solve() const {
    const int team = team_for(0.5 * c * m * m, ALONE_PRODUCTS, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t r = 0; r < c; r += 8) {
      const FlushDenormals flush;
      for (int64_t t = 0; t < m; t += 8) transpose8(xp + t * c + r, c, z + r * m + t, m);
      for (int64_t i = r; i < r + 8; i++) {
        float* to = z + i * m;
        for (int64_t k = 0; k < m; k++) {
          const float* row = system + k * m;
          const float found = to[k] / row[k];
          for (int64_t t = (k + 1) / 8 * 8; t < m; t += 8) store(to + t, fnma(all(found), load(row + t), load(to + t)));
          to[k] = found;  // which the vector that it lies in has changed
        }
        for (int64_t k = 0; k < m; k += 8) store(minus + i * m + k, all(0) - load(to + k));
      }
    }
  }
};

}  // namespace

extern "C" int hope_take_up(int64_t n, int64_t c, int64_t threads, float ridge, const float* X, float* P) {
  if (!extents({n + 8, c, 4}) || !extents({c, c}) || n < 0 || !width(c) || !threads_fit(threads) || !(ridge > 0))
    return BAD_ARGUMENT;
  if (n == 0) return DONE;
  if (!all_given({X, P})) return BAD_ARGUMENT;
  return outcome_of([=] {
    TakingUp found(std::min(n, c), c, threads);
    for (int64_t i = 0; i < n; i += c) found.part(std::min(c, n - i), ridge, X + i * c, P);
  });
}

extern "C" int hope_precondition(int64_t r, int64_t c, int64_t threads, const float* P, float* G) {
  if (!extents({r, c}) || !extents({c, c}) || !width(c) || !threads_fit(threads)) return BAD_ARGUMENT;
  if (r == 0) return DONE;
  if (!all_given({P, G})) return BAD_ARGUMENT;
  return outcome_of([=] {
    const AlignedFloats made(ROWS * c);
    for (int64_t i = 0; i < r; i += ROWS) {
      const int64_t rows = std::min(ROWS, r - i);
      must(hope_linear(rows, c, c, threads, G + i * c, P, nullptr, made.data));
      std::memcpy(G + i * c, made.data, rows * c * sizeof(float));
    }
  });
}
