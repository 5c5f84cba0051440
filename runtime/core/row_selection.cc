// Thresholds from block maxima: k blocks' maxima bound the k-th largest logit from below, and what is left above the
// bound is little enough to be gathered and sorted.
#include "row_selection.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <functional>

namespace trtllm::executor {
namespace {

constexpr std::int64_t kNarrow = 64;      // blocks whose maxima bound a narrow nucleus
constexpr std::int64_t kSortable = 2048;  // candidates that are sorted without more ado
constexpr float kSteps = 64.0f;           // slices that halve the weight
constexpr int kSlices = 2048;             // down to 2^-32; the last takes what is below

template <typename T>
T *reserve(std::vector<T> &memory, std::int64_t size) {
    if (static_cast<std::int64_t>(memory.size()) < size) memory.resize(static_cast<std::size_t>(size));
    return memory.data();
}

Scan finish_scan(Row &row, bool regular) {
    if (!regular) return Scan::not_a_number;
    row.largest = *std::max_element(row.scratch.maxima.begin(), row.scratch.maxima.begin() + row.num_blocks());
    return row.largest > -INFINITY ? Scan::regular : Scan::nothing_finite;
}

float select_largest(std::vector<float> &selection, std::int64_t count, std::int64_t k) {
    std::nth_element(selection.begin(), selection.begin() + (k - 1), selection.begin() + count, std::greater<>());
    return std::max(selection[static_cast<std::size_t>(k - 1)], -FLT_MAX);
}

// At most the k-th largest logit, and not far below it.
float bound_of_kth(Row &row, std::int64_t k) {
    const std::int64_t blocks = row.num_blocks();
    if (2 * k <= blocks) {
        std::copy_n(row.scratch.maxima.data(), blocks, reserve(row.scratch.selection, blocks));
        return select_largest(row.scratch.selection, blocks, k);
    }
    const std::int64_t groups = blocks * kBlockGroups;
    if (2 * k > groups) return -FLT_MAX;
    row.math.lane_maxima(row.logits, row.size, reserve(row.scratch.selection, groups));
    return select_largest(row.scratch.selection, groups, k);
}

double sum_candidates(Row &row, std::int64_t count, float scale) {
    float *weights = reserve(row.scratch.weights, count);
    row.math.weights(row.scratch.values.data(), count, row.largest, scale, weights);
    double total = 0.0;
    for (std::int64_t i = 0; i < count; ++i) total += weights[i];
    return total;
}

int slice_of(const Row &row, float logit, float scale) {
    const float steps = (row.largest - logit) * scale * kSteps;
    return steps < kSlices - 1 ? static_cast<int>(steps) : kSlices - 1;
}

// Where many candidates are in question: leaves only those of the slice in which the nucleus ends, and takes the weight
// of the slices before it off `needed`. Returns how many are left.
std::int64_t keep_last_slice(Row &row, std::int64_t count, double &needed, float scale) {
    sum_candidates(row, count, scale);
    float *values = row.scratch.values.data();
    std::int32_t *places = row.scratch.indices.data();
    std::array<double, kSlices> sums{};
    const float *weights = row.scratch.weights.data();
    for (std::int64_t i = 0; i < count; ++i)
        sums[static_cast<std::size_t>(slice_of(row, values[i], scale))] += weights[i];
    int slice = 0, last = 0;
    double before = 0.0, before_last = 0.0;
    for (; slice < kSlices; before += sums[static_cast<std::size_t>(slice++)]) {
        const double sum = sums[static_cast<std::size_t>(slice)];
        if (sum > 0.0) last = slice, before_last = before;
        if (sum > 0.0 && before + sum >= needed) break;
    }
    needed -= before_last;
    std::int64_t left = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        if (slice_of(row, values[i], scale) != last) continue;
        values[left] = values[i];
        places[left++] = places[i];
    }
    return left;
}

TokenId first_of_block(const Row &row, std::int64_t block, float value) {
    const float *begin = row.logits + block * kBlock;
    return static_cast<TokenId>(std::find(begin, begin + row.block_size(block), value) - row.logits);
}

// The threshold that keeps the fewest candidates whose weights reach `needed`; see nucleus_threshold().
float nucleus_end(Row &row, std::int64_t count, double needed, float scale) {
    if (count > kSortable) count = keep_last_slice(row, count, needed, scale);
    sort_candidates(row.scratch, count);
    const std::uint64_t *keys = row.scratch.keys.data();
    for (std::int64_t i = 0; i < count; ++i) row.scratch.values[static_cast<std::size_t>(i)] = logit_of_key(keys[i]);
    sum_candidates(row, count, scale);
    std::int64_t last = 0;
    for (double sum = row.scratch.weights[0]; sum < needed && last + 1 < count;)
        sum += row.scratch.weights[static_cast<std::size_t>(++last)];
    const float threshold = logit_of_key(keys[last]);
    for (std::int64_t i = last + 1; i < count && logit_of_key(keys[i]) == threshold; ++i)
        row.logits[token_of_key(keys[i])] = -INFINITY;
    return threshold;
}

}  // namespace

std::int64_t Row::block_size(std::int64_t block) const { return std::min<std::int64_t>(kBlock, size - block * kBlock); }

Scan scan(Row &row) {
    return finish_scan(row, row.math.maxima(row.logits, row.size, reserve(row.scratch.maxima, row.num_blocks())));
}

