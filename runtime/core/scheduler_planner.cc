// The plan as a whole, and its context rows.
#include "scheduler_planner.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "scheduler_chunks.h"

namespace trtllm::executor {

StepPlanner::StepPlanner(RequestBooks &books) : books_(books), capacity_(books), config_(books.config()) {}

StepPlan StepPlanner::plan(std::int64_t now_ms) {
    if (books_.num_rows_in_step() > 0) throw std::logic_error("the rows of the last plan are not all answered");
    now_ms_ = now_ms;
    budget_ = config_.max_num_tokens;
    generation_.clear();
    context_.clear();
    plan_ = StepPlan();
    const bool was_idle = books_.active().empty();
    plan_generation();
    plan_context();
    const bool may_start_any =
        config_.capacity_scheduler_policy != CapacitySchedulerPolicy::static_batch || was_idle;
    // What was paused just now would only take back what it was paused for.
    if (may_start_any && (plan_.paused.empty() || books_.active().empty())) start_waiting();
    if (config_.context_chunking_policy == ContextChunkingPolicy::equal_progress) grow_in_turns();
    return finish();
}

// Prompts in flight take from the budget in order of importance, or in turn.
void StepPlanner::plan_context() {
    do {
        collect_context();
        const bool in_turns = config_.context_chunking_policy == ContextChunkingPolicy::equal_progress;
        for (Row &row : context_) grow(row, in_turns ? next_turn(config_, 0) : config_.max_num_tokens);
    } while (unblock_context());
}

void StepPlanner::collect_context() {
    context_.clear();
    for (ScheduledRequest *request : books_.active()) add_context(*request);
    if (config_.context_chunking_policy != ContextChunkingPolicy::equal_progress) return;
    const auto next = std::find_if(context_.begin(), context_.end(),
                                   [&](const Row &row) { return row.request->arrival == last_turn_; });
    if (next != context_.end()) std::rotate(context_.begin(), next + 1, context_.end());
}

void StepPlanner::add_context(ScheduledRequest &request) {
    for (std::size_t i = 0; i < request.sequences.size(); ++i) {
        if (request.sequences[i].is_catching_up()) context_.push_back({&request, static_cast<std::int32_t>(i), 0, 0});
    }
}

// Makes the row's chunk as long as the budget and the cache allow, at most `most` tokens where it may be cut.
void StepPlanner::grow(Row &row, std::int32_t most) {
    const ScheduledSequence &sequence = row.at();
    const std::int32_t remaining = sequence.catch_up_end - sequence.num_computed;
    const std::int32_t budget = budget_ + row.num_tokens;
    const std::int32_t limit = may_cut(config_, remaining) ? std::min(most, budget) : budget;
    std::int32_t size = largest_chunk(config_, remaining, limit);
    while (size > row.num_tokens && !capacity_.reserve(*row.request, sequence, sequence.num_computed + size, now_ms_)) {
        size = smaller_chunk(config_, remaining, size);
    }
    if (size <= row.num_tokens) return;
    budget_ -= size - row.num_tokens;
    row.num_tokens = size;
    last_turn_ = row.request->arrival;
}

void StepPlanner::grow_in_turns() {
    for (bool grown = true; grown && budget_ > 0;) {
        grown = false;
        for (Row &row : context_) {
            const std::int32_t before = row.num_tokens;
            if (before > 0) grow(row, next_turn(config_, before));
            grown |= row.num_tokens > before;
        }
    }
}

// Prompts that hold the whole cache between them, and none has room to go on: the least important one gives way.
bool StepPlanner::unblock_context() {
    if (!generation_.empty() || context_.empty()) return false;
    if (std::any_of(context_.begin(), context_.end(), [](const Row &row) { return row.num_tokens > 0; })) return false;
    return pause_behind(0);
}

StepPlan StepPlanner::finish() {
    plan_.rows.reserve(context_.size() + generation_.size());
    for (const Row &row : context_) {
        if (row.num_tokens == 0) continue;
        plan_.rows.push_back(describe(row, true));
        plan_.num_context_tokens += row.num_tokens;
    }
    for (const Row &row : generation_) {
        plan_.rows.push_back(describe(row, false));
        plan_.num_generation_tokens += row.num_tokens;
    }
    for (const Row &row : context_) {
        if (row.num_tokens > 0) books_.plan_row(row.at());
    }
    for (const Row &row : generation_) books_.plan_row(row.at());
    return std::move(plan_);
}

PlannedRow StepPlanner::describe(const Row &row, bool is_context) const {
    const ScheduledSequence &sequence = row.at();
    PlannedRow planned;
    planned.request = row.request->id;
    planned.sequence = row.sequence;
    planned.cache_id = sequence.cache_id;
    planned.past_length = sequence.num_computed;
    planned.num_tokens = row.num_tokens;
    planned.num_draft_tokens = row.num_drafts;
    planned.is_context = is_context;
    planned.reaches_end = sequence.num_computed + row.num_tokens - row.num_drafts == sequence.size();
    return planned;
}

}  // namespace trtllm::executor
