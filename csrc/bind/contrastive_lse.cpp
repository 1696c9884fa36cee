// Python's entry to contrastive_lse.cpp and contrastive_lse_gradient.cpp. What a chunk's calls have
// in common is an object of its own.
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

struct Products {
  void (*product)(const LseProduct&);
  int64_t (*scratch)(int64_t depth, int64_t dim, int threads);
};

#define VERSION(level) \
  {Level::level, {level::contrastive_lse_product, level::contrastive_lse_product_scratch}},
const std::initializer_list<Version<Products>> products = {
    VF_LEVELS_CONTRASTIVE_LSE_GRADIENT(VERSION)};
#undef VERSION

LseChunk chunk_of(Address products, int64_t products_stride, int64_t rows, int64_t columns,
                  Address x_counts, Address y_counts, int64_t first_own, int64_t texts_per_clip,
                  float scale, bool running, int threads, Address x, Address y_panels, int64_t dim,
                  Address weights, int64_t stride, bool bf16_weights) {
  return {.products = at<float>(products),
          .products_stride = products_stride,
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
          .weights = at(weights),
          .stride = stride,
          .bf16_weights = bf16_weights};
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

void product(Address weights, int64_t stride, bool transposed, int64_t rows, int64_t depth,
             Address vectors, int64_t vectors_stride, int64_t dim, Address sums,
             int64_t sums_stride, bool bf16_sums, bool grows, Address scratch, int threads) {
  best(products).product({.weights = at<const uint16_t>(weights),
                          .stride = stride,
                          .transposed = transposed,
                          .rows = rows,
                          .depth = depth,
                          .vectors = at<const uint16_t>(vectors),
                          .vectors_stride = vectors_stride,
                          .dim = dim,
                          .sums = at(sums),
                          .sums_stride = sums_stride,
                          .bf16_sums = bf16_sums,
                          .grows = grows,
                          .scratch = at(scratch),
                          .threads = threads});
}

const Bindings bindings([](py::module_& m) {
  // local: tests load several builds of the module into one process
  py::class_<LseChunk>(m, "ContrastiveLseChunk", py::module_local())
      .def(py::init(&chunk_of), py::kw_only(), "products"_a, "products_stride"_a, "rows"_a,
           "columns"_a, "x_counts"_a, "y_counts"_a, "first_own"_a, "texts_per_clip"_a, "scale"_a,
           "running"_a, "threads"_a, "x"_a, "y_panels"_a, "dim"_a, "weights"_a, "stride"_a,
           "bf16_weights"_a);
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
  m.def("contrastive_lse_product", &product, Released(), py::kw_only(), "weights"_a, "stride"_a,
        "transposed"_a, "rows"_a, "depth"_a, "vectors"_a, "vectors_stride"_a, "dim"_a, "sums"_a,
        "sums_stride"_a, "bf16_sums"_a, "grows"_a, "scratch"_a, "threads"_a);
  m.def(
      "contrastive_lse_product_scratch",
      [](int64_t depth, int64_t dim, int threads) {
        return best(products).scratch(depth, dim, threads);
      },
      py::kw_only(), "depth"_a, "dim"_a, "threads"_a);
});

}  // namespace
}  // namespace vatt_fast
