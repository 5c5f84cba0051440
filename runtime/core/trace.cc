// The ring of trace events and its JSON.
#include "trace.h"

#include "json_writer.h"

namespace trtllm::executor {

void Trace::span(const char *name, double begin_us, double end_us, std::int64_t count) {
    add({name, 'X', begin_us, end_us - begin_us, 0, count});
}

void Trace::begin_stage(RequestId id, const char *stage, double at_us) { add({stage, 'b', at_us, 0, id, -1}); }

void Trace::end_stage(RequestId id, const char *stage, double at_us) { add({stage, 'e', at_us, 0, id, -1}); }

void Trace::counter(const char *name, double at_us, std::int64_t value) { add({name, 'C', at_us, 0, 0, value}); }

void Trace::add(const Event &event) {
    if (!enabled()) return;
    const std::scoped_lock lock(mutex_);
    if (events_.size() < capacity_) {
        events_.push_back(event);
    } else {
        events_[next_] = event;
        next_ = (next_ + 1) % capacity_;
    }
}

std::string Trace::to_json() const {
    JsonWriter json;
    json.begin_object().field("displayTimeUnit", "ms").key("traceEvents").begin_array();
    json.begin_object().field("name", "thread_name").field("ph", "M").field("pid", 1).field("tid", 1);
    json.key("args").begin_object().field("name", "executor").end_object().end_object();
    const std::scoped_lock lock(mutex_);
    for (std::size_t index = 0; index < events_.size(); ++index) {
        const Event &event = events_[(next_ + index) % events_.size()];
        json.begin_object().field("name", event.name).field("ph", std::string_view(&event.phase, 1));
        json.field("pid", 1).field("tid", 1).field("ts", event.at_us);
        if (event.phase == 'X') {
            json.field("dur", event.duration_us);
            if (event.value >= 0) json.key("args").begin_object().field("count", event.value).end_object();
        } else if (event.phase == 'C') {
            json.key("args").begin_object().field("value", event.value).end_object();
        } else {
            json.field("cat", "request").field("id", event.id);
        }
        json.end_object();
    }
    return json.end_array().end_object().take();
}

}  // namespace trtllm::executor
