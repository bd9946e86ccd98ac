// A grid of threads on one host thread: fibers, who runs next, barriers, shared memory. simt.h puts the
// kernels' names on top.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "races.h"

namespace hope::emulator {

struct Options {
  // 0: threads take turns; else they run in a random order of this seed, and may be interrupted where they access
  // shared memory
  unsigned seed = 0;
  // Blocks at work at a time, at least one cluster; others start, in order of their index, as clusters end.
  int resident = 8;
  bool races = true;  // report accesses to shared memory that nothing orders
};

inline Options& options() {
  static Options it;
  return it;
}

struct Warp;
struct Block;
struct Cluster;

struct Copy {
  uint32_t* to;
  const uint32_t* from;  // null: zeros
};

struct Thread {
  Fiber fiber;
  Warp* warp;
  int lane;
  uint32_t clock = 1;
  bool ended = false;
  Place paused{};                    // the last pause()
  std::vector<Copy> copies;          // under way
  std::vector<size_t> copied;        // offsets of all not waited for
  std::unique_ptr<Knowledge> own;    // acquired since the warp's lanes last met
  unsigned char* stack = nullptr;
};

struct Warp {
  Block* block;
  int index;  // in its block
  Thread lanes[32];
  Knowledge knows;
  // The operation at which lanes gather, or wait once all are there.
  const char* kind = nullptr;
  Place place{};
  uint32_t present = 0;  // lanes that have arrived
  void* arguments[32];
  const struct Barrier* waits = nullptr;
  int ended = 0;  // lanes
  int cluster_phase = 0;
  bool cluster_arrived = false;
};

struct Barrier {
  std::vector<Warp*> waiting;
  int arrived = 0;  // warps
  int needed = 0;   // warps
  int phase = 0;   // of a cluster's barrier
  Knowledge joined;
};

struct FreeBytes {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  Cluster* cluster;
  int index, rank;
  size_t shared_bytes;
  std::unique_ptr<unsigned char, FreeBytes> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<Shadow> shadow;
  Barrier barriers[16];
  int live;  // warps
  std::map<uint32_t, uint32_t> remote;  // thread of another block -> stamp of its last store to this one
};

struct Cluster {
  int index, live;  // warps not ended
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barriers[2];  // of even and odd phases
  Warp* warp(uint32_t i) const {
    const size_t per_block = blocks[0]->warps.size();
    return blocks[i / per_block]->warps[i % per_block].get();
  }
};

inline std::string name_of(const Warp& w) {
  return "block " + std::to_string(w.block->index) + " warp " + std::to_string(w.index);
}
inline std::string name_of(const Thread& t) { return name_of(*t.warp) + " lane " + std::to_string(t.lane); }

class Grid {
 public:
  Thread* now = nullptr;  // who runs
  int threads = 0, cluster = 1;

  void run(int blocks, int threads_, int cluster_, size_t shared_bytes, const std::function<void()>& kernel);

  Warp& warp() { return *now->warp; }
  Block& block() { return *now->warp->block; }

  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error(now ? name_of(*now) + ": " + what : what);
  }

  // All 32 lanes deposit `arguments`; the last to arrive calls work(warp), and all go on if that says so;
  // else when the warp is released.
  template <class Work> void gather(const char* kind, void* arguments, Place place, Work work) {
    Warp& w = warp();
    if (w.ended)
      fail(std::string(kind) + " at " + place.text() + ", but " + std::to_string(w.ended) +
           " lanes of its warp have ended");
    if (!w.present) {
      w.kind = kind, w.place = place;
    } else if (w.kind != kind || w.place.line != place.line) {
      fail(std::string(kind) + " at " + place.text() + ", but other lanes of its warp wait at " + w.kind +
           " at " + w.place.text());
    }
    w.arguments[now->lane] = arguments;
    w.present |= 1u << now->lane;
    if (w.present != 0xffffffffu) return wait();
    w.present = 0;
    if (!work(w)) return wait();
    resume(w);
    if (random_) {
      ready(now);
      wait();
    }
  }

  void sync_warp(Place place) {
    gather("sync_warp", nullptr, place, [this](Warp& w) {
      meet(w);
      return true;
    });
  }

