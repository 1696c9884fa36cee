// The contrastive log-sums: what is done with a chunk of products x @ y^T. Forward, one pass sums exp(S) by rows, columns and own texts;
// backward, one pass turns products into weights. Compiled once for each instruction set (VF_LEVEL): vectors are the compiler's own, as
// wide as the set has them, and those that multiply bf16 compute the products of bf16 vectors too.
//
// R clips (rows), C texts (columns) of a chunk, D dimensions; tiles of TILE_ROWS x TILE_COLUMNS scores are the tasks, whatever the number
// of threads: each leaves its sums apart, and they are joined in the tiles' order, so the bits do not depend on who did what.
#include "contrastive_lse.h"

#include <omp.h>

#include "products.h"

namespace vatt_fast {
namespace VF_LEVEL {

#include "vectors.h"

constexpr int64_t TILE_ROWS = 128, TILE_COLUMNS = 512;  // 256 KiB of products: they stay in a core's L2 from one pass to the next

int64_t nce_tile_floats() { return TILE_ROWS * TILE_COLUMNS; }

// -- own texts ---------------------------------------------------------------------------------------------------------

struct Span {
  int64_t begin, end;
};

static inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// Columns of a row's own texts among begin .. end - 1.
static inline Span own_texts(const NceChunk& c, int64_t row, int64_t begin, int64_t end) {
  const int64_t first = c.first_own + row * c.texts_per_clip;
  return {clamp(first, begin, end), clamp(first + c.texts_per_clip, begin, end)};
}

// -- tiles -------------------------------------------------------------------------------------------------------------

struct Tile {
  int64_t row, rows, column, columns;  // columns rounded up to 32: those beyond the chunk do not count
  int64_t strip, block;                // place among the chunk's tiles, across and down
  float* products;                     // of its first row and column
  int64_t stride;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded(int64_t columns) { return ceil_div(columns, 32) * 32; }
static inline int64_t strips_of(const NceChunk& c) { return ceil_div(c.columns, TILE_COLUMNS); }
static inline int64_t blocks_of(const NceChunk& c) { return ceil_div(c.rows, TILE_ROWS); }

// Tile ``number``, one below the other first: they share the texts, which are the larger part.
static inline Tile tile_of(const NceChunk& c, int64_t number) {
  const int64_t block = number % blocks_of(c), strip = number / blocks_of(c);
  const int64_t row = block * TILE_ROWS, column = strip * TILE_COLUMNS;
  const int64_t rows = clamp(c.rows - row, 0, TILE_ROWS), columns = clamp(padded(c.columns) - column, 0, TILE_COLUMNS);
  if (c.x) return {row, rows, column, columns, strip, block, c.products + omp_get_thread_num() * nce_tile_floats(), TILE_COLUMNS};
  return {row, rows, column, columns, strip, block, c.products + row * c.stride + column, c.stride};
}

static inline bool counts(const NceChunk& c, int64_t row) { return !c.x_counts || c.x_counts[row]; }

// -- products of bf16 vectors ------------------------------------------------------------------------------------------

#if VF_PRODUCTS

// Computes the tile's products, 32 x 32 at a time. 32 texts stay in the first cache while all clips of the tile pass by.
static void multiply(const NceChunk& c, const Tile& t) {
  if (!c.x) return;
  const int64_t panel = 16 * c.dim;
  for (int64_t j = 0; j < t.columns; j += UNIT)
    for (int64_t i = 0; i < t.rows; i += UNIT) {
      const Factors factors = {c.x + (t.row + i) * c.dim, c.dim, 32, c.y_panels + (t.column + j) / 16 * panel, panel, TILE};
      multiply({factors, c.dim / 32, t.products + i * t.stride + j, t.stride, true});
    }
}

// Transposes 16 x 16 pairs of bf16.
static void transpose_pairs(const uint16_t* from, int64_t stride, uint16_t* to) {
  __m512i r[16], s[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 8; i++) {
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 32 * i, r[i]);
}

void nce_pack(const uint16_t* y, int64_t texts, int64_t dim, uint16_t* panels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t text = 0; text < texts; text += 16)
    for (int64_t d = 0; d < dim; d += 32) transpose_pairs(y + text * dim + d, dim, panels + text * dim + 16 * d);
}

// A row of weights, rounded to bf16.
static void keep_weights(const NceChunk& c, const Tile& t, int64_t i) {
  if (!c.x) return;
  const float* weights = t.products + i * t.stride;
  uint16_t* to = c.weights + (t.row + i) * c.stride + t.column;
  for (int64_t j = 0; j < t.columns; j += 32)
    _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + j + 16), _mm512_loadu_ps(weights + j)));
}

#else

static inline void begin_products() {}
static inline void end_products() {}
static inline void multiply(const NceChunk&, const Tile&) {}
static inline void keep_weights(const NceChunk&, const Tile&, int64_t) {}

#endif

// -- forward -----------------------------------------------------------------------------------------------------------

