// The attention kernels, written once over vectors of ATTENTION_LANES floats; the file includes itself once for each
// width. A task is one (batch row, key-value head, run of new tokens); all query heads of the group share the loads of
// keys and values, and the softmax runs online over tiles of keys.
//   few query rows (decode):  scores [row, key] as dot products, one vector of keys at a time
//   many query rows (prefill): scores [key, row] = K x Q^T, so that a lane is a query row and nothing is summed sideways
#ifndef ATTENTION_LANES

#include "attention.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass between functions that are always inlined

namespace trtllm {
namespace {

constexpr int64_t kTileRows = 48;    // query rows of a prefill tile
constexpr int64_t kDirectRows = 8;   // up to here the scores are dot products
constexpr int64_t kDirectKeys = 256;
constexpr int64_t kPackedKeys = 64;
constexpr int64_t kMostLanes = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t group_size(const AttentionShape& shape) { return shape.num_heads / shape.num_kv_heads; }

int64_t tile_positions(const AttentionShape& shape) { return std::max<int64_t>(1, kTileRows / group_size(shape)); }

int64_t padded_rows(const AttentionShape& shape) {
  const int64_t positions = std::min(tile_positions(shape), shape.sequence);
  return round_up(positions * group_size(shape), kMostLanes);
}

// One task's corner of the arrays.
struct Task {
  int64_t batch, kv_head;
  int64_t begin, end;   // new tokens of this task, padding included
  int64_t valid;        // new tokens of the batch row
  int64_t past;
  float* keys;          // [T, D]
  float* values;        // [T, D]
};

// A task's scratch, cut up.
struct Scratch {
  float* queries;      // [rows, D] or [D, padded rows]
  float* scores;       // [rows, kDirectKeys] or [kPackedKeys, padded rows]
  float* totals;       // [rows, D]: the output before its division by sums
  float* staging;      // [kMostLanes, D]
  float* maxima;       // [padded rows], and so the rest
  float* sums;
  float* carries;      // what a new maximum makes of the totals so far
  float* positions;    // of each row, counted from the first key of the tile of keys
};

size_t scratch_floats(const AttentionShape& shape) {
  const int64_t rows = padded_rows(shape);
  const int64_t scores = std::max(kPackedKeys * rows, kDirectKeys * kDirectRows);
  return static_cast<size_t>(scores + (2 * rows + kMostLanes) * round_up(shape.head_size, kMostLanes) + 4 * rows +
                             kMostLanes);
}

Scratch cut_scratch(const AttentionShape& shape, float* memory) {
  const int64_t rows = padded_rows(shape), size = round_up(shape.head_size, kMostLanes);
  float* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
  Scratch scratch;
  scratch.queries = take(rows * size);
  scratch.scores = take(std::max(kPackedKeys * rows, kDirectKeys * kDirectRows));
  scratch.totals = take(rows * size);
  scratch.staging = take(kMostLanes * size);
  scratch.maxima = take(rows);
  scratch.sums = take(rows);
  scratch.carries = take(rows);
  scratch.positions = take(rows);
  return scratch;
}

// Later chunks see more keys, so they come first.
Task find_task(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays, int64_t index) {
  const int64_t chunks = (shape.sequence + plan.chunk - 1) / plan.chunk;
  const int64_t slot = index / chunks, chunk = chunks - 1 - index % chunks;
  Task task;
  task.batch = slot / shape.num_kv_heads;
  task.kv_head = slot % shape.num_kv_heads;
  task.begin = chunk * plan.chunk;
  task.end = std::min(shape.sequence, task.begin + plan.chunk);
  task.valid = std::min(arrays.lengths[task.batch], shape.sequence);
  task.past = arrays.past_lengths[task.batch];
  task.keys = arrays.key_cache + slot * shape.capacity * shape.head_size;
  task.values = arrays.value_cache + slot * shape.capacity * shape.head_size;
  return task;
}

const float* new_token(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task, int64_t token) {
  const int64_t width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size;
  return arrays.qkv + (task.batch * shape.sequence + token) * width;
}

float* output_head(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task, int64_t token) {
  const int64_t row = task.batch * shape.sequence + token;
  return arrays.output + (row * shape.num_heads + task.kv_head * group_size(shape)) * shape.head_size;
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
  void (*append)(const AttentionShape&, const AttentionArrays&, const Task&);
  void (*attend)(const AttentionShape&, const AttentionArrays&, const Task&, const Scratch&);
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

int64_t choose_lanes(int64_t head_size, int64_t most_lanes) {
  for (const KernelSet& kernels : kKernelSets)
    if (kernels.lanes <= most_lanes && head_size % kernels.lanes == 0 && machine_has(kernels.lanes))
      return kernels.lanes;
  return 1;
}

// Whole batch rows when there are enough of them to share out evenly: then no task waits for another's keys.
int64_t choose_chunk(const AttentionShape& shape, int threads) {
  const int64_t slots = shape.batch * shape.num_kv_heads;
  const bool whole = threads <= 1 || slots >= 8 * threads || shape.sequence <= tile_positions(shape);
  return whole ? std::max<int64_t>(1, shape.sequence) : tile_positions(shape);
}

}  // namespace

AttentionPlan plan_attention(const AttentionShape& shape, int threads, int64_t most_lanes) {
  AttentionPlan plan;
  plan.chunk = choose_chunk(shape, threads);
  const int64_t chunks = (shape.sequence + plan.chunk - 1) / plan.chunk;
  plan.tasks = shape.batch * shape.num_kv_heads * chunks;
  plan.append_first = chunks > 1;
  plan.scratch_floats = scratch_floats(shape);
  plan.lanes = choose_lanes(shape.head_size, most_lanes);
  return plan;
}

void attention_append(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                      int64_t task) {
  kernels_of(plan.lanes).append(shape, arrays, find_task(plan, shape, arrays, task));
}

void attention_task(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays, int64_t index,
                    float* scratch) {
  const KernelSet& kernels = kernels_of(plan.lanes);
  const Task task = find_task(plan, shape, arrays, index);
  if (!plan.append_first) kernels.append(shape, arrays, task);
  kernels.attend(shape, arrays, task, cut_scratch(shape, scratch));
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

// Rows x (Columns vectors) of c = carry * c + a b, or of a b alone where carry is null. b is [depth, b_stride].
template <int Rows, int Columns, int RowStride>
ATTENTION_INLINE void product_block(Factor a, const float* b, int64_t b_stride, int64_t depth, float* c,
                                    int64_t c_stride, const float* carry) {
  const int64_t row_stride = RowStride ? RowStride : a.row_stride;
  Vector sum[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Columns; ++v) sum[r][v] = carry ? load(c + r * c_stride + v * kLanes) * carry[r] : Vector{};
  for (int64_t k = 0; k < depth; ++k, a.data += a.depth_stride, b += b_stride) {
    Vector right[Columns];
    for (int v = 0; v < Columns; ++v) right[v] = load(b + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vector left = splat(a.data[r * row_stride]);
      for (int v = 0; v < Columns; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Columns; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <int Rows, int RowStride>
ATTENTION_TARGET void product_rows(Factor a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                                   int64_t columns, const float* carry) {
  constexpr int kWide = kSums / Rows >= 4 ? 4 : 2;
  int64_t v = 0;
  for (; v + kWide * kLanes <= columns; v += kWide * kLanes)
    product_block<Rows, kWide, RowStride>(a, b + v, b_stride, depth, c + v, c_stride, carry);
  for (; v < columns; v += kLanes)
    product_block<Rows, 1, RowStride>(a, b + v, b_stride, depth, c + v, c_stride, carry);
}

// c[rows, columns] = carry * c + a b; columns is a multiple of kLanes.
template <int RowStride>
ATTENTION_TARGET void product(Factor a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                              int64_t rows, int64_t columns, const float* carry) {
  const int64_t row_stride = RowStride ? RowStride : a.row_stride;
  const auto advance = [&](int64_t count) {
    a.data += count * row_stride;
    c += count * c_stride;
    if (carry) carry += count;
    rows -= count;
  };
  for (; rows >= kRowBlock; advance(kRowBlock))
    product_rows<kRowBlock, RowStride>(a, b, b_stride, depth, c, c_stride, columns, carry);
  for (; rows >= 4; advance(4)) product_rows<4, RowStride>(a, b, b_stride, depth, c, c_stride, columns, carry);
  if (rows == 3) product_rows<3, RowStride>(a, b, b_stride, depth, c, c_stride, columns, carry);
  if (rows == 2) product_rows<2, RowStride>(a, b, b_stride, depth, c, c_stride, columns, carry);
  if (rows == 1) product_rows<1, RowStride>(a, b, b_stride, depth, c, c_stride, columns, carry);
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

ATTENTION_TARGET void append(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task) {
  const int64_t size = shape.head_size, half = shape.rotary_size / 2;
  for (int64_t token = task.begin; token < std::min(task.end, task.valid); ++token) {
    const int64_t position = task.past + token;
    const float* key = new_token(shape, arrays, task, token) + (shape.num_heads + task.kv_head) * size;
    prepare_head(shape, key, arrays.key_norm, arrays.norm_epsilon, arrays.cos + position * half,
                 arrays.sin + position * half, 1.0f, task.keys + position * size);
    std::memcpy(task.values + position * size, key + shape.num_kv_heads * size, sizeof(float) * size);
  }
}

// One query head of the group, ready for its dot products: times shape.scale too.
ATTENTION_TARGET void prepare_query(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                    int64_t token, int64_t head, float* to) {
  const int64_t half = shape.rotary_size / 2, position = task.past + token;
  const int64_t first = task.kv_head * group_size(shape);
  prepare_head(shape, new_token(shape, arrays, task, token) + (first + head) * shape.head_size, arrays.query_norm,
               arrays.norm_epsilon, arrays.cos + position * half, arrays.sin + position * half, shape.scale, to);
}

// The queries of a tile as [row, D]; a row is (token, head of the group).
ATTENTION_TARGET void prepare_rows(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                   int64_t token, int64_t rows, float* to) {
  const int64_t group = group_size(shape);
  for (int64_t row = 0; row < rows; ++row)
    prepare_query(shape, arrays, task, token + row / group, row % group, to + row * shape.head_size);
}

// The same queries as [D, stride]; the columns past `rows` are zero up to a multiple of kLanes.
ATTENTION_TARGET void prepare_columns(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
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

// scores[Rows, kDirectKeys] of `count` keys. Past them, up to a multiple of kLanes, the last key repeats. Fetches the
// values meanwhile: decode waits for memory, and they are next.
template <int Rows, int Size>
ATTENTION_TARGET void dot_rows(const float* queries, const float* keys, const float* values, int64_t count,
                               int64_t head_size, float* scores) {
  const int64_t size = Size ? Size : head_size;
  for (int64_t key = 0; key < count; key += kLanes) {
    Vector part[Rows][kLanes / kDotKeys];
    for (int p = 0; p < kLanes / kDotKeys; ++p) {
      const float* row[kDotKeys];
      for (int i = 0; i < kDotKeys; ++i) row[i] = keys + std::min(key + p * kDotKeys + i, count - 1) * size;
      for (int64_t d = 0; d < kDotKeys * size; d += 16) __builtin_prefetch(values + (key + p * kDotKeys) * size + d);
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
      store(scores + r * kDirectKeys + key, fold<kLanes / kDotKeys, kDotKeys>(part[r]));
  }
}

template <int Size>
ATTENTION_TARGET void dot(const float* queries, const float* keys, const float* values, int64_t count, int64_t rows,
                          int64_t size, float* scores) {
  int64_t row = 0;
  for (; row + kDotRows <= rows; row += kDotRows)
    dot_rows<kDotRows, Size>(queries + row * size, keys, values, count, size, scores + row * kDirectKeys);
  queries += row * size;
  scores += row * kDirectKeys;
  if (rows - row == 3) dot_rows<3, Size>(queries, keys, values, count, size, scores);
  if (rows - row == 2) dot_rows<2, Size>(queries, keys, values, count, size, scores);
  if (rows - row == 1) dot_rows<1, Size>(queries, keys, values, count, size, scores);
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

// A run of new tokens of a task and the keys they see between them.
struct Tile {
  int64_t token, tokens, rows;
  int64_t position;             // of the first token; the tokens follow each other
  int64_t first_key, last_key;  // inclusive
};

inline Tile make_tile(const AttentionShape& shape, const Task& task, int64_t token, int64_t end) {
  Tile tile;
  tile.token = token;
  tile.tokens = end - token;
  tile.rows = tile.tokens * group_size(shape);
  tile.position = task.past + token;
  tile.first_key = shape.window > 0 ? std::max<int64_t>(0, tile.position - shape.window + 1) : 0;
  tile.last_key = tile.position + tile.tokens - 1;
  return tile;
}

inline float window_of(const AttentionShape& shape) {
  return shape.window > 0 ? static_cast<float>(shape.window) : INFINITY;
}

template <int Size>
ATTENTION_TARGET void attend_direct(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                    const Tile& tile, const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape);
  prepare_rows(shape, arrays, task, tile.token, tile.rows, scratch.queries);
  for (int64_t key = tile.first_key; key <= tile.last_key; key += kDirectKeys) {
    const int64_t count = std::min(kDirectKeys, tile.last_key + 1 - key);
    const float *keys = task.keys + key * size, *values = task.values + key * size;
    dot<Size>(scratch.queries, keys, values, count, tile.rows, size, scratch.scores);
    for (int64_t row = 0; row < tile.rows; ++row)
      soften_row(scratch.scores + row * kDirectKeys, count, static_cast<float>(tile.position + row / group - key),
                 window_of(shape), shape.softcap, scratch.maxima[row], scratch.sums[row], scratch.carries[row]);
    product<kDirectKeys>({scratch.scores, kDirectKeys, 1}, values, size, count, scratch.totals, size, tile.rows, size,
                         scratch.carries);
  }
}

template <int Size>
ATTENTION_TARGET void attend_packed(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                    const Tile& tile, const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape), stride = padded_rows(shape);
  const int64_t columns = round_up(tile.rows, kLanes);
  prepare_columns(shape, arrays, task, tile.token, tile.rows, stride, scratch.staging, scratch.queries);
  for (int64_t key = tile.first_key; key <= tile.last_key; key += kPackedKeys) {
    const int64_t count = std::min(kPackedKeys, tile.last_key + 1 - key);
    const float *keys = task.keys + key * size, *values = task.values + key * size;
    for (int64_t row = 0; row < columns; ++row)
      scratch.positions[row] = static_cast<float>(tile.position + std::min(row, tile.rows - 1) / group - key);
    const bool masked =
        key + count - 1 > tile.position || (shape.window > 0 && key <= tile.last_key - shape.window);
    product<Size>({keys, size, 1}, scratch.queries, stride, size, scratch.scores, stride, count, columns, nullptr);
    soften_tile(scratch, columns, stride, count, masked, window_of(shape), shape.softcap);
    product<1>({scratch.scores, 1, stride}, values, size, count, scratch.totals, size, tile.rows, size,
               scratch.carries);
  }
}

// totals / sums -> output; a token's heads of one group lie side by side there.
ATTENTION_TARGET void write_tile(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                 const Tile& tile, const Scratch& scratch) {
  const int64_t size = shape.head_size, group = group_size(shape);
  for (int64_t row = 0; row < tile.rows; ++row) {
    float* to = output_head(shape, arrays, task, tile.token + row / group) + row % group * size;
    const float inverse = 1.0f / scratch.sums[row];
    for (int64_t d = 0; d < size; d += kLanes) store(to + d, load(scratch.totals + row * size + d) * inverse);
  }
}

template <int Size>
ATTENTION_TARGET void attend_tile(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                                  const Tile& tile, const Scratch& scratch) {
  start_rows(scratch, tile.rows, round_up(tile.rows, kLanes), shape.head_size);
  if (tile.rows <= kDirectRows)
    attend_direct<Size>(shape, arrays, task, tile, scratch);
  else
    attend_packed<Size>(shape, arrays, task, tile, scratch);
  write_tile(shape, arrays, task, tile, scratch);
}

ATTENTION_TARGET void attend(const AttentionShape& shape, const AttentionArrays& arrays, const Task& task,
                             const Scratch& scratch) {
  const int64_t end = std::min(task.end, task.valid);
  for (int64_t token = task.begin; token < end; token += tile_positions(shape)) {
    const Tile tile = make_tile(shape, task, token, std::min(end, token + tile_positions(shape)));
    if (shape.head_size == 64)
      attend_tile<64>(shape, arrays, task, tile, scratch);
    else if (shape.head_size == 128)
      attend_tile<128>(shape, arrays, task, tile, scratch);
    else
      attend_tile<0>(shape, arrays, task, tile, scratch);
  }
  for (int64_t token = std::max(task.begin, end); token < task.end; ++token)
    std::fill_n(output_head(shape, arrays, task, token), group_size(shape) * shape.head_size, 0.0f);
}

}  // namespace ATTENTION_NAMESPACE
}  // namespace
}  // namespace trtllm

#undef ATTENTION_INLINE
#undef ATTENTION_NAMESPACE
#undef ATTENTION_TARGET
#undef ATTENTION_LANES

#endif
