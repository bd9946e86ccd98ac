// Committing a chunk of 64 tokens by products of warpgroups where one block has all memories (N = 64): the stages of
// commit.cuh, for heads of which each memory has two warps of a warpgroup, or, with one output, one.
//
//     warps 0 1 | 2 3     M_memory | M_k
//           4 5 | 6 | 7   M_v | eta | alpha
//
// ONE TILE FOR ALL   Keys, values and transformed keys are those of all memories: a product of a warpgroup with them
// takes 64 units, whosever they are. The second warpgroup does it for the four groups of a scalar memory's warps;
// M_v's warps, who have two, keep nothing of the other two: their operand is zero where it would move weights.
// ONE TILE FOR EACH  Errors differ. A product with a memory's errors has zeros in the rows of other memories' units,
// and products with the errors of the warpgroup's memories are added up: each row has the one that is its own. (So a
// number that is not finite in one memory's errors reaches the other's weights without the detour through keys.)
// M(k) and M(v)      as in commit.cuh, of one memory after the other, over its 64 units.
// FLOPS              products of 64 x 64 x 16 of the first warpgroup (the second): 16 (32) of w2, 16 (8) of w1, 16 (32)
//                    for delta2, 16 (8) for delta1, 4 of keys, and of half the width 36 for M(k) and M(v).
#pragma once
#include "stages.cuh"

namespace hope {

template <class T, int ACT> struct OneBlockCommit : WarpgroupStages<T, ACT, 64> {
  using Base = WarpgroupStages<T, ACT, 64>;
  using typename Base::Me, typename Base::Weights;
  using Base::p, Base::shared, Base::D, Base::C, Base::kGroups, Base::kScalarGroups;
  using Base::me, Base::has, Base::keys, Base::values;
  static constexpr int kMemories = 3, kFullUnits = 64 * kMemories, kUnits = kFullUnits + 2 * 64;  // in w1, at_v; in a

  HOPE_DEVICE void run(float (&state)[16][8]) const {
    fence_proxy();
    evaluate<false>();
    evaluate<true>();
    if (const int thread = thread_index_again(); thread < 32)
      decays<D, T>(shared, C, has(kRetention), has(kDgd), thread);
    fence_proxy();
    sync_block();
    errors();
    if (has(kDgd)) key_products<D, T>(shared, C, has(kRetention));
    fence_proxy();
    sync_block();
    gradients();
    transformed_keys<D, T>(shared, C, has(kDgd), shared_at<Word4>(shared.plan.solved + 1536 * me().warp));
    fence_proxy();
    sync_block();
    step_sizes();
    update_inputs(state);
    update_outputs(state);
    if (const Role role = me().role; !role.full() && !role.idle()) update_scalar_outputs();
  }

 private:
  // Groups of units that the warp's warpgroup multiplies with one tile for all.
  HOPE_DEVICE static int groups(const Me& me) { return me.warpgroup() == 0 ? kGroups : kScalarGroups; }
  // f(memory, is it the first) for the memories with D outputs of the warp's warpgroup.
  template <class F> HOPE_DEVICE static void for_memories(const Me& me, F f) {
    const int group = me.warpgroup();
    f(2 * group, true);
    if (group == 0) f(1, false);
  }
  // An operand of which other memories' rows are zero.
  HOPE_DEVICE static void rows_of(uint32_t (&mine)[4][4], const uint32_t (&all)[4][4], bool own) {
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[s][i] = own ? all[s][i] : 0;
  }
  HOPE_DEVICE TokenTile<T> errors_tile(int memory) const { return {shared.e(memory, 0, C)}; }

  HOPE_DEVICE T* hidden(const Me& me, int offset, int units, int g, int s) const {
    const int first = me.role.full() ? 32 * me.warp : 64 * me.warp - kFullUnits;
    return Base::hidden_rows(offset, units, first + 16 * g, s, me.lane);
  }
  HOPE_DEVICE Word4* kept(const Me& me, int g) const {
    return me.role.full() ? me.own.at(shared.plan.d) + 32 * (8 * me.warp + 4 * g)
                          : me.own.at(shared.plan.more_d) + 32 * (16 * (me.warp - 6) + 4 * g);
  }
  // Sums of squares of a memory's targets over half of the positions; a scalar memory's M(k) (kind 0), M(v) (1).
  HOPE_DEVICE float* squares(int memory, int half) const {
    return shared_at<float>(shared.plan.partial) + (2 * memory + half) * C;
  }
  HOPE_DEVICE float* scalar_output(int warp, int kind) const {
    return shared_at<float>(shared.plan.partial) + (2 * (warp - kMemories) + kind) * C;
  }
  // Later, m and eta m of a memory, by its place among the block's: [2][C].
  HOPE_DEVICE float* sizes(const Role& role) const {
    return shared_at<float>(shared.plan.partial) + 2 * role.memory * C;
  }

  template <bool KEYS> HOPE_DEVICE void evaluate() const {
    const Me now = me();
    const Weights weights{now.own};
    const bool full = now.role.full();
    float norm[16] = {}, y[16] = {};
#pragma unroll 1
    for (int g = 0; g < groups(now); ++g) {
      float z[4][8], slope[8];
      Base::hidden_group(z, weights, full ? g % kGroups : g, KEYS ? keys() : values());
      if (full && g >= kGroups) continue;
      const Float2 weight = full ? Float2{0.f, 0.f} : Base::scalar_pair(now, g);
      Word4* to = kept(now, g);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (ACT != kGeluTanh) sync_warp();  // as in hidden_group of ../forward.cuh: registers are short
        activate<ACT, KEYS>(z[s], slope);
        if (KEYS) {
          Base::add_squares(norm, z[s], s);
          Base::put_hidden(hidden(now, shared.plan.a, kUnits, g, s), z[s]);
          to[32 * s] = round_block<fp16>(slope);
        } else if (full) {
          Base::put_hidden(hidden(now, shared.plan.at_v, kFullUnits, g, s), z[s], has(kOwnValues));
        }
        if (!full) Base::add_weighted(y, z[s], s, weight);
      }
    }
    if (KEYS) Base::put_tokens(shared.norms(now.warp, 0, C), norm, now.lane);
    if (!full) Base::put_tokens(scalar_output(now.warp, KEYS ? 0 : 1), y, now.lane);
  }

