// The Python module. It takes addresses, sizes and a thread count and knows no tensors: the caller
// owns the memory and has checked everything. Each op's functions are in a file of their own here,
// which registers itself (Bindings).
#include "binding.h"
#include "interface.h"

namespace vatt_fast {
namespace {

const char* name_of(Level level) { return level_names[static_cast<int>(level)]; }

void hold_to_named(const std::string& name) {
  std::string names;
  for (const char* each : level_names) names += std::string(names.empty() ? "" : ", ") + each;
  for (int i = 0; i < num_levels; ++i) {
    if (name != level_names[i]) continue;
    if (!hold_to(static_cast<Level>(i)))
      throw std::invalid_argument("this machine has " + std::string(name_of(available().level)) +
                                  " at most: " + available().missing);
    return;
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; there are " + names);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("INTERFACE") = VF_INTERFACE;  // a digest of these files (kernels/native_interface.py)
  m.def("available", [] { return name_of(available().level); });
  m.def("missing", [] { return available().missing; });
  m.def("level", [] { return name_of(current_level()); });
  m.def("hold_to", &hold_to_named);
  for (const Bindings* each = Bindings::first(); each; each = each->next) each->bind(m);
}

}  // namespace vatt_fast
