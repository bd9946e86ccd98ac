// A CMS level in a decoder's step.
#pragma once
#include "token_state.h"

// from: [B, d], what it reads; what it makes of that joins the stream.
inline void read_level(const TokenState& s, const TokenLevel& level, const float* from) {
  const TokenBuffers& w = s.w;
  const LevelVectors& v = level.vectors;
  const int64_t B = s.B, d = s.d, N = level.N;
  s.norm(from, v.gain, v.shift);
  auto inner = [&](const float* const* W, const float* bias, float* y) {
    product(s.team, B, N, d, w.n, [=](int64_t b) { return W[b]; },
            [=](int64_t b, int64_t r, float sum) { y[b * N + r] = bias ? sum + bias[r] : sum; });
  };
  inner(level.up, v.up_bias, w.hidden);
  if (level.gate) inner(level.gate, v.gate_bias, w.gates);
  s.team.sync();
  const Range own = s.team.share(0, B * N, 8);
  auto activate = [&](auto f) {
    const FlushDenormals flush;
    for (int64_t i = own.begin; i < own.end; i += 8) store(w.hidden + i, f(i, load(w.hidden + i)));
  };
  if (level.kind == SWIGLU_LEVEL) activate([&](int64_t i, f8 z) { return sigma<SILU>(load(w.gates + i)) * z; });
  else if (level.gate) activate([&](int64_t i, f8 z) { return sigma<GELU_TANH>(load(w.gates + i)) * z; });
  else activate([](int64_t, f8 z) { return sigma<GELU_TANH>(z); });
  s.team.sync();
  float* const out = v.post_gain ? w.x : w.h;
  const bool joins = out == w.h;
  const float share = level.share, *bias = v.down_bias;
  product(s.team, B, d, N, w.hidden, [&](int64_t b) { return level.down[b]; },
          [=](int64_t b, int64_t r, float sum) {
            const float y = bias ? sum + bias[r] : sum;
            out[b * d + r] = joins ? out[b * d + r] + share * y : y;
          });
  if (!joins) s.join(w.x, v.post_gain, share);
}
