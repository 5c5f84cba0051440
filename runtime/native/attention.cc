// The attention kernels, written once over vectors of ATTENTION_LANES floats; the file includes itself once for each
// width. A task is one (row, key-value head, tile of new tokens, range of keys); all query heads of the group share the
// loads of keys and values, and the softmax runs online over tiles of keys. Tiles begin at the same keys however the
// cache is cut into blocks, so that the results do not depend on it.
//   few query rows (decode):  scores [row, key] as dot products, one vector of keys at a time
//   many query rows (prefill): scores [key, row] = K x Q^T, so that a lane is a query row and nothing is summed sideways
#ifndef ATTENTION_LANES

#include "attention.h"

#include "attention_tiles.h"
#include "small_floats.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass between functions that are always inlined

namespace trtllm {
namespace {

// Cached keys that follow each other in memory, or the values of the same tokens.
struct Span {
  const float* data;
  int64_t tokens;
};

// The spans of a tile of keys.
struct Spans {
  Span keys[kDirectKeys], values[kDirectKeys];
  int64_t count;
};

// A task's scratch, cut up.
struct Scratch {
  float* queries;      // [rows, D] or [D, padded rows]
  float* scores;       // [rows, kScoreStride] or [kPackedKeys, padded rows]
  float* totals;       // [rows, D]: the output before its division by sums
  float* staging;      // [kMostLanes, D]
  float* maxima;       // [padded rows], and so the rest
  float* sums;
  float* carries;      // what a new maximum makes of the totals so far
  float* positions;    // of each row, counted from the first key of the tile of keys
  float* keys;         // [kPackedKeys, D]: a tile of a cache that holds no floats, as floats
  float* values;
};

Scratch cut_scratch(const AttentionPlan& plan, const AttentionShape& shape, float* memory) {
  const int64_t rows = plan.tile_rows, size = round_up(shape.head_size, kMostLanes);
  float* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
  Scratch scratch;
  scratch.queries = take(rows * size);
  scratch.scores = take(std::max(kPackedKeys * rows, kScoreStride * kDirectRows));
  scratch.totals = take(rows * size);
  scratch.staging = take(kMostLanes * size);
  scratch.maxima = take(rows);
  scratch.sums = take(rows);
  scratch.carries = take(rows);
  scratch.positions = take(rows);
  const int64_t widened = shape.cache == CacheFormat::float32 ? 0 : kPackedKeys * size;
  scratch.keys = take(widened);
  scratch.values = take(widened);
  return scratch;
}

// The byte at which the head's row of the token at `position` begins in the key cache and in the value cache.
int64_t cache_offset(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                     int64_t position) {
  const int64_t block = arrays.block_table[task.row * shape.max_blocks + position / shape.tokens_per_block];
  const int64_t row = (block * shape.num_kv_heads + task.kv_head) * shape.tokens_per_block;
  return (row + position % shape.tokens_per_block) * cache_row_bytes(shape);
}

uint8_t* cache_row(void* cache, int64_t offset) { return static_cast<uint8_t*>(cache) + offset; }
const float* floats_at(const void* cache, int64_t offset) {
  return reinterpret_cast<const float*>(static_cast<const uint8_t*>(cache) + offset);
}

// Keys first .. first + count - 1, of which there are at most kDirectKeys.
void find_spans(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task, int64_t first,
                int64_t count, Spans& spans) {
  spans.count = 0;
  for (int64_t tokens; count > 0; first += tokens, count -= tokens) {
    tokens = std::min(count, shape.tokens_per_block - first % shape.tokens_per_block);
    const int64_t offset = cache_offset(shape, arrays, task, first);
    spans.keys[spans.count] = {floats_at(arrays.key_cache, offset), tokens};
    spans.values[spans.count++] = {floats_at(arrays.value_cache, offset), tokens};
  }
}

// The keys that are read after span `index` of a tile that ends at `end`. A machine foresees those that follow in
// memory, and a long span's worth of others would drive out what is in use: then the span itself.
const float* keys_ahead(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                        const Spans& spans, int64_t index, int64_t end) {
  const Span& span = spans.keys[index];
  if (span.tokens > kPackedKeys || shape.cache != CacheFormat::float32) return span.data;
  if (index + 1 < spans.count) return spans.keys[index + 1].data;
  return end < task.key_end ? floats_at(arrays.key_cache, cache_offset(shape, arrays, task, end)) : span.data;
}

// Keys of the tile that begins at `key`; later tiles begin at multiples of `most`.
int64_t tile_keys(const AttentionTask& task, int64_t key, int64_t most) {
  return std::min(most - key % most, task.key_end - key);
}

const float* new_token(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                       int64_t token) {
  const int64_t width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size;
  return arrays.qkv + (task.start + token) * width;
}

float* output_head(const AttentionShape& shape, const AttentionArrays& arrays, int64_t packed_token, int64_t kv_head) {
  return arrays.output + (packed_token * shape.num_heads + kv_head * group_size(shape)) * shape.head_size;
}

}  // namespace
}  // namespace trtllm

