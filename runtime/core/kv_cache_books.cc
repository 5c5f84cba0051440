// Operations over all groups. A group with a narrower window uses no block where the widest does not, and shares
// wherever that one shares; so blocks that the widest group can give, all can.
#include "kv_cache_books.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace trtllm::executor {
namespace {

const CacheShape &checked(const CacheShape &shape) {
    const bool has_windows = std::all_of(shape.groups.begin(), shape.groups.end(),
                                         [](const CacheGroup &group) { return group.window >= 0; });
    if (shape.tokens_per_block < 1 || shape.num_blocks < 0 || shape.num_host_blocks < 0 || shape.groups.empty() ||
        !has_windows) {
        throw std::invalid_argument("a cache needs blocks of at least one token, a group, and no negative numbers");
    }
    return shape;
}

std::int64_t reach_of(const CacheGroup &group) {
    return group.window == 0 ? std::numeric_limits<std::int64_t>::max() : group.window;
}

std::int32_t divide_up(std::int64_t value, std::int64_t by) { return static_cast<std::int32_t>((value + by - 1) / by); }

}  // namespace

KvCacheManager::Books::Books(const CacheShape &shape, const KvCacheOptions &options)
    : shape(checked(shape)), options(options), journal(options.event_buffer_max_size) {
    stores_.reserve(shape.groups.size());
    for (std::size_t group = 0; group < shape.groups.size(); ++group) {
        stores_.emplace_back(static_cast<std::int32_t>(group), this->shape, this->options, journal);
        if (reach_of(shape.groups[group]) > reach_of(shape.groups[widest_])) widest_ = group;
    }
    accounts_.resize(shape.groups.size());
    if (stores_[widest_].is_windowed()) {
        accounts_[widest_].holders.resize(static_cast<std::size_t>(shape.num_blocks), nullptr);
    }
}

const Sequence &KvCacheManager::Books::sequence(SequenceId id) const {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) throw std::logic_error("the cache knows no sequence " + std::to_string(id));
    return found->second;
}

Sequence &KvCacheManager::Books::find(SequenceId id) { return const_cast<Sequence &>(sequence(id)); }

Sequence &KvCacheManager::Books::open(SequenceId id, const SequenceOptions &sequence_options,
                                      std::int32_t prompt_length) {
    const auto [at, is_new] = sequences_.try_emplace(id);
    if (!is_new) throw std::logic_error("the cache knows a sequence " + std::to_string(id) + " already");
    Sequence &sequence = at->second;
    sequence.id = id;
    sequence.options = sequence_options;
    sequence.prompt_length = prompt_length;
    sequence.tables.resize(stores_.size());
    return sequence;
}

TableEditor KvCacheManager::Books::edit(Sequence &sequence, std::size_t group) {
    return {stores_[group], accounts_[group], sequence, options};
}

PrefixMatch KvCacheManager::Books::match(std::span<const TokenId> tokens, const CacheKey &key,
                                         std::int32_t most_tokens) const {
    return match_prefix(stores_, options, key, tokens,
                        std::min(static_cast<std::int32_t>(tokens.size()) - 1, most_tokens));
}

std::int32_t KvCacheManager::Books::add(SequenceId id, std::span<const TokenId> tokens,
                                        const SequenceOptions &sequence_options) {
    Sequence &sequence = open(id, sequence_options, static_cast<std::int32_t>(tokens.size()));
    sequence.shares = options.enable_block_reuse;
    const PrefixMatch match = this->match(tokens, sequence_options.key, sequence_options.max_reuse_tokens);
    const std::span<const TokenId> reused = tokens.first(static_cast<std::size_t>(match.num_tokens));
    sequence.tokens.assign(reused.begin(), reused.end());
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        give(sequence, group, match.groups[group], match.num_tokens);
    }
    count_prompt(sequence, tokens.size());
    return match.num_tokens;
}

