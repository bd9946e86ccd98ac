// Memory: addresses checked against what a launch may touch, accesses shown to the race detector, counted.
#pragma once
#include <array>

#include "arithmetic.h"

namespace hope::ptx {

enum Space : int32_t { kGeneric = 0, kGlobal = 1, kShared = 2, kSharedCluster = 3, kLocal = 4 };
enum Order : int32_t { kWeak = 0, kRelaxed = 1, kAcquire = 2, kRelease = 3, kAcquireRelease = 4, kReadOnly = 5 };

inline std::string place(const Grid& g, uint64_t address) {
  const Region* below = nullptr;
  for (const Region& r : g.regions)
    if (r.address <= address && (!below || r.address > below->address)) below = &r;
  if (!below) return "below all memory of the launch";
  return "at byte " + std::to_string(address - below->address) + " of " + below->name + ", which has " +
         std::to_string(below->bytes);
}

[[noreturn]] inline void race(Grid& g, const Conflict& c, int lane, const std::string& where) {
  g.fail("race at " + where + ": " + c.what + " by " + g.thread_name(c.thread) +
             " is not ordered before\n    " + g.line_text(c.line),
         lane);
}

// One lane's memory: where it is on the host, and who watches over it.
struct Place {
  unsigned char* host;
  Shadow* shadow;
  size_t offset;
  Block* block;    // of shared memory
  Region* region;  // of global memory
};

inline Place find_place(Warp& w, int lane, Space space, uint64_t address, size_t bytes, size_t alignment) {
  Grid& g = *w.grid;
  if (address % alignment) g.fail("misaligned: address " + std::to_string(address), lane);
  if (space == kGeneric) {
    if (address >> 56 == kSharedWindow >> 56) space = kSharedCluster, address -= kSharedWindow;
    else if (address >> 56 == kLocalWindow >> 56) space = kLocal, address -= kLocalWindow;
    else space = kGlobal;
  }
  if (space == kLocal) {
    const size_t has = g.program.local_bytes;
    if (address > has || bytes > has - address)
      g.fail("out of bounds: " + std::to_string(bytes) + " bytes at byte " + std::to_string(address) +
                 " of " + std::to_string(has) + " bytes of local memory",
             lane);
    return {w.local.get() + lane * has + address, nullptr, 0, nullptr, nullptr};
  }
  if (space == kGlobal) {
    if (g.regions.empty()) g.fail("out of bounds: the launch has no global memory", lane);
    Region* last = &g.regions[g.last_region];
    if (address - last->address > last->bytes || bytes > last->bytes - (address - last->address)) {
      Region* found = nullptr;
      for (Region& r : g.regions)
        if (address - r.address <= r.bytes && bytes <= r.bytes - (address - r.address)) found = &r;
      if (!found) g.fail("out of bounds: " + std::to_string(bytes) + " bytes " + place(g, address), lane);
      last = found, g.last_region = found - g.regions.data();
    }
    if (g.options.races && !last->shadow)
      last->shadow = std::make_unique<Shadow>(last->bytes, g.program.single_bytes);
    return {reinterpret_cast<unsigned char*>(address), last->shadow.get(), address - last->address, nullptr,
            last};
  }
  Block* b = w.block;
  if (space == kSharedCluster && address >> 32 == 0) {
    const uint32_t rank = static_cast<uint32_t>(address) >> kRankShift;
    // addresses of the block itself are those of the cluster too: rank 0 is "this block", rank r + 1 is
    // block r
    if (rank) {
      if (rank > b->cluster->blocks.size())
        g.fail("no block " + std::to_string(rank - 1) + " in the cluster", lane);
      b = b->cluster->blocks[rank - 1].get();
    }
    address &= (1u << kRankShift) - 1;
  }
  if (address > b->shared_bytes || bytes > b->shared_bytes - address)
    g.fail("out of bounds: " + std::to_string(bytes) + " bytes at byte " + std::to_string(address) + " of " +
               std::to_string(b->shared_bytes) + " bytes of shared memory",
           lane);
  return {b->shared.get() + address, b->shadow.get(), static_cast<size_t>(address), b, nullptr};
}

inline std::string where(const Place& p) {
  return p.region ? "byte " + std::to_string(p.offset) + " of " + p.region->name
                  : "byte " + std::to_string(p.offset) + " of shared memory";
}

inline void check_other_block(Warp& w, int lane, const Place& p) {
  if (!p.block || p.block == w.block) return;
  if (!w.cluster_phase) w.grid->fail("accesses a block of the cluster that may not have started", lane);
  if (!p.block->live) w.grid->fail("accesses a block of the cluster that has ended", lane);
  p.block->remote[w.id * 32 + lane] = w.clock;
}

inline void check_read(Warp& w, int lane, const Place& p, size_t bytes, Access kind) {
  check_other_block(w, lane, p);
  if (!p.shadow) return;
  Conflict c;
  if (!p.shadow->read(p.offset, bytes, w.accessor(lane), w.grid->at->line, kind, c))
    race(*w.grid, c, lane, where(p));
}

// `same`: what is written is there already. `addresses`, of the lanes in `mask`: of lanes that one
// instruction lets store to one address one wins, "which is undefined" (CUDA's programming guide); here the
// last one does. Compilers count on it for numbers that lanes hold together: where a * b + c was contracted
// they differ in the last bit.
inline void check_write(Warp& w, int lane, const Place& p, size_t bytes, Access kind, bool pending = false,
                        bool same = false, const uint64_t* addresses = nullptr, uint32_t mask = 0) {
  if (p.shadow) {
    Conflict c;
    const auto together = [&] {
      const uint32_t me = w.accessor(lane).thread, other = c.thread;
      return addresses && other / 32 == me / 32 && other < me && (mask >> other % 32 & 1) &&
             addresses[other % 32] == addresses[lane];
    };
    const auto write = [&](bool again) {
      return p.shadow->write(p.offset, bytes, w.accessor(lane), pending ? kPending : w.clock,
                             w.grid->at->line, kind, c, again);
    };
    if (!write(same) && !(together() && write(true)))
      race(*w.grid, c, lane, where(p));
  }
  if (p.block && p.shadow && !p.block->under_product.empty())
    for (size_t unit = p.offset / 16; unit <= (p.offset + bytes - 1) / 16; ++unit)
      if (p.block->under_product[unit])
        w.grid->fail("race at " + where(p) + ": a product that nobody has waited for reads it", lane);
  check_other_block(w, lane, p);
}

// Async-proxy accesses see a thread's plain writes after a fence.proxy.async: of the writer, known to the
// reader, or of the reader, who knew of them.
inline void check_passed_to_proxy(Warp& w, uint32_t lanes, Shadow& shadow, size_t offset, size_t bytes,
                                  uint32_t spaces) {
  Grid& g = *w.grid;
  const Accessor who = w.accessor(std::countr_zero(lanes));
  const uint32_t warps = g.shape.threads / 32;
  shadow.each_write(offset, bytes, [&](uint32_t thread, uint32_t stamp, int32_t line) {
    if (w.all_fenced.has(lanes, spaces, thread, stamp) || w.some_fenced.has(lanes, spaces, thread, stamp))
      return true;
    for (const auto& b : w.block->cluster->blocks) {  // a cluster that has ended is ordered before this one
      if (static_cast<uint32_t>(b->index) != thread / 32 / warps) continue;
      const auto& fences = b->warps[thread / 32 % warps]->proxy_fences;
      const auto fence = std::find_if(fences.begin(), fences.end(), [&](const ProxyFence& f) {
        return f.clock > stamp && (f.spaces & spaces) && (f.lanes >> thread % 32 & 1);
      });
      if (fence == fences.end() || !who.knows(thread, fence->clock))
        g.fail("no fence.proxy.async between this and what it reads, which was written by " +
               g.thread_name(thread) + "\n    " + g.line_text(line));
    }
    return true;
  });
}

// --- counts
// --------------------------------------------------------------------------------------------------
inline void measure(Warp& w, const Instruction& i, Space space, const uint64_t* addresses, size_t bytes,
                    uint32_t mask) {
  Count& count = w.grid->count(i);
  count.bytes += bytes * std::popcount(mask);
  if (!w.grid->options.measure || !mask) return;
  if (space == kLocal) return;
  // a warp's generic addresses are all of the space of its first one
  if (space == kGeneric)
    space = addresses[std::countr_zero(mask)] >> 56 == kSharedWindow >> 56 ? kSharedCluster : kGlobal;
  if (space == kGlobal) {
    std::array<uint64_t, 32 * 16> found;
    size_t n = 0;
    for (uint32_t m = mask; m; m &= m - 1) {
      const uint64_t a = addresses[std::countr_zero(m)];
      for (uint64_t s = a / 32; s <= (a + bytes - 1) / 32; ++s) found[n++] = s;
    }
    std::sort(found.begin(), found.begin() + n);
    count.sectors += std::unique(found.begin(), found.begin() + n) - found.begin();
    return;
  }
  // 32 banks of 4 bytes; 8-byte accesses go by halves of a warp, 16-byte ones by quarters; a word asked for
  // by several lanes is sent once
  const int lanes_at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uint64_t words[32][4];
    int in_bank[32] = {}, most = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (uint64_t a = addresses[lane] / 4; a <= (addresses[lane] + bytes - 1) / 4; ++a) {
        const int bank = a % 32;
        bool known = false;
        for (int k = 0; k < std::min(in_bank[bank], 4); ++k) known = known || words[bank][k] == a;
        if (known) continue;
        if (in_bank[bank] < 4) words[bank][in_bank[bank]] = a;
        most = std::max(most, ++in_bank[bank]);
      }
    }
    count.wavefronts += most;
  }
}

