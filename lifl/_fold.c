/* The fold kernels: weighted sums of updates, their mean, Flower's mean, and the copy that looks for
 * NaN and Inf on the way. Pure: pointers in, numbers out; no arena, no clock, no allocation.
 *
 * Every kernel is written once and compiled for three vector widths; the widest that the machine
 * has is taken at run time. There is no fused multiply-add (-ffp-contract=off), so the same inputs
 * in the same order give the same bits on every machine.
 *
 * Sums of int64 are pairs (high, low) of doubles, about 106 bits: a counter above 2^53 keeps its
 * last digit. All others are float64: exact for the smaller integers while |sum| < 2^53. */
#define _GNU_SOURCE
#include "_shm.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

/* Elements done for all updates before going on: the sums (8 KiB) stay in the first-level cache, so
 * each update is read once from memory and the sums are written once. */
#define CHUNK 1024u

/* Sums of more elements than this fit no cache near the core. */
#define MANY (1u << 20)

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

/* The exponent is moved by a multiplication, which handles subnormals too. Finite inputs only:
 * admission has refused the others. */
INLINE float half_to_float(uint16_t h) {
  float magnitude = float_of_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &magnitude, sizeof bits);
  return float_of_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

INLINE float bfloat_to_float(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

/* One rounding, to nearest even, of a double to a format with `mantissa` bits and the smallest normal
 * exponent `emin`: scale so that the last kept bit is 1, rint, put the exponent back. */
INLINE uint16_t narrow(double v, int mantissa, int emin, uint16_t infinity) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  uint16_t sign = (uint16_t)(bits >> 63 << 15);
  int e = (int)(bits >> 52 & 0x7ff) - 1023;
  e = e < emin ? emin : e;
  if (e > 1 - emin) return sign | infinity; /* also NaN and Inf, which the caller has flagged */
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
  if (f == 0x1p63) part += 1; /* 2^63 is no int64: count from the one below */
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

/* ---------------------------------------------------------------- fold: sum = previous + sum of w*x */

/* Four updates at a time: the sums are loaded and stored a quarter as often. */
#define FOUR(LOAD, START)                                                                       \
  for (uint32_t k = 0; k < n;) {                                                                \
    const void *x0 = xs[k], *x1 = k + 1 < n ? xs[k + 1] : x0, *x2 = k + 2 < n ? xs[k + 2] : x0, \
               *x3 = k + 3 < n ? xs[k + 3] : x0;                                                \
    const double *w = ws + k;                                                                   \
    uint32_t left = n - k;                                                                      \
    if (left >= 4) {                                                                            \
      double w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];                                        \
      for (uint64_t i = 0; i < m; i++)                                                          \
        s[i] = START + ((w0 * LOAD(x0, at + i) + w1 * LOAD(x1, at + i)) +                       \
                        (w2 * LOAD(x2, at + i) + w3 * LOAD(x3, at + i)));                       \
      k += 4;                                                                                   \
    } else if (left >= 2) {                                                                     \
      double w0 = w[0], w1 = w[1];                                                              \
      for (uint64_t i = 0; i < m; i++) s[i] = START + (w0 * LOAD(x0, at + i) + w1 * LOAD(x1, at + i)); \
      k += 2;                                                                                   \
    } else {                                                                                    \
      double w0 = w[0];                                                                         \
      for (uint64_t i = 0; i < m; i++) s[i] = START + w0 * LOAD(x0, at + i);                    \
      k += 1;                                                                                   \
    }                                                                                           \
    p = s;                                                                                      \
  }

/* Past the caches where the sums would not stay there anyway: a plain store would first read the line
 * that it writes over, which took 8 % longer for 8 updates of 11.7 million float32. */
INLINE void put(double *target, const double *sums, uint64_t m, int past_caches) {
#if defined(__x86_64__)
  if (past_caches && ((uintptr_t)target & 15) == 0) {
    uint64_t i = 0;
    for (; i + 1 < m; i += 2) _mm_stream_pd(target + i, _mm_load_pd(sums + i));
    if (i < m) target[i] = sums[i];
    return;
  }
#else
  (void)past_caches;
#endif
  memcpy(target, sums, m * sizeof *sums);
}

INLINE void put_end(void) {
#if defined(__x86_64__)
  _mm_sfence(); /* the commit that follows must not overtake the sums */
#endif
}

