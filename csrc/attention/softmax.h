// The forward's softmax: rows of scores become powers, and on AMX slices of a tile product stand
// between them. Compiled in namespace VF_LEVEL.
#pragma once

#include "heads.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// What is known of a step's keys: nothing can go wrong; some are not attended, or powers may be too
// small; there is a bias.
enum class Keys { plain, marked, biased };

// Which product's tiles are worked on between a softmax's rows.
enum class Overlap { nothing, scores, values };

// The r-th of eight slices of a product of depth 1 or 2, on tiles. A slice is at most one tile
// product with the loads before it. At depth 1 the second half has no products, only the stores.
template <Overlap overlap>
inline __attribute__((always_inline)) void tile_slice(const Product& product, int r) {
  if (overlap == Overlap::nothing) return;
#if VF_PRODUCTS == 2
  constexpr int STORE = 8, NOTHING = 9;
  if (r >= 4 && product.depth < 2) r = r == 7 ? STORE : NOTHING;
  const Factors& factors = product.factors;
  const int64_t left_bytes = factors.left_stride * 2;
  const uint16_t *left = factors.left, *right = factors.right;
  if (r >= 4) left += factors.left_next, right += factors.right_next;
  switch (r) {
    case 0:
      load_sums(product);
      [[fallthrough]];
    case 4:
      _tile_loadd(4, left, left_bytes);
      load_right_6(right, factors.streamed);
      _tile_dpbf16ps(0, 4, 6);
      break;
    case 1:
    case 5:
      load_right_7(right + factors.right_column, factors.streamed);
      _tile_dpbf16ps(1, 4, 7);
      break;
    case 2:
    case 6:
      _tile_loadd(5, left + 16 * factors.left_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      break;
    case 3:
      _tile_dpbf16ps(3, 5, 7);
      break;
    case 7:
      _tile_dpbf16ps(3, 5, 7);
      [[fallthrough]];
    case STORE:
      store_sums(product);
      break;
    default:
      break;
  }
#endif
}

struct Softmax {
  const float* scores;         // (8, 64)
  uint16_t* probabilities;     // (8, 64)
  float* totals;               // (8, 16)
  const float* negative_peak;  // (8,)
  uint64_t visible;
  float factor;
  Keys keys;
  const float* bias;  // of the first row and key
  int64_t bias_rows, bias_stride;
};

// One call: 8 rows by 32 or 64 keys of scores become powers, rounded to bf16 for the next product.
// On AMX a slice of another product follows each row: its tiles work while these vectors do.
template <Overlap overlap, Keys keys, int vectors>
__attribute__((noinline)) void exponentiate(const Softmax& given, const Product& given_product) {
  const Softmax softmax = given;  // copies: the compiler knows that nothing else writes them
  const Product product = given_product;
  const __m512 factor = _mm512_set1_ps(softmax.factor);
  __mmask16 visible[vectors];
  for (int i = 0; i < vectors; i++) visible[i] = __mmask16(softmax.visible >> 16 * i);
  before_tile_loads();
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const float added_to_row = softmax.negative_peak[r];
    const __m512 negative_peak =
        _mm512_set1_ps(keys == Keys::plain ? added_to_row + MAGIC : added_to_row);
    __m512 power[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
      const __m512 score = _mm512_load_ps(softmax.scores + r * STEP + 16 * i);
      if (keys == Keys::plain) {
        power[i] = exp2_bounded(score, factor, negative_peak);
        continue;
      }
      __m512 added = negative_peak;
      if (keys == Keys::biased) {
        const __mmask16 there = r < softmax.bias_rows ? visible[i] : 0;
        const float* bias = softmax.bias + r * softmax.bias_stride + 16 * i;
        added = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, bias), _mm512_set1_ps(LOG2_E), added);
      }
      power[i] = exp2_where(visible[i], _mm512_fmadd_ps(score, factor, added));
    }
    uint16_t* probabilities = softmax.probabilities + r * STEP;
    __m512 total = _mm512_add_ps(power[0], power[1]);
    _mm512_store_si512(probabilities, to_bf16(power[1], power[0]));
    if (vectors == 4) {
      const __m512 third = power[vectors - 2], fourth = power[vectors - 1];
      total = _mm512_add_ps(total, _mm512_add_ps(third, fourth));
      _mm512_store_si512(probabilities + 32, to_bf16(fourth, third));
    }
    float* totals = softmax.totals + r * 16;
    _mm512_store_ps(totals, _mm512_add_ps(_mm512_load_ps(totals), total));
    tile_slice<overlap>(product, r);
  }
}

template <Overlap overlap>
inline void exponentiate(int64_t units, const Softmax& softmax, const Product& product) {
  if (softmax.keys == Keys::plain) return exponentiate<overlap, Keys::plain, 4>(softmax, product);
  if (units == 2) return exponentiate<overlap, Keys::marked, 4>(softmax, product);
  return exponentiate<overlap, Keys::marked, 2>(softmax, product);
}

inline void exponentiate(Overlap overlap, int64_t units, const Softmax& softmax,
                         const Product& product) {
  if (softmax.keys == Keys::biased) {
    if (units == 2) return exponentiate<Overlap::nothing, Keys::biased, 4>(softmax, product);
    return exponentiate<Overlap::nothing, Keys::biased, 2>(softmax, product);
  }
  if (overlap == Overlap::scores) return exponentiate<Overlap::scores>(units, softmax, product);
  if (overlap == Overlap::values) return exponentiate<Overlap::values>(units, softmax, product);
  return exponentiate<Overlap::nothing>(units, softmax, product);
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
