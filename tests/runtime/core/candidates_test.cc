// Tokens chosen from the best logits of a row are those of the whole row, or none is chosen.
#include "candidates.h"

#include <cfloat>
#include <cmath>
#include <numeric>

#include "testing.h"

namespace {

using namespace trtllm::executor;
using testing::pick;
using testing::Random;
using testing::scaled;

struct Best {
    std::vector<float> values;
    std::vector<std::int32_t> tokens;
    float log_sum_exp;

    CandidateRow row(std::int32_t vocab_size) const { return {values, tokens, log_sum_exp, vocab_size}; }
};

// As a device gives them: equals in any order, the sum off by a little.
Best best_of(const std::vector<float> &logits, std::size_t count, Random &random) {
    std::vector<std::int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::stable_sort(order.begin(), order.end(), [&](auto left, auto right) {
        return logits[static_cast<std::size_t>(left)] > logits[static_cast<std::size_t>(right)];
    });
    order.resize(count);
    Best best{{}, order, 0.0f};
    for (const auto token : order) best.values.push_back(logits[static_cast<std::size_t>(token)]);
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - best.values[0]);
    const double error = 1e-6 * static_cast<double>(pick(random, -10, 10));
    best.log_sum_exp = static_cast<float>(best.values[0] + std::log(sum) + error);
    return best;
}

// Peaked as those of models are, or flat; in steps, so that many are equal, or not.
std::vector<float> random_logits(std::size_t size, Random &random) {
    std::normal_distribution<float> normal(0.0f, 0.25f * static_cast<float>(pick(random, 1, 20)));
    const bool in_steps = pick(random, 0, 2) == 0, has_banned = pick(random, 0, 3) == 0;
    std::vector<float> logits(size);
    for (auto &logit : logits) {
        logit = normal(random);
        if (in_steps) logit = std::round(logit * 2.0f) / 2.0f;
        if (has_banned && pick(random, 0, 3) == 0) logit = -INFINITY;
    }
    logits[0] = 0.0f;  // one at least is finite
    return logits;
}

std::shared_ptr<DecodingParams> random_params(Random &random) {
    auto params = std::make_shared<DecodingParams>();
    auto &sampling = params->sampling;
    sampling.temperature = 0.1f * static_cast<float>(pick(random, 1, 20));
    sampling.top_k = static_cast<std::int32_t>(pick(random, 0, 3) == 0 ? pick(random, 1, 80) : 0);
    if (pick(random, 0, 2) > 0) sampling.top_p = 0.05f * static_cast<float>(pick(random, 1, 19));
    if (pick(random, 0, 3) == 0) sampling.min_p = 0.05f * static_cast<float>(pick(random, 1, 10));
    sampling.seed = static_cast<std::uint64_t>(pick(random, 0, 1000));
    if (pick(random, 0, 3) == 0) params->num_logprobs = static_cast<std::int32_t>(pick(random, 0, 8));
    return params;
}

}  // namespace

TEST_CASE("a token chosen from candidates is the one that the whole row gives") {
    const auto rounds = scaled(4000);
    int chosen = 0;
    DecodeScratch scratch;
    for (int round = 0; round < rounds; ++round) {
        Random random(static_cast<std::uint64_t>(round));
        const auto size = static_cast<std::size_t>(pick(random, 0, 1) ? pick(random, 70, 400) : pick(random, 400, 3000));
        const auto logits = random_logits(size, random);
        const auto best = best_of(logits, static_cast<std::size_t>(pick(random, 1, 64)), random);
        const SequenceDecoder decoder(random_params(random), std::vector<TokenId>{1, 2}, 0, static_cast<std::int32_t>(size));
        auto known_decoder = decoder, whole_decoder = decoder;
        const auto known = known_decoder.next(best.row(static_cast<std::int32_t>(size)), scratch);
        if (!known) continue;
        ++chosen;
        auto copy = logits;
        const auto whole = whole_decoder.next(copy.data(), scratch);
        CHECK_EQ(known->token, whole.token);
        CHECK_EQ(known->logprob.has_value(), whole.logprob.has_value());
        CHECK_EQ(known->top.size(), whole.top.size());
        for (std::size_t place = 0; place < whole.top.size(); ++place) {
            CHECK_EQ(known->top[place].token, whole.top[place].token);
            CHECK(std::abs(known->top[place].logprob - whole.top[place].logprob) < 2e-5f);
        }
        if (!whole.logprob) continue;
        CHECK_EQ(known->logprob->rank, whole.logprob->rank);
        CHECK(std::abs(known->logprob->logprob - whole.logprob->logprob) < 2e-5f);
    }
    CHECK(chosen > rounds / 3);
}

