// Threads that work on one (row, head) together: who owns which rows, and where they wait for each other.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vec.h"

// A sense-reversing barrier. It spins, because stages last microseconds, and yields when a neighbour has lost
// its core.
class Barrier {
 public:
  void wait(int threads) {
    const int now = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == now; spins++) {
      if (spins < 4096) pause();
      else std::this_thread::yield();
    }
  }

 private:
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Range {
  int64_t begin, end;
  Range within(int64_t a, int64_t b) const {  // the part of this range inside [a, b)
    int64_t lo = begin > a ? begin : a, hi = end < b ? end : b;
    return {lo, hi > lo ? hi : lo};
  }
};

struct Team {
  int id, size;
  Barrier* barrier;
  void sync() const {
    if (size > 1) barrier->wait(size);
  }
  // This thread's share of [a, b), cut at multiples of `unit` from a.
  Range share(int64_t a, int64_t b, int64_t unit) const {
    int64_t units = (b - a + unit - 1) / unit;
    auto cut = [&](int64_t i) { return a + units * i / size * unit; };
    int64_t lo = cut(id), hi = id + 1 == size ? b : cut(id + 1);
    return {lo < b ? lo : b, hi < b ? hi : b};
  }
};

// Work that one thread is done with before others are worth waking: numbers that are passed over, and products of the
// memories, of an orthogonal step (m m n), of projections, attention and decoder steps, and of segments.
constexpr double ALONE_NUMBERS = 1 << 15, ALONE_MEMORY = 1 << 18, ALONE_ORTHOGONAL = 1 << 18, ALONE_PRODUCTS = 1 << 21,
                 ALONE_SEGMENT = 1 << 22;

inline int team_for(double work, double alone, int64_t threads) {
  return work < alone ? 1 : static_cast<int>(threads);
}

// f(id, n) on `threads` threads, or on as many as there are: n.
template <class F>
void in_parallel(int threads, F f) {
#ifdef HOPE_STD_THREADS  // the thread sanitizer does not see OpenMP's
  std::vector<std::thread> others;
  for (int id = 1; id < threads; id++) others.emplace_back(f, id, threads);
  f(0, threads);
  for (std::thread& t : others) t.join();
#else
#pragma omp parallel num_threads(threads)
#ifdef _OPENMP
  f(omp_get_thread_num(), omp_get_num_threads());
#else
  f(0, 1);
#endif
#endif
}
