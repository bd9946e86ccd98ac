// A grid of warps on one host thread: who runs next, barriers, shared memory, what a launch may touch.
//
// A warp is a state: 32-lane registers, predicates, and where its lanes are. Lanes that branch apart run on in
// groups, the one with the smallest pc first, and are one group again where they meet; an instruction that
// wants all lanes waits until they have come.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "program.h"
#include "shadow.h"

namespace hope::ptx {

struct Options {
  uint64_t seed = 0;   // 0: warps take turns; else a random order, with interruptions anywhere
  int resident = 8;    // blocks at work at a time; others start, in order of their index, as clusters end
  bool races = true;   // accesses that nothing orders are faults
  bool measure = false;  // Count::wavefronts and sectors
};

struct Region {
  uint64_t address, bytes;
  std::string name;
  std::unique_ptr<Shadow> shadow;
};

struct Block;
struct Cluster;
class Grid;

// Where generic and cluster addresses of shared memory lie; no host address is there.
constexpr uint64_t kSharedWindow = 0x0500000000000000ull;
constexpr uint32_t kRankShift = 24;  // of an address in the cluster's shared memory

struct Group {
  int32_t pc;
  uint32_t lanes;
  bool parked;  // at an instruction that wants the others
};

struct AsyncCopy {
  int lane;
  size_t to;  // in shared memory
  uint64_t from;
  uint32_t bytes, valid;  // the rest is zeros
  bool done;
};

struct Result {  // of products under way: lanes of an accumulator, and the group that makes it
  std::array<uint32_t, 32> lanes;
  uint64_t group;
};

struct FreeBytes {
  void operator()(void* p) const { std::free(p); }
};

struct Warp {
  Grid* grid;
  Block* block;
  int index;     // in its block
  uint32_t id;   // in the grid
  int32_t pc = 0;
  uint32_t active = 0xffffffffu, alive = 0xffffffffu;
  std::vector<Group> groups;  // lanes elsewhere
  std::unique_ptr<unsigned char, FreeBytes> registers;
  const unsigned char* bases[2];  // of registers and constants
  std::vector<uint32_t> predicates;

  uint32_t clock = 1;
  Knowledge knows;
  std::unique_ptr<Knowledge> own[32];  // acquired by a lane since all last met
  bool any_own = false;

  std::vector<std::vector<AsyncCopy>> copies;  // committed groups, and the open one at the end
  std::vector<uint32_t> open_reads;             // of products: which 16 bytes of shared memory
  std::vector<std::vector<uint32_t>> products;  // committed groups of them under way
  std::map<int32_t, Result> results;  // register -> what it becomes when its group is waited for
  uint64_t committed = 0;             // groups
  bool products_fenced = false;
  bool open_products = false;      // issued and not committed
  uint64_t products_issued = 0;    // which ones: the same by all warps of a warpgroup
  uint32_t proxy_fence = 0;  // its own writes stamped before it are seen by asynchronous products
  std::vector<uint32_t> known_at_fence;  // and those of other warps that it knew of then

  bool waiting = false;
  int barrier = -1;
  int32_t wait_line = 0;
  int cluster_phase = 0;
  bool cluster_arrived = false;

  void* lanes(int32_t operand) {
    return const_cast<unsigned char*>(bases[static_cast<uint32_t>(operand) >> 30]) +
           size_t{static_cast<uint32_t>(operand) & 0x3fffffffu} * 128;
  }
  void set_predicate(int32_t p, uint32_t value, uint32_t mask) {
    predicates[p] = (predicates[p] & ~mask) | (value & mask);
  }
  uint32_t knows_at_fence(uint32_t warp) const { return warp < known_at_fence.size() ? known_at_fence[warp] : 0; }
  Accessor accessor(int lane) { return {id * 32 + lane, clock, &knows, any_own ? own[lane].get() : nullptr}; }
};

struct Barrier {
  std::vector<Warp*> waiting;
  int arrived = 0, needed = 0, phase = 0;
  Knowledge joined;
};

struct Block {
  Cluster* cluster;
  int index, rank, live;
  uint32_t x, y, z;
  size_t shared_bytes;
  std::unique_ptr<unsigned char, FreeBytes> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<Shadow> shadow;
  std::vector<uint32_t> under_product;  // of every 16 bytes: how many reads by products are under way
  Barrier barriers[16];
  std::map<uint64_t, struct MBarrier> mbarriers;
  std::map<uint32_t, uint32_t> remote;  // thread of another block -> stamp of its last store to this one
};

struct MBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Knowledge joined, released;
};

struct Cluster {
  int index, live;  // warps not ended
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barriers[2];  // of even and odd phases
};

struct Location {  // what was released there
  Knowledge gpu;
  std::map<int, Knowledge> cta;
};

struct Shape {
  uint32_t grid[3];
  int threads, cluster;
  size_t shared_bytes;
};

class Grid {
 public:
  Grid(Program& program, const Shape& shape, const Options& options, const unsigned char* parameters,
       size_t parameter_bytes, std::vector<Region>& regions)
      : program(program), shape(shape), options(options), parameters(parameters), parameter_bytes(parameter_bytes),
        regions(regions), state_(0x9e3779b97f4a7c15ull * (options.seed + 1)) {}

  Program& program;
  const Shape shape;
  const Options options;
  const unsigned char* parameters;
  const size_t parameter_bytes;
  std::vector<Region>& regions;
  size_t last_region = 0;  // the one accessed last
  Warp* now = nullptr;
  const Instruction* at = nullptr;