TEST_CASE("all draws of a row are those of the whole row") {
    Random random(5);
    DecodeScratch scratch;
    const auto logits = random_logits(2000, random);
    const auto best = best_of(logits, 64, random);
    for (const float top_p : {0.3f, 0.6f, 0.8f})
        for (int step = 0; step < 500; ++step) {
            const SamplingFilter filter{0.3f, 0, top_p, 0.0f};
            const double uniform = static_cast<double>(step) / 500.0;
            KnownLogits known(best.row(2000), scratch);
            const auto token = known.draw(filter, uniform);
            CHECK(token.has_value());
            auto copy = logits;
            DecodeScratch other;
            Row row(copy.data(), 2000, other);
            CHECK(scan_with_sums(row, filter.scale()) == Scan::regular);
            CHECK_EQ(*token, draw_token({row, relate_sums(row, filter.scale())}, filter, uniform));
        }
}

TEST_CASE("what candidates cannot tell is left to the whole row") {
    DecodeScratch scratch;
    const std::vector<std::int32_t> tokens{7, 3, 9};
    const auto choose = [&](std::vector<float> values, float log_sum_exp, const SamplingFilter &filter) {
        KnownLogits known({values, tokens, log_sum_exp, 100}, scratch);
        return known.is_regular() ? known.draw(filter, 0.5) : std::nullopt;
    };
    const std::vector<float> values{5.0f, 2.0f, 1.0f};
    const auto outside = [](double sum) { return static_cast<float>(std::log(std::exp(5.0) + std::exp(2.0) + std::exp(1.0) + sum)); };
    CHECK(choose(values, outside(1.0), {1.0f, 2, 1.0f, 0.0f}) == 7);
    CHECK(!choose(values, outside(1.0), {1.0f, 4, 1.0f, 0.0f}));           // a fourth is not known
    CHECK(!choose({5.0f, 1.0f, 1.0f}, outside(1.0), {1.0f, 2, 1.0f, 0.0f}));  // there may be more that equal the second
    CHECK(!choose(values, outside(1.0), {1.0f, 0, 1.0f, 0.0f}));           // all tokens
    CHECK(choose(values, outside(1.0), {1.0f, 0, 0.9f, 0.0f}) == 7);
    CHECK(!choose(values, outside(60.0), {1.0f, 0, 0.9f, 0.0f}));          // the nucleus goes on behind them
    CHECK(choose(values, outside(60.0), {0.1f, 0, 0.9f, 0.0f}) == 7);      // cold: what is behind weighs nothing
    CHECK(!choose(values, outside(60.0), {4.0f, 0, 0.3f, 0.0f}));          // hot: it may weigh anything
    CHECK(choose(values, outside(60.0), {1.0f, 0, 1.0f, 0.2f}) == 7);
    CHECK(!choose(values, outside(60.0), {1.0f, 0, 1.0f, 0.001f}));
    CHECK(!choose(values, NAN, {1.0f, 2, 1.0f, 0.0f}));
    CHECK(!choose({INFINITY, 2.0f, 1.0f}, INFINITY, {1.0f, 2, 1.0f, 0.0f}));
    CHECK(!choose({-INFINITY, -INFINITY, -INFINITY}, -INFINITY, {1.0f, 2, 1.0f, 0.0f}));
}

TEST_CASE("the first among the largest is told from its equals only when all of them are known") {
    DecodeScratch scratch;
    const std::vector<std::int32_t> tokens{7, 3, 9};
    const std::vector<float> two{5.0f, 5.0f, 1.0f}, three{5.0f, 5.0f, 5.0f};
    CHECK(KnownLogits({two, tokens, 6.0f, 100}, scratch).first_largest() == 3);
    CHECK(!KnownLogits({three, tokens, 6.0f, 100}, scratch).first_largest());
    CHECK(KnownLogits({three, tokens, 6.0f, 3}, scratch).first_largest() == 3);
}

int main(int count, char **arguments) { return testing::run(count, arguments); }
