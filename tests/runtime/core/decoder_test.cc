// The choice of tokens: distributions, thresholds and their ties, draws by counter, log probabilities, odd rows.
#include "decoder.h"

#include <cfloat>
#include <set>

#include "decoding_reference.h"
#include "sampler.h"
#include "uniform_draw.h"

namespace {

using namespace trtllm::executor;

std::shared_ptr<DecodingParams> make_params(float temperature, std::int32_t top_k, float top_p, float min_p) {
    auto params = std::make_shared<DecodingParams>();
    params->sampling.temperature = temperature;
    params->sampling.top_k = top_k;
    params->sampling.top_p = top_p;
    params->sampling.min_p = min_p;
    return params;
}

TokenId draw(std::vector<float> logits, const SamplingFilter &filter, double uniform, int lanes = 16) {
    DecodeScratch scratch;
    scratch.most_lanes = lanes;
    Row row(logits.data(), static_cast<std::int32_t>(logits.size()), scratch);
    double total = 0.0;
    if (filter.needs_total(row.size)) {
        CHECK(scan_with_sums(row, filter.scale()) == Scan::regular);
        total = relate_sums(row, filter.scale());
    } else {
        CHECK(scan(row) == Scan::regular);
    }
    return draw_token({row, total}, filter, uniform);
}

// Draws at many places of [0, 1) must be those of the exact distribution's inverse; a place within `slack` of a border
// between two tokens may give either.
void check_against(const reference::Distribution &exact, const std::vector<float> &logits,
                   const SamplingFilter &filter) {
    constexpr double slack = 1e-5;  // weights err by less than 2.5e-7 + 9e-8 * 17 (e^-12), and their sums by less
    double sum = 0.0;
    std::vector<double> borders = {0.0};
    for (const double p : exact.probabilities) borders.push_back(sum += p);
    for (int i = 0; i < 16; ++i) {
        const double uniform = (i + 0.5) / 16;
        const auto token = static_cast<std::size_t>(draw(logits, filter, uniform));
        CHECK(exact.probabilities[token] > 0.0);
        CHECK(borders[token] - slack <= uniform && uniform <= borders[token + 1] + slack);
    }
}

TEST_CASE("draws at every place are those of the exact distribution, whatever the filters") {
    testing::Random random(11);
    static constexpr float kPs[] = {0.05f, 0.3f, 0.9f, 0.99f, 1.0f, 1.0f};
    static constexpr std::int32_t kKs[] = {0, 0, 0, 2, 3, 50, 700, 100000};
    static constexpr float kMinPs[] = {0.0f, 0.0f, 0.02f, 0.4f, 1.0f};
    int checked = 0;
    for (int round = 0; round < testing::scaled(250); ++round) {
        const bool large = testing::pick(random, 0, 9) == 0;
        const auto size = large ? testing::pick(random, 20000, 30000) : testing::pick(random, 1, 3000);
        auto logits = reference::random_logits(random, size, 0.5f * static_cast<float>(testing::pick(random, 0, 8)));
        if (round % 3 == 0)
            for (float &x : logits) x = std::round(2.0f * x) / 2.0f;  // ties
        if (round % 4 == 0)
            for (float &x : logits) x = testing::pick(random, 0, 3) ? x : -INFINITY;
        logits[static_cast<std::size_t>(testing::pick(random, 0, size - 1))] = 1.0f;
        const SamplingFilter filter{0.2f + 0.3f * static_cast<float>(testing::pick(random, 0, 6)),
                                    kKs[testing::pick(random, 0, 7)], kPs[testing::pick(random, 0, 5)],
                                    kMinPs[testing::pick(random, 0, 4)]};
        const auto exact = reference::filter(logits, filter.temperature, filter.top_k, filter.top_p, filter.min_p);
        if (exact.margin < 1e-5) continue;  // a decision too close to call in single precision
        check_against(exact, logits, filter);
        ++checked;
    }
    CHECK(checked > testing::scaled(250) * 7 / 10);
}

TEST_CASE("every vector width draws the same tokens") {
    testing::Random random(12);
    for (int round = 0; round < testing::scaled(60); ++round) {
        const auto logits = reference::random_logits(random, testing::pick(random, 1, 20000), 2.5f);
        const SamplingFilter filters[] = {{0.8f, 0, 1.0f, 0.0f}, {0.8f, 50, 1.0f, 0.0f}, {0.8f, 0, 0.9f, 0.0f},
                                          {1.3f, 40, 0.9f, 0.0f}, {0.8f, 0, 1.0f, 0.05f}, {2.0f, 0, 0.95f, 0.01f}};
        for (const auto &filter : filters) {
            const double uniform = uniform_draw(5, 0, static_cast<std::uint64_t>(round));
            CHECK_EQ(draw(logits, filter, uniform, 4), draw(logits, filter, uniform, 8));
            CHECK_EQ(draw(logits, filter, uniform, 4), draw(logits, filter, uniform, 16));
        }
    }
}

TEST_CASE("generated tokens are distributed as the filters say") {
    testing::Random random(13);
    const std::int32_t size = 40, count = 20000;
    const auto logits = reference::random_logits(random, size, 1.5f);
    for (const auto &params : {make_params(1.0f, 0, 1.0f, 0.0f), make_params(0.6f, 0, 1.0f, 0.0f),
                               make_params(1.0f, 9, 1.0f, 0.0f), make_params(0.9f, 0, 0.7f, 0.0f),
                               make_params(1.2f, 0, 1.0f, 0.1f), make_params(1.4f, 20, 0.8f, 0.05f)}) {
        const auto &sampling = params->sampling;
        const auto exact =
            reference::filter(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p);
        SequenceDecoder decoder(params, {}, 0, size);
        DecodeScratch scratch;
        std::vector<double> seen(static_cast<std::size_t>(size));
        for (int i = 0; i < count; ++i) {
            auto row = logits;
            const TokenId token = decoder.next(row.data(), scratch).token;
            decoder.accept(token);
            ++seen[static_cast<std::size_t>(token)];
        }
        double statistic = 0.0, freedom = -1.0;
        for (std::size_t t = 0; t < seen.size(); ++t) {
            const double expected = exact.probabilities[t] * count;
            if (expected == 0.0) {
                CHECK_EQ(seen[t], 0.0);
                continue;
            }
            statistic += (seen[t] - expected) * (seen[t] - expected) / expected;
            ++freedom;
        }
        CHECK(freedom > 0);
        CHECK(statistic < reference::chi_square_bound(freedom));
    }
}

TEST_CASE("the generator gives the published numbers of Philox4x32-10") {
    CHECK((philox4x32({0, 0, 0, 0}, {0, 0}) == PhiloxCounter{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
    CHECK((philox4x32({0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}, {0xffffffffu, 0xffffffffu}) ==
           PhiloxCounter{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
    CHECK((philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u}) ==
           PhiloxCounter{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

std::vector<TokenId> generate(std::uint64_t seed, std::int32_t sequence, int count, DecodeScratch &scratch) {
    auto params = make_params(1.0f, 0, 0.95f, 0.0f);
    params->sampling.seed = seed;
    testing::Random random(99);
    SequenceDecoder decoder(params, {}, sequence, 500);
    std::vector<TokenId> tokens;
    for (int i = 0; i < count; ++i) {
        auto row = reference::random_logits(random, 500, 1.0f);
        tokens.push_back(decoder.next(row.data(), scratch).token);
        decoder.accept(tokens.back());
    }
    return tokens;
}

TEST_CASE("a seed gives the same tokens again, another seed or sequence gives others") {
    DecodeScratch scratch, other;
    const auto tokens = generate(1, 0, 30, scratch);
    generate(8, 3, 5, scratch);
    CHECK(tokens == generate(1, 0, 30, scratch));
    CHECK(tokens == generate(1, 0, 30, other));
    CHECK(tokens != generate(2, 0, 30, scratch));
    CHECK(tokens != generate(std::uint64_t{1} << 32 | 1, 0, 30, scratch));
    CHECK(tokens != generate(1, 1, 30, scratch));
}

TEST_CASE("greedy takes the first of the largest, with temperature 0 or top_k 1") {
    testing::Random random(14);
    for (int round = 0; round < testing::scaled(200); ++round) {
        auto logits = reference::random_logits(random, testing::pick(random, 1, 40000), 1.0f);
        for (float &x : logits) x = std::round(x);
        const auto first = static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        const auto size = static_cast<std::int32_t>(logits.size());
        CHECK_EQ(argmax(logits.data(), size), first);
        for (const auto &params : {make_params(0.0f, 0, 0.5f, 0.0f), make_params(0.7f, 1, 1.0f, 0.0f)}) {
            DecodeScratch scratch;
            auto row = logits;
            CHECK_EQ(SequenceDecoder(params, {}, 0, size).next(row.data(), scratch).token, first);
        }
    }
}

TEST_CASE("rows without a use are refused before anything is changed") {
    auto params = make_params(0.8f, 0, 0.9f, 0.0f);
    params->logit_bias = {{0, 5.0f}};
    for (const float bad : {static_cast<float>(NAN), static_cast<float>(INFINITY)})
        for (const int logprobs : {-1, 2}) {
            params->num_logprobs = logprobs;
            std::vector<float> row(300, 0.0f);
            row[299] = bad;
            DecodeScratch scratch;
            SequenceDecoder decoder(params, {}, 0, 300);
            CHECK_THROWS(decoder.next(row.data(), scratch), NonFiniteLogits);
            CHECK_EQ(row[0], 0.0f);
            CHECK_EQ(argmax(row.data(), 300), -1);
            std::fill(row.begin(), row.end(), -INFINITY);
            CHECK_THROWS(decoder.next(row.data(), scratch), NonFiniteLogits);
            CHECK_THROWS(token_logprobs(row.data(), 300, 0, 1, scratch), NonFiniteLogits);
            CHECK_EQ(argmax(row.data(), 300), -1);
        }
}

TEST_CASE("a constraint that leaves no token is an error, and one that leaves one is obeyed") {
    DecodeScratch scratch;
    for (const auto &params : {make_params(0.0f, 0, 1.0f, 0.0f), make_params(0.8f, 5, 0.9f, 0.0f),
                               make_params(0.8f, 0, 0.9f, 0.0f)}) {
        SequenceDecoder decoder(params, {}, 0, 70);
        std::vector<std::uint32_t> allowed(3, 0);
        std::vector<float> row(70, 1.0f);
        CHECK_THROWS(decoder.next(row.data(), scratch, allowed.data()), ImpossibleConstraint);
        allowed[2] = 1u << 5;  // token 69
        row.assign(70, 1.0f);
        CHECK_EQ(decoder.next(row.data(), scratch, allowed.data()).token, 69);
        allowed[0] = 1u;  // of which only token 69 was finite
        row.assign(70, -INFINITY);
        row[69] = -1e30f;
        CHECK_EQ(decoder.next(row.data(), scratch, allowed.data()).token, 69);
    }
}

TEST_CASE("odd rows give tokens: one token, equal logits, huge, tiny, and masked ones") {
    DecodeScratch scratch;
    for (const float value : {0.0f, 1e30f, -1e30f, 3e38f, -3e38f, 1e-42f})
        for (const std::int32_t size : {1, 7, 16, 257, 5000})
            for (const auto &params : {make_params(0.8f, 50, 1.0f, 0.0f), make_params(1e-30f, 0, 0.9f, 0.0f),
                                       make_params(1e30f, 0, 0.9f, 0.1f),
                                       make_params(2.0f, 3, 0.9f, 0.0f), make_params(1.0f, 0, 1.0f, 0.0f)}) {
                params->num_logprobs = 3;
                for (std::uint64_t seed = 0; seed < 4; ++seed) {
                    params->sampling.seed = seed;
                    std::vector<float> row(static_cast<std::size_t>(size), value);
                    for (std::size_t i = 1; i < row.size(); i += 2) row[i] = -INFINITY;
                    const auto choice = SequenceDecoder(params, {}, 0, size).next(row.data(), scratch);
                    CHECK(choice.token >= 0 && choice.token < size && choice.token % 2 == 0);
                    CHECK(std::abs(choice.logprob->logprob + std::log((size + 1) / 2)) < 1e-5f);
                    CHECK_EQ(choice.logprob->rank, choice.token / 2 + 1);
                }
            }
}

TEST_CASE("equal logits share out: top_p keeps the smaller ids, top_k keeps all equals") {
    const std::vector<float> logits(4000, 2.0f);
    std::set<TokenId> nucleus, by_count;
    for (int i = 0; i < 8000; ++i) {
        nucleus.insert(draw(logits, {1.0f, 0, 0.25f, 0.0f}, (i + 0.5) / 8000));
        by_count.insert(draw(logits, {1.0f, 10, 1.0f, 0.0f}, (i + 0.5) / 8000));
    }
    CHECK_EQ(nucleus.size(), 1000u);
    CHECK_EQ(*nucleus.rbegin(), 999);
    CHECK_EQ(by_count.size(), 4000u);
}

TEST_CASE("top_p decays after every token, stops at its least, and is set back by its token") {
    auto params = make_params(1.0f, 0, 0.85f, 0.0f);
    params->sampling.top_p_decay = 0.5f;
    params->sampling.top_p_min = 0.3f;
    params->sampling.top_p_reset_id = 3;
    SequenceDecoder decoder(params, {}, 0, 10);
    const auto reachable = [&] {  // tokens of ten equal ones that some draw gives, over many sequences in this state
        std::set<TokenId> tokens;
        for (std::int32_t sequence = 0; sequence < 400; ++sequence) {
            SequenceDecoder copy(params, {}, sequence, 10);
            for (const TokenId token : decoder.adjuster().generated()) copy.accept(token);
            std::vector<float> row(10, 0.0f);
            DecodeScratch scratch;
            tokens.insert(copy.next(row.data(), scratch).token);
        }
        return tokens.size();
    };
    CHECK_EQ(reachable(), 9u);   // 0.85
    decoder.accept(1);
    CHECK_EQ(reachable(), 5u);   // 0.425
    decoder.accept(1);
    CHECK_EQ(reachable(), 4u);   // 0.3, which is a little more in single precision
    decoder.accept(3);
    CHECK_EQ(reachable(), 9u);
}

TEST_CASE("log probabilities are those of the raw logits, whatever is adjusted or filtered") {
    testing::Random random(15);
    for (int round = 0; round < testing::scaled(100); ++round) {
        const auto size = static_cast<std::int32_t>(testing::pick(random, 1, 5000));
        auto logits = reference::random_logits(random, size, 3.0f);
        if (round % 2)
            for (float &x : logits) x = std::round(x);
        auto params = make_params(round % 3 ? 0.7f : 1.0f, 0, round % 5 ? 0.8f : 1.0f, 0.0f);
        params->num_logprobs = static_cast<std::int32_t>(testing::pick(random, 0, 8));
        if (round % 4 == 0) params->logit_bias = {{0, -3.0f}, {size - 1, 4.0f}};
        DecodeScratch scratch;
        auto row = logits;
        const Choice choice = SequenceDecoder(params, {}, 0, size).next(row.data(), scratch);
        const auto exact = reference::filter(logits, 1.0, 0, 1.0, 0.0);
        const double top = *std::max_element(logits.begin(), logits.end());
        double total = 0.0;
        for (const float x : logits) total += std::exp(x - top);
        std::vector<TokenId> order(static_cast<std::size_t>(size));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
        const auto check = [&](const TokenLogprob &given) {
            const double expected = logits[static_cast<std::size_t>(given.token)] - top - std::log(total);
            // the total errs by 2e-6 of itself at most; the result is rounded to single precision
            CHECK(std::abs(given.logprob - expected) <= 2e-6 + 6e-8 * std::abs(expected));
            CHECK_EQ(order[static_cast<std::size_t>(given.rank - 1)], given.token);
        };
        CHECK_EQ(choice.logprob->token, choice.token);
        check(*choice.logprob);
        CHECK_EQ(choice.top.size(), static_cast<std::size_t>(std::min(params->num_logprobs, size)));
        for (std::size_t i = 0; i < choice.top.size(); ++i) {
            check(choice.top[i]);
            CHECK_EQ(choice.top[i].rank, static_cast<std::int32_t>(i + 1));
        }
        const Choice again = token_logprobs(logits.data(), size, choice.token, 2, scratch);
        CHECK_EQ(again.logprob->logprob, choice.logprob->logprob);
        CHECK_EQ(again.logprob->rank, choice.logprob->rank);
    }
}

}  // namespace

int main(int c, char **v) { return testing::run(c, v); }
