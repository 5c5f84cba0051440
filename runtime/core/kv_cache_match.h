// How much of a prompt the cache can give to a new sequence: what each group's tree holds, and what all can agree on.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block_store.h"

namespace trtllm::executor {

// How a group comes to the last, not full block of what is reused.
enum class TailSource { none, copy, take_over };

// What one group's tree holds of a prompt.
struct GroupMatch {
    std::vector<NodeIndex> path;          // nodes of full blocks; in a window group some may have no block
    std::vector<std::int32_t> last_gap;   // [i] the last position before i whose node cannot be used, or -1
    RadixTree::Shared partial;            // what goes on below the path, but not for a whole block
    TailSource tail = TailSource::none;   // decided for the length that was agreed on

    NodeIndex tail_node(std::int32_t position) const {
        return position < static_cast<std::int32_t>(path.size()) ? path[static_cast<std::size_t>(position)]
                                                                  : partial.node;
    }
};

// The longest prefix that every group can serve: with its tree's nodes, and with the blocks it has for those that have
// to be copied or brought back.
struct PrefixMatch {
    std::int32_t num_tokens = 0;
    std::vector<GroupMatch> groups;
};

PrefixMatch match_prefix(std::span<const BlockStore> stores, const KvCacheOptions &options, const CacheKey &key,
                         std::span<const TokenId> tokens, std::int32_t most_tokens);

}  // namespace trtllm::executor
