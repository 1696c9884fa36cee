// levels: avx512_bf16 amx_bf16
// Attention in bf16, forward: products of whole tiles (common/products.h), fp32 sums, and softmax
// in AVX-512 between them. One task: a run of query blocks of one head. Keys and values are packed
// once a task (common/bf16_panels.h); queries are taken 32 at a time, keys 64 at a time.
//
// B batch, T queries, S keys, H heads, D head_dim, width: D rounded up to 32, depth = width / 32
#include <math.h>
#include <omp.h>
#include <string.h>

#include "softmax.h"

namespace vatt_fast {
namespace VF_LEVEL {

namespace {

// What a block of 32 queries carries from step to step.
struct Block {
  uint16_t* rows;  // (32, width)
  float* sums;     // (32, width), of the values
  float* totals;   // (32, 16): each row's sum of probabilities in 16 parts
  // what is added to a row's scores, in units of log 2, before their powers are taken
  float negative_peak[UNIT];
  bool bounded;   // then these are whole numbers and no power leaves the range of fp32
  int64_t first;  // query
};

struct Forward {
  Geometry geometry;
  float factor;  // of the products, for powers of two
  int64_t keys, queries;
  float key_length;  // of the longest key
  uint16_t *key_columns, *value_pairs, *key_rows;
  uint64_t* visible;
  float* scores[2];            // (32, 64) each, of this step and the next
  uint16_t* probabilities[2];  // (32, 64) each, of this step and the last
  Block blocks[3];             // of the last step, this one and the next
  const float* bias;           // of the head, or null
};

inline int64_t units_in_step(int64_t keys, int64_t step) {
  return minimum(2, units_of(keys) - 2 * step);
}

// q @ k^T of a block and 32 keys of a step: their scores, but for the scale.
inline Product score_product(const Forward& fwd, const Block& block, int64_t step, int64_t unit,
                             float* scores) {
  const Geometry& geometry = fwd.geometry;
  const int64_t column = geometry.depth * TILE;
  return {.factors = {.left = block.rows,
                      .left_stride = geometry.width,
                      .left_next = 32,
                      .right = fwd.key_columns + (4 * step + 2 * unit) * column,
                      .right_column = column,
                      .right_next = TILE,
                      .streamed = true},
          .depth = geometry.depth,
          .sums = scores + 32 * unit,
          .stride = STEP,
          .fresh = true};
}

// probabilities @ v of a step: 32 dims of it are added to a block's sums.
inline Product value_product(const Forward& fwd, const uint16_t* probabilities, const Block& block,
                             int64_t step, int64_t group) {
  const int64_t tiles = fwd.geometry.value_tiles;
  return {.factors = {.left = probabilities,
                      .left_stride = STEP,
                      .left_next = 32,
                      .right = fwd.value_pairs + (2 * step * tiles + 2 * group) * TILE,
                      .right_column = TILE,
                      .right_next = tiles * TILE,
                      .streamed = true},
          .depth = units_in_step(fwd.keys, step),
          .sums = block.sums + 32 * group,
          .stride = fwd.geometry.width,
          .fresh = step == 0};
}

// -- a block's beginning and end -----------------------------------------------------------------

// The largest visible bias of a query in units of log 2; -inf where there is none.
float bias_peak(const Forward& fwd, int64_t t) {
  __m512 peak = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < fwd.keys; n += 16) {
    const __mmask16 visible = __mmask16(fwd.visible[n / 64] >> n % 64);
    const __m512 bias = _mm512_maskz_loadu_ps(visible, fwd.bias + t * fwd.keys + n);
    peak = _mm512_mask_max_ps(peak, visible, peak, bias);
  }
  return _mm512_reduce_max_ps(peak) * LOG2_E;
}

// The rows' true largest scores, by a pass over all keys: where lengths bound nothing.
void find_peaks(const Forward& fwd, const Block& block, int64_t rows, float* scores, float* peaks) {
  __m512 peak[UNIT];
  for (int r = 0; r < UNIT; r++) peak[r] = _mm512_set1_ps(-INFINITY);
  for (int64_t step = 0; step < steps_of(fwd.keys); step++) {
    for (int64_t unit = 0; unit < units_in_step(fwd.keys, step); unit++)
      multiply(score_product(fwd, block, step, unit, scores));
    for (int64_t r = 0; r < rows; r++)
      for (int i = 0; i < 2 * units_in_step(fwd.keys, step); i++) {
        const __mmask16 visible = __mmask16(fwd.visible[step] >> 16 * i);
        const __m512 score = _mm512_load_ps(scores + r * STEP + 16 * i);
        __m512 x = _mm512_mul_ps(score, _mm512_set1_ps(fwd.factor));
        if (fwd.bias) {
          const float* bias = fwd.bias + (block.first + r) * fwd.keys + step * STEP + 16 * i;
          x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(visible, bias), _mm512_set1_ps(LOG2_E), x);
        }
        peak[r] = _mm512_mask_max_ps(peak[r], visible, peak[r], x);
      }
  }
  for (int64_t r = 0; r < rows; r++) peaks[r] = _mm512_reduce_max_ps(peak[r]);
}

// Reads 32 queries and finds what to subtract from their scores: |q| times the longest key, which
// no score exceeds and which needs no pass over the keys. No score is then below minus twice that,
// so up to 2^-100 nothing is lost to underflow.
void begin_block(const Forward& fwd, const Heads& q, const uint16_t* from, int64_t first,
                 float* scores, Block& block) {
  const Geometry& geometry = fwd.geometry;
  const int64_t rows = minimum(UNIT, fwd.queries - first);
  block.first = first;
  pack_rows(geometry, from + first * q.row, q.row, rows, UNIT, nullptr, block.rows);
  memset(block.totals, 0, UNIT * 64);
  // of one step the pass is short, and a probability of one is exact
  block.bounded = steps_of(fwd.keys) > 1;
  alignas(64) float peaks[UNIT];
  for (int half = 0; half < UNIT; half += 16) {
    __m512i squares[16];
    for (int r = 0; r < 16; r++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < geometry.width; d += 32) {
        const __m512i values = _mm512_load_si512(block.rows + (half + r) * geometry.width + d);
        sum = dot(sum, values, values);
      }
      squares[r] = _mm512_castps_si512(sum);
    }
    const __m512 longest = _mm512_set1_ps(fwd.key_length * fabsf(fwd.factor));
    const __m512 bound = _mm512_mul_ps(_mm512_sqrt_ps(sum_of_each(squares)), longest);
    const __mmask16 small =
        _mm512_cmp_ps_mask(bound, _mm512_set1_ps(50), _CMP_LE_OQ);  // nan is not
    block.bounded = block.bounded && small == 0xffff;
    constexpr int up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    _mm512_store_ps(peaks + half, _mm512_roundscale_ps(bound, up));
  }
  for (int64_t r = 0; fwd.bias && r < rows; r++) peaks[r] += bias_peak(fwd, first + r);
  if (!block.bounded) find_peaks(fwd, block, rows, scores, peaks);
  // zero: -inf + inf would give nan
  for (int r = 0; r < UNIT; r++) block.negative_peak[r] = peaks[r] == -INFINITY ? 0 : -peaks[r];
}

