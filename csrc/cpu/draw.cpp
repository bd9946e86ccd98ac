// A draw takes one pass for the largest logit, and where all tokens have a place one for their weights and one for the
// sums. Nothing is sorted but the likeliest tokens, where top_k or top_p asks for them.
#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "check.h"

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr int64_t FIRST = 64, MORE = 8;  // likeliest tokens that are looked at for a mass, then times so many

struct Token {
  double logit;
  int64_t id;
};

bool likelier(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

constexpr double INTEGERS = 6755399441055744.0;  // 1.5 2^52: a number added to it lies as an integer in the low bits

// 2^n for an integer n of [-1022, 1023], from INTEGERS + n.
inline double power(double shifted) {
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  std::memcpy(&shifted, &bits, 8);
  return shifted;
}

constexpr double LEAST = -800;  // e^LEAST is 0

// e^x for x of [LEAST, 0], within one unit in the last place. Written out, without branches, it is done four at a time,
// and has the same bits on any machine: x = n ln 2 + r, a Taylor polynomial of r, and 2^n in two halves, as n may be
// below the exponents.
inline double exponential(double x) {
  constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  const double n = (x * 1.44269504088896338700 + INTEGERS) - INTEGERS, half = (n * 0.5 + INTEGERS) - INTEGERS;
  const double r = (x - n * LN2_HIGH) - n * LN2_LOW;
  double p = 1 / 6227020800.0;
  p = p * r + 1 / 479001600.0;
  p = p * r + 1 / 39916800.0;
  p = p * r + 1 / 3628800.0;
  p = p * r + 1 / 362880.0;
  p = p * r + 1 / 40320.0;
  p = p * r + 1 / 5040.0;
  p = p * r + 1 / 720.0;
  p = p * r + 1 / 120.0;
  p = p * r + 1 / 24.0;
  p = p * r + 1 / 6.0;
  p = p * r + 1 / 2.0;
  p = 1 + (r + r * r * p);
  return p * power(half + INTEGERS) * power(n - half + INTEGERS);
}

// Number: of the logits. All arithmetic is in double.
template <class Number>
class Row {
 public:
  explicit Row(int64_t V) : V(V) {}

  int64_t draw(const Number* of, double at, int64_t top_k, double top_p, double u) {
    logits = of, temperature = at;
    if (!find_largest()) return -1;
    if (top_k == V && top_p >= 1) {
      weigh_all();
      return place(u);
    }
    top_p < 1 ? keep(top_k, top_p) : keep(top_k);
    std::sort(kept.begin(), kept.end(), [](const Token& a, const Token& b) { return a.id < b.id; });
    weigh_kept();
    return kept[place(u)].id;
  }

 private:
  const int64_t V;
  const Number* logits;
  double temperature, largest;
  std::vector<Token> kept;
  std::vector<double> weights;  // e^((logit - largest) / temperature), of all tokens or of the kept ones

  // Whether the row is a distribution.
  bool find_largest() {
    Number most = -INFINITE;
    int64_t none = 0;
#pragma omp simd reduction(max : most) reduction(| : none)
    for (int64_t i = 0; i < V; i++) {
      none |= logits[i] != logits[i];
      most = logits[i] > most ? logits[i] : most;
    }
    largest = most;
    return !none && most > -INFINITE;
  }

  void weigh_all() {
    weights.assign(logits, logits + V);
    weigh();
  }

  void weigh_kept() {
    weights.clear();
    for (const Token& token : kept) weights.push_back(token.logit);
    weigh();
  }

  // Of the logits in their place. The likeliest are at 1 even where they are infinite or the temperature's reciprocal
  // is; what is infinitely less likely is at 0 even where the temperature is infinite, and the quotient NaN.
  void weigh() {
    const double top = largest, by = temperature;
    double* w = weights.data();
    const int64_t n = weights.size();
    for (int64_t i = 0; i < n; i++) {
      const double less = w[i] - top, quotient = (w[i] == top ? 0 : less) / by;
      w[i] = quotient > LEAST ? quotient : LEAST;
    }
    for (int64_t i = 0; i < n; i++) w[i] = exponential(w[i]);  // apart: compilers make branches of constants in it
  }

  // kept: the n likeliest, in no order; fewer where the others are at -inf.
  void keep(int64_t n) {
    kept.clear();
    kept.reserve(std::min(2 * n, V));
    Number least = -INFINITE;  // n tokens before are as likely as this
    const auto cut = [&] {
      std::nth_element(kept.begin(), kept.begin() + (n - 1), kept.end(), likelier);
      kept.resize(n);
      least = kept.back().logit;
    };
    for (int64_t i = 0; i < V; i++) {
      if (!(logits[i] > least)) continue;
      kept.push_back({logits[i], i});
      if (static_cast<int64_t>(kept.size()) == 2 * n) cut();
    }
    if (static_cast<int64_t>(kept.size()) > n) cut();
  }

  // kept: of the top_k likeliest the likeliest whose mass reaches top_p.
  void keep(int64_t top_k, double top_p) {
    kept.clear();
    if (top_k == V) {
      weigh_all();
    } else {
      keep(top_k);
      weigh_kept();
    }
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (int64_t n = std::min(FIRST, top_k);; n = std::min(n * MORE, top_k)) {
      if (static_cast<int64_t>(kept.size()) != n) keep(n);
      std::sort(kept.begin(), kept.end(), likelier);
      weigh_kept();
      double mass = 0;
      for (size_t i = 0; i < kept.size(); i++) {
        const double p = weights[i] / total;
        mass += p;
        if (mass - p >= top_p) return kept.resize(i);
      }
      if (n == top_k) return;
    }
  }

  // Which weight the share u of their sum falls into.
  int64_t place(double u) {
    std::partial_sum(weights.begin(), weights.end(), weights.begin());
    const double total = weights.back();
    // below the total whatever the product rounds to: the token found always has a weight
    const double target = std::min(u * total, std::nextafter(total, 0.0));
    return std::upper_bound(weights.begin(), weights.end(), target) - weights.begin();
  }
};

}  // namespace

extern "C" int hope_draw(int64_t B, int64_t V, int64_t wide, const void* logits, double temperature, int64_t top_k,
                         double top_p, const double* u, int64_t* tokens) try {
  if (!extents({B, V}) || !V || !(temperature > 0) || top_k < 1 || top_k > V || !(top_p > 0)) return BAD_ARGUMENT;
  if (!B) return DONE;
  if (!all_given({logits, u, tokens})) return BAD_ARGUMENT;
  for (int64_t b = 0; b < B; b++)
    if (!(u[b] >= 0 && u[b] < 1)) return BAD_ARGUMENT;
  const auto draw = [&](auto row, const auto* rows) {
    for (int64_t b = 0; b < B; b++) tokens[b] = row.draw(rows + b * V, temperature, top_k, top_p, u[b]);
  };
  if (wide)
    draw(Row<double>(V), static_cast<const double*>(logits));
  else
    draw(Row<float>(V), static_cast<const float*>(logits));
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
