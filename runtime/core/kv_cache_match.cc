// The agreement is reached from above: each group lowers the length to what it can serve, until none does.
#include "kv_cache_match.h"

#include <algorithm>

namespace trtllm::executor {
namespace {

class GroupMatcher {
public:
    GroupMatcher(const BlockStore &store, const KvCacheOptions &options, GroupMatch &match)
        : store_(store), options_(options), match_(match) {}

    void descend(const CacheKey &key, std::span<const TokenId> tokens) {
        NodeIndex node = store_.tree().find_root(key);
        match_.last_gap.push_back(-1);
        while (node != no_node && !tokens.empty()) {
            const std::span<const TokenId> block = tokens.first(std::min(tokens.size(), block_size()));
            const NodeIndex child = full_child(node, block);
            if (child == no_node) {
                find_partial(node, block);
                return;
            }
            const std::int32_t position = static_cast<std::int32_t>(match_.path.size());
            match_.path.push_back(child);
            match_.last_gap.push_back(store_.is_usable(child) ? match_.last_gap.back() : position);
            node = child;
            tokens = tokens.subspan(block.size());
        }
    }

    // The most that this group can serve of `length` tokens.
    std::int32_t serve(std::int32_t length) const {
        const std::int32_t size = store_.tokens_per_block();
        const std::int32_t reach = static_cast<std::int32_t>(match_.path.size()) * size + match_.partial.length;
        length = std::min(length, reach);
        if (length % size > 0 && !can_give_tail(length)) length -= length % size;
        for (;;) {
            const std::int32_t gap = match_.last_gap[static_cast<std::size_t>(length / size)];
            if (gap < store_.first_needed(length)) break;
            length = gap * size;
        }
        return affordable(length);
    }

    // How the last block of `length` tokens would come about, with the blocks that are available.
    TailSource tail_source(std::int32_t length) const {
        if (length % store_.tokens_per_block() == 0) return TailSource::none;
        const NodeIndex node = match_.tail_node(length / store_.tokens_per_block());
        const RadixNode &source = store_.tree()[node];
        const bool is_free_leaf = store_.is_unused(node) && source.children.empty();
        const bool loses_nothing =
            static_cast<std::int32_t>(source.tokens.size()) == length % store_.tokens_per_block();
        if (is_free_leaf && (loses_nothing || !options_.copy_on_partial_reuse)) return TailSource::take_over;
        const Cost cost = cost_of(length);
        if (cost.blocks + 1 <= store_.num_available() - cost.pinned - (store_.is_unused(node) ? 1 : 0)) {
            return TailSource::copy;
        }
        // Its own source would be what goes to make room for the copy.
        return is_free_leaf ? TailSource::take_over : TailSource::none;
    }

private:
    struct Cost {
        std::int32_t blocks = 0;  // to bring host blocks back
        std::int32_t pinned = 0;  // available blocks that will be in use
        std::int32_t last_host = -1;
    };

    std::size_t block_size() const { return static_cast<std::size_t>(store_.tokens_per_block()); }

    NodeIndex full_child(NodeIndex node, std::span<const TokenId> block) const {
        if (block.size() < block_size()) return no_node;
        const ChildPlace place = store_.tree().place(node, block);
        if (place.after_shared < block.size()) return no_node;
        return store_.is_windowed() || store_.is_usable(place.after) ? place.after : no_node;
    }

    bool can_be_tail(NodeIndex node) const {
        if (!store_.is_usable(node)) return false;
        return options_.copy_on_partial_reuse || (store_.is_unused(node) && store_.tree()[node].children.empty());
    }

    std::int32_t least_partial() const { return std::max(1, options_.min_partial_tokens); }

    // A child that is the whole block would be on the path, unless it cannot be used; then it is not found here either.
    void find_partial(NodeIndex node, std::span<const TokenId> tokens) {
        if (!options_.enable_partial_reuse) return;
        match_.partial = store_.tree().find_shared(node, tokens, static_cast<std::size_t>(least_partial()),
                                                   [&](NodeIndex child) { return can_be_tail(child); });
    }

    bool can_give_tail(std::int32_t length) const {
        const std::int32_t rest = length % store_.tokens_per_block();
        if (!options_.enable_partial_reuse || rest < least_partial()) return false;
        return can_be_tail(match_.tail_node(length / store_.tokens_per_block()));
    }

    Cost cost_of(std::int32_t length) const {
        Cost cost;
        for (std::int32_t i = store_.first_needed(length); i < length / store_.tokens_per_block(); ++i) {
            const NodeIndex node = match_.path[static_cast<std::size_t>(i)];
            if (store_.is_unused(node)) ++cost.pinned;
            if (!store_.is_host(store_.tree()[node].block)) continue;
            ++cost.blocks;
            cost.last_host = i;
        }
        return cost;
    }

    std::int32_t affordable(std::int32_t length) const {
        const std::int32_t size = store_.tokens_per_block();
        if (length % size > 0 && tail_source(length) == TailSource::none) length -= length % size;
        const Cost cost = cost_of(length);
        if (length % size > 0) {
            const NodeIndex tail = match_.tail_node(length / size);
            const std::int32_t tail_blocks = store_.is_unused(tail) ? 1 : 0;
            if (cost.blocks + cost.pinned + tail_blocks <= store_.num_available()) return length;
            return length - length % size;
        }
        return cost.blocks + cost.pinned <= store_.num_available() ? length : cost.last_host * size;
    }

    const BlockStore &store_;
    const KvCacheOptions &options_;
    GroupMatch &match_;
};

}  // namespace

PrefixMatch match_prefix(std::span<const BlockStore> stores, const KvCacheOptions &options, const CacheKey &key,
                         std::span<const TokenId> tokens, std::int32_t most_tokens) {
    PrefixMatch match;
    match.groups.resize(stores.size());
    if (!options.enable_block_reuse || most_tokens <= 0) return match;
    std::vector<GroupMatcher> matchers;
    for (std::size_t i = 0; i < stores.size(); ++i) {
        matchers.emplace_back(stores[i], options, match.groups[i]);
        matchers.back().descend(key, tokens.first(static_cast<std::size_t>(most_tokens)));
    }
    match.num_tokens = most_tokens;
    for (bool has_changed = true; has_changed;) {
        has_changed = false;
        for (const GroupMatcher &matcher : matchers) {
            const std::int32_t length = matcher.serve(match.num_tokens);
            has_changed = has_changed || length < match.num_tokens;
            match.num_tokens = length;
        }
    }
    for (std::size_t i = 0; i < stores.size(); ++i) {
        match.groups[i].tail = matchers[i].tail_source(match.num_tokens);
    }
    return match;
}

}  // namespace trtllm::executor
