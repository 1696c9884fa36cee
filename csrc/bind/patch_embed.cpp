// Python's entry to patch_embed/passes.cpp and patch_embed/product.cpp. Dtypes are named as in
// Element.
#include "patch_embed/patch_embed.h"

#include "binding.h"

namespace vatt_fast {
namespace {

struct Kernels {
  void (*pack_patches)(const PackPatches&);
  void (*read_weight)(const ReadWeight&);
  void (*finish_tokens)(const FinishTokens&);
  void (*sum_gradients)(const SumGradients&);
  void (*finish_weight)(const FinishWeight&);
};

#define VERSION(level)                                                                   \
  {Level::level,                                                                         \
   {level::pack_patches, level::read_weight, level::finish_tokens, level::sum_gradients, \
    level::finish_weight}},
const std::initializer_list<Version<Kernels>> versions = {VF_LEVELS_PATCH_EMBED_PASSES(VERSION)};
#undef VERSION

struct Products {
  void (*project)(const ProjectPatches&);
  void (*weigh)(const WeighPatches&);
  int64_t (*project_scratch)(int64_t dim, int64_t k, int threads);
  int64_t (*weigh_scratch)(int64_t rows, int64_t dim, int64_t k, int threads);
};

#define VERSION(level) \
  {Level::level,       \
   {level::project_patches, level::weigh_patches, level::project_scratch, level::weigh_scratch}},
const std::initializer_list<Version<Products>> products = {VF_LEVELS_PATCH_EMBED_PRODUCT(VERSION)};
#undef VERSION

template <typename Call>
void run(void (*Kernels::*kernel)(const Call&), const Call& call) {
  py::gil_scoped_release others_may_run;
  (best(versions).*kernel)(call);
}

Element element_of(const std::string& name) {
  if (name == "uint8") return Element::uint8;
  if (name == "bf16") return Element::bf16;
  if (name == "fp16") return Element::fp16;
  if (name == "fp32") return Element::fp32;
  throw std::invalid_argument("unknown element type " + name);
}

int64_t values_of(const Patches& patches) {
  return patches.frames * patches.lines * patches.columns * patches.channels;
}

int64_t lines_of(int64_t keep_stride, int64_t clips) { return keep_stride ? clips : 1; }

int64_t clips_of(const Rows& rows) { return (rows.first + rows.count - 1) / (rows.A + rows.K) + 1; }

int64_t blocks(int64_t length, int64_t size) { return (length + size - 1) / size; }

int64_t patches_of(const Patches& patches) {
  return blocks(patches.T, patches.frames) * blocks(patches.H, patches.lines) *
         blocks(patches.W, patches.columns);
}

Patches patches(Address data, const std::string& element, int64_t stride_b, int64_t stride_t,
                int64_t stride_h, int64_t stride_w, int64_t stride_c, int64_t T, int64_t H,
                int64_t W, int64_t frames, int64_t lines, int64_t columns, int64_t channels,
                Address keep, int64_t keep_stride) {
  return {.data = at(data),
          .element = element_of(element),
          .stride_b = stride_b,
          .stride_t = stride_t,
          .stride_h = stride_h,
          .stride_w = stride_w,
          .stride_c = stride_c,
          .T = T,
          .H = H,
          .W = W,
          .frames = frames,
          .lines = lines,
          .columns = columns,
          .channels = channels,
          .keep = at<const int64_t>(keep),
          .keep_stride = keep_stride};
}

void pack(const Patches& patches, Address packed, const std::string& element, int64_t first,
          int64_t count, int64_t K, int64_t A, int threads) {
  const Rows rows = {.first = first, .count = count, .K = K, .A = A};
  const int64_t lines = lines_of(patches.keep_stride, clips_of(rows));
  check_keep(patches.keep, lines, K, patches_of(patches), "patches");
  run(&Kernels::pack_patches, {.patches = patches,
                               .packed = at(packed),
                               .element = element_of(element),
                               .rows = rows,
                               .k = values_of(patches),
                               .threads = threads});
}

void weight(Address weight, const std::string& weight_element, int64_t weight_stride, Address bias,
            Address copy, Address whole_bias, float factor, int64_t dim, int64_t k, int threads) {
  run(&Kernels::read_weight, {.weight = at(weight),
                              .weight_element = element_of(weight_element),
                              .weight_stride = weight_stride,
                              .bias = at<const float>(bias),
                              .copy = at(copy),
                              .whole_bias = at<float>(whole_bias),
                              .factor = factor,
                              .dim = dim,
                              .k = k,
                              .threads = threads});
}

void finish(Address product, const std::string& product_element, Address tokens,
            const std::string& element, float scale, Address bias, Address position,
            const std::string& position_element, int64_t position_stride, int64_t positions,
            Address agg, Address keep, int64_t keep_stride, int64_t first, int64_t count, int64_t K,
            int64_t dim, int threads) {
  const Rows rows = {.first = first, .count = count, .K = K, .A = agg ? 1 : 0};
  const int64_t* kept = at<const int64_t>(keep);
  if (position) check_keep(kept, lines_of(keep_stride, clips_of(rows)), K, positions, "patches");
  run(&Kernels::finish_tokens, {.product = at(product),
                                .product_element = element_of(product_element),
                                .tokens = at(tokens),
                                .element = element_of(element),
                                .scale = scale,
                                .bias = at<const float>(bias),
                                .position = at(position),
                                .position_element = element_of(position_element),
                                .position_stride = position_stride,
                                .agg = at<const float>(agg),
                                .keep = kept,
                                .keep_stride = keep_stride,
                                .rows = rows,
                                .dim = dim,
                                .threads = threads});
}

void sums(Address d_tokens, const std::string& element, Address keep, int64_t keep_stride,
          Address inverse, Address d_position, Address parts, Address d_bias, Address d_agg,
          int64_t B, int64_t K, int64_t dim, int64_t rows, int threads) {
  const int64_t* kept = at<const int64_t>(keep);
  check_keep(kept, lines_of(keep_stride, B), K, rows, "patches");
  run(&Kernels::sum_gradients, {.d_tokens = at(d_tokens),
                                .element = element_of(element),
                                .keep = kept,
                                .keep_stride = keep_stride,
                                .inverse = at<int32_t>(inverse),
                                .d_position = at<float>(d_position),
                                .parts = at<float>(parts),
                                .d_bias = at<float>(d_bias),
                                .d_agg = at<float>(d_agg),
                                .B = B,
                                .K = K,
                                .A = d_agg ? 1 : 0,
                                .dim = dim,
                                .rows = rows,
                                .threads = threads});
}

void finish_d_weight(Address product, const std::string& element, Address d_weight, Address d_bias,
                     float scale, float factor, bool grows, int64_t dim, int64_t k, int threads) {
  run(&Kernels::finish_weight, {.product = at(product),
                                .element = element_of(element),
                                .d_weight = at<float>(d_weight),
                                .d_bias = at<const float>(d_bias),
                                .scale = scale,
                                .factor = factor,
                                .grows = grows,
                                .dim = dim,
                                .k = k,
                                .threads = threads});
}

void project(const Patches& patches, Address weight, const std::string& weight_element,
             int64_t weight_stride, Address bias, float factor, float scale, Address position,
             const std::string& position_element, int64_t position_stride, int64_t positions,
             Address agg, Address keep, int64_t keep_stride, Address tokens, int64_t B, int64_t K,
             int64_t dim, Address scratch, int threads) {
  const int64_t A = agg ? 1 : 0;
  const Rows rows = {.first = 0, .count = B * (A + K), .K = K, .A = A};
  const int64_t* kept = at<const int64_t>(keep);
  check_keep(patches.keep, lines_of(patches.keep_stride, B), K, patches_of(patches), "patches");
  if (position) check_keep(kept, lines_of(keep_stride, B), K, positions, "patches");
  const ProjectPatches call = {.patches = patches,
                               .rows = rows,
                               .weight = at(weight),
                               .weight_element = element_of(weight_element),
                               .weight_stride = weight_stride,
                               .bias = at<const float>(bias),
                               .factor = factor,
                               .scale = scale,
                               .position = at(position),
                               .position_element = element_of(position_element),
                               .position_stride = position_stride,
                               .agg = at<const float>(agg),
                               .keep = kept,
                               .keep_stride = keep_stride,
                               .tokens = at(tokens),
                               .dim = dim,
                               .k = values_of(patches),
                               .scratch = at(scratch),
                               .threads = threads};
  py::gil_scoped_release others_may_run;
  best(products).project(call);
}

void weigh(const Patches& patches, Address d_tokens, Address d_weight, const std::string& element,
           Address d_bias, float scale, float factor, bool grows, int64_t first, int64_t count,
           int64_t K, int64_t A, int64_t dim, Address scratch, int threads) {
  const Rows rows = {.first = first, .count = count, .K = K, .A = A};
  const int64_t lines = lines_of(patches.keep_stride, clips_of(rows));
  check_keep(patches.keep, lines, K, patches_of(patches), "patches");
  const WeighPatches call = {.patches = patches,
                             .rows = rows,
                             .d_tokens = at(d_tokens),
                             .d_weight = at(d_weight),
                             .element = element_of(element),
                             .d_bias = at<const float>(d_bias),
                             .scale = scale,
                             .factor = factor,
                             .grows = grows,
                             .dim = dim,
                             .k = values_of(patches),
                             .scratch = at(scratch),
                             .threads = threads};
  py::gil_scoped_release others_may_run;
  best(products).weigh(call);
}

const Bindings bindings([](py::module_& m) {
  // local: tests load several builds of the module into one process
  py::class_<Patches>(m, "Patches", py::module_local())
      .def(py::init(&patches), py::kw_only(), "data"_a, "element"_a, "stride_b"_a, "stride_t"_a,
           "stride_h"_a, "stride_w"_a, "stride_c"_a, "T"_a, "H"_a, "W"_a, "frames"_a, "lines"_a,
           "columns"_a, "channels"_a, "keep"_a, "keep_stride"_a);
  m.attr("patch_embed_rows_a_part") = rows_a_part;
  m.def("patch_embed_pack", &pack, py::kw_only(), "patches"_a, "packed"_a, "element"_a, "first"_a,
        "count"_a, "K"_a, "A"_a, "threads"_a);
  m.def("patch_embed_weight", &weight, py::kw_only(), "weight"_a, "weight_element"_a,
        "weight_stride"_a, "bias"_a, "copy"_a, "whole_bias"_a, "factor"_a, "dim"_a, "k"_a,
        "threads"_a);
  m.def("patch_embed_finish", &finish, py::kw_only(), "product"_a, "product_element"_a, "tokens"_a,
        "element"_a, "scale"_a, "bias"_a, "position"_a, "position_element"_a, "position_stride"_a,
        "positions"_a, "agg"_a, "keep"_a, "keep_stride"_a, "first"_a, "count"_a, "K"_a, "dim"_a,
        "threads"_a);
  m.def("patch_embed_sums", &sums, py::kw_only(), "d_tokens"_a, "element"_a, "keep"_a,
        "keep_stride"_a, "inverse"_a, "d_position"_a, "parts"_a, "d_bias"_a, "d_agg"_a, "B"_a,
        "K"_a, "dim"_a, "rows"_a, "threads"_a);
  m.def("patch_embed_finish_weight", &finish_d_weight, py::kw_only(), "product"_a, "element"_a,
        "d_weight"_a, "d_bias"_a, "scale"_a, "factor"_a, "grows"_a, "dim"_a, "k"_a, "threads"_a);
  m.def("patch_embed_project", &project, py::kw_only(), "patches"_a, "weight"_a, "weight_element"_a,
        "weight_stride"_a, "bias"_a, "factor"_a, "scale"_a, "position"_a, "position_element"_a,
        "position_stride"_a, "positions"_a, "agg"_a, "keep"_a, "keep_stride"_a, "tokens"_a, "B"_a,
        "K"_a, "dim"_a, "scratch"_a, "threads"_a);
  m.def("patch_embed_weigh", &weigh, py::kw_only(), "patches"_a, "d_tokens"_a, "d_weight"_a,
        "element"_a, "d_bias"_a, "scale"_a, "factor"_a, "grows"_a, "first"_a, "count"_a, "K"_a,
        "A"_a, "dim"_a, "scratch"_a, "threads"_a);
  m.def(
      "patch_embed_project_scratch",
      [](int64_t dim, int64_t k, int threads) {
        return best(products).project_scratch(dim, k, threads);
      },
      py::kw_only(), "dim"_a, "k"_a, "threads"_a);
  m.def(
      "patch_embed_weigh_scratch",
      [](int64_t rows, int64_t dim, int64_t k, int threads) {
        return best(products).weigh_scratch(rows, dim, k, threads);
      },
      py::kw_only(), "rows"_a, "dim"_a, "k"_a, "threads"_a);
});

}  // namespace
}  // namespace vatt_fast
