// One step of beam search: log probabilities, the best candidates of all beams, which of them end, which go on.
#include "beam_search.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "logprobs.h"

namespace trtllm::executor {
namespace {

struct Beam {
    LogitsAdjuster adjuster;
    std::vector<float> logprobs;
    float sum = 0.0f;
};

// A beam and a token that may follow it.
struct Candidate {
    float rank_score = 0.0f;  // what candidates are compared by
    float sum = 0.0f;         // of log probabilities, the token's included
    float logprob = 0.0f;
    std::int32_t beam = 0;
    TokenId token = 0;

    bool operator<(const Candidate &other) const {  // comes first
        if (rank_score != other.rank_score) return rank_score > other.rank_score;
        return beam != other.beam ? beam < other.beam : token < other.token;
    }
};

// Turns logits into log probabilities.
void to_logprobs(Row &row, const LogSoftmax &softmax) {
    const auto log_total = static_cast<float>(softmax.log_total);
    for (std::int32_t t = 0; t < row.size; ++t) row.logits[t] = row.logits[t] - softmax.largest - log_total;
}

// The length of the longest stop word that `tokens` and then `next` end with.
std::size_t completed_stop_word(const DecodingParams &params, std::span<const TokenId> tokens, TokenId next) {
    if (tokens.size() + 1 < static_cast<std::size_t>(std::max(params.sampling.min_tokens, 0))) return 0;
    std::size_t longest = 0;
    for (const auto &word : params.stop_words) {
        if (word.size() > tokens.size() + 1 || word.back() != next) continue;
        if (std::equal(word.rbegin() + 1, word.rend(), tokens.rbegin())) longest = std::max(longest, word.size());
    }
    return longest;
}

}  // namespace

struct BeamSearch::State {
    std::shared_ptr<const DecodingParams> params;
    std::int32_t max_tokens;
    std::int32_t vocab_size;
    std::vector<Beam> beams;
    std::vector<Hypothesis> finished;  // the best first
    std::int32_t length = 0;           // generated so far
    bool over = false;

    const SamplingConfig &sampling() const { return params->sampling; }
    std::int32_t width_of_step() const;
    float scored(float sum, std::int32_t at_length) const;
    void add_candidates(std::int32_t beam, Row &row, std::int64_t count, std::vector<Candidate> &candidates) const;
    std::vector<Candidate> best_candidates(std::span<float *const> rows, DecodeScratch &scratch,
                                           std::span<const std::uint32_t *const> allowed, std::int64_t count) const;
    bool finish_if_ended(const Candidate &candidate, bool counts);
    void keep_best();
    bool can_improve(const std::vector<Candidate> &live) const;
    std::vector<std::int32_t> move_on(const std::vector<Candidate> &live);
    Hypothesis as_it_stands(const Beam &beam) const;
};

std::int32_t BeamSearch::State::width_of_step() const {
    const auto &widths = sampling().beam_width_array;
    if (widths.empty()) return sampling().beam_width;
    return widths[std::min(static_cast<std::size_t>(length), widths.size() - 1)];
}

float BeamSearch::State::scored(float sum, std::int32_t at_length) const {
    if (at_length == 0) return sum;
    const double penalty = sampling().length_penalty;
    return sum / static_cast<float>(std::pow(static_cast<double>(at_length), penalty));
}

void BeamSearch::State::add_candidates(std::int32_t beam, Row &row, std::int64_t count,
                                       std::vector<Candidate> &candidates) const {
    if (scan(row) != Scan::regular) return;
    const std::int64_t found = gather_at_least(row, kth_largest(row, std::min<std::int64_t>(count, vocab_size)));
    sort_candidates(row.scratch, found);
    for (std::int64_t i = 0; i < std::min(found, count); ++i) {
        const std::uint64_t key = row.scratch.keys[static_cast<std::size_t>(i)];
        Candidate candidate;
        candidate.beam = beam;
        candidate.token = token_of_key(key);
        candidate.logprob = logit_of_key(key);
        candidate.sum = beams[static_cast<std::size_t>(beam)].sum + candidate.logprob;
        candidate.rank_score = candidate.sum + sampling().beam_search_diversity_rate * static_cast<float>(beam);
        candidates.push_back(candidate);
    }
}

std::vector<Candidate> BeamSearch::State::best_candidates(std::span<float *const> rows, DecodeScratch &scratch,
                                                          std::span<const std::uint32_t *const> allowed,
                                                          std::int64_t count) const {
    std::vector<LogSoftmax> softmaxes;
    for (float *logits : rows) {
        Row row(logits, vocab_size, scratch);
        if (scan_with_sums(row, kLog2e) != Scan::regular)
            throw NonFiniteLogits("the engine's logits hold NaN or infinity, or nothing finite");
        softmaxes.push_back(log_softmax(row, relate_sums(row, kLog2e)));
    }
    std::vector<Candidate> candidates;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        Row row(rows[i], vocab_size, scratch);
        to_logprobs(row, softmaxes[i]);
        beams[i].adjuster.adjust(rows[i], allowed.empty() ? nullptr : allowed[i]);
        add_candidates(static_cast<std::int32_t>(i), row, count, candidates);
    }
    if (candidates.empty())
        throw ImpossibleConstraint("no token is left: bans, min_tokens and the allowed tokens exclude all of them");
    const std::int64_t kept = std::min(count, static_cast<std::int64_t>(candidates.size()));
    std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.end());
    candidates.resize(static_cast<std::size_t>(kept));
    return candidates;
}

