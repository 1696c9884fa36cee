// levels: avx2 avx512
// Attention of few tokens in fp32, forward and backward. All scores of a head fit a core's cache,
// so each head is one task, packed once and multiplied in registers. Libraries split such products
// for their threads and pay for it; sentences have 17 tokens.
//
// A packed matrix has rows filled up with zeros to whole vectors: `pack` keeps an operand's order,
// `pack_transposed` does not. Every product is left @ packed; left is read an element at a time, in
// either order of its axes.
//
// B batch, T queries, S keys, H heads, D head_dim
#include "short.h"

#include <immintrin.h>
#include <math.h>
#include <omp.h>

#include "common/sizes.h"
#include "common/vectors.h"

namespace vatt_fast {
namespace VF_LEVEL {

// -- products ------------------------------------------------------------------------------------

constexpr int ROWS = 6,
              LANES = WIDTH == 16
                          ? 4
                          : 2;  // of a product: as many sums as leave registers for the operands

struct Left {
  const float* data;
  int64_t row, column;  // strides
};

struct Packed {
  float* data;
  int64_t width;  // a multiple of WIDTH
};

template <int R, int L>
static inline void block(Left left, const float* b, int64_t width, int64_t depth, float* c) {
  Floats sums[R][L] = {};
  for (int64_t k = 0; k < depth; k++) {
    Floats right[L];
    for (int l = 0; l < L; l++) right[l] = load(b + k * width + l * WIDTH);
    for (int r = 0; r < R; r++) {
      const Floats value = all(left.data[r * left.row + k * left.column]);
      for (int l = 0; l < L; l++) sums[r][l] += value * right[l];
    }
  }
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) store(c + r * width + l * WIDTH, sums[r][l]);
}

// What of a product is made. A causal one leaves out blocks of keys after their queries: of scores
// (keys by queries) a row's columns before its own, of depth what is after a row (keys, of a query)
// or before it (queries, of a key). Whole blocks are made: what is left out within one must be 0.
enum class Part { all, later_columns, earlier_depth, later_depth };

template <int R, int L>
static inline void block_at(int64_t row, Part part, Left left, const float* b, int64_t width,
                            int64_t depth, float* c) {
  left.data += row * left.row, c += row * width;
  if (part == Part::earlier_depth) depth = minimum(depth, row + R);
  if (part == Part::later_depth) left.data += row * left.column, b += row * width, depth -= row;
  block<R, L>(left, b, width, depth, c);
}

template <int L>
static void strip(Part part, Left left, const float* b, int64_t width, int64_t rows, int64_t depth,
                  float* c) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) block_at<ROWS, L>(row, part, left, b, width, depth, c);
  switch (rows - row) {
    case 5:
      return block_at<5, L>(row, part, left, b, width, depth, c);
    case 4:
      return block_at<4, L>(row, part, left, b, width, depth, c);
    case 3:
      return block_at<3, L>(row, part, left, b, width, depth, c);
    case 2:
      return block_at<2, L>(row, part, left, b, width, depth, c);
    case 1:
      return block_at<1, L>(row, part, left, b, width, depth, c);
  }
}

// c (rows, b.width) = left (rows, depth) @ b (depth, b.width)
static void multiply(Part part, Left left, Packed b, int64_t rows, int64_t depth, float* c) {
  int64_t n = 0;
  const auto rows_to = [&](int64_t column) {
    return part == Part::later_columns ? minimum(rows, column) : rows;
  };
  for (; n + LANES * WIDTH <= b.width; n += LANES * WIDTH)
    strip<LANES>(part, left, b.data + n, b.width, rows_to(n + LANES * WIDTH), depth, c + n);
  for (; n + 2 * WIDTH <= b.width; n += 2 * WIDTH)
    strip<2>(part, left, b.data + n, b.width, rows_to(n + 2 * WIDTH), depth, c + n);
  for (; n < b.width; n += WIDTH)
    strip<1>(part, left, b.data + n, b.width, rows_to(n + WIDTH), depth, c + n);
}

// -- packing -------------------------------------------------------------------------------------

static inline int64_t padded(int64_t n) { return round_up(n, WIDTH); }

static Packed pack(const float* from, int64_t row, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; r++) {
    __builtin_memcpy(to + r * padded(width), from + r * row, sizeof(float) * width);
    for (int64_t i = width; i < padded(width); i++) to[r * padded(width) + i] = 0;
  }
  return {to, padded(width)};
}

