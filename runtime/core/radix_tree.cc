// Searching, adding and removing nodes. Indices are used again; generations tell the uses apart.
#include "radix_tree.h"

#include <algorithm>

namespace trtllm::executor {

std::size_t RadixTree::shared_length(std::span<const TokenId> a, std::span<const TokenId> b) {
    const std::size_t most = std::min(a.size(), b.size());
    return static_cast<std::size_t>(
        std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(most), b.begin()).first - a.begin());
}

NodeIndex RadixTree::find_root(const CacheKey &key) const {
    const auto found = roots_.find(key);
    return found == roots_.end() ? no_node : found->second;
}

NodeIndex RadixTree::make_root(const CacheKey &key) {
    const NodeIndex known = find_root(key);
    if (known != no_node) return known;
    const NodeIndex root = make_node();
    (*this)[root].key = key;
    roots_.emplace(key, root);
    return root;
}

ChildPlace RadixTree::place(NodeIndex parent, std::span<const TokenId> tokens) const {
    const std::vector<NodeIndex> &children = (*this)[parent].children;
    const auto comes_before = [&](NodeIndex child, std::span<const TokenId> wanted) {
        const std::vector<TokenId> &own = (*this)[child].tokens;
        const std::size_t shared = shared_length(own, wanted);
        return shared < wanted.size() && (shared == own.size() || own[shared] < wanted[shared]);
    };
    const auto at = std::lower_bound(children.begin(), children.end(), tokens, comes_before);
    ChildPlace place;
    place.position = static_cast<std::size_t>(at - children.begin());
    if (at != children.end()) {
        place.after = *at;
        place.after_shared = shared_length((*this)[*at].tokens, tokens);
    }
    if (at != children.begin()) {
        place.before = *(at - 1);
        place.before_shared = shared_length((*this)[place.before].tokens, tokens);
    }
    return place;
}

NodeIndex RadixTree::make_node() {
    NodeIndex index = static_cast<NodeIndex>(nodes_.size());
    if (unused_.empty()) {
        nodes_.emplace_back();
    } else {
        index = unused_.back();
        unused_.pop_back();
    }
    (*this)[index].is_alive = true;
    return index;
}

NodeIndex RadixTree::insert(NodeIndex parent, std::size_t position, std::span<const TokenId> tokens) {
    const NodeIndex index = make_node();
    RadixNode &node = (*this)[index];
    node.parent = parent;
    node.tokens.assign(tokens.begin(), tokens.end());
    std::vector<NodeIndex> &children = (*this)[parent].children;
    children.insert(children.begin() + static_cast<std::ptrdiff_t>(position), index);
    return index;
}

void RadixTree::append(NodeIndex node, std::span<const TokenId> tokens) {
    std::vector<TokenId> &own = (*this)[node].tokens;
    own.insert(own.end(), tokens.begin(), tokens.end());
}

void RadixTree::remove(NodeIndex index) {
    RadixNode &node = (*this)[index];
    if (node.parent == no_node) {
        roots_.erase(node.key);
    } else {
        std::vector<NodeIndex> &siblings = (*this)[node.parent].children;
        siblings.erase(siblings.begin() + static_cast<std::ptrdiff_t>(place(node.parent, node.tokens).position));
    }
    RadixNode empty;
    empty.generation = node.generation + 1;
    std::swap(empty.tokens, node.tokens);
    std::swap(empty.children, node.children);
    empty.tokens.clear();
    empty.children.clear();
    node = std::move(empty);
    unused_.push_back(index);
}

bool RadixTree::is_alive(NodeHandle handle) const {
    return handle.index != no_node && (*this)[handle.index].is_alive &&
           (*this)[handle.index].generation == handle.generation;
}

NodeIndex RadixTree::ancestor(NodeIndex node, std::int32_t levels) const {
    for (; levels > 0; --levels) node = (*this)[node].parent;
    return node;
}

void RadixTree::clear() {
    roots_.clear();
    unused_.clear();
    for (std::size_t index = nodes_.size(); index-- > 0;) {
        const std::uint32_t generation = nodes_[index].generation + 1;
        nodes_[index] = RadixNode();
        nodes_[index].generation = generation;
        unused_.push_back(static_cast<NodeIndex>(index));
    }
}

}  // namespace trtllm::executor
