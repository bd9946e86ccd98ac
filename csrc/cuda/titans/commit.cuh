// Committing a chunk: everything from the moment the last of its C tokens has been read to the new weights.
// Without shards a block needs nothing from the others for it.
//
//   for every panel of 16 tokens
//     evaluate        a, sigma', shares of M(k) and M(v)      last panel: also decays             | barrier
//     errors          e = M(k) - target, some tokens a warp   last panel: also key_products       | barrier
//     gradients       d = sigma' (w1^T e), |a|^2, |d|^2       last panel: also transformed_keys   | barrier
//   step_sizes        gain = eta / max(1, clip), every warp a share of its memory's tokens        | barrier
//   update_inputs     delta2 <- gamma[C,0] delta2 - U^T Kg,   u_t = gain_t d_t + erase_t delta2 k_t
//   update_outputs    delta1 <- gamma[C,0] delta1 - sum_t gain_t gamma[C,t] e_t a_t^T
//
// The last two need no barrier: units are a warp's own. FLOPs a warp and panel (32 or 64 units, D = 64): 160
// mma instructions of 4096. The smallest normal number of fp16 is 6e-5, and a step size times a decay may be
// less: U and gain gamma[C,t] a are multiplied by a power of two that makes the largest step size about one,
// and so are the deviations while they are added to, which is exact. Only the operands of products are
// rounded to T: weights, k, v, a, e, d, U, Kg, gain gamma[C,t] a.
#pragma once
#include "clock.cuh"
#include "read.cuh"

namespace hope {

// With shards: M(k) and M(v) of a block's warps go to the other block, and are added up after one more barrier
// of the (row, head) a panel; likewise the norms, after one more a chunk.
template <int D, class T, int ACT, bool ON_CHIP, class Exchange> struct Commit {
  using W = Width<D>;
  static constexpr bool kSharded = Exchange::kSharded;
  const TitansParams& p;
  const Shared<D, T>& shared;
  const Exchange& exchange;

  // Who a thread is: asked again in every stage, since registers are for the state.
  struct Me {
    int warp, lane;
    Role role;
    StoredWeights<D, ON_CHIP> weights;
  };
  HOPE_DEVICE Me me() const {
    const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
    return {warp, lane, shared.call().role(shared.plan, warp), {{p, shared.plan, shared.call(), warp, lane}}};
  }

  HOPE_DEVICE int chunk() const { return load_shared(&shared.call().chunk); }
  HOPE_DEVICE bool has(int flag) const { return p.flags & flag; }

  HOPE_DEVICE void run(float (&state)[16][8]) const {
    const int panels = chunk() / kPanel;
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      float slope[W::kGroups][8];
      const bool last = panel == panels - 1;
      evaluate(slope, panel);
      if (const int thread = thread_index_again(); last && thread >= kThreads - 32)
        decays<D, T>(shared, chunk(), has(kRetention), has(kDgd), thread & 31);
      sync_block();
      if constexpr (kSharded) {
        if (has(kOwnValues)) put_shares(panel, 1);
        exchange.barrier();
      }
      errors(panel);
      if (last && has(kDgd)) key_products<D, T>(shared, chunk(), has(kRetention));
      sync_block();
      gradients(slope, panel);
      // v and all partial outputs have been read, and the next ones are written after a barrier
      if (last)
        transformed_keys<D, T>(shared, chunk(), has(kDgd), reinterpret_cast<Word4*>(shared.part(me().warp, 0)));
      sync_block();
    }
    if constexpr (kSharded) {
      put_norms();
      exchange.barrier();
    }
    step_sizes();
    sync_block();
    const Role role = me().role;
    if (role.idle()) return;
    if (role.full()) {
      update_inputs<W::kGroups>(state);
      update_outputs(state);
    } else {
      update_inputs<W::kScalarGroups>(state);
      update_scalar_outputs();
    }
  }