// Divides the sums by the totals and writes out and lse.
void finish_block(const Forward& fwd, const Block& block, uint16_t* out, int64_t out_stride,
                  float* lse) {
  const Geometry& geometry = fwd.geometry;
  const int64_t rows = minimum(UNIT, fwd.queries - block.first);
  alignas(64) float inverses[UNIT];
  for (int half = 0; half < UNIT; half += 16) {
    __m512i parts[16];
    for (int r = 0; r < 16; r++) parts[r] = _mm512_load_si512(block.totals + (half + r) * 16);
    const __m512 total = sum_of_each(parts);
    const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_store_ps(inverses + half, _mm512_maskz_div_ps(some, _mm512_set1_ps(1), total));
    const __m512 peak =
        _mm512_mul_ps(_mm512_loadu_ps(block.negative_peak + half), _mm512_set1_ps(LN_2));
    const __m512 log_sum =
        _mm512_mask_sub_ps(_mm512_set1_ps(-INFINITY), some, logarithm(total), peak);
    _mm512_mask_storeu_ps(lse + block.first + half, first_of_16(rows - half), log_sum);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < geometry.head_dim; d += 16) {
      const __m512 sums = _mm512_load_ps(block.sums + r * geometry.width + d);
      uint16_t* to = out + (block.first + r) * out_stride + d;
      store_row(sums, inverses[r], to, geometry.head_dim - d);
    }
}

// -- one task ------------------------------------------------------------------------------------

