// The executor over a session made of arithmetic: what a request gets never depends on what else is under way.
#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#include "beam_search.h"
#include "decoder.h"
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

SessionInfo session_info(std::int32_t tokens_per_block = 4, std::int32_t num_blocks = 64) {
    SessionInfo info;
    info.vocab_size = vocabulary;
    info.max_seq_len = 96;
    info.max_batch_size = 8;
    info.max_num_tokens = 64;
    info.cache.tokens_per_block = tokens_per_block;
    info.cache.num_blocks = num_blocks;
    return info;
}

ExecutorConfig default_config() {
    ExecutorConfig config;
    config.max_beam_width = 4;
    return config;
}

Request make_request(std::vector<TokenId> prompt, std::int32_t max_tokens, DecodingParams params = {}) {
    Request request;
    request.input_token_ids = std::move(prompt);
    request.max_tokens = max_tokens;
    request.decoding = std::make_shared<DecodingParams>(std::move(params));
    return request;
}

struct Output {
    std::vector<TokenId> tokens;
    std::vector<float> logprobs;
    FinishReason reason = FinishReason::not_finished;
};

// What a request must give: the plain loop, without executor, scheduler or cache.
std::vector<Output> expected_outputs(const Request &request, std::int32_t max_seq_len) {
    std::vector<Output> outputs;
    DecodeScratch scratch;
    const auto &prompt = request.input_token_ids;
    const auto most = std::min(request.max_tokens, max_seq_len - static_cast<std::int32_t>(prompt.size()));
    if (request.decoding->sampling.beam_width > 1) {
        BeamSearch beams(request.decoding, prompt, most, vocabulary);
        while (!beams.is_finished()) {
            std::vector<std::vector<float>> logits;
            std::vector<float *> rows;
            for (std::int32_t beam = 0; beam < beams.num_beams(); ++beam) {
                auto tokens = prompt;
                tokens.insert(tokens.end(), beams.tokens(beam).begin(), beams.tokens(beam).end());
                logits.push_back(testing::fake_logits(tokens, vocabulary));
            }
            for (auto &row : logits) rows.push_back(row.data());
            beams.step(rows, scratch);
        }
        for (const auto &result : beams.results()) {
            outputs.push_back({result.tokens, {}, result.end_token >= 0 ? FinishReason::end_id : FinishReason::length});
            if (static_cast<std::int32_t>(outputs.size()) == request.num_return_sequences) break;
        }
        return outputs;
    }
    for (std::int32_t index = 0; index < request.num_return_sequences; ++index) {
        SequenceDecoder decoder(request.decoding, prompt, index, vocabulary);
        Output output;
        auto tokens = prompt;
        while (output.reason == FinishReason::not_finished) {
            auto logits = testing::fake_logits(tokens, vocabulary);
            const auto choice = decoder.next(logits.data(), scratch);
            decoder.accept(choice.token);
            if (decoder.adjuster().is_end(choice.token)) {
                output.reason = FinishReason::end_id;
                break;
            }
            tokens.push_back(choice.token);
            output.tokens.push_back(choice.token);
            if (choice.logprob) output.logprobs.push_back(choice.logprob->logprob);
            if (decoder.adjuster().matched_stop_word() > 0) output.reason = FinishReason::stop_words;
            else if (static_cast<std::int32_t>(output.tokens.size()) >= most) output.reason = FinishReason::length;
        }
        outputs.push_back(std::move(output));
    }
    return outputs;
}

struct Collected {
    std::map<std::int32_t, Output> sequences;
    std::string error;
    bool is_final = false;
    std::optional<RequestPerfMetrics> metrics;
    std::vector<Response> responses;
};

void take(const std::vector<Response> &responses, std::map<RequestId, Collected> &collected) {
    for (const auto &response : responses) {
        auto &request = collected[response.request_id];
        CHECK(!request.is_final);
        request.is_final = response.is_final;
        request.responses.push_back(response);
        if (!response.error.empty()) {
            request.error = response.error;
            continue;
        }
        auto &sequence = request.sequences[response.sequence_index];
        CHECK(sequence.reason == FinishReason::not_finished);
        sequence.tokens.insert(sequence.tokens.end(), response.token_ids.begin(), response.token_ids.end());
        for (const auto &item : response.logprobs) sequence.logprobs.push_back(item.logprob);
        sequence.reason = response.finish_reason;
        CHECK_EQ(response.is_sequence_final, response.finish_reason != FinishReason::not_finished);
        if (response.is_final) request.metrics = response.perf_metrics;
    }
}

