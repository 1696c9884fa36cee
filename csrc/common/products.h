// Products of bf16 panels with fp32 sums, 32 x 32 at a time: on AMX's tiles, or in AVX-512 BF16's
// registers. Compiled in namespace VF_LEVEL; VF_PRODUCTS tells what the level multiplies bf16 with:
// nothing (0), registers (1), tiles (2).
#pragma once

#define VF_PRODUCTS_base 0
#define VF_PRODUCTS_avx2 0
#define VF_PRODUCTS_avx512 0
#define VF_PRODUCTS_avx512_bf16 1
#define VF_PRODUCTS_amx_bf16 2
#define VF_JOINED(a, b) a##b
#define VF_JOIN(a, b) VF_JOINED(a, b)
#define VF_PRODUCTS VF_JOIN(VF_PRODUCTS_, VF_LEVEL)

#if VF_PRODUCTS

#include <stdint.h>
#include <string.h>

#include "emulated.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr bool TILES = VF_PRODUCTS == 2;  // they multiply while the vector units do something else
constexpr int TILE = 512;                 // bf16 values of a tile: 16 rows of 32
constexpr int UNIT = 32;                  // rows and columns of a product's 2 by 2 tiles

// Where a product's operands lie. Left: 32 rows, row-major. Right: tiles of 16 pairs of the depth
// by 16 columns, two side by side.
struct Factors {
  const uint16_t* left;
  int64_t left_stride;  // values to the next row
  int64_t left_next;    // values to the next 32 of the depth
  const uint16_t* right;
  int64_t right_column, right_next;  // values to the second 16 columns, to the next 32 of the depth
  // the right factor comes again only after more than the first cache holds: tiles load it past it
  bool streamed = false;
};

// One product: sums (32, 32) of row stride `stride` += left @ right over `depth` times 32; fresh: =
// instead.
struct Product {
  Factors factors;
  int64_t depth;
  float* sums;
  int64_t stride;
  bool fresh;
  // What registers, but not tiles, leave out: rows of sums beyond these, which nobody reads; pairs
  // beyond these of the last 32 of the depth, which are zeros.
  int64_t rows = UNIT, last_pairs = 16;
};

// Of `count` values of depth.
inline int64_t last_pairs_of(int64_t count) { return (count - 1) % 32 / 2 + 1; }

#if VF_PRODUCTS == 2

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The first and second 16 columns of a right factor, to tiles 6 and 7.
inline void load_right_6(const uint16_t* from, bool streamed) {
  if (streamed)
    _tile_stream_loadd(6, from, 64);
  else
    _tile_loadd(6, from, 64);
}

inline void load_right_7(const uint16_t* from, bool streamed) {
  if (streamed)
    _tile_stream_loadd(7, from, 64);
  else
    _tile_loadd(7, from, 64);
}

// Once a thread before its products, and end_products() after them.
inline void begin_products() {
  alignas(64) TileShapes shapes = {};
  shapes.palette = 1;
  for (int t = 0; t < 8; t++) shapes.row_bytes[t] = 64, shapes.rows[t] = 16;
  __asm__ volatile(
      "" ::"r"(&shapes)
      : "memory");  // gcc believes that only the first bytes are read, and drops the others
  _tile_loadconfig(&shapes);
}

inline void end_products() { _tile_release(); }

// The compiler does not know that tile loads read memory: what was written must be there before.
inline void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

inline void load_sums(const Product& product) {
  if (product.fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  const int64_t bytes = product.stride * 4;
  const float *upper = product.sums, *lower = upper + 16 * product.stride;
  _tile_loadd(0, upper, bytes);
  _tile_loadd(1, upper + 16, bytes);
  _tile_loadd(2, lower, bytes);
  _tile_loadd(3, lower + 16, bytes);
}

inline void store_sums(const Product& product) {
  const int64_t bytes = product.stride * 4;
  float *upper = product.sums, *lower = upper + 16 * product.stride;
  _tile_stored(0, upper, bytes);
  _tile_stored(1, upper + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

__attribute__((noinline)) void multiply(const Product& product) {
  const Factors factors = product.factors;
  const int64_t left_bytes = factors.left_stride * 2;
  before_tile_loads();
  load_sums(product);
  for (int64_t k = 0; k < product.depth; k++) {
    const uint16_t *left = factors.left + k * factors.left_next,
                   *right = factors.right + k * factors.right_next;
    _tile_loadd(4, left, left_bytes);
    load_right_6(right, factors.streamed);
    _tile_dpbf16ps(0, 4, 6);
    load_right_7(right + factors.right_column, factors.streamed);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + 16 * factors.left_stride, left_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(product);
}

#else

inline void begin_products() {}
inline void end_products() {}
inline void before_tile_loads() {}

// Eight rows by 32 columns of sums stay in registers; a pair of the left factor is broadcast to all
// columns.
__attribute__((noinline)) void multiply(const Product& product) {
  constexpr int ROWS = 8;
  const Factors factors = product.factors;
  const int64_t rows = product.rows < UNIT ? product.rows : UNIT;
  for (int64_t first = 0; first < rows; first += ROWS) {
    __m512 sums[ROWS][2];
    float* to = product.sums + first * product.stride;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++)
        sums[r][c] =
            product.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to + r * product.stride + 16 * c);
    for (int64_t k = 0; k < product.depth; k++) {
      const uint16_t *left = factors.left + first * factors.left_stride + k * factors.left_next,
                     *right = factors.right + k * factors.right_next;
      const int64_t pairs = k + 1 == product.depth ? product.last_pairs : 16;
      for (int64_t pair = 0; pair < pairs; pair++) {
        const __m512bh columns[2] = {
            (__m512bh)_mm512_loadu_si512(right + 32 * pair),
            (__m512bh)_mm512_loadu_si512(right + factors.right_column + 32 * pair)};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          int32_t values;
          memcpy(&values, left + r * factors.left_stride + 2 * pair, 4);
          const __m512bh row = (__m512bh)_mm512_set1_epi32(values);
#pragma GCC unroll 2
          for (int c = 0; c < 2; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, columns[c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) _mm512_storeu_ps(to + r * product.stride + 16 * c, sums[r][c]);
  }
}

#endif

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
