// Decoding written the straightforward way, in double precision and over whole rows: what the decoder is held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <vector>

#include "decoder.h"
#include "testing.h"

namespace reference {

using trtllm::executor::DecodingParams;
using trtllm::executor::TokenId;
using Tokens = std::vector<TokenId>;

inline bool ends_with(const Tokens &tokens, const Tokens &end) {
    return end.size() <= tokens.size() && std::equal(end.rbegin(), end.rend(), tokens.rbegin());
}

// The tokens that would complete an n-gram again.
inline Tokens repeating_tokens(const Tokens &tokens, std::size_t size) {
    Tokens banned;
    for (std::size_t end = size; size > 0 && end <= tokens.size(); ++end) {
        const auto first = tokens.begin() + static_cast<long>(end - size);
        const Tokens context(first, first + static_cast<long>(size - 1));
        if (ends_with(tokens, context)) banned.push_back(tokens[end - 1]);
    }
    return banned;
}

inline void adjust(const DecodingParams &params, const Tokens &prompt, const Tokens &output,
                   std::vector<float> &logits) {
    const auto &sampling = params.sampling;
    for (const auto &[token, bias] : params.logit_bias) logits[static_cast<std::size_t>(token)] += bias;
    for (std::size_t t = 0; t < params.embedding_bias.size(); ++t) logits[t] += params.embedding_bias[t];
    Tokens tokens = prompt;
    tokens.insert(tokens.end(), output.begin(), output.end());
    const long ignored = std::min<long>(sampling.prompt_ignore_length, static_cast<long>(prompt.size()));
    Tokens repeated(prompt.begin() + ignored, prompt.end());
    repeated.insert(repeated.end(), output.begin(), output.end());
    const float penalty = sampling.repetition_penalty;
    for (std::size_t t = 0; t < logits.size(); ++t) {
        const auto token = static_cast<TokenId>(t);
        if (logits[t] == -INFINITY) continue;
        if (std::find(repeated.begin(), repeated.end(), token) != repeated.end())
            logits[t] = logits[t] < 0 ? logits[t] * penalty : logits[t] / penalty;
        const auto times = static_cast<float>(std::count(output.begin(), output.end(), token));
        if (times > 0) logits[t] -= sampling.presence_penalty + sampling.frequency_penalty * times;
    }
    const auto forbid = [&logits](TokenId token) { logits[static_cast<std::size_t>(token)] = -INFINITY; };
    const auto ngram = static_cast<std::size_t>(sampling.no_repeat_ngram_size);
    for (const TokenId token : repeating_tokens(tokens, ngram)) forbid(token);
    for (const Tokens &word : params.bad_words)
        if (ends_with(tokens, Tokens(word.begin(), word.end() - 1))) forbid(word.back());
    if (output.size() >= static_cast<std::size_t>(sampling.min_tokens)) return;
    for (const TokenId token : params.end_ids) forbid(token);
    for (const Tokens &word : params.stop_words) forbid(word.back());
}

// Probabilities of all tokens after temperature, top_k, top_p and min_p; `margin` is the least distance of any of the
// decisions from going the other way, in probability.
struct Distribution {
    std::vector<double> probabilities;
    double margin = 1.0;
};

inline Distribution filter(const std::vector<float> &logits, double temperature, std::int32_t top_k, double top_p,
                           double min_p) {
    const std::size_t size = logits.size();
    std::vector<std::size_t> order(size);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
    const double largest = logits[order[0]];
    std::vector<double> weights(size);
    for (std::size_t i = 0; i < size; ++i) weights[i] = std::exp((logits[i] - largest) / temperature);
    std::size_t kept = size;
    if (top_k > 0 && static_cast<std::size_t>(top_k) < size) {
        kept = static_cast<std::size_t>(top_k);
        while (kept < size && logits[order[kept]] == logits[order[kept - 1]]) ++kept;
    }
    Distribution result{std::vector<double>(size, 0.0)};
    double total = 0.0;
    for (std::size_t i = 0; i < kept; ++i) total += weights[order[i]];
    if (top_p < 1.0) {
        double sum = 0.0;
        std::size_t i = 0;
        for (; i < kept && sum < top_p * total; ++i) {
            sum += weights[order[i]];
            result.margin = std::min(result.margin, std::abs(sum / total - top_p));
        }
        kept = i;
    }
    const double least = std::log(min_p) * temperature + largest;
    total = 0.0;
    for (std::size_t i = 0; i < kept; ++i) {
        if (min_p > 0.0) result.margin = std::min(result.margin, std::abs(logits[order[i]] - least));
        if (min_p > 0.0 && logits[order[i]] < least) break;
        total += result.probabilities[order[i]] = weights[order[i]];
    }
    for (double &p : result.probabilities) p /= total;
    return result;
}

// An upper bound that a chi-square statistic of `freedom` exceeds with probability below 4e-6 (Wilson and Hilferty).
inline double chi_square_bound(double freedom) {
    const double part = 2.0 / (9.0 * freedom);
    return freedom * std::pow(1.0 - part + 4.5 * std::sqrt(part), 3.0);
}

inline std::vector<float> random_logits(testing::Random &random, std::int64_t size, float spread) {
    std::normal_distribution<float> normal(0.0f, spread);
    std::vector<float> logits(static_cast<std::size_t>(size));
    for (float &logit : logits) logit = normal(random);
    return logits;
}

}  // namespace reference
