// What every binding needs. Memory arrives as integers; arguments are keywords, so that a caller
// who says something else than a binding gets a TypeError that names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "levels.h"

namespace vatt_fast {

namespace py = pybind11;
using namespace py::literals;

using Released = py::call_guard<py::gil_scoped_release>;

using Address = std::uintptr_t;  // of a tensor's memory; 0: there is none

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A static one in each file of bindings: the module calls them all when it is loaded.
struct Bindings {
  using Bind = void (*)(py::module_&);

  explicit Bindings(Bind bind) : bind(bind), next(first()) { first() = this; }

  static const Bindings*& first() {
    static const Bindings* head = nullptr;
    return head;
  }

  const Bind bind;
  const Bindings* const next;
};

// Kernels as one instruction set has them. A file's versions are made of VF_LEVELS_<source>, lowest
// first.
template <typename Kernels>
struct Version {
  Level level;
  Kernels kernels;
};

// Those of the highest instruction set not above the one in use.
template <typename Kernels>
const Kernels& best(const std::initializer_list<Version<Kernels>>& versions) {
  const Kernels* found = nullptr;
  for (const Version<Kernels>& version : versions)
    if (version.level <= current_level()) found = &version.kernels;
  if (!found)
    throw std::logic_error(std::string("there is no such kernel at level ") +
                           level_names[static_cast<int>(current_level())]);
  return *found;
}

// Indices (lines, K) are read before anything else is: a wrong one would reach foreign memory.
inline void check_keep(const int64_t* keep, int64_t lines, int64_t K, int64_t limit,
                       const char* what) {
  if (keep == nullptr) return;
  for (int64_t i = 0; i < lines * K; ++i)
    if (keep[i] < 0 || keep[i] >= limit)
      throw py::index_error("keep has the index " + std::to_string(keep[i]) + "; there are " +
                            std::to_string(limit) + " " + what);
}

}  // namespace vatt_fast
