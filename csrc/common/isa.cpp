#include "isa.h"

#if defined(VF_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vatt_fast {

#if defined(VF_X86)
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c,
                    &r.d);  // leaves zeros where the leaf does not exist
  return r;
}

bool bit(unsigned word, int position) { return word >> position & 1; }

// Which register files the operating system saves on a context switch.
unsigned saved_registers() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool request_tiles() {
#if defined(VF_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr long request_permission = 0x1023,
                 tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

Features detect() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
#if defined(VF_EMULATED)
  const bool bf16 = true, tiles = true;
#else
  const bool bf16 = bit(cpuid(7, 1).a, 5), tiles = bit(seven.d, 24) && bit(seven.d, 22);
#endif
  if (!bit(one.c, 27))
    return {Level::base, "the operating system saves no vector registers (OSXSAVE)"};
  const unsigned saved = saved_registers();
  if (!bit(seven.b, 5) || !bit(one.c, 12) || !bit(one.c, 29))
    return {Level::base, "the processor lacks AVX2, FMA or F16C"};
  if ((saved & 0x6) != 0x6)
    return {Level::base, "the operating system does not save AVX registers"};
  if (!bit(seven.b, 16) || !bit(seven.b, 17) || !bit(seven.b, 30) || !bit(seven.b, 31))
    return {Level::avx2, "the processor lacks AVX-512 F, DQ, BW or VL"};
  if ((saved & 0xe6) != 0xe6)
    return {Level::avx2, "the operating system does not save AVX-512 registers"};
  if (!bf16) return {Level::avx512, "the processor lacks AVX-512 BF16"};
  if (!tiles) return {Level::avx512_bf16, "the processor lacks AMX-TILE or AMX-BF16"};
#if !defined(VF_EMULATED)
  if ((saved & 0x60000) != 0x60000)
    return {Level::avx512_bf16, "the operating system does not save AMX tiles"};
#endif
  if (!request_tiles())
    return {Level::avx512_bf16, "the operating system refused the use of AMX tiles"};
  return {Level::amx_bf16, ""};
}
#else
Features detect() { return {Level::base, "no kernels for this processor"}; }
#endif

namespace {
Level& level() {
  static Level held = available().level;
  return held;
}
}  // namespace

const Features& available() {
  static const Features found = detect();
  return found;
}

Level current_level() { return level(); }

bool hold_to(Level asked) {
  if (asked > available().level) return false;
  level() = asked;
  return true;
}

}  // namespace vatt_fast
