// Events: their hashes, their buffer and their JSON, which has the reference's names.
#include "kv_cache_events.h"

#include <sstream>

#include "trtllm/executor.h"

namespace trtllm::executor {
namespace {

std::uint64_t mix(std::uint64_t value) {  // the finalizer of splitmix64
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

template <typename Items, typename Write>
void write_list(std::ostream &out, const Items &items, Write write) {
    out << "[";
    const char *separator = "";
    for (const auto &item : items) {
        out << separator;
        separator = ", ";
        write(item);
    }
    out << "]";
}

void write_block(std::ostream &out, const StoredBlock &block) {
    out << R"({"type": "stored_block", "block_hash": )" << block.hash << R"(, "tokens": )";
    write_list(out, block.tokens, [&](TokenId token) {
        out << R"({"type": "unique_token", "token_id": )" << token << R"(, "token_extra_id": 0})";
    });
    out << R"(, "cache_level": )" << block.cache_level << R"(, "priority": )" << block.priority << "}";
}

using Change = std::optional<std::pair<std::int32_t, std::int32_t>>;  // from, to

void write_change(std::ostream &out, const char *name, const Change &change) {
    out << ", \"" << name << "\": ";
    if (!change) {
        out << "null";
        return;
    }
    out << R"({"type": "event_diff", "new_value": )" << change->second << R"(, "old_value": )" << change->first << "}";
}

void write_stored(std::ostream &out, const KvCacheEvent &event) {
    out << R"(, "parent_hash": )";
    if (event.parent_hash) {
        out << *event.parent_hash;
    } else {
        out << "null";
    }
    out << R"(, "blocks": )";
    write_list(out, event.blocks, [&](const StoredBlock &block) { write_block(out, block); });
}

void write_data(std::ostream &out, const KvCacheEvent &event) {
    const auto write_number = [&](auto number) { out << number; };
    switch (event.kind) {
        case KvCacheEvent::Kind::created:
            out << R"(, "num_blocks_per_cache_level": )";
            return write_list(out, event.num_blocks_per_level, write_number);
        case KvCacheEvent::Kind::stored:
            return write_stored(out, event);
        case KvCacheEvent::Kind::removed:
            out << R"(, "block_hashes": )";
            return write_list(out, event.hashes, write_number);
        case KvCacheEvent::Kind::updated:
            out << R"(, "block_hash": )" << event.hashes.at(0);
            write_change(out, "cache_level", event.level_change);
            return write_change(out, "priority", event.priority_change);
    }
}

const char *name_of(KvCacheEvent::Kind kind) {
    constexpr const char *names[] = {"created", "stored", "removed", "updated"};
    return names[static_cast<int>(kind)];
}

}  // namespace

std::uint64_t hash_of_key(const CacheKey &key) { return mix(mix(key.adapter_id) ^ key.salt); }

std::uint64_t hash_of_block(std::uint64_t parent_hash, std::span<const TokenId> tokens) {
    std::uint64_t hash = mix(parent_hash ^ tokens.size());
    for (const TokenId token : tokens) hash = mix(hash ^ static_cast<std::uint32_t>(token));
    return hash;
}

KvCacheEvent &KvCacheEventBuffer::add(KvCacheEvent::Kind kind, std::int32_t group) {
    if (events_.size() == max_size_) events_.pop_front();
    KvCacheEvent &event = events_.emplace_back();
    event.kind = kind;
    event.event_id = next_id_++;
    event.group = group;
    return event;
}

void KvCacheEventBuffer::created(std::int32_t group, std::vector<std::int32_t> num_blocks_per_level) {
    if (is_enabled()) add(KvCacheEvent::Kind::created, group).num_blocks_per_level = std::move(num_blocks_per_level);
}

void KvCacheEventBuffer::stored(std::int32_t group, std::optional<std::uint64_t> parent_hash, StoredBlock block) {
    if (!is_enabled()) return;
    const bool follows = !events_.empty() && events_.back().kind == KvCacheEvent::Kind::stored &&
                         events_.back().group == group && parent_hash == events_.back().blocks.back().hash;
    KvCacheEvent &event = follows ? events_.back() : add(KvCacheEvent::Kind::stored, group);
    if (!follows) event.parent_hash = parent_hash;
    event.blocks.push_back(std::move(block));
}

void KvCacheEventBuffer::removed(std::int32_t group, std::uint64_t hash) {
    if (is_enabled()) add(KvCacheEvent::Kind::removed, group).hashes = {hash};
}

KvCacheEvent &KvCacheEventBuffer::add_update(std::int32_t group, std::uint64_t hash) {
    KvCacheEvent &event = add(KvCacheEvent::Kind::updated, group);
    event.hashes = {hash};
    return event;
}

void KvCacheEventBuffer::priority_changed(std::int32_t group, std::uint64_t hash, std::int32_t from, std::int32_t to) {
    if (is_enabled()) add_update(group, hash).priority_change = {from, to};
}

void KvCacheEventBuffer::level_changed(std::int32_t group, std::uint64_t hash, std::int32_t from, std::int32_t to) {
    if (is_enabled()) add_update(group, hash).level_change = {from, to};
}

std::vector<KvCacheEvent> KvCacheEventBuffer::take() {
    std::vector<KvCacheEvent> taken(std::make_move_iterator(events_.begin()), std::make_move_iterator(events_.end()));
    events_.clear();
    return taken;
}

std::string to_json(const KvCacheEvent &event) {
    std::ostringstream out;
    const char *name = name_of(event.kind);
    out << R"({"event_id": )" << event.event_id << R"(, "type": ")" << name << R"(", "group": )" << event.group
        << R"(, "data": {"type": ")" << name << "\"";
    write_data(out, event);
    out << "}}";
    return out.str();
}

}  // namespace trtllm::executor
