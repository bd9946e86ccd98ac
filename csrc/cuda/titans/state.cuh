// A warp's deviations between global memory and registers, and its rounded weights.
#pragma once
#include "role.cuh"
#include "shared.cuh"

namespace hope {

// Where the blocks of a warp's weights lie in tensors [.., M N, D] and [.., Mf, D, N] of one (row, head), or head.
template <int D> struct Place {
  int w2, w1, w1s;  // first number of the warp's units
  // before: the memory's warps in blocks of lower rank.
  HOPE_DEVICE static Place of(const TitansParams& p, const Role& role, int before = 0) {
    const int unit = (before + role.within) * (role.full() ? Width<D>::kUnits : Width<D>::kScalarUnits);
    return {(role.memory * p.N + unit) * D, role.memory * D * p.N + unit, (role.memory - kEta) * p.N + unit};
  }
};

// f(block, first number, numbers a row, is it of w1) for the 16 blocks of a warp. BY_UNITS: blocks of w1 are kept
// transposed, units by positions, and one group of units comes after the other, as those of w2 do.
template <int D, bool BY_UNITS = false, class F>
HOPE_DEVICE void for_blocks(const Place<D>& place, bool full, int N, F f) {
  using W = Width<D>;
  if (full) {
#pragma unroll
    for (int b = 0; b < 8; ++b) f(b, place.w2 + (b / W::kSteps) * 16 * D + (b % W::kSteps) * 16, D, false);
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      const int i = BY_UNITS ? b % W::kSteps : b / W::kGroups, g = BY_UNITS ? b / W::kSteps : b % W::kGroups;
      f(8 + b, place.w1 + i * 16 * N + g * 16, N, true);
    }
  } else {
#pragma unroll
    for (int b = 0; b < 16; ++b) f(b, place.w2 + (b / W::kSteps) * 16 * D + (b % W::kSteps) * 16, D, false);
  }
}

// The tensors of one (row, head) g.
struct Deviations {
  float *w2, *w1, *w1s;
  HOPE_DEVICE static Deviations of(const TitansParams& p, int64_t g, int D, int memories) {
    return {p.delta2 + g * memories * p.N * D, p.delta1 + g * 3 * D * p.N, p.delta1s + g * (memories - 3) * p.N};
  }
};

template <class T> struct Bases {
  const T *w2, *w1, *w1s;
  HOPE_DEVICE static Bases of(const TitansParams& p, int64_t h, int D, int memories) {
    if (p.base2 == nullptr) return {nullptr, nullptr, nullptr};
    return {static_cast<const T*>(p.base2) + h * memories * p.N * D, static_cast<const T*>(p.base1) + h * 3 * D * p.N,
            static_cast<const T*>(p.base1s) + h * (memories - 3) * p.N};
  }
};

// A block of the base weights; zeros if there are none.
template <class T>
HOPE_DEVICE Word4 base_block(const Bases<T>& bases, const Role& role, bool w1, int first, int stride,
                             int lane) {
  if (bases.w2 == nullptr || role.idle()) return {0, 0, 0, 0};
  return load_block16<T>((w1 ? bases.w1 : bases.w2) + first, stride, lane);
}

// A warp's rounded weights, from its deviations and base weights. Some blocks of the base are requested before
// the first is used. (The compiler would not do so by itself: for all it knows, a store of weights may change what
// is loaded after it.)
template <int D, class T, class Weights>
HOPE_DEVICE void round_weights(const float (&state)[16][8], const Weights& weights, const Own& own,
                               const Bases<T>& bases, const Place<D>& place, const Role& role, int N, int lane) {
  const auto batched = [&](auto load) {
    constexpr int kBatch = D == 64 ? 8 : 2;  // as registers allow
    Word4 base[kBatch];
    for_blocks<D>(place, role.full(), N, [&](int i, int at, int row, bool w1) {
      base[i % kBatch] = load(i, at, row, w1);
      if (i % kBatch < kBatch - 1) return;
      const int first = i - (kBatch - 1);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) weights.put(first + k, round_block<T>(state[first + k], base[k]));
    });
  };
  if (own.plan.base >= 0) {
    const Word4* kept = own.at(own.plan.base) + 512 * own.warp;
    batched([&](int i, int, int, bool) { return kept[32 * i]; });
  } else {
    batched([&](int, int at, int row, bool w1) { return base_block<T>(bases, role, w1, at, row, lane); });
  }
}

