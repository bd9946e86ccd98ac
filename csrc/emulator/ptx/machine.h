// A grid of warps on one host thread: who runs next, barriers, shared memory, what a launch may touch.
//
// A warp is a state: 32-lane registers, predicates, and where its lanes are. Lanes that branch apart run on
// in groups, the one with the smallest pc first, and are one group again where they meet; an instruction that
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
constexpr uint64_t kLocalWindow = 0x0600000000000000ull;
constexpr uint32_t kRankShift = 24;  // of an address in the cluster's shared memory

enum Scope : int32_t { kOfDevice = 0, kOfBlock = 1, kOfCluster = 2 };
enum Proxied : uint32_t { kProxyShared = 1, kProxyGlobal = 2 };  // spaces that a fence.proxy.async is about

struct Group {
  int32_t pc;
  uint32_t lanes;
  bool parked;  // at an instruction that wants the others
};

struct AsyncCopy {
  int lane;
  uint32_t group;  // of its lane's
  size_t to;       // in shared memory
  uint64_t from;
  uint32_t bytes, valid;  // the rest is zeros
  Region* region;         // of what is read
  bool done;
};

struct Result {  // of products under way: lanes of an accumulator, and the group that makes it
  std::array<uint32_t, 32> lanes;
  uint64_t group;
};

struct ProxyFence {
  uint32_t clock, lanes, spaces;
};

struct KnownAtFence {  // other warps' accesses that lanes knew of
  uint32_t lanes = 0, spaces = 0;
  std::vector<uint32_t> warps;

  bool has(uint32_t by, uint32_t space, uint32_t thread, uint32_t stamp) const {
    return (lanes & by) == by && (spaces & space) && warps[thread / 32] > stamp;
  }
};

// Of a lane that orders relaxed accesses by fences: what it had released at its last fence, and what it has
// read of others since.
struct Fenced {
  std::unique_ptr<Knowledge> released, read[3];  // by the scope of the fence to come
  Scope scope = kOfDevice;
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

  std::unique_ptr<Fenced> fences[32];

  std::vector<AsyncCopy> copies;  // under way
  uint32_t copy_groups[32] = {};  // committed, by every lane
  std::vector<uint32_t> open_reads;             // of products: which 16 bytes of shared memory
  std::vector<std::vector<uint32_t>> products;  // committed groups of them under way
  std::map<int32_t, Result> results;  // register -> what it becomes when its group is waited for
  uint64_t committed = 0;             // groups
  bool products_fenced = false;
  uint64_t in_step = 0;  // what was done that the warps of a warpgroup do alike: the same in all of them
  std::vector<ProxyFence> proxy_fences;
  KnownAtFence all_fenced, some_fenced;  // the last one of all lanes, and of some
  std::unique_ptr<unsigned char[]> local;  // memory of the lanes, one after another

  bool waiting = false;
  int32_t wait_line = 0;
  int cluster_phase = 0;
  bool cluster_arrived = false;

  void* lanes(int32_t operand) {
    return const_cast<unsigned char*>(bases[static_cast<uint32_t>(operand) >> 30]) +
           size_t{static_cast<uint32_t>(operand) & 0x3fffffffu} * 128;
  }
  bool products_under_way() const { return !products.empty() || !results.empty(); }
  void set_predicate(int32_t p, uint32_t value, uint32_t mask) {
    predicates[p] = (predicates[p] & ~mask) | (value & mask);
  }
  Accessor accessor(int lane) { return {id * 32 + lane, clock, &knows, any_own ? own[lane].get() : nullptr}; }
};

struct Barrier {
  std::vector<Warp*> waiting;
  int arrived = 0, needed = 0, phase = 0;
  bool counted = false;  // of a number of threads, not of all
  Knowledge joined;
};

