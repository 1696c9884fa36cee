// Python's entry to csrc/drop_token.cpp.
#include "binding.h"
#include "drop_token.h"

namespace py = pybind11;

namespace vatt_fast {
namespace {

KeptRows rows_of(Address keep, int64_t keep_stride, int64_t B, int64_t N, int64_t K, int64_t row_bytes, int threads) {
  const KeptRows rows = {at<const int64_t>(keep), keep_stride, B, N, K, row_bytes, threads};
  check_keep(rows.keep, keep_stride ? B : 1, K, N, "tokens");
  return rows;
}

void take(Address tokens, int64_t stride_b, int64_t stride_n, Address kept, Address keep, int64_t keep_stride, int64_t B, int64_t N,
          int64_t K, int64_t row_bytes, int threads) {
  const KeptRows rows = rows_of(keep, keep_stride, B, N, K, row_bytes, threads);
  py::gil_scoped_release others_may_run;
  take_rows(rows, at<const char>(tokens), stride_b, stride_n, at<char>(kept));
}

void put(Address kept, Address tokens, Address inverse, Address keep, int64_t keep_stride, int64_t B, int64_t N, int64_t K,
         int64_t row_bytes, int threads) {
  const KeptRows rows = rows_of(keep, keep_stride, B, N, K, row_bytes, threads);
  py::gil_scoped_release others_may_run;
  put_rows(rows, at<const char>(kept), at<char>(tokens), at<int32_t>(inverse));
}

}  // namespace

void bind_drop_token(py::module_& m) {
  m.def("drop_token_take", &take);
  m.def("drop_token_put", &put);
}

}  // namespace vatt_fast
