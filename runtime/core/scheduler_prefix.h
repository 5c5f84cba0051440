// Whether waiting saves work: a request in flight is computing the beginning of a waiting request's tokens right now.
#pragma once

#include "scheduler_books.h"

namespace trtllm::executor {

// True when a context in flight has yet to compute tokens that `waiting` begins with, at least one chunk unit more
// than `num_reusable`, which the cache holds already. It ends by itself: the context passes the common
// part, or leaves flight.
bool is_prefix_under_way(const RequestBooks &books, const ScheduledRequest &waiting, std::int32_t num_reusable);

}  // namespace trtllm::executor