#if defined(__x86_64__)
#define ATTENTION_LANES 16
#define ATTENTION_NAMESPACE lanes16
#define ATTENTION_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#include "attention.cc"
#define ATTENTION_LANES 8
#define ATTENTION_NAMESPACE lanes8
#define ATTENTION_TARGET __attribute__((target("avx2,fma")))
#include "attention.cc"
#endif
#define ATTENTION_LANES 4
#define ATTENTION_NAMESPACE lanes4
#define ATTENTION_TARGET
#include "attention.cc"
#define ATTENTION_LANES 1
#define ATTENTION_NAMESPACE lanes1
#define ATTENTION_TARGET
#include "attention.cc"

namespace trtllm {
namespace {

struct KernelSet {
  int64_t lanes;
  void (*append)(const AttentionShape&, const AttentionArrays&, const AttentionTask&);
  void (*attend)(const AttentionPlan&, const AttentionShape&, const AttentionArrays&, const AttentionTask&,
                 const Scratch&, float* partials);
};

constexpr KernelSet kKernelSets[] = {
#if defined(__x86_64__)
    {16, lanes16::append, lanes16::attend},
    {8, lanes8::append, lanes8::attend},
#endif
    {4, lanes4::append, lanes4::attend},
    {1, lanes1::append, lanes1::attend},
};

bool machine_has(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes == 16)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (lanes == 8) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return lanes <= 4;
}

const KernelSet& kernels_of(int64_t lanes) {
  for (const KernelSet& kernels : kKernelSets)
    if (kernels.lanes == lanes) return kernels;
  __builtin_unreachable();
}

}  // namespace

int64_t choose_lanes(int64_t head_size, int64_t most_lanes) {
  for (const KernelSet& kernels : kKernelSets)
    if (kernels.lanes <= most_lanes && head_size % kernels.lanes == 0 && machine_has(kernels.lanes))
      return kernels.lanes;
  return 1;
}

void attention_append(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                      int64_t index) {
  const AttentionTask& task = plan.tasks[static_cast<size_t>(index)];
  if (task.key_end > task.past) kernels_of(plan.lanes).append(shape, arrays, task);
}

void attention_task(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                    int64_t index, float* scratch, float* partials) {
  const AttentionTask& task = plan.tasks[static_cast<size_t>(index)];
  if (!plan.append_first) attention_append(plan, shape, arrays, index);
  kernels_of(plan.lanes).attend(plan, shape, arrays, task, cut_scratch(plan, shape, scratch), partials);
}

void attention_merge(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                     const float* partials) {
  const int64_t size = shape.head_size, group = group_size(shape), stride = partial_stride(plan, shape);
  for (const AttentionMerge& merge : plan.merges)
    for (int64_t row = 0; row < merge.tokens * group; ++row) {
      const float* first = partials + merge.partial * stride;
      const float* maxima = first + plan.tile_rows * size + row;
      float top = -FLT_MAX, sum = 0;
      for (int64_t part = 0; part < merge.parts; ++part) top = std::max(top, maxima[part * stride]);
      float* to = output_head(shape, arrays, merge.token + row / group, merge.kv_head) + row % group * size;
      std::fill_n(to, size, 0.0f);
      for (int64_t part = 0; part < merge.parts; ++part) {
        const float weight = std::exp(maxima[part * stride] - top);
        const float* totals = first + part * stride + row * size;
        for (int64_t d = 0; d < size; ++d) to[d] += weight * totals[d];
        sum += weight * maxima[part * stride + plan.tile_rows];
      }
      for (int64_t d = 0; d < size; ++d) to[d] /= sum;
    }
}

}  // namespace trtllm

#else  // ATTENTION_LANES: the kernels at one width

#define ATTENTION_INLINE ATTENTION_TARGET inline __attribute__((always_inline))

