// The bf16 conversions and products of AVX-512 and the tile instructions of AMX, written out in
// AVX-512F under the same names, for tests on machines without them (VF_EMULATED, compiled without
// -mavx512bf16 and -mamx-*). Include it in place of <immintrin.h>.
#pragma once

#include <immintrin.h>

#if defined(VF_EMULATED)

#include <stdint.h>
#include <string.h>

// What the instructions do whatever MXCSR says: denormals are zero coming in and going out, round
// to nearest even.
static inline unsigned emulated_begin_bf16() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  return before;
}

static inline __m512 emulated_even(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
static inline __m512 emulated_odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

static inline __m256i emulated_round(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x),
                magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __mmask16 tiny = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x00800000));
  rounded = _mm512_mask_or_epi32(rounded, nan, bits,
                                 _mm512_set1_epi32(0x00400000));  // quiet, never infinite
  rounded = _mm512_mask_and_epi32(
      rounded, tiny, bits, _mm512_set1_epi32(int(0x80000000)));  // a denormal is a zero of its sign
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

static inline __m512bh emulated_cvtne2ps(__m512 high, __m512 low) {
  return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(emulated_round(low)),
                                      emulated_round(high), 1);
}
static inline __m256bh emulated_cvtneps(__m512 x) { return (__m256bh)emulated_round(x); }
static inline __m128bh emulated_cvtneps_256(__m256 x) {
  return (__m128bh)_mm256_castsi256_si128(emulated_round(_mm512_castps256_ps512(x)));
}

// A call of its own, which the compiler keeps between the settings.
static __attribute__((noinline, unused)) void emulated_dot(__m512* sum, const __m512i* x,
                                                           const __m512i* y) {
  const __m512 odd = _mm512_fmadd_ps(emulated_odd(*x), emulated_odd(*y), *sum);
  *sum = _mm512_fmadd_ps(emulated_even(*x), emulated_even(*y), odd);
}
static inline __m512 emulated_dpbf16(__m512 sum, __m512bh x, __m512bh y) {
  const __m512i pairs_x = (__m512i)x, pairs_y = (__m512i)y;
  const unsigned before = emulated_begin_bf16();
  emulated_dot(&sum, &pairs_x, &pairs_y);
  _mm_setcsr(before);
  return sum;
}

#define _mm512_cvtne2ps_pbh emulated_cvtne2ps
#define _mm512_cvtneps_pbh emulated_cvtneps
#define _mm256_cvtneps_pbh emulated_cvtneps_256
#define _mm512_dpbf16_ps emulated_dpbf16

// Tiles: eight of up to 16 rows of 64 bytes a thread; what lies beyond a tile's configured size
// stays zero. Misuse traps, as it does there.
struct EmulatedTiles {
  alignas(64) uint8_t data[8][16][64];
  uint8_t rows[8];
  uint16_t bytes[8];  // of a row
  bool configured;
};
static thread_local __attribute__((unused)) EmulatedTiles emulated_tiles;

static inline void emulated_tile_release() { memset(&emulated_tiles, 0, sizeof emulated_tiles); }

static inline void emulated_tile_loadconfig(const void* config) {
  const uint8_t* at = static_cast<const uint8_t*>(
      config);  // palette, start row, 14 reserved, 16 row lengths, 16 row counts
  emulated_tile_release();
  if (at[0] != 1 || at[1] != 0) __builtin_trap();
  for (int t = 0; t < 8; t++) {
    memcpy(&emulated_tiles.bytes[t], at + 16 + 2 * t, 2);
    emulated_tiles.rows[t] = at[48 + t];
    if (emulated_tiles.rows[t] > 16 || emulated_tiles.bytes[t] > 64 || emulated_tiles.bytes[t] % 4)
      __builtin_trap();
  }
  emulated_tiles.configured = true;
}

static inline EmulatedTiles& emulated_checked(int t) {
  EmulatedTiles& tiles = emulated_tiles;
  if (!tiles.configured || !tiles.rows[t] || !tiles.bytes[t]) __builtin_trap();
  return tiles;
}

static inline void emulated_tile_zero(int t) {
  memset(emulated_checked(t).data[t], 0, sizeof emulated_tiles.data[t]);
}

static inline void emulated_tile_loadd(int t, const void* base, long stride) {
  EmulatedTiles& tiles = emulated_checked(t);
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int r = 0; r < tiles.rows[t]; r++)
    memcpy(tiles.data[t][r], static_cast<const uint8_t*>(base) + r * stride, tiles.bytes[t]);
}

static inline void emulated_tile_stored(int t, void* base, long stride) {
  EmulatedTiles& tiles = emulated_checked(t);
  for (int r = 0; r < tiles.rows[t]; r++)
    memcpy(static_cast<uint8_t*>(base) + r * stride, tiles.data[t][r], tiles.bytes[t]);
}

// Even and odd products are summed apart over the whole row, from zero, and added to the sum at the
// end.
static __attribute__((noinline, unused)) void emulated_multiply(EmulatedTiles& tiles, int sum,
                                                                int x, int y) {
  __m512 even[16], odd[16];
  const int pairs = tiles.bytes[x] / 4;
  for (int k = 0; k < pairs; k++) {
    const __m512i row = _mm512_load_si512(tiles.data[y][k]);
    even[k] = emulated_even(row), odd[k] = emulated_odd(row);
  }
  const __mmask16 columns = __mmask16((1u << tiles.bytes[sum] / 4) - 1);
  for (int r = 0; r < tiles.rows[sum]; r++) {
    const uint32_t* values = reinterpret_cast<const uint32_t*>(tiles.data[x][r]);
    __m512 sum_even = _mm512_setzero_ps(), sum_odd = sum_even;
    for (int k = 0; k < pairs; k++) {
      const __m512i pair = _mm512_set1_epi32(int(values[k]));
      sum_even = _mm512_fmadd_ps(emulated_even(pair), even[k], sum_even);
      sum_odd = _mm512_fmadd_ps(emulated_odd(pair), odd[k], sum_odd);
    }
    float* row = reinterpret_cast<float*>(tiles.data[sum][r]);
    _mm512_store_ps(
        row, _mm512_maskz_add_ps(columns, _mm512_load_ps(row), _mm512_add_ps(sum_even, sum_odd)));
  }
}

static inline void emulated_tile_dpbf16ps(int sum, int x, int y) {
  EmulatedTiles& tiles = emulated_checked(sum);
  emulated_checked(x), emulated_checked(y);
  const bool fits = tiles.rows[x] == tiles.rows[sum] && tiles.bytes[y] == tiles.bytes[sum] &&
                    tiles.rows[y] * 4 == tiles.bytes[x];
  if (!fits || sum == x || sum == y || x == y) __builtin_trap();
  const unsigned before = emulated_begin_bf16();
  emulated_multiply(tiles, sum, x, y);
  _mm_setcsr(before);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stream_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbf16ps emulated_tile_dpbf16ps

#endif  // VF_EMULATED
