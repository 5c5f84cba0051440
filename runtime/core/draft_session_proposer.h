// A small engine guesses what the large one will say: its greedy continuation, with a cache of its own.
#pragma once

#include <map>

#include "decoder.h"
#include "kv_cache_manager.h"
#include "step_builder.h"
#include "trtllm/executor.h"

namespace trtllm::executor {

class DraftSessionProposer : public DraftProposer {
public:
    explicit DraftSessionProposer(std::shared_ptr<Session> session);
    std::vector<std::vector<TokenId>> propose(std::span<const Query> queries) override;
    void forget(SequenceId sequence) override;

private:
    // One query on its way: `tokens` grows by the guesses.
    struct Work {
        SequenceId sequence;
        std::vector<TokenId> tokens;
        std::size_t num_given;
        std::size_t num_wanted;
        std::size_t num_cached;
    };
    bool open(const Query &query, std::span<const Query> all, Work &work);
    bool make_room(SequenceId id, std::int32_t num_tokens, std::span<const Query> all);
    void run(std::span<Work *> works);

    std::shared_ptr<Session> session_;
    SessionInfo info_;
    KvCacheManager cache_;
    StepBuilder builder_;
    std::map<SequenceId, std::vector<TokenId>> cached_;  // what the cache holds of each sequence
};

}  // namespace trtllm::executor
