// A CMS level in a decoder's step.
#pragma once
#include "token_state.h"

// w.thin = S x, for rows x [K] and S [rank, K]; whole to everyone afterwards
inline void thin_product(const TokenState& s, int64_t rank, int64_t K, const float* S, const float* x) {
  if (rank == 0) return;
  s.project(rank, K, x, S, s.w.thin);
  s.team.sync();
}

// y = W x + bias, of rows x [K] and y [rows]; with L: W x + L thin + bias, in rows that have an L, by way of `part`, which
// may be y.
template <class Done>
void level_product(const TokenState& s, int64_t rows, int64_t K, const float* const* W, int64_t rank,
                   const float* const* L, const float* bias, const float* x, float* part, Done done) {
  if (rank)
    product(s.team, s.B, rows, rank, s.w.thin, [=](int64_t b) { return L[b]; },
            [=](int64_t b, int64_t r, float sum) { part[b * rows + r] = sum; });
  product(s.team, s.B, rows, K, x, [=](int64_t b) { return W[b]; }, [=](int64_t b, int64_t r, float sum) {
    if (rank && L[b]) sum = sum + part[b * rows + r];
    done(b, r, bias ? sum + bias[r] : sum);
  });
}

// from: [B, d], what it reads; what it makes of that joins the stream.
inline void read_level(const TokenState& s, const TokenLevel& level, const float* from) {
  const TokenBuffers& w = s.w;
  const LevelVectors& v = level.vectors;
  const LevelLowRank& low = level.low;
  const int64_t B = s.B, d = s.d, N = level.N;
  s.norm(from, v.gain, v.shift);
  thin_product(s, low.rank, d, low.across, w.n);
  auto inner = [&](const float* const* W, const float* const* L, const float* bias, float* y) {
    level_product(s, N, d, W, low.rank, L, bias, w.n, y, [=](int64_t b, int64_t r, float z) { y[b * N + r] = z; });
  };
  inner(level.up, low.up, v.up_bias, w.hidden);
  if (level.gate) inner(level.gate, low.gate, v.gate_bias, w.gates);
  s.team.sync();
  const Range own = s.team.share(0, B * N, 8);
  auto activate = [&](auto f) {
    const FlushDenormals flush;
    for (int64_t i = own.begin; i < own.end; i += 8) store(w.hidden + i, f(i, load(w.hidden + i)));
  };
  f8 slope;  // beside which sigma has the bits of a segment
  if (level.kind == SWIGLU_LEVEL) activate([&](int64_t i, f8 z) { return sigma<SILU>(load(w.gates + i)) * z; });
  else if (level.gate) activate([&](int64_t i, f8 z) { return sigma<GELU_TANH>(load(w.gates + i)) * z; });
  else if (level.kind == GELU_LEVEL) activate([](int64_t, f8 z) { return sigma<GELU_TANH>(z); });
  else activate([&](int64_t, f8 z) { return sigma<GELU>(z, slope); });
  s.team.sync();
  thin_product(s, low.rank, N, low.across_down, w.hidden);
  const bool joins = !v.post_gain;
  const float share = level.share;
  level_product(s, d, N, level.down, low.rank, low.down, v.down_bias, w.hidden, w.x,
                [=](int64_t b, int64_t r, float y) {
                  if (joins) w.h[b * d + r] = w.h[b * d + r] + share * y;
                  else w.x[b * d + r] = y;
                });
  if (!joins) s.join(w.x, v.post_gain, share);
}
