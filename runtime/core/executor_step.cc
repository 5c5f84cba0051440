// One step of the executor: plan, run the engine, decode, record.
#include <algorithm>
#include <cstdio>
#include <unistd.h>

#include "executor_loop.h"

namespace trtllm::executor {

namespace {

std::int64_t resident_bytes() {
    std::FILE *file = std::fopen("/proc/self/statm", "r");
    if (file == nullptr) return 0;
    long long total = 0, resident = 0;
    const int count = std::fscanf(file, "%lld %lld", &total, &resident);
    std::fclose(file);
    return count == 2 ? resident * sysconf(_SC_PAGESIZE) : 0;
}

}  // namespace

void Executor::Loop::step() {
    const double begin = now_ms();
    num_started_ = num_paused_ = num_decoded_ = num_decoding_rows_ = 0;
    queue_latency_ms_ = draft_ms_ = 0;
    speculation_ = {};
    if (proposer_) propose_drafts();
    const StepPlan plan = scheduler_.schedule(whole_ms());
    note_plan(plan);
    const double planned = now_ms();
    if (plan.rows.empty()) throw std::logic_error("the scheduler left every request waiting");
    if (!run_session(plan)) {
        deliver();
        return;
    }
    const double computed = step_ms_ = now_ms();
    decode(plan);
    const double end = now_ms();
    ++iteration_;
    if (trace_.enabled()) {
        const auto rows = static_cast<std::int64_t>(plan.rows.size());
        trace_.span("step", begin * 1000, end * 1000, iteration_);
        trace_.span("schedule", begin * 1000, planned * 1000, rows);
        trace_.span("session", planned * 1000, computed * 1000, plan.num_context_tokens + plan.num_generation_tokens);
        trace_.span("decode", computed * 1000, end * 1000, rows);
        trace_.counter("free cache blocks", end * 1000, cache_.num_available_blocks());
        trace_.counter("requests", end * 1000, static_cast<std::int64_t>(requests_.size()));
    }
    record(plan, begin, computed - planned);  // before the news, so that who hears of a step finds it recorded
    deliver();
}

void Executor::Loop::propose_drafts() {
    const double begin = now_ms();
    std::vector<DraftProposer::Query> queries;
    std::vector<Scheduler::SequenceRef> targets;
    for (const auto &item : scheduler_.generating()) {
        auto *request = find(item.request);
        if (request == nullptr || !request->takes_drafts() || !request->has_started()) continue;
        auto &sequence = request->sequences()[static_cast<std::size_t>(item.sequence)];
        const auto left = request->request().max_tokens - sequence.num_generated - 1;
        const auto most = std::min(config_.scheduler.max_draft_tokens, left);
        if (most <= 0) continue;
        queries.push_back({(item.request << 16) + static_cast<SequenceId>(item.sequence),
                           scheduler_.tokens(item.request, item.sequence), most});
        targets.push_back(item);
    }
    if (queries.empty()) return;
    std::vector<std::vector<TokenId>> guesses;
    try {
        guesses = proposer_->propose(queries);
    } catch (const std::exception &) {  // guesses are a help, not a need: this step goes without
        for (const auto &query : queries) proposer_->forget(query.sequence);
        return;
    }
    for (std::size_t index = 0; index < targets.size(); ++index) {
        auto &drafts = guesses[index];
        std::erase_if(drafts, [this](TokenId token) { return token < 0 || token >= info_.vocab_size; });
        if (drafts.size() > static_cast<std::size_t>(queries[index].max_drafts))
            drafts.resize(static_cast<std::size_t>(queries[index].max_drafts));
        scheduler_.set_drafts(targets[index].request, targets[index].sequence, drafts);
        find(targets[index].request)->sequences()[static_cast<std::size_t>(targets[index].sequence)].drafts =
            std::move(drafts);
    }
    draft_ms_ = now_ms() - begin;
}

void Executor::Loop::note_plan(const StepPlan &plan) {
    const double now = now_ms();
    for (const auto id : plan.started) {
        auto *request = find(id);
        if (request == nullptr) continue;
        request->is_scheduled = true;
        request->metrics.first_scheduled = now;
        request->metrics.first_iter = iteration_;
        queue_latency_ms_ += now - request->queued_since_ms;
        ++num_started_;
        trace_.end_stage(id, "queued", now * 1000);
        trace_.begin_stage(id, "context", now * 1000);
    }
    if (!plan.started.empty()) {
        const std::scoped_lock lock(mutex_);
        num_waiting_ -= static_cast<std::int64_t>(plan.started.size());
    }
    for (const auto id : plan.resumed)
        if (auto *request = find(id)) request->is_paused = false;
    for (const auto id : plan.paused) {
        auto *request = find(id);
        if (request == nullptr) continue;
        request->is_paused = true;
        ++request->metrics.num_pauses;
        ++num_paused_;
    }
}

// False when the engine failed: then the requests of the step have failed, and nothing computed before is trusted.
bool Executor::Loop::run_session(const StepPlan &plan) {
    const auto lookup = [this](const PlannedRow &row) {
        StepBuilder::RowContent content;
        auto &request = *requests_.at(row.request);
        content.tokens = scheduler_.tokens(row.request, row.sequence);
        if (row.num_draft_tokens > 0)
            content.drafts = request.sequences()[static_cast<std::size_t>(row.sequence)].drafts;
        content.wants_all_logits = row.is_context && !request.has_started() && request.wants_prompt_rows();
        if (info_.num_candidates > 0)
            content.wants_whole_rows = request.wants_whole_rows(row.sequence, row.num_draft_tokens, info_.num_candidates);
        return content;
    };
    const auto &batch = builder_.build(plan, cache_, cache_.take_copies(), lookup);
    try {
        logits_ = StepLogits(*session_, batch, session_->step(batch));
        return true;
    } catch (const std::exception &error) {
        for (const auto &row : plan.rows)
            fail(row.request, std::string("the engine failed: ") + error.what(), "other requests go on; try it again");
        cache_.clear_reusable(whole_ms());
        return false;
    }
}

void Executor::Loop::decode(const StepPlan &plan) {
    turns_.clear();
    for (std::size_t index = 0; index < plan.rows.size(); ++index) {
        const auto first = builder_.first_logits()[index];
        guarded(plan.rows[index].request, [&] { take_row(plan.rows[index], first, turns_); });
    }
    if (config_.batched_logits_processor) run_batched_processor(turns_);
    take_turns(turns_);
    spare_rows_.clear();
}

// Notes what a row computed. A row that reached the end gives one turn, or one for each sequence that starts.
// `first` is its first row of logits, -1 for none.
void Executor::Loop::take_row(const PlannedRow &row, std::int64_t first, std::vector<Turn> &turns) {
    auto *request = find(row.request);
    if (request == nullptr) return;
    if (row.is_context && !request->has_started()) {
        if (request->wants_prompt_rows())
            request->take_prompt_rows(logits_.memory(first), row.past_length, row.num_tokens, scratch_);
        request->metrics.num_computed_prompt_tokens += row.num_tokens;
    }
    if (!row.reaches_end) {
        scheduler_.complete_row(row, row.num_tokens, static_cast<std::int64_t>(step_ms_));
        return;
    }
    const bool all_rows = row.is_context && !request->has_started() && request->wants_prompt_rows();
    if (all_rows) first += row.num_tokens - 1;
    if (!request->has_started()) return start_request(row, *request, first, turns);
    if (!request->is_beam_search())
        request->sequences()[static_cast<std::size_t>(row.sequence)].drafts.resize(
            static_cast<std::size_t>(row.num_draft_tokens));
    turns.push_back({&row, request, row.sequence, logits_.memory(first), {logits_, first}, 1 + row.num_draft_tokens});
}

void Executor::Loop::start_request(const PlannedRow &row, ActiveRequest &request, std::int64_t first,
                                   std::vector<Turn> &turns) {
    scheduler_.complete_row(row, row.num_tokens, static_cast<std::int64_t>(step_ms_));
    request.start();
    request.metrics.first_token = step_ms_;
    const auto prompt = static_cast<std::int32_t>(request.request().input_token_ids.size());
    request.metrics.num_reused_tokens = std::max(prompt - request.metrics.num_computed_prompt_tokens, 0);
    const auto stats = cache_.sequence_stats(row.cache_id);
    request.metrics.num_total_allocated_blocks = stats.alloc_total_blocks;
    request.metrics.num_new_allocated_blocks = stats.alloc_new_blocks;
    request.metrics.num_reused_blocks = stats.reused_blocks;
    request.metrics.num_missed_blocks = stats.missed_blocks;
    trace_.end_stage(row.request, "context", request.metrics.first_token * 1000);
    trace_.begin_stage(row.request, "generation", request.metrics.first_token * 1000);
    const auto count = request.is_beam_search() ? 1 : request.num_sequences();
    for (std::int32_t index = 0; index < count; ++index) {
        float *own = logits_.memory(first);
        if (index == 0) {
            turns.push_back({&row, &request, index, own, {logits_, first}, 1});
            continue;
        }
        own = spare_rows_.emplace_back(own, own + info_.vocab_size).data();
        turns.push_back({&row, &request, index, own, {own, info_.vocab_size}, 1});
    }
}

void Executor::Loop::run_batched_processor(const std::vector<Turn> &turns) {
    BatchedLogits batch;
    batch.vocab_size = info_.vocab_size;
    std::deque<std::vector<TokenId>> tokens;
    for (const auto &turn : turns) {
        if (find(turn.row->request) == nullptr || !turn.request->request().apply_batched_logits_processor) continue;
        batch.ids.push_back(turn.row->request);
        batch.sequences.push_back(turn.sequence);
        const auto known = scheduler_.tokens(turn.row->request, turn.row->sequence);
        batch.tokens.push_back(tokens.emplace_back(known.begin(), known.end()));
        batch.rows.push_back(turn.logits);
    }
    if (batch.ids.empty()) return;
    try {
        config_.batched_logits_processor(batch);
    } catch (const std::exception &error) {
        for (const auto id : batch.ids)
            fail(id, std::string("the batched logits processor failed: ") + error.what(), "other requests go on");
    }
}

// Turns of one request stand together: rows are planned request by request within context and generation.
void Executor::Loop::take_turns(std::vector<Turn> &turns) {
    const auto comes_before = [](const Turn &left, const Turn &right) {
        if (left.row->request != right.row->request) return left.row->request < right.row->request;
        return left.sequence < right.sequence;
    };
    if (!std::is_sorted(turns.begin(), turns.end(), comes_before))
        std::stable_sort(turns.begin(), turns.end(), comes_before);
    for (std::size_t first = 0; first < turns.size();) {
        const auto id = turns[first].row->request;
        std::size_t last = first;
        while (last < turns.size() && turns[last].row->request == id) ++last;
        const auto mine = std::span(turns).subspan(first, last - first);
        first = last;
        if (find(id) == nullptr) continue;  // it has failed by now
        guarded(id, [&] {
            auto &request = *mine.front().request;
            if (request.is_beam_search()) {
                advance_beams(mine);
            } else if (mine.size() > 1 && mine[0].row == mine[1].row) {
                advance_new(mine);
            } else {
                for (const auto &turn : mine) advance_sample(turn);
            }
            ++request.num_decode_steps;
            request.metrics.last_token = step_ms_;
            request.metrics.last_iter = iteration_;
            settle(request);
        });
    }
}

void Executor::Loop::advance_sample(const Turn &turn) {
    const bool is_first = turn.request->num_sequences() == 1 && turn.request->num_decode_steps == 0;
    auto progress = turn.request->advance(turn.sequence, turn.rows, turn.num_rows, scratch_);
    num_decoded_ += static_cast<std::int64_t>(progress.tokens.size());
    ++num_decoding_rows_;
    if (turn.row->num_draft_tokens > 0) {
        speculation_.num_draft_tokens += turn.row->num_draft_tokens;
        speculation_.num_accepted_tokens += progress.num_accepted;
        ++speculation_.num_requests_with_draft_tokens;
        turn.request->metrics.total_draft_tokens += turn.row->num_draft_tokens;
        turn.request->metrics.total_accepted_draft_tokens += progress.num_accepted;
    }
    const auto num_known = turn.row->num_tokens - turn.row->num_draft_tokens;
    if (!is_first) scheduler_.complete_row(*turn.row, num_known + progress.num_accepted, static_cast<std::int64_t>(step_ms_));
    if (progress.is_finished) {
        scheduler_.finish_sequence(turn.row->request, turn.sequence, static_cast<std::int64_t>(step_ms_));
    } else {
        scheduler_.append(turn.row->request, turn.sequence, progress.tokens);
    }
}

// The first tokens of several samples, all chosen from the prompt's last logits.
void Executor::Loop::advance_new(std::span<Turn> turns) {
    std::vector<TokenId> first_tokens;
    std::vector<std::int32_t> finished;
    for (const auto &turn : turns) {
        const auto progress = turn.request->advance(turn.sequence, turn.rows, turn.num_rows, scratch_);
        first_tokens.push_back(progress.tokens.back());
        if (progress.is_finished) finished.push_back(turn.sequence);
    }
    num_decoded_ += static_cast<std::int64_t>(turns.size());
    num_decoding_rows_ += static_cast<std::int64_t>(turns.size());
    const auto id = turns.front().row->request;
    scheduler_.start_sequences(id, first_tokens);
    for (const auto index : finished) scheduler_.finish_sequence(id, index, static_cast<std::int64_t>(step_ms_));
}

void Executor::Loop::advance_beams(std::span<Turn> turns) {
    auto &request = *turns.front().request;
    const auto id = request.id();
    const bool is_first = request.num_decode_steps == 0;
    std::vector<float *> rows;
    for (const auto &turn : turns) {
        rows.push_back(turn.logits);
        if (!is_first) scheduler_.complete_row(*turn.row, turn.row->num_tokens, static_cast<std::int64_t>(step_ms_));
    }
    const auto progress = request.advance_beams(rows, scratch_);
    num_decoded_ += static_cast<std::int64_t>(turns.size());
    num_decoding_rows_ += static_cast<std::int64_t>(turns.size());
    if (progress.is_finished) return;
    if (is_first) {
        scheduler_.start_sequences(id, progress.tokens);
    } else {
        scheduler_.reorder(id, progress.parents, progress.tokens, static_cast<std::int64_t>(step_ms_));
    }
}

void Executor::Loop::record(const StepPlan &plan, double begin_ms, double session_ms) {
    const double now = now_ms();
    if (now - memory_read_ms_ > 250) {
        memory_bytes_ = resident_bytes();
        memory_read_ms_ = now;
    }
    if (config_.iter_stats_max_iterations > 0) {
        IterationStats stats;
        stats.timestamp_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                                 std::chrono::system_clock::now().time_since_epoch())
                                 .count();
        stats.iter = iteration_;
        stats.iter_latency_ms = now - begin_ms;
        stats.session_latency_ms = session_ms;
        stats.new_active_requests_queue_latency_ms = queue_latency_ms_;
        stats.num_new_active_requests = static_cast<std::int32_t>(num_started_);
        stats.num_active_requests = static_cast<std::int32_t>(scheduler_.num_active());
        stats.num_queued_requests = static_cast<std::int32_t>(scheduler_.num_queued());
        stats.num_completed_requests = static_cast<std::int32_t>(num_completed_);
        stats.max_num_active_requests = stats.max_batch_size_static = config_.scheduler.max_batch_size;
        stats.max_num_tokens_static = config_.scheduler.max_num_tokens;
        for (const auto &row : plan.rows) ++(row.is_context ? stats.num_context_requests : stats.num_gen_requests);
        stats.num_scheduled_requests = stats.num_context_requests + stats.num_gen_requests;
        stats.num_paused_requests = static_cast<std::int32_t>(num_paused_);
        stats.num_ctx_tokens = plan.num_context_tokens;
        stats.num_gen_tokens = plan.num_generation_tokens;
        stats.avg_num_decoded_tokens_per_iter =
            num_decoding_rows_ == 0 ? 0 : double(num_decoded_) / double(num_decoding_rows_);
        stats.cpu_mem_usage = memory_bytes_;
        stats.kv_cache = cache_.stats();
        stats.spec_decoding = speculation_;
        const auto drafting = speculation_.num_requests_with_draft_tokens;
        if (drafting > 0)
            stats.spec_decoding.acceptance_length = 1.0 + double(speculation_.num_accepted_tokens) / double(drafting);
        stats.spec_decoding.iter_latency_ms = draft_ms_;
        stats.spec_decoding.draft_overhead = now > begin_ms ? draft_ms_ / (now - begin_ms) : 0;
        const std::scoped_lock lock(mutex_);
        iteration_stats_.push_back(std::move(stats));
        while (static_cast<std::int64_t>(iteration_stats_.size()) > config_.iter_stats_max_iterations)
            iteration_stats_.pop_front();
    }
    num_completed_ = 0;
    if (config_.request_stats_max_iterations > 0) record_requests(plan);
}

