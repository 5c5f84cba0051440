// The choice of one sequence's next token, from its raw logits to the token and its log probability.
#include <algorithm>
#include <cmath>

#include "candidates.h"
#include "decoder.h"
#include "logprobs.h"
#include "sampler.h"
#include "uniform_draw.h"

namespace trtllm::executor {
namespace {

void check_raw(Scan scan) {
    if (scan == Scan::not_a_number) throw NonFiniteLogits("the engine's logits hold NaN or infinity");
    if (scan == Scan::nothing_finite) throw NonFiniteLogits("the engine's logits are all -inf");
}

void check_adjusted(Scan scan) {
    if (scan != Scan::regular)
        throw ImpossibleConstraint("no token is left: bans, min_tokens and the allowed tokens exclude all of them");
}

// Scans with sums under `scale`; the total of the weights.
double checked_total(Row &row, float scale, void (*check)(Scan)) {
    check(scan_with_sums(row, scale));
    return relate_sums(row, scale);
}

}  // namespace

SequenceDecoder::SequenceDecoder(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt,
                                 std::int32_t sequence_index, std::int32_t vocab_size)
    : params_(params), adjuster_(params, prompt, vocab_size), sequence_index_(sequence_index), vocab_size_(vocab_size),
      top_p_now_(params->sampling.top_p) {}

// The raw row is checked, and its log probabilities are taken, before anything changes it; what was summed on the way
// serves the draw too where nothing is adjusted and the scale is the same.
Choice SequenceDecoder::next(float *logits, DecodeScratch &scratch, const std::uint32_t *allowed) {
    const SamplingConfig &sampling = params_->sampling;
    const bool greedy = sampling.temperature == 0.0f || sampling.top_k == 1;
    const bool wants_logprobs = params_->num_logprobs >= 0;
    const bool adjusts = allowed != nullptr || adjuster_.changes_logits();
    const SamplingFilter filter{greedy ? 1.0f : sampling.temperature, sampling.top_k, top_p_now_, sampling.min_p};
    const bool needs_total = !greedy && filter.needs_total(vocab_size_);

    Row row(logits, vocab_size_, scratch);
    Choice choice;
    LogSoftmax softmax;
    double total = 0.0;
    float scale = 0.0f;  // of the total; 0: there is none
    if (wants_logprobs || (needs_total && !adjusts)) {
        scale = wants_logprobs ? kLog2e : filter.scale();
        total = checked_total(row, scale, check_raw);
    } else {
        check_raw(scan(row));
    }
    if (wants_logprobs) {
        softmax = log_softmax(row, total);
        choice.top = most_probable(row, softmax, params_->num_logprobs);
        if (adjusts) scratch.row.assign(logits, logits + vocab_size_);
    }

    if (adjusts) adjuster_.adjust(logits, allowed);
    if (needs_total && (adjusts || scale != filter.scale()))
        total = checked_total(row, filter.scale(), check_adjusted);
    else if (adjusts)
        check_adjusted(scan(row));

    const double uniform = uniform_draw(sampling.seed, sequence_index_, adjuster_.generated().size());
    choice.token = greedy ? first_largest(row) : draw_token({row, needs_total ? total : 0.0}, filter, uniform);
    if (wants_logprobs)
        choice.logprob = logprob_of(row, adjusts ? scratch.row.data() : logits, softmax, choice.token);
    return choice;
}

std::optional<Choice> SequenceDecoder::next(const CandidateRow &candidates, DecodeScratch &scratch) {
    const SamplingConfig &sampling = params_->sampling;
    if (adjuster_.changes_logits()) return std::nullopt;
    KnownLogits known(candidates, scratch);
    if (!known.is_regular()) return std::nullopt;
    const bool greedy = sampling.temperature == 0.0f || sampling.top_k == 1;
    const SamplingFilter filter{greedy ? 1.0f : sampling.temperature, sampling.top_k, top_p_now_, sampling.min_p};
    const double uniform = uniform_draw(sampling.seed, sequence_index_, adjuster_.generated().size());
    const auto token = greedy ? known.first_largest() : known.draw(filter, uniform);
    if (!token) return std::nullopt;
    Choice choice;
    choice.token = *token;
    if (params_->num_logprobs >= 0 && !known.add_logprobs(choice, params_->num_logprobs)) return std::nullopt;
    return choice;
}

void SequenceDecoder::accept(TokenId token) {
    const SamplingConfig &sampling = params_->sampling;
    adjuster_.accept(token);
    top_p_now_ = std::max(top_p_now_ * sampling.top_p_decay, sampling.top_p_min);
    if (token == sampling.top_p_reset_id) top_p_now_ = sampling.top_p;
}

TokenId argmax(const float *logits, std::int32_t vocab_size) {
    constexpr std::int64_t kBlocks = 64;
    const VectorMath &math = vector_math();
    float maxima[kBlocks], largest = -INFINITY;
    const float *block = logits;
    for (std::int64_t start = 0; start < vocab_size; start += kBlocks * kBlock) {
        const std::int64_t size = std::min<std::int64_t>(kBlocks * kBlock, vocab_size - start);
        if (!math.maxima(logits + start, size, maxima)) return -1;
        const float *most = std::max_element(maxima, maxima + count_blocks(size));
        if (!(*most > largest)) continue;
        largest = *most;
        block = logits + start + (most - maxima) * kBlock;
    }
    if (largest == -INFINITY) return -1;
    return static_cast<TokenId>(std::find(block, logits + vocab_size, largest) - logits);
}

}  // namespace trtllm::executor
