// levels: base
#include "drop_token.h"

#include <algorithm>
#include <cstring>

namespace vatt_fast {
namespace {

constexpr int64_t least_bytes = 1 << 17;  // a thread: below, waking it takes longer

int threads_for(const KeptRows& rows, int64_t count) {
  const int64_t useful = count * rows.row_bytes / least_bytes;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(rows.threads, useful)));
}

}  // namespace

void take_rows(const KeptRows& rows, const char* tokens, int64_t stride_b, int64_t stride_n,
               char* kept) {
#pragma omp parallel for collapse(2) num_threads(threads_for(rows, rows.B* rows.K)) schedule(static)
  for (int64_t b = 0; b < rows.B; ++b)
    for (int64_t n = 0; n < rows.K; ++n)
      std::memcpy(kept + (b * rows.K + n) * rows.row_bytes,
                  tokens + b * stride_b + rows.keep[b * rows.keep_stride + n] * stride_n,
                  rows.row_bytes);
}

void put_rows(const KeptRows& rows, const char* kept, char* tokens, int32_t* inverse) {
  const int64_t lines = rows.keep_stride ? rows.B : 1,
                inverse_stride = rows.keep_stride ? rows.N : 0;
  std::fill(inverse, inverse + lines * rows.N, -1);
  for (int64_t b = 0; b < lines; ++b)
    for (int64_t n = 0; n < rows.K; ++n)
      inverse[b * rows.N + rows.keep[b * rows.K + n]] = static_cast<int32_t>(n);
#pragma omp parallel for collapse(2) num_threads(threads_for(rows, rows.B* rows.N)) schedule(static)
  for (int64_t b = 0; b < rows.B; ++b)
    for (int64_t n = 0; n < rows.N; ++n) {
      char* const token = tokens + (b * rows.N + n) * rows.row_bytes;
      const int32_t from = inverse[b * inverse_stride + n];
      if (from < 0)
        std::memset(token, 0, rows.row_bytes);
      else
        std::memcpy(token, kept + (b * rows.K + from) * rows.row_bytes, rows.row_bytes);
    }
}

}  // namespace vatt_fast