namespace trtllm {
namespace {
namespace ATTENTION_NAMESPACE {

constexpr int kLanes = ATTENTION_LANES;
constexpr int kSums = kLanes == 16 ? 24 : 12;      // vectors a product keeps in registers
constexpr int kRowBlock = kSums / 2;               // rows of the widest product
constexpr int kDotRows = kLanes == 16 ? 4 : 3;     // query rows of one pass over the keys
constexpr int kDotKeys = kLanes < 4 ? kLanes : 4;  // keys of one pass over the head

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

ATTENTION_INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
ATTENTION_INLINE void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
ATTENTION_INLINE Vector splat(float value) { return value - Vector{}; }
ATTENTION_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// Holds a value in a register that the compiler would sooner load again for each use.
ATTENTION_INLINE Vector keep(Vector value) {
#if defined(__x86_64__)
  if constexpr (kLanes > 1) asm("" : "+v"(value));
#endif
  return value;
}

// Lane l of the result comes from `a` where l & H is 0 and from `b` elsewhere: lane l of it, or its partner l ^ H.
template <int H, bool SwapA, bool SwapB, int... Lane>
ATTENTION_INLINE Vector pick(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, ((Lane & H) ? kLanes + (SwapB ? Lane ^ H : Lane) : (SwapA ? Lane ^ H : Lane))...);
}
template <int H, bool SwapA, bool SwapB>
ATTENTION_INLINE Vector pick(Vector a, Vector b) {
  return pick<H, SwapA, SwapB>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Sums each of Count vectors over its lanes: lane l of the result belongs to vector l / H % Count.
template <int Count, int H>
ATTENTION_INLINE Vector fold(const Vector* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    Vector half[Count / 2];
    for (int i = 0; i < Count / 2; ++i) {
      const Vector a = vectors[2 * i], b = vectors[2 * i + 1];
      half[i] = pick<H, false, false>(a, b) + pick<H, true, true>(a, b);
    }
    return fold<Count / 2, 2 * H>(half);
  }
}

template <int H>
ATTENTION_INLINE void transpose(Vector* rows) {
  if constexpr (H < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (i & H) continue;
      const Vector a = rows[i], b = rows[i + H];
      rows[i] = pick<H, false, true>(a, b);
      rows[i + H] = pick<H, true, false>(a, b);
    }
    transpose<2 * H>(rows);
  }
}

template <int H>
ATTENTION_INLINE float sum_lanes(Vector value) {
  if constexpr (H < kLanes)
    return sum_lanes<2 * H>(value + pick<H, true, true>(value, value));
  else
    return value[0];
}

template <int H>
ATTENTION_INLINE float largest_lane(Vector value) {
  if constexpr (H < kLanes)
    return largest_lane<2 * H>(larger(value, pick<H, true, true>(value, value)));
  else
    return value[0];
}

// e^x for x <= 88, to about 1 ulp; exactly 0 below -87. The low bits of `shifted` hold the nearest integer to x log2(e).
ATTENTION_INLINE Vector exponential(Vector x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector whole = shifted - magic;
  const Vector rest = (x - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
  Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * (rest * rest) + (rest + 1.0f);
  const Vector scaled = (Vector)((Integers)sum + ((Integers)shifted << 23));
  return x < -87.0f ? Vector{} : scaled;
}

// Cephes' tanhf: an odd polynomial near 0, exponentials elsewhere.
ATTENTION_INLINE Vector hyperbolic_tangent(Vector x) {
  const Vector size = x < 0.0f ? -x : x, square = x * x;
  Vector small = square * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * square + -5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square + -3.33332819422e-1f;
  small = small * square * x + x;
  const Vector large = 1.0f - 2.0f / (exponential(size > 20.0f ? splat(40.0f) : 2.0f * size) + 1.0f);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// Where the left factor's element (row, depth) lies. A row stride known to the compiler becomes an address's constant.
struct Factor {
  const float* data;
  int64_t row_stride, depth_stride;
};

// Rows x (Columns vectors) of c = carry * c + a b, or of a b alone where carry is null. The rows of b are those of
// `spans`, one after the other, from their element `column` on.
template <int Rows, int Columns, int RowStride>
ATTENTION_INLINE void product_block(Factor a, const Span* spans, int64_t span_count, int64_t b_stride, int64_t column,
                                    float* c, int64_t c_stride, const float* carry) {
  const int64_t row_stride = RowStride ? RowStride : a.row_stride;
  Vector sum[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Columns; ++v) sum[r][v] = carry ? load(c + r * c_stride + v * kLanes) * carry[r] : Vector{};
  for (const Span* span = spans; span != spans + span_count; ++span) {
    const float* b = span->data + column;
    for (int64_t k = 0; k < span->tokens; ++k, a.data += a.depth_stride, b += b_stride) {
      Vector right[Columns];
      for (int v = 0; v < Columns; ++v) right[v] = load(b + v * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const Vector left = splat(a.data[r * row_stride]);
        for (int v = 0; v < Columns; ++v) sum[r][v] += left * right[v];
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Columns; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <int Rows, int RowStride>
ATTENTION_TARGET void product_rows(Factor a, const Span* spans, int64_t span_count, int64_t b_stride, float* c,
                                   int64_t c_stride, int64_t columns, const float* carry) {
  constexpr int kWide = std::min(4, kSums / Rows);
  int64_t v = 0;
  for (; v + kWide * kLanes <= columns; v += kWide * kLanes)
    product_block<Rows, kWide, RowStride>(a, spans, span_count, b_stride, v, c + v, c_stride, carry);
  for (; v < columns; v += kLanes)
    product_block<Rows, 1, RowStride>(a, spans, span_count, b_stride, v, c + v, c_stride, carry);
}

// c[rows, columns] = carry * c + a b; columns is a multiple of kLanes.
template <int RowStride>
ATTENTION_TARGET void product(Factor a, const Span* spans, int64_t span_count, int64_t b_stride, float* c,
                              int64_t c_stride, int64_t rows, int64_t columns, const float* carry) {
  const int64_t row_stride = RowStride ? RowStride : a.row_stride;
  const auto run = [&]<int Rows>(std::integral_constant<int, Rows>) {
    product_rows<Rows, RowStride>(a, spans, span_count, b_stride, c, c_stride, columns, carry);
    a.data += Rows * row_stride;
    c += Rows * c_stride;
    if (carry) carry += Rows;
    rows -= Rows;
  };
  while (rows >= kRowBlock) run(std::integral_constant<int, kRowBlock>{});
  if (kRowBlock > 8 && rows >= 8) run(std::integral_constant<int, 8>{});
  if (rows >= 4) run(std::integral_constant<int, 4>{});
  if (rows == 3) run(std::integral_constant<int, 3>{});
  if (rows == 2) run(std::integral_constant<int, 2>{});
  if (rows == 1) run(std::integral_constant<int, 1>{});
}

// One head, normalised, rotated and scaled. `cos` and `sin` are the rows of its position.
ATTENTION_TARGET void prepare_head(const AttentionShape& shape, const float* __restrict head, const float* norm,
                                   float epsilon, const float* cos, const float* sin, float factor,
                                   float* __restrict to) {
  const int64_t size = shape.head_size, half = shape.rotary_size / 2;
  if (norm) {
    Vector squares{};
    for (int64_t d = 0; d < size; d += kLanes) squares += load(head + d) * load(head + d);
    factor /= std::sqrt(sum_lanes<1>(squares) / static_cast<float>(size) + epsilon);
    for (int64_t d = 0; d < size; d += kLanes) store(to + d, load(head + d) * load(norm + d) * factor);
  } else {
    for (int64_t d = 0; d < size; d += kLanes) store(to + d, load(head + d) * factor);
  }
#pragma GCC ivdep
  for (int64_t d = 0; d < half; ++d) {
    const float first = to[d], second = to[d + half];
    to[d] = first * cos[d] - second * sin[d];
    to[d + half] = second * cos[d] + first * sin[d];
  }
}

// One head's key or value into a row of the cache; halves go to even.
ATTENTION_TARGET void store_int8(const float* __restrict head, int64_t size, uint8_t* __restrict row) {
  float largest = 0;
  for (int64_t d = 0; d < size; ++d) largest = std::max(largest, std::fabs(head[d]));
  const uint16_t bits = half_bits(std::min(largest / 127.0f, 65504.0f));
  const float scale = half_value(bits), factor = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t d = 0; d < size; ++d) {
    const float value = std::min(std::max(head[d] * factor, -127.0f), 127.0f);
    row[d] = static_cast<uint8_t>(static_cast<int32_t>((value + 12582912.0f) - 12582912.0f));
  }
  std::memcpy(row + size, &bits, sizeof bits);
}

ATTENTION_TARGET void store_float8(const float* __restrict head, int64_t size, float scale, uint8_t* __restrict row) {
  for (int64_t d = 0; d < size; ++d) row[d] = e4m3_bits(nearest_e4m3(head[d] / scale));
}

ATTENTION_TARGET void store_row(const AttentionShape& shape, const float* head, float scale, uint8_t* row) {
  if (shape.cache == CacheFormat::int8) return store_int8(head, shape.head_size, row);
  if (shape.cache == CacheFormat::float8) return store_float8(head, shape.head_size, scale, row);
  std::memcpy(row, head, sizeof(float) * static_cast<size_t>(shape.head_size));
}

// kLanes bytes as integers: the compiler's own conversion goes element by element.
ATTENTION_INLINE Integers load_bytes(const uint8_t* from) {
#if defined(__x86_64__) && ATTENTION_LANES == 16
  return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__x86_64__) && ATTENTION_LANES == 8
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Integers values;
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<int8_t>(from[i]);
  return values;
#endif
}

// Rows of an 8-bit cache as floats [count, D].
ATTENTION_TARGET void widen_int8(const uint8_t* rows, int64_t count, int64_t size, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i, rows += size + 2, to += size) {
    uint16_t bits;
    std::memcpy(&bits, rows + size, sizeof bits);
    const float scale = half_value(bits);
    __builtin_prefetch(rows + 2048);
    for (int64_t d = 0; d < size; d += kLanes)
      store(to + d, __builtin_convertvector(load_bytes(rows + d), Vector) * scale);
  }
}

ATTENTION_TARGET void widen_float8(const uint8_t* rows, int64_t count, int64_t size, float scale, float* __restrict to) {
  for (int64_t d = 0; d < count * size; d += kLanes) {
    const Integers bits = load_bytes(rows + d);
    const Integers magnitude = bits & 0x7f;
    const Vector normal = (Vector)((magnitude << 20) + (120 << 23));
    const Vector small = __builtin_convertvector(magnitude, Vector) * 0x1p-9f;
    const Vector value = magnitude < 8 ? small : normal;
    store(to + d, (Vector)((Integers)value | (bits & 0x80) << 24) * scale);
  }
}

ATTENTION_TARGET void widen(const AttentionShape& shape, const uint8_t* rows, int64_t count, float scale, float* to) {
  if (shape.cache == CacheFormat::int8)
    widen_int8(rows, count, shape.head_size, to);
  else
    widen_float8(rows, count, shape.head_size, scale, to);
}

// The spans of keys first .. first + count - 1: in the cache, or in the scratch where the cache holds no floats.
ATTENTION_TARGET void read_tile(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                                const Scratch& scratch, int64_t first, int64_t count, Spans& spans) {
  if (shape.cache == CacheFormat::float32) return find_spans(shape, arrays, task, first, count, spans);
  spans.count = 1;
  spans.keys[0] = {scratch.keys, count};
  spans.values[0] = {scratch.values, count};
  for (int64_t done = 0, tokens; done < count; done += tokens) {
    const int64_t position = first + done;
    tokens = std::min(count - done, shape.tokens_per_block - position % shape.tokens_per_block);
    const int64_t offset = cache_offset(shape, arrays, task, position);
    widen(shape, cache_row(arrays.key_cache, offset), tokens, arrays.key_scale, scratch.keys + done * shape.head_size);
    widen(shape, cache_row(arrays.value_cache, offset), tokens, arrays.value_scale,
          scratch.values + done * shape.head_size);
  }
}

ATTENTION_TARGET void append(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task) {
  const int64_t size = shape.head_size, half = shape.rotary_size / 2;
  thread_local std::vector<float> prepared;
  if (shape.cache != CacheFormat::float32) prepared.resize(static_cast<size_t>(size));
  for (int64_t token = task.begin; token < task.end; ++token) {
    const int64_t position = task.past + token, to = cache_offset(shape, arrays, task, position);
    const float* key = new_token(shape, arrays, task, token) + (shape.num_heads + task.kv_head) * size;
    uint8_t* key_row = cache_row(arrays.key_cache, to);
    float* ready = shape.cache == CacheFormat::float32 ? reinterpret_cast<float*>(key_row) : prepared.data();
    prepare_head(shape, key, arrays.key_norm, arrays.norm_epsilon, arrays.cos + position * half,
                 arrays.sin + position * half, 1.0f, ready);
    if (shape.cache != CacheFormat::float32) store_row(shape, ready, arrays.key_scale, key_row);
    store_row(shape, key + shape.num_kv_heads * size, arrays.value_scale, cache_row(arrays.value_cache, to));
  }
}

// One query head of the group, ready for its dot products: times shape.scale too.
ATTENTION_TARGET void prepare_query(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                                    int64_t token, int64_t head, float* to) {
  const int64_t half = shape.rotary_size / 2, position = task.past + token;
  const int64_t first = task.kv_head * group_size(shape);
  prepare_head(shape, new_token(shape, arrays, task, token) + (first + head) * shape.head_size, arrays.query_norm,
               arrays.norm_epsilon, arrays.cos + position * half, arrays.sin + position * half, shape.scale, to);
}

// The queries of a tile as [row, D]; a row is (token, head of the group).
ATTENTION_TARGET void prepare_rows(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                                   int64_t token, int64_t rows, float* to) {
  const int64_t group = group_size(shape);
  for (int64_t row = 0; row < rows; ++row)
    prepare_query(shape, arrays, task, token + row / group, row % group, to + row * shape.head_size);
}

// The same queries as [D, stride]; the columns past `rows` are zero up to a multiple of kLanes.
ATTENTION_TARGET void prepare_columns(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                                      int64_t token, int64_t rows, int64_t stride, float* staging, float* to) {
  const int64_t group = group_size(shape), size = shape.head_size;
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (row + i < rows)
        prepare_query(shape, arrays, task, token + (row + i) / group, (row + i) % group, staging + i * size);
      else
        std::fill_n(staging + i * size, size, 0.0f);
    }
    for (int64_t d = 0; d < size; d += kLanes) {
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(staging + i * size + d);
      transpose<1>(block);
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * stride + row, block[i]);
    }
  }
}

// scores[Rows, kScoreStride] of `count` keys. Past them, up to a multiple of kLanes, the last key repeats. Fetches the
// values meanwhile, and as much from `ahead`: decode waits for memory, and they are next.
template <int Rows, int Size>
ATTENTION_TARGET void dot_rows(const float* queries, const float* keys, const float* values, const float* ahead,
                               int64_t count, int64_t head_size, float* scores) {
  const int64_t size = Size ? Size : head_size;
  for (int64_t key = 0; key < count; key += kLanes) {
    Vector part[Rows][kLanes / kDotKeys];
    for (int p = 0; p < kLanes / kDotKeys; ++p) {
      const float* row[kDotKeys];
      for (int i = 0; i < kDotKeys; ++i) row[i] = keys + std::min(key + p * kDotKeys + i, count - 1) * size;
      for (int64_t d = 0; d < kDotKeys * size; d += 16) {
        __builtin_prefetch(values + (key + p * kDotKeys) * size + d);
        __builtin_prefetch(ahead + (key + p * kDotKeys) * size + d);
      }
      Vector sum[Rows][kDotKeys] = {};
      for (int64_t d = 0; d < size; d += kLanes) {
        Vector query[Rows];
        for (int r = 0; r < Rows; ++r) query[r] = load(queries + r * size + d);
        for (int i = 0; i < kDotKeys; ++i) {
          const Vector element = keep(load(row[i] + d));
          for (int r = 0; r < Rows; ++r) sum[r][i] += query[r] * element;
        }
      }
      for (int r = 0; r < Rows; ++r) part[r][p] = fold<kDotKeys, 1>(sum[r]);
    }
    for (int r = 0; r < Rows; ++r)
      store(scores + r * kScoreStride + key, fold<kLanes / kDotKeys, kDotKeys>(part[r]));
  }
}

template <int Size>
ATTENTION_TARGET void dot(const float* queries, const float* keys, const float* values, const float* ahead,
                          int64_t count, int64_t rows, int64_t size, float* scores) {
  int64_t row = 0;
  for (; row + kDotRows <= rows; row += kDotRows)
    dot_rows<kDotRows, Size>(queries + row * size, keys, values, ahead, count, size, scores + row * kScoreStride);
  queries += row * size;
  scores += row * kScoreStride;
  if (rows - row == 3) dot_rows<3, Size>(queries, keys, values, ahead, count, size, scores);
  if (rows - row == 2) dot_rows<2, Size>(queries, keys, values, ahead, count, size, scores);
  if (rows - row == 1) dot_rows<1, Size>(queries, keys, values, ahead, count, size, scores);
}

// A maximum that starts finite lets a masked score, -inf, become exp(-inf) and never inf - inf.
ATTENTION_INLINE void start_rows(const Scratch& scratch, int64_t rows, int64_t padded, int64_t size) {
  std::fill_n(scratch.maxima, padded, -FLT_MAX);
  std::fill_n(scratch.sums, padded, 0.0f);
  std::fill_n(scratch.totals, rows * size, 0.0f);
}

// scores[count] of one row -> exp(score - maximum) with the masked ones 0; the running maximum and sum move on.
ATTENTION_TARGET void soften_row(float* scores, int64_t count, float position, float window, float softcap,
                                 float& maximum, float& sum, float& carry) {
  Vector index;
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<float>(i);
  const float last = std::min(position, static_cast<float>(count - 1));
  Vector top = splat(maximum);
  for (int64_t key = 0; key < count; key += kLanes, index += static_cast<float>(kLanes)) {
    Vector score = load(scores + key);
    if (softcap > 0) score = softcap * hyperbolic_tangent(score / softcap);
    score = index > last ? splat(-INFINITY) : score;
    score = index > position - window ? score : splat(-INFINITY);
    store(scores + key, score);
    top = larger(top, score);
  }
  const float previous = std::exchange(maximum, largest_lane<1>(top));
  Vector total{};
  for (int64_t key = 0; key < count; key += kLanes) {
    const Vector weight = exponential(load(scores + key) - maximum);
    store(scores + key, weight);
    total += weight;
  }
  carry = exponential(splat(previous - maximum))[0];
  sum = sum * carry + sum_lanes<1>(total);
}

// The same for kLanes rows at once, from scores[count, stride].
template <bool Masked, bool Capped>
ATTENTION_INLINE void soften_columns(float* scores, int64_t count, int64_t stride, const float* positions, float window,
                                     float softcap, float* maxima, float* sums, float* carries) {
  const Vector position = load(positions), previous = load(maxima), oldest = position - window;
  Vector top = previous;
  for (int64_t key = 0; key < count; ++key) {
    Vector score = load(scores + key * stride);
    if (Capped) score = softcap * hyperbolic_tangent(score / softcap);
    if (Masked) {
      const float index = static_cast<float>(key);
      score = position < index ? splat(-INFINITY) : score;
      score = oldest < index ? score : splat(-INFINITY);
    }
    if (Masked || Capped) store(scores + key * stride, score);
    top = larger(top, score);
  }
  Vector total{};
  for (int64_t key = 0; key < count; ++key) {
    const Vector weight = exponential(load(scores + key * stride) - top);
    store(scores + key * stride, weight);
    total += weight;
  }
  const Vector carry = exponential(previous - top);
  store(maxima, top);
  store(carries, carry);
  store(sums, load(sums) * carry + total);
}

ATTENTION_TARGET void soften_tile(const Scratch& scratch, int64_t rows, int64_t stride, int64_t count, bool masked,
                                  float window, float softcap) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    float *scores = scratch.scores + row, *positions = scratch.positions + row, *maxima = scratch.maxima + row,
          *sums = scratch.sums + row, *carries = scratch.carries + row;
    if (softcap > 0)
      soften_columns<true, true>(scores, count, stride, positions, window, softcap, maxima, sums, carries);
    else if (masked)
      soften_columns<true, false>(scores, count, stride, positions, window, softcap, maxima, sums, carries);
    else
      soften_columns<false, false>(scores, count, stride, positions, window, softcap, maxima, sums, carries);
  }
}

