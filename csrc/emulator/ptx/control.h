// Branches, ends and barriers.
#pragma once
#include "conversions.h"

namespace hope::ptx {

// operands: target, as the index of an instruction
inline Next branch(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t others = w.active & ~mask;
  if (!mask) return Next::kFollowing;
  if (others) {
    w.groups.push_back({w.pc + 1, others, false});
    w.active = mask;
  }
  w.pc = i.operands[0];
  return Next::kJump;
}

inline Next end(Warp& w, const Instruction&, uint32_t mask) {
  w.grid->end_lanes(w, mask);
  return Next::kFollowing;
}

inline void want_all(Warp& w, uint32_t mask) {
  if (mask != 0xffffffffu)
    w.grid->fail("an instruction of all lanes of the warp runs on " + std::to_string(std::popcount(mask)) +
                 " of them (its predicate differs)");
}

// operands: id, count (registers; count -1: all warps of the block), whether it waits
inline Next barrier(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  Grid& g = *w.grid;
  auto same = [&](int32_t operand) {
    const uint32_t* v = static_cast<uint32_t*>(w.lanes(operand));
    for (int lane = 1; lane < 32; ++lane)
      if (v[lane] != v[0]) g.fail("the lanes of a warp name different barriers or counts");
    return v[0];
  };
  const uint32_t id = same(i.operands[0]);
  if (id > 15) g.fail("barrier " + std::to_string(id) + ": ids are 0 to 15");
  Barrier& b = w.block->barriers[id];
  int needed = w.block->live;
  if (i.operands[1] >= 0) {
    const uint32_t count = same(i.operands[1]);
    if (!count || count % 32 || count > static_cast<uint32_t>(g.shape.threads))
      g.fail("barrier of " + std::to_string(count) + " threads: counts are whole warps of the block");
    needed = count / 32;
  }
  const bool counted = i.operands[1] >= 0;
  if (b.arrived && b.needed != needed && (counted || b.counted))
    g.fail("barrier " + std::to_string(id) + " of " + std::to_string(32 * needed) + " threads, where others wait for " +
           std::to_string(32 * b.needed));
  b.needed = needed, b.counted = counted;
  g.arrive(b, w);
  if (!i.operands[2]) {
    if (b.arrived == needed) g.release_all(b, true);
    return Next::kFollowing;
  }
  g.hold(b, w);
  if (b.arrived == needed) g.release_all(b, true);
  return Next::kWait;
}

// A phase of a cluster's barrier is over when every warp that has not ended has arrived. Phases alternate between
// two barriers: a warp that arrives at the next but one knows that all have waited for this one.
inline Next cluster_arrive(Warp& w, const Instruction&, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  Grid& g = *w.grid;
  if (w.cluster_arrived) g.fail("arrives twice without waiting");
  w.cluster_arrived = true;
  Barrier& b = w.block->cluster->barriers[w.cluster_phase & 1];
  if (b.phase != w.cluster_phase) {
    b.phase = w.cluster_phase;
    b.arrived = 0;
    b.joined.clear();
  }
  g.arrive(b, w);
  if (b.arrived == w.block->cluster->live) g.release_all(b, false);
  return Next::kFollowing;
}

inline Next cluster_wait(Warp& w, const Instruction&, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  Grid& g = *w.grid;
  if (!w.cluster_arrived) g.fail("waits without having arrived");
  Barrier& b = w.block->cluster->barriers[w.cluster_phase & 1];
  w.cluster_arrived = false;
  ++w.cluster_phase;
  g.hold(b, w);
  b.needed = w.block->cluster->live;
  if (b.arrived >= b.needed) g.release_all(b, false);
  return Next::kWait;
}

inline Next nothing(Warp&, const Instruction&, uint32_t) { return Next::kFollowing; }

inline void add_control(Forms& f) {
  f["bra"] = {branch};
  f["ret"] = {end};
  f["exit"] = {end};
  f["trap"] = {[](Warp& w, const Instruction&, uint32_t mask) {
    if (mask) w.grid->fail("trap");
    return Next::kFollowing;
  }};
  f["barrier"] = {barrier, true};
  f["bar.warp.sync"] = {[](Warp& w, const Instruction&, uint32_t mask) {
                          if (!mask) return Next::kFollowing;
                          want_all(w, mask);
                          w.grid->meet(w);
                          return Next::kFollowing;
                        },
                        true};
  f["barrier.cluster.arrive"] = {cluster_arrive, true};
  f["barrier.cluster.wait"] = {cluster_wait, true};
  f["nanosleep.u32"] = {[](Warp&, const Instruction&, uint32_t) { return Next::kTurn; }};
  f["nop"] = {nothing};
}

}  // namespace hope::ptx