// Fetches responses until all of `ids` have ended.
void wait_for(Executor &executor, const std::vector<RequestId> &ids, std::map<RequestId, Collected> &collected) {
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    const auto is_open = [&](RequestId id) { return !collected[id].is_final; };
    while (std::any_of(ids.begin(), ids.end(), is_open)) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        take(executor.await_responses(100ms), collected);
    }
}

Collected run_one(Executor &executor, Request request) {
    std::map<RequestId, Collected> collected;
    const auto id = executor.enqueue(std::move(request));
    wait_for(executor, {id}, collected);
    return collected[id];
}

std::vector<TokenId> random_tokens(Random &random, std::int64_t count) {
    std::vector<TokenId> tokens;
    for (std::int64_t index = 0; index < count; ++index) tokens.push_back(static_cast<TokenId>(pick(random, 0, vocabulary - 1)));
    return tokens;
}

Request random_request(Random &random, const std::vector<std::vector<TokenId>> &prefixes, std::int64_t longest) {
    auto prompt = prefixes[static_cast<std::size_t>(pick(random, 0, static_cast<std::int64_t>(prefixes.size()) - 1))];
    prompt.resize(static_cast<std::size_t>(std::min<std::int64_t>(pick(random, 0, 30), static_cast<std::int64_t>(prompt.size()))));
    const auto more = random_tokens(random, pick(random, 1, std::max<std::int64_t>(1, longest - 30)));
    prompt.insert(prompt.end(), more.begin(), more.end());
    DecodingParams params;
    auto &sampling = params.sampling;
    const auto kind = pick(random, 0, 5);
    if (kind >= 2) {
        sampling.top_k = static_cast<std::int32_t>(pick(random, 0, 12));
        sampling.temperature = 0.25f * static_cast<float>(pick(random, 1, 8));
        if (pick(random, 0, 1)) sampling.top_p = 0.8f;
        sampling.seed = static_cast<std::uint64_t>(pick(random, 0, 99));
    }
    if (kind == 3) {
        sampling.repetition_penalty = 1.3f;
        sampling.presence_penalty = 0.5f;
        sampling.no_repeat_ngram_size = 2;
    }
    if (pick(random, 0, 1)) params.end_ids = {static_cast<TokenId>(pick(random, 0, vocabulary - 1))};
    if (pick(random, 0, 3) == 0) params.stop_words = {{static_cast<TokenId>(pick(random, 0, vocabulary - 1))}};
    if (pick(random, 0, 3) == 0) params.num_logprobs = 2;
    auto request = make_request(std::move(prompt), static_cast<std::int32_t>(pick(random, 1, 24)), params);
    if (kind >= 2) request.num_return_sequences = static_cast<std::int32_t>(pick(random, 1, 3));
    if (kind == 1) {
        params.sampling.beam_width = static_cast<std::int32_t>(pick(random, 2, 3));
        params.stop_words.clear();
        params.num_logprobs = -1;
        request.decoding = std::make_shared<DecodingParams>(params);
        request.num_return_sequences = static_cast<std::int32_t>(pick(random, 1, params.sampling.beam_width));
    }
    request.streaming = kind != 1 && pick(random, 0, 1) == 1;
    request.priority = 0.25f * static_cast<float>(pick(random, 0, 4));
    request.allow_drafts = pick(random, 0, 3) > 0;
    return request;
}

