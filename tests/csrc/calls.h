// Calls of the CPU library on numbers that are the same everywhere: a scan in two parts, with the gradient of the
// second, and a model's steps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "call.h"
#include "token.h"

struct Case {
  int64_t B, H, D, N, memory, other, T;
  bool own, target_norm, clip, dgd, skip, based, modifying, keep;
  bool update = true;
  int32_t activation = 0, softplus = 0;
  // these three have no gradient here, nor have linear memories an N
  bool momentum = false, linear = false, adaptive = false, dot = false;
  bool trains() const { return !momentum && !linear && !adaptive; }
};

using Floats = std::vector<float>;

struct Draw {  // of a bell's shape, variance 1, made of integers: the same in every run and on every machine
  uint64_t state = 1;
  float one() {
    int32_t sum = 0;
    for (int i = 0; i < 12; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<int32_t>(state >> 44) - (1 << 19);
    }
    return static_cast<float>(sum) / (1 << 20);
  }
  Floats operator()(int64_t n, float scale) {
    Floats x(n);
    for (float& v : x) v = scale * one();
    return x;
  }
};

struct Results {
  Floats delta2, delta1, delta1s, pending_k, pending_v, pending_eta, pending_alpha, o, kept2, kept1, bars;
  Floats s2, s1, s1s, pending_beta, kept_q2, kept_q1, made_q;
  bool operator==(const Results& r) const {
    auto same = [](const Floats& a, const Floats& b) {
      return a.size() == b.size() && !std::memcmp(a.data(), b.data(), 4 * a.size());
    };
    return same(delta2, r.delta2) && same(delta1, r.delta1) && same(delta1s, r.delta1s) &&
           same(pending_k, r.pending_k) && same(pending_v, r.pending_v) && same(pending_eta, r.pending_eta) &&
           same(pending_alpha, r.pending_alpha) && same(o, r.o) && same(kept2, r.kept2) &&
           same(kept1, r.kept1) && same(bars, r.bars) && same(s2, r.s2) && same(s1, r.s1) && same(s1s, r.s1s) &&
           same(pending_beta, r.pending_beta) && same(kept_q2, r.kept_q2) && same(kept_q1, r.kept_q1) &&
           same(made_q, r.made_q);
  }
};