 private:
  // A power of two p with v / p in [1, 2), and 1 / p; for bf16, which has the exponents of fp32, 1.
  struct Range {
    float down, up;
  };
  HOPE_DEVICE static Range range_of(float v) {
    if constexpr (kWideExponent<T>) return {1.f, 1.f};
    union { float f; uint32_t bits; } p{v > 1e-12f ? v : 1e-12f};
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      const float other = shuffle_xor(p.f, mask);
      p.f = other > p.f ? other : p.f;
    }
    p.bits &= 0x7f800000u;
    union { uint32_t bits; float f; } inverse{0x7f000000u - p.bits};
    return {p.f, inverse.f};
  }

  // The warp's fragments of a or d of a panel: group g has number g * group_stride().
  HOPE_DEVICE Word4* fragments(const Own& own, int offset, int panel) const {
    return own.at(offset) + 32 * (shared.call().first_fragment(own.warp) + panel);
  }
  HOPE_DEVICE int group_stride() const { return 2 * chunk(); }  // 32 * C / 16

  HOPE_DEVICE void store_norms(int kind, int panel, float (&sums)[2], int warp, int lane) const {
    const float n0 = row_sum4(sums[0]), n1 = row_sum4(sums[1]);
    if ((lane & 3) == 0) {
      float* to = shared.norms(warp, kind, chunk()) + panel * kPanel + (lane >> 2);
      store_shared(to, n0);
      store_shared(to + 8, n1);
    }
  }

  // Where a lane's i-th four numbers of M(k) wait for M(v) if there is one buffer.
  template <class E> HOPE_DEVICE Float4& kept_at_k(const Me& me, int i) const {
    return reinterpret_cast<Float4&>(me.weights.own.at(shared.plan.at_k)[32 * (me.warp * E::kEach + i)]);
  }
  template <class E> HOPE_DEVICE Float4 gathered(const Me& me, int buffer, int i) const {
    return E::gather(shared.part(me.role.first(), buffer), Shared<D, T>::kPart,
                     E::pair(me.role.within, me.lane), E::column(me.lane, i), me.lane);
  }

  // M(k) (kind 0) or M(v) (1), summed over the warps of this block, to both blocks of the memory.
  HOPE_DEVICE void put_shares(int panel, int kind) const {
    const Me now = me();
    if (!now.role.full()) return;
#pragma unroll 1
    for (int i = 0; i < D / 64; ++i)
      exchange.put_share(panel, kind, i, gathered<Epilogue<D, kWarps>>(now, kind, i));
  }
  // |a|^2 and |d|^2 likewise.
  HOPE_DEVICE void put_norms() const {
    const Role role = me().role;
    const int C = chunk(), kind = thread_index_again() / C, t = thread_index_again() % C;
    if (!role.full() || kind > 1) return;
    float sum = 0.f;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) sum += load_shared(shared.norms(w, kind, C) + t);
    *exchange.norm_share(exchange.shard(), kind, t) = sum;
  }
  // A lane's i-th four numbers of M(k) and M(v).
  template <class E> HOPE_DEVICE Float4 at_k(const Me& me, int panel, int i) const {
    if constexpr (kSharded)
      return exchange.sum_of_shares(panel, 0, i);
    else
      return shared.plan.one_buffer ? kept_at_k<E>(me, i) : gathered<E>(me, 0, i);
  }
  template <class E> HOPE_DEVICE Float4 at_v(const Me& me, int panel, int i) const {
    if constexpr (kSharded)
      return exchange.sum_of_shares(panel, 1, i);
    else
      return gathered<E>(me, 1, i);
  }

  // sigma' of a scalar memory's group, from evaluate to gradients.
  HOPE_DEVICE void keep_slope(const float (&slope)[8], int g, int warp, int lane) const {
    Float4* to = shared.part(warp, 0) + 64 * g + lane;
    store_shared(to, Float4{slope[0], slope[1], slope[2], slope[3]});
    store_shared(to + 32, Float4{slope[4], slope[5], slope[6], slope[7]});
  }
  HOPE_DEVICE void kept_slope(float (&slope)[8], int g, int warp, int lane) const {
    const Float4* from = shared.part(warp, 0) + 64 * g + lane;
    const Float4 a = load_shared(from), b = load_shared(from + 32);
    slope[0] = a.x, slope[1] = a.y, slope[2] = a.z, slope[3] = a.w;
    slope[4] = b.x, slope[5] = b.y, slope[6] = b.z, slope[7] = b.w;
  }

  HOPE_DEVICE void evaluate(float (&slope)[W::kGroups][8], int panel) const {
    const auto [warp, lane, role, weights] = me();
    const T* k = shared.k(panel * kPanel);
    const T* v = shared.v(panel * kPanel);
    float norm[2] = {}, z[8], other[8];
    if (role.full()) {
      uint32_t h[W::kGroups][4];
#pragma unroll
      for (int g = 0; g < W::kGroups; ++g) {
        hidden_group<D, T, ACT, true>(z, slope[g], k, weights, g, lane);
        add_squares(norm, z);
        as_operand<T>(h[g], z);
        fragments(weights.own, shared.plan.a, panel)[g * group_stride()] = {h[g][0], h[g][1], h[g][2], h[g][3]};
      }
      if (!has(kDot)) output_part<D, T>(shared.part(warp, 0), h, weights, lane);
    } else {
      float y[2] = {};  // M(v)
#pragma unroll 1
      for (int g = 0; g < W::kScalarGroups; ++g) {
        hidden_group<D, T, ACT, false>(z, other, v, weights, g, lane);
        add_scalar(y, z, scalar_weights(shared.delta1s(warp), shared.base1s(warp), g, lane));
      }
      store_sums(shared.sums(warp, 1), y, lane);
      y[0] = y[1] = 0.f;
#pragma unroll 1
      for (int g = 0; g < W::kScalarGroups; ++g) {
        hidden_group<D, T, ACT, true>(z, other, k, weights, g, lane);
        keep_slope(other, g, warp, lane);
        add_squares(norm, z);
        add_scalar(y, z, scalar_weights(shared.delta1s(warp), shared.base1s(warp), g, lane));
        uint32_t h[4];
        as_operand<T>(h, z);
        fragments(weights.own, shared.plan.a, panel)[g * group_stride()] = {h[0], h[1], h[2], h[3]};
      }
      store_sums(shared.sums(warp, 0), y, lane);
    }
    store_norms(0, panel, norm, warp, lane);
    if (shared.plan.one_buffer) {  // M(v) will take its place
      sync_block();
      if constexpr (kSharded) {
        if (!has(kDot)) put_shares(panel, 0);
      } else if (role.full() && !has(kDot)) {
        const Me now = me();
        with_epilogue<D>(now.role.warps(), [&](auto e) {
          using E = decltype(e);
          Float4 sums[E::kEach];
#pragma unroll
          for (int i = 0; i < E::kEach; ++i) sums[i] = gathered<E>(now, 0, i);
#pragma unroll
          for (int i = 0; i < E::kEach; ++i) kept_at_k<E>(now, i) = sums[i];
        });
      }
      sync_block();
    }
    if (me().role.full()) {
      if (has(kOwnValues)) {
        uint32_t h[W::kGroups][4];
#pragma unroll
        for (int g = 0; g < W::kGroups; ++g) {
          hidden_group<D, T, ACT, false>(z, other, v, weights, g, lane);
          as_operand<T>(h[g], z);
        }
        output_part<D, T>(shared.part(warp, 1), h, weights, lane);
      }
    }
  }

  template <class E> HOPE_DEVICE void full_errors(const Me& now, int panel) const {
    const int lane = now.lane, slot = panel * kPanel, r = E::pair(now.role.within, lane);
    T* e = shared.e(now.role.first() / now.role.warps(), slot, chunk()) + r * W::kRow;
    Float4 target[E::kEach];
#pragma unroll
    for (int i = 0; i < E::kEach; ++i) {
      target[i] = two_rows<D, T>(shared.v(slot), r, 8 * E::column(lane, i) + 2 * (lane & 3));
      if (has(kOwnValues)) target[i] = target[i] + at_v<E>(now, panel, i);
    }
    const Float2 by = has(kTargetNorm) ? inverse_norms<E>(target) : Float2{1.f, 1.f};
    float e2[2] = {};
#pragma unroll
    for (int i = 0; i < E::kEach; ++i) {
      const int position = 8 * E::column(lane, i) + 2 * (lane & 3);
      Float4 error = scaled(target[i], {-by.x, -by.y});
      if (!has(kDot)) {
        const Float4 sum = two_rows<D, T>(shared.k(slot), r, position) + at_k<E>(now, panel, i) + error;
        error = scaled(sum, {p.grad_scale, p.grad_scale});
      }
      e2[0] = fma_(error.x, error.x, fma_(error.y, error.y, e2[0]));
      e2[1] = fma_(error.z, error.z, fma_(error.w, error.w, e2[1]));
      store_shared(reinterpret_cast<uint32_t*>(e + position), pack2<T>(error.x, error.y));
      store_shared(reinterpret_cast<uint32_t*>(e + 8 * W::kRow + position), pack2<T>(error.z, error.w));
    }
    e2[0] = E::sum(e2[0]), e2[1] = E::sum(e2[1]);
    if (const int half = lane % E::kLanes; half < 2)
      store_shared(shared.e2(now.role.first(), chunk()) + slot + r + 8 * half, half == 0 ? e2[0] : e2[1]);
  }

  HOPE_DEVICE void errors(int panel) const {
    const Me now = me();
    const auto [warp, lane, role, weights] = now;
    const int slot = panel * kPanel;
    if (role.full()) {
      with_epilogue<D>(role.warps(), [&](auto e) { full_errors<decltype(e)>(now, panel); });
    } else if (role.within == 0 && lane < kPanel) {
      float y = 0.f, target = 0.f;
      for (int w = 0; w < role.warps(); ++w) {
        y += load_shared(shared.sums(role.first() + w, 0) + lane);
        target += load_shared(shared.sums(role.first() + w, 1) + lane);
      }
      if (has(kTargetNorm)) target = target > 1.f ? 1.f : target < -1.f ? -1.f : target;
      const float error = has(kDot) ? -target : p.grad_scale * (y - target);
      store_shared(shared.es(role.first(), chunk()) + slot + lane, error);
      store_shared(shared.e2(role.first(), chunk()) + slot + lane, error * error);
    }
  }

  HOPE_DEVICE void gradients(const float (&slope)[W::kGroups][8], int panel) const {
    const auto [warp, lane, role, weights] = me();
    const int slot = panel * kPanel, stride = group_stride();
    Word4* const d_blocks = fragments(weights.own, shared.plan.d, panel);
    float norm[2] = {};
    if (role.full()) {
      const T* e = shared.e(role.first() / role.warps(), slot, chunk());
      float d[W::kGroups][8];
#pragma unroll
      for (int i = 0; i < W::kSteps; ++i) {
        uint32_t rows[4];
        load_matrices(rows, corner<D>(e, 16 * i, lane));
#pragma unroll
        for (int g = 0; g < W::kGroups; ++g) {
          const Word4 w = weights.w1(i, g);
          mma<T>(d[g], rows, transpose8x8(w.x), transpose8x8(w.y), i == 0);
          mma<T>(d[g] + 4, rows, transpose8x8(w.z), transpose8x8(w.w), i == 0);
        }
      }
#pragma unroll
      for (int g = 0; g < W::kGroups; ++g) finish_gradient(d[g], slope[g], norm, d_blocks + g * stride);
    } else {
      const float e0 = load_shared(shared.es(role.first(), chunk()) + slot + (lane >> 2));
      const float e1 = load_shared(shared.es(role.first(), chunk()) + slot + (lane >> 2) + 8);
#pragma unroll 1
      for (int g = 0; g < W::kScalarGroups; ++g) {
        const Float4 w = scalar_weights(shared.delta1s(warp), shared.base1s(warp), g, lane);
        float d[8] = {w.x * e0, w.y * e0, w.x * e1, w.y * e1, w.z * e0, w.w * e0, w.z * e1, w.w * e1};
        float kept[8];
        kept_slope(kept, g, warp, lane);
        finish_gradient(d, kept, norm, d_blocks + g * stride);
      }
    }
    store_norms(1, panel, norm, warp, lane);
  }

  HOPE_DEVICE static void finish_gradient(float (&d)[8], const float (&slope)[8], float (&norm)[2],
                                          Word4* block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] *= slope[i];
    add_squares(norm, d);
    *block = round_block<T>(d);
  }

  // gain_t = eta_t / max(1, S_t), S_t = c m_t sum_s eta_s m_s (k_t.k_s)^2: the memory's warps take eight tokens
  // t in turn. Every one of them has the sizes m of all tokens; products of keys are made again, which is
  // cheaper than to keep them.
  HOPE_DEVICE void step_sizes() const {
    const auto [warp, lane, role, weights] = me();
    if (role.idle()) return;
    const int C = chunk();
    float* gain = shared.gain(role.first(), C);
    if (!has(kClip)) {
      for (int t = 32 * role.within + lane; t < C; t += 32 * role.warps())
        store_shared(gain + t, load_shared(shared.eta() + t));
      return;
    }
    // where the warp's partial outputs were
    float* size = reinterpret_cast<float*>(shared.part(warp, 0));
    float* weight = size + C;  // eta m
    sync_warp();
    if (const int t = 2 * lane; t < C) {
      Float2 a2{0.f, 0.f}, d2{0.f, 0.f};
      if (kSharded && role.full()) {
        a2 = {exchange.sum_of_norms(0, t), exchange.sum_of_norms(0, t + 1)};
        d2 = {exchange.sum_of_norms(1, t), exchange.sum_of_norms(1, t + 1)};
      } else {
        const float* norms = shared.norms(role.first(), 0, C) + t;
#pragma unroll 1
        for (int w = role.warps(); w > 0; --w, norms += 2 * C) {
          const Float2 a = load_shared(reinterpret_cast<const Float2*>(norms));
          const Float2 d = load_shared(reinterpret_cast<const Float2*>(norms + C));
          a2 = {a2.x + a.x, a2.y + a.y}, d2 = {d2.x + d.x, d2.y + d.y};
        }
      }
      const Float2 e2 = load_shared(reinterpret_cast<const Float2*>(shared.e2(role.first(), C) + t));
      const Float2 m{sqrt_(a2.x + divide(d2.x, e2.x + 1e-9f) + 1e-12f),
                     sqrt_(a2.y + divide(d2.y, e2.y + 1e-9f) + 1e-12f)};
      const Float2 eta = load_shared(reinterpret_cast<const Float2*>(shared.eta() + t));
      store_shared(reinterpret_cast<Float2*>(size + t), m);
      store_shared(reinterpret_cast<Float2*>(weight + t), Float2{eta.x * m.x, eta.y * m.y});
    }
    sync_warp();
    const float factor = has(kDot) ? 1.f : p.grad_scale;
#pragma unroll 1
    for (int t = 8 * role.within; t < C; t += 8 * role.warps()) {
      uint32_t keys[W::kSteps / 2][4];  // operands b of steps 2 i and 2 i + 1
#pragma unroll
      for (int i = 0; i < W::kSteps / 2; ++i)
        load_matrices(keys[i], shared.k(t + (lane & 7)) + 32 * i + 8 * (lane >> 3));
      float sums[2] = {};
#pragma unroll 1
      for (int slot = 0; slot < C; slot += kPanel) {
        float c[4];  // k_s.k_t
#pragma unroll
        for (int s = 0; s < W::kSteps; ++s) {
          uint32_t rows[4];
          load_matrices(rows, corner<D>(shared.k(slot), 16 * s, lane));
          mma<T>(c, rows, keys[s / 2][2 * (s & 1)], keys[s / 2][2 * (s & 1) + 1], s == 0);
        }
        const float* by = weight + slot + (lane >> 2);
        const float w0 = load_shared(by), w1 = load_shared(by + 8);
        sums[0] = fma_(w1 * c[2], c[2], fma_(w0 * c[0], c[0], sums[0]));
        sums[1] = fma_(w1 * c[3], c[3], fma_(w0 * c[1], c[1], sums[1]));
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        sums[0] += shuffle_xor(sums[0], mask), sums[1] += shuffle_xor(sums[1], mask);
      if (lane < 4) {
        const Float2 m = load_shared(reinterpret_cast<const Float2*>(size + t) + lane);
        const Float2 eta = load_shared(reinterpret_cast<const Float2*>(shared.eta() + t) + lane);
        const float clip[2] = {factor * m.x * sums[0], factor * m.y * sums[1]};
        store_shared(reinterpret_cast<Float2*>(gain + t) + lane,
                     Float2{divide(eta.x, clip[0] <= 1.f ? 1.f : clip[0]),
                            divide(eta.y, clip[1] <= 1.f ? 1.f : clip[1])});
      }
    }
  }

  // delta2 of the warp's units: blocks g * kSteps + s.
  template <int GROUPS> HOPE_DEVICE void update_inputs(float (&state)[16][8]) const {
    const Me mine = me();
    const float decay_chunk = load_shared(shared.decay_chunk(chunk()));
    float largest = 0.f;
    if constexpr (!kWideExponent<T>) {
      const float* gain = shared.gain(mine.role.first(), chunk());
#pragma unroll 1
      for (int t = mine.lane; t < chunk(); t += 32) {
        const float step = load_shared(gain + t), erase = load_shared(shared.erase() + t);
        largest = step > largest ? step : largest;
        largest = erase > largest ? erase : largest;
      }
    }
    const Range range = range_of(largest);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      sync_warp();  // as in hidden_group
      constexpr bool kKept = D == 64 && kWideExponent<T>;  // where registers are left for what loops over panels need
      const Word4* d_blocks = nullptr;
      if (kKept) d_blocks = fragments(mine.weights.own, shared.plan.d, 0) + g * group_stride();
      Word4 old[W::kSteps];
#pragma unroll
      for (int s = 0; s < W::kSteps; ++s) {
        old[s] = round_block<T>(state[g * W::kSteps + s]);
#pragma unroll
        for (int i = 0; i < 8; ++i) state[g * W::kSteps + s][i] *= decay_chunk * range.up;
      }
#pragma unroll 1
      for (int panel = 0; panel < chunk() / kPanel; ++panel) {
        const Me now = kKept ? mine : me();
        const int lane = now.lane, slot = panel * kPanel, row = slot + (lane >> 2);
        const float* gain = shared.gain(now.role.first(), chunk());
        float d[8];
        unpack_block<T>(d, kKept ? d_blocks[32 * panel]
                                 : fragments(now.weights.own, shared.plan.d, panel)[g * group_stride()]);
        float delta2_k[8] = {};
        if (has(kDgd)) {
#pragma unroll
          for (int s = 0; s < W::kSteps; ++s) {
            uint32_t k[4];
            load_matrices(k, corner<D>(shared.k(slot), 16 * s, lane));
            mma<T>(delta2_k, k, old[s].x, old[s].z, s == 0);
            mma<T>(delta2_k + 4, k, old[s].y, old[s].w, s == 0);
          }
        }
        const float step[2] = {-range.up * load_shared(gain + row), -range.up * load_shared(gain + row + 8)};
        const float erase[2] = {-range.up * load_shared(shared.erase() + row),
                                -range.up * load_shared(shared.erase() + row + 8)};
        uint32_t moved[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows g, g + 8 take turns
          const float u0 = fma_(step[i & 1], d[2 * i], erase[i & 1] * delta2_k[2 * i]);
          const float u1 = fma_(step[i & 1], d[2 * i + 1], erase[i & 1] * delta2_k[2 * i + 1]);
          moved[i] = transpose8x8(pack2<T>(u0, u1));
        }
        const uint32_t rows[4] = {moved[0], moved[2], moved[1], moved[3]};  // units x tokens
#pragma unroll
        for (int s = 0; s < W::kSteps; ++s) {
          uint32_t keys[4];
          load_matrices_transposed(keys, corner<D>(shared.kg(slot), 16 * s, lane));
          mma<T>(state[g * W::kSteps + s], rows, keys[0], keys[1]);
          mma<T>(state[g * W::kSteps + s] + 4, rows, keys[2], keys[3]);
        }
      }
      if constexpr (!kWideExponent<T>) {
#pragma unroll
        for (int s = 0; s < W::kSteps; ++s)
#pragma unroll
          for (int i = 0; i < 8; ++i) state[g * W::kSteps + s][i] *= range.down;
      }
    }
  }

  // delta1 of the warp's units: blocks 8 + i * kGroups + g.
  HOPE_DEVICE void update_outputs(float (&state)[16][8]) const {
    const auto [warp, lane, role, weights] = me();
    const float decay_chunk = load_shared(shared.decay_chunk(chunk()));
    const float* gain = shared.gain(role.first(), chunk());
    float largest = 0.f;
    if constexpr (!kWideExponent<T>) {
#pragma unroll 1
      for (int t = lane; t < chunk(); t += 32) {
        const float step = load_shared(gain + t) * load_shared(shared.decay_after() + t);
        largest = step > largest ? step : largest;
      }
    }
    const Range range = range_of(largest);
#pragma unroll
    for (int b = 8; b < 16; ++b)
#pragma unroll
      for (int i = 0; i < 8; ++i) state[b][i] *= decay_chunk * range.up;
#pragma unroll 1
    for (int panel = 0; panel < chunk() / kPanel; ++panel) {
      const int slot = panel * kPanel, row = slot + (lane >> 2);
      const float by[2] = {
          -range.up * (load_shared(gain + row) * load_shared(shared.decay_after() + row)),
          -range.up * (load_shared(gain + row + 8) * load_shared(shared.decay_after() + row + 8))};
      uint32_t h[W::kGroups][4];
#pragma unroll
      for (int g = 0; g < W::kGroups; ++g) {
        float a[8];
        unpack_block<T>(a, fragments(weights.own, shared.plan.a, panel)[g * group_stride()]);
#pragma unroll
        for (int i = 0; i < 4; ++i) h[g][i] = transpose8x8(pack2<T>(by[i & 1] * a[2 * i], by[i & 1] * a[2 * i + 1]));
      }
      const T* e = shared.e(role.first() / role.warps(), slot, chunk());
#pragma unroll
      for (int i = 0; i < W::kSteps; ++i) {
        uint32_t rows[4];
        load_matrices_transposed(rows, corner_b<D>(e, 16 * i, lane));
#pragma unroll
        for (int g = 0; g < W::kGroups; ++g) {
          mma<T>(state[8 + i * W::kGroups + g], rows, h[g][0], h[g][1]);
          mma<T>(state[8 + i * W::kGroups + g] + 4, rows, h[g][2], h[g][3]);
        }
      }
    }
    if constexpr (!kWideExponent<T>) {
#pragma unroll
      for (int b = 8; b < 16; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) state[b][i] *= range.down;
    }
  }

  // delta1 of a scalar memory's units, in shared memory.
  HOPE_DEVICE void update_scalar_outputs() const {
    const auto [warp, lane, role, weights] = me();
    const float decay_chunk = load_shared(shared.decay_chunk(chunk()));
    const float* gain = shared.gain(role.first(), chunk());
    const Word4* a_blocks = fragments(weights.own, shared.plan.a, 0);
#pragma unroll 1
    for (int g = 0; g < W::kScalarGroups; ++g, a_blocks += group_stride()) {
      Float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int panel = 0; panel < chunk() / kPanel; ++panel) {
        const int row = panel * kPanel + (lane >> 2);
        float by[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          by[half] = load_shared(gain + row + 8 * half) * load_shared(shared.decay_after() + row + 8 * half) *
                     load_shared(shared.es(role.first(), chunk()) + row + 8 * half);
        float a[8];
        unpack_block<T>(a, a_blocks[32 * panel]);
        sum = {fma_(a[2], by[1], fma_(a[0], by[0], sum.x)), fma_(a[3], by[1], fma_(a[1], by[0], sum.y)),
               fma_(a[6], by[1], fma_(a[4], by[0], sum.z)), fma_(a[7], by[1], fma_(a[5], by[0], sum.w))};
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        sum = sum + Float4{shuffle_xor(sum.x, mask), shuffle_xor(sum.y, mask), shuffle_xor(sum.z, mask),
                           shuffle_xor(sum.w, mask)};
      if (lane < 4) {
        Float4* to = reinterpret_cast<Float4*>(shared.delta1s(warp) + 16 * g) + lane;
        const Float4 old = load_shared(to);
        store_shared(to, Float4{fma_(decay_chunk, old.x, -sum.x), fma_(decay_chunk, old.y, -sum.y),
                                fma_(decay_chunk, old.z, -sum.z), fma_(decay_chunk, old.w, -sum.w)});
      }
    }
    sync_warp();
  }
};

}  // namespace hope
