// Who computes what in the next step. Pure arithmetic: no device, no clock, no threads.
//
// There is no prefill mode and no decode mode: each sequence has tokens and computed tokens, and a step lets the second
// catch up with the first, within the budgets of rows, tokens and cache blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv_cache_manager.h"
#include "trtllm/scheduling.h"
#include "trtllm/types.h"

namespace trtllm::executor {

class RequestBooks;
class StepPlanner;

struct SchedulerRequest {
    RequestId id = 0;
    std::vector<TokenId> prompt;
    std::int32_t max_tokens = 1;     // generated tokens of each sequence
    std::int32_t num_sequences = 1;  // after the prompt: samples, or the widest beam
    bool is_beam_search = false;     // its sequences advance together, and it is never paused
    float priority = 0.5f;           // 0 .. 1; higher goes first, equal ones in order of arrival
    SequenceOptions cache;
};

struct PlannedRow {
    RequestId request = 0;
    std::int32_t sequence = 0;         // index among the request's sequences
    SequenceId cache_id = 0;           // the sequence's number in the cache manager
    std::int32_t past_length = 0;      // tokens in the cache already
    std::int32_t num_tokens = 0;       // tokens to compute, drafts included
    std::int32_t num_draft_tokens = 0; // of them, at the end: guesses that logits will confirm or not
    bool is_context = false;           // prompt, or what is computed again after a pause
    bool reaches_end = false;          // computes the newest token, so that its logits choose the next one
};

struct StepPlan {
    std::vector<PlannedRow> rows;  // context rows first, then generation rows
    std::vector<RequestId> started;   // left the queue for the first time
    std::vector<RequestId> resumed;   // left the queue again after a pause
    std::vector<RequestId> paused;    // lost their cache in this call
    std::int32_t num_context_tokens = 0;
    std::int32_t num_generation_tokens = 0;
};

enum class RequestStage { queued, context_in_progress, generation_in_progress };

class Scheduler {
public:
    // Throws RequestError when the configuration contradicts itself or the cache's shape.
    Scheduler(const SchedulerConfig &config, KvCacheManager &cache);
    ~Scheduler();

    // Puts a request into the queue. Throws RequestError, and nothing changes, when the queue is full, the id is known,
    // the prompt is empty or leaves no room for one token below max_seq_len (to which max_tokens is capped), when it
    // has more sequences than a step has rows or tokens, when the whole cache could not hold it, or when chunking is
    // off and the prompt exceeds max_num_tokens.
    void add(SchedulerRequest request);

    // Plans a step and books its blocks. Every planned row must be answered by complete_row() (or its request be
    // removed) before the next call. An empty plan with has_work() true cannot happen, unless every live sequence waits
    // for append(), start_sequences() or reorder(), or has max_tokens and waits for its end.
    StepPlan schedule(std::int64_t now_ms);

    // The row's first `num_valid` tokens are computed: all of them, or without the drafts that were refused.
    void complete_row(const PlannedRow &row, std::int32_t num_valid, std::int64_t now_ms);

    // The newest tokens of a sequence, chosen from the logits of a row that reached the end; drafts that were accepted
    // are among them. At the prompt's end a request of several sequences calls start_sequences instead.
    void append(RequestId id, std::int32_t sequence, std::span<const TokenId> tokens);
    // The first token of each of num_sequences sequences (beam search may start fewer): they fork from the prompt.
    void start_sequences(RequestId id, std::span<const TokenId> first_tokens);
    // Beam search: sequence i goes on from sequence parents[i] with tokens[i]. The number of beams may change.
    void reorder(RequestId id, std::span<const std::int32_t> parents, std::span<const TokenId> tokens,
                 std::int64_t now_ms);

    // Guesses for the next tokens of a sequence that waits for exactly one token to be computed; they count for the
    // next schedule() only, which may take fewer of them (none when budgets are short).
    void set_drafts(RequestId id, std::int32_t sequence, std::span<const TokenId> drafts);

    // A sequence has ended: it gets no more rows and its cache is let go.
    void finish_sequence(RequestId id, std::int32_t sequence, std::int64_t now_ms);
    // The request has ended, was cancelled or has failed, in whatever stage it is; unknown ids are ignored.
    // With `keep` false its blocks are not kept for reuse (their content is unknown after a failed step).
    void remove(RequestId id, std::int64_t now_ms, bool keep = true);

    // While held, no request leaves the queue for the first time; those that were paused do.
    void hold(bool holds);
    // Every request in flight goes back to the queue, and nothing it had computed is kept for reuse. No beam search may
    // be in flight.
    struct Restart {
        std::vector<RequestId> restarted;
        std::vector<RequestId> too_large;  // of them: they can never start again
    };
    Restart restart_all(std::int64_t now_ms);

    bool has_work() const;
    bool contains(RequestId id) const;
    RequestStage stage(RequestId id) const;
    // All tokens of a sequence: prompt and output.
    std::span<const TokenId> tokens(RequestId id, std::int32_t sequence = 0) const;
    std::int32_t num_sequences(RequestId id) const;
    // Sequences that wait for exactly one token to be computed: those that may get drafts.
    struct SequenceRef {
        RequestId request;
        std::int32_t sequence;
    };
    std::vector<SequenceRef> generating() const;

    std::int64_t num_queued() const;    // not started, or paused
    std::int64_t num_active() const;    // requests in flight
    std::int64_t num_paused() const;    // of the queued ones
    std::int64_t num_active_beam_searches() const;
    const SchedulerConfig &config() const;

    // Proves that the books balance (with the cache's): budgets kept, every running sequence has its blocks, no queued
    // one has any. Throws std::logic_error.
    void check() const;

private:
    std::unique_ptr<RequestBooks> books_;
    std::unique_ptr<StepPlanner> planner_;
};

}  // namespace trtllm::executor
