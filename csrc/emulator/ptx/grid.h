// How a grid runs: clusters start and end, warps take turns, lanes part and meet.
#pragma once
#include <algorithm>

#include "machine.h"

namespace hope::ptx {

constexpr int64_t kIdle = 4000000;  // instructions in a row that change nothing: everybody waits for nothing

void fill_special(Warp& w, const Special& s);  // special.h

inline void Grid::start_cluster(int index) {
  auto c = std::make_unique<Cluster>();
  const int warps = shape.threads / 32;
  c->index = index;
  c->live = shape.cluster * warps;
  for (int rank = 0; rank < shape.cluster; ++rank) {
    auto b = std::make_unique<Block>();
    b->cluster = c.get();
    b->index = index * shape.cluster + rank;
    b->rank = rank;
    b->live = warps;
    b->x = b->index % shape.grid[0];
    b->y = b->index / shape.grid[0] % shape.grid[1];
    b->z = b->index / shape.grid[0] / shape.grid[1];
    b->shared_bytes = shape.shared_bytes;
    b->shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, (shape.shared_bytes / 1024 + 1) * 1024)));
    if (!b->shared) throw std::bad_alloc();
    std::memset(b->shared.get(), 0xff, shape.shared_bytes);
    if (options.races) b->shadow = std::make_unique<Shadow>(shape.shared_bytes, program.single_bytes);
    for (int i = 0; i < warps; ++i) {
      auto w = std::make_unique<Warp>();
      w->grid = this;
      w->block = b.get();
      w->index = i;
      w->id = b->index * warps + i;
      const size_t bytes = size_t{128} * (program.slots + 1);
      w->registers.reset(static_cast<unsigned char*>(std::aligned_alloc(128, bytes)));
      std::memset(w->registers.get(), 0xff, bytes);
      w->bases[0] = w->registers.get();
      w->bases[1] = reinterpret_cast<const unsigned char*>(program.constants.data());
      w->predicates.assign(program.predicates + 1, 0);
      for (int32_t p : program.true_predicates) w->predicates[p] = 0xffffffffu;
      for (const Special& s : program.specials) fill_special(*w, s);
      if (program.local_bytes) w->local = std::make_unique<unsigned char[]>(size_t{32} * program.local_bytes);
      if (options.races) {
        w->knows.warps.resize(known_warps());
        w->knows.warps[w->id] = 1;
      }
      ready_.push_back(w.get());
      b->warps.push_back(std::move(w));
    }
    c->blocks.push_back(std::move(b));
  }
  live_.push_back(std::move(c));
}

// The group of lanes that runs next: the one that has the furthest to go, unless it waits for others.
inline void Grid::choose_group(Warp& w) {
  size_t best = w.groups.size();
  for (size_t i = 0; i < w.groups.size(); ++i)
    if (!w.groups[i].parked && (best == w.groups.size() || w.groups[i].pc < w.groups[best].pc)) best = i;
  if (best == w.groups.size()) {
    std::string text = "lanes wait for each other at different instructions:";
    for (const Group& g : w.groups)
      text += "\n  " + std::to_string(std::popcount(g.lanes)) + " lanes at " +
              line_text(program.instructions[g.pc].line);
    fail(text);
  }
  w.pc = w.groups[best].pc;
  w.active = w.groups[best].lanes;
  w.groups.erase(w.groups.begin() + best);
}

// Where control may have arrived from elsewhere while lanes are apart: lanes that are here join; others that are
// behind go first. False: another instruction is next.
inline bool Grid::settle(Warp& w, const Instruction& i) {
  for (size_t g = 0; g < w.groups.size();) {
    if (w.groups[g].pc == w.pc) {
      w.active |= w.groups[g].lanes;
      w.groups.erase(w.groups.begin() + g);
    } else {
      ++g;
    }
  }
  if (i.together) return true;
  for (const Group& g : w.groups)
    if (!g.parked && g.pc < w.pc) {
      w.groups.push_back({w.pc, w.active, false});
      choose_group(w);
      return false;
    }
  return true;
}

// At an instruction that wants all lanes: true if they are here, else others go on.
inline bool Grid::park(Warp& w) {
  if (w.active == w.alive) {
    if (w.alive != 0xffffffffu)
      fail(std::to_string(32 - std::popcount(w.alive)) + " lanes of the warp have ended before an instruction of all");
    return true;
  }
  w.groups.push_back({w.pc, w.active, true});
  choose_group(w);
  return false;
}

inline void Grid::end_lanes(Warp& w, uint32_t mask) {
  w.alive &= ~mask;
  w.active &= ~mask;
}

