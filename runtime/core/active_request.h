// A request under way: the state of its decoding, and what has not been told to its caller yet.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "beam_search.h"
#include "decoder.h"
#include "logits_rows.h"
#include "trtllm/executor.h"

namespace trtllm::executor {

// One sample of a request.
struct ActiveSequence {
    std::optional<SequenceDecoder> decoder;
    std::unique_ptr<TokenConstraint> constraint;
    std::vector<TokenId> drafts;       // guesses that go with the next step
    Response pending;                  // what the next response will say
    std::int32_t num_generated = 0;
    float cumulative_logprob = 0;
    bool is_finished = false;
};

class ActiveRequest {
public:
    ActiveRequest(RequestId id, Request request, std::int32_t vocab_size, std::int32_t max_seq_len, double now_ms);

    RequestId id() const { return id_; }
    const Request &request() const { return request_; }
    bool is_beam_search() const { return request_.decoding->sampling.beam_width > 1; }
    std::int32_t num_sequences() const;
    bool has_started() const { return !sequences_.empty() || beams_.has_value(); }
    bool is_finished() const { return is_finished_; }
    bool wants_prompt_rows() const { return request_.return_context_logits || request_.num_prompt_logprobs >= 0; }
    bool takes_drafts() const;
    std::int32_t num_generated() const;
    // Prompt and output of a sequence.
    std::vector<ActiveSequence> &sequences() { return sequences_; }
    BeamSearch &beams() { return *beams_; }

    // Logits of prompt tokens [first, first + count), row after row; those seen before are skipped.
    void take_prompt_rows(const float *logits, std::int32_t first, std::int32_t count, DecodeScratch &scratch);
    // The prompt is computed from its beginning again, with other weights.
    void forget_prompt_rows();
    // The prompt is computed: from here on there are sequences, or beams.
    void start();

    // What one sequence did with logits of its newest token and of the drafts after it.
    struct Progress {
        std::vector<TokenId> tokens;    // what the scheduler goes on with: end tokens are among them
        std::int32_t num_accepted = 0;  // drafts that came true
        bool is_finished = false;
    };
    // Chooses from `num_rows` rows, which are changed in place, until a draft is refused or the sequence ends.
    Progress advance(std::int32_t sequence, const LogitsRows &logits, std::int32_t num_rows, DecodeScratch &scratch);
    // False when the best `num_candidates` logits of a sequence's next rows are likely to be enough.
    bool wants_whole_rows(std::int32_t sequence, std::int32_t num_drafts, std::int32_t num_candidates) const;

    struct BeamProgress {
        std::vector<std::int32_t> parents;
        std::vector<TokenId> tokens;
        bool is_finished = false;
    };
    BeamProgress advance_beams(std::span<float *const> rows, DecodeScratch &scratch);

    // Ends what is not finished yet, for another reason than its tokens.
    void finish_all(FinishReason reason);
    void finish_sequence(std::int32_t sequence, FinishReason reason);
    // Moves what is to be told to `responses`.
    void collect(std::vector<Response> &responses);

    // Written by the loop.
    RequestPerfMetrics metrics;
    double queued_since_ms = 0;
    bool is_scheduled = false, is_paused = false;
    std::int64_t num_decode_steps = 0;

private:
    Choice choose(ActiveSequence &sequence, std::int32_t index, const LogitsRows &logits, std::int64_t row,
                  DecodeScratch &scratch);
    void emit(ActiveSequence &sequence, const Choice &choice);
    void run_processor(std::int32_t sequence, std::span<const TokenId> generated, float *logits);
    void collect_beams(std::vector<Response> &responses);
    void add_prompt_outputs(Response &response);
    void keep_logits(Response &response, const float *logits);

    RequestId id_;
    Request request_;
    std::int32_t vocab_size_, max_generated_;
    std::vector<ActiveSequence> sequences_;
    std::optional<BeamSearch> beams_;
    std::vector<std::unique_ptr<TokenConstraint>> beam_constraints_;
    FinishReason beam_finish_ = FinishReason::not_finished;
    std::int32_t num_prompt_rows_ = 0;
    std::vector<TokenLogprob> prompt_logprobs_;
    std::vector<std::vector<TokenLogprob>> top_prompt_logprobs_;
    std::shared_ptr<LogitsMatrix> context_logits_;
    bool told_prompt_ = false, is_finished_ = false;
    std::vector<std::uint32_t> mask_;
    std::vector<TokenId> processor_tokens_;
};

}  // namespace trtllm::executor
