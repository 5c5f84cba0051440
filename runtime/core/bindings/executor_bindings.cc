// The executor in Python: its session, callbacks and results cross the interpreter's lock here and nowhere else.
#include "executor_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "python_session.h"
#include "runtime/core/draft_session_proposer.h"
#include "trtllm/executor.h"

namespace nb = nanobind;

namespace trtllm::executor {

namespace {

using Retention = std::tuple<std::int32_t, std::int32_t, std::int32_t, std::optional<std::int64_t>>;

class PythonConstraint : public TokenConstraint {
public:
    PythonConstraint(nb::object object, std::int32_t vocab_size)
        : object_(hold(std::move(object))), words_((static_cast<std::size_t>(vocab_size) + 31) / 32) {}

    bool fill(std::uint32_t *allowed) override {
        const nb::gil_scoped_acquire lock;
        return nb::cast<bool>(object_->object.attr("fill")(view(allowed, {words_})));
    }
    void accept(TokenId token) override {
        const nb::gil_scoped_acquire lock;
        object_->object.attr("accept")(token);
    }
    std::unique_ptr<TokenConstraint> clone() const override {
        const nb::gil_scoped_acquire lock;
        return std::make_unique<PythonConstraint>(object_->object.attr("clone")(), static_cast<std::int32_t>(words_ * 32));
    }

private:
    std::shared_ptr<Held> object_;
    std::size_t words_;
};

nb::list token_list(std::span<const TokenId> tokens) {
    nb::list result;
    for (const auto token : tokens) result.append(token);
    return result;
}

LogitsProcessor logits_processor(nb::object callback) {
    return [held = hold(std::move(callback))](RequestId id, std::int32_t sequence, std::span<const TokenId> tokens,
                                              float *logits, std::int32_t vocab_size) {
        const nb::gil_scoped_acquire lock;
        held->object(id, sequence, token_list(tokens), view(logits, {static_cast<std::size_t>(vocab_size)}));
    };
}

BatchedLogitsProcessor batched_processor(nb::object callback) {
    return [held = hold(std::move(callback))](const BatchedLogits &batch) {
        const nb::gil_scoped_acquire lock;
        nb::list tokens, rows;
        for (const auto &item : batch.tokens) tokens.append(token_list(item));
        for (auto *row : batch.rows) rows.append(view(row, {static_cast<std::size_t>(batch.vocab_size)}));
        held->object(batch.ids, batch.sequences, tokens, rows);
    };
}

// What Python fills in; requests are made of it when they are enqueued.
struct PythonRequest {
    Request request;
    DecodingParams decoding;
    std::vector<Retention> retention_ranges;
    nb::object logits_processor = nb::none();
    nb::object constraint = nb::none();
};

struct PythonConfig {
    ExecutorConfig config;
    nb::object batched_logits_processor = nb::none();
    nb::object draft_session = nb::none();
    std::int32_t ngram_max_draft_len = 0;
    std::int32_t ngram_max_matching_ngram_size = 3;
};

template <typename Enum>
struct Name {
    const char *text;
    Enum value;
};

constexpr Name<CapacitySchedulerPolicy> capacity_policies[] = {
    {"GUARANTEED_NO_EVICT", CapacitySchedulerPolicy::guaranteed_no_evict},
    {"MAX_UTILIZATION", CapacitySchedulerPolicy::max_utilization},
    {"STATIC_BATCH", CapacitySchedulerPolicy::static_batch},
};
constexpr Name<ContextChunkingPolicy> chunking_policies[] = {
    {"FIRST_COME_FIRST_SERVED", ContextChunkingPolicy::first_come_first_served},
    {"EQUAL_PROGRESS", ContextChunkingPolicy::equal_progress},
};
constexpr Name<FinishReason> finish_reasons[] = {
    {"", FinishReason::not_finished},      {"end_id", FinishReason::end_id},       {"stop_words", FinishReason::stop_words},
    {"length", FinishReason::length},      {"timed_out", FinishReason::timed_out}, {"cancelled", FinishReason::cancelled},
    {"stopped", FinishReason::stopped},
};

template <typename Enum, std::size_t count>
Enum named(const Name<Enum> (&names)[count], const std::string &text) {
    for (const auto &name : names)
        if (text == name.text) return name.value;
    std::string known;
    for (const auto &name : names) known += (known.empty() ? "" : ", ") + std::string(name.text);
    throw RequestError("unknown policy '" + text + "'", "known: " + known);
}

template <typename Enum, std::size_t count>
std::string name_of(const Name<Enum> (&names)[count], Enum value) {
    for (const auto &name : names)
        if (value == name.value) return name.text;
    return "";
}

std::vector<float> float_vector(nb::handle values) {
    nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> array;
    if (nb::try_cast(values, array)) return {array.data(), array.data() + array.shape(0)};
    return nb::cast<std::vector<float>>(values);
}

std::vector<std::tuple<TokenId, float, std::int32_t>> logprob_tuples(const std::vector<TokenLogprob> &items) {
    std::vector<std::tuple<TokenId, float, std::int32_t>> result;
    result.reserve(items.size());
    for (const auto &item : items) result.emplace_back(item.token, item.logprob, item.rank);
    return result;
}

nb::list logprob_lists(const std::vector<std::vector<TokenLogprob>> &items) {
    nb::list result;
    for (const auto &item : items) result.append(nb::cast(logprob_tuples(item)));
    return result;
}

// The matrix lives as long as the response or the array, whichever is longer.
nb::object matrix(const std::shared_ptr<LogitsMatrix> &logits) {
    if (!logits) return nb::none();
    auto *shared = new std::shared_ptr<LogitsMatrix>(logits);
    const nb::capsule owner(shared, [](void *data) noexcept { delete static_cast<std::shared_ptr<LogitsMatrix> *>(data); });
    const std::size_t shape[] = {static_cast<std::size_t>(logits->rows), static_cast<std::size_t>(logits->columns)};
    return nb::cast(nb::ndarray<nb::numpy, float>(logits->values.data(), 2, shape, owner));
}

nb::object metrics_dict(const std::optional<RequestPerfMetrics> &metrics) {
    if (!metrics) return nb::none();
    nb::dict result;
    result["arrival_ms"] = metrics->arrival;
    result["first_scheduled_ms"] = metrics->first_scheduled;
    result["first_token_ms"] = metrics->first_token;
    result["last_token_ms"] = metrics->last_token;
    result["first_iter"] = metrics->first_iter;
    result["last_iter"] = metrics->last_iter;
    result["num_computed_prompt_tokens"] = metrics->num_computed_prompt_tokens;
    result["num_reused_tokens"] = metrics->num_reused_tokens;
    result["num_total_allocated_blocks"] = metrics->num_total_allocated_blocks;
    result["num_new_allocated_blocks"] = metrics->num_new_allocated_blocks;
    result["num_reused_blocks"] = metrics->num_reused_blocks;
    result["num_missed_blocks"] = metrics->num_missed_blocks;
    result["num_pauses"] = metrics->num_pauses;
    result["total_draft_tokens"] = metrics->total_draft_tokens;
    result["total_accepted_draft_tokens"] = metrics->total_accepted_draft_tokens;
    return result;
}

// The executor with the Python objects it needs; everything that may wait lets go of the interpreter's lock.
class PythonExecutor {
public:
    PythonExecutor(nb::object session, const PythonConfig &given) {
        ExecutorConfig config = given.config;
        if (!given.batched_logits_processor.is_none())
            config.batched_logits_processor = batched_processor(given.batched_logits_processor);
        if (given.ngram_max_draft_len > 0)
            config.ngram = NgramConfig{given.ngram_max_draft_len, given.ngram_max_matching_ngram_size};
        if (!given.draft_session.is_none())
            config.draft_proposer = std::make_shared<DraftSessionProposer>(std::make_shared<PythonSession>(given.draft_session));
        auto engine = std::make_shared<PythonSession>(std::move(session));
        const nb::gil_scoped_release unlock;
        executor_ = std::make_unique<Executor>(std::move(engine), std::move(config));
    }