ExecutorConfig random_config(Random &random, SessionInfo &info) {
    auto config = default_config();
    const bool is_linear = pick(random, 0, 3) == 0;
    info.cache.tokens_per_block = is_linear ? info.max_seq_len : static_cast<std::int32_t>(1 << pick(random, 0, 4));
    const auto whole = (info.max_seq_len + info.cache.tokens_per_block - 1) / info.cache.tokens_per_block;
    // At least three whole sequences: the widest request must fit.
    info.cache.num_blocks = static_cast<std::int32_t>(whole * pick(random, 4, 8) + pick(random, 0, whole));
    if (!is_linear && pick(random, 0, 2) == 0) info.cache.num_host_blocks = static_cast<std::int32_t>(pick(random, 1, 40));
    if (!is_linear && pick(random, 0, 2) == 0) info.cache.groups.push_back({static_cast<std::int32_t>(pick(random, 3, 20)), 1, 8});
    info.max_num_tokens = static_cast<std::int32_t>(pick(random, 16, 64));
    auto &scheduler = config.scheduler;
    scheduler.capacity_scheduler_policy = static_cast<CapacitySchedulerPolicy>(pick(random, 0, 2));
    scheduler.context_chunking_policy = static_cast<ContextChunkingPolicy>(pick(random, 0, 1));
    scheduler.chunk_unit = static_cast<std::int32_t>(pick(random, 1, 16));
    config.kv_cache.enable_block_reuse = pick(random, 0, 3) > 0;
    config.kv_cache.enable_partial_reuse = pick(random, 0, 3) > 0;
    config.kv_cache.copy_on_partial_reuse = pick(random, 0, 3) > 0;
    if (pick(random, 0, 2) == 0) config.ngram = NgramConfig{static_cast<std::int32_t>(pick(random, 1, 4)), 2};
    if (pick(random, 0, 1)) info.num_candidates = static_cast<std::int32_t>(pick(random, 1, 16));
    config.perf_trace_max_events = 50;
    config.request_stats_max_iterations = 5;
    return config;
}

// Those of candidates come from the device's sum, which is rounded in another way.
void check_logprobs(const std::vector<float> &found, const std::vector<float> &expected, bool from_candidates) {
    CHECK_EQ(found.size(), expected.size());
    for (std::size_t place = 0; place < found.size(); ++place)
        CHECK(from_candidates ? std::abs(found[place] - expected[place]) < 1e-5f : found[place] == expected[place]);
}

}  // namespace

TEST_CASE("a greedy request gives what the plain loop gives") {
    Executor executor(std::make_shared<FakeSession>(session_info()), default_config());
    const auto request = make_request({1, 2, 3}, 10);
    const auto output = run_one(executor, request);
    CHECK_EQ(output.error, "");
    CHECK(output.sequences.at(0).tokens == expected_outputs(request, 96)[0].tokens);
    CHECK(output.sequences.at(0).reason == FinishReason::length);
    executor.check();
}

TEST_CASE("batching, chunks, pauses, reuse, drafts and cancellations never change what a request gets") {
    const auto rounds = scaled(24);
    for (int round = 0; round < rounds; ++round) {
        Random random(static_cast<std::uint64_t>(round) + 100);
        auto info = session_info();
        const auto config = random_config(random, info);
        auto session = std::make_shared<FakeSession>(info);
        Executor executor(session, config);
        const std::vector<std::vector<TokenId>> prefixes = {random_tokens(random, 30), random_tokens(random, 30)};
        std::map<RequestId, Request> requests;
        std::map<RequestId, Collected> collected;
        std::vector<RequestId> ids, cancelled;
        for (int number = 0; number < 40; ++number) {
            auto request = random_request(random, prefixes, 70);
            const auto id = executor.enqueue(request);
            requests[id] = std::move(request);
            ids.push_back(id);
            if (pick(random, 0, 9) == 0) {
                cancelled.push_back(ids[static_cast<std::size_t>(pick(random, 0, number))]);
                executor.cancel(cancelled.back());
            }
            if (pick(random, 0, 4) == 0) take(executor.await_responses(1ms), collected);
        }
        wait_for(executor, ids, collected);
        for (const auto id : ids) {
            const auto &result = collected[id];
            if (!result.error.empty()) throw testing::Failure("round " + std::to_string(round) + ": " + result.error);
            const auto expected = expected_outputs(requests[id], info.max_seq_len);
            const bool was_cancelled = std::find(cancelled.begin(), cancelled.end(), id) != cancelled.end();
            for (const auto &[index, sequence] : result.sequences) {
                if (was_cancelled && requests[id].decoding->sampling.beam_width > 1) continue;
                const auto &whole = expected.at(static_cast<std::size_t>(index));
                if (sequence.reason == FinishReason::cancelled) {
                    CHECK(was_cancelled);
                    CHECK(sequence.tokens.size() <= whole.tokens.size());
                    CHECK(std::equal(sequence.tokens.begin(), sequence.tokens.end(), whole.tokens.begin()));
                    continue;
                }
                CHECK(sequence.tokens == whole.tokens);
                check_logprobs(sequence.logprobs, whole.logprobs, info.num_candidates > 0);
                CHECK(sequence.reason == whole.reason);
            }
            if (!was_cancelled) CHECK_EQ(result.sequences.size(), expected.size());
        }
        executor.check();
    }
}

