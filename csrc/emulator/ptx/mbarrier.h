// Objects in shared memory that count arrivals and bytes of asynchronous copies: mbarrier, and the copies that tell
// one when they are done.
//
// An arrival releases what its thread knows, a wait that finds its phase over acquires what all of the phase
// released. A copy's accesses count as those of a thread of the object's own: whoever has seen the phase end in which
// the copy was completed knows of them, and nobody else, not even the thread that issued it.
#pragma once
#include "exchange.h"

namespace hope::ptx {

struct Object {
  Block* block;
  size_t at;
  MBarrier* barrier;
};

constexpr uint64_t kMark = 0x6d62617272696572ull;  // what the bytes of such an object are

inline Object object_at(Warp& w, int lane, Space space, uint64_t address, bool exists = true) {
  const Place p = find_place(w, lane, space == kGlobal ? kGeneric : space, address, 8, 8);
  Grid& g = *w.grid;
  if (!p.block) g.fail("an mbarrier outside of shared memory", lane);
  check_write(w, lane, p, 8, exists ? Access::kAtomic : Access::kPlain);
  if (!exists) return {p.block, p.offset, nullptr};
  const auto found = p.block->mbarriers.find(p.offset);
  if (found == p.block->mbarriers.end() || std::memcmp(p.host, &kMark, 8))
    g.fail("byte " + std::to_string(p.offset) + " of shared memory is no mbarrier", lane);
  return {p.block, p.offset, &found->second};
}

inline void end_phase_if_due(Grid& g, MBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  if (g.options.races) {
    b.joined.released.push_back({b.thread, b.stamp + 1});
    b.released = std::exchange(b.joined, {});
    b.joined.warps.resize(g.known_warps());
  }
  b.stamp = g.async_stamp();
  g.progress();
}

inline void arrive_at(Grid& g, const Object& o, uint32_t count) {
  if (count > o.barrier->pending) g.fail("more arrivals at an mbarrier than its phase has left");
  o.barrier->pending -= count;
  g.progress();
  end_phase_if_due(g, *o.barrier);
}

// A copy's completion, or an arrival that waited for its lane's copies.
inline void Grid::arrive_late(Transfer& t) {
  const auto before = std::pair{now, at};
  now = t.warp, at = t.at;
  const auto found = t.block->mbarriers.find(t.barrier);
  if (found == t.block->mbarriers.end()) fail("the mbarrier of a copy is gone before the copy is complete", t.lane);
  MBarrier& b = found->second;
  if (t.bytes) {
    std::memcpy(t.block->shared.get() + t.to, reinterpret_cast<const void*>(t.from), t.bytes);
    if (options.races) {
      t.block->shadow->complete_write(t.to, t.bytes, b.thread, b.stamp);
      t.region->shadow->complete_read(t.from - t.region->address, t.bytes, b.thread / 32, 1u << b.thread % 32, b.stamp);
    }
    b.bytes -= static_cast<int64_t>(t.bytes);
    progress();
    end_phase_if_due(*this, b);
  } else {
    std::erase_if(t.warp->copies, [&](AsyncCopy& c) {
      if (c.lane != t.lane) return false;
      copy_now(*t.warp, c);
      finish(*t.warp, c, b.thread, b.stamp);
      return true;
    });
    arrive_at(*this, {t.block, t.barrier, &b}, 1);
  }
  now = before.first, at = before.second;
}

inline void Grid::advance(bool all) {
  // those of one lane in their order
  for (size_t k = 0; k < transfers.size();) {
    if (!all && draw() % 4) {
      ++k;
      continue;
    }
    Transfer t = transfers[k];
    transfers.erase(transfers.begin() + k);
    arrive_late(t);
  }
}

// operands of all: space, wide, base, offset, then their own
struct MBarrierForm {
  Space space;
  uint64_t addresses[32];
  const int32_t* rest;
};
inline MBarrierForm mbarrier_form(Warp& w, const Instruction& i) {
  MBarrierForm f{static_cast<Space>(i.operands[0]), {}, i.operands + 4};
  addresses_of(w, i.operands[2], i.operands[1], i.operands[3], f.addresses);
  return f;
}

template <class F> constexpr Run each_object(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    const MBarrierForm f = mbarrier_form(w, i);
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      F{}(w, i, lane, object_at(w, lane, f.space, f.addresses[lane]), f.rest);
    }
    return Next::kFollowing;
  };
}

inline uint32_t of_lane(Warp& w, int32_t operand, int lane, uint32_t otherwise) {
  return operand < 0 ? otherwise : lanes_of<uint32_t>(w, operand)[lane];
}

inline void expect_bytes(Grid& g, const Object& o, int64_t bytes) {
  o.barrier->bytes += bytes;
  if (o.barrier->bytes > (1 << 20) - 1) g.fail("an mbarrier expects more than 2^20 - 1 bytes");
}

// own operands: whether it releases, scope, d (or -1), count (or -1), expected bytes (or -1)
inline void arrive(Warp& w, const Instruction&, int lane, const Object& o, const int32_t* rest) {
  Grid& g = *w.grid;
  if (g.options.races && rest[0] && (rest[1] != kOfBlock || o.block == w.block)) {
    g.join(o.barrier->joined, g.known_by(w, lane));
    ++w.clock;
  }
  if (rest[2] >= 0) lanes_of<uint64_t>(w, rest[2])[lane] = o.barrier->phase;
  if (rest[4] >= 0) expect_bytes(g, o, of_lane(w, rest[4], lane, 0));
  arrive_at(g, o, of_lane(w, rest[3], lane, 1));
}

