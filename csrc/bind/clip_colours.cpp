// Python's entry to clip_colours.cpp.
#include "clip_colours.h"

#include "binding.h"

namespace vatt_fast {
namespace {

struct Kernels {
  void (*change)(const ClipFrames&, const Colours&);
  int64_t (*scratch)(int64_t pixels);
};

#define VERSION(level) {Level::level, {level::clip_colours, level::clip_colours_scratch}},
const std::initializer_list<Version<Kernels>> versions = {VF_LEVELS_CLIP_COLOURS(VERSION)};
#undef VERSION

void change(Address from, Address to, int64_t frames, int64_t pixels, Address scratch, int threads,
            float brightness, float saturation, float contrast, float hue) {
  best(versions).change(
      {.from = at<const uint8_t>(from),
       .to = at<uint8_t>(to),
       .frames = frames,
       .pixels = pixels,
       .scratch = at<int16_t>(scratch),
       .threads = threads},
      {.brightness = brightness, .saturation = saturation, .contrast = contrast, .hue = hue});
}

const Bindings bindings([](py::module_& m) {
  m.def("clip_colours", &change, Released(), py::kw_only(), "from_"_a, "to"_a, "frames"_a,
        "pixels"_a, "scratch"_a, "threads"_a, "brightness"_a, "saturation"_a, "contrast"_a,
        "hue"_a);
  m.def(
      "clip_colours_scratch", [](int64_t pixels) { return best(versions).scratch(pixels); },
      py::kw_only(), "pixels"_a);
});

}  // namespace
}  // namespace vatt_fast
