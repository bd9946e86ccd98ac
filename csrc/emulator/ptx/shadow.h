// Races, found by what is ordered before what (../races.h says how clocks and knowledge work), on any memory:
// of every 2 bytes (or every byte) the last write, and the reads since then, are known.
//
// Atomic operations do not race with each other. Asynchronous copies and products are under way until they
// are waited for: nobody may touch what they write, nor write what they read.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../races.h"

namespace hope::ptx {

using emulator::Accessor;
using emulator::Knowledge;

constexpr uint32_t kPending = 0xffffffffu;  // stamp of what is under way: no thread knows it, not even its own

enum class Access : uint8_t { kPlain, kAtomic, kCopy };

struct Conflict {
  size_t offset;
  uint32_t thread;
  int32_t line;
  const char* what;
};

class Shadow {
 public:
  explicit Shadow(size_t bytes, bool single_bytes)
      : shift_(single_bytes ? 0 : 1), count_((bytes >> shift_) + 1),
        cells_(static_cast<Cell*>(std::calloc(count_, sizeof(Cell)))), more_(1) {
    if (!cells_) throw std::bad_alloc();
  }

  bool read(size_t offset, size_t bytes, const Accessor& who, int32_t line, Access kind, Conflict& conflict) {
    const uint32_t warp = who.thread / 32;
    Known known(who);
    for (size_t c = offset >> shift_, end = (offset + bytes - 1) >> shift_; c <= end; ++c) {
      Cell& cell = cells_[c];
      if (!known.orders(cell) && !(kind == Access::kAtomic && cell.kind == Access::kAtomic))
        return fail(conflict, c, cell);
      Reads& r = reads_of(cell, warp);
      // reads of the same warp that this one knows of are ordered before all that this one is ordered before
      const bool fresh = r.warp == warp + 1 && r.lanes && r.stamp >= who.warp->warps[warp];
      r.lanes = (fresh ? r.lanes : 0) | 1u << (who.thread & 31);
      r.stamp = fresh && r.stamp > who.clock ? r.stamp : who.clock;
      r.atomic = (fresh ? r.atomic : true) && kind == Access::kAtomic;
      r.warp = warp + 1;
      r.line = line;
    }
    return true;
  }

  // `stamp`: the writer's clock, or kPending. `same`: it writes what is there. Threads that write one value to one
  // place do not race: compilers let all threads that hold a number store it.
  bool write(size_t offset, size_t bytes, const Accessor& who, uint32_t stamp, int32_t line, Access kind,
             Conflict& conflict, bool same = false) {
    Known known(who);
    for (size_t c = offset >> shift_, end = (offset + bytes - 1) >> shift_; c <= end; ++c) {
      Cell& cell = cells_[c];
      const bool both = kind == Access::kAtomic && cell.kind == Access::kAtomic;
      const bool again = same && cell.kind == Access::kPlain && cell.write_stamp != kPending;
      if (!both && !again && !known.orders(cell)) return fail(conflict, c, cell);
      for (const Reads* r = &cell.reads; r->warp; r = &more_[r->next]) {
        if (!(r->atomic && kind == Access::kAtomic) && !ordered(*r, who)) {
          conflict = {c << shift_, reader_of(*r, who), r->line, r->under_way ? "asynchronous read not waited for" : "read"};
          return false;
        }
        if (!r->next) break;
      }
      if (both && cell.write_stamp != kPending) {
        cell.writer = who.thread, cell.write_stamp = stamp, cell.write_line = line;
        continue;
      }
      forget_reads(cell);
      cell = {who.thread, stamp, line, kind, {}};
    }
    return true;
  }

  // What is being written there is complete: `thread` wrote it, at `stamp`.
  void complete_write(size_t offset, size_t bytes, uint32_t thread, uint32_t stamp) {
    for (size_t c = offset >> shift_, end = (offset + bytes - 1) >> shift_; c <= end; ++c)
      cells_[c].writer = thread, cells_[c].write_stamp = stamp;
  }

