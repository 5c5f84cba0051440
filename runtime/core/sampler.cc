// Every filter becomes a threshold on the logits; one sum over what is left places the draw.
#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace trtllm::executor {
namespace {

constexpr double kLog2e = 1.4426950408889634;

bool cuts_to_k(const SamplingFilter &filter, std::int32_t vocab_size) {
    return filter.top_k > 0 && filter.top_k < vocab_size;
}

float threshold_of(const ScannedRow &scanned, const SamplingFilter &filter) {
    Row &row = scanned.row;
    float threshold = -FLT_MAX;
    if (cuts_to_k(filter, row.size)) {
        threshold = kth_largest(row, filter.top_k);
        if (filter.top_p < 1.0f) {
            const std::int64_t count = gather_at_least(row, threshold);
            threshold = nucleus_threshold(row, count, filter.top_p, filter.scale());
        }
    } else if (filter.top_p < 1.0f) {
        threshold = nucleus_threshold_of_row(row, filter.top_p, scanned.total, filter.scale());
    }
    return std::max(threshold, min_p_threshold(row.largest, filter));
}

}  // namespace

float SamplingFilter::scale() const { return static_cast<float>(std::min(kLog2e / temperature, 1e30)); }

bool SamplingFilter::needs_total(std::int32_t vocab_size) const {
    if (cuts_to_k(*this, vocab_size)) return false;
    return top_p < 1.0f || min_p == 0.0f;
}

float min_p_threshold(float largest, const SamplingFilter &filter) {
    if (filter.min_p <= 0.0f) return -FLT_MAX;
    return static_cast<float>(largest + filter.temperature * std::log(static_cast<double>(filter.min_p)));
}

TokenId draw_token(const ScannedRow &scanned, const SamplingFilter &filter, double uniform) {
    const float threshold = threshold_of(scanned, filter), scale = filter.scale();
    const bool keeps_all = threshold == -FLT_MAX && scanned.total > 0.0;
    const double total = keeps_all ? scanned.total : sum_blocks(scanned.row, threshold, scale);
    return token_at(scanned.row, uniform * total, threshold, scale);
}

}  // namespace trtllm::executor
