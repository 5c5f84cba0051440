// An engine made of arithmetic: its logits are a hash of every token of the sequence, read back through the block tables.
//
// A wrong block, a missed copy, a token computed twice or not at all changes the hash, and with it the output.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "trtllm/session.h"

namespace testing {

using trtllm::executor::SessionInfo;
using trtllm::executor::StepBatch;
using trtllm::executor::TokenId;

inline std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
    return hash ^ (hash >> 29);
}

// Logits [vocab_size] after `tokens`, between -4 and 4. The same seed is the same model.
template <typename Tokens>
std::vector<float> fake_logits(const Tokens &tokens, std::int32_t vocab_size, std::uint64_t seed = 1) {
    std::uint64_t hash = mix(0, seed);
    for (const auto token : tokens) hash = mix(hash, static_cast<std::uint64_t>(token) + 1);
    std::vector<float> logits(static_cast<std::size_t>(vocab_size));
    for (std::size_t token = 0; token < logits.size(); ++token)
        logits[token] = static_cast<float>(mix(mix(hash, token), 7) >> 40) / static_cast<float>(1 << 21) - 4.0f;
    return logits;
}

class FakeSession : public trtllm::executor::Session {
public:
    struct Cell {
        TokenId token = -1;
        std::int64_t position = -1;
        std::uint64_t seed = 0;  // the model that computed it
    };

    explicit FakeSession(SessionInfo info, std::uint64_t seed = 1) : info_(std::move(info)), seed_(seed) {
        const auto blocks = info_.cache.num_blocks + info_.cache.num_host_blocks;
        cells_.resize(info_.cache.groups.size());
        for (auto &group : cells_)
            group.resize(static_cast<std::size_t>(blocks) * static_cast<std::size_t>(info_.cache.tokens_per_block));
    }

    const SessionInfo &info() const override { return info_; }

    float *step(const StepBatch &batch) override {
        ++num_steps;
        for (const auto &copy : batch.copies) do_copy(copy);
        if (before_step) before_step(batch);
        require(batch.num_rows() <= info_.max_batch_size, "too many rows");
        require(static_cast<std::int32_t>(batch.tokens.size()) <= info_.max_num_tokens, "too many tokens");
        num_tokens += static_cast<std::int64_t>(batch.tokens.size());
        for (std::int64_t row = 0; row < batch.num_rows(); ++row) store(batch, row);
        logits_.clear();
        std::size_t next = 0;
        for (std::int64_t row = 0; row < batch.num_rows(); ++row)
            for (; next < batch.logits_indices.size() && batch.logits_indices[next] < end(batch, row); ++next) {
                const auto tokens = read(batch, row, batch.positions[static_cast<std::size_t>(batch.logits_indices[next])]);
                const auto values = fake_logits(tokens, info_.vocab_size, seed_);
                logits_.insert(logits_.end(), values.begin(), values.end());
            }
        require(next == batch.logits_indices.size(), "logits are asked for tokens that are not there");
        if (after_step) after_step(batch, logits_);
        if (info_.num_candidates > 0) hide_rows(batch);
        return logits_.data();
    }

    trtllm::executor::StepCandidates candidates() override {
        return {info_.num_candidates, best_values_.data(), best_tokens_.data(), log_sum_exp_.data()};
    }

    void complete(std::int64_t index) override {
        ++num_completed;
        const auto size = static_cast<std::ptrdiff_t>(info_.vocab_size);
        std::copy_n(hidden_.begin() + index * size, size, logits_.begin() + index * size);
    }

    // Other weights, for the steps to come.
    void set_seed(std::uint64_t seed) { seed_ = seed; }

    std::function<void(const StepBatch &)> before_step;                      // may throw, or sleep
    std::function<void(const StepBatch &, std::vector<float> &)> after_step;  // may spoil logits
    std::atomic<std::int64_t> num_steps = 0, num_tokens = 0, num_hidden = 0, num_completed = 0;

private:
    static void require(bool holds, const char *what) {
        if (!holds) throw std::runtime_error(std::string("fake session: ") + what);
    }

    static std::int64_t end(const StepBatch &batch, std::int64_t row) {
        return batch.row_starts[static_cast<std::size_t>(row) + 1];
    }

