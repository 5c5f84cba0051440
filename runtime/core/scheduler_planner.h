// One step's plan: generation rows first, then chunks of prompts in flight, then new requests, each within what is left
// of rows, tokens and blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler_books.h"
#include "scheduler_capacity.h"

namespace trtllm::executor {

class StepPlanner {
public:
    explicit StepPlanner(RequestBooks &books);

    StepPlan plan(std::int64_t now_ms);
    // Drafts were set for a sequence: they count for the next plan.
    void note_drafts() { has_drafts_ = true; }
    const CapacityBooks &capacity() const { return capacity_; }

private:
    struct Row {
        ScheduledRequest *request;
        std::int32_t sequence;
        std::int32_t num_tokens;
        std::int32_t num_drafts;
        ScheduledSequence &at() const { return request->sequences[sequence]; }
    };

    // Generation.
    void plan_generation();
    bool plan_request(std::size_t place);
    bool plan_generation_row(ScheduledRequest &request, std::int32_t index);
    bool open_siblings(std::size_t place);
    bool open_sibling(ScheduledRequest &request, ScheduledSequence &sequence);
    bool open_by_tokens(const ScheduledRequest &request, ScheduledSequence &sequence);
    bool pause_behind(std::size_t place);
    void pause(ScheduledRequest &request);
    std::int32_t tokens_for_drafts() const;
    std::int32_t next_context_tokens() const;

    // Context.
    void plan_context();
    void collect_context();
    void add_context(ScheduledRequest &request);
    void grow(Row &row, std::int32_t most);
    void grow_in_turns();
    bool unblock_context();

    // The queue.
    void start_waiting();
    bool may_start(const ScheduledRequest &request);
    bool start(ScheduledRequest &request);
    bool open_first(ScheduledRequest &request);

    StepPlan finish();
    PlannedRow describe(const Row &row, bool is_context) const;

    RequestBooks &books_;
    CapacityBooks capacity_;
    const SchedulerConfig &config_;
    std::vector<Row> generation_, context_;  // emptied, not freed, from step to step
    StepPlan plan_;
    std::int64_t now_ms_ = 0;
    std::int32_t budget_ = 0;        // tokens that are left of the step
    std::int32_t draft_budget_ = 0;  // of them, for drafts
    bool has_drafts_ = false;
    std::int64_t last_turn_ = -1;       // arrival of the prompt that got the last unit, under equal progress
    std::int64_t refused_ = -1;         // arrival of the request that the cache had no room for,
    std::int64_t refused_at_ = -1;      // and books_.num_changes() of that time
};

}  // namespace trtllm::executor
