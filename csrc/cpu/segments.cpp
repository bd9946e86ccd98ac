// Segments one after another in one call: what Python would do between two of them is counting.

#include <algorithm>
#include <cmath>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "segment.h"

namespace {

class Segments {
 public:
  explicit Segments(const SegmentsCall& given)
      : s(given), c(given.first), len(c.B), known(c.B), before(c.blocks * c.B), blocks(c.block, c.block + c.blocks),
        levels(c.blocks), mixers(c.blocks) {
    if (given.other) memories.assign(given.other, given.other + c.blocks);
    for (int64_t i = 0; i < c.blocks; i++) {
      levels[i].assign(blocks[i].level, blocks[i].level + blocks[i].levels);
      blocks[i].level = levels[i].data();
      int64_t* const at = before.data() + i * c.B;
      std::copy_n(counted(blocks[i]), c.B, at);
      if (blocks[i].attention) {
        mixers[i] = *blocks[i].attention, mixers[i].attention.used = at;
        blocks[i].attention = &mixers[i];
      } else {
        blocks[i].titans.pos = at, blocks[i].titans.len = len.data();
      }
    }
    c.block = blocks.data(), c.len = len.data(), c.known = known.data();
  }

  int run(int64_t* done) {
    for (*done = 0; *done < s.count; ++*done) {
      at(*done);
      int outcome = hope_segment_read(&c);
      if (outcome == DONE) outcome = hope_segment_head(&c);
      if (outcome != DONE) return outcome;
      if (c.finite && std::count(c.finite, c.finite + c.B, 0)) return DONE;
      if (s.mean && !even()) return DONE;
      if (s.steps && (outcome = hope_segment_learn(&c)) != DONE) return outcome;
      advance();
    }
    return DONE;
  }

  // How many tokens a block has of each row, as its mixer counts them.
  static const int64_t* counted(const SegmentBlock& b) {
    return b.attention ? b.attention->attention.used : b.titans.pos;
  }

 private:
  const SegmentsCall& s;
  SegmentCall c;
  std::vector<int64_t> len, known, before;
  std::vector<SegmentBlock> blocks;
  std::vector<std::vector<SegmentLevel>> levels;
  std::vector<SegmentMemory> memories;  // that the next segment writes
  std::vector<AttentionMixer> mixers;

  // c becomes segment i.
  void at(int64_t i) {
    const SegmentCall& first = s.first;
    const int64_t past = i * c.T;
    for (int64_t b = 0; b < c.B; b++) {
      len[b] = std::clamp<int64_t>(first.len[b] - past, 0, c.T);
      known[b] = first.known ? std::clamp<int64_t>(first.known[b] - past, 0, c.T) : 0;
    }
    auto behind = [past](auto* p, int64_t numbers) { return p ? p + past * numbers : p; };
    c.ids = behind(first.ids, 1), c.targets = behind(first.targets, 1), c.nats = behind(first.nats, 1);
    c.logits = behind(first.logits, c.vocab), c.h = behind(first.h, c.d);
    for (int64_t k = 0; k < c.blocks && blocks[k].attention; k++) {
      const AttentionMixer& m = *first.block[k].attention;
      const int64_t half = m.attention.D / 2;
      mixers[k].cos = behind(m.cos, half), mixers[k].sin = behind(m.sin, half);
      mixers[k].far_cos = behind(m.far_cos, half), mixers[k].far_sin = behind(m.far_sin, half);
    }
    if (c.finite) std::fill_n(c.finite, c.B, 1);
    const void* const* step = s.steps;
    for (int64_t k = 0; step && k < i * c.blocks; k++) step += 5 * levels[k % c.blocks].size();
    auto next = [&step](auto*& to) { to = static_cast<std::remove_reference_t<decltype(to)>>(*step++); };
    for (auto& of : levels)
      for (SegmentLevel& level : of) {
        if (!step) continue;
        next(level.up_step), next(level.gate_step), next(level.down_step);
        next(level.inverse), next(level.inverse_down);
      }
  }

  // Whether no row's loss has risen, and the running means with it.
  bool even() const {
    std::vector<double> loss(c.B);
    for (int64_t b = 0; b < c.B; b++) {
      for (int64_t t = 0; t < known[b]; t++) loss[b] += c.nats[b * c.stride + t];
      loss[b] /= known[b];
      if (!std::isfinite(loss[b]) || loss[b] > s.mean[b] + s.rise) return false;
    }
    for (int64_t b = 0; b < c.B; b++) s.mean[b] = (1 - s.share) * s.mean[b] + s.share * loss[b];
    return true;
  }

  void advance() {
    for (int64_t i = 0; i < c.blocks; i++) {
      for (int64_t b = 0; b < c.B; b++) before[i * c.B + b] += len[b];
      if (blocks[i].attention) continue;
      blocks[i].before = std::exchange(blocks[i].after, memories[i]);
      memories[i] = blocks[i].before;
    }
  }
};

// What is looked at before its first segment is checked as a call of its own.
bool fits(const SegmentsCall* s) {
  if (!s) return false;
  const SegmentCall& c = s->first;
  if (s->count < 0 || c.T < 1 || !extent(c.stride) || !extent(c.blocks) ||
      !extents({c.B, c.blocks + 1, c.vocab, c.T}) || s->count > (c.stride + c.T - 1) / c.T || (c.B && !c.len) ||
      (c.blocks && !c.block) || (s->mean && !all_given({c.targets, c.nats})) || (s->steps && !c.keep))
    return false;
  for (int64_t b = 0; b < c.B; b++)
    if (c.len[b] < 0 || c.len[b] > std::min(c.stride, s->count * c.T)) return false;
  for (int64_t i = 0; i < c.blocks; i++) {
    const SegmentBlock& b = c.block[i];
    if (!extent(b.levels) || (b.levels && !b.level) || (!b.attention && !s->other) ||
        (c.B && !Segments::counted(b)))
      return false;
  }
  return true;
}

}  // namespace

extern "C" int hope_segments(const SegmentsCall* s, int64_t* done) try {
  if (!done || !fits(s)) return BAD_ARGUMENT;
  return Segments(*s).run(done);
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
