/* The fold kernels: weighted sums of updates, their mean, Flower's mean, and the copy that looks for NaN and Inf on the
 * way. Pure: pointers in, numbers out; no arena, no clock, no allocation.
 *
 * Every kernel is written once and compiled for three vector widths; the machine's widest is taken at run time. There is
 * no fused multiply-add (-ffp-contract=off), so the same inputs in the same order give the same bits on every machine.
 *
 * Sums of int64 are pairs (high, low) of doubles, about 106 bits: a counter above 2^53 keeps its last digit. All other
 * sums are float64: exact for the smaller integers while |sum| < 2^53. */
#define _GNU_SOURCE
#include "_shm.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* The number of elements that are done for all updates before the next ones. If the updates need several passes, runs
 * are long (32 KiB of float32), because the hardware fetches ahead within a run; the sums (64 KiB) stay in the
 * second-level cache. If one pass takes all updates, runs are short, and the sums (4 KiB) stay in the first-level
 * cache. */
#define CHUNK 8192u
#define SHORT_CHUNK 512u
#define CHUNK_OF(updates) ((updates) > 4 ? CHUNK : SHORT_CHUNK)

/* Elements between one fetch ahead and the next, a cache line of float32. The fetches are spread out, because a core
 * has only few of them in flight. */
#define BLOCK 16u

/* The distance, in elements, of a fetch ahead of the use: far enough for memory to answer, near enough that the element
 * is still in the first-level cache. */
#define AHEAD 512u

/* A target of this size or more is written past the caches. It would not stay there, and a whole line that is written
 * past them is not read first. */
#define STREAM_BYTES (UINT64_C(1) << 21)

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define WIDTHS(X)                                                                       \
  X(v4, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))) \
  X(v3, __attribute__((target("avx2"))))                                                \
  X(v1, )
static int width(void) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  return __builtin_cpu_supports("avx2") ? 1 : 0;
}
const char *lifl_vector_width(void) { return (const char *[]){"sse2", "avx2", "avx512"}[width()]; }
#define CALL(name, ...)                          \
  switch (width()) {                             \
  case 2: return name##_v4(__VA_ARGS__);         \
  case 1: return name##_v3(__VA_ARGS__);         \
  default: return name##_v1(__VA_ARGS__);        \
  }
#else
#define WIDTHS(X) X(v1, )
const char *lifl_vector_width(void) { return "native"; }
#define CALL(name, ...) return name##_v1(__VA_ARGS__);
#endif

/* ---------------------------------------------------------------- numbers */

INLINE float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

INLINE double double_of_bits(uint64_t bits) {
  double d;
  memcpy(&d, &bits, sizeof d);
  return d;
}

/* A multiplication moves the exponent, which handles subnormals too. Inputs are finite: admission has refused the
 * others. */
INLINE float half_to_float(uint16_t h) {
  float magnitude = float_of_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &magnitude, sizeof bits);
  return float_of_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

INLINE float bfloat_to_float(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

/* Rounds a double once, to nearest even, to a format with `mantissa` bits and the smallest normal exponent `emin`: it
 * scales so that the last kept bit is 1, rounds, and puts the exponent back. */
INLINE uint16_t narrow(double v, int mantissa, int emin, uint16_t infinity) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  uint16_t sign = (uint16_t)(bits >> 63 << 15);
  int e = (int)(bits >> 52 & 0x7ff) - 1023;
  e = e < emin ? emin : e;
  if (e > 1 - emin) return sign | infinity; /* NaN and Inf too, which the caller has flagged */
  double q = rint(fabs(v) * double_of_bits((uint64_t)(mantissa - e + 1023) << 52));
  int64_t out = ((int64_t)(e - emin + 1) << mantissa) + (int64_t)q - (INT64_C(1) << mantissa);
  return sign | (uint16_t)(out > infinity ? infinity : out);
}
INLINE uint16_t half_of(double v) { return narrow(v, 10, -14, 0x7c00); }
INLINE uint16_t bfloat_of(double v) { return narrow(v, 7, -126, 0x7f80); }

struct pair {
  double high, low;
};