    ~PythonExecutor() {
        const nb::gil_scoped_release unlock;
        executor_.reset();
    }

    RequestId enqueue(const PythonRequest &given) {
        Request request = given.request;
        request.decoding = std::make_shared<DecodingParams>(given.decoding);
        for (const auto &[begin, end, priority, duration] : given.retention_ranges)
            request.retention.ranges.push_back({begin, end, priority, duration});
        if (!given.logits_processor.is_none()) request.logits_processor = logits_processor(given.logits_processor);
        if (!given.constraint.is_none())
            request.constraint = std::make_shared<PythonConstraint>(given.constraint, executor_->session_info().vocab_size);
        const nb::gil_scoped_release unlock;
        return executor_->enqueue(std::move(request));
    }

    std::vector<Response> await_responses(std::int64_t timeout_ms) {
        const nb::gil_scoped_release unlock;
        return executor_->await_responses(std::chrono::milliseconds(timeout_ms));
    }

    void between_steps(nb::object work) {
        const auto held = hold(std::move(work));
        const nb::gil_scoped_release unlock;
        executor_->between_steps([held] {
            const nb::gil_scoped_acquire lock;
            held->object();
        });
    }

    void exchange(nb::object work, bool recompute) {
        const auto held = hold(std::move(work));
        const nb::gil_scoped_release unlock;
        executor_->exchange(
            [held] {
                const nb::gil_scoped_acquire lock;
                held->object();
            },
            recompute ? InFlight::recompute : InFlight::finish);
    }

