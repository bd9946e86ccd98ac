// Forms of arithmetic: a PTX opcode without what changes nothing here, and the function it is.
//
// Approximate functions are the host's, rounded once: what a device answers lies within the error PTX states,
// and no result may depend on more.
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

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float value(Half h) { return emulator::fp16_value(h.bits); }
inline float value(Brain b) { return emulator::bf16_value(b.bits); }
inline Half half_of(float x) { return {static_cast<uint16_t>(emulator::fp16_of(x))}; }
inline Brain brain_of(float x) { return {static_cast<uint16_t>(emulator::bf16_of(x))}; }
inline float least(float a, float b) { return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
inline float most(float a, float b) { return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && !std::signbit(a)) ? a : b; }
inline float quiet() { return std::bit_cast<float>(0x7fffffffu); }

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
// To an integer, as cvt does it: what is outside its range becomes the nearest that is inside, NaN becomes 0.
template <class T> inline T integer(double x) {
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}
inline float toward_zero(double exact) {  // of a result that double holds exactly
  float f = static_cast<float>(exact);
  if (std::fabs(static_cast<double>(f)) > std::fabs(exact)) f = std::nextafterf(f, 0.f);
  return f;
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
inline uint32_t inserted(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  for (uint32_t k = 0; k < length && position + k < 32; ++k)
    b = (b & ~(1u << (position + k))) | (a >> k & 1) << (position + k);
  return b;
}
// 11 significant bits, as few as the instruction may leave.
inline float tanh_approximate(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(std::tanh(x));
  if ((u & 0x7fffffffu) > 0x7f800000u) return x;
  return std::bit_cast<float>((u + 0x7ffu + (u >> 12 & 1)) & ~0xfffu);
}

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
  f["mov." + t] = {each_lane<T, T>([](T a) { return a; })};
  f["selp." + t] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    Word<T> r[32];
    const auto *a = lanes_of<T>(w, i.operands[1]), *b = lanes_of<T>(w, i.operands[2]);
    const uint32_t p = w.predicates[i.operands[3]];
    for (int lane = 0; lane < 32; ++lane) r[lane] = p >> lane & 1 ? a[lane] : b[lane];
    put(lanes_of<T>(w, i.operands[0]), r, mask);
    return Next::kFollowing;
  }};
}

template <class D, class S> inline void add_conversion(Forms& f, const std::string& d, const std::string& s) {
  f["cvt." + d + "." + s] = {each_lane<D, S>([](S a) { return static_cast<D>(a); })};
}
template <class D> inline void add_conversions_to(Forms& f, const std::string& d) {
  add_conversion<D, int8_t>(f, d, "s8"), add_conversion<D, uint8_t>(f, d, "u8");
  add_conversion<D, int16_t>(f, d, "s16"), add_conversion<D, uint16_t>(f, d, "u16");
  add_conversion<D, int32_t>(f, d, "s32"), add_conversion<D, uint32_t>(f, d, "u32");
  add_conversion<D, int64_t>(f, d, "s64"), add_conversion<D, uint64_t>(f, d, "u64");
}

