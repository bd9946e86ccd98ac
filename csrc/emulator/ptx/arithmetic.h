// Forms of arithmetic on integers, bits and predicates: a PTX opcode without what changes nothing here, and the
// function it is.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <unordered_map>

#include "../numbers.h"
#include "lanes.h"

namespace hope::ptx {

struct Form {
  Run run;
  bool together = false;  // wants all lanes of the warp
};
using Forms = std::unordered_map<std::string, Form>;

template <class T> inline T shift_left(T a, uint32_t n) { return n >= 8 * sizeof(T) ? 0 : static_cast<T>(a << n); }
template <class T> inline T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) n = 8 * sizeof(T) - 1, a = std::is_signed_v<T> ? a : T{0};
  return static_cast<T>(a >> n);
}
template <class T> inline T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return a / b;
}
template <class T> inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k) & 15;
    uint32_t byte = both >> (8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * k);
  }
  return r;
}
template <class T> inline T extracted(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 0xff, length &= 0xff;
  U r = 0;
  U sign = 0;
  if constexpr (std::is_signed_v<T>)
    if (length) sign = static_cast<U>(a) >> std::min(position + length - 1, bits - 1) & 1;
  for (uint32_t k = 0; k < bits; ++k) {
    const bool inside = k < length && position + k < bits;
    r |= static_cast<U>(inside ? static_cast<U>(a) >> (position + k) & 1 : sign) << k;
  }
  return static_cast<T>(r);
}
template <class T> inline T inserted(T a, T b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  for (uint32_t k = 0; k < length && position + k < 8 * sizeof(T); ++k)
    b = (b & ~(T{1} << (position + k))) | (a >> k & 1) << (position + k);
  return b;
}
inline int64_t of_24_bits(int32_t a) { return static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8; }
// Adds the forms of one integer type under its names: PTX writes b32 and u32 for the same bits.
template <class T> inline void add_integers(Forms& f, const std::string& t) {
  using U = std::make_unsigned_t<T>;
  f["add." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(U(a) + U(b)); })};
  f["sub." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(U(a) - U(b)); })};
  f["mul.lo." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(uint64_t(a) * uint64_t(b)); })};
  f["mad.lo." + t] = {
      each_lane<T, T, T, T>([](T a, T b, T c) { return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c)); })};
  f["mul.hi." + t] = {each_lane<T, T, T>([](T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
  })};
  f["div." + t] = {each_lane<T, T, T>([](T a, T b) { return quotient(a, b); })};
  f["rem." + t] = {each_lane<T, T, T>([](T a, T b) { return remainder(a, b); })};
  f["min." + t] = {each_lane<T, T, T>([](T a, T b) { return std::min(a, b); })};
  f["max." + t] = {each_lane<T, T, T>([](T a, T b) { return std::max(a, b); })};
  f["shr." + t] = {each_lane<T, T, uint32_t>([](T a, uint32_t n) { return shift_right(a, n); })};
  f["setp.eq." + t] = {compare<T>([](T a, T b) { return a == b; })};
  f["setp.ne." + t] = {compare<T>([](T a, T b) { return a != b; })};
  f["setp.lt." + t] = {compare<T>([](T a, T b) { return a < b; })};
  f["setp.le." + t] = {compare<T>([](T a, T b) { return a <= b; })};
  f["setp.gt." + t] = {compare<T>([](T a, T b) { return a > b; })};
  f["setp.ge." + t] = {compare<T>([](T a, T b) { return a >= b; })};
  if constexpr (sizeof(T) >= 4) f["bfe." + t] = {each_lane<T, T, uint32_t, uint32_t>([](T a, uint32_t p, uint32_t n) { return extracted(a, p, n); })};
  if constexpr (std::is_unsigned_v<T>)  // other names of the same comparisons
    for (const auto& [name, same] : {std::pair{"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}})
      f["setp." + (name + ("." + t))] = f["setp." + (same + ("." + t))];
  if constexpr (std::is_signed_v<T>) {
    f["neg." + t] = {each_lane<T, T>([](T a) { return static_cast<T>(U(0) - U(a)); })};
    f["abs." + t] = {each_lane<T, T>([](T a) { return a < 0 ? static_cast<T>(U(0) - U(a)) : a; })};
  }
}

template <class T> inline void add_bits(Forms& f, const std::string& t) {
  f["and." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(a & b); })};
  f["or." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(a | b); })};
  f["xor." + t] = {each_lane<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); })};
  f["not." + t] = {each_lane<T, T>([](T a) { return static_cast<T>(~a); })};
  f["shl." + t] = {each_lane<T, T, uint32_t>([](T a, uint32_t n) { return shift_left(a, n); })};
  f["shr." + t] = {each_lane<T, T, uint32_t>([](T a, uint32_t n) { return shift_right(a, n); })};
  f["mov." + t] = {each_lane<T, T>([](T a) { return a; })};
  if constexpr (sizeof(T) >= 4) {
    f["bfi." + t] = {each_lane<T, T, T, uint32_t, uint32_t>(
        [](T a, T b, uint32_t p, uint32_t n) { return inserted(a, b, p, n); })};
    f["popc." + t] = {each_lane<uint32_t, T>([](T a) { return uint32_t(std::popcount(a)); })};
    f["clz." + t] = {each_lane<uint32_t, T>([](T a) { return uint32_t(std::countl_zero(a)); })};
    f["brev." + t] = {each_lane<T, T>([](T a) {
      T r = 0;
      for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
      return r;
    })};
  }
  f["selp." + t] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    Word<T> r[32];
    const auto *a = lanes_of<T>(w, i.operands[1]), *b = lanes_of<T>(w, i.operands[2]);
    const uint32_t p = w.predicates[i.operands[3]];
    for (int lane = 0; lane < 32; ++lane) r[lane] = p >> lane & 1 ? a[lane] : b[lane];
    put(lanes_of<T>(w, i.operands[0]), r, mask);
    return Next::kFollowing;
  }};
}

