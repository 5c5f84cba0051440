// Changing the weights of a running engine: what waits for whom, and which caches are forgotten.
#include <algorithm>

#include "executor_loop.h"

namespace trtllm::executor {

void Executor::Loop::exchange(const std::function<void()> &work, InFlight in_flight) {
    std::promise<void> promise;
    auto done = promise.get_future();
    {
        const std::scoped_lock lock(mutex_);
        if (has_ended_ || is_closing_) throw RequestError("the executor has been shut down", "make a new one");
        inbox_.exchanges.push_back({work, in_flight, std::move(promise)});
        wake_loop_.notify_one();
    }
    done.get();
}

// While an exchange waits no request starts, and there is always one under way: what it waits for.
void Executor::Loop::run_exchanges() {
    while (!exchanges_.empty()) {
        const bool finishes = exchanges_.front().in_flight == InFlight::finish;
        const bool ready = finishes ? scheduler_.num_active() == 0 && scheduler_.num_paused() == 0
                                    : scheduler_.num_active_beam_searches() == 0;
        scheduler_.hold(!ready);
        if (!ready) return;
        Exchange exchange = std::move(exchanges_.front());
        exchanges_.pop_front();
        try {
            exchange.work();
            forget_caches();
            exchange.done.set_value();
        } catch (...) {
            exchange.done.set_exception(std::current_exception());
        }
    }
}

// Every request under way loses its cache and waits for its turn to compute it again.
void Executor::Loop::forget_caches() {
    const auto outcome = scheduler_.restart_all(whole_ms());
    for (const auto id : outcome.restarted) {
        auto *request = find(id);
        request->is_paused = true;
        ++request->metrics.num_pauses;
        if (!request->has_started()) request->forget_prompt_rows();
    }
    cache_.clear_reusable(whole_ms());
    for (const auto id : outcome.too_large)
        fail(id, "the cache cannot hold what this request would compute again after the change of weights",
             "give the cache more memory, or change the weights when no request is under way");
}

}  // namespace trtllm::executor
