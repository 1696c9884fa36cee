// levels: avx512_bf16 amx_bf16
// Our own products in bf16, and what stands around them: from patches to tokens, and from the
// gradient of tokens to that of the weight. Sums are fp32 and added in one order for any number of
// threads.
//
// One factor is packed once, for all tasks. Of the other a task packs or takes the part that stays
// in a core's second cache. The depth is taken DEPTH values at a time, so that 64 rows or columns
// of the first factor stay in the first cache. docs/notes/patch_embed.md has what was tried.
#include <omp.h>

#include "common/bf16_panels.h"
#include "common/large_products.h"
#include "common/pairs.h"
#include "common/pieces.h"
#include "rows.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

constexpr int64_t DEPTH = 256;
constexpr int64_t SHORT = 2 * UNIT, LONG = 4 * UNIT;  // sides of a task's block of sums
constexpr int64_t SECOND_CACHE = 400 << 10;           // values: most of a megabyte

int64_t units(int64_t count) { return ceil_div(count, UNIT); }

// How many times 32 rows or columns of this depth stay in the second cache, LONG at most.
int64_t units_a_block(int64_t depth) {
  return clamp(SECOND_CACHE / (UNIT * depth), 1, LONG / UNIT);
}

// A row of 32 values as bf16, beyond `count` zeros.
inline __m512i load_32(const Bf16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_of_32(count), from);
}

inline __m512i load_32(const float* from, int64_t count) {
  return to_bf16(_mm512_maskz_loadu_ps(first_of_16(count - 16), from + 16),
                 _mm512_maskz_loadu_ps(first_of_16(count), from));
}

// 16 values as fp32, beyond `count` zeros.
inline __m512 load_16(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_of_16(count), from);
}

inline __m512 load_16(const Bf16* from, int64_t count) {
  const __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of_16(count), from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
}

inline void store_32(__m512 low, __m512 high, float* to, int64_t count) {
  _mm512_mask_storeu_ps(to, first_of_16(count), low);
  _mm512_mask_storeu_ps(to + 16, first_of_16(count - 16), high);
}

inline void store_32(__m512 low, __m512 high, Bf16* to, int64_t count) {
  _mm512_mask_storeu_epi16(to, first_of_32(count), to_bf16(high, low));
}

// -- from patches to tokens ----------------------------------------------------------------------

struct ProjectMemory {
  uint16_t* weight;  // for each SHORT of dim, for each 32 of k: two right factors
  float* bias;       // (dim), up to SHORT
  // a thread's own:
  uint16_t* rows;  // for each DEPTH of k: (32 * units_a_block(k), DEPTH)
  Bf16* row;
  float* sums;  // (LONG, SHORT)
};

ProjectMemory project_memory(Pieces& pieces, int64_t dim, int64_t k, int thread) {
  ProjectMemory memory = {};
  memory.weight = pieces.take<uint16_t>(round_up(dim, SHORT) * units(k) * UNIT);
  memory.bias = pieces.take<float>(round_up(dim, SHORT));
  for (int each = 0; each <= thread; ++each) {
    memory.rows = pieces.take<uint16_t>(units_a_block(k) * UNIT * round_up(k, DEPTH));
    memory.row = pieces.take<Bf16>(round_up(k, UNIT));
    memory.sums = pieces.take<float>(LONG * SHORT);
  }
  return memory;
}

// One task: 16 rows of the weight become columns of right factors, and their sums the bias.
template <typename In>
void pack_weight(const ProjectPatches& call, const ProjectMemory& memory, int64_t first) {
  const In* weight = static_cast<const In*>(call.weight) + first * call.weight_stride;
  const int64_t there = clamp(call.dim - first, 0, 16);
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  uint16_t* to =
      memory.weight + first / SHORT * SHORT * units(call.k) * UNIT + first % SHORT / 16 * TILE;
  __m512 sums[16] = {};
  for (int64_t v = 0; v < call.k; v += 32, to += SHORT * UNIT) {
    __m512i rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      rows[i] = i < there ? load_32(weight + i * call.weight_stride + v, call.k - v)
                          : _mm512_setzero_si512();
      sums[i] = dot(sums[i], rows[i], ones);
    }
    transpose_16(rows);
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, rows[i]);
  }
  for (int64_t i = 0; i < 16; ++i)
    memory.bias[first + i] =
        i < there ? call.bias[first + i] + call.factor * _mm512_reduce_add_ps(sums[i]) : 0;
}