  // w1 times a or at_v of a memory, once it is waited for: as in commit.cuh.
  HOPE_DEVICE void outputs(float (&y)[4][4], int offset, int units, int memory) const {
    const auto a = agreed(units_matrix(shared_at<T>(offset) + 8 * 64 * memory, units, 0));
    const T* w1_matrix = Weights::template w1_matrix<T>(shared.plan) + 8 * 64 * memory;
    const auto w1 = agreed(units_matrix(w1_matrix, Weights::kUnits, 4 * me().warpgroup()));
#pragma unroll
    for (int s = 0; s < 4; ++s) warpgroup_mma_narrow(y[0], a + 256 * s, w1 + 256 * s, s == 0);
    warpgroup_commit();
  }

  HOPE_DEVICE void errors() const {
    if (has(kTargetNorm)) {
#pragma unroll 1
      for (int memory = 0; memory < kMemories; ++memory) {
        float target[4][4];
        warpgroup_fence();
        outputs(target, shared.plan.at_v, kFullUnits, memory);
        warpgroup_wait();
        const Me now = me();
        const int slot = 16 * (now.warp & 3), half = now.warpgroup();
        Base::add_tokens(target, shared.v(slot), half, now.lane);
        const float first = Base::square_sum(target, 0), second = Base::square_sum(target, 1);
        float* to = squares(memory, half) + slot + now.row();
        if ((now.lane & 3) == 0) store_shared(to, first), store_shared(to + 8, second);
      }
    }
    sync_block();
#pragma unroll 1
    for (int memory = 0; memory < kMemories; ++memory) {
      float target[4][4], error[4][4];  // the target once more: registers are too few to keep it
      warpgroup_fence();
      outputs(target, shared.plan.at_v, kFullUnits, memory);
      outputs(error, shared.plan.a, kUnits, memory);
      warpgroup_wait();
      const Me now = me();
      Base::put_errors(target, error, now, squares(memory, 0), squares(memory, 1),
                       shared.e2(2 * memory + now.warpgroup(), C), shared.e(memory, 0, C));
    }
    const Me now = me();
    if (now.role.full() || now.role.idle()) return;
#pragma unroll 1
    for (int t = now.lane; t < C; t += 32) {
      const float y = load_shared(scalar_output(now.warp, 0) + t);
      float v = load_shared(scalar_output(now.warp, 1) + t);
      if (has(kTargetNorm)) v = v > 1.f ? 1.f : v < -1.f ? -1.f : v;
      const float e = has(kDot) ? -v : p.grad_scale * (y - v);
      store_shared(shared.es(now.warp, C) + t, e);
      store_shared(shared.e2(now.warp, C) + t, e * e);
    }
  }

