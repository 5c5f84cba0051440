// Steps of a Python session: arrays go over as views, logits come back as one.
#include "python_session.h"

#include <nanobind/stl/string.h>

namespace nb = nanobind;

namespace trtllm::executor {

namespace {

template <typename T>
T number(nb::handle object, const char *name) {
    return nb::cast<T>(object.attr(name));
}

SessionInfo read_info(nb::handle given) {
    SessionInfo info;
    info.vocab_size = number<std::int32_t>(given, "vocab_size");
    info.max_seq_len = number<std::int32_t>(given, "max_seq_len");
    info.max_batch_size = number<std::int32_t>(given, "max_batch_size");
    info.max_num_tokens = number<std::int32_t>(given, "max_num_tokens");
    info.gathers_all_logits = number<bool>(given, "gathers_all_logits");
    info.num_candidates = nb::cast<std::int32_t>(nb::getattr(given, "num_candidates", nb::int_(0)));
    const nb::object cache = given.attr("cache");
    info.cache.tokens_per_block = number<std::int32_t>(cache, "tokens_per_block");
    info.cache.num_blocks = number<std::int32_t>(cache, "num_blocks");
    info.cache.num_host_blocks = number<std::int32_t>(cache, "num_host_blocks");
    info.cache.groups.clear();
    for (const auto group : cache.attr("groups"))
        info.cache.groups.push_back({number<std::int32_t>(group, "window"), number<std::int32_t>(group, "num_layers"),
                                     number<std::int64_t>(group, "bytes_per_token")});
    return info;
}

template <typename T>
nb::object array(const std::vector<T> &values) {
    return view(const_cast<T *>(values.data()), {values.size()});
}

}  // namespace

PythonSession::PythonSession(nb::object session)
    : session_(hold(session)), step_(hold(session.attr("step"))), info_(read_info(session.attr("info"))) {}

float *PythonSession::step(const StepBatch &batch) {
    const nb::gil_scoped_acquire lock;
    nb::list tables, copies;
    const auto rows = static_cast<std::size_t>(batch.num_rows());
    for (const auto &table : batch.block_tables)
        tables.append(view(const_cast<std::int32_t *>(table.data()), {rows, static_cast<std::size_t>(batch.max_blocks)}));
    for (const auto &copy : batch.copies)
        copies.append(nb::make_tuple(copy.group, copy.source, copy.destination, copy.num_tokens));
    nb::list arguments;
    for (const auto &values : {&batch.tokens, &batch.positions, &batch.row_starts, &batch.past_lengths, &batch.logits_indices})
        arguments.append(array(*values));
    arguments.append(tables);
    arguments.append(copies);
    if (info_.num_candidates > 0) arguments.append(array(batch.wants_whole));
    const nb::object result = step_->object(*arguments);
    if (batch.logits_indices.empty()) return nullptr;
    const auto logits = nb::cast<nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(result);
    if (logits.shape(0) != batch.logits_indices.size() || logits.shape(1) != static_cast<std::size_t>(info_.vocab_size))
        throw std::runtime_error("the session returned logits of another shape than was asked for");
    logits_ = hold(result);
    return logits.data();
}

StepCandidates PythonSession::candidates() {
    const nb::gil_scoped_acquire lock;
    const nb::object result = session_->object.attr("candidates")();
    const auto count = static_cast<std::size_t>(info_.num_candidates);
    using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    using Tokens = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    using Sums = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    const auto values = nb::cast<Values>(result[0]);
    const auto tokens = nb::cast<Tokens>(result[1]);
    const auto sums = nb::cast<Sums>(result[2]);
    if (values.shape(1) != count || tokens.shape(1) != count || values.shape(0) != sums.shape(0) ||
        tokens.shape(0) != sums.shape(0))
        throw std::runtime_error("the session returned candidates of another shape than it said");
    candidates_ = hold(result);
    return {info_.num_candidates, values.data(), tokens.data(), sums.data()};
}

void PythonSession::complete(std::int64_t index) {
    const nb::gil_scoped_acquire lock;
    session_->object.attr("complete")(index);
}

}  // namespace trtllm::executor
