// Changing the weights of a running executor: every request is wholly of one model, or goes on with another from the
// tokens it had, as the caller chose; no step mixes the two, which the session itself checks for every cache row.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <set>
#include <thread>

#include "fake_session.h"
#include "testing.h"
#include "trtllm/executor.h"

using namespace trtllm::executor;
using testing::FakeSession;
using testing::pick;
using testing::Random;
using testing::scaled;
using namespace std::chrono_literals;

namespace {

constexpr std::int32_t vocabulary = 40;

SessionInfo session_info(std::int32_t window = 0) {
    SessionInfo info;
    info.vocab_size = vocabulary;
    info.max_seq_len = 96;
    info.max_batch_size = 8;
    info.max_num_tokens = 64;
    info.cache.tokens_per_block = 4;
    info.cache.num_blocks = 120;
    if (window > 0) info.cache.groups = {{window, 1, 8}};
    return info;
}

ExecutorConfig default_config(CapacitySchedulerPolicy policy = CapacitySchedulerPolicy::guaranteed_no_evict) {
    ExecutorConfig config;
    config.max_beam_width = 4;
    config.scheduler.capacity_scheduler_policy = policy;
    return config;
}

Request greedy(std::vector<TokenId> prompt, std::int32_t max_tokens) {
    Request request;
    request.input_token_ids = std::move(prompt);
    request.max_tokens = max_tokens;
    return request;
}

// Where every layer has a window, the session's model knows nothing but zeros of what lies before it.
TokenId next_token(std::vector<TokenId> tokens, std::uint64_t seed, std::int32_t window = 0) {
    const auto hidden = window > 0 ? std::max<std::int64_t>(0, static_cast<std::int64_t>(tokens.size()) - window) : 0;
    std::fill(tokens.begin(), tokens.begin() + hidden, 0);
    const auto logits = testing::fake_logits(tokens, vocabulary, seed);
    return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// The `count` tokens that the model generates.
std::vector<TokenId> continued(std::vector<TokenId> tokens, std::size_t count, std::uint64_t seed) {
    const auto prompt = static_cast<std::ptrdiff_t>(tokens.size());
    for (std::size_t index = 0; index < count; ++index) tokens.push_back(next_token(tokens, seed));
    return {tokens.begin() + prompt, tokens.end()};
}

// Whether the output's tokens are of the models `first` to `last`, one after the other, each of none or several.
bool is_of_models_in_order(const std::vector<TokenId> &prompt, const std::vector<TokenId> &output, std::uint64_t first,
                           std::uint64_t last, std::int32_t window = 0) {
    auto tokens = prompt;
    std::set<std::uint64_t> possible = {};
    for (auto seed = first; seed <= last; ++seed) possible.insert(seed);
    for (const auto token : output) {
        std::set<std::uint64_t> next;
        for (const auto seed : possible)
            for (auto later = seed; later <= last; ++later)
                if (next_token(tokens, later, window) == token) next.insert(later);
        if (next.empty()) return false;
        possible = next;
        tokens.push_back(token);
    }
    return true;
}

struct Collected {
    std::map<std::int32_t, std::vector<TokenId>> sequences;
    std::string error;
    bool is_final = false;
    std::vector<TokenLogprob> prompt_logprobs;
    std::int64_t context_rows = 0;
};

void wait_for(Executor &executor, const std::set<RequestId> &ids, std::map<RequestId, Collected> &collected) {
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    const auto is_open = [&](RequestId id) { return !collected[id].is_final; };
    while (std::any_of(ids.begin(), ids.end(), is_open)) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        for (const auto &response : executor.await_responses(50ms)) {
            auto &own = collected[response.request_id];
            own.is_final = response.is_final;
            own.error += response.error;
            auto &tokens = own.sequences[response.sequence_index];
            tokens.insert(tokens.end(), response.token_ids.begin(), response.token_ids.end());
            if (!response.prompt_logprobs.empty()) own.prompt_logprobs = response.prompt_logprobs;
            if (response.context_logits) own.context_rows = response.context_logits->rows;
        }
    }
}

std::vector<TokenId> random_prompt(Random &random, std::int64_t longest = 40) {
    std::vector<TokenId> tokens(static_cast<std::size_t>(pick(random, 1, longest)));
    for (auto &token : tokens) token = static_cast<TokenId>(pick(random, 0, vocabulary - 1));
    return tokens;
}

}  // namespace

TEST_CASE("with finish a request under way ends on the old weights and one that waits gets the new ones") {
    auto session = std::make_shared<FakeSession>(session_info());
    auto config = default_config();
    config.scheduler.max_batch_size = 1;
    std::atomic<bool> waits = true;
    session->before_step = [&](const StepBatch &) {
        while (waits) std::this_thread::sleep_for(1ms);
    };
    Executor executor(session, config);
    const auto first = executor.enqueue(greedy({1, 2, 3}, 12));
    while (session->num_steps == 0) std::this_thread::sleep_for(1ms);
    const auto second = executor.enqueue(greedy({4, 5}, 12));
    std::thread caller([&] { executor.exchange([&] { session->set_seed(2); }, InFlight::finish); });
    std::this_thread::sleep_for(20ms);
    waits = false;
    caller.join();
    std::map<RequestId, Collected> collected;
    wait_for(executor, {first, second}, collected);
    CHECK(collected[first].sequences[0] == continued({1, 2, 3}, 12, 1));
    CHECK(collected[second].sequences[0] == continued({4, 5}, 12, 2));
    executor.check();
}