// own operands: whether it acquires, scope, p, whether by parity, phase (a register of 4 bytes, or the 8 of a state)
inline Next wait(Warp& w, const Instruction& i, uint32_t mask) {
  const MBarrierForm f = mbarrier_form(w, i);
  uint32_t over = 0;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const Object o = object_at(w, lane, f.space, f.addresses[lane]);
    if (o.block != w.block) w.grid->fail("waits at an mbarrier of another block", lane);
    bool done;
    if (f.rest[3]) {
      const uint32_t parity = lanes_of<uint32_t>(w, f.rest[4])[lane];
      if (parity > 1) w.grid->fail("a parity other than 0 and 1", lane);
      done = (o.barrier->phase & 1) != parity;
    } else {
      const uint64_t state = lanes_of<uint64_t>(w, f.rest[4])[lane];
      if (state + 1 != o.barrier->phase && state != o.barrier->phase)
        w.grid->fail("the state of a phase that is neither this one nor the last", lane);
      done = state != o.barrier->phase;
    }
    if (done && f.rest[0]) w.grid->learn(w, lane, o.barrier->released);
    over |= static_cast<uint32_t>(done) << lane;
  }
  w.set_predicate(f.rest[2], over, mask);
  if (over == mask) return Next::kFollowing;
  w.grid->in_vain();
  return Next::kTurn;
}

// operands: destination (space, wide, base, offset), source (base of 8 bytes, offset in two words), bytes (a register),
// mbarrier (space, wide, base, offset)
inline Next copy_bulk(Warp& w, const Instruction& i, uint32_t mask) {
  const int32_t* o = i.operands;
  Grid& g = *w.grid;
  uint64_t to[32], from[32], barriers[32];
  addresses_of(w, o[2], o[1], o[3], to);
  addresses_of(w, o[4], true, static_cast<int64_t>(static_cast<uint32_t>(o[5])) | static_cast<int64_t>(o[6]) << 32, from);
  addresses_of(w, o[10], o[9], o[11], barriers);
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint32_t bytes = lanes_of<uint32_t>(w, o[7])[lane];
    if (bytes % 16 || !bytes) g.fail("a bulk copy of " + std::to_string(bytes) + " bytes: expected a multiple of 16", lane);
    const Place p = find_place(w, lane, static_cast<Space>(o[0]), to[lane], bytes, 16);
    if (from[lane] % 16) g.fail("misaligned: source address " + std::to_string(from[lane]), lane);
    const Object object = object_at(w, lane, static_cast<Space>(o[8]), barriers[lane]);
    if (!p.block || object.block != p.block) g.fail("a bulk copy whose mbarrier is not in the block it writes to", lane);
    check_write(w, lane, p, bytes, Access::kCopy, true);
    Region* region = check_async_read(w, lane, from[lane], bytes, object.barrier->thread);
    uint32_t thread;
    int32_t line;
    for (size_t k = 0; region->shadow && k < bytes; k += 2)
      if (!passed_to_proxy(w, 1u << lane, *region->shadow, from[lane] - region->address + k, kProxyGlobal, line, thread))
        g.fail("no fence.proxy.async between this copy and what it reads, which was written by " + g.thread_name(thread) +
                   "\n    " + g.line_text(line),
               lane);
    g.transfers.push_back({&w, lane, p.block, object.at, p.offset, bytes, from[lane], region, &i});
  }
  measure(w, i, kGlobal, from, 16, mask);
  g.progress();
  return Next::kFollowing;
}

inline void add_mbarriers(Forms& f) {
  // own operands: count
  f["mbarrier.init"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    const MBarrierForm form = mbarrier_form(w, i);
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      const Object o = object_at(w, lane, form.space, form.addresses[lane], false);
      const uint32_t count = of_lane(w, form.rest[0], lane, 0);
      if (!count || count > (1 << 20) - 1) w.grid->fail("an mbarrier of " + std::to_string(count) + " arrivals", lane);
      MBarrier& b = o.block->mbarriers[o.at] = {};
      b.expected = b.pending = count;
      b.thread = w.grid->async_thread(), b.stamp = w.grid->async_stamp();
      b.joined.warps.resize(w.grid->known_warps());
      std::memcpy(o.block->shared.get() + o.at, &kMark, 8);
    }
    return Next::kFollowing;
  }};
  f["mbarrier.inval"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    const MBarrierForm form = mbarrier_form(w, i);
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      const Object o = object_at(w, lane, form.space, form.addresses[lane], false);
      if (!o.block->mbarriers.erase(o.at)) w.grid->fail("no mbarrier is there", lane);
    }
    return Next::kFollowing;
  }};
  f["mbarrier.arrive"] = {each_object([](Warp& w, const Instruction& i, int lane, const Object& o, const int32_t* rest) {
    arrive(w, i, lane, o, rest);
  })};
  // own operands: bytes
  f["mbarrier.expect_tx"] = {each_object([](Warp& w, const Instruction&, int lane, const Object& o, const int32_t* rest) {
    expect_bytes(*w.grid, o, of_lane(w, rest[0], lane, 0));
  })};
  f["mbarrier.complete_tx"] = {each_object([](Warp& w, const Instruction&, int lane, const Object& o, const int32_t* rest) {
    o.barrier->bytes -= of_lane(w, rest[0], lane, 0);
    w.grid->progress();
    end_phase_if_due(*w.grid, *o.barrier);
  })};
  f["mbarrier.wait"] = {wait};
  // own operands: whether the arrival is one of those expected
  f["cp.async.mbarrier.arrive"] = {each_object([](Warp& w, const Instruction& i, int lane, const Object& o, const int32_t* rest) {
    Transfer t{&w, lane, o.block, o.at};
    t.at = &i;
    if (!rest[0]) ++o.barrier->pending;
    w.grid->transfers.push_back(t);
  })};
  f["cp.async.bulk"] = {copy_bulk};
}

}  // namespace hope::ptx