// The tiles' sums: of rows and own texts (strips, R), of columns (blocks, C padded); peaks likewise, if running.
struct Parts {
  float *row, *own, *col, *row_peak, *own_peak, *col_peak;
};

static Parts parts_in(const NceChunk& c, float* scratch) {
  const int64_t of_rows = strips_of(c) * c.rows, all_sums = 2 * of_rows + blocks_of(c) * padded(c.columns);
  float* peaks = scratch + all_sums;
  return {scratch, scratch + of_rows, scratch + 2 * of_rows, peaks, peaks + of_rows, peaks + 2 * of_rows};
}

// One task: a tile of products. Leaves the sums of exp(S) over its rows and over its columns.
static void sum_tile(const NceChunk& c, const Tile& t, const Parts& parts) {
  const int32_t* y_counts = c.y_counts + t.column;
  float* columns = parts.col + t.block * padded(c.columns) + t.column;
  for (int64_t j = 0; j < t.columns; j++) columns[j] = 0;
  for (int64_t i = 0; i < t.rows; i++) {
    const float* products = t.products + i * t.stride;
    Floats total = {};
    if (counts(c, t.row + i)) {
      for (int64_t j = 0; j < t.columns; j += WIDTH) {
        const Floats terms = where(load(y_counts + j), exp_of(load(products + j) * c.scale));
        total += terms;
        store(columns + j, load(columns + j) + terms);
      }
    } else {
      for (int64_t j = 0; j < t.columns; j += WIDTH) total += where(load(y_counts + j), exp_of(load(products + j) * c.scale));
    }
    parts.row[t.strip * c.rows + t.row + i] = sum_of(total);
  }
}

static inline Floats scores_or_hole(const float* products, Ints y_counts, float scale) {
  return y_counts ? load(products) * scale : all(-__builtin_inff());
}

static inline Floats without_hole(Floats peak) { return peak == -__builtin_inff() ? Floats{} : peak; }

// The same where exp(S) might leave fp32: a first pass finds the peaks of rows and columns, a second sums exp(S - peak).
static void sum_tile_running(const NceChunk& c, const Tile& t, const Parts& parts) {
  const float hole = -__builtin_inff();
  const int32_t* y_counts = c.y_counts + t.column;
  float* columns = parts.col + t.block * padded(c.columns) + t.column;
  float* peaks = parts.col_peak + t.block * padded(c.columns) + t.column;
  for (int64_t j = 0; j < t.columns; j++) columns[j] = 0, peaks[j] = hole;
  for (int64_t i = 0; i < t.rows; i++) {
    const float* products = t.products + i * t.stride;
    const bool in_columns = counts(c, t.row + i);
    Floats top = all(hole);
    for (int64_t j = 0; j < t.columns; j += WIDTH) {
      const Floats scores = scores_or_hole(products + j, load(y_counts + j), c.scale);
      top = larger(scores, top);
      if (in_columns) store(peaks + j, larger(scores, load(peaks + j)));
    }
    parts.row_peak[t.strip * c.rows + t.row + i] = largest_of(top);
  }
  for (int64_t i = 0; i < t.rows; i++) {
    const float* products = t.products + i * t.stride;
    const bool in_columns = counts(c, t.row + i);
    const Floats top = without_hole(all(parts.row_peak[t.strip * c.rows + t.row + i]));
    Floats total = {};
    for (int64_t j = 0; j < t.columns; j += WIDTH) {
      const Floats scores = scores_or_hole(products + j, load(y_counts + j), c.scale);
      total += exp_of(scores - top);
      if (in_columns) store(columns + j, load(columns + j) + exp_of(scores - without_hole(load(peaks + j))));
    }
    parts.row[t.strip * c.rows + t.row + i] = sum_of(total);
  }
}

// A log-sum (peak, total) takes in another.
static inline void fold(double& total, float& peak, double more, float more_peak) {
  const float higher = more_peak > peak ? more_peak : peak;
  const float top = higher == -__builtin_inff() ? 0 : higher;  // nothing seen yet: -inf less -inf would be nan
  total = total * __builtin_exp((double)peak - top) + more * __builtin_exp((double)more_peak - top);
  peak = higher;
}

// Own texts of the tile's rows: few, one by one.
static void sum_own(const NceChunk& c, const Tile& t, const Parts& parts) {
  for (int64_t i = 0; i < t.rows; i++) {
    double total = 0;
    float peak = -__builtin_inff();
    const Span own = own_texts(c, t.row + i, t.column, clamp(t.column + t.columns, 0, c.columns));
    for (int64_t j = own.begin; j < own.end; j++) {
      if (!c.y_counts[j]) continue;
      const float score = t.products[i * t.stride + j - t.column] * c.scale;
      if (c.running)
        fold(total, peak, 1, score);
      else
        total += __builtin_exp((double)score);
    }
    parts.own[t.strip * c.rows + t.row + i] = (float)total;
    if (c.running) parts.own_peak[t.strip * c.rows + t.row + i] = peak;
  }
}

// A thread without a tile would only be waited for.
static int threads_for(const NceChunk& c, int64_t tiles) { return tiles < c.threads ? (int)tiles : c.threads; }