TEST_CASE("with recompute a request goes on from its tokens, and both models had a part in it") {
    for (const auto policy : {CapacitySchedulerPolicy::guaranteed_no_evict, CapacitySchedulerPolicy::max_utilization,
                              CapacitySchedulerPolicy::static_batch}) {
        auto session = std::make_shared<FakeSession>(session_info());
        Executor executor(session, default_config(policy));
        std::atomic<int> left = 10;
        session->before_step = [&](const StepBatch &) {
            while (left <= 0) std::this_thread::sleep_for(1ms);
            --left;
        };
        const auto id = executor.enqueue(greedy({7, 8, 9, 10, 11}, 30));
        while (left > 0) std::this_thread::sleep_for(1ms);
        std::thread caller([&] { executor.exchange([&] { session->set_seed(2); }, InFlight::recompute); });
        std::this_thread::sleep_for(10ms);
        left = 1000;
        caller.join();
        std::map<RequestId, Collected> collected;
        wait_for(executor, {id}, collected);
        const auto &output = collected[id].sequences[0];
        CHECK_EQ(collected[id].error, "");
        CHECK_EQ(output.size(), 30u);
        const std::vector<TokenId> prompt = {7, 8, 9, 10, 11};
        CHECK(is_of_models_in_order(prompt, output, 1, 2));
        CHECK(!is_of_models_in_order(prompt, output, 1, 1));
        CHECK(!is_of_models_in_order(prompt, output, 2, 2));
        executor.check();
    }
}

TEST_CASE("work that throws changes nothing, and its caller is told") {
    for (const auto mode : {InFlight::finish, InFlight::recompute}) {
        auto session = std::make_shared<FakeSession>(session_info());
        Executor executor(session, default_config());
        const auto id = executor.enqueue(greedy({1, 2}, 40));
        CHECK_THROWS(executor.exchange([] { throw std::runtime_error("no"); }, mode), std::runtime_error);
        const auto after = executor.enqueue(greedy({1, 2}, 40));
        std::map<RequestId, Collected> collected;
        wait_for(executor, {id, after}, collected);
        CHECK(collected[id].sequences[0] == collected[after].sequences[0]);
        CHECK(is_of_models_in_order({1, 2}, collected[id].sequences[0], 1, 1));
        executor.check();
    }
}

TEST_CASE("the reusable cache is forgotten, so that a prompt seen before is computed by the new weights") {
    auto session = std::make_shared<FakeSession>(session_info());
    Executor executor(session, default_config());
    std::map<RequestId, Collected> collected;
    const std::vector<TokenId> prompt(24, 3);
    const auto before = executor.enqueue(greedy(prompt, 4));
    wait_for(executor, {before}, collected);
    executor.exchange([&] { session->set_seed(2); }, InFlight::finish);
    const auto after = executor.enqueue(greedy(prompt, 4));
    wait_for(executor, {after}, collected);
    CHECK_EQ(collected[after].error, "");
    CHECK(is_of_models_in_order(prompt, collected[after].sequences[0], 2, 2));
}

TEST_CASE("a beam search under way ends on the weights it began with, whatever was asked for") {
    for (const auto mode : {InFlight::finish, InFlight::recompute}) {
        const auto run = [&](bool exchanges) {
            auto session = std::make_shared<FakeSession>(session_info());
            Executor executor(session, default_config());
            auto request = greedy({1, 2, 3, 4, 5, 6}, 20);
            DecodingParams params;
            params.sampling.beam_width = 3;
            request.decoding = std::make_shared<DecodingParams>(params);
            std::atomic<bool> waits = exchanges;
            session->before_step = [&](const StepBatch &) {
                while (waits && session->num_steps > 3) std::this_thread::sleep_for(1ms);
            };
            const auto id = executor.enqueue(request);
            std::thread caller;
            if (exchanges) {
                while (session->num_steps <= 3) std::this_thread::sleep_for(1ms);
                caller = std::thread([&] { executor.exchange([&] { session->set_seed(2); }, mode); });
                std::this_thread::sleep_for(10ms);
                waits = false;
                caller.join();
            }
            std::map<RequestId, Collected> collected;
            wait_for(executor, {id}, collected);
            CHECK_EQ(collected[id].error, "");
            executor.check();
            return collected[id].sequences;
        };
        CHECK(run(true) == run(false));
    }
}

