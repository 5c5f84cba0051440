// Adding up the scheduler's books, and comparing them with the cache's.
#include "scheduler_check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace trtllm::executor {
namespace {

void require(bool holds, const std::string &what) {
    if (!holds) throw std::logic_error("scheduler: " + what);
}

void check_sequence(const RequestBooks &books, const ScheduledRequest &request, const ScheduledSequence &sequence) {
    const std::string name = "request " + std::to_string(request.id);
    require(sequence.size() <= request.max_length, name + " is longer than it may be");
    require(!sequence.in_step || (sequence.is_live() && sequence.is_open()), name + " has a row but no cache");
    if (!sequence.is_open()) return;
    const KvCacheManager &cache = books.cache();
    require(cache.has_sequence(sequence.cache_id), name + " has a cache that does not exist");
    require(cache.num_committed(sequence.cache_id) == sequence.num_computed, name + " and the cache count differently");
    require(cache.missing_blocks(sequence.cache_id, sequence.num_computed) == 0, name + " lacks blocks");
    require(sequence.num_computed <= sequence.size() + static_cast<std::int32_t>(sequence.drafts.size()),
            name + " has computed tokens that it does not have");
}

void check_request(const RequestBooks &books, const ScheduledRequest &request) {
    const std::string name = "request " + std::to_string(request.id);
    const auto num_open = std::count_if(request.sequences.begin(), request.sequences.end(),
                                        [](const auto &sequence) { return sequence.is_open(); });
    require(request.place == RequestPlace::active || num_open == 0, name + " is not in flight and has a cache");
    require(request.place != RequestPlace::active || num_open > 0 || request.waits_for_fork(),
            name + " is in flight and has no cache");
    require((request.num_live() == 0) == (request.place == RequestPlace::ended), name + " has ended or not");
    for (const ScheduledSequence &sequence : request.sequences) {
        check_sequence(books, request, sequence);
        require(!sequence.is_finished || !sequence.is_open() || request.waits_for_fork(),
                name + " keeps the cache of a finished sequence");
    }
}

}  // namespace

void check_books(const RequestBooks &books) {
    std::size_t num_queued = 0, num_active = 0;
    std::int32_t num_rows = 0, num_beam_searches = 0;
    std::int64_t num_paused = 0;
    bool is_any_open = false;
    for (const auto &[id, request] : books.requests()) {
        check_request(books, *request);
        const bool is_queued = request->place == RequestPlace::queued;
        const bool is_active = request->place == RequestPlace::active;
        num_queued += is_queued;
        num_active += is_active;
        num_paused += is_queued && request->was_paused;
        num_beam_searches += is_active && request->is_beam_search;
        for (const ScheduledSequence &sequence : request->sequences) {
            num_rows += sequence.in_step;
            is_any_open |= sequence.is_open();
        }
    }
    require(num_queued == books.queue().size() && num_active == books.active().size(),
            "a request is in no or in two places");
    require(std::is_sorted(books.active().begin(), books.active().end(), MoreImportant()),
            "the flight is out of order");
    require(num_rows == books.num_rows_in_step(), "rows are counted wrong");
    require(num_paused == books.num_paused() && num_beam_searches == books.num_active_beam_searches(),
            "paused requests or beam searches are counted wrong");
    const SchedulerConfig &config = books.config();
    require(books.num_slots_taken() <= std::min(config.max_batch_size, config.max_num_tokens),
            "too many sequences are in flight");
    require(num_paused == 0 || config.capacity_scheduler_policy == CapacitySchedulerPolicy::max_utilization,
            "a request is paused that was promised its end");
    require(is_any_open || books.cache().num_available_blocks() == books.cache().num_blocks(),
            "nothing is in flight and blocks are missing");
}

}  // namespace trtllm::executor
