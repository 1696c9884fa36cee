#include "drop_token.h"

#include <algorithm>
#include <cstring>

namespace vatt_fast {
namespace {

constexpr int64_t least_bytes = 1 << 17;  // a thread: below, waking it takes longer

int threads_for(const KeptRows& r, int64_t rows) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(r.threads, rows * r.row_bytes / least_bytes)));
}

}  // namespace

void take_rows(const KeptRows& r, const char* tokens, int64_t stride_b, int64_t stride_n, char* kept) {
#pragma omp parallel for collapse(2) num_threads(threads_for(r, r.B * r.K)) schedule(static)
  for (int64_t b = 0; b < r.B; ++b)
    for (int64_t n = 0; n < r.K; ++n)
      std::memcpy(kept + (b * r.K + n) * r.row_bytes, tokens + b * stride_b + r.keep[b * r.keep_stride + n] * stride_n, r.row_bytes);
}

void put_rows(const KeptRows& r, const char* kept, char* tokens, int32_t* inverse) {
  const int64_t lines = r.keep_stride ? r.B : 1, inverse_stride = r.keep_stride ? r.N : 0;
  std::fill(inverse, inverse + lines * r.N, -1);
  for (int64_t b = 0; b < lines; ++b)
    for (int64_t n = 0; n < r.K; ++n) inverse[b * r.N + r.keep[b * r.K + n]] = static_cast<int32_t>(n);
#pragma omp parallel for collapse(2) num_threads(threads_for(r, r.B * r.N)) schedule(static)
  for (int64_t b = 0; b < r.B; ++b)
    for (int64_t n = 0; n < r.N; ++n) {
      char* const token = tokens + (b * r.N + n) * r.row_bytes;
      const int32_t from = inverse[b * inverse_stride + n];
      if (from < 0)
        std::memset(token, 0, r.row_bytes);
      else
        std::memcpy(token, kept + (b * r.K + from) * r.row_bytes, r.row_bytes);
    }
}

}  // namespace vatt_fast