// Shares what was matched: first everything is held, so that taking blocks evicts none of it.
void KvCacheManager::Books::give(Sequence &sequence, std::size_t group, const GroupMatch &match,
                                 std::int32_t num_tokens) {
    if (!sequence.shares) return;
    BlockStore &store = stores_[group];
    TableEditor table = edit(sequence, group);
    const std::int32_t num_full = num_tokens / shape.tokens_per_block;
    const std::int32_t first = std::min(store.first_needed(num_tokens), num_full);
    const std::span<const NodeIndex> needed =
        std::span(match.path).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(num_full - first));
    const bool has_path = num_full > 0;
    table.start(has_path ? match.path[static_cast<std::size_t>(num_full - 1)]
                         : store.tree().make_root(sequence.options.key));
    for (const NodeIndex node : needed) store.pin(node);
    for (const NodeIndex node : needed) {
        if (store.is_primary(store.tree()[node].block)) store.add_reference(store.tree()[node].block);
    }
    for (std::int32_t position = 0; position < first; ++position) table.skip_position();
    const bool has_tail = match.tail != TailSource::none;
    const NodeIndex tail = has_tail ? match.tail_node(num_full) : no_node;
    const BlockId tail_block = has_tail ? store.tree()[tail].block : no_block;
    if (has_tail) store.pin(tail);
    if (has_tail && store.is_primary(tail_block)) store.add_reference(tail_block);
    for (const NodeIndex node : needed) {
        if (store.is_host(store.tree()[node].block)) {
            store.onboard(node);
            store.tree()[node].contributor = sequence.id;  // by a copy that is still to be done
            ++sequence.stats.alloc_total_blocks;
        }
        table.share(store.tree()[node].block);
        store.drop_reference(store.tree()[node].block);
        table.claim(node);
        store.unpin(node);
    }
    if (has_tail) give_tail(sequence, group, match, num_tokens);
}

// The node of the tail is pinned, and its block is held if it is in the primary pool.
void KvCacheManager::Books::give_tail(Sequence &sequence, std::size_t group, const GroupMatch &match,
                                      std::int32_t num_tokens) {
    BlockStore &store = stores_[group];
    TableEditor table = edit(sequence, group);
    const NodeIndex node = match.tail_node(num_tokens / shape.tokens_per_block);
    const std::int32_t length = num_tokens % shape.tokens_per_block;
    const BlockId source = store.tree()[node].block;
    if (match.tail == TailSource::take_over) {
        table.share(source);
        table.claim(node);
        store.unpin(node);
        store.drop_reference(source);
        return table.own_tail(length);
    }
    const BlockId block = store.allocate();
    ++sequence.stats.alloc_total_blocks;
    store.copy(source, block, length);
    const bool covers = static_cast<std::int32_t>(store.tree()[node].tokens.size()) >= length;
    table.add_private(block, covers ? store.tree().handle(node) : NodeHandle{});
    if (store.is_primary(source)) store.drop_reference(source);
    store.unpin(node);
}

void KvCacheManager::Books::count_prompt(Sequence &sequence, std::size_t num_prompt_tokens) {
    const std::int32_t groups = static_cast<std::int32_t>(stores_.size());
    const std::int32_t reused = divide_up(sequence.num_committed(), shape.tokens_per_block);
    const std::int32_t all = divide_up(static_cast<std::int64_t>(num_prompt_tokens), shape.tokens_per_block);
    sequence.stats.reused_blocks = reused * groups;
    sequence.stats.missed_blocks = (all - reused) * groups;
    journal.counters.reused_blocks += sequence.stats.reused_blocks;
    journal.counters.missed_blocks += sequence.stats.missed_blocks;
    journal.counters.reused_tokens += sequence.num_committed();
    journal.counters.prompt_tokens += static_cast<std::int64_t>(num_prompt_tokens);
}

bool KvCacheManager::Books::reserve(SequenceId id, std::int32_t num_tokens) {
    Sequence &sequence = find(id);
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        if (edit(sequence, group).missing(num_tokens) > stores_[group].num_available()) return false;
    }
    const std::int32_t before = sequence.stats.alloc_new_blocks;
    for (std::size_t group = 0; group < stores_.size(); ++group) edit(sequence, group).reserve(num_tokens);
    journal.counters.alloc_new_blocks += sequence.stats.alloc_new_blocks - before;
    settle_accounts();
    return true;
}

void KvCacheManager::Books::commit(SequenceId id, std::span<const TokenId> tokens) {
    Sequence &sequence = find(id);
    const std::int32_t begin = sequence.num_committed();
    sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        TableEditor table = edit(sequence, group);
        table.commit(begin);
        table.slide();
    }
    settle_accounts();
}

bool KvCacheManager::Books::fork(SequenceId parent_id, SequenceId child_id, std::int32_t num_tokens) {
    Sequence &parent = find(parent_id);
    if (num_tokens < 0 || num_tokens > parent.num_committed()) {
        throw std::logic_error("a fork wants tokens that its parent has not committed");
    }
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        const bool needs_block = num_tokens % shape.tokens_per_block > 0;
        if (!edit(parent, group).holds_window_of(num_tokens)) return false;
        if (needs_block && stores_[group].num_available() == 0) return false;
    }
    Sequence &child = open(child_id, parent.options, parent.prompt_length);
    child.shares = parent.shares;
    child.tokens.assign(parent.tokens.begin(), parent.tokens.begin() + num_tokens);
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        edit(child, group).fork_from(parent.tables[group], parent.num_committed(), num_tokens);
    }
    return true;
}

