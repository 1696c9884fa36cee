// Attention in bf16: forward and backward by products of whole tiles (products.h), fp32 sums, softmax in AVX-512 between them.
//
// Tensors are packed once a task into panels of whole tiles, padded with zeros, so that tiles never read beyond a tensor:
//   rows      (n, width) bf16, row-major: the left factor, its rows times the products' depth
//   columns   for each 16 rows, for each 32 values: 16 pairs of values by 16 rows: the right factor of "x @ rows^T"
//   pairs     for each 32 rows, for each 16 values: 16 pairs of rows by 16 values: the right factor of "x @ rows"
// A task walks one head: queries in blocks, keys in steps of 64.
//
// B batch, T queries, S keys, H heads, D head_dim, width: D rounded up to 32, depth = width / 32
#include <math.h>
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "products.h"

namespace vatt_fast {
namespace VF_LEVEL {

namespace {

constexpr int STEP = 64;  // keys that one softmax step takes
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t units_of(int64_t rows) { return (rows + UNIT - 1) / UNIT; }
inline int64_t steps_of(int64_t keys) { return (keys + STEP - 1) / STEP; }

// Memory handed out in pieces on cache-line borders; with no base it only counts.
struct Arena {
  uint8_t* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// -- vectors -----------------------------------------------------------------------------------------------------------

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: in a sum with it the low bits are the other number, rounded

// 2^rest for |rest| <= 1/2, to 3e-6 of itself, exact at 0. The rounding to bf16 that follows is a thousand times that.
inline __m512 power_of_rest(__m512 rest) {
  __m512 power = _mm512_fmadd_ps(rest, _mm512_set1_ps(0x1.3a02ccp-7f), _mm512_set1_ps(0x1.c9fc46p-5f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0x1.ec0378p-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0x1.62e12cp-1f));
  return _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
}

// 2^x where visible and above 2^-125, else 0.
inline __m512 exp2_where(__mmask16 visible, __m512 x) {
  const __m512 magic = _mm512_set1_ps(MAGIC), shifted = _mm512_add_ps(x, magic);
  const __mmask16 kept = _mm512_mask_cmp_ps_mask(visible, shifted, _mm512_set1_ps(MAGIC - 125), _CMP_NLT_UQ);  // nan is kept
  const __m512i power = _mm512_castps_si512(power_of_rest(_mm512_sub_ps(x, _mm512_sub_ps(shifted, magic))));
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, power, _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// 2^(score * factor + added), where that is between -125 and 127 and added is a whole number; magic_added = MAGIC + added.
inline __m512 exp2_promised(__m512 score, __m512 factor, __m512 magic_added) {
  const __m512 shifted = _mm512_fmadd_ps(score, factor, magic_added);
  const __m512 rest = _mm512_fmsub_ps(score, factor, _mm512_sub_ps(shifted, magic_added));
  const __m512i power = _mm512_castps_si512(power_of_rest(rest));
  return _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

inline __m512i to_bf16(__m512 high, __m512 low) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __m512 dot(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1; }
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
      rows[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(rows[i]), _mm512_castsi512_ps(rows[i + step])));
  return _mm512_castsi512_ps(rows[0]);
}

// Natural logarithm of positive numbers, to an eps of fp32.
inline __m512 logarithm(__m512 x) {
  const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero), one = _mm512_set1_ps(1);
  const __mmask16 large = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.5f), _CMP_GE_OQ);
  const __m512 m = _mm512_mask_mul_ps(mantissa, large, mantissa, _mm512_set1_ps(0.5f));  // 0.75 to 1.5
  __m512 exponent = _mm512_getexp_ps(x);
  exponent = _mm512_mask_add_ps(exponent, large, exponent, one);
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(s, s);
  __m512 series = _mm512_fmadd_ps(square, _mm512_set1_ps(2.0f / 9), _mm512_set1_ps(2.0f / 7));  // of 2 artanh(s) / s
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f / 5));
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f / 3));
  series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(exponent, _mm512_set1_ps(LN_2), _mm512_mul_ps(series, s));
}

// -- packing -----------------------------------------------------------------------------------------------------------

struct Geometry {
  int64_t head_dim, depth, width, value_tiles;
};

inline Geometry geometry_of(int64_t head_dim) {
  const int64_t depth = (head_dim + 31) / 32;
  return {head_dim, depth, depth * 32, depth * 2};
}

inline const uint16_t* head_of(const Heads& x, int64_t b, int64_t h) { return x.data + b * x.batch + h * x.head; }

inline bool is_visible(const uint64_t* visible, int64_t key) { return visible[key / 64] >> key % 64 & 1; }

// One bit a key: whether it is attended; none beyond S.
inline void mark_visible(const uint8_t* mask, int64_t keys, uint64_t* visible) {
  for (int64_t word = 0; word < steps_of(keys); word++) {
    uint64_t bits = 0;
    for (int64_t key = word * 64; key < minimum(keys, word * 64 + 64); key++) bits |= uint64_t(!mask || mask[key]) << key % 64;
    visible[word] = bits;
  }
}

// `padded` rows from `from`, row-major; zeros beyond `rows` and where not visible: what is not attended may hold anything.
inline void pack_rows(const Geometry& g, const uint16_t* from, int64_t stride, int64_t rows, int64_t padded, const uint64_t* visible,
                      uint16_t* to) {
  for (int64_t n = 0; n < padded; n++)
    for (int64_t d = 0; d < g.width; d += 32) {
      const bool there = n < rows && (!visible || is_visible(visible, n));
      const __m512i values = there ? _mm512_maskz_loadu_epi16(first_of_32(g.head_dim - d), from + n * stride + d) : _mm512_setzero_si512();
      _mm512_store_si512(to + n * g.width + d, values);
    }
}