static void join_row(const NceChunk& c, const NceSums& sums, const Parts& parts, int64_t i) {
  for (int64_t strip = 0; strip < strips_of(c); strip++) {
    const int64_t at = strip * c.rows + i;
    if (c.running) {
      fold(sums.row[i], sums.row_peak[i], parts.row[at], parts.row_peak[at]);
      fold(sums.pos[i], sums.pos_peak[i], parts.own[at], parts.own_peak[at]);
    } else {
      sums.row[i] += parts.row[at];
      sums.pos[i] += parts.own[at];
    }
  }
}

static void join_column(const NceChunk& c, const NceSums& sums, const Parts& parts, int64_t j) {
  for (int64_t block = 0; block < blocks_of(c); block++) {
    const int64_t at = block * padded(c.columns) + j;
    if (c.running)
      fold(sums.col[j], sums.col_peak[j], parts.col[at], parts.col_peak[at]);
    else
      sums.col[j] += parts.col[at];
  }
}

void nce_forward(const NceChunk& c, const NceSums& sums) {
  const Parts parts = parts_in(c, sums.scratch);
  const int64_t tiles = strips_of(c) * blocks_of(c);
#pragma omp parallel num_threads(threads_for(c, tiles))
  {
    if (c.x) begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tiles; number++) {
      const Tile t = tile_of(c, number);
      multiply(c, t);
      sum_own(c, t, parts);
      if (c.running)
        sum_tile_running(c, t, parts);
      else
        sum_tile(c, t, parts);
    }
    if (c.x) end_products();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < c.rows; i++) join_row(c, sums, parts, i);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < c.columns; j++) join_column(c, sums, parts, j);
  }
}

// -- backward ----------------------------------------------------------------------------------------------------------

static inline Floats weights_of(const NceChunk& c, const NceGradients& g, int64_t i, int64_t j, bool in_columns, Floats scores) {
  if (!c.running) return exp_of(scores) * (in_columns ? load(g.col + j) + g.row[i] : all(g.row[i]));
  const Floats of_row = exp_of(scores - g.row_lse[i]) * g.row[i];
  return in_columns ? of_row + exp_of(scores - load(g.col_lse + j)) * load(g.col + j) : of_row;
}

// Adds the gradient of pos to the weights of a row's own texts, whose products were kept aside, and their part of d_scale.
static double weigh_own(const NceChunk& c, const NceGradients& g, int64_t i, Span own, const float* products, float* weights) {
  double d_scale = 0;
  for (int64_t j = own.begin; j < own.end; j++) {
    if (!c.y_counts[j]) continue;
    const float product = products[j - own.begin], score = product * c.scale;
    const float weight = g.pos[i] * (float)__builtin_exp((double)(c.running ? score - g.pos_lse[i] : score));
    weights[j] += weight * c.scale;
    d_scale += (double)weight * product;
  }
  return d_scale;
}

// One task: a tile of products becomes weights. Returns its part of d_scale.
static double weigh_tile(const NceChunk& c, const Tile& t, const NceGradients& g) {
  double d_scale = 0;
  float own_products[TILE_COLUMNS];
  for (int64_t i = 0; i < t.rows; i++) {
    float* row = t.products + i * t.stride;
    const Span own = own_texts(c, t.row + i, t.column, clamp(t.column + t.columns, 0, c.columns));
    for (int64_t j = own.begin; j < own.end; j++) own_products[j - own.begin] = row[j - t.column];
    const bool in_columns = counts(c, t.row + i);
    Floats total = {};
    for (int64_t j = 0; j < t.columns; j += WIDTH) {
      const Ints y_counts = load(c.y_counts + t.column + j);
      const Floats products = where(y_counts, load(row + j));
      const Floats weights = where(y_counts, weights_of(c, g, t.row + i, t.column + j, in_columns, products * c.scale));
      total += weights * products;
      store(row + j, weights * c.scale);
    }
    d_scale += sum_of(total) + weigh_own(c, g, t.row + i, own, own_products, row - t.column);
    keep_weights(c, t, i);
  }
  return d_scale;
}

void nce_backward(const NceChunk& c, const NceGradients& g) {
  const int64_t tiles = strips_of(c) * blocks_of(c);
  double* d_scales = reinterpret_cast<double*>(g.scratch);
#pragma omp parallel num_threads(threads_for(c, tiles))
  {
    if (c.x) begin_products();
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tiles; number++) {
      const Tile t = tile_of(c, number);
      multiply(c, t);
      d_scales[number] = weigh_tile(c, t, g);
    }
    if (c.x) end_products();
  }
  for (int64_t number = 0; number < tiles; number++) *g.d_scale += d_scales[number];
}

int64_t nce_scratch_floats(int64_t rows, int64_t columns) {
  const int64_t strips = ceil_div(columns, TILE_COLUMNS), blocks = ceil_div(rows, TILE_ROWS);
  return 2 * (2 * strips * rows + blocks * padded(columns)) + 2 * strips * blocks;
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
