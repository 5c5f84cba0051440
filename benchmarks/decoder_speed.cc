// Times the decoder on one core: the cost of a step for a batch of rows, every row distinct and read from memory.
//
// in runtime/core, on one line:
//     g++ -std=c++20 -O3 -ffp-contract=off -Iinclude -I. -o /tmp/decoder_speed vector_math.cc
//         row_selection.cc sampler.cc logits_adjuster.cc logprobs.cc sequence_decoder.cc
//         ../../benchmarks/decoder_speed.cc
//     /tmp/decoder_speed [repetitions]
//
// Two kinds of logits: "peaked" ones, as of a language model (a few candidates above a normal crowd: the nucleus of 0.9
// holds some tens of tokens), and "flat" ones, a normal distribution alone, whose nucleus of 0.9 is half the
// vocabulary.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "decoder.h"
#include "vector_math.h"

namespace {

using namespace trtllm::executor;

constexpr int kRows = 64;
constexpr int kPrompt = 1000;

struct Setting {
    const char *name;
    DecodingParams params;
};

std::vector<Setting> settings() {
    const auto make = [](const char *name, float temperature, int top_k, float top_p, float min_p) {
        Setting setting{name, {}};
        setting.params.sampling.temperature = temperature;
        setting.params.sampling.top_k = top_k;
        setting.params.sampling.top_p = top_p;
        setting.params.sampling.min_p = min_p;
        return setting;
    };
    std::vector<Setting> all = {
        make("greedy", 0.0f, 0, 1.0f, 0.0f),       make("temperature 0.8", 0.8f, 0, 1.0f, 0.0f),
        make("top_k 50", 0.8f, 50, 1.0f, 0.0f),    make("top_k 1000", 0.8f, 1000, 1.0f, 0.0f),
        make("top_p 0.9", 0.8f, 0, 0.9f, 0.0f),    make("top_k 50, top_p 0.9", 0.8f, 50, 0.9f, 0.0f),
        make("min_p 0.05", 0.8f, 0, 1.0f, 0.05f),  make("top_k 50, penalties", 0.8f, 50, 1.0f, 0.0f),
        make("top_p 0.9, penalties", 0.8f, 0, 0.9f, 0.0f), make("greedy, logprobs 5", 0.0f, 0, 1.0f, 0.0f),
        make("top_p 0.9, logprobs 5", 0.8f, 0, 0.9f, 0.0f),
    };
    for (Setting &setting : all) {
        if (std::string(setting.name).find("penalties") != std::string::npos) {
            setting.params.sampling.repetition_penalty = 1.1f;
            setting.params.sampling.frequency_penalty = 0.2f;
            setting.params.sampling.presence_penalty = 0.1f;
        }
        if (std::string(setting.name).find("logprobs") != std::string::npos) setting.params.num_logprobs = 5;
    }
    return all;
}

std::vector<float> make_logits(int vocab_size, bool peaked) {
    std::mt19937_64 random(7);
    std::normal_distribution<float> crowd(0.0f, peaked ? 2.0f : 1.0f), height(12.0f, 1.5f);
    std::vector<float> logits(static_cast<std::size_t>(kRows) * vocab_size);
    for (float &logit : logits) logit = crowd(random);
    if (peaked)
        for (int row = 0; row < kRows; ++row)
            for (int i = 0; i < 60; ++i)
                logits[static_cast<std::size_t>(row) * vocab_size + random() % vocab_size] = height(random);
    return logits;
}

// Milliseconds of processor time of one step: the least over repetitions, since other work on the machine only adds.
// Logits are written anew before each, outside the time.
double time_step(const Setting &setting, const std::vector<float> &source, int vocab_size, int lanes, int repetitions) {
    const auto params = std::make_shared<const DecodingParams>(setting.params);
    std::mt19937_64 random(3);
    std::vector<TokenId> prompt(kPrompt);
    for (TokenId &token : prompt) token = static_cast<TokenId>(random() % vocab_size);
    std::vector<SequenceDecoder> decoders;
    for (int row = 0; row < kRows; ++row) decoders.emplace_back(params, prompt, row, vocab_size);
    DecodeScratch scratch;
    scratch.most_lanes = lanes;
    std::vector<float> logits(source.size());
    std::vector<double> times;
    for (int repetition = 0; repetition < repetitions; ++repetition) {
        std::copy(source.begin(), source.end(), logits.begin());
        const std::clock_t start = std::clock();
        for (int row = 0; row < kRows; ++row) {
            float *const row_logits = logits.data() + static_cast<std::size_t>(row) * vocab_size;
            decoders[row].accept(decoders[row].next(row_logits, scratch).token);
        }
        times.push_back(1e3 * static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    }
    return *std::min_element(times.begin(), times.end());
}

}  // namespace

int main(int count, char **arguments) {
    const int repetitions = count > 1 ? std::max(1, std::atoi(arguments[1])) : 15;
    for (const int vocab_size : {150000, 49152})
        for (const bool peaked : {true, false}) {
            const std::vector<float> logits = make_logits(vocab_size, peaked);
            std::printf("%d rows of %d %s logits, milliseconds a step\n%-24s", kRows, vocab_size,
                        peaked ? "peaked" : "flat", "");
            for (const int lanes : {16, 8, 4}) std::printf("%7d lanes", vector_math(lanes).lanes);
            std::printf("\n");
            for (const Setting &setting : settings()) {
                std::printf("%-24s", setting.name);
                for (const int lanes : {16, 8, 4})
                    std::printf("%13.2f", time_step(setting, logits, vocab_size, lanes, repetitions));
                std::printf("\n");
                std::fflush(stdout);
            }
        }
    return 0;
}