  // Barrier `id` of the block: 0 for all its warps that have not ended, 1 .. 15 for `count` threads.
  void sync(int id, int count, const char* kind, Place place) {
    int arguments[2] = {id, count};
    gather(kind, arguments, place, [this, kind](Warp& w) {
      const int* first = static_cast<const int*>(w.arguments[0]);
      for (void* a : w.arguments)
        if (std::memcmp(a, first, sizeof(int[2])))
          fail(std::string(kind) + ": the lanes of a warp name different barriers or counts");
      const int barrier_id = first[0], threads_of_it = first[1];
      if (barrier_id < 0 || barrier_id > 15 ||
          (barrier_id && (threads_of_it <= 0 || threads_of_it % 32 || threads_of_it > threads)))
        fail(std::string(kind) + "(" + std::to_string(barrier_id) + ", " + std::to_string(threads_of_it) +
             "): ids are 1 .. 15, counts whole warps of the block");
      Barrier& b = w.block->barriers[barrier_id];
      const int needed = barrier_id ? threads_of_it / 32 : w.block->live;
      if (barrier_id && b.arrived && b.needed != needed)
        fail(std::string(kind) + "(" + std::to_string(barrier_id) + ", " + std::to_string(threads_of_it) +
             ") at " + w.place.text() + ", but " + name_of(*b.waiting[0]) +
             " waits at the same barrier for " + std::to_string(32 * b.needed) + " threads at " +
             b.waiting[0]->place.text());
      b.needed = needed;
      arrive(b, w);
      hold(b, w);
      if (b.arrived == needed) release(b, true);
      return false;
    });
  }

  // A phase of a cluster's barrier is over when every warp that has not ended has arrived. Phases alternate
  // between two barriers: a warp that arrives at the next but one knows that all have waited for this one.
  // relaxed: what was done before arriving is not ordered before what others do after waiting.
  void cluster_arrive(Place place, bool relaxed = false) {
    gather(relaxed ? "cluster_arrive_relaxed" : "cluster_arrive", nullptr, place, [this, relaxed](Warp& w) {
      if (w.cluster_arrived) fail("cluster_arrive at " + w.place.text() + ", twice without cluster_wait");
      w.cluster_arrived = true;
      Barrier& b = w.block->cluster->barriers[w.cluster_phase & 1];
      if (b.phase != w.cluster_phase) {
        b.phase = w.cluster_phase;
        b.arrived = 0;
        b.joined.clear();
      }
      if (!relaxed)
        arrive(b, w);
      else
        ++b.arrived, b.joined.warps.resize(w.knows.warps.size());
      if (b.arrived == w.block->cluster->live) release(b, false);
      return true;
    });
  }

  void cluster_wait(Place place) {
    gather("cluster_wait", nullptr, place, [this](Warp& w) {
      if (!w.cluster_arrived) fail("cluster_wait at " + w.place.text() + " without cluster_arrive");
      Barrier& b = w.block->cluster->barriers[w.cluster_phase & 1];
      w.cluster_arrived = false;
      ++w.cluster_phase;
      hold(b, w);
      b.needed = w.block->cluster->live;
      if (b.arrived >= b.needed) release(b, false);
      return false;
    });
  }

  void pause(Place place) {
    now->paused = place;
    if (++idle_ > 100000 + 1000 * static_cast<int64_t>(ready_.size() + 1))
      fail("deadlock: every thread that can run pauses, nothing else happens for long. Waiting:\n" + waiting());
    yield();
    now->paused = {};
  }

  void progress() { idle_ = 0; }

  // In a random order only, now and then: another thread's turn.
  void interrupt() {
    if (!random_) return;
    if (!now->copies.empty() && draw() % 4 == 0) copy_one(draw() % now->copies.size());
    if (draw() % 32 == 0) yield();
  }

  // --- shared memory ---------------------------------------------------------------------------------------
  size_t offset(const void* p, size_t bytes, size_t alignment, const char* kind, Place place) {
    const Block& b = block();
    const size_t o = static_cast<const unsigned char*>(p) - b.shared.get();
    if (o > b.shared_bytes || bytes > b.shared_bytes - o)
      fail(std::string(kind) + " of " + std::to_string(bytes) + " bytes at byte " +
           std::to_string(static_cast<int64_t>(o)) + " of the block's " + std::to_string(b.shared_bytes) +
           " bytes of shared memory, at " + place.text());
    if (o % alignment)
      fail(std::string(kind) + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(o) +
           " of shared memory, which is misaligned, at " + place.text());
    return o;
  }

  void read(const Thread& t, size_t at, size_t bytes, const char* kind, Place place) {
    if (!races_) return;
    Conflict c;
    if (!block().shadow->read(at, bytes, accessor(t), c)) race(t, block(), c, kind, place);
  }

