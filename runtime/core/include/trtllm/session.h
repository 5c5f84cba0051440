// What the executor asks of an engine: a cache of blocks, and steps over packed tokens. Sessions know nothing of requests.
#pragma once

#include <cstdint>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

// Layers that share one block table because they see equally far back.
struct CacheGroup {
    std::int32_t window = 0;       // newest tokens that its layers see; 0 = all
    std::int32_t num_layers = 1;
    std::int64_t bytes_per_token = 0;  // of all its layers, keys and values, in the cache's own type
};

// The cache that a session has allocated. A linear cache is one whose block is a whole slot.
struct CacheShape {
    std::int32_t tokens_per_block = 32;
    std::int32_t num_blocks = 0;       // of the primary pool, for each group
    std::int32_t num_host_blocks = 0;  // of the pool that blocks are offloaded to, for each group
    std::vector<CacheGroup> groups = {CacheGroup{}};
};

struct SessionInfo {
    std::int32_t vocab_size = 0;
    std::int32_t max_seq_len = 0;     // tokens of one sequence, prompt and output together
    std::int32_t max_batch_size = 0;  // rows of a step
    std::int32_t max_num_tokens = 0;  // tokens of a step
    bool gathers_all_logits = true;   // false: logits exist of a row's last token only
    std::int32_t num_candidates = 0;  // best logits of a row that come when the row itself need not; 0: rows always come
    CacheShape cache;
};

// Copy the first `num_tokens` rows of block `source` to block `destination`, in every layer of group `group`.
// Block numbers run through both pools: 0 .. num_blocks - 1 primary, then the host's.
struct BlockCopy {
    std::int32_t group = 0;
    BlockId source = 0;
    BlockId destination = 0;
    std::int32_t num_tokens = 0;
};

// One step: rows of packed tokens. Context rows come first, then generation rows.
struct StepBatch {
    std::vector<std::int64_t> tokens;         // [T] the rows' new tokens, one row after the other
    std::vector<std::int64_t> positions;      // [T] each token's place in its sequence, from 0
    std::vector<std::int64_t> row_starts;     // [R + 1] where each row begins in `tokens`; the last is T
    std::vector<std::int64_t> past_lengths;   // [R] tokens of the row's sequence that the cache holds already
    std::vector<std::int64_t> logits_indices;  // [N] places in `tokens` whose logits are wanted, rising
    std::vector<std::uint8_t> wants_whole;    // [N] 0: the row's candidates are likely to do, where the session has them
    std::int32_t max_blocks = 0;              // columns of the block tables
    std::vector<std::vector<std::int32_t>> block_tables;  // for each group [R, max_blocks]; unused entries are 0
    std::vector<BlockCopy> copies;            // to be done in this order before anything is computed

    std::int64_t num_rows() const { return static_cast<std::int64_t>(past_lengths.size()); }
};

// The best logits of a step's rows, the largest first; `count` is SessionInfo::num_candidates.
struct StepCandidates {
    std::int32_t count = 0;
    const float *values = nullptr;         // [N, count]
    const std::int32_t *tokens = nullptr;  // [N, count]
    const float *log_sum_exp = nullptr;    // [N] of the whole rows
};

// An engine that is loaded and has its cache. Called from the executor's thread alone.
class Session {
public:
    virtual ~Session() = default;
    virtual const SessionInfo &info() const = 0;
    // Runs a step and returns float32 logits [N, vocab_size], which the caller may change and which stay valid until the
    // next step. `batch.tokens` may be empty: then only the copies are done. Throws when the engine fails; the cache
    // rows of this step's tokens are then undefined, all others are untouched.
    virtual float *step(const StepBatch &batch) = 0;
    // Of the last step, and until the next one, for the rows that were not wanted whole: those of the logits may hold
    // anything. Asked for where info() has num_candidates.
    virtual StepCandidates candidates() { return {}; }
    // Brings row `index` of the last step's logits, which was not wanted whole. Throws when the engine fails.
    virtual void complete(std::int64_t index) { static_cast<void>(index); }
};

}  // namespace trtllm::executor
