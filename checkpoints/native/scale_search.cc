// The search for a block's scale: candidates around the plain scale, each improved by least squares.
#include "checkpoints/native/scale_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "checkpoints/native/vectors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRTLLM_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define TRTLLM_CLONES
#endif

namespace trtllm {
namespace {

constexpr int kCandidates = 12;
constexpr int kAffineCandidates = 16;
constexpr int kRefinements = 3;  // of each, by least squares
constexpr std::size_t kLanes = 8;
constexpr float kRounder = 12582912.0f;  // see rounded_integer()

struct Fit {
    float products = 0.0f;  // of element and integer, weighted
    float squares = 0.0f;   // of integers, weighted
};

float total(const float (&lanes)[kLanes]) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

void fit_portable(const float *x, const float *weights, std::size_t length, float inverse, Fit *result) {
    float products[kLanes] = {}, squares[kLanes] = {};
    for (std::size_t i = 0; i < length; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const float scaled = std::min(std::max(x[i + lane] * inverse, -8.0f), 7.0f);
            const float integer = (scaled + kRounder) - kRounder;
            const float weighted = weights[i + lane] * integer;
            products[lane] += weighted * x[i + lane];
            squares[lane] += weighted * integer;
        }
    }
    *result = {total(products), total(squares)};
}

#ifdef TRTLLM_AVX2
TRTLLM_AVX2 void fit_avx2(const float *x, const float *weights, std::size_t length, float inverse, Fit *result) {
    __m256 products = _mm256_setzero_ps(), squares = products;
    const __m256 factor = _mm256_set1_ps(inverse), lowest = _mm256_set1_ps(-8.0f), highest = _mm256_set1_ps(7.0f);
    for (std::size_t i = 0; i < length; i += kLanes) {
        const __m256 element = _mm256_loadu_ps(x + i);
        const __m256 scaled = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(element, factor), lowest), highest);
        const __m256 integer = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 weighted = _mm256_mul_ps(_mm256_loadu_ps(weights + i), integer);
        products = _mm256_add_ps(products, _mm256_mul_ps(weighted, element));
        squares = _mm256_add_ps(squares, _mm256_mul_ps(weighted, integer));
    }
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, products);
    result->products = total(lanes);
    _mm256_storeu_ps(lanes, squares);
    result->squares = total(lanes);
}
#endif

// Both forms give the same bits.
void fit(const float *x, const float *weights, std::size_t length, float inverse, Fit *result) {
#ifdef TRTLLM_AVX2
    if (has_avx2()) return fit_avx2(x, weights, length, inverse, result);
#endif
    fit_portable(x, weights, length, inverse, result);
}

// The weighted squared error with integers taken against the scale as stored.
float error_of(const float *x, const float *weights, std::size_t length, float scale) {
    float errors[kLanes] = {};
    const float divisor = scale == 0.0f ? 1.0f : scale;
    for (std::size_t i = 0; i < length; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            float scaled = x[i + lane] / divisor;
            scaled = scaled < -8.0f ? -8.0f : scaled;
            scaled = scaled > 7.0f ? 7.0f : scaled;
            const float difference = x[i + lane] - ((scaled + kRounder) - kRounder) * scale;
            errors[lane] += weights[i + lane] * (difference * difference);
        }
    }
    return total(errors);
}

// What weighted least squares needs of elements and the integers that they are rounded to.
struct AffineFit {
    float integers = 0.0f;  // sums over the block, weighted
    float squares = 0.0f;
    float products = 0.0f;  // of element and integer
};

void fit_affine_portable(const float *x, const float *weights, std::size_t length, float inverse, float lowest,
                         AffineFit *result) {
    float integers[kLanes] = {}, squares[kLanes] = {}, products[kLanes] = {};
    for (std::size_t i = 0; i < length; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const float scaled = std::min(std::max((x[i + lane] - lowest) * inverse, 0.0f), 15.0f);
            const float integer = (scaled + kRounder) - kRounder;
            const float weighted = weights[i + lane] * integer;
            integers[lane] += weighted;
            squares[lane] += weighted * integer;
            products[lane] += weighted * x[i + lane];
        }
    }
    *result = {total(integers), total(squares), total(products)};
}

