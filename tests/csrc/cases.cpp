// Kernels for tests/csrc/test_emulator.py. usage: cases NAME SEED RESIDENT < input > output; errors that the
// emulator reports go to stderr.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/simt.cuh"

namespace hope {
namespace {

using emulator::launch;

template <class V> std::vector<V> input() {
  std::string bytes;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) bytes.append(buffer, n);
  std::vector<V> v(bytes.size() / sizeof(V));
  std::memcpy(v.data(), bytes.data(), v.size() * sizeof(V));
  return v;
}

template <class V> void output(const std::vector<V>& v) { std::fwrite(v.data(), sizeof(V), v.size(), stdout); }

uint32_t* words() { return reinterpret_cast<uint32_t*>(shared_memory()); }

// --- values ------------------------------------------------------------------------------------------------
// a[16][16], b[16][8] of T and c[16][8] of fp32, one after the other.
template <class T> HOPE_KERNEL(32) multiply(const uint16_t* a, const uint16_t* b, const float* c, float* out) {
  const int g = lane_index() / 4, t = 2 * (lane_index() % 4);
  auto two = [](uint16_t lo, uint16_t hi) { return lo | static_cast<uint32_t>(hi) << 16; };
  auto of_a = [&](int m, int k) { return two(a[16 * m + k], a[16 * m + k + 1]); };
  const uint32_t fragment[4] = {of_a(g, t), of_a(g + 8, t), of_a(g, t + 8), of_a(g + 8, t + 8)};
  float sums[4] = {c[8 * g + t], c[8 * g + t + 1], c[8 * (g + 8) + t], c[8 * (g + 8) + t + 1]};
  mma<T>(sums, fragment, two(b[8 * t + g], b[8 * (t + 1) + g]), two(b[8 * (t + 8) + g], b[8 * (t + 9) + g]));
  for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + t + i % 2] = sums[i];
}

template <class T> void multiply_case() {
  const auto in = input<uint16_t>();
  std::vector<float> c(128), out(128);
  std::memcpy(c.data(), &in[384], 512);
  launch(1, 32, 1, 0, [&] { multiply<T>(&in[0], &in[256], c.data(), out.data()); });
  output(out);
}