// --- loads and stores
// ------------------------------------------------------------------------------------------
struct MemoryForm {  // attributes before an instruction's registers
  Space space;
  Order order;
  Scope scope;  // of the order
  int bytes, count;
  bool is_signed;
  int register_bytes;
  int64_t offset;
};

constexpr int kMemoryAttributes = 9;

inline MemoryForm memory_form(const Instruction& i) {
  const int32_t* o = i.operands;
  return {static_cast<Space>(o[0]),
          static_cast<Order>(o[1]),
          static_cast<Scope>(o[2]),
          o[3],
          o[4],
          o[5] != 0,
          o[6],
          static_cast<int64_t>(static_cast<uint32_t>(o[7])) | static_cast<int64_t>(o[8]) << 32};
}

// Addresses of all lanes; `at` is a register of 4 or 8 bytes, told by the sign of `wide`.
inline void addresses_of(Warp& w, int32_t base, bool wide, int64_t offset, uint64_t* to) {
  if (wide) {
    const uint64_t* a = static_cast<const uint64_t*>(w.lanes(base));
    for (int lane = 0; lane < 32; ++lane) to[lane] = a[lane] + offset;
  } else {
    const uint32_t* a = static_cast<const uint32_t*>(w.lanes(base));
    for (int lane = 0; lane < 32; ++lane)
      to[lane] = static_cast<uint32_t>(a[lane] + static_cast<uint32_t>(offset));
  }
}