inline float window_of(const AttentionShape& shape) {
  return shape.window > 0 ? static_cast<float>(shape.window) : INFINITY;
}

inline int64_t rows_of(const AttentionShape& shape, const AttentionTask& task) {
  return (task.end - task.begin) * group_size(shape);
}

template <int Size>
ATTENTION_TARGET void attend_direct(const AttentionShape& shape, const AttentionArrays& arrays,
                                    const AttentionTask& task, const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape), rows = rows_of(shape, task);
  prepare_rows(shape, arrays, task, task.begin, rows, scratch.queries);
  Spans spans;
  for (int64_t key = task.key_begin, count; key < task.key_end; key += count) {
    count = tile_keys(task, key, direct_keys(shape));
    read_tile(shape, arrays, task, scratch, key, count, spans);
    float* scores = scratch.scores;
    for (int64_t i = 0; i < spans.count; scores += spans.keys[i++].tokens)
      dot<Size>(scratch.queries, spans.keys[i].data, spans.values[i].data,
                keys_ahead(shape, arrays, task, spans, i, key + count), spans.keys[i].tokens, rows, size, scores);
    for (int64_t row = 0; row < rows; ++row)
      soften_row(scratch.scores + row * kScoreStride, count,
                 static_cast<float>(task.past + task.begin + row / group - key), window_of(shape), shape.softcap,
                 scratch.maxima[row], scratch.sums[row], scratch.carries[row]);
    product<kScoreStride>({scratch.scores, kScoreStride, 1}, spans.values, spans.count, size, scratch.totals, size,
                          rows, size, scratch.carries);
  }
}