INLINE struct pair two_sum(double a, double b) { /* Knuth: high + low == a + b exactly */
  double s = a + b, t = s - a;
  return (struct pair){s, (a - (s - t)) + (b - t)};
}

INLINE struct pair two_product(double a, double b) { /* Dekker, without fma: the same bits everywhere */
  double p = a * b, c = 134217729.0 * a, d = 134217729.0 * b;
  double ah = c - (c - a), bh = d - (d - b), al = a - ah, bl = b - bh;
  return (struct pair){p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
}

INLINE struct pair pair_add(struct pair a, struct pair b) {
  struct pair s = two_sum(a.high, b.high), t = two_sum(a.low, b.low);
  s = two_sum(s.high, s.low + t.high);
  return two_sum(s.high, s.low + t.low);
}

INLINE struct pair pair_of_product(double w, int64_t x) {
  /* Both halves of x are exact doubles. */
  double high = (double)(x >> 32) * 4294967296.0, low = (double)(uint32_t)x;
  return pair_add(two_product(w, high), two_product(w, low));
}

/* s / (weight + low), to the nearest integer, ties to even, kept inside int64. */
INLINE int64_t pair_round(struct pair s, double weight, double low) {
  double q = s.high / weight;
  struct pair back = two_product(q, weight);
  double rest = ((s.high - back.high) - back.low + s.low - q * low) / weight;
  if (q > 0x1p63) return INT64_MAX;
  if (q < -0x1p63) return INT64_MIN;
  double f = floor(q), part = (q - f) + rest;
  int64_t whole = f == 0x1p63 ? INT64_MAX : (int64_t)f;
  if (f == 0x1p63) part += 1; /* 2^63 is no int64: `whole` is the number below, and `part` counts from there */
  double under = floor(part), step = rint(part);
  if (part - under == 0.5) step = under + (double)(((uint64_t)whole + (uint64_t)(int64_t)under) & 1);
  if (step > 0 && whole > INT64_MAX - (int64_t)step) return INT64_MAX;
  if (step < 0 && whole < INT64_MIN - (int64_t)step) return INT64_MIN;
  return whole + (int64_t)step;
}

/* ---------------------------------------------------------------- one element of each dtype */

#define LOAD_f32(x, i) ((double)((const float *)(x))[i])
#define LOAD_f64(x, i) (((const double *)(x))[i])
#define LOAD_f16(x, i) ((double)half_to_float(((const uint16_t *)(x))[i]))
#define LOAD_bf16(x, i) ((double)bfloat_to_float(((const uint16_t *)(x))[i]))
#define LOAD_i8(x, i) ((double)((const int8_t *)(x))[i])
#define LOAD_i16(x, i) ((double)((const int16_t *)(x))[i])
#define LOAD_i32(x, i) ((double)((const int32_t *)(x))[i])
#define LOAD_i64(x, i) ((double)((const int64_t *)(x))[i])
#define LOAD_u8(x, i) ((double)((const uint8_t *)(x))[i])
#define LOAD_bool(x, i) ((double)(((const uint8_t *)(x))[i] != 0))

#define STORE_f32(y, i, v) (((float *)(y))[i] = (float)(v))
#define STORE_f64(y, i, v) (((double *)(y))[i] = (v))
#define STORE_f16(y, i, v) (((uint16_t *)(y))[i] = half_of(v))
#define STORE_bf16(y, i, v) (((uint16_t *)(y))[i] = bfloat_of(v))
#define STORE_i8(y, i, v) (((int8_t *)(y))[i] = (int8_t)rint(v))
#define STORE_i16(y, i, v) (((int16_t *)(y))[i] = (int16_t)rint(v))
#define STORE_i32(y, i, v) (((int32_t *)(y))[i] = (int32_t)rint(v))
#define STORE_u8(y, i, v) (((uint8_t *)(y))[i] = (uint8_t)rint(v))
#define STORE_bool(y, i, v) (((uint8_t *)(y))[i] = rint(v) != 0)

/* All but int64, whose sums are pairs. */
#define DTYPES(X, ...)                                                                              \
  X(LIFL_FLOAT32, f32, __VA_ARGS__) X(LIFL_FLOAT64, f64, __VA_ARGS__) X(LIFL_FLOAT16, f16, __VA_ARGS__) \
  X(LIFL_BFLOAT16, bf16, __VA_ARGS__) X(LIFL_INT8, i8, __VA_ARGS__) X(LIFL_INT16, i16, __VA_ARGS__)     \
  X(LIFL_INT32, i32, __VA_ARGS__) X(LIFL_UINT8, u8, __VA_ARGS__) X(LIFL_BOOL, bool, __VA_ARGS__)

static const uint8_t dtype_bytes[] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 1};

