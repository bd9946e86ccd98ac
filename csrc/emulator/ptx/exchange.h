// What lanes of a warp give each other: shuffles, votes, matrices of 8 x 8.
#pragma once
#include "control.h"
#include "memory.h"

namespace hope::ptx {

inline void want_members(Warp& w, int32_t operand, uint32_t mask) {
  const uint32_t* members = static_cast<uint32_t*>(w.lanes(operand));
  for (uint32_t m = mask; m; m &= m - 1)
    if (members[std::countr_zero(m)] != 0xffffffffu) w.grid->fail("a member mask other than all lanes", std::countr_zero(m));
  want_all(w, mask);
}

enum Shuffle { kUp, kDown, kButterfly, kIndex };

// operands: d, p (or -1), a, b, c, members
template <Shuffle MODE> inline Next shuffle(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  const int32_t* o = i.operands;
  want_members(w, o[5], mask);
  const uint32_t *a = lanes_of<uint32_t>(w, o[2]), *b = lanes_of<uint32_t>(w, o[3]), *c = lanes_of<uint32_t>(w, o[4]);
  uint32_t result[32], valid = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int largest = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int from = MODE == kUp ? lane - by : MODE == kDown ? lane + by : MODE == kButterfly ? lane ^ by : least | (by & ~segment);
    const bool inside = MODE == kUp ? from >= largest : from <= largest;
    if (!inside) from = lane;
    valid |= static_cast<uint32_t>(inside) << lane;
    result[lane] = a[from];
  }
  put(lanes_of<uint32_t>(w, o[0]), result, mask);
  if (o[1] >= 0) w.set_predicate(o[1], valid, mask);
  return Next::kFollowing;
}

// operands: d, a, members
template <class T, class F> constexpr Run reduce(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    if (!mask) return Next::kFollowing;
    want_members(w, i.operands[2], mask);
    const uint32_t* a = lanes_of<T>(w, i.operands[1]);
    T r = number<T>(a[0]);
    for (int lane = 1; lane < 32; ++lane) r = F{}(r, number<T>(a[lane]));
    uint32_t result[32];
    std::fill(result, result + 32, word<T>(r));
    put(lanes_of<T>(w, i.operands[0]), result, mask);
    return Next::kFollowing;
  };
}

// Element pairs of 8 x 8 numbers of 16 bits, transposed; `word(lane)` holds row lane / 4, columns 2 (lane % 4) and + 1.
template <class W> inline uint32_t transposed(int lane, W word) {
  const int row = lane / 4, column = 2 * (lane % 4);
  auto at = [&](int r, int c) { return word(4 * r + c / 2) >> (16 * (c % 2)) & 0xffffu; };
  return at(column, row) | at(column + 1, row) << 16;
}

// operands: matrices, wide, base, offset, registers
template <bool TRANSPOSED> inline Next load_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  const int32_t* o = i.operands;
  const int matrices = o[0];
  uint64_t rows[32];
  addresses_of(w, o[2], o[1], o[3], rows);
  uint32_t words[4][32];
  for (int r = 0; r < 8 * matrices; ++r) {
    const Place p = find_place(w, r, kShared, rows[r], 16, 16);
    check_read(w, r, p, 16, Access::kPlain);
    std::memcpy(&words[r / 8][4 * (r % 8)], p.host, 16);
  }
  for (int m = 0; m < matrices; ++m) {
    uint32_t* d = lanes_of<uint32_t>(w, o[4 + m]);
    for (int lane = 0; lane < 32; ++lane)
      d[lane] = TRANSPOSED ? transposed(lane, [&](int l) { return words[m][l]; }) : words[m][lane];
  }
  for (int m = 0; m < matrices; ++m) measure(w, i, kShared, rows, 16, 0xffu << (8 * m));
  return Next::kFollowing;
}

template <bool TRANSPOSED> inline Next store_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  const int32_t* o = i.operands;
  const int matrices = o[0];
  uint64_t rows[32];
  addresses_of(w, o[2], o[1], o[3], rows);
  for (int r = 0; r < 8 * matrices; ++r) {
    const Place p = find_place(w, r, kShared, rows[r], 16, 16);
    const uint32_t* s = lanes_of<uint32_t>(w, o[4 + r / 8]);
    uint32_t row[4];
    for (int k = 0; k < 4; ++k)
      row[k] = TRANSPOSED ? transposed(4 * (r % 8) + k, [&](int l) { return s[l]; }) : s[4 * (r % 8) + k];
    check_write(w, r, p, 16, Access::kPlain, false, !std::memcmp(p.host, row, 16));
    std::memcpy(p.host, row, 16);
  }
  for (int m = 0; m < matrices; ++m) measure(w, i, kShared, rows, 16, 0xffu << (8 * m));
  w.grid->progress();
  return Next::kFollowing;
}

