// wgmma: products of four warps on operands in shared memory, described by 64-bit descriptors, under way until
// they are waited for (compute capability 9.0).
//
// Every warp computes its own 16 of the 64 rows when it issues the product. Until it has waited, the sums are not
// in its registers, and what is read of shared memory may not be written. That has to be visible to the
// asynchronous proxy: a fence.proxy.async lies between a write and the product.
#pragma once
#include "tensor.h"

namespace hope::ptx {

// Bytes of a matrix of 16-bit numbers, by its descriptor: 8 rows (or 8 steps of k) of 16-byte units are an atom,
// as wide as the swizzle.
struct Descriptor {
  uint32_t start, leading, stride, units, swizzle_bits;

  // `row`: of m or n. transposed: rows are contiguous in memory, not k.
  uint32_t address(int row, int k, bool transposed) const {
    uint32_t at = start;
    if (!transposed) {
      at += row % 8 * units * 16 + row / 8 * stride + (units == 1 ? k / 8 * leading : k / 8 * 16) + k % 8 * 2;
    } else if (units == 1) {
      at += row / 8 * stride + k % 8 * 16 + k / 8 * leading + row % 8 * 2;
    } else {
      const uint32_t unit = row / 8;
      at += unit % units * 16 + unit / units * leading + k % 8 * units * 16 + k / 8 * stride + row % 8 * 2;
    }
    return at ^ ((at >> 7 & ((1u << swizzle_bits) - 1)) << 4);
  }
};

inline Descriptor descriptor(Warp& w, uint64_t d) {
  if (d >> 49 & 7) w.grid->fail("a matrix descriptor with a base offset, which the machine does not have");
  static constexpr uint32_t units[4] = {1, 8, 4, 2}, bits[4] = {0, 3, 2, 1};
  const uint32_t swizzle = d >> 62;
  return {static_cast<uint32_t>(d & 0x3fff) << 4, static_cast<uint32_t>(d >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(d >> 32 & 0x3fff) << 4, units[swizzle], bits[swizzle]};
}

// The race detector sees what a product reads: 16 bytes at `at`.
inline void show_product(Warp& w, uint32_t at) {
  Block& b = *w.block;
  Conflict c;
  if (!b.shadow->read(at, 16, w.accessor(0), w.grid->at->line, Access::kPlain, c))
    race(*w.grid, c, 0, "byte " + std::to_string(c.offset) + " of shared memory");
  uint32_t thread;
  int32_t line;
  for (uint32_t k = 0; k < 16; k += 2)
    if (!passed_to_proxy(w, 0xffffffffu, *b.shadow, at + k, kProxyShared, line, thread))
      w.grid->fail("no fence.proxy.async between this product and what it reads, which was written by " +
                   w.grid->thread_name(thread) + "\n    " + w.grid->line_text(line));
  ++b.under_product[at / 16];
  w.open_reads.push_back(at / 16);
}

// 16 x `rows` numbers into `to`, k after k. A unit of 16 bytes holds 8 of a row, or 8 rows of a k.
template <class T>
inline void gather_matrix(Warp& w, uint64_t d, int first_row, int rows, bool transposed, float* to) {
  const Descriptor m = descriptor(w, d);
  Block& b = *w.block;
  if (b.under_product.empty()) b.under_product.resize(b.shared_bytes / 16 + 1);
  for (int row = 0; row < rows; row += transposed ? 8 : 1)
    for (int k = 0; k < 16; k += transposed ? 1 : 8) {
      const uint32_t at = m.address(first_row + row, k, transposed);
      if (at + 16 > b.shared_bytes)
        w.grid->fail("out of bounds: a matrix reaches byte " + std::to_string(at) + " of " +
                     std::to_string(b.shared_bytes) + " bytes of shared memory");
      uint16_t bits[8];
      std::memcpy(bits, b.shared.get() + at, 16);
      for (int e = 0; e < 8; ++e)
        to[(transposed ? k : k + e) * rows + (transposed ? row + e : row)] = value(T{bits[e]});
      if (b.shadow) show_product(w, at);
    }
}

// operands: n, a in registers, scales of a and b, transpositions of a and b, d x n / 2, a (4 registers or a
// descriptor), b, scale of d (a predicate)
template <class T> inline Next warpgroup_product(Warp& w, const Instruction& i, uint32_t mask) {
  if (!mask) return Next::kFollowing;
  want_all(w, mask);
  Grid& g = *w.grid;
  const int32_t* o = i.operands;
  const int n = o[0], in_registers = o[1];
  const float scale = static_cast<float>(o[2] * o[3]);
  if (!w.products_fenced) g.fail("no wgmma.fence before the first product");
  if (g.shape.threads % 128) g.fail("a product of four warps in a block of other than whole warpgroups");
  const int32_t *d = o + 6, *rest = d + n / 2;
  float a[16 * 16], b[16 * 256];
  auto same = [&](int32_t operand) {
    const uint64_t* v = static_cast<uint64_t*>(w.lanes(operand));
    for (int lane = 1; lane < 32; ++lane)
      if (v[lane] != v[0]) g.fail("the lanes of a warp have different descriptors");
    return v[0];
  };
  if (in_registers) {
    for (int k = 0; k < 4; ++k) {
      const uint32_t* s = lanes_of<uint32_t>(w, rest[k]);
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4 + 8 * (k % 2), column = 2 * (lane % 4) + 8 * (k / 2);
        a[column * 16 + row] = value(T{static_cast<uint16_t>(s[lane])});
        a[(column + 1) * 16 + row] = value(T{static_cast<uint16_t>(s[lane] >> 16)});
      }
    }
  } else {
    gather_matrix<T>(w, same(rest[0]), 16 * (w.index % 4), 16, o[4], a);
  }
  rest += in_registers ? 4 : 1;
  gather_matrix<T>(w, same(rest[0]), 0, n, o[5], b);
  const uint32_t keep = w.predicates[rest[1]];
  if (keep && ~keep) g.fail("the lanes of a warp scale d differently");
  float sums[16][256];
  for (int k = 0; k < n / 2; ++k) {
    const auto earlier = w.results.find(d[k]);
    const uint32_t* from = earlier == w.results.end() ? lanes_of<uint32_t>(w, d[k]) : earlier->second.lanes.data();
    for (int lane = 0; lane < 32; ++lane)
      sums[lane / 4 + 8 * (k % 4 / 2)][8 * (k / 4) + 2 * (lane % 4) + k % 2] =
          keep ? std::bit_cast<float>(from[lane]) : 0.f;
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      const float factor = scale * a[k * 16 + row];
      for (int column = 0; column < n; ++column) sums[row][column] += factor * b[k * n + column];
    }
  for (int k = 0; k < n / 2; ++k) {
    Result& r = w.results[d[k]];
    r.group = w.committed;
    for (int lane = 0; lane < 32; ++lane)
      r.lanes[lane] = std::bit_cast<uint32_t>(sums[lane / 4 + 8 * (k % 4 / 2)][8 * (k / 4) + 2 * (lane % 4) + k % 2]);
    std::fill_n(lanes_of<uint32_t>(w, d[k]), 32, 0x7fffffffu);  // nobody may look before it is waited for
  }
  w.in_step = w.in_step * 31 + i.index + 1;
  g.progress();
  return Next::kFollowing;
}

inline void add_warpgroup(Forms& f) {
  f["wgmma.mma_async.bf16"] = {warpgroup_product<Brain>, true};
  f["wgmma.mma_async.f16"] = {warpgroup_product<Half>, true};
  f["wgmma.fence"] = {[](Warp& w, const Instruction&, uint32_t mask) {
                        if (mask) want_all(w, mask), w.products_fenced = true;
                        return Next::kFollowing;
                      },
                      true};
  f["wgmma.commit_group"] = {[](Warp& w, const Instruction&, uint32_t mask) {
                               if (!mask) return Next::kFollowing;
                               want_all(w, mask);
                               w.products.push_back(std::exchange(w.open_reads, {}));
                               ++w.committed;
                               return Next::kFollowing;
                             },
                             true};
  // operands: groups that may remain under way
  f["wgmma.wait_group"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
                             if (!mask) return Next::kFollowing;
                             want_all(w, mask);
                             while (w.products.size() > static_cast<size_t>(i.operands[0])) {
                               for (uint32_t unit : w.products.front()) --w.block->under_product[unit];
                               w.products.erase(w.products.begin());
                             }
                             std::erase_if(w.results, [&](const auto& result) {
                               if (result.second.group >= w.committed - w.products.size()) return false;
                               std::memcpy(w.lanes(result.first), result.second.lanes.data(), 128);
                               return true;
                             });
                             if (!w.products_under_way()) w.products_fenced = false;
                             return Next::kFollowing;
                           },
                           true};
  // operands: registers. What it changes is the hardware's; all warps of a warpgroup have to agree.
  f["setmaxnreg"] = {[](Warp& w, const Instruction& i, uint32_t mask) {
                       if (!mask) return Next::kFollowing;
                       want_all(w, mask);
                       if (w.grid->shape.threads % 128) w.grid->fail("setmaxnreg in a block of other than whole warpgroups");
                       w.in_step = w.in_step * 31 + i.index + 1;
                       return Next::kFollowing;
                     },
                     true};
}

}  // namespace hope::ptx