uint64_t lifl_dtype_bytes(uint32_t dtype) { return dtype <= LIFL_BOOL ? dtype_bytes[dtype] : 0; }
uint64_t lifl_sum_bytes(uint32_t dtype) {
  return dtype > LIFL_BOOL ? 0 : dtype == LIFL_INT64 ? sizeof(struct pair) : sizeof(double);
}

/* ---------------------------------------------------------------- memory */

/* Fetches the elements that are used AHEAD later, in this run or the next: the hardware fetches ahead only within a
 * page and within a run, and too late at the beginning of each. A fetch outside of mapped memory does nothing. */
INLINE void fetch(const void *x, uint64_t nbytes) {
  for (uint64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const char *)x + i, 0, 3);
}

INLINE int is_streamed(const void *target, uint64_t nbytes) {
#if defined(__SSE2__)
  return nbytes >= STREAM_BYTES && (uintptr_t)target % 16 == 0;
#else
  (void)target, (void)nbytes;
  return 0;
#endif
}

INLINE void stream(void *target, const void *source, uint64_t nbytes) {
  uint64_t i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= nbytes; i += 16)
    _mm_stream_ps((float *)((char *)target + i), _mm_loadu_ps((const float *)((const char *)source + i)));
#endif
  memcpy((char *)target + i, (const char *)source + i, nbytes - i);
}

