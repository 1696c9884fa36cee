// Scratch memory in pieces. Compiled in namespace VF_LEVEL.
#pragma once

#include <stdint.h>

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// Pieces begin on cache lines of their own. From address 0 on, `next` is what all of them take;
// memory that begins anywhere must be 64 bytes larger.
struct Pieces {
  uintptr_t next;

  template <typename T>
  T* take(int64_t count) {
    next = (next + 63) / 64 * 64;
    T* piece = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(count) * sizeof(T);
    return piece;
  }
};

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
