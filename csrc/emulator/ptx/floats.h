// Forms of arithmetic on fp32 and on pairs of 16-bit numbers.
//
// Approximate functions are the host's, rounded once: what a device answers lies within the error PTX states,
// and no result may depend on more. A NaN that an instruction makes is 0x7fffffff.
#pragma once
#include "arithmetic.h"

namespace hope::ptx {

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float quiet() { return std::bit_cast<float>(0x7fffffffu); }
inline float canonical(float x) { return x != x ? quiet() : x; }
inline float value(Half h) { return emulator::fp16_value(h.bits); }
inline float value(Brain b) { return emulator::bf16_value(b.bits); }
inline Half half_of(float x) { return {static_cast<uint16_t>(emulator::fp16_of(x))}; }
inline Brain brain_of(float x) { return {static_cast<uint16_t>(emulator::bf16_of(x))}; }
template <class T> inline T narrow(float x) {
  if constexpr (std::is_same_v<T, Half>) return half_of(x);
  else return brain_of(x);
}

// -0 is less than +0; a NaN gives way to a number
inline float least(float a, float b) {
  return canonical(std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b);
}
inline float most(float a, float b) {
  return canonical(std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && !std::signbit(a)) ? a : b);
}
inline float saturated(float x) { return x > 0.f ? std::min(x, 1.f) : 0.f; }  // NaN becomes 0

// What a + b is, exactly: the sum in double, and the rest that it lacks.
struct Sum {
  double near, rest;
};
inline Sum exact_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}
inline float toward_zero(Sum s) {
  if (!std::isfinite(s.near)) return static_cast<float>(s.near);
  float f = static_cast<float>(s.near);
  const double over =
      std::fabs(f) == std::fabs(s.near) ? (s.near < 0 ? s.rest : -s.rest) : std::fabs(f) - std::fabs(s.near);
  return over > 0 ? std::nextafterf(f, 0.f) : f;
}
// Toward zero, the last bit set if anything was lost: rounds to fewer bits as the exact sum would.
inline float with_sticky_bit(Sum s) {
  const float f = toward_zero(s);
  if (!std::isfinite(f) || (f == s.near && s.rest == 0)) return f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1u);
}

// 11 significant bits, as few as the instruction may leave.
inline float tanh_approximate(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(std::tanh(x));
  if ((u & 0x7fffffffu) > 0x7f800000u) return quiet();
  return std::bit_cast<float>((u + 0x7ffu + (u >> 12 & 1)) & ~0xfffu);
}

template <bool FLUSH> struct Fp32 {
  static float in(float x) { return FLUSH ? flushed(x) : x; }
  static float out(float x) { return canonical(FLUSH ? flushed(x) : x); }
};

template <bool FLUSH, class F> inline void add_unary(Forms& f, const std::string& name, F) {
  using P = Fp32<FLUSH>;
  f[name + (FLUSH ? ".ftz" : "") + ".f32"] = {
      each_lane<float, float>([](float a) { return P::out(F{}(P::in(a))); })};
}
template <bool FLUSH, class F> inline void add_binary(Forms& f, const std::string& name, F) {
  using P = Fp32<FLUSH>;
  f[name + (FLUSH ? ".ftz" : "") + ".f32"] = {
      each_lane<float, float, float>([](float a, float b) { return P::out(F{}(P::in(a), P::in(b))); })};
}
template <bool FLUSH, class F> inline void add_comparison(Forms& f, const std::string& name, F) {
  using P = Fp32<FLUSH>;
  f["setp." + name + (FLUSH ? ".ftz" : "") + ".f32"] = {
      compare<float>([](float a, float b) { return F{}(P::in(a), P::in(b)); })};
}

