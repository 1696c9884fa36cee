// The forward's softmax: rows of scores become powers, and on AMX slices of tile products stand
// between them. Compiled in namespace VF_LEVEL.
#pragma once

#include "common/slices.h"
#include "heads.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int SPAN = 2 * STEP;  // keys whose probabilities one product with the values takes

// What is known of a step's scores: no power leaves the range of fp32; nothing; nothing, and a bias
// is added.
enum class Scores { bounded, any, biased };

// A step of a block of queries: 32 of them by 64 keys.
struct Softmax {
  const float* scores;         // (32, 64)
  uint16_t* probabilities;     // (32, 64) of row stride SPAN
  float* totals;               // (32, 16)
  const float* negative_peak;  // (32,)
  int64_t rows;                // that exist
  uint64_t visible;
  bool diagonal;  // row r attends the first r + 1 of its last 32 keys alone
  float factor;
  const float* bias;  // of the first row and key
  int64_t bias_stride;
};

// One call: rows by 32 or 64 keys of scores become powers, rounded to bf16 for the next product.
// On AMX a tile product of `slices` follows each row, and works while these vectors do:
//
//   rows    0  1  2  3 | 4  5  6  7 | ...
//   tiles   slice 0    | slice 1    | ...    slices without rows go before them
template <Scores kind, int vectors, bool diagonal>
__attribute__((noinline)) void exponentiate(const Softmax& given, const Product* products,
                                            int count, Pending& pending) {
  const Softmax softmax = given;  // a copy: the compiler knows that nothing else writes it
  const __m512 factor = _mm512_set1_ps(softmax.factor);
  __mmask16 visible[vectors];
  for (int i = 0; i < vectors; i++) visible[i] = __mmask16(softmax.visible >> 16 * i);
  const int64_t groups = ceil_div(softmax.rows, 4);
  Slices slices(products, count, pending);
  slices.leave(groups);

  const auto take_row = [&](int64_t row) __attribute__((always_inline)) {
    if (diagonal) {
      const __mmask32 keys = uint32_t(softmax.visible >> 16 * (vectors - 2)) & first_of_32(row + 1);
      visible[vectors - 2] = __mmask16(keys), visible[vectors - 1] = __mmask16(keys >> 16);
    }
    const __m512 negative_peak =
        _mm512_set1_ps(softmax.negative_peak[row] + (kind == Scores::bounded ? FIXED_POINT : 0));
    __m512 power[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
      const __m512 score = _mm512_load_ps(softmax.scores + row * STEP + 16 * i);
      if (kind == Scores::bounded) {
        power[i] = exp2_bounded(visible[i], score, factor, negative_peak);
        continue;
      }
      __m512 added = negative_peak;
      if (kind == Scores::biased) {
        const __mmask16 there = row < softmax.rows ? visible[i] : 0;
        const float* bias = softmax.bias + row * softmax.bias_stride + 16 * i;
        added = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, bias), _mm512_set1_ps(LOG2_E), added);
      }
      power[i] = exp2_where(visible[i], _mm512_fmadd_ps(score, factor, added));
    }
    uint16_t* probabilities = softmax.probabilities + row * SPAN;
    __m512 total = _mm512_add_ps(power[0], power[1]);
    _mm512_store_si512(probabilities, to_bf16(power[1], power[0]));
    if (vectors == 4) {
      const __m512 third = power[vectors - 2], fourth = power[vectors - 1];
      total = _mm512_add_ps(total, _mm512_add_ps(third, fourth));
      _mm512_store_si512(probabilities + 32, to_bf16(fourth, third));
    }
    float* totals = softmax.totals + row * 16;
    _mm512_store_ps(totals, _mm512_add_ps(_mm512_load_ps(totals), total));
  };
  for (int64_t row = 0; row < 4 * groups; row += 4) {
    take_row(row), slices.multiply<0>();
    take_row(row + 1), slices.multiply<1>();
    take_row(row + 2), slices.multiply<2>();
    take_row(row + 3), slices.multiply<3>();
  }
  pending = slices.pending();
}

template <Scores kind, int vectors>
inline void exponentiate(const Softmax& softmax, const Product* products, int count,
                         Pending& pending) {
  if (softmax.diagonal)
    exponentiate<kind, vectors, true>(softmax, products, count, pending);
  else
    exponentiate<kind, vectors, false>(softmax, products, count, pending);
}

template <int vectors>
inline void exponentiate(Scores kind, const Softmax& softmax, const Product* products, int count,
                         Pending& pending) {
  switch (kind) {
    case Scores::bounded:
      return exponentiate<Scores::bounded, vectors>(softmax, products, count, pending);
    case Scores::any:
      return exponentiate<Scores::any, vectors>(softmax, products, count, pending);
    case Scores::biased:
      return exponentiate<Scores::biased, vectors>(softmax, products, count, pending);
  }
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
