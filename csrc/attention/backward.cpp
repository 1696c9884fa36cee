// levels: avx512_bf16 amx_bf16
// Attention in bf16, backward: the same products and panels as forward.cpp. A task walks one head:
// keys in chunks of 1024, queries in blocks of 64 against each chunk, keys in steps of 64.
//
// B batch, T queries, S keys, H heads, D head_dim, width: D rounded up to 32, depth = width / 32
#include <math.h>
#include <omp.h>
#include <string.h>

#include "heads.h"

namespace vatt_fast {
namespace VF_LEVEL {

namespace {

constexpr int BLOCK = 64;            // queries
constexpr int64_t KEY_CHUNK = 1024;  // keys whose panels and sums stay in the second cache

// Sums, panels and products of one head. Scores are computed transposed, keys by queries. So the
// rows of the probabilities are left factors of d_v and d_k as they are, and two rows interleaved
// are the right factor of d_q, which is transposed too.
struct Backward {
  Geometry geometry;
  int64_t keys, queries;
  float factor, scale;
  uint64_t* visible;
  // of a chunk of keys
  uint16_t *key_rows, *value_rows;
  // for each 32 keys, for each 16 dims: 16 dims by 32 keys, the left factor of d_q
  uint16_t* key_dims;
  float *d_k, *d_v;  // (chunk, width)
  // of a block of queries
  uint16_t *rows, *query_columns, *query_pairs, *gradient_columns, *gradient_pairs;
  // (64,), in units of log 2; inf in a row without a key, whose powers are then 0
  float *log_sums, *delta;
  float* d_q;  // for each block, or one: (width, 64), dims by queries
  // of 64 keys by 64 queries, this step's and the last's
  uint16_t *probabilities[2], *d_scores[2];  // (64, 64)
  // for each 32 keys, for each 16 queries of query_of(): 16 pairs of keys by 16 queries
  uint16_t* d_scores_pairs[2];
  // of 32 keys by 32 queries, these and the next
  float *scores[2], *d_probabilities[2];
  const float* bias;  // of the head, or null
  float* d_bias;
};

Backward backward_memory(const AttentionShape& shape, Arena& arena) {
  Backward bwd = {};
  bwd.geometry = geometry_of(shape.head_dim);
  bwd.keys = shape.keys, bwd.queries = shape.queries;
  bwd.scale = shape.scale, bwd.factor = shape.scale * LOG2_E;
  const int64_t chunk = minimum(KEY_CHUNK, units_of(shape.keys) * UNIT), width = bwd.geometry.width;
  const int64_t blocks = shape.keys > KEY_CHUNK ? ceil_div(shape.queries, BLOCK) : 1;
  bwd.visible = arena.take<uint64_t>(steps_of(shape.keys));
  uint16_t** const key_panels[] = {&bwd.key_rows, &bwd.value_rows, &bwd.key_dims};
  for (uint16_t** panel : key_panels) *panel = arena.take<uint16_t>(chunk * width);
  uint16_t** const query_panels[] = {&bwd.rows, &bwd.query_columns, &bwd.query_pairs,
                                     &bwd.gradient_columns, &bwd.gradient_pairs};
  for (uint16_t** panel : query_panels) *panel = arena.take<uint16_t>(BLOCK * width);
  bwd.d_k = arena.take<float>(chunk * width);
  bwd.d_v = arena.take<float>(chunk * width);
  bwd.log_sums = arena.take<float>(BLOCK);
  bwd.delta = arena.take<float>(BLOCK);
  bwd.d_q = arena.take<float>(blocks * BLOCK * width);
  for (int i = 0; i < 2; i++) {
    bwd.probabilities[i] = arena.take<uint16_t>(STEP * BLOCK);
    bwd.d_scores[i] = arena.take<uint16_t>(STEP * BLOCK);
    bwd.d_scores_pairs[i] = arena.take<uint16_t>(STEP * BLOCK);
    bwd.scores[i] = arena.take<float>(UNIT * UNIT);
    bwd.d_probabilities[i] = arena.take<float>(UNIT * UNIT);
  }
  return bwd;
}

// Where two interleaved rows of 32 queries put the n-th of the first (half 0) or second (half 1) 16
// columns.
inline int query_of(int half, int n) { return n / 4 * 8 + n % 4 + 4 * half; }

// Packed rows to dims: pairs, whose tiles of 16 pairs of keys by 16 dims become 16 dims by 32 keys.
void pack_dims(const Geometry& geometry, const uint16_t* rows, int64_t padded, uint16_t* dims) {
  pack_pairs(geometry, rows, padded, dims);
  for (uint16_t* tile = dims; tile < dims + padded * geometry.width; tile += TILE) {
    __m512i r[16];
    load_transposed(tile, 32, r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, r[i]);
  }
}

void begin_chunk(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h,
                 int64_t first) {
  const int64_t rows = minimum(KEY_CHUNK, bwd.keys - first), padded = units_of(rows) * UNIT;
  pack_rows(bwd.geometry, head_of(args.k, b, h) + first * args.k.row, args.k.row, rows, padded,
            bwd.visible + first / 64, bwd.key_rows);
  pack_rows(bwd.geometry, head_of(args.v, b, h) + first * args.v.row, args.v.row, rows, padded,
            bwd.visible + first / 64, bwd.value_rows);
  pack_dims(bwd.geometry, bwd.key_rows, padded, bwd.key_dims);
  memset(bwd.d_k, 0, padded * bwd.geometry.width * sizeof(float));
  memset(bwd.d_v, 0, padded * bwd.geometry.width * sizeof(float));
}

void finish_chunk(const AttentionBackward& args, const Backward& bwd, int64_t b, int64_t h,
                  int64_t first) {
  const int64_t stride = args.shape.heads * bwd.geometry.head_dim,
                offset = (b * bwd.keys * args.shape.heads + h) * bwd.geometry.head_dim;
  for (int64_t n = 0; n < minimum(KEY_CHUNK, bwd.keys - first); n++)
    for (int64_t d = 0; d < bwd.geometry.head_dim; d += 16) {
      const int64_t at = offset + (first + n) * stride + d;
      store_row(_mm512_load_ps(bwd.d_k + n * bwd.geometry.width + d), bwd.scale, args.d_k + at,
                bwd.geometry.head_dim - d);
      store_row(_mm512_load_ps(bwd.d_v + n * bwd.geometry.width + d), 1, args.d_v + at,
                bwd.geometry.head_dim - d);
    }
}

void begin_queries(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h,
                   int64_t first) {
  const int64_t rows = minimum(BLOCK, bwd.queries - first), padded = units_of(rows) * UNIT;
  const float* lse = args.lse + (b * args.shape.heads + h) * bwd.queries + first;
  const float* d_lse =
      args.d_lse ? args.d_lse + (b * args.shape.heads + h) * bwd.queries + first : nullptr;
  uint64_t attending = 0;
  for (int64_t r = 0; r < BLOCK; r++) {
    const bool attends = r < rows && lse[r] != -INFINITY;
    attending |= uint64_t(attends) << r;
    bwd.log_sums[r] = attends ? lse[r] * LOG2_E : INFINITY;
  }
  pack_rows(bwd.geometry, head_of(args.q, b, h) + first * args.q.row, args.q.row, rows, padded,
            nullptr, bwd.rows);
  pack_columns(bwd.geometry, bwd.rows, padded, bwd.query_columns);
  pack_pairs(bwd.geometry, bwd.rows, padded, bwd.query_pairs);
  // a row without a key passes no gradient, whatever comes in
  pack_rows(bwd.geometry, head_of(args.d_out, b, h) + first * args.d_out.row, args.d_out.row, rows,
            padded, &attending, bwd.rows);
  pack_columns(bwd.geometry, bwd.rows, padded, bwd.gradient_columns);
  pack_pairs(bwd.geometry, bwd.rows, padded, bwd.gradient_pairs);
  const uint16_t* out = head_of(args.out, b, h) + first * args.out.row;
  for (int64_t first_row = 0; first_row < padded; first_row += 16) {
    __m512i products[16];
    for (int64_t r = first_row; r < first_row + 16; r++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < bwd.geometry.width && attending >> r & 1; d += 32) {
        const __m512i values = _mm512_maskz_loadu_epi16(first_of_32(bwd.geometry.head_dim - d),
                                                        out + r * args.out.row + d);
        sum = dot(sum, values, _mm512_load_si512(bwd.rows + r * bwd.geometry.width + d));
      }
      products[r - first_row] = _mm512_castps_si512(sum);
    }
    const __m512 delta = sum_of_each(products);
    const __mmask16 with_gradient = d_lse ? __mmask16(attending >> first_row) : 0;
    const __m512 added = _mm512_maskz_loadu_ps(with_gradient, d_lse ? d_lse + first_row : lse);
    _mm512_store_ps(bwd.delta + first_row, _mm512_sub_ps(delta, added));
  }
}

void finish_queries(const AttentionBackward& args, const Backward& bwd, int64_t b, int64_t h,
                    int64_t first, const float* d_q) {
  uint16_t* to =
      args.d_q + ((b * bwd.queries + first) * args.shape.heads + h) * bwd.geometry.head_dim;
  const int64_t rows = minimum(BLOCK, bwd.queries - first);
  for (int64_t d = 0; d < bwd.geometry.head_dim; d += 16)
    for (int quarter = 0; quarter < 2 * units_of(rows); quarter++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(d_q + (d + i) * BLOCK + quarter * 16);
      transpose_16(r);
      for (int n = 0; n < 16; n++) {
        const int64_t row = quarter / 2 * 32 + query_of(quarter % 2, n);
        if (row < rows)
          store_row(_mm512_castsi512_ps(r[n]), bwd.scale,
                    to + row * args.shape.heads * bwd.geometry.head_dim + d,
                    bwd.geometry.head_dim - d);
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
__attribute__((noinline)) void differentiate(const Unit& given, int64_t first_row,
                                             int64_t end_row) {
  const Unit unit = given;
  const __m512 factor = _mm512_set1_ps(unit.factor);
  const __m512 log_sums[2] = {_mm512_load_ps(unit.log_sums), _mm512_load_ps(unit.log_sums + 16)};
  const __m512 delta[2] = {_mm512_load_ps(unit.delta), _mm512_load_ps(unit.delta + 16)};
  const __mmask16 there[2] = {first_of_16(unit.queries), first_of_16(unit.queries - 16)};
  for (int64_t row = first_row; row < end_row; row += 2) {
    __m512i d_scores[2];
#pragma GCC unroll 2
    for (int of_pair = 0; of_pair < 2; of_pair++) {
      const int64_t j = row + of_pair;
      const __mmask16 visible = unit.visible >> j & 1 ? 0xffff : 0;
      __m512 probability[2], d_score[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
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
  }
}

// Where 32 keys by 32 queries lie: the i-th and j-th of a step, which lies at `key` of its chunk.
struct Place {
  int64_t key, i, j;
};

// Rows of a step's keys or values times the columns of a block's queries or gradients of out.
inline Product transposed_product(const Geometry& geometry, const uint16_t* rows,
                                  const uint16_t* columns, const Place& at, float* sums) {
  const int64_t column = geometry.depth * TILE;
  return {.factors = {.left = rows + (at.key + 32 * at.i) * geometry.width,
                      .left_stride = geometry.width,
                      .left_next = 32,
                      .right = columns + 2 * at.j * column,
                      .right_column = column,
                      .right_next = TILE},
          .depth = geometry.depth,
          .sums = sums,
          .stride = UNIT,
          .fresh = true};
}

inline Product score_product(const Backward& bwd, const Place& at, float* sums) {
  return transposed_product(bwd.geometry, bwd.key_rows, bwd.query_columns, at, sums);
}

inline Product d_probability_product(const Backward& bwd, const Place& at, float* sums) {
  return transposed_product(bwd.geometry, bwd.value_rows, bwd.gradient_columns, at, sums);
}

// Of 64 keys against a block of queries: how many 32s there are, and which buffers hold them.
struct Step {
  int64_t key, key_units, query_units;
  int parity;
  bool fresh;  // d_q is not yet begun
};

// The products that add a step to d_v, d_k and d_q, 32 by 32 sums each. Returns how many.
inline int list_sums(const Backward& bwd, const Step& step, float* d_q, Product* list) {
  const Geometry& geometry = bwd.geometry;
  const int parity = step.parity;
  int count = 0;
  for (int64_t group = 0; group < geometry.depth; group++) {  // of 32 dims
    for (int64_t i = 0; i < step.key_units; i++) {
      const int64_t right = 2 * group * TILE;
      const int64_t sums = (step.key + 32 * i) * geometry.width + 32 * group;
      Product product = {.factors = {.left = bwd.probabilities[parity] + 32 * i * BLOCK,
                                     .left_stride = BLOCK,
                                     .left_next = 32,
                                     .right = bwd.gradient_pairs + right,
                                     .right_column = TILE,
                                     .right_next = geometry.value_tiles * TILE},
                         .depth = step.query_units,
                         .sums = bwd.d_v + sums,
                         .stride = geometry.width,
                         .fresh = false};
      list[count++] = product;
      product.factors.left = bwd.d_scores[parity] + 32 * i * BLOCK;
      product.factors.right = bwd.query_pairs + right;
      product.sums = bwd.d_k + sums;
      list[count++] = product;
    }
    const int64_t dims = (step.key / 32 * geometry.value_tiles + 2 * group) * TILE;
    for (int64_t j = 0; j < step.query_units; j++)
      list[count++] = {.factors = {.left = bwd.key_dims + dims,
                                   .left_stride = 32,
                                   .left_next = geometry.value_tiles * TILE,
                                   .right = bwd.d_scores_pairs[parity] + 2 * j * TILE,
                                   .right_column = TILE,
                                   .right_next = 4 * TILE},
                       .depth = step.key_units,
                       .sums = d_q + 32 * group * BLOCK + 32 * j,
                       .stride = BLOCK,
                       .fresh = step.fresh};
  }
  return count;
}

// The i-th 32 keys by the j-th 32 queries of a step, whose products lie in `buffer`.
inline Unit unit_of(const Backward& bwd, int64_t chunk, int64_t query, const Step& step, int64_t i,
                    int64_t j, int buffer) {
  const int64_t s = chunk + step.key + 32 * i, t = query + 32 * j;
  const int64_t square = 32 * i * BLOCK + 32 * j, bias = s * bwd.queries + t;
  return {.scores = bwd.scores[buffer],
          .d_probabilities = bwd.d_probabilities[buffer],
          .log_sums = bwd.log_sums + 32 * j,
          .delta = bwd.delta + 32 * j,
          .probabilities = bwd.probabilities[step.parity] + square,
          .d_scores = bwd.d_scores[step.parity] + square,
          .pairs = bwd.d_scores_pairs[step.parity] + (4 * i + 2 * j) * TILE,
          .visible = uint32_t(bwd.visible[s / 64] >> s % 64),
          .factor = bwd.factor,
          .bias = bwd.bias ? bwd.bias + bias : nullptr,
          .d_bias = bwd.d_bias ? bwd.d_bias + bias : nullptr,
          .bias_stride = bwd.queries,
          .queries = bwd.queries - t};
}

// A unit's rows in as many parts as there are products, a product after each.
inline void differentiate_beside(const Unit& unit, const Product* products, int count) {
  const auto rows = unit.bias ? &differentiate<true> : &differentiate<false>;
  if (count == 0) rows(unit, 0, UNIT);
  for (int n = 0; n < count; n++) {
    rows(unit, 16 * n / count * 2, 16 * (n + 1) / count * 2);
    multiply(products[n]);
  }
}

// A block of queries against a chunk of keys, 64 by 64 a step, 32 by 32 a unit. While the vector
// units work on a unit, the matrix unit multiplies the next unit's scores and d_probabilities, and
// a share of the last step's sums:
//
//   tiles     scores 0   |  scores 1   scores 2   ...              |
//                        |  sums of the last step, a part a unit   |  sums of the last step
//   vectors              |  unit 0     unit 1     ...              |
void differentiate_block(const Backward& bwd, int64_t chunk, int64_t query, float* d_q) {
  constexpr int most = 6 * 128 / 32;  // of list_sums
  const int64_t keys = minimum(KEY_CHUNK, bwd.keys - chunk);
  Product sums[most];
  int listed = 0, buffer = 0;
  Step step = {.key = 0,
               .key_units = 0,
               .query_units = minimum(2, units_of(bwd.queries - query)),
               .parity = 0,
               .fresh = chunk == 0};
  multiply(score_product(bwd, {0, 0, 0}, bwd.scores[0]));
  multiply(d_probability_product(bwd, {0, 0, 0}, bwd.d_probabilities[0]));
  for (; step.key < keys; step.key += STEP, step.parity ^= 1) {
    step.key_units = minimum(2, units_of(keys - step.key));
    const int64_t columns = step.query_units, units = step.key_units * columns;
    for (int64_t u = 0; u < units; u++, buffer ^= 1) {
      Product beside[2 + most];
      int count = 0;
      const Place next = u + 1 < units ? Place{step.key, (u + 1) / columns, (u + 1) % columns}
                                       : Place{step.key + STEP, 0, 0};
      if (next.key < keys) {
        beside[count++] = score_product(bwd, next, bwd.scores[buffer ^ 1]);
        beside[count++] = d_probability_product(bwd, next, bwd.d_probabilities[buffer ^ 1]);
      }
      for (int64_t n = listed * u / units; n < listed * (u + 1) / units; n++)
        beside[count++] = sums[n];
      const Unit unit = unit_of(bwd, chunk, query, step, u / columns, u % columns, buffer);
      differentiate_beside(unit, beside, count);
    }
    listed = list_sums(bwd, step, d_q, sums);
    step.fresh = false;
  }
  for (int n = 0; n < listed; n++) multiply(sums[n]);
}

// One task: all gradients of one head.
void differentiate_head(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h) {
  mark_visible(args.key_mask ? args.key_mask + b * bwd.keys : nullptr, bwd.keys, bwd.visible);
  bwd.bias = args.bias ? args.bias + h * bwd.keys * bwd.queries : nullptr;
  bwd.d_bias = args.d_bias ? args.d_bias + h * bwd.keys * bwd.queries : nullptr;
  for (int64_t chunk = 0; chunk < bwd.keys; chunk += KEY_CHUNK) {
    const int64_t keys = minimum(KEY_CHUNK, bwd.keys - chunk);
    begin_chunk(args, bwd, b, h, chunk);
    for (int64_t query = 0; query < bwd.queries; query += BLOCK) {
      float* d_q = bwd.keys > KEY_CHUNK ? bwd.d_q + query * bwd.geometry.width : bwd.d_q;
      begin_queries(args, bwd, b, h, query);
      differentiate_block(bwd, chunk, query, d_q);
      if (chunk + keys == bwd.keys) finish_queries(args, bwd, b, h, query, d_q);
    }
    finish_chunk(args, bwd, b, h, chunk);
  }
}

}  // namespace

int64_t attention_backward_scratch(const AttentionShape& shape) {
  Arena arena = {};
  backward_memory(shape, arena);
  return arena.used * shape.threads;
}

void attention_backward(const AttentionBackward& args) {
  const AttentionShape& shape = args.shape;
  const int64_t memory = attention_backward_scratch(shape) / shape.threads;
  const int64_t together =
      args.d_bias ? shape.batch : 1;  // a head's batch is one task where its bias is summed over
#pragma omp parallel num_threads(shape.threads)
  {
    Arena arena = {args.scratch + memory * omp_get_thread_num(), 0};
    Backward bwd = backward_memory(shape, arena);
    begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shape.batch * shape.heads / together; task++) {
      const int64_t h = task % shape.heads;
      for (int64_t b = task / shape.heads; b < task / shape.heads + together; b++)
        differentiate_head(args, bwd, b, h);
    }
    end_products();
  }
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