// The deviations of a warp; zeros for one without a memory.
template <int D, bool BY_UNITS = false>
HOPE_DEVICE void load_deviations(float (&state)[16][8], const Deviations& from, const Place<D>& place,
                                 const Role& role, int N, int lane) {
  if (!role.idle()) {
    for_blocks<D, BY_UNITS>(place, role.full(), N, [&](int b, int first, int stride, bool w1) {
      if (BY_UNITS && w1)
        sync_warp(), load_block_transposed(state[b], from.w1 + first, stride, lane);
      else
        load_block(state[b], (w1 ? from.w1 : from.w2) + first, stride, lane);
    });
  } else {
#pragma unroll
    for (int b = 0; b < 16; ++b)
#pragma unroll
      for (int i = 0; i < 8; ++i) state[b][i] = 0.f;
  }
}

// One number of a scalar memory's w1 a unit, to shared memory.
template <int D, class T, class R>
HOPE_DEVICE void load_scalar_weights(const Shared<D, T, R>& shared, const Deviations& from, const Bases<T>& base,
                                     const Place<D>& place, const Role& role, int warp, int lane) {
  if (role.full()) return;
  for (int u = lane; u < Width<D>::kScalarUnits; u += 32) {
    const bool there = !role.idle();
    store_shared(shared.delta1s(warp) + u, there ? from.w1s[place.w1s + u] : 0.f);
    const uint16_t bits = there && base.w1s ? reinterpret_cast<const uint16_t*>(base.w1s)[place.w1s + u] : uint16_t{0};
    store_shared(shared.base1s(warp) + u, unpack2<T>(bits).x);
  }
  sync_warp();
}

// What a block keeps of a (row, head) while it commits: deviations in registers, the scalar memories' w1 and,
// where there is room, base weights in shared memory. before: the memory's warps in blocks of lower rank.
template <int D, class T, class R>
HOPE_DEVICE void load_state(float (&state)[16][8], const TitansParams& p, const Shared<D, T, R>& shared,
                            const Role& role, int before, int group, int warp, int lane) {
  const Plan& plan = shared.plan;
  const Place<D> place = Place<D>::of(p, role, before);
  const Deviations deviations = Deviations::of(p, group, D, plan.memories);
  const Bases<T> bases = Bases<T>::of(p, group % p.H, D, plan.memories);
  load_deviations<D, R::kPieces>(state, deviations, place, role, R::hidden(p), lane);
  load_scalar_weights<D, T>(shared, deviations, bases, place, role, warp, lane);
  const Own own{p, plan, shared.call(), warp, lane};
  if (plan.base >= 0)
    for_blocks<D>(place, role.full(), R::hidden(p), [&](int i, int at, int row, bool w1) {
      own.at(plan.base)[512 * warp + 32 * i] = base_block<T>(bases, role, w1, at, row, lane);
    });
}

// The deviations, once chunks have been committed, to where they were loaded from.
template <int D, class T, class R>
HOPE_DEVICE void store_state(const float (&state)[16][8], const TitansParams& p, const Shared<D, T, R>& shared,
                             const Role& role, int before, int group, int warp, int lane) {
  if (role.idle()) return;
  const Place<D> place = Place<D>::of(p, role, before);
  const Deviations deviations = Deviations::of(p, group, D, shared.plan.memories);
  for_blocks<D, R::kPieces>(place, role.full(), R::hidden(p), [&](int i, int at, int row, bool w1) {
    if (R::kPieces && w1)
      store_block_transposed(state[i], deviations.w1 + at, row, lane);
    else
      store_block(state[i], (w1 ? deviations.w1 : deviations.w2) + at, row, lane);
  });
  if (!role.full())
    for (int u = lane; u < Width<D>::kScalarUnits; u += 32)
      deviations.w1s[place.w1s + u] = load_shared(shared.delta1s(warp) + u);
}

}  // namespace hope
