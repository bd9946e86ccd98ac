// What commits by products of warpgroups have in common, whichever memories a block has (commit.cuh, one_block.cuh).
#pragma once
#include "../clock.cuh"
#include "../read.cuh"
#include "tokens.cuh"
#include "weights.cuh"

namespace hope {

template <class V> HOPE_DEVICE V* shared_at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }

// Of heads with N hidden units.
template <class T, int ACT, int N> struct WarpgroupStages {
  static constexpr int D = 64, C = kChunk;
  static constexpr int kGroups = Width<D>::kGroups, kScalarGroups = Width<D>::kScalarGroups;
  using S = Shared<D, T, PieceRows<N>>;
  using Weights = WarpgroupWeights<N>;
  const TitansParams& p;
  const S& shared;

  struct Me {
    int warp, lane;
    Role role;
    Own own;
    HOPE_DEVICE int warpgroup() const { return warp >> 2; }
    HOPE_DEVICE int row() const { return lane >> 2; }
  };
  HOPE_DEVICE Me me() const {
    const int thread = thread_index_again(), warp = thread >> 5, lane = thread & 31;
    return {warp, lane, shared.call().role(shared.plan, warp), {p, shared.plan, shared.call(), warp, lane}};
  }
  HOPE_DEVICE bool has(int flag) const { return p.flags & flag; }

  HOPE_DEVICE TokenTile<T> keys() const { return {shared.k(0)}; }
  HOPE_DEVICE TokenTile<T> values() const { return {shared.v(0)}; }
  // Memory by memory: the weights w1 of a lane's two units of a group.
  HOPE_DEVICE Float2 scalar_pair(const Me& me, int g) const {
    const int unit = 16 * g + 4 * (me.row() >> 1) + (me.row() & 1);
    const float *delta = shared.delta1s(me.warp) + unit, *base = shared.base1s(me.warp) + unit;
    return {load_shared(delta) + load_shared(base), load_shared(delta + 2) + load_shared(base + 2)};
  }
  HOPE_DEVICE static void put_tokens(float* to, float (&v)[16], int lane) {
    store_shared(reinterpret_cast<Float2*>(to) + lane, token_sums(v, lane));
  }

  // Of 16 tokens s, a lane's: adds w z, or z^2.
  HOPE_DEVICE static void add_weighted(float (&y)[16], const float (&z)[8], int s, Float2 w) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[token_of(s, i)] = fma_(z[i], i & 2 ? w.y : w.x, y[token_of(s, i)]);
  }
  HOPE_DEVICE static void add_squares(float (&sums)[16], const float (&z)[8], int s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[token_of(s, i)] = fma_(z[i], z[i], sums[token_of(s, i)]);
  }

  // z of a group: w2 times the tokens of a tile.
  HOPE_DEVICE static void hidden_group(float (&z)[4][8], const Weights& weights, int g,
                                       const TokenTile<T>& tile) {
    uint32_t w[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const Word4 block = weights.w2(g, s);
      w[s][0] = block.x, w[s][1] = block.y, w[s][2] = block.z, w[s][3] = block.w;
    }
    warpgroup_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) warpgroup_mma(z[0], w[s], tile.positions(s), s == 0);
    warpgroup_commit();
    warpgroup_wait();
  }

  // A lane's row of a or at_v, 16 units from `unit` on, 16 tokens s. units: of the matrix.
  HOPE_DEVICE T* hidden_rows(int offset, int units, int unit, int s, int lane) const {
    return four_pieces<false>(shared_at<T>(offset) + 8 * unit, units, lane) + 8 * units * 2 * s;
  }
  // z of 16 tokens there, or zeros.
  HOPE_DEVICE static void put_hidden(T* row, const float (&z)[8], bool there = true) {
    uint32_t h[4];
    as_operand<T>(h, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) h[i] = there ? h[i] : 0;
    store_matrices(row, h);
  }

  // Of the four numbers of 8 positions j of a half: rows r and r + 8 of the warp's 16 tokens.
  HOPE_DEVICE static float square_sum(const float (&x)[4][4], int row) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum = fma_(x[j][2 * row], x[j][2 * row], fma_(x[j][2 * row + 1], x[j][2 * row + 1], sum));
    return row_sum4(sum);
  }
  // Adds a tile's numbers at the warp's 16 tokens and the half of the positions.
  HOPE_DEVICE static void add_tokens(float (&x)[4][4], const T* rows, int half, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t words[4];
      load_matrices(words, S::rows(rows, 32 * half + 16 * i, lane));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Float2 v = unpack2<T>(words[n]);
        x[2 * i + (n >> 1)][2 * (n & 1)] += v.x, x[2 * i + (n >> 1)][2 * (n & 1) + 1] += v.y;
      }
    }
  }

  // The errors of the warp's 16 tokens at its warpgroup's half of the positions, from M(v) (target) and M(k) (error)
  // there, to a tile. Squares of targets, [C] of either half, are there; those of errors go to e2.
  HOPE_DEVICE void put_errors(float (&target)[4][4], float (&error)[4][4], const Me& me, const float* first_half,
                              const float* second_half, float* e2, T* tile) const {
    const int lane = me.lane, half = me.warpgroup(), slot = 16 * (me.warp & 3), row = slot + me.row();
    add_tokens(target, shared.v(slot), half, lane);
    add_tokens(error, shared.k(slot), half, lane);
    float by[2] = {1.f, 1.f};
    if (has(kTargetNorm)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = row + 8 * r;
        const float norm = sqrt_(load_shared(first_half + t) + load_shared(second_half + t));
        by[r] = divide(1.f, norm > 1e-6f ? norm : 1e-6f);
      }
    }
    const bool dot = has(kDot);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float wanted = target[j][i] * by[i >> 1];
        error[j][i] = dot ? -wanted : p.grad_scale * (error[j][i] - wanted);
      }
    const float first = square_sum(error, 0), second = square_sum(error, 1);
    e2 += row;
    if ((lane & 3) == 0) store_shared(e2, first), store_shared(e2 + 8, second);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store_matrices(const_cast<T*>(S::rows(tile + slot * S::kRow, 32 * half + 16 * i, lane)),
                     {pack2<T>(error[2 * i][0], error[2 * i][1]),
                      pack2<T>(error[2 * i][2], error[2 * i][3]),
                      pack2<T>(error[2 * i + 1][0], error[2 * i + 1][1]),
                      pack2<T>(error[2 * i + 1][2], error[2 * i + 1][3])});
  }

  // w1 times the errors of a lane's tokens.
  HOPE_DEVICE static void scalar_gradient(float (&d)[4][8], const float (&e)[16], Float2 w) {
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < 8; ++i) d[s][i] = (i & 2 ? w.y : w.x) * e[token_of(s, i)];
  }
  // g becomes d, which takes the place of sigma'.
  HOPE_DEVICE static void finish_gradient(float (&d)[4][8], float (&norm)[16], Word4* kept) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float slope[8];
      unpack_block<fp16>(slope, kept[32 * s]);