TEST_CASE("prompt outputs of a prompt that was half computed are all of the new weights") {
    auto info = session_info();
    info.max_num_tokens = 8;
    auto session = std::make_shared<FakeSession>(info);
    auto config = default_config();
    config.scheduler.chunk_unit = 4;
    std::atomic<int> left = 2;
    session->before_step = [&](const StepBatch &) {
        while (left <= 0) std::this_thread::sleep_for(1ms);
        --left;
    };
    Executor executor(session, config);
    std::vector<TokenId> prompt;
    for (TokenId token = 0; token < 40; ++token) prompt.push_back(token % 7);
    auto request = greedy(prompt, 2);
    request.num_prompt_logprobs = 0;
    request.return_context_logits = true;
    const auto id = executor.enqueue(request);
    while (left > 0) std::this_thread::sleep_for(1ms);
    std::thread caller([&] { executor.exchange([&] { session->set_seed(2); }, InFlight::recompute); });
    std::this_thread::sleep_for(10ms);
    left = 1000;
    caller.join();
    const auto fresh = executor.enqueue(request);
    std::map<RequestId, Collected> collected;
    wait_for(executor, {id, fresh}, collected);
    CHECK_EQ(collected[id].context_rows, 40);
    CHECK_EQ(collected[id].prompt_logprobs.size(), 39u);
    for (std::size_t index = 0; index < 39; ++index)
        CHECK_EQ(collected[id].prompt_logprobs[index].logprob, collected[fresh].prompt_logprobs[index].logprob);
}

TEST_CASE("shutdown tells whoever waits to change the weights") {
    auto session = std::make_shared<FakeSession>(session_info());
    std::atomic<bool> waits = true;
    session->before_step = [&](const StepBatch &) {
        while (waits) std::this_thread::sleep_for(1ms);
    };
    Executor executor(session, default_config());
    executor.enqueue(greedy({1}, 90));
    while (session->num_steps == 0) std::this_thread::sleep_for(1ms);
    bool was_refused = false;
    std::thread caller([&] {
        try {
            executor.exchange([] {}, InFlight::finish);
        } catch (const RequestError &) {
            was_refused = true;
        }
    });
    std::this_thread::sleep_for(20ms);
    std::thread closer([&] { executor.shutdown(ShutdownMode::cancel); });
    std::this_thread::sleep_for(20ms);
    waits = false;
    closer.join();
    caller.join();
    CHECK(was_refused);
}

TEST_CASE("weights change back and forth under load: every request is of the models it was promised") {
    for (int round = 0; round < scaled(24); ++round) {
        Random random(static_cast<std::uint64_t>(round) + 1);
        const auto mode = round % 2 == 0 ? InFlight::finish : InFlight::recompute;
        const auto window = round % 3 == 0 ? static_cast<std::int32_t>(pick(random, 4, 30)) : 0;
        auto info = session_info(window);
        info.max_num_tokens = static_cast<std::int32_t>(pick(random, 12, 64));
        auto session = std::make_shared<FakeSession>(info);
        auto config = default_config(static_cast<CapacitySchedulerPolicy>(pick(random, 0, 2)));
        config.scheduler.chunk_unit = 4;
        if (pick(random, 0, 1)) config.ngram = NgramConfig{3, 2};
        Executor executor(session, config);
        std::map<RequestId, Request> requests;
        std::set<RequestId> ids;
        std::atomic<std::uint64_t> newest = 1;
        std::thread changer([&] {
            for (int turn = 0; turn < 6; ++turn) {
                executor.exchange([&] { session->set_seed(++newest); }, mode);
                std::this_thread::sleep_for(300us);
            }
        });
        for (int count = 0; count < 40; ++count) {
            auto request = greedy(random_prompt(random), static_cast<std::int32_t>(pick(random, 1, 30)));
            DecodingParams params;
            if (pick(random, 0, 3) == 0) {  // samples that all follow the likeliest token
                params.sampling.top_k = 1;
                params.sampling.seed = 5;
                request.num_return_sequences = static_cast<std::int32_t>(pick(random, 1, 3));
            }
            request.decoding = std::make_shared<DecodingParams>(params);
            const auto id = executor.enqueue(request);
            requests.emplace(id, request);
            ids.insert(id);
            if (pick(random, 0, 4) == 0) std::this_thread::sleep_for(200us);
        }
        std::map<RequestId, Collected> collected;
        wait_for(executor, ids, collected);
        changer.join();
        executor.check();
        for (const auto id : ids) {
            const auto &request = requests.at(id);
            CHECK_EQ(collected[id].error, "");
            for (const auto &entry : collected[id].sequences) {
                CHECK_EQ(entry.second.size(), static_cast<std::size_t>(request.max_tokens));
                bool is_of_one = false;
                for (std::uint64_t seed = 1; seed <= newest; ++seed)
                    is_of_one |= is_of_models_in_order(request.input_token_ids, entry.second, seed, seed, window);
                if (mode == InFlight::finish) CHECK(is_of_one);
                else CHECK(is_of_models_in_order(request.input_token_ids, entry.second, 1, newest, window));
            }
        }
    }
}

int main(int count, char **values) { return testing::run(count, values); }