TEST_CASE("rows stay where they are when their best logits are enough, and come when they are not") {
    auto info = session_info();
    info.num_candidates = 8;
    const auto run = [&](const DecodingParams &params, std::int32_t samples = 1) {
        auto session = std::make_shared<FakeSession>(info);
        Executor executor(session, default_config());
        auto request = make_request({1, 2, 3}, 20, params);
        request.num_return_sequences = samples;
        const auto output = run_one(executor, request);
        CHECK_EQ(output.error, "");
        const auto expected = expected_outputs(request, 96);
        for (const auto &[index, sequence] : output.sequences)
            CHECK(sequence.tokens == expected[static_cast<std::size_t>(index)].tokens);
        return std::pair(session->num_hidden.load(), session->num_completed.load());
    };
    using Counts = std::pair<std::int64_t, std::int64_t>;
    DecodingParams params;
    CHECK(run(params) == Counts(20, 0));
    params.sampling.top_k = 5;
    params.sampling.temperature = 0.7f;
    CHECK(run(params) == Counts(20, 0));
    CHECK(run(params, 3) == Counts(57, 0));  // the prompt's row is shared by all
    params.num_logprobs = 3;
    CHECK(run(params) == Counts(20, 0));
    params.num_logprobs = 8;
    CHECK(run(params) == Counts(0, 0));
    params.num_logprobs = -1;
    params.sampling.top_k = 9;
    CHECK(run(params) == Counts(0, 0));
    params.sampling.top_p = 0.5f;  // top_k of 9 takes a ninth
    CHECK(run(params).first == 20);
    params.sampling.top_k = 0;
    params.sampling.temperature = 0.1f;
    const auto [hidden, completed] = run(params);
    CHECK(hidden == 20 && completed < 10);
    params = {};
    params.sampling.presence_penalty = 0.5f;
    CHECK(run(params).first <= 1);
}

TEST_CASE("a step that fails takes only its own requests with it") {
    auto session = std::make_shared<FakeSession>(session_info());
    session->before_step = [](const StepBatch &batch) {
        for (const auto token : batch.tokens)
            if (token == 39) throw std::runtime_error("the accelerator caught fire");
    };
    Executor executor(session, default_config());
    const auto bad = run_one(executor, make_request({1, 39}, 4));
    CHECK(bad.error.find("caught fire") != std::string::npos);
    DecodingParams without;
    without.bad_words = {{39}};
    const auto request = make_request({1, 2}, 4, without);
    CHECK(run_one(executor, request).sequences.at(0).tokens == expected_outputs(request, 96)[0].tokens);
    executor.check();
}

TEST_CASE("logits that are not finite end their request alone") {
    auto session = std::make_shared<FakeSession>(session_info());
    session->after_step = [](const StepBatch &batch, std::vector<float> &logits) {
        for (std::size_t row = 0; row < batch.logits_indices.size(); ++row)
            if (batch.tokens[static_cast<std::size_t>(batch.logits_indices[row])] == 7)
                logits[row * vocabulary] = std::numeric_limits<float>::quiet_NaN();
    };
    Executor executor(session, default_config());
    DecodingParams no_seven;
    no_seven.bad_words = {{7}};
    std::map<RequestId, Collected> collected;
    const auto good = make_request({1, 2, 3}, 12, no_seven);
    const auto good_id = executor.enqueue(good), bad_id = executor.enqueue(make_request({7}, 12));
    wait_for(executor, {good_id, bad_id}, collected);
    CHECK(!collected[bad_id].error.empty());
    CHECK_EQ(collected[good_id].error, "");
    CHECK(collected[good_id].sequences.at(0).tokens == expected_outputs(good, 96)[0].tokens);
    executor.check();
}