// A number of 1, 2, 4 or 8 bytes, extended to 8.
inline uint64_t number_at(const unsigned char* from, int bytes, bool is_signed) {
  auto as = [&](auto x) {
    std::memcpy(&x, from, sizeof x);
    return is_signed
               ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<std::make_signed_t<decltype(x)>>(x)))
               : x;
  };
  return bytes == 4   ? as(uint32_t{})
         : bytes == 8 ? as(uint64_t{})
         : bytes == 2 ? as(uint16_t{})
                      : as(uint8_t{});
}
inline void put_number(Warp& w, int32_t operand, int register_bytes, int lane, uint64_t v) {
  if (register_bytes == 8) static_cast<uint64_t*>(w.lanes(operand))[lane] = v;
  else
    static_cast<uint32_t*>(w.lanes(operand))[lane] =
        static_cast<uint32_t>(register_bytes == 2 ? v & 0xffff : v);
}

// operands: attributes, wide, base, registers
inline Next load(Warp& w, const Instruction& i, uint32_t mask) {
  const MemoryForm f = memory_form(i);
  const int32_t* rest = i.operands + kMemoryAttributes;
  uint64_t addresses[32];
  addresses_of(w, rest[1], rest[0], f.offset, addresses);
  const size_t bytes = size_t(f.bytes) * f.count;
  const bool weak = f.order == kWeak || f.order == kReadOnly;
  const Access kind = weak ? Access::kPlain : Access::kAtomic;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const Place p = find_place(w, lane, f.space, addresses[lane], bytes, bytes);
    if (f.order == kReadOnly && p.shadow && p.shadow->written(p.offset, bytes))
      w.grid->fail("reads with .nc what this launch has written: " + where(p), lane);
    if (f.order == kAcquire) w.grid->acquire(w, lane, reinterpret_cast<uint64_t>(p.host), f.scope);
    else if (f.order == kRelaxed) w.grid->relaxed_read(w, lane, reinterpret_cast<uint64_t>(p.host), f.scope);
    check_read(w, lane, p, bytes, kind);
    for (int k = 0; k < f.count; ++k)
      put_number(w, rest[2 + k], f.register_bytes, lane,
                 number_at(p.host + k * f.bytes, f.bytes, f.is_signed));
  }
  measure(w, i, f.space, addresses, bytes, mask);
  return weak ? Next::kFollowing : Next::kTurn;
}

