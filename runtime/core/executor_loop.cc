// The executor's doors for callers, and the frame of its thread: waiting, taking in, telling, ending.
#include "executor_loop.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "draft_session_proposer.h"
#include "ngram_proposer.h"

namespace trtllm::executor {

namespace {

std::int32_t smaller(std::int32_t wanted, std::int32_t possible) {
    return wanted <= 0 ? possible : std::min(wanted, possible);
}

ExecutorConfig completed(ExecutorConfig config, const SessionInfo &info) {
    auto &scheduler = config.scheduler;
    scheduler.max_batch_size = smaller(scheduler.max_batch_size, info.max_batch_size);
    scheduler.max_num_tokens = smaller(scheduler.max_num_tokens, info.max_num_tokens);
    scheduler.max_seq_len = smaller(scheduler.max_seq_len, info.max_seq_len);
    scheduler.chunk_unit = std::min(smaller(scheduler.chunk_unit, 64), scheduler.max_num_tokens);
    const bool drafts = info.gathers_all_logits && (config.draft_proposer || config.ngram);
    scheduler.max_draft_tokens = !drafts                 ? 0
                                 : config.draft_proposer ? config.max_draft_len
                                                         : config.ngram->max_draft_len;
    return config;
}

}  // namespace

Executor::Loop::Loop(std::shared_ptr<Session> session, ExecutorConfig config)
    : session_(std::move(session)),
      info_(session_->info()),
      config_(completed(std::move(config), info_)),
      trace_(static_cast<std::size_t>(std::max<std::int64_t>(config_.perf_trace_max_events, 0))),
      cache_(info_.cache, config_.kv_cache),
      scheduler_(config_.scheduler, cache_),
      builder_(info_) {
    if (config_.scheduler.max_draft_tokens > 0) {
        proposer_ = config_.draft_proposer;
        if (!proposer_) proposer_ = std::make_shared<NgramProposer>(*config_.ngram);
    }
    thread_ = std::thread([this] { run(); });
}

Executor::Loop::~Loop() { shutdown(ShutdownMode::cancel); }

double Executor::Loop::now_ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - origin_).count();
}

ActiveRequest *Executor::Loop::find(RequestId id) {
    const auto found = requests_.find(id);
    return found == requests_.end() ? nullptr : found->second.get();
}

void Executor::Loop::validate(const Request &request) const {
    const auto &scheduler = config_.scheduler;
    const auto length = static_cast<std::int64_t>(request.input_token_ids.size());
    if (length == 0) throw RequestError("the prompt is empty", "give at least one token");
    if (length >= scheduler.max_seq_len)
        throw RequestError("the prompt has " + std::to_string(length) + " tokens, the engine takes " +
                               std::to_string(scheduler.max_seq_len - 1) + " and one token of output",
                           "shorten it, or rebuild with a larger --max-seq-len");
    for (const auto token : request.input_token_ids)
        if (token < 0 || token >= info_.vocab_size)
            throw RequestError("token id " + std::to_string(token) + " is outside the vocabulary of " +
                                   std::to_string(info_.vocab_size),
                               "use this engine's tokenizer");
    if (request.max_tokens < 1)
        throw RequestError("max_tokens is " + std::to_string(request.max_tokens) + ", must be at least 1",
                           "ask for one token or more");
    if (!(request.priority >= 0.0f && request.priority <= 1.0f))
        throw RequestError("priority is " + std::to_string(request.priority) + ", must be from 0 to 1",
                           "0.5 is the usual one");
    if (request.allotted_time_ms && *request.allotted_time_ms <= 0)
        throw RequestError("allotted_time_ms is " + std::to_string(*request.allotted_time_ms) + ", must be positive",
                           "leave it out for no limit");
    check_sampling(*request.decoding, info_.vocab_size, config_.max_beam_width);
    const auto &sampling = request.decoding->sampling;
    if (request.num_return_sequences < 1 ||
        (sampling.beam_width > 1 && request.num_return_sequences > sampling.beam_width))
        throw RequestError("n is " + std::to_string(request.num_return_sequences) + ", must be at least 1" +
                               (sampling.beam_width > 1 ? " and at most the beam width" : ""),
                           "each sequence is one output");
    if (sampling.beam_width > 1 && request.streaming)
        throw RequestError("a beam search cannot stream: its beginning may change until its end",
                           "set streaming to false, or use_beam_search to false");
    const bool wants_prompt = request.num_prompt_logprobs >= 0 || request.return_context_logits;
    if (wants_prompt && !info_.gathers_all_logits)
        throw RequestError("this engine gives logits of the last token only, not of the whole prompt",
                           "rebuild it with --gather-context-logits");
    if (request.apply_batched_logits_processor && !config_.batched_logits_processor)
        throw RequestError("apply_batched_logits_processor is set, but there is no such processor",
                           "give one when the executor is made");
}

