// Python's entry to csrc/attention.cpp and csrc/short_attention.cpp.
#include <tuple>

#include "attention.h"
#include "binding.h"
#include "isa.h"
#include "short_attention.h"

namespace py = pybind11;

namespace vatt_fast {

#if defined(VF_X86)
namespace {

using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;         // memory with strides of batch, row and head, in elements
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, T, S, H, head_dim
using Released = py::call_guard<py::gil_scoped_release>;

// -- few tokens, fp32; callers see to it that current_level() is avx2 at least ------------------------------------------

struct ShortKernels {
  int64_t (*floats)(int64_t queries, int64_t keys, int64_t head_dim);
  void (*forward)(const ShortAttention&, float* out, float* lse);
  void (*backward)(const ShortAttention&, const ShortGradients&);
};

ShortKernels short_kernels() {
  if (current_level() >= Level::avx512) return {avx512::short_attention_floats, avx512::short_attention_forward, avx512::short_attention_backward};
  return {avx2::short_attention_floats, avx2::short_attention_forward, avx2::short_attention_backward};
}

FloatHeads float_heads(const Strided& x) { return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

ShortAttention short_attention(const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v,
                               Address key_mask, Address bias, int64_t bias_row, Address scratch) {
  const auto [B, T, S, H, D] = shape;
  return {B, T, S, H, D, scale, threads, float_heads(q), float_heads(k), float_heads(v), at<const uint8_t>(key_mask), at<const float>(bias),
          bias_row, at<float>(scratch)};
}

void bind_few_tokens(py::module_& m) {
  m.def("short_attention_floats", [](const Shape& s) { return short_kernels().floats(std::get<1>(s), std::get<2>(s), std::get<4>(s)); });
  m.def(
      "short_attention_forward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, Address key_mask, Address bias,
         int64_t bias_row, Address scratch, Address out, Address lse) {
        short_kernels().forward(short_attention(shape, scale, threads, q, k, v, key_mask, bias, bias_row, scratch), at<float>(out), at<float>(lse));
      },
      Released());
  m.def(
      "short_attention_backward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, Address key_mask, Address bias,
         int64_t bias_row, Address scratch, const Strided& d_out, Address lse, Address d_lse, Address d_q, Address d_k, Address d_v,
         Address d_bias, int64_t groups) {
        short_kernels().backward(short_attention(shape, scale, threads, q, k, v, key_mask, bias, bias_row, scratch),
                                 {float_heads(d_out), at<const float>(lse), at<const float>(d_lse), at<float>(d_q),
                                  at<float>(d_k), at<float>(d_v), at<float>(d_bias), groups});
      },
      Released());
}

// -- bf16; callers see to it that current_level() is avx512_bf16 at least -----------------------------------------------

struct Bf16Kernels {
  int64_t (*forward_scratch)(const AttentionShape&);
  void (*forward)(const AttentionForward&);
  int64_t (*backward_scratch)(const AttentionShape&);
  void (*backward)(const AttentionBackward&);
};

Bf16Kernels bf16_kernels() {
  if (current_level() >= Level::amx_bf16)
    return {amx_bf16::attention_forward_scratch, amx_bf16::attention_forward, amx_bf16::attention_backward_scratch, amx_bf16::attention_backward};
  return {avx512_bf16::attention_forward_scratch, avx512_bf16::attention_forward, avx512_bf16::attention_backward_scratch,
          avx512_bf16::attention_backward};
}

Heads heads(const Strided& x) { return {at<const uint16_t>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

AttentionShape shape_of(const Shape& shape, float scale, int threads) {
  const auto [B, T, S, H, D] = shape;
  return {B, T, S, H, D, scale, threads};
}

void bind_bf16(py::module_& m) {
  m.def("attention_scratch", [](const Shape& shape, int threads, bool backward) {
    const AttentionShape s = shape_of(shape, 0, threads);
    return backward ? bf16_kernels().backward_scratch(s) : bf16_kernels().forward_scratch(s);
  });
  m.def(
      "attention_forward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, Address key_mask, Address bias,
         Address out, Address lse, Address scratch) {
        bf16_kernels().forward({shape_of(shape, scale, threads), heads(q), heads(k), heads(v), at<const uint8_t>(key_mask),
                                at<const float>(bias), at<uint16_t>(out), at<float>(lse), at<uint8_t>(scratch)});
      },
      Released());
  m.def(
      "attention_backward",
      [](const Shape& shape, float scale, int threads, const Strided& q, const Strided& k, const Strided& v, const Strided& out,
         const Strided& d_out, Address key_mask, Address bias, Address lse, Address d_lse, Address d_q, Address d_k, Address d_v,
         Address d_bias, Address scratch) {
        bf16_kernels().backward({shape_of(shape, scale, threads), heads(q), heads(k), heads(v), heads(out), heads(d_out),
                                 at<const uint8_t>(key_mask), at<const float>(bias), at<const float>(lse), at<const float>(d_lse),
                                 at<uint16_t>(d_q), at<uint16_t>(d_k), at<uint16_t>(d_v), at<float>(d_bias), at<uint8_t>(scratch)});
      },
      Released());
}

}  // namespace

void bind_attention(py::module_& m) {
  bind_few_tokens(m);
  bind_bf16(m);
}
#else
void bind_attention(py::module_&) {}
#endif

}  // namespace vatt_fast
