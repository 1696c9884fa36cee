// Python's entry to csrc/contrastive_lse.cpp.
#include <stdexcept>

#include "binding.h"
#include "isa.h"
#include "contrastive_lse.h"

namespace py = pybind11;

namespace vatt_fast {

namespace {

struct Kernels {
  int64_t (*scratch_floats)(int64_t rows, int64_t columns);
  void (*forward)(const NceChunk&, const NceSums&);
  void (*backward)(const NceChunk&, const NceGradients&);
  void (*pack)(const uint16_t* y, int64_t texts, int64_t dim, uint16_t* panels, int threads);  // of those that multiply bf16
};

Kernels kernels() {
#if defined(VF_X86)
  if (current_level() >= Level::amx_bf16) return {amx_bf16::nce_scratch_floats, amx_bf16::nce_forward, amx_bf16::nce_backward, amx_bf16::nce_pack};
  if (current_level() >= Level::avx512_bf16)
    return {avx512_bf16::nce_scratch_floats, avx512_bf16::nce_forward, avx512_bf16::nce_backward, avx512_bf16::nce_pack};
  if (current_level() >= Level::avx512) return {avx512::nce_scratch_floats, avx512::nce_forward, avx512::nce_backward, nullptr};
  if (current_level() >= Level::avx2) return {avx2::nce_scratch_floats, avx2::nce_forward, avx2::nce_backward, nullptr};
#endif
  return {base::nce_scratch_floats, base::nce_forward, base::nce_backward, nullptr};
}

// The chunk's part of every call's arguments.
NceChunk chunk(Address products, int64_t stride, int64_t rows, int64_t columns, Address x_counts, Address y_counts, int64_t first_own,
               int64_t texts_per_clip, float scale, bool running, int threads, Address x, Address y_panels, int64_t dim, Address weights) {
  return {at<float>(products), stride, rows, columns, at<const uint8_t>(x_counts), at<const int32_t>(y_counts), first_own,
          texts_per_clip, scale, running, threads, at<const uint16_t>(x), at<const uint16_t>(y_panels), dim, at<uint16_t>(weights)};
}

void forward(Address products, int64_t stride, int64_t rows, int64_t columns, Address x_counts, Address y_counts, int64_t first_own,
             int64_t texts_per_clip, float scale, bool running, int threads, Address x, Address y_panels, int64_t dim, Address weights, Address row, Address col, Address pos, Address row_peak,
             Address col_peak, Address pos_peak, Address scratch) {
  kernels().forward(
      chunk(products, stride, rows, columns, x_counts, y_counts, first_own, texts_per_clip, scale, running, threads, x, y_panels, dim, weights),
      {at<double>(row), at<double>(col), at<double>(pos), at<float>(row_peak), at<float>(col_peak), at<float>(pos_peak), at<float>(scratch)});
}

void backward(Address products, int64_t stride, int64_t rows, int64_t columns, Address x_counts, Address y_counts, int64_t first_own,
              int64_t texts_per_clip, float scale, bool running, int threads, Address x, Address y_panels, int64_t dim, Address weights, Address row, Address col, Address pos, Address row_lse,
              Address col_lse, Address pos_lse, Address d_scale, Address scratch) {
  kernels().backward(chunk(products, stride, rows, columns, x_counts, y_counts, first_own, texts_per_clip, scale, running, threads, x, y_panels, dim, weights),
                     {at<const float>(row), at<const float>(col), at<const float>(pos), at<const float>(row_lse), at<const float>(col_lse),
                      at<const float>(pos_lse), at<double>(d_scale), at<float>(scratch)});
}

}  // namespace

void bind_nce(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("nce_scratch_floats", [](int64_t rows, int64_t columns) { return kernels().scratch_floats(rows, columns); });
  m.def("nce_tile_floats", &base::nce_tile_floats);
  m.def(
      "nce_pack",
      [](Address y, int64_t texts, int64_t dim, Address panels, int threads) {
        if (!kernels().pack) throw std::logic_error("this instruction set multiplies no bf16");
        kernels().pack(at<const uint16_t>(y), texts, dim, at<uint16_t>(panels), threads);
      },
      Released());
  m.def("nce_forward", &forward, Released());
  m.def("nce_backward", &backward, Released());
}

}  // namespace vatt_fast
