// levels: base avx2 avx512 avx512_bf16 amx_bf16
// The contrastive log-sums: what is done with a chunk of products x @ y^T. Forward, one pass sums
// exp(S) by rows, columns and own texts; backward, one pass turns products into weights. Vectors
// are the compiler's own, as wide as the instruction set has them. The sets that multiply bf16
// compute the products of bf16 vectors too.
//
// R clips (rows), C texts (columns) of a chunk, D dimensions. A task is a tile of TILE_ROWS x
// TILE_COLUMNS scores, whatever the number of threads. Each leaves its sums apart, and they are
// joined in the tiles' order, so the bits do not depend on which thread did what.
#include "contrastive_lse.h"

#include <omp.h>

#include "common/bf16_panels.h"
#include "common/large_products.h"
#include "common/sizes.h"
#include "common/vectors.h"

namespace vatt_fast {
namespace VF_LEVEL {

// 256 KiB of products: they stay in a core's L2 from one pass to the next
constexpr int64_t TILE_ROWS = 128, TILE_COLUMNS = 512;

int64_t contrastive_lse_tile_floats() { return TILE_ROWS * TILE_COLUMNS; }

// -- own texts -----------------------------------------------------------------------------------

struct Span {
  int64_t begin, end;
};

// Columns of a row's own texts among begin .. end - 1.
static inline Span own_texts(const LseChunk& chunk, int64_t row, int64_t begin, int64_t end) {
  const int64_t first = chunk.first_own + row * chunk.texts_per_clip;
  return {clamp(first, begin, end), clamp(first + chunk.texts_per_clip, begin, end)};
}

// -- tiles ---------------------------------------------------------------------------------------

struct Tile {
  int64_t row, rows, column,
      columns;           // columns rounded up to 32: those beyond the chunk do not count
  int64_t strip, block;  // place among the chunk's tiles, across and down
  float* products;       // of its first row and column
  int64_t stride;
};

static inline int64_t padded(int64_t columns) { return round_up(columns, 32); }
static inline int64_t strips_of(const LseChunk& chunk) {
  return ceil_div(chunk.columns, TILE_COLUMNS);
}
static inline int64_t blocks_of(const LseChunk& chunk) { return ceil_div(chunk.rows, TILE_ROWS); }

// Tile ``number``, one below the other first: they share the texts, which are the larger part.
static inline Tile tile_of(const LseChunk& chunk, int64_t number) {
  const int64_t block = number % blocks_of(chunk), strip = number / blocks_of(chunk);
  const int64_t row = block * TILE_ROWS, column = strip * TILE_COLUMNS;
  const int64_t rows = clamp(chunk.rows - row, 0, TILE_ROWS),
                columns = clamp(padded(chunk.columns) - column, 0, TILE_COLUMNS);
  const int64_t memory = omp_get_thread_num() * contrastive_lse_tile_floats();
  return {.row = row,
          .rows = rows,
          .column = column,
          .columns = columns,
          .strip = strip,
          .block = block,
          .products = chunk.products +
                      (chunk.products_stride ? row * chunk.products_stride + column : memory),
          .stride = chunk.products_stride ? chunk.products_stride : TILE_COLUMNS};
}

static inline bool counts(const LseChunk& chunk, int64_t row) {
  return !chunk.x_counts || chunk.x_counts[row];
}

// -- products of bf16 vectors --------------------------------------------------------------------

#if VF_PRODUCTS

constexpr int64_t PANEL = 64;   // texts
constexpr int64_t DEPTH = 256;  // dimensions: of a panel so many stay in the first cache

// Computes the tile's products: all its clips pass by a part of a panel.
static void multiply(const LseChunk& chunk, const Tile& tile) {
  if (!chunk.x) return;
  const uint16_t *right = chunk.y_panels + tile.column * chunk.dim,
                 *end = chunk.y_panels + padded(chunk.columns) * chunk.dim;
  Late late = {};
  for (int64_t j = 0; j < tile.columns; j += PANEL)
    for (int64_t d = 0; d < chunk.dim; d += DEPTH) {
      const int64_t width = minimum(tile.columns - j, PANEL), depth = minimum(chunk.dim - d, DEPTH);
      const uint16_t* next = right + depth * width;
      multiply({.factors = {.left = chunk.x + tile.row * chunk.dim + d,
                            .left_stride = chunk.dim,
                            .left_next = 32,
                            .right = right,
                            .right_column = TILE,
                            .right_next = 32 * width},
                .left_unit = UNIT * chunk.dim,
                .right_unit = 2 * TILE,
                .rows = ceil_div(tile.rows, UNIT),
                .columns = width / UNIT,
                .depth = depth / 32,
                .sums = tile.products + j,
                .stride = tile.stride,
                .fresh = d == 0,
                .ahead = next,
                .ahead_values = minimum(end - next, DEPTH * PANEL)},
               late);
      right = next;
    }
  finish(late);
}

bool contrastive_lse_pack(const uint16_t* y, int64_t texts, int64_t dim, uint16_t* panels,
                          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t text = 0; text < texts; text += 16) {
    const int64_t first = text / PANEL * PANEL, width = minimum(texts - first, PANEL);
    uint16_t* to = panels + first * dim + (text - first) / 16 * TILE;
    for (int64_t d = 0; d < dim; d += 32, to += 32 * width) {
      __m512i r[16];
      load_transposed(y + text * dim + d, dim, r);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 32 * i, r[i]);
    }
  }
  return true;
}

