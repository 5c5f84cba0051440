// Log probabilities of one row of logits, in parts, for those who have scanned it already.
#pragma once

#include <cmath>

#include "row_selection.h"

namespace trtllm::executor {

inline constexpr float kLog2e = 1.44269504088896341f;  // the scale of weights without a temperature

// log softmax(x) = x - largest - log_total.
struct LogSoftmax {
    float largest = 0.0f;
    double log_total = 0.0;
    float of(float logit) const { return static_cast<float>(static_cast<double>(logit) - largest - log_total); }
};

// Of a row that scan_with_sums(row, kLog2e) went over; `total` is what relate_sums() gave.
inline LogSoftmax log_softmax(const Row &row, double total) { return {row.largest, std::log(total)}; }

// The `count` most probable tokens of a scanned row, equals by id.
std::vector<TokenLogprob> most_probable(Row &row, const LogSoftmax &softmax, std::int64_t count);
// `logits` is the row that was scanned, or a copy of it.
TokenLogprob logprob_of(const Row &row, const float *logits, const LogSoftmax &softmax, TokenId token);

}  // namespace trtllm::executor