// Packed rows to columns. Returns the largest square of a row's length.
inline float pack_columns(const Geometry& g, const uint16_t* from, int64_t padded, uint16_t* to) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t n = 0; n < padded; n += 16) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < g.depth; k++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(from + (n + i) * g.width + 32 * k);
      transpose_16(r);
      for (int i = 0; i < 16; i++) {
        _mm512_store_si512(to + (n / 16 * g.depth + k) * TILE + i * 32, r[i]);
        squares = dot(squares, r[i], r[i]);
      }
    }
    largest = _mm512_max_ps(squares, largest);
  }
  return _mm512_reduce_max_ps(largest);
}

// Packed rows to pairs.
inline void pack_pairs(const Geometry& g, const uint16_t* from, int64_t padded, uint16_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34,
                                       2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t n = 0; n < padded; n += 2)
    for (int64_t k = 0; k < g.depth; k++) {
      const __m512i a = _mm512_load_si512(from + n * g.width + 32 * k), b = _mm512_load_si512(from + (n + 1) * g.width + 32 * k);
      uint16_t* tile = to + (n / 32 * g.value_tiles + 2 * k) * TILE + n % 32 * 16;
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(tile + TILE, _mm512_permutex2var_epi16(a, high, b));
    }
}

// 16 fp32 values times `factor` to the first `count` bf16 of a row.
inline void store_row(__m512 values, float factor, uint16_t* to, int64_t count) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(factor)));
  _mm256_mask_storeu_epi16(to, first_of_16(count), rounded);
}

// -- forward -----------------------------------------------------------------------------------------------------------

// What a block of 32 queries carries from step to step.
struct Block {
  uint16_t* rows;             // (32, width)
  float* sums;                // (32, width), of the values
  float* totals;              // (32, 16): each row's sum of probabilities in 16 parts
  float negative_peak[UNIT];  // what is added to a row's scores, in units of log 2, before their powers are taken
  bool bounded;               // then these are whole numbers and no power leaves the range of fp32
  int64_t first;              // query
};

struct Forward {
  Geometry g;
  float factor;  // of the products, for powers of two
  int64_t keys, queries;
  float key_length;  // of the longest key
  uint16_t *key_columns, *value_pairs, *key_rows;
  uint64_t* visible;
  float* scores[2];            // (32, 64) each, of this step and the next
  uint16_t* probabilities[2];  // (32, 64) each, of this step and the last
  Block blocks[3];             // last, this, next
  const float* bias;           // of the head, or null
};

inline int64_t units_in_step(int64_t keys, int64_t step) { return minimum(2, units_of(keys) - 2 * step); }

// Scores of a block and 32 keys of a step.
inline Product score(const Forward& f, const Block& block, int64_t step, int64_t unit, float* scores) {
  const Geometry& g = f.g;
  const uint16_t* keys = f.key_columns + (4 * step + 2 * unit) * g.depth * TILE;
  return {{block.rows, g.width, 32, keys, g.depth * TILE, TILE}, g.depth, scores + 32 * unit, STEP, true};
}

// 32 dims of a step's values, weighed, onto a block's sums.
inline Product weigh(const Forward& f, const uint16_t* probabilities, const Block& block, int64_t step, int64_t group) {
  const int64_t tiles = f.g.value_tiles;
  const uint16_t* values = f.value_pairs + (2 * step * tiles + 2 * group) * TILE;
  float* sums = block.sums + 32 * group;
  return {{probabilities, STEP, 32, values, TILE, tiles * TILE}, units_in_step(f.keys, step), sums, f.g.width, step == 0};
}

// What is known of the keys of a step: nothing can go wrong; some are not attended, or powers may be too small; there is a bias.
enum class Keys { plain, marked, biased };
enum class Beside { nothing, scores, values };  // the product whose tiles are worked on between a softmax's rows

