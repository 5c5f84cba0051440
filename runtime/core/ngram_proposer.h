// Prompt lookup: guesses that what followed the last time the newest tokens were seen follows again.
#pragma once

#include <unordered_map>

#include "trtllm/executor.h"

namespace trtllm::executor {

class NgramProposer : public DraftProposer {
public:
    explicit NgramProposer(const NgramConfig &config) : config_(config) {}
    std::vector<std::vector<TokenId>> propose(std::span<const Query> queries) override;
    void forget(SequenceId sequence) override { indices_.erase(sequence); }

private:
    // Where each n-gram of a sequence was last followed by something: hash of (n, tokens) -> place of what follows.
    struct Index {
        std::size_t num_indexed = 0;  // tokens that have become "what follows"
        std::unordered_map<std::uint64_t, std::size_t> last;
    };
    void extend(Index &index, std::span<const TokenId> tokens) const;

    NgramConfig config_;
    std::unordered_map<SequenceId, Index> indices_;
};

}  // namespace trtllm::executor
