// Arithmetic on 32 lanes: how a function of numbers becomes an instruction.
#pragma once
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace hope::ptx {

struct Half { uint16_t bits; };  // fp16
struct Brain { uint16_t bits; };  // bf16

// A register of up to 32 bits is a word a lane, zero-extended; one of 64 bits is two.
template <class T> using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T> inline T number(Word<T> w) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>(w);
  else if constexpr (std::is_same_v<T, double>) return std::bit_cast<double>(w);
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Brain>) return T{static_cast<uint16_t>(w)};
  else return static_cast<T>(w);
}
template <class T> inline Word<T> word(T x) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<uint32_t>(x);
  else if constexpr (std::is_same_v<T, double>) return std::bit_cast<uint64_t>(x);
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Brain>) return x.bits;
  else if constexpr (sizeof(T) == 8) return static_cast<uint64_t>(x);
  else return static_cast<std::make_unsigned_t<T>>(x);
}

template <class T>
inline Word<T>* lanes_of(Warp& w, int32_t operand) {
  return static_cast<Word<T>*>(w.lanes(operand));
}

// Puts 32 words into a register where the mask says so.
template <class W> inline void put(W* d, const W* value, uint32_t mask) {
  if (mask == 0xffffffffu) {
    std::memcpy(d, value, 32 * sizeof(W));
  } else {
    for (uint32_t m = mask; m; m &= m - 1) d[std::countr_zero(m)] = value[std::countr_zero(m)];
  }
}

// operands: d, sources. f: a function without state of the sources' numbers.
template <class D, class... S, class F> constexpr Run each_lane(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    alignas(64) Word<D> result[32];
    [&]<size_t... k>(std::index_sequence<k...>) {
      const auto sources = std::make_tuple(lanes_of<S>(w, i.operands[k + 1])...);
      for (int lane = 0; lane < 32; ++lane)
        result[lane] = word<D>(F{}(number<S>(std::get<k>(sources)[lane])...));
    }(std::index_sequence_for<S...>{});
    put(lanes_of<D>(w, i.operands[0]), result, mask);
    return Next::kFollowing;
  };
}

// operands: p, a, b.
template <class S, class F> constexpr Run compare(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    const auto *a = lanes_of<S>(w, i.operands[1]), *b = lanes_of<S>(w, i.operands[2]);
    uint32_t found = 0;
    for (int lane = 0; lane < 32; ++lane)
      found |= static_cast<uint32_t>(F{}(number<S>(a[lane]), number<S>(b[lane]))) << lane;
    w.set_predicate(i.operands[0], found, mask);
    return Next::kFollowing;
  };
}

}  // namespace hope::ptx
