// What patch_embed is made of.
// Around products that are the library's, passes over memory. Forward: read_weight, then for every
// chunk of rows pack_patches, product, finish_tokens. Backward: sum_gradients, then for every chunk
// pack_patches, product, finish_weight.
// Where bf16 is multiplied (product.cpp), with our own products. Forward: project_patches.
// Backward: sum_gradients, then for every chunk of rows weigh_patches.
//
// B clips, N patches, K kept, k values a patch; A 1 with AGG, else 0. tokens, their product and
// packed rows have R = B (A + K) rows: AGG first in every clip. Matrices are dense with dim or k
// columns unless a stride is given; strides count elements.
#pragma once

#include <stdint.h>

#include "levels.h"

namespace vatt_fast {

enum class Element { uint8, bf16, fp16, fp32 };

// Where patch n of clip b lies. Its values run over frames, lines, columns and channels of a clip
// (T, H, W, channels); beyond the clip's far end raw values are 0. A waveform is one line of one
// frame; a row of values is a frame of one pixel.
struct Patches {
  const void* data;
  Element element;
  int64_t stride_b, stride_t, stride_h, stride_w, stride_c;
  int64_t T, H, W, frames, lines, columns, channels;
  const int64_t* keep;  // token n of clip b holds patch keep[b * keep_stride + n]; null: patch n
  int64_t keep_stride;  // K, or 0 where all clips share one line
};

struct Rows {  // first .. first + count of R; buffers begin with the first
  int64_t first, count, K, A;
};

struct PackPatches {  // packed = kept rows, uint8 less 128; zeros in AGG's place
  Patches patches;
  void* packed;
  Element element;  // bf16 or fp32
  Rows rows;
  int64_t k;
  int threads;
};

struct ReadWeight {  // copy = weight as the product takes it; whole_bias = bias + factor * its row
                     // sums
  const void* weight;
  Element weight_element;  // bf16 or fp32
  int64_t weight_stride;
  const float* bias;
  void* copy;  // in the other of the two; null: the product takes the weight itself
  float* whole_bias;
  float factor;
  int64_t dim, k;
  int threads;
};

struct FinishTokens {  // tokens = scale * product + bias + position[keep], and AGG; they may share
                       // the product's memory
  const void* product;
  Element product_element;
  void* tokens;
  Element element;
  float scale;
  const float* bias;
  const void* position;  // or null
  Element position_element;
  int64_t position_stride;
  const float* agg;     // null where A = 0
  const int64_t* keep;  // as in Patches
  int64_t keep_stride;
  Rows rows;
  int64_t dim;
  int threads;
};

constexpr int64_t rows_a_part = 32;  // of the sums: fixed, so that the order of summation is

struct SumGradients {  // d_position[p] = sum of d_tokens over the clips that keep p, in order;
                       // d_bias = sum over p; d_agg
  const void* d_tokens;
  Element element;
  const int64_t* keep;  // as in Patches, and null where there is no position: then p counts tokens
  int64_t keep_stride;
  int32_t* inverse;   // (1 or B, rows), scratch: the token that holds a patch; null where keep is
  float* d_position;  // (rows, dim), or null
  float* parts;       // (ceil(rows / rows_a_part), 2, dim), scratch
  float* d_bias;
  float* d_agg;  // null where A = 0
  int64_t B, K, A, dim, rows;
  int threads;
};

struct FinishWeight {  // d_weight = scale * product + factor * d_bias of its row, or grows by scale
                       // * product; they may share memory
  const void* product;
  Element element;
  float* d_weight;
  const float* d_bias;
  float scale, factor;
  bool grows;
  int64_t dim, k;
  int threads;
};

struct ProjectPatches {  // tokens = scale * rows @ weight^T + bias + position[keep], and AGG
  Patches patches;
  Rows rows;  // all of them
  const void* weight;
  Element weight_element;  // bf16 or fp32, which is rounded to bf16
  int64_t weight_stride;
  const float* bias;  // and factor * its row sums of the weight as rounded
  float factor, scale;
  const void* position;  // or null
  Element position_element;
  int64_t position_stride;
  const float* agg;     // null where A = 0
  const int64_t* keep;  // as in Patches
  int64_t keep_stride;
  void* tokens;  // bf16
  int64_t dim, k;
  void* scratch;  // project_scratch() bytes
  int threads;
};

struct WeighPatches {  // d_weight = scale * d_tokens^T @ rows + factor * d_bias of its row, or
                       // grows by scale * d_tokens^T @ rows
  Patches patches;
  Rows rows;
  const void* d_tokens;  // bf16, from the first row
  void* d_weight;
  Element element;  // of d_weight, bf16 or fp32
  const float* d_bias;
  float scale, factor;
  bool grows;
  int64_t dim, k;
  void* scratch;  // weigh_scratch() bytes
  int threads;
};

#define VF_DECLARE(level)                  \
  namespace level {                        \
  void pack_patches(const PackPatches&);   \
  void read_weight(const ReadWeight&);     \
  void finish_tokens(const FinishTokens&); \
  void sum_gradients(const SumGradients&); \
  void finish_weight(const FinishWeight&); \
  }
VF_LEVELS_PATCH_EMBED_PASSES(VF_DECLARE)
#undef VF_DECLARE

#define VF_DECLARE(level)                                                   \
  namespace level {                                                         \
  void project_patches(const ProjectPatches&);                              \
  void weigh_patches(const WeighPatches&);                                  \
  int64_t project_scratch(int64_t dim, int64_t k, int threads);             \
  int64_t weigh_scratch(int64_t rows, int64_t dim, int64_t k, int threads); \
  }
VF_LEVELS_PATCH_EMBED_PRODUCT(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vatt_fast
