// Queue, flight and caches of the scheduler's requests.
#include "scheduler_books.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace trtllm::executor {

RequestBooks::RequestBooks(const SchedulerConfig &config, KvCacheManager &cache) : config_(config), cache_(cache) {}

ScheduledRequest *RequestBooks::find(RequestId id) const {
    const auto found = requests_.find(id);
    return found == requests_.end() ? nullptr : found->second.get();
}

ScheduledRequest &RequestBooks::at(RequestId id) const {
    if (ScheduledRequest *request = find(id)) return *request;
    throw std::logic_error("request " + std::to_string(id) + " is not known to the scheduler");
}

ScheduledSequence &RequestBooks::at(ScheduledRequest &request, std::int32_t sequence) {
    const auto count = static_cast<std::int32_t>(request.sequences.size());
    if (sequence >= 0 && sequence < count) return request.sequences[sequence];
    throw std::logic_error("request " + std::to_string(request.id) + " has no sequence " + std::to_string(sequence));
}

void RequestBooks::enqueue(std::unique_ptr<ScheduledRequest> request) {
    request->arrival = next_arrival_++;
    request->place = RequestPlace::queued;
    queue_.insert(request.get());
    requests_.emplace(request->id, std::move(request));
}

void RequestBooks::activate(ScheduledRequest &request) {
    queue_.erase(&request);
    num_paused_ -= request.was_paused;
    num_active_beam_searches_ += request.is_beam_search;
    request.place = RequestPlace::active;
    active_.insert(std::upper_bound(active_.begin(), active_.end(), &request, MoreImportant()), &request);
}

void RequestBooks::leave_flight(ScheduledRequest &request) {
    active_.erase(std::find(active_.begin(), active_.end(), &request));
    num_active_beam_searches_ -= request.is_beam_search;
    note_change();
}

void RequestBooks::pause(ScheduledRequest &request, std::int64_t now_ms, bool keep) {
    for (ScheduledSequence &sequence : request.sequences) close(sequence, now_ms, keep);
    leave_flight(request);
    request.was_paused = true;
    request.place = RequestPlace::queued;
    queue_.insert(&request);
    ++num_paused_;
}

void RequestBooks::hold(bool holds) {
    if (is_held_ != holds) note_change();
    is_held_ = holds;
}

ScheduledRequest *RequestBooks::next_waiting() const {
    const auto may_leave = [this](const ScheduledRequest *request) { return !is_held_ || request->was_paused; };
    const auto found = std::find_if(queue_.begin(), queue_.end(), may_leave);
    return found == queue_.end() ? nullptr : *found;
}

void RequestBooks::erase(ScheduledRequest &request, std::int64_t now_ms, bool keep) {
    for (ScheduledSequence &sequence : request.sequences) close(sequence, now_ms, keep);
    if (request.place == RequestPlace::active) leave_flight(request);
    if (request.place == RequestPlace::queued) {
        queue_.erase(&request);
        num_paused_ -= request.was_paused;
    }
    requests_.erase(request.id);
}

void RequestBooks::finish(ScheduledRequest &request, ScheduledSequence &sequence, std::int64_t now_ms) {
    sequence.is_finished = true;
    answer_row(sequence);
    note_change();
    const bool is_parent = sequence.num_computed >= request.prompt_length && request.waits_for_fork();
    if (!is_parent) close(sequence, now_ms);
    close_finished_parents(request, now_ms);
    if (request.num_live() > 0) return;
    if (request.place == RequestPlace::active) leave_flight(request);
    if (request.place == RequestPlace::queued) {
        queue_.erase(&request);
        num_paused_ -= request.was_paused;
    }
    request.place = RequestPlace::ended;
}

void RequestBooks::open(const ScheduledRequest &request, ScheduledSequence &sequence, std::int64_t now_ms) {
    sequence.cache_id = next_cache_id_++;
    sequence.num_computed = cache_.add_sequence(sequence.cache_id, sequence.tokens, request.cache, now_ms);
    sequence.catch_up_end = sequence.size();
}

bool RequestBooks::fork(const ScheduledSequence &parent, ScheduledSequence &child, std::int32_t num_tokens,
                        std::int64_t now_ms) {
    if (!cache_.fork(parent.cache_id, next_cache_id_, num_tokens, now_ms)) return false;
    child.cache_id = next_cache_id_++;
    child.num_computed = num_tokens;
    child.catch_up_end = child.size() - num_tokens > 1 ? child.size() : num_tokens;
    return true;
}

void RequestBooks::close(ScheduledSequence &sequence, std::int64_t now_ms, bool keep) {
    answer_row(sequence);
    sequence.drafts.clear();
    if (!sequence.is_open()) return;
    cache_.remove_sequence(sequence.cache_id, now_ms, keep);
    sequence.cache_id = 0;
    sequence.num_computed = 0;
    sequence.catch_up_end = 0;
    note_change();
}

void RequestBooks::close_finished_parents(ScheduledRequest &request, std::int64_t now_ms) {
    if (request.waits_for_fork()) return;
    for (ScheduledSequence &sequence : request.sequences) {
        if (sequence.is_finished && sequence.is_open()) close(sequence, now_ms);
    }
}

void RequestBooks::plan_row(ScheduledSequence &sequence) {
    sequence.in_step = true;
    ++num_rows_in_step_;
}

void RequestBooks::answer_row(ScheduledSequence &sequence) {
    num_rows_in_step_ -= sequence.in_step;
    sequence.in_step = false;
}

void RequestBooks::commit(ScheduledSequence &sequence, std::span<const TokenId> tokens, std::int64_t now_ms) {
    cache_.commit(sequence.cache_id, tokens, now_ms);
    sequence.num_computed += static_cast<std::int32_t>(tokens.size());
}

std::int32_t RequestBooks::num_slots_taken() const {
    std::int32_t taken = 0;
    for (const ScheduledRequest *request : active_) taken += request->num_slots();
    return taken;
}

}  // namespace trtllm::executor