  void write(Block& owner, size_t at, size_t bytes, const char* kind, Place place, bool pending = false) {
    if (!races_) return;
    Conflict c;
    if (!owner.shadow->write(at, bytes, accessor(*now), pending ? kPending : now->clock, place, c))
      race(*now, owner, c, kind, place);
  }

  void store_remote(uint32_t* p, int rank, uint32_t v, Place place) {
    const size_t at = offset(p, 4, 4, "store_remote", place);
    Cluster& c = *block().cluster;
    if (rank < 0 || rank >= cluster)
      fail("store_remote to block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster));
    Block& there = *c.blocks[rank];
    if (&there != &block() && !warp().cluster_phase)
      fail("store_remote at " + place.text() + " before a cluster barrier: the other block may not have started");
    if (!there.live)
      fail("store_remote at " + place.text() + " to block " + std::to_string(there.index) +
           ", which has ended");
    write(there, at, 4, "store_remote", place);
    if (&there != &block()) there.remote[number(*now)] = now->clock;
    std::memcpy(there.shared.get() + at, &v, 4);
    interrupt();
  }

  void copy_async(void* p, const void* source, bool valid, Place place) {
    const size_t at = offset(p, 4, 4, "copy_async4", place);
    if (valid && reinterpret_cast<uintptr_t>(source) % 4)
      fail("copy_async4 from a misaligned address, at " + place.text());
    write(block(), at, 4, "copy_async4", place, true);
    now->copies.push_back({static_cast<uint32_t*>(p), valid ? static_cast<const uint32_t*>(source) : nullptr});
    now->copied.push_back(at);
    interrupt();
  }

  void wait_copies() {
    while (!now->copies.empty()) copy_one(now->copies.size() - 1);
    if (races_)
      for (size_t at : now->copied) block().shadow->complete(at, now->clock);
    now->copied.clear();
  }

  // --- releases and acquires through global memory ---------------------------------------------------------
  void acquire(const void* p) {
    if (!races_) return;
    auto it = locations_.find({p, block().cluster->index});
    if (it == locations_.end()) return;
    if (!now->own) now->own = std::make_unique<Knowledge>(it->second);
    else now->own->join(it->second);
  }

  void release_to(const void* p) {
    if (!races_) return;
    Knowledge& k = locations_[{p, block().cluster->index}];
    if (k.warps.empty()) k.warps.resize(warp().knows.warps.size());
    k.join(warp().knows);
    if (now->own) k.join(*now->own);
    k.released.push_back({number(*now), ++now->clock});
  }

 private:
  bool random_ = false, races_ = true;
  uint64_t state_ = 1;
  int64_t idle_ = 0;
  std::vector<Thread*> ready_;  // a queue from head_ on when threads take turns
  size_t head_ = 0;
  std::vector<std::unique_ptr<Cluster>> live_;
  std::map<std::pair<const void*, int>, Knowledge> locations_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;
  Cluster* finished_ = nullptr;
  Fiber host_;

  uint32_t draw() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1dull) >> 32);
  }

  uint32_t number(const Warp& w) const { return w.block->rank * (threads / 32) + w.index; }
  uint32_t number(const Thread& t) const { return 32 * number(*t.warp) + t.lane; }
  Accessor accessor(const Thread& t) const { return {number(t), t.clock, &t.warp->knows, t.own.get()}; }

  [[noreturn]] void race(const Thread& t, const Block& owner, const Conflict& c, const char* kind, Place place) {
    const Thread& other = block().cluster->warp(c.thread / 32)->lanes[c.thread % 32];
    throw std::runtime_error("race on byte " + std::to_string(c.offset) + " of the shared memory of block " +
                             std::to_string(owner.index) + ": " + kind + " by " + name_of(t) + " at " +
                             place.text() + " and " + c.kind + " by " + name_of(other) +
                             (c.place.file ? " at " + c.place.text() : ""));
  }

  void copy_one(size_t i) {
    auto& copies = now->copies;
    if (copies[i].from) std::memcpy(copies[i].to, copies[i].from, 4);
    else std::memset(copies[i].to, 0, 4);
    copies[i] = copies.back();
    copies.pop_back();
  }

  // --- who runs next ---------------------------------------------------------------------------------------
  void ready(Thread* t) { ready_.push_back(t); }

  void resume(Warp& w) {  // all but the running thread
    for (Thread& t : w.lanes)
      if (&t != now) ready(&t);
  }

  Thread* next() {
    if (random_) {
      if (ready_.empty()) return nullptr;
      const size_t i = (static_cast<uint64_t>(draw()) * ready_.size()) >> 32;
      Thread* t = ready_[i];
      ready_[i] = ready_.back();
      ready_.pop_back();
      return t;
    }
    if (head_ == ready_.size()) return nullptr;
    Thread* t = ready_[head_++];
    if (head_ >= 4096 && 2 * head_ >= ready_.size()) {
      ready_.erase(ready_.begin(), ready_.begin() + head_);
      head_ = 0;
    }
    return t;
  }

  void yield() {
    ready(now);
    wait();
  }

  void wait() {  // until another thread makes this one ready
    Thread* me = now;
    Thread* t = next();
    if (!t) fail("deadlock: no thread can run. Waiting:\n" + waiting());
    if (t == me) return;
    now = t;
    me->fiber.switch_to(t->fiber);
  }

  // --- barriers --------------------------------------------------------------------------------------------
  void meet(Warp& w) {  // the lanes learn of each other
    if (!races_) return;
    uint32_t clock = 0;
    for (Thread& t : w.lanes) {
      clock = std::max(clock, t.clock);
      if (t.own) w.knows.join(*t.own), t.own.reset();
    }
    for (Thread& t : w.lanes) t.clock = clock + 1;
    w.knows.warps[number(w)] = clock + 1;
  }

  void arrive(Barrier& b, Warp& w) {
    meet(w);
    if (races_) {
      if (b.joined.warps.empty()) b.joined.warps.resize(w.knows.warps.size());
      b.joined.join(w.knows);
    }
    ++b.arrived;
  }

  void hold(Barrier& b, Warp& w) {
    w.waits = &b;
    b.waiting.push_back(&w);
  }

  // All have arrived: those that wait go on.
  void release(Barrier& b, bool reset) {
    for (Warp* w : b.waiting) {
      if (races_) w->knows.join(b.joined);
      w->waits = nullptr;
      for (Thread& t : w->lanes) ready(&t);
    }
    b.waiting.clear();
    if (reset) {
      b.arrived = 0;
      b.joined.clear();
    }
    progress();
  }

  // --- beginnings and ends ---------------------------------------------------------------------------------
  void start_cluster(int index, size_t shared_bytes);
  void end_cluster();
  void end_thread();
  void end_block(Block& b);
  void forget();
  std::string waiting() const;
  static void entry();
};