inline void Grid::slice(Warp& w) {
  int budget = random() ? (draw() % 8 ? 1 + draw() % 64 : 1 + draw() % 2000) : 20000;
  now = &w;
  const Instruction* const program_begin = program.instructions.data();
  Count* const counts = program.counts.data();
  if (random())
    for (AsyncCopy& c : w.copies)
      if (draw() % 8 == 0) copy_now(w, c);
  // lanes of a warp run apart in any order: another group's turn now and then
  if (!w.groups.empty() && (random() ? draw() % 4 == 0 : idle_ > kIdle / 2)) {
    const size_t g = draw() % w.groups.size();
    if (!w.groups[g].parked) {
      std::swap(w.pc, w.groups[g].pc);
      std::swap(w.active, w.groups[g].lanes);
    }
  }
  for (; budget > 0; --budget) {
    const Instruction& i = program_begin[w.pc];
    at = &i;
    if (!w.groups.empty() && (i.starts || i.together) && !settle(w, i)) continue;
    if (i.together && w.active != 0xffffffffu && !park(w)) continue;
    uint32_t mask = w.active;
    if (i.guard >= 0) {
      const uint32_t p = w.predicates[i.guard];
      mask &= i.negated ? ~p : p;
    }
    if (i.waits && w.products_under_way()) wait_for_results(w, i);
    Count& count = counts[i.index];
    ++count.executed;
    count.lanes += std::popcount(mask);
    ++idle_;
    const Next next = i.run(w, i, mask);
    if (next == Next::kFollowing) {
      ++w.pc;
    } else if (next == Next::kTurn) {
      ++w.pc;
      break;
    } else if (next == Next::kWait) {
      ++w.pc;
      return;
    }
    if (!w.active) {
      if (!w.alive) return end_warp(w);
      choose_group(w);
    }
  }
  if (idle_ > kIdle + 20000 * static_cast<int64_t>(ready_.size()))
    fail("deadlock: instructions run, but for long nothing changes. Waiting:\n" + waiting());
  ready_.push_back(&w);
}

inline void Grid::wait_for_results(Warp& w, const Instruction& i) {
  for (int32_t k = 0; k < i.register_count; ++k)
    if (w.results.count(i.registers[k])) fail("uses the result of an asynchronous product that is not waited for");
}

inline void Grid::end_warp(Warp& w) {
  std::erase_if(transfers, [&](Transfer& t) { return t.warp == &w && !t.bytes && (arrive_late(t), true); });
  for (AsyncCopy& c : w.copies) copy_now(w, c);
  if (w.products_under_way()) fail("ends before its asynchronous products are waited for");
  if (w.cluster_arrived) fail("ends between barrier.cluster.arrive and wait");
  meet(w);
  progress();
  Block& b = *w.block;
  Cluster& c = *b.cluster;
  --b.live, --c.live;
  for (Barrier& whole : b.barriers)
    if (!whole.counted && !whole.waiting.empty() && whole.arrived >= b.live) release_all(whole, true);
  for (Barrier& phase : c.barriers)
    if (!phase.waiting.empty() && phase.arrived >= c.live) release_all(phase, false);
  if (!b.live) end_block(b);
  if (!c.live) finished_ = &c;
}

// The block must know of every store from another one before its memory goes away.
inline void Grid::end_block(Block& b) {
  for (const auto& w : b.warps)
    if (w->in_step != b.warps[w->index / 4 * 4]->in_step)
      fail("the warps of a warpgroup issued different products, or set registers differently");
  for (const Transfer& t : transfers)
    if (t.block == &b) {
      at = t.at;
      fail("the block ends while this copy to its shared memory is under way");
    }
  if (!options.races) return;
  for (const auto& [thread, stamp] : b.remote) {
    bool known = false;
    for (const auto& w : b.warps) known = known || w->knows.of(thread, stamp);
    if (!known)
      fail("race: the block ends without a barrier after an access to its shared memory by " + thread_name(thread));
  }
}

inline std::string Grid::waiting() const {
  std::string text;
  int lines = 0;
  for (const auto& c : live_)
    for (const auto& b : c->blocks)
      for (const auto& w : b->warps) {
        if (!w->alive || ++lines > 32) continue;
        text += "  " + name_of(*w) + (w->waiting ? " waits at " : " runs at ") +
                line_text(w->waiting ? w->wait_line : program.instructions[w->pc].line) + "\n";
      }
  if (lines > 32) text += "  and " + std::to_string(lines - 32) + " more warps\n";
  return text;
}

inline void Grid::run() {
  const int clusters = blocks() / shape.cluster;
  int started = 0;
  while (true) {
    for (; started < clusters && (static_cast<int>(live_.size()) + 1) * shape.cluster <= options.resident; ++started)
      start_cluster(started);
    if (live_.empty()) break;
    if (ready_.empty() && !transfers.empty()) advance(true);
    if (ready_.empty()) {
      now = nullptr, at = nullptr;
      fail("deadlock: no warp can run. Waiting:\n" + waiting());
    }
    if (!transfers.empty()) advance(!random());
    const size_t pick = random() ? draw() % ready_.size() : 0;
    Warp* w = ready_[pick];
    ready_.erase(ready_.begin() + pick);
    slice(*w);
    now = nullptr;
    if (finished_) {
      for (const auto& b : finished_->blocks)
        forget_released(reinterpret_cast<uint64_t>(b->shared.get()), b->shared_bytes);
      live_.erase(std::find_if(live_.begin(), live_.end(), [&](const auto& c) { return c.get() == finished_; }));
      finished_ = nullptr;
    }
  }
}

}  // namespace hope::ptx