// The r-th eighth of a product of depth 2 or 1, on tiles.
template <Beside beside>
inline __attribute__((always_inline)) void eighth(const Product& p, int r) {
  if (beside == Beside::nothing) return;
#if VF_PRODUCTS == 2
  if (r >= 4 && p.depth < 2) r = r == 7 ? 8 : 9;
  const Factors& f = p.factors;
  const int64_t left_bytes = f.left_stride * 2;
  const uint16_t *left = f.left, *right = f.right;
  if (r >= 4) left += f.left_next, right += f.right_next;
  switch (r) {
    case 0:
      load_sums(p);
      [[fallthrough]];
    case 4:
      _tile_loadd(4, left, left_bytes);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      break;
    case 1:
    case 5:
      _tile_loadd(7, right + f.right_column, 64);
      _tile_dpbf16ps(1, 4, 7);
      break;
    case 2:
    case 6:
      _tile_loadd(5, left + 16 * f.left_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      break;
    case 3:
      _tile_dpbf16ps(3, 5, 7);
      break;
    case 7:
      _tile_dpbf16ps(3, 5, 7);
      [[fallthrough]];
    case 8:
      store_sums(p);
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

// One call: 8 rows by 32 or 64 keys of powers, rounded to bf16 for the next product, and on AMX an eighth of another product after
// each row, whose tiles work while these vectors do.
template <Beside beside, Keys keys, int vectors>
__attribute__((noinline)) void take_powers(const Softmax& softmax, const Product& product) {
  const Softmax s = softmax;  // of which the compiler knows that nothing else writes it
  const Product p = product;
  const __m512 factor = _mm512_set1_ps(s.factor);
  __mmask16 visible[vectors];
  for (int i = 0; i < vectors; i++) visible[i] = __mmask16(s.visible >> 16 * i);
  before_tile_loads();
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const __m512 negative_peak = _mm512_set1_ps(keys == Keys::plain ? s.negative_peak[r] + MAGIC : s.negative_peak[r]);
    __m512 power[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
      const __m512 score = _mm512_load_ps(s.scores + r * STEP + 16 * i);
      if (keys == Keys::plain) {
        power[i] = exp2_promised(score, factor, negative_peak);
        continue;
      }
      __m512 added = negative_peak;
      if (keys == Keys::biased) {
        const __mmask16 there = r < s.bias_rows ? visible[i] : 0;
        const __m512 bias = _mm512_maskz_loadu_ps(there, s.bias + r * s.bias_stride + 16 * i);
        added = _mm512_fmadd_ps(bias, _mm512_set1_ps(LOG2_E), added);
      }
      power[i] = exp2_where(visible[i], _mm512_fmadd_ps(score, factor, added));
    }
    __m512 total = _mm512_add_ps(power[0], power[1]);
    _mm512_store_si512(s.probabilities + r * STEP, to_bf16(power[1], power[0]));
    if (vectors == 4) {
      total = _mm512_add_ps(total, _mm512_add_ps(power[vectors - 2], power[vectors - 1]));
      _mm512_store_si512(s.probabilities + r * STEP + 32, to_bf16(power[vectors - 1], power[vectors - 2]));
    }
    _mm512_store_ps(s.totals + r * 16, _mm512_add_ps(_mm512_load_ps(s.totals + r * 16), total));
    eighth<beside>(p, r);
  }
}

template <Beside beside>
inline void take_powers(int64_t units, const Softmax& s, const Product& p) {
  if (s.keys == Keys::plain) return take_powers<beside, Keys::plain, 4>(s, p);
  return units == 2 ? take_powers<beside, Keys::marked, 4>(s, p) : take_powers<beside, Keys::marked, 2>(s, p);
}

inline void take_powers(Beside beside, int64_t units, const Softmax& s, const Product& p) {
  if (s.keys == Keys::biased) {
    if (units == 2) return take_powers<Beside::nothing, Keys::biased, 4>(s, p);
    return take_powers<Beside::nothing, Keys::biased, 2>(s, p);
  }
  if (beside == Beside::scores) return take_powers<Beside::scores>(units, s, p);
  if (beside == Beside::values) return take_powers<Beside::values>(units, s, p);
  return take_powers<Beside::nothing>(units, s, p);
}

// The largest visible bias of a query in units of log 2; -inf where there is none.
float bias_peak(const Forward& f, int64_t t) {
  __m512 peak = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < f.keys; n += 16) {
    const __mmask16 visible = __mmask16(f.visible[n / 64] >> n % 64);
    peak = _mm512_mask_max_ps(peak, visible, peak, _mm512_maskz_loadu_ps(visible, f.bias + t * f.keys + n));
  }
  return _mm512_reduce_max_ps(peak) * LOG2_E;
}

// The rows' true largest scores, by a pass over all keys: where lengths promise nothing.
void find_peaks(const Forward& f, const Block& block, int64_t rows, float* scores, float* peaks) {
  __m512 peak[UNIT];
  for (int r = 0; r < UNIT; r++) peak[r] = _mm512_set1_ps(-INFINITY);
  for (int64_t step = 0; step < steps_of(f.keys); step++) {
    for (int64_t unit = 0; unit < units_in_step(f.keys, step); unit++) multiply(score(f, block, step, unit, scores));
    for (int64_t r = 0; r < rows; r++)
      for (int i = 0; i < 2 * units_in_step(f.keys, step); i++) {
        const __mmask16 visible = __mmask16(f.visible[step] >> 16 * i);
        __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + r * STEP + 16 * i), _mm512_set1_ps(f.factor));
        if (f.bias) {
          const float* bias = f.bias + (block.first + r) * f.keys + step * STEP + 16 * i;
          x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(visible, bias), _mm512_set1_ps(LOG2_E), x);
        }
        peak[r] = _mm512_mask_max_ps(peak[r], visible, peak[r], x);
      }
  }
  for (int64_t r = 0; r < rows; r++) peaks[r] = _mm512_reduce_max_ps(peak[r]);
}

