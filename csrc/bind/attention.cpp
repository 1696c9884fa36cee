// Python's entry to attention/forward.cpp and attention/backward.cpp: bf16.
#include "attention/attention.h"

#include <tuple>

#include "binding.h"

namespace vatt_fast {
namespace {

// Memory with strides of batch, row and head, in elements.
using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;
// B, T, S, H, head_dim
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

struct ForwardKernels {
  int64_t (*scratch)(const AttentionShape&);
  void (*run)(const AttentionForward&);
};

struct BackwardKernels {
  int64_t (*scratch)(const AttentionShape&);
  void (*run)(const AttentionBackward&);
};

#define VERSION(level) {Level::level, {level::attention_forward_scratch, level::attention_forward}},
const std::initializer_list<Version<ForwardKernels>> forwards = {
    VF_LEVELS_ATTENTION_FORWARD(VERSION)};
#undef VERSION

#define VERSION(level) \
  {Level::level, {level::attention_backward_scratch, level::attention_backward}},
const std::initializer_list<Version<BackwardKernels>> backwards = {
    VF_LEVELS_ATTENTION_BACKWARD(VERSION)};
#undef VERSION

Heads heads(const Strided& x) {
  const auto [data, batch, row, head] = x;
  return {.data = at<const uint16_t>(data), .batch = batch, .row = row, .head = head};
}

AttentionShape shape_of(const Shape& shape, float scale, bool causal, int threads) {
  const auto [B, T, S, H, D] = shape;
  return {.batch = B,
          .queries = T,
          .keys = S,
          .heads = H,
          .head_dim = D,
          .scale = scale,
          .causal = causal,
          .threads = threads};
}

int64_t scratch(const Shape& shape, int threads, bool backward) {
  const AttentionShape sizes = shape_of(shape, 0, false, threads);
  return backward ? best(backwards).scratch(sizes) : best(forwards).scratch(sizes);
}

void forward(const Shape& shape, float scale, bool causal, int threads, const Strided& q,
             const Strided& k, const Strided& v, Address key_mask, Address bias, Address out,
             Address lse, Address scratch) {
  best(forwards).run({.shape = shape_of(shape, scale, causal, threads),
                      .q = heads(q),
                      .k = heads(k),
                      .v = heads(v),
                      .key_mask = at<const uint8_t>(key_mask),
                      .bias = at<const float>(bias),
                      .out = at<uint16_t>(out),
                      .lse = at<float>(lse),
                      .scratch = at<uint8_t>(scratch)});
}

void backward(const Shape& shape, float scale, bool causal, int threads, const Strided& q,
              const Strided& k, const Strided& v, const Strided& out, const Strided& d_out,
              Address key_mask, Address bias, Address lse, Address d_lse, Address d_q, Address d_k,
              Address d_v, Address d_bias, Address scratch) {
  best(backwards).run({.shape = shape_of(shape, scale, causal, threads),
                       .q = heads(q),
                       .k = heads(k),
                       .v = heads(v),
                       .out = heads(out),
                       .d_out = heads(d_out),
                       .key_mask = at<const uint8_t>(key_mask),
                       .bias = at<const float>(bias),
                       .lse = at<const float>(lse),
                       .d_lse = at<const float>(d_lse),
                       .d_q = at<uint16_t>(d_q),
                       .d_k = at<uint16_t>(d_k),
                       .d_v = at<uint16_t>(d_v),
                       .d_bias = at<float>(d_bias),
                       .scratch = at<uint8_t>(scratch)});
}

const Bindings bindings([](py::module_& m) {
  m.def("attention_scratch", &scratch, py::kw_only(), "shape"_a, "threads"_a, "backward"_a);
  m.def("attention_forward", &forward, Released(), py::kw_only(), "shape"_a, "scale"_a, "causal"_a,
        "threads"_a, "q"_a, "k"_a, "v"_a, "key_mask"_a, "bias"_a, "out"_a, "lse"_a, "scratch"_a);
  m.def("attention_backward", &backward, Released(), py::kw_only(), "shape"_a, "scale"_a,
        "causal"_a, "threads"_a, "q"_a, "k"_a, "v"_a, "out"_a, "d_out"_a, "key_mask"_a, "bias"_a,
        "lse"_a, "d_lse"_a, "d_q"_a, "d_k"_a, "d_v"_a, "d_bias"_a, "scratch"_a);
});

}  // namespace
}  // namespace vatt_fast
