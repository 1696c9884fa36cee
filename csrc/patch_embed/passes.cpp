// levels: base avx2 avx512
// The passes declared in patch_embed.h. All are bound by memory: plain loops that the compiler
// vectorises, and intrinsics for the conversions it does badly. Whatever is summed is summed in one
// order for any number of threads.
#include "rows.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// -- pack ----------------------------------------------------------------------------------------

template <typename In, typename Out>
void pack(const PackPatches& call) {
  const Rows rows = call.rows;
  const Patches& patches = call.patches;
  // one task: a row
#pragma omp parallel for schedule(static) num_threads(threads_for(rows.count* call.k, call.threads))
  for (int64_t i = 0; i < rows.count; ++i)
    pack_row<In>(patches, rows, i, call.k, static_cast<Out*>(call.packed) + i * call.k);
}

template <typename In>
void pack_as(const PackPatches& call) {
  if (call.element == Element::bf16)
    pack<In, Bf16>(call);
  else
    pack<In, float>(call);
}

// -- weight --------------------------------------------------------------------------------------

template <typename In, typename Out>
void read(const ReadWeight& call) {
  constexpr int64_t lanes = 32;  // running sums side by side, so that they vectorise
  // one task: a row of the weight
#pragma omp parallel for schedule(static) num_threads(threads_for(call.dim* call.k, call.threads))
  for (int64_t d = 0; d < call.dim; ++d) {
    const In* in = static_cast<const In*>(call.weight) + d * call.weight_stride;
    Out* out = call.copy ? static_cast<Out*>(call.copy) + d * call.k : nullptr;
    float sums[lanes] = {};
    int64_t v = 0;
    for (; v + lanes <= call.k; v += lanes) {
      if (out) {
        convert(in + v, out + v, lanes);
        for (int64_t i = 0; i < lanes; ++i) sums[i] += load(out[v + i]);
      } else {
        for (int64_t i = 0; i < lanes; ++i) sums[i] += load(in[v + i]);
      }
    }
    for (int64_t i = 0; v < call.k; ++i, ++v) {
      if (out) store(load(in[v]), out + v);
      sums[i] += out ? load(out[v]) : load(in[v]);
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    call.whole_bias[d] = call.bias[d] + call.factor * sums[0];
  }
}

// -- finish --------------------------------------------------------------------------------------

// in and out may be the same row.
template <typename In, typename Out, typename Position>
inline void add_row(const In* in, float scale, const float* bias, const Position* position,
                    Out* out, int64_t dim) {
  if (position) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d)
      store(scale * load(in[d]) + (bias[d] + load(position[d])), out + d);
  } else {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) store(scale * load(in[d]) + bias[d], out + d);
  }
}

template <typename In, typename Out, typename Position>
void finish(const FinishTokens& call) {
  const Rows rows = call.rows;
  const Position* position = static_cast<const Position*>(call.position);
  // one task: a row of tokens
#pragma omp parallel for schedule(static) \
    num_threads(threads_for(rows.count* call.dim, call.threads))
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t b = (rows.first + i) / (rows.A + rows.K),
                  n = (rows.first + i) % (rows.A + rows.K) - rows.A;
    Out* out = static_cast<Out*>(call.tokens) + i * call.dim;
    if (n < 0) {
      convert(call.agg, out, call.dim);
      continue;
    }
    const int64_t patch = call.keep ? call.keep[b * call.keep_stride + n] : n;
    const Position* added = position ? position + patch * call.position_stride : nullptr;
    add_row(static_cast<const In*>(call.product) + i * call.dim, call.scale, call.bias, added, out,
            call.dim);
  }
}

template <typename In, typename Out>
void finish_as(const FinishTokens& call) {
  if (call.position_element == Element::bf16)
    finish<In, Out, Bf16>(call);
  else
    finish<In, Out, float>(call);
}

// -- sums ----------------------------------------------------------------------------------------

template <typename In>
inline void accumulate(const In* __restrict in, float* __restrict sum, int64_t count, bool first) {
  if (first) {
    for (int64_t i = 0; i < count; ++i) sum[i] = load(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) sum[i] += load(in[i]);
  }
}

