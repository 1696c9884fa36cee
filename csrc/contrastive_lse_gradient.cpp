// levels: avx512_bf16 amx_bf16
// The gradients of x and y from a chunk's weights: weights @ y and weights^T @ x. One task: 128
// rows of a gradient. Their part of the weights stays in a core's second cache, 64 dimensions of
// 256 vectors in the first. Sums are fp32 and added in one order for any number of threads.
#include <omp.h>

#include "common/large_products.h"
#include "common/pairs.h"
#include "common/pieces.h"
#include "common/sizes.h"
#include "contrastive_lse.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int64_t ROWS = 128, COLUMNS = 64, DEPTH = 256;

struct Memory {
  uint16_t* right;  // for each 64 of dim, for each 32 vectors: two right factors
  // a thread's own:
  uint16_t* left;  // for each DEPTH of vectors: (ROWS, DEPTH), where weights are transposed
  float* sums;     // (ROWS, COLUMNS)
};

Memory memory_in(Pieces& pieces, int64_t depth, int64_t dim, int thread) {
  Memory memory = {};
  memory.right = pieces.take<uint16_t>(round_up(dim, COLUMNS) * round_up(depth, UNIT));
  for (int each = 0; each <= thread; each++) {
    memory.left = pieces.take<uint16_t>(ROWS * round_up(depth, DEPTH));
    memory.sums = pieces.take<float>(ROWS * COLUMNS);
  }
  return memory;
}

// One task: 32 vectors.
void pack_right(const LseProduct& call, const Memory& memory, int64_t first) {
  __m512i low[16], high[16];
  for (int64_t d = 0; d < round_up(call.dim, COLUMNS); d += UNIT) {
    pair_rows(call.vectors + first * call.vectors_stride + d, call.vectors_stride,
              call.depth - first, call.dim - d, low, high);
    uint16_t* to = memory.right + d / COLUMNS * COLUMNS * round_up(call.depth, UNIT) +
                   first * COLUMNS + d % COLUMNS / 16 * TILE;
    store_each(low, to, 32);
    store_each(high, to + TILE, 32);
  }
}

// Columns `first` to `first + count` of the weights as rows.
void transpose_left(const LseProduct& call, const Memory& memory, int64_t first, int64_t count) {
  __m512i low[16], high[16];
  for (int64_t v = 0; v < call.depth; v += UNIT)
    for (int64_t r = 0; r < count; r += UNIT) {
      transpose_rows(call.weights + v * call.stride + first + r, call.stride, call.depth - v,
                     count - r, low, high);
      uint16_t* to = memory.left + v / DEPTH * DEPTH * ROWS + r * DEPTH + v % DEPTH;
      store_each(low, to, DEPTH);
      store_each(high, to + 16 * DEPTH, DEPTH);
    }
}

// A row's sums of 64 dimensions from d on.
void store_sums(const LseProduct& call, int64_t row, int64_t d, const float* sums) {
  for (int64_t c = 0; c < minimum(COLUMNS, call.dim - d); c += 16) {
    const __mmask16 there = first_of_16(call.dim - d - c);
    const int64_t place = row * call.sums_stride + d + c;
    __m512 values = _mm512_loadu_ps(sums + c);
    if (call.bf16_sums) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.sums) + place, there,
                               (__m256i)_mm512_cvtneps_pbh(values));
      continue;
    }
    float* to = static_cast<float*>(call.sums) + place;
    if (call.grows) values = _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), values);
    _mm512_mask_storeu_ps(to, there, values);
  }
}

// One task: `count` rows of the gradient.
void multiply_rows(const LseProduct& call, const Memory& memory, int64_t first, int64_t count) {
  const uint16_t *right = memory.right,
                 *end = right + round_up(call.dim, COLUMNS) * round_up(call.depth, UNIT);
  if (call.transposed) transpose_left(call, memory, first, count);
  Late late = {};
  for (int64_t d = 0; d < call.dim; d += COLUMNS) {
    for (int64_t v = 0; v < call.depth; v += DEPTH) {
      const int64_t depth = minimum(ceil_div(call.depth - v, UNIT), DEPTH / UNIT);
      const uint16_t* next = right + depth * UNIT * COLUMNS;
      const int64_t stride = call.transposed ? DEPTH : call.stride;
      multiply({.factors = {.left = call.transposed ? memory.left + v * ROWS
                                                    : call.weights + first * call.stride + v,
                            .left_stride = stride,
                            .left_next = 32,
                            .right = right,
                            .right_column = TILE,
                            .right_next = 32 * COLUMNS},
                .left_unit = UNIT * stride,
                .right_unit = 2 * TILE,
                .rows = ceil_div(count, UNIT),
                .columns = minimum(ceil_div(call.dim - d, UNIT), COLUMNS / UNIT),
                .depth = depth,
                .sums = memory.sums,
                .stride = COLUMNS,
                .fresh = v == 0,
                .ahead = next,
                .ahead_values = minimum(end - next, DEPTH * COLUMNS)},
               late);
      right = next;
    }
    finish(late);
    for (int64_t r = 0; r < count; r++) store_sums(call, first + r, d, memory.sums + r * COLUMNS);
  }
}

}  // namespace

void contrastive_lse_product(const LseProduct& call) {
  const int64_t all = ceil_div(call.rows, UNIT);
  const int threads = static_cast<int>(minimum(all, call.threads));
  // as many for each thread, and of equal length
  const int64_t tasks = minimum(all, round_up(ceil_div(call.rows, ROWS), threads));
#pragma omp parallel num_threads(threads)
  {
    Pieces pieces = {reinterpret_cast<uintptr_t>(call.scratch)};
    const Memory memory = memory_in(pieces, call.depth, call.dim, omp_get_thread_num());
    begin_products();
#pragma omp for schedule(static)
    for (int64_t first = 0; first < call.depth; first += UNIT) pack_right(call, memory, first);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t first = task * all / tasks * UNIT, last = (task + 1) * all / tasks * UNIT;
      multiply_rows(call, memory, first, minimum(last, call.rows) - first);
    }
    end_products();
  }
}

int64_t contrastive_lse_product_scratch(int64_t depth, int64_t dim, int threads) {
  Pieces pieces = {};
  memory_in(pieces, depth, dim, threads - 1);
  return static_cast<int64_t>(pieces.next) + 64;
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