// Four rows at a time, in their order: whole columns, each row some KiB from the next, would drive
// each other from the cache.
static Packed pack_transposed(const float* from, int64_t row, int64_t rows, int64_t width,
                              float* to) {
  const int64_t across = padded(rows), fours = rows / 4 * 4, blocks = width / 4 * 4;
  for (int64_t r = 0; r < fours; r += 4)
    for (int64_t i = 0; i < blocks; i += 4) {
      const float* at = from + r * row + i;
      float* place = to + i * across + r;
      __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + row), c = _mm_loadu_ps(at + 2 * row),
             d = _mm_loadu_ps(at + 3 * row);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(place, a);
      _mm_storeu_ps(place + across, b);
      _mm_storeu_ps(place + 2 * across, c);
      _mm_storeu_ps(place + 3 * across, d);
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = r < fours ? blocks : 0; i < width; i++) to[i * across + r] = from[r * row + i];
  for (int64_t i = 0; i < width; i++)
    for (int64_t r = rows; r < across; r++) to[i * across + r] = 0;
  return {to, across};
}

static inline void unpack(const float* from, int64_t width, float factor, float* to) {
  for (int64_t i = 0; i < width; i++) to[i] = factor * from[i];
}

// -- one head ------------------------------------------------------------------------------------
// Scores lie transposed, (S, padded T): a vector holds a key's scores with several queries, so that
// softmax is sums of vectors. Lanes beyond T hold what no result takes.

static inline const float* head_of(const FloatHeads& x, int64_t b, int64_t h) {
  return x.data + b * x.batch + h * x.head;
}

// A thread's working memory, in the order it is taken.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  }
};

int64_t short_attention_floats(int64_t T, int64_t S, int64_t D) {  // the backward's
  const int64_t longer = T > S ? T : S;
  return 2 * S * padded(T) + 2 * padded(T) + D * padded(T) + 2 * longer * padded(D);
}

static inline bool hidden(const ShortAttention& args, int64_t b, int64_t s) {
  return args.key_mask && !args.key_mask[b * args.keys + s];
}

static bool all_hidden(const ShortAttention& args, int64_t b) {
  int64_t s = 0;
  while (s < args.keys && hidden(args, b, s)) s++;
  return s == args.keys;
}

// Keys or values: whatever hidden ones hold, nan too, is nothing.
static Packed pack_keys(const ShortAttention& args, int64_t b, const float* from, int64_t row,
                        float* to) {
  const Packed packed = pack(from, row, args.keys, args.head_dim, to);
  for (int64_t s = 0; s < args.keys; s++)
    if (hidden(args, b, s))
      __builtin_memset(to + s * packed.width, 0, sizeof(float) * packed.width);
  return packed;
}

static void zero(float* to, int64_t rows, int64_t width, int64_t row) {
  for (int64_t r = 0; r < rows; r++) __builtin_memset(to + r * row, 0, sizeof(float) * width);
}

// A key's products become scores with WIDTH queries, from the t-th on.
static inline Floats score(const ShortAttention& args, int64_t h, int64_t s, int64_t t,
                           const float* products) {
  const Floats x = load(products + s * padded(args.queries) + t) * args.scale;
  return args.bias ? x + load(args.bias + (h * args.keys + s) * args.bias_row + t) : x;
}

// Keys that any of WIDTH queries, from the t-th on, attends.
template <bool causal>
static inline int64_t keys_of(const ShortAttention& args, int64_t t) {
  return causal ? minimum(args.keys, t + WIDTH) : args.keys;
}

// Which of WIDTH queries, from the t-th on, come no earlier than a key.
static inline Ints reach(int64_t t, int64_t s) {
  Ints lanes;
  for (int i = 0; i < WIDTH; i++) lanes[i] = i;
  return lanes >= int32_t(s - t);
}

// Zeros to keys after WIDTH queries, as many as products still read (Part).
template <bool causal>
static inline void zero_later(const ShortAttention& args, int64_t t, float* scores) {
  const int64_t first = keys_of<causal>(args, t);
  for (int64_t s = first; s < minimum(args.keys, first + ROWS); s++)
    store(scores + s * padded(args.queries) + t, Floats{});
}