Forward forward_memory(const AttentionShape& shape, Arena& arena) {
  Forward fwd = {};
  fwd.geometry = geometry_of(shape.head_dim);
  fwd.keys = shape.keys, fwd.queries = shape.queries;
  const int64_t width = fwd.geometry.width, padded = units_of(shape.keys) * UNIT;
  fwd.key_columns = arena.take<uint16_t>(padded * width);
  fwd.value_pairs = arena.take<uint16_t>(padded * width);
  fwd.key_rows = arena.take<uint16_t>(UNIT * width);
  fwd.visible = arena.take<uint64_t>(steps_of(shape.keys));
  for (int i = 0; i < 2; i++) {
    fwd.scores[i] = arena.take<float>(UNIT * STEP);
    fwd.probabilities[i] = arena.take<uint16_t>(UNIT * STEP);
  }
  for (int i = 0; i < 3; i++) {
    fwd.blocks[i].rows = arena.take<uint16_t>(UNIT * width);
    fwd.blocks[i].sums = arena.take<float>(UNIT * width);
    fwd.blocks[i].totals = arena.take<float>(UNIT * 16);
  }
  return fwd;
}

// Keys and values of one head to their panels, through 32 rows at a time.
void pack_keys_and_values(const AttentionForward& args, int64_t b, int64_t h, Forward& fwd) {
  const Geometry& geometry = fwd.geometry;
  const uint16_t *keys = head_of(args.k, b, h), *values = head_of(args.v, b, h);
  mark_visible(args.key_mask ? args.key_mask + b * fwd.keys : nullptr, fwd.keys, fwd.visible);
  float largest = 0;
  for (int64_t n = 0; n < fwd.keys; n += UNIT) {
    const int64_t rows = minimum(UNIT, fwd.keys - n), panel = n * geometry.width;
    const uint64_t visible = fwd.visible[n / 64] >> n % 64;
    pack_rows(geometry, keys + n * args.k.row, args.k.row, rows, UNIT, &visible, fwd.key_rows);
    const float squares = pack_columns(geometry, fwd.key_rows, UNIT, fwd.key_columns + panel);
    largest = squares > largest || squares != squares ? squares : largest;
    pack_rows(geometry, values + n * args.v.row, args.v.row, rows, UNIT, &visible, fwd.key_rows);
    pack_pairs(geometry, fwd.key_rows, UNIT, fwd.value_pairs + panel);
  }
  fwd.key_length = sqrtf(largest) * 1.001f;  // roundings of the products
}

// A step of a block: 32 queries against 64 keys. Blocks and their steps follow each other in one
// sequence, so that the overlap does not end with a block.
struct Item {
  int64_t step;
  Block& block;
  float* scores;
  uint16_t* probabilities;
};

inline Item item_at(Forward& fwd, int64_t n, int64_t steps) {
  return {.step = n % steps,
          .block = fwd.blocks[n / steps % 3],
          .scores = fwd.scores[n % 2],
          .probabilities = fwd.probabilities[n % 2]};
}

// The products that may run beside an item's softmax.
struct Beside {
  Product scores[2], values[4];  // of the next item; of the last one
  int num_scores = 0, num_values = 0;
};

inline void list_scores(const Forward& fwd, const Item& item, Beside& beside) {
  for (int64_t unit = 0; unit < units_in_step(fwd.keys, item.step); unit++)
    beside.scores[beside.num_scores++] =
        score_product(fwd, item.block, item.step, unit, item.scores);
}

inline void list_values(const Forward& fwd, const Item& item, Beside& beside) {
  for (int64_t group = 0; group < fwd.geometry.depth; group++)
    beside.values[beside.num_values++] =
        value_product(fwd, item.probabilities, item.block, item.step, group);
}

inline void multiply(const Beside& beside) {
  for (int i = 0; i < beside.num_scores; i++) multiply(beside.scores[i]);
  for (int i = 0; i < beside.num_values; i++) multiply(beside.values[i]);
}

// An item's softmax, eight rows at a time; where `overlapped`, a product beside each eight.
inline void exponentiate(const Forward& fwd, const Item& item, bool overlapped,
                         const Beside& beside) {
  const Block& block = item.block;
  const uint64_t visible = fwd.visible[item.step];
  const bool plain = block.bounded && visible == ~uint64_t(0);
  for (int eight = 0; eight < 4; eight++) {
    const int64_t r = 8 * eight, t = block.first + r;
    const Softmax softmax = {
        .scores = item.scores + r * STEP,
        .probabilities = item.probabilities + r * STEP,
        .totals = block.totals + r * 16,
        .negative_peak = block.negative_peak + r,
        .visible = visible,
        .factor = fwd.factor,
        .keys = fwd.bias ? Keys::biased
                : plain  ? Keys::plain
                         : Keys::marked,
        .bias = fwd.bias ? fwd.bias + minimum(t, fwd.queries - 1) * fwd.keys + item.step * STEP
                         : nullptr,
        .bias_rows = fwd.queries - t,
        .bias_stride = fwd.keys};
    Overlap overlap = Overlap::nothing;
    Product product = {};
    if (overlapped && eight < beside.num_scores) {
      overlap = Overlap::scores;
      product = beside.scores[eight];
    } else if (overlapped && eight >= 2 && eight - 2 < beside.num_values) {
      overlap = Overlap::values;
      product = beside.values[eight - 2];
    }
    exponentiate(overlap, units_in_step(fwd.keys, item.step), softmax, product);
  }
}