// `count` patches from row `first`, as the left factor: zeros beyond them and beyond k.
template <typename In>
void pack_left(const ProjectPatches& call, const ProjectMemory& memory, int64_t first,
               int64_t count) {
  const int64_t rows = round_up(count, UNIT);
  fill_with_zero(memory.row + call.k, round_up(call.k, UNIT) - call.k);
  for (int64_t r = 0; r < rows; ++r) {
    if (r < count) pack_row<In>(call.patches, call.rows, first + r, call.k, memory.row);
    for (int64_t v = 0; v < call.k; v += 32)
      _mm512_storeu_si512(memory.rows + v / DEPTH * rows * DEPTH + r * DEPTH + v % DEPTH,
                          r < count ? _mm512_loadu_si512(memory.row + v) : _mm512_setzero_si512());
  }
}

// Where the position of each of a task's rows lies; null where it has none.
template <typename Position>
void find_positions(const ProjectPatches& call, int64_t first, int64_t count,
                    const Position** positions) {
  for (int64_t r = 0; r < count; ++r) {
    const Rows& rows = call.rows;
    const int64_t b = (first + r) / (rows.A + rows.K), n = (first + r) % (rows.A + rows.K) - rows.A;
    positions[r] = nullptr;
    if (n < 0 || !call.position) continue;
    const int64_t patch = call.keep ? call.keep[b * call.keep_stride + n] : n;
    positions[r] = static_cast<const Position*>(call.position) + patch * call.position_stride;
  }
}

// What the next columns' sums will be added to: short pieces far apart, which the processor does
// not foresee.
template <typename Position>
void prefetch_positions(const Position** positions, int64_t count, int64_t d, int64_t columns) {
  for (int64_t r = 0; r < count; ++r) {
    if (!positions[r]) continue;
    for (int64_t c = 0; c < columns; c += 64 / sizeof(Position))
      _mm_prefetch(reinterpret_cast<const char*>(positions[r] + d + c), _MM_HINT_T1);
  }
}

// Sums of columns d to d + SHORT become tokens.
template <typename Position>
void finish_rows(const ProjectPatches& call, const ProjectMemory& memory, int64_t first,
                 int64_t count, int64_t d, const Position** positions) {
  const __m512 scale = _mm512_set1_ps(call.scale);
  const int64_t rows_a_clip = call.rows.A + call.rows.K;
  for (int64_t c = 0; c < minimum(SHORT, call.dim - d); c += 32) {
    const int64_t there = call.dim - d - c;
    const float* bias = memory.bias + d + c;
    const __m512 low_bias = _mm512_loadu_ps(bias), high_bias = _mm512_loadu_ps(bias + 16);
    for (int64_t r = 0; r < count; ++r) {
      const float* sums = memory.sums + r * SHORT + c;
      __m512 low = low_bias, high = high_bias;
      if (const Position* position = positions[r]) {
        low = _mm512_add_ps(low, load_16(position + d + c, there));
        high = _mm512_add_ps(high, load_16(position + d + c + 16, there - 16));
      }
      store_32(_mm512_fmadd_ps(_mm512_loadu_ps(sums), scale, low),
               _mm512_fmadd_ps(_mm512_loadu_ps(sums + 16), scale, high),
               static_cast<Bf16*>(call.tokens) + (first + r) * call.dim + d + c, there);
    }
  }
  if (!call.rows.A) return;
  for (int64_t row = round_up(first, rows_a_clip); row < first + count; row += rows_a_clip)
    convert(call.agg + d, static_cast<Bf16*>(call.tokens) + row * call.dim + d,
            minimum(SHORT, call.dim - d));
}

// One task: `count` rows of tokens.
template <typename In, typename Position>
void project_rows(const ProjectPatches& call, const ProjectMemory& memory, int64_t first,
                  int64_t count) {
  const int64_t rows = round_up(count, UNIT);
  const uint16_t *weight = memory.weight,
                 *end = weight + round_up(call.dim, SHORT) * units(call.k) * UNIT;
  pack_left<In>(call, memory, first, count);
  const Position* positions[LONG];
  find_positions(call, first, count, positions);
  Late late = {};
  for (int64_t d = 0; d < call.dim; d += SHORT) {
    prefetch_positions(positions, count, d, minimum(SHORT, call.dim - d));
    for (int64_t v = 0; v < call.k; v += DEPTH) {
      const int64_t depth = minimum(units(call.k - v), DEPTH / UNIT);
      const uint16_t* next = weight + depth * SHORT * UNIT;
      multiply({.factors = {.left = memory.rows + v * rows,
                            .left_stride = DEPTH,
                            .left_next = 32,
                            .right = weight,
                            .right_column = TILE,
                            .right_next = SHORT * UNIT},
                .left_unit = UNIT * DEPTH,
                .right_unit = 2 * TILE,
                .rows = rows / UNIT,
                .columns = minimum(units(call.dim - d), SHORT / UNIT),
                .depth = depth,
                .sums = memory.sums,
                .stride = SHORT,
                .fresh = v == 0,
                .ahead = next,
                .ahead_values = minimum(end - next, DEPTH * SHORT)},
               late);
      weight = next;
    }
    finish(late);
    finish_rows(call, memory, first, count, d, positions);
  }
}

