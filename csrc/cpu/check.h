// What entry points return, and what every one of them checks before it follows a pointer: sizes, positions and
// pointers that cannot belong to one call are refused. How much memory a pointer points to is for the caller to know
// (hope_kernels/ops/titans/cpp.py counts it).
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>

enum Outcome { DONE = 0, NO_MEMORY = 1, BAD_ARGUMENT = 2 };  // what the library returns

constexpr int64_t LARGEST = int64_t{1} << 31, MOST_FLOATS = int64_t{1} << 56;  // an extent; a tensor, or a work space

inline bool extent(int64_t n) { return n >= 0 && n <= LARGEST; }

// Extents whose product is no overflow.
inline bool extents(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t n : sizes) {
    if (!extent(n) || n > MOST_FLOATS / product) return false;
    product *= std::max<int64_t>(n, 1);  // beside a zero the others count all the same
  }
  return true;
}

inline bool width(int64_t n) { return n > 0 && n <= 1 << 24 && n % 8 == 0; }

inline bool threads_fit(int64_t n) { return n > 0 && n <= 1 << 16; }

inline bool rows_of_width(int64_t rows, int64_t d, int64_t threads) {
  return width(d) && rows >= 0 && rows <= MOST_FLOATS / d && threads_fit(threads);
}

inline bool all_given(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!p) return false;
  return true;
}

// Tokens read before a call and in it; null: rows start at 0.
inline bool rows_fit(int64_t B, int64_t T, const int64_t* pos, const int64_t* len) {
  for (int64_t b = 0; b < B; b++)
    if (len[b] < 0 || len[b] > T || (pos && (pos[b] < 0 || pos[b] > INT64_MAX / 4))) return false;
  return true;
}

// `kept` weights a row are enough for every chunk that its tokens touch.
inline bool kept_fit(int64_t B, int64_t kept, int64_t chunk, const int64_t* pos, const int64_t* len) {
  for (int64_t b = 0; b < B; b++)
    if (len[b] && (pos[b] % chunk + len[b] - 1) / chunk >= kept) return false;
  return true;
}

// Of a function that an entry point calls: anything but DONE is what the entry point returns (outcome_of).
inline void must(int outcome) {
  if (outcome != DONE) throw static_cast<Outcome>(outcome);
}

template <class F>
int outcome_of(F f) try {
  f();
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
} catch (Outcome outcome) {
  return outcome;
}
