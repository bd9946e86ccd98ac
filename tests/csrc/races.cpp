// Calls hope_titans_scan, hope_token_step and hope_newton_schulz with one and with several threads over shapes that
// share the work differently; the thread sanitizer watches. Exit code 1 where a number of threads changes a bit.
#include <cstdio>
#include <cstring>

#include "calls.h"
#include "cms_whole.h"

int main() {
  int changed = 0, index = 0;
  for (const Case& s : CASES) {
    const Results alone = called(s, 1);
    for (int64_t threads : {2, 3, 5})
      if (!(called(s, threads) == alone))
        changed++, std::printf("case %d: other bits with %d threads\n", index, int(threads));
    index++;
  }
  for (const auto step : {stepped, attended}) {
    const Floats alone = step(1);
    for (int64_t threads : {2, 3})
      if (std::memcmp(alone.data(), step(threads).data(), 4 * alone.size()))
        changed++, std::printf("a step: other bits with %d threads\n", int(threads));
  }
  Draw draw;
  const Floats g = draw(70 * 200, 1);
  Floats one = g;
  changed += hope_newton_schulz(1, 70, 200, 1, g.data(), one.data());
  for (int64_t threads : {2, 3}) {
    Floats found = g;
    changed += hope_newton_schulz(1, 70, 200, threads, found.data(), found.data());
    if (std::memcmp(one.data(), found.data(), 4 * one.size()))
      changed++, std::printf("newton_schulz: other bits with %d threads\n", int(threads));
  }
  return changed != 0;
}
