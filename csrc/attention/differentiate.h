// The backward's vector work: scores and gradients of probabilities become probabilities and
// gradients of scores, and on AMX slices of tile products stand between their rows. Compiled in
// namespace VF_LEVEL.
#pragma once

#include "common/slices.h"
#include "heads.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int BLOCK = 128;  // queries that one product with d_k or d_v takes

struct Unit {
  const float *scores, *d_probabilities;  // (32, 32) keys by queries
  const float *log_sums, *delta;          // (32,)
  uint16_t *probabilities, *d_scores;     // (32, 32) of row stride BLOCK
  uint16_t* pairs;                        // two tiles
  uint32_t visible;
  bool diagonal;  // queries come no earlier than the key of their number
  float factor;
  const float* bias;  // of the first key and query
  float* d_bias;
  int64_t bias_stride;
  int64_t keys, queries;  // that exist, of these 32
};

// One call: 32 keys by 32 queries of probabilities and gradients of scores, in bf16, and on AMX the
// slices of products, as evenly as they come between each two keys and the next.
template <bool has_bias, bool diagonal>
__attribute__((noinline)) void differentiate(const Unit& given, const Product* products, int count,
                                             Pending& pending) {
  const Unit unit = given;
  Slices slices(products, count, pending);
  const int64_t all_slices = slices.left_over();
  const __m512 factor = _mm512_set1_ps(unit.factor);
  const __m512 log_sums[2] = {_mm512_load_ps(unit.log_sums), _mm512_load_ps(unit.log_sums + 16)};
  const __m512 delta[2] = {_mm512_load_ps(unit.delta), _mm512_load_ps(unit.delta + 16)};
  const __mmask16 there[2] = {first_of_16(unit.queries), first_of_16(unit.queries - 16)};
  for (int64_t row = 0; row < UNIT; row += 2) {
    __m512i d_scores[2] = {};
    if (row >= unit.keys) {  // d_q takes all 32; d_k and d_v of no key may be anything
      _mm512_store_si512(unit.pairs + row * 16, d_scores[0]);
      _mm512_store_si512(unit.pairs + TILE + row * 16, d_scores[0]);
      continue;
    }
#pragma GCC unroll 2
    for (int of_pair = 0; of_pair < 2; of_pair++) {
      const int64_t j = row + of_pair;
      const __mmask16 all = unit.visible >> j & 1 ? 0xffff : 0;
      __m512 probability[2], d_score[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const __mmask16 visible = diagonal ? all & ~first_of_16(j - 16 * i) : all;
        const __m512 score = _mm512_load_ps(unit.scores + j * UNIT + 16 * i);
        __m512 x = _mm512_fmsub_ps(score, factor, log_sums[i]);
        if (has_bias) {
          const float* bias = unit.bias + j * unit.bias_stride + 16 * i;
          const __m512 added = _mm512_maskz_loadu_ps(there[i] & visible, bias);
          x = _mm512_fmadd_ps(added, _mm512_set1_ps(LOG2_E), x);
        }
        probability[i] = exp2_where(visible, x);
        const __m512 d_probability = _mm512_load_ps(unit.d_probabilities + j * UNIT + 16 * i);
        d_score[i] = _mm512_mul_ps(probability[i], _mm512_sub_ps(d_probability, delta[i]));
        if (has_bias && unit.d_bias) {
          float* sum = unit.d_bias + j * unit.bias_stride + 16 * i;
          const __mmask16 added = there[i] & visible;
          const __m512 more = _mm512_add_ps(_mm512_maskz_loadu_ps(added, sum), d_score[i]);
          _mm512_mask_storeu_ps(sum, added, more);
        }
      }
      d_scores[of_pair] = to_bf16(d_score[1], d_score[0]);
      _mm512_store_si512(unit.probabilities + j * BLOCK, to_bf16(probability[1], probability[0]));
      _mm512_store_si512(unit.d_scores + j * BLOCK, d_scores[of_pair]);
    }
    _mm512_store_si512(unit.pairs + row * 16, _mm512_unpacklo_epi16(d_scores[0], d_scores[1]));
    _mm512_store_si512(unit.pairs + TILE + row * 16,
                       _mm512_unpackhi_epi16(d_scores[0], d_scores[1]));
    slices.leave(all_slices * (UNIT - 2 - row) / UNIT);
  }
  slices.leave(0);
  pending = slices.pending();
}

inline void differentiate(const Unit& unit, const Product* products, int count, Pending& pending) {
  if (unit.diagonal)
    (unit.bias ? differentiate<true, true> : differentiate<false, true>)(unit, products, count,
                                                                         pending);
  else
    (unit.bias ? differentiate<true, false> : differentiate<false, false>)(unit, products, count,
                                                                           pending);
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
