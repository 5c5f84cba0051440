// Which tokens of one row of logits are in question: k-th largest values, candidates above a threshold, the nucleus.
// Block maxima say where to look, so that after the first pass only few blocks are read again.
#pragma once

#include <cstdint>

#include "decoder.h"
#include "vector_math.h"

namespace trtllm::executor {

struct Row {
    float *logits;
    std::int32_t size;
    DecodeScratch &scratch;  // maxima (and sums) of the blocks are there once the row is scanned
    const VectorMath &math;
    float largest = 0.0f;  // finite once scanned

    Row(float *logits, std::int32_t size, DecodeScratch &scratch)
        : logits(logits), size(size), scratch(scratch), math(vector_math(scratch.most_lanes)) {}
    std::int64_t num_blocks() const { return count_blocks(size); }
    std::int64_t block_size(std::int64_t block) const;
};

enum class Scan { regular, nothing_finite, not_a_number };

// Finds the blocks' maxima and the row's; not_a_number when there is NaN or +inf, nothing_finite when all are -inf.
Scan scan(Row &row);
// The same, and the blocks' sums of weights.
Scan scan_with_sums(Row &row, float scale);

// Turns the sums that scan_with_sums() found into sums relative to the row's maximum. Returns their total.
double relate_sums(Row &row, float scale);

// The first among the largest.
TokenId first_largest(const Row &row);
// The k-th largest logit (1 <= k <= size) and at least -FLT_MAX.
float kth_largest(Row &row, std::int64_t k);

// Puts the logits of at least `threshold`, in order of their places, in scratch.values and scratch.indices.
std::int64_t gather_at_least(Row &row, float threshold);

// Sorts the first `count` candidates by logit, the largest first, then by place, as scratch.keys.
void sort_candidates(DecodeScratch &scratch, std::int64_t count);
float logit_of_key(std::uint64_t key);
TokenId token_of_key(std::uint64_t key);

// The threshold that keeps the fewest of the first `count` candidates whose weights reach `top_p` of their total. Where
// several equal it and not all are needed, those of larger ids become -inf in the row.
float nucleus_threshold(Row &row, std::int64_t count, double top_p, float scale);
// The same of the whole row, of whose weights the total is `total` (see relate_sums).
float nucleus_threshold_of_row(Row &row, double top_p, double total, float scale);

// Sums of the blocks' weights, of logits of at least `threshold`, relative to the row's maximum. Returns their total.
double sum_blocks(Row &row, float threshold, float scale);
// The token at `target` on the line of those weights, in order of ids.
TokenId token_at(Row &row, double target, float threshold, float scale);

}  // namespace trtllm::executor