/* A release does not order streamed stores: this fence comes before any message about them. */
INLINE void end_stream(void) {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/* ---------------------------------------------------------------- fold: sum = previous + sum of w*x */

/* s = p + TERM for one chunk. On the way it fetches the elements used AHEAD later: those of these `step` updates, or,
 * at the end of the chunk, those that the next pass reads, of the `ahead` updates from xs[next] on, from element `to`.
 * `p` may be `s`. */
#define PASS(TERM)                                                                                           \
  for (uint64_t b = 0; b < m; b += BLOCK) {                                                                  \
    uint64_t e = m - b < BLOCK ? m : b + BLOCK, f = b + AHEAD;                                               \
    uint32_t from = f < m ? k : next, many = f < m ? step : ahead;                                           \
    uint64_t element = f < m ? at + f : to + f - m;                                                          \
    for (uint32_t j = 0; j < many; j++) fetch((const char *)xs[from + j] + element * size, BLOCK * size);    \
    _Pragma("GCC ivdep") for (uint64_t i = b; i < e; i++) s[i] = p[i] + (TERM);                              \
  }

/* s = p + sum of ws[k] * xs[k][at..], `m` elements. It takes four updates at a time: the sums are loaded and stored a
 * quarter as often. */
#define ADD(CODE, T, ...)                                                                                      \
  INLINE void add_##T(double *s, const double *p, const void *const *xs, const double *ws, uint32_t n,         \
                      uint64_t at, uint64_t m) {                                                               \
    const uint64_t size = dtype_bytes[CODE];                                                                   \
    for (uint32_t k = 0; k < n; p = s) {                                                                       \
      uint32_t step = n - k >= 4 ? 4 : n - k >= 2 ? 2 : 1;                                                     \
      uint32_t next = k + step < n ? k + step : 0, ahead = n - next < 4 ? n - next : 4;                        \
      uint64_t to = next ? at : at + m;                                                                        \
      const void *x0 = xs[k];                                                                                  \
      double w0 = ws[k];                                                                                       \
      if (step == 4) {                                                                                         \
        const void *x1 = xs[k + 1], *x2 = xs[k + 2], *x3 = xs[k + 3];                                          \
        double w1 = ws[k + 1], w2 = ws[k + 2], w3 = ws[k + 3];                                                 \
        PASS((w0 * LOAD_##T(x0, at + i) + w1 * LOAD_##T(x1, at + i)) +                                         \
             (w2 * LOAD_##T(x2, at + i) + w3 * LOAD_##T(x3, at + i)))                                          \
      } else if (step == 2) {                                                                                  \
        const void *x1 = xs[k + 1];                                                                            \
        double w1 = ws[k + 1];                                                                                 \
        PASS(w0 * LOAD_##T(x0, at + i) + w1 * LOAD_##T(x1, at + i))                                            \
      } else {                                                                                                 \
        PASS(w0 * LOAD_##T(x0, at + i))                                                                        \
      }                                                                                                        \
      k += step;                                                                                               \
    }                                                                                                          \
  }
DTYPES(ADD, )

#define FOLD(CODE, T, ...)                                                                                       \
  INLINE void fold_##T(double *sum, const double *previous, const void *const *xs, const double *ws, uint32_t n, \
                       uint64_t count) {                                                                         \
    _Alignas(64) double scratch[CHUNK];                                                                          \
    int past_caches = is_streamed(sum, count * sizeof *sum);                                                     \
    const uint64_t chunk = CHUNK_OF(n);                                                                          \
    for (uint64_t at = 0; at < count; at += chunk) {                                                             \
      uint64_t m = count - at < chunk ? count - at : chunk;                                                      \
      double *s = past_caches ? scratch : sum + at;                                                              \
      if (!previous) memset(s, 0, m * sizeof *s);                                                                \
      add_##T(s, previous ? previous + at : s, xs, ws, n, at, m);                                                \
      if (past_caches) stream(sum + at, s, m * sizeof *s);                                                       \
    }                                                                                                            \
    if (past_caches) end_stream();                                                                               \
  }
DTYPES(FOLD, )

INLINE void fold_i64(struct pair *sum, const struct pair *previous, const void *const *xs, const double *ws, uint32_t n,
                     uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    struct pair s = previous ? previous[i] : (struct pair){0, 0};
    for (uint32_t k = 0; k < n; k++) s = pair_add(s, pair_of_product(ws[k], ((const int64_t *)xs[k])[i]));
    sum[i] = s;
  }
}

#define FOLD_CASE(CODE, T, ...) \
  case CODE: fold_##T(sum, previous, xs, ws, n, count); break;
#define DEFINE_FOLD(WIDTH, TARGET)                                                                              \
  TARGET static int fold_##WIDTH(uint32_t dtype, void *sum, const void *previous, const void *const *xs,        \
                                 const double *ws, uint32_t n, uint64_t count) {                                \
    switch (dtype) {                                                                                            \
      DTYPES(FOLD_CASE, )                                                                                       \
    case LIFL_INT64: fold_i64(sum, previous, xs, ws, n, count); break;                                          \
    default: return LIFL_EINVAL;                                                                                \
    }                                                                                                           \
    return LIFL_OK;                                                                                             \
  }
WIDTHS(DEFINE_FOLD)

int lifl_fold(uint32_t dtype, void *sum, const void *previous, const void *const *updates, const double *weights,
              uint32_t n, uint64_t count) {
  if (sum == previous || n == 0) return LIFL_EINVAL;
  CALL(fold, dtype, sum, previous, updates, weights, n, count)
}

/* ---------------------------------------------------------------- finish: mean = (sum of sums + sum of w*x) / weight */

/* s = sum of the sums at `at`, `m` elements; the next elements are fetched ahead. */
INLINE void add_sums(double *s, const double *const *sums, uint32_t n, uint64_t at, uint64_t m) {
  const double *p = sums[0] + at;
  for (uint64_t b = 0; b < m; b += BLOCK, p = sums[0] + at) {
    uint64_t e = m - b < BLOCK ? m : b + BLOCK;
    for (uint32_t k = 0; k < n; k++) fetch(sums[k] + at + b + AHEAD, BLOCK * sizeof *p);
    if (n == 1) memcpy(s + b, p + b, (e - b) * sizeof *s);
    for (uint32_t k = 1; k < n; k++, p = s)
      _Pragma("GCC ivdep") for (uint64_t i = b; i < e; i++) s[i] = p[i] + sums[k][at + i];
  }
}

/* Makes the mean in one pass from sums, from updates that are in none of the sums, or from both. */
#define FINISH(CODE, T, ...)                                                                                    \
  INLINE int finish_##T(void *mean, const double *const *sums, uint32_t n, const void *const *xs, const double *ws, \
                        uint32_t updates, double weight, uint64_t count) {                                      \
    _Alignas(64) double s[CHUNK];                                                                               \
    _Alignas(64) unsigned char out[CHUNK * sizeof(double)];                                                     \
    const uint64_t size = dtype_bytes[CODE], chunk = CHUNK_OF(updates);                                     \
    int bad = 0, past_caches = is_streamed(mean, count * size);                                                 \
    for (uint64_t at = 0; at < count; at += chunk) {                                                            \
      uint64_t m = count - at < chunk ? count - at : chunk;                                                     \
      if (n) add_sums(s, sums, n, at, m);                                                                       \
      else memset(s, 0, m * sizeof *s);                                                                         \
      if (updates) add_##T(s, s, xs, ws, updates, at, m);                                                       \
      _Pragma("GCC ivdep") for (uint64_t i = 0; i < m; i++) s[i] = s[i] / weight;                               \
      for (uint64_t i = 0; i < m; i++) bad |= !(fabs(s[i]) <= DBL_MAX);                                         \
      if (past_caches) {                                                                                        \
        for (uint64_t i = 0; i < m; i++) STORE_##T(out, i, s[i]);                                               \
        stream((char *)mean + at * size, out, m * size);                                                        \
      } else {                                                                                                  \
        for (uint64_t i = 0; i < m; i++) STORE_##T(mean, at + i, s[i]);                                         \
      }                                                                                                         \
    }                                                                                                           \
    if (past_caches) end_stream();                                                                              \
    return bad ? LIFL_OVERFLOW : LIFL_OK;                                                                       \
  }
DTYPES(FINISH, )

INLINE int finish_i64(int64_t *mean, const struct pair *const *sums, uint32_t n, const void *const *xs,
                      const double *ws, uint32_t updates, double weight, double low, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    struct pair s = {0, 0};
    for (uint32_t k = 0; k < n; k++) s = pair_add(s, sums[k][i]);
    for (uint32_t k = 0; k < updates; k++) s = pair_add(s, pair_of_product(ws[k], ((const int64_t *)xs[k])[i]));
    mean[i] = pair_round(s, weight, low);
  }
  return LIFL_OK;
}

