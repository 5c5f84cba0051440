// Promises of cache blocks.
#include "scheduler_capacity.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace trtllm::executor {

CapacityBooks::CapacityBooks(const RequestBooks &books) : books_(books) {
    for (const CacheGroup &group : books.cache().shape().groups) {
        const bool is_full = group.window == 0 || group.window >= books.config().max_seq_len;
        has_full_group_ |= is_full;
        has_window_group_ |= !is_full;
    }
}

bool CapacityBooks::is_promised(const ScheduledRequest &request) const {
    return request.is_beam_search ||
           books_.config().capacity_scheduler_policy != CapacitySchedulerPolicy::max_utilization;
}

// Full blocks that a sequence to come will share with the one that it forks from. A window may have let go of them.
std::int64_t CapacityBooks::sharing(const ScheduledRequest &request) const {
    if (has_window_group_ || !is_promised(request)) return 0;
    std::int32_t shared = request.prompt_length;
    if (request.is_beam_search && request.is_forked && !request.waits_for_fork()) {
        std::int32_t computed = request.max_length;
        for (const ScheduledSequence &sequence : request.sequences) {
            if (sequence.is_live()) computed = std::min(computed, sequence.num_computed);
        }
        shared = std::max(shared, computed);
    }
    return shared / books_.cache().shape().tokens_per_block;
}

// Without a group that sees everything, a window trades shared blocks for own ones as it slides: what is held now says
// nothing of what is still to be taken, so it is not deducted.
std::int64_t CapacityBooks::outstanding(const ScheduledRequest &request) const {
    std::int64_t blocks = 0;
    std::int32_t num_open = 0;
    for (const ScheduledSequence &sequence : request.sequences) {
        if (!sequence.is_live() || !sequence.is_open()) continue;
        const std::int32_t held = has_full_group_ ? books_.cache().held_blocks(sequence.cache_id) : 0;
        blocks += std::max(0, request.blocks_per_sequence - held);
        ++num_open;
    }
    const std::int64_t num_to_come = request.num_slots() - num_open;
    const std::int64_t each = request.blocks_per_sequence - sharing(request);
    blocks += num_to_come * each;
    // The first sequence has nobody to share with.
    if (num_open == 0 && num_to_come > 0) blocks += request.blocks_per_sequence - each;
    return blocks;
}

std::int64_t CapacityBooks::spare() const {
    std::int64_t spare = books_.cache().num_available_blocks();
    for (const ScheduledRequest *request : books_.active()) {
        if (is_promised(*request)) spare -= outstanding(*request);
    }
    return spare;
}

bool CapacityBooks::could_ever_hold(const ScheduledRequest &request) const {
    return outstanding(request) <= books_.cache().num_blocks();
}

std::int64_t CapacityBooks::total_promised_slots() const {
    std::int64_t blocks = 0;
    for (const ScheduledRequest *request : books_.active()) {
        if (!is_promised(*request)) continue;
        blocks += static_cast<std::int64_t>(request->num_slots()) * request->blocks_per_sequence;
    }
    return blocks;
}

bool CapacityBooks::may_promise(const ScheduledRequest &request, std::int32_t num_reusable) const {
    if (!has_full_group_) return can_promise(request);
    const std::int32_t tokens_per_block = books_.cache().shape().tokens_per_block;
    return outstanding(request) - num_reusable / tokens_per_block <= spare();
}

bool CapacityBooks::can_promise(const ScheduledRequest &request) const {
    const bool all_are_promised =
        books_.config().capacity_scheduler_policy != CapacitySchedulerPolicy::max_utilization;
    if (has_full_group_ || !all_are_promised) return outstanding(request) <= spare();
    const std::int64_t most = static_cast<std::int64_t>(request.num_slots()) * request.blocks_per_sequence;
    return total_promised_slots() + most <= books_.cache().num_blocks();
}

void CapacityBooks::check() const {
    if (books_.config().capacity_scheduler_policy == CapacitySchedulerPolicy::max_utilization &&
        books_.num_active_beam_searches() == 0) {
        return;
    }
    const bool holds = has_full_group_ ? spare() >= 0 : total_promised_slots() <= books_.cache().num_blocks();
    if (!holds) throw std::logic_error("more cache blocks are promised than there are");
}

bool CapacityBooks::reserve(const ScheduledRequest &request, const ScheduledSequence &sequence, std::int32_t num_tokens,
                            std::int64_t now_ms) const {
    const bool promised = is_promised(request);
    if (!promised && books_.num_active_beam_searches() > 0) {
        const std::int32_t missing = books_.cache().missing_blocks(sequence.cache_id, num_tokens);
        if (missing > 0 && missing > spare()) return false;
    }
    const bool reserved = books_.cache().reserve(sequence.cache_id, num_tokens, now_ms);
    if (!reserved && promised) {
        throw std::logic_error("the cache has no room for request " + std::to_string(request.id) +
                               ", to which it was promised");
    }
    return reserved;
}

}  // namespace trtllm::executor