// Reads 32 queries and finds what to subtract from their scores: |q| times the longest key, which no score exceeds and which needs no pass
// over the keys. No score is then below minus twice that, so up to 2^-100 nothing is lost to underflow.
void begin_block(const Forward& f, const Heads& q, const uint16_t* from, int64_t first, float* scores, Block& block) {
  const int64_t rows = minimum(UNIT, f.queries - first);
  block.first = first;
  pack_rows(f.g, from + first * q.row, q.row, rows, UNIT, nullptr, block.rows);
  memset(block.totals, 0, UNIT * 64);
  block.bounded = steps_of(f.keys) > 1;  // else the pass is short, and a probability of one is exact
  alignas(64) float peaks[UNIT];
  for (int half = 0; half < UNIT; half += 16) {
    __m512i squares[16];
    for (int r = 0; r < 16; r++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < f.g.width; d += 32) {
        const __m512i values = _mm512_load_si512(block.rows + (half + r) * f.g.width + d);
        sum = dot(sum, values, values);
      }
      squares[r] = _mm512_castps_si512(sum);
    }
    const __m512 longest = _mm512_set1_ps(f.key_length * fabsf(f.factor));
    const __m512 bound = _mm512_mul_ps(_mm512_sqrt_ps(sum_of_each(squares)), longest);
    block.bounded = block.bounded && _mm512_cmp_ps_mask(bound, _mm512_set1_ps(50), _CMP_LE_OQ) == 0xffff;  // not true of nan
    _mm512_store_ps(peaks + half, _mm512_roundscale_ps(bound, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
  }
  for (int64_t r = 0; f.bias && r < rows; r++) peaks[r] += bias_peak(f, first + r);
  if (!block.bounded) find_peaks(f, block, rows, scores, peaks);
  for (int r = 0; r < UNIT; r++) block.negative_peak[r] = peaks[r] == -INFINITY ? 0 : -peaks[r];  // zero: -inf + inf would give nan
}

// Divides the sums by the totals and writes out and lse.
void finish_block(const Forward& f, const Block& block, uint16_t* out, int64_t out_stride, float* lse) {
  const int64_t rows = minimum(UNIT, f.queries - block.first);
  alignas(64) float inverses[UNIT];
  for (int half = 0; half < UNIT; half += 16) {
    __m512i parts[16];
    for (int r = 0; r < 16; r++) parts[r] = _mm512_load_si512(block.totals + (half + r) * 16);
    const __m512 total = sum_of_each(parts);
    const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_store_ps(inverses + half, _mm512_maskz_div_ps(some, _mm512_set1_ps(1), total));
    const __m512 peak = _mm512_mul_ps(_mm512_loadu_ps(block.negative_peak + half), _mm512_set1_ps(LN_2));
    const __m512 log_sum = _mm512_mask_sub_ps(_mm512_set1_ps(-INFINITY), some, logarithm(total), peak);
    _mm512_mask_storeu_ps(lse + block.first + half, first_of_16(rows - half), log_sum);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < f.g.head_dim; d += 16)
      store_row(_mm512_load_ps(block.sums + r * f.g.width + d), inverses[r], out + (block.first + r) * out_stride + d, f.g.head_dim - d);
}

Forward forward_memory(const AttentionShape& shape, Arena& arena) {
  Forward f = {};
  f.g = geometry_of(shape.head_dim);
  f.keys = shape.keys, f.queries = shape.queries;
  const int64_t padded = units_of(shape.keys) * UNIT;
  f.key_columns = arena.take<uint16_t>(padded * f.g.width);
  f.value_pairs = arena.take<uint16_t>(padded * f.g.width);
  f.key_rows = arena.take<uint16_t>(UNIT * f.g.width);
  f.visible = arena.take<uint64_t>(steps_of(shape.keys));
  for (int i = 0; i < 2; i++) {
    f.scores[i] = arena.take<float>(UNIT * STEP);
    f.probabilities[i] = arena.take<uint16_t>(UNIT * STEP);
  }
  for (int i = 0; i < 3; i++) {
    f.blocks[i].rows = arena.take<uint16_t>(UNIT * f.g.width);
    f.blocks[i].sums = arena.take<float>(UNIT * f.g.width);
    f.blocks[i].totals = arena.take<float>(UNIT * 16);
  }
  return f;
}

// Keys and values of one head to their panels, through 32 rows at a time.
void pack_keys_and_values(const AttentionForward& a, int64_t b, int64_t h, Forward& f) {
  const uint16_t *keys = head_of(a.k, b, h), *values = head_of(a.v, b, h);
  mark_visible(a.key_mask ? a.key_mask + b * f.keys : nullptr, f.keys, f.visible);
  float largest = 0;
  for (int64_t n = 0; n < f.keys; n += UNIT) {
    const int64_t rows = minimum(UNIT, f.keys - n);
    const uint64_t visible = f.visible[n / 64] >> n % 64;
    pack_rows(f.g, keys + n * a.k.row, a.k.row, rows, UNIT, &visible, f.key_rows);
    const float squares = pack_columns(f.g, f.key_rows, UNIT, f.key_columns + n * f.g.width);
    largest = squares > largest || squares != squares ? squares : largest;
    pack_rows(f.g, values + n * a.v.row, a.v.row, rows, UNIT, &visible, f.key_rows);
    pack_pairs(f.g, f.key_rows, UNIT, f.value_pairs + n * f.g.width);
  }
  f.key_length = sqrtf(largest) * 1.001f;  // roundings of the products
}

// One task: a run of query blocks of one head. Blocks and steps follow each other in one sequence: while the powers of one step are taken,
// AMX multiplies the next step's scores and the last step's values.
void attend(const AttentionForward& a, Forward& f, int64_t b, int64_t h, int64_t first_block, int64_t end_block) {
  const AttentionShape& shape = a.shape;
  const uint16_t* queries = head_of(a.q, b, h);
  uint16_t* out = a.out + (b * shape.queries * shape.heads + h) * shape.head_dim;
  float* lse = a.lse + (b * shape.heads + h) * shape.queries;
  f.bias = a.bias ? a.bias + h * shape.queries * shape.keys : nullptr;
  f.factor = shape.scale * LOG2_E;
  const int64_t steps = steps_of(f.keys), items = (end_block - first_block) * steps;
  const bool overlapped = TILES && f.g.depth <= 2 && !f.bias;
  const int64_t row_stride = shape.heads * shape.head_dim;

  begin_block(f, a.q, queries, first_block * UNIT, f.scores[0], f.blocks[0]);
  for (int64_t unit = 0; unit < units_in_step(f.keys, 0); unit++) multiply(score(f, f.blocks[0], 0, unit, f.scores[0]));
  for (int64_t item = 0; item <= items; item++) {  // the last one only weighs
    const int64_t step = item % steps, units = units_in_step(f.keys, step);
    const int64_t before = (item + steps - 1) % steps, after = (item + 1) % steps;
    Block &block = f.blocks[item / steps % 3], &next = f.blocks[(item + 1) / steps % 3];
    const Block& last = f.blocks[(item + 3 * steps - 1) / steps % 3];
    float *scores = f.scores[item % 2], *next_scores = f.scores[(item + 1) % 2];
    uint16_t *probabilities = f.probabilities[item % 2], *last_probabilities = f.probabilities[(item + 1) % 2];
    const bool weighs = item > 0, takes = item < items, multiplies = item + 1 < items;
    if (multiplies && after == 0) begin_block(f, a.q, queries, (first_block + (item + 1) / steps) * UNIT, next_scores, next);
    if (!overlapped || !takes) {
      for (int64_t unit = 0; multiplies && unit < units_in_step(f.keys, after); unit++) multiply(score(f, next, after, unit, next_scores));
      for (int64_t group = 0; weighs && group < f.g.depth; group++) multiply(weigh(f, last_probabilities, last, before, group));
    }
    for (int eight = 0; takes && eight < 4; eight++) {
      const int64_t r = 8 * eight, t = block.first + r;
      const float* bias = f.bias ? f.bias + minimum(t, f.queries - 1) * f.keys + step * STEP : nullptr;
      const Keys keys = f.bias ? Keys::biased : block.bounded && f.visible[step] == ~uint64_t(0) ? Keys::plain : Keys::marked;
      const Softmax softmax = {scores + r * STEP,
                               probabilities + r * STEP,
                               block.totals + r * 16,
                               block.negative_peak + r,
                               f.visible[step],
                               f.factor,
                               keys,
                               bias,
                               f.queries - t,
                               f.keys};
      Beside beside = Beside::nothing;
      Product product = {};
      if (overlapped && eight < 2 && multiplies && eight < units_in_step(f.keys, after)) {
        beside = Beside::scores;
        product = score(f, next, after, eight, next_scores);
      } else if (overlapped && eight >= 2 && weighs && eight - 2 < f.g.depth) {
        beside = Beside::values;
        product = weigh(f, last_probabilities, last, before, eight - 2);
      }
      take_powers(beside, units, softmax, product);
    }
    if (weighs && before == steps - 1) finish_block(f, last, out, row_stride, lse);
  }
}

// Into how many tasks a head's query blocks are cut: enough for all threads, few enough that packing keys again costs little.
int64_t parts_of(const AttentionShape& shape) {
  const int64_t heads = shape.batch * shape.heads, blocks = units_of(shape.queries);
  if (heads >= 3 * shape.threads || heads % shape.threads == 0) return 1;
  return minimum((3 * shape.threads + heads - 1) / heads, (blocks + 7) / 8);
}

}  // namespace

