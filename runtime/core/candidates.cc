// Draws from the best of a row: thresholds are those of the whole row, or bounds of its sum say that they are not known.
#include "candidates.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "row_selection.h"

namespace trtllm::executor {
namespace {

// Relative; what roundings on the device, in sums of weights and in the order of adding may amount to, with room.
constexpr double kSlackOfSums = 1e-4;

struct Bounds {
    double least, most;
};

// Of the sum of outside[i] ** power, all at most `largest`, `count` of them, whose sum lies within `sum`.
Bounds power_sum(const Bounds &sum, double largest, double count, double power) {
    if (power == 1.0) return sum;
    const double alike = std::pow(count, 1.0 - power);  // all equal
    const double steep = std::pow(largest, power - 1.0);  // few of the largest, the rest nothing
    if (power > 1.0) return {alike * std::pow(sum.least, power), sum.most * steep};
    return {sum.least * steep, std::min(alike * std::pow(sum.most, power), count * std::pow(largest, power))};
}

}  // namespace

KnownLogits::KnownLogits(const CandidateRow &given, DecodeScratch &scratch)
    : scratch_(scratch), vocab_size_(given.vocab_size), count_(static_cast<std::int64_t>(given.values.size())),
      log_sum_exp_(given.log_sum_exp), is_complete_(count_ >= vocab_size_) {
    scratch.values.assign(given.values.begin(), given.values.end());
    scratch.indices.assign(given.tokens.begin(), given.tokens.end());
    const auto is_odd = [](float logit) { return std::isnan(logit) || logit == INFINITY; };
    is_regular_ = count_ > 0 && std::isfinite(log_sum_exp_) && std::none_of(scratch.values.begin(), scratch.values.end(), is_odd);
    if (!is_regular_) return;
    sort_candidates(scratch, count_);
    scratch.known.assign(scratch.keys.begin(), scratch.keys.begin() + count_);
    is_regular_ = std::isfinite(value(0));
}

KnownLogits::~KnownLogits() {
    if (!is_regular_ || scratch_.sparse.size() != static_cast<std::size_t>(vocab_size_)) return;
    for (std::int64_t place = 0; place < count_; ++place) scratch_.sparse[static_cast<std::size_t>(token(place))] = -INFINITY;
}

float KnownLogits::value(std::int64_t place) const { return logit_of_key(scratch_.known[static_cast<std::size_t>(place)]); }

TokenId KnownLogits::token(std::int64_t place) const {
    return token_of_key(scratch_.known[static_cast<std::size_t>(place)]);
}

// Whether every token with a logit of at least `threshold` is among the known ones.
bool KnownLogits::knows_down_to(float threshold) const { return is_complete_ || value(count_ - 1) < threshold; }

std::optional<TokenId> KnownLogits::first_largest() const {
    if (!knows_down_to(value(0))) return std::nullopt;
    return token(0);
}

// Lays the known logits out as a row that is -inf elsewhere, with the maxima of its blocks.
void KnownLogits::spread() {
    const auto size = static_cast<std::size_t>(vocab_size_);
    if (scratch_.sparse.size() != size) scratch_.sparse.assign(size, -INFINITY);
    const auto blocks = static_cast<std::size_t>(count_blocks(vocab_size_));
    if (scratch_.maxima.size() < blocks) scratch_.maxima.resize(blocks);
    std::fill_n(scratch_.maxima.begin(), blocks, -INFINITY);
    for (std::int64_t place = 0; place < count_; ++place) {
        const auto token = static_cast<std::size_t>(this->token(place));
        scratch_.sparse[token] = value(place);
        float &most = scratch_.maxima[token / kBlock];
        most = std::max(most, value(place));
    }
}

// The place of the last token of the nucleus, when the bounds of what is not known leave only one.
std::optional<std::int64_t> KnownLogits::nucleus_end(const SamplingFilter &filter) const {
    const double largest = value(0), power = 1.0 / filter.temperature;
    double known = 0.0, known_scaled = 0.0;
    for (std::int64_t place = 0; place < count_; ++place) {
        known += std::exp(value(place) - largest);
        known_scaled += std::exp((value(place) - largest) * power);
    }
    Bounds total{known_scaled, known_scaled};
    if (!is_complete_) {
        const double all = std::exp(log_sum_exp_ - largest), slack = kSlackOfSums * all;
        const Bounds outside{std::max(all - known - slack, 0.0), std::max(all - known, 0.0) + slack};
        const double next = std::exp(value(count_ - 1) - largest);
        const auto scaled = power_sum(outside, next, static_cast<double>(vocab_size_ - count_), power);
        total = {known_scaled + scaled.least, known_scaled + scaled.most};
    }
    if (!std::isfinite(total.most)) return std::nullopt;
    const double top_p = filter.top_p;
    const double least = top_p * total.least * (1.0 - kSlackOfSums), most = top_p * total.most * (1.0 + kSlackOfSums);
    double sum = 0.0;
    for (std::int64_t place = 0; place < count_; ++place) {
        if (place > 0 && sum >= least) return std::nullopt;  // it may end before this one already
        sum += std::exp((value(place) - largest) * power);
        if (sum >= most) return place;
    }
    return std::nullopt;
}

std::optional<TokenId> KnownLogits::draw(const SamplingFilter &filter, double uniform) {
    const bool cuts_to_k = filter.top_k > 0 && filter.top_k < vocab_size_;
    float threshold = -FLT_MAX;
    if (cuts_to_k) {
        if (filter.top_k > count_) return std::nullopt;
        threshold = std::max(value(filter.top_k - 1), -FLT_MAX);
    }
    std::optional<std::int64_t> end;
    if (!cuts_to_k && filter.top_p < 1.0f) {
        end = nucleus_end(filter);
        if (!end) return std::nullopt;
        threshold = value(*end);
    }
    if (!cuts_to_k && !end && filter.min_p == 0.0f) return std::nullopt;
    if ((cuts_to_k || end) && !knows_down_to(threshold)) return std::nullopt;

    spread();
    Row row(scratch_.sparse.data(), vocab_size_, scratch_);
    row.largest = value(0);
    if (cuts_to_k && filter.top_p < 1.0f) {
        const std::int64_t kept = gather_at_least(row, threshold);
        threshold = nucleus_threshold(row, kept, filter.top_p, filter.scale());
    }
    if (end)  // of equals at the end, those of larger ids are left out
        for (std::int64_t place = *end + 1; place < count_ && value(place) == threshold; ++place)
            row.logits[token(place)] = -INFINITY;
    threshold = std::max(threshold, min_p_threshold(row.largest, filter));
    if (!knows_down_to(threshold)) return std::nullopt;
    const double total = sum_blocks(row, threshold, filter.scale());
    return token_at(row, uniform * total, threshold, filter.scale());
}

bool KnownLogits::add_logprobs(Choice &choice, std::int32_t num_logprobs) const {
    const auto wanted = std::min<std::int64_t>(num_logprobs, vocab_size_);
    const auto is_sure = [this](std::int64_t place) { return is_complete_ || value(place) > value(count_ - 1); };
    if (wanted > count_ || (wanted > 0 && !is_sure(wanted - 1))) return false;
    const auto logprob_at = [this](std::int64_t place) {
        const auto logprob = static_cast<float>(static_cast<double>(value(place)) - log_sum_exp_);
        return TokenLogprob{token(place), logprob, static_cast<std::int32_t>(place + 1)};
    };
    std::int64_t chosen = 0;
    while (chosen < count_ && token(chosen) != choice.token) ++chosen;
    if (chosen == count_ || !is_sure(chosen)) return false;
    choice.logprob = logprob_at(chosen);
    for (std::int64_t place = 0; place < wanted; ++place) choice.top.push_back(logprob_at(place));
    return true;
}

}  // namespace trtllm::executor