struct MBarrier {
  uint32_t expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;                   // expected and not here
  uint32_t phase = 0;
  uint32_t thread =
      0;  // that asynchronous accesses count as; who has seen a phase end knows those of its stamp
  uint32_t stamp = 0;
  Knowledge joined, released;
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
  std::map<size_t, MBarrier> mbarriers;
  std::map<uint32_t, uint32_t> remote;  // thread of another block -> stamp of its last access to this one
};

struct Cluster {
  int index, live;  // warps not ended
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barriers[2];  // of even and odd phases
};

struct Location {  // what was released there, to threads of the device, of a cluster, of a block
  Knowledge device;
  std::map<int, Knowledge> cluster, block;
};

// What goes on without a warp: a bulk copy, or an arrival when a lane's copies are done.
struct Transfer {
  Warp* warp;
  int lane;
  Block* block;  // of `to` and `barrier`
  size_t barrier;
  size_t to = 0, bytes = 0;  // 0 bytes: an arrival
  uint64_t from = 0;
  Region* region = nullptr;
  const Instruction* at = nullptr;
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
      : program(program),
        shape(shape),
        options(options),
        parameters(parameters),
        parameter_bytes(parameter_bytes),
        regions(regions),
        state_(0x9e3779b97f4a7c15ull * (options.seed + 1)) {}

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
    if (thread >= static_cast<uint32_t>(blocks() * shape.threads))
      return "a copy that an mbarrier is told of";
    return "block " + std::to_string(thread / 32 / warps) + " warp " + std::to_string(thread / 32 % warps) +
           " lane " + std::to_string(thread % 32);
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
  void in_vain() { idle_ += 64; }  // a wait that was not over
  // Warps that knowledge is about: the grid's, and some that asynchronous accesses count as.
  static constexpr size_t kAsyncWarps = 8;
  size_t known_warps() const {
    return size_t(blocks()) * (shape.threads / 32) + (program.has_mbarriers ? kAsyncWarps : 0);
  }
  uint32_t async_thread() { return blocks() * shape.threads + async_threads_++ % (32 * kAsyncWarps); }
  uint32_t async_stamp() { return ++async_stamps_; }
  std::vector<Transfer> transfers;
  void advance(bool all);  // mbarrier.h
  int blocks() const { return static_cast<int>(shape.grid[0] * shape.grid[1] * shape.grid[2]); }
  Count& count(const Instruction& i) { return program.counts[i.index]; }

