// Rows of a step's logits as decoding sees them: whole, or known by their best until somebody needs more.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "candidates.h"
#include "trtllm/session.h"

namespace trtllm::executor {

// All rows of one step.
class StepLogits {
public:
    StepLogits() = default;
    StepLogits(Session &session, const StepBatch &batch, float *rows)
        : session_(&session), rows_(rows), vocab_size_(session.info().vocab_size) {
        if (session.info().num_candidates <= 0 || rows == nullptr) return;
        candidates_ = session.candidates();
        is_whole_ = batch.wants_whole;
    }

    float *memory(std::int64_t index) const { return rows_ + index * vocab_size_; }
    // Row `index` as it may be changed; brings it where it is not there yet.
    float *whole(std::int64_t index) {
        const auto place = static_cast<std::size_t>(index);
        if (place < is_whole_.size() && is_whole_[place] == 0) {
            session_->complete(index);
            is_whole_[place] = 1;
        }
        return memory(index);
    }
    // Nothing where the row is there.
    std::optional<CandidateRow> candidates(std::int64_t index) const {
        const auto place = static_cast<std::size_t>(index), count = static_cast<std::size_t>(candidates_.count);
        if (place >= is_whole_.size() || is_whole_[place] != 0) return std::nullopt;
        return CandidateRow{{candidates_.values + place * count, count},
                            {candidates_.tokens + place * count, count},
                            candidates_.log_sum_exp[place],
                            static_cast<std::int32_t>(vocab_size_)};
    }

private:
    Session *session_ = nullptr;
    float *rows_ = nullptr;
    std::int64_t vocab_size_ = 0;
    StepCandidates candidates_;
    std::vector<std::uint8_t> is_whole_;  // empty: all are
};

// Neighbouring rows that one sequence goes on with; those that are no step's are whole.
class LogitsRows {
public:
    LogitsRows(float *rows, std::int64_t vocab_size) : rows_(rows), vocab_size_(vocab_size) {}
    LogitsRows(StepLogits &step, std::int64_t first) : step_(&step), first_(first) {}
    float *whole(std::int64_t row) const { return step_ ? step_->whole(first_ + row) : rows_ + row * vocab_size_; }
    std::optional<CandidateRow> candidates(std::int64_t row) const {
        return step_ ? step_->candidates(first_ + row) : std::nullopt;
    }

private:
    StepLogits *step_ = nullptr;
    std::int64_t first_ = 0;
    float *rows_ = nullptr;
    std::int64_t vocab_size_ = 0;
};

}  // namespace trtllm::executor
