// The entry point of clip_colours.cpp, one for each instruction set, and what it takes.
#pragma once

#include <stdint.h>

#include "levels.h"

namespace vatt_fast {

// One draw for all frames of a clip. All values are whole numbers, so that every product is exact
// in fp32: no machine rounds otherwise, whether it multiplies and adds in one step or in two.
struct Colours {
  float brightness;  // added, in sixteenths of a level of 0 .. 255
  float saturation;  // factor, in 1024ths
  float contrast;    // factor, in 256ths
  float hue;         // turn, in 64ths of a sixth of the circle
};

struct ClipFrames {
  const uint8_t* from;  // (frames, pixels, 3) RGB
  uint8_t* to;          // the same, or the same memory
  int64_t frames, pixels;
  int16_t* scratch;  // (threads, clip_colours_scratch(pixels))
  int threads;
};

#define VF_DECLARE(level)                               \
  namespace level {                                     \
  void clip_colours(const ClipFrames&, const Colours&); \
  int64_t clip_colours_scratch(int64_t pixels);         \
  }
VF_LEVELS_CLIP_COLOURS(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vatt_fast
