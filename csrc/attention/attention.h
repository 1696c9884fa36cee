// The entry points of forward.cpp and backward.cpp, one set for each instruction set, and what they
// take. bf16 tensors, fp32 statistics. B batch, T queries, S keys, H heads, D head_dim
#pragma once

#include <stdint.h>

#include "levels.h"

namespace vatt_fast {

// A bf16 (B, rows, H, D) tensor with a contiguous last axis; strides in elements.
struct Heads {
  const uint16_t* data;
  int64_t batch, row, head;
};

struct AttentionShape {
  int64_t batch, queries, keys, heads, head_dim;  // head_dim up to 128
  float scale;
  bool causal;  // a query attends its own position's key and earlier ones; T = S
  int threads;
};

struct AttentionForward {
  AttentionShape shape;
  Heads q, k, v;
  const uint8_t* key_mask;  // (B, S) contiguous bool, or null
  const float* bias;        // (H, T, S) contiguous, or null
  uint16_t* out;            // (B, T, H, D) contiguous
  float* lse;               // (B, H, T) contiguous
  uint8_t* scratch;         // attention_forward_scratch(shape) bytes on a multiple of 64
};

struct AttentionBackward {
  AttentionShape shape;
  Heads q, k, v, out, d_out;
  const uint8_t* key_mask;
  const float* bias;          // (H, S, T) contiguous: transposed; or null
  const float *lse, *d_lse;   // (B, H, T) contiguous; d_lse may be null
  uint16_t *d_q, *d_k, *d_v;  // (B, T, H, D), (B, S, H, D) twice, contiguous
  float* d_bias;              // (H, S, T) contiguous, zeros coming in; or null
  uint8_t* scratch;           // attention_backward_scratch(shape) bytes on a multiple of 64
};

#define VF_DECLARE(level)                                   \
  namespace level {                                         \
  int64_t attention_forward_scratch(const AttentionShape&); \
  void attention_forward(const AttentionForward&);          \
  }
VF_LEVELS_ATTENTION_FORWARD(VF_DECLARE)
#undef VF_DECLARE

#define VF_DECLARE(level)                                    \
  namespace level {                                          \
  int64_t attention_backward_scratch(const AttentionShape&); \
  void attention_backward(const AttentionBackward&);         \
  }
VF_LEVELS_ATTENTION_BACKWARD(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vatt_fast
