// Penalties, bans and bias against the straightforward reference, stop words, copies, and the cost of long sequences.
#include <chrono>

#include "decoder.h"
#include "decoding_reference.h"
#include "token_history.h"

namespace {

using namespace trtllm::executor;
using reference::Tokens;

Tokens random_tokens(testing::Random &random, std::int64_t count, std::int64_t vocab_size) {
    Tokens tokens;
    for (std::int64_t i = 0; i < count; ++i)
        tokens.push_back(static_cast<TokenId>(testing::pick(random, 0, vocab_size - 1)));
    return tokens;
}

std::vector<Tokens> random_words(testing::Random &random, std::int64_t vocab_size) {
    std::vector<Tokens> words(static_cast<std::size_t>(testing::pick(random, 0, 4)));
    for (Tokens &word : words) word = random_tokens(random, testing::pick(random, 1, 3), vocab_size);
    return words;
}

DecodingParams random_params(testing::Random &random, std::int32_t vocab_size) {
    DecodingParams params;
    const auto maybe = [&random] { return testing::pick(random, 0, 1) == 1; };
    const auto number = [&random](double least, double most) {
        return static_cast<float>(std::uniform_real_distribution<double>(least, most)(random));
    };
    if (maybe()) params.sampling.repetition_penalty = number(0.5, 2.0);
    if (maybe()) params.sampling.presence_penalty = number(-2.0, 2.0);
    if (maybe()) params.sampling.frequency_penalty = number(-2.0, 2.0);
    if (maybe()) params.sampling.prompt_ignore_length = static_cast<std::int32_t>(testing::pick(random, 0, 12));
    if (maybe()) params.sampling.min_tokens = static_cast<std::int32_t>(testing::pick(random, 0, 12));
    if (maybe()) params.sampling.no_repeat_ngram_size = static_cast<std::int32_t>(testing::pick(random, 1, 4));
    if (maybe()) params.bad_words = random_words(random, vocab_size);
    if (maybe()) params.stop_words = random_words(random, vocab_size);
    if (maybe()) params.end_ids = random_tokens(random, 2, vocab_size);
    if (maybe()) params.logit_bias = {{0, number(-5.0, 5.0)}, {vocab_size - 1, -INFINITY}};
    if (testing::pick(random, 0, 4) == 0)
        for (std::int32_t t = 0; t < vocab_size; ++t) params.embedding_bias.push_back(number(-1.0, 1.0));
    return params;
}

TEST_CASE("adjusting equals the straightforward reference after every token, for all sorts of parameters") {
    testing::Random random(21);
    for (int round = 0; round < testing::scaled(500); ++round) {
        const auto vocab_size = static_cast<std::int32_t>(testing::pick(random, 1, 12));
        const auto params = std::make_shared<const DecodingParams>(random_params(random, vocab_size));
        const Tokens prompt = random_tokens(random, testing::pick(random, 0, 20), vocab_size);
        LogitsAdjuster adjuster(params, prompt, vocab_size);
        Tokens output;
        for (int step = 0; step < 20; ++step) {
            const auto logits = reference::random_logits(random, vocab_size, 3.0f);
            auto expected = logits, given = logits;
            reference::adjust(*params, prompt, output, expected);
            adjuster.adjust(given.data());
            CHECK(given == expected);
            CHECK(adjuster.changes_logits() || given == logits);
            output.push_back(random_tokens(random, 1, vocab_size)[0]);
            adjuster.accept(output.back());
            CHECK(std::equal(output.begin(), output.end(), adjuster.generated().begin(), adjuster.generated().end()));
        }
    }
}

TEST_CASE("what is not allowed becomes -inf, and nothing else changes") {
    testing::Random random(22);
    for (int round = 0; round < testing::scaled(100); ++round) {
        const auto vocab_size = static_cast<std::int32_t>(testing::pick(random, 1, 200));
        std::vector<std::uint32_t> allowed(static_cast<std::size_t>(vocab_size + 31) / 32);
        for (auto &word : allowed) word = round % 3 == 0 ? 0xffffffffu : static_cast<std::uint32_t>(random());
        const auto logits = reference::random_logits(random, vocab_size, 1.0f);
        auto given = logits;
        LogitsAdjuster(std::make_shared<DecodingParams>(), {}, vocab_size).adjust(given.data(), allowed.data());
        for (std::size_t t = 0; t < logits.size(); ++t)
            CHECK_EQ(given[t], allowed[t / 32] >> (t % 32) & 1 ? logits[t] : -INFINITY);
    }
}

TEST_CASE("an adjuster without anything to do says so") {
    auto params = std::make_shared<DecodingParams>();
    params->sampling.presence_penalty = 1.0f;
    params->sampling.no_repeat_ngram_size = 2;
    params->bad_words = {{5, 6}};
    params->end_ids = {9};
    LogitsAdjuster adjuster(params, Tokens{1, 2, 3}, 10);
    CHECK(!adjuster.changes_logits());
    adjuster.accept(4);
    CHECK(adjuster.changes_logits());
}

TEST_CASE("copies go their own ways") {
    testing::Random random(23);
    auto params = std::make_shared<DecodingParams>(random_params(random, 8));
    params->sampling.repetition_penalty = 1.5f;
    params->sampling.no_repeat_ngram_size = 2;
    const Tokens prompt = {1, 2, 3};
    LogitsAdjuster first(params, prompt, 8);
    first.accept(4);
    LogitsAdjuster second = first, third(params, prompt, 8);
    third = first;
    const Tokens ends[] = {{5, 1, 2}, {6, 6, 1}, {7, 3, 4}};
    LogitsAdjuster *adjusters[] = {&first, &second, &third};
    for (int step = 0; step < 3; ++step)
        for (int i = 0; i < 3; ++i) adjusters[i]->accept(ends[i][static_cast<std::size_t>(step)]);
    for (int i = 0; i < 3; ++i) {
        Tokens output = {4};
        output.insert(output.end(), ends[i].begin(), ends[i].end());
        const auto logits = reference::random_logits(random, 8, 2.0f);
        auto expected = logits, given = logits;
        reference::adjust(*params, prompt, output, expected);
        adjusters[i]->adjust(given.data());
        CHECK(given == expected);
    }
}

TEST_CASE("a stop word is matched in the output alone, the longest of them, from min_tokens on") {
    auto params = std::make_shared<DecodingParams>();
    params->stop_words = {{2}, {1, 2}, {3, 1, 2}};
    params->sampling.min_tokens = 3;
    params->end_ids = {7};
    LogitsAdjuster adjuster(params, Tokens{3, 1}, 10);
    adjuster.accept(2);
    CHECK_EQ(adjuster.matched_stop_word(), 0u);  // too early
    adjuster.accept(1);
    adjuster.accept(2);
    CHECK_EQ(adjuster.matched_stop_word(), 2u);
    adjuster.accept(4);
    CHECK_EQ(adjuster.matched_stop_word(), 0u);
    for (const TokenId token : {3, 1, 2}) adjuster.accept(token);
    CHECK_EQ(adjuster.matched_stop_word(), 3u);
    CHECK(adjuster.is_end(7) && !adjuster.is_end(2));
}

TEST_CASE("adjusting never makes a finite logit infinite") {
    auto params = std::make_shared<DecodingParams>();
    params->sampling.repetition_penalty = 0.5f;
    params->logit_bias = {{1, 3e38f}};
    LogitsAdjuster adjuster(params, Tokens{0, 2}, 3);
    std::vector<float> logits = {3e38f, 3e38f, -3e38f};
    adjuster.adjust(logits.data());
    CHECK(logits[0] < INFINITY && logits[1] < INFINITY && logits[2] == -1.5e38f);
}

TEST_CASE("forbidden repetitions are each found once, however often the context has come") {
    NgramFollowers followers(3);
    Tokens tokens;
    for (int i = 0; i < 3000; ++i) {
        for (const TokenId token : {7, 7, static_cast<TokenId>(i % 3)}) {
            tokens.push_back(token);
            followers.add(tokens);
        }
    }
    tokens.insert(tokens.end(), {7, 7});
    followers.add({tokens.data(), tokens.size() - 1});
    followers.add(tokens);
    Tokens found;
    followers.for_each(tokens, [&found](TokenId token) { found.push_back(token); });
    std::sort(found.begin(), found.end());
    CHECK((found == Tokens{0, 1, 2}));
}

TEST_CASE("a token costs the same at the end of a long sequence") {
    testing::Random random(24);
    auto params = std::make_shared<DecodingParams>();
    params->sampling.no_repeat_ngram_size = 3;
    constexpr int kLength = 400000, kSteps = 4000;
    LogitsAdjuster adjuster(params, random_tokens(random, kLength, 1000), 1000);
    std::vector<float> logits(1000, 0.0f);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kSteps; ++i) {
        adjuster.adjust(logits.data());
        adjuster.accept(i % 1000);
    }
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    CHECK(passed.count() < 0.2);  // looking at every earlier place would be 1.6e9 comparisons
}

}  // namespace

int main(int c, char **v) { return testing::run(c, v); }
