// The scheduler's public face: requests come in, are answered row by row, and leave.
#include "scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "scheduler_books.h"
#include "scheduler_check.h"
#include "scheduler_planner.h"

namespace trtllm::executor {
namespace {

void check_config(const SchedulerConfig &config, const KvCacheManager &cache) {
    const auto at_least = [](const char *name, std::int64_t value, std::int64_t least) {
        if (value >= least) return;
        throw RequestError(std::string(name) + " is " + std::to_string(value),
                           "set it to " + std::to_string(least) + " or more");
    };
    at_least("max_batch_size", config.max_batch_size, 1);
    at_least("max_num_tokens", config.max_num_tokens, 1);
    at_least("max_seq_len", config.max_seq_len, 2);
    at_least("chunk_unit", config.chunk_unit, 1);
    at_least("max_draft_tokens", config.max_draft_tokens, 0);
    at_least("number of cache blocks", cache.num_blocks(), 1);
    if (config.max_queue_size != -1) at_least("max_queue_size", config.max_queue_size, 1);
}

void check_lengths(const SchedulerRequest &request, const SchedulerConfig &config) {
    const std::string prompt = "the prompt has " + std::to_string(request.prompt.size()) + " tokens";
    if (request.prompt.empty()) throw RequestError("the prompt is empty", "give at least one token");
    if (request.prompt.size() >= static_cast<std::size_t>(config.max_seq_len)) {
        throw RequestError(prompt + " and a sequence at most " + std::to_string(config.max_seq_len),
                           "shorten the prompt, or build the engine with a larger max_seq_len");
    }
    if (!config.enable_chunked_context && request.prompt.size() > static_cast<std::size_t>(config.max_num_tokens)) {
        throw RequestError(prompt + " and a step at most " + std::to_string(config.max_num_tokens),
                           "enable chunked context, or raise max_num_tokens");
    }
}

void check_request(const SchedulerRequest &request, const SchedulerConfig &config) {
    check_lengths(request, config);
    if (request.max_tokens < 1) {
        throw RequestError("max_tokens is " + std::to_string(request.max_tokens), "ask for 1 or more");
    }
    if (!(request.priority >= 0.0f && request.priority <= 1.0f)) {
        throw RequestError("the priority is " + std::to_string(request.priority), "give a number between 0 and 1");
    }
    const std::int32_t most = std::min(config.max_batch_size, config.max_num_tokens);
    if (request.num_sequences < 1 || request.num_sequences > most) {
        throw RequestError("the request has " + std::to_string(request.num_sequences) +
                               " sequences and a step at most " + std::to_string(most),
                           "ask for fewer, or raise max_batch_size and max_num_tokens");
    }
}

std::unique_ptr<ScheduledRequest> describe(SchedulerRequest &&request, const SchedulerConfig &config,
                                           const KvCacheManager &cache) {
    auto described = std::make_unique<ScheduledRequest>();
    described->id = request.id;
    described->priority = request.priority;
    described->prompt_length = static_cast<std::int32_t>(request.prompt.size());
    described->max_length = static_cast<std::int32_t>(
        std::min<std::int64_t>(std::int64_t{described->prompt_length} + request.max_tokens, config.max_seq_len));
    described->max_sequences = request.num_sequences;
    described->is_beam_search = request.is_beam_search;
    described->cache = std::move(request.cache);
    // The newest token is never in the cache, and drafts are given only where they can be wanted.
    const std::int32_t most_cached = described->max_length - 1;
    const bool may_recompute = config.capacity_scheduler_policy == CapacitySchedulerPolicy::max_utilization;
    const std::int32_t context = may_recompute ? most_cached : described->prompt_length;
    const std::int32_t max_chunk = std::max(std::min(config.max_num_tokens, context), 1 + config.max_draft_tokens);
    described->blocks_per_sequence = cache.blocks_for(most_cached, max_chunk);
    described->sequences.resize(1);
    described->sequences.front().tokens = std::move(request.prompt);
    return described;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig &config, KvCacheManager &cache) {
    check_config(config, cache);
    books_ = std::make_unique<RequestBooks>(config, cache);
    planner_ = std::make_unique<StepPlanner>(*books_);
}

Scheduler::~Scheduler() = default;

void Scheduler::add(SchedulerRequest request) {
    const SchedulerConfig &config = books_->config();
    check_request(request, config);
    if (contains(request.id)) {
        throw RequestError("request " + std::to_string(request.id) + " is known already",
                           "give every request its own id");
    }
    if (config.max_queue_size >= 0 && num_queued() - num_paused() >= config.max_queue_size) {
        throw RequestError("the queue is full: " + std::to_string(config.max_queue_size) + " requests wait",
                           "try again later, or raise max_queue_size");
    }
    auto described = describe(std::move(request), config, books_->cache());
    if (!planner_->capacity().could_ever_hold(*described)) {
        throw RequestError("the request needs " + std::to_string(planner_->capacity().outstanding(*described)) +
                               " cache blocks and there are " + std::to_string(books_->cache().num_blocks()),
                           "lower max_tokens, shorten the prompt, or give the cache more memory");
    }
    books_->enqueue(std::move(described));
}

StepPlan Scheduler::schedule(std::int64_t now_ms) { return planner_->plan(now_ms); }

void Scheduler::complete_row(const PlannedRow &row, std::int32_t num_valid, std::int64_t now_ms) {
    ScheduledRequest *request = books_->find(row.request);
    if (request == nullptr) return;
    ScheduledSequence &sequence = RequestBooks::at(*request, row.sequence);
    if (!sequence.in_step || sequence.cache_id != row.cache_id) return;  // cancelled while the step ran
    const std::int32_t num_own = row.num_tokens - row.num_draft_tokens;
    if (num_valid < num_own || num_valid > row.num_tokens) {
        throw std::logic_error("a row of " + std::to_string(row.num_tokens) + " tokens has " +
                               std::to_string(num_valid) + " valid ones");
    }
    books_->answer_row(sequence);
    const std::span<const TokenId> tokens(sequence.tokens), drafts(sequence.drafts);
    const auto own = tokens.subspan(static_cast<std::size_t>(row.past_length), static_cast<std::size_t>(num_own));
    books_->commit(sequence, own, now_ms);
    if (num_valid > num_own) {
        books_->commit(sequence, drafts.first(static_cast<std::size_t>(num_valid - num_own)), now_ms);
    }
    sequence.drafts.resize(static_cast<std::size_t>(num_valid - num_own));
    // What was computed can be shared, and what a window let go of can be taken.
    if (row.is_context || planner_->capacity().has_windows()) books_->note_change();
}

void Scheduler::append(RequestId id, std::int32_t index, std::span<const TokenId> tokens) {
    ScheduledRequest *request = books_->find(id);
    if (request == nullptr) return;
    ScheduledSequence &sequence = RequestBooks::at(*request, index);
    if (!sequence.is_live()) return;
    const auto fail = [&](const char *what) { throw std::logic_error("request " + std::to_string(id) + ": " + what); };
    if (!request->is_forked && request->max_sequences > 1) fail("append() instead of start_sequences()");
    if (!sequence.waits_for_tokens() || sequence.in_step) fail("append() to a sequence that does not wait for tokens");
    const auto most = static_cast<std::size_t>(request->max_length - sequence.size());
    if (tokens.size() > most) fail("append() beyond max_tokens");
    // Accepted drafts are in the cache already: what is appended must be what was computed.
    const std::size_t num_known = std::min(sequence.drafts.size(), tokens.size());
    if (!std::equal(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(num_known), sequence.drafts.begin())) {
        fail("append() of other tokens than the accepted drafts");
    }
    sequence.drafts.erase(sequence.drafts.begin(), sequence.drafts.begin() + static_cast<std::ptrdiff_t>(num_known));
    sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
    request->is_forked = true;
}

void Scheduler::start_sequences(RequestId id, std::span<const TokenId> first_tokens) {
    ScheduledRequest *request = books_->find(id);
    if (request == nullptr || request->place == RequestPlace::ended) return;
    const auto count = static_cast<std::int32_t>(first_tokens.size());
    ScheduledSequence &first = request->sequences.front();
    if (request->is_forked || !first.waits_for_tokens() || first.in_step) {
        throw std::logic_error("start_sequences() before or after the prompt's end");
    }
    if (count < 1 || count > request->max_sequences) {
        throw std::logic_error("start_sequences() of too many sequences, or none");
    }
    const std::vector<TokenId> prompt = first.tokens;
    request->sequences.resize(first_tokens.size());
    for (std::size_t i = 0; i < first_tokens.size(); ++i) {
        ScheduledSequence &sequence = request->sequences[i];
        if (i > 0) sequence.tokens = prompt;
        sequence.tokens.push_back(first_tokens[i]);
    }
    request->is_forked = true;
    if (count < request->max_sequences && !request->is_beam_search) books_->note_change();
}

void Scheduler::set_drafts(RequestId id, std::int32_t index, std::span<const TokenId> drafts) {
    ScheduledRequest *request = books_->find(id);
    if (request == nullptr) return;
    ScheduledSequence &sequence = RequestBooks::at(*request, index);
    if (!sequence.is_live()) return;
    if (!request->can_generate(sequence) || request->is_beam_search || sequence.in_step) {
        throw std::logic_error("set_drafts() for a sequence that generating() does not name");
    }
    if (drafts.size() > static_cast<std::size_t>(config().max_draft_tokens)) {
        throw std::logic_error("set_drafts() of more than max_draft_tokens");
    }
    sequence.drafts.assign(drafts.begin(), drafts.end());
    planner_->note_drafts();
}

void Scheduler::finish_sequence(RequestId id, std::int32_t index, std::int64_t now_ms) {
    ScheduledRequest *request = books_->find(id);
    if (request == nullptr) return;
    ScheduledSequence &sequence = RequestBooks::at(*request, index);
    if (sequence.is_live()) books_->finish(*request, sequence, now_ms);
}

void Scheduler::remove(RequestId id, std::int64_t now_ms, bool keep) {
    if (ScheduledRequest *request = books_->find(id)) books_->erase(*request, now_ms, keep);
}

void Scheduler::hold(bool holds) { books_->hold(holds); }

Scheduler::Restart Scheduler::restart_all(std::int64_t now_ms) {
    if (books_->num_rows_in_step() > 0 || books_->num_active_beam_searches() > 0) {
        throw std::logic_error("restart_all() within a step, or with a beam search in flight");
    }
    Restart outcome;
    const std::vector<ScheduledRequest *> active = books_->active();
    for (ScheduledRequest *request : active) {
        books_->pause(*request, now_ms, false);
        // What is computed again is longer than the prompt, and so may be its chunks.
        const std::int32_t most_cached = request->max_length - 1;
        const std::int32_t chunk =
            std::max(std::min(config().max_num_tokens, most_cached), 1 + config().max_draft_tokens);
        request->blocks_per_sequence = books_->cache().blocks_for(most_cached, chunk);
        outcome.restarted.push_back(request->id);
        if (!planner_->capacity().could_ever_hold(*request)) outcome.too_large.push_back(request->id);
    }
    return outcome;
}

bool Scheduler::has_work() const { return !books_->queue().empty() || !books_->active().empty(); }

bool Scheduler::contains(RequestId id) const { return books_->find(id) != nullptr; }

RequestStage Scheduler::stage(RequestId id) const {
    const ScheduledRequest &request = books_->at(id);
    if (request.place == RequestPlace::queued) return RequestStage::queued;
    const bool is_context = std::any_of(request.sequences.begin(), request.sequences.end(),
                                        [](const auto &sequence) { return sequence.is_catching_up(); });
    return is_context ? RequestStage::context_in_progress : RequestStage::generation_in_progress;
}

std::span<const TokenId> Scheduler::tokens(RequestId id, std::int32_t sequence) const {
    return RequestBooks::at(books_->at(id), sequence).tokens;
}

std::int32_t Scheduler::num_sequences(RequestId id) const {
    return static_cast<std::int32_t>(books_->at(id).sequences.size());
}

std::vector<Scheduler::SequenceRef> Scheduler::generating() const {
    std::vector<SequenceRef> all;
    for (const ScheduledRequest *request : books_->active()) {
        if (request->is_beam_search) continue;
        for (std::size_t i = 0; i < request->sequences.size(); ++i) {
            const ScheduledSequence &sequence = request->sequences[i];
            if (!request->can_generate(sequence) || sequence.in_step) continue;
            all.push_back({request->id, static_cast<std::int32_t>(i)});
        }
    }
    return all;
}

std::int64_t Scheduler::num_queued() const { return static_cast<std::int64_t>(books_->queue().size()); }

std::int64_t Scheduler::num_active() const { return static_cast<std::int64_t>(books_->active().size()); }

std::int64_t Scheduler::num_paused() const { return books_->num_paused(); }

std::int64_t Scheduler::num_active_beam_searches() const { return books_->num_active_beam_searches(); }

const SchedulerConfig &Scheduler::config() const { return books_->config(); }

void Scheduler::check() const {
    check_books(*books_);
    if (books_->num_rows_in_step() == 0) planner_->capacity().check();
}

}  // namespace trtllm::executor
