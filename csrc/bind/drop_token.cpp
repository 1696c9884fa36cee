// Python's entry to drop_token.cpp.
#include "drop_token.h"

#include "binding.h"

namespace vatt_fast {
namespace {

KeptRows rows_of(Address keep, int64_t keep_stride, int64_t B, int64_t N, int64_t K,
                 int64_t row_bytes, int threads) {
  const KeptRows rows = {.keep = at<const int64_t>(keep),
                         .keep_stride = keep_stride,
                         .B = B,
                         .N = N,
                         .K = K,
                         .row_bytes = row_bytes,
                         .threads = threads};
  check_keep(rows.keep, keep_stride ? B : 1, K, N, "tokens");
  return rows;
}

void take(Address tokens, int64_t stride_b, int64_t stride_n, Address kept, Address keep,
          int64_t keep_stride, int64_t B, int64_t N, int64_t K, int64_t row_bytes, int threads) {
  const KeptRows rows = rows_of(keep, keep_stride, B, N, K, row_bytes, threads);
  py::gil_scoped_release others_may_run;
  take_rows(rows, at<const char>(tokens), stride_b, stride_n, at<char>(kept));
}

void put(Address kept, Address tokens, Address inverse, Address keep, int64_t keep_stride,
         int64_t B, int64_t N, int64_t K, int64_t row_bytes, int threads) {
  const KeptRows rows = rows_of(keep, keep_stride, B, N, K, row_bytes, threads);
  py::gil_scoped_release others_may_run;
  put_rows(rows, at<const char>(kept), at<char>(tokens), at<int32_t>(inverse));
}

const Bindings bindings([](py::module_& m) {
  m.def("drop_token_take", &take, py::kw_only(), "tokens"_a, "stride_b"_a, "stride_n"_a, "kept"_a,
        "keep"_a, "keep_stride"_a, "B"_a, "N"_a, "K"_a, "row_bytes"_a, "threads"_a);
  m.def("drop_token_put", &put, py::kw_only(), "kept"_a, "tokens"_a, "inverse"_a, "keep"_a,
        "keep_stride"_a, "B"_a, "N"_a, "K"_a, "row_bytes"_a, "threads"_a);
});

}  // namespace
}  // namespace vatt_fast
