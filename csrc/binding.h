// What every bind_<op>.cpp needs: memory arrives as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace vatt_fast {

using Address = std::uintptr_t;  // of a tensor's memory; 0: there is none

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Indices (lines, K) are read before anything else is: a wrong one would reach foreign memory.
inline void check_keep(const int64_t* keep, int64_t lines, int64_t K, int64_t limit, const char* what) {
  if (keep == nullptr) return;
  for (int64_t i = 0; i < lines * K; ++i)
    if (keep[i] < 0 || keep[i] >= limit)
      throw pybind11::index_error("keep has the index " + std::to_string(keep[i]) + "; there are " + std::to_string(limit) + " " + what);
}

}  // namespace vatt_fast
