// How many cache blocks requests may still take, and whether one more can be promised that it ends.
//
// A promise covers everything that a request's sequences will ever hold, less what they hold already. As long as all
// promises together fit into the blocks that are available, no reserve() and no fork() of a promised request can fail:
// each of them takes blocks from the available ones and from the promise alike.
#pragma once

#include <cstdint>

#include "scheduler_books.h"

namespace trtllm::executor {

class CapacityBooks {
public:
    explicit CapacityBooks(const RequestBooks &books);

    // Guaranteed to run to its end: every request, or beam searches alone under max_utilization.
    bool is_promised(const ScheduledRequest &request) const;
    // Most blocks that the request may take from now on, as it stands.
    std::int64_t outstanding(const ScheduledRequest &request) const;
    // Blocks that are available and promised to nobody.
    std::int64_t spare() const;
    // Whether an empty cache could hold the request to its end.
    bool could_ever_hold(const ScheduledRequest &request) const;
    // Whether a waiting request, whose first `num_reusable` tokens are in the cache, might be promised its end.
    bool may_promise(const ScheduledRequest &request, std::int32_t num_reusable) const;
    // Whether a request that has just been opened can be promised its end.
    bool can_promise(const ScheduledRequest &request) const;
    // Makes room for the first `num_tokens` tokens of a sequence out of its promise, or out of what is spare.
    bool reserve(const ScheduledRequest &request, const ScheduledSequence &sequence, std::int32_t num_tokens,
                 std::int64_t now_ms) const;

    // Blocks that a running sequence needs may be let go, so that forks can fail.
    bool has_windows() const { return has_window_group_; }
    // Throws std::logic_error when more is promised than there is. Between steps.
    void check() const;

private:
    std::int64_t sharing(const ScheduledRequest &request) const;

    const RequestBooks &books_;
    bool has_full_group_ = false;    // layers that see everything: blocks are kept to the end
    bool has_window_group_ = false;
};

}  // namespace trtllm::executor
