// bf16 and fp32 vectors of AVX-512: powers of two, logarithm, transposition, conversion. Compiled
// in namespace VF_LEVEL, at the levels that multiply bf16 (products.h).
#pragma once

#include "products.h"

#if VF_PRODUCTS

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr float MAGIC =
    12582912.0f;  // 1.5 * 2^23: in a sum with it the low bits are the other number, rounded

// 2^rest for |rest| <= 1/2, to 3e-6 of itself, exact at 0. The rounding to bf16 that follows is a
// thousand times that.
inline __m512 power_of_rest(__m512 rest) {
  __m512 power =
      _mm512_fmadd_ps(rest, _mm512_set1_ps(0x1.3a02ccp-7f), _mm512_set1_ps(0x1.c9fc46p-5f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0x1.ec0378p-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0x1.62e12cp-1f));
  return _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
}

// 2^x where visible and above 2^-125, else 0.
inline __m512 exp2_where(__mmask16 visible, __m512 x) {
  const __m512 magic = _mm512_set1_ps(MAGIC), shifted = _mm512_add_ps(x, magic);
  const __mmask16 kept = _mm512_mask_cmp_ps_mask(visible, shifted, _mm512_set1_ps(MAGIC - 125),
                                                 _CMP_NLT_UQ);  // nan is kept
  const __m512i power =
      _mm512_castps_si512(power_of_rest(_mm512_sub_ps(x, _mm512_sub_ps(shifted, magic))));
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(kept, power, _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// What exp2_bounded takes for a whole number that is added to the scores: the sum's exponent is 8
// then, and the rest of its bits are the power's in fixed point, 8.15, with fp32's own 127 added.
constexpr float FIXED_POINT = 256 + 127;

// 2^(score * factor + added) where visible, else 0, to 1e-4 of itself: a twentieth of bf16's
// rounding. The power must be between -120 and 1, which excludes nan; fixed_point = FIXED_POINT +
// added. On AMX a fused product, like any shift, has but one port while tiles multiply, so there
// are few: a shuffle moves the fixed point by a byte to where fp32 has exponent and mantissa, and
// a cubic replaces the mantissa m - 1 by that of 2^(m - 1).
inline __m512 exp2_bounded(__mmask16 visible, __m512 score, __m512 factor, __m512 fixed_point) {
  const __m512i up = _mm512_set4_epi32(0x0e0d0cff, 0x0a0908ff, 0x060504ff, 0x020100ff),
                mantissa = _mm512_set1_epi32(0x007fffff), one = _mm512_set1_epi32(0x3f800000);
  const __m512 sum = _mm512_fmadd_ps(score, factor, fixed_point);
  const __m512i bits = _mm512_shuffle_epi8(_mm512_castps_si512(sum), up);
  const __m512 m = _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bits, mantissa, one, 0xea));  // (bits & mantissa) | one
  __m512 power = _mm512_fmadd_ps(m, _mm512_set1_ps(0.07703935f), _mm512_set1_ps(-0.00342813f));
  power = _mm512_fmadd_ps(power, m, _mm512_set1_ps(0.47083517f));
  power = _mm512_fmadd_ps(power, m, _mm512_set1_ps(0.45555551f));
  return _mm512_castsi512_ps(_mm512_maskz_ternarylogic_epi32(
      visible, _mm512_castps_si512(power), bits, mantissa, 0xe0));  // power & (bits | mantissa)
}

inline __m512i to_bf16(__m512 high, __m512 low) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __m512 dot(__m512 sum, __m512i x, __m512i y) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

inline __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}
inline __mmask16 first_of_16(int64_t count) { return __mmask16(first_of_32(count)); }

inline void transpose_16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The sums of 16 vectors' lanes.
inline __m512 sum_of_each(__m512i rows[16]) {
  transpose_16(rows);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++)
      rows[i] = _mm512_castps_si512(
          _mm512_add_ps(_mm512_castsi512_ps(rows[i]), _mm512_castsi512_ps(rows[i + step])));
  return _mm512_castsi512_ps(rows[0]);
}

// Natural logarithm of positive numbers, to an eps of fp32.
inline __m512 logarithm(__m512 x) {
  const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero),
               one = _mm512_set1_ps(1);
  const __mmask16 large = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.5f), _CMP_GE_OQ);
  const __m512 m =
      _mm512_mask_mul_ps(mantissa, large, mantissa, _mm512_set1_ps(0.5f));  // 0.75 to 1.5
  __m512 exponent = _mm512_getexp_ps(x);
  exponent = _mm512_mask_add_ps(exponent, large, exponent, one);
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)),
               square = _mm512_mul_ps(s, s);
  __m512 series = _mm512_fmadd_ps(square, _mm512_set1_ps(2.0f / 9),
                                  _mm512_set1_ps(2.0f / 7));  // of 2 artanh(s) / s
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f / 5));
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f / 3));
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(exponent, _mm512_set1_ps(LN_2), _mm512_mul_ps(series, s));
}

// 16 fp32 values times `factor` to the first `count` bf16 of a row.
inline void store_row(__m512 values, float factor, uint16_t* to, int64_t count) {
  const __m256i rounded =
      (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(factor)));
  _mm256_mask_storeu_epi16(to, first_of_16(count), rounded);
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
