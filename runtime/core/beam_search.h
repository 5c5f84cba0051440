// Beam search over one request: which beams go on from which, and the best finished hypotheses.
//
// The semantics are those of transformers' beam search (version 5). Logits become log probabilities, which the
// penalties and bans then act on; max(2, 1 + end ids) * width candidates are looked at, equals by beam and token; those
// that end (by an end token, a stop word or length) are set aside when they are among the first `width`, with score =
// sum of log probabilities / length ** length_penalty, where the length counts the end token and not the prompt.
// beam_width of them are kept. The search is over when that many are and early_stopping is 1; when the best live beam
// cannot score more than the worst of them, assuming its length as it is now, or max_tokens where early_stopping is
// neither 0 nor 1 and the length penalty is positive; and when no beam lives on.
//
// beam_search_diversity_rate * (the beam's place among the live ones, 0 the best) is added to a candidate's sum where
// candidates are compared, and only there. With beam_width_array, step s leaves beam_width_array[s] beams.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decoder.h"

namespace trtllm::executor {

struct Hypothesis {
    std::vector<TokenId> tokens;   // generated ones, without an end token
    std::vector<float> logprobs;   // of each token, as penalties and bans left them
    float cumulative_logprob = 0;  // sum, the end token's included
    float score = 0;               // what it was ranked by
    TokenId end_token = -1;        // -1: ended by length, or by a stop word
    std::int32_t stop_word_length = 0;  // tokens at the end that are the stop word
};

class BeamSearch {
public:
    BeamSearch(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt, std::int32_t max_tokens,
               std::int32_t vocab_size);

    // Beams that are alive: 1 before the first step (all start from the prompt), then the step's width, or fewer where
    // there are not as many continuations; 0 when the search is over.
    std::int32_t num_beams() const;
    // Takes logits [num_beams, V] (row stride V, changed in place; rows[i] is beam i's) and moves on.
    // Returns, for each beam that lives on, its parent's index; empty when the search is over. Throws NonFiniteLogits
    // before anything is changed, and ImpossibleConstraint when adjusting leaves no beam a token.
    std::vector<std::int32_t> step(std::span<float *const> rows, DecodeScratch &scratch,
                                   std::span<const std::uint32_t *const> allowed = {});
    // The newest token of a live beam, and all that it has generated.
    TokenId last_token(std::int32_t beam) const;
    std::span<const TokenId> tokens(std::int32_t beam) const;
    bool is_finished() const;
    // At most `beam_width` hypotheses, the best first. Before the end: the live beams as they stand.
    std::vector<Hypothesis> results() const;
    // Ends the search where it stands (cancelled, out of time): live beams become results.
    void stop();

private:
    struct State;
    std::shared_ptr<State> state_;
};

}  // namespace trtllm::executor