    Cell &cell(const StepBatch &batch, std::size_t group, std::int64_t row, std::int64_t position) {
        const auto size = info_.cache.tokens_per_block;
        const auto column = row * batch.max_blocks + position / size;
        const auto block = batch.block_tables[group].at(static_cast<std::size_t>(column));
        require(block >= 0 && block < info_.cache.num_blocks, "a table names a block outside the primary pool");
        return cells_[group].at(static_cast<std::size_t>(block) * static_cast<std::size_t>(size) +
                                static_cast<std::size_t>(position % size));
    }

    // Takes the rows away that need not come, and leaves their best logits.
    void hide_rows(const StepBatch &batch) {
        hidden_ = logits_;
        best_values_.clear();
        best_tokens_.clear();
        log_sum_exp_.clear();
        require(batch.wants_whole.size() == batch.logits_indices.size(), "rows are not told apart");
        const auto size = static_cast<std::size_t>(info_.vocab_size);
        for (std::size_t row = 0; row < batch.wants_whole.size(); ++row) {
            float *values = logits_.data() + row * size;
            std::vector<std::int32_t> order(size);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](auto left, auto right) { return values[left] > values[right]; });
            double sum = 0.0;
            for (std::size_t token = 0; token < size; ++token) sum += std::exp(static_cast<double>(values[token]));
            log_sum_exp_.push_back(static_cast<float>(std::log(sum)));
            for (std::int32_t place = 0; place < info_.num_candidates; ++place) {
                best_tokens_.push_back(order[static_cast<std::size_t>(place)]);
                best_values_.push_back(values[best_tokens_.back()]);
            }
            if (batch.wants_whole[row] != 0) continue;
            ++num_hidden;
            std::fill_n(values, size, std::numeric_limits<float>::quiet_NaN());
        }
    }

    void do_copy(const trtllm::executor::BlockCopy &copy) {
        auto &group = cells_.at(static_cast<std::size_t>(copy.group));
        const auto size = static_cast<std::size_t>(info_.cache.tokens_per_block);
        require(copy.num_tokens >= 0 && copy.num_tokens <= info_.cache.tokens_per_block, "a copy is longer than a block");
        for (std::size_t row = 0; row < static_cast<std::size_t>(copy.num_tokens); ++row)
            group.at(static_cast<std::size_t>(copy.destination) * size + row) =
                group.at(static_cast<std::size_t>(copy.source) * size + row);
    }

    void store(const StepBatch &batch, std::int64_t row) {
        const auto begin = batch.row_starts[static_cast<std::size_t>(row)];
        for (auto place = begin; place < end(batch, row); ++place) {
            const auto position = batch.positions[static_cast<std::size_t>(place)];
            require(position == batch.past_lengths[static_cast<std::size_t>(row)] + place - begin, "positions skip");
            require(position < info_.max_seq_len, "a sequence is too long");
            const auto token = static_cast<TokenId>(batch.tokens[static_cast<std::size_t>(place)]);
            require(token >= 0 && token < info_.vocab_size, "a token is outside the vocabulary");
            for (std::size_t group = 0; group < cells_.size(); ++group) cell(batch, group, row, position) = {token, position, seed_};
        }
    }

    // The sequence's tokens up to `position`, as a group without a window holds them; windows must hold the same.
    std::vector<TokenId> read(const StepBatch &batch, std::int64_t row, std::int64_t position) {
        std::vector<TokenId> tokens(static_cast<std::size_t>(position) + 1);
        for (std::int64_t place = 0; place <= position; ++place) {
            for (std::size_t group = 0; group < cells_.size(); ++group) {
                const auto window = info_.cache.groups[group].window;
                if (window > 0 && place <= position - window) continue;
                const Cell &found = cell(batch, group, row, place);
                if (found.seed != seed_) throw std::runtime_error("fake session: a cache row is of other weights");
                if (found.position != place) throw std::runtime_error("fake session: a cache row is not there");
                if (group > 0 && found.token != tokens[static_cast<std::size_t>(place)])
                    throw std::runtime_error("fake session: two groups disagree");
                tokens[static_cast<std::size_t>(place)] = found.token;
            }
        }
        return tokens;
    }

    SessionInfo info_;
    std::uint64_t seed_;
    std::vector<std::vector<Cell>> cells_;  // of each group
    std::vector<float> logits_, hidden_, best_values_, log_sum_exp_;
    std::vector<std::int32_t> best_tokens_;
};

}  // namespace testing
