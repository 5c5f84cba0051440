// What scheduler, cache manager, decoder and executor cost a step, with an engine that computes nothing.
//
//     g++ -std=c++20 -O3 -Iruntime/core/include -Iruntime/core benchmarks/executor_overhead.cc runtime/core/*.cc -pthread
//     ./a.out [requests] [vocabulary]
//
// Prints microseconds of steps that decode all requests: the whole step less the session's call. Greedy decoding reads
// every logit, so a large vocabulary shows the decoder's share and a small one everything else.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <vector>

#include "trtllm/executor.h"

namespace ex = trtllm::executor;

class NullSession : public ex::Session {
public:
    NullSession(std::int32_t rows, std::int32_t vocabulary) : logits_(static_cast<std::size_t>(rows) * vocabulary) {
        info_.vocab_size = vocabulary;
        info_.max_seq_len = 1024;
        info_.max_batch_size = rows;
        info_.max_num_tokens = 8192;
        info_.cache.num_blocks = rows * 32;
        for (std::size_t place = 0; place < logits_.size(); ++place)
            logits_[place] = static_cast<float>((place * 2654435761u) % 65536) / 65536.0f;
    }
    const ex::SessionInfo &info() const override { return info_; }
    float *step(const ex::StepBatch &) override { return logits_.data(); }

private:
    ex::SessionInfo info_;
    std::vector<float> logits_;
};

int main(int count, char **arguments) {
    const auto requests = count > 1 ? std::atoi(arguments[1]) : 256;
    const auto vocabulary = count > 2 ? std::atoi(arguments[2]) : 1024;
    ex::ExecutorConfig config;
    config.scheduler.max_batch_size = requests;
    config.iter_stats_max_iterations = 10000;
    ex::Executor executor(std::make_shared<NullSession>(requests, vocabulary), config);
    for (int number = 0; number < requests; ++number) {
        ex::Request request;
        for (int token = 0; token < 100; ++token) request.input_token_ids.push_back((number * 31 + token * 7) % vocabulary);
        request.max_tokens = 600;
        request.streaming = true;
        executor.enqueue(std::move(request));
    }
    for (int finished = 0; finished < requests;)
        for (const auto &response : executor.await_responses(std::chrono::seconds(1))) finished += response.is_final;
    std::vector<double> microseconds;
    for (const auto &stats : executor.take_iteration_stats())
        if (stats.num_ctx_tokens == 0 && stats.num_gen_requests == requests)
            microseconds.push_back((stats.iter_latency_ms - stats.session_latency_ms) * 1000);
    std::sort(microseconds.begin(), microseconds.end());
    const auto at = [&](double share) { return microseconds[static_cast<std::size_t>(share * (microseconds.size() - 1))]; };
    std::cout << requests << " requests, vocabulary " << vocabulary << ", " << microseconds.size()
              << " steps: median " << at(0.5) << " us, p90 " << at(0.9) << " us, p99 " << at(0.99) << " us\n";
}
