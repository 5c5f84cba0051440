// Every parameter out of its range is named with its value and its range; what is within passes.
#include "decoder.h"
#include "decoding_reference.h"

namespace {

using namespace trtllm::executor;

std::string complaint(const DecodingParams &params) {
    try {
        check_sampling(params, 100, 8);
    } catch (const RequestError &error) {
        CHECK(!error.hint().empty());
        return error.what();
    }
    return "";
}

template <typename Change>
void expect(const std::string &wanted, Change change) {
    DecodingParams params;
    change(params, params.sampling);
    CHECK_EQ(complaint(params), wanted);
}

TEST_CASE("each parameter out of range is named, with its value and its range") {
    using P = DecodingParams;
    using S = SamplingConfig;
    expect("beam_width is 9, must be 1 to 8", [](P &, S &s) { s.beam_width = 9; });
    expect("beam_width is 0, must be 1 to 8", [](P &, S &s) { s.beam_width = 0; });
    expect("beam_width_array[1] is 5, must be 1 to 4 (beam_width)",
           [](P &, S &s) { s.beam_width = 4, s.beam_width_array = {2, 5}; });
    expect("temperature is -1, must be finite and at least 0 (greedy)", [](P &, S &s) { s.temperature = -1; });
    expect("temperature is nan, must be finite and at least 0 (greedy)", [](P &, S &s) { s.temperature = NAN; });
    expect("top_k is -2, must be at least 0 (all tokens)", [](P &, S &s) { s.top_k = -2; });
    expect("top_p is 0, must be above 0 and at most 1", [](P &, S &s) { s.top_p = 0; });
    expect("top_p is 1.5, must be above 0 and at most 1", [](P &, S &s) { s.top_p = 1.5; });
    expect("top_p_min is 0, must be above 0 and at most 1", [](P &, S &s) { s.top_p_min = 0; });
    expect("top_p_decay is 2, must be above 0 and at most 1", [](P &, S &s) { s.top_p_decay = 2; });
    expect("top_p_reset_id is 100, must be a token id, 0 to 99", [](P &, S &s) { s.top_p_reset_id = 100; });
    expect("min_p is -0.5, must be 0 to 1", [](P &, S &s) { s.min_p = -0.5; });
    expect("repetition_penalty is 0, must be finite and above 0", [](P &, S &s) { s.repetition_penalty = 0; });
    expect("presence_penalty is inf, must be finite", [](P &, S &s) { s.presence_penalty = INFINITY; });
    expect("frequency_penalty is inf, must be finite", [](P &, S &s) { s.frequency_penalty = INFINITY; });
    expect("prompt_ignore_length is -1, must be at least 0", [](P &, S &s) { s.prompt_ignore_length = -1; });
    expect("min_tokens is -3, must be at least 0", [](P &, S &s) { s.min_tokens = -3; });
    expect("no_repeat_ngram_size is -1, must be at least 0 (off)", [](P &, S &s) { s.no_repeat_ngram_size = -1; });
    expect("length_penalty is -inf, must be finite", [](P &, S &s) { s.length_penalty = -INFINITY; });
    expect("beam_search_diversity_rate is inf, must be finite",
           [](P &, S &s) { s.beam_search_diversity_rate = INFINITY; });
    expect("end_ids[1] is -1, must be a token id, 0 to 99", [](P &p, S &) { p.end_ids = {4, -1}; });
    expect("bad_words[1] is empty, must be one token or more", [](P &p, S &) { p.bad_words = {{1}, {}}; });
    expect("bad_words[0][2] is 100, must be a token id, 0 to 99", [](P &p, S &) { p.bad_words = {{1, 2, 100}}; });
    expect("stop_words[0][0] is -7, must be a token id, 0 to 99", [](P &p, S &) { p.stop_words = {{-7}}; });
    expect("logit_bias[0] token is 1000, must be a token id, 0 to 99",
           [](P &p, S &) { p.logit_bias = {{1000, 1.0f}}; });
    expect("logit_bias[0] is inf, must be a number below infinity", [](P &p, S &) { p.logit_bias = {{1, INFINITY}}; });
    expect("length of embedding_bias is 3, must be 0 or 100 (the vocabulary)",
           [](P &p, S &) { p.embedding_bias = {1, 2, 3}; });
    expect("embedding_bias[2] is nan, must be a number below infinity",
           [](P &p, S &) { p.embedding_bias.assign(100, 0.0f), p.embedding_bias[2] = NAN; });
    expect("num_logprobs is -2, must be -1 to 100", [](P &p, S &) { p.num_logprobs = -2; });
    expect("num_logprobs is 101, must be -1 to 100", [](P &p, S &) { p.num_logprobs = 101; });
}

TEST_CASE("all that is wrong is reported at once") {
    expect("top_k is -1, must be at least 0 (all tokens); min_tokens is -1, must be at least 0",
           [](DecodingParams &, SamplingConfig &s) { s.top_k = -1, s.min_tokens = -1; });
}

TEST_CASE("defaults and the ends of the ranges pass") {
    expect("", [](DecodingParams &, SamplingConfig &) {});
    expect("", [](DecodingParams &p, SamplingConfig &s) {
        s.beam_width = 8, s.beam_width_array = {1, 8}, s.temperature = 0, s.top_k = 1 << 30, s.top_p_reset_id = 99;
        s.min_p = 1, s.no_repeat_ngram_size = 1 << 30, s.early_stopping = 7, s.length_penalty = -2;
        p.end_ids = {0, 99}, p.logit_bias = {{3, -INFINITY}}, p.embedding_bias.assign(100, -1.0f), p.num_logprobs = 100;
    });
}

}  // namespace

int main(int c, char **v) { return testing::run(c, v); }
