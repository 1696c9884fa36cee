// Values as clips, weights and gradients hold them, and a row of them: what the passes around the
// library's product (passes.cpp) and our own (product.cpp) have in common. Compiled in namespace
// VF_LEVEL.
#pragma once

#include <stddef.h>

#include "common/sizes.h"
#include "patch_embed.h"

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

constexpr int64_t least_work = 1 << 15;  // values a thread: below, waking it takes longer

inline int threads_for(int64_t values, int threads) {
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

// 32 values: -128 .. 127 is exact in bf16, the upper half of the float is all of it.
inline __m512i to_bf16(const uint8_t* in, __m512i upper_halves) {
  return _mm512_permutex2var_epi16(_mm512_castps_si512(centred(in)), upper_halves,
                                   _mm512_castps_si512(centred(in + 16)));
}

inline void convert(const uint8_t* __restrict in, Bf16* __restrict out, int64_t count) {
  const __m512i upper_halves =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) _mm512_storeu_si512(out + i, to_bf16(in + i, upper_halves));
  if (i + 16 <= count) {
    const __m512i values = _mm512_srli_epi32(_mm512_castps_si512(centred(in + i)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(values));
    i += 16;
  }
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

// Row i of those packed: a kept patch, or zeros in AGG's place.
template <typename In, typename Out>
inline void pack_row(const Patches& patches, const Rows& rows, int64_t i, int64_t k, Out* out) {
  const int64_t b = (rows.first + i) / (rows.A + rows.K),
                n = (rows.first + i) % (rows.A + rows.K) - rows.A;
  if (n < 0)
    fill_with_zero(out, k);
  else
    pack_patch<In>(patches, b, patches.keep ? patches.keep[b * patches.keep_stride + n] : n, out);
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