RequestId Executor::Loop::enqueue(Request request) {
    validate(request);
    const std::scoped_lock lock(mutex_);
    if (is_closing_) throw RequestError("the executor has been shut down", "make a new one");
    const auto limit = config_.scheduler.max_queue_size;
    if (limit >= 0 && num_waiting_ >= limit)
        throw RequestError("the queue is full: " + std::to_string(num_waiting_) + " requests wait",
                           "try again later, or raise max_queue_size");
    const auto id = next_id_++;
    ++num_waiting_;
    inbox_.requests.emplace_back(id, std::move(request));
    inbox_.arrivals.emplace_back(now_ms(), id);
    wake_loop_.notify_one();
    return id;
}

std::vector<Response> Executor::Loop::await_responses(std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    wake_callers_.wait_for(lock, timeout, [this] { return !responses_.empty() || has_ended_; });
    auto taken = std::exchange(responses_, {});
    if (static_cast<std::int64_t>(taken.size()) > config_.max_pending_responses) wake_loop_.notify_one();
    return taken;
}

std::size_t Executor::Loop::num_responses_ready() const {
    const std::scoped_lock lock(mutex_);
    return responses_.size();
}

void Executor::Loop::cancel(RequestId id) { stop_sequence(id, -1); }

void Executor::Loop::stop_sequence(RequestId id, std::int32_t sequence_index) {
    const std::scoped_lock lock(mutex_);
    inbox_.stops.push_back({id, sequence_index});
    wake_loop_.notify_one();
}

template <typename T>
static std::vector<T> take_all(std::mutex &mutex, std::deque<T> &items) {
    const std::scoped_lock lock(mutex);
    std::vector<T> taken(std::make_move_iterator(items.begin()), std::make_move_iterator(items.end()));
    items.clear();
    return taken;
}

std::vector<IterationStats> Executor::Loop::take_iteration_stats() { return take_all(mutex_, iteration_stats_); }

std::vector<RequestStatsPerIteration> Executor::Loop::take_request_stats() { return take_all(mutex_, request_stats_); }

std::vector<KvCacheEvent> Executor::Loop::take_kv_cache_events() { return take_all(mutex_, events_); }

bool Executor::Loop::can_enqueue() const {
    const std::scoped_lock lock(mutex_);
    const auto limit = config_.scheduler.max_queue_size;
    return !is_closing_ && (limit < 0 || num_waiting_ < limit);
}

void Executor::Loop::between_steps(const std::function<void()> &work) {
    std::packaged_task<void()> task(work);
    auto done = task.get_future();
    {
        const std::scoped_lock lock(mutex_);
        if (has_ended_ || is_closing_) throw RequestError("the executor has been shut down", "make a new one");
        inbox_.work.push_back(std::move(task));
        wake_loop_.notify_one();
    }
    done.get();
}

void Executor::Loop::check() {
    between_steps([this] {
        cache_.check();
        scheduler_.check();
        if (!requests_.empty()) return;
        if (cache_.num_available_blocks() != cache_.num_blocks())
            throw std::logic_error("the executor is idle, but " +
                                   std::to_string(cache_.num_blocks() - cache_.num_available_blocks()) +
                                   " cache blocks did not come back");
        if (scheduler_.num_queued() != 0 || scheduler_.num_active() != 0 || !deadlines_.empty())
            throw std::logic_error("the executor is idle, but its scheduler or its clock still knows requests");
    });
}

