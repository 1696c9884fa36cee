// Vectors as wide as the instruction set has them. Included inside namespace VF_LEVEL, and static throughout: a function shared with another
// set's object would be merged with it, which is also why such sources include no other header code but intrinsics.

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

static inline Floats load(const float* at) {
  Floats v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}
static inline Ints load(const int32_t* at) {
  Ints v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}
static inline void store(float* at, Floats v) { __builtin_memcpy(at, &v, sizeof v); }
static inline Floats all(float value) { return value - Floats{}; }
static inline Floats where(Ints mask, Floats v) { return (Floats)((Ints)v & mask); }  // else 0, also for nan
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float sum_of(Floats v) {
  float lanes[WIDTH];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

static inline float largest_of(Floats v) {
  float lanes[WIDTH], top;
  __builtin_memcpy(lanes, &v, sizeof v);
  top = lanes[0];
  for (int i = 1; i < WIDTH; i++) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// exp, relative error below 2e-7; 0 below -87, nan stays nan. x = n ln 2 + r, exp(r) by a polynomial, 2^n by the exponent's bits.
static inline Floats exp_of(Floats x) {
  constexpr float LOWEST = -87.3f, HIGHEST = 88.3f, TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves n in the low bits
  const Floats bounded = x < LOWEST ? all(LOWEST) : x > HIGHEST ? all(HIGHEST) : x;
  const Floats shifted = bounded * 1.44269504088896341f + TO_INTEGER;
  const Floats n = shifted - TO_INTEGER;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const Ints power = ((Ints)shifted << 23) + 0x3f800000;
  const Floats value = p * (Floats)power;
  return x < LOWEST ? Floats{} : value;
}