// Products become exp(scores - peak); `peaks` and `totals` are those of each query. A query without
// a key has the peak -inf and the total 0.
template <bool causal>
static void exponentials(const ShortAttention& args, int64_t b, int64_t h, float* products,
                         float* peaks, float* totals) {
  const int64_t width = padded(args.queries);
  for (int64_t t = 0; t < width; t += WIDTH) {
    const int64_t keys = keys_of<causal>(args, t);
    Floats top = all(-INFINITY), total = {};
    for (int64_t s = 0; s < keys; s++)
      if (!hidden(args, b, s)) {
        Floats x = score(args, h, s, t, products);
        if (causal && s > t) x = reach(t, s) ? x : all(-INFINITY);
        store(products + s * width + t, x);
        top = larger(top, x);
      }
    store(peaks + t, top);
    top = top == -INFINITY ? Floats{} : top;
    for (int64_t s = 0; s < keys; s++) {
      float* at = products + s * width + t;
      const Floats e = hidden(args, b, s) ? Floats{} : exp_of(load(at) - top);
      store(at, e);
      total += e;
    }
    store(totals + t, total);
    zero_later<causal>(args, t, products);
  }
}

static void forward_head(const ShortAttention& args, int64_t b, int64_t h, float* out, float* lse,
                         Scratch memory) {
  const int64_t T = args.queries, S = args.keys, H = args.heads, D = args.head_dim,
                width = padded(T);
  if (all_hidden(args, b)) {
    for (int64_t t = 0; t < T; t++) lse[(b * H + h) * T + t] = -INFINITY;
    return zero(out + (b * T * H + h) * D, T, D, H * D);
  }
  float *weights = memory.take(S * width), *peaks = memory.take(width),
        *totals = memory.take(width);
  const Packed queries =
      pack_transposed(head_of(args.q, b, h), args.q.row, T, D, memory.take(D * width));
  multiply(args.causal ? Part::later_columns : Part::all, {head_of(args.k, b, h), args.k.row, 1},
           queries, S, D, weights);
  (args.causal ? exponentials<true> : exponentials<false>)(args, b, h, weights, peaks, totals);
  const Packed values =
      pack_keys(args, b, head_of(args.v, b, h), args.v.row, memory.take(S * padded(D)));
  float* mixed = memory.take(T * padded(D));
  multiply(args.causal ? Part::earlier_depth : Part::all, {weights, 1, width}, values, T, S, mixed);
  for (int64_t t = 0; t < T; t++) {
    lse[(b * H + h) * T + t] = peaks[t] + logf(totals[t]);
    float* row = out + ((b * T + t) * H + h) * D;
    if (totals[t] == 0)
      zero(row, 1, D, D);
    else
      unpack(mixed + t * padded(D), D, 1 / totals[t], row);
  }
}

// Products q k^T and d_out v^T become probabilities and the gradients of the scores, which are
// added to d_bias. The probabilities are made to sum to 1 once more: lse was rounded.
template <bool causal>
static void differentiate(const ShortAttention& args, int64_t b, int64_t h, const float* lse,
                          const float* d_lse, float* p, float* d_scores, float* d_bias) {
  const int64_t width = padded(args.queries);
  for (int64_t t = 0; t < width; t += WIDTH) {
    const Floats log_sum = load(lse + t);
    const Ints has_keys = log_sum < INFINITY;
    const int64_t keys = keys_of<causal>(args, t);
    Floats total = {}, delta = {};
    for (int64_t s = 0; s < keys; s++) {
      const bool nothing = hidden(args, b, s);
      Floats e = nothing ? Floats{} : exp_of(score(args, h, s, t, p) - log_sum);
      if (causal && s > t) e = where(reach(t, s), e);
      if (nothing) store(d_scores + s * width + t, e);
      store(p + s * width + t, e);
      total += e;
      delta += e * load(d_scores + s * width + t);
    }
    const Floats factor = total > 0.0f ? 1.0f / total : Floats{};
    delta = delta * factor - load(d_lse + t);
    for (int64_t s = 0; s < keys; s++) {
      float *e = p + s * width + t, *d = d_scores + s * width + t;
      store(e, load(e) * factor);
      store(d, where(has_keys, load(e) * (load(d) - delta)));  // of a hidden key: 0
      if (d_bias)
        store(d_bias + s * args.bias_row + t, load(d_bias + s * args.bias_row + t) + load(d));
    }
    zero_later<causal>(args, t, p);
    zero_later<causal>(args, t, d_scores);
  }
}

