// The runtime's public face in C++: requests go in, tokens come out, a thread of its own steps the engine.
//
//     auto executor = trtllm::executor::Executor(session, config);
//     auto id = executor.enqueue(request);
//     for (bool done = false; !done;)
//         for (const auto &response : executor.await_responses(std::chrono::seconds(1))) { ... }
//
// Names follow the reference executor API where it has them.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "trtllm/kv_cache.h"
#include "trtllm/sampling.h"
#include "trtllm/scheduling.h"
#include "trtllm/session.h"
#include "trtllm/types.h"

namespace trtllm::executor {

// Restricts the next token of one sequence, as a grammar does. Called from the executor's thread alone.
class TokenConstraint {
public:
    virtual ~TokenConstraint() = default;
    // Sets bit t % 32 of word t / 32 of `allowed` [ceil(V / 32)] for every token that may come next.
    // Returns false when every token may.
    virtual bool fill(std::uint32_t *allowed) = 0;
    virtual void accept(TokenId token) = 0;
    // The same state for another sequence of the request.
    virtual std::unique_ptr<TokenConstraint> clone() const = 0;
};

// Changes one sequence's logits [V] in place before anything else does. `tokens` are prompt and output so far.
using LogitsProcessor = std::function<void(RequestId id, std::int32_t sequence, std::span<const TokenId> tokens,
                                           float *logits, std::int32_t vocab_size)>;

// The same for all sequences of a step that asked for it, in one call: row i of `rows` belongs to `ids[i]`.
struct BatchedLogits {
    std::vector<RequestId> ids;
    std::vector<std::int32_t> sequences;
    std::vector<std::span<const TokenId>> tokens;
    std::vector<float *> rows;
    std::int32_t vocab_size = 0;
};
using BatchedLogitsProcessor = std::function<void(const BatchedLogits &)>;

// Guesses the next tokens of sequences; see NgramConfig and DraftModelConfig for those that come with the executor.
class DraftProposer {
public:
    struct Query {
        SequenceId sequence = 0;
        std::span<const TokenId> tokens;  // prompt and output
        std::int32_t max_drafts = 0;
    };
    virtual ~DraftProposer() = default;
    // One list of guesses for each query; an empty one is fine.
    virtual std::vector<std::vector<TokenId>> propose(std::span<const Query> queries) = 0;
    // The sequence is gone.
    virtual void forget(SequenceId sequence) = 0;
};

// Prompt lookup: what followed the last time these tokens were seen.
struct NgramConfig {
    std::int32_t max_draft_len = 4;
    std::int32_t max_matching_ngram_size = 3;
};

struct Request {
    std::vector<TokenId> input_token_ids;
    std::int32_t max_tokens = 32;
    bool streaming = false;            // responses as tokens come; otherwise one for each sequence at its end
    std::shared_ptr<const DecodingParams> decoding = std::make_shared<DecodingParams>();
    std::int32_t num_return_sequences = 1;  // samples; with beam search the number of hypotheses, at most beam_width
    std::int32_t num_prompt_logprobs = -1;  // as DecodingParams::num_logprobs, for the prompt's own tokens
    bool return_context_logits = false;
    bool return_generation_logits = false;
    float priority = 0.5f;
    std::optional<std::int64_t> allotted_time_ms;  // from enqueue on; then it ends with what it has
    RetentionConfig retention;
    CacheKey cache_key;
    LogitsProcessor logits_processor;
    bool apply_batched_logits_processor = false;
    std::shared_ptr<const TokenConstraint> constraint;  // cloned for each sequence
    bool allow_drafts = true;
};

enum class FinishReason { not_finished, end_id, stop_words, length, timed_out, cancelled, stopped };

// Milliseconds of the executor's own steady clock.
struct RequestPerfMetrics {
    double arrival = 0, first_scheduled = 0, first_token = 0, last_token = 0;
    std::int64_t first_iter = 0, last_iter = 0;
    std::int32_t num_computed_prompt_tokens = 0, num_reused_tokens = 0;
    std::int32_t num_total_allocated_blocks = 0, num_new_allocated_blocks = 0;
    std::int32_t num_reused_blocks = 0, num_missed_blocks = 0;
    std::int32_t num_pauses = 0;
    std::int64_t total_draft_tokens = 0, total_accepted_draft_tokens = 0;
};

struct LogitsMatrix {
    std::int64_t rows = 0, columns = 0;
    std::vector<float> values;
};

// News of one sequence.
struct Response {
    RequestId request_id = 0;
    std::int32_t sequence_index = 0;
    std::vector<TokenId> token_ids;            // new since the sequence's last response; an end token is not among them
    std::vector<TokenLogprob> logprobs;        // of them, when asked for
    std::vector<std::vector<TokenLogprob>> top_logprobs;
    float cumulative_logprob = 0;              // of all the sequence's tokens so far
    FinishReason finish_reason = FinishReason::not_finished;
    std::optional<TokenId> stop_token;         // the end token that ended it
    std::int32_t stop_word_length = 0;         // tokens at the end of the sequence that are the stop word
    bool is_sequence_final = false;
    bool is_final = false;                     // the request's last response
    std::string error, error_hint;             // not empty: the request failed, and this is its last response
    std::vector<TokenLogprob> prompt_logprobs;               // with sequence 0's first response; entry i is prompt token i + 1
    std::vector<std::vector<TokenLogprob>> top_prompt_logprobs;
    std::shared_ptr<LogitsMatrix> context_logits;            // [prompt, V], with sequence 0's first response
    std::shared_ptr<LogitsMatrix> generation_logits;         // [tokens, V], with the sequence's last response
    std::optional<RequestPerfMetrics> perf_metrics;          // with the last response
};

struct SpecDecodingStats {
    std::int64_t num_draft_tokens = 0, num_accepted_tokens = 0, num_requests_with_draft_tokens = 0;
    double acceptance_length = 0, iter_latency_ms = 0, draft_overhead = 0;
};

// One step. Reference names (iterLatencyMS, ...) are those of to_json().
struct IterationStats {
    std::int64_t timestamp_ms = 0;  // since the epoch
    std::int64_t iter = 0;
    double iter_latency_ms = 0, session_latency_ms = 0, new_active_requests_queue_latency_ms = 0;
    std::int32_t num_new_active_requests = 0, num_active_requests = 0, num_queued_requests = 0, num_completed_requests = 0;
    std::int32_t max_num_active_requests = 0, max_batch_size_static = 0, max_num_tokens_static = 0;
    std::int32_t num_scheduled_requests = 0, num_context_requests = 0, num_gen_requests = 0, num_paused_requests = 0;
    std::int32_t num_ctx_tokens = 0, num_gen_tokens = 0;
    double avg_num_decoded_tokens_per_iter = 0;
    std::int64_t cpu_mem_usage = 0;  // bytes resident
    KvCacheStats kv_cache;
    SpecDecodingStats spec_decoding;
    std::string to_json() const;
};

struct RequestStats {
    RequestId id = 0;
    std::string stage;  // QUEUED, CONTEXT_IN_PROGRESS, GENERATION_IN_PROGRESS, GENERATION_COMPLETE
    std::int32_t context_prefill_position = 0, num_generated_tokens = 0;
    double avg_num_decoded_tokens_per_iter = 0;
    bool scheduled = false, paused = false;
    SequenceCacheStats cache;
};

// Requests of one step.
struct RequestStatsPerIteration {
    std::int64_t iter = 0;
    std::vector<RequestStats> request_stats;
    std::string to_json() const;
};

std::string to_json(const KvCacheEvent &event);

struct ExecutorConfig {
    SchedulerConfig scheduler;  // zeros of max_* are filled in from the session
    KvCacheOptions kv_cache;
    std::int32_t max_beam_width = 1;
    std::int64_t iter_stats_max_iterations = 1000;
    std::int64_t request_stats_max_iterations = 0;
    std::int64_t perf_trace_max_events = 0;  // 0: no trace
    std::int64_t max_pending_responses = 65536;  // while more of them wait to be fetched, the engine rests
    BatchedLogitsProcessor batched_logits_processor;
    std::optional<NgramConfig> ngram;
    std::shared_ptr<DraftProposer> draft_proposer;  // instead of ngram
    std::int32_t max_draft_len = 0;                 // of draft_proposer
};

enum class ShutdownMode { finish, cancel };

// What becomes of requests under way when the engine's weights change: they end before, or their cache is computed anew.
enum class InFlight { finish, recompute };

class Executor {
public:
    Executor(std::shared_ptr<Session> session, ExecutorConfig config);
    ~Executor();  // cancels what is under way
    Executor(const Executor &) = delete;
    Executor &operator=(const Executor &) = delete;

