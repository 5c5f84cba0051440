// A scheduler, its cache, and a pretended engine whose cache rows remember the tokens that they were computed from: who
// reads a row that was never written, or another sequence's, is found out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "kv_cache_manager.h"
#include "scheduler.h"
#include "testing.h"

namespace testing {

using namespace trtllm::executor;

inline std::uint64_t mix(std::uint64_t history, std::uint64_t value) {
    std::uint64_t mixed = (history ^ (value + 0x9e3779b97f4a7c15ull)) * 0xbf58476d1ce4e5b9ull;
    return mixed ^ (mixed >> 29);
}

class SchedulerWorld {
public:
    SchedulerWorld(const SchedulerConfig &config, const CacheShape &shape, const KvCacheOptions &options = {})
        : cache(shape, options), scheduler(config, cache) {
        const auto num_blocks = static_cast<std::size_t>(shape.num_blocks + shape.num_host_blocks);
        const auto num_tokens = num_blocks * static_cast<std::size_t>(shape.tokens_per_block);
        content_.assign(shape.groups.size(), std::vector<std::uint64_t>(num_tokens, 0));
    }

    void check() const {
        scheduler.check();
        cache.check();
    }

    void add(SchedulerRequest request) {
        keys_[request.id] = mix(request.cache.key.salt, request.cache.key.adapter_id);
        scheduler.add(std::move(request));
        check();
    }

    // Plans a step, holds it against the budgets, and computes its rows in the pretended engine's cache.
    StepPlan plan() {
        const bool has_work = scheduler.has_work();
        StepPlan plan = scheduler.schedule(now_ms);
        check();
        check_budgets(plan);
        if (has_work) CHECK(!plan.rows.empty());
        for (const BlockCopy &copy : cache.take_copies()) run_copy(copy);
        return plan;
    }

    // The row's tokens with their drafts, through every layer: reads what is there of the past, writes what is new.
    void compute(const PlannedRow &row, std::span<const TokenId> drafts) {
        const auto known = scheduler.tokens(row.request, row.sequence);
        std::vector<TokenId> tokens(known.begin(), known.end());
        tokens.insert(tokens.end(), drafts.begin(), drafts.end());
        const std::int32_t end = row.past_length + row.num_tokens;
        CHECK(end <= static_cast<std::int32_t>(tokens.size()));
        if (row.reaches_end) CHECK_EQ(end - row.num_draft_tokens, static_cast<std::int32_t>(known.size()));
        check_follows(row);
        std::uint64_t history = keys_.at(row.request);
        for (std::int32_t position = 0; position < end; ++position) {
            history = mix(history, static_cast<std::uint64_t>(tokens[position]));
            for (std::size_t group = 0; group < content_.size(); ++group) visit(row, group, position, history);
        }
    }

    // Without drafts: computes and answers a row.
    void run(const PlannedRow &row) {
        compute(row, {});
        answer(row, row.num_tokens);
    }

    void answer(const PlannedRow &row, std::int32_t num_valid) {
        scheduler.complete_row(row, num_valid, now_ms);
        computed_[row.cache_id] = row.past_length + num_valid;
        num_computed_tokens += row.num_tokens;
        check();
    }

    // Plans and runs a step; sequences whose rows reach the end get `token`.
    StepPlan step(TokenId token = 7) {
        StepPlan planned = plan();
        for (const PlannedRow &row : planned.rows) run(row);
        for (const PlannedRow &row : planned.rows) {
            if (row.reaches_end && scheduler.num_sequences(row.request) == 1) {
                scheduler.append(row.request, row.sequence, std::span(&token, 1));
            }
        }
        check();
        ++now_ms;
        return planned;
    }

    KvCacheManager cache;
    Scheduler scheduler;
    std::int64_t now_ms = 0;
    std::int64_t num_computed_tokens = 0;

private:
    void check_budgets(const StepPlan &plan) {
        const SchedulerConfig &config = scheduler.config();
        std::int32_t context = 0, generation = 0;
        for (const PlannedRow &row : plan.rows) {
            CHECK(row.num_tokens > 0);
            CHECK(row.num_draft_tokens <= config.max_draft_tokens);
            CHECK_EQ(row.past_length, cache.num_committed(row.cache_id));
            CHECK_EQ(cache.missing_blocks(row.cache_id, row.past_length + row.num_tokens), 0);
            if (row.is_context) {
                CHECK_EQ(generation, 0);  // context rows come first
                check_chunk(row);
            } else {
                CHECK(row.reaches_end);
                CHECK_EQ(row.num_tokens, 1 + row.num_draft_tokens);
            }
            (row.is_context ? context : generation) += row.num_tokens;
        }
        CHECK_EQ(context, plan.num_context_tokens);
        CHECK_EQ(generation, plan.num_generation_tokens);
        CHECK(context + generation <= config.max_num_tokens);
        CHECK(static_cast<std::int32_t>(plan.rows.size()) <= config.max_batch_size);
    }

    void check_chunk(const PlannedRow &row) {
        const SchedulerConfig &config = scheduler.config();
        CHECK_EQ(row.num_draft_tokens, 0);
        if (row.reaches_end) return;
        if (config.chunk_unit <= config.max_num_tokens) CHECK_EQ(row.num_tokens % config.chunk_unit, 0);
        const auto size = static_cast<std::int32_t>(scheduler.tokens(row.request, row.sequence).size());
        if (!config.enable_chunked_context) CHECK(size - row.past_length > config.max_num_tokens);
    }

    // A cache goes on where its last row ended: no gap and no repetition.
    void check_follows(const PlannedRow &row) {
        const auto last = computed_.find(row.cache_id);
        if (last != computed_.end()) CHECK_EQ(row.past_length, last->second);
    }

    void run_copy(const BlockCopy &copy) {
        const auto size = static_cast<std::ptrdiff_t>(cache.shape().tokens_per_block);
        auto &rows = content_[copy.group];
        std::copy_n(rows.begin() + copy.source * size, copy.num_tokens, rows.begin() + copy.destination * size);
    }

    void visit(const PlannedRow &row, std::size_t group, std::int32_t position, std::uint64_t history) {
        const std::int32_t window = cache.shape().groups[group].window;
        const std::int32_t size = cache.shape().tokens_per_block;
        const auto table = cache.block_table(row.cache_id, static_cast<std::int32_t>(group));
        if (window > 0 && position <= row.past_length - window) return;
        CHECK(position / size < static_cast<std::int32_t>(table.size()));
        const BlockId block = table[position / size];
        CHECK(block >= 0 && block < cache.shape().num_blocks);
        auto &place = content_[group][static_cast<std::size_t>(block * size + position % size)];
        if (position >= row.past_length) place = history;
        CHECK_EQ(place, history);
    }

    std::vector<std::vector<std::uint64_t>> content_;  // [groups][blocks * tokens per block] hash of the tokens so far
    std::map<SequenceId, std::int32_t> computed_;
    std::map<RequestId, std::uint64_t> keys_;
};

}  // namespace testing
