// One token a row through a whole model, in one call: what would be some forty calls of PyTorch a block, each of
// which takes longer than its work. Weights are met once for all rows of the batch, and are all there is to do:
// their bytes, from wherever they lie, are the time of a step.
//
// A team of threads shares out every product by rows of weights, with barriers in between; a number is one chain
// of operations, whatever the batch and the threads. Memories have the bits of hope_titans_scan, and their chunks
// are committed by its code; so have all products those of panels (segment_run.h), which is why weights lie input by
// input here. Everything a step would advance is written last, once the logits are known.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "check.h"
#include "titans_heads.h"
#include "titans_token.h"
#include "token.h"
#include "width.h"

namespace {

constexpr int NOT_FINITE = 3;
constexpr int64_t ALONE = 1 << 21;  // products that one thread is done with before others are worth waking

constexpr int64_t STRIP = 64;  // outputs of a weight that lie beside each other, input by input; the last has fewer

// Outputs [j, j + 8 NV) of a strip `w` wide for NB rows x, K apart: one chain over the inputs each, as in panels.
template <int NB, int NV>
HK_INLINE void columns(int64_t K, const float* W, int64_t w, int64_t j, const float* x, float (*y)[STRIP]) {
  f8 acc[NB][NV] = {};
  W += j;
  for (int64_t k = 0; k < K; k++, W += w) {
    f8 a[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) a[v] = load(W + 8 * v);
#pragma GCC unroll 4
    for (int b = 0; b < NB; b++) {
      const f8 in = all(x[b * K + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[b][v] = fma(a[v], in, acc[b][v]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(y[b] + j + 8 * v, acc[b][v]);
}

template <int NB>
HK_INLINE void strip_product(int64_t K, const float* W, int64_t w, const float* x, float (*y)[STRIP]) {
  int64_t j = 0;
  if constexpr (NB == 1) {
    for (; j + 64 <= w; j += 64) columns<1, 8>(K, W, w, j, x, y);
    for (; j + 32 <= w; j += 32) columns<1, 4>(K, W, w, j, x, y);
  }
  for (; j + 16 <= w; j += 16) columns<NB, 2>(K, W, w, j, x, y);
  for (; j < w; j += 8) columns<NB, 1>(K, W, w, j, x, y);
}

// y_b = W_b x_b for every row b: done(b, r, the sum). weights(b): W_b [rows, K] in strips. Rows of the batch that
// share W take it together.
template <class Weights, class Done>
void product(const Team& team, int64_t B, int64_t rows, int64_t K, const float* x, Weights weights, Done done) {
  const FlushDenormals flush;
  const Range own = team.share(0, rows, STRIP);
  for (int64_t r = own.begin; r < own.end; r += STRIP) {
    const int64_t count = std::min(STRIP, rows - r), w = (count + 7) / 8 * 8;
    for (int64_t b = 0; b < B;) {
      const float* W = weights(b);
      const bool four = b + 4 <= B && weights(b + 1) == W && weights(b + 2) == W && weights(b + 3) == W;
      float y[4][STRIP];
      four ? strip_product<4>(K, W + r * K, w, x + b * K, y) : strip_product<1>(K, W + r * K, w, x + b * K, y);
      for (int64_t i = 0; i < (four ? 4 : 1); i++, b++)
        for (int64_t n = 0; n < count; n++) done(b, r + n, y[i][n]);
    }
  }
}

// W, for every row
inline auto shared(const float* W) {
  return [W](int64_t) { return W; };
}

int64_t head_floats(const TitansCall& t) { return ((t.Mf + t.Ms) * t.N + 15) / 16 * 16 + 16; }

// The buffers of a step.
struct Buffers {
  float *h, *n, *u, *x, *q, *gate, *o, *hidden, *tails, *heads;
  int64_t head;  // floats between two threads' part of `heads`

  int64_t carve(const TokenCall& c, float* base) {
    int64_t used = 0, widest = 8;
    head = 16;
    for (int64_t i = 0; i < c.blocks; i++) {
      head = std::max(head, head_floats(c.block[i].titans));
      for (int64_t l = 0; l < c.block[i].levels; l++) widest = std::max(widest, c.block[i].level[l].N);
    }
    auto take = [&](float*& p, int64_t n) {
      p = base ? base + used : nullptr;
      used += (n + 15) / 16 * 16 + 16;
    };
    const int64_t n = c.B * c.d;
    take(h, n), take(this->n, n), take(u, n), take(x, n), take(q, n), take(gate, n), take(o, n);
    take(hidden, c.B * widest), take(tails, c.blocks * n * std::max<int64_t>(c.W - 1, 0));
    take(heads, c.threads * head);
    return used;
  }
};

class Step {
 public:
  Step(const TokenCall& call, const Buffers& buffers, const Team& team)
      : c(call), w(buffers), team(team), B(c.B), d(c.d) {}

  void read() {
    for_rows([&](int64_t b) { std::memcpy(w.h + b * d, c.embed + c.ids[b] * d, d * sizeof(float)); });
    for (int64_t i = 0; i < c.blocks; i++) {
      mixer(c.block[i], w.tails + i * B * (c.W - 1) * d);
      for (int64_t l = 0; l < c.block[i].levels; l++) level(c.block[i].level[l]);
    }
    norm(c.gain);
    product(team, B, c.vocab, d, w.n, shared(c.head),
            [&](int64_t b, int64_t r, float sum) { c.logits[b * c.vocab + r] = sum; });
    team.sync();
  }

  // Commits the chunks that are full, and keeps the inputs of the next token's convolution. scratch: what a scan
  // works with, and own: what each of its threads has to itself; null where no chunk is full.
  void advance(float* scratch, float* own) {
    for (int64_t i = 0; i < c.blocks; i++) {
      const TokenBlock& block = c.block[i];
      const TitansCall& t = block.titans;
      for (int64_t g = team.id; g < B * t.H; g += team.size)
        if (closes(t, g / t.H)) {
          (wide() ? avx512::commit_open : commit_open)(t, g / t.H, g % t.H, slot(t, g / t.H) + 1, scratch, own);
          pack(t, g / t.H, g % t.H, block.packed + g * packed_floats(t));
        }
      for (int64_t b = 0; block.count && team.id == 0 && b < B; b++) block.count[b]++;
      const int64_t n = (c.W - 1) * d;
      if (block.conv && n)
        for_rows([&](int64_t b) { std::memcpy(block.tail + b * n, w.tails + (i * B + b) * n, n * sizeof(float)); });
    }
  }

  // Takes the token out of the open chunks again.
  void undo() {
    for (int64_t i = 0; i < c.blocks; i++) {
      const TitansCall& t = c.block[i].titans;
      for (int64_t g = team.id; g < B * t.H; g += team.size) {
        const TokenRead to = place(t, g);
        std::memset(to.k, 0, t.D * sizeof(float));
        std::memset(to.v, 0, t.D * sizeof(float));
        *to.eta = 0;
        if (t.retention) *to.alpha = 0;
      }
    }
  }

  static bool closes(const TitansCall& t, int64_t b) {
    return (slot(t, b) + 1) % std::min(t.chunk_memory, t.chunk_other) == 0;
  }

 private:
  const TokenCall& c;
  const Buffers& w;
  const Team& team;
  const int64_t B, d;

  static int64_t slot(const TitansCall& t, int64_t b) { return t.pos[b] % std::max(t.chunk_memory, t.chunk_other); }

  template <class F>
  void for_rows(F f) const {
    for (int64_t b = team.id; b < B; b += team.size) f(b);
  }

  // y [B, rows] = W x
  void project(int64_t rows, const float* x, const float* W, float* y) const {
    product(team, B, rows, d, x, shared(W), [&](int64_t b, int64_t r, float sum) { y[b * rows + r] = sum; });
  }

  // w.n = rmsnorm(h) gain; whole to everyone afterwards
  void norm(const float* gain) const {
    team.sync();
    for_rows([&](int64_t b) {
      const FlushDenormals flush;
      const float* x = w.h + b * d;
      const f8 factor = all(1 / std::sqrt(four_chains_of(x, x, d) / d + c.eps));
      for (int64_t i = 0; i < d; i += 8) store(w.n + b * d + i, load(x + i) * factor * load(gain + i));
    });
    team.sync();
  }

  void mixer(const TokenBlock& block, float* tails) const {
    const TitansCall& t = block.titans;
    norm(block.gain);
    const float *u = w.n, *x = w.n;
    if (block.conv) {
      for_rows([&](int64_t b) { convolve(block, b, tails + b * (c.W - 1) * d); });
      u = x = w.u;
      team.sync();
    }
    if (block.in_proj) {
      project(d, u, block.in_proj, w.x);
      x = w.x;
      team.sync();
    }
    project(d, x, block.q_proj, w.q);
    if (block.gate_proj) project(d, w.n, block.gate_proj, w.gate);
    team.sync();
    for (int64_t g = team.id; g < B * t.H; g += team.size) head(block, g, x);
    team.sync();
    // the heads of a row, [H, D], are its d numbers
    if (block.out_proj) {
      product(team, B, d, d, w.o, shared(block.out_proj), [&](int64_t b, int64_t r, float y) { w.h[b * d + r] += y; });
    } else {
      for_rows([&](int64_t b) {
        const FlushDenormals flush;
        for (int64_t i = b * d; i < (b + 1) * d; i += 8) store(w.h + i, load(w.h + i) + load(w.o + i));
      });
    }
  }

  // w.u_b: as hope_conv has it. tail: becomes the row's next one.
  void convolve(const TokenBlock& block, int64_t b, float* tail) const {
    const int64_t W = c.W;
    const float *before = block.tail + b * (W - 1) * d, *now = w.n + b * d;
    for (int64_t i = 0; i < d; i++) {
      const float* weight = block.conv + i * W;
      float s = weight[0] * (W > 1 ? before[i] : now[i]);
      for (int64_t j = 1; j < W; j++) s = std::fma(weight[j], j < W - 1 ? before[j * d + i] : now[i], s);
      w.u[b * d + i] = s;
    }
    if (W == 1) return;
    std::memcpy(tail, before + d, (W - 2) * d * sizeof(float));
    std::memcpy(tail + (W - 2) * d, now, d * sizeof(float));
  }

  // Where head g of the batch reads and writes.
  TokenRead place(const TitansCall& t, int64_t g) const {
    const int64_t b = g / t.H, h = g % t.H, at = (b * std::max(t.chunk_memory, t.chunk_other) + slot(t, b)) * t.H + h;
    return {w.q + g * t.D, nullptr, w.o + g * t.D, t.pending_k + at * t.D, t.pending_v + at * t.D,
            t.pending_eta + at, t.retention ? t.pending_alpha + at : nullptr, t.eta_bias[h],
            t.retention ? t.alpha_bias[h] : 0};
  }

  void head(const TokenBlock& block, int64_t g, const float* x) const {
    const TitansCall& t = block.titans;
    TokenRead to = place(t, g);
    to.x = x + g * t.D;
    if (t.qk_l2norm) unit_row(to.q, t.D, w.q + g * t.D);
    const FlushDenormals flush;
    float* hidden = w.heads + team.id * w.head;
    const float* W = block.packed + g * packed_floats(t);
    switch (t.activation) {
      case GELU: read_token<GELU>(t, W, to, hidden); break;
      case SILU: read_token<SILU>(t, W, to, hidden); break;
      default: read_token<GELU_TANH>(t, W, to, hidden);
    }
    const float* gain = block.out_gain ? block.out_gain + g % t.H * t.D : nullptr;
    gate_row(to.o, gain, block.gate_proj ? w.gate + g * t.D : nullptr, t.D, to.o);
  }

  void level(const TokenLevel& level) const {
    const int64_t N = level.N;
    norm(level.gain);
    product(team, B, N, d, w.n, [&](int64_t b) { return level.up[b]; },
            [&](int64_t b, int64_t r, float sum) { w.hidden[b * N + r] = sum; });
    team.sync();
    const Range own = team.share(0, B * N, 8);
    {
      const FlushDenormals flush;
      for (int64_t i = own.begin; i < own.end; i += 8) store(w.hidden + i, sigma<GELU_TANH>(load(w.hidden + i)));
    }
    team.sync();
    product(team, B, d, N, w.hidden, [&](int64_t b) { return level.down[b]; },
            [&](int64_t b, int64_t r, float sum) { w.h[b * d + r] += sum; });
  }
};

bool finite(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::isfinite(x[i]) ? 0.0f : 1.0f);
  return most == 0;
}

bool titans_fit(const TitansCall& t, const TokenCall& c) {
  const int64_t big = std::max(t.chunk_memory, t.chunk_other), small = std::min(t.chunk_memory, t.chunk_other);
  return t.B == c.B && t.T == 1 && t.H > 0 && width(t.D) && width(t.N) && t.H * t.D == c.d && t.Mf == 3 &&
         t.Ms == 1 + (t.retention != 0) && t.self_modifying && t.update && !t.scalar_skip && !t.kept2 && !t.s2 && small > 0 &&
         big <= LARGEST && big % small == 0 && extents({c.B, t.H, t.Mf + t.Ms, t.N + 1, t.D}) &&
         extents({c.B, big, t.H, t.D}) && extents({big, t.Mf + t.Ms, t.N + 1}) && t.activation >= GELU_TANH &&
         t.activation <= SILU && rows_fit(c.B, 1, t.pos, t.len) && !t.base2 == !t.base1 && !t.base2 == !t.base1s &&
         all_given({t.delta2, t.delta1, t.delta1s, t.pending_k, t.pending_v}) &&
         all_given({t.pending_eta, t.eta_bias, t.pos, t.len}) &&
         (!t.retention || all_given({t.pending_alpha, t.alpha_bias}));
}

bool block_fits(const TokenBlock& b, const TokenCall& c) {
  if (!titans_fit(b.titans, c) || !all_given({b.gain, b.q_proj, b.packed}) || b.levels < 0 || (b.levels && !b.level))
    return false;
  if (b.conv && (c.W < 1 || (c.W > 1 && !b.tail))) return false;
  for (int64_t l = 0; l < b.levels; l++) {
    const TokenLevel& level = b.level[l];
    if (!width(level.N) || !all_given({level.gain, level.up, level.down})) return false;
    for (int64_t i = 0; i < c.B; i++)
      if (!all_given({level.up[i], level.down[i]})) return false;
  }
  return true;
}

bool fits(const TokenCall* c) {
  if (!c || c->B < 0 || !width(c->d) || c->W < 0 || c->blocks < 0 || c->vocab < 1 || !threads_fit(c->threads) ||
      !extents({c->B, c->W + 1, c->d, c->blocks + 1}) || !extents({c->vocab, c->d}) || !extents({c->B, c->vocab}))
    return false;
  if (!all_given({c->ids, c->embed, c->gain, c->head, c->logits}) || (c->blocks && !c->block)) return false;
  for (int64_t b = 0; b < c->B; b++)
    if (c->ids[b] < 0 || c->ids[b] >= c->vocab) return false;
  for (int64_t i = 0; i < c->blocks; i++)
    if (!block_fits(c->block[i], *c)) return false;
  return true;
}

int team_of(const TokenCall& c) {
  int64_t weights = c.vocab * c.d;
  for (int64_t i = 0; i < c.blocks; i++) {
    weights += 4 * c.d * c.d + c.block[i].titans.H * packed_floats(c.block[i].titans);
    for (int64_t l = 0; l < c.block[i].levels; l++) weights += 2 * c.d * c.block[i].level[l].N;
  }
  return static_cast<int>(std::clamp<int64_t>(c.B * weights / ALONE, 1, c.threads));
}

}  // namespace

extern "C" int64_t hope_token_packed(const TitansCall* t) {
  return t && extents({t->B, t->H, t->Mf + t->Ms, t->N + 1, t->D}) ? t->B * t->H * packed_floats(*t) : -1;
}

extern "C" int hope_token_strips(int64_t rows, int64_t K, const float* W, float* to) {
  if (!extents({rows, K}) || (rows * K && !all_given({W, to}))) return BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; r += STRIP) {
    const int64_t count = std::min(STRIP, rows - r), w = (count + 7) / 8 * 8;
    float* strip = to + r * K;
    for (int64_t k = 0; k < K; k++)
      for (int64_t n = 0; n < w; n++) strip[k * w + n] = n < count ? W[(r + n) * K + k] : 0;
  }
  return DONE;
}

extern "C" int64_t hope_token_work(const TokenCall* c) { return fits(c) ? Buffers().carve(*c, nullptr) : -1; }

extern "C" int hope_token_pack(const TokenCall* c) {
  if (!fits(c)) return BAD_ARGUMENT;
  for (int64_t i = 0; i < c->blocks; i++) {
    const TitansCall& t = c->block[i].titans;
    for (int64_t g = 0; g < c->B * t.H; g++) pack(t, g / t.H, g % t.H, c->block[i].packed + g * packed_floats(t));
  }
  return DONE;
}

extern "C" int hope_token_step(const TokenCall* call) {
  if (!fits(call) || !call->work) return BAD_ARGUMENT;
  const TokenCall& c = *call;
  if (c.B == 0) return DONE;
  int64_t scratch = 0, own = 0;
  for (int64_t i = 0; i < c.blocks; i++) {
    const TitansCall& t = c.block[i].titans;
    bool closes = false;
    for (int64_t b = 0; b < c.B; b++) closes = closes || Step::closes(t, b);
    if (!closes) continue;
    Workspace sizes;
    scratch = std::max(scratch, sizes.carve(t, nullptr)), own = std::max(own, Head::own_floats(t));
  }
  const int threads = team_of(c);
  own = (own + 15) / 16 * 16;
  try {
    const Memory memory((scratch + own) * threads);
    Buffers buffers;
    buffers.carve(c, c.work);
    Barrier barrier;
    bool good = true;
    in_parallel(threads, [&](int id, int n) {
      const Team team{id, n, &barrier};
      Step step(c, buffers, team);
      step.read();
      if (id == 0) good = !c.finite || finite(c.logits, c.B * c.vocab);
      team.sync();
      float* mine = memory.data + (scratch + own) * id;
      good ? step.advance(mine, mine + scratch) : step.undo();
    });
    return good ? DONE : NOT_FINITE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
