// Python's entry to csrc/patch_embed.cpp. Addresses are integers, 0 for null; dtypes are named as in Element.
#include <iterator>
#include <stdexcept>
#include <string>

#include "binding.h"
#include "isa.h"
#include "patch_embed.h"

namespace py = pybind11;

namespace vatt_fast {
namespace {

Element element_of(const std::string& name) {
  if (name == "uint8") return Element::uint8;
  if (name == "bf16") return Element::bf16;
  if (name == "fp16") return Element::fp16;
  if (name == "fp32") return Element::fp32;
  throw std::invalid_argument("unknown element type " + name);
}

int64_t lines_of(int64_t keep_stride, int64_t clips) { return keep_stride ? clips : 1; }

int64_t clips_of(const Rows& rows) { return (rows.first + rows.count - 1) / (rows.A + rows.K) + 1; }

// Runs the highest version of the function that the level in use has.
#if defined(VF_X86)
#define VF_RUN(function, call)                                   \
  do {                                                           \
    py::gil_scoped_release others_may_run;                       \
    if (current_level() >= Level::avx512)                        \
      avx512::function(call);                                    \
    else if (current_level() >= Level::avx2)                     \
      avx2::function(call);                                      \
    else                                                         \
      base::function(call);                                      \
  } while (false)
#else
#define VF_RUN(function, call)             \
  do {                                     \
    py::gil_scoped_release others_may_run; \
    base::function(call);                  \
  } while (false)
#endif

struct Shape {  // where values lie: see Patches
  int64_t stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W, frames, lines, columns, channels;

  explicit Shape(const py::tuple& numbers) {
    int64_t* const fields[] = {&stride_b, &stride_t, &stride_h, &stride_w, &stride_c, &T, &H, &W, &frames, &lines, &columns, &channels};
    if (numbers.size() != std::size(fields)) throw std::invalid_argument("a patch's place takes 12 numbers");
    for (std::size_t i = 0; i < std::size(fields); ++i) *fields[i] = numbers[i].cast<int64_t>();
  }

  int64_t patches() const { return ((T + frames - 1) / frames) * ((H + lines - 1) / lines) * ((W + columns - 1) / columns); }
  int64_t values() const { return frames * lines * columns * channels; }
};

void pack(Address patches, const std::string& element, const py::tuple& place, Address keep, int64_t keep_stride, Address packed,
          const std::string& packed_element, int64_t first, int64_t count, int64_t K, int64_t A, int threads) {
  const Shape s(place);
  PackPatches call = {};
  call.patches = {at(patches), element_of(element), s.stride_b, s.stride_t, s.stride_h, s.stride_w, s.stride_c, s.T, s.H, s.W,
                  s.frames,    s.lines,             s.columns,  s.channels, at<const int64_t>(keep), keep_stride};
  call.packed = at(packed);
  call.element = element_of(packed_element);
  call.rows = {first, count, K, A};
  check_keep(call.patches.keep, lines_of(keep_stride, clips_of(call.rows)), K, s.patches(), "patches");
  call.k = s.values();
  call.threads = threads;
  VF_RUN(pack_patches, call);
}

void weight(Address weight, const std::string& weight_element, int64_t weight_stride, Address bias, Address copy, Address whole_bias,
            float factor, int64_t dim, int64_t k, int threads) {
  ReadWeight call = {};
  call.weight = at(weight);
  call.weight_element = element_of(weight_element);
  call.weight_stride = weight_stride;
  call.bias = at<const float>(bias);
  call.copy = at(copy);
  call.whole_bias = at<float>(whole_bias);
  call.factor = factor;
  call.dim = dim;
  call.k = k;
  call.threads = threads;
  VF_RUN(read_weight, call);
}

void finish(Address product, const std::string& product_element, Address tokens, const std::string& element, float scale, Address bias,
            Address position, const std::string& position_element, int64_t position_stride, int64_t positions, Address agg, Address keep,
            int64_t keep_stride, int64_t first, int64_t count, int64_t K, int64_t dim, int threads) {
  FinishTokens call = {};
  call.product = at(product);
  call.product_element = element_of(product_element);
  call.tokens = at(tokens);
  call.element = element_of(element);
  call.scale = scale;
  call.bias = at<const float>(bias);
  call.position = at(position);
  call.position_element = element_of(position_element);
  call.position_stride = position_stride;
  call.agg = at<const float>(agg);
  call.keep = at<const int64_t>(keep);
  call.keep_stride = keep_stride;
  call.rows = {first, count, K, agg ? 1 : 0};
  if (position) check_keep(call.keep, lines_of(keep_stride, clips_of(call.rows)), K, positions, "patches");
  call.dim = dim;
  call.threads = threads;
  VF_RUN(finish_tokens, call);
}

void sums(Address d_tokens, const std::string& element, Address keep, int64_t keep_stride, Address inverse, Address d_position,
          Address parts, Address d_bias, Address d_agg, int64_t B, int64_t K, int64_t dim, int64_t rows, int threads) {
  check_keep(at<const int64_t>(keep), lines_of(keep_stride, B), K, rows, "patches");
  SumGradients call = {};
  call.d_tokens = at(d_tokens);
  call.element = element_of(element);
  call.keep = at<const int64_t>(keep);
  call.keep_stride = keep_stride;
  call.inverse = at<int32_t>(inverse);
  call.d_position = at<float>(d_position);
  call.parts = at<float>(parts);
  call.d_bias = at<float>(d_bias);
  call.d_agg = at<float>(d_agg);
  call.B = B;
  call.K = K;
  call.A = d_agg ? 1 : 0;
  call.dim = dim;
  call.rows = rows;
  call.threads = threads;
  VF_RUN(sum_gradients, call);
}

void finish_d_weight(Address product, const std::string& element, Address d_weight, Address d_bias, float scale, float factor, bool grows,
                     int64_t dim, int64_t k, int threads) {
  FinishWeight call = {};
  call.product = at(product);
  call.element = element_of(element);
  call.d_weight = at<float>(d_weight);
  call.d_bias = at<const float>(d_bias);
  call.scale = scale;
  call.factor = factor;
  call.grows = grows;
  call.dim = dim;
  call.k = k;
  call.threads = threads;
  VF_RUN(finish_weight, call);
}

}  // namespace

void bind_patch_embed(py::module_& m) {
  m.attr("patch_rows_a_part") = rows_a_part;
  m.def("patch_pack", &pack);
  m.def("patch_weight", &weight);
  m.def("patch_finish", &finish);
  m.def("patch_sums", &sums);
  m.def("patch_finish_weight", &finish_d_weight);
}

}  // namespace vatt_fast