Scan scan_with_sums(Row &row, float scale) {
    float *maxima = reserve(row.scratch.maxima, row.num_blocks()), *sums = reserve(row.scratch.sums, row.num_blocks());
    return finish_scan(row, row.math.maxima_and_sums(row.logits, row.size, scale, maxima, sums));
}

double relate_sums(Row &row, float scale) {
    float *factors = reserve(row.scratch.weights, row.num_blocks());
    row.math.weights(row.scratch.maxima.data(), row.num_blocks(), row.largest, scale, factors);
    double total = 0.0;
    for (std::int64_t b = 0; b < row.num_blocks(); ++b) {
        row.scratch.sums[static_cast<std::size_t>(b)] *= factors[b];
        total += row.scratch.sums[static_cast<std::size_t>(b)];
    }
    return total;
}

TokenId first_largest(const Row &row) {
    const auto &maxima = row.scratch.maxima;
    const auto block = std::find(maxima.begin(), maxima.begin() + row.num_blocks(), row.largest);
    return first_of_block(row, block - maxima.begin(), row.largest);
}

float kth_largest(Row &row, std::int64_t k) {
    const std::int64_t found = gather_at_least(row, bound_of_kth(row, k));
    if (found < k) return -FLT_MAX;
    std::copy_n(row.scratch.values.data(), found, reserve(row.scratch.selection, found));
    return select_largest(row.scratch.selection, found, k);
}

std::int64_t gather_at_least(Row &row, float threshold) {
    float *values = reserve(row.scratch.values, row.size + kSlack);
    std::int32_t *places = reserve(row.scratch.indices, row.size + kSlack);
    std::int64_t found = 0;
    for (std::int64_t b = 0; b < row.num_blocks(); ++b) {
        if (row.scratch.maxima[static_cast<std::size_t>(b)] < threshold) continue;
        const auto base = static_cast<std::int32_t>(b * kBlock);
        found += row.math.gather(row.logits + base, row.block_size(b), threshold, base, values + found, places + found);
    }
    return found;
}

// The high half falls as the logit rises, the low half is the place.
void sort_candidates(DecodeScratch &scratch, std::int64_t count) {
    std::uint64_t *keys = reserve(scratch.keys, count);
    for (std::int64_t i = 0; i < count; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(scratch.values[static_cast<std::size_t>(i)] + 0.0f);  // no -0
        const std::uint32_t falling = bits >> 31 ? bits : ~bits & 0x7fffffffu;
        const auto place = static_cast<std::uint32_t>(scratch.indices[static_cast<std::size_t>(i)]);
        keys[i] = std::uint64_t{falling} << 32 | place;
    }
    if (!std::is_sorted(keys, keys + count)) std::sort(keys, keys + count);
}

float logit_of_key(std::uint64_t key) {
    const auto falling = static_cast<std::uint32_t>(key >> 32);
    return std::bit_cast<float>(falling >> 31 ? falling : ~falling & 0x7fffffffu);
}

TokenId token_of_key(std::uint64_t key) { return static_cast<TokenId>(key & 0xffffffffu); }

float nucleus_threshold(Row &row, std::int64_t count, double top_p, float scale) {
    return nucleus_end(row, count, top_p * sum_candidates(row, count, scale), scale);
}

// Tokens of less than (1 - top_p) * total / size weigh less than (1 - top_p) * total together: the nucleus ends above.
float nucleus_threshold_of_row(Row &row, double top_p, double total, float scale) {
    const double needed = top_p * total, least = 0.99 * (1.0 - top_p) * total / row.size;
    const float widest = std::max(static_cast<float>(row.largest + 1.0001 * std::log2(least) / scale), -FLT_MAX);
    const float narrow = bound_of_kth(row, kNarrow);
    std::int64_t count = 0;
    if (narrow > widest) {
        count = gather_at_least(row, narrow);
        if (count > kSortable || sum_candidates(row, count, scale) < needed * (1.0 + 1e-5)) count = 0;
    }
    if (count == 0) count = gather_at_least(row, widest);
    return nucleus_end(row, count, needed, scale);
}

double sum_blocks(Row &row, float threshold, float scale) {
    float *sums = reserve(row.scratch.sums, row.num_blocks());
    double total = 0.0;
    for (std::int64_t b = 0; b < row.num_blocks(); ++b) {
        const bool reaches = row.scratch.maxima[static_cast<std::size_t>(b)] >= threshold;
        const float *block = row.logits + b * kBlock;
        sums[b] = reaches ? row.math.sum_at_least(block, row.block_size(b), threshold, row.largest, scale) : 0.0f;
        total += sums[b];
    }
    return total;
}

TokenId token_at(Row &row, double target, float threshold, float scale) {
    const float *sums = row.scratch.sums.data();
    std::int64_t block = -1;
    double before = 0.0;
    for (std::int64_t b = 0; b < row.num_blocks(); ++b) {
        if (!(sums[b] > 0.0f)) continue;
        if (block >= 0) before += sums[block];
        block = b;
        if (before + sums[b] > target) break;
    }
    const float *logits = row.logits + block * kBlock;
    float *weights = reserve(row.scratch.weights, kBlock);
    row.math.weights(logits, row.block_size(block), row.largest, scale, weights);
    std::int64_t chosen = -1;
    for (std::int64_t i = 0; i < row.block_size(block); ++i) {
        if (logits[i] < threshold || !(weights[i] > 0.0f)) continue;
        chosen = i;
        before += weights[i];
        if (before > target) break;
    }
    return chosen < 0 ? first_largest(row) : static_cast<TokenId>(block * kBlock + chosen);
}

}  // namespace trtllm::executor
