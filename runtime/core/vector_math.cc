// The passes over logits, written once over vectors of VECTOR_LANES floats; the file includes itself for each width.
// A block's sum always has sixteen partial sums, held in 16 / VECTOR_LANES vectors and folded in the same order.
#ifndef VECTOR_LANES

#include "vector_math.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only pass between functions that are always inlined

namespace trtllm::executor {
namespace {

// A whole block: x [count] and -inf behind it.
struct PaddedBlock {
    PaddedBlock(const float *x, std::int64_t count) {
        std::fill(std::copy_n(x, count, values), values + kBlock, -INFINITY);
    }
    alignas(64) float values[kBlock];
};

}  // namespace
}  // namespace trtllm::executor

#if defined(__x86_64__)
#define VECTOR_LANES 16
#define VECTOR_NAMESPACE lanes16
#define VECTOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,prefer-vector-width=512")))
#include "vector_math.cc"
#define VECTOR_LANES 8
#define VECTOR_NAMESPACE lanes8
#define VECTOR_TARGET __attribute__((target("avx2,popcnt")))
#include "vector_math.cc"
#endif
#define VECTOR_LANES 4
#define VECTOR_NAMESPACE lanes4
#define VECTOR_TARGET
#include "vector_math.cc"

namespace trtllm::executor {
namespace {

bool machine_has(int lanes) {
#if defined(__x86_64__)
    if (lanes == 16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    if (lanes == 8) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
#endif
    return lanes <= 4;
}

}  // namespace

const VectorMath &vector_math(int most_lanes) {
#if defined(__x86_64__)
    static const bool has16 = machine_has(16), has8 = machine_has(8);
    if (most_lanes >= 16 && has16) return lanes16::kMath;
    if (most_lanes >= 8 && has8) return lanes8::kMath;
#else
    (void)most_lanes;
#endif
    return lanes4::kMath;
}

}  // namespace trtllm::executor

#else  // VECTOR_LANES: the passes at one width

#define VECTOR_INLINE VECTOR_TARGET inline __attribute__((always_inline))

namespace trtllm::executor {
namespace {
namespace VECTOR_NAMESPACE {

constexpr int kLanes = VECTOR_LANES;
constexpr int kGroups = 16;
constexpr int kParts = kGroups / kLanes;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Flags __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

VECTOR_INLINE Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
VECTOR_INLINE void store(float *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }
VECTOR_INLINE Vector splat(float value) { return Vector{} + value; }
VECTOR_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// a * b rounded by itself, whatever the compiler would like to fuse it with.
VECTOR_INLINE Vector product(Vector a, Vector b) {
    Vector result = a * b;
#if defined(__x86_64__)
    asm("" : "+v"(result));
#elif defined(__aarch64__)
    asm("" : "+w"(result));
#endif
    return result;
}

// Lane i of the result is lane i + H of `value` where i < H: the upper half comes down.
template <int H, int... Lane>
VECTOR_INLINE Vector upper(Vector value, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(value, value, (Lane < H ? Lane + H : Lane)...);
}
template <int H>
VECTOR_INLINE Vector upper(Vector value) {
    return upper<H>(value, std::make_integer_sequence<int, kLanes>{});
}

template <int H>
VECTOR_INLINE float fold_sum(Vector value) {
    if constexpr (H == 0)
        return value[0];
    else
        return fold_sum<H / 2>(value + upper<H>(value));
}

template <int H>
VECTOR_INLINE float fold_larger(Vector value) {
    if constexpr (H == 0)
        return value[0];
    else
        return fold_larger<H / 2>(larger(value, upper<H>(value)));
}

// Sixteen partial sums, folded in halves: 8 apart, 4 apart, 2 apart, 1 apart.
VECTOR_INLINE float total(const Vector *parts) {
    Vector folded[kParts];
    for (int p = 0; p < kParts; ++p) folded[p] = parts[p];
    for (int half = kParts / 2; half > 0; half /= 2)
        for (int p = 0; p < half; ++p) folded[p] = folded[p] + folded[p + half];
    return fold_sum<kLanes / 2>(folded[0]);
}

VECTOR_INLINE bool any(Flags flags) {
#if defined(__x86_64__)
    if constexpr (kLanes == 4) return _mm_movemask_ps(reinterpret_cast<__m128 &>(flags)) != 0;
#endif
    std::int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= flags[i];
    return all != 0;
}

// 2^y for y <= 0: a polynomial of degree 5 on [-1/2, 1/2], exactly 1 at 0; its own relative error is 9e-8. The low bits
// of `shifted` hold the nearest integer. y < -125, -inf included, gives 0.
VECTOR_INLINE Vector power_of_two(Vector y) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    const Vector shifted = y + magic;
    const Vector rest = y - (shifted - magic);
    Vector sum = splat(1.326472731307149e-3f);
    sum = product(sum, rest) + 9.671512991189957e-3f;
    sum = product(sum, rest) + 5.550733581185341e-2f;
    sum = product(sum, rest) + 2.402224242687225e-1f;
    sum = product(sum, rest) + 6.931470036506653e-1f;
    sum = product(sum, rest) + 1.0f;
    const Bits scaled = reinterpret_cast<Bits>(sum) + (reinterpret_cast<Bits>(shifted) << 23);
    return y < -125.0f ? Vector{} : reinterpret_cast<Vector>(scaled);
}

VECTOR_INLINE Vector weight(Vector x, float reference, float scale) {
    return power_of_two(product(x - reference, splat(scale)));
}

template <bool Filtered>
VECTOR_INLINE float sum_block(const float *block, float threshold, float reference, float scale) {
    Vector parts[kParts] = {};
    for (int i = 0; i < kBlock; i += kGroups)
        for (int p = 0; p < kParts; ++p) {
            const Vector x = load(block + i + p * kLanes);
            const Vector w = weight(x, reference, scale);
            parts[p] += Filtered ? (x >= threshold ? w : Vector{}) : w;
        }
    return total(parts);
}

// The largest of a block; `bad` collects NaN and +inf. Two running maxima, since one would wait for itself.
VECTOR_INLINE float largest_of_block(const float *block, Flags &bad) {
    Vector first = load(block), second = load(block + kLanes);
    bad |= ~(first < INFINITY) | ~(second < INFINITY);
    for (int i = 2 * kLanes; i < kBlock; i += 2 * kLanes) {
        const Vector a = load(block + i), b = load(block + i + kLanes);
        bad |= ~(a < INFINITY) | ~(b < INFINITY);
        first = larger(first, a);
        second = larger(second, b);
    }
    return fold_larger<kLanes / 2>(larger(first, second));
}

// Asks for a block ahead of its time: sums keep the machine too busy to run ahead of them by itself. Addresses behind
// the row do no harm.
VECTOR_INLINE void fetch(const float *block) {
    for (int i = 0; i < kBlock; i += 16) __builtin_prefetch(block + i);
}

VECTOR_TARGET bool maxima(const float *x, std::int64_t size, float *to) {
    Flags bad{};
    const std::int64_t whole = size / kBlock;
    for (std::int64_t b = 0; b < whole; ++b) to[b] = largest_of_block(x + b * kBlock, bad);
    if (whole * kBlock < size)
        to[whole] = largest_of_block(PaddedBlock(x + whole * kBlock, size - whole * kBlock).values, bad);
    return !any(bad);
}

VECTOR_TARGET bool maxima_and_sums(const float *x, std::int64_t size, float scale, float *to, float *sums) {
    Flags bad{};
    const auto do_block = [&](const float *block, std::int64_t b) VECTOR_TARGET {
        fetch(block + 4 * kBlock);
        to[b] = largest_of_block(block, bad);
        sums[b] = sum_block<false>(block, 0.0f, to[b] > -FLT_MAX ? to[b] : -FLT_MAX, scale);
    };
    const std::int64_t whole = size / kBlock;
    for (std::int64_t b = 0; b < whole; ++b) do_block(x + b * kBlock, b);
    if (whole * kBlock < size) do_block(PaddedBlock(x + whole * kBlock, size - whole * kBlock).values, whole);
    return !any(bad);
}

VECTOR_TARGET float sum_at_least(const float *x, std::int64_t count, float threshold, float reference, float scale) {
    if (count == kBlock) return sum_block<true>(x, threshold, reference, scale);
    return sum_block<true>(PaddedBlock(x, count).values, threshold, reference, scale);
}

VECTOR_TARGET void weights(const float *x, std::int64_t count, float reference, float scale, float *to) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, weight(load(x + i), reference, scale));
    if (i == count) return;
    float last[kLanes] = {};
    std::copy(x + i, x + count, last);
    store(last, weight(load(last), reference, scale));
    std::copy_n(last, count - i, to + i);
}

VECTOR_INLINE std::uint32_t mask_at_least(const float *x, float threshold) {
#if defined(__x86_64__)
    if constexpr (kLanes == 16)
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(threshold), _CMP_GE_OQ);
    else if constexpr (kLanes == 8)
        return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(threshold), _CMP_GE_OQ));
    else
        return _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(x), _mm_set1_ps(threshold)));
