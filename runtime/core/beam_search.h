// Beam search over one request: which beams go on from which, and the best finished hypotheses.
//
// The semantics are those of transformers' beam search: 2 * width candidates a step, hypotheses that end are set aside
// with score = sum of log probabilities / length ** length_penalty.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decoder.h"

namespace trtllm::executor {

struct Hypothesis {
    std::vector<TokenId> tokens;   // generated ones, without an end token
    std::vector<float> logprobs;   // of each token
    float cumulative_logprob = 0;  // sum, the end token's included
    float score = 0;               // what it was ranked by
    TokenId end_token = -1;        // -1: ended by length
};

class BeamSearch {
public:
    BeamSearch(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt, std::int32_t max_tokens,
               std::int32_t vocab_size);

    // Beams that are alive: 1 before the first step (all start from the prompt), then the step's width.
    std::int32_t num_beams() const;
    // Takes logits [num_beams, V] (row stride V, changed in place; rows[i] is beam i's) and moves on.
    // Returns, for each beam that lives on, its parent's index; empty when the search is over.
    std::vector<std::int32_t> step(std::span<float *const> rows, DecodeScratch &scratch,
                                   std::span<const std::uint32_t *const> allowed = {});
    // The newest token of a live beam, and all of them.
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
