// Committing a chunk of 64 tokens by products of warpgroups (../../warpgroup.cuh): what ../commit.cuh does,
// for all tokens at once and with other sums of the same numbers. A memory with D outputs has a block for itself.
//
//     evaluate      z^T = w2 K^T, w2 V^T; a = sigma(z), sigma', |a|^2; last warp: decays     | barrier
//     errors        M(k), M(v) = a^T w1^T over all units, e; products of keys                | 2 barriers
//     gradients     g^T = w1^T E^T, d = sigma' g, |d|^2; transformed keys                    | barrier
//     step_sizes    K K^T; gains                                           | 2 barriers of the warpgroup
//     update        delta2 <- gamma[C,0] delta2 - U^T Kg,  u_t = gain_t d_t + erase_t delta2 k_t
//                   delta1^T <- gamma[C,0] delta1^T - sum_t gain_t gamma[C,t] a_t e_t^T
//
// UNITS ARE ROWS (m), tokens columns (n), of all products but those of M(k) and M(v): a warp's 16 units are
// its rows of the 64 that a warpgroup multiplies. So weights, deviations, a, d and u are operands a in
// registers of the warp that owns the units, sums become operands without an exchange, and keys, values,
// errors and transformed keys are operands b for all warps, each in the one tile it lies in, whichever of
// tokens and positions is summed over. delta1 is kept transposed for that. M(k) and M(v) are summed over all
// units by the tensor cores: tokens as m, and of the 64 positions 32 for each warpgroup, from a of the whole
// block and w1 in shared memory.
// ROUNDING    as in ../commit.cuh; sigma', which is kept from evaluate to gradients, to fp16.
// FLOPS       a warpgroup: 12 products of 64 x 64 x 64 with weights or for them (a scalar memory: 16), 6 for
//             M(k) and M(v), 1 of keys.
#pragma once
#include "stages.cuh"

