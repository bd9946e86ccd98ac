// Which queries of a call are done together, and which slots of the cache they meet: what attention and its gradient
// have in common.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>

#include "attention.h"
#include "panel.h"
#include "team.h"

class AttentionTiles {
 protected:
  explicit AttentionTiles(const AttentionCall& c) : c(c), group(c.H / c.Hkv) {}

  static constexpr int64_t BLOCK = 64;
  const AttentionCall& c;
  const int64_t group;

  // task(i, work) for every i < tasks, with `floats` numbers of its thread's, from a line's start. products: of a
  // query's and a key's numbers each.
  template <class Task>
  void on_team(int64_t products, int64_t tasks, int64_t floats, Task task) const {
    int64_t keys = 0;
    for (int64_t b = 0; b < c.B; b++) keys = std::max(keys, c.used[b] + c.len[b]);
    if (c.window) keys = std::min(keys, c.window + c.sinks + BLOCK);
    const double all = static_cast<double>(products * c.B * c.T * c.H * c.D) * static_cast<double>(keys);
    const int team = team_for(all, ALONE_PRODUCTS, std::clamp<int64_t>(tasks, 1, c.threads));
    const std::unique_ptr<float[]> work(new float[team * floats + 16]);
    float* const aligned = work.get() + (64 - reinterpret_cast<uintptr_t>(work.get()) % 64) % 64 / sizeof(float);
    in_parallel(team, [&](int id, int size) {
      for (int64_t i = id; i < tasks; i += size) task(i, aligned + id * floats);
    });
  }

  struct Tile {
    int64_t first, lanes;  // queries of a row and key head, counted token by token, of each the heads of its group
    int64_t begin, end;    // slots where the first and the last of them stand
    float late[PANEL];     // slots after `begin`
  };

  Tile tile(int64_t b, int64_t first) const {
    const int64_t lanes = std::min<int64_t>(PANEL, c.len[b] * group - first), last = first + lanes - 1;
    Tile t{first, lanes, c.used[b] + first / group, c.used[b] + last / group, {}};
    for (int64_t j = 0; j < PANEL; j++)
      t.late[j] = static_cast<float>((first + std::min(j, lanes - 1)) / group - first / group);
    return t;
  }

  // Where a query's numbers begin in q, and what is laid out as that.
  int64_t at(int64_t b, int64_t head, int64_t n) const {
    return ((b * c.T + n / group) * c.H + head * group + n % group) * c.D;
  }

  // `to`, a panel [D]: the queries of a tile, times what makes their products scores in powers of two. rows: [16, D].
  void scaled_panel(const float* from, int64_t b, int64_t head, const Tile& t, float* rows, float* to) const {
    std::memset(rows, 0, PANEL * c.D * sizeof(float));
    for (int64_t j = 0; j < t.lanes; j++) {
      const float* row = from + at(b, head, t.first + j);
      for (int64_t d = 0; d < c.D; d++) rows[j * c.D + d] = row[d] * (c.scale * LOG2_E);
    }
    load_lanes(to, rows, c.D, c.D, 0, PANEL);
  }

  // The first slot in the window of a query at `place`.
  int64_t oldest(int64_t place) const { return c.window ? std::max<int64_t>(0, place - c.window + 1) : 0; }

  // meet(a, z, sinks) with every block of slots [a, z) for queries that stand at `begin` to `end`.
  template <class Meet>
  void blocks(int64_t b, int64_t begin, int64_t end, Meet meet) const {
    const int64_t stop = end + 1, sinks = std::min(c.sinks, stop);
    for (int64_t s = 0; s < sinks; s += BLOCK) meet(s, std::min(s + BLOCK, sinks), true);
    for (int64_t s = std::max(c.sinks, oldest(begin)), next; s < stop; s = next) {
      next = std::min(stop, s + BLOCK - (s + c.base[b]) % BLOCK);
      meet(s, next, false);
    }
  }

