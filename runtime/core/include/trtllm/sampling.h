// How tokens are chosen. Fields and defaults are those of the reference SamplingConfig.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

struct SamplingConfig {
    std::int32_t beam_width = 1;                   // above 1: beam search instead of sampling
    std::vector<std::int32_t> beam_width_array;    // beam width of each step; the last one holds on
    float temperature = 1.0f;                      // 0 = greedy
    std::int32_t top_k = 1;                        // 0 = all, 1 = greedy
    float top_p = 1.0f;
    float top_p_min = 1e-6f;                       // where the decay ends
    float top_p_decay = 1.0f;                      // top_p is multiplied by it after every token
    std::optional<TokenId> top_p_reset_id;         // this token sets top_p back
    float min_p = 0.0f;                            // least probability, relative to the most probable token's
    std::uint64_t seed = 0;
    float repetition_penalty = 1.0f;               // of tokens in prompt and output: positive logits are divided by it
    float presence_penalty = 0.0f;                 // subtracted once from tokens of the output
    float frequency_penalty = 0.0f;                // subtracted as often as the output holds the token
    std::int32_t prompt_ignore_length = 0;         // leading prompt tokens that the repetition penalty does not see
    std::int32_t min_tokens = 0;                   // end tokens and stop words are forbidden before
    std::int32_t no_repeat_ngram_size = 0;         // 0 = off
    float length_penalty = 0.0f;                   // beam scores are divided by length ** length_penalty
    float beam_search_diversity_rate = 0.0f;       // added to a candidate's score times its beam's rank
    std::int32_t early_stopping = 1;               // 1: at beam_width results; 0: by a bound; other: when none can win

    bool is_greedy() const { return beam_width <= 1 && (temperature == 0.0f || top_k == 1); }
};

// Everything that shapes the choice of a request's tokens.
struct DecodingParams {
    SamplingConfig sampling;
    std::vector<TokenId> end_ids;                           // end token and stop token ids: end the sequence
    std::vector<std::vector<TokenId>> bad_words;            // token sequences that must not be completed
    std::vector<std::vector<TokenId>> stop_words;           // token sequences that end the sequence
    std::vector<std::pair<TokenId, float>> logit_bias;      // added to the logits of these tokens
    std::vector<float> embedding_bias;                      // [V] added to all logits, or empty
    std::int32_t num_logprobs = -1;                         // alternatives a token; 0: the chosen one's only; -1: none
};

struct TokenLogprob {
    TokenId token = 0;
    float logprob = 0.0f;  // log softmax of the engine's logits, before penalties, masks and temperature
    std::int32_t rank = 0;  // 1 = the most probable
};

// One chosen token. `top` holds num_logprobs alternatives, the most probable first.
struct Choice {
    TokenId token = 0;
    std::optional<TokenLogprob> logprob;
    std::vector<TokenLogprob> top;
};

}  // namespace trtllm::executor
