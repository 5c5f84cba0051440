// The runtime from C++, without Python: an engine of thirty lines (letter pairs of a text), served by the executor.
//
//     cmake -S runtime/core -B build/core && cmake --build build/core && build/core/bigram_engine
#include <cmath>
#include <iostream>
#include <map>
#include <string>

#include "trtllm/executor.h"

namespace ex = trtllm::executor;

// How often each letter follows each other one. Such a model needs no cache, so it leaves the block tables unread; a real
// engine stores keys and values at the blocks they name.
class BigramSession : public ex::Session {
public:
    explicit BigramSession(const std::string &text) : counts_(vocabulary * vocabulary, 0.01f) {
        for (std::size_t place = 1; place < text.size(); ++place)
            counts_[static_cast<unsigned char>(text[place - 1]) * vocabulary + static_cast<unsigned char>(text[place])] += 1;
        info_.vocab_size = vocabulary;
        info_.max_seq_len = 256;
        info_.max_batch_size = 8;
        info_.max_num_tokens = 512;
        info_.cache.num_blocks = 64;
    }

    const ex::SessionInfo &info() const override { return info_; }

    float *step(const ex::StepBatch &batch) override {
        logits_.clear();
        for (const auto place : batch.logits_indices) {
            const auto letter = static_cast<std::size_t>(batch.tokens[static_cast<std::size_t>(place)]);
            for (std::size_t next = 0; next < vocabulary; ++next)
                logits_.push_back(std::log(counts_[letter * vocabulary + next]));
        }
        return logits_.data();
    }

private:
    static constexpr std::size_t vocabulary = 128;
    std::vector<float> counts_, logits_;
    ex::SessionInfo info_;
};

int main() {
    const std::string text = "the quick brown fox jumps over the lazy dog and then the other fox thanks the dog. ";
    ex::Executor executor(std::make_shared<BigramSession>(text), ex::ExecutorConfig{});
    std::map<ex::RequestId, std::string> outputs;
    for (const std::string prompt : {"the ", "a fox ", "dogs "}) {
        ex::DecodingParams params;
        params.sampling.top_k = 3;
        params.sampling.seed = 7;
        params.end_ids = {'.'};
        ex::Request request;
        request.input_token_ids.assign(prompt.begin(), prompt.end());
        request.max_tokens = 40;
        request.streaming = true;
        request.decoding = std::make_shared<ex::DecodingParams>(params);
        outputs[executor.enqueue(std::move(request))] = prompt;
    }
    for (std::size_t finished = 0; finished < outputs.size();)
        for (const auto &response : executor.await_responses(std::chrono::seconds(1))) {
            if (!response.error.empty()) std::cerr << response.error << "\n  " << response.error_hint << "\n";
            outputs[response.request_id].append(response.token_ids.begin(), response.token_ids.end());
            finished += response.is_final;
        }
    for (const auto &[id, output] : outputs) std::cout << id << ": " << output << "\n";
    executor.shutdown(ex::ShutdownMode::finish);
}