TEST_CASE("what can never be served is refused at once, by name") {
    Executor executor(std::make_shared<FakeSession>(session_info()), default_config());
    const auto refuses = [&](Request request, const char *says) {
        try {
            executor.enqueue(std::move(request));
        } catch (const RequestError &error) {
            CHECK(std::string(error.what()).find(says) != std::string::npos);
            CHECK(!error.hint().empty());
            return;
        }
        throw testing::Failure(std::string("not refused: ") + says);
    };
    refuses(make_request({}, 4), "empty");
    refuses(make_request(std::vector<TokenId>(96, 1), 4), "96 tokens");
    refuses(make_request({vocabulary}, 4), "vocabulary");
    refuses(make_request({-1}, 4), "vocabulary");
    refuses(make_request({1}, 0), "max_tokens");
    DecodingParams params;
    params.sampling.temperature = -1;
    refuses(make_request({1}, 4, params), "temperature");
    params = {};
    params.sampling.beam_width = 5;
    refuses(make_request({1}, 4, params), "beam_width");
    auto request = make_request({1}, 4);
    request.num_return_sequences = 0;
    refuses(request, "n is 0");
    request = make_request({1}, 4);
    request.priority = 2;
    refuses(request, "priority");
    request = make_request({1}, 4);
    request.allotted_time_ms = 0;
    refuses(request, "allotted_time_ms");
    request = make_request({1}, 4);
    request.apply_batched_logits_processor = true;
    refuses(request, "apply_batched_logits_processor");
    CHECK(run_one(executor, make_request({1}, 4)).error.empty());
    executor.shutdown();
    refuses(make_request({1}, 4), "shut down");
}

TEST_CASE("more samples than rows fail their own request and no other") {
    Executor executor(std::make_shared<FakeSession>(session_info()), default_config());
    auto request = make_request({1}, 4);
    request.num_return_sequences = 9;
    CHECK(!run_one(executor, request).error.empty());
    CHECK(run_one(executor, make_request({1}, 4)).error.empty());
    executor.check();
}

TEST_CASE("a full queue refuses, and takes requests again when it has emptied") {
    auto session = std::make_shared<FakeSession>(session_info());
    std::atomic<bool> go = false;
    session->before_step = [&](const StepBatch &) {
        while (!go) std::this_thread::sleep_for(1ms);
    };
    auto config = default_config();
    config.scheduler.max_queue_size = 2;
    Executor executor(session, config);
    std::vector<RequestId> ids = {executor.enqueue(make_request({1}, 2))};
    while (session->num_steps == 0) std::this_thread::sleep_for(1ms);
    ids.push_back(executor.enqueue(make_request({2}, 2)));
    ids.push_back(executor.enqueue(make_request({3}, 2)));
    CHECK(!executor.can_enqueue_requests());
    CHECK_THROWS(executor.enqueue(make_request({4}, 2)), RequestError);
    go = true;
    std::map<RequestId, Collected> collected;
    wait_for(executor, ids, collected);
    CHECK(executor.can_enqueue_requests());
    executor.check();
}

TEST_CASE("a request that runs out of time ends with what it has") {
    auto session = std::make_shared<FakeSession>(session_info());
    session->before_step = [](const StepBatch &) { std::this_thread::sleep_for(5ms); };
    Executor executor(session, default_config());
    auto request = make_request({1, 2}, 90);
    request.allotted_time_ms = 40;
    const auto output = run_one(executor, request);
    CHECK(output.sequences.at(0).reason == FinishReason::timed_out);
    const auto whole = expected_outputs(request, 96)[0].tokens;
    const auto &tokens = output.sequences.at(0).tokens;
    CHECK(!tokens.empty());
    CHECK(tokens.size() < whole.size());
    CHECK(std::equal(tokens.begin(), tokens.end(), whole.begin()));
    executor.check();
}

