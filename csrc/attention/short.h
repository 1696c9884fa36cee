// The entry points of short.cpp, one set for each instruction set, and what they take. fp32
// tensors. B batch, T queries, S keys, H heads, D head_dim
#pragma once

#include <stdint.h>

#include "levels.h"

namespace vatt_fast {

// An fp32 (B, rows, H, D) tensor with a contiguous last axis; strides in elements.
struct FloatHeads {
  const float* data;
  int64_t batch, row, head;
};

struct ShortAttention {
  int64_t batch, queries, keys, heads, head_dim;
  float scale;
  bool causal;  // a query attends its own position's key and earlier ones; T = S
  int threads;
  FloatHeads q, k, v;
  const uint8_t* key_mask;  // (B, S) contiguous bool, or null
  const float* bias;        // (H, S, bias_row) contiguous, anything beyond T; or null
  int64_t bias_row;         // T filled up to a multiple of 16
  float* scratch;           // short_attention_floats(...) for each thread
};

struct ShortGradients {
  FloatHeads d_out;
  const float *lse, *d_lse;  // (B, H, T) contiguous; d_lse may be null
  float *d_q, *d_k, *d_v;    // (B, T, H, D), (B, S, H, D) twice, contiguous
  float* d_bias;   // (groups, H, S, bias_row) contiguous: each group's sum over its clips, anything
                   // beyond T; or null
  int64_t groups;  // of clips, as even as they come, whatever the number of threads
};

// out (B, T, H, D) and lse (B, H, T) are contiguous
#define VF_DECLARE(level)                                                          \
  namespace level {                                                                \
  int64_t short_attention_floats(int64_t queries, int64_t keys, int64_t head_dim); \
  void short_attention_forward(const ShortAttention&, float* out, float* lse);     \
  void short_attention_backward(const ShortAttention&, const ShortGradients&);     \
  }
VF_LEVELS_ATTENTION_SHORT(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vatt_fast