#ifdef TRTLLM_AVX2
TRTLLM_AVX2 void fit_affine_avx2(const float *x, const float *weights, std::size_t length, float inverse, float lowest,
                                 AffineFit *result) {
    __m256 integers = _mm256_setzero_ps(), squares = integers, products = integers;
    const __m256 factor = _mm256_set1_ps(inverse), base = _mm256_set1_ps(lowest);
    const __m256 zero = _mm256_setzero_ps(), highest = _mm256_set1_ps(15.0f);
    for (std::size_t i = 0; i < length; i += kLanes) {
        const __m256 element = _mm256_loadu_ps(x + i);
        const __m256 above = _mm256_mul_ps(_mm256_sub_ps(element, base), factor);
        const __m256 scaled = _mm256_min_ps(_mm256_max_ps(above, zero), highest);
        const __m256 integer = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 weighted = _mm256_mul_ps(_mm256_loadu_ps(weights + i), integer);
        integers = _mm256_add_ps(integers, weighted);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(weighted, integer));
        products = _mm256_add_ps(products, _mm256_mul_ps(weighted, element));
    }
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, integers);
    result->integers = total(lanes);
    _mm256_storeu_ps(lanes, squares);
    result->squares = total(lanes);
    _mm256_storeu_ps(lanes, products);
    result->products = total(lanes);
}
#endif

// Both forms give the same bits.
void fit_affine(const float *x, const float *weights, std::size_t length, float inverse, float lowest,
                AffineFit *result) {
#ifdef TRTLLM_AVX2
    if (has_avx2()) return fit_affine_avx2(x, weights, length, inverse, lowest, result);
#endif
    fit_affine_portable(x, weights, length, inverse, lowest, result);
}

TRTLLM_CLONES float affine_error(const float *x, const float *weights, std::size_t length, const Affine &form) {
    float errors[kLanes] = {};
    const float divisor = form.scale == 0.0f ? 1.0f : form.scale;
    for (std::size_t i = 0; i < length; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            float scaled = (x[i + lane] - form.minimum) / divisor;
            scaled = scaled < 0.0f ? 0.0f : scaled;
            scaled = scaled > 15.0f ? 15.0f : scaled;
            const float rounded = form.scale == 0.0f ? 0.0f : (scaled + kRounder) - kRounder;
            const float difference = (x[i + lane] - form.minimum) - rounded * form.scale;
            errors[lane] += weights[i + lane] * (difference * difference);
        }
    }
    return total(errors);
}

// Weighted sums over the block that do not depend on its integers.
struct BlockSums {
    float weights = 0.0f;
    float elements = 0.0f;
};

// What least squares makes of integers, and by how much it lowers the weighted sum of squares.
struct Solution {
    Affine form;
    float gain = 0.0f;
};

// Scale and minimum of least weighted squared error for the integers behind `found`.
Solution least_squares(const AffineFit &found, const BlockSums &sums) {
    const float determinant = sums.weights * found.squares - found.integers * found.integers;
    if (!(determinant > 0.0f)) return {};
    const float scale = (sums.weights * found.products - found.integers * sums.elements) / determinant;
    const float minimum = (found.squares * sums.elements - found.integers * found.products) / determinant;
    return {{scale, minimum}, scale * found.products + minimum * sums.elements};
}

}  // namespace

Affine plain_affine(const float *x, std::size_t length) {
    float smallest = x[0], largest = x[0];
    for (std::size_t i = 1; i < length; ++i) {
        smallest = std::min(smallest, x[i]);
        largest = std::max(largest, x[i]);
    }
    const float minimum = rounded_scale(smallest, Float::float16);
    return {rounded_scale((largest - minimum) / 15.0f, Float::float16), minimum};
}

