// Python's entry to contrastive_lse.cpp. What a chunk's calls have in common is an object of its
// own.
#include "contrastive_lse.h"

#include "binding.h"

namespace vatt_fast {
namespace {

struct Kernels {
  int64_t (*scratch_floats)(int64_t rows, int64_t columns);
  int64_t (*tile_floats)();
  void (*forward)(const LseChunk&, const LseSums&);
  void (*backward)(const LseChunk&, const LseGradients&);
  bool (*pack)(const uint16_t* y, int64_t texts, int64_t dim, uint16_t* panels, int threads);
};

#define VERSION(level)                                                         \
  {Level::level,                                                               \
   {level::contrastive_lse_scratch_floats, level::contrastive_lse_tile_floats, \
    level::contrastive_lse_forward, level::contrastive_lse_backward,           \
    level::contrastive_lse_pack}},
const std::initializer_list<Version<Kernels>> versions = {VF_LEVELS_CONTRASTIVE_LSE(VERSION)};
#undef VERSION

LseChunk chunk_of(Address products, int64_t stride, int64_t rows, int64_t columns, Address x_counts,
                  Address y_counts, int64_t first_own, int64_t texts_per_clip, float scale,
                  bool running, int threads, Address x, Address y_panels, int64_t dim,
                  Address weights) {
  return {.products = at<float>(products),
          .stride = stride,
          .rows = rows,
          .columns = columns,
          .x_counts = at<const uint8_t>(x_counts),
          .y_counts = at<const int32_t>(y_counts),
          .first_own = first_own,
          .texts_per_clip = texts_per_clip,
          .scale = scale,
          .running = running,
          .threads = threads,
          .x = at<const uint16_t>(x),
          .y_panels = at<const uint16_t>(y_panels),
          .dim = dim,
          .weights = at<uint16_t>(weights)};
}

void forward(const LseChunk& chunk, Address row, Address col, Address pos, Address row_peak,
             Address col_peak, Address pos_peak, Address scratch) {
  best(versions).forward(chunk, {.row = at<double>(row),
                                 .col = at<double>(col),
                                 .pos = at<double>(pos),
                                 .row_peak = at<float>(row_peak),
                                 .col_peak = at<float>(col_peak),
                                 .pos_peak = at<float>(pos_peak),
                                 .scratch = at<float>(scratch)});
}

void backward(const LseChunk& chunk, Address row, Address col, Address pos, Address row_lse,
              Address col_lse, Address pos_lse, Address d_scale, Address scratch) {
  best(versions).backward(chunk, {.row = at<const float>(row),
                                  .col = at<const float>(col),
                                  .pos = at<const float>(pos),
                                  .row_lse = at<const float>(row_lse),
                                  .col_lse = at<const float>(col_lse),
                                  .pos_lse = at<const float>(pos_lse),
                                  .d_scale = at<double>(d_scale),
                                  .scratch = at<float>(scratch)});
}

void pack(Address y, int64_t texts, int64_t dim, Address panels, int threads) {
  if (!best(versions).pack(at<const uint16_t>(y), texts, dim, at<uint16_t>(panels), threads))
    throw std::logic_error("this instruction set multiplies no bf16");
}

const Bindings bindings([](py::module_& m) {
  // local: tests load several builds of the module into one process
  py::class_<LseChunk>(m, "ContrastiveLseChunk", py::module_local())
      .def(py::init(&chunk_of), py::kw_only(), "products"_a, "stride"_a, "rows"_a, "columns"_a,
           "x_counts"_a, "y_counts"_a, "first_own"_a, "texts_per_clip"_a, "scale"_a, "running"_a,
           "threads"_a, "x"_a, "y_panels"_a, "dim"_a, "weights"_a);
  m.def(
      "contrastive_lse_scratch_floats",
      [](int64_t rows, int64_t columns) { return best(versions).scratch_floats(rows, columns); },
      py::kw_only(), "rows"_a, "columns"_a);
  m.def("contrastive_lse_tile_floats", [] { return best(versions).tile_floats(); });
  m.def("contrastive_lse_pack", &pack, Released(), py::kw_only(), "y"_a, "texts"_a, "dim"_a,
        "panels"_a, "threads"_a);
  m.def("contrastive_lse_forward", &forward, Released(), py::kw_only(), "chunk"_a, "row"_a, "col"_a,
        "pos"_a, "row_peak"_a, "col_peak"_a, "pos_peak"_a, "scratch"_a);
  m.def("contrastive_lse_backward", &backward, Released(), py::kw_only(), "chunk"_a, "row"_a,
        "col"_a, "pos"_a, "row_lse"_a, "col_lse"_a, "pos_lse"_a, "d_scale"_a, "scratch"_a);
});

}  // namespace
}  // namespace vatt_fast
