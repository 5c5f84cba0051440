// Turns a plan into the flat arrays of a step, in memory that is reused from step to step.
#pragma once

#include <functional>

#include "kv_cache_manager.h"
#include "scheduler.h"
#include "trtllm/session.h"

namespace trtllm::executor {

class StepBuilder {
public:
    StepBuilder(const SessionInfo &info);

    struct RowContent {
        std::span<const TokenId> tokens;  // of the whole sequence
        std::span<const TokenId> drafts;
        bool wants_all_logits = false;
        bool wants_whole_rows = true;
    };
    using Lookup = std::function<RowContent(const PlannedRow &)>;

    // The batch stays valid until the next call. first_logits()[i] is row i's first row of logits, -1 for none.
    const StepBatch &build(const StepPlan &plan, const KvCacheManager &cache, std::vector<BlockCopy> copies,
                           const Lookup &lookup);
    const std::vector<std::int64_t> &first_logits() const { return first_logits_; }

private:
    void add_row(const PlannedRow &row, const RowContent &content);
    void add_tables(std::size_t index, const PlannedRow &row, const KvCacheManager &cache);

    std::size_t num_groups_;
    StepBatch batch_;
    std::vector<std::int64_t> first_logits_;
};

}  // namespace trtllm::executor