  // --- order
  // -------------------------------------------------------------------------------------------------
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
  void join(Knowledge& to, const Knowledge& from) const {
    to.warps.resize(known_warps());
    to.join(from);
  }
  // `given`: what the lane knows, or knew at its last fence.
  void release(Warp& w, int lane, uint64_t address, Scope scope, const Knowledge* given = nullptr) {
    if (!options.races) return;
    Location& l = locations_[address];
    const Knowledge k = given ? *given : known_by(w, lane);
    if (scope == kOfDevice) join(l.device, k);
    if (scope != kOfBlock) join(l.cluster[w.block->index / shape.cluster], k);
    join(l.block[w.block->index], k);
    if (!given) ++w.clock;
  }
  // What an acquire at this address may know: of releases whose scope this thread is in, by threads in its
  // own.
  template <class F> void acquired(Warp& w, uint64_t address, Scope scope, F take) {
    const auto found = locations_.find(address);
    if (found == locations_.end()) return;
    const Location& l = found->second;
    if (scope == kOfDevice && !l.device.warps.empty()) take(l.device);
    const auto cluster = l.cluster.find(w.block->index / shape.cluster);
    if (scope != kOfBlock && cluster != l.cluster.end()) take(cluster->second);
    const auto block = l.block.find(w.block->index);
    if (block != l.block.end()) take(block->second);
  }
  void learn(Warp& w, int lane, const Knowledge& what) {
    if (!options.races || what.warps.empty()) return;
    if (!w.own[lane]) w.own[lane] = std::make_unique<Knowledge>(), w.any_own = true;
    join(*w.own[lane], what);
  }
  void acquire(Warp& w, int lane, uint64_t address, Scope scope) {
    if (!options.races) return;
    acquired(w, address, scope, [&](const Knowledge& k) { learn(w, lane, k); });
  }
  // A relaxed write, or one that others read first: what was released there by whom it replaces is lost, and
  // what its lane had fenced is released.
  void relaxed_write(Warp& w, int lane, uint64_t address, Scope scope, bool replaces) {
    if (!options.races) return;
    if (replaces) locations_.erase(address);
    if (w.fences[lane] && w.fences[lane]->released)
      release(w, lane, address, narrower(scope, w.fences[lane]->scope), w.fences[lane]->released.get());
  }
  void relaxed_read(Warp& w, int lane, uint64_t address, Scope scope) {
    if (!options.races) return;
    for (const Scope of : {kOfDevice, kOfBlock, kOfCluster})
      acquired(w, address, narrower(scope, of), [&](const Knowledge& k) {
        if (!w.fences[lane]) w.fences[lane] = std::make_unique<Fenced>();
        auto& read = w.fences[lane]->read[of];
        if (!read) read = std::make_unique<Knowledge>();
        join(*read, k);
      });
  }
  void fence(Warp& w, uint32_t lanes, Scope scope) {
    if (!options.races) return;
    for (uint32_t m = lanes; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      if (!w.fences[lane]) w.fences[lane] = std::make_unique<Fenced>();
      Fenced& f = *w.fences[lane];
      if (f.read[scope]) learn(w, lane, *f.read[scope]), f.read[scope].reset();
      f.released = std::make_unique<Knowledge>(known_by(w, lane));
      f.scope = scope;
    }
    ++w.clock;
  }
  static Scope narrower(Scope a, Scope b) {
    return a == kOfBlock || b == kOfBlock ? kOfBlock : std::max(a, b);
  }
  void forget_released(uint64_t from, size_t bytes) {  // memory that goes away
    locations_.erase(locations_.lower_bound(from), locations_.lower_bound(from + bytes));
  }

  // --- barriers
  // ----------------------------------------------------------------------------------------------
  void arrive(Barrier& b, Warp& w) {
    meet(w);
    if (options.races) join(b.joined, w.knows);
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

  // --- copies
  // ------------------------------------------------------------------------------------------------
  void copy_now(Warp& w, AsyncCopy& c) {
    if (c.done) return;
    unsigned char* to = w.block->shared.get() + c.to;
    std::memcpy(to, reinterpret_cast<const void*>(c.from), c.valid);
    std::memset(to + c.valid, 0, c.bytes - c.valid);
    c.done = true;
  }
  // Copies of these lanes, but for the last groups of each.
  void wait_copies(Warp& w, uint32_t lanes, uint32_t groups_left) {
    std::erase_if(w.copies, [&](AsyncCopy& c) {
      if (!(lanes >> c.lane & 1) || c.group + groups_left >= w.copy_groups[c.lane]) return false;
      copy_now(w, c);
      finish(w, c, w.id * 32 + c.lane, w.clock);
      return true;
    });
  }
  // To the race detector: a copy was made by this thread at this stamp.
  void finish(Warp& w, const AsyncCopy& c, uint32_t thread, uint32_t stamp) {
    if (!options.races) return;
    w.block->shadow->complete_write(c.to, c.bytes, thread, stamp);
    if (c.valid)
      c.region->shadow->complete_read(c.from - c.region->address, c.valid, w.id, 1u << c.lane, w.clock);
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
  void wait_for_results(Warp& w, const Instruction& i);
  void arrive_late(Transfer& t);  // mbarrier.h

  uint64_t state_;
  int64_t idle_ = 0;
  uint32_t async_threads_ = 0, async_stamps_ = 0;
  std::vector<Warp*> ready_;
  std::vector<std::unique_ptr<Cluster>> live_;
  Cluster* finished_ = nullptr;
  std::map<uint64_t, Location> locations_;
};

}  // namespace hope::ptx