  // Slots [a, z) that some queries of a tile see; all of them see [u, w).
  struct Span {
    int64_t a, u, w, z;
    bool windowed;

    bool empty() const { return a >= z; }

    // f(i) for every slot a + i that not all of them see
    template <class F>
    HK_INLINE void edges(F f) const {
      for (int64_t i = 0; i < u - a; i++) f(i);
      for (int64_t i = w - a; i < z - a; i++) f(i);
    }
  };

  Span span(const Tile& t, int64_t a, int64_t z, bool sinks) const {
    const bool windowed = c.window && !sinks;
    if (windowed) a = std::max(a, oldest(t.begin));
    z = std::min(z, t.end + 1);
    if (a >= z) return {a, a, a, a, windowed};
    const int64_t u = windowed ? std::clamp(oldest(t.end), a, z) : a;
    return {a, u, std::clamp(t.begin + 1, u, z), z, windowed};
  }

  // Of 8 lanes: its sign is set where slot a + i is not seen.
  HK_INLINE f8 hidden(const Span& s, const Tile& t, f8 late, int64_t i) const {
    const f8 ahead = late - all(static_cast<float>(s.a + i - t.begin));
    if (!s.windowed) return ahead;
    return least(ahead, all(static_cast<float>(s.a + i - t.begin + c.window) - 0.5f) - late);
  }

  // Where the keys and values of a span begin, and how many of its slots make whole tiles, where there are as many:
  // what lies in those that nobody sees is not looked at.
  int64_t keys(int64_t b, int64_t head, const Span& s) const { return ((b * c.slots + s.a) * c.Hkv + head) * c.D; }
  int64_t rows(const Span& s) const { return std::min((s.z - s.a + 7) / 8 * 8, c.slots - s.a); }

  // accumulate (product.h) in the lanes that see a slot: where the sign of `seen` is not set
  template <int MR, int NV, class V>
  static HK_INLINE void accumulate_seen(int64_t n, const float* x, int64_t ld, const float* p, const float* seen,
                                        V (&acc)[MR][NV]) {
    for (int64_t k = 0; k < n; k++, x += ld, p += PANEL, seen += PANEL)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const V weight = load_as<V>(p + v * LANES<V>), mark = load_as<V>(seen + v * LANES<V>);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
          acc[r][v] = by_sign(mark, fma(all_as<V>(x[r]), weight, acc[r][v]), acc[r][v]);
      }
  }

  template <class V, int MR, int NV> struct Shape {
    using Vector = V;
    static constexpr int ROWS = MR, VECTORS = NV;
  };

  // done(r, acc) with the rows of sum_i x[i][r] p[i] over the slots of a span, a panel of c.D rows.
  template <class Done>
  void weighed(const Span& s, const float* x, int64_t ld, const float* p, const float* seen, bool half,
               Done done) const {
    const int64_t u = s.u - s.a, w = s.w - s.a, z = s.z - s.a;
    int64_t r = 0;
    auto rows = [&](auto shape) {
      using V = typename decltype(shape)::Vector;
      constexpr int MR = decltype(shape)::ROWS, NV = decltype(shape)::VECTORS;
      for (; r + MR <= c.D; r += MR) {
        V acc[MR][NV] = {};
        const float* from = x + r;
        accumulate_seen<MR, NV, V>(u, from, ld, p, seen, acc);
        accumulate<MR, NV, V>(w - u, from + u * ld, 1, ld, p + u * PANEL, PANEL, acc);
        accumulate_seen<MR, NV, V>(z - w, from + w * ld, ld, p + w * PANEL, seen + w * PANEL, acc);
        done(r, acc);
      }
    };
    if (half) return rows(Shape<f8, 8, 1>()), rows(Shape<f8, 1, 1>());
#ifdef HOPE_WIDE
    rows(Shape<f16, 8, 1>()), rows(Shape<f16, 1, 1>());
#else
    rows(Shape<f8, 4, 2>()), rows(Shape<f8, 1, 2>());
#endif
  }
};