// A tile's row of weights, rounded to bf16.
static void round_weights(const float* weights, int64_t count, uint16_t* to) {
  for (int64_t j = 0; j < count; j += 32)
    _mm512_storeu_si512(to + j,
                        to_bf16(_mm512_loadu_ps(weights + j + 16), _mm512_loadu_ps(weights + j)));
}

#else

static inline void begin_products() {}
static inline void end_products() {}
static inline void multiply(const LseChunk&, const Tile&) {}
static inline void round_weights(const float*, int64_t, uint16_t*) {}

bool contrastive_lse_pack(const uint16_t*, int64_t, int64_t, uint16_t*, int) { return false; }

#endif

// -- forward -------------------------------------------------------------------------------------

// The tiles' sums: of rows and own texts (strips, R), of columns (blocks, C padded); peaks
// likewise, if running.
struct Parts {
  float *row, *own, *col, *row_peak, *own_peak, *col_peak;
};

static Parts parts_in(const LseChunk& chunk, float* scratch) {
  const int64_t of_rows = strips_of(chunk) * chunk.rows,
                all_sums = 2 * of_rows + blocks_of(chunk) * padded(chunk.columns);
  float* peaks = scratch + all_sums;
  return {.row = scratch,
          .own = scratch + of_rows,
          .col = scratch + 2 * of_rows,
          .row_peak = peaks,
          .own_peak = peaks + of_rows,
          .col_peak = peaks + 2 * of_rows};
}

// One task: a tile of products. Leaves the sums of exp(S) over its rows and over its columns.
static void sum_tile(const LseChunk& chunk, const Tile& tile, const Parts& parts) {
  const int32_t* y_counts = chunk.y_counts + tile.column;
  float* columns = parts.col + tile.block * padded(chunk.columns) + tile.column;
  for (int64_t j = 0; j < tile.columns; j++) columns[j] = 0;
  for (int64_t i = 0; i < tile.rows; i++) {
    const float* products = tile.products + i * tile.stride;
    Floats total = {};
    if (counts(chunk, tile.row + i)) {
      for (int64_t j = 0; j < tile.columns; j += WIDTH) {
        const Floats terms = where(load(y_counts + j), exp_of(load(products + j) * chunk.scale));
        total += terms;
        store(columns + j, load(columns + j) + terms);
      }
    } else {
      for (int64_t j = 0; j < tile.columns; j += WIDTH)
        total += where(load(y_counts + j), exp_of(load(products + j) * chunk.scale));
    }
    parts.row[tile.strip * chunk.rows + tile.row + i] = sum_of(total);
  }
}

static inline Floats scores_or_absent(const float* products, Ints y_counts, float scale) {
  return y_counts ? load(products) * scale : all(-__builtin_inff());
}

static inline Floats zero_if_absent(Floats peak) {
  return peak == -__builtin_inff() ? Floats{} : peak;
}