  HOPE_DEVICE void gradients() const {
    const Me now = me();
    const bool full = now.role.full();
    const Weights weights{now.own};
    float norm[16] = {}, e[16] = {};
    if (!full) of_tokens(e, shared.es(now.warp, C), now.lane);
#pragma unroll 1
    for (int g = 0; g < (full ? kGroups : kScalarGroups); ++g) {
      float d[4][8];
      if (g < kGroups) {
        uint32_t w[4][4];
#pragma unroll
        for (int s = 0; s < 4; ++s) weights.w1_rows(w[s], s, g);
        for_memories(now, [&](int memory, bool first) {
          uint32_t mine[4][4];
          rows_of(mine, w, now.role.memory == memory);
          const auto tile = errors_tile(memory);
          warpgroup_fence();
#pragma unroll
          for (int s = 0; s < 4; ++s) warpgroup_mma(d[0], mine[s], agreed(tile.positions(s)), first && s == 0);
          warpgroup_commit();
          warpgroup_wait();
        });
      }
      if (!full) Base::scalar_gradient(d, e, Base::scalar_pair(now, g));
      Base::finish_gradient(d, norm, kept(now, g));
    }
    Base::put_tokens(shared.norms(now.warp, 1, C), norm, now.lane);
  }

  // As in ../commit.cuh: a warp has the products of 16 keys with all others, for the memories of its warpgroup.
  HOPE_DEVICE void step_sizes() const {
    const Me now = me();
    const int lane = now.lane, group = now.warpgroup();
    if (!now.role.idle()) {
      const int first = now.role.first();
#pragma unroll 1
      for (int t = 32 * now.role.within + lane; t < C; t += 32 * now.role.warps()) {
        const float eta = load_shared(shared.eta() + t);
        if (!has(kClip)) {
          store_shared(shared.gain(first, C) + t, eta);
          continue;
        }
        float a2 = 0.f, d2 = 0.f, e2 = 0.f;
#pragma unroll 1
        for (int w = first; w < first + now.role.warps(); ++w)
          a2 += load_shared(shared.norms(w, 0, C) + t), d2 += load_shared(shared.norms(w, 1, C) + t),
              e2 += load_shared(shared.e2(w, C) + t);
        const float m = sqrt_(a2 + divide(d2, e2 + 1e-9f) + 1e-12f);
        store_shared(sizes(now.role) + t, m), store_shared(sizes(now.role) + C + t, eta * m);
      }
    }
    Base::sync_warpgroup(group);
    if (!has(kClip)) return;
    float c[4][8];  // products of the warp's 16 keys with all of them, squared
    warpgroup_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) warpgroup_mma(c[0], keys().positions(s), keys().positions(s), s == 0);
    warpgroup_commit();
    warpgroup_wait();
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < 8; ++i) c[s][i] *= c[s][i];
    const float factor = has(kDot) ? 1.f : p.grad_scale;
