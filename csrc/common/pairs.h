// Rows of bf16 side by side in pairs: what right factors of "x @ rows" are made of, and,
// transposed, left ones of "rows^T @ x" (products.h). Compiled in namespace VF_LEVEL, at the levels
// that multiply bf16.
#pragma once

#include "bf16_vectors.h"

#if VF_PRODUCTS

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

template <bool whole>
inline void pair_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                      __m512i low[16], __m512i high[16]) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    __m512i pair[2];
    for (int64_t j = 0; j < 2; ++j) {
      const int64_t row = 2 * i + j;
      if (whole)
        pair[j] = _mm512_loadu_si512(from + row * stride);
      else
        pair[j] = row < rows ? _mm512_maskz_loadu_epi16(first_of_32(columns), from + row * stride)
                             : _mm512_setzero_si512();
    }
    low[i] = _mm512_permutex2var_epi16(pair[0], first, pair[1]);
    high[i] = _mm512_permutex2var_epi16(pair[0], second, pair[1]);
  }
}

// 32 rows of 32 values: in `low` 16 pairs of rows of the first 16 columns, in `high` of the others.
// What lies beyond `rows` and `columns` is not read, and zero.
inline void pair_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                      __m512i low[16], __m512i high[16]) {
  if (rows >= 32 && columns >= 32)
    pair_rows<true>(from, stride, rows, columns, low, high);
  else
    pair_rows<false>(from, stride, rows, columns, low, high);
}

// The same 32 x 32 values as 32 columns of 32: the first 16 in `low`.
inline void transpose_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                           __m512i low[16], __m512i high[16]) {
  pair_rows(from, stride, rows, columns, low, high);
  transpose_16(low);
  transpose_16(high);
}

inline void store_each(const __m512i rows[16], uint16_t* to, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * stride, rows[i]);
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