#else
    std::uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<std::uint32_t>(x[i] >= threshold) << i;
    return mask;
#endif
}

// Moves the lanes of x whose bit is set in `mask` to `values`, and their places to `places`.
VECTOR_INLINE void compress(const float *x, std::uint32_t mask, std::int32_t base, float *values,
                            std::int32_t *places) {
#if defined(__x86_64__)
    if constexpr (kLanes == 16) {
        const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const auto lanes = static_cast<__mmask16>(mask);
        _mm512_storeu_ps(values, _mm512_maskz_compress_ps(lanes, _mm512_loadu_ps(x)));
        const __m512i numbers = _mm512_add_epi32(order, _mm512_set1_epi32(base));
        _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(lanes, numbers));
        return;
    }
#endif
    for (; mask != 0; mask &= mask - 1) {
        const int lane = std::countr_zero(mask);
        *values++ = x[lane];
        *places++ = base + lane;
    }
}

VECTOR_TARGET std::int64_t gather(const float *x, std::int64_t count, float threshold, std::int32_t base, float *values,
                                  std::int32_t *places) {
    std::int64_t found = 0, i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const std::uint32_t mask = mask_at_least(x + i, threshold);
        if (mask == 0) continue;
        compress(x + i, mask, base + static_cast<std::int32_t>(i), values + found, places + found);
        found += std::popcount(mask);
    }
    for (; i < count; ++i) {
        if (!(x[i] >= threshold)) continue;
        values[found] = x[i];
        places[found++] = base + static_cast<std::int32_t>(i);
    }
    return found;
}