    template <typename Items>
    static std::vector<std::string> jsons(const Items &items) {
        std::vector<std::string> result;
        for (const auto &item : items) {
            if constexpr (requires { item.to_json(); }) result.push_back(item.to_json());
            else result.push_back(to_json(item));
        }
        return result;
    }

    Executor &executor() { return *executor_; }

private:
    std::unique_ptr<Executor> executor_;
};

void bind_request(nb::module_ &module) {
    using P = PythonRequest;
    auto cls = nb::class_<P>(module, "ExecutorRequest", "What the executor is asked for: see runtime/core's Request.");
    cls.def(nb::init<>());
    const auto plain = [&](const char *name, auto Request::*member) {
        using T = std::remove_reference_t<decltype(std::declval<Request>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.request.*member; },
            [member](P &self, T value) { self.request.*member = std::move(value); }, nb::for_setter(nb::arg("value").none()));
    };
    const auto decoding = [&](const char *name, auto DecodingParams::*member) {
        using T = std::remove_reference_t<decltype(std::declval<DecodingParams>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.decoding.*member; },
            [member](P &self, T value) { self.decoding.*member = std::move(value); });
    };
    const auto sampling = [&](const char *name, auto SamplingConfig::*member) {
        using T = std::remove_reference_t<decltype(std::declval<SamplingConfig>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.decoding.sampling.*member; },
            [member](P &self, T value) { self.decoding.sampling.*member = std::move(value); },
            nb::for_setter(nb::arg("value").none()));
    };
    plain("input_token_ids", &Request::input_token_ids);
    plain("max_tokens", &Request::max_tokens);
    plain("streaming", &Request::streaming);
    plain("num_return_sequences", &Request::num_return_sequences);
    plain("num_prompt_logprobs", &Request::num_prompt_logprobs);
    plain("return_context_logits", &Request::return_context_logits);
    plain("return_generation_logits", &Request::return_generation_logits);
    plain("priority", &Request::priority);
    plain("allotted_time_ms", &Request::allotted_time_ms);
    plain("apply_batched_logits_processor", &Request::apply_batched_logits_processor);
    plain("allow_drafts", &Request::allow_drafts);
    decoding("end_ids", &DecodingParams::end_ids);
    decoding("bad_words", &DecodingParams::bad_words);
    decoding("stop_words", &DecodingParams::stop_words);
    decoding("logit_bias", &DecodingParams::logit_bias);
    decoding("num_logprobs", &DecodingParams::num_logprobs);
    cls.def_prop_rw(
        "embedding_bias", [](const P &self) { return self.decoding.embedding_bias; },
        [](P &self, nb::object values) { self.decoding.embedding_bias = float_vector(values); });
    sampling("beam_width", &SamplingConfig::beam_width);
    sampling("beam_width_array", &SamplingConfig::beam_width_array);
    sampling("temperature", &SamplingConfig::temperature);
    sampling("top_k", &SamplingConfig::top_k);
    sampling("top_p", &SamplingConfig::top_p);
    sampling("top_p_min", &SamplingConfig::top_p_min);
    sampling("top_p_decay", &SamplingConfig::top_p_decay);
    sampling("top_p_reset_id", &SamplingConfig::top_p_reset_id);
    sampling("min_p", &SamplingConfig::min_p);
    sampling("seed", &SamplingConfig::seed);
    sampling("repetition_penalty", &SamplingConfig::repetition_penalty);
    sampling("presence_penalty", &SamplingConfig::presence_penalty);
    sampling("frequency_penalty", &SamplingConfig::frequency_penalty);
    sampling("prompt_ignore_length", &SamplingConfig::prompt_ignore_length);
    sampling("min_tokens", &SamplingConfig::min_tokens);
    sampling("no_repeat_ngram_size", &SamplingConfig::no_repeat_ngram_size);
    sampling("length_penalty", &SamplingConfig::length_penalty);
    sampling("beam_search_diversity_rate", &SamplingConfig::beam_search_diversity_rate);
    sampling("early_stopping", &SamplingConfig::early_stopping);
    cls.def_prop_rw(
        "adapter_id", [](const P &self) { return self.request.cache_key.adapter_id; },
        [](P &self, std::uint64_t value) { self.request.cache_key.adapter_id = value; });
    cls.def_prop_rw(
        "cache_salt", [](const P &self) { return self.request.cache_key.salt; },
        [](P &self, std::uint64_t value) { self.request.cache_key.salt = value; });
    cls.def_rw("retention_ranges", &P::retention_ranges);
    cls.def_prop_rw(
        "decode_priority", [](const P &self) { return self.request.retention.decode_priority; },
        [](P &self, std::int32_t value) { self.request.retention.decode_priority = value; });
    cls.def_prop_rw(
        "decode_duration_ms", [](const P &self) { return self.request.retention.decode_duration_ms; },
        [](P &self, std::optional<std::int64_t> value) { self.request.retention.decode_duration_ms = value; },
        nb::for_setter(nb::arg("value").none()));
    cls.def_rw("logits_processor", &P::logits_processor, nb::arg("value").none());
    cls.def_rw("constraint", &P::constraint, nb::arg("value").none());
}