template <bool FLUSH> inline void add_fp32(Forms& f) {
  using P = Fp32<FLUSH>;
  const std::string z = FLUSH ? ".ftz" : "";
  for (const std::string r : {"", ".rn"}) {
    add_binary<FLUSH>(f, "add" + r, [](float a, float b) { return a + b; });
    add_binary<FLUSH>(f, "sub" + r, [](float a, float b) { return a - b; });
    add_binary<FLUSH>(f, "mul" + r, [](float a, float b) { return a * b; });
  }
  add_binary<FLUSH>(f, "add.rz", [](float a, float b) { return toward_zero(exact_sum(a, b)); });
  f["fma.rn" + z + ".f32"] = {each_lane<float, float, float, float>(
      [](float a, float b, float c) { return P::out(__builtin_fmaf(P::in(a), P::in(b), P::in(c))); })};
  f["add" + z + ".sat.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return saturated(P::out(P::in(a) + P::in(b))); })};
  f["mul" + z + ".sat.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return saturated(P::out(P::in(a) * P::in(b))); })};
  f["fma.rn" + z + ".sat.f32"] = {each_lane<float, float, float, float>([](float a, float b, float c) {
    return saturated(P::out(__builtin_fmaf(P::in(a), P::in(b), P::in(c))));
  })};
  add_binary<FLUSH>(f, "div.full", [](float a, float b) { return a / b; });
  add_binary<FLUSH>(f, "div.rn", [](float a, float b) { return a / b; });
  // beyond 2^126 this one's quotient is 0
  add_binary<FLUSH>(f, "div.approx",
                    [](float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.f : a / b; });
  for (const char* r : {".approx", ".rn"}) {
    add_unary<FLUSH>(f, std::string("rcp") + r, [](float a) { return 1.f / a; });
    add_unary<FLUSH>(f, std::string("sqrt") + r, [](float a) { return std::sqrt(a); });
  }
  add_unary<FLUSH>(f, "rsqrt.approx", [](float a) { return float(1. / std::sqrt(double(a))); });
  add_unary<FLUSH>(f, "ex2.approx", [](float a) { return std::exp2(a); });
  add_unary<FLUSH>(f, "lg2.approx", [](float a) { return std::log2(a); });
  add_unary<FLUSH>(f, "sin.approx", [](float a) { return std::sin(a); });
  add_unary<FLUSH>(f, "cos.approx", [](float a) { return std::cos(a); });
  f["neg" + z + ".f32"] = {each_lane<float, float>([](float a) { return -P::in(a); })};
  f["abs" + z + ".f32"] = {each_lane<float, float>([](float a) { return std::fabs(P::in(a)); })};
  add_binary<FLUSH>(f, "min", [](float a, float b) { return least(a, b); });
  add_binary<FLUSH>(f, "max", [](float a, float b) { return most(a, b); });
  f["min" + z + ".NaN.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return std::isnan(a) || std::isnan(b) ? quiet() : least(P::in(a), P::in(b)); })};
  f["max" + z + ".NaN.f32"] = {each_lane<float, float, float>(
      [](float a, float b) { return std::isnan(a) || std::isnan(b) ? quiet() : most(P::in(a), P::in(b)); })};

  add_comparison<FLUSH>(f, "eq", [](float a, float b) { return a == b; });
  add_comparison<FLUSH>(f, "ne", [](float a, float b) { return a < b || a > b; });
  add_comparison<FLUSH>(f, "lt", [](float a, float b) { return a < b; });
  add_comparison<FLUSH>(f, "le", [](float a, float b) { return a <= b; });
  add_comparison<FLUSH>(f, "gt", [](float a, float b) { return a > b; });
  add_comparison<FLUSH>(f, "ge", [](float a, float b) { return a >= b; });
  // true of NaN too
  add_comparison<FLUSH>(f, "equ", [](float a, float b) { return !(a < b || a > b); });
  add_comparison<FLUSH>(f, "neu", [](float a, float b) { return !(a == b); });
  add_comparison<FLUSH>(f, "ltu", [](float a, float b) { return !(a >= b); });
  add_comparison<FLUSH>(f, "leu", [](float a, float b) { return !(a > b); });
  add_comparison<FLUSH>(f, "gtu", [](float a, float b) { return !(a <= b); });
  add_comparison<FLUSH>(f, "geu", [](float a, float b) { return !(a < b); });
  add_comparison<FLUSH>(f, "nan", [](float a, float b) { return std::isnan(a) || std::isnan(b); });
  add_comparison<FLUSH>(f, "num", [](float a, float b) { return !std::isnan(a) && !std::isnan(b); });
}

// Both halves of a word: g of numbers, rounded once more to 16 bits. fp32 has more than twice their bits and
// two:
// of a sum, difference or product the two roundings are one.
template <class T, class... S, class G> inline Form of_pairs(G) {
  return {each_lane<uint32_t, S...>([](S... words) {
    auto part = [&](int s) { return uint32_t(narrow<T>(G{}(value(T{uint16_t(words >> s)})...)).bits) << s; };
    return part(0) | part(16);
  })};
}
template <class T> inline void add_pairs(Forms& f, const std::string& t) {
  using W = uint32_t;
  f["add.rn." + t] = f["add." + t] = of_pairs<T, W, W>([](float a, float b) { return a + b; });
  f["sub.rn." + t] = f["sub." + t] = of_pairs<T, W, W>([](float a, float b) { return a - b; });
  f["mul.rn." + t] = f["mul." + t] = of_pairs<T, W, W>([](float a, float b) { return a * b; });
  f["fma.rn." + t] = of_pairs<T, W, W, W>(
      [](float a, float b, float c) { return with_sticky_bit(exact_sum(double(a) * double(b), c)); });
}

inline void add_floats(Forms& f) {
  add_fp32<false>(f), add_fp32<true>(f);
  f["tanh.approx.f32"] = {each_lane<float, float>([](float a) { return tanh_approximate(a); })};
  add_pairs<Brain>(f, "bf16x2"), add_pairs<Half>(f, "f16x2");
}

}  // namespace hope::ptx