Affine search_affine4(const float *x, const float *importance, std::size_t length, const Affine &fallback) {
    if (!(fallback.scale > 0.0f)) return fallback;
    static const std::vector<float> ones(kLongestBlock, 1.0f);
    const float *weights = importance != nullptr ? importance : ones.data();
    Affine best = fallback;
    const float best_error = affine_error(x, weights, length, fallback);
    if (best_error == 0.0f) return best;
    BlockSums sums;
    for (std::size_t i = 0; i < length; ++i) sums.weights += weights[i], sums.elements += weights[i] * x[i];
    Solution found;
    for (int step = 0; step < kAffineCandidates; ++step) {
        // the range becomes 14 to 17 steps: the largest element is cut off, or leaves integers unused
        const float steps = 14.0f + 0.2f * static_cast<float>(step);
        Affine form{fallback.scale * 15.0f / steps, fallback.minimum};
        for (int round = 0; round < kRefinements && form.scale > 0.0f; ++round) {
            AffineFit fitted;
            fit_affine(x, weights, length, 1.0f / form.scale, form.minimum, &fitted);
            const Solution solution = least_squares(fitted, sums);
            if (solution.gain > found.gain && solution.form.scale > 0.0f) found = solution;
            form = solution.form;
        }
    }
    const Affine form{rounded_scale(found.form.scale, Float::float16), rounded_scale(found.form.minimum, Float::float16)};
    if (!(form.scale > 0.0f) || !std::isfinite(form.scale) || !std::isfinite(form.minimum)) return best;
    if (affine_error(x, weights, length, form) < best_error) best = form;
    return best;
}

void store_counted(const float *x, std::size_t length, const Affine &form, std::uint8_t *values) {
    for (std::size_t i = 0; i < length; i += 2) {
        const int low = static_cast<int>(counted_integer(x[i], form)) - 8;
        const int high = static_cast<int>(counted_integer(x[i + 1], form)) - 8;
        values[i / 2] = static_cast<std::uint8_t>((low & 0xf) | ((high & 0xf) << 4));
    }
}

float rounded_scale(float value, Float scale_dtype) {
    value += 0.0f;
    if (scale_dtype == Float::float32) return value;
    const bool is_float16 = scale_dtype == Float::float16;
    const std::uint16_t half = is_float16 ? to_float16(value) : to_bfloat16(value);
    if ((half & 0x7fffu) == 0) return 0.0f;
    return is_float16 ? from_float16(half) : from_bfloat16(half);
}

float absmax_scale(const float *x, std::size_t length, int bits, Float scale_dtype) {
    std::uint32_t magnitude = 0, largest = 0;  // as unsigned bits every negative is above every positive
    for (std::size_t i = 0; i < length; ++i) {
        const auto word = std::bit_cast<std::uint32_t>(x[i]);
        magnitude = std::max(magnitude, word & 0x7fffffffu);
        largest = std::max(largest, word);
    }
    if (magnitude == 0) return 0.0f;
    const float maximum = std::bit_cast<float>(magnitude);
    if (bits == 8) return rounded_scale(maximum / 127.0f, scale_dtype);
    return rounded_scale(largest == (magnitude | 0x80000000u) ? maximum / 8.0f : maximum / -8.0f, scale_dtype);
}

void store_integers(const float *x, std::size_t length, float scale, int bits, std::uint8_t *values) {
    std::int8_t integers[kLongestBlock];
    for (std::size_t i = 0; i < length; ++i)
        integers[i] = static_cast<std::int8_t>(rounded_integer(x[i], scale, bits));
    if (bits == 8) {
        for (std::size_t i = 0; i < length; ++i) values[i] = static_cast<std::uint8_t>(integers[i]);
        return;
    }
    for (std::size_t i = 0; i < length; i += 2)
        values[i / 2] = static_cast<std::uint8_t>((integers[i] & 0xf) | ((integers[i + 1] & 0xf) << 4));
}

float search_scale4(const float *x, const float *importance, std::size_t length, float fallback, Float scale_dtype) {
    if (fallback == 0.0f) return fallback;
    static const std::vector<float> ones(kLongestBlock, 1.0f);
    const float *weights = importance != nullptr ? importance : ones.data();
    float best = fallback, best_error = error_of(x, weights, length, fallback);
    for (const float sign : {1.0f, -1.0f}) {
        float gain = 0.0f, candidate = 0.0f;
        for (int step = 0; step < kCandidates; ++step) {
            // the largest element falls from -9 to -5.48, or on the other side from 9 to 5.48 where 7 cuts it off
            Fit found;
            fit(x, weights, length, sign * (1.125f - 0.04f * static_cast<float>(step)) / fallback, &found);
            if (found.squares <= 0.0f) continue;
            const float least = found.products * found.products / found.squares;
            if (least > gain) gain = least, candidate = found.products / found.squares;
        }
        candidate = rounded_scale(candidate, scale_dtype);
        if (candidate == 0.0f || !std::isfinite(candidate)) continue;
        const float error = error_of(x, weights, length, candidate);
        if (error < best_error) best = candidate, best_error = error;
    }
    return best;
}

}  // namespace trtllm
