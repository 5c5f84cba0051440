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
    const nb::object result = step_->object(array(batch.tokens), array(batch.positions), array(batch.row_starts),
                                            array(batch.past_lengths), array(batch.logits_indices), tables, copies);
    if (batch.logits_indices.empty()) return nullptr;
    const auto logits = nb::cast<nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(result);
    if (logits.shape(0) != batch.logits_indices.size() || logits.shape(1) != static_cast<std::size_t>(info_.vocab_size))
        throw std::runtime_error("the session returned logits of another shape than was asked for");
    logits_ = hold(result);
    return logits.data();
}

}  // namespace trtllm::executor