#pragma unroll 1
    for (int first = 4 * group; first < 4 * group + 4;) {  // memory after memory
      const Role role = shared.call().role(shared.plan, first);
      if (role.idle()) break;
      float by[16], sums[2] = {};
      of_tokens(by, sizes(role) + C, lane);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i >> 1 & 1] = fma_(by[token_of(s, i)], c[s][i], sums[i >> 1 & 1]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = 16 * (now.warp & 3) + now.row() + 8 * r;
        const float clip = factor * load_shared(sizes(role) + t) * row_sum4(sums[r]);
        const float eta = load_shared(shared.eta() + t);
        if ((lane & 3) == 0) store_shared(shared.gain(first, C) + t, divide(eta, clip <= 1.f ? 1.f : clip));
      }
      first += role.warps();
    }
    Base::sync_warpgroup(group);
  }

  // delta2 of the warp's units. Groups that the warp does not have are those of M_v's delta1: nothing moves there.
  HOPE_DEVICE void update_inputs(float (&state)[16][8]) const {
    const Me now = me();
    const bool full = now.role.full();
    const float decay_chunk = load_shared(shared.decay_chunk(C));
    const float* gain = shared.gain(now.role.first(), C);
#pragma unroll
    for (int g = 0; g < kScalarGroups; ++g) {
      if (g >= kGroups && now.warpgroup() == 0) break;
      const bool own = !now.role.idle() && (!full || g < kGroups);
      float delta2_k[4][8] = {};
      if (has(kDgd)) {
        uint32_t old[4][4];
#pragma unroll
        for (int s = 0; s < 4; ++s) as_operand<T>(old[s], state[4 * g + s]);
        warpgroup_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) warpgroup_mma(delta2_k[0], old[s], keys().positions(s), s == 0);
        warpgroup_commit();
        warpgroup_wait();
      }
      uint32_t u[4][4];
      Base::inputs_step(u, kept(now, full ? g % kGroups : g), delta2_k, gain, now.lane);
      rows_of(u, u, own);
      const float keep = own ? decay_chunk : 1.f;
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) state[4 * g + s][i] *= keep;
      warpgroup_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s)
        warpgroup_mma(state[4 * g], u[s], TokenTile<T>{shared.kg(0)}.tokens(s), false);
      warpgroup_commit();
      warpgroup_wait();
    }
  }

  // delta1 of the warp's units, transposed. Where a scalar memory's warp has delta2, nothing moves.
  HOPE_DEVICE void update_outputs(float (&state)[16][8]) const {
    const Me now = me();
    const bool full = now.role.full();
    const float keep = full ? load_shared(shared.decay_chunk(C)) : 1.f;
    float by[16];
    Base::step_after(by, shared.gain(now.role.first(), C), now.lane);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t h[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) Base::outputs_step(h[s], hidden(now, shared.plan.a, kUnits, g, s), by, s);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) state[8 + 4 * g + s][i] *= keep;
      for_memories(now, [&](int memory, bool) {
        uint32_t mine[4][4];
        rows_of(mine, h, now.role.memory == memory);
        const auto tile = errors_tile(memory);
        warpgroup_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) warpgroup_mma(state[8 + 4 * g], mine[s], agreed(tile.tokens(s)), false);
        warpgroup_commit();
        warpgroup_wait();
      });
    }
  }

  // delta1s of the warp's units, in shared memory.
  HOPE_DEVICE void update_scalar_outputs() const {
    const Me now = me();
    const float decay_chunk = load_shared(shared.decay_chunk(C));
    float by[16], e[16];
    Base::step_after(by, shared.gain(now.warp, C), now.lane);
    of_tokens(e, shared.es(now.warp, C), now.lane);
#pragma unroll
    for (int n = 0; n < 16; ++n) by[n] *= e[n];
#pragma unroll 1
    for (int g = 0; g < kScalarGroups; ++g) {
      float sums[2] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) Base::add_unit_sums(sums, hidden(now, shared.plan.a, kUnits, g, s), by, s);
      Base::put_scalar_weights(now, g, sums, decay_chunk);
    }
    sync_warp();
  }
};

}  // namespace hope
