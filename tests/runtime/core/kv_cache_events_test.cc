// The JSON of cache events has the reference's names.
#include "testing.h"
#include "trtllm/executor.h"

namespace {

using namespace trtllm::executor;

TEST_CASE("a created event lists the blocks of each level") {
    KvCacheEvent event;
    event.num_blocks_per_level = {8, 2};
    CHECK_EQ(to_json(event),
             R"({"event_id": 0, "type": "created", "group": 0, "data": {"type": "created", )"
             R"("num_blocks_per_cache_level": [8, 2]}})");
}

TEST_CASE("a stored event lists its blocks, with the parent's hash if there is one") {
    KvCacheEvent event;
    event.kind = KvCacheEvent::Kind::stored;
    event.event_id = 7;
    event.group = 1;
    event.blocks = {{18446744073709551615ull, {5, 6}, 35, 0}};
    const std::string blocks =
        R"("blocks": [{"type": "stored_block", "block_hash": 18446744073709551615, "tokens": )"
        R"([{"type": "unique_token", "token_id": 5, "token_extra_id": 0}, )"
        R"({"type": "unique_token", "token_id": 6, "token_extra_id": 0}], "cache_level": 0, "priority": 35}]}})";
    const std::string head =
        R"({"event_id": 7, "type": "stored", "group": 1, "data": {"type": "stored", "parent_hash": )";
    CHECK_EQ(to_json(event), head + "null, " + blocks);
    event.parent_hash = 99;
    CHECK_EQ(to_json(event), head + "99, " + blocks);
}

TEST_CASE("removed and updated events name their blocks, and updates both values") {
    KvCacheEvent event;
    event.kind = KvCacheEvent::Kind::removed;
    event.hashes = {3, 4};
    CHECK_EQ(to_json(event),
             R"({"event_id": 0, "type": "removed", "group": 0, "data": {"type": "removed", "block_hashes": [3, 4]}})");
    event.kind = KvCacheEvent::Kind::updated;
    event.hashes = {3};
    event.level_change = {0, 1};
    CHECK_EQ(to_json(event),
             R"({"event_id": 0, "type": "updated", "group": 0, "data": {"type": "updated", "block_hash": 3, )"
             R"("cache_level": {"type": "event_diff", "new_value": 1, "old_value": 0}, "priority": null}})");
}

}  // namespace

int main(int count, char **arguments) { return testing::run(count, arguments); }
