// Arithmetic on sizes. Compiled in namespace VF_LEVEL, each instruction set for itself.
#pragma once

#include <stdint.h>

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