// A function of predicates. operands: p, a, b.
template <class F> constexpr Run of_predicates(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    w.set_predicate(i.operands[0], F{}(w.predicates[i.operands[1]], w.predicates[i.operands[2]]), mask);
    return Next::kFollowing;
  };
}

// operands: low, high, a whole
template <class S, class D> inline Next halves(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t low[32], high[32];
  const auto* a = lanes_of<S>(w, i.operands[2]);
  constexpr int bits = 4 * sizeof(S);
  for (int lane = 0; lane < 32; ++lane) {
    low[lane] = static_cast<uint32_t>(a[lane] & ((S{1} << bits) - 1));
    high[lane] = static_cast<uint32_t>(a[lane] >> bits);
  }
  put(lanes_of<D>(w, i.operands[0]), low, mask);
  put(lanes_of<D>(w, i.operands[1]), high, mask);
  return Next::kFollowing;
}

inline void add_arithmetic(Forms& f) {
  add_integers<int16_t>(f, "s16"), add_integers<uint16_t>(f, "u16");
  add_integers<int32_t>(f, "s32"), add_integers<uint32_t>(f, "u32");
  add_integers<int64_t>(f, "s64"), add_integers<uint64_t>(f, "u64");
  for (const char* op : {"setp.eq.", "setp.ne."})
    for (const char* bits : {"16", "32", "64"}) f[op + ("b" + std::string(bits))] = f[op + ("u" + std::string(bits))];
  add_bits<uint16_t>(f, "b16"), add_bits<uint32_t>(f, "b32"), add_bits<uint64_t>(f, "b64");
  for (const char* op : {"mov.", "selp."})
    for (const auto& [name, same] : {std::pair{"u16", "b16"}, {"s16", "b16"}, {"f16", "b16"}, {"bf16", "b16"}, {"u32", "b32"},
                                     {"s32", "b32"}, {"f32", "b32"}, {"u64", "b64"}, {"s64", "b64"}, {"f64", "b64"}})
      f[op + std::string(name)] = f[op + std::string(same)];

  f["mul.wide.s16"] = {each_lane<int32_t, int16_t, int16_t>([](int16_t a, int16_t b) { return int32_t(a) * b; })};
  f["mul.wide.u16"] = {each_lane<uint32_t, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return uint32_t(a) * b; })};
  f["mul.wide.s32"] = {each_lane<int64_t, int32_t, int32_t>([](int32_t a, int32_t b) { return int64_t(a) * b; })};
  f["mul.wide.u32"] = {each_lane<uint64_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) { return uint64_t(a) * b; })};
  f["mad.wide.s16"] = {each_lane<int32_t, int16_t, int16_t, int32_t>(
      [](int16_t a, int16_t b, int32_t c) { return int32_t(uint32_t(int32_t(a) * b) + uint32_t(c)); })};
  f["mad.wide.u16"] = {each_lane<uint32_t, uint16_t, uint16_t, uint32_t>(
      [](uint16_t a, uint16_t b, uint32_t c) { return uint32_t(a) * b + c; })};
  f["mad.wide.s32"] = {each_lane<int64_t, int32_t, int32_t, int64_t>(
      [](int32_t a, int32_t b, int64_t c) { return int64_t(uint64_t(int64_t(a) * b) + uint64_t(c)); })};
  f["mad.wide.u32"] = {each_lane<uint64_t, uint32_t, uint32_t, uint64_t>(
      [](uint32_t a, uint32_t b, uint64_t c) { return uint64_t(a) * b + c; })};
  f["prmt.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t s) { return permuted(a, b, s); })};
  f["lop3.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
        uint32_t r = 0;
        for (int k = 0; k < 8; ++k)
          if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        return r;
      })};
  f["shf.l.wrap.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>(((uint64_t(b) << 32 | a) << (n & 31)) >> 32);
  })};
  f["shf.r.wrap.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t n) { return static_cast<uint32_t>((uint64_t(b) << 32 | a) >> (n & 31)); })};
  f["shf.l.clamp.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>((uint64_t(b) << 32 | a) << std::min(n, 32u) >> 32);
  })};
  f["shf.r.clamp.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t n) { return static_cast<uint32_t>((uint64_t(b) << 32 | a) >> std::min(n, 32u)); })};
  f["mul24.lo.s32"] = {each_lane<int32_t, int32_t, int32_t>(
      [](int32_t a, int32_t b) { return static_cast<int32_t>(of_24_bits(a) * of_24_bits(b)); })};
  f["mul24.lo.u32"] = {each_lane<uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a & 0xffffff) * (b & 0xffffff)); })};

  f["and.pred"] = {of_predicates([](uint32_t a, uint32_t b) { return a & b; })};
  f["or.pred"] = {of_predicates([](uint32_t a, uint32_t b) { return a | b; })};
  f["xor.pred"] = {of_predicates([](uint32_t a, uint32_t b) { return a ^ b; })};
  f["not.pred"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    w.set_predicate(i.operands[0], ~w.predicates[i.operands[1]], mask);
    return Next::kFollowing;
  }};
  f["mov.pred"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    w.set_predicate(i.operands[0], w.predicates[i.operands[1]], mask);
    return Next::kFollowing;
  }};
  // {two halves} and a whole; operands in the order of the text
  f["pack.b32"] = {each_lane<uint32_t, uint32_t, uint32_t>([](uint32_t lo, uint32_t hi) { return (lo & 0xffff) | hi << 16; })};
  f["pack.b64"] = {each_lane<uint64_t, uint32_t, uint32_t>([](uint32_t lo, uint32_t hi) { return lo | uint64_t(hi) << 32; })};
  f["quarters.b64"] = {each_lane<uint64_t, uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return (a & 0xffff) | uint64_t(b & 0xffff) << 16 | uint64_t(c & 0xffff) << 32 | uint64_t(d) << 48;
  })};
  // operands: four results (-1: nobody takes it), a whole
  f["split.b64"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    uint64_t a[32];
    std::memcpy(a, w.lanes(i.operands[4]), sizeof a);
    for (int k = 0; k < 4; ++k)
      for (uint32_t m = i.operands[k] < 0 ? 0 : mask; m; m &= m - 1) {
        const int lane = std::countr_zero(m);
        lanes_of<uint32_t>(w, i.operands[k])[lane] = a[lane] >> (16 * k) & 0xffff;
      }
    return Next::kFollowing;
  }};
  f["halves.b32"] = {halves<uint32_t, uint32_t>};
  f["halves.b64"] = {halves<uint64_t, uint32_t>};
  f["low.b32"] = {each_lane<uint16_t, uint32_t>([](uint32_t a) { return uint16_t(a); })};
  f["high.b32"] = {each_lane<uint16_t, uint32_t>([](uint32_t a) { return uint16_t(a >> 16); })};
  f["low.b64"] = {each_lane<uint32_t, uint64_t>([](uint64_t a) { return uint32_t(a); })};
  f["high.b64"] = {each_lane<uint32_t, uint64_t>([](uint64_t a) { return uint32_t(a >> 32); })};
  f["cvta.local.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a + kLocalWindow; })};
  f["cvta.to.local.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a - kLocalWindow; })};
  f["cvta.shared.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a + kSharedWindow; })};
  f["cvta.to.shared.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a - kSharedWindow; })};
}

}  // namespace hope::ptx
