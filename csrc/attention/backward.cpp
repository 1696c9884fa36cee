// levels: avx512_bf16 amx_bf16
// Attention in bf16, backward: the same products and panels as forward.cpp. A task walks one head:
// queries in chunks of 1024, whose panels and d_q stay in the second cache, 64 keys at a time
// against a chunk, queries 128 at a time against those.
//
// B batch, T queries, S keys, H heads, D head_dim, width: D rounded up to 32, depth = width / 32
#include <math.h>
#include <omp.h>

#include "differentiate.h"
#include "waiting.h"

namespace vatt_fast {
namespace VF_LEVEL {

namespace {

// 32s of dims of d_k and d_v of twice 32 keys, and of d_q of a block of queries
constexpr int MOST_SUMS = (2 * 2 + BLOCK / 32) * 128 / 32;
using WaitingSums = Waiting<MOST_SUMS>;

constexpr int64_t QUERY_CHUNK = 1024;  // queries whose panels and sums stay in the second cache

// Sums, panels and products of one head. Scores are computed transposed, keys by queries. So the
// rows of the probabilities are left factors of d_v and d_k as they are, and two rows interleaved
// are the right factor of d_q, which is transposed too.
struct Backward {
  Geometry geometry;
  bool causal;
  int64_t keys, queries;
  float factor, scale;
  uint64_t* visible;
  // of a step of 64 keys
  uint16_t *key_rows, *value_rows;
  // for each 32 keys, for each 16 dims: 16 dims by 32 keys, the left factor of d_q
  uint16_t* key_dims;
  float *d_k, *d_v;  // (64, width); of all steps, one after another, where there are more chunks
  // of a chunk of queries
  uint16_t *query_columns, *query_pairs, *gradient_columns, *gradient_pairs;
  // (chunk,), in units of log 2; inf in a row without a key, whose powers are then 0
  float *log_sums, *delta;
  float* d_q;      // for each 32 queries: (width, 32), dims by queries
  uint16_t* rows;  // (64, width), before they are packed
  // of two times 32 keys by a block of queries
  uint16_t *probabilities, *d_scores;  // (64, BLOCK)
  // for each 32 keys, for each 16 queries of query_of(): 16 pairs of keys by 16 queries
  uint16_t* d_scores_pairs;
  // of 32 keys by 32 queries, these and the next
  float *scores[2], *d_probabilities[2];
  const float* bias;  // of the head, or null
  float* d_bias;
};

Backward backward_memory(const AttentionShape& shape, Arena& arena) {
  Backward bwd = {};
  bwd.geometry = geometry_of(shape.head_dim);
  bwd.causal = shape.causal, bwd.keys = shape.keys, bwd.queries = shape.queries;
  bwd.scale = shape.scale, bwd.factor = shape.scale * LOG2_E;
  const int64_t width = bwd.geometry.width;
  const int64_t chunk = minimum(QUERY_CHUNK, units_of(shape.queries) * UNIT);
  const int64_t kept = shape.queries > QUERY_CHUNK ? steps_of(shape.keys) : 1;
  bwd.visible = arena.take<uint64_t>(steps_of(shape.keys));
  uint16_t** const step_panels[] = {&bwd.key_rows, &bwd.value_rows, &bwd.key_dims, &bwd.rows};
  for (uint16_t** panel : step_panels) *panel = arena.take<uint16_t>(STEP * width);
  uint16_t** const query_panels[] = {&bwd.query_columns, &bwd.query_pairs, &bwd.gradient_columns,
                                     &bwd.gradient_pairs};
  for (uint16_t** panel : query_panels) *panel = arena.take<uint16_t>(chunk * width);
  bwd.d_k = arena.take<float>(kept * STEP * width);
  bwd.d_v = arena.take<float>(kept * STEP * width);
  bwd.log_sums = arena.take<float>(chunk);
  bwd.delta = arena.take<float>(chunk);
  bwd.d_q = arena.take<float>(chunk * width);
  bwd.probabilities = arena.take<uint16_t>(STEP * BLOCK);
  bwd.d_scores = arena.take<uint16_t>(STEP * BLOCK);
  bwd.d_scores_pairs = arena.take<uint16_t>(STEP * BLOCK);
  for (int i = 0; i < 2; i++) {
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

// -- rows in, rows out ---------------------------------------------------------------------------

// Packs 64 keys and values.
void begin_keys(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h, int64_t first) {
  const int64_t rows = minimum(STEP, bwd.keys - first), padded = units_of(rows) * UNIT;
  const uint64_t* visible = bwd.visible + first / 64;
  pack_rows(bwd.geometry, head_of(args.k, b, h) + first * args.k.row, args.k.row, rows, padded,
            visible, bwd.key_rows);
  pack_rows(bwd.geometry, head_of(args.v, b, h) + first * args.v.row, args.v.row, rows, padded,
            visible, bwd.value_rows);
  pack_dims(bwd.geometry, bwd.key_rows, padded, bwd.key_dims);
}

void finish_keys(const AttentionBackward& args, const Backward& bwd, int64_t b, int64_t h,
                 int64_t first, const float* d_k, const float* d_v) {
  const int64_t D = bwd.geometry.head_dim, stride = args.shape.heads * D;
  const int64_t offset = ((b * bwd.keys + first) * args.shape.heads + h) * D;
  for (int64_t n = 0; n < minimum(STEP, bwd.keys - first); n++)
    for (int64_t d = 0; d < D; d += 16) {
      const int64_t from = n * bwd.geometry.width + d, to = offset + n * stride + d;
      store_row(_mm512_load_ps(d_k + from), bwd.scale, args.d_k + to, D - d);
      store_row(_mm512_load_ps(d_v + from), 1, args.d_v + to, D - d);
    }
}

// Packs the 64 queries from `first` on, and their gradients of out, to `at` of a chunk.
void begin_queries(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h,
                   int64_t first, int64_t at) {
  const int64_t rows = minimum(64, bwd.queries - first), padded = units_of(rows) * UNIT;
  const int64_t panel = at * bwd.geometry.width;
  const float* lse = args.lse + (b * args.shape.heads + h) * bwd.queries + first;
  const float* d_lse =
      args.d_lse ? args.d_lse + (b * args.shape.heads + h) * bwd.queries + first : nullptr;
  uint64_t attending = 0;
  for (int64_t r = 0; r < padded; r++) {
    const bool attends = r < rows && lse[r] != -INFINITY;
    attending |= uint64_t(attends) << r;
    bwd.log_sums[at + r] = attends ? lse[r] * LOG2_E : INFINITY;
  }
  pack_rows(bwd.geometry, head_of(args.q, b, h) + first * args.q.row, args.q.row, rows, padded,
            nullptr, bwd.rows);
  pack_columns(bwd.geometry, bwd.rows, padded, bwd.query_columns + panel);
  pack_pairs(bwd.geometry, bwd.rows, padded, bwd.query_pairs + panel);
  // a row without a key passes no gradient, whatever comes in
  pack_rows(bwd.geometry, head_of(args.d_out, b, h) + first * args.d_out.row, args.d_out.row, rows,
            padded, &attending, bwd.rows);
  pack_columns(bwd.geometry, bwd.rows, padded, bwd.gradient_columns + panel);
  pack_pairs(bwd.geometry, bwd.rows, padded, bwd.gradient_pairs + panel);
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
    _mm512_store_ps(bwd.delta + at + first_row, _mm512_sub_ps(delta, added));
  }
}

// Writes d_q of the 32 queries from `first` on, which lie at `at` of a chunk.
void finish_queries(const AttentionBackward& args, const Backward& bwd, int64_t b, int64_t h,
                    int64_t first, int64_t at) {
  const int64_t D = bwd.geometry.head_dim, stride = args.shape.heads * D;
  const float* d_q = bwd.d_q + at * bwd.geometry.width;
  uint16_t* to = args.d_q + ((b * bwd.queries + first) * args.shape.heads + h) * D;
  const int64_t rows = minimum(UNIT, bwd.queries - first);
  for (int64_t d = 0; d < D; d += 16)
    for (int half = 0; half < 2; half++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(d_q + (d + i) * UNIT + half * 16);
      transpose_16(r);
      for (int n = 0; n < 16; n++)
        if (const int64_t row = query_of(half, n); row < rows)
          store_row(_mm512_castsi512_ps(r[n]), bwd.scale, to + row * stride + d, D - d);
    }
}

// -- products -------------------------------------------------------------------------------------

inline int64_t queries_of(const Backward& bwd, int64_t chunk) {
  return minimum(QUERY_CHUNK, bwd.queries - chunk);
}

// The first query that meets a step of 64 keys.
inline int64_t first_query(const Backward& bwd, int64_t step) { return bwd.causal ? step : 0; }

// Where 32 keys by 32 queries lie, and what holds their probabilities.
struct Place {
  int64_t i;       // of a step's two 32s of keys
  int64_t query;   // of the chunk
  int64_t slot;    // of two 32s of keys in `probabilities`, by turns
  int64_t column;  // query within its block
};

// Rows of a step's keys or values times the columns of queries or gradients of out.
inline Product transposed_product(const Backward& bwd, int64_t step, const uint16_t* rows,
                                  const uint16_t* columns, const Place& at, float* sums) {
  const Geometry& geometry = bwd.geometry;
  return {.factors = {.left = rows + 32 * at.i * geometry.width,
                      .left_stride = geometry.width,
                      .left_next = 32,
                      .right = columns + at.query * geometry.width,
                      .right_column = geometry.depth * TILE,
                      .right_next = TILE,
                      .streamed = true},
          .depth = geometry.depth,
          .sums = sums,
          .stride = UNIT,
          .fresh = true,
          .rows = bwd.keys - step - 32 * at.i,
          .last_pairs = last_pairs_of(geometry.head_dim)};
}

inline Unit unit_of(const Backward& bwd, int64_t chunk, int64_t step, const Place& at, int buffer) {
  const int64_t s = step + 32 * at.i, t = chunk + at.query;
  const int64_t square = 32 * at.slot * BLOCK + at.column, bias = s * bwd.queries + t;
  return {.scores = bwd.scores[buffer],
          .d_probabilities = bwd.d_probabilities[buffer],
          .log_sums = bwd.log_sums + at.query,
          .delta = bwd.delta + at.query,
          .probabilities = bwd.probabilities + square,
          .d_scores = bwd.d_scores + square,
          .pairs = bwd.d_scores_pairs + (at.slot * BLOCK + at.column) / 16 * TILE,
          .visible = bwd.causal && s > t ? 0 : uint32_t(bwd.visible[s / 64] >> s % 64),
          .diagonal = bwd.causal && s == t,
          .factor = bwd.factor,
          .bias = bwd.bias ? bwd.bias + bias : nullptr,
          .d_bias = bwd.d_bias ? bwd.d_bias + bias : nullptr,
          .bias_stride = bwd.queries,
          .keys = bwd.keys - s,
          .queries = bwd.queries - t};
}

// -- 64 keys by a chunk of queries ---------------------------------------------------------------

// d_v and d_k += probabilities and d_scores of 32 keys and a block of queries times gradients of
// out and queries.
inline void add_key_sums(const Backward& bwd, int64_t chunk, int64_t step, const Place& at,
                         float* d_k, float* d_v, int64_t overwritten, WaitingSums& waiting) {
  const Geometry& geometry = bwd.geometry;
  const int64_t left = 32 * at.slot * BLOCK, block = at.query - at.column;
  const int64_t queries = minimum(BLOCK, queries_of(bwd, chunk) - block);
  for (int64_t group = 0; group < geometry.depth; group++) {  // of 32 dims
    const int64_t right = block * geometry.width + 2 * group * TILE;
    const int64_t sums = 32 * at.i * geometry.width + 32 * group;
    Product product = {.factors = {.left = bwd.probabilities + left,
                                   .left_stride = BLOCK,
                                   .left_next = 32,
                                   .right = bwd.gradient_pairs + right,
                                   .right_column = TILE,
                                   .right_next = geometry.value_tiles * TILE,
                                   .streamed = true},
                       .depth = units_of(queries),
                       .sums = d_v + sums,
                       .stride = geometry.width,
                       .fresh = chunk + block == first_query(bwd, step),
                       .rows = bwd.keys - step - 32 * at.i,
                       .last_pairs = last_pairs_of(queries)};
    waiting.add(product, overwritten);
    product.factors.left = bwd.d_scores + left;
    product.factors.right = bwd.query_pairs + right;
    product.sums = d_k + sums;
    waiting.add(product, overwritten);
  }
}

// d_q of 32 queries += a step's keys, transposed, times d_scores.
inline void add_query_sums(const Backward& bwd, int64_t step, const Place& at, int64_t overwritten,
                           WaitingSums& waiting) {
  const Geometry& geometry = bwd.geometry;
  const int64_t keys = minimum(STEP, bwd.keys - step);
  const int64_t slot = keys > UNIT ? 0 : at.slot;  // the first of the step
  for (int64_t group = 0; group < geometry.depth; group++)
    waiting.add({.factors = {.left = bwd.key_dims + 2 * group * TILE,
                             .left_stride = 32,
                             .left_next = geometry.value_tiles * TILE,
                             .right = bwd.d_scores_pairs + (slot * BLOCK + at.column) / 16 * TILE,
                             .right_column = TILE,
                             .right_next = BLOCK / 16 * TILE},
                 .depth = units_of(keys),
                 .sums = bwd.d_q + at.query * geometry.width + 32 * group * UNIT,
                 .stride = UNIT,
                 .fresh = step == 0,
                 .last_pairs = last_pairs_of(keys)},
                overwritten);
}

// 64 keys against a chunk of queries, in units of 32 by 32: of a block of 128 queries all with the
// first 32 keys (a), then all with the second (b). While the vector units work on a unit, the
// matrix unit multiplies the next unit's scores and d_probabilities, and sums of earlier units:
//
//   vectors   a0    a1    a2    a3     |  b0    b1    b2    b3    |  a4    a5    a6    a7     |
//   tiles     scores and d_probabilities of the next unit
//             sums of the block before |  d_k and d_v of a        |  d_q of queries 2 and 3   |
//                                      |  d_q of queries 0 and 1  |  d_k and d_v of b         |
//
// So one buffer of probabilities is enough: each half is read while the other is written. What a
// unit writes over is multiplied before (waiting.h), which at ragged ends is sooner than this.
void differentiate_keys(const Backward& bwd, int64_t chunk, int64_t step, float* d_k, float* d_v) {
  const int64_t queries = queries_of(bwd, chunk);
  const int64_t key_units = units_of(minimum(STEP, bwd.keys - step));
  const int64_t share = 3 * bwd.geometry.depth;  // slices of d_k, d_v and d_q for each unit
  WaitingSums waiting;
  Product beside[2 + MOST_SUMS];
  Pending pending;
  const auto list_scores = [&](const Place& at, int buffer) {
    beside[0] =
        transposed_product(bwd, step, bwd.key_rows, bwd.query_columns, at, bwd.scores[buffer]);
    beside[1] = transposed_product(bwd, step, bwd.value_rows, bwd.gradient_columns, at,
                                   bwd.d_probabilities[buffer]);
    return 2;
  };
  const int64_t first = clamp(first_query(bwd, step) - chunk, 0, queries);
  multiply(beside, list_scores({.query = first}, 0), pending);
  store(pending);

  int64_t unit = 0;
  Place at = {};
  for (int64_t block = first; block < queries; block += BLOCK) {
    const int64_t query_units = units_of(minimum(BLOCK, queries - block));
    for (at.i = 0; at.i < key_units; at.i++, at.slot ^= 1) {
      for (int64_t j = 0; j < query_units; j++, unit++) {
        at.query = block + 32 * j, at.column = 32 * j;
        Place next = at;
        if (j + 1 < query_units) {
          next.query += 32;
        } else {
          next.i = (at.i + 1) % key_units;
          next.query = next.i == 0 ? block + BLOCK : block;
        }
        int count = next.query < queries ? list_scores(next, (unit + 1) % 2) : 0;
        const int sums = waiting.take(unit, share, beside + count);
        const Unit those = unit_of(bwd, chunk, step, at, unit % 2);
        differentiate(those, beside, count + sums, pending);
        if (sums == 0) store(pending);  // the next unit reads the scores
        // the next block's unit at this place, whose queries may be fewer
        const int64_t next_units = units_of(clamp(queries - block - BLOCK, 0, BLOCK));
        const int64_t next_block = unit - j + query_units * (key_units - at.i);
        if (at.i + 1 == key_units)
          add_query_sums(bwd, step, at, next_block + minimum(j, next_units), waiting);
        if (j + 1 == query_units)
          add_key_sums(bwd, chunk, step, at, d_k, d_v,
                       next_block + (at.i + 1 == key_units ? next_units : 0), waiting);
      }
    }
  }
  multiply(beside, waiting.take_all(beside), pending);
  store(pending);
}

// One task: all gradients of one head.
void differentiate_head(const AttentionBackward& args, Backward& bwd, int64_t b, int64_t h) {
  mark_visible(args.key_mask ? args.key_mask + b * bwd.keys : nullptr, bwd.keys, bwd.visible);
  bwd.bias = args.bias ? args.bias + h * bwd.keys * bwd.queries : nullptr;
  bwd.d_bias = args.d_bias ? args.d_bias + h * bwd.keys * bwd.queries : nullptr;
  for (int64_t chunk = 0; chunk < bwd.queries; chunk += QUERY_CHUNK) {
    const int64_t end = minimum(bwd.queries, chunk + QUERY_CHUNK);
    const bool last = end == bwd.queries;
    for (int64_t query = chunk; query < end; query += 64)
      begin_queries(args, bwd, b, h, query, query - chunk);
    for (int64_t step = 0; step < bwd.keys && first_query(bwd, step) < end; step += STEP) {
      const int64_t kept = bwd.queries > QUERY_CHUNK ? step * bwd.geometry.width : 0;
      begin_keys(args, bwd, b, h, step);
      differentiate_keys(bwd, chunk, step, bwd.d_k + kept, bwd.d_v + kept);
      if (last) finish_keys(args, bwd, b, h, step, bwd.d_k + kept, bwd.d_v + kept);
    }
    for (int64_t query = chunk; query < end; query += UNIT)
      finish_queries(args, bwd, b, h, query, query - chunk);
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