template <typename In, typename Weight, typename Position>
void project(const ProjectPatches& call) {
  const int64_t all = units(call.rows.count), most = units_a_block(call.k);
  const int threads = threads_for(call.rows.count * call.k, call.threads);
  // as many for each thread, and of equal length
  const int64_t tasks = minimum(all, round_up(ceil_div(all, most), threads));
#pragma omp parallel num_threads(threads)
  {
    Pieces pieces = {reinterpret_cast<uintptr_t>(call.scratch)};
    const ProjectMemory memory = project_memory(pieces, call.dim, call.k, omp_get_thread_num());
    begin_products();
#pragma omp for schedule(static)
    for (int64_t d = 0; d < round_up(call.dim, SHORT); d += 16)
      pack_weight<Weight>(call, memory, d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * all / tasks * UNIT, last = (task + 1) * all / tasks * UNIT;
      project_rows<In, Position>(call, memory, first, minimum(last, call.rows.count) - first);
    }
    end_products();
  }
}

template <typename In, typename Weight>
void project_from(const ProjectPatches& call) {
  if (call.position_element == Element::bf16)
    project<In, Weight, Bf16>(call);
  else
    project<In, Weight, float>(call);
}

template <typename In>
void project_from(const ProjectPatches& call) {
  if (call.weight_element == Element::bf16)
    project_from<In, Bf16>(call);
  else
    project_from<In, float>(call);
}

// -- from the gradient of tokens to that of the weight -------------------------------------------

struct WeighMemory {
  uint16_t* left;   // for each SHORT of dim, for each DEPTH of rows: (SHORT, DEPTH)
  uint16_t* right;  // for each 32 of k, for each 32 rows: a right factor
  // a thread's own:
  Bf16* rows;   // (32, k up to 32)
  float* sums;  // (SHORT, LONG)
};

WeighMemory weigh_memory(Pieces& pieces, int64_t rows, int64_t dim, int64_t k, int thread) {
  WeighMemory memory = {};
  memory.left = pieces.take<uint16_t>(round_up(dim, SHORT) * round_up(rows, DEPTH));
  memory.right = pieces.take<uint16_t>(round_up(k, UNIT) * round_up(rows, UNIT));
  for (int each = 0; each <= thread; ++each) {
    memory.rows = pieces.take<Bf16>(UNIT * round_up(k, UNIT));
    memory.sums = pieces.take<float>(SHORT * LONG);
  }
  return memory;
}

// One task: 32 rows of d_tokens, transposed, and the 32 rows of patches that they met.
template <typename In>
void pack_both(const WeighPatches& call, const WeighMemory& memory, int64_t first) {
  const int64_t count = minimum(call.rows.count - first, UNIT), wide = round_up(call.k, UNIT);
  const uint16_t* d_tokens = static_cast<const uint16_t*>(call.d_tokens) + first * call.dim;
  const uint16_t* rows = reinterpret_cast<const uint16_t*>(memory.rows);
  __m512i low[16], high[16];
  for (int64_t d = 0; d < round_up(call.dim, SHORT); d += UNIT) {
    transpose_rows(d_tokens + d, call.dim, count, call.dim - d, low, high);
    uint16_t* to = memory.left + d / SHORT * SHORT * round_up(call.rows.count, DEPTH) +
                   first / DEPTH * DEPTH * SHORT + d % SHORT * DEPTH + first % DEPTH;
    store_each(low, to, DEPTH);
    store_each(high, to + 16 * DEPTH, DEPTH);
  }
  for (int64_t r = 0; r < count; ++r)
    pack_row<In>(call.patches, call.rows, first + r, call.k, memory.rows + r * wide);
  for (int64_t v = 0; v < call.k; v += UNIT) {
    pair_rows(rows + v, wide, count, call.k - v, low, high);
    uint16_t* to = memory.right + v * round_up(call.rows.count, UNIT) + first * UNIT;
    store_each(low, to, 32);
    store_each(high, to + TILE, 32);
  }
}