void bind_config(nb::module_ &module) {
    using P = PythonConfig;
    auto cls = nb::class_<P>(module, "ExecutorConfig", "How the executor works: see runtime/core's ExecutorConfig.");
    cls.def(nb::init<>());
    const auto plain = [&](const char *name, auto ExecutorConfig::*member) {
        using T = std::remove_reference_t<decltype(std::declval<ExecutorConfig>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.config.*member; },
            [member](P &self, T value) { self.config.*member = value; });
    };
    const auto scheduler = [&](const char *name, auto SchedulerConfig::*member) {
        using T = std::remove_reference_t<decltype(std::declval<SchedulerConfig>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.config.scheduler.*member; },
            [member](P &self, T value) { self.config.scheduler.*member = value; });
    };
    const auto cache = [&](const char *name, auto KvCacheOptions::*member) {
        using T = std::remove_reference_t<decltype(std::declval<KvCacheOptions>().*member)>;
        cls.def_prop_rw(
            name, [member](const P &self) -> T { return self.config.kv_cache.*member; },
            [member](P &self, T value) { self.config.kv_cache.*member = value; });
    };
    cls.def_prop_rw(
        "capacity_scheduler_policy",
        [](const P &self) { return name_of(capacity_policies, self.config.scheduler.capacity_scheduler_policy); },
        [](P &self, const std::string &name) {
            self.config.scheduler.capacity_scheduler_policy = named(capacity_policies, name);
        });
    cls.def_prop_rw(
        "context_chunking_policy",
        [](const P &self) { return name_of(chunking_policies, self.config.scheduler.context_chunking_policy); },
        [](P &self, const std::string &name) {
            self.config.scheduler.context_chunking_policy = named(chunking_policies, name);
        });
    scheduler("enable_chunked_context", &SchedulerConfig::enable_chunked_context);
    scheduler("max_batch_size", &SchedulerConfig::max_batch_size);
    scheduler("max_num_tokens", &SchedulerConfig::max_num_tokens);
    scheduler("max_seq_len", &SchedulerConfig::max_seq_len);
    scheduler("chunk_unit", &SchedulerConfig::chunk_unit);
    scheduler("max_queue_size", &SchedulerConfig::max_queue_size);
    cache("enable_block_reuse", &KvCacheOptions::enable_block_reuse);
    cache("enable_partial_reuse", &KvCacheOptions::enable_partial_reuse);
    cache("copy_on_partial_reuse", &KvCacheOptions::copy_on_partial_reuse);
    cache("onboard_blocks", &KvCacheOptions::onboard_blocks);
    cache("secondary_offload_min_priority", &KvCacheOptions::offload_min_priority);
    cache("min_partial_tokens", &KvCacheOptions::min_partial_tokens);
    cache("event_buffer_max_size", &KvCacheOptions::event_buffer_max_size);
    plain("max_beam_width", &ExecutorConfig::max_beam_width);
    plain("iter_stats_max_iterations", &ExecutorConfig::iter_stats_max_iterations);
    plain("request_stats_max_iterations", &ExecutorConfig::request_stats_max_iterations);
    plain("perf_trace_max_events", &ExecutorConfig::perf_trace_max_events);
    plain("max_pending_responses", &ExecutorConfig::max_pending_responses);
    plain("max_draft_len", &ExecutorConfig::max_draft_len);
    cls.def_rw("batched_logits_processor", &P::batched_logits_processor, nb::arg("value").none());
    cls.def_rw("draft_session", &P::draft_session, nb::arg("value").none());
    cls.def_rw("ngram_max_draft_len", &P::ngram_max_draft_len);
    cls.def_rw("ngram_max_matching_ngram_size", &P::ngram_max_matching_ngram_size);
}

