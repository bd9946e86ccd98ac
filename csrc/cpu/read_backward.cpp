// The gradient of M_memory's reads by their queries, with the fast weights constants:
//
//     o = q + w1 sigma(w2 q)        dq = do + w2^T (sigma'(w2 q) * (w1^T do))
//
// or, where memories are linear, o = w2 q and dq = w2^T do; at the weights that hope_titans_scan kept for each chunk.
// One task a (row, head, chunk); z = w2 q is computed again, which is a third of the 6 D N FLOPs a token and saves
// keeping N numbers for it. A value is one chain of operations, as in product.h, and depends on nothing but its own
// token.

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "call.h"
#include "check.h"
#include "panel.h"

namespace {

struct Task {
  const float *w2, *w1, *q, *grad;  // the head's weights of this chunk; token rows
  float *dq, *work;                 // token rows; panels [D], [D], [N]
  int64_t tokens, step, D, N;       // step: floats between token rows
};

void linear_backward(const Task& t) {
  float *grad = t.work, *dq = grad + t.D * PANEL;
  for (int64_t first = 0; first < t.tokens; first += PANEL) {
    const int64_t n = std::min<int64_t>(PANEL, t.tokens - first);
    load_lanes(grad, t.grad + first * t.step, t.step, t.D, 0, n);
    panel_product(0, t.D, t.D, t.w2, 1, t.D, grad, n <= 8, [&](int64_t i, auto& acc) { store_rows(dq, i, acc); });
    store_lanes(dq, t.dq + first * t.step, t.step, t.D, 0, n);
  }
}

template <int ACT>
void backward(const Task& t) {
  const int64_t D = t.D, N = t.N;
  float *q = t.work, *grad = q + D * PANEL, *z = grad + D * PANEL;
  for (int64_t first = 0; first < t.tokens; first += PANEL) {
    const int64_t n = std::min<int64_t>(PANEL, t.tokens - first);
    const bool half = n <= 8;
    load_lanes(q, t.q + first * t.step, t.step, D, 0, n);
    load_lanes(grad, t.grad + first * t.step, t.step, D, 0, n);
    panel_product(0, N, D, t.w2, D, 1, q, half, [&](int64_t i, auto& acc) { store_rows(z, i, acc); });
    for (int64_t i = 0; i < N * PANEL; i += half ? PANEL : 8) {
      f8 slope;
      sigma<ACT>(load(z + i), slope);
      store(z + i, slope);
    }
    panel_product(0, N, D, t.w1, 1, N, grad, half, [&](int64_t i, auto& acc) {
      multiply_rows(acc, z, i);
      store_rows(z, i, acc);
    });
    panel_product(0, D, N, t.w2, 1, D, z, half, [&](int64_t i, auto& acc) {
      add_rows(acc, grad, i);
      store_rows(q, i, acc);
    });
    store_lanes(q, t.dq + first * t.step, t.step, D, 0, n);
  }
}

void run(const TitansReadBackward& c, int64_t task, float* work) {
  const int64_t chunk = task % c.kept, h = task / c.kept % c.H, b = task / c.kept / c.H, phase = c.pos[b] % c.chunk;
  const int64_t begin = std::max<int64_t>(chunk * c.chunk - phase, 0);
  const int64_t end = std::min((chunk + 1) * c.chunk - phase, c.len[b]);
  // tasks are in the order of the weights
  const int64_t token = ((b * c.T + begin) * c.H + h) * c.D, weights = task * (c.N ? c.N : c.D) * c.D;
  const Task t{c.kept2 + weights, c.kept1 + weights, c.q + token, c.grad + token,
               c.dq + token, work, end - begin, c.H * c.D, c.D, c.N};
  if (!c.N) return linear_backward(t);
  switch (c.activation) {
    case GELU: return backward<GELU>(t);
    case SILU: return backward<SILU>(t);
    default: return backward<GELU_TANH>(t);
  }
}

bool fits(const TitansReadBackward& c) {
  const bool sizes = width(c.D) && (c.N == 0 || width(c.N)) && c.H > 0 && c.chunk > 0 && extent(c.chunk) &&
                     extents({c.B, c.T, c.H, c.D}) && extents({c.B, c.H, c.kept, std::max(c.N, c.D), c.D}) &&
                     threads_fit(c.threads) && c.activation >= GELU_TANH && c.activation <= SILU;
  if (!sizes || c.B * c.T == 0) return sizes;
  return all_given({c.q, c.grad, c.pos, c.len, c.dq}) && (c.kept == 0 || (c.kept2 && !c.kept1 == !c.N)) &&
         rows_fit(c.B, c.T, c.pos, c.len) && kept_fit(c.B, c.kept, c.chunk, c.pos, c.len);
}

}  // namespace

extern "C" int hope_titans_read_backward(const TitansReadBackward* call) {
  if (!call || !fits(*call)) return BAD_ARGUMENT;
  const TitansReadBackward& c = *call;
  if (c.T == 0) return DONE;
  const int64_t tasks = c.B * c.H * c.kept, floats = (2 * c.D + c.N) * PANEL;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, tasks)));
  try {
    std::vector<float> work(floats * threads);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
      float* mine = work.data() + omp_get_thread_num() * floats;
#else
      float* mine = work.data();
#endif
      const FlushDenormals guard;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tasks; i++) run(c, i, mine);
    }
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
