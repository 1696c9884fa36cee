// levels: avx512_bf16 amx_bf16
// Attention in bf16, forward: products of whole tiles (common/products.h), fp32 sums, and softmax
// in AVX-512 between them. One task: a run of query blocks of one head. Keys and values are packed
// once a task (common/bf16_panels.h); queries are taken 32 at a time, keys 64 at a time, values
// 128.
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
  int64_t keys;   // from the first on, that any of its queries may attend
};

struct Forward {
  Geometry geometry;
  float factor;  // of the products, for powers of two
  bool causal;
  int64_t keys, queries;
  float key_length;  // of the longest key
  uint16_t *key_columns, *value_pairs, *key_rows;
  uint64_t* visible;
  float* scores[2];            // (32, 64) each, of this step and the next
  uint16_t* probabilities[2];  // (32, 128) each, of this span of two steps and the last
  Block blocks[3];             // of the last step, this one and the next
  const float* bias;           // of the head, or null
};

// The 32s of keys in a step or a span that begins at `key`.
inline int64_t units_in(int64_t keys, int64_t key, int64_t length) {
  return units_of(minimum(keys - key, length));
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
          .fresh = true,
          .rows = fwd.queries - block.first,
          .last_pairs = last_pairs_of(geometry.head_dim)};
}

// probabilities @ v of the span that begins at `key`: 32 dims of it are added to a block's sums.
inline Product value_product(const Forward& fwd, const uint16_t* probabilities, const Block& block,
                             int64_t key, int64_t group) {
  const int64_t tiles = fwd.geometry.value_tiles;
  return {.factors = {.left = probabilities,
                      .left_stride = SPAN,
                      .left_next = 32,
                      .right = fwd.value_pairs + (key / UNIT * tiles + 2 * group) * TILE,
                      .right_column = TILE,
                      .right_next = tiles * TILE,
                      .streamed = true},
          .depth = units_in(block.keys, key, SPAN),
          .sums = block.sums + 32 * group,
          .stride = fwd.geometry.width,
          .fresh = key == 0,
          .rows = fwd.queries - block.first,
          .last_pairs = last_pairs_of(minimum(block.keys - key, SPAN))};
}

inline int64_t steps_of(const Block& block) { return steps_of(block.keys); }

// -- a block's beginning and end -----------------------------------------------------------------

// Keys from the first on that a query may attend.
inline int64_t keys_of(const Forward& fwd, int64_t query) {
  return fwd.causal ? minimum(fwd.keys, query + 1) : fwd.keys;
}

// The largest visible bias of a query in units of log 2; -inf where there is none.
float bias_peak(const Forward& fwd, int64_t t) {
  __m512 peak = _mm512_set1_ps(-INFINITY);
  const int64_t keys = keys_of(fwd, t);
  for (int64_t n = 0; n < keys; n += 16) {
    const __mmask16 visible = __mmask16(fwd.visible[n / 64] >> n % 64) & first_of_16(keys - n);
    const __m512 bias = _mm512_maskz_loadu_ps(visible, fwd.bias + t * fwd.keys + n);
    peak = _mm512_mask_max_ps(peak, visible, peak, bias);
  }
  return _mm512_reduce_max_ps(peak) * LOG2_E;
}

// Each row's largest score of a step, in units of log 2, where it exceeds the row's `peak` of 16
// parts.
void raise_peaks(const Forward& fwd, const Block& block, int64_t step, const float* scores,
                 __m512* peak) {
  const int64_t rows = minimum(UNIT, fwd.queries - block.first);
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < 2 * units_in(block.keys, step * STEP, STEP); i++) {
      const int64_t keys = keys_of(fwd, block.first + r) - step * STEP - 16 * i;
      const __mmask16 visible = __mmask16(fwd.visible[step] >> 16 * i) & first_of_16(keys);
      const __m512 score = _mm512_load_ps(scores + r * STEP + 16 * i);
      __m512 x = _mm512_mul_ps(score, _mm512_set1_ps(fwd.factor));
      if (fwd.bias) {
        const float* bias = fwd.bias + (block.first + r) * fwd.keys + step * STEP + 16 * i;
        x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(visible, bias), _mm512_set1_ps(LOG2_E), x);
      }
      peak[r] = _mm512_mask_max_ps(peak[r], visible, peak[r], x);
    }
}

inline void set_peak(Block& block, int64_t row, float peak) {
  block.negative_peak[row] = peak == -INFINITY ? 0 : -peak;  // zero: -inf + inf would give nan
}

