// From logits to tokens: adjusting (penalties, bans, bias), sampling, and log probabilities, for one sequence at a
// time.
//
// What a sequence draws depends on its seed, its index and the number of the token alone, never on the batch, the step
// or on pauses: uniform(seed, sequence index, token number) is a counter-based generator. Nor does it depend on the
// machine's vectors: every width computes the same bits.
//
// Logits are adjusted in this order: bias, repetition, presence and frequency penalties, no-repeat n-grams, bad words,
// min_tokens, allowed tokens. Then come temperature, top_k, top_p and min_p with transformers' definitions: top_k keeps
// whatever equals the k-th largest; top_p keeps the smallest set that reaches it, among equals those of smaller ids;
// min_p is relative to the most probable token. The token is drawn by its place on the line of kept tokens in the order
// of their ids, where noise in the logits moves the borders between them only by as much.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "trtllm/sampling.h"

namespace trtllm::executor {

struct CandidateRow;

// Raises RequestError that names the field, its value and its range.
void check_sampling(const DecodingParams &params, std::int32_t vocab_size, std::int32_t max_beam_width);

// Memory that decoding reuses from call to call; one for each thread.
struct DecodeScratch {
    std::vector<float> values;          // candidates, and their places in the row
    std::vector<std::int32_t> indices;
    std::vector<float> row;             // for copies of a row
    std::vector<float> maxima;          // of each block of logits
    std::vector<float> sums;            // of each block's weights
    std::vector<float> weights;
    std::vector<float> selection;       // what the search for a k-th largest may shuffle
    std::vector<std::uint64_t> keys;    // candidates in the form that is sorted
    std::vector<std::uint64_t> known;   // the best of a row that is not there, in that form
    std::vector<float> sparse;          // a row of -inf, but for a while
    int most_lanes = 16;                // widest vectors to use; tokens do not depend on it
};

// Penalties, bans and bias of one sequence: needs to see every token that is accepted.
class LogitsAdjuster {
public:
    LogitsAdjuster(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt,
                   std::int32_t vocab_size);

    // Whether adjust() would change anything now; if not, the logits row need not be copied by who shares it.
    bool changes_logits() const;
    // Changes logits [V] in place: bias, repetition / presence / frequency penalties, no-repeat n-grams, bad words,
    // min_tokens; then tokens whose bit in `allowed` (bit t % 32 of word t / 32; may be null) is 0 become -inf.
    void adjust(float *logits, const std::uint32_t *allowed = nullptr) const;
    void accept(TokenId token);
    std::span<const TokenId> generated() const;
    // The number of tokens of the longest stop word that the generated tokens end with; 0 for none, and while there are
    // fewer than min_tokens of them.
    std::size_t matched_stop_word() const;
    bool is_end(TokenId token) const;

private:
    std::shared_ptr<const DecodingParams> params_;
    std::int32_t vocab_size_;
    std::vector<TokenId> tokens_;        // prompt and output
    std::size_t prompt_length_;
    struct Seen;
    std::shared_ptr<Seen> seen_;         // deep-copied when the adjuster is copied (beam search copies adjusters)
    bool forbids_ends() const;           // because of min_tokens

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
    // The same from the best of the row alone; nothing when it takes the whole row to tell, or to say what is wrong.
    std::optional<Choice> next(const CandidateRow &candidates, DecodeScratch &scratch);
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