int64_t attention_forward_scratch(const AttentionShape& shape) {
  Arena arena = {};
  forward_memory(shape, arena);
  return arena.used * shape.threads;
}

void attention_forward(const AttentionForward& a) {
  const AttentionShape& shape = a.shape;
  const int64_t parts = parts_of(shape), heads = shape.batch * shape.heads, blocks = units_of(shape.queries);
  const int64_t memory = attention_forward_scratch(shape) / shape.threads;
#pragma omp parallel num_threads(shape.threads)
  {
    Arena arena = {a.scratch + memory * omp_get_thread_num(), 0};
    Forward f = forward_memory(shape, arena);
    begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * parts; task++) {
      const int64_t head = task / parts, part = task % parts;
      const int64_t b = head / shape.heads, h = head % shape.heads;
      pack_keys_and_values(a, b, h, f);
      attend(a, f, b, h, blocks * part / parts, blocks * (part + 1) / parts);
    }
    end_products();
  }
}

// -- backward ----------------------------------------------------------------------------------------------------------

namespace {

constexpr int BLOCK = 64;            // queries
constexpr int64_t KEY_CHUNK = 1024;  // keys whose panels and sums stay in the second cache

// Sums, panels and products of one head. Scores are taken transposed, keys by queries: so the probabilities' rows are the left factors of
// d_v and d_k as they come, and two rows interleaved the right factor of d_q, transposed too.
struct Backward {
  Geometry g;
  int64_t keys, queries;
  float factor, scale;
  uint64_t* visible;
  // of a chunk of keys
  uint16_t *key_rows, *value_rows;
  uint16_t* key_dims;  // for each 32 keys, for each 16 dims: 16 dims by 32 keys, the left factor of d_q
  float *d_k, *d_v;    // (chunk, width)
  // of a block of queries
  uint16_t *rows, *query_columns, *query_pairs, *gradient_columns, *gradient_pairs;
  float *log_sums, *delta;  // (64,), in units of log 2; inf in a row without a key, whose powers are then 0
  float* d_q;               // for each block, or one: (width, 64), dims by queries
  // of 64 keys by 64 queries, this step's and the last's
  uint16_t *probabilities[2], *d_scores[2];  // (64, 64)
  uint16_t* d_scores_pairs[2];               // for each 32 keys, for each 16 queries of query_of(): 16 pairs of keys by 16 queries
  // of 32 keys by 32 queries, these and the next
  float *scores[2], *d_probabilities[2];
  const float* bias;  // of the head, or null
  float* d_bias;
};

Backward backward_memory(const AttentionShape& shape, Arena& arena) {
  Backward w = {};
  w.g = geometry_of(shape.head_dim);
  w.keys = shape.keys, w.queries = shape.queries;
  w.scale = shape.scale, w.factor = shape.scale * LOG2_E;
  const int64_t chunk = minimum(KEY_CHUNK, units_of(shape.keys) * UNIT), width = w.g.width;
  const int64_t blocks = shape.keys > KEY_CHUNK ? (shape.queries + BLOCK - 1) / BLOCK : 1;
  w.visible = arena.take<uint64_t>(steps_of(shape.keys));
  uint16_t** const key_panels[] = {&w.key_rows, &w.value_rows, &w.key_dims};
  for (uint16_t** panel : key_panels) *panel = arena.take<uint16_t>(chunk * width);
  uint16_t** const query_panels[] = {&w.rows, &w.query_columns, &w.query_pairs, &w.gradient_columns, &w.gradient_pairs};
  for (uint16_t** panel : query_panels) *panel = arena.take<uint16_t>(BLOCK * width);
  w.d_k = arena.take<float>(chunk * width);
  w.d_v = arena.take<float>(chunk * width);
  w.log_sums = arena.take<float>(BLOCK);
  w.delta = arena.take<float>(BLOCK);
  w.d_q = arena.take<float>(blocks * BLOCK * width);
  for (int i = 0; i < 2; i++) {
    w.probabilities[i] = arena.take<uint16_t>(STEP * BLOCK);
    w.d_scores[i] = arena.take<uint16_t>(STEP * BLOCK);
    w.d_scores_pairs[i] = arena.take<uint16_t>(STEP * BLOCK);
    w.scores[i] = arena.take<float>(UNIT * UNIT);
    w.d_probabilities[i] = arena.take<float>(UNIT * UNIT);
  }
  return w;
}

// Where two interleaved rows of 32 queries put the n-th of the first (half 0) or second (half 1) 16 columns.
inline int query_of(int half, int n) { return n / 4 * 8 + n % 4 + 4 * half; }

// Packed rows to dims: pairs, whose tiles of 16 pairs of keys by 16 dims become 16 dims by 32 keys.
void pack_dims(const Geometry& g, const uint16_t* rows, int64_t padded, uint16_t* dims) {
  pack_pairs(g, rows, padded, dims);
  for (uint16_t* tile = dims; tile < dims + padded * g.width; tile += TILE) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + i * 32);
    transpose_16(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, r[i]);
  }
}