// The same where exp(S) might leave fp32: a first pass finds the peaks of rows and columns, a
// second sums exp(S - peak).
static void sum_tile_running(const LseChunk& chunk, const Tile& tile, const Parts& parts) {
  const float absent = -__builtin_inff();
  const int32_t* y_counts = chunk.y_counts + tile.column;
  float* columns = parts.col + tile.block * padded(chunk.columns) + tile.column;
  float* peaks = parts.col_peak + tile.block * padded(chunk.columns) + tile.column;
  for (int64_t j = 0; j < tile.columns; j++) columns[j] = 0, peaks[j] = absent;
  for (int64_t i = 0; i < tile.rows; i++) {
    const float* products = tile.products + i * tile.stride;
    const bool in_columns = counts(chunk, tile.row + i);
    Floats top = all(absent);
    for (int64_t j = 0; j < tile.columns; j += WIDTH) {
      const Floats scores = scores_or_absent(products + j, load(y_counts + j), chunk.scale);
      top = larger(scores, top);
      if (in_columns) store(peaks + j, larger(scores, load(peaks + j)));
    }
    parts.row_peak[tile.strip * chunk.rows + tile.row + i] = largest_of(top);
  }
  for (int64_t i = 0; i < tile.rows; i++) {
    const float* products = tile.products + i * tile.stride;
    const bool in_columns = counts(chunk, tile.row + i);
    const Floats top = zero_if_absent(all(parts.row_peak[tile.strip * chunk.rows + tile.row + i]));
    Floats total = {};
    for (int64_t j = 0; j < tile.columns; j += WIDTH) {
      const Floats scores = scores_or_absent(products + j, load(y_counts + j), chunk.scale);
      total += exp_of(scores - top);
      if (in_columns)
        store(columns + j, load(columns + j) + exp_of(scores - zero_if_absent(load(peaks + j))));
    }
    parts.row[tile.strip * chunk.rows + tile.row + i] = sum_of(total);
  }
}

// A log-sum (peak, total) takes in another.
static inline void fold(double& total, float& peak, double more, float more_peak) {
  const float higher = more_peak > peak ? more_peak : peak;
  const float top =
      higher == -__builtin_inff() ? 0 : higher;  // nothing seen yet: -inf less -inf would be nan
  total = total * __builtin_exp((double)peak - top) + more * __builtin_exp((double)more_peak - top);
  peak = higher;
}

// Own texts of the tile's rows: few, one by one.
static void sum_own(const LseChunk& chunk, const Tile& tile, const Parts& parts) {
  for (int64_t i = 0; i < tile.rows; i++) {
    double total = 0;
    float peak = -__builtin_inff();
    const Span own = own_texts(chunk, tile.row + i, tile.column,
                               clamp(tile.column + tile.columns, 0, chunk.columns));
    for (int64_t j = own.begin; j < own.end; j++) {
      if (!chunk.y_counts[j]) continue;
      const float score = tile.products[i * tile.stride + j - tile.column] * chunk.scale;
      if (chunk.running)
        fold(total, peak, 1, score);
      else
        total += __builtin_exp((double)score);
    }
    parts.own[tile.strip * chunk.rows + tile.row + i] = (float)total;
    if (chunk.running) parts.own_peak[tile.strip * chunk.rows + tile.row + i] = peak;
  }
}

// A thread without a tile would only be waited for.
static int threads_for(const LseChunk& chunk, int64_t tiles) {
  return tiles < chunk.threads ? (int)tiles : chunk.threads;
}

static void join_row(const LseChunk& chunk, const LseSums& sums, const Parts& parts, int64_t i) {
  for (int64_t strip = 0; strip < strips_of(chunk); strip++) {
    const int64_t at = strip * chunk.rows + i;
    if (chunk.running) {
      fold(sums.row[i], sums.row_peak[i], parts.row[at], parts.row_peak[at]);
      fold(sums.pos[i], sums.pos_peak[i], parts.own[at], parts.own_peak[at]);
    } else {
      sums.row[i] += parts.row[at];
      sums.pos[i] += parts.own[at];
    }
  }
}

static void join_column(const LseChunk& chunk, const LseSums& sums, const Parts& parts, int64_t j) {
  for (int64_t block = 0; block < blocks_of(chunk); block++) {
    const int64_t at = block * padded(chunk.columns) + j;
    if (chunk.running)
      fold(sums.col[j], sums.col_peak[j], parts.col[at], parts.col_peak[at]);
    else
      sums.col[j] += parts.col[at];
  }
}

void contrastive_lse_forward(const LseChunk& chunk, const LseSums& sums) {
  const Parts parts = parts_in(chunk, sums.scratch);
  const int64_t tiles = strips_of(chunk) * blocks_of(chunk);
#pragma omp parallel num_threads(threads_for(chunk, tiles))
  {
    if (chunk.x) begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tiles; number++) {
      const Tile tile = tile_of(chunk, number);
      multiply(chunk, tile);
      sum_own(chunk, tile, parts);
      if (chunk.running)
        sum_tile_running(chunk, tile, parts);
      else
        sum_tile(chunk, tile, parts);
    }
    if (chunk.x) end_products();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < chunk.rows; i++) join_row(chunk, sums, parts, i);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < chunk.columns; j++) join_column(chunk, sums, parts, j);
  }
}

