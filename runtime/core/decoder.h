// From logits to tokens: adjusting (penalties, bans, bias), sampling, and log probabilities, for one sequence at a time.
//
// What a sequence draws depends on its seed, its index and the number of the token alone, never on the batch, the step
// or on pauses: uniform(seed, sequence index, token number) is a counter-based generator.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "trtllm/sampling.h"

namespace trtllm::executor {

// Raises RequestError that names the field, its value and its range.
void check_sampling(const DecodingParams &params, std::int32_t vocab_size, std::int32_t max_beam_width);

// Memory that decoding reuses from call to call; one for each thread.
struct DecodeScratch {
    std::vector<float> values;
    std::vector<std::int32_t> indices;
    std::vector<float> row;  // for copies of a row
};

// Penalties, bans and bias of one sequence: needs to see every token that is accepted.
class LogitsAdjuster {
public:
    LogitsAdjuster(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt, std::int32_t vocab_size);

    // Whether adjust() would change anything now; if not, the logits row need not be copied by who shares it.
    bool changes_logits() const;
    // Changes logits [V] in place: bias, repetition / presence / frequency penalties, no-repeat n-grams, bad words,
    // min_tokens; then tokens whose bit in `allowed` (bit t % 32 of word t / 32; may be null) is 0 become -inf.
    void adjust(float *logits, const std::uint32_t *allowed = nullptr);
    void accept(TokenId token);
    std::span<const TokenId> generated() const;
    // True when the generated tokens end with one of the stop words (which only count from min_tokens on).
    // Returns the number of tokens of that stop word, 0 for none.
    std::size_t matched_stop_word() const;
    bool is_end(TokenId token) const;

private:
    std::shared_ptr<const DecodingParams> params_;
    std::int32_t vocab_size_;
    std::vector<TokenId> tokens_;        // prompt and output
    std::size_t prompt_length_;
    // The implementation keeps counts of seen tokens and an n-gram index here.
    struct Seen;
    std::shared_ptr<Seen> seen_;         // deep-copied when the adjuster is copied (beam search copies adjusters)

public:
    LogitsAdjuster(const LogitsAdjuster &other);
    LogitsAdjuster &operator=(const LogitsAdjuster &other);
    LogitsAdjuster(LogitsAdjuster &&) noexcept = default;
    LogitsAdjuster &operator=(LogitsAdjuster &&) noexcept = default;
    ~LogitsAdjuster();
};

// Chooses the tokens of one sequence.
class SequenceDecoder {
public:
    // `sequence_index` is the place among a request's sequences: each draws its own numbers.
    SequenceDecoder(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt,
                    std::int32_t sequence_index, std::int32_t vocab_size);

    // The next token from logits [V], which are changed in place. Throws NonFiniteLogits when they hold NaN, +inf, or
    // nothing but -inf before anything is adjusted, ImpossibleConstraint when adjusting leaves no token.
    Choice next(float *logits, DecodeScratch &scratch, const std::uint32_t *allowed = nullptr);
    // Must follow each next() with its token (or another, when the caller overrides it).
    void accept(TokenId token);
    const LogitsAdjuster &adjuster() const { return adjuster_; }

private:
    std::shared_ptr<const DecodingParams> params_;
    LogitsAdjuster adjuster_;
    std::int32_t sequence_index_;
    std::int32_t vocab_size_;
    float top_p_now_;
};

class NonFiniteLogits : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class ImpossibleConstraint : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Log softmax of raw logits [V] for `token` and the `num_top` most probable ones.
Choice token_logprobs(const float *logits, std::int32_t vocab_size, TokenId token, std::int32_t num_top,
                      DecodeScratch &scratch);

// The place of the largest of logits [V], the first among equals; -1 when one is NaN or +inf or all are -inf.
TokenId argmax(const float *logits, std::int32_t vocab_size);

}  // namespace trtllm::executor
