// Passes over rows of logits, compiled for several vector widths. Every width gives the same bits: sums run in sixteen
// fixed lanes, nothing is fused into multiply-adds, and the rest is comparisons.
#pragma once

#include <cstdint>

namespace trtllm::executor {

// Rows are cut into blocks of so many logits; the last one may be shorter.
inline constexpr std::int64_t kBlock = 256;
inline constexpr std::int64_t kBlockGroups = 16;  // groups of a block that lane_maxima() tells apart
inline constexpr std::int64_t kSlack = 16;        // elements that gather() may write past what it returns

constexpr std::int64_t count_blocks(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

// A weight is 2^y, y = (x - reference) * scale, so scale = log2(e) / temperature. Its relative error is at most 2.5e-7
// for 2^y (9e-8 of the polynomial, the rest is rounding) and 9e-8 * |y| for the two roundings of y: a token of a
// thousandth of the reference's probability is known to 1.2e-6 of itself. A block's sum adds 20 roundings, 1.2e-6, at
// worst. Weights below 2^-125 are 0. `reference` is finite and no less than any x.
struct VectorMath {
    int lanes;
    // The largest logit of each block; false when one of x [size] is NaN or +inf.
    bool (*maxima)(const float *x, std::int64_t size, float *maxima);
    // The same, and the sum of each block's weights, the reference being the block's own maximum.
    bool (*maxima_and_sums)(const float *x, std::int64_t size, float scale, float *maxima, float *sums);
    // The sum of the weights of those x [count <= kBlock] that are at least `threshold`.
    float (*sum_at_least)(const float *x, std::int64_t count, float threshold, float reference, float scale);
    void (*weights)(const float *x, std::int64_t count, float reference, float scale, float *weights);
    // Writes those of x [count <= kBlock] that are at least `threshold` (finite) and their places, counted from `base`,
    // in order. Returns how many.
    std::int64_t (*gather)(const float *x, std::int64_t count, float threshold, std::int32_t base, float *values,
                           std::int32_t *places);
    std::int64_t (*count_at_least)(const float *x, std::int64_t size, float threshold);
    // The largest of every sixteenth logit of a block: maxima [kBlockGroups * count_blocks(size)].
    void (*lane_maxima)(const float *x, std::int64_t size, float *maxima);
};

// The widest version of at most `most_lanes` that this machine runs.
const VectorMath &vector_math(int most_lanes = 16);

}  // namespace trtllm::executor
