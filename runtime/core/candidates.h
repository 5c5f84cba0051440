// The choice of a token from the best logits of a row alone, where that provably gives what the whole row would give.
//
// A session that computes on a device may keep rows of logits there and hand out their largest and log(sum(exp)). Every
// filter keeps logits above some threshold; when all of those are known, the draw is computed by the same code on a row
// that is -inf elsewhere, and its bits are those of the whole row.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "decoder.h"
#include "sampler.h"

namespace trtllm::executor {

struct CandidateRow {
    std::span<const float> values;          // the largest logits of the row, the largest first
    std::span<const std::int32_t> tokens;   // whose they are; the order of equals does not matter
    float log_sum_exp = 0.0f;               // of the whole row
    std::int32_t vocab_size = 0;
};

// A row of which the best are known. Uses the scratch until it is gone.
class KnownLogits {
public:
    KnownLogits(const CandidateRow &given, DecodeScratch &scratch);
    ~KnownLogits();
    KnownLogits(const KnownLogits &) = delete;
    KnownLogits &operator=(const KnownLogits &) = delete;

    // False: there is NaN, +inf, or nothing finite; the whole row has to say which.
    bool is_regular() const { return is_regular_; }
    // Those that the whole row gives; nothing when it takes the whole row to tell.
    std::optional<TokenId> first_largest() const;
    std::optional<TokenId> draw(const SamplingFilter &filter, double uniform);
    // Adds what is asked for of choice.token, which must be one of the known; false when that takes the whole row.
    bool add_logprobs(Choice &choice, std::int32_t num_logprobs) const;

private:
    float value(std::int64_t place) const;
    TokenId token(std::int64_t place) const;
    bool knows_down_to(float threshold) const;
    void spread();
    std::optional<std::int64_t> nucleus_end(const SamplingFilter &filter) const;

    DecodeScratch &scratch_;
    std::int32_t vocab_size_;
    std::int64_t count_;
    double log_sum_exp_;
    bool is_complete_, is_regular_;
};

}  // namespace trtllm::executor