  void run();

  [[noreturn]] void fail(const std::string& what, int lane = -1) {
    std::string text = what;
    if (at) text += "\n  line " + std::to_string(at->line) + ": " + program.texts[at->index];
    if (now) text = name_of(*now, lane) + ": " + text;
    throw std::runtime_error(program.name + ": " + text);
  }
  static std::string name_of(const Warp& w, int lane = -1) {
    return "block " + std::to_string(w.block->index) + " warp " + std::to_string(w.index) +
           (lane < 0 ? "" : " lane " + std::to_string(lane));
  }
  std::string thread_name(uint32_t thread) const {
    const uint32_t warps = shape.threads / 32;
    return "block " + std::to_string(thread / 32 / warps) + " warp " + std::to_string(thread / 32 % warps) + " lane " +
           std::to_string(thread % 32);
  }
  std::string line_text(int32_t line) const {
    for (const Instruction& i : program.instructions)
      if (i.line == line) return "line " + std::to_string(line) + ": " + program.texts[i.index];
    return "line " + std::to_string(line);
  }

  uint64_t draw() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_;
  }
  bool random() const { return options.seed != 0; }
  void progress() { idle_ = 0; }
  int blocks() const { return static_cast<int>(shape.grid[0] * shape.grid[1] * shape.grid[2]); }
  Count& count(const Instruction& i) { return program.counts[i.index]; }

  // --- order -------------------------------------------------------------------------------------------------
  // The lanes of a warp know of each other's accesses up to now.
  void meet(Warp& w) {
    if (!options.races) return;
    if (w.any_own) {
      for (auto& own : w.own)
        if (own) w.knows.join(*own), own.reset();
      w.any_own = false;
    }
    w.knows.warps[w.id] = ++w.clock;
  }
  Knowledge known_by(Warp& w, int lane) {
    Knowledge k = w.knows;
    if (w.any_own && w.own[lane]) k.join(*w.own[lane]);
    k.released.push_back({w.id * 32 + lane, w.clock + 1});
    return k;
  }
  void release(Warp& w, int lane, uint64_t address, bool of_cta) {
    if (!options.races) return;
    Location& l = locations_[address];
    const Knowledge k = known_by(w, lane);
    auto join = [&](Knowledge& to) {
      to.warps.resize(k.warps.size());
      to.join(k);
    };
    if (!of_cta) join(l.gpu);
    join(l.cta[w.block->index]);
    ++w.clock;
  }
  void acquire(Warp& w, int lane, uint64_t address, bool of_cta) {
    if (!options.races) return;
    const auto found = locations_.find(address);
    if (found == locations_.end()) return;
    auto take = [&](const Knowledge& from) {
      if (from.warps.empty()) return;
      if (!w.own[lane]) {
        w.own[lane] = std::make_unique<Knowledge>();
        w.own[lane]->warps.resize(w.knows.warps.size());
        w.any_own = true;
      }
      w.own[lane]->join(from);
    };
    if (!of_cta) take(found->second.gpu);
    const auto mine = found->second.cta.find(w.block->index);
    if (mine != found->second.cta.end()) take(mine->second);
  }
  void forget_released(uint64_t address) { locations_.erase(address); }

  // --- barriers ----------------------------------------------------------------------------------------------
  void arrive(Barrier& b, Warp& w) {
    meet(w);
    if (options.races) {
      b.joined.warps.resize(w.knows.warps.size());
      b.joined.join(w.knows);
    }
    ++b.arrived;
  }
  void hold(Barrier& b, Warp& w) {
    b.waiting.push_back(&w);
    w.waiting = true;
    w.wait_line = at->line;
  }
  void release_all(Barrier& b, bool reset) {
    for (Warp* w : b.waiting) {
      if (options.races) {
        w->knows.join(b.joined);
        w->knows.warps[w->id] = ++w->clock;
      }
      w->waiting = false;
      ready_.push_back(w);
    }
    b.waiting.clear();
    if (reset) b.arrived = 0, b.joined.clear();
    progress();
  }

  // --- copies ------------------------------------------------------------------------------------------------
  void copy_now(Warp& w, AsyncCopy& c) {
    if (c.done) return;
    unsigned char* to = w.block->shared.get() + c.to;
    std::memcpy(to, reinterpret_cast<const void*>(c.from), c.valid);
    std::memset(to + c.valid, 0, c.bytes - c.valid);
    c.done = true;
  }
  void wait_copies(Warp& w, size_t groups_left) {
    const size_t committed = w.copies.empty() ? 0 : w.copies.size() - 1;
    for (size_t g = 0; g + groups_left < committed; ++g) {
      for (AsyncCopy& c : w.copies.front()) {
        copy_now(w, c);
        if (w.block->shadow) w.block->shadow->complete_write(c.to, c.bytes, w.clock);
      }
      w.copies.erase(w.copies.begin());
    }
  }

  void end_lanes(Warp& w, uint32_t mask);
  std::string waiting() const;

 private:
  void start_cluster(int index);
  void end_warp(Warp& w);
  void end_block(Block& b);
  void slice(Warp& w);
  bool settle(Warp& w, const Instruction& i);
  bool park(Warp& w);
  void choose_group(Warp& w);

  uint64_t state_;
  int64_t idle_ = 0;
  std::vector<Warp*> ready_;
  size_t head_ = 0;
  std::vector<std::unique_ptr<Cluster>> live_;
  Cluster* finished_ = nullptr;
  std::map<uint64_t, Location> locations_;
};

}  // namespace hope::ptx
