// The Python module: takes addresses, sizes and a thread count; knows no tensors. Whoever calls owns the memory and has checked everything.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"

namespace py = pybind11;

namespace vatt_fast {

// each in its own bind_<op>.cpp
void bind_attention(py::module_& m);
void bind_drop_token(py::module_& m);
void bind_nce(py::module_& m);
void bind_patch_embed(py::module_& m);

namespace {

const char* name_of(Level level) { return level_names[static_cast<int>(level)]; }

void hold_to_named(const std::string& name) {
  for (Level each : {Level::base, Level::avx2, Level::avx512, Level::avx512_bf16, Level::amx_bf16}) {
    if (name != name_of(each)) continue;
    if (!hold_to(each))
      throw std::invalid_argument("this machine has " + std::string(name_of(available().level)) + " at most: " + available().missing);
    return;
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; there are base, avx2, avx512, avx512_bf16 and amx_bf16");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("INTERFACE") = 4;  // kernels/native.py has the same
  m.def("available", [] { return name_of(available().level); });
  m.def("missing", [] { return available().missing; });
  m.def("level", [] { return name_of(current_level()); });
  m.def("hold_to", &hold_to_named);
  bind_attention(m);
  bind_drop_token(m);
  bind_nce(m);
  bind_patch_embed(m);
}

}  // namespace vatt_fast