  // An asynchronous read, issued by `who` and completed as one of `as` (a thread): nobody may write there before.
  bool read_pending(size_t offset, size_t bytes, const Accessor& who, uint32_t as, int32_t line, Conflict& conflict) {
    Known known(who);
    for (size_t c = offset >> shift_, end = (offset + bytes - 1) >> shift_; c <= end; ++c) {
      Cell& cell = cells_[c];
      if (!known.orders(cell)) return fail(conflict, c, cell);
      Reads& r = reads_of(cell, as / 32);
      if (r.warp != as / 32 + 1) r = {as / 32 + 1, 0, 0, line, r.next, false, 0};
      ++r.under_way;
      r.atomic = false;
      r.line = line;
    }
    return true;
  }
  // `lanes` of the warp have read, at `stamp`.
  void complete_read(size_t offset, size_t bytes, uint32_t warp, uint32_t lanes, uint32_t stamp) {
    for (size_t c = offset >> shift_, end = (offset + bytes - 1) >> shift_; c <= end; ++c) {
      Reads& r = reads_of(cells_[c], warp);
      if (r.warp != warp + 1 || !r.under_way) continue;
      --r.under_way;
      r.lanes |= lanes;
      r.stamp = r.stamp > stamp ? r.stamp : stamp;
    }
  }

  // The last plain write of the memory there: false if there was none.
  bool last_write(size_t offset, uint32_t& thread, uint32_t& stamp, int32_t& line) const {
    const Cell& cell = cells_[offset >> shift_];
    thread = cell.writer, stamp = cell.write_stamp, line = cell.write_line;
    return cell.write_stamp && cell.kind == Access::kPlain;
  }
  size_t step() const { return size_t{1} << shift_; }

 private:
  struct Reads {
    uint32_t warp, stamp, lanes;  // warp + 1; 0: none
    int32_t line;
    uint32_t next;
    bool atomic;
    uint16_t under_way;  // asynchronous reads not complete
  };
  struct Cell {
    uint32_t writer, write_stamp;
    int32_t write_line;
    Access kind;
    Reads reads;
  };

  // Whether writes are ordered before what a thread does; neighbours have mostly one writer.
  struct Known {
    explicit Known(const Accessor& who) : who(who), thread(who.thread), stamp(0) {}
    bool orders(const Cell& cell) {
      if (!cell.write_stamp || (cell.writer == thread && cell.write_stamp == stamp)) return true;
      if (cell.write_stamp == kPending || !who.knows(cell.writer, cell.write_stamp)) return false;
      thread = cell.writer, stamp = cell.write_stamp;
      return true;
    }
    const Accessor& who;
    uint32_t thread, stamp;
  };

  static uint32_t reader_of(const Reads& r, const Accessor& who) {  // one of them that `who` does not know of
    uint32_t lanes = r.lanes;
    for (; lanes & (lanes - 1); lanes &= lanes - 1)
      if (!who.knows(32 * (r.warp - 1) + __builtin_ctz(lanes), r.stamp)) break;
    return 32 * (r.warp - 1) + (lanes ? __builtin_ctz(lanes) : 0);
  }
  static bool ordered(const Reads& r, const Accessor& who) {
    if (r.under_way) return false;
    if (who.warp->warps[r.warp - 1] > r.stamp) return true;
    for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1)
      if (!who.knows(32 * (r.warp - 1) + __builtin_ctz(lanes), r.stamp)) return false;
    return true;
  }

  Reads& reads_of(Cell& cell, uint32_t warp) {
    Reads* r = &cell.reads;
    while (r->warp && r->warp != warp + 1) {
      if (!r->next) {
        uint32_t place;
        if (free_) {
          place = free_, free_ = more_[place].next;
          more_[place] = {};
        } else {
          place = static_cast<uint32_t>(more_.size());
          more_.push_back({});  // may move what r points to
          r = &cell.reads;
          while (r->next) r = &more_[r->next];
        }
        r->next = place;
        return more_[place];
      }
      r = &more_[r->next];
    }
    return *r;
  }
  void forget_reads(const Cell& cell) {
    if (!cell.reads.next) return;
    uint32_t last = cell.reads.next;
    while (more_[last].next) last = more_[last].next;
    more_[last].next = free_;
    free_ = cell.reads.next;
  }

  static const char* name_of(const Cell& cell) {
    if (cell.write_stamp == kPending) return "asynchronous copy not waited for";
    return cell.kind == Access::kAtomic ? "atomic" : cell.kind == Access::kCopy ? "asynchronous copy" : "write";
  }
  bool fail(Conflict& conflict, size_t c, const Cell& cell) const {
    conflict = {c << shift_, cell.writer, cell.write_line, name_of(cell)};
    return false;
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int shift_;
  size_t count_;
  std::unique_ptr<Cell[], Free> cells_;
  std::vector<Reads> more_;  // of further warps; 0 is none
  uint32_t free_ = 0;        // the first of those not in use
};

}  // namespace hope::ptx
