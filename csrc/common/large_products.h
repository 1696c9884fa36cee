// Products of many times 32 x 32 (products.h) whose factors lie in a core's caches. Compiled in
// namespace VF_LEVEL, at the levels that multiply bf16.
#pragma once

#include "products.h"
#include "sizes.h"

#if VF_PRODUCTS

#include <immintrin.h>

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// Sums (32 * rows, 32 * columns) of row stride `stride` += left @ right over `depth` times 32.
// While it runs, `ahead`, of the next one's factors, is brought into a cache: to tiles, which read
// the second one fast enough, into that, or it would drive out what they read now.
struct LargeProduct {
  Factors factors;                // of its first 32 x 32
  int64_t left_unit, right_unit;  // values to the next 32 rows, to the next 32 columns
  int64_t rows, columns, depth;
  float* sums;
  int64_t stride;
  bool fresh;  // sums = instead
  const uint16_t* ahead;
  int64_t ahead_values;
};

// A little of what is ahead with every step of the depth: all at once would hold up the products.
struct Ahead {
  const char* at;
  int64_t bytes;  // a step

  Ahead(const LargeProduct& product, int64_t steps)
      : at(reinterpret_cast<const char*>(product.ahead)),
        bytes((product.ahead_values * 2 + 64 * steps - 1) / (64 * steps) * 64) {}

  inline void step() {
    for (const char* end = at + bytes; at < end; at += 64)
      _mm_prefetch(at, TILES ? _MM_HINT_T1 : _MM_HINT_T0);
  }
};

// Sums that a product has left in the tiles.
struct Late {
  float* sums;  // null: there are none
  int64_t stride;
};

#if VF_PRODUCTS == 2

// The tiles' numbers must be literals.
#define VF_RENEW(tile, row, column)                                                               \
  if (late.sums) _tile_stored(tile, late.sums + (row) * late.stride + (column), late.stride * 4); \
  if (product.fresh)                                                                              \
    _tile_zero(tile);                                                                             \
  else                                                                                            \
    _tile_loadd(tile, product.sums + (row) * product.stride + (column), product.stride * 4);

// The same as multiply(product), but its sums stay in the tiles until the next one begins, which
// stores them between its own loads: right behind their products the stores would wait for them.
__attribute__((noinline)) void multiply_late(const Product& product, Late& late, Ahead& ahead) {
  const Factors factors = product.factors;
  const int64_t left_bytes = factors.left_stride * 2;
  before_tile_loads();
  for (int64_t k = 0; k < product.depth; k++) {
    const uint16_t *left = factors.left + k * factors.left_next,
                   *right = factors.right + k * factors.right_next;
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, right, 64);
    if (k == 0) {
      VF_RENEW(0, 0, 0)
    }
    ahead.step();
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + factors.right_column, 64);
    if (k == 0) {
      VF_RENEW(1, 0, 16)
    }
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + 16 * factors.left_stride, left_bytes);
    if (k == 0) {
      VF_RENEW(2, 16, 0)
    }
    _tile_dpbf16ps(2, 5, 6);
    if (k == 0) {
      VF_RENEW(3, 16, 16)
    }
    _tile_dpbf16ps(3, 5, 7);
  }
  late = {product.sums, product.stride};
}

#undef VF_RENEW

// Before the last sums are read.
inline void finish(Late& late) {
  if (late.sums)
    store_sums({.factors = {}, .depth = 0, .sums = late.sums, .stride = late.stride, .fresh = {}});
  late.sums = nullptr;
}

inline void multiply(const LargeProduct& product, Late& late) {
  Ahead ahead(product, product.rows * product.columns * product.depth);
  for (int64_t i = 0; i < product.rows; i++)
    for (int64_t j = 0; j < product.columns; j++) {
      Factors factors = product.factors;
      factors.left += i * product.left_unit;
      factors.right += j * product.right_unit;
      multiply_late({.factors = factors,
                     .depth = product.depth,
                     .sums = product.sums + UNIT * (i * product.stride + j),
                     .stride = product.stride,
                     .fresh = product.fresh},
                    late, ahead);
    }
}

#else

// 32 rows by 64 columns. Four of the rows stay in registers at a time: half the loads of the right
// factor that eight by 32 would take.
__attribute__((noinline)) void multiply_two(const Product& product, int64_t right_unit,
                                            Ahead& given_ahead) {
  constexpr int ROWS = 4, COLUMNS = 4;
  const Factors factors = product.factors;
  const int64_t depth = product.depth, stride = product.stride;
  const bool fresh = product.fresh;
  float* to = product.sums;
  Ahead ahead = given_ahead;
  for (int first = 0; first < UNIT; first += ROWS, to += ROWS * stride) {
    __m512 sums[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++)
        sums[r][c] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to + r * stride + 16 * c);
    for (int64_t k = 0; k < depth; k++) {
      const uint16_t *left = factors.left + first * factors.left_stride + k * factors.left_next,
                     *right = factors.right + k * factors.right_next;
      for (int pair = 0; pair < 16; pair++) {
        __m512bh columns[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++)
          columns[c] = (__m512bh)_mm512_loadu_si512(right + c / 2 * right_unit +
                                                    c % 2 * factors.right_column + 32 * pair);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          int32_t values;
          memcpy(&values, left + r * factors.left_stride + 2 * pair, 4);
          const __m512bh row = (__m512bh)_mm512_set1_epi32(values);
#pragma GCC unroll 4
          for (int c = 0; c < COLUMNS; c++)
            sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, columns[c]);
        }
      }
      ahead.step();
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) _mm512_storeu_ps(to + r * stride + 16 * c, sums[r][c]);
  }
  given_ahead = ahead;
}

inline void finish(Late&) {}

inline void multiply(const LargeProduct& product, Late&) {
  constexpr int64_t four_rows = UNIT / 4;
  Ahead ahead(product, product.rows * four_rows * ceil_div(product.columns, 2) * product.depth);
  for (int64_t i = 0; i < product.rows; i++)
    for (int64_t j = 0; j < product.columns; j += 2) {
      Factors factors = product.factors;
      factors.left += i * product.left_unit;
      factors.right += j * product.right_unit;
      const Product part = {.factors = factors,
                            .depth = product.depth,
                            .sums = product.sums + UNIT * (i * product.stride + j),
                            .stride = product.stride,
                            .fresh = product.fresh};
      if (j + 1 < product.columns)
        multiply_two(part, product.right_unit, ahead);
      else
        multiply(part);
    }
}

#endif

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
