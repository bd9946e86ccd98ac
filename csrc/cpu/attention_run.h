// softmax(q k^T) v on panels (product.h): what is compiled for each width of vectors (width.h).
//
// A panel is 16 queries of one key head: tokens one after another, of each the heads of its group. Keys meet it in
// blocks of 64, whose ends are multiples of 64 of the token's place in its sequence (and the end of the sinks), not of
// the call or of the cache, which may have been trimmed. A query's numbers are then one chain of operations over what
// it sees, in any company: a score is a chain over D; a block's sum and its part of the output are chains over its
// keys in order, from which keys that a query does not see are left out; and what the blocks made is put together in
// order, scaled by the largest score so far (an online softmax: of sums over blocks, which round less than one chain
// over a long cache, and of a work space that does not grow with it).
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "attention.h"
#include "check.h"
#include "panel.h"
#include "team.h"

class Attention {
 public:
  explicit Attention(const AttentionCall& c) : c(c), group(c.H / c.Hkv) {}

  void run() const {
    int64_t keys = 0;
    for (int64_t b = 0; b < c.B; b++) keys = std::max(keys, c.used[b] + c.len[b]);
    if (c.window) keys = std::min(keys, c.window + c.sinks + PART);
    const double products = 2.0 * static_cast<double>(c.B * c.T * c.H * c.D) * static_cast<double>(keys);
    const int64_t team = products < ALONE ? 1 : std::clamp<int64_t>(tasks(), 1, c.threads);
    const std::unique_ptr<float[]> work(new float[team * floats() + 16]);
    float* const aligned = work.get() + (64 - reinterpret_cast<uintptr_t>(work.get()) % 64) % 64 / sizeof(float);
    in_parallel(static_cast<int>(team), [&](int id, int size) {
      for (int64_t i = id; i < tasks(); i += size) task(i, aligned + id * floats());
    });
  }

  int64_t tasks() const { return c.B * shares() * parts(); }

  // work: floats() of the caller's
  void task(int64_t i, float* work) const {
    const FlushDenormals flush;
    const int64_t share = i / parts() % shares();
    part(i / parts() / shares(), share * together(), i % parts() * PART, work);
  }

  int64_t floats() const { return TILES * 3 * PANEL * (c.D + 1) + PANEL * c.D + BLOCK * PANEL + 16; }

 private:
  static constexpr int64_t PART = 4 * PANEL, BLOCK = 64;  // queries that meet a block of keys while it is in the cache
  static constexpr int64_t TILES = 8;  // of a task, at most
  static constexpr int64_t FEW = 3;
  static constexpr double ALONE = 1 << 21;  // products that one thread is done with before others are worth waking
  const AttentionCall& c;
  const int64_t group;

  struct Tile {
    int64_t head;          // of keys
    int64_t first, lanes;  // queries
    int64_t begin, end;    // slots where the first and the last of them stand
    float *q, *far, *o;    // panels [D]; o: sum of p v
    float *m, *l;          // [16]: the largest score so far, sum of p
    float *late;           // [16]: slots after `begin`
  };

  int64_t parts() const { return (c.T * group + PART - 1) / PART; }

  // Key heads of a task: where a few queries wait for memory, they share the pages of several heads, which lie beside
  // each other; but every thread has a task.
  int64_t together() const {
    return c.T * group > FEW ? 1 : std::clamp<int64_t>(c.B * c.Hkv / c.threads, 1, std::min(c.Hkv, TILES));
  }
  int64_t shares() const { return (c.Hkv + together() - 1) / together(); }

  // Queries [n, n + PART) of (row, key heads from `head`), counted head by head of the group, token by token.
  void part(int64_t b, int64_t head, int64_t n, float* work) const {
    const int64_t all = c.T * group, real = c.len[b] * group, stop = std::min(n + PART, all);
    const int64_t heads = std::min(c.Hkv, head + together());
    for (int64_t h = head; h < heads; h++)
      for (int64_t i = std::max(n, real); i < stop; i++) std::memset(output(b, h, i), 0, c.D * sizeof(float));
    if (n >= real) return;
    float *const p = work, *const rows = p + BLOCK * PANEL;
    work = rows + PANEL * c.D;
    Tile tiles[TILES];
    int count = 0;
    for (int64_t h = head; h < heads; h++)
      for (int64_t first = n; first < std::min(real, stop); first += PANEL) {
        Tile& t = tiles[count++];
        t.head = h, t.first = first, t.lanes = std::min<int64_t>(PANEL, real - first);
        t.begin = c.used[b] + first / group, t.end = c.used[b] + (first + t.lanes - 1) / group;
        for (float** panel : {&t.q, &t.far, &t.o}) *panel = work, work += PANEL * c.D;
        for (float** row : {&t.m, &t.l, &t.late}) *row = work, work += PANEL;
        start(b, t, rows);
      }
    const int64_t end = tiles[count - 1].end + 1, sinks = std::min(c.sinks, end);
    auto meet = [&](int64_t from, int64_t to, bool sinks) {
      if (tiles[0].lanes <= FEW) ahead(b, head, heads, from, to, end);
      for (int i = 0; i < count; i++) block(b, tiles[i], from, to, sinks, p);
    };
    for (int64_t s = 0; s < sinks; s += BLOCK) meet(s, std::min(s + BLOCK, sinks), true);
    for (int64_t s = std::max(c.sinks, oldest(tiles[0].begin)), next; s < end; s = next) {
      next = std::min(end, s + BLOCK - (s + c.base[b]) % BLOCK);
      meet(s, next, false);
    }
    for (int i = 0; i < count; i++) finish(b, tiles[i], rows);
  }