void begin_chunk(const AttentionBackward& a, Backward& w, int64_t b, int64_t h, int64_t first) {
  const int64_t rows = minimum(KEY_CHUNK, w.keys - first), padded = units_of(rows) * UNIT;
  pack_rows(w.g, head_of(a.k, b, h) + first * a.k.row, a.k.row, rows, padded, w.visible + first / 64, w.key_rows);
  pack_rows(w.g, head_of(a.v, b, h) + first * a.v.row, a.v.row, rows, padded, w.visible + first / 64, w.value_rows);
  pack_dims(w.g, w.key_rows, padded, w.key_dims);
  memset(w.d_k, 0, padded * w.g.width * sizeof(float));
  memset(w.d_v, 0, padded * w.g.width * sizeof(float));
}

void finish_chunk(const AttentionBackward& a, const Backward& w, int64_t b, int64_t h, int64_t first) {
  const int64_t stride = a.shape.heads * w.g.head_dim, offset = (b * w.keys * a.shape.heads + h) * w.g.head_dim;
  for (int64_t n = 0; n < minimum(KEY_CHUNK, w.keys - first); n++)
    for (int64_t d = 0; d < w.g.head_dim; d += 16) {
      const int64_t at = offset + (first + n) * stride + d;
      store_row(_mm512_load_ps(w.d_k + n * w.g.width + d), w.scale, a.d_k + at, w.g.head_dim - d);
      store_row(_mm512_load_ps(w.d_v + n * w.g.width + d), 1, a.d_v + at, w.g.head_dim - d);
    }
}

void begin_queries(const AttentionBackward& a, Backward& w, int64_t b, int64_t h, int64_t first) {
  const int64_t rows = minimum(BLOCK, w.queries - first), padded = units_of(rows) * UNIT;
  const float* lse = a.lse + (b * a.shape.heads + h) * w.queries + first;
  const float* d_lse = a.d_lse ? a.d_lse + (b * a.shape.heads + h) * w.queries + first : nullptr;
  uint64_t attending = 0;
  for (int64_t r = 0; r < BLOCK; r++) {
    const bool attends = r < rows && lse[r] != -INFINITY;
    attending |= uint64_t(attends) << r;
    w.log_sums[r] = attends ? lse[r] * LOG2_E : INFINITY;
  }
  pack_rows(w.g, head_of(a.q, b, h) + first * a.q.row, a.q.row, rows, padded, nullptr, w.rows);
  pack_columns(w.g, w.rows, padded, w.query_columns);
  pack_pairs(w.g, w.rows, padded, w.query_pairs);
  // a row without a key passes no gradient, whatever comes in
  pack_rows(w.g, head_of(a.d_out, b, h) + first * a.d_out.row, a.d_out.row, rows, padded, &attending, w.rows);
  pack_columns(w.g, w.rows, padded, w.gradient_columns);
  pack_pairs(w.g, w.rows, padded, w.gradient_pairs);
  const uint16_t* out = head_of(a.out, b, h) + first * a.out.row;
  for (int64_t first_row = 0; first_row < padded; first_row += 16) {
    __m512i products[16];
    for (int64_t r = first_row; r < first_row + 16; r++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < w.g.width && attending >> r & 1; d += 32) {
        const __m512i values = _mm512_maskz_loadu_epi16(first_of_32(w.g.head_dim - d), out + r * a.out.row + d);
        sum = dot(sum, values, _mm512_load_si512(w.rows + r * w.g.width + d));
      }
      products[r - first_row] = _mm512_castps_si512(sum);
    }
    const __m512 delta = sum_of_each(products);
    const __mmask16 with_gradient = d_lse ? __mmask16(attending >> first_row) : 0;
    const __m512 added = _mm512_maskz_loadu_ps(with_gradient, d_lse ? d_lse + first_row : lse);
    _mm512_store_ps(w.delta + first_row, _mm512_sub_ps(delta, added));
  }
}