template <bool FLUSH> inline void add_floats(Forms& f) {
  const std::string z = FLUSH ? ".ftz" : "";
  auto in = [](float x) { return FLUSH ? flushed(x) : x; };
  using In = decltype(in);
  for (const std::string r : {"", ".rn"}) {
    f["add" + r + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return In{}(In{}(a) + In{}(b)); })};
    f["sub" + r + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return In{}(In{}(a) - In{}(b)); })};
    f["mul" + r + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return In{}(In{}(a) * In{}(b)); })};
  }
  f["add.rz" + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) {
    const float sum = a + b;
    return std::isfinite(sum) ? In{}(toward_zero(double(a) + double(b))) : sum;
  })};
  f["fma.rn" + z + ".f32"] = {each_lane<float, float, float, float>(
      [](float a, float b, float c) { return In{}(__builtin_fmaf(In{}(a), In{}(b), In{}(c))); })};
  for (const std::string r : {".full", ".approx"})
    f["div" + r + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return In{}(In{}(a) / In{}(b)); })};
  // beyond 2^126 this one's quotient is 0
  f["div.approx" + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) {
    return std::fabs(b) > 0x1p126f ? a * 0.f : In{}(In{}(a) / In{}(b));
  })};
  f["div.rn" + z + ".f32"] = f["div.full" + z + ".f32"];
  f["rcp.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(1.f / In{}(a)); })};
  f["rcp.rn" + z + ".f32"] = f["rcp.approx" + z + ".f32"];
  f["sqrt.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(std::sqrt(In{}(a))); })};
  f["sqrt.rn" + z + ".f32"] = f["sqrt.approx" + z + ".f32"];
  f["rsqrt.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(float(1. / std::sqrt(double(In{}(a))))); })};
  f["ex2.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(std::exp2(In{}(a))); })};
  f["lg2.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(std::log2(In{}(a))); })};
  f["sin.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(std::sin(In{}(a))); })};
  f["cos.approx" + z + ".f32"] = {each_lane<float, float>([](float a) { return In{}(std::cos(In{}(a))); })};
  f["neg" + z + ".f32"] = {each_lane<float, float>([](float a) { return -In{}(a); })};
  f["abs" + z + ".f32"] = {each_lane<float, float>([](float a) { return std::fabs(In{}(a)); })};
  f["min" + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return least(In{}(a), In{}(b)); })};
  f["max" + z + ".f32"] = {each_lane<float, float, float>([](float a, float b) { return most(In{}(a), In{}(b)); })};
  f["min" + z + ".NaN.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return std::isnan(a) || std::isnan(b) ? quiet() : least(In{}(a), In{}(b)); })};
  f["max" + z + ".NaN.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return std::isnan(a) || std::isnan(b) ? quiet() : most(In{}(a), In{}(b)); })};
  f["setp.eq" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) == In{}(b); })};
  f["setp.ne" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) < In{}(b) || In{}(a) > In{}(b); })};
  f["setp.lt" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) < In{}(b); })};
  f["setp.le" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) <= In{}(b); })};
  f["setp.gt" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) > In{}(b); })};
  f["setp.ge" + z + ".f32"] = {compare<float>([](float a, float b) { return In{}(a) >= In{}(b); })};
  // true of NaN too
  f["setp.equ" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) < In{}(b) || In{}(a) > In{}(b)); })};
  f["setp.neu" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) == In{}(b)); })};
  f["setp.ltu" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) >= In{}(b)); })};
  f["setp.leu" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) > In{}(b)); })};
  f["setp.gtu" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) <= In{}(b)); })};
  f["setp.geu" + z + ".f32"] = {compare<float>([](float a, float b) { return !(In{}(a) < In{}(b)); })};
  f["setp.nan" + z + ".f32"] = {compare<float>([](float a, float b) { return std::isnan(a) || std::isnan(b); })};
  f["setp.num" + z + ".f32"] = {compare<float>([](float a, float b) { return !std::isnan(a) && !std::isnan(b); })};
  f["cvt.rn" + z + ".f16.f32"] = {each_lane<Half, float>([](float a) { return half_of(In{}(a)); })};
  f["cvt" + z + ".f32.f16"] = {each_lane<float, Half>([](Half a) { return value(a); })};
  f["cvt.rzi" + z + ".s32.f32"] = {each_lane<int32_t, float>([](float a) { return integer<int32_t>(std::trunc(a)); })};
  f["cvt.rzi" + z + ".u32.f32"] = {each_lane<uint32_t, float>([](float a) { return integer<uint32_t>(std::trunc(a)); })};
  f["cvt.rni" + z + ".f32.f32"] = {each_lane<float, float>([](float a) { return std::nearbyint(In{}(a)); })};
  f["cvt.rmi" + z + ".f32.f32"] = {each_lane<float, float>([](float a) { return std::floor(In{}(a)); })};
  f["cvt.rpi" + z + ".f32.f32"] = {each_lane<float, float>([](float a) { return std::ceil(In{}(a)); })};
  f["cvt.rzi" + z + ".f32.f32"] = {each_lane<float, float>([](float a) { return std::trunc(In{}(a)); })};
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
  add_floats<false>(f), add_floats<true>(f);

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
  f["bfi.b32"] = {each_lane<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t p, uint32_t n) { return inserted(a, b, p, n); })};
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
  f["popc.b32"] = {each_lane<uint32_t, uint32_t>([](uint32_t a) { return uint32_t(std::popcount(a)); })};
  f["clz.b32"] = {each_lane<uint32_t, uint32_t>([](uint32_t a) { return uint32_t(std::countl_zero(a)); })};
  f["brev.b32"] = {each_lane<uint32_t, uint32_t>([](uint32_t a) {
    uint32_t r = 0;
    for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
    return r;
  })};

  add_conversions_to<int8_t>(f, "s8"), add_conversions_to<uint8_t>(f, "u8");
  add_conversions_to<int16_t>(f, "s16"), add_conversions_to<uint16_t>(f, "u16");
  add_conversions_to<int32_t>(f, "s32"), add_conversions_to<uint32_t>(f, "u32");
  add_conversions_to<int64_t>(f, "s64"), add_conversions_to<uint64_t>(f, "u64");
  f["cvt.rn.f32.s32"] = {each_lane<float, int32_t>([](int32_t a) { return static_cast<float>(a); })};
  f["cvt.rn.f32.u32"] = {each_lane<float, uint32_t>([](uint32_t a) { return static_cast<float>(a); })};
  f["cvt.rn.f32.s64"] = {each_lane<float, int64_t>([](int64_t a) { return static_cast<float>(a); })};
  f["cvt.rn.f32.u64"] = {each_lane<float, uint64_t>([](uint64_t a) { return static_cast<float>(a); })};
  f["cvt.rn.f32.s16"] = {each_lane<float, int16_t>([](int16_t a) { return static_cast<float>(a); })};
  f["cvt.rn.f32.u16"] = {each_lane<float, uint16_t>([](uint16_t a) { return static_cast<float>(a); })};
  f["cvt.f32.bf16"] = {each_lane<float, Brain>([](Brain a) { return value(a); })};
  f["cvt.rn.bf16.f32"] = {each_lane<Brain, float>([](float a) { return brain_of(a); })};
  // the first source is the upper half
  f["cvt.rn.bf16x2.f32"] = {each_lane<uint32_t, float, float>(
      [](float hi, float lo) { return uint32_t(brain_of(hi).bits) << 16 | brain_of(lo).bits; })};
  f["cvt.rn.f16x2.f32"] = {each_lane<uint32_t, float, float>(
      [](float hi, float lo) { return uint32_t(half_of(hi).bits) << 16 | half_of(lo).bits; })};
  f["cvt.rna.tf32.f32"] = {each_lane<uint32_t, float>([](float a) {
    const uint32_t u = std::bit_cast<uint32_t>(a);
    return std::isfinite(a) ? (u + 0x1000u) & ~0x1fffu : u;
  })};
  f["tanh.approx.f32"] = {each_lane<float, float>([](float a) { return tanh_approximate(a); })};
  for (const char* t : {".bf16x2", ".f16x2"}) {
    const bool bf = t[1] == 'b';
    auto both = [&](const char* op, auto g) {
      using G = decltype(g);
      f[std::string(op) + t] = {bf ? each_lane<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
        auto part = [&](int s) { return uint32_t(brain_of(G{}(value(Brain{uint16_t(a >> s)}), value(Brain{uint16_t(b >> s)}))).bits) << s; };
        return part(0) | part(16);
      }) : each_lane<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
        auto part = [&](int s) { return uint32_t(half_of(G{}(value(Half{uint16_t(a >> s)}), value(Half{uint16_t(b >> s)}))).bits) << s; };
        return part(0) | part(16);
      })};
    };
    both("add.rn", [](float a, float b) { return a + b; });
    both("mul.rn", [](float a, float b) { return a * b; });
    both("sub.rn", [](float a, float b) { return a - b; });
  }

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
  f["halves.b32"] = {halves<uint32_t, uint32_t>};
  f["halves.b64"] = {halves<uint64_t, uint32_t>};
  f["low.b32"] = {each_lane<uint16_t, uint32_t>([](uint32_t a) { return uint16_t(a); })};
  f["high.b32"] = {each_lane<uint16_t, uint32_t>([](uint32_t a) { return uint16_t(a >> 16); })};
  f["low.b64"] = {each_lane<uint32_t, uint64_t>([](uint64_t a) { return uint32_t(a); })};
  f["high.b64"] = {each_lane<uint32_t, uint64_t>([](uint64_t a) { return uint32_t(a >> 32); })};
  f["cvta.shared.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a + kSharedWindow; })};
  f["cvta.to.shared.u64"] = {each_lane<uint64_t, uint64_t>([](uint64_t a) { return a - kSharedWindow; })};
}

}  // namespace hope::ptx