// -- backward ------------------------------------------------------------------------------------

static inline Floats weights_of(const LseChunk& chunk, const LseGradients& gradients, int64_t i,
                                int64_t j, bool in_columns, Floats scores) {
  if (!chunk.running)
    return exp_of(scores) *
           (in_columns ? load(gradients.col + j) + gradients.row[i] : all(gradients.row[i]));
  const Floats of_row = exp_of(scores - gradients.row_lse[i]) * gradients.row[i];
  return in_columns
             ? of_row + exp_of(scores - load(gradients.col_lse + j)) * load(gradients.col + j)
             : of_row;
}

// Adds the gradient of pos to the weights of a row's own texts, whose products were kept aside, and
// their part of d_scale.
static double weigh_own(const LseChunk& chunk, const LseGradients& gradients, int64_t i, Span own,
                        const float* products, float* weights) {
  double d_scale = 0;
  for (int64_t j = own.begin; j < own.end; j++) {
    if (!chunk.y_counts[j]) continue;
    const float product = products[j - own.begin], score = product * chunk.scale;
    const float weight =
        gradients.pos[i] *
        (float)__builtin_exp((double)(chunk.running ? score - gradients.pos_lse[i] : score));
    weights[j] += weight * chunk.scale;
    d_scale += (double)weight * product;
  }
  return d_scale;
}

// One task: a tile of products becomes weights. Returns its part of d_scale.
static double weigh_tile(const LseChunk& chunk, const Tile& tile, const LseGradients& gradients) {
  double d_scale = 0;
  float own_products[TILE_COLUMNS], weights_of_row[TILE_COLUMNS];
  for (int64_t i = 0; i < tile.rows; i++) {
    const float* row = tile.products + i * tile.stride;
    const int64_t place = (tile.row + i) * chunk.stride + tile.column;
    float* to = chunk.bf16_weights ? weights_of_row : static_cast<float*>(chunk.weights) + place;
    const Span own = own_texts(chunk, tile.row + i, tile.column,
                               clamp(tile.column + tile.columns, 0, chunk.columns));
    for (int64_t j = own.begin; j < own.end; j++)  // the weights may take the products' place
      own_products[j - own.begin] = row[j - tile.column];
    const bool in_columns = counts(chunk, tile.row + i);
    Floats total = {};
    for (int64_t j = 0; j < tile.columns; j += WIDTH) {
      const Ints y_counts = load(chunk.y_counts + tile.column + j);
      const Floats products = where(y_counts, load(row + j));
      const Floats weights =
          where(y_counts, weights_of(chunk, gradients, tile.row + i, tile.column + j, in_columns,
                                     products * chunk.scale));
      total += weights * products;
      store(to + j, weights * chunk.scale);
    }
    d_scale += sum_of(total) +
               weigh_own(chunk, gradients, tile.row + i, own, own_products, to - tile.column);
    if (chunk.bf16_weights)
      round_weights(weights_of_row, tile.columns, static_cast<uint16_t*>(chunk.weights) + place);
  }
  return d_scale;
}

void contrastive_lse_backward(const LseChunk& chunk, const LseGradients& gradients) {
  const int64_t tiles = strips_of(chunk) * blocks_of(chunk);
  double* d_scales = reinterpret_cast<double*>(gradients.scratch);
#pragma omp parallel num_threads(threads_for(chunk, tiles))
  {
    if (chunk.x) begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tiles; number++) {
      const Tile tile = tile_of(chunk, number);
      multiply(chunk, tile);
      d_scales[number] = weigh_tile(chunk, tile, gradients);
    }
    if (chunk.x) end_products();
  }
  for (int64_t number = 0; number < tiles; number++) *gradients.d_scale += d_scales[number];
}

int64_t contrastive_lse_scratch_floats(int64_t rows, int64_t columns) {
  const int64_t strips = ceil_div(columns, TILE_COLUMNS), blocks = ceil_div(rows, TILE_ROWS);
  return 2 * (2 * strips * rows + blocks * padded(columns)) + 2 * strips * blocks;
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