namespace hope {

template <class T, int ACT> struct WarpgroupCommit : WarpgroupStages<T, ACT, 256> {
  using Base = WarpgroupStages<T, ACT, 256>;
  using typename Base::Me, typename Base::Weights;
  using Base::p, Base::shared, Base::D, Base::C, Base::kGroups, Base::kScalarGroups;
  using Base::me, Base::has, Base::keys, Base::values;

  HOPE_DEVICE void run(float (&state)[16][8]) const {
    fence_proxy();  // tokens are there, from other blocks as well
    evaluate();
    if (const int thread = thread_index_again(); thread >= kThreads - 32)
      decays<D, T>(shared, C, has(kRetention), has(kDgd), thread & 31);
    fence_proxy();
    sync_block();
    errors();
    if (has(kDgd)) key_products<D, T>(shared, C, has(kRetention));
    fence_proxy();
    sync_block();
    gradients();
    {
      const Me now = me();
      unsigned char* solved = now.role.full() ? reinterpret_cast<unsigned char*>(shared.part(now.warp, 0))
                                              : shared_memory() + shared.plan.solved + 1536 * now.warp;
      transformed_keys<D, T>(shared, C, has(kDgd), reinterpret_cast<Word4*>(solved));
    }
    fence_proxy();
    sync_block();
    const Role role = me().role;
    if (role.idle()) return;
    step_sizes();
    if (role.full()) {
      update_inputs<kGroups>(state);
      update_outputs(state);
    } else {
      update_inputs<kScalarGroups>(state);
      update_scalar_outputs();
    }
  }

 private:
  HOPE_DEVICE TokenTile<T> errors_tile() const { return {shared.e(0, 0, C)}; }
  // A lane's row of a or at_v of a group, 16 tokens s. GROUPS: of a warp.
  template <int GROUPS> HOPE_DEVICE T* hidden(const Me& me, int offset, int g, int s) const {
    return Base::hidden_rows(offset, 16 * GROUPS * kWarps, 16 * GROUPS * me.warp + 16 * g, s, me.lane);
  }
  // sigma', later d, of a group: a lane's own, 32 s for 16 tokens s.
  HOPE_DEVICE Word4* kept(const Me& me, int g) const {
    return me.own.at(g < 2 ? shared.plan.d : shared.plan.more_d) + 32 * (8 * me.warp + 4 * (g & 1));
  }
  // A full memory: sums of squares of its warpgroup `warp`. A scalar one: a warp's share of M(k) (kind 0) or M(v).
  HOPE_DEVICE float* shares(int warp, int kind) const {
    return shared_at<float>(shared.plan.partial) + (2 * warp + kind) * C;
  }
  HOPE_DEVICE void evaluate() const {
    const Me now = me();
    if (now.role.idle()) return;
    if (now.role.full())
      evaluate_values<true>(now), evaluate_keys<true>(now);
    else
      evaluate_values<false>(now), evaluate_keys<false>(now);
  }
  template <bool FULL> HOPE_DEVICE void evaluate_values(const Me& now) const {
    const Weights weights{now.own};
    float y[16] = {};
#pragma unroll 1
    for (int g = 0; g < (FULL ? kGroups : kScalarGroups); ++g) {
      float z[4][8], unused[8];
      Base::hidden_group(z, weights, g, values());
      const Float2 weight = FULL ? Float2{0.f, 0.f} : Base::scalar_pair(now, g);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (ACT != kGeluTanh) sync_warp();  // as in hidden_group of ../forward.cuh: registers are short
        activate<ACT, false>(z[s], unused);
        if (FULL)
          Base::put_hidden(hidden<kGroups>(now, shared.plan.at_v, g, s), z[s], has(kOwnValues));
        else
          Base::add_weighted(y, z[s], s, weight);
      }
    }
    if (!FULL) Base::put_tokens(shares(now.warp, 1), y, now.lane);
  }
  template <bool FULL> HOPE_DEVICE void evaluate_keys(const Me& now) const {
    const Weights weights{now.own};
    float norm[16] = {}, y[16] = {};
#pragma unroll 1
    for (int g = 0; g < (FULL ? kGroups : kScalarGroups); ++g) {
      float z[4][8], slope[8];
      Base::hidden_group(z, weights, g, keys());
      const Float2 weight = FULL ? Float2{0.f, 0.f} : Base::scalar_pair(now, g);
      Word4* to = kept(now, g);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (ACT != kGeluTanh) sync_warp();
        activate<ACT, true>(z[s], slope);
        Base::add_squares(norm, z[s], s);
        if (!FULL) Base::add_weighted(y, z[s], s, weight);
        Base::put_hidden(hidden<FULL ? kGroups : kScalarGroups>(now, shared.plan.a, g, s), z[s]);
        to[32 * s] = round_block<fp16>(slope);
      }
    }
    Base::put_tokens(shared.norms(now.warp, 0, C), norm, now.lane);
    if (!FULL) Base::put_tokens(shares(now.warp, 0), y, now.lane);
  }

  // w1 times a or at_v, once it is waited for: the warp's 16 tokens by its warpgroup's half of the positions.
  HOPE_DEVICE void outputs(float (&y)[4][4], int offset) const {
    const auto a = units_matrix(shared_at<T>(offset), 256, 0);
    const T* w1_matrix = Weights::template w1_matrix<T>(shared.plan);
    const auto w1 = agreed(units_matrix(w1_matrix, Weights::kUnits, 4 * me().warpgroup()));
#pragma unroll
    for (int s = 0; s < 16; ++s) warpgroup_mma_narrow(y[0], a + 256 * s, w1 + 256 * s, s == 0);
    warpgroup_commit();
  }

  HOPE_DEVICE void errors() const {
    if (const Me now = me(); now.role.full()) {
      const int row = 16 * (now.warp & 3) + now.row(), half = now.warpgroup();
      float target[4][4];
      warpgroup_fence();
      outputs(target, shared.plan.at_v);
      warpgroup_wait();
      Base::add_tokens(target, shared.v(16 * (now.warp & 3)), half, now.lane);
      const float first = Base::square_sum(target, 0), second = Base::square_sum(target, 1);
      if ((now.lane & 3) == 0)
        store_shared(shares(half, 0) + row, first), store_shared(shares(half, 0) + row + 8, second);
    }
    sync_block();
    const Me now = me();
    if (now.role.full()) {
      float target[4][4], error[4][4];  // the target once more: registers are too few to keep it
      warpgroup_fence();
      outputs(target, shared.plan.at_v);
      outputs(error, shared.plan.a);
      warpgroup_wait();
      Base::put_errors(target, error, now, shares(0, 0), shares(1, 0), shared.e2(4 * now.warpgroup(), C),
                       shared.e(0, 0, C));
    } else if (!now.role.idle() && now.role.within < 2) {
      const int t = 32 * now.role.within + now.lane, memory = now.role.first();
      float y = 0.f, v = 0.f;
      for (int w = 0; w < now.role.warps(); ++w)
        y += load_shared(shares(memory + w, 0) + t), v += load_shared(shares(memory + w, 1) + t);
      if (has(kTargetNorm)) v = v > 1.f ? 1.f : v < -1.f ? -1.f : v;
      const float e = has(kDot) ? -v : p.grad_scale * (y - v);
      store_shared(shared.es(memory, C) + t, e);
      store_shared(shared.e2(memory, C) + t, e * e);
    }
  }

  HOPE_DEVICE void gradients() const {
    const Me now = me();
    if (now.role.idle()) return;
    float norm[16] = {};
    if (now.role.full()) {
      const Weights weights{now.own};
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        uint32_t w[4][4];
        float d[4][8];
#pragma unroll
        for (int s = 0; s < 4; ++s) weights.w1_rows(w[s], s, g);
        warpgroup_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) warpgroup_mma(d[0], w[s], errors_tile().positions(s), s == 0);
        warpgroup_commit();
        warpgroup_wait();
        Base::finish_gradient(d, norm, kept(now, g));
      }
    } else {
      float e[16];
      of_tokens(e, shared.es(now.role.first(), C), now.lane);
#pragma unroll 1
      for (int g = 0; g < kScalarGroups; ++g) {
        float d[4][8];
        Base::scalar_gradient(d, e, Base::scalar_pair(now, g));
        Base::finish_gradient(d, norm, kept(now, g));
      }
    }
    Base::put_tokens(shared.norms(now.warp, 1, C), norm, now.lane);
  }
  // As in ../commit.cuh; a memory of two warpgroups has its gains twice.
  HOPE_DEVICE void step_sizes() const {
    const Me now = me();
    const int lane = now.lane, group = now.warpgroup(), thread = 32 * (now.warp & 3) + lane;
    float* gain = shared.gain(4 * group, C);
    if (!has(kClip)) {
      if (thread < C) store_shared(gain + thread, load_shared(shared.eta() + thread));
      return Base::sync_warpgroup(group);
    }
    float* size = shared.sums(4 * group, 0);
    float* weight = size + C;  // eta m
    if (thread < C) {
      const int t = thread, first = now.role.first();
      float a2 = 0.f, d2 = 0.f, e2 = load_shared(shared.e2(first, C) + t);
      if (now.role.full()) e2 += load_shared(shared.e2(4, C) + t);
#pragma unroll 4
      for (int w = first; w < first + now.role.warps(); ++w)
        a2 += load_shared(shared.norms(w, 0, C) + t), d2 += load_shared(shared.norms(w, 1, C) + t);
      const float m = sqrt_(a2 + divide(d2, e2 + 1e-9f) + 1e-12f);
      store_shared(size + t, m), store_shared(weight + t, load_shared(shared.eta() + t) * m);
    }
    Base::sync_warpgroup(group);
    float c[4][8];  // products of the warp's 16 keys with all of them
    warpgroup_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) warpgroup_mma(c[0], keys().positions(s), keys().positions(s), s == 0);
    warpgroup_commit();
    warpgroup_wait();
    float by[16], sums[2] = {};
    of_tokens(by, weight, lane);
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sums[i >> 1 & 1] = fma_(by[token_of(s, i)] * c[s][i], c[s][i], sums[i >> 1 & 1]);
    const float factor = has(kDot) ? 1.f : p.grad_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = 16 * (now.warp & 3) + now.row() + 8 * r;
      const float clip = factor * load_shared(size + t) * row_sum4(sums[r]);
      const float eta = load_shared(shared.eta() + t);
      if ((lane & 3) == 0) store_shared(gain + t, divide(eta, clip <= 1.f ? 1.f : clip));
    }
    Base::sync_warpgroup(group);
  }

  // delta2 of the warp's units.
  template <int GROUPS> HOPE_DEVICE void update_inputs(float (&state)[16][8]) const {
    const Me now = me();
    const float decay_chunk = load_shared(shared.decay_chunk(C));
    const float* gain = shared.gain(4 * now.warpgroup(), C);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
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
      Base::inputs_step(u, kept(now, g), delta2_k, gain, now.lane);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) state[4 * g + s][i] *= decay_chunk;
      warpgroup_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s)
        warpgroup_mma(state[4 * g], u[s], TokenTile<T>{shared.kg(0)}.tokens(s), false);
      warpgroup_commit();
      warpgroup_wait();
    }
  }

  // delta1 of the warp's units, transposed.
  HOPE_DEVICE void update_outputs(float (&state)[16][8]) const {
    const Me now = me();
    const float decay_chunk = load_shared(shared.decay_chunk(C));
    float by[16];
    Base::step_after(by, shared.gain(4 * now.warpgroup(), C), now.lane);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t h[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) Base::outputs_step(h[s], hidden<kGroups>(now, shared.plan.a, g, s), by, s);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) state[8 + 4 * g + s][i] *= decay_chunk;
      warpgroup_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) warpgroup_mma(state[8 + 4 * g], h[s], errors_tile().tokens(s), false);
      warpgroup_commit();
      warpgroup_wait();
    }
  }

  // delta1s of the warp's units, in shared memory.
  HOPE_DEVICE void update_scalar_outputs() const {
    const Me now = me();
    const float decay_chunk = load_shared(shared.decay_chunk(C));
    float by[16], e[16];
    Base::step_after(by, shared.gain(4 * now.warpgroup(), C), now.lane);
    of_tokens(e, shared.es(now.role.first(), C), now.lane);
#pragma unroll
    for (int n = 0; n < 16; ++n) by[n] *= e[n];
#pragma unroll 1
    for (int g = 0; g < kScalarGroups; ++g) {
      float sums[2] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) Base::add_unit_sums(sums, hidden<kScalarGroups>(now, shared.plan.a, g, s), by, s);
      Base::put_scalar_weights(now, g, sums, decay_chunk);
    }
    sync_warp();
  }
};

}  // namespace hope