TEST_CASE("one sequence can be stopped while its siblings go on") {
    auto session = std::make_shared<FakeSession>(session_info());
    session->before_step = [](const StepBatch &) { std::this_thread::sleep_for(2ms); };
    Executor executor(session, default_config());
    DecodingParams params;
    params.sampling.top_k = 0;
    auto request = make_request({1, 2}, 30, params);
    request.num_return_sequences = 2;
    request.streaming = true;
    const auto id = executor.enqueue(request);
    std::map<RequestId, Collected> collected;
    while (collected[id].sequences[1].tokens.empty()) take(executor.await_responses(100ms), collected);
    executor.stop_sequence(id, 1);
    wait_for(executor, {id}, collected);
    const auto expected = expected_outputs(request, 96);
    CHECK(collected[id].sequences.at(1).reason == FinishReason::stopped);
    CHECK(collected[id].sequences.at(1).tokens.size() < 30);
    CHECK(collected[id].sequences.at(0).tokens == expected[0].tokens);
    executor.check();
}

TEST_CASE("shutdown finishes what is under way, or cancels it") {
    for (const auto mode : {ShutdownMode::finish, ShutdownMode::cancel}) {
        auto session = std::make_shared<FakeSession>(session_info());
        session->before_step = [](const StepBatch &) { std::this_thread::sleep_for(1ms); };
        Executor executor(session, default_config());
        std::vector<RequestId> ids;
        for (int number = 0; number < 20; ++number) ids.push_back(executor.enqueue(make_request({1, 2, number}, 20)));
        executor.shutdown(mode);
        std::map<RequestId, Collected> collected;
        take(executor.await_responses(0ms), collected);
        for (const auto id : ids) {
            CHECK(collected[id].is_final);
            const auto reason = collected[id].sequences.at(0).reason;
            if (mode == ShutdownMode::finish) CHECK(reason == FinishReason::length);
            else CHECK(reason == FinishReason::length || reason == FinishReason::cancelled);
        }
        CHECK(executor.await_responses(10s).empty());  // at once: nothing will come
    }
}

TEST_CASE("many threads may enqueue, cancel and read at the same time") {
    Executor executor(std::make_shared<FakeSession>(session_info()), default_config());
    std::mutex mutex;
    std::vector<RequestId> ids;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread)
        threads.emplace_back([&, thread] {
            Random random(static_cast<std::uint64_t>(thread));
            for (int number = 0; number < 25; ++number) {
                auto request = make_request(random_tokens(random, pick(random, 1, 30)), 6);
                request.streaming = true;
                const auto id = executor.enqueue(request);
                if (number % 5 == 0) executor.cancel(id);
                if (number % 7 == 0) (void)executor.take_iteration_stats();
                if (number % 9 == 0) executor.check();
                (void)executor.num_responses_ready();
                const std::scoped_lock lock(mutex);
                ids.push_back(id);
            }
        });
    std::map<RequestId, Collected> collected;
    for (auto &thread : threads) {
        take(executor.await_responses(1ms), collected);
        thread.join();
    }
    wait_for(executor, ids, collected);
    CHECK_EQ(ids.size(), 100u);
    executor.check();
}

TEST_CASE("a shared prompt is computed once") {
    auto session = std::make_shared<FakeSession>(session_info());
    Executor executor(session, default_config());
    Random random(3);
    auto prompt = random_tokens(random, 60);
    (void)run_one(executor, make_request(prompt, 1));
    const auto first = session->num_tokens.load();
    CHECK_EQ(first, 60);
    prompt.back() = (prompt.back() + 1) % vocabulary;
    const auto request = make_request(prompt, 1);
    const auto second = run_one(executor, request);
    CHECK(second.sequences.at(0).tokens == expected_outputs(request, 96)[0].tokens);
    CHECK_EQ(session->num_tokens - first, 1);
    CHECK_EQ(second.metrics->num_reused_tokens, 59);
}