#define FINISH_CASE(CODE, T, ...) \
  case CODE: return finish_##T(mean, (const double *const *)sums, n, xs, ws, updates, weight, count);
#define DEFINE_FINISH(WIDTH, TARGET)                                                                                 \
  TARGET static int finish_##WIDTH(uint32_t dtype, void *mean, const void *const *sums, uint32_t n,                  \
                                   const void *const *xs, const double *ws, uint32_t updates, double weight,         \
                                   double low, uint64_t count) {                                                     \
    switch (dtype) {                                                                                                 \
      DTYPES(FINISH_CASE, )                                                                                          \
    case LIFL_INT64:                                                                                                 \
      return finish_i64(mean, (const struct pair *const *)sums, n, xs, ws, updates, weight, low, count);             \
    default: return LIFL_EINVAL;                                                                                     \
    }                                                                                                                \
  }
WIDTHS(DEFINE_FINISH)

/* `weight_low` matters only for int64, whose sums are that exact. */
int lifl_finish(uint32_t dtype, void *mean, const void *const *sums, uint32_t n, const void *const *updates,
                const double *weights, uint32_t num_updates, double weight, double weight_low, uint64_t count) {
  if (n + num_updates == 0 || !(weight > 0)) return LIFL_EINVAL;
  CALL(finish, dtype, mean, sums, n, updates, weights, num_updates, weight, weight_low, count)
}

/* ---------------------------------------------------------------- Flower's mean, bit by bit */

