// cvt: from every integer to every integer, between integers and fp32, and to and from 16-bit numbers.
#pragma once
#include "floats.h"

namespace hope::ptx {

// A result of 8 bits fills a register of 16 by its sign.
template <class D>
using Filled =
    std::conditional_t<sizeof(D) == 1, std::conditional_t<std::is_signed_v<D>, int16_t, uint16_t>, D>;

// To an integer: what is outside its range becomes the nearest that is inside. NaN becomes 0, and the number
// of
// 64 bits whose highest alone is set.
template <class T> inline T integer(double x) {
  if (std::isnan(x)) return sizeof(T) == 8 ? static_cast<T>(uint64_t{1} << 63) : 0;
  if (x <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

// operands: d, a, bytes and sign of a's type, bytes and sign of d's type, bytes of d's register, whether to
// saturate, bytes of a's register, of which the low ones count
inline Next convert_integer(Warp& w, const Instruction& i, uint32_t mask) {
  const int32_t* o = i.operands;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    const int unused = 128 - 8 * o[2], cut = 128 - 8 * o[4];
    const unsigned __int128 bits =
        o[8] == 8 ? lanes_of<uint64_t>(w, o[1])[lane] : lanes_of<uint32_t>(w, o[1])[lane];
    __int128 x = o[3] ? static_cast<__int128>(bits << unused) >> unused
                      : static_cast<__int128>(bits << unused >> unused);
    if (o[7]) {
      const __int128 span = static_cast<__int128>(1) << (8 * o[4] - (o[5] ? 1 : 0));
      x = std::min<__int128>(std::max<__int128>(x, o[5] ? -span : 0), span - 1);
    }
    const auto kept = static_cast<unsigned __int128>(x) << cut;
    x = o[5] ? static_cast<__int128>(kept) >> cut : static_cast<__int128>(kept >> cut);
    if (o[6] == 8) lanes_of<uint64_t>(w, o[0])[lane] = static_cast<uint64_t>(x);
    else lanes_of<uint32_t>(w, o[0])[lane] = static_cast<uint32_t>(x) & (o[6] == 2 ? 0xffffu : 0xffffffffu);
  }
  return Next::kFollowing;
}

template <class D, class S> inline void add_conversion(Forms& f, const std::string& d, const std::string& s) {
  f["cvt." + d + "." + s] = {
      each_lane<Filled<D>, S>([](S a) { return static_cast<Filled<D>>(static_cast<D>(a)); })};
}
template <class D> inline void add_conversions_to(Forms& f, const std::string& d) {
  add_conversion<D, int8_t>(f, d, "s8"), add_conversion<D, uint8_t>(f, d, "u8");
  add_conversion<D, int16_t>(f, d, "s16"), add_conversion<D, uint16_t>(f, d, "u16");
  add_conversion<D, int32_t>(f, d, "s32"), add_conversion<D, uint32_t>(f, d, "u32");
  add_conversion<D, int64_t>(f, d, "s64"), add_conversion<D, uint64_t>(f, d, "u64");
  f["cvt.rn.f32." + d] = {each_lane<float, D>([](D a) { return static_cast<float>(a); })};
  auto whole = [&](const std::string& rounding, auto round) {
    using R = decltype(round);
    auto form = [](auto in) -> Form {
      using In = decltype(in);
      return {each_lane<Filled<D>, float>(
          [](float a) { return static_cast<Filled<D>>(integer<D>(R{}(In{}(a)))); })};
    };
    f["cvt." + rounding + "." + d + ".f32"] = form([](float x) { return x; });
    f["cvt." + rounding + ".ftz." + d + ".f32"] = form([](float x) { return flushed(x); });
  };
  whole("rni", [](float x) { return std::nearbyint(x); });
  whole("rzi", [](float x) { return std::trunc(x); });
  whole("rmi", [](float x) { return std::floor(x); });
  whole("rpi", [](float x) { return std::ceil(x); });
}

template <class T> inline void add_conversions_of_16_bits(Forms& f, const std::string& t) {
  auto at_least_zero = [](float a) { return a > 0.f || a != a ? a : 0.f; };
  using Relu = decltype(at_least_zero);
  f["cvt.rn." + t + ".f32"] = {each_lane<T, float>([](float a) { return narrow<T>(a); })};
  f["cvt.rn.relu." + t + ".f32"] = {each_lane<T, float>([](float a) { return narrow<T>(Relu{}(a)); })};
  // the first source is the upper half
  f["cvt.rn." + t + "x2.f32"] = {each_lane<uint32_t, float, float>(
      [](float hi, float lo) { return uint32_t(narrow<T>(hi).bits) << 16 | narrow<T>(lo).bits; })};
  f["cvt.rn.relu." + t + "x2.f32"] = {each_lane<uint32_t, float, float>([](float hi, float lo) {
    return uint32_t(narrow<T>(Relu{}(hi)).bits) << 16 | narrow<T>(Relu{}(lo)).bits;
  })};
  f["cvt.f32." + t] = {each_lane<float, T>([](T a) { return value(a); })};
}

inline void add_conversions(Forms& f) {
  f["cvt.integer"] = {convert_integer};
  add_conversions_to<int8_t>(f, "s8"), add_conversions_to<uint8_t>(f, "u8");
  add_conversions_to<int16_t>(f, "s16"), add_conversions_to<uint16_t>(f, "u16");
  add_conversions_to<int32_t>(f, "s32"), add_conversions_to<uint32_t>(f, "u32");
  add_conversions_to<int64_t>(f, "s64"), add_conversions_to<uint64_t>(f, "u64");
  add_unary<false>(f, "cvt.rni.f32", [](float a) { return std::nearbyint(a); });
  add_unary<false>(f, "cvt.rmi.f32", [](float a) { return std::floor(a); });
  add_unary<false>(f, "cvt.rpi.f32", [](float a) { return std::ceil(a); });
  add_unary<false>(f, "cvt.rzi.f32", [](float a) { return std::trunc(a); });
  add_conversions_of_16_bits<Brain>(f, "bf16"), add_conversions_of_16_bits<Half>(f, "f16");
  // no fp32 that is flushed is as large as half of fp16's smallest number
  f["cvt.rn.ftz.f16.f32"] = f["cvt.rn.f16.f32"];
  f["cvt.ftz.f32.f16"] = f["cvt.f32.f16"];
  f["cvt.rna.tf32.f32"] = {each_lane<uint32_t, float>([](float a) {
    const uint32_t u = std::bit_cast<uint32_t>(a);
    return std::isfinite(a) ? (u + 0x1000u) & ~0x1fffu : std::bit_cast<uint32_t>(canonical(a));
  })};
}

}  // namespace hope::ptx
