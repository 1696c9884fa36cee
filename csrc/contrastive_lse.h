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
  // (R, stride), and the backward leaves scale * d loss / d scores in their place; or room for a
  // tile a thread: contrastive_lse_tile_floats()
  float* products;
  // of products or weights: at least C rounded up to 32; what lies beyond C is of no consequence
  int64_t stride;
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
  uint16_t* weights;  // (R, stride) bf16: where the backward leaves scale * d loss / d scores
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

// contrastive_lse_pack: y (texts, dim) bf16, multiples of 16 and 32 -> panels of 16 texts, each
// (dim / 2, 16, 2), the order in which products read them. False where the set multiplies no bf16.
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

}  // namespace vatt_fast
