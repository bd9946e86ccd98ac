// One token a row through a whole model, in one call: what would be some forty calls of PyTorch a block, each of
// which takes longer than its work. Weights are met once for all rows of the batch, and are all there is to do:
// their bytes, from wherever they lie, are the time of a step.
//
// A team of threads shares out every product by rows of weights, with barriers in between; a number is one chain
// of operations, whatever the batch and the threads: those of panels (segment_run.h), which is why weights lie input
// by input here. Everything a step would advance is written last, once the logits are known; but keys and values of
// the token take a slot that nobody has counted yet.

#include <cmath>
#include <cstring>
#include <new>

#include "aligned.h"
#include "token_attention.h"
#include "token_check.h"
#include "token_level.h"
#include "token_memories.h"

namespace {

constexpr int NOT_FINITE = 3;

class Step {
 public:
  Step(const TokenCall& call, const TokenBuffers& buffers, const Team& team) : c(call), s(call, buffers, team) {}

  void read() const {
    s.each(c.B, [&](int64_t b) {
      for (int64_t i = 0; i < c.d; i++) s.w.h[b * c.d + i] = c.embed[c.ids[b] * c.d + i] * c.scale;
    });
    for (int64_t i = 0; i < c.blocks; i++) {
      const TokenBlock& block = c.block[i];
      if (block.memories) memories(i).read(block.gain);
      else AttentionStep(s, *block.attention).read(block.gain);
      levels(block);
    }
    s.norm(s.w.h, c.gain);
    s.project(c.vocab, c.d, s.w.n, c.head, c.logits);
    s.team.sync();
  }

  // scratch, own: as MemoriesStep has them. Caches have their token already.
  void advance(float* scratch, float* own) const {
    for (int64_t i = 0; i < c.blocks; i++)
      if (c.block[i].memories) memories(i).advance(scratch, own);
  }

  void undo() const {
    for (int64_t i = 0; i < c.blocks; i++) {
      if (c.block[i].memories) memories(i).undo();
      else AttentionStep(s, *c.block[i].attention).undo();
    }
  }

 private:
  const TokenCall& c;
  const TokenState s;

  void levels(const TokenBlock& block) const {
    const float* from = s.w.h;
    if (block.mixture) {
      s.team.sync();
      s.each(c.B, [&](int64_t b) { std::memcpy(s.w.u + b * c.d, s.w.h + b * c.d, c.d * sizeof(float)); });
      from = s.w.u;
    }
    for (int64_t l = 0; l < block.levels; l++) read_level(s, block.level[l], from);
  }

  MemoriesStep memories(int64_t i) const {
    return MemoriesStep(s, *c.block[i].memories, s.w.tails + i * c.B * (c.W - 1) * c.d);
  }
};

bool finite(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::isfinite(x[i]) ? 0.0f : 1.0f);
  return most == 0;
}

int team_of(const TokenCall& c) {
  double products = 1.0 * c.vocab * c.d;  // of a row
  for (int64_t i = 0; i < c.blocks; i++) {
    const TokenBlock& block = c.block[i];
    if (const TokenMemories* m = block.memories) {
      products += 4.0 * c.d * c.d + m->titans.H * packed_floats(m->titans);
    } else {
      const AttentionCall& a = block.attention->call;
      const int64_t keys = a.window ? std::min(a.slots, a.window + a.sinks) : a.slots;
      products += 2.0 * (a.H + a.Hkv) * a.D * c.d + 2.0 * a.H * a.D * keys;
    }
    for (int64_t l = 0; l < block.levels; l++) products += (block.level[l].gate ? 3.0 : 2.0) * c.d * block.level[l].N;
  }
  return static_cast<int>(std::clamp<double>(c.B * products / ALONE_PRODUCTS, 1, c.threads));
}

}  // namespace

extern "C" int64_t hope_token_packed(const TitansCall* t) {
  return t && memory_sizes_fit(*t) ? t->B * t->H * packed_floats(*t) : -1;
}

extern "C" int hope_token_strips(int64_t rows, int64_t K, const float* W, float* to) {
  if (!extents({rows, K}) || (rows * K && !all_given({W, to}))) return BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; r += STRIP) turn_strip(W + r * K, std::min(STRIP, rows - r), K, to + r * K);
  return DONE;
}

extern "C" int64_t hope_token_work(const TokenCall* c) { return step_fits(c) ? TokenBuffers().carve(*c, nullptr) : -1; }

extern "C" int hope_token_pack(const TokenCall* c) {
  if (!step_fits(c)) return BAD_ARGUMENT;
  for (int64_t i = 0; i < c->blocks; i++) {
    const TokenMemories* m = c->block[i].memories;
    for (int64_t g = 0; m && g < c->B * m->titans.H; g++)
      pack(m->titans, g / m->titans.H, g % m->titans.H, m->packed + g * packed_floats(m->titans));
  }
  return DONE;
}

extern "C" int hope_token_step(const TokenCall* call) {
  if (!step_fits(call) || !call->work || !caches_fit(*call)) return BAD_ARGUMENT;
  const TokenCall& c = *call;
  if (c.B == 0) return DONE;
  int64_t scratch = 0, own = 0;
  for (int64_t i = 0; i < c.blocks; i++) {
    if (!c.block[i].memories) continue;
    const TitansCall& t = c.block[i].memories->titans;
    bool closes = false;
    for (int64_t b = 0; b < c.B; b++) closes = closes || MemoriesStep::closes(t, b);
    if (!closes) continue;
    Workspace sizes;
    scratch = std::max(scratch, sizes.carve(t, nullptr)), own = std::max(own, Head::own_floats(t));
  }
  const int threads = team_of(c);
  own = (own + 15) / 16 * 16;
  try {
    const AlignedFloats memory(scratch + own, threads);
    TokenBuffers buffers;
    buffers.carve(c, c.work);
    Barrier barrier;
    bool good = true;
    in_parallel(threads, [&](int id, int n) {
      const Team team{id, n, &barrier};
      const Step step(c, buffers, team);
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
