// All heads of a call, and one chunk of one head: what is compiled for each width of vectors (width.h).
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "aligned.h"
#include "team.h"
#include "titans_scan.h"

inline void scan(const TitansCall& c, const Workspace& work, const Team& team, float* mine, int64_t b, int64_t h) {
  Scan s(c, work, team, mine);
  with_kind(c, [&](auto kind) { s.run<kind>(b, h); });
}

// A call has about 8 D N products a token, head and memory (titans.cpp).
inline int team_of(const TitansCall& c) {
#ifdef HOPE_STD_THREADS  // the thread sanitizer is to see threads in small calls
  return static_cast<int>(c.threads);
#else
  return team_for(8.0 * c.B * c.T * c.H * (c.Mf + c.Ms) * c.D * memory_rows(c), ALONE_MEMORY, c.threads);
#endif
}

inline void all_heads(const TitansCall& c) {
  const int64_t groups = c.B * c.H;
  Workspace sizes;
  const int64_t floats = sizes.carve(c, nullptr);
  const int threads = team_of(c);
  const bool together = groups < threads;  // all threads on one (row, head), or one on each
  const int works = together ? 1 : threads;
  const AlignedFloats memory(floats, works);
  std::vector<Workspace> work(works);
  for (int i = 0; i < works; i++) work[i].carve(c, memory.data + i * floats);
  // every thread's own floats are asked for here, since an exception must not leave the parallel region;
  // pages come as they are touched
  const int64_t own = Head::own_floats(c);
  const std::unique_ptr<float, void (*)(void*)> mine(
      static_cast<float*>(std::calloc(threads, own * sizeof(float))), std::free);
  if (!mine) throw std::bad_alloc();
  Barrier barrier;
  in_parallel(threads, [&](int id, int n) {
    const FlushDenormals guard;
    const Team team = together ? Team{id, n, &barrier} : Team{0, 1, nullptr};
    for (int64_t i = together ? 0 : id; i < groups; i += together ? 1 : n) {
      scan(c, work[together ? 0 : id], team, mine.get() + id * own, i / c.H, i % c.H);
    }
  });
}

// Commits what is due with the open chunk of `end` tokens of head h of row b. scratch: what Workspace::carve asks
// for; own: Head::own_floats.
inline void commit_open(const TitansCall& c, int64_t b, int64_t h, int64_t end, float* scratch, float* own) {
  const FlushDenormals flush;
  Workspace work;
  work.carve(c, scratch);
  const Team alone{0, 1, nullptr};
  Scan scan(c, work, alone, own);
  with_kind(c, [&](auto kind) { scan.commit_open<kind>(b, h, end); });
}
