// Which requests wait and which are in flight, and the caches of their sequences: the only code that opens, forks and
// closes them. It decides nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

#include "kv_cache_manager.h"
#include "scheduler_request.h"

namespace trtllm::executor {

class RequestBooks {
public:
    using Queue = std::set<ScheduledRequest *, MoreImportant>;

    RequestBooks(const SchedulerConfig &config, KvCacheManager &cache);

    ScheduledRequest *find(RequestId id) const;  // null when unknown
    ScheduledRequest &at(RequestId id) const;    // throws std::logic_error when unknown
    static ScheduledSequence &at(ScheduledRequest &request, std::int32_t sequence);

    void enqueue(std::unique_ptr<ScheduledRequest> request);
    // From the queue into flight, and back without its cache.
    void activate(ScheduledRequest &request);
    void pause(ScheduledRequest &request, std::int64_t now_ms, bool keep = true);
    void erase(ScheduledRequest &request, std::int64_t now_ms, bool keep);
    void finish(ScheduledRequest &request, ScheduledSequence &sequence, std::int64_t now_ms);

    // Gives a sequence a cache with what can be reused of its tokens.
    void open(const ScheduledRequest &request, ScheduledSequence &sequence, std::int64_t now_ms);
    // Gives it the parent's first `num_tokens` tokens. False, and nothing changes, when the cache cannot.
    bool fork(const ScheduledSequence &parent, ScheduledSequence &child, std::int32_t num_tokens, std::int64_t now_ms);
    void close(ScheduledSequence &sequence, std::int64_t now_ms, bool keep = true);
    // Lets go of finished sequences' caches that were kept because others were to fork from them.
    void close_finished_parents(ScheduledRequest &request, std::int64_t now_ms);

    void plan_row(ScheduledSequence &sequence);
    void answer_row(ScheduledSequence &sequence);

    // While held, only paused requests may leave the queue.
    void hold(bool holds);
    // The first request that may leave the queue; null when there is none.
    ScheduledRequest *next_waiting() const;
    const Queue &queue() const { return queue_; }
    const std::vector<ScheduledRequest *> &active() const { return active_; }  // the most important first
    const std::unordered_map<RequestId, std::unique_ptr<ScheduledRequest>> &requests() const { return requests_; }
    std::int32_t num_slots_taken() const;
    std::int32_t num_active_beam_searches() const { return num_active_beam_searches_; }
    std::int64_t num_paused() const { return num_paused_; }
    std::int32_t num_rows_in_step() const { return num_rows_in_step_; }
    const SchedulerConfig &config() const { return config_; }
    KvCacheManager &cache() const { return cache_; }

    // A request that did not fit into the cache will not fit now either, as long as this number stays.
    std::int64_t num_changes() const { return num_changes_; }
    void note_change() { ++num_changes_; }
    // Tokens of a sequence are in the cache, behind those that were there.
    void commit(ScheduledSequence &sequence, std::span<const TokenId> tokens, std::int64_t now_ms);

private:
    void leave_flight(ScheduledRequest &request);

    SchedulerConfig config_;
    KvCacheManager &cache_;
    std::unordered_map<RequestId, std::unique_ptr<ScheduledRequest>> requests_;
    Queue queue_;
    std::vector<ScheduledRequest *> active_;
    std::int64_t next_arrival_ = 0;
    SequenceId next_cache_id_ = 1;
    std::int64_t num_paused_ = 0;
    std::int32_t num_active_beam_searches_ = 0;
    std::int32_t num_rows_in_step_ = 0;
    std::int64_t num_changes_ = 0;
    bool is_held_ = false;
};

}  // namespace trtllm::executor
