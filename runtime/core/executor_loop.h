// The executor's thread: takes requests in, steps the engine, tells what came of it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "active_request.h"
#include "kv_cache_manager.h"
#include "scheduler.h"
#include "step_builder.h"
#include "trace.h"
#include "trtllm/executor.h"

namespace trtllm::executor {

class Executor::Loop {
public:
    Loop(std::shared_ptr<Session> session, ExecutorConfig config);
    ~Loop();

    // From any thread.
    RequestId enqueue(Request request);
    std::vector<Response> await_responses(std::chrono::milliseconds timeout);
    std::size_t num_responses_ready() const;
    void cancel(RequestId id);
    void stop_sequence(RequestId id, std::int32_t sequence_index);
    std::vector<IterationStats> take_iteration_stats();
    std::vector<RequestStatsPerIteration> take_request_stats();
    std::vector<KvCacheEvent> take_kv_cache_events();
    bool can_enqueue() const;
    void between_steps(const std::function<void()> &work);
    void exchange(const std::function<void()> &work, InFlight in_flight);
    void check();
    void clear_reusable_cache();
    void shutdown(ShutdownMode mode);

    const SessionInfo &session_info() const { return info_; }
    const ExecutorConfig &config() const { return config_; }
    const Trace &trace() const { return trace_; }

private:
    struct Stop {
        RequestId id;
        std::int32_t sequence;  // -1: the whole request
    };
    // Work that changes the weights, and what it waits for.
    struct Exchange {
        std::function<void()> work;
        InFlight in_flight;
        std::promise<void> done;
    };
    struct Inbox {
        std::vector<std::pair<RequestId, Request>> requests;
        std::vector<std::pair<double, RequestId>> arrivals;
        std::vector<Stop> stops;
        std::vector<std::packaged_task<void()>> work;
        std::vector<Exchange> exchanges;
        bool empty() const { return requests.empty() && stops.empty() && work.empty() && exchanges.empty(); }
    };
    // Logits that one sequence goes on with: of its newest token, then of the drafts after it, row after row.
    struct Turn {
        const PlannedRow *row;
        ActiveRequest *request;
        std::int32_t sequence;
        float *logits;
        LogitsRows rows;  // the same; which need not be whole where nobody but a sample takes them
        std::int32_t num_rows;
    };

    void validate(const Request &request) const;
    void run();
    bool wait_for_work();
    void take_inbox();
    void admit(RequestId id, Request request, double arrived_ms);
    void apply_stop(const Stop &stop);
    void apply_time_limits();
    void run_exchanges();
    void forget_caches();
    void step();
    void propose_drafts();
    void note_plan(const StepPlan &plan);
    bool run_session(const StepPlan &plan);
    void decode(const StepPlan &plan);
    void take_row(const PlannedRow &row, std::int64_t first, std::vector<Turn> &turns);
    void start_request(const PlannedRow &row, ActiveRequest &request, std::int64_t first, std::vector<Turn> &turns);
    void run_batched_processor(const std::vector<Turn> &turns);
    void take_turns(std::vector<Turn> &turns);
    void advance_sample(const Turn &turn);
    void advance_new(std::span<Turn> turns);
    void advance_beams(std::span<Turn> turns);
    // Runs work on behalf of a request: what it throws ends that request and nothing else.
    void guarded(RequestId id, const std::function<void()> &work);
    void fail_all(const std::string &what);
    void fail(RequestId id, const std::string &what, const std::string &hint);
    void settle(ActiveRequest &request);
    void finish_request(RequestId id, bool keep);
    void deliver();
    void record(const StepPlan &plan, double begin_ms, double session_ms);
    void record_requests(const StepPlan &plan);
    void close();
    double now_ms() const;
    std::int64_t whole_ms() const { return static_cast<std::int64_t>(now_ms()); }
    ActiveRequest *find(RequestId id);

    std::shared_ptr<Session> session_;
    SessionInfo info_;
    ExecutorConfig config_;
    Trace trace_;
    std::chrono::steady_clock::time_point origin_ = std::chrono::steady_clock::now();

    // Shared with callers, under mutex_.
    mutable std::mutex mutex_;
    std::condition_variable wake_loop_, wake_callers_;
    Inbox inbox_;
    std::vector<Response> responses_;
    std::deque<IterationStats> iteration_stats_;
    std::deque<RequestStatsPerIteration> request_stats_;
    std::deque<KvCacheEvent> events_;
    RequestId next_id_ = 1;
    std::int64_t num_waiting_ = 0;  // accepted and not started, as the caller sees it
    bool is_closing_ = false, cancels_on_close_ = false, has_ended_ = false;

    // The loop's own.
    KvCacheManager cache_;
    Scheduler scheduler_;
    StepBuilder builder_;
    StepLogits logits_;  // of the last step
    std::unordered_map<RequestId, std::unique_ptr<ActiveRequest>> requests_;
    std::multimap<double, RequestId> deadlines_;
    std::deque<Exchange> exchanges_;
    std::shared_ptr<DraftProposer> proposer_;
    DecodeScratch scratch_;
    std::deque<std::vector<float>> spare_rows_;
    std::vector<Response> outgoing_;
    std::vector<Turn> turns_;
    double step_ms_ = 0;  // when the logits of this step were there
    std::int64_t iteration_ = 0;
    std::int64_t num_completed_ = 0, num_started_ = 0, num_paused_ = 0;
    double queue_latency_ms_ = 0, draft_ms_ = 0;
    double memory_read_ms_ = -1e9;
    std::int64_t memory_bytes_ = 0;
    SpecDecodingStats speculation_;
    std::int64_t num_decoded_ = 0, num_decoding_rows_ = 0;

    std::mutex thread_mutex_;
    std::thread thread_;
};

}  // namespace trtllm::executor
