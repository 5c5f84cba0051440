// What the scheduler remembers of a request and of each of its sequences.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scheduler.h"

namespace trtllm::executor {

struct ScheduledSequence {
    std::vector<TokenId> tokens;     // prompt and output
    std::vector<TokenId> drafts;     // for the next row; of the step under way once they are planned
    SequenceId cache_id = 0;         // 0: it has no cache now
    std::int32_t num_computed = 0;   // in the cache; accepted drafts run ahead of `tokens` until append()
    std::int32_t catch_up_end = 0;   // rows that begin before it are context
    bool in_step = false;            // a planned row is not answered yet
    bool is_finished = false;

    std::int32_t size() const { return static_cast<std::int32_t>(tokens.size()); }
    bool is_open() const { return cache_id != 0; }
    bool is_live() const { return !is_finished; }
    bool is_catching_up() const { return is_live() && is_open() && num_computed < catch_up_end; }
    bool waits_for_tokens() const { return is_live() && is_open() && num_computed >= size(); }
};

enum class RequestPlace { queued, active, ended };  // ended: every sequence is finished, remove() is yet to come

struct ScheduledRequest {
    RequestId id = 0;
    std::int64_t arrival = 0;        // kept through pauses
    float priority = 0.5f;
    SequenceOptions cache;
    std::int32_t prompt_length = 0;
    std::int32_t max_length = 0;     // prompt and output of a sequence
    std::int32_t max_sequences = 1;
    std::int32_t blocks_per_sequence = 0;  // most that one sequence holds at once
    bool is_beam_search = false;
    bool is_forked = false;          // the prompt's end is behind it: its sequences exist
    bool was_paused = false;
    RequestPlace place = RequestPlace::queued;
    std::vector<ScheduledSequence> sequences;

    std::int32_t num_live() const {
        return static_cast<std::int32_t>(
            std::count_if(sequences.begin(), sequences.end(), [](const auto &item) { return item.is_live(); }));
    }
    // Places among max_batch_size sequences.
    std::int32_t num_slots() const { return !is_forked || is_beam_search ? max_sequences : num_live(); }
    bool waits_for_tokens() const {
        return std::any_of(sequences.begin(), sequences.end(),
                           [](const auto &item) { return item.waits_for_tokens(); });
    }
    bool waits_for_fork() const {
        return std::any_of(sequences.begin(), sequences.end(),
                           [](const auto &item) { return item.is_live() && !item.is_open(); });
    }
    // A generation row is possible: one token is to be computed, and its logits are wanted.
    bool can_generate(const ScheduledSequence &sequence) const {
        return sequence.is_live() && sequence.is_open() && sequence.num_computed >= sequence.catch_up_end &&
               sequence.num_computed == sequence.size() - 1 && sequence.size() < max_length;
    }
};

// Higher priority first, then the earlier arrival.
struct MoreImportant {
    bool operator()(const ScheduledRequest *left, const ScheduledRequest *right) const {
        if (left->priority != right->priority) return left->priority > right->priority;
        return left->arrival < right->arrival;
    }
};

}  // namespace trtllm::executor
