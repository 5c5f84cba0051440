// Who leaves the queue: the first that policy, budgets and the cache allow, and nobody before those ahead of it.
#include <algorithm>

#include "scheduler_chunks.h"
#include "scheduler_planner.h"
#include "scheduler_prefix.h"

namespace trtllm::executor {

void StepPlanner::start_waiting() {
    while (budget_ > 0) {
        ScheduledRequest *request = books_.next_waiting();
        if (request == nullptr || !may_start(*request) || !start(*request)) return;
    }
}

// Slots, and whether anything has changed since the cache had no room for it. Every sequence in flight has a token of
// every step for sure, so that no more of them are let in than a step has tokens.
bool StepPlanner::may_start(const ScheduledRequest &request) {
    const std::int32_t most = std::min(config_.max_batch_size, config_.max_num_tokens);
    if (books_.num_slots_taken() + request.num_slots() > most) return false;
    return request.arrival != refused_ || books_.num_changes() != refused_at_;
}

bool StepPlanner::start(ScheduledRequest &request) {
    const std::vector<TokenId> &tokens = request.sequences.front().tokens;
    const std::int32_t reusable =
        std::min({books_.cache().count_reusable_tokens(tokens, request.cache.key), request.cache.max_reuse_tokens,
                  static_cast<std::int32_t>(tokens.size()) - 1});
    const std::int32_t remaining = static_cast<std::int32_t>(tokens.size()) - reusable;
    if (largest_chunk(config_, remaining, budget_) == 0) return false;
    const bool may_wait = config_.wait_for_shared_prefix && books_.cache().options().enable_block_reuse &&
                          config_.capacity_scheduler_policy != CapacitySchedulerPolicy::static_batch;
    if (may_wait && is_prefix_under_way(books_, request, reusable)) return false;
    if ((capacity_.is_promised(request) && !capacity_.may_promise(request, reusable)) || !open_first(request)) {
        refused_ = request.arrival;
        refused_at_ = books_.num_changes();
        return false;
    }
    (request.was_paused ? plan_.resumed : plan_.started).push_back(request.id);
    books_.activate(request);
    return true;
}

// Opens the first live sequence and plans its first chunk; its siblings follow when they can fork from it.
bool StepPlanner::open_first(ScheduledRequest &request) {
    auto &sequences = request.sequences;
    const auto first =
        std::find_if(sequences.begin(), sequences.end(), [](const auto &item) { return item.is_live(); });
    if (!open_by_tokens(request, *first)) return false;
    if (!capacity_.is_promised(request) || capacity_.can_promise(request)) {
        const bool in_turns = config_.context_chunking_policy == ContextChunkingPolicy::equal_progress;
        Row row{&request, static_cast<std::int32_t>(first - sequences.begin()), 0, 0};
        grow(row, in_turns ? next_turn(config_, 0) : config_.max_num_tokens);
        if (row.num_tokens > 0) {
            context_.push_back(row);
            return true;
        }
    }
    books_.close(*first, now_ms_);
    return false;
}

}  // namespace trtllm::executor