static void unpack_rows(const float* from, int64_t rows, int64_t width, float factor, float* to,
                        int64_t row) {
  for (int64_t r = 0; r < rows; r++) unpack(from + r * padded(width), width, factor, to + r * row);
}

static void backward_head(const ShortAttention& args, const ShortGradients& grads, int64_t b,
                          int64_t h, float* d_bias, Scratch memory) {
  const int64_t T = args.queries, S = args.keys, H = args.heads, D = args.head_dim,
                width = padded(T), longer = T > S ? T : S;
  float *p = memory.take(S * width), *d_scores = memory.take(S * width), *lse = memory.take(width),
        *d_lse = memory.take(width);
  float *transposed = memory.take(D * width), *packed = memory.take(longer * padded(D)),
        *result = memory.take(longer * padded(D));
  const float *q = head_of(args.q, b, h), *k = head_of(args.k, b, h),
              *d_out = head_of(grads.d_out, b, h);
  float *d_q = grads.d_q + (b * T * H + h) * D, *d_k = grads.d_k + (b * S * H + h) * D,
        *d_v = grads.d_v + (b * S * H + h) * D;
  if (all_hidden(args, b))
    return zero(d_q, T, D, H * D), zero(d_k, S, D, H * D), zero(d_v, S, D, H * D);
  for (int64_t t = 0; t < width; t++) {
    const int64_t at = (b * H + h) * T + t;
    const bool empty =
        t >= T || grads.lse[at] == -INFINITY;  // no key: no gradient, whatever comes in
    lse[t] = empty ? INFINITY : grads.lse[at];
    d_lse[t] = empty || !grads.d_lse ? 0 : grads.d_lse[at];
  }
  const Part of_scores = args.causal ? Part::later_columns : Part::all,
             of_queries = args.causal ? Part::earlier_depth : Part::all,
             of_keys = args.causal ? Part::later_depth : Part::all;
  multiply(of_scores, {k, args.k.row, 1}, pack_transposed(q, args.q.row, T, D, transposed), S, D,
           p);
  multiply(of_scores, {head_of(args.v, b, h), args.v.row, 1},
           pack_transposed(d_out, grads.d_out.row, T, D, transposed), S, D, d_scores);
  (args.causal ? differentiate<true> : differentiate<false>)(args, b, h, lse, d_lse, p, d_scores,
                                                             d_bias);
  const Packed packed_d_out = pack(d_out, grads.d_out.row, T, D, packed);
  for (int64_t t = 0; t < T; t++)
    if (lse[t] == INFINITY) zero(packed + t * packed_d_out.width, 1, packed_d_out.width, 0);
  multiply(of_keys, {p, width, 1}, packed_d_out, S, T, result);
  unpack_rows(result, S, D, 1, d_v, H * D);
  multiply(of_keys, {d_scores, width, 1}, pack(q, args.q.row, T, D, packed), S, T, result);
  unpack_rows(result, S, D, args.scale, d_k, H * D);
  multiply(of_queries, {d_scores, 1, width}, pack_keys(args, b, k, args.k.row, packed), T, S,
           result);
  unpack_rows(result, T, D, args.scale, d_q, H * D);
}

// -- all heads -----------------------------------------------------------------------------------

static Scratch memory_of(const ShortAttention& args) {
  return {args.scratch +
          omp_get_thread_num() * short_attention_floats(args.queries, args.keys, args.head_dim)};
}

void short_attention_forward(const ShortAttention& args, float* out, float* lse) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t task = 0; task < args.batch * args.heads; task++)
    forward_head(args, task / args.heads, task % args.heads, out, lse, memory_of(args));
}

void short_attention_backward(const ShortAttention& args, const ShortGradients& grads) {
  const int64_t scores = args.keys * args.bias_row;
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t task = 0; task < grads.groups * args.heads; task++) {
    const int64_t group = task / args.heads, h = task % args.heads;
    float* d_bias = grads.d_bias ? grads.d_bias + task * scores : nullptr;
    for (int64_t i = 0; d_bias && i < scores; i++) d_bias[i] = 0;
    for (int64_t b = group * args.batch / grads.groups; b < (group + 1) * args.batch / grads.groups;
         b++)
      backward_head(args, grads, b, h, d_bias, memory_of(args));
  }
}

}  // namespace VF_LEVEL
}  // namespace vatt_fast