template <int Size>
ATTENTION_TARGET void attend_packed(const AttentionPlan& plan, const AttentionShape& shape,
                                    const AttentionArrays& arrays, const AttentionTask& task, const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape), stride = plan.tile_rows;
  const int64_t rows = rows_of(shape, task), columns = round_up(rows, kLanes);
  const int64_t position = task.past + task.begin, last = task.past + task.end - 1;
  prepare_columns(shape, arrays, task, task.begin, rows, stride, scratch.staging, scratch.queries);
  const Span queries = {scratch.queries, size};
  Spans spans;
  for (int64_t key = task.key_begin, count; key < task.key_end; key += count) {
    count = tile_keys(task, key, kPackedKeys);
    read_tile(shape, arrays, task, scratch, key, count, spans);
    for (int64_t row = 0; row < columns; ++row)
      scratch.positions[row] = static_cast<float>(position + std::min(row, rows - 1) / group - key);
    const bool masked = key + count - 1 > position || (shape.window > 0 && key <= last - shape.window);
    float* scores = scratch.scores;
    for (int64_t i = 0; i < spans.count; scores += spans.keys[i++].tokens * stride)
      product<Size>({spans.keys[i].data, size, 1}, &queries, 1, stride, scores, stride, spans.keys[i].tokens, columns,
                    nullptr);
    soften_tile(scratch, columns, stride, count, masked, window_of(shape), shape.softcap);
    product<1>({scratch.scores, 1, stride}, spans.values, spans.count, size, scratch.totals, size, rows, size,
               scratch.carries);
  }
}

