// Packing of bf16 matrices into panels of whole tiles, padded with zeros, so that tiles never read
// beyond a tensor:
//   rows      (n, width), row-major: the left factor, its rows times the products' depth
//   columns   for each 16 rows, for each 32 values: 16 pairs of values by 16 rows:
//             the right factor of "x @ rows^T"
//   pairs     for each 32 rows, for each 16 values: 16 pairs of rows by 16 values:
//             the right factor of "x @ rows"
// Compiled in namespace VF_LEVEL, at the levels that multiply bf16 (products.h).
#pragma once

#include "bf16_vectors.h"

#if VF_PRODUCTS

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

struct Geometry {
  int64_t head_dim, depth, width, value_tiles;
};

inline Geometry geometry_of(int64_t head_dim) {
  const int64_t depth = (head_dim + 31) / 32;
  return {head_dim, depth, depth * 32, depth * 2};
}

inline bool is_visible(const uint64_t* visible, int64_t row) {
  return visible[row / 64] >> row % 64 & 1;
}

// `padded` rows from `from`, row-major; zeros beyond `rows` and where not visible: what is not
// attended may hold anything.
inline void pack_rows(const Geometry& geometry, const uint16_t* from, int64_t stride, int64_t rows,
                      int64_t padded, const uint64_t* visible, uint16_t* to) {
  for (int64_t n = 0; n < padded; n++)
    for (int64_t d = 0; d < geometry.width; d += 32) {
      const bool there = n < rows && (!visible || is_visible(visible, n));
      const __m512i values = there ? _mm512_maskz_loadu_epi16(first_of_32(geometry.head_dim - d),
                                                              from + n * stride + d)
                                   : _mm512_setzero_si512();
      _mm512_store_si512(to + n * geometry.width + d, values);
    }
}

// 16 rows of 32 values as a tile of columns: 16 pairs of values by 16 rows.
inline void load_transposed(const uint16_t* from, int64_t stride, __m512i rows[16]) {
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from + i * stride);
  transpose_16(rows);
}

// Packed rows to columns. Returns the largest square of a row's length: of their bits, which order
// nan above all numbers.
inline float pack_columns(const Geometry& geometry, const uint16_t* from, int64_t padded,
                          uint16_t* to) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t n = 0; n < padded; n += 16) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < geometry.depth; k++) {
      __m512i r[16];
      load_transposed(from + n * geometry.width + 32 * k, geometry.width, r);
      for (int i = 0; i < 16; i++) {
        _mm512_store_si512(to + (n / 16 * geometry.depth + k) * TILE + i * 32, r[i]);
        squares = dot(squares, r[i], r[i]);
      }
    }
    largest = _mm512_max_epu32(_mm512_castps_si512(squares), largest);
  }
  const __m512i bits = _mm512_set1_epi32(int(_mm512_reduce_max_epu32(largest)));
  return _mm512_cvtss_f32(_mm512_castsi512_ps(bits));
}

// Packed rows to pairs.
inline void pack_pairs(const Geometry& geometry, const uint16_t* from, int64_t padded,
                       uint16_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t n = 0; n < padded; n += 2)
    for (int64_t k = 0; k < geometry.depth; k++) {
      const __m512i a = _mm512_load_si512(from + n * geometry.width + 32 * k),
                    b = _mm512_load_si512(from + (n + 1) * geometry.width + 32 * k);
      uint16_t* tile = to + (n / 32 * geometry.value_tiles + 2 * k) * TILE + n % 32 * 16;
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(tile + TILE, _mm512_permutex2var_epi16(a, high, b));
    }
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
