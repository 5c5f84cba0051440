// Log probabilities and ranks of tokens under the engine's own logits.
#include "logprobs.h"

#include <algorithm>
#include <cmath>

namespace trtllm::executor {

std::vector<TokenLogprob> most_probable(Row &row, const LogSoftmax &softmax, std::int64_t count) {
    std::vector<TokenLogprob> result;
    if (count <= 0) return result;
    const std::int64_t found = gather_at_least(row, kth_largest(row, std::min<std::int64_t>(count, row.size)));
    sort_candidates(row.scratch, found);
    for (std::int64_t i = 0; i < std::min(found, count); ++i) {
        const std::uint64_t key = row.scratch.keys[static_cast<std::size_t>(i)];
        result.push_back({token_of_key(key), softmax.of(logit_of_key(key)), static_cast<std::int32_t>(i + 1)});
    }
    return result;
}

TokenLogprob logprob_of(const Row &row, const float *logits, const LogSoftmax &softmax, TokenId token) {
    const float logit = logits[token];
    const std::int64_t before = row.math.count_at_least(logits, token, logit);
    const std::int64_t behind =
        row.math.count_at_least(logits + token, row.size - token, std::nextafter(logit, INFINITY));
    return {token, softmax.of(logit), static_cast<std::int32_t>(before + behind + 1)};
}

Choice token_logprobs(const float *logits, std::int32_t vocab_size, TokenId token, std::int32_t num_top,
                      DecodeScratch &scratch) {
    Row row(const_cast<float *>(logits), vocab_size, scratch);  // only nucleus thresholds write to it
    if (scan_with_sums(row, kLog2e) != Scan::regular)
        throw NonFiniteLogits("log probabilities of logits that hold NaN or infinity, or nothing finite");
    const LogSoftmax softmax = log_softmax(row, relate_sums(row, kLog2e));
    Choice choice;
    choice.token = token;
    choice.logprob = logprob_of(row, logits, softmax, token);
    choice.top = most_probable(row, softmax, num_top);
    return choice;
}

}  // namespace trtllm::executor
