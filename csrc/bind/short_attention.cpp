// Python's entry to attention/short.cpp: few tokens, fp32.
#include <tuple>

#include "attention/short.h"
#include "binding.h"

namespace vatt_fast {
namespace {

// Memory with strides of batch, row and head, in elements.
using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;
// B, T, S, H, head_dim
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

struct Kernels {
  int64_t (*floats)(int64_t queries, int64_t keys, int64_t head_dim);
  void (*forward)(const ShortAttention&, float* out, float* lse);
  void (*backward)(const ShortAttention&, const ShortGradients&);
};

#define VERSION(level)                                             \
  {Level::level,                                                   \
   {level::short_attention_floats, level::short_attention_forward, \
    level::short_attention_backward}},
const std::initializer_list<Version<Kernels>> versions = {VF_LEVELS_ATTENTION_SHORT(VERSION)};
#undef VERSION

FloatHeads heads(const Strided& x) {
  const auto [data, batch, row, head] = x;
  return {.data = at<const float>(data), .batch = batch, .row = row, .head = head};
}

ShortAttention arguments(const Shape& shape, float scale, bool causal, int threads,
                         const Strided& q, const Strided& k, const Strided& v, Address key_mask,
                         Address bias, int64_t bias_row, Address scratch) {
  const auto [B, T, S, H, D] = shape;
  return {.batch = B,
          .queries = T,
          .keys = S,
          .heads = H,
          .head_dim = D,
          .scale = scale,
          .causal = causal,
          .threads = threads,
          .q = heads(q),
          .k = heads(k),
          .v = heads(v),
          .key_mask = at<const uint8_t>(key_mask),
          .bias = at<const float>(bias),
          .bias_row = bias_row,
          .scratch = at<float>(scratch)};
}

int64_t floats(const Shape& shape) {
  const auto [B, T, S, H, D] = shape;
  return best(versions).floats(T, S, D);
}

void forward(const Shape& shape, float scale, bool causal, int threads, const Strided& q,
             const Strided& k, const Strided& v, Address key_mask, Address bias, int64_t bias_row,
             Address scratch, Address out, Address lse) {
  best(versions).forward(
      arguments(shape, scale, causal, threads, q, k, v, key_mask, bias, bias_row, scratch),
      at<float>(out), at<float>(lse));
}

void backward(const Shape& shape, float scale, bool causal, int threads, const Strided& q,
              const Strided& k, const Strided& v, Address key_mask, Address bias, int64_t bias_row,
              Address scratch, const Strided& d_out, Address lse, Address d_lse, Address d_q,
              Address d_k, Address d_v, Address d_bias, int64_t groups) {
  best(versions).backward(
      arguments(shape, scale, causal, threads, q, k, v, key_mask, bias, bias_row, scratch),
      {.d_out = heads(d_out),
       .lse = at<const float>(lse),
       .d_lse = at<const float>(d_lse),
       .d_q = at<float>(d_q),
       .d_k = at<float>(d_k),
       .d_v = at<float>(d_v),
       .d_bias = at<float>(d_bias),
       .groups = groups});
}

const Bindings bindings([](py::module_& m) {
  m.def("short_attention_floats", &floats, py::kw_only(), "shape"_a);
  m.def("short_attention_forward", &forward, Released(), py::kw_only(), "shape"_a, "scale"_a,
        "causal"_a, "threads"_a, "q"_a, "k"_a, "v"_a, "key_mask"_a, "bias"_a, "bias_row"_a,
        "scratch"_a, "out"_a, "lse"_a);
  m.def("short_attention_backward", &backward, Released(), py::kw_only(), "shape"_a, "scale"_a,
        "causal"_a, "threads"_a, "q"_a, "k"_a, "v"_a, "key_mask"_a, "bias"_a, "bias_row"_a,
        "scratch"_a, "d_out"_a, "lse"_a, "d_lse"_a, "d_q"_a, "d_k"_a, "d_v"_a, "d_bias"_a,
        "groups"_a);
});

}  // namespace
}  // namespace vatt_fast