void KvCacheManager::Books::truncate(SequenceId id, std::int32_t num_tokens) {
    Sequence &sequence = find(id);
    if (num_tokens < 0) throw std::logic_error("a sequence cannot have fewer than no tokens");
    if (num_tokens >= sequence.num_committed()) return;
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        if (edit(sequence, group).can_truncate(num_tokens)) continue;
        throw std::logic_error("a sequence was truncated to where its window has let go of blocks");
    }
    std::int32_t most_blocks = std::numeric_limits<std::int32_t>::max();  // alike in all groups
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        most_blocks = std::min(most_blocks, edit(sequence, group).first_shared(num_tokens));
    }
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        edit(sequence, group).truncate(num_tokens, most_blocks);
    }
    sequence.tokens.resize(static_cast<std::size_t>(num_tokens));
    settle_accounts();
}

void KvCacheManager::Books::remove(SequenceId id, bool keep) {
    Sequence &sequence = find(id);
    for (std::size_t group = 0; group < stores_.size(); ++group) edit(sequence, group).release(keep);
    settle_accounts();
    sequences_.erase(id);
}

// Blocks whose account was closed while others use them go on the account of one of those, at the same position.
void KvCacheManager::Books::settle_accounts() {
    for (const OpenAccount &open : accounts_[widest_].open) {
        const BlockTable *&holder = accounts_[widest_].holders[static_cast<std::size_t>(open.block)];
        if (holder != nullptr) continue;
        for (auto &[id, sequence] : sequences_) {
            BlockTable &table = sequence.tables[widest_];
            const std::size_t position = static_cast<std::size_t>(open.position);
            if (position >= table.blocks.size() || table.blocks[position] != open.block) continue;
            holder = &table;
            ++table.num_charged;
            break;
        }
    }
    accounts_[widest_].open.clear();
}

void KvCacheManager::Books::clear() {
    for (auto &[id, sequence] : sequences_) {
        sequence.shares = false;
        for (BlockTable &table : sequence.tables) {
            table.parent = no_node;
            table.cover = {};
        }
    }
    for (BlockStore &store : stores_) store.clear();
}

std::int32_t KvCacheManager::Books::num_available() const {
    std::int32_t least = shape.num_blocks;
    for (const BlockStore &store : stores_) least = std::min(least, store.num_available());
    return least;
}

std::int32_t KvCacheManager::Books::blocks_for(std::int32_t num_tokens, std::int32_t max_chunk) const {
    const std::int64_t size = shape.tokens_per_block;
    const std::int32_t all = divide_up(num_tokens, size);
    if (!stores_[widest_].is_windowed()) return all;
    // The run of tokens that is held at once, wherever in its first block it begins.
    const std::int64_t run = static_cast<std::int64_t>(stores_[widest_].window()) - 1 + std::max(1, max_chunk);
    return std::min(all, static_cast<std::int32_t>((run + size - 2) / size + 1));
}

std::int32_t KvCacheManager::Books::missing(SequenceId id, std::int32_t num_tokens) const {
    Books &self = const_cast<Books &>(*this);  // an editor that only looks
    std::int32_t most = 0;
    for (std::size_t group = 0; group < stores_.size(); ++group) {
        most = std::max(most, self.edit(self.find(id), group).missing(num_tokens));
    }
    return most;
}

std::int32_t KvCacheManager::Books::held(SequenceId id) const {
    const BlockTable &table = sequence(id).tables[widest_];
    const std::int32_t owed = missing(id, 0);  // for a shared tail
    if (stores_[widest_].is_windowed()) return table.num_charged;
    return static_cast<std::int32_t>(table.blocks.size()) - owed;
}

KvCacheStats KvCacheManager::Books::stats() const {
    KvCacheStats stats = journal.counters;
    stats.tokens_per_block = shape.tokens_per_block;
    for (const BlockStore &store : stores_) {
        stats.max_num_blocks += shape.num_blocks;
        stats.free_num_blocks += store.num_available();
        stats.used_num_blocks += store.num_used();
        stats.host_max_blocks += shape.num_host_blocks;
        stats.host_used_blocks += store.num_host_used();
        stats.used_bytes += static_cast<std::int64_t>(store.num_used()) * shape.tokens_per_block *
                            shape.groups[static_cast<std::size_t>(store.group())].bytes_per_token;
    }
    const std::int64_t lookups = stats.reused_blocks + stats.missed_blocks;
    if (lookups > 0) stats.cache_hit_rate = static_cast<double>(stats.reused_blocks) / static_cast<double>(lookups);
    return stats;
}

}  // namespace trtllm::executor