// totals / sums -> output; a token's heads of one group lie side by side there.
ATTENTION_TARGET void write_tile(const AttentionShape& shape, const AttentionArrays& arrays, const AttentionTask& task,
                                 const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape);
  for (int64_t row = 0; row < rows_of(shape, task); ++row) {
    float* to =
        output_head(shape, arrays, task.start + task.begin + row / group, task.kv_head) + row % group * size;
    const float inverse = 1.0f / scratch.sums[row];
    for (int64_t d = 0; d < size; d += kLanes) store(to + d, load(scratch.totals + row * size + d) * inverse);
  }
}

inline void write_partial(const AttentionPlan& plan, const AttentionShape& shape, const AttentionTask& task,
                          const Scratch& scratch, float* partials) {
  const int64_t rows = rows_of(shape, task);
  float* to = partials + task.partial * partial_stride(plan, shape);
  std::copy_n(scratch.totals, rows * shape.head_size, to);
  std::copy_n(scratch.maxima, rows, to + plan.tile_rows * shape.head_size);
  std::copy_n(scratch.sums, rows, to + plan.tile_rows * (shape.head_size + 1));
}

template <int Size>
ATTENTION_TARGET void attend_keys(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                                  const AttentionTask& task, const Scratch& scratch) {
  const int64_t rows = rows_of(shape, task);
  start_rows(scratch, rows, round_up(rows, kLanes), shape.head_size);
  if (rows <= kDirectRows)
    attend_direct<Size>(shape, arrays, task, scratch);
  else
    attend_packed<Size>(plan, shape, arrays, task, scratch);
}

ATTENTION_TARGET void attend(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                             const AttentionTask& task, const Scratch& scratch, float* partials) {
  if (shape.head_size == 64)
    attend_keys<64>(plan, shape, arrays, task, scratch);
  else if (shape.head_size == 128)
    attend_keys<128>(plan, shape, arrays, task, scratch);
  else
    attend_keys<0>(plan, shape, arrays, task, scratch);
  if (task.partial < 0)
    write_tile(shape, arrays, task, scratch);
  else
    write_partial(plan, shape, task, scratch, partials);
}

}  // namespace ATTENTION_NAMESPACE
}  // namespace
}  // namespace trtllm

#undef ATTENTION_INLINE
#undef ATTENTION_NAMESPACE
#undef ATTENTION_TARGET
#undef ATTENTION_LANES

#endif