TEST_CASE("requests that arrive together and share a prompt compute it once") {
    for (const std::int32_t tokens_per_block : {4, 96}) {
        auto session = std::make_shared<FakeSession>(session_info(tokens_per_block, tokens_per_block == 4 ? 256 : 8));
        std::atomic<bool> go = false;
        session->before_step = [&](const StepBatch &) {
            while (!go) std::this_thread::sleep_for(1ms);
        };
        Executor executor(session, default_config());
        Random random(4);
        const auto prefix = random_tokens(random, 50);
        std::vector<RequestId> ids;
        for (int number = 0; number < 6; ++number) {
            auto prompt = prefix;
            prompt.push_back(number);
            ids.push_back(executor.enqueue(make_request(prompt, 3)));
        }
        go = true;
        std::map<RequestId, Collected> collected;
        wait_for(executor, ids, collected);
        CHECK(session->num_tokens < 2 * 51 + 6 * 10);
    }
}

TEST_CASE("prompt log probabilities and context logits cover the whole prompt, in chunks and with a warm cache") {
    auto session = std::make_shared<FakeSession>(session_info());
    auto config = default_config();
    config.scheduler.max_num_tokens = 16;
    config.scheduler.chunk_unit = 4;
    Executor executor(session, config);
    Random random(5);
    auto request = make_request(random_tokens(random, 50), 3);
    (void)run_one(executor, request);
    request.num_prompt_logprobs = 2;
    request.return_context_logits = request.return_generation_logits = true;
    const auto result = run_one(executor, request);
    const auto &response = result.responses.front();
    CHECK_EQ(response.prompt_logprobs.size(), 49u);
    CHECK_EQ(response.context_logits->rows, 50);
    CHECK_EQ(response.generation_logits->rows, 3);
    DecodeScratch scratch;
    for (std::size_t place = 0; place < 50; ++place) {
        const std::span<const TokenId> before(request.input_token_ids.data(), place + 1);
        const auto logits = testing::fake_logits(before, vocabulary);
        CHECK(std::equal(logits.begin(), logits.end(), response.context_logits->values.begin() + static_cast<std::ptrdiff_t>(place) * vocabulary));
        if (place == 49) break;
        const auto next = request.input_token_ids[place + 1];
        const auto expected = token_logprobs(logits.data(), vocabulary, next, 2, scratch);
        CHECK_EQ(response.prompt_logprobs[place].token, next);
        CHECK_EQ(response.prompt_logprobs[place].logprob, expected.logprob->logprob);
        CHECK_EQ(response.top_prompt_logprobs[place].size(), 2u);
    }
}

TEST_CASE("drafts of an n-gram index or of a draft engine never change the output, and save steps") {
    DecodingParams params;
    params.sampling.repetition_penalty = 0.2f;  // rewards repetition, so that guesses come true
    const auto request = make_request({3, 4, 5, 3, 4}, 40, params);
    const auto expected = expected_outputs(request, 96)[0].tokens;
    auto plain_session = std::make_shared<FakeSession>(session_info());
    Executor plain(plain_session, default_config());
    CHECK(run_one(plain, request).sequences.at(0).tokens == expected);
    auto config = default_config();
    config.ngram = NgramConfig{4, 2};
    auto session = std::make_shared<FakeSession>(session_info());
    Executor executor(session, config);
    const auto result = run_one(executor, request);
    CHECK(result.sequences.at(0).tokens == expected);
    CHECK(result.metrics->total_draft_tokens > 0);
    if (result.metrics->total_accepted_draft_tokens > 0) CHECK(session->num_steps < plain_session->num_steps);
    executor.check();
}