void Executor::Loop::record_requests(const StepPlan &plan) {
    RequestStatsPerIteration iteration;
    iteration.iter = iteration_;
    std::unordered_map<RequestId, SequenceId> scheduled;
    for (const auto &row : plan.rows) scheduled.emplace(row.request, row.cache_id);
    for (const auto &[id, request] : requests_) {
        RequestStats stats;
        stats.id = id;
        const bool generates = request->has_started();
        stats.stage = generates ? "GENERATION_IN_PROGRESS" : request->is_scheduled ? "CONTEXT_IN_PROGRESS" : "QUEUED";
        stats.num_generated_tokens = request->num_generated();
        const auto found = scheduled.find(id);
        stats.scheduled = found != scheduled.end();
        stats.paused = request->is_paused;
        if (stats.scheduled && cache_.has_sequence(found->second)) {
            stats.context_prefill_position = std::min(cache_.num_committed(found->second),
                                                      static_cast<std::int32_t>(request->request().input_token_ids.size()));
            stats.cache = cache_.sequence_stats(found->second);
        }
        if (request->num_decode_steps > 0)
            stats.avg_num_decoded_tokens_per_iter =
                double(stats.num_generated_tokens) / double(request->num_decode_steps);
        iteration.request_stats.push_back(stats);
    }
    const std::scoped_lock lock(mutex_);
    request_stats_.push_back(std::move(iteration));
    while (static_cast<std::int64_t>(request_stats_.size()) > config_.request_stats_max_iterations)
        request_stats_.pop_front();
}

}  // namespace trtllm::executor