// The rows' true largest scores where lengths bound nothing: of the only step's scores, which are
// there, or by a pass over all keys.
void find_peaks(const Forward& fwd, const float* of_one_step, float* scores, Block& block) {
  __m512 peak[UNIT];
  for (int r = 0; r < UNIT; r++) peak[r] = _mm512_set1_ps(-INFINITY);
  if (of_one_step) raise_peaks(fwd, block, 0, of_one_step, peak);
  for (int64_t step = 0; !of_one_step && step < steps_of(block); step++) {
    for (int64_t unit = 0; unit < units_in(block.keys, step * STEP, STEP); unit++)
      multiply(score_product(fwd, block, step, unit, scores));
    raise_peaks(fwd, block, step, scores, peak);
  }
  for (int r = 0; r < UNIT; r++) set_peak(block, r, _mm512_reduce_max_ps(peak[r]));
}

// Reads 32 queries and finds what to subtract from their scores: |q| times the longest key, which
// no score exceeds and which needs no pass over the keys. No score is then below minus twice that,
// so up to 2^-100 nothing is lost to underflow. Of one step the largest score is found at once, and
// a probability of one is exact.
void begin_block(const Forward& fwd, const Heads& q, const uint16_t* from, int64_t first,
                 float* scores, Block& block) {
  const Geometry& geometry = fwd.geometry;
  const int64_t rows = minimum(UNIT, fwd.queries - first);
  block.first = first, block.keys = keys_of(fwd, first + UNIT - 1);
  pack_rows(geometry, from + first * q.row, q.row, rows, UNIT, nullptr, block.rows);
  memset(block.totals, 0, UNIT * 64);
  block.bounded = steps_of(block) > 1;
  if (!block.bounded) return;
  alignas(64) float bounds[UNIT];
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
    _mm512_store_ps(bounds + half, _mm512_roundscale_ps(bound, up));
  }
  if (!block.bounded) return find_peaks(fwd, nullptr, scores, block);
  for (int64_t r = 0; r < UNIT; r++)
    set_peak(block, r, bounds[r] + (fwd.bias && r < rows ? bias_peak(fwd, first + r) : 0));
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
  fwd.causal = shape.causal, fwd.keys = shape.keys, fwd.queries = shape.queries;
  const int64_t width = fwd.geometry.width, padded = units_of(shape.keys) * UNIT;
  fwd.key_columns = arena.take<uint16_t>(padded * width);
  fwd.value_pairs = arena.take<uint16_t>(padded * width);
  fwd.key_rows = arena.take<uint16_t>(UNIT * width);
  fwd.visible = arena.take<uint64_t>(steps_of(shape.keys));
  for (int i = 0; i < 2; i++) {
    fwd.scores[i] = arena.take<float>(UNIT * STEP);
    fwd.probabilities[i] = arena.take<uint16_t>(UNIT * SPAN);
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
  Block* block;
  float* scores;
  uint16_t* probabilities;             // of its span
  int64_t number, span, block_number;  // in the sequence

  bool last() const { return step + 1 == steps_of(*block); }
};

inline Item item_at(Forward& fwd, int64_t number, int64_t span, int64_t block, int64_t step) {
  return {.step = step,
          .block = &fwd.blocks[block % 3],
          .scores = fwd.scores[number % 2],
          .probabilities = fwd.probabilities[span % 2],
          .number = number,
          .span = span,
          .block_number = block};
}

inline Item after(Forward& fwd, const Item& item) {
  if (item.last()) return item_at(fwd, item.number + 1, item.span + 1, item.block_number + 1, 0);
  const int64_t span = item.span + item.step % 2;
  return item_at(fwd, item.number + 1, span, item.block_number, item.step + 1);
}

inline int list_scores(const Forward& fwd, const Item& item, Product* list) {
  int count = 0;
  for (int64_t unit = 0; unit < units_in(item.block->keys, item.step * STEP, STEP); unit++)
    list[count++] = score_product(fwd, *item.block, item.step, unit, item.scores);
  return count;
}

// The values of an item's span, of dims 32 times `first` to 32 times `end`.
inline int list_values(const Forward& fwd, const Item& item, int64_t first, int64_t end,
                       Product* list) {
  int count = 0;
  for (int64_t group = first; group < end; group++)
    list[count++] =
        value_product(fwd, item.probabilities, *item.block, item.step / 2 * SPAN, group);
  return count;
}

