// What the bf16 forward and backward share: steps of keys, which keys are visible, working memory.
// Compiled in namespace VF_LEVEL.
//
// B batch, T queries, S keys, H heads, D head_dim, width: D rounded up to 32, depth = width / 32
#pragma once

#include "attention.h"
#include "common/bf16_panels.h"
#include "common/sizes.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int STEP = 64;  // keys that one softmax step takes

inline int64_t units_of(int64_t rows) { return ceil_div(rows, UNIT); }
inline int64_t steps_of(int64_t keys) { return ceil_div(keys, STEP); }

// Memory handed out in pieces on cache-line borders; with no base it only counts.
struct Arena {
  uint8_t* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

inline const uint16_t* head_of(const Heads& x, int64_t b, int64_t h) {
  return x.data + b * x.batch + h * x.head;
}

// One bit a key: whether it is attended; none beyond S.
inline void mark_visible(const uint8_t* mask, int64_t keys, uint64_t* visible) {
  for (int64_t word = 0; word < steps_of(keys); word++) {
    uint64_t bits = 0;
    for (int64_t key = word * 64; key < minimum(keys, word * 64 + 64); key++)
      bits |= uint64_t(!mask || mask[key]) << key % 64;
    visible[word] = bits;
  }
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
