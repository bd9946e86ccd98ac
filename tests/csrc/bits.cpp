// Hashes of what every function of the CPU library computes, one a line. The same on every machine, with vectors of
// every width. usage: bits [WIDTH]
#include <cstdio>
#include <functional>
#include <limits>
#include <string>

#include "attention.h"
#include "attention_model.h"
#include "calls.h"
#include "checksum.h"
#include "cms.h"
#include "cms_whole.h"
#include "layer.h"
#include "layer_parameters.h"
#include "linear.h"
#include "segment.h"

namespace {

template <class T> void show(const std::string& name, const std::vector<T>& numbers, uint64_t hash = 14695981039346656037u) {
  for (T x : numbers) {
    uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    if (x != x) bits = 0x7FC00000;  // machines differ in which NaN a computation makes
    for (int i = 0; i < 4; i++) hash = (hash ^ (bits >> 8 * i & 255)) * 1099511628211u;
  }
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

void done(int outcome) {
  if (outcome) std::printf("refused: %d\n", outcome), std::exit(2);
}

void scans() {
  int index = 0;
  for (Case s : CASES) {
    for (int32_t activation : {0, 1, 2}) {
      if (s.linear && activation) continue;
      s.activation = activation, s.softplus = index % 2;
      const Results r = called(s, 1);
      const std::string name = "scan " + std::to_string(index) + " activation " + std::to_string(activation);
      Floats state = r.delta2;
      for (const Floats* more : {&r.delta1, &r.delta1s, &r.pending_k, &r.pending_v, &r.pending_eta, &r.pending_alpha,
                                 &r.kept2, &r.kept1, &r.s2, &r.s1, &r.s1s, &r.pending_beta, &r.kept_q2, &r.kept_q1,
                                 &r.made_q})
        state.insert(state.end(), more->begin(), more->end());
      show(name + " o", r.o), show(name + " state", state);
      if (s.trains()) show(name + " gradients", r.bars);
    }
    index++;
  }
}

void reads() {
  Draw draw;
  const int64_t B = 2, T = 40, H = 2, D = 16, N = 32, C = 16, kept = 4;
  const Floats w2 = draw(B * H * kept * N * D, 0.25f), w1 = draw(B * H * kept * D * N, 0.2f);
  const Floats q = draw(B * T * H * D, 1), grad = draw(B * T * H * D, 1);
  const std::vector<int64_t> pos{5, 0}, len{40, 33};
  for (int32_t activation : {0, 1, 2}) {
    Floats dq(q.size());
    const TitansReadBackward c{B, T, H, D, N, C, kept, 1, activation, w2.data(), w1.data(), q.data(), grad.data(),
                               pos.data(), len.data(), dq.data()};
    done(hope_titans_read_backward(&c));
    show("read_backward activation " + std::to_string(activation), dq);
  }
  Floats dq(q.size());
  const TitansReadBackward c{B, T, H, D, 0, C, kept, 1, 0, w2.data(), nullptr, q.data(), grad.data(), pos.data(),
                             len.data(), dq.data()};
  done(hope_titans_read_backward(&c));
  show("read_backward linear", dq);
}

void layers() {
  Draw draw;
  const int64_t B = 2, T = 9, H = 3, D = 16, d = H * D, W = 4, n = B * T * d;
  const Floats x = draw(n, 1), tail = draw(B * (W - 1) * d, 1), weight = draw(d * W, 0.5f), dy = draw(n, 1);
  const Floats gain = draw(d, 1), gate = draw(n, 3);
  const std::vector<int64_t> len{9, 5};
  Floats y(n), more(B * (W - 1) * d), dx(n), other(n);
  done(hope_conv(B, T, d, W, 1, x.data(), tail.data(), weight.data(), len.data(), y.data(), more.data()));
  show("conv", y), show("conv tail", more);
  done(hope_conv_backward(B, T, d, W, 1, weight.data(), dy.data(), dx.data()));
  show("conv_backward", dx);
  Floats taps(d * W), dgain(d);
  done(hope_conv_weight_backward(B, T, d, W, 1, x.data(), tail.data(), dy.data(), taps.data()));
  show("conv_weight_backward", taps);
  done(hope_unit(B * T * H, D, 1, x.data(), y.data()));
  show("unit", y);
  done(hope_unit_backward(B * T * H, D, 1, x.data(), dy.data(), dx.data()));
  show("unit_backward", dx);
  done(hope_output_gate(B * T, H, D, 1, x.data(), gain.data(), gate.data(), y.data()));
  show("output_gate", y);
  done(hope_output_gate_backward(B * T, H, D, 1, x.data(), gain.data(), gate.data(), dy.data(), dx.data(), other.data()));
  show("output_gate_backward o", dx), show("output_gate_backward gate", other);
  done(hope_output_gate_gain_backward(B * T, H, D, 1, x.data(), gate.data(), dy.data(), dgain.data()));
  show("output_gate_gain_backward", dgain);
}

void projections() {
  Draw draw;
  for (int64_t tokens : {1, 5, 29}) {
    const int64_t K = 600, R = 131;  // more than one depth of a strip, and outputs that fill none
    const Floats x = draw(tokens * K, 1), weight = draw(R * K, 0.1f), more = draw(tokens * R, 1);
    Floats y(tokens * R), sum(tokens * R);
    done(hope_linear(tokens, K, R, 1, x.data(), weight.data(), nullptr, y.data()));
    done(hope_linear(tokens, K, R, 1, x.data(), weight.data(), more.data(), sum.data()));
    show("linear " + std::to_string(tokens), y), show("linear " + std::to_string(tokens) + " more", sum);
  }
  const Floats x = draw(5 * 40, 1), gain = draw(40, 1);
  Floats y(5 * 40);
  done(hope_rms_norm(5, 40, 1, 1e-6f, x.data(), gain.data(), y.data()));
  show("rms_norm", y);
  done(hope_layer_norm(5, 40, 1, 1e-6f, x.data(), gain.data(), x.data(), y.data()));
  show("layer_norm", y);
  Floats gates(5 * 40);
  for (int32_t softplus : {0, 1}) {
    done(hope_gate(5, 40, softplus, 0.5f, x.data(), gain.data(), gates.data()));
    show("gate " + std::to_string(softplus), gates);
  }
}

void attention_backward(const std::string& name, AttentionCall c) {
  Draw draw{3};
  const Floats dy = draw(c.B * c.T * c.H * c.D, 1);
  const int64_t own = c.B * c.T * c.Hkv * c.D;
  Floats most(c.B * c.T * c.H), sum(most.size()), dq(dy.size()), dfar(dy.size()), dk(own), dv(own);
  c.most = most.data(), c.sum = sum.data();
  done(hope_attention(&c));
  const AttentionBackward a{c, dy.data(), nullptr, c.sinks ? dfar.data() : nullptr, dq.data(), dk.data(), dv.data()};
  done(hope_attention_backward(&a));
  for (const Floats* more : {&dfar, &dk, &dv}) dq.insert(dq.end(), more->begin(), more->end());
  show(name, dq);
}

void attention() {
  Draw draw;
  const int64_t B = 2, T = 90, H = 6, Hkv = 2, slots = 240;
  const std::vector<int64_t> used{130, 0}, base{70, 0}, len{90, 51};
  for (int64_t D : {16, 13})
    for (int64_t window : {0, 40, 5}) {
      const int64_t sinks = window == 40 ? 70 : window ? 3 : 0, n = B * T * H * D, keys = B * slots * Hkv * D;
      Floats q = draw(n, 2), far = draw(n, 2), k = draw(keys, 1), v = draw(keys, 1), y(n);
      k[30 * Hkv * D] = 300, v[(slots + 20) * Hkv * D] = std::numeric_limits<float>::infinity();
      for (int64_t tokens : {90, 1}) {  // panels, and a few lanes
        const std::vector<int64_t> some{std::min(tokens, len[0]), std::min(tokens, len[1])};
        const AttentionCall c{B, T, H, Hkv, D, slots, window, sinks, 1, 0.25f, q.data(), sinks ? far.data() : nullptr,
                              k.data(), v.data(), used.data(), base.data(), some.data(), y.data()};
        done(hope_attention(&c));
        const std::string name =
            " " + std::to_string(D) + " window " + std::to_string(window) + " of " + std::to_string(tokens);
        show("attention" + name, y);
        attention_backward("attention_backward" + name, c);
      }
    }
}

void attention_model() {
  Draw draw;
  const int64_t B = 2, T = 37, d = 16, H = 4, Hkv = 2, D = 20, N = 24, slots = 50;  // heads that fill no vectors
  const std::vector<int64_t> used{7, 0}, base{2, 0}, len{37, 21};
  const Floats gain = draw(d, 1), q_proj = draw(H * D * d, 0.2f), k_proj = draw(Hkv * D * d, 0.2f);
  const Floats v_proj = draw(Hkv * D * d, 0.2f), o_proj = draw(d * H * D, 0.2f), bias = draw(H * D, 0.1f);
  const Floats cos = draw(B * T * D / 2, 0.5f), sin = draw(B * T * D / 2, 0.5f), up = draw(N * d, 0.2f);
  const Floats down = draw(d * N, 0.2f), other = draw(N * d, 0.2f);
  Floats k = draw(B * slots * Hkv * D, 1), v = draw(B * slots * Hkv * D, 1), h = draw(B * T * d, 1);
  const float* ups[] = {up.data(), other.data()};
  const float* downs[] = {down.data(), down.data()};
  const AttentionLevel level{GELU_LEVEL, N, gain.data(), ups, downs};
  AttentionBlock block{};
  block.gain = gain.data(), block.q_proj = q_proj.data(), block.k_proj = k_proj.data(), block.v_proj = v_proj.data();
  block.o_proj = o_proj.data(), block.q_bias = bias.data(), block.cos = block.far_sin = cos.data();
  block.sin = block.far_cos = sin.data(), block.k = k.data(), block.v = v.data();
  block.levels = 1, block.level = &level;
  block.attention.B = B, block.attention.H = H, block.attention.Hkv = Hkv, block.attention.D = D;
  block.attention.slots = slots, block.attention.window = 9, block.attention.sinks = 3, block.attention.threads = 1;
  block.attention.scale = 0.3f, block.attention.used = used.data(), block.attention.base = base.data();
  const AttentionReading c{B, T, d, 1, 1, 16, B, 1e-6f, len.data(), &block, h.data()};
  done(hope_attention_read(&c));
  std::fill(h.begin() + (T + len[1]) * d, h.end(), 0.0f);  // of tokens that do not count
  show("attention_model", h), show("attention_model keys", k);
}

// Through two blocks, back to the level of the first. behind: norms behind mixers and level. mixture: as if it were one
// of several levels, with biases behind a layer norm. rank: of what rows learn, where the second has learned nothing; 0:
// whole matrices.
void attention_segment(const std::string& name, LevelKind kind, bool behind, bool mixture = false, int64_t rank = 0,
                       bool preconditioned = false) {
  Draw draw;
  const int64_t B = 2, T = 21, d = 16, H = 4, Hkv = 2, D = 8, N = 24, V = 11, slots = 50;
  const std::vector<int64_t> used{9, 0}, base{4, 0}, len{21, 10}, known{20, 10};
  const Floats gain = draw(d, 1), q_proj = draw(H * D * d, 0.3f), k_proj = draw(Hkv * D * d, 0.3f);
  const Floats v_proj = draw(Hkv * D * d, 0.3f), o_proj = draw(d * H * D, 0.3f), bias = draw(H * D, 0.1f);
  const Floats cos = draw(B * T * D / 2, 0.5f), sin = draw(B * T * D / 2, 0.5f), embed = draw(V * d, 1);
  Floats k = draw(B * slots * Hkv * D, 1), v = draw(B * slots * Hkv * D, 1);
  AttentionMixer mixer{};
  mixer.gain = gain.data(), mixer.q_proj = q_proj.data(), mixer.k_proj = k_proj.data(), mixer.v_proj = v_proj.data();
  mixer.o_proj = o_proj.data(), mixer.k_bias = bias.data(), mixer.q_gain = gain.data(), mixer.k_gain = bias.data();
  mixer.cos = mixer.far_sin = cos.data(), mixer.sin = mixer.far_cos = sin.data();
  mixer.k = k.data(), mixer.v = v.data();
  AttentionCall& t = mixer.attention;
  t.B = B, t.H = H, t.Hkv = Hkv, t.D = D, t.slots = slots, t.window = 7, t.sinks = 2, t.threads = 1, t.scale = 0.3f;
  t.used = used.data(), t.base = base.data();
  Floats weights[3] = {draw(B * N * d, 0.2f), draw(B * d * N, 0.2f), draw(B * N * d, 0.2f)};
  Floats thin[3] = {draw(B * N * rank, 0.2f), draw(B * d * rank, 0.2f), draw(B * N * rank, 0.2f)};
  const Floats across = draw(rank * d, 0.3f), across_down = draw(rank * N, 0.3f);
  std::vector<const float*> rows[3], learned[3];
  std::vector<SegmentStep> steps[3];
  for (int i : {0, 1, 2})
    for (int64_t b = 0; b < B; b++) {
      rows[i].push_back(weights[i].data() + (rank ? 0 : b * N * d));
      float* own = rank ? thin[i].data() + b * (i == 1 ? d : N) * rank : weights[i].data() + b * N * d;
      learned[i].push_back(b ? nullptr : own);
      steps[i].push_back({0, 0, 0.1f, 0, 0, 0, 0, 0, 0, nullptr, own, nullptr, nullptr});
    }
  const bool gate = kind == SWIGLU_LEVEL || kind == GEGLU_LEVEL;
  // of what each matrix is given: one row steps by its P at once, the other sums up and so does its next P
  const int64_t most = preconditioned ? (rank ? rank : N) : 0;
  Floats inverses[4] = {Floats(most * most), Floats(most * most), Floats(most * most), Floats(most * most)};
  std::vector<RowInverse> inverse[2];
  for (int i = 0; i < 2 && preconditioned; i++) {
    const int64_t K = rank ? rank : i ? N : d;
    for (int64_t k = 0; k < K; k++) inverses[2 * i][k * K + k] = inverses[2 * i + 1][k * K + k] = 1;
    inverse[i].push_back({AT_ONCE, 0.5f, inverses[2 * i].data(), nullptr});
    inverse[i].push_back({LATER, 0.5f, nullptr, inverses[2 * i + 1].data()});
  }
  LevelLowRank low{};
  if (rank)
    low = {rank, across.data(), across_down.data(), learned[0].data(), gate ? learned[2].data() : nullptr,
           learned[1].data()};
  const float* post = behind ? gain.data() : nullptr;
  LevelVectors vectors{gain.data(), nullptr, post, nullptr, nullptr, nullptr};
  if (mixture) vectors.shift = vectors.up_bias = vectors.gate_bias = vectors.down_bias = bias.data();
  const SegmentLevel level{kind, N, 1, preconditioned, vectors, rows[0].data(), gate ? rows[2].data() : nullptr,
                           rows[1].data(), low, steps[0].data(), steps[2].data(), steps[1].data(),
                           preconditioned ? inverse[0].data() : nullptr, preconditioned ? inverse[1].data() : nullptr,
                           mixture ? 0.3f : 1};
  SegmentBlock blocks[2]{};
  AttentionMixer mixers[2] = {mixer, mixer};
  Floats other_k = k, other_v = v;
  mixers[1].k = other_k.data(), mixers[1].v = other_v.data();
  for (int i : {0, 1}) {
    blocks[i].attention = &mixers[i], blocks[i].post_gain = post;
    blocks[i].levels = 1 - i, blocks[i].level = &level, blocks[i].mixture = mixture;
  }
  std::vector<int64_t> ids(B * T);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = i * i % V;
  const std::vector<int64_t> targets(ids.rbegin(), ids.rend());
  std::vector<int32_t> learns(B, 1);
  Floats nats(B * T);
  SegmentCall c{};
  c.B = B, c.T = c.stride = T, c.d = d, c.vocab = V, c.blocks = 2, c.threads = 1, c.rotations = B, c.keep = 1;
  c.eps = 1e-6f, c.scale = 1, c.ids = ids.data(), c.len = len.data(), c.embed = c.head = embed.data();
  c.gain = gain.data();
  c.block = blocks, c.targets = targets.data(), c.known = known.data(), c.nats = nats.data(), c.learns = learns.data();
  Floats work(hope_segment_floats(&c));
  c.work = work.data();
  done(hope_segment_read(&c)), done(hope_segment_head(&c)), done(hope_segment_learn(&c));
  const Floats* changed = rank ? thin : weights;
  show(name + " nats", nats), show(name + " up", changed[0]), show(name + " down", changed[1]);
  if (gate) show(name + " gate", changed[2]);
  for (const Floats& P : inverses)
    if (preconditioned) show(name + " P", P);
  show(name + " keys", other_k);
}

void levels() {
  Draw draw;
  const int64_t rows = 5, d = 40, n = 1000;
  Floats z = draw(n, 4);
  const float extremes[] = {0, -0.f, 1e-40f, -1e-30f, 88, -88, 130, -130, 3e38f, -3e38f,
                            std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  std::copy(std::begin(extremes), std::end(extremes), z.begin());
  Floats a(n), slope(n), dx(rows * d), dgain(d);
  for (int32_t erf : {1, 0}) {
    done(hope_cms_gelu(n, 1, erf, z.data(), a.data(), slope.data()));
    const std::string name = erf ? "gelu of erf" : "gelu";
    show(name, a), show(name + " slope", slope);
  }
  const Floats x = draw(rows * d, 1), gain = draw(d, 1), dn = draw(rows * d, 1), dy = draw(rows * d, 1);
  Floats gated(n);
  for (int32_t silu : {0, 1}) {
    done(hope_cms_gate(n, 1, silu, z.data(), slope.data(), gated.data()));
    show("cms gate " + std::to_string(silu), gated);
  }
  done(hope_cms_norm_backward(rows, d, 1, 1e-6f, x.data(), gain.data(), dn.data(), dy.data(), dx.data(), dgain.data()));
  show("norm_backward", dx), show("norm_backward gain", dgain);
  int64_t sum;
  done(hope_checksum(4 * n - 3, a.data(), &sum));
  show("checksum", std::vector<int32_t>{static_cast<int32_t>(sum), static_cast<int32_t>(sum >> 32)});
  for (int64_t rule : {0, 1, 2}) {
    const Floats grad = draw(n, 1);
    Floats total = draw(n, 1), weight = draw(n, 1), moment = draw(n, 0.1f), square = draw(n, 0.1f);
    for (float& s : square) s *= s;
    std::vector<uint16_t> copy(n);
    done(hope_cms_step(n, 1, rule, 0.1f, 0.9f, 0.99f, 0.1f, 0.01f, 1.1f, 1e-8f, grad.data(), total.data(),
                       weight.data(), rule ? moment.data() : nullptr, rule == 2 ? square.data() : nullptr, copy.data()));
    const std::string name = "step " + std::to_string(rule);
    show(name, weight), show(name + " moment", moment), show(name + " square", square), show(name + " bf16", copy);
  }
}

void whole() {
  Draw draw;
  for (auto [r, c] : {std::pair<int64_t, int64_t>{5, 3}, {24, 33}, {70, 200}, {200, 70}}) {
    Floats g = draw(2 * r * c, 1);
    done(hope_newton_schulz(2, r, c, 1, g.data(), g.data()));
    show("newton_schulz " + std::to_string(r) + " x " + std::to_string(c), g);
  }
  Floats g = draw(5000, 1e-3f);
  done(hope_normalise(5000, 1, g.data()));
  show("normalise", g);
  const int64_t c = 72;
  Floats P(c * c);
  for (int64_t i = 0; i < c; i++) P[i * c + i] = 1;
  for (int64_t n : {13, 100}) {  // some, and more than it takes at a time
    const Floats x = draw(n * c, 1);
    done(hope_take_up(n, c, 1, 0.7f, x.data(), P.data()));
    show("take_up of " + std::to_string(n), P);
  }
  Floats weights = draw(70 * c, 1);
  done(hope_precondition(70, c, 1, P.data(), weights.data()));
  show("precondition", weights);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && hope_cpu_width(std::atoi(arguments[1])) != std::atoi(arguments[1])) return 3;
  scans(), reads(), layers(), projections(), attention(), attention_model();
  attention_segment("attention_segment", GELU_LEVEL, false);
  attention_segment("attention_segment swiglu", SWIGLU_LEVEL, false);
  attention_segment("attention_segment geglu, norms behind", GEGLU_LEVEL, true);
  attention_segment("attention_segment of a mixture", SWIGLU_LEVEL, true, true);
  attention_segment("attention_segment gelu of erf", GELU_ERF_LEVEL, false);
  attention_segment("attention_segment low rank", GELU_LEVEL, false, false, 8);
  attention_segment("attention_segment preconditioned, swiglu", SWIGLU_LEVEL, false, false, 0, true);
  attention_segment("attention_segment low rank, geglu of a mixture", GEGLU_LEVEL, true, true, 16);
  levels(), whole();
  show("model's steps", stepped(1)), show("steps with attention", attended(1));
  show("steps of low rank", attended(1, 16));
}