/* flwr.serverapp.strategy.strategy_utils.aggregate_arrayrecords computes m = x0 * f0, then m += xi * fi, with
 * f = weight / total weight a Python float. NumPy computes that in the array's dtype, to which it rounds the factor
 * first; integers and booleans in float64; float16 in float32, rounded after each step. */
INLINE void flower_f32(float *m, const void *const *xs, const double *fs, uint32_t n, uint64_t count) {
  for (uint64_t at = 0; at < count; at += CHUNK)
    for (uint32_t k = 0; k < n; k++) {
      const float *x = xs[k];
      float f = (float)fs[k];
      uint64_t end = count - at < CHUNK ? count : at + CHUNK;
      if (k == 0)
        for (uint64_t i = at; i < end; i++) m[i] = x[i] * f;
      else
        for (uint64_t i = at; i < end; i++) m[i] += x[i] * f;
    }
}

INLINE void flower_f16(uint16_t *m, const void *const *xs, const double *fs, uint32_t n, uint64_t count) {
  for (uint64_t i = 0; i < count; i++)
    for (uint32_t k = 0; k < n; k++) {
      uint16_t term = half_of(half_to_float(((const uint16_t *)xs[k])[i]) * half_to_float(half_of(fs[k])));
      float sum = half_to_float(m[i]) + half_to_float(term);
      m[i] = k == 0 ? term : half_of(sum);
    }
}

#define FLOWER_WIDE(T)                                                                                       \
  INLINE void flower_##T(double *m, const void *const *xs, const double *fs, uint32_t n, uint64_t count) {   \
    for (uint64_t at = 0; at < count; at += CHUNK)                                                           \
      for (uint32_t k = 0; k < n; k++) {                                                                     \
        const void *x = xs[k];                                                                               \
        double f = fs[k];                                                                                    \
        uint64_t end = count - at < CHUNK ? count : at + CHUNK;                                              \
        if (k == 0)                                                                                          \
          for (uint64_t i = at; i < end; i++) m[i] = LOAD_##T(x, i) * f;                                     \
        else                                                                                                 \
          for (uint64_t i = at; i < end; i++) m[i] += LOAD_##T(x, i) * f;                                    \
      }                                                                                                      \
  }
FLOWER_WIDE(f64)
FLOWER_WIDE(i8)
FLOWER_WIDE(i16)
FLOWER_WIDE(i32)
FLOWER_WIDE(i64)
FLOWER_WIDE(u8)
FLOWER_WIDE(bool)

#define DEFINE_FLOWER(WIDTH, TARGET)                                                                          \
  TARGET static int flower_##WIDTH(uint32_t dtype, void *m, const void *const *xs, const double *fs, uint32_t n, \
                                   uint64_t count) {                                                          \
    switch (dtype) {                                                                                          \
    case LIFL_FLOAT32: flower_f32(m, xs, fs, n, count); break;                                                \
    case LIFL_FLOAT64: flower_f64(m, xs, fs, n, count); break;                                                \
    case LIFL_FLOAT16: flower_f16(m, xs, fs, n, count); break;                                                \
    case LIFL_INT8: flower_i8(m, xs, fs, n, count); break;                                                    \
    case LIFL_INT16: flower_i16(m, xs, fs, n, count); break;                                                  \
    case LIFL_INT32: flower_i32(m, xs, fs, n, count); break;                                                  \
    case LIFL_INT64: flower_i64(m, xs, fs, n, count); break;                                                  \
    case LIFL_UINT8: flower_u8(m, xs, fs, n, count); break;                                                   \
    case LIFL_BOOL: flower_bool(m, xs, fs, n, count); break;                                                  \
    default: return LIFL_EINVAL;                                                                              \
    }                                                                                                         \
    return LIFL_OK;                                                                                           \
  }
WIDTHS(DEFINE_FLOWER)

int lifl_flower(uint32_t dtype, void *mean, const void *const *updates, const double *factors, uint32_t n,
                uint64_t count) {
  if (n == 0) return LIFL_EINVAL;
  CALL(flower, dtype, mean, updates, factors, n, count)
}

/* ---------------------------------------------------------------- copies into a block */