VECTOR_TARGET std::int64_t count_at_least(const float *x, std::int64_t size, float threshold) {
    std::int64_t found = 0, i = 0;
    while (i + kLanes <= size) {
        Flags counts{};  // minus the count of each lane
        const std::int64_t end = std::min(size - kLanes, i + (std::int64_t{1} << 24));
        for (; i <= end; i += kLanes) counts += load(x + i) >= threshold;
        for (int lane = 0; lane < kLanes; ++lane) found -= counts[lane];
    }
    for (; i < size; ++i) found += x[i] >= threshold;
    return found;
}

VECTOR_TARGET void lane_maxima(const float *x, std::int64_t size, float *to) {
    const auto do_block = [&](const float *block, float *groups) VECTOR_TARGET {
        for (int p = 0; p < kParts; ++p) {
            Vector most = load(block + p * kLanes);
            for (int i = kGroups; i < kBlock; i += kGroups) most = larger(most, load(block + i + p * kLanes));
            store(groups + p * kLanes, most);
        }
    };
    const std::int64_t whole = size / kBlock;
    for (std::int64_t b = 0; b < whole; ++b) do_block(x + b * kBlock, to + b * kGroups);
    if (whole * kBlock < size)
        do_block(PaddedBlock(x + whole * kBlock, size - whole * kBlock).values, to + whole * kGroups);
}

constexpr VectorMath kMath = {kLanes, maxima, maxima_and_sums, sum_at_least, weights, gather, count_at_least,
                              lane_maxima};

}  // namespace VECTOR_NAMESPACE
}  // namespace
}  // namespace trtllm::executor

#undef VECTOR_INLINE
#undef VECTOR_NAMESPACE
#undef VECTOR_TARGET
#undef VECTOR_LANES

#endif
