// The entry points of contrastive_lse.cpp, one set for each instruction set, and what they take.
#pragma once

#include <stdint.h>

#include "levels.h"

namespace vatt_fast {

// R clips (rows) by C texts (columns): a chunk of the score matrix scale * x @ y^T, and what
// belongs to its rows and columns. Arrays of columns are read up to C rounded up to 32.
//
// The products x @ y^T either lie in memory, or are computed a tile at a time (by the sets that
// multiply bf16): then x and y_panels are given.
struct LseChunk {
  // (R, products_stride); R rounded up to 32 where they are computed
  float* products;
  int64_t
      products_stride;  // 0: products has room for a tile a thread, contrastive_lse_tile_floats()
  int64_t rows, columns;
  const uint8_t* x_counts;  // (R,) bool; null: all do
  const int32_t* y_counts;  // (C,) all bits set where a text counts; 0 beyond C
  int64_t first_own;        // column of the first row's first own text; may lie outside the chunk
  int64_t texts_per_clip;
  float scale;
  bool running;  // exp(S) might leave fp32: log-sums carry a running maximum
  int threads;
  const uint16_t* x;  // (R rounded up to 32, D) bf16, zeros beyond R; null: products are there
  const uint16_t* y_panels;  // what contrastive_lse_pack made of y (C rounded up to 32, D)
  int64_t dim;               // D, a multiple of 32
  // (R, stride), fp32 or bf16: where the backward leaves scale * d loss / d scores; fp32 ones may
  // take the place of the products
  void* weights;
  int64_t
      stride;  // as products_stride at least C rounded up to 32; what lies beyond C does not count
  bool bf16_weights;
};

// What all chunks seen so far sum up to: lse = log(total), or peak + log(total) if running.
struct LseSums {
  double *row, *col, *pos;
  float *row_peak, *col_peak, *pos_peak;  // if running
  float* scratch;                         // contrastive_lse_scratch_floats(R, C)
};

// A score's weight is g exp(S), or g exp(S - lse) if running, summed over the three sets it is in.
// An empty set has g = 0, lse = inf.
struct LseGradients {
  const float *row, *col, *pos;              // g
  const float *row_lse, *col_lse, *pos_lse;  // if running
  double* d_scale;                           // grows by this chunk's part
  float* scratch;                            // contrastive_lse_scratch_floats(R, C)
};

// sums (rows, dim) = or += left (rows, depth) @ vectors (depth, dim), of a chunk's bf16 weights.
struct LseProduct {
  // left, (rows rounded up to 32, stride), or where it is transposed (depth, stride); what belongs
  // to no row does not count; where it is not, columns beyond depth up to 32 are zeros
  const uint16_t* weights;
  int64_t stride;
  bool transposed;
  int64_t rows, depth;
  const uint16_t* vectors;
  int64_t vectors_stride, dim;
  void* sums;  // fp32, or bf16 if they do not grow
  int64_t sums_stride;
  bool bf16_sums, grows;
  void* scratch;  // contrastive_lse_product_scratch() bytes
  int threads;
};

// contrastive_lse_pack: y (texts, dim) bf16, multiples of 32 -> panels of 64 texts (the last of 32
// where no more are left), each (dim / 32, texts / 16, 16, 16, 2): 32 dimensions, in 16 pairs, of
// 16 texts are a tile. The order in which products read them. False where the set multiplies no
// bf16.
#define VF_DECLARE(level)                                                                    \
  namespace level {                                                                          \
  int64_t contrastive_lse_scratch_floats(int64_t rows, int64_t columns);                     \
  int64_t contrastive_lse_tile_floats();                                                     \
  void contrastive_lse_forward(const LseChunk&, const LseSums&);                             \
  void contrastive_lse_backward(const LseChunk&, const LseGradients&);                       \
  bool contrastive_lse_pack(const uint16_t* y, int64_t texts, int64_t dim, uint16_t* panels, \
                            int threads);                                                    \
  }
VF_LEVELS_CONTRASTIVE_LSE(VF_DECLARE)
#undef VF_DECLARE

#define VF_DECLARE(level)                                                           \
  namespace level {                                                                 \
  void contrastive_lse_product(const LseProduct&);                                  \
  int64_t contrastive_lse_product_scratch(int64_t depth, int64_t dim, int threads); \
  }
VF_LEVELS_CONTRASTIVE_LSE_GRADIENT(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vatt_fast