#pragma unroll
      for (int i = 0; i < 8; ++i) d[s][i] *= slope[i];
      kept[32 * s] = round_block<T>(d[s]);
      add_squares(norm, d[s], s);
    }
  }

  // -u of a group: of a memory's gains, its d and delta2 k.
  HOPE_DEVICE void inputs_step(uint32_t (&u)[4][4], const Word4* d_blocks, const float (&delta2_k)[4][8],
                               const float* gain, int lane) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float d[8];
      unpack_block<T>(d, d_blocks[32 * s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 16 * s + 8 * (i >> 1);
        const auto at_tokens = [&](const float* from) {
          return load_shared(reinterpret_cast<const Float2*>(from + column) + (lane & 3));
        };
        const Float2 step = at_tokens(gain), erase = at_tokens(shared.erase());
        u[s][i] = pack2<T>(fma_(-step.x, d[2 * i], -erase.x * delta2_k[s][2 * i]),
                           fma_(-step.y, d[2 * i + 1], -erase.y * delta2_k[s][2 * i + 1]));
      }
    }
  }
  // -gain_t gamma[C,t] of a lane's tokens.
  HOPE_DEVICE void step_after(float (&by)[16], const float* gain, int lane) const {
    float after[16];
    of_tokens(by, gain, lane);
    of_tokens(after, shared.decay_after(), lane);
#pragma unroll
    for (int n = 0; n < 16; ++n) by[n] = -(by[n] * after[n]);
  }
  // `by` times a of 16 tokens s; and the sums of that over the tokens, of a lane's two units.
  HOPE_DEVICE static void outputs_step(uint32_t (&h)[4], const T* row, const float (&by)[16], int s) {
    load_matrices(h, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float2 pair = unpack2<T>(h[i]);
      const int n = token_of(s, 2 * i);
      h[i] = pack2<T>(by[n] * pair.x, by[n + 1] * pair.y);
    }
  }
  HOPE_DEVICE static void add_unit_sums(float (&sums)[2], const T* row, const float (&by)[16], int s) {
    uint32_t h[4];
    load_matrices(h, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float2 pair = unpack2<T>(h[i]);
      const int n = token_of(s, 2 * i);
      sums[i & 1] = fma_(pair.y, by[n + 1], fma_(pair.x, by[n], sums[i & 1]));
    }
  }

  // delta1s of a lane's two units of a group, once more: what is added is summed over the lanes that share them.
  HOPE_DEVICE void put_scalar_weights(const Me& me, int g, const float (&sums)[2], float decay_chunk) const {
    const float first = row_sum4(sums[0]), second = row_sum4(sums[1]);
    if ((me.lane & 3) == 0) {
      float* to = shared.delta1s(me.warp) + 16 * g + 4 * (me.row() >> 1) + (me.row() & 1);
      store_shared(to, fma_(decay_chunk, load_shared(to), first));
      store_shared(to + 2, fma_(decay_chunk, load_shared(to + 2), second));
    }
  }

  HOPE_DEVICE static void sync_warpgroup(int group) {
    if (group == 0)
      sync_some(1, 128);
    else
      sync_some(2, 128);
  }
};

}  // namespace hope
