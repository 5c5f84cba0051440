// What the executor did when: the newest events, as Chrome trace JSON that Perfetto and chrome://tracing show.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

// Events are named by string literals. Safe to read while another thread writes.
class Trace {
public:
    explicit Trace(std::size_t capacity) : capacity_(capacity) {}

    bool enabled() const { return capacity_ > 0; }
    // A span of the step loop, in microseconds of the executor's clock. `count` is shown with it when not negative.
    void span(const char *name, double begin_us, double end_us, std::int64_t count = -1);
    // A request's stage begins or ends ("queued", "context", "generation").
    void begin_stage(RequestId id, const char *stage, double at_us);
    void end_stage(RequestId id, const char *stage, double at_us);
    // A number over time.
    void counter(const char *name, double at_us, std::int64_t value);
    std::string to_json() const;

private:
    struct Event {
        const char *name;
        char phase;  // X complete, b and e asynchronous, C counter
        double at_us, duration_us;
        std::uint64_t id;
        std::int64_t value;
    };
    void add(const Event &event);

    std::size_t capacity_;
    mutable std::mutex mutex_;
    std::vector<Event> events_;
    std::size_t next_ = 0;  // where the ring goes on once it is full
};

}  // namespace trtllm::executor
