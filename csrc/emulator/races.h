// Races on shared memory, found by what is ordered before what, not by what happened to come first.
//
// CLOCKS. Every thread has a clock, every access is stamped with it. sync_warp and every barrier put the
// clocks of a warp's lanes to one common, larger value, and only there do lanes learn of each other (shuffles
// and mma order no memory accesses). So what a thread knows of the others is one number per warp of its
// cluster: all accesses stamped below it are ordered before its own. Releases through global memory are a
// single thread's and come on top: few, a list. A release advances the thread's clock: what follows is not
// released.
//
// SHADOW. For every 2 bytes of shared memory: the last write's thread and stamp, and per warp of the block
// the last reads' stamp and lanes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace hope::emulator {

struct Place {  // in a kernel's source
  const char* file;
  int line;
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Knowledge {
  std::vector<uint32_t> warps;                          // per warp of the cluster: accesses stamped below are known
  std::vector<std::pair<uint32_t, uint32_t>> released;  // (thread of the cluster, stamp): likewise, of one thread

  bool of(uint32_t thread, uint32_t stamp) const {
    if (warps[thread / 32] > stamp) return true;
    for (const auto& [t, s] : released)
      if (t == thread && s > stamp) return true;
    return false;
  }
  void join(const Knowledge& other) {
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = std::max(warps[i], other.warps[i]);
    released.insert(released.end(), other.released.begin(), other.released.end());
    forget();
  }
  void clear() {
    std::fill(warps.begin(), warps.end(), 0u);
    released.clear();
  }

 private:
  void forget() {  // what is known anyhow, and all but the latest of a thread
    if (released.empty()) return;
    std::sort(released.begin(), released.end(), std::greater<>());
    size_t kept = 0;
    for (const auto& r : released)
      if (warps[r.first / 32] < r.second && (!kept || released[kept - 1].first != r.first)) released[kept++] = r;
    released.resize(kept);
  }
};

// Who accesses: a thread of the cluster, its clock and what it knows (its warp's, and what it alone has
// acquired since).
struct Accessor {
  uint32_t thread, clock;
  const Knowledge *warp, *own;

  bool knows(uint32_t other, uint32_t stamp) const {
    return other == thread || warp->warps[other / 32] > stamp || (!warp->released.empty() && warp->of(other, stamp)) ||
           (own && own->of(other, stamp));
  }
};

struct Conflict {
  size_t offset;  // bytes from the start of shared memory
  uint32_t thread;
  const char* kind;
  Place place;  // of the earlier access; no file if it was a read
};

constexpr uint32_t kPending = 0xffffffffu;  // stamp of a copy under way: no thread knows it, not even its own

class Shadow {
 public:
  // `warps`: of the block that owns the memory.
  Shadow(size_t bytes, int warps, uint32_t first_warp)
      : first_warp_(first_warp), halves_((bytes + 1) / 2), heads_(halves_), reads_(halves_ * warps) {}

  // Each returns false and fills in `conflict` at the first pair that is not ordered.
  bool read(size_t offset, size_t bytes, const Accessor& who, Conflict& conflict) {
    const uint32_t warp = who.thread / 32 - first_warp_;
    Reads* reads = &reads_[warp * halves_];
    uint32_t known_thread = who.thread, known_stamp = 0;
    for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
      Head& h = heads_[i];
      if (h.stamp && (h.thread != known_thread || h.stamp != known_stamp)) {
        if (h.stamp == kPending || !who.knows(h.thread, h.stamp)) return fail(conflict, i, h);
        known_thread = h.thread, known_stamp = h.stamp;
      }
      h.readers |= 1u << warp;
      Reads& r = reads[i];
      // Reads of the same warp that this one knows of are ordered before all that this one is ordered before.
      r.lanes = r.stamp >= who.warp->warps[who.thread / 32] ? r.lanes | 1u << (who.thread & 31)
                                                            : 1u << (who.thread & 31);
      r.stamp = std::max(r.stamp, who.clock);
    }
    return true;
  }

  // `stamp`: the writer's clock, or kPending.
  bool write(size_t offset, size_t bytes, const Accessor& who, uint32_t stamp, Place place, Conflict& conflict) {
    uint32_t known_thread = who.thread, known_stamp = 0;
    for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
      Head& h = heads_[i];
      if (h.stamp && (h.thread != known_thread || h.stamp != known_stamp)) {
        if (h.stamp == kPending || !who.knows(h.thread, h.stamp)) return fail(conflict, i, h);
        known_thread = h.thread, known_stamp = h.stamp;
      }
      for (uint32_t left = h.readers; left; left &= left - 1) {
        const uint32_t warp = __builtin_ctz(left);
        const Reads& r = reads_[warp * halves_ + i];
        if (who.warp->warps[first_warp_ + warp] > r.stamp) continue;
        for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
          const uint32_t reader = 32 * (first_warp_ + warp) + __builtin_ctz(lanes);
          if (!who.knows(reader, r.stamp)) {
            conflict = {2 * i, reader, "read", {nullptr, 0}};
            return false;
          }
        }
      }
      h = {who.thread, stamp, 0, place.line, place.file, stamp == kPending};
    }
    return true;
  }

  // The copy of this thread to these 4 bytes has been waited for.
  void complete(size_t offset, uint32_t clock) {
    for (size_t i = offset / 2; i < offset / 2 + 2; ++i) heads_[i].stamp = clock;
  }

 private:
  struct Head {
    uint32_t thread, stamp, readers;
    int line;
    const char* file;
    bool copy;
  };
  struct Reads {
    uint32_t stamp, lanes;
  };
  static bool fail(Conflict& conflict, size_t i, const Head& h) {
    const char* kind = h.copy ? "asynchronous copy" : "write";
    if (h.stamp == kPending) kind = "asynchronous copy not waited for";
    conflict = {2 * i, h.thread, kind, {h.file, h.line}};
    return false;
  }

  uint32_t first_warp_;
  size_t halves_;
  std::vector<Head> heads_;
  std::vector<Reads> reads_;
};

}  // namespace hope::emulator