template <typename In>
void sum(const SumGradients& call) {
  const int64_t rows_a_clip = call.A + call.K, dim = call.dim,
                parts = ceil_div(call.rows, rows_a_part);
  const int64_t lines = call.keep_stride ? call.B : 1,
                inverse_stride = call.keep_stride ? call.rows : 0;
  const In* d_tokens = static_cast<const In*>(call.d_tokens);
  constexpr int64_t columns_a_task = 64;
#pragma omp parallel num_threads(threads_for(call.B * rows_a_clip * dim, call.threads))
  {
    if (call.keep) {
      // one task: a line of keep
#pragma omp for schedule(static)
      for (int64_t line = 0; line < lines; ++line) {
        int32_t* inverse = call.inverse + line * call.rows;
        for (int64_t p = 0; p < call.rows; ++p) inverse[p] = -1;
        for (int64_t n = 0; n < call.K; ++n)
          inverse[call.keep[line * call.keep_stride + n]] = static_cast<int32_t>(n);
      }
    }
    // one task: the sums over clips of rows_a_part positions, and the sum of those
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      float *total = call.parts + part * 2 * dim, *spare = total + dim;
      fill_with_zero(total, dim);
      for (int64_t p = part * rows_a_part; p < minimum(call.rows, (part + 1) * rows_a_part); ++p) {
        float* row = call.d_position ? call.d_position + p * dim : spare;
        bool first = true;
        for (int64_t b = 0; b < call.B; ++b) {
          const int64_t n = call.keep ? call.inverse[b * inverse_stride + p] : p;
          if (n < 0) continue;
          accumulate(d_tokens + (b * rows_a_clip + call.A + n) * dim, row, dim, first);
          first = false;
        }
        if (first)
          fill_with_zero(row, dim);
        else
          accumulate(row, total, dim, false);
      }
    }
    // one task: columns of the sum over parts, and of AGG's over clips
#pragma omp for schedule(static)
    for (int64_t d = 0; d < dim; d += columns_a_task) {
      const int64_t count = minimum(columns_a_task, dim - d);
      for (int64_t part = 0; part < parts; ++part)
        accumulate(call.parts + part * 2 * dim + d, call.d_bias + d, count, part == 0);
      if (call.d_agg)
        for (int64_t b = 0; b < call.B; ++b)
          accumulate(d_tokens + b * rows_a_clip * dim + d, call.d_agg + d, count, b == 0);
    }
  }
}

template <typename In>
void scale_rows(const FinishWeight& call) {
  // one task: a row of the weight
#pragma omp parallel for schedule(static) num_threads(threads_for(call.dim* call.k, call.threads))
  for (int64_t d = 0; d < call.dim; ++d) {
    const In* in = static_cast<const In*>(call.product) + d * call.k;
    float* out = call.d_weight + d * call.k;
    const float scale = call.scale, shift = call.factor * call.d_bias[d];
    if (call.grows) {
#pragma omp simd
      for (int64_t v = 0; v < call.k; ++v) out[v] += scale * load(in[v]);
    } else {
#pragma omp simd
      for (int64_t v = 0; v < call.k; ++v) out[v] = scale * load(in[v]) + shift;
    }
  }
}

}  // namespace

// -- entry points --------------------------------------------------------------------------------

void pack_patches(const PackPatches& call) {
  switch (call.patches.element) {
    case Element::uint8:
      return pack_as<uint8_t>(call);
    case Element::bf16:
      return pack_as<Bf16>(call);
    case Element::fp16:
      return pack_as<Half>(call);
    case Element::fp32:
      return pack_as<float>(call);
  }
}

void read_weight(const ReadWeight& call) {
  if (call.weight_element == Element::fp32)
    read<float, Bf16>(call);
  else
    read<Bf16, float>(call);
}

void finish_tokens(const FinishTokens& call) {
  if (call.element == Element::fp32)
    finish_as<float, float>(call);
  else if (call.product_element == Element::fp32)
    finish_as<float, Bf16>(call);
  else
    finish_as<Bf16, Bf16>(call);
}

void sum_gradients(const SumGradients& call) {
  if (call.element == Element::bf16)
    sum<Bf16>(call);
  else
    sum<float>(call);
}

void finish_weight(const FinishWeight& call) {
  if (call.element == Element::bf16)
    scale_rows<Bf16>(call);
  else
    scale_rows<float>(call);
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
