// The public class: a door to the loop.
#include "trtllm/executor.h"

#include "executor_loop.h"

namespace trtllm::executor {

Executor::Executor(std::shared_ptr<Session> session, ExecutorConfig config)
    : loop_(std::make_unique<Loop>(std::move(session), std::move(config))) {}

Executor::~Executor() { loop_->shutdown(ShutdownMode::cancel); }

RequestId Executor::enqueue(Request request) { return loop_->enqueue(std::move(request)); }

std::vector<Response> Executor::await_responses(std::chrono::milliseconds timeout) {
    return loop_->await_responses(timeout);
}

std::size_t Executor::num_responses_ready() const { return loop_->num_responses_ready(); }

void Executor::cancel(RequestId id) { loop_->cancel(id); }

void Executor::stop_sequence(RequestId id, std::int32_t sequence_index) { loop_->stop_sequence(id, sequence_index); }

std::vector<IterationStats> Executor::take_iteration_stats() { return loop_->take_iteration_stats(); }

std::vector<RequestStatsPerIteration> Executor::take_request_stats() { return loop_->take_request_stats(); }

std::vector<KvCacheEvent> Executor::take_kv_cache_events() { return loop_->take_kv_cache_events(); }

std::string Executor::trace_json() const { return loop_->trace().to_json(); }

bool Executor::can_enqueue_requests() const { return loop_->can_enqueue(); }

const SessionInfo &Executor::session_info() const { return loop_->session_info(); }

const ExecutorConfig &Executor::config() const { return loop_->config(); }

void Executor::between_steps(const std::function<void()> &work) { loop_->between_steps(work); }

void Executor::exchange(const std::function<void()> &work, InFlight in_flight) { loop_->exchange(work, in_flight); }

void Executor::clear_reusable_cache() { loop_->clear_reusable_cache(); }

void Executor::check() { loop_->check(); }

void Executor::shutdown(ShutdownMode mode) { loop_->shutdown(mode); }

}  // namespace trtllm::executor