  // The first slot in the window of a query at `place`.
  int64_t oldest(int64_t place) const { return c.window ? std::max<int64_t>(0, place - c.window + 1) : 0; }

  int64_t at(int64_t b, int64_t head, int64_t n) const {
    return ((b * c.T + n / group) * c.H + head * group + n % group) * c.D;
  }
  float* output(int64_t b, int64_t head, int64_t n) const { return c.y + at(b, head, n); }

  void start(int64_t b, const Tile& t, float* rows) const {
    auto load_panel = [&](const float* from, float* to) {
      std::memset(rows, 0, PANEL * c.D * sizeof(float));
      for (int64_t j = 0; j < t.lanes; j++) {
        const float* row = from + at(b, t.head, t.first + j);
        for (int64_t d = 0; d < c.D; d++) rows[j * c.D + d] = row[d] * (c.scale * LOG2_E);
      }
      load_lanes(to, rows, c.D, c.D, 0, PANEL);
    };
    load_panel(c.q, t.q);
    if (c.far) load_panel(c.far, t.far);
    std::memset(t.o, 0, PANEL * c.D * sizeof(float));
    for (int64_t j = 0; j < PANEL; j++) {
      t.m[j] = -FLT_MAX, t.l[j] = 0;
      t.late[j] = static_cast<float>((t.first + std::min(j, t.lanes - 1)) / group - t.first / group);
    }
  }

  // Slots [a, z) of one block meet a tile: those that some of its queries see.
  void block(int64_t b, const Tile& t, int64_t a, int64_t z, bool sinks, float* p) const {
    const bool windowed = c.window && !sinks, half = t.lanes <= 8;
    if (windowed) a = std::max(a, oldest(t.begin));
    z = std::min(z, t.end + 1);
    if (a >= z) return;
    // all of them see [u, w)
    const int64_t u = windowed ? std::clamp(oldest(t.end), a, z) : a, w = std::clamp(t.begin + 1, u, z);
    const int64_t ld = c.Hkv * c.D, from = ((b * c.slots + a) * c.Hkv + t.head) * c.D;
    // whole tiles, where there are as many slots: what lies in those that nobody sees is not looked at
    const int64_t rows = std::min((z - a + 7) / 8 * 8, c.slots - a);
    panel_product(0, rows, c.D, c.k + from, ld, 1, sinks && c.far ? t.far : t.q, half,
                  [&](int64_t r, auto& acc) { store_rows(p, r, acc); });
    float shrink[PANEL];
    for (int64_t v = 0; v < (half ? 8 : PANEL); v += 8) {
      const f8 late = load(t.late + v);
      auto hidden = [&](int64_t i) {  // its sign is set where slot a + i is not seen
        const f8 ahead = late - all(static_cast<float>(a + i - t.begin));
        if (!windowed) return ahead;
        return least(ahead, all(static_cast<float>(a + i - t.begin + c.window) - 0.5f) - late);
      };
      auto edges = [&](auto f) {
        for (int64_t i = 0; i < u - a; i++) f(i);
        for (int64_t i = w - a; i < z - a; i++) f(i);
      };
      softmax(p + v, z - a, t.m + v, t.l + v, shrink + v, edges, hidden);
    }
    if (t.lanes <= FEW) weigh_few(t, c.v + from, ld, p, z - a, shrink);
    else weigh(c.v + from, ld, p, u - a, w - a, z - a, half, t.o, shrink);
  }

  // A few queries wait for memory, which is fastest in its own order: of key heads [h, g), the values of slots [a, z) and
  // the keys of as many after them come nearer. By loads: what fetches ahead of a program is not set off by prefetches.
  void ahead(int64_t b, int64_t h, int64_t g, int64_t a, int64_t z, int64_t end) const {
    auto touch = [&](const float* of, int64_t i) {
      const volatile float* row = of + ((b * c.slots + i) * c.Hkv + h) * c.D;
      for (int64_t d = 0; d < (g - h) * c.D; d += 16) static_cast<void>(row[d]);
    };
    for (int64_t i = a; i < z; i++) touch(c.v, i);
    for (int64_t i = z; i < std::min(2 * z - a, end); i++) touch(c.k, i);
  }

