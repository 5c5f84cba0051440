// One draw from one row of logits: temperature, top_k, top_p, min_p.
#pragma once

#include "row_selection.h"

namespace trtllm::executor {

struct SamplingFilter {
    float temperature = 1.0f;  // above 0
    std::int32_t top_k = 0;    // 0 = all
    float top_p = 1.0f;
    float min_p = 0.0f;

    float scale() const;  // of weights: log2(e) / temperature
    // Whether the draw needs the sum of all tokens' weights.
    bool needs_total(std::int32_t vocab_size) const;
};

// What a scan left in the row's scratch.
struct ScannedRow {
    Row &row;
    double total = 0.0;  // of the weights under the filter's scale, the blocks' sums being related; 0: sums unknown
};

// The least logit that min_p keeps; -FLT_MAX without one.
float min_p_threshold(float largest, const SamplingFilter &filter);

// The token at `uniform` in [0, 1) of what the filter keeps; needs_total() calls for a total.
TokenId draw_token(const ScannedRow &scanned, const SamplingFilter &filter, double uniform);

}  // namespace trtllm::executor
