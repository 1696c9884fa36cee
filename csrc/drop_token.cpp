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
  const int64_t rows = r.B * r.K;
#pragma omp parallel for num_threads(threads_for(r, rows)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / r.K, n = r.keep[b * r.keep_stride + row % r.K];
    std::memcpy(kept + row * r.row_bytes, tokens + b * stride_b + n * stride_n, r.row_bytes);
  }
}

void put_rows(const KeptRows& r, const char* kept, char* tokens, int32_t* inverse) {
  const int64_t lines = r.keep_stride ? r.B : 1, rows = r.B * r.N;
  std::fill(inverse, inverse + lines * r.N, -1);
  for (int64_t i = 0; i < lines * r.K; ++i) inverse[i / r.K * r.N + r.keep[i]] = static_cast<int32_t>(i % r.K);
#pragma omp parallel for num_threads(threads_for(r, rows)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / r.N, n = inverse[(lines > 1 ? b * r.N : 0) + row % r.N];
    char* const token = tokens + row * r.row_bytes;
    if (n < 0)
      std::memset(token, 0, r.row_bytes);
    else
      std::memcpy(token, kept + (b * r.K + n) * r.row_bytes, r.row_bytes);
  }
}

}  // namespace vatt_fast