// 32 rows of 16 bytes, row i at place (5 i) % 32 of shared memory; out[lane][4].
HOPE_KERNEL(32) load_rows(const Word4* rows, uint32_t* out, bool transposed) {
  Word4* shared = reinterpret_cast<Word4*>(shared_memory());
  const int lane = lane_index(), place = 5 * lane % 32;
  store_shared(shared + place, rows[lane]);
  sync_warp();
  uint32_t r[4];
  if (transposed) load_matrices_transposed(r, shared + place);
  else load_matrices(r, shared + place);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

void load_case(bool transposed) {
  const auto in = input<Word4>();
  std::vector<uint32_t> out(128);
  launch(1, 32, 1, 512, [&] { load_rows(in.data(), out.data(), transposed); });
  output(out);
}

void transpose_case() {
  const auto in = input<uint32_t>();
  std::vector<uint32_t> out(32);
  launch(1, 32, 1, 0, [&] { out[lane_index()] = transpose8x8(in[lane_index()]); });
  output(out);
}

template <class T> void pack_case() {
  const auto in = input<float>();
  std::vector<uint32_t> out;
  for (size_t i = 0; i < in.size(); i += 2) out.push_back(pack2<T>(in[i], in[i + 1]));
  output(out);
}

template <class T> void unpack_case() {
  const auto in = input<uint32_t>();
  std::vector<Float2> out;
  for (uint32_t w : in) out.push_back(unpack2<T>(w));
  output(out);
}

// Everything at once, without races: copies, matrices, barriers of all kinds, stores to the neighbour.
// Clusters of 2 blocks, 64 threads.
HOPE_KERNEL(64) exchange(const uint32_t* in, uint32_t* out) {
  uint32_t* shared = words();  // [64][4] copied, [64] partial sums, [64] from the neighbour
  const int i = thread_index();
  for (int j = 0; j < 4; ++j) copy_async4(shared + 4 * i + j, in + 256 * block_index() + 64 * j + i, j < 3);
  wait_copies();
  sync_block();
  uint32_t r[4];
  load_matrices(r, shared + 4 * ((i + 32) % 64));
  float sums[4] = {};
  mma<bf16>(sums, r, r[0], r[1]);
  store_shared(reinterpret_cast<float*>(shared + 256 + i), shuffle_xor(sums[0], 5) + shuffle(sums[3], 7));
  sync_some(1 + warp_index(), 32);
  const uint32_t v = load_shared(shared + 256 + (i ^ 1));
  cluster_arrive();
  cluster_wait();
  store_remote(shared + 320 + (i ^ 33), cluster_rank() ^ 1, v ^ transpose8x8(v));
  cluster_arrive();
  cluster_wait();
  out[64 * block_index() + i] = load_shared(shared + 320 + i);
}

void exchange_case() {
  const auto in = input<uint32_t>();
  std::vector<uint32_t> out(in.size() / 4);
  launch(static_cast<int>(in.size() / 256), 64, 2, 4 * 384, [&] { exchange(in.data(), out.data()); });
  output(out);
}

// --- what is an error, and what looks like one -------------------------------------------------------------
void neighbour(bool barrier) {  // through shared memory, across warps
  launch(2, 64, 1, 256, [&] {
    store_shared(words() + thread_index(), 1u);
    if (barrier) sync_block();
    load_shared(words() + (thread_index() + 32) % 64);
  });
}

void overwrite(bool barrier) {  // a read, then a write of another warp
  launch(1, 64, 1, 256, [&] {
    load_shared(words());
    if (barrier) sync_block();
    if (thread_index() == 40) store_shared(words(), 1u);
  });
}

void lanes(bool barrier) {  // within a warp: a shuffle orders nothing
  launch(1, 32, 1, 128, [&] {
    store_shared(words() + lane_index(), 1u);
    shuffle_xor(1.f, 1);
    if (barrier) sync_warp();
    load_shared(words() + (lane_index() ^ 1));
  });
}

void matrix_rows(bool barrier) {  // load_matrices reads on behalf of the lane that gave the address
  launch(1, 32, 1, 512, [&] {
    for (int j = 0; j < 4; ++j) store_shared(words() + 4 * lane_index() + j, 0u);
    if (barrier) sync_warp();
    uint32_t r[4];
    load_matrices(r, words() + 4 * (lane_index() ^ 3));
  });
}

void halves(bool right) {  // of a block, each with its own barrier, or both with barriers that miss each other
  launch(1, 128, 1, 512, [&] {
    const int i = thread_index(), half = i / 64;
    store_shared(words() + i, static_cast<uint32_t>(i));
    sync_some(1 + half, 64);
    load_shared(words() + (right ? 64 * half + (i + 32) % 64 : (i + 64) % 128));
  });
}

void counts() {
  launch(1, 128, 1, 0, [] { sync_some(3, warp_index() == 0 ? 64 : 96); });
}

void half_words() {  // two lanes, one word
  launch(1, 32, 1, 64, [] { store_shared(reinterpret_cast<bf16*>(shared_memory()) + lane_index(), bf16{1}); });
}

void same_value() { launch(1, 64, 1, 64, [] { store_shared(words(), 7u); }); }

void cluster_exchange(bool first, bool second, bool relaxed = false) {
  launch(4, 32, 2, 128, [&] {
    if (first) cluster_arrive(), cluster_wait();
    store_remote(words() + lane_index(), cluster_rank() ^ 1, 1u);
    relaxed ? cluster_arrive_relaxed() : cluster_arrive();
    if (!second) load_shared(words() + lane_index());
    cluster_wait();
    load_shared(words() + lane_index());
  });
}

void early_end() {  // the neighbour may be gone when the store arrives
  launch(2, 32, 2, 128, [] {
    cluster_arrive(), cluster_wait();
    if (cluster_rank() == 0) store_remote(words() + lane_index(), 1, 1u);
  });
}

void deadlock() {
  launch(1, 96, 1, 0, [] {
    if (warp_index() == 2) sync_some(2, 96);
    else sync_block();
  });
}

void divergent() {
  launch(1, 32, 1, 0, [] {
    if (lane_index() == 3) sync_warp();
    else shuffle_xor(1.f, 1);
  });
}

void lane_ends() {
  launch(1, 32, 1, 0, [] {
    if (lane_index() != 3) sync_warp();
  });
}

void forever() {
  unsigned flag = 0;
  launch(1, 32, 1, 0, [&] {
    while (!load_acquire(&flag)) pause();
  });
}

// Blocks work one after another in the order of tickets, more of them than are resident.
void tickets() {
  unsigned next = 0, turn = 0;
  std::vector<uint32_t> order;
  launch(20, 64, 1, 4, [&] {
    if (thread_index() == 0) {
      const unsigned ticket = fetch_add_release(&next, 1);
      while (load_acquire(&turn) != ticket) pause();
      store_shared(words(), ticket);
    }
    sync_block();
    if (thread_index() == 63) {
      order.push_back(load_shared(words()));
      fetch_add_release(&turn, 1);
    }
  });
  output(order);
}

// From warp to warp through shared memory, announced in global memory; by a release, or by one that comes too
// early.
void flag(bool right) {
  unsigned ready = 0;
  launch(1, 64, 1, 4, [&] {
    if (thread_index() == 0) {
      if (!right) fetch_add_release(&ready, 1);
      store_shared(words(), 5u);
      if (right) fetch_add_release(&ready, 1);
    }
    if (warp_index() == 1) {
      if (lane_index() == 0)
        while (!load_acquire(&ready)) pause();
      sync_warp();
      load_shared(words());
    }
  });
}

void copy_race(bool waited, bool other) {
  const uint32_t source = 9;
  launch(1, 64, 1, 4, [&] {
    if (thread_index() == 0) {
      copy_async4(words(), &source, true);
      if (waited) wait_copies();
      if (!other && load_shared(words()) != 9) throw std::logic_error("not copied");
    }
    sync_block();
    if (other && load_shared(words()) != 9) throw std::logic_error("not copied");
  });
}

void fresh_memory() {
  std::vector<uint32_t> out(1);
  launch(1, 32, 1, 128, [&] { out[0] = load_shared(words() + 31); });
  output(out);
}

// Programs of accesses and barriers: [warps][steps] each; a word for each program says whether a race was reported.
struct Step {
  // kind: 0 load, 1 store, of shared memory; 2 sync_warp, 3 sync_block, 4 + id sync_some of 64 threads
  uint32_t kind, lane, offset, bytes;
};

template <class V> void access(const Step& s) {
  V* p = reinterpret_cast<V*>(shared_memory() + s.offset);
  if (s.kind == 0) load_shared(p);
  else store_shared(p, V{});
}

void programs() {
  constexpr int kWarps = 3, kSteps = 16;
  const auto in = input<Step>();
  std::vector<uint32_t> out(in.size() / (kWarps * kSteps));
  for (size_t i = 0; i < out.size(); ++i) {
    try {
      launch(1, 32 * kWarps, 1, 16, [&] {
        for (int j = 0; j < kSteps; ++j) {
          const Step& s = in[(i * kWarps + warp_index()) * kSteps + j];
          if (s.kind == 2) sync_warp();
          else if (s.kind == 3) sync_block();
          else if (s.kind >= 4) sync_some(s.kind - 4, 64);
          else if (s.bytes == 0 || static_cast<int>(s.lane) != lane_index()) continue;
          else if (s.bytes == 2) access<bf16>(s);
          else if (s.bytes == 4) access<uint32_t>(s);
          else access<Word2>(s);
        }
      });
    } catch (const std::runtime_error& e) {
      if (std::string(e.what()).rfind("race on byte", 0)) throw;
      out[i] = 1;
    }
  }
  output(out);
}

void once(const std::function<void()>& access) {  // 128 bytes of shared memory, two blocks a cluster
  launch(2, 32, 2, 128, [&] {
    cluster_arrive(), cluster_wait();
    access();
  });
}

}  // namespace
}  // namespace hope

