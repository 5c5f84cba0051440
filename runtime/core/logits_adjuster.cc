// Penalties, bans and bias of one sequence. Each touches the tokens that it is about, never the whole vocabulary,
// except for an embedding bias and the mask of allowed tokens, which are as long as it is.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>

#include "decoder.h"
#include "token_history.h"

namespace trtllm::executor {

struct LogitsAdjuster::Seen {
    TokenCounts counts;
    std::optional<NgramFollowers> ngrams;
};

namespace {

bool penalizes(const SamplingConfig &sampling) {
    return sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f ||
           sampling.frequency_penalty != 0.0f;
}

// An adjustment must not make a finite logit infinite: that would forbid or force a token.
float held_finite(float logit) { return std::clamp(logit, -FLT_MAX, FLT_MAX); }

void add_bias(const DecodingParams &params, float *logits, std::int32_t vocab_size) {
    for (const auto &[token, bias] : params.logit_bias) logits[token] = std::min(logits[token] + bias, FLT_MAX);
    if (params.embedding_bias.empty()) return;
    const float *bias = params.embedding_bias.data();
    for (std::int32_t t = 0; t < vocab_size; ++t) logits[t] = std::min(logits[t] + bias[t], FLT_MAX);
}

void penalize(const SamplingConfig &sampling, std::span<const TokenCounts::Entry> entries, float *logits,
              std::int32_t vocab_size) {
    const float repetition = sampling.repetition_penalty;
    for (const auto &[token, in_output] : entries) {
        if (token >= vocab_size || token < 0) continue;
        float logit = logits[token];
        if (logit == -INFINITY) continue;
        logit = logit < 0.0f ? logit * repetition : logit / repetition;
        if (in_output > 0)
            logit -= sampling.presence_penalty + sampling.frequency_penalty * static_cast<float>(in_output);
        logits[token] = held_finite(logit);
    }
}

bool ends_with(std::span<const TokenId> tokens, std::span<const TokenId> end) {
    return tokens.size() >= end.size() && std::equal(end.rbegin(), end.rend(), tokens.rbegin());
}

std::span<const TokenId> all_but_last(const std::vector<TokenId> &word) { return {word.data(), word.size() - 1}; }

void forbid(float *logits, std::int32_t vocab_size, TokenId token) {
    if (token >= 0 && token < vocab_size) logits[token] = -INFINITY;
}

void forbid_all_but(const std::uint32_t *allowed, float *logits, std::int32_t vocab_size) {
    for (std::int32_t first = 0; first < vocab_size; first += 32) {
        const std::uint32_t word = allowed[first / 32];
        if (word == 0xffffffffu) continue;
        const std::int32_t count = std::min(32, vocab_size - first);
        for (std::int32_t t = 0; t < count; ++t)
            if (!(word >> t & 1)) logits[first + t] = -INFINITY;
    }
}

}  // namespace

LogitsAdjuster::LogitsAdjuster(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt,
                               std::int32_t vocab_size)
    : params_(std::move(params)), vocab_size_(vocab_size), tokens_(prompt.begin(), prompt.end()),
      prompt_length_(prompt.size()), seen_(std::make_shared<Seen>()) {
    const SamplingConfig &sampling = params_->sampling;
    if (sampling.repetition_penalty != 1.0f)
        for (std::size_t i = static_cast<std::size_t>(sampling.prompt_ignore_length); i < prompt.size(); ++i)
            seen_->counts.add(prompt[i], false);
    if (sampling.no_repeat_ngram_size <= 0) return;
    seen_->ngrams.emplace(sampling.no_repeat_ngram_size);
    for (std::size_t i = 0; i < prompt.size(); ++i) seen_->ngrams->add({tokens_.data(), i + 1});
}

LogitsAdjuster::LogitsAdjuster(const LogitsAdjuster &other)
    : params_(other.params_), vocab_size_(other.vocab_size_), tokens_(other.tokens_),
      prompt_length_(other.prompt_length_), seen_(std::make_shared<Seen>(*other.seen_)) {}

LogitsAdjuster &LogitsAdjuster::operator=(const LogitsAdjuster &other) {
    if (this != &other) *this = LogitsAdjuster(other);
    return *this;
}

LogitsAdjuster::~LogitsAdjuster() = default;

bool LogitsAdjuster::changes_logits() const {
    const DecodingParams &params = *params_;
    if (!params.logit_bias.empty() || !params.embedding_bias.empty()) return true;
    if (!seen_->counts.entries().empty()) return true;
    if (forbids_ends()) return true;
    for (const auto &word : params.bad_words)
        if (ends_with(tokens_, all_but_last(word))) return true;
    bool repeats = false;
    if (seen_->ngrams) seen_->ngrams->for_each(tokens_, [&repeats](TokenId) { repeats = true; });
    return repeats;
}

bool LogitsAdjuster::forbids_ends() const {
    const bool has_ends = !params_->end_ids.empty() || !params_->stop_words.empty();
    return has_ends && generated().size() < static_cast<std::size_t>(std::max(params_->sampling.min_tokens, 0));
}

void LogitsAdjuster::adjust(float *logits, const std::uint32_t *allowed) const {
    const DecodingParams &params = *params_;
    add_bias(params, logits, vocab_size_);
    penalize(params.sampling, seen_->counts.entries(), logits, vocab_size_);
    if (seen_->ngrams)
        seen_->ngrams->for_each(tokens_, [&](TokenId token) { forbid(logits, vocab_size_, token); });
    for (const auto &word : params.bad_words)
        if (ends_with(tokens_, all_but_last(word))) forbid(logits, vocab_size_, word.back());
    if (forbids_ends()) {
        for (const TokenId token : params.end_ids) forbid(logits, vocab_size_, token);
        for (const auto &word : params.stop_words) forbid(logits, vocab_size_, word.back());
    }
    if (allowed != nullptr) forbid_all_but(allowed, logits, vocab_size_);
}

void LogitsAdjuster::accept(TokenId token) {
    tokens_.push_back(token);
    if (penalizes(params_->sampling)) seen_->counts.add(token, true);
    if (seen_->ngrams) seen_->ngrams->add(tokens_);
}

std::span<const TokenId> LogitsAdjuster::generated() const {
    return std::span<const TokenId>(tokens_).subspan(prompt_length_);
}

std::size_t LogitsAdjuster::matched_stop_word() const {
    const std::span<const TokenId> output = generated();
    if (output.size() < static_cast<std::size_t>(std::max(params_->sampling.min_tokens, 0))) return 0;
    std::size_t longest = 0;
    for (const auto &word : params_->stop_words)
        if (ends_with(output, word)) longest = std::max(longest, word.size());
    return longest;
}

bool LogitsAdjuster::is_end(TokenId token) const {
    return std::find(params_->end_ids.begin(), params_->end_ids.end(), token) != params_->end_ids.end();
}

}  // namespace trtllm::executor
