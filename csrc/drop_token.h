// DropToken's gather and its inverse, rows of bytes. Nothing is computed: one version serves every
// machine.
#pragma once

#include <cstdint>

namespace vatt_fast {

struct KeptRows {       // B clips of N tokens, K of them kept, a token's values side by side
  const int64_t* keep;  // token n of clip b was token keep[b * keep_stride + n]
  int64_t keep_stride;  // K, or 0 where all clips share one line
  int64_t B, N, K, row_bytes;
  int threads;
};

// kept (B, K) = the kept rows of tokens, whose strides count bytes
void take_rows(const KeptRows&, const char* tokens, int64_t stride_b, int64_t stride_n, char* kept);

// tokens (B, N) = the rows of kept in their places, zeros elsewhere; every row is written once.
// inverse: (1 or B, N), scratch
void put_rows(const KeptRows&, const char* kept, char* tokens, int32_t* inverse);

}  // namespace vatt_fast
