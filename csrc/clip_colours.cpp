// levels: base avx2 avx512
// Brightness, saturation, contrast and hue of a clip, in this order, as tf.image.adjust_* define
// them; vatt_fast/data/colours.py has the same steps in torch, and gives the same bytes.
//
// Saturation needs no hue: the largest channel M stays, the others move to M - (M - x) * factor,
// and the factor ends where the smallest becomes 0. A hue is told by q = C * hue, C the largest
// less the smallest: no division. Contrast pulls towards a frame's own means, hence the two passes.
#include "clip_colours.h"

#include <omp.h>

#include "common/vectors.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int PIXELS = 128;                // at a time: what lies between is in L1
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds, halves to even

struct Planes {
  alignas(64) float channel[3][PIXELS];
};

inline Floats rounded(Floats v) { return (v + TO_INTEGER) - TO_INTEGER; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats between(Floats v, Floats low, Floats high) { return smaller(larger(v, low), high); }
inline Floats size_of(Floats v) { return larger(v, -v); }
inline int64_t padded(int64_t pixels) { return (pixels + PIXELS - 1) / PIXELS * PIXELS; }

// Bytes of pixels -> planes in 16ths of a level, brightened.
void brighten(const uint8_t* bytes, float brightness, Planes& planes) {
  uint8_t apart[3][PIXELS];
  for (int i = 0; i < PIXELS; i++) {
    apart[0][i] = bytes[3 * i];
    apart[1][i] = bytes[3 * i + 1];
    apart[2][i] = bytes[3 * i + 2];
  }
  for (int c = 0; c < 3; c++)
    for (int i = 0; i < PIXELS; i++)
      planes.channel[c][i] = static_cast<float>(apart[c][i]) * 16 + brightness;
}

// 16ths of a level -> 64ths, in place.
void saturate(Planes& planes, float saturation) {
  for (int i = 0; i < PIXELS; i += WIDTH) {
    Floats x[3];
    for (int c = 0; c < 3; c++) x[c] = load(planes.channel[c] + i);
    const Floats most = larger(larger(x[0], x[1]), x[2]);
    const Floats least = smaller(smaller(x[0], x[1]), x[2]);
    const Floats until_0 = larger(most, all(0)) * 1024 / larger(most - least, all(1));
    const Floats factor = rounded(smaller(all(saturation), until_0));
    for (int c = 0; c < 3; c++)
      store(planes.channel[c] + i, most * 4 - rounded((most - x[c]) * factor * (1.0f / 256)));
  }
}

// 64ths of a level -> levels 0 .. 255, in place.
void contrast_and_turn(Planes& planes, const Colours& colours, const float* pull) {
  for (int i = 0; i < PIXELS; i += WIDTH) {
    Floats x[3];
    for (int c = 0; c < 3; c++)
      x[c] = rounded(load(planes.channel[c] + i) * (colours.contrast / 256) + pull[c]);
    const Floats r = x[0], g = x[1], b = x[2];
    const Floats most = larger(larger(r, g), b), least = smaller(smaller(r, g), b);
    const Floats C = most - least;
    Floats q = r == most ? g - b : g == most ? b - r + 2 * C : r - g + 4 * C;
    q += rounded(C * (colours.hue / 64));
    q = q < 0 ? q + 6 * C : q;
    q = q >= 6 * C ? q - 6 * C : q;
    const Floats parts[3] = {size_of(q - 3 * C) - C, 2 * C - size_of(q - 2 * C),
                             2 * C - size_of(q - 4 * C)};
    for (int c = 0; c < 3; c++) {
      const Floats v = rounded((least + between(parts[c], all(0), C)) * (1.0f / 64));
      store(planes.channel[c] + i, between(v, all(0), all(255)));
    }
  }
}

void keep(const Planes& planes, int16_t* to, int64_t stride) {
  for (int c = 0; c < 3; c++)
    for (int i = 0; i < PIXELS; i++)
      to[c * stride + i] = static_cast<int16_t>(static_cast<int32_t>(planes.channel[c][i]));
}

void take(const int16_t* from, int64_t stride, Planes& planes) {
  for (int c = 0; c < 3; c++)
    for (int i = 0; i < PIXELS; i++)
      planes.channel[c][i] = static_cast<float>(from[c * stride + i]);
}

void write(const Planes& planes, uint8_t* bytes) {
  uint8_t apart[3][PIXELS];
  for (int c = 0; c < 3; c++)
    for (int i = 0; i < PIXELS; i++)
      apart[c][i] = static_cast<uint8_t>(static_cast<int32_t>(planes.channel[c][i]));
  for (int i = 0; i < PIXELS; i++) {
    bytes[3 * i] = apart[0][i];
    bytes[3 * i + 1] = apart[1][i];
    bytes[3 * i + 2] = apart[2][i];
  }
}

void change_frame(const uint8_t* from, uint8_t* to, int64_t pixels, const Colours& colours,
                  int16_t* scratch) {
  const int64_t stride = padded(pixels);
  uint8_t bytes[3 * PIXELS] = {};
  int64_t sums[3] = {};
  for (int64_t first = 0; first < pixels; first += PIXELS) {
    const int64_t count = pixels - first < PIXELS ? pixels - first : PIXELS;
    __builtin_memcpy(bytes, from + 3 * first, 3 * count);
    Planes planes;
    brighten(bytes, colours.brightness, planes);
    saturate(planes, colours.saturation);
    keep(planes, scratch + first, stride);
    for (int c = 0; c < 3; c++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i++) sum += scratch[c * stride + first + i];
      sums[c] += sum;
    }
  }
  float pull[3];
  for (int c = 0; c < 3; c++)
    pull[c] = static_cast<float>(
        __builtin_rint(static_cast<double>(sums[c]) * (256 - colours.contrast) / (256.0 * pixels)));
  for (int64_t first = 0; first < pixels; first += PIXELS) {
    const int64_t count = pixels - first < PIXELS ? pixels - first : PIXELS;
    Planes planes;
    take(scratch + first, stride, planes);
    contrast_and_turn(planes, colours, pull);
    write(planes, bytes);
    __builtin_memcpy(to + 3 * first, bytes, 3 * count);
  }
}

}  // namespace

void clip_colours(const ClipFrames& clip, const Colours& colours) {
  const int threads = clip.threads < clip.frames ? clip.threads : static_cast<int>(clip.frames);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t frame = 0; frame < clip.frames; frame++) {
    const int64_t place = 3 * clip.pixels * frame;
    change_frame(clip.from + place, clip.to + place, clip.pixels, colours,
                 clip.scratch + omp_get_thread_num() * clip_colours_scratch(clip.pixels));
  }
}

int64_t clip_colours_scratch(int64_t pixels) { return 3 * padded(pixels); }

}  // namespace VF_LEVEL
}  // namespace vatt_fast