// Whether the candidate ends its beam. If so and it `counts`, it becomes a finished hypothesis.
bool BeamSearch::State::finish_if_ended(const Candidate &candidate, bool counts) {
    const Beam &beam = beams[static_cast<std::size_t>(candidate.beam)];
    const bool is_end = beam.adjuster.is_end(candidate.token);
    const std::size_t stop = completed_stop_word(*params, beam.adjuster.generated(), candidate.token);
    if (!is_end && stop == 0 && length + 1 < max_tokens) return false;
    if (!counts) return true;
    Hypothesis hypothesis = as_it_stands(beam);
    if (is_end) {
        hypothesis.end_token = candidate.token;
    } else {
        hypothesis.tokens.push_back(candidate.token);
        hypothesis.logprobs.push_back(candidate.logprob);
        hypothesis.stop_word_length = static_cast<std::int32_t>(stop);
    }
    hypothesis.cumulative_logprob = candidate.sum;
    hypothesis.score = scored(candidate.sum, length + 1);
    finished.push_back(std::move(hypothesis));
    return true;
}

void BeamSearch::State::keep_best() {
    std::stable_sort(finished.begin(), finished.end(),
                     [](const Hypothesis &a, const Hypothesis &b) { return a.score > b.score; });
    const auto most = static_cast<std::size_t>(sampling().beam_width);
    if (finished.size() > most) finished.erase(finished.begin() + sampling().beam_width, finished.end());
}

// Whether a live beam may still end better than the worst finished hypothesis; `length` is the live beams'.
bool BeamSearch::State::can_improve(const std::vector<Candidate> &live) const {
    if (finished.size() < static_cast<std::size_t>(sampling().beam_width)) return true;
    if (sampling().early_stopping == 1) return false;
    const bool assumes_longest = sampling().early_stopping != 0 && sampling().length_penalty > 0.0f;
    float best = live.front().sum;
    for (const Candidate &candidate : live) best = std::max(best, candidate.sum);
    return scored(best, assumes_longest ? max_tokens : length) > finished.back().score;
}

std::vector<std::int32_t> BeamSearch::State::move_on(const std::vector<Candidate> &live) {
    std::vector<std::int32_t> uses(beams.size(), 0), parents;
    for (const Candidate &candidate : live) ++uses[static_cast<std::size_t>(candidate.beam)];
    std::vector<Beam> next;
    next.reserve(live.size());
    for (const Candidate &candidate : live) {
        Beam &parent = beams[static_cast<std::size_t>(candidate.beam)];
        if (--uses[static_cast<std::size_t>(candidate.beam)] == 0)
            next.push_back(std::move(parent));
        else
            next.push_back(parent);
        next.back().adjuster.accept(candidate.token);
        next.back().logprobs.push_back(candidate.logprob);
        next.back().sum = candidate.sum;
        parents.push_back(candidate.beam);
    }
    beams = std::move(next);
    return parents;
}

Hypothesis BeamSearch::State::as_it_stands(const Beam &beam) const {
    const auto tokens = beam.adjuster.generated();
    return {{tokens.begin(), tokens.end()}, beam.logprobs, beam.sum, scored(beam.sum, length), -1, 0};
}

BeamSearch::BeamSearch(std::shared_ptr<const DecodingParams> params, std::span<const TokenId> prompt,
                       std::int32_t max_tokens, std::int32_t vocab_size)
    : state_(std::make_shared<State>()) {
    state_->max_tokens = max_tokens;
    state_->vocab_size = vocab_size;
    state_->beams.push_back({LogitsAdjuster(params, prompt, vocab_size), {}, 0.0f});
    state_->params = std::move(params);
}

std::int32_t BeamSearch::num_beams() const { return static_cast<std::int32_t>(state_->beams.size()); }

std::vector<std::int32_t> BeamSearch::step(std::span<float *const> rows, DecodeScratch &scratch,
                                           std::span<const std::uint32_t *const> allowed) {
    State &state = *state_;
    if (state.over || rows.size() != state.beams.size() || (!allowed.empty() && allowed.size() != rows.size()))
        throw std::logic_error("a beam search step takes one row for each live beam");
    const auto width = static_cast<std::size_t>(state.width_of_step());
    const std::size_t count = std::max<std::size_t>(2, 1 + state.params->end_ids.size()) * width;
    const auto candidates = state.best_candidates(rows, scratch, allowed, static_cast<std::int64_t>(count));
    std::vector<Candidate> live;
    for (std::size_t i = 0; i < candidates.size(); ++i)
        if (!state.finish_if_ended(candidates[i], i < width) && live.size() < width) live.push_back(candidates[i]);
    state.keep_best();
    ++state.length;
    state.over = live.empty() || !state.can_improve(live);
    if (state.over) live.clear();
    return state.move_on(live);
}

TokenId BeamSearch::last_token(std::int32_t beam) const { return tokens(beam).back(); }

std::span<const TokenId> BeamSearch::tokens(std::int32_t beam) const {
    return state_->beams.at(static_cast<std::size_t>(beam)).adjuster.generated();
}

bool BeamSearch::is_finished() const { return state_->over; }

std::vector<Hypothesis> BeamSearch::results() const {
    if (state_->over) return state_->finished;
    std::vector<Hypothesis> live;
    for (const Beam &beam : state_->beams) live.push_back(state_->as_it_stands(beam));
    return live;
}

void BeamSearch::stop() {
    if (state_->over) return;
    for (Hypothesis &hypothesis : results()) state_->finished.push_back(std::move(hypothesis));
    state_->keep_best();
    state_->beams.clear();
    state_->over = true;
}

}  // namespace trtllm::executor
