// Which instruction set this machine offers, and why not a higher one.
#pragma once

namespace vatt_fast {

enum class Level { base, avx2, avx512, avx512_bf16, amx_bf16 };  // each includes those before it

constexpr int num_levels = 5;
constexpr const char* level_names[num_levels] = {"base", "avx2", "avx512", "avx512_bf16",
                                                 "amx_bf16"};

struct Features {
  Level level;
  const char* missing;  // what the next level would need, "" at the highest
};

// Asks processor and operating system. The matrix unit's registers must be requested from Linux,
// once a process: this does so.
Features detect();

// What kernels run at: what detect() found when the module was loaded, or a lower level that
// hold_to() asked for.
const Features& available();
Level current_level();
bool hold_to(Level level);  // false, and nothing changed, where this machine lacks it

}  // namespace vatt_fast