// An item's softmax, and products that run beside it.
inline void exponentiate(const Forward& fwd, const Item& item, const Product* beside, int count,
                         Pending& pending) {
  const Block& block = *item.block;
  const int64_t key = item.step * STEP;
  const Softmax softmax = {.scores = item.scores,
                           .probabilities = item.probabilities + key % SPAN,
                           .totals = block.totals,
                           .negative_peak = block.negative_peak,
                           .rows = minimum(UNIT, fwd.queries - block.first),
                           .visible = fwd.visible[item.step],
                           .diagonal = fwd.causal && item.last(),
                           .factor = fwd.factor,
                           .bias = fwd.bias ? fwd.bias + block.first * fwd.keys + key : nullptr,
                           .bias_stride = fwd.keys};
  const Scores kind = fwd.bias ? Scores::biased : block.bounded ? Scores::bounded : Scores::any;
  if (units_in(block.keys, key, STEP) == 2)
    exponentiate<4>(kind, softmax, beside, count, pending);
  else
    exponentiate<2>(kind, softmax, beside, count, pending);
}

// One task: a run of query blocks of one head. Softmax of one item runs on the vector units while
// the matrix unit multiplies the next item's scores, and the values of the last two items, which
// are a span: half of the dims beside each of this span's items.
//
//              prologue |  item 0      item 1      item 2      item 3      ...  | epilogue
//   tiles      scores 0 |  scores 1    scores 2    scores 3    scores 4    ...  |
//                       |                          values of items 0 and 1      | values of the
//                       |                          dims 0-31   dims 32-63  ...  | last span
//   vectors             |  softmax 0   softmax 1   softmax 2   softmax 3   ...  |
//
// A block of an odd number of items ends with a span of one, beside which all dims are taken. What
// runs beside a softmax reads and writes other buffers than it does: scores and spans are held
// twice, blocks three times.
void attend(const AttentionForward& args, Forward& fwd, int64_t b, int64_t h, int64_t first_block,
            int64_t end_block) {
  constexpr int most = 2 + 128 / 32;  // products beside an item
  const AttentionShape& shape = args.shape;
  const uint16_t* queries = head_of(args.q, b, h);
  uint16_t* out = args.out + (b * shape.queries * shape.heads + h) * shape.head_dim;
  float* lse = args.lse + (b * shape.heads + h) * shape.queries;
  fwd.bias = args.bias ? args.bias + h * shape.queries * shape.keys : nullptr;
  fwd.factor = shape.scale * LOG2_E;
  const int64_t groups = fwd.geometry.depth;  // of 32 dims
  Product beside[most];
  Pending pending;
  const auto begin = [&](const Item& item) {
    const int64_t first = (first_block + item.block_number) * UNIT;
    begin_block(fwd, args.q, queries, first, item.scores, *item.block);
  };
  const auto finish = [&](const Item& item) {
    finish_block(fwd, *item.block, out, shape.heads * shape.head_dim, lse);
  };

  Item item = item_at(fwd, 0, 0, 0, 0), last = item;  // `last`: of the span before this one
  begin(item);
  multiply(beside, list_scores(fwd, item, beside), pending);
  store(pending);

  for (bool more = true; more;) {
    const Item next = after(fwd, item);
    more = next.block_number < end_block - first_block;
    int count = 0;
    if (more) {
      if (next.step == 0) {
        store(pending);
        begin(next);
      }
      count = list_scores(fwd, next, beside);
    }
    const bool second = item.step % 2 == 1, alone = !second && item.last();
    const int64_t half = ceil_div(groups, 2);
    const int64_t first_group = second ? half : 0, end_group = second || alone ? groups : half;
    const int values =
        item.span == 0 ? 0 : list_values(fwd, last, first_group, end_group, beside + count);
    if (steps_of(*item.block) == 1) find_peaks(fwd, item.scores, nullptr, *item.block);
    exponentiate(fwd, item, beside, count + values, pending);
    const bool finished = values > 0 && end_group == groups && last.last();
    if (values == 0 || finished) store(pending);  // the next softmax reads the scores
    if (finished) finish(last);
    if (next.span != item.span) last = item;
    if (more) item = next;
  }

  last = item;
  multiply(beside, list_values(fwd, last, 0, groups, beside), pending);
  store(pending);
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
      const int64_t head = task / parts, part = parts - 1 - task % parts;  // causal: longest first
      const int64_t b = head / shape.heads, h = head % shape.heads;
      pack_keys_and_values(args, b, h, fwd);
      attend(args, fwd, b, h, blocks * part / parts, blocks * (part + 1) / parts);
    }
    end_products();
  }
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