#include "warpgroup_cases.h"

namespace hope {
namespace {

constexpr Pieces kRows = Pieces::kRows, kColumns = Pieces::kColumns;
using Case = std::function<void()>;
const std::map<std::string, Case> cases = {
    {"mma_bf16", multiply_case<bf16>},
    {"mma_fp16", multiply_case<fp16>},
    {"load_matrices", [] { load_case(false); }},
    {"load_matrices_transposed", [] { load_case(true); }},
    {"transpose8x8", transpose_case},
    {"store_matrices", store_case},
    {"warpgroup_rows_rows_64", warpgroup_case<kRows, kRows, 64>},
    {"warpgroup_columns_columns_64", warpgroup_case<kColumns, kColumns, 64>},
    {"warpgroup_registers_rows_64", warpgroup_case<kRows, kRows, 64, true>},
    {"warpgroup_registers_columns_64", warpgroup_case<kRows, kColumns, 64, true>},
    {"warpgroup_columns_columns_32", warpgroup_case<kColumns, kColumns, 32>},
    {"warpgroup_rows_columns_32", warpgroup_case<kRows, kColumns, 32>},
    {"pack_bf16", pack_case<bf16>},
    {"pack_fp16", pack_case<fp16>},
    {"unpack_bf16", unpack_case<bf16>},
    {"unpack_fp16", unpack_case<fp16>},
    {"exchange", exchange_case},
    {"neighbour", [] { neighbour(true); }},
    {"neighbour_race", [] { neighbour(false); }},
    {"overwrite", [] { overwrite(true); }},
    {"overwrite_race", [] { overwrite(false); }},
    {"lanes", [] { lanes(true); }},
    {"lanes_race", [] { lanes(false); }},
    {"matrix_rows", [] { matrix_rows(true); }},
    {"matrix_rows_race", [] { matrix_rows(false); }},
    {"halves", [] { halves(true); }},
    {"halves_race", [] { halves(false); }},
    {"counts", counts},
    {"half_words", half_words},
    {"same_value", same_value},
    {"cluster", [] { cluster_exchange(true, true); }},
    {"cluster_too_early", [] { cluster_exchange(false, true); }},
    {"cluster_race", [] { cluster_exchange(true, false); }},
    {"cluster_relaxed_race", [] { cluster_exchange(true, true, true); }},
    {"early_end", early_end},
    {"deadlock", deadlock},
    {"divergent", divergent},
    {"lane_ends", lane_ends},
    {"forever", forever},
    {"tickets", tickets},
    {"flag", [] { flag(true); }},
    {"flag_race", [] { flag(false); }},
    {"copy", [] { copy_race(true, false); }},
    {"copy_for_others", [] { copy_race(true, true); }},
    {"copy_race", [] { copy_race(false, false); }},
    {"copy_race_of_others", [] { copy_race(false, true); }},
    {"programs", programs},
    {"fresh_memory", fresh_memory},
    {"load_outside", [] { once([] { load_shared(words() + 32); }); }},
    {"load_before", [] { once([] { load_shared(words() - 1); }); }},
    {"load_elsewhere", [] { once([] { const float x = 0; load_shared(&x); }); }},
    {"load_across", [] { once([] { load_shared(reinterpret_cast<Word4*>(shared_memory() + 120)); }); }},
    {"load_misaligned", [] { once([] { load_shared(reinterpret_cast<Word2*>(shared_memory() + 4)); }); }},
    {"store_outside", [] { once([] { store_shared(words() + 32, 0u); }); }},
    {"matrices_outside", [] { once([] { uint32_t r[4]; load_matrices(r, words() + 4 * lane_index()); }); }},
    {"matrices_misaligned", [] { once([] { uint32_t r[4]; load_matrices(r, words() + 1); }); }},
    {"copy_outside", [] { once([] { copy_async4(words() + 32, nullptr, false); }); }},
    {"remote_outside", [] { once([] { store_remote(words() + 32, 1, 0); }); }},
    {"remote_nowhere", [] { once([] { store_remote(words(), 2, 0); }); }},
};

}  // namespace
}  // namespace hope

int main(int argc, char** argv) {
  if (argc != 4 || !hope::cases.count(argv[1])) return 2;
  hope::emulator::options().seed = std::atoi(argv[2]);
  hope::emulator::options().resident = std::atoi(argv[3]);
  try {
    hope::cases.at(argv[1])();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
