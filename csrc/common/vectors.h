// Vectors as wide as the instruction set has them. Compiled in namespace VF_LEVEL, and local to
// each object: the linker would merge a function that two objects share, and a machine might then
// meet instructions that it lacks. For the same reason a source compiled for an instruction set
// includes no other header with code but intrinsics.
#pragma once

#include <stdint.h>

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

inline Floats load(const float* at) {
  Floats v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}

inline Ints load(const int32_t* at) {
  Ints v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}

inline void store(float* at, Floats v) { __builtin_memcpy(at, &v, sizeof v); }
inline Floats all(float value) { return value - Floats{}; }

// v where the mask's bits are set, else 0, also for nan.
inline Floats where(Ints mask, Floats v) { return (Floats)((Ints)v & mask); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_of(Floats v) {
  float lanes[WIDTH];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float largest_of(Floats v) {
  float lanes[WIDTH], top;
  __builtin_memcpy(lanes, &v, sizeof v);
  top = lanes[0];
  for (int i = 1; i < WIDTH; i++) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// exp, relative error below 2e-7; 0 below -87, nan stays nan.
// x = n ln 2 + r; exp(r) is a polynomial, 2^n is made of the exponent's bits.
inline Floats exp_of(Floats x) {
  constexpr float LOWEST = -87.3f, HIGHEST = 88.3f;
  constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds, n is in the low bits
  const Floats bounded = x < LOWEST ? all(LOWEST) : x > HIGHEST ? all(HIGHEST) : x;
  const Floats shifted = bounded * 1.44269504088896341f + TO_INTEGER;
  const Floats n = shifted - TO_INTEGER;
  // ln 2 in two parts: the first product is exact
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  // unsigned: of a nan, which a mask may still remove, any bits come here, and their sum may
  // overflow
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  const Floats value = p * (Floats)power;
  return x < LOWEST ? Floats{} : value;
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