// The adjoints of everything that the call was given, one after another. start: the state that it began with.
inline Floats differentiated(TitansCall c, const Results& start) {
  Draw draw{7};
  Results s = start;
  c.delta2 = s.delta2.data(), c.delta1 = s.delta1.data(), c.delta1s = c.Ms ? s.delta1s.data() : nullptr, c.o = nullptr;
  c.pending_k = s.pending_k.data(), c.pending_v = s.pending_v.data();
  c.pending_eta = s.pending_eta.data(), c.pending_alpha = s.pending_alpha.data();
  const int64_t tokens = c.B * c.T * c.H;
  const Floats o_bar = draw(tokens * c.D, 1);
  std::vector<Floats> parts;
  auto drawn = [&](const Floats& like) { return parts.push_back(draw(like.size(), 0.1f)), parts.back().data(); };
  auto zeros = [&](int64_t n) { return parts.push_back(Floats(n)), parts.back().data(); };
  TitansBackward a{};
  a.call = c, a.o_bar = o_bar.data();
  a.delta2_bar = drawn(s.delta2), a.delta1_bar = drawn(s.delta1);
  if (c.Ms) a.delta1s_bar = drawn(s.delta1s);
  if (c.base2) a.base2_bar = zeros(s.delta2.size()), a.base1_bar = zeros(s.delta1.size());
  if (c.base1s) a.base1s_bar = zeros(s.delta1s.size());
  a.pending_k_bar = drawn(s.pending_k), a.pending_v_bar = drawn(s.pending_v);
  a.pending_eta_bar = drawn(s.pending_eta), a.pending_alpha_bar = drawn(s.pending_alpha);
  a.q_bar = zeros(tokens * c.D);
  if (c.x) a.x_bar = zeros(tokens * c.D), a.eta_bias_bar = zeros(c.B * c.H), a.alpha_bias_bar = zeros(c.B * c.H);
  if (c.k) a.k_bar = zeros(tokens * c.D), a.v_bar = zeros(tokens * c.D);
  if (c.k) a.eta_bar = zeros(tokens), a.alpha_bar = zeros(tokens);
  if (int outcome = hope_titans_backward(&a)) std::printf("refused: %d\n", outcome), std::exit(2);
  Floats all;
  for (const Floats& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

inline Results called(const Case& s, int64_t threads) {
  Draw draw;
  const int64_t Mf = s.modifying ? 3 + s.adaptive : 1, Ms = s.modifying ? 2 : 0, one = s.linear ? s.D : s.N;
  const int64_t R = s.linear ? Mf * s.D + Ms : (Mf + Ms) * s.N + (s.skip ? Ms : 0);
  const int64_t C = std::max(s.memory, s.other), tokens = s.B * s.T * s.H, chunks = s.T / s.memory + 2;
  const float w2 = 1 / std::sqrt(float(s.D)), w1 = 1 / std::sqrt(float(one));
  const Floats base2 = draw(s.H * R * s.D, w2), base1 = draw(s.H * Mf * s.D * s.N, w1);
  const Floats base1s = draw(s.H * Ms * s.N, w1);
  const Floats q = draw(tokens * s.D, 1), x = draw(tokens * s.D, 1), k = draw(tokens * s.D, w2);
  const Floats v = draw(tokens * s.D, 1), bias(s.H, 0.5f);
  Floats eta = draw(tokens, 0.1f), alpha(tokens, 0.9f);
  for (float& e : eta) e = std::abs(e);
  const Floats kept(s.keep ? s.B * s.H * chunks * one * s.D : 0);
  Results r{draw(s.B * s.H * R * s.D, 0.1f * w2), draw(s.B * s.H * Mf * s.D * s.N, 0.1f * w1),
            draw(s.B * s.H * Ms * s.N, 0.1f * w1), Floats(s.B * C * s.H * s.D), Floats(s.B * C * s.H * s.D),
            Floats(s.B * C * s.H), Floats(s.B * C * s.H), Floats(tokens * s.D), kept,
            s.linear ? Floats() : kept, {}, {}, {}, {}, {}, {}, {}, {}};
  std::vector<int64_t> pos(s.B), len(s.B);
  TitansCall c{};
  c.B = s.B, c.T = s.T, c.H = s.H, c.D = s.D, c.N = s.N, c.Mf = Mf, c.Ms = Ms;
  c.chunk_memory = s.memory, c.chunk_other = s.other, c.kept = s.keep ? chunks : 0, c.threads = threads;
  c.self_modifying = s.modifying, c.dgd = s.dgd, c.retention = 1, c.own_values = s.own;
  c.target_norm = s.target_norm, c.step_clip = s.clip, c.scalar_skip = s.skip, c.qk_l2norm = 1;
  c.update = s.update, c.activation = s.activation, c.softplus = s.softplus, c.grad_scale = 1, c.eta_scale = 0.1f;
  c.objective_dot = s.dot;
  auto given = [](auto& x) { return x.empty() ? nullptr : x.data(); };
  if (s.based) c.base2 = base2.data(), c.base1 = given(base1), c.base1s = given(base1s);
  c.delta2 = r.delta2.data(), c.delta1 = given(r.delta1), c.delta1s = given(r.delta1s);
  c.q = s.adaptive ? nullptr : q.data();
  if (s.modifying) c.x = x.data(), c.eta_bias = c.alpha_bias = bias.data();
  else c.k = k.data(), c.v = v.data(), c.eta = eta.data(), c.alpha = alpha.data();
  c.pending_k = r.pending_k.data(), c.pending_v = r.pending_v.data();
  c.pending_eta = r.pending_eta.data(), c.pending_alpha = r.pending_alpha.data();
  Floats beta(tokens);
  if (s.momentum) {
    for (float& b : beta) b = std::min(0.9f, std::abs(draw.one()));
    r.s2.resize(r.delta2.size()), r.s1.resize(r.delta1.size()), r.s1s.resize(r.delta1s.size());
    r.pending_beta.resize(r.pending_eta.size());
    c.s2 = r.s2.data(), c.s1 = given(r.s1), c.s1s = given(r.s1s);
    c.beta = beta.data(), c.pending_beta = r.pending_beta.data();
  }
  if (s.keep) c.kept2 = r.kept2.data(), c.kept1 = given(r.kept1);
  if (s.keep && s.adaptive) {
    c.kept_q = s.T / s.other + 2, r.kept_q2.resize(s.B * s.H * c.kept_q * one * s.D), r.made_q.resize(tokens * s.D);
    if (!s.linear) r.kept_q1.resize(r.kept_q2.size());
    c.kept_q2 = r.kept_q2.data(), c.kept_q1 = given(r.kept_q1), c.made_q = r.made_q.data();
  }
  c.pos = pos.data(), c.len = len.data();
  c.span = C, c.spans = s.T / C + 2;  // as many states as chunks: a backward has several spans
  Floats spans2(c.spans * r.delta2.size()), spans1(c.spans * r.delta1.size()), spans1s(c.spans * r.delta1s.size());
  Floats made_k(tokens * s.D), made_v(tokens * s.D), made_eta(tokens), made_alpha(tokens), made_size(tokens);
  c.made_k = made_k.data(), c.made_v = made_v.data(), c.made_eta = made_eta.data();
  c.made_alpha = made_alpha.data(), c.made_size = made_size.data();
  c.spans2 = spans2.data(), c.spans1 = given(spans1), c.spans1s = given(spans1s);
  for (int64_t part : {s.T / 3, s.T - s.T / 3}) {  // two calls: the second opens a chunk that is there
    for (int64_t b = 0; b < s.B; b++) len[b] = part - b % 2;
    const Results start = r;
    c.o = r.o.data();  // the first call's outputs are written over by the second's, which are more
    if (int outcome = hope_titans_scan(&c)) std::printf("refused: %d\n", outcome), std::exit(2);
    if (s.trains()) r.bars = differentiated(c, start);
    for (int64_t b = 0; b < s.B; b++) pos[b] += len[b];
  }
  return r;
}

// Logits and weights after 20 tokens of 16 rows, through two blocks of width 256 with a level each.
inline Floats stepped(int64_t threads) {
  Draw draw;
  const int64_t B = 16, d = 256, H = 4, D = 64, N = 64, V = 40, W = 4, C = 4, U = 512;
  const Floats one(d, 1), zero(H, 0), embed = draw(V * d, 1), conv = draw(d * W, 0.5f);
  const Floats base2 = draw(H * 5 * N * D, 0.1f), base1 = draw(H * 3 * D * N, 0.1f), base1s = draw(H * 2 * N, 0.1f);
  const Floats square = draw(d * d, 0.06f), up = draw(U * d, 0.06f), down = draw(d * U, 0.04f);
  const std::vector<const float*> ups(B, up.data()), downs(B, down.data());
  const TokenLevel level{GELU_LEVEL, U, {one.data()}, ups.data(), nullptr, downs.data(), {}, 1};
  std::vector<int64_t> pos(B), len(B, 1), ids(B);
  Floats delta2[2], delta1[2], delta1s[2], k[2], v[2], eta[2], alpha[2], tail[2], packed[2];
  TokenMemories memories[2] = {};
  TokenBlock blocks[2];
  for (int i = 0; i < 2; i++) {
    delta2[i].resize(B * H * 5 * N * D), delta1[i].resize(B * H * 3 * D * N), delta1s[i].resize(B * H * 2 * N);
    k[i].resize(B * C * d), v[i].resize(B * C * d), eta[i].resize(B * C * H), alpha[i].resize(B * C * H);
    tail[i].resize(B * (W - 1) * d);
    TitansCall t{};
    t.B = B, t.T = 1, t.H = H, t.D = D, t.N = N, t.Mf = 3, t.Ms = 2, t.chunk_memory = t.chunk_other = C;
    t.threads = 1, t.self_modifying = t.dgd = t.retention = t.own_values = t.target_norm = t.step_clip = 1;
    t.qk_l2norm = t.update = 1, t.grad_scale = 1, t.eta_scale = 0.5f;
    t.base2 = base2.data(), t.base1 = base1.data(), t.base1s = base1s.data(), t.eta_bias = t.alpha_bias = zero.data();
    t.delta2 = delta2[i].data(), t.delta1 = delta1[i].data(), t.delta1s = delta1s[i].data();
    t.pending_k = k[i].data(), t.pending_v = v[i].data();
    t.pending_eta = eta[i].data(), t.pending_alpha = alpha[i].data(), t.pos = pos.data(), t.len = len.data();
    packed[i].resize(hope_token_packed(&t));
    const float* w = square.data();
    TokenMemories& m = memories[i];
    m.conv = conv.data(), m.tail = tail[i].data(), m.in_proj = m.q_proj = m.gate_proj = m.out_proj = w;
    m.out_gain = one.data(), m.titans = t, m.packed = packed[i].data();
    blocks[i] = {one.data(), &memories[i], nullptr, 1, &level};
  }
  Floats logits(B * V);
  TokenCall c{B, d, W, V, 2, threads, 1, 1e-6f, 1, ids.data(), embed.data(), one.data(), embed.data(), blocks,
              logits.data(), nullptr};
  Floats work(hope_token_work(&c));
  c.work = work.data();
  if (hope_token_pack(&c)) std::printf("refused\n"), std::exit(2);
  for (int64_t t = 0; t < 20; t++) {
    for (int64_t b = 0; b < B; b++) ids[b] = (7 * t + 3 * b) % V;
    if (int outcome = hope_token_step(&c)) std::printf("refused: %d\n", outcome), std::exit(2);
    for (int64_t& p : pos) p++;
  }
  for (const Floats* more : {&delta2[0], &delta1[1], &tail[1]}) logits.insert(logits.end(), more->begin(), more->end());
  return logits;
}

// Logits, keys and values after 20 tokens of 16 rows, at different places, through two blocks of attention, one of them
// with a window and sinks, and a gated level each. rank: of what all rows but one have learned of it; 0: whole matrices,
// which are all the same.
inline Floats attended(int64_t threads, int64_t rank = 0) {
  Draw draw;
  const int64_t B = 16, d = 128, H = 6, Hkv = 2, D = 24, V = 40, U = 256, slots = 32, wide = H * D, kv = Hkv * D;
  const Floats embed = draw(V * d, 1), gain = draw(d, 1), head = draw(D, 1), bias = draw(wide, 1);
  const Floats q_proj = draw(wide * d, 0.1f), kv_proj = draw(kv * d, 0.1f), o_proj = draw(d * wide, 0.1f);
  const Floats up = draw(U * d, 0.1f), down = draw(d * U, 0.1f);
  const std::vector<const float*> ups(B, up.data()), downs(B, down.data());
  const float *n = gain.data(), *w = kv_proj.data();
  const Floats across = draw(rank * U, 0.2f), thin = draw((U + B) * rank, 0.2f);
  std::vector<const float*> learned(B);
  for (int64_t b = 1; b < B; b++) learned[b] = thin.data() + b * rank;
  LevelLowRank low{};
  if (rank) low = {rank, across.data(), across.data(), learned.data(), learned.data(), learned.data()};
  const TokenLevel levels[2] = {{SWIGLU_LEVEL, U, {n}, ups.data(), ups.data(), downs.data(), low, 1},
                                {GEGLU_LEVEL, U, {n, nullptr, n}, ups.data(), ups.data(), downs.data(), low, 1}};
  std::vector<int64_t> used(B), base(B), len(B, 1), ids(B);
  for (int64_t b = 0; b < B; b++) used[b] = b % 5, base[b] = 7 * b;
  const Floats cos = draw(B * D / 2, 1), sin = draw(B * D / 2, 1);
  Floats k[2], v[2];
  TokenAttention attention[2];
  TokenBlock blocks[2];
  for (int i = 0; i < 2; i++) {
    k[i].resize(B * slots * kv), v[i].resize(B * slots * kv);
    AttentionCall call{};
    call.B = B, call.T = 1, call.H = H, call.Hkv = Hkv, call.D = D, call.slots = slots, call.scale = 0.2f;
    call.used = used.data(), call.base = base.data(), call.len = len.data();
    const float *far = nullptr, *more = i ? bias.data() : nullptr, *norm = i ? head.data() : nullptr;
    if (i) call.window = 7, call.sinks = 3, far = sin.data();
    attention[i] = {call, k[i].data(), v[i].data(), q_proj.data(), w, w, o_proj.data(), more, more, more, norm, norm,
                    i ? n : nullptr, cos.data(), sin.data(), far, far, D / 2};
    blocks[i] = {n, nullptr, &attention[i], 1, &levels[i]};
  }
  Floats logits(B * V);
  TokenCall c{B, d, 0, V, 2, threads, 1, 1e-6f, 1, ids.data(), embed.data(), n, embed.data(), blocks, logits.data(),
              nullptr};
  Floats work(hope_token_work(&c));
  c.work = work.data();
  for (int64_t t = 0; t < 20; t++) {
    for (int64_t b = 0; b < B; b++) ids[b] = (7 * t + 3 * b) % V;
    if (int outcome = hope_token_step(&c)) std::printf("refused: %d\n", outcome), std::exit(2);
    for (int64_t& u : used) u++;
  }
  for (const Floats* more : {&k[0], &v[0], &k[1], &v[1]}) logits.insert(logits.end(), more->begin(), more->end());
  return logits;
}

constexpr bool on = true, off = false;
const Case CASES[] = {
    {1, 1, 16, 16, 16, 16, 70, on, on, on, on, off, on, on, on},
    {2, 1, 16, 32, 16, 16, 50, off, off, on, on, on, on, on, off},
    {1, 1, 16, 16, 16, 32, 100, on, on, on, on, off, on, on, on},
    {1, 1, 16, 16, 32, 16, 100, on, on, on, on, on, on, on, on},
    {1, 1, 24, 24, 48, 24, 110, on, off, on, on, off, on, on, off},
    {1, 1, 24, 24, 24, 48, 110, off, on, on, off, on, off, on, on},
    {1, 1, 16, 16, 4, 8, 40, on, on, off, off, off, off, on, on},
    {1, 2, 16, 16, 16, 16, 60, on, on, on, on, off, on, off, on},
    {3, 2, 8, 8, 16, 32, 70, on, on, on, on, off, on, on, off},
    {1, 1, 16, 16, 16, 8, 60, on, on, on, on, off, off, off, on},
    {2, 1, 16, 16, 16, 8, 50, on, on, on, on, off, on, on, off, off},
    {2, 1, 16, 16, 16, 16, 60, on, on, on, on, off, on, on, on, on, 0, 0, on},
    {1, 2, 16, 32, 24, 48, 110, off, off, on, on, on, on, on, off, on, 0, 0, on},
    {1, 2, 16, 16, 4, 8, 40, on, on, off, off, off, off, off, on, on, 0, 0, on},
    {2, 1, 24, 0, 16, 16, 60, on, on, on, on, off, on, on, on, on, 0, 0, off, on},
    {1, 2, 16, 0, 24, 48, 110, off, off, off, on, off, off, on, on, on, 0, 0, on, on},
    {1, 2, 16, 0, 4, 8, 40, on, on, on, off, off, on, off, off, on, 0, 0, off, on},
    {2, 1, 16, 0, 16, 8, 50, on, on, on, on, off, on, on, on, on, 0, 0, off, on, on, on},
    {2, 1, 16, 24, 8, 16, 60, on, on, on, on, on, on, on, on, on, 0, 0, off, off, on},
    {2, 1, 16, 16, 16, 16, 40, on, on, on, on, off, on, on, on, off, 0, 0, on, off, on},
};