  // Scores s [n][16], of 8 lanes, become p = 2^(s - m), -0 where hidden; shrink: 2^(m before - m now).
  template <class Edges, class Hidden>
  static HK_INLINE void softmax(float* s, int64_t n, float* m, float* l, float* shrink, Edges edges, Hidden hidden) {
    edges([&](int64_t i) { store(s + i * PANEL, by_sign(hidden(i), load(s + i * PANEL), all(-INFINITY))); });
    const f8 before = load(m);
    f8 now = before, sum = all(0);
    for (int64_t i = 0; i < n; i++) now = most(load(s + i * PANEL), now);
    for (int64_t i = 0; i < n; i++) {
      const f8 x = abs(exp2(load(s + i * PANEL) - now));  // a NaN has any sign
      sum += x;
      store(s + i * PANEL, x);
    }
    edges([&](int64_t i) { store(s + i * PANEL, by_sign(hidden(i), load(s + i * PANEL), all(-0.0f))); });
    const f8 factor = by_sign(before - now, all(1), exp2(before - now));  // exp2(0) is not 1 to the last bit
    store(l, fma(load(l), factor, sum));
    store(m, now);
    store(shrink, factor);
  }

  // o <- shrink o + sum of p v over slots [0, z), in which all see [u, w)
  void weigh(const float* values, int64_t ld, const float* p, int64_t u, int64_t w, int64_t z, bool half, float* o,
             const float* shrink) const {
    int64_t r = 0;
    auto rows = [&](auto tile) {
      using V = typename decltype(tile)::Vector;
      constexpr int MR = decltype(tile)::ROWS, NV = decltype(tile)::VECTORS;
      for (; r + MR <= c.D; r += MR) {
        V acc[MR][NV] = {};
        const float* x = values + r;
        accumulate_seen<MR, NV, V>(u, x, ld, p, acc);
        accumulate<MR, NV, V>(w - u, x + u * ld, 1, ld, p + u * PANEL, PANEL, acc);
        accumulate_seen<MR, NV, V>(z - w, x + w * ld, ld, p + w * PANEL, acc);
        for (int i = 0; i < MR; i++)
          for (int v = 0; v < NV; v++) {
            float* to = o + (r + i) * PANEL + v * LANES<V>;
            store(to, fma(load_as<V>(to), load_as<V>(shrink + v * LANES<V>), acc[i][v]));
          }
      }
    };
    if (half) return rows(Shape<f8, 8, 1>()), rows(Shape<f8, 1, 1>());
#ifdef HOPE_WIDE
    rows(Shape<f16, 8, 1>()), rows(Shape<f16, 1, 1>());
#else
    rows(Shape<f8, 4, 2>()), rows(Shape<f8, 1, 2>());
#endif
  }

  // The same for a few lanes, as when a token is decoded: the lanes of a vector are numbers of v.
  void weigh_few(const Tile& t, const float* values, int64_t ld, const float* p, int64_t n, const float* shrink) const {
    for (int64_t j = 0; j < t.lanes; j++) {
      int64_t d = 0;
      auto columns = [&](auto count) {
        constexpr int NV = decltype(count)::value;
        for (; d + 8 * NV <= c.D; d += 8 * NV) {
          f8 acc[NV] = {};
          for (int64_t i = 0; i < n; i++) {
            const float weight = p[i * PANEL + j];
            if (std::signbit(weight)) continue;
            for (int v = 0; v < NV; v++) acc[v] = fma(all(weight), load(values + i * ld + d + 8 * v), acc[v]);
          }
          float sums[8 * NV];
          for (int v = 0; v < NV; v++) store(sums + 8 * v, acc[v]);
          for (int i = 0; i < 8 * NV; i++) {
            float& to = t.o[(d + i) * PANEL + j];
            to = std::fma(to, shrink[j], sums[i]);
          }
        }
      };
      columns(std::integral_constant<int, 4>()), columns(std::integral_constant<int, 1>());
      for (; d < c.D; d++) {
        float sum = 0, &to = t.o[d * PANEL + j];
        for (int64_t i = 0; i < n; i++)
          if (!std::signbit(p[i * PANEL + j])) sum = std::fma(p[i * PANEL + j], values[i * ld + d], sum);
        to = std::fma(to, shrink[j], sum);
      }
    }
  }

  template <class V, int MR, int NV> struct Shape {
    using Vector = V;
    static constexpr int ROWS = MR, VECTORS = NV;
  };

  // accumulate (product.h) in the lanes that see a slot
  template <int MR, int NV, class V>
  static HK_INLINE void accumulate_seen(int64_t n, const float* x, int64_t ld, const float* p, V (&acc)[MR][NV]) {
    for (int64_t k = 0; k < n; k++, x += ld, p += PANEL)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const V weight = load_as<V>(p + v * LANES<V>);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
          acc[r][v] = by_sign(weight, fma(all_as<V>(x[r]), weight, acc[r][v]), acc[r][v]);
      }
  }

  void finish(int64_t b, const Tile& t, float* rows) const {
    for (int64_t v = 0; v < PANEL; v += 8) {
      const f8 factor = all(1) / load(t.l + v);
      for (int64_t d = 0; d < c.D; d++) store(t.o + d * PANEL + v, load(t.o + d * PANEL + v) * factor);
    }
    store_lanes(t.o, rows, c.D, c.D, 0, PANEL);
    for (int64_t j = 0; j < t.lanes; j++)
      std::memcpy(output(b, t.head, t.first + j), rows + j * c.D, c.D * sizeof(float));
  }
};
