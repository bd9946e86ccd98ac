// Races, found by what is ordered before what (../races.h says how clocks and knowledge work), on any memory:
// of every word of 4 bytes the last write, and the reads since then, are known. A word of which a part was
// accessed has them of every 2 bytes (or every byte) apart, until it is written as a whole.
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

constexpr uint32_t kPending =
    0xffffffffu;  // stamp of what is under way: no thread knows it, not even its own

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
      : part_(single_bytes ? 1 : 2), parts_(4 / part_), count_(bytes / 4 + 1),
        cells_(static_cast<Cell*>(std::calloc(count_, sizeof(Cell)))), apart_(parts_), more_(1) {
    if (!cells_) throw std::bad_alloc();
  }

  bool read(size_t offset, size_t bytes, const Accessor& who, int32_t line, Access kind, Conflict& conflict) {
    const uint32_t warp = who.thread / 32, known_warp = who.warp->warps[warp];
    Known known(who);
    return each(offset, bytes, [&](Cell& cell, size_t at) {
      if (!known.orders(cell) && !(kind == Access::kAtomic && cell.kind == Access::kAtomic))
        return fail(conflict, at, cell);
      Reads& r = reads_of(cell, warp);
      // reads of the same warp that this one knows of are ordered before all that this one is ordered before
      const bool fresh = r.warp == warp + 1 && r.lanes && r.stamp >= known_warp;
      r.lanes = (fresh ? r.lanes : 0) | 1u << (who.thread & 31);
      r.stamp = fresh && r.stamp > who.clock ? r.stamp : who.clock;
      r.atomic = (fresh ? r.atomic : true) && kind == Access::kAtomic;
      r.warp = warp + 1;
      r.line = line;
      return true;
    });
  }

  // `stamp`: the writer's clock, or kPending. `same`: it writes what is there. Threads that write one value
  // to one place do not race: compilers let all threads that hold a number store it.
  bool write(size_t offset, size_t bytes, const Accessor& who, uint32_t stamp, int32_t line, Access kind,
             Conflict& conflict, bool same = false) {
    Known known(who);
    const auto ordered_before = [&](Cell& cell, size_t at) {
      const bool both = kind == Access::kAtomic && cell.kind == Access::kAtomic;
      const bool again = same && cell.kind == Access::kPlain && cell.write_stamp != kPending;
      if (!both && !again && !known.orders(cell)) return fail(conflict, at, cell);
      for (const Reads* r = &cell.reads; r->warp; r = &more_[r->next]) {
        if (!(r->atomic && kind == Access::kAtomic) && !ordered(*r, who)) {
          conflict = {at, reader_of(*r, who), r->line,
                      r->under_way ? "asynchronous read not waited for" : "read"};
          return false;
        }
        if (!r->next) break;
      }
      return true;
    };
    if (!each(offset, bytes, [&](Cell& cell, size_t at) {
          if (!ordered_before(cell, at)) return false;
          if (kind == Access::kAtomic && cell.kind == Access::kAtomic && cell.write_stamp != kPending) {
            cell.writer = who.thread, cell.write_stamp = stamp,
            cell.write_line = line;  // who has read it remains known
            return true;
          }
          forget_reads(cell);
          cell = {who.thread, stamp, line, kind, false, {}};
          return true;
        }))
      return false;
    if (kind != Access::kAtomic)
      for (size_t w = (offset + 3) / 4; w < (offset + bytes) / 4; ++w) join(cells_[w]);
    return true;
  }

  // What is being written there is complete: `thread` wrote it, at `stamp`.
  void complete_write(size_t offset, size_t bytes, uint32_t thread, uint32_t stamp) {
    each(offset, bytes, [&](Cell& cell, size_t) {
      cell.writer = thread, cell.write_stamp = stamp;
      return true;
    });
  }

  // An asynchronous read, issued by `who` and completed as one of `as` (a thread): nobody may write there
  // before.
  bool read_pending(size_t offset, size_t bytes, const Accessor& who, uint32_t as, int32_t line,
                    Conflict& conflict) {
    Known known(who);
    return each(offset, bytes, [&](Cell& cell, size_t at) {
      if (!known.orders(cell)) return fail(conflict, at, cell);
      Reads& r = reads_of(cell, as / 32);
      if (r.warp != as / 32 + 1) r = {as / 32 + 1, 0, 0, line, r.next, false, 0};
      ++r.under_way;
      r.atomic = false;
      r.line = line;
      return true;
    });
  }
  // `lanes` of the warp have read, at `stamp`.
  void complete_read(size_t offset, size_t bytes, uint32_t warp, uint32_t lanes, uint32_t stamp) {
    each(offset, bytes, [&](Cell& cell, size_t) {
      Reads& r = reads_of(cell, warp);
      if (r.warp != warp + 1 || !r.under_way) return true;
      --r.under_way;
      r.lanes |= lanes;
      r.stamp = r.stamp > stamp ? r.stamp : stamp;
      return true;
    });
  }

  bool written(size_t offset, size_t bytes) {
    return !each(offset, bytes, [](Cell& cell, size_t) { return !cell.write_stamp; });
  }

  // f(thread, stamp, line) of the plain writes that were the last ones there; false as soon as it is.
  template <class F> bool each_write(size_t offset, size_t bytes, F f) {
    const Cell* before = nullptr;
    return each(offset, bytes, [&](Cell& cell, size_t) {
      if (!cell.write_stamp || cell.kind != Access::kPlain) return true;
      if (before && before->writer == cell.writer && before->write_stamp == cell.write_stamp) return true;
      before = &cell;
      return f(cell.writer, cell.write_stamp, cell.write_line);
    });
  }

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
    bool apart;  // its parts have cells of their own, from apart_[writer] on
    Reads reads;
  };

  // f(cell, offset) of all that lies there, words or parts of words; false as soon as f is.
  template <class F> bool each(size_t offset, size_t bytes, F f) {
    const size_t end = offset + bytes;
    for (size_t at = offset; at < end;) {
      Cell& cell = cells_[at / 4];
      const size_t next = at / 4 * 4 + 4;
      if (!cell.apart && at % 4 == 0 && next <= end) {
        if (!f(cell, at)) return false;
        at = next;
        continue;
      }
      if (!cell.apart) part(cell);
      for (const size_t first = cell.writer; at < next && at < end; at = (at / part_ + 1) * part_)
        if (!f(apart_[first + at % 4 / part_], at)) return false;
    }
    return true;
  }

  // From now on the parts of a word are watched one by one: each was accessed as the whole.
  void part(Cell& cell) {
    uint32_t first;
    if (free_apart_) {
      first = free_apart_, free_apart_ = apart_[first].writer;
    } else {
      first = static_cast<uint32_t>(apart_.size());
      apart_.resize(first + parts_);
    }
    for (size_t k = 0; k < parts_; ++k) {
      Cell& own = apart_[first + k];
      own = {cell.writer, cell.write_stamp, cell.write_line, cell.kind, false, cell.reads};
      own.reads.next = 0;
      uint32_t last = 0;
      for (uint32_t r = cell.reads.next; r; r = more_[r].next) {
        const uint32_t copy = place_for_reads();
        more_[copy] = more_[r];
        more_[copy].next = 0;
        (last ? more_[last].next : own.reads.next) = copy;
        last = copy;
      }
    }
    forget_reads(cell);
    cell = {first, 0, 0, Access::kPlain, true, {}};
  }
  void join(Cell& cell) {
    if (!cell.apart) return;
    const uint32_t first = cell.writer;
    cell = apart_[first];  // all are alike: just written
    apart_[first].writer = free_apart_;
    free_apart_ = first;
  }

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
        const uint32_t place = place_for_reads();  // may move what r points to
        for (r = &cell.reads; r->next;) r = &more_[r->next];
        r->next = place;
        return more_[place];
      }
      r = &more_[r->next];
    }
    return *r;
  }
  uint32_t place_for_reads() {
    const uint32_t place = free_;
    if (!place) {
      more_.push_back({});
      return static_cast<uint32_t>(more_.size() - 1);
    }
    free_ = more_[place].next;
    more_[place] = {};
    return place;
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
    return cell.kind == Access::kAtomic ? "atomic"
           : cell.kind == Access::kCopy ? "asynchronous copy"
                                        : "write";
  }
  bool fail(Conflict& conflict, size_t at, const Cell& cell) const {
    conflict = {at, cell.writer, cell.write_line, name_of(cell)};
    return false;
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const size_t part_, parts_;  // bytes of a part of a word, and how many a word has
  size_t count_;
  std::unique_ptr<Cell[], Free> cells_;
  std::vector<Cell> apart_;  // of parts of words; the first ones are nobody's
  uint32_t free_apart_ = 0;
  std::vector<Reads> more_;  // of further warps; 0 is none
  uint32_t free_ = 0;        // the first of those not in use
};

}  // namespace hope::ptx
