// Beam search against two references: an exhaustive search, which a wide beam must equal, and transformers' algorithm
// written out with its -1e9 sentinels. The "model" is a hash of the tokens so far.
#include "beam_search.h"

#include "decoding_reference.h"

namespace {

using namespace trtllm::executor;
using reference::Tokens;

struct Model {
    std::uint64_t seed;
    std::int32_t vocab_size;
    float boost = 0.0f;  // of every fourth token: where those end sequences, many do
    std::vector<float> logits(const Tokens &tokens) const {
        std::uint64_t hash = seed;
        for (const TokenId token : tokens) hash = hash * 6364136223846793005u + static_cast<std::uint64_t>(token) + 1;
        testing::Random random(hash);
        auto row = reference::random_logits(random, vocab_size, 1.5f);
        for (std::size_t t = 3; t < row.size(); t += 4) row[t] += boost;
        return row;
    }
    std::vector<float> logprobs(const Tokens &tokens) const {
        auto row = logits(tokens);
        const double largest = *std::max_element(row.begin(), row.end());
        double total = 0.0;
        for (const float x : row) total += std::exp(x - largest);
        for (float &x : row) x = static_cast<float>(x - largest - std::log(total));
        return row;
    }
};

struct Search {
    std::shared_ptr<DecodingParams> params = std::make_shared<DecodingParams>();
    Tokens prompt = {1, 0};
    std::int32_t max_tokens = 5;
    SamplingConfig &sampling() { return params->sampling; }
};

// One step of `beams` with the model's logits; the parents that step() returned must fit the tokens.
std::vector<std::int32_t> advance(BeamSearch &beams, const Model &model, const Tokens &prompt,
                                  const std::vector<const std::uint32_t *> &allowed = {}) {
    std::vector<Tokens> before;
    std::vector<std::vector<float>> logits;
    std::vector<float *> rows;
    for (std::int32_t i = 0; i < beams.num_beams(); ++i) {
        before.emplace_back(beams.tokens(i).begin(), beams.tokens(i).end());
        Tokens tokens = prompt;
        tokens.insert(tokens.end(), before.back().begin(), before.back().end());
        logits.push_back(model.logits(tokens));
    }
    for (auto &row : logits) rows.push_back(row.data());
    DecodeScratch scratch;
    const auto parents = beams.step(rows, scratch, allowed);
    CHECK_EQ(parents.size(), static_cast<std::size_t>(beams.num_beams()));
    for (std::int32_t i = 0; i < beams.num_beams(); ++i) {
        Tokens expected = before[static_cast<std::size_t>(parents[static_cast<std::size_t>(i)])];
        expected.push_back(beams.last_token(i));
        CHECK((Tokens(beams.tokens(i).begin(), beams.tokens(i).end()) == expected));
    }
    return parents;
}

std::vector<Hypothesis> run(const Search &search, const Model &model) {
    BeamSearch beams(search.params, search.prompt, search.max_tokens, model.vocab_size);
    for (int step = 0; !beams.is_finished(); ++step) {
        CHECK(step < search.max_tokens);
        advance(beams, model, search.prompt);
    }
    CHECK_EQ(beams.num_beams(), 0);
    return beams.results();
}

bool is_end(const Search &search, TokenId token) {
    const auto &ends = search.params->end_ids;
    return std::find(ends.begin(), ends.end(), token) != ends.end();
}

// A finished sequence of a reference, the end token included.
struct Finished {
    Tokens tokens;
    double score = 0;
};

void check_results(const Search &search, const std::vector<Hypothesis> &results,
                   const std::vector<Finished> &expected) {
    CHECK_EQ(results.size(), expected.size());
    for (std::size_t i = 0; i < results.size(); ++i) {
        Tokens tokens = results[i].tokens;
        if (results[i].end_token >= 0) tokens.push_back(results[i].end_token);
        CHECK(tokens == expected[i].tokens);
        CHECK_EQ(results[i].end_token >= 0, is_end(search, tokens.back()));
        CHECK_EQ(results[i].logprobs.size(), results[i].tokens.size());
        // sums of at most 8 single precision log probabilities, each of at most 16 in size
        CHECK(std::abs(results[i].score - expected[i].score) < 8 * 8 * 16 * 6e-8);
    }
}

void enumerate(const Search &search, const Model &model, Tokens &output, double sum, std::vector<Finished> &all) {
    const bool ended = !output.empty() && is_end(search, output.back());
    if (ended || static_cast<std::int32_t>(output.size()) == search.max_tokens) {
        all.push_back({output, sum / std::pow(output.size(), search.params->sampling.length_penalty)});
        return;
    }
    Tokens tokens = search.prompt;
    tokens.insert(tokens.end(), output.begin(), output.end());
    const auto logprobs = model.logprobs(tokens);
    for (TokenId token = 0; token < model.vocab_size; ++token) {
        output.push_back(token);
        enumerate(search, model, output, sum + logprobs[static_cast<std::size_t>(token)], all);
        output.pop_back();
    }
}

TEST_CASE("a beam wide enough for everything finds all sequences in the order of their scores") {
    testing::Random random(31);
    for (int round = 0; round < testing::scaled(40); ++round) {
        Search search;
        search.max_tokens = static_cast<std::int32_t>(testing::pick(random, 1, 4));
        search.params->end_ids = {2};
        search.sampling().length_penalty = 0.5f * static_cast<float>(testing::pick(random, -2, 4));
        search.sampling().early_stopping = static_cast<std::int32_t>(testing::pick(random, 0, 2));
        const Model model{random(), 4};
        std::vector<Finished> all;
        Tokens output;
        enumerate(search, model, output, 0.0, all);
        std::sort(all.begin(), all.end(), [](const Finished &a, const Finished &b) { return a.score > b.score; });
        search.sampling().beam_width = static_cast<std::int32_t>(all.size());
        check_results(search, run(search, model), all);
    }
}

struct Running {
    Tokens tokens;
    float score;
    bool flag;  // hits a stopping criterion, or is finished
};

std::vector<Running> top(std::vector<Running> all, std::size_t count) {
    std::stable_sort(all.begin(), all.end(), [](const Running &a, const Running &b) { return a.score > b.score; });
    all.resize(std::min(all.size(), count));
    return all;
}

// transformers' _beam_search, step for step.
std::vector<Finished> transformers_search(const Search &search, const Model &model) {
    const auto &sampling = search.params->sampling;
    const auto width = static_cast<std::size_t>(sampling.beam_width);
    const std::size_t keep = std::max<std::size_t>(2, 1 + search.params->end_ids.size()) * width;
    const float penalty = sampling.length_penalty;
    std::vector<Running> running(width, {{}, -1e9f, false}), finished(width, {{}, -1e9f, false});
    running[0].score = 0.0f;
    bool unsatisfied = true;
    for (std::int32_t length = 1;; ++length) {
        std::vector<Running> continuations;
        for (const Running &beam : running) {
            Tokens tokens = search.prompt;
            tokens.insert(tokens.end(), beam.tokens.begin(), beam.tokens.end());
            const auto logprobs = model.logprobs(tokens);
            for (TokenId token = 0; token < model.vocab_size; ++token) {
                Running next{beam.tokens, beam.score + logprobs[static_cast<std::size_t>(token)], false};
                next.tokens.push_back(token);
                continuations.push_back(next);
            }
        }
        continuations = top(continuations, keep);
        const bool last = length == search.max_tokens;
        for (Running &next : continuations) next.flag = last || is_end(search, next.tokens.back());
        std::vector<Running> going_on = continuations;
        for (Running &next : going_on) next.score += next.flag ? -1e9f : 0.0f;
        running = top(going_on, width);

        const bool full = std::all_of(finished.begin(), finished.end(), [](const Running &f) { return f.flag; });
        for (std::size_t i = 0; i < continuations.size(); ++i) {
            Running next = continuations[i];
            next.flag = next.flag && i < width;
            next.score = next.score / static_cast<float>(std::pow(length, penalty));
            if (full && sampling.early_stopping == 1) next.score += -1e9f;
            if (!unsatisfied) next.score += -1e9f;
            if (!next.flag) next.score += -1e9f;
            finished.push_back(next);
        }
        finished = top(finished, width);

        const bool longest = sampling.early_stopping != 0 && sampling.early_stopping != 1 && penalty > 0;
        const std::int32_t assumed = longest ? search.max_tokens : length;
        const float best = running[0].score / static_cast<float>(std::pow(assumed, penalty));
        bool improves = false;
        for (const Running &f : finished) improves |= best > (f.flag ? finished.back().score : -1e9f);
        unsatisfied = unsatisfied && improves;
        const bool now_full = std::all_of(finished.begin(), finished.end(), [](const Running &f) { return f.flag; });
        const bool all_hit = std::all_of(continuations.begin(), continuations.end(), [&](const Running &next) {
            return last || is_end(search, next.tokens.back());
        });
        if (!unsatisfied || (now_full && sampling.early_stopping == 1) || all_hit) break;
    }
    std::vector<Finished> results;
    for (const Running &f : finished)
        if (f.flag) results.push_back({f.tokens, f.score});
    return results;
}

TEST_CASE("narrow beams find what transformers' algorithm finds") {
    testing::Random random(32);
    int by_end = 0, early = 0;
    for (int round = 0; round < testing::scaled(600); ++round) {
        Search search;
        search.sampling().beam_width = static_cast<std::int32_t>(testing::pick(random, 1, 4));
        search.max_tokens = static_cast<std::int32_t>(testing::pick(random, 1, 8));
        search.params->end_ids = round % 3 ? Tokens{3} : Tokens{3, 7, 11};
        search.sampling().length_penalty = 0.5f * static_cast<float>(testing::pick(random, -2, 4));
        search.sampling().early_stopping = static_cast<std::int32_t>(testing::pick(random, 0, 2));
        const auto vocab_size = static_cast<std::int32_t>(testing::pick(random, 16, 20));  // candidates of one beam do
        const Model model{random(), vocab_size, 1.5f * static_cast<float>(round % 4)};
        const auto results = run(search, model);
        check_results(search, results, transformers_search(search, model));
        by_end += results[0].end_token >= 0;
        early += std::all_of(results.begin(), results.end(), [&](const Hypothesis &h) {
            return static_cast<std::int32_t>(h.tokens.size()) + 1 < search.max_tokens;
        });
    }
    CHECK(by_end > testing::scaled(600) / 10 && early > testing::scaled(600) / 20);
}

TEST_CASE("penalties and bans act on log probabilities") {
    Search search;
    search.sampling().beam_width = 1;
    search.sampling().repetition_penalty = 3.0f;
    search.sampling().min_tokens = 2;
    search.params->end_ids = {0};
    search.max_tokens = 1;
    const Model model{5, 6};
    auto expected = model.logprobs(search.prompt);
    reference::adjust(*search.params, search.prompt, {}, expected);
    const auto best = std::max_element(expected.begin(), expected.end());
    const auto results = run(search, model);
    CHECK_EQ(results[0].tokens[0], static_cast<TokenId>(best - expected.begin()));
    CHECK(std::abs(results[0].cumulative_logprob - *best) < 1e-5f);
    CHECK(std::abs(results[0].logprobs[0] - *best) < 1e-5f);
}

TEST_CASE("the width of each step is the array's, the last one holds on") {
    Search search;
    search.sampling().beam_width = 4;
    search.sampling().beam_width_array = {2, 4, 3};
    const Model model{6, 20};
    BeamSearch beams(search.params, search.prompt, 6, model.vocab_size);
    CHECK_EQ(beams.num_beams(), 1);
    for (const std::int32_t width : {2, 4, 3, 3, 3}) {
        advance(beams, model, search.prompt);
        CHECK_EQ(beams.num_beams(), width);
    }
    advance(beams, model, search.prompt);
    CHECK(beams.is_finished());
    CHECK_EQ(beams.results().size(), 3u);
}

TEST_CASE("a diversity rate lets worse beams go on, and leaves scores as they are") {
    Search search;
    search.sampling().beam_width = 3;
    search.sampling().beam_search_diversity_rate = 100.0f;
    const Model model{7, 20};
    BeamSearch beams(search.params, search.prompt, 4, model.vocab_size);
    advance(beams, model, search.prompt);
    CHECK((advance(beams, model, search.prompt) == std::vector<std::int32_t>{2, 2, 2}));
    for (const Hypothesis &hypothesis : beams.results()) {
        float sum = 0.0f;
        for (const float logprob : hypothesis.logprobs) sum += logprob;
        CHECK_EQ(hypothesis.cumulative_logprob, sum);
        CHECK(sum < 0.0f);
    }
}

TEST_CASE("a stop word ends a beam and stays among its tokens") {
    Search search;
    search.sampling().beam_width = 40;  // all candidates
    search.params->stop_words = {{4}, {5, 4}};
    search.max_tokens = 2;
    const Model model{8, 6};
    int of_one = 0, of_two = 0;
    for (const Hypothesis &h : run(search, model)) {
        CHECK_EQ(h.end_token, -1);
        if (h.tokens.back() != 4) continue;
        const bool two = h.tokens.size() == 2 && h.tokens[0] == 5;
        CHECK_EQ(h.stop_word_length, two ? 2 : 1);
        ++(two ? of_two : of_one);
    }
    CHECK(of_one == 5 && of_two == 1);  // {4}, and {t, 4} for t other than 4 and 5
}

TEST_CASE("beams that have nowhere to go die, and all of them dying is an error") {
    Search search;
    search.sampling().beam_width = 3;
    const Model model{9, 10};
    BeamSearch beams(search.params, search.prompt, 6, model.vocab_size);
    const std::uint32_t two = 0b110, none = 0;
    advance(beams, model, search.prompt, {&two});
    CHECK_EQ(beams.num_beams(), 2);
    CHECK((advance(beams, model, search.prompt, {&none, &two}) == std::vector<std::int32_t>{1, 1}));
    CHECK_THROWS(advance(beams, model, search.prompt, {&none, &none}), ImpossibleConstraint);
    DecodeScratch scratch;
    std::vector<float> good(10, 1.0f), bad(10, NAN);
    std::vector<float *> rows = {good.data(), bad.data()};
    CHECK_THROWS(beams.step(rows, scratch), NonFiniteLogits);
    CHECK_EQ(good[0], 1.0f);
    CHECK_THROWS(beams.step({rows.data(), 1}, scratch), std::logic_error);
}

TEST_CASE("a search that is stopped gives what it has, the best first") {
    Search search;
    search.sampling().beam_width = 3;
    search.sampling().length_penalty = 1.0f;
    search.params->end_ids = {3};
    const Model model{10, 20};
    BeamSearch beams(search.params, search.prompt, 50, model.vocab_size);
    advance(beams, model, search.prompt);
    advance(beams, model, search.prompt);
    const auto standing = beams.results();
    CHECK_EQ(standing.size(), 3u);
    CHECK(standing[0].score == standing[0].cumulative_logprob / 2);
    beams.stop();
    CHECK(beams.is_finished());
    const auto results = beams.results();
    CHECK_EQ(results.size(), 3u);
    for (std::size_t i = 1; i < results.size(); ++i) CHECK(results[i - 1].score >= results[i].score);
}

}  // namespace

int main(int c, char **v) { return testing::run(c, v); }