TEST_CASE("processors and constraints act on their own request") {
    struct OnlyEven : TokenConstraint {
        bool fill(std::uint32_t *allowed) override {
            for (std::int32_t token = 0; token < vocabulary; token += 2) allowed[token / 32] |= 1u << (token % 32);
            return true;
        }
        void accept(TokenId token) override { CHECK(token % 2 == 0); }
        std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<OnlyEven>(*this); }
    };
    auto config = default_config();
    std::size_t batched_calls = 0;
    config.batched_logits_processor = [&](const BatchedLogits &batch) {
        ++batched_calls;
        for (auto *row : batch.rows) row[11] = 1000;
    };
    Executor executor(std::make_shared<FakeSession>(session_info()), config);
    auto even = make_request({1, 2}, 8);
    even.constraint = std::make_shared<OnlyEven>();
    const auto evens = run_one(executor, even);
    CHECK_EQ(evens.sequences.at(0).tokens.size(), 8u);
    for (const auto token : evens.sequences.at(0).tokens) CHECK(token % 2 == 0);
    auto forced = make_request({1, 2}, 3);
    std::vector<std::size_t> lengths;
    forced.logits_processor = [&](RequestId, std::int32_t, std::span<const TokenId> tokens, float *logits, std::int32_t) {
        lengths.push_back(tokens.size());
        logits[5] = 1000;
    };
    CHECK(run_one(executor, forced).sequences.at(0).tokens == std::vector<TokenId>(3, 5));
    CHECK(lengths == (std::vector<std::size_t>{2, 3, 4}));
    CHECK_EQ(batched_calls, 0u);
    auto batched = make_request({1, 2}, 3);
    batched.apply_batched_logits_processor = true;
    CHECK(run_one(executor, batched).sequences.at(0).tokens == std::vector<TokenId>(3, 11));
    auto broken = make_request({1, 2}, 3);
    broken.logits_processor = [](RequestId, std::int32_t, std::span<const TokenId>, float *, std::int32_t) {
        throw std::invalid_argument("my own fault");
    };
    CHECK_EQ(run_one(executor, broken).error, "my own fault");
    executor.check();
}

TEST_CASE("statistics and trace tell what happened, as JSON with the reference names") {
    auto config = default_config();
    config.perf_trace_max_events = 1000;
    config.request_stats_max_iterations = 100;
    config.kv_cache.event_buffer_max_size = 100;
    Executor executor(std::make_shared<FakeSession>(session_info()), config);
    const auto result = run_one(executor, make_request({1, 2, 3, 4, 5}, 6));
    CHECK(result.metrics->first_token >= result.metrics->first_scheduled);
    CHECK(result.metrics->first_scheduled >= result.metrics->arrival);
    CHECK(result.metrics->last_token >= result.metrics->first_token);
    const auto stats = executor.take_iteration_stats();
    CHECK_EQ(stats.size(), 6u);
    CHECK_EQ(stats[0].num_ctx_tokens, 5);
    CHECK_EQ(stats[1].num_gen_tokens, 1);
    const auto json = stats[1].to_json();
    for (const char *name : {"iterLatencyMS", "kvCacheStats", "maxNumBlocks", "inflightBatchingStats", "numGenRequests"})
        CHECK(json.find("\"" + std::string(name) + "\":") != std::string::npos);
    const auto requests = executor.take_request_stats();
    CHECK_EQ(requests.size(), 6u);
    CHECK(requests[1].to_json().find("GENERATION_IN_PROGRESS") != std::string::npos);
    const auto trace = executor.trace_json();
    for (const char *name : {"\"session\"", "\"schedule\"", "\"generation\"", "\"context\"", "\"queued\"", "traceEvents"})
        CHECK(trace.find(name) != std::string::npos);
    CHECK(!executor.take_kv_cache_events().empty());
}

TEST_CASE("work runs between two steps, and tells its caller what it threw") {
    Executor executor(std::make_shared<FakeSession>(session_info()), default_config());
    bool ran = false;
    executor.between_steps([&] { ran = true; });
    CHECK(ran);
    CHECK_THROWS(executor.between_steps([] { throw std::runtime_error("no"); }), std::runtime_error);
    CHECK(run_one(executor, make_request({1}, 2)).error.empty());
}

TEST_CASE("the engine rests while too many responses wait to be fetched") {
    auto session = std::make_shared<FakeSession>(session_info());
    auto config = default_config();
    config.max_pending_responses = 4;
    Executor executor(session, config);
    auto request = make_request({1, 2}, 60);
    request.streaming = true;
    const auto id = executor.enqueue(request);
    while (executor.num_responses_ready() <= 4) std::this_thread::sleep_for(1ms);
    const auto steps = session->num_steps.load();
    std::this_thread::sleep_for(30ms);
    CHECK_EQ(session->num_steps.load(), steps);
    std::map<RequestId, Collected> collected;
    wait_for(executor, {id}, collected);
    CHECK_EQ(collected[id].sequences.at(0).tokens.size(), 60u);
}

int main(int count, char **arguments) { return testing::run(count, arguments); }
