// levels: base avx2 avx512
// The passes declared in patch_embed.h. All are bound by memory: plain loops that the compiler
// vectorises, and intrinsics for the conversions it does badly. Whatever is summed is summed in one
// order for any number of threads.
#include "patch_embed.h"

#include <stddef.h>

#include "common/sizes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr float centre = 128;
constexpr int64_t least_work = 1 << 15;  // values a thread: below, waking it takes longer

int threads_for(int64_t values, int threads) {
  const int64_t useful = values / least_work;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// -- one value -----------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float load(uint8_t x) {
  return static_cast<float>(static_cast<int8_t>(x ^ 128));
}  // x - 128
inline float load(float x) { return x; }
inline float load(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float load(
    Half x) {  // the exponent is rebased by a product, which is right for subnormal numbers too
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13,
                 sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rebased = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | rebased | (magnitude >= 0x0f800000 ? 0x7f800000 : 0));
}

inline uint16_t nearest_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline void store(float x, float* out) { *out = x; }
inline void store(float x, Bf16* out) { out->bits = nearest_bf16(x); }

// -- runs of values ------------------------------------------------------------------------------

template <typename In, typename Out>
inline void convert(const In* __restrict in, Out* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(load(in[i]), out + i);
}

#if defined(__AVX512F__)
inline __m512 centred(const uint8_t* in) {
  const __m128i values =
      _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)), _mm_set1_epi8(-128));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
}

inline __m256i to_bf16(
    const uint8_t* in) {  // -128 .. 127 is exact in bf16: the upper half of the float is all of it
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(centred(in)), 16));
}

inline void convert(const uint8_t* __restrict in, Bf16* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_bf16(in + i));
  for (; i < count; ++i) store(load(in[i]), out + i);
}

inline void convert(const uint8_t* __restrict in, float* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, centred(in + i));
  for (; i < count; ++i) store(load(in[i]), out + i);
}
#elif defined(__AVX2__)
inline __m256 centred(const uint8_t* in) {
  const __m128i values =
      _mm_xor_si128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)), _mm_set1_epi8(-128));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
}

inline void convert(const uint8_t* __restrict in, Bf16* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {  // exact, as above
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(centred(in + i)), 16);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(centred(in + i + 8)), 16);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), both);
  }
  for (; i < count; ++i) store(load(in[i]), out + i);
}

inline void convert(const uint8_t* __restrict in, float* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, centred(in + i));
  for (; i < count; ++i) store(load(in[i]), out + i);
}
#endif

inline void convert(const Bf16* __restrict in, Bf16* __restrict out, int64_t count) {
  __builtin_memcpy(out, in, static_cast<size_t>(count) * sizeof(Bf16));
}

inline void convert(const float* __restrict in, float* __restrict out, int64_t count) {
  __builtin_memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
}

template <typename In, typename Out>
inline void fill_with_raw_zero(Out* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(load(In{}), out + i);
}

template <typename Out>
inline void fill_with_zero(Out* out, int64_t count) {
  __builtin_memset(out, 0, static_cast<size_t>(count) * sizeof(Out));
}

// -- pack ----------------------------------------------------------------------------------------

// Line (t, y) of a patch, from where it lies in the clip.
template <typename In, typename Out>
inline void pack_line(const Patches& patches, const In* in, int64_t pixels, Out* out) {
  if (patches.stride_c == 1 && (patches.stride_w == patches.channels || patches.columns == 1)) {
    convert(in, out, pixels * patches.channels);
    return;
  }
  for (int64_t x = 0; x < pixels; ++x)
    for (int64_t c = 0; c < patches.channels; ++c)
      store(load(in[x * patches.stride_w + c * patches.stride_c]), out + x * patches.channels + c);
}

template <typename In, typename Out>
void pack_patch(const Patches& patches, int64_t b, int64_t patch, Out* out) {
  const int64_t across = ceil_div(patches.W, patches.columns),
                down = ceil_div(patches.H, patches.lines);
  const int64_t t0 = patch / (across * down) * patches.frames,
                y0 = patch / across % down * patches.lines, x0 = patch % across * patches.columns;
  const int64_t pixels = minimum(patches.columns, patches.W - x0),
                run = patches.columns * patches.channels;
  const In* corner = static_cast<const In*>(patches.data) + b * patches.stride_b +
                     t0 * patches.stride_t + y0 * patches.stride_h + x0 * patches.stride_w;
  for (int64_t t = 0; t < patches.frames; ++t) {
    const int64_t lines = t0 + t < patches.T ? minimum(patches.lines, patches.H - y0) : 0;
    const In* line = corner + t * patches.stride_t;
    for (int64_t y = 0; y < lines; ++y, line += patches.stride_h, out += run) {
      if (y + 4 < lines)
        __builtin_prefetch(
            line +
            4 * patches.stride_h);  // short runs far apart: the processor foresees none of them
      pack_line(patches, line, pixels, out);
      if (pixels < patches.columns)
        fill_with_raw_zero<In>(out + pixels * patches.channels,
                               (patches.columns - pixels) * patches.channels);
    }
    fill_with_raw_zero<In>(out, (patches.lines - lines) * run);
    out += (patches.lines - lines) * run;
  }
}

template <typename In, typename Out>
void pack(const PackPatches& call) {
  const Rows rows = call.rows;
  const Patches& patches = call.patches;
  // one task: a row
#pragma omp parallel for schedule(static) num_threads(threads_for(rows.count* call.k, call.threads))
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t b = (rows.first + i) / (rows.A + rows.K),
                  n = (rows.first + i) % (rows.A + rows.K) - rows.A;
    Out* out = static_cast<Out*>(call.packed) + i * call.k;
    if (n < 0)
      fill_with_zero(out, call.k);
    else
      pack_patch<In>(patches, b, patches.keep ? patches.keep[b * patches.keep_stride + n] : n, out);
  }
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