void Executor::Loop::clear_reusable_cache() {
    between_steps([this] { cache_.clear_reusable(whole_ms()); });
}

void Executor::Loop::shutdown(ShutdownMode mode) {
    {
        const std::scoped_lock lock(mutex_);
        is_closing_ = true;
        cancels_on_close_ = cancels_on_close_ || mode == ShutdownMode::cancel;
        wake_loop_.notify_one();
    }
    const std::scoped_lock lock(thread_mutex_);
    if (thread_.joinable()) thread_.join();
}

void Executor::Loop::run() {
    while (wait_for_work()) {
        try {
            take_inbox();
            apply_time_limits();
            run_exchanges();
            deliver();
            if (scheduler_.has_work()) step();
        } catch (const std::exception &error) {  // nobody may wait for ever, whatever went wrong
            fail_all(std::string("the executor failed: ") + error.what());
        }
    }
    close();
}

// False when it is time to end.
bool Executor::Loop::wait_for_work() {
    std::unique_lock lock(mutex_);
    const auto backlog = [this] { return static_cast<std::int64_t>(responses_.size()) > config_.max_pending_responses; };
    wake_loop_.wait(lock, [&] {
        const bool can_step = !requests_.empty() && (!backlog() || is_closing_);
        const bool can_exchange = requests_.empty() && !exchanges_.empty();
        return can_step || can_exchange || !inbox_.empty() || is_closing_;
    });
    const bool has_work = !requests_.empty() || !inbox_.empty() || !exchanges_.empty();
    return !is_closing_ || (!cancels_on_close_ && has_work);
}

void Executor::Loop::take_inbox() {
    Inbox taken;
    {
        const std::scoped_lock lock(mutex_);
        std::swap(taken, inbox_);
    }
    for (std::size_t index = 0; index < taken.requests.size(); ++index)
        admit(taken.requests[index].first, std::move(taken.requests[index].second), taken.arrivals[index].first);
    for (const auto &stop : taken.stops) apply_stop(stop);
    for (auto &work : taken.work) work();
    for (auto &exchange : taken.exchanges) exchanges_.push_back(std::move(exchange));
}

void Executor::Loop::admit(RequestId id, Request request, double arrived_ms) {
    SchedulerRequest entry;
    entry.id = id;
    entry.prompt = request.input_token_ids;
    entry.max_tokens = request.max_tokens;
    entry.priority = request.priority;
    entry.cache.key = request.cache_key;
    entry.cache.retention = request.retention;
    if (request.return_context_logits || request.num_prompt_logprobs >= 0) entry.cache.max_reuse_tokens = 0;
    const auto limit = request.allotted_time_ms;
    auto active = std::make_unique<ActiveRequest>(id, std::move(request), info_.vocab_size,
                                                  config_.scheduler.max_seq_len, arrived_ms);
    entry.num_sequences = active->num_sequences();
    entry.is_beam_search = active->is_beam_search();
    requests_[id] = std::move(active);
    trace_.begin_stage(id, "queued", arrived_ms * 1000);
    guarded(id, [&] {
        scheduler_.add(std::move(entry));
        if (limit) deadlines_.emplace(arrived_ms + static_cast<double>(*limit), id);
    });
}

void Executor::Loop::apply_stop(const Stop &stop) {
    auto *request = find(stop.id);
    if (request == nullptr) return;
    if (stop.sequence < 0) {
        request->finish_all(FinishReason::cancelled);
    } else {
        if (!request->has_started() || request->is_beam_search()) return;
        if (stop.sequence >= request->num_sequences()) return;
        if (request->sequences()[static_cast<std::size_t>(stop.sequence)].is_finished) return;
        request->finish_sequence(stop.sequence, FinishReason::stopped);
        scheduler_.finish_sequence(stop.id, stop.sequence, whole_ms());
    }
    settle(*request);
}