void finish_queries(const AttentionBackward& a, const Backward& w, int64_t b, int64_t h, int64_t first, const float* d_q) {
  uint16_t* to = a.d_q + ((b * w.queries + first) * a.shape.heads + h) * w.g.head_dim;
  const int64_t rows = minimum(BLOCK, w.queries - first);
  for (int64_t d = 0; d < w.g.head_dim; d += 16)
    for (int quarter = 0; quarter < 2 * units_of(rows); quarter++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(d_q + (d + i) * BLOCK + quarter * 16);
      transpose_16(r);
      for (int n = 0; n < 16; n++) {
        const int64_t row = quarter / 2 * 32 + query_of(quarter % 2, n);
        if (row < rows) store_row(_mm512_castsi512_ps(r[n]), w.scale, to + row * a.shape.heads * w.g.head_dim + d, w.g.head_dim - d);
      }
    }
}

struct Unit {
  const float *scores, *d_probabilities;  // (32, 32) keys by queries
  const float *log_sums, *delta;          // (32,)
  uint16_t *probabilities, *d_scores;     // (32, 32) of row stride 64
  uint16_t* pairs;                        // two tiles
  uint32_t visible;
  float factor;
  const float* bias;  // of the first key and query
  float* d_bias;
  int64_t bias_stride;
  int64_t queries;  // that exist, of these 32
};

// One call: some of 32 keys by 32 queries of probabilities and gradients of scores, in bf16.
template <bool has_bias>
__attribute__((noinline)) void differentiate(const Unit& unit, int64_t first_row, int64_t end_row) {
  const Unit u = unit;
  const __m512 factor = _mm512_set1_ps(u.factor);
  const __m512 log_sums[2] = {_mm512_load_ps(u.log_sums), _mm512_load_ps(u.log_sums + 16)};
  const __m512 delta[2] = {_mm512_load_ps(u.delta), _mm512_load_ps(u.delta + 16)};
  const __mmask16 there[2] = {first_of_16(u.queries), first_of_16(u.queries - 16)};
  for (int64_t row = first_row; row < end_row; row += 2) {
    __m512i d_scores[2];
#pragma GCC unroll 2
    for (int of_pair = 0; of_pair < 2; of_pair++) {
      const int64_t j = row + of_pair;
      const __mmask16 visible = u.visible >> j & 1 ? 0xffff : 0;
      __m512 p[2], d[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        __m512 x = _mm512_fmsub_ps(_mm512_load_ps(u.scores + j * UNIT + 16 * i), factor, log_sums[i]);
        if (has_bias) {
          const __m512 bias = _mm512_maskz_loadu_ps(there[i] & visible, u.bias + j * u.bias_stride + 16 * i);
          x = _mm512_fmadd_ps(bias, _mm512_set1_ps(LOG2_E), x);
        }
        p[i] = exp2_where(visible, x);
        d[i] = _mm512_mul_ps(p[i], _mm512_sub_ps(_mm512_load_ps(u.d_probabilities + j * UNIT + 16 * i), delta[i]));
        if (has_bias && u.d_bias) {
          float* sum = u.d_bias + j * u.bias_stride + 16 * i;
          const __mmask16 added = there[i] & visible;
          _mm512_mask_storeu_ps(sum, added, _mm512_add_ps(_mm512_maskz_loadu_ps(added, sum), d[i]));
        }
      }
      d_scores[of_pair] = to_bf16(d[1], d[0]);
      _mm512_store_si512(u.probabilities + j * BLOCK, to_bf16(p[1], p[0]));
      _mm512_store_si512(u.d_scores + j * BLOCK, d_scores[of_pair]);
    }
    _mm512_store_si512(u.pairs + row * 16, _mm512_unpacklo_epi16(d_scores[0], d_scores[1]));
    _mm512_store_si512(u.pairs + TILE + row * 16, _mm512_unpackhi_epi16(d_scores[0], d_scores[1]));
  }
}

// Where 32 keys by 32 queries lie: the i-th and j-th of a step's; which lies at `key` of its chunk.
struct Place {
  int64_t key, i, j;
};

inline Product score(const Backward& w, const Place& at, float* sums) {
  const int64_t rows = (at.key + 32 * at.i) * w.g.width, columns = 2 * at.j * w.g.depth * TILE;
  return {{w.key_rows + rows, w.g.width, 32, w.query_columns + columns, w.g.depth * TILE, TILE}, w.g.depth, sums, UNIT, true};
}

inline Product d_probability(const Backward& w, const Place& at, float* sums) {
  const int64_t rows = (at.key + 32 * at.i) * w.g.width, columns = 2 * at.j * w.g.depth * TILE;
  return {{w.value_rows + rows, w.g.width, 32, w.gradient_columns + columns, w.g.depth * TILE, TILE}, w.g.depth, sums, UNIT, true};
}

// The three products that a step's probabilities and gradients of scores enter, 32 by 32 sums at a time. Returns how many.
inline int list_sums(const Backward& w, int64_t key, int64_t key_units, int64_t query_units, int parity, bool fresh, float* d_q,
                     Product* list) {
  const Geometry& g = w.g;
  int count = 0;
  for (int64_t group = 0; group < g.depth; group++) {  // of 32 dims
    for (int64_t i = 0; i < key_units; i++) {
      const uint16_t *p = w.probabilities[parity] + 32 * i * BLOCK, *d_s = w.d_scores[parity] + 32 * i * BLOCK;
      const int64_t right = 2 * group * TILE, next = g.value_tiles * TILE, sums = (key + 32 * i) * g.width + 32 * group;
      list[count++] = {{p, BLOCK, 32, w.gradient_pairs + right, TILE, next}, query_units, w.d_v + sums, g.width, false};
      list[count++] = {{d_s, BLOCK, 32, w.query_pairs + right, TILE, next}, query_units, w.d_k + sums, g.width, false};
    }
    for (int64_t j = 0; j < query_units; j++) {
      const uint16_t* dims = w.key_dims + (key / 32 * g.value_tiles + 2 * group) * TILE;
      const uint16_t* pairs = w.d_scores_pairs[parity] + 2 * j * TILE;
      float* sums = d_q + 32 * group * BLOCK + 32 * j;
      list[count++] = {{dims, 32, g.value_tiles * TILE, pairs, TILE, 4 * TILE}, key_units, sums, BLOCK, fresh};
    }
  }
  return count;
}

