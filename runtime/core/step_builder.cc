// Packing of rows: tokens, positions, block tables, and which logits are wanted.
#include "step_builder.h"

#include <algorithm>

namespace trtllm::executor {

StepBuilder::StepBuilder(const SessionInfo &info) : num_groups_(info.cache.groups.size()) {
    const auto block = std::max(info.cache.tokens_per_block, 1);
    batch_.max_blocks = (info.max_seq_len + block - 1) / block;
    batch_.block_tables.resize(num_groups_);
}

const StepBatch &StepBuilder::build(const StepPlan &plan, const KvCacheManager &cache, std::vector<BlockCopy> copies,
                                    const Lookup &lookup) {
    batch_.tokens.clear();
    batch_.positions.clear();
    batch_.row_starts.assign(1, 0);
    batch_.past_lengths.clear();
    batch_.logits_indices.clear();
    batch_.wants_whole.clear();
    batch_.copies = std::move(copies);
    first_logits_.clear();
    for (auto &table : batch_.block_tables)
        table.assign(plan.rows.size() * static_cast<std::size_t>(batch_.max_blocks), 0);
    for (std::size_t index = 0; index < plan.rows.size(); ++index) {
        add_row(plan.rows[index], lookup(plan.rows[index]));
        add_tables(index, plan.rows[index], cache);
    }
    return batch_;
}

void StepBuilder::add_row(const PlannedRow &row, const RowContent &content) {
    const auto first = static_cast<std::int64_t>(batch_.tokens.size());
    const auto num_known = row.num_tokens - row.num_draft_tokens;
    for (std::int32_t offset = 0; offset < row.num_tokens; ++offset) {
        const auto place = static_cast<std::size_t>(row.past_length + offset);
        const auto draft = static_cast<std::size_t>(std::max(offset - num_known, 0));
        batch_.tokens.push_back(offset < num_known ? content.tokens[place] : content.drafts[draft]);
        batch_.positions.push_back(row.past_length + offset);
    }
    batch_.row_starts.push_back(first + row.num_tokens);
    batch_.past_lengths.push_back(row.past_length);
    const auto num_logits = content.wants_all_logits ? row.num_tokens : row.reaches_end ? 1 + row.num_draft_tokens : 0;
    first_logits_.push_back(num_logits > 0 ? static_cast<std::int64_t>(batch_.logits_indices.size()) : -1);
    for (std::int32_t offset = row.num_tokens - num_logits; offset < row.num_tokens; ++offset)
        batch_.logits_indices.push_back(first + offset);
    batch_.wants_whole.resize(batch_.logits_indices.size(), content.wants_whole_rows ? 1 : 0);
}

void StepBuilder::add_tables(std::size_t index, const PlannedRow &row, const KvCacheManager &cache) {
    for (std::size_t group = 0; group < num_groups_; ++group) {
        const auto table = cache.block_table(row.cache_id, static_cast<std::int32_t>(group));
        const auto columns = std::min(table.size(), static_cast<std::size_t>(batch_.max_blocks));
        auto *target = batch_.block_tables[group].data() + index * static_cast<std::size_t>(batch_.max_blocks);
        for (std::size_t column = 0; column < columns; ++column) target[column] = std::max(table[column], 0);
    }
}

}  // namespace trtllm::executor