// One task: a run of query blocks of one head. Softmax of one item runs on the vector units while
// the matrix unit multiplies the next item's scores and the last item's values:
//
//              prologue |  item 0         item 1         ...   item n - 1       | epilogue
//   tiles      scores 0 |  scores 1       scores 2       ...                    |
//                       |                 values 0       ...   values n - 2     | values n - 1
//   vectors             |  softmax 0      softmax 1      ...   softmax n - 1    |
//
// Within an item, of its 32 rows:
//
//   rows      0 - 7            8 - 15           16 - 23           24 - 31
//   tiles     scores, keys     scores, keys     values, dims      values, dims
//             0 - 31           32 - 63          0 - 31            32 - 63
//
// A slice of the product (tile_slice) stands after each row. A product that runs beside a softmax
// reads and writes other buffers than it does: scores and probabilities are held twice, blocks
// three times. With a bias, a head_dim beyond 64, or without a matrix unit, products go before the
// softmax.
void attend(const AttentionForward& args, Forward& fwd, int64_t b, int64_t h, int64_t first_block,
            int64_t end_block) {
  const AttentionShape& shape = args.shape;
  const uint16_t* queries = head_of(args.q, b, h);
  uint16_t* out = args.out + (b * shape.queries * shape.heads + h) * shape.head_dim;
  float* lse = args.lse + (b * shape.heads + h) * shape.queries;
  fwd.bias = args.bias ? args.bias + h * shape.queries * shape.keys : nullptr;
  fwd.factor = shape.scale * LOG2_E;
  const int64_t steps = steps_of(fwd.keys), items = (end_block - first_block) * steps;
  const bool overlapped = TILES && fwd.geometry.depth <= 2 && !fwd.bias;
  const auto begin = [&](int64_t block, const Item& item) {
    begin_block(fwd, args.q, queries, (first_block + block) * UNIT, item.scores, item.block);
  };
  const auto finish = [&](const Item& item) {
    if (item.step == steps - 1)
      finish_block(fwd, item.block, out, shape.heads * shape.head_dim, lse);
  };

  const Item first = item_at(fwd, 0, steps), last = item_at(fwd, items - 1, steps);
  Beside before;
  begin(0, first);
  list_scores(fwd, first, before);
  multiply(before);

  for (int64_t n = 0; n < items; n++) {
    Beside beside;
    if (n + 1 < items) {
      const Item next = item_at(fwd, n + 1, steps);
      if (next.step == 0) begin((n + 1) / steps, next);
      list_scores(fwd, next, beside);
    }
    if (n > 0) list_values(fwd, item_at(fwd, n - 1, steps), beside);
    if (!overlapped) multiply(beside);
    exponentiate(fwd, item_at(fwd, n, steps), overlapped, beside);
    if (n > 0) finish(item_at(fwd, n - 1, steps));
  }

  Beside after;
  list_values(fwd, last, after);
  multiply(after);
  finish(last);
}

// Into how many tasks a head's query blocks are cut: enough for all threads, few enough that
// packing the keys again costs little.
int64_t parts_of(const AttentionShape& shape) {
  const int64_t heads = shape.batch * shape.heads, blocks = units_of(shape.queries);
  if (heads >= 3 * shape.threads || heads % shape.threads == 0) return 1;
  return minimum(ceil_div(3 * shape.threads, heads), ceil_div(blocks, 8));
}

}  // namespace

int64_t attention_forward_scratch(const AttentionShape& shape) {
  Arena arena = {};
  forward_memory(shape, arena);
  return arena.used * shape.threads;
}

void attention_forward(const AttentionForward& args) {
  const AttentionShape& shape = args.shape;
  const int64_t parts = parts_of(shape), heads = shape.batch * shape.heads;
  const int64_t blocks = units_of(shape.queries);
  const int64_t memory = attention_forward_scratch(shape) / shape.threads;
#pragma omp parallel num_threads(shape.threads)
  {
    Arena arena = {args.scratch + memory * omp_get_thread_num(), 0};
    Forward fwd = forward_memory(shape, arena);
    begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * parts; task++) {
      const int64_t head = task / parts, part = task % parts;
      const int64_t b = head / shape.heads, h = head % shape.heads;
      pack_keys_and_values(args, b, h, fwd);
      attend(args, fwd, b, h, blocks * part / parts, blocks * (part + 1) / parts);
    }
    end_products();
  }
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