void Executor::Loop::apply_time_limits() {
    while (!deadlines_.empty() && deadlines_.begin()->first <= now_ms()) {
        const auto id = deadlines_.begin()->second;
        deadlines_.erase(deadlines_.begin());
        if (auto *request = find(id)) {
            request->finish_all(FinishReason::timed_out);
            settle(*request);
        }
    }
}

// Tells what is new of a request, and lets it go when it has ended.
void Executor::Loop::settle(ActiveRequest &request) {
    request.collect(outgoing_);
    if (request.is_finished()) finish_request(request.id(), true);
}

void Executor::Loop::finish_request(RequestId id, bool keep) {
    const auto found = requests_.find(id);
    const auto request = std::move(found->second);
    requests_.erase(found);
    const char *stage = !request->is_scheduled ? "queued" : request->has_started() ? "generation" : "context";
    trace_.end_stage(id, stage, now_ms() * 1000);
    if (proposer_)
        for (std::int32_t index = 0; index < request->num_sequences(); ++index)
            proposer_->forget((id << 16) + static_cast<SequenceId>(index));
    if (!request->is_scheduled) {
        const std::scoped_lock lock(mutex_);
        --num_waiting_;
    }
    if (request->request().allotted_time_ms)
        std::erase_if(deadlines_, [id](const auto &entry) { return entry.second == id; });
    scheduler_.remove(id, whole_ms(), keep);
    ++num_completed_;
}

void Executor::Loop::guarded(RequestId id, const std::function<void()> &work) {
    try {
        work();
    } catch (const RequestError &error) {
        fail(id, error.what(), error.hint());
    } catch (const NonFiniteLogits &error) {
        fail(id, error.what(), "the engine computes in too narrow a type, or its weights are damaged");
    } catch (const ImpossibleConstraint &error) {
        fail(id, error.what(), "loosen bad words, bias, min_tokens or the grammar");
    } catch (const std::exception &error) {
        fail(id, error.what(), "it came from what was given with this request; others go on");
    }
}

void Executor::Loop::fail(RequestId id, const std::string &what, const std::string &hint) {
    if (find(id) == nullptr) return;
    Response response;
    response.request_id = id;
    response.error = what.empty() ? "the request failed" : what;
    response.error_hint = hint;
    response.is_sequence_final = response.is_final = true;
    outgoing_.push_back(std::move(response));
    finish_request(id, false);
}

void Executor::Loop::fail_all(const std::string &what) {
    std::vector<RequestId> left;
    for (const auto &entry : requests_) left.push_back(entry.first);
    std::sort(left.begin(), left.end());
    for (const auto id : left) fail(id, what, "this is a defect of the executor: please report it");
    deliver();
}

void Executor::Loop::deliver() {
    auto events = cache_.options().event_buffer_max_size > 0 ? cache_.take_events() : std::vector<KvCacheEvent>{};
    if (outgoing_.empty() && events.empty()) return;
    const std::scoped_lock lock(mutex_);
    for (auto &event : events) events_.push_back(std::move(event));
    while (events_.size() > cache_.options().event_buffer_max_size) events_.pop_front();
    if (outgoing_.empty()) return;
    if (responses_.empty()) {
        responses_.swap(outgoing_);
    } else {
        std::move(outgoing_.begin(), outgoing_.end(), std::back_inserter(responses_));
    }
    outgoing_.clear();
    wake_callers_.notify_all();
}

void Executor::Loop::close() {
    take_inbox();
    std::vector<RequestId> left;
    for (const auto &entry : requests_) left.push_back(entry.first);
    std::sort(left.begin(), left.end());
    for (const auto id : left) {
        auto &request = *requests_.at(id);
        request.finish_all(FinishReason::cancelled);
        settle(request);
    }
    deliver();
    for (auto &exchange : exchanges_)
        exchange.done.set_exception(
            std::make_exception_ptr(RequestError("the executor has been shut down", "make a new one")));
    exchanges_.clear();
    const std::scoped_lock lock(mutex_);
    has_ended_ = true;
    wake_callers_.notify_all();
}

}  // namespace trtllm::executor