inline Grid grid;

inline std::string Grid::waiting() const {
  std::string text;
  int lines = 0;
  for (const auto& c : live_)
    for (const auto& b : c->blocks)
      for (const auto& w : b->warps) {
        std::string at;
        if (w->waits)
          at = " at " + std::string(w->kind) + " " + w->place.text() + " (" +
               std::to_string(w->waits->arrived) + " of " + std::to_string(w->waits->needed) +
               " warps have arrived)";
        else if (w->present)
          at = " at " + std::string(w->kind) + " " + w->place.text() + " (" +
               std::to_string(__builtin_popcount(w->present)) + " of 32 lanes have arrived)";
        for (const Thread& t : w->lanes)
          if (t.paused.file) {
            at += " lane " + std::to_string(t.lane) + " pauses at " + t.paused.text();
            break;
          }
        if (!at.empty() && ++lines <= 64) text += "  " + name_of(*w) + at + "\n";
      }
  if (lines > 64) text += "  and " + std::to_string(lines - 64) + " more warps\n";
  return text;
}

inline void Grid::start_cluster(int index, size_t shared_bytes) {
  auto c = std::make_unique<Cluster>();
  const int warps = threads / 32;
  c->index = index;
  c->live = cluster * warps;
  for (int rank = 0; rank < cluster; ++rank) {
    auto b = std::make_unique<Block>();
    b->cluster = c.get();
    b->index = index * cluster + rank;
    b->rank = rank;
    b->live = warps;
    b->shared_bytes = shared_bytes;
    b->shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, (shared_bytes / 1024 + 1) * 1024)));
    if (!b->shared) throw std::bad_alloc();
    std::memset(b->shared.get(), 0xff, shared_bytes);
    if (races_) b->shadow = std::make_unique<Shadow>(shared_bytes, warps, rank * warps);
    for (int i = 0; i < warps; ++i) {
      auto w = std::make_unique<Warp>();
      w->block = b.get();
      w->index = i;
      if (races_) {
        w->knows.warps.resize(cluster * warps);
        w->knows.warps[rank * warps + i] = 1;
      }
      for (int lane = 0; lane < 32; ++lane) {
        Thread& t = w->lanes[lane];
        t.warp = w.get();
        t.lane = lane;
        t.stack = stacks.take();
        t.fiber.start(t.stack, (32 * i + lane) * 320 % 4096, entry);
        ready(&t);
      }
      b->warps.push_back(std::move(w));
    }
    c->blocks.push_back(std::move(b));
  }
  live_.push_back(std::move(c));
}

