// Numbers of 16 hidden units (a warp's rows of a product of its warpgroup) by 64 tokens, as products of
// weights with tokens leave them: x[s][i] with rows g and g + 8 of the 16 (i = 0, 1, 4, 5 and 2, 3, 6, 7), g
// = lane / 4, tokens 16 s + 2 (lane % 4) (even i) and the next, 8 later for i >= 4. Rounded, x[s] is the
// operand a with units as m and tokens as k.
#pragma once
#include "../../warpgroup.cuh"
#include "../shared.cuh"

namespace hope {

constexpr int kChunk = 64;

// The number of a lane's tokens, of 16, to which x[s][i] belongs.
HOPE_DEVICE constexpr int token_of(int s, int i) { return 4 * s + 2 * (i >> 2) + (i & 1); }

// A lane's 16 of 64 numbers, one a token.
HOPE_DEVICE void of_tokens(float (&to)[16], const float* from, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Float2 v = load_shared(reinterpret_cast<const Float2*>(from + 8 * j) + (lane & 3));
    to[2 * j] = v.x, to[2 * j + 1] = v.y;
  }
}

// Sums over the eight lanes that share tokens; what a lane gets are those of tokens 2 lane and 2 lane + 1.
template <int HALF> HOPE_DEVICE void halve(float (&v)[16], int lane) {
  const bool upper = lane & 2 * HALF;
#pragma unroll
  for (int n = 0; n < HALF; ++n) {
    const float low = v[n], high = v[n + HALF], other = shuffle_xor(upper ? low : high, 2 * HALF);
    v[n] = (upper ? high : low) + other;
  }
}
HOPE_DEVICE Float2 token_sums(float (&v)[16], int lane) {
  halve<8>(v, lane), halve<4>(v, lane), halve<2>(v, lane);
  return {v[0], v[1]};
}

// The tile of a chunk's keys, values or errors as operand b: tokens as n, steps of 16 positions as k; or
// positions as n, steps of 16 tokens as k.
template <class T> struct TokenTile {
  const T* tile;
  HOPE_DEVICE SharedMatrix<Pieces::kRows> positions(int s) const {
    return shared_matrix<Pieces::kRows>(tile, 2 * kPieceColumn, 128) + 4 * kPieceColumn * s;
  }
  HOPE_DEVICE SharedMatrix<Pieces::kColumns> tokens(int s) const {
    return shared_matrix<Pieces::kColumns>(tile, 128, 2 * kPieceColumn) + 256 * s;
  }
};

// Numbers [8 columns][units][8] as an operand with units as k, in steps of 16, from a column on.
template <class T>
HOPE_DEVICE SharedMatrix<Pieces::kColumns> units_matrix(const T* matrix, int units, int column) {
  return shared_matrix<Pieces::kColumns>(matrix + column * 8 * units, 128, 16 * units);
}

}  // namespace hope