void bind_response(nb::module_ &module) {
    auto cls = nb::class_<Response>(module, "ExecutorResponse", "News of one sequence: see runtime/core's Response.");
    cls.def_ro("request_id", &Response::request_id);
    cls.def_ro("sequence_index", &Response::sequence_index);
    cls.def_ro("token_ids", &Response::token_ids);
    cls.def_prop_ro("logprobs", [](const Response &self) { return logprob_tuples(self.logprobs); });
    cls.def_prop_ro("top_logprobs", [](const Response &self) { return logprob_lists(self.top_logprobs); });
    cls.def_ro("cumulative_logprob", &Response::cumulative_logprob);
    cls.def_prop_ro("finish_reason", [](const Response &self) { return name_of(finish_reasons, self.finish_reason); });
    cls.def_ro("stop_token", &Response::stop_token);
    cls.def_ro("stop_word_length", &Response::stop_word_length);
    cls.def_ro("is_sequence_final", &Response::is_sequence_final);
    cls.def_ro("is_final", &Response::is_final);
    cls.def_ro("error", &Response::error);
    cls.def_ro("error_hint", &Response::error_hint);
    cls.def_prop_ro("prompt_logprobs", [](const Response &self) { return logprob_tuples(self.prompt_logprobs); });
    cls.def_prop_ro("top_prompt_logprobs", [](const Response &self) { return logprob_lists(self.top_prompt_logprobs); });
    cls.def_prop_ro("context_logits", [](const Response &self) { return matrix(self.context_logits); });
    cls.def_prop_ro("generation_logits", [](const Response &self) { return matrix(self.generation_logits); });
    cls.def_prop_ro("perf_metrics", [](const Response &self) { return metrics_dict(self.perf_metrics); });
}

void bind_executor_class(nb::module_ &module) {
    using P = PythonExecutor;
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    auto cls = nb::class_<P>(module, "Executor", "Steps an engine on a thread of its own: see runtime/core's Executor.");
    cls.def(nb::init<nb::object, const PythonConfig &>(), nb::arg("session"), nb::arg("config"));
    cls.def("enqueue", &P::enqueue, nb::arg("request"));
    cls.def("await_responses", &P::await_responses, nb::arg("timeout_ms"));
    cls.def("num_responses_ready", [](P &self) { return self.executor().num_responses_ready(); });
    cls.def("cancel", [](P &self, RequestId id) { self.executor().cancel(id); }, nb::arg("request_id"), unlocked);
    cls.def(
        "stop_sequence", [](P &self, RequestId id, std::int32_t index) { self.executor().stop_sequence(id, index); },
        nb::arg("request_id"), nb::arg("sequence_index"), unlocked);
    cls.def("take_iteration_stats", [](P &self) { return P::jsons(self.executor().take_iteration_stats()); });
    cls.def("take_request_stats", [](P &self) { return P::jsons(self.executor().take_request_stats()); });
    cls.def("take_kv_cache_events", [](P &self) { return P::jsons(self.executor().take_kv_cache_events()); });
    cls.def("trace_json", [](P &self) { return self.executor().trace_json(); });
    cls.def("can_enqueue_requests", [](P &self) { return self.executor().can_enqueue_requests(); });
    cls.def("between_steps", &P::between_steps, nb::arg("work"));
    cls.def("exchange", &P::exchange, nb::arg("work"), nb::arg("recompute"));
    cls.def("clear_reusable_cache", [](P &self) { self.executor().clear_reusable_cache(); }, unlocked);
    cls.def("check", [](P &self) { self.executor().check(); }, unlocked);
    cls.def(
        "shutdown",
        [](P &self, bool finish) { self.executor().shutdown(finish ? ShutdownMode::finish : ShutdownMode::cancel); },
        nb::arg("finish"), unlocked);
}

void translate(const std::exception_ptr &pointer, void *) {
    try {
        std::rethrow_exception(pointer);
    } catch (const RequestError &error) {
        const auto cls = nb::module_::import_("trtllm.errors").attr("UsageError");
        const auto instance = cls(error.what(), error.hint());
        PyErr_SetObject(cls.ptr(), instance.ptr());
    }
}

}  // namespace

}  // namespace trtllm::executor

void bind_runtime(nb::module_ &module) {
    using namespace trtllm::executor;
    bind_request(module);
    bind_config(module);
    bind_response(module);
    bind_executor_class(module);
    nb::register_exception_translator(translate, nullptr);
}
