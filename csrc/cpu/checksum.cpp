// A checksum by the place of every number, in one pass: the row and column sums of a matrix are enough for it.
#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "check.h"

namespace {

constexpr int64_t WIDTH = 4096, ROWS = 2048;
constexpr uint64_t COLUMN = 3523014627193176565, ROW = 1189123992306739459;

struct Sums {
  std::vector<uint64_t> whole = std::vector<uint64_t>(WIDTH), high = std::vector<uint64_t>(WIDTH);
};

// found, continued with a matrix of `rows` rows and `columns` columns at `data`, which need not be aligned
uint64_t matrix(uint64_t found, const char* data, int64_t rows, int64_t columns, Sums& sums) {
  uint64_t *whole = sums.whole.data(), *high = sums.high.data(), by_whole = 0, by_high = 0;
  std::fill_n(whole, columns, 0), std::fill_n(high, columns, 0);
  for (int64_t i = 0; i < rows; i++, data += columns * 8) {
    uint64_t of_whole = 0, of_high = 0;
    for (int64_t j = 0; j < columns; j++) {
      int64_t x;
      std::memcpy(&x, data + j * 8, 8);
      const uint64_t y = static_cast<uint64_t>(x >> 32);
      whole[j] += x, high[j] += y;
      of_whole += x, of_high += y;
    }
    const uint64_t weight = 2 * i * ROW + 1;
    by_whole += of_whole * weight, by_high += of_high * weight;
  }
  for (int64_t j = 0; j < columns; j++) by_whole += whole[j] * (2 * j * COLUMN), by_high += high[j] * (2 * j * COLUMN);
  return (found * ROW + by_whole) * ROW + by_high;
}

}  // namespace

extern "C" int hope_checksum(int64_t bytes, const void* data, int64_t* found) try {
  if (bytes < 0 || bytes > 4 * MOST_FLOATS || !found || (bytes && !data)) return BAD_ARGUMENT;
  const char* at = static_cast<const char*>(data);
  const int64_t count = bytes / 8, rows = count / WIDTH;
  int64_t tail = 0;
  if (bytes % 8) std::memcpy(&tail, at + count * 8, bytes % 8);
  uint64_t sum = tail;
  Sums sums;
  int64_t i = 0;
  do {
    const int64_t n = std::min(ROWS, rows - i);
    sum = matrix(sum, at + i * WIDTH * 8, n, WIDTH, sums);
    i += n;
  } while (i < rows);
  sum = matrix(sum, at + rows * WIDTH * 8, 1, count % WIDTH, sums);
  *found = static_cast<int64_t>(sum);
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