enum Vote { kAll, kAny, kUniform };

// operands: p, q, members
template <Vote MODE> inline Next vote(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_members(w, i.operands[2], mask);
  const uint32_t q = w.predicates[i.operands[1]] ^ (i.operands[3] ? 0xffffffffu : 0);
  const bool found = MODE == kAll ? q == 0xffffffffu : MODE == kAny ? q != 0 : q == 0 || q == 0xffffffffu;
  w.set_predicate(i.operands[0], found ? 0xffffffffu : 0, mask);
  return Next::kFollowing;
}

inline void put_one(Warp& w, int32_t operand, uint32_t value, uint32_t mask) {
  uint32_t result[32];
  std::fill(result, result + 32, value);
  put(lanes_of<uint32_t>(w, operand), result, mask);
}

inline void add_exchange(Forms& f) {
  f["vote.sync.all"] = {vote<kAll>, true};
  f["vote.sync.any"] = {vote<kAny>, true};
  f["vote.sync.uni"] = {vote<kUniform>, true};
  // operands: d, q, members, whether q is negated
  f["vote.sync.ballot"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
                             if (!mask) return Next::kFollowing;
                             want_members(w, i.operands[2], mask);
                             put_one(w, i.operands[0], w.predicates[i.operands[1]] ^ (i.operands[3] ? 0xffffffffu : 0), mask);
                             return Next::kFollowing;
                           },
                           true};
  f["activemask"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
    put_one(w, i.operands[0], mask, mask);
    return Next::kFollowing;
  }};
  // operands: d (or -1), p, members. The leader is the lowest lane.
  f["elect.sync"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
                       if (!mask) return Next::kFollowing;
                       want_members(w, i.operands[2], mask);
                       if (i.operands[0] >= 0) put_one(w, i.operands[0], 0, mask);
                       w.set_predicate(i.operands[1], 1, mask);
                       return Next::kFollowing;
                     },
                     true};
  f["shfl.sync.up.b32"] = {shuffle<kUp>, true};
  f["shfl.sync.down.b32"] = {shuffle<kDown>, true};
  f["shfl.sync.bfly.b32"] = {shuffle<kButterfly>, true};
  f["shfl.sync.idx.b32"] = {shuffle<kIndex>, true};
  f["redux.sync.max.s32"] = {reduce<int32_t>([](int32_t a, int32_t b) { return std::max(a, b); }), true};
  f["redux.sync.min.s32"] = {reduce<int32_t>([](int32_t a, int32_t b) { return std::min(a, b); }), true};
  f["redux.sync.max.u32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return std::max(a, b); }), true};
  f["redux.sync.min.u32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return std::min(a, b); }), true};
  f["redux.sync.add.s32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return a + b; }), true};
  f["redux.sync.add.u32"] = f["redux.sync.add.s32"];
  f["redux.sync.and.b32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return a & b; }), true};
  f["redux.sync.xor.b32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return a ^ b; }), true};
  f["redux.sync.or.b32"] = {reduce<uint32_t>([](uint32_t a, uint32_t b) { return a | b; }), true};
  f["ldmatrix"] = {load_matrix<false>, true};
  f["ldmatrix.trans"] = {load_matrix<true>, true};
  f["stmatrix"] = {store_matrix<false>, true};
  f["stmatrix.trans"] = {store_matrix<true>, true};
  f["movmatrix.sync.aligned.m8n8.trans.b16"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
                                                   if (!mask) return Next::kFollowing;
                                                   want_all(w, mask);
                                                   uint32_t given[32];
                                                   std::memcpy(given, w.lanes(i.operands[1]), sizeof given);
                                                   uint32_t* d = lanes_of<uint32_t>(w, i.operands[0]);
                                                   for (int lane = 0; lane < 32; ++lane)
                                                     d[lane] = transposed(lane, [&](int l) { return given[l]; });
                                                   return Next::kFollowing;
                                                 },
                                                 true};
}

}  // namespace hope::ptx