    // Checks a request and queues it. Throws RequestError, at once and for this caller alone, when it can never be
    // served as it stands, when the queue is full, or after shutdown.
    RequestId enqueue(Request request);
    // Blocks until there is a response, until the timeout, or until shutdown has delivered the last one. In order.
    std::vector<Response> await_responses(std::chrono::milliseconds timeout);
    // Responses that wait to be fetched.
    std::size_t num_responses_ready() const;
    // Ends a request as it stands; its last response says so. Unknown and finished ids are ignored.
    void cancel(RequestId id);
    // Ends one sequence, because its text contains a stop string. Like cancel(), with FinishReason::stopped.
    void stop_sequence(RequestId id, std::int32_t sequence_index);

    std::vector<IterationStats> take_iteration_stats();       // since the last call
    std::vector<RequestStatsPerIteration> take_request_stats();
    std::vector<KvCacheEvent> take_kv_cache_events();
    // The newest events of the executor's work as Chrome trace JSON, which Perfetto shows.
    std::string trace_json() const;
    bool can_enqueue_requests() const;
    const SessionInfo &session_info() const;
    const ExecutorConfig &config() const;

    // Runs `work` on the executor's thread between two steps, and returns when it is done; rethrows what it throws.
    void between_steps(const std::function<void()> &work);
    // Changes what the session computes with: runs `work` on the executor's thread between two steps, forgets the cache
    // that is kept for reuse, and returns. No step ever sees a cache of the old weights with the new ones.
    // finish: requests under way end first, and those that wait go on waiting.
    // recompute: requests under way go on with the tokens they have, whose cache is computed anew; beam searches, which
    // cannot be interrupted, end first.
    // Rethrows what `work` throws; then everything goes on as it was.
    void exchange(const std::function<void()> &work, InFlight in_flight);
    // Forgets the cache that is kept for reuse (the weights have changed).
    void clear_reusable_cache();
    // Proves that the books balance; when idle, that every block came back. Throws std::logic_error.
    void check();

    // No request is taken from now on. Returns when all have finished or are cancelled and the thread has ended.
    void shutdown(ShutdownMode mode = ShutdownMode::cancel);

private:
    class Loop;
    std::unique_ptr<Loop> loop_;
};

}  // namespace trtllm::executor