inline Next store(Warp& w, const Instruction& i, uint32_t mask) {
  const MemoryForm f = memory_form(i);
  const int32_t* rest = i.operands + kMemoryAttributes;
  uint64_t addresses[32];
  addresses_of(w, rest[1], rest[0], f.offset, addresses);
  const size_t bytes = size_t(f.bytes) * f.count;
  const Access kind = f.order == kWeak ? Access::kPlain : Access::kAtomic;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const Place p = find_place(w, lane, f.space, addresses[lane], bytes, bytes);
    unsigned char values[64];
    for (int k = 0; k < f.count; ++k) {
      const uint64_t v = f.register_bytes == 8 ? static_cast<uint64_t*>(w.lanes(rest[2 + k]))[lane]
                                                : static_cast<uint32_t*>(w.lanes(rest[2 + k]))[lane];
      std::memcpy(values + k * f.bytes, &v, f.bytes);
    }
    const bool same = p.block && kind == Access::kPlain && !std::memcmp(p.host, values, bytes);
    check_write(w, lane, p, bytes, kind, false, same, p.block && kind == Access::kPlain ? addresses : nullptr,
                mask);
    if (kind == Access::kAtomic)
      w.grid->relaxed_write(w, lane, reinterpret_cast<uint64_t>(p.host), f.scope, true);
    if (f.order == kRelease) w.grid->release(w, lane, reinterpret_cast<uint64_t>(p.host), f.scope);
    std::memcpy(p.host, values, bytes);
  }
  measure(w, i, f.space, addresses, bytes, mask);
  if (mask) w.grid->progress();
  return Next::kFollowing;
}

// operands: attributes, wide, base, d (or -1), a, b (of cas, or -1)
template <class T, class F> constexpr Run atomic(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    const MemoryForm f = memory_form(i);
    const int32_t* rest = i.operands + kMemoryAttributes;
    uint64_t addresses[32];
    addresses_of(w, rest[1], rest[0], f.offset, addresses);
    bool changed = false;
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      const Place p = find_place(w, lane, f.space, addresses[lane], sizeof(T), sizeof(T));
      const uint64_t key = reinterpret_cast<uint64_t>(p.host);
      if (f.order == kAcquire || f.order == kAcquireRelease) w.grid->acquire(w, lane, key, f.scope);
      else w.grid->relaxed_read(w, lane, key, f.scope);
      check_write(w, lane, p, sizeof(T), Access::kAtomic);
      if (f.order == kRelease || f.order == kAcquireRelease) w.grid->release(w, lane, key, f.scope);
      else w.grid->relaxed_write(w, lane, key, f.scope, false);
      T old;
      std::memcpy(&old, p.host, sizeof(T));
      const T a = number<T>(lanes_of<T>(w, rest[3])[lane]);
      const T b = rest[4] < 0 ? T{} : number<T>(lanes_of<T>(w, rest[4])[lane]);
      const T now = F{}(old, a, b);
      changed = changed || std::memcmp(&now, &old, sizeof(T));
      std::memcpy(p.host, &now, sizeof(T));
      if (rest[2] >= 0) lanes_of<T>(w, rest[2])[lane] = word<T>(old);
    }
    measure(w, i, f.space, addresses, sizeof(T), mask);
    if (changed) w.grid->progress();
    return Next::kTurn;
  };
}

// A read of global memory that is under way until it is completed as one of the thread `as`.
inline Region* check_async_read(Warp& w, int lane, uint64_t from, size_t bytes, uint32_t as) {
  const Place p = find_place(w, lane, kGlobal, from, bytes, 1);
  Conflict c;
  if (p.shadow && !p.shadow->read_pending(p.offset, bytes, w.accessor(lane), as, w.grid->at->line, c))
    race(*w.grid, c, lane, where(p));
  return p.region;
}

// operands: bytes, shared wide, shared base, shared offset, global base (8 bytes), global offset (two words),
// source bytes (a register of 4 bytes, or -1)
inline Next copy_async(Warp& w, const Instruction& i, uint32_t mask) {
  const int32_t* o = i.operands;
  const uint32_t bytes = o[0];
  uint64_t to[32], from[32];
  addresses_of(w, o[2], o[1], o[3], to);
  addresses_of(w, o[4], true,
               static_cast<int64_t>(static_cast<uint32_t>(o[5])) | static_cast<int64_t>(o[6]) << 32, from);
  uint32_t reading = 0;  // lanes that copy anything: the others fill with zeros, and read nothing
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const uint32_t valid = o[7] < 0 ? bytes : static_cast<uint32_t*>(w.lanes(o[7]))[lane];
    if (valid > bytes) w.grid->fail("more source bytes than the copy has", lane);
    const Place p = find_place(w, lane, kShared, to[lane], bytes, bytes);
    check_write(w, lane, p, bytes, Access::kCopy, true);
    Region* region = nullptr;
    if (valid) {
      if (from[lane] % bytes) w.grid->fail("misaligned: source address " + std::to_string(from[lane]), lane);
      region = check_async_read(w, lane, from[lane], valid, w.id * 32 + lane);
      reading |= 1u << lane;
    }
    w.copies.push_back({lane, w.copy_groups[lane], p.offset, from[lane], bytes, valid, region, false});
  }
  measure(w, i, kGlobal, from, bytes, reading);
  w.grid->progress();
  return Next::kFollowing;
}