// Sums of `count` values of a row of the weight become its gradient.
template <typename Out>
void finish_gradient(const WeighPatches& call, int64_t d, int64_t v, int64_t count,
                     const float* sums) {
  Out* to = static_cast<Out*>(call.d_weight) + d * call.k + v;
  const __m512 scale = _mm512_set1_ps(call.scale),
               shift = _mm512_set1_ps(call.factor * call.d_bias[d]);
  for (int64_t i = 0; i < count; i += 32) {
    const __m512 low = call.grows ? load_16(to + i, count - i) : shift,
                 high = call.grows ? load_16(to + i + 16, count - i - 16) : shift;
    store_32(_mm512_fmadd_ps(_mm512_loadu_ps(sums + i), scale, low),
             _mm512_fmadd_ps(_mm512_loadu_ps(sums + i + 16), scale, high), to + i, count - i);
  }
}

// One task: columns v to v + 32 * columns of the gradient, rows from d to end.
template <typename Out>
void weigh_columns(const WeighPatches& call, const WeighMemory& memory, int64_t v, int64_t columns,
                   int64_t d, int64_t end) {
  const int64_t rows = call.rows.count;
  const uint16_t *left = memory.left + d * round_up(rows, DEPTH),
                 *last = memory.left + round_up(end, SHORT) * round_up(rows, DEPTH);
  Late late = {};
  for (; d < end; d += SHORT) {
    for (int64_t r = 0; r < rows; r += DEPTH) {
      const uint16_t* next = left + DEPTH * SHORT;
      multiply({.factors = {.left = left,
                            .left_stride = DEPTH,
                            .left_next = 32,
                            .right = memory.right + v * round_up(rows, UNIT) + r * UNIT,
                            .right_column = TILE,
                            .right_next = 2 * TILE},
                .left_unit = UNIT * DEPTH,
                .right_unit = UNIT * round_up(rows, UNIT),
                .rows = minimum(units(end - d), SHORT / UNIT),
                .columns = columns,
                .depth = minimum(units(rows - r), DEPTH / UNIT),
                .sums = memory.sums,
                .stride = LONG,
                .fresh = r == 0,
                .ahead = next,
                .ahead_values = minimum(last - next, DEPTH * SHORT)},
               late);
      left = next;
    }
    finish(late);
    for (int64_t i = 0; i < minimum(end - d, SHORT); ++i)
      finish_gradient<Out>(call, d + i, v, minimum(call.k - v, columns * UNIT),
                           memory.sums + i * LONG);
  }
}

template <typename In, typename Out>
void weigh(const WeighPatches& call) {
  const int64_t rows = call.rows.count;
  const int threads = threads_for(rows * call.k, call.threads);
  // the gradient in blocks of at most LONG columns, of rows so that each thread has its part
  const int64_t pairs = ceil_div(units(call.k), 2), strips = ceil_div(call.dim, SHORT),
                across = ceil_div(call.k, LONG),
                down = minimum(strips, ceil_div(threads * 4, across)), tasks = across * down;
#pragma omp parallel num_threads(threads)
  {
    Pieces pieces = {reinterpret_cast<uintptr_t>(call.scratch)};
    const WeighMemory memory = weigh_memory(pieces, rows, call.dim, call.k, omp_get_thread_num());
    begin_products();
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += UNIT) pack_both<In>(call, memory, first);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = task / down, j = task % down;
      const int64_t column = i * pairs / across * 2,
                    end = minimum((i + 1) * pairs / across * 2, units(call.k));
      weigh_columns<Out>(call, memory, column * UNIT, end - column, j * strips / down * SHORT,
                         minimum((j + 1) * strips / down * SHORT, call.dim));
    }
    end_products();
  }
}

template <typename In>
void weigh_from(const WeighPatches& call) {
  if (call.element == Element::bf16)
    weigh<In, Bf16>(call);
  else
    weigh<In, float>(call);
}

}  // namespace

// -- entry points --------------------------------------------------------------------------------

#define VF_FROM(function, call)       \
  switch ((call).patches.element) {   \
    case Element::uint8:              \
      return function<uint8_t>(call); \
    case Element::bf16:               \
      return function<Bf16>(call);    \
    case Element::fp16:               \
      return function<Half>(call);    \
    case Element::fp32:               \
      return function<float>(call);   \
  }

void project_patches(const ProjectPatches& call) { VF_FROM(project_from, call) }

void weigh_patches(const WeighPatches& call){VF_FROM(weigh_from, call)}
#undef VF_FROM

int64_t project_scratch(int64_t dim, int64_t k, int threads) {
  Pieces pieces = {};
  project_memory(pieces, dim, k, threads - 1);
  return static_cast<int64_t>(pieces.next) + 64;
}

int64_t weigh_scratch(int64_t rows, int64_t dim, int64_t k, int threads) {
  Pieces pieces = {};
  weigh_memory(pieces, rows, dim, k, threads - 1);
  return static_cast<int64_t>(pieces.next) + 64;
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
