// Scales (and minima) of 4-bit blocks that make the weighted squared error of the block least, rather than fit its largest element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "checkpoints/native/floats.h"

namespace trtllm {

inline constexpr std::size_t kLongestBlock = 256;

// A scale for `length` elements (a multiple of 8, at most kLongestBlock), as it is after rounding to `scale_dtype`,
// with integers in [-8, 7]. `importance` weighs the elements' squared errors; null weighs them alike. Its error is
// never above that of `fallback`, which is a scale after the same rounding: then that one is returned.
float search_scale4(const float *x, const float *importance, std::size_t length, float fallback, Float scale_dtype);

// Scale and minimum of a block whose elements are scale * integer + minimum, integers in [0, 15].
struct Affine {
    float scale = 0.0f;
    float minimum = 0.0f;
};

// Minimum and scale as the block's extremes give them, in float16: the smallest element becomes 0, the largest 15.
// Either is infinite when float16 does not hold it.
Affine plain_affine(const float *x, std::size_t length);

// The affine form of least squared error, weighted as search_scale4's, that is found near the plain one; never a worse
// one than `fallback`, which is after rounding to float16.
Affine search_affine4(const float *x, const float *importance, std::size_t length, const Affine &fallback);

// Rounds a block to integers against a stored scale and minimum, two a byte less 8, in two's complement.
void store_counted(const float *x, std::size_t length, const Affine &form, std::uint8_t *values);

// `element` against scale and minimum, rounded to nearest even and cut off to 0 .. 15.
inline float counted_integer(float element, const Affine &form) {
    if (form.scale == 0.0f) return 0.0f;
    float quotient = (element - form.minimum) / form.scale;
    quotient = quotient < 0.0f ? 0.0f : quotient;
    quotient = quotient > 15.0f ? 15.0f : quotient;
    constexpr float rounder = 12582912.0f;  // see rounded_integer()
    return (quotient + rounder) - rounder;
}

// `value` after rounding to a scale's type; a zero is never negative.
float rounded_scale(float value, Float scale_dtype);

// The plain scale: the largest element becomes -8, or
// with 8 bits 127 or -127. Rounded to `scale_dtype`.
float absmax_scale(const float *x, std::size_t length, int bits, Float scale_dtype);

// Rounds a block to integers against a stored scale: -8..7, two a byte with the first in the low nibble, or -127..127.
// With scale 0 they are zeros.
void store_integers(const float *x, std::size_t length, float scale, int bits, std::uint8_t *values);

// `element` against `scale`, rounded to nearest even and cut off to what `bits` hold.
inline float rounded_integer(float element, float scale, int bits) {
    if (scale == 0.0f) return 0.0f;
    const float lowest = bits == 4 ? -8.0f : -127.0f, highest = bits == 4 ? 7.0f : 127.0f;
    float quotient = element / scale;
    quotient = quotient < lowest ? lowest : quotient;
    quotient = quotient > highest ? highest : quotient;
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to nearest even
    return (quotient + rounder) - rounder;
}

}  // namespace trtllm