// operands: bytes, count, signed, register bytes, offset, base (-1, or a register of 8 bytes), registers
inline Next load_parameter(Warp& w, const Instruction& i, uint32_t mask) {
  const int32_t* o = i.operands;
  const Grid& g = *w.grid;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const int64_t base = o[5] < 0 ? 0 : static_cast<int64_t>(static_cast<uint64_t*>(w.lanes(o[5]))[lane]);
    const int64_t at = base + o[4];
    if (at < 0 || at + o[0] * o[1] > static_cast<int64_t>(g.parameter_bytes))
      w.grid->fail("out of bounds: byte " + std::to_string(at) + " of " + std::to_string(g.parameter_bytes) +
                       " bytes of parameters",
                   lane);
    for (int k = 0; k < o[1]; ++k)
      put_number(w, o[6 + k], o[3], lane, number_at(g.parameters + at + k * o[0], o[0], o[2]));
  }
  return Next::kFollowing;
}

template <class T> inline void add_atomics(Forms& f, const std::string& t) {
  f["atom.add." + t] = {atomic<T>([](T old, T a, T) { return static_cast<T>(old + a); })};
  if constexpr (std::is_integral_v<T>) {
    f["atom.min." + t] = {atomic<T>([](T old, T a, T) { return std::min(old, a); })};
    f["atom.max." + t] = {atomic<T>([](T old, T a, T) { return std::max(old, a); })};
    f["atom.exch." + t] = {atomic<T>([](T, T a, T) { return a; })};
    f["atom.cas." + t] = {atomic<T>([](T old, T a, T b) { return old == a ? b : old; })};
    f["atom.and." + t] = {atomic<T>([](T old, T a, T) { return static_cast<T>(old & a); })};
    f["atom.or." + t] = {atomic<T>([](T old, T a, T) { return static_cast<T>(old | a); })};
  }
}

inline void add_memory(Forms& f) {
  f["ld"] = {load};
  f["st"] = {store};
  f["ld.param"] = {load_parameter};
  add_atomics<uint32_t>(f, "u32"), add_atomics<int32_t>(f, "s32"), add_atomics<uint64_t>(f, "u64");
  add_atomics<int64_t>(f, "s64"), add_atomics<uint32_t>(f, "b32"), add_atomics<uint64_t>(f, "b64");
  add_atomics<float>(f, "f32");
  f["cp.async"] = {copy_async};
  f["cp.async.commit_group"] = {[](Warp& w, const Instruction&, uint32_t mask) {
    for (uint32_t m = mask; m; m &= m - 1) ++w.copy_groups[std::countr_zero(m)];
    return Next::kFollowing;
  }};
  f["cp.async.wait_group"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    w.grid->wait_copies(w, mask, i.operands[0]);
    return Next::kFollowing;
  }};
  f["cp.async.wait_all"] = {[](Warp& w, const Instruction&, uint32_t mask) {
    for (uint32_t m = mask; m; m &= m - 1) ++w.copy_groups[std::countr_zero(m)];
    w.grid->wait_copies(w, mask, 0);
    return Next::kFollowing;
  }};
  // operands: scope
  f["fence"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    if (mask) w.grid->fence(w, mask, static_cast<Scope>(i.operands[0]));
    return Next::kFollowing;
  }};
  // operands: spaces
  f["fence.proxy.async"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    if (!mask) return Next::kFollowing;
    const uint32_t spaces = i.operands[0];
    w.proxy_fences.push_back({++w.clock, mask, spaces});
    (mask == 0xffffffffu ? w.all_fenced : w.some_fenced) = {mask, spaces, w.knows.warps};
    return Next::kFollowing;
  }};
  f["mapa.shared::cluster.u32"] = {each_lane<uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t rank) { return (rank + 1) << kRankShift | (a & ((1u << kRankShift) - 1)); })};
}

}  // namespace hope::ptx
