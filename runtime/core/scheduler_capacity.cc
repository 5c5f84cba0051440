// Promises of cache blocks.
#include "scheduler_capacity.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace trtllm::executor {

CapacityBooks::CapacityBooks(const RequestBooks &books) : books_(books) {
    for (const CacheGroup &group : books.cache().shape().groups) {
        has_full_group_ |= group.window == 0;
        has_window_group_ |= group.window > 0;
    }
}

bool CapacityBooks::is_promised(const ScheduledRequest &request) const {
    return request.is_beam_search ||
           books_.config().capacity_scheduler_policy != CapacitySchedulerPolicy::max_utilization;
}

// Full blocks that a sequence to come will share with the one that it forks from: with a beam all of them, with the
// prompt only when no window may have let go of them in the meantime. Where every layer has a window, blocks are shared
// for a while only and then replaced by own ones: nothing is saved.
std::int64_t CapacityBooks::sharing(const ScheduledRequest &request) const {
    if (!is_promised(request) || !has_full_group_) return 0;
    std::int32_t shared = has_window_group_ ? 0 : request.prompt_length;
    if (request.is_beam_search && request.is_forked && !request.waits_for_fork()) {
        shared = request.max_length;
        for (const ScheduledSequence &beam : request.sequences) {
            if (beam.is_live()) shared = std::min(shared, beam.num_computed);
        }
    }
    return shared / books_.cache().shape().tokens_per_block;
}

std::int64_t CapacityBooks::outstanding(const ScheduledRequest &request) const {
    std::int64_t blocks = 0;
    std::int32_t num_open = 0;
    bool is_any_open = false;  // a finished one too: it is kept to be forked from
    for (const ScheduledSequence &sequence : request.sequences) {
        is_any_open |= sequence.is_open();
        if (!sequence.is_live() || !sequence.is_open()) continue;
        blocks += std::max(0, request.blocks_per_sequence - books_.cache().held_blocks(sequence.cache_id));
        ++num_open;
    }
    const std::int64_t num_to_come = request.num_slots() - num_open;
    const std::int64_t each = request.blocks_per_sequence - sharing(request);
    blocks += num_to_come * each;
    // The first sequence has nobody to share with.
    if (!is_any_open && num_to_come > 0) blocks += request.blocks_per_sequence - each;
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

bool CapacityBooks::may_promise(const ScheduledRequest &request, std::int32_t num_reusable) const {
    const std::int32_t tokens_per_block = books_.cache().shape().tokens_per_block;
    return outstanding(request) - num_reusable / tokens_per_block <= spare();
}

bool CapacityBooks::can_promise(const ScheduledRequest &request) const { return outstanding(request) <= spare(); }

void CapacityBooks::check() const {
    const bool is_any_promised =
        books_.num_active_beam_searches() > 0 ||
        books_.config().capacity_scheduler_policy != CapacitySchedulerPolicy::max_utilization;
    if (is_any_promised && spare() < 0) throw std::logic_error("more cache blocks are promised than there are");
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
