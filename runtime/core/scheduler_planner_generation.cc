// The plan's generation rows: one token of each sequence that waits for one, drafts as the budget allows, and pauses
// when the cache has no room for them.
#include <algorithm>
#include <stdexcept>

#include "scheduler_chunks.h"
#include "scheduler_planner.h"

namespace trtllm::executor {

void StepPlanner::plan_generation() {
    draft_budget_ = has_drafts_ ? tokens_for_drafts() : 0;
    for (std::size_t place = 0; place < books_.active().size();) {
        if (plan_request(place)) ++place;
    }
    has_drafts_ = false;
}

// False when the request at this place of the flight was paused.
bool StepPlanner::plan_request(std::size_t place) {
    ScheduledRequest &request = *books_.active()[place];
    const std::size_t num_rows = generation_.size();
    bool fits = open_siblings(place);
    for (std::size_t i = 0; fits && i < request.sequences.size(); ++i) {
        while (fits && !plan_generation_row(request, static_cast<std::int32_t>(i))) fits = pause_behind(place);
    }
    if (fits) return true;
    for (std::size_t i = num_rows; i < generation_.size(); ++i) budget_ += generation_[i].num_tokens;
    generation_.erase(generation_.begin() + static_cast<std::ptrdiff_t>(num_rows), generation_.end());
    pause(request);
    return false;
}

// False when the cache has no room for the row's token.
bool StepPlanner::plan_generation_row(ScheduledRequest &request, std::int32_t index) {
    ScheduledSequence &sequence = request.sequences[index];
    if (!request.can_generate(sequence)) {
        sequence.drafts.clear();
        return true;
    }
    // Drafts behind the last token that is wanted are of no use.
    std::int32_t drafts = std::min({static_cast<std::int32_t>(sequence.drafts.size()), std::max(0, draft_budget_),
                                    request.max_length - sequence.size() - 1});
    if (drafts > 0 && !capacity_.reserve(request, sequence, sequence.size() + drafts, now_ms_)) drafts = 0;
    if (drafts == 0 && !capacity_.reserve(request, sequence, sequence.size(), now_ms_)) return false;
    sequence.drafts.resize(static_cast<std::size_t>(drafts));
    generation_.push_back({&request, index, 1 + drafts, drafts});
    budget_ -= 1 + drafts;
    draft_budget_ -= drafts;
    return true;
}

// Every generation row has its token, and the next context its smallest chunk, before drafts get any.
std::int32_t StepPlanner::tokens_for_drafts() const {
    std::int32_t rows = 0;
    for (const ScheduledRequest *request : books_.active()) {
        for (const ScheduledSequence &sequence : request->sequences) {
            rows += request->can_generate(sequence) || (sequence.is_live() && !sequence.is_open());
        }
    }
    return config_.max_num_tokens - rows - next_context_tokens();
}

std::int32_t StepPlanner::next_context_tokens() const {
    const auto smallest = [&](std::int32_t remaining) {
        return may_cut(config_, remaining) ? std::min(remaining, smallest_chunk(config_)) : remaining;
    };
    for (const ScheduledRequest *request : books_.active()) {
        for (const ScheduledSequence &sequence : request->sequences) {
            if (sequence.is_catching_up()) return smallest(sequence.catch_up_end - sequence.num_computed);
        }
    }
    const ScheduledRequest *first = books_.next_waiting();
    if (first == nullptr || books_.num_slots_taken() >= config_.max_batch_size) return 0;
    if (config_.capacity_scheduler_policy == CapacitySchedulerPolicy::static_batch) return 0;
    if (first->arrival == refused_ && books_.num_changes() == refused_at_) return 0;
    return smallest(first->sequences.front().size());
}

// Gives each sequence without a cache one, as soon as there is one to fork from. False without room for it.
bool StepPlanner::open_siblings(std::size_t place) {
    ScheduledRequest &request = *books_.active()[place];
    if (!request.waits_for_fork()) return true;
    for (ScheduledSequence &sequence : request.sequences) {
        if (!sequence.is_live() || sequence.is_open()) continue;
        while (!open_sibling(request, sequence)) {
            if (!pause_behind(place)) return false;
        }
    }
    books_.close_finished_parents(request, now_ms_);
    return true;
}

bool StepPlanner::open_sibling(ScheduledRequest &request, ScheduledSequence &sequence) {
    const ScheduledSequence *parent = nullptr;
    for (const ScheduledSequence &other : request.sequences) {
        if (!other.is_open()) continue;
        if (parent == nullptr || other.num_computed > parent->num_computed) parent = &other;
    }
    if (parent == nullptr) return open_by_tokens(request, sequence);
    if (parent->num_computed < request.prompt_length) return true;  // later: the prompt is computed once
    if (request.was_paused && !capacity_.is_promised(request)) {  // what the sequence had computed may still be there, beyond the prompt
        const std::int32_t reusable = books_.cache().count_reusable_tokens(sequence.tokens, request.cache.key);
        if (std::min(reusable, request.cache.max_reuse_tokens) > request.prompt_length) {
            return open_by_tokens(request, sequence);
        }
    }
    const bool promised = capacity_.is_promised(request);
    if (!promised && capacity_.spare() < 1) return false;
    if (books_.fork(*parent, sequence, request.prompt_length, now_ms_)) return true;
    if (promised && !capacity_.has_windows()) throw std::logic_error("a promised fork has failed");
    return open_by_tokens(request, sequence);  // a window has let go of what the fork needs
}

// False, and nothing changes, when what is found for reuse is promised to others.
bool StepPlanner::open_by_tokens(const ScheduledRequest &request, ScheduledSequence &sequence) {
    books_.open(request, sequence, now_ms_);
    if (capacity_.is_promised(request) || books_.num_active_beam_searches() == 0 || capacity_.spare() >= 0) return true;
    books_.close(sequence, now_ms_);
    return false;
}

// Pauses the least important request in flight behind a place. False when there is none that may be.
bool StepPlanner::pause_behind(std::size_t place) {
    const auto &active = books_.active();
    for (std::size_t i = active.size(); i-- > place + 1;) {
        if (capacity_.is_promised(*active[i]) || active[i]->waits_for_tokens()) continue;
        pause(*active[i]);
        return true;
    }
    return false;
}

void StepPlanner::pause(ScheduledRequest &request) {
    if (capacity_.is_promised(request)) throw std::logic_error("a request that was promised its end is to be paused");
    plan_.paused.push_back(request.id);
    books_.pause(request, now_ms_);
}

}  // namespace trtllm::executor
