// The ranges of the decoding parameters. All that is wrong is reported at once.
#include <cmath>
#include <sstream>
#include <string>

#include "decoder.h"

namespace trtllm::executor {
namespace {

class Problems {
public:
    // `range` completes "must be ...".
    template <typename T>
    void expect(bool holds, const std::string &field, const T &value, const std::string &range) {
        if (holds) return;
        if (count_++ > 0) text_ << "; ";
        text_ << field << " is " << value << ", must be " << range;
    }
    void raise() const {
        if (count_ > 0) throw RequestError(text_.str(), "correct the request's sampling parameters");
    }

private:
    int count_ = 0;
    std::ostringstream text_;
};

template <typename T>
bool is_between(T value, T least, T most) {
    return value >= least && value <= most;  // false for NaN
}

bool is_share(float value) { return value > 0.0f && value <= 1.0f; }

bool is_bias(float value) { return value < INFINITY; }  // -inf bans; false for NaN

std::string at(const std::string &field, std::size_t index) { return field + "[" + std::to_string(index) + "]"; }

std::string up_to(std::int64_t least, std::int64_t most) {
    return std::to_string(least) + " to " + std::to_string(most);
}

std::string token_range(std::int32_t vocab_size) { return "a token id, " + up_to(0, vocab_size - 1); }

void check_beams(Problems &problems, const SamplingConfig &sampling, std::int32_t max_beam_width) {
    problems.expect(is_between(sampling.beam_width, 1, max_beam_width), "beam_width", sampling.beam_width,
                    up_to(1, max_beam_width));
    for (std::size_t i = 0; i < sampling.beam_width_array.size(); ++i)
        problems.expect(is_between(sampling.beam_width_array[i], 1, sampling.beam_width), at("beam_width_array", i),
                        sampling.beam_width_array[i], up_to(1, sampling.beam_width) + " (beam_width)");
    problems.expect(std::isfinite(sampling.length_penalty), "length_penalty", sampling.length_penalty, "finite");
    problems.expect(std::isfinite(sampling.beam_search_diversity_rate), "beam_search_diversity_rate",
                    sampling.beam_search_diversity_rate, "finite");
}

void check_draws(Problems &problems, const SamplingConfig &sampling, std::int32_t vocab_size) {
    problems.expect(sampling.temperature >= 0.0f && std::isfinite(sampling.temperature), "temperature",
                    sampling.temperature, "finite and at least 0 (greedy)");
    problems.expect(sampling.top_k >= 0, "top_k", sampling.top_k, "at least 0 (all tokens)");
    problems.expect(is_share(sampling.top_p), "top_p", sampling.top_p, "above 0 and at most 1");
    problems.expect(is_share(sampling.top_p_min), "top_p_min", sampling.top_p_min, "above 0 and at most 1");
    problems.expect(is_share(sampling.top_p_decay), "top_p_decay", sampling.top_p_decay, "above 0 and at most 1");
    if (sampling.top_p_reset_id)
        problems.expect(is_between(*sampling.top_p_reset_id, 0, vocab_size - 1), "top_p_reset_id",
                        *sampling.top_p_reset_id, token_range(vocab_size));
    problems.expect(is_between(sampling.min_p, 0.0f, 1.0f), "min_p", sampling.min_p, "0 to 1");
}

void check_penalties(Problems &problems, const SamplingConfig &sampling) {
    problems.expect(sampling.repetition_penalty > 0.0f && std::isfinite(sampling.repetition_penalty),
                    "repetition_penalty", sampling.repetition_penalty, "finite and above 0");
    problems.expect(std::isfinite(sampling.presence_penalty), "presence_penalty", sampling.presence_penalty, "finite");
    problems.expect(std::isfinite(sampling.frequency_penalty), "frequency_penalty", sampling.frequency_penalty,
                    "finite");
    problems.expect(sampling.prompt_ignore_length >= 0, "prompt_ignore_length", sampling.prompt_ignore_length,
                    "at least 0");
    problems.expect(sampling.min_tokens >= 0, "min_tokens", sampling.min_tokens, "at least 0");
    problems.expect(sampling.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", sampling.no_repeat_ngram_size,
                    "at least 0 (off)");
}

void check_words(Problems &problems, const std::string &field, const std::vector<std::vector<TokenId>> &words,
                 std::int32_t vocab_size) {
    for (std::size_t i = 0; i < words.size(); ++i) {
        problems.expect(!words[i].empty(), at(field, i), "empty", "one token or more");
        for (std::size_t j = 0; j < words[i].size(); ++j)
            problems.expect(is_between(words[i][j], 0, vocab_size - 1), at(at(field, i), j), words[i][j],
                            token_range(vocab_size));
    }
}

void check_biases(Problems &problems, const DecodingParams &params, std::int32_t vocab_size) {
    for (std::size_t i = 0; i < params.logit_bias.size(); ++i) {
        const auto &[token, bias] = params.logit_bias[i];
        problems.expect(is_between(token, 0, vocab_size - 1), at("logit_bias", i) + " token", token,
                        token_range(vocab_size));
        problems.expect(is_bias(bias), at("logit_bias", i), bias, "a number below infinity");
    }
    const auto size = static_cast<std::int64_t>(params.embedding_bias.size());
    problems.expect(size == 0 || size == vocab_size, "length of embedding_bias", size,
                    "0 or " + std::to_string(vocab_size) + " (the vocabulary)");
    for (std::size_t i = 0; i < params.embedding_bias.size(); ++i) {
        if (is_bias(params.embedding_bias[i])) continue;
        return problems.expect(false, at("embedding_bias", i), params.embedding_bias[i], "a number below infinity");
    }
}

}  // namespace

void check_sampling(const DecodingParams &params, std::int32_t vocab_size, std::int32_t max_beam_width) {
    Problems problems;
    check_beams(problems, params.sampling, max_beam_width);
    check_draws(problems, params.sampling, vocab_size);
    check_penalties(problems, params.sampling);
    for (std::size_t i = 0; i < params.end_ids.size(); ++i)
        problems.expect(is_between(params.end_ids[i], 0, vocab_size - 1), at("end_ids", i), params.end_ids[i],
                        token_range(vocab_size));
    check_words(problems, "bad_words", params.bad_words, vocab_size);
    check_words(problems, "stop_words", params.stop_words, vocab_size);
    check_biases(problems, params, vocab_size);
    problems.expect(is_between(params.num_logprobs, -1, vocab_size), "num_logprobs", params.num_logprobs,
                    up_to(-1, vocab_size));
    problems.raise();
}

}  // namespace trtllm::executor
