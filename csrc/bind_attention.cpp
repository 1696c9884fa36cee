// Python's entry to csrc/attention.cpp.
#include <tuple>

#include "attention.h"
#include "binding.h"
#include "isa.h"

namespace py = pybind11;

namespace vatt_fast {

#if defined(VF_X86)
namespace {

using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;         // memory with strides of batch, row and head, in elements
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, T, S, H, head_dim

Heads heads(const Strided& x) { return {at<const uint16_t>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

AttentionShape shape_of(const Shape& s, float scale, int threads) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s), scale, threads};
}

}  // namespace

// Callers see to it that current_level() is amx_bf16.
void bind_attention(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("attention_scratch", [](const Shape& shape, int threads, bool backward) {
    const AttentionShape s = shape_of(shape, 0, threads);
    return backward ? amx_bf16::attention_backward_scratch(s) : amx_bf16::attention_forward_scratch(s);
  });
  m.def(
      "attention_forward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, Address key_mask, Address bias,
         Address out, Address lse, Address scratch) {
        amx_bf16::attention_forward({shape_of(shape, scale, threads), heads(q), heads(k), heads(v), at<const uint8_t>(key_mask),
                                     at<const float>(bias), at<uint16_t>(out), at<float>(lse), at<uint8_t>(scratch)});
      },
      Released());
  m.def(
      "attention_backward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, const Strided& out,
         const Strided& d_out, Address key_mask, Address bias, Address lse, Address d_lse, Address d_q, Address d_k, Address d_v,
         Address d_bias, Address scratch) {
        amx_bf16::attention_backward({shape_of(shape, scale, threads), heads(q), heads(k), heads(v), heads(out), heads(d_out),
                                      at<const uint8_t>(key_mask), at<const float>(bias), at<const float>(lse), at<const float>(d_lse),
                                      at<uint16_t>(d_q), at<uint16_t>(d_k), at<uint16_t>(d_v), at<float>(d_bias), at<uint8_t>(scratch)});
      },
      Released());
}
#else
void bind_attention(py::module_&) {}
#endif

}  // namespace vatt_fast
