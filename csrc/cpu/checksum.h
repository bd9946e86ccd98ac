// Which weights a state was read with (called by hope_kernels/identity.py).
#pragma once
#include <cstdint>

extern "C" {
// found: of `bytes` bytes as 64-bit integers, the last one filled up with zeros, modulo 2^64. As matrices x of 4096
// columns and at most 2048 rows, and one row of what is left: of each, and of x >> 32, sum_ij x_ij (u_j + w_i).
// Returns 0, or 2 for arguments that do not fit each other.
int hope_checksum(int64_t bytes, const void* data, int64_t* found);
}