/* An exponent of all ones is NaN or Inf. Only integer arithmetic: no flags, no traps, and it vectorises. */
#define HAS_NONFINITE(NAME, U, MASK)                               \
  INLINE int nonfinite_##NAME(const void *data, uint64_t count) {  \
    const U *x = data;                                             \
    U bad = 0;                                                     \
    for (uint64_t i = 0; i < count; i++) bad |= (x[i] & MASK) == MASK; \
    return bad != 0;                                               \
  }
HAS_NONFINITE(f32, uint32_t, UINT32_C(0x7f800000))
HAS_NONFINITE(f64, uint64_t, UINT64_C(0x7ff0000000000000))
HAS_NONFINITE(f16, uint16_t, UINT16_C(0x7c00))
HAS_NONFINITE(bf16, uint16_t, UINT16_C(0x7f80))

INLINE int has_nonfinite(uint32_t dtype, const void *data, uint64_t count) {
  switch (dtype) {
  case LIFL_FLOAT32: return nonfinite_f32(data, count);
  case LIFL_FLOAT64: return nonfinite_f64(data, count);
  case LIFL_FLOAT16: return nonfinite_f16(data, count);
  case LIFL_BFLOAT16: return nonfinite_bf16(data, count);
  default: return 0;
  }
}

/* The check of a chunk comes before the write: it brings the chunk into the first-level cache. A source that is not
 * aligned to its elements is copied first and checked in the target. */
#define DEFINE_COPY(WIDTH, TARGET)                                                                             \
  TARGET static int64_t copy_##WIDTH(uint32_t dtype, uint8_t *target, const uint8_t *source, uint64_t count) { \
    uint64_t size = dtype_bytes[dtype], step = 1024 / size;                                                    \
    int aligned = (uintptr_t)source % size == 0;                                                               \
    int past_caches = aligned && source != target && is_streamed(target, count * size);                        \
    for (uint64_t at = 0; at < count; at += step) {                                                            \
      uint64_t m = count - at < step ? count - at : step;                                                      \
      const uint8_t *from = source + at * size;                                                                \
      uint8_t *to = target + at * size;                                                                        \
      fetch(from + 2048, 1024);                                                                                \
      if (!aligned) memcpy(to, from, m * size);                                                                \
      const uint8_t *seen = aligned ? from : to;                                                               \
      if (has_nonfinite(dtype, seen, m)) {                                                                     \
        uint64_t i = 0;                                                                                        \
        while (!has_nonfinite(dtype, seen + i * size, 1)) i++;                                                 \
        return (int64_t)(at + i);                                                                              \
      }                                                                                                        \
      if (past_caches) stream(to, from, m * size);                                                             \
      else if (aligned && source != target) memcpy(to, from, m * size);                                        \
    }                                                                                                          \
    if (past_caches) end_stream();                                                                             \
    return -1;                                                                                                 \
  }
WIDTHS(DEFINE_COPY)

/* Copies `count` elements (none when source == target). Returns the index of the first element that is not finite, -1
 * if all are, -2 for an unknown dtype. Elements that were copied before stay in the target. */
int64_t lifl_copy_finite(uint32_t dtype, void *target, const void *source, uint64_t count) {
  if (dtype > LIFL_BOOL) return -2;
  CALL(copy, dtype, target, source, count)
}

/* ---------------------------------------------------------------- the bandwidth of memory */

#define DEFINE_READ(WIDTH, TARGET)                                            \
  TARGET static double read_##WIDTH(const uint64_t *x, uint64_t n, uint32_t rounds) { \
    uint64_t all = 0;                                                         \
    for (uint32_t r = 0; r < rounds; r++) {                                   \
      uint64_t sum = r;                                                       \
      for (uint64_t i = 0; i < n; i++) sum += x[i];                           \
      __asm__ __volatile__("" : "+r"(sum) : : "memory");                      \
      all += sum;                                                             \
    }                                                                         \
    return (double)all;                                                       \
  }
WIDTHS(DEFINE_READ)

double lifl_bench_read(const void *source, uint64_t nbytes, uint32_t rounds) { CALL(read, source, nbytes / 8, rounds) }