inline void Grid::end_thread() {
  Warp& w = warp();
  wait_copies();
  if (w.present) fail("ends while other lanes of its warp wait at " + std::string(w.kind) + " at " + w.place.text());
  now->ended = true;
  if (++w.ended < 32) return;
  if (w.cluster_arrived) fail("ends between cluster_arrive and cluster_wait");
  meet(w);
  progress();
  Block& b = *w.block;
  Cluster& c = *b.cluster;
  --b.live, --c.live;
  Barrier& whole = b.barriers[0];
  if (!whole.waiting.empty() && whole.arrived >= b.live) release(whole, true);
  for (Barrier& phase : c.barriers)
    if (!phase.waiting.empty() && phase.arrived >= c.live) release(phase, false);
  if (!b.live) end_block(b);
  if (!c.live) finished_ = &c;
}

// The block must know of every store from another one before its memory goes away.
inline void Grid::end_block(Block& b) {
  if (!races_) return;
  for (const auto& [thread, stamp] : b.remote) {
    bool known = false;
    for (const auto& w : b.warps) known = known || w->knows.of(thread, stamp);
    if (!known)
      throw std::runtime_error("race: block " + std::to_string(b.index) +
                               " ends without a barrier after a store_remote to it by " +
                               name_of(b.cluster->warp(thread / 32)->lanes[thread % 32]));
  }
}

inline void Grid::entry() {
  Grid& g = grid;
  try {
    (*g.kernel_)();
    g.end_thread();
  } catch (...) {
    g.failure_ = std::current_exception();
  }
  Thread* me = g.now;
  Thread* t = g.failure_ || g.finished_ ? nullptr : g.next();
  g.now = t;
  me->fiber.switch_to(t ? t->fiber : g.host_);
  std::abort();  // a thread that has ended does not run again
}

inline void Grid::forget() {
  for (const auto& c : live_)
    for (const auto& b : c->blocks)
      for (const auto& w : b->warps)
        for (Thread& t : w->lanes) stacks.give(t.stack);
  live_.clear();
  ready_.clear();
  locations_.clear();
  head_ = 0;
  idle_ = 0;
  now = nullptr;
  finished_ = nullptr;
  kernel_ = nullptr;
}

inline void Grid::end_cluster() {
  for (size_t i = 0; i < live_.size(); ++i)
    if (live_[i].get() == finished_) {
      for (const auto& b : finished_->blocks)
        for (const auto& w : b->warps)
          for (Thread& t : w->lanes) stacks.give(t.stack);
      live_.erase(live_.begin() + i);
      break;
    }
  finished_ = nullptr;
}

inline void Grid::run(int blocks, int threads_, int cluster_, size_t shared_bytes,
                      const std::function<void()>& kernel) {
  const Options& o = options();
  if (blocks < 0 || cluster_ < 1 || blocks % cluster_)
    throw std::invalid_argument("launch: the grid must be whole clusters");
  if (threads_ < 32 || threads_ > 1024 || threads_ % 32)
    throw std::invalid_argument("launch: a block is 1 .. 32 whole warps");
  if (o.resident < cluster_) throw std::invalid_argument("launch: fewer resident blocks than a cluster has");
  if (kernel_) throw std::logic_error("launch inside a kernel");
  threads = threads_, cluster = cluster_;
  races_ = o.races;
  random_ = o.seed != 0;
  state_ = 0x9e3779b97f4a7c15ull * (o.seed + 1ull);
  kernel_ = &kernel;
  failure_ = nullptr;
  try {
    int started = 0;
    while (!failure_) {
      for (; started < blocks / cluster && (static_cast<int>(live_.size()) + 1) * cluster <= o.resident; ++started)
        start_cluster(started, shared_bytes);
      if (live_.empty()) break;
      now = next();
      if (!now) fail("deadlock: no thread can run. Waiting:\n" + waiting());
      host_.switch_to(now->fiber);
      now = nullptr;
      if (finished_ && !failure_) end_cluster();
    }
  } catch (...) {
    failure_ = std::current_exception();
  }
  forget();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Runs kernel() on every thread of a grid. Throws std::runtime_error for what a device would hang on, answer
// with garbage or trap.
inline void launch(int blocks, int threads, int cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  grid.run(blocks, threads, cluster, shared_bytes, kernel);
}

}  // namespace hope::emulator