// A block of queries against a chunk of keys, 64 by 64 a step, of which 32 by 32 a unit. While the vectors work on a unit, AMX
// multiplies the next unit's scores and d_probabilities, and a share of the last step's sums.
void differentiate_block(const Backward& w, int64_t chunk, int64_t query, float* d_q) {
  constexpr int most = 6 * 128 / 32;  // of list_sums
  const int64_t keys = minimum(KEY_CHUNK, w.keys - chunk), query_units = minimum(2, units_of(w.queries - query));
  Product sums[most];
  int listed = 0, parity = 0, buffer = 0;
  multiply(score(w, {0, 0, 0}, w.scores[0]));
  multiply(d_probability(w, {0, 0, 0}, w.d_probabilities[0]));
  for (int64_t key = 0; key < keys; key += STEP, parity ^= 1) {
    const int64_t key_units = minimum(2, units_of(keys - key)), units = key_units * query_units;
    for (int64_t u = 0; u < units; u++, buffer ^= 1) {
      const int64_t i = u / query_units, j = u % query_units;
      Product beside[2 + most];
      int count = 0;
      const Place next = u + 1 < units ? Place{key, (u + 1) / query_units, (u + 1) % query_units} : Place{key + STEP, 0, 0};
      if (next.key < keys) {
        beside[count++] = score(w, next, w.scores[buffer ^ 1]);
        beside[count++] = d_probability(w, next, w.d_probabilities[buffer ^ 1]);
      }
      for (int64_t n = listed * u / units; n < listed * (u + 1) / units; n++) beside[count++] = sums[n];
      const int64_t s = chunk + key + 32 * i, t = query + 32 * j, square = 32 * i * BLOCK + 32 * j, bias = s * w.queries + t;
      const Unit unit = {w.scores[buffer],
                         w.d_probabilities[buffer],
                         w.log_sums + 32 * j,
                         w.delta + 32 * j,
                         w.probabilities[parity] + square,
                         w.d_scores[parity] + square,
                         w.d_scores_pairs[parity] + (4 * i + 2 * j) * TILE,
                         uint32_t(w.visible[s / 64] >> s % 64),
                         w.factor,
                         w.bias ? w.bias + bias : nullptr,
                         w.d_bias ? w.d_bias + bias : nullptr,
                         w.queries,
                         w.queries - t};
      for (int n = 0; n < count; n++) {
        const int64_t first = 16 * n / count * 2, end = 16 * (n + 1) / count * 2;
        if (w.bias)
          differentiate<true>(unit, first, end);
        else
          differentiate<false>(unit, first, end);
        multiply(beside[n]);
      }
      if (count == 0) w.bias ? differentiate<true>(unit, 0, UNIT) : differentiate<false>(unit, 0, UNIT);
    }
    listed = list_sums(w, key, key_units, query_units, parity, chunk + key == 0, d_q, sums);
  }
  for (int n = 0; n < listed; n++) multiply(sums[n]);
}

// One task: all gradients of one head.
void differentiate_head(const AttentionBackward& a, Backward& w, int64_t b, int64_t h) {
  mark_visible(a.key_mask ? a.key_mask + b * w.keys : nullptr, w.keys, w.visible);
  w.bias = a.bias ? a.bias + h * w.keys * w.queries : nullptr;
  w.d_bias = a.d_bias ? a.d_bias + h * w.keys * w.queries : nullptr;
  for (int64_t chunk = 0; chunk < w.keys; chunk += KEY_CHUNK) {
    const int64_t keys = minimum(KEY_CHUNK, w.keys - chunk);
    begin_chunk(a, w, b, h, chunk);
    for (int64_t query = 0; query < w.queries; query += BLOCK) {
      float* d_q = w.keys > KEY_CHUNK ? w.d_q + query * w.g.width : w.d_q;
      begin_queries(a, w, b, h, query);
      differentiate_block(w, chunk, query, d_q);
      if (chunk + keys == w.keys) finish_queries(a, w, b, h, query, d_q);
    }
    finish_chunk(a, w, b, h, chunk);
  }
}

}  // namespace

int64_t attention_backward_scratch(const AttentionShape& shape) {
  Arena arena = {};
  backward_memory(shape, arena);
  return arena.used * shape.threads;
}

void attention_backward(const AttentionBackward& a) {
  const AttentionShape& shape = a.shape;
  const int64_t memory = attention_backward_scratch(shape) / shape.threads;
  const int64_t together = a.d_bias ? shape.batch : 1;  // a head's batch is one task where its bias is summed over
#pragma omp parallel num_threads(shape.threads)
  {
    Arena arena = {a.scratch + memory * omp_get_thread_num(), 0};
    Backward w = backward_memory(shape, arena);
    begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shape.batch * shape.heads / together; task++) {
      const int64_t h = task % shape.heads;
      for (int64_t b = task / shape.heads; b < task / shape.heads + together; b++) differentiate_head(a, w, b, h);
    }
    end_products();
  }
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