#define FOLD(CODE, T, ...)                                                                                       \
  INLINE void fold_##T(double *sum, const double *previous, const void *const *xs, const double *ws, uint32_t n, \
                       uint64_t count) {                                                                         \
    _Alignas(64) double s[CHUNK];                                                                                \
    for (uint64_t at = 0; at < count; at += CHUNK) {                                                             \
      uint64_t m = count - at < CHUNK ? count - at : CHUNK;                                                      \
      const double *p = previous ? previous + at : s;                                                            \
      if (!previous) memset(s, 0, m * sizeof *s);                                                                \
      FOUR(LOAD_##T, p[i])                                                                                       \
      put(sum + at, s, m, count > MANY);                                                                         \
    }                                                                                                            \
    put_end();                                                                                                   \
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

/* ---------------------------------------------------------------- finish: mean = (sum of sums) / weight */

#define FINISH(CODE, T, ...)                                                                                    \
  INLINE int finish_##T(void *mean, const double *const *sums, uint32_t n, double weight, uint64_t count) {     \
    double v[CHUNK];                                                                                            \
    int bad = 0;                                                                                                \
    for (uint64_t at = 0; at < count; at += CHUNK) {                                                            \
      uint64_t m = count - at < CHUNK ? count - at : CHUNK;                                                     \
      if (n == 1) {                                                                                             \
        for (uint64_t i = 0; i < m; i++) v[i] = sums[0][at + i] / weight;                                       \
      } else if (n == 2) {                                                                                      \
        const double *a = sums[0] + at, *b = sums[1] + at;                                                      \
        for (uint64_t i = 0; i < m; i++) v[i] = (a[i] + b[i]) / weight;                                         \
      } else {                                                                                                  \
        memcpy(v, sums[0] + at, m * sizeof *v);                                                                 \
        for (uint32_t k = 1; k < n; k++)                                                                        \
          for (uint64_t i = 0; i < m; i++) v[i] += sums[k][at + i];                                             \
        for (uint64_t i = 0; i < m; i++) v[i] /= weight;                                                        \
      }                                                                                                         \
      for (uint64_t i = 0; i < m; i++) bad |= !(fabs(v[i]) <= DBL_MAX);                                         \
      for (uint64_t i = 0; i < m; i++) STORE_##T(mean, at + i, v[i]);                                           \
    }                                                                                                           \
    return bad ? LIFL_OVERFLOW : LIFL_OK;                                                                       \
  }
DTYPES(FINISH, )

INLINE int finish_i64(int64_t *mean, const struct pair *const *sums, uint32_t n, double weight, double low,
                      uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    struct pair s = sums[0][i];
    for (uint32_t k = 1; k < n; k++) s = pair_add(s, sums[k][i]);
    mean[i] = pair_round(s, weight, low);
  }
  return LIFL_OK;
}

#define FINISH_CASE(CODE, T, ...) \
  case CODE: return finish_##T(mean, (const double *const *)sums, n, weight, count);
#define DEFINE_FINISH(WIDTH, TARGET)                                                                               \
  TARGET static int finish_##WIDTH(uint32_t dtype, void *mean, const void *const *sums, uint32_t n, double weight, \
                                   double low, uint64_t count) {                                                   \
    switch (dtype) {                                                                                               \
      DTYPES(FINISH_CASE, )                                                                                        \
    case LIFL_INT64: return finish_i64(mean, (const struct pair *const *)sums, n, weight, low, count);             \
    default: return LIFL_EINVAL;                                                                                   \
    }                                                                                                              \
  }
WIDTHS(DEFINE_FINISH)

/* `weight_low` matters for int64 alone, whose sums are that exact. */
int lifl_finish(uint32_t dtype, void *mean, const void *const *sums, uint32_t n, double weight, double weight_low,
                uint64_t count) {
  if (n == 0 || !(weight > 0)) return LIFL_EINVAL;
  CALL(finish, dtype, mean, sums, n, weight, weight_low, count)
}

/* ---------------------------------------------------------------- Flower's mean, bit by bit */

/* flwr.serverapp.strategy.strategy_utils.aggregate_arrayrecords: m = x0 * f0, then m += xi * fi, with
 * f = weight / total weight a Python float. NumPy computes that in the array's dtype, the factor
 * rounded to it first; in float64 for integers and booleans; float16 in float32, rounded after each
 * step. */
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

/* ---------------------------------------------------------------- the way in */

/* An exponent of all ones is NaN or Inf. Integer arithmetic only: no flags, no traps, and it
 * vectorises. The chunk is looked at while it is in the first-level cache from the copy. */
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

#define DEFINE_COPY(WIDTH, TARGET)                                                                             \
  TARGET static int64_t copy_##WIDTH(uint32_t dtype, uint8_t *target, const uint8_t *source, uint64_t count) { \
    uint64_t size = dtype_bytes[dtype], step = 32768 / size;                                                   \
    for (uint64_t at = 0; at < count; at += step) {                                                            \
      uint64_t m = count - at < step ? count - at : step;                                                      \
      if (source != target) memcpy(target + at * size, source + at * size, m * size);                          \
      if (has_nonfinite(dtype, target + at * size, m)) {                                                       \
        uint64_t i = at;                                                                                       \
        while (!has_nonfinite(dtype, target + i * size, 1)) i++;                                               \
        return (int64_t)i;                                                                                     \
      }                                                                                                        \
    }                                                                                                          \
    return -1;                                                                                                 \
  }
WIDTHS(DEFINE_COPY)

/* Copies `count` elements (none when source == target) and returns the index of the first that is not
 * finite, -1 if all are, -2 for an unknown dtype. What was copied before stays copied. */
int64_t lifl_copy_finite(uint32_t dtype, void *target, const void *source, uint64_t count) {
  if (dtype > LIFL_BOOL) return -2;
  CALL(copy, dtype, target, source, count)
}

/* ---------------------------------------------------------------- what the machine can do at most */

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
