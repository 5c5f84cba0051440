// The rules of the cache manager, one by one.
#include <algorithm>
#include <numeric>

#include "kv_cache_model.h"

namespace {

using namespace model;

CacheShape shape_of(std::int32_t block, std::int32_t blocks, std::int32_t host = 0,
                    std::vector<std::int32_t> windows = {0}) {
    CacheShape shape;
    shape.tokens_per_block = block;
    shape.num_blocks = blocks;
    shape.num_host_blocks = host;
    shape.groups.clear();
    for (const std::int32_t window : windows) shape.groups.push_back({window, 1, 100});
    return shape;
}

std::vector<TokenId> range(TokenId first, std::int32_t count) {
    std::vector<TokenId> tokens(static_cast<std::size_t>(count));
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
}

std::vector<TokenId> joined(std::vector<TokenId> a, const std::vector<TokenId> &b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

SequenceOptions with_priority(std::int32_t priority, std::optional<std::int64_t> duration = std::nullopt) {
    SequenceOptions options;
    options.retention.ranges = {{0, -1, priority, duration}};
    return options;
}

TEST_CASE("full blocks are shared and the last token is always left to compute") {
    World world(shape_of(4, 16), {});
    CHECK_EQ(world.run(1, range(0, 12)), 0);
    CHECK_EQ(world.add(2, range(0, 12)), 11);
    CHECK_EQ(world.add(3, joined(range(0, 8), range(50, 8))), 8);
    CHECK(std::ranges::equal(world.cache.block_table(2).first(2), world.cache.block_table(3)));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 8), {}), 7);
    CHECK_EQ(world.cache.count_reusable_tokens(range(1, 8), {}), 0);
    CHECK_EQ(world.cache.count_reusable_tokens({}, {}), 0);
    world.check();
}

TEST_CASE("prompts share nothing across adapters or salts") {
    World world(shape_of(4, 16), {});
    world.run(1, range(0, 12), {{1, 0}, {}});
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 12), {0, 0}), 0);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 12), {1, 7}), 0);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 12), {1, 0}), 11);
}

TEST_CASE("without reuse nothing is kept or found") {
    KvCacheOptions options;
    options.enable_block_reuse = false;
    World world(shape_of(4, 4), options);
    world.run(1, range(0, 12));
    CHECK_EQ(world.add(2, range(0, 12)), 0);
    CHECK_EQ(world.cache.stats().used_num_blocks, 0);
}

TEST_CASE("max_reuse_tokens bounds what is shared, and 0 shares nothing") {
    World world(shape_of(4, 16), {});
    world.run(1, range(0, 12));
    SequenceOptions options;
    options.max_reuse_tokens = 6;
    CHECK_EQ(world.add(2, range(0, 12), options), 6);
    options.max_reuse_tokens = 0;
    CHECK_EQ(world.add(3, range(0, 12), options), 0);
    world.check();
}

TEST_CASE("part of a block is copied from one that is in use") {
    World world(shape_of(8, 8), {});
    world.add(1, range(0, 20));
    CHECK(world.step(1, range(0, 20)));
    CHECK_EQ(world.add(2, joined(range(0, 13), range(90, 3))), 13);
    CHECK(world.cache.block_table(2)[0] == world.cache.block_table(1)[0]);
    CHECK(world.cache.block_table(2)[1] != world.cache.block_table(1)[1]);
    CHECK_EQ(world.add(3, joined(range(0, 18), range(90, 3))), 18);  // from the block that sequence 1 still fills
    world.check();
}

TEST_CASE("a linear cache shares a system prompt while its first user still generates") {
    World world(shape_of(64, 3), {});
    world.add(1, range(0, 40));
    CHECK(world.step(1, range(0, 40)));
    CHECK(world.step(1, range(70, 1)));
    CHECK_EQ(world.add(2, joined(range(0, 30), range(90, 5))), 30);
    CHECK(world.step(1, range(71, 2)));
    CHECK(world.step(2, range(90, 5)));
    world.check();
}

TEST_CASE("without partial reuse only whole blocks count, and short matches are not worth a copy") {
    KvCacheOptions options;
    options.enable_partial_reuse = false;
    World whole(shape_of(8, 8), options);
    whole.run(1, range(0, 20));
    CHECK_EQ(whole.cache.count_reusable_tokens(range(0, 20), {}), 16);
    options.enable_partial_reuse = true;
    options.min_partial_tokens = 3;
    World worth(shape_of(8, 8), options);
    worth.run(1, range(0, 20));
    CHECK_EQ(worth.cache.count_reusable_tokens(joined(range(0, 18), range(90, 5)), {}), 16);
    CHECK_EQ(worth.cache.count_reusable_tokens(joined(range(0, 19), range(90, 5)), {}), 19);
}

TEST_CASE("without copying, an unused leaf is taken over and loses its rest") {
    KvCacheOptions options;
    options.copy_on_partial_reuse = false;
    World world(shape_of(8, 8), options);
    world.run(1, range(0, 16));
    const std::int32_t available = world.cache.num_available_blocks();
    CHECK_EQ(world.add(2, joined(range(0, 12), range(90, 9))), 12);
    CHECK(world.cache.take_copies().empty());
    CHECK_EQ(world.cache.num_available_blocks(), available - 2);
    CHECK(world.step(2, range(90, 9)));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 16), {}), 8);  // the block is in use now
    world.check();
}

TEST_CASE("a block that matches to its end is taken over without a copy") {
    World world(shape_of(64, 4), {});
    world.run(1, range(0, 40));
    CHECK_EQ(world.add(2, range(0, 50)), 40);
    CHECK(world.cache.take_copies().empty());
    CHECK(world.step(2, range(40, 10)));
    world.check();
}

TEST_CASE("the only slot left is taken over rather than lost, even when its rest does not match") {
    World world(shape_of(64, 1), {});
    world.run(1, range(0, 40));
    CHECK_EQ(world.add(2, joined(range(0, 30), range(90, 5))), 30);
    CHECK(world.cache.take_copies().empty());
    CHECK(world.step(2, range(90, 5)));
    world.check();
}

TEST_CASE("the child with the longest common prefix is found among many") {
    World world(shape_of(16, 64), {});
    for (TokenId i = 0; i < 15; ++i) {
        world.run(static_cast<SequenceId>(i), joined(joined(range(0, 1 + i % 8), {100 + i}), range(200, 4)));
    }
    for (TokenId i = 0; i < 15; ++i) {
        const std::vector<TokenId> prompt = joined(joined(range(0, 1 + i % 8), {100 + i}), range(300, 9));
        CHECK_EQ(world.cache.count_reusable_tokens(prompt, {}), 2 + i % 8);
    }
}

TEST_CASE("two sequences that commit the same tokens end up with one block, and the other is free again") {
    World world(shape_of(4, 8), {});
    world.add(1, range(0, 9));
    world.add(2, range(0, 9));
    CHECK(world.step(1, range(0, 6)));
    CHECK_EQ(world.cache.num_available_blocks(), 6);
    CHECK(world.step(2, range(0, 6)));
    CHECK_EQ(world.cache.num_available_blocks(), 5);
    CHECK_EQ(world.cache.block_table(1)[0], world.cache.block_table(2)[0]);
    CHECK(world.cache.block_table(1)[1] != world.cache.block_table(2)[1]);
    CHECK(world.step(2, range(6, 1)));  // the longer one now stands in the tree
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 9), {}), 7);
    world.remove(1);
    world.check();
    CHECK_EQ(world.cache.stats().used_num_blocks, 2);
    CHECK_EQ(world.cache.num_available_blocks(), 6);
    world.remove(2);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 9), {}), 7);
    world.check();
}

TEST_CASE("sequences that part inside a block are both found") {
    World world(shape_of(16, 8), {});
    world.add(1, range(0, 5));
    world.add(2, range(0, 5));
    CHECK(world.step(1, range(0, 5)));
    CHECK(world.step(2, range(0, 5)));
    CHECK(world.step(1, range(20, 3)));
    CHECK(world.step(2, range(30, 3)));
    CHECK_EQ(world.cache.count_reusable_tokens(joined(joined(range(0, 5), range(20, 3)), {1}), {}), 8);
    CHECK_EQ(world.cache.count_reusable_tokens(joined(joined(range(0, 5), range(30, 3)), {1}), {}), 8);
    world.check();
}

TEST_CASE("lower priorities go first, then what was used longest ago") {
    World world(shape_of(4, 3), {});
    world.run(1, range(0, 4), with_priority(80));
    world.run(2, range(10, 4));
    world.run(3, range(20, 4));
    const auto kept = [&](TokenId first) { return world.cache.count_reusable_tokens(range(first, 5), {}) == 4; };
    world.run(4, range(30, 4));
    CHECK(kept(0) && !kept(10) && kept(20) && kept(30));
    world.run(5, range(40, 4), with_priority(10));
    CHECK(kept(0) && !kept(20) && kept(30) && kept(40));
    world.run(6, range(50, 4));
    CHECK(kept(0) && kept(30) && !kept(40) && kept(50));
}

TEST_CASE("a priority with a duration falls back to the default when its time is over") {
    World world(shape_of(4, 2), {});
    world.run(1, range(0, 4), with_priority(90, 100));
    world.now = 50;
    world.run(2, range(10, 4));
    world.now = 99;
    world.run(3, range(20, 4));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 5), {}), 4);
    world.now = 100;
    world.run(4, range(30, 4));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 5), {}), 0);
    CHECK_EQ(world.cache.count_reusable_tokens(range(20, 5), {}), 4);
}

TEST_CASE("decoded tokens have a priority of their own") {
    World world(shape_of(4, 3), {});
    SequenceOptions options;
    options.retention.decode_priority = 5;
    world.add(1, range(0, 4), options);
    CHECK(world.step(1, range(0, 4)));
    CHECK(world.step(1, range(4, 4)));
    world.remove(1);
    world.run(2, range(20, 4), with_priority(6));
    world.run(3, range(30, 4));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 9), {}), 4);
}

TEST_CASE("only leaves go: a path is eaten from its end") {
    World world(shape_of(4, 4), {});
    world.run(1, range(0, 16));
    for (std::int32_t i = 1; i <= 3; ++i) {
        world.add(static_cast<SequenceId>(10 + i), range(100 * i, 4));
        CHECK(world.step(static_cast<SequenceId>(10 + i), range(100 * i, 4)));
        CHECK_EQ(world.cache.count_reusable_tokens(range(0, 17), {}), 16 - 4 * i);
    }
    world.check();
}

TEST_CASE("an evicted block goes to the host and comes back when it is wanted") {
    World world(shape_of(4, 2, 4), {});
    world.run(1, range(0, 8));
    world.run(2, range(50, 8));
    CHECK_EQ(world.cache.stats().offloaded_blocks, 2);
    CHECK_EQ(world.cache.stats().host_used_blocks, 2);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 9), {}), 8);
    CHECK_EQ(world.add(3, range(0, 9)), 8);
    world.check();
    CHECK_EQ(world.cache.stats().onboarded_blocks, 2);
    CHECK_EQ(world.cache.stats().offloaded_blocks, 4);
    CHECK(!world.cache.reserve(3, 9, 0));
}

TEST_CASE("copies that are executed in order never read a block that was written too early") {
    World world(shape_of(4, 4, 4), {});
    world.run(1, range(0, 8));
    world.run(2, range(50, 8));
    world.run(3, range(90, 8));  // 1 is on the host now
    // Bringing 1 back sends 2 to the host, block by block through the same places; then part of 2 is wanted, which
    // makes room in the place of 3. Nothing is executed in between.
    CHECK_EQ(world.add(4, joined(range(0, 8), {1})), 8);
    CHECK_EQ(world.add(5, joined(range(50, 2), {1})), 2);
    const std::vector<BlockCopy> copies = world.cache.take_copies();
    CHECK_EQ(copies.size(), 6u);
    FakeMemory reversed = world.memory;
    reversed.replay({copies.rbegin(), copies.rend()});
    world.memory.replay(copies);
    world.check();
    CHECK_THROWS(reversed.verify(world.cache, 4, {}, range(0, 8)), testing::Failure);  // the order makes it right
}

TEST_CASE("blocks of little worth are dropped, and the host keeps what is worth most") {
    World dropped(shape_of(4, 1, 4), {});
    dropped.run(1, range(0, 4), with_priority(default_retention_priority - 1));
    dropped.run(2, range(50, 4));
    CHECK_EQ(dropped.cache.stats().host_used_blocks, 0);
    World world(shape_of(4, 1, 1), {});
    world.run(1, range(0, 4), with_priority(60));
    world.run(2, range(50, 4), with_priority(50));  // 1 goes to the host
    world.run(3, range(60, 4), with_priority(70));  // 2 is worth less than 1
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 5), {}), 4);
    CHECK_EQ(world.cache.count_reusable_tokens(range(50, 5), {}), 0);
    world.run(4, range(70, 4));  // 3 is worth more
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 5), {}), 0);
    CHECK_EQ(world.cache.count_reusable_tokens(range(60, 5), {}), 4);
}

TEST_CASE("without onboarding a match ends where the host begins") {
    KvCacheOptions options;
    options.onboard_blocks = false;
    World world(shape_of(4, 3, 4), options);
    world.run(1, range(0, 12));
    world.run(2, range(50, 4));
    CHECK_EQ(world.cache.stats().host_used_blocks, 1);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 13), {}), 8);
}

TEST_CASE("a window lets go of blocks that no later token sees") {
    World world(shape_of(4, 16, 0, {0, 6}), {});
    world.add(1, range(0, 40));
    for (std::int32_t at = 0; at < 40; ++at) {
        CHECK(world.step(1, range(at, 1)));
        const auto table = world.cache.block_table(1, 1);
        for (std::int32_t i = 0; i < static_cast<std::int32_t>(table.size()); ++i) {
            CHECK_EQ(table[static_cast<std::size_t>(i)] >= 0, i >= std::max(0, at + 1 - 6 + 1) / 4);
        }
        world.check();
    }
    CHECK_EQ(world.cache.block_table(1, 0).size(), 10u);
    CHECK_EQ(world.cache.num_available_blocks(), 6);
    CHECK(!world.fork(1, 2, 12));
    CHECK(world.fork(1, 2, 39));
    world.check();
}

TEST_CASE("a prefix counts only where every group has what it needs") {
    World world(shape_of(4, 6, 0, {4, 16}), {});
    world.add(1, range(0, 24));
    CHECK(world.step(1, range(0, 24)));
    world.remove(1);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 25), {}), 24);
    world.add(2, range(100, 6));  // evicts what was released first: early blocks, of the narrow window above all
    CHECK(world.step(2, range(100, 6)));
    const std::int32_t reused = world.add(3, range(0, 25));
    CHECK(reused > 0);
    world.check();
}

TEST_CASE("the narrow window of a long gap resumes at the earlier place that both groups have") {
    World world(shape_of(4, 8, 0, {0, 5}), {});
    world.run(1, range(0, 32));
    world.run(2, joined(range(0, 8), range(200, 4)));
    CHECK_EQ(world.cache.count_reusable_tokens(joined(range(0, 8), range(300, 4)), {}), 8);
    world.check();
}

TEST_CASE("reserving takes all groups' blocks or none") {
    World world(shape_of(4, 4, 0, {0, 8}), {});
    world.add(1, range(0, 20));
    CHECK(!world.cache.reserve(1, 17, 0));
    CHECK_EQ(world.cache.num_available_blocks(), 4);
    CHECK_EQ(world.cache.missing_blocks(1, 16), 4);
    CHECK(world.cache.reserve(1, 16, 0));
    CHECK_EQ(world.cache.missing_blocks(1, 16), 0);
    CHECK_EQ(world.cache.held_blocks(1), 4);
    CHECK_EQ(world.cache.num_available_blocks(), 0);
    world.check();
}

TEST_CASE("a fork shares full blocks, copies the last and goes its own way") {
    for (const std::int32_t block : {4, 64}) {
        for (const bool reuse : {true, false}) {
            KvCacheOptions options;
            options.enable_block_reuse = reuse;
            World world(shape_of(block, 8), options);
            world.add(1, range(0, 10));
            CHECK(world.step(1, range(0, 10)));
            CHECK(world.fork(1, 2, 10));
            CHECK(world.fork(1, 3, 7));
            CHECK(world.step(1, range(50, 3)));
            CHECK(world.step(2, range(60, 3)));
            CHECK(world.step(3, range(70, 3)));
            world.check();
            if (block == 4) CHECK_EQ(world.cache.block_table(1)[0], world.cache.block_table(3)[0]);
            for (const SequenceId id : {1, 2, 3}) world.remove(id);
            world.check();
            CHECK_EQ(world.cache.num_available_blocks(), 8);
        }
    }
}

TEST_CASE("a fork without a free block changes nothing") {
    World world(shape_of(4, 3), {});
    world.add(1, range(0, 10));
    CHECK(world.step(1, range(0, 10)));
    CHECK(!world.fork(1, 2, 9));
    CHECK(!world.cache.has_sequence(2));
    CHECK(world.fork(1, 2, 8));
    world.check();
}

TEST_CASE("truncated tokens are found no longer, and the blocks stay reserved") {
    World world(shape_of(4, 8), {});
    world.add(1, range(0, 14));
    CHECK(world.step(1, range(0, 14)));
    world.truncate(1, 6);
    CHECK_EQ(world.cache.held_blocks(1), 4);
    CHECK_EQ(world.cache.missing_blocks(1, 16), 0);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 14), {}), 6);
    CHECK(world.step(1, range(40, 8)));
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 14), {}), 6);
    world.check();
}

TEST_CASE("truncating into a shared block leaves it to the others and makes a copy before the next token") {
    World world(shape_of(4, 6), {});
    world.add(1, range(0, 12));
    CHECK(world.step(1, range(0, 12)));
    CHECK(world.fork(1, 2, 12));
    world.truncate(2, 6);
    world.check();
    CHECK_EQ(world.cache.missing_blocks(2, 6), 1);
    CHECK_EQ(world.cache.held_blocks(2), 1);
    CHECK_THROWS(world.cache.commit(2, range(70, 1), 0), std::logic_error);
}

TEST_CASE("after the copy both sequences keep their own tokens") {
    World world(shape_of(4, 6), {});
    world.add(1, range(0, 12));
    CHECK(world.step(1, range(0, 12)));
    CHECK(world.fork(1, 2, 12));
    world.truncate(2, 6);
    CHECK(world.step(2, range(70, 5)));
    world.check();
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 13), {}), 12);
    world.truncate(2, 7);
    world.remove(1);
    world.truncate(2, 3);
    CHECK(world.step(2, range(80, 2)));
    world.check();
}

TEST_CASE("removing without keeping takes what the sequence put in, and no more") {
    World world(shape_of(4, 16), {});
    world.run(1, range(0, 8));
    world.add(2, range(0, 16));
    CHECK(world.step(2, range(8, 8)));
    CHECK_EQ(world.add(3, range(0, 13)), 12);
    world.remove(2, false);
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 17), {}), 12);  // sequence 3 uses it
    world.remove(3, false);
    world.check();
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 17), {}), 12);
    World alone(shape_of(4, 16), {});
    alone.run(1, range(0, 8));
    alone.add(2, range(0, 17));
    CHECK(alone.step(2, range(8, 9)));
    alone.remove(2, false);
    alone.check();
    CHECK_EQ(alone.cache.count_reusable_tokens(range(0, 17), {}), 8);
}

TEST_CASE("clearing forgets what is kept, and running sequences no longer add to it") {
    World world(shape_of(4, 8, 4), {});
    world.run(1, range(0, 8));
    world.add(2, range(50, 8));
    CHECK(world.step(2, range(50, 6)));
    world.cache.clear_reusable(0);
    world.check();
    CHECK_EQ(world.cache.count_reusable_tokens(range(0, 8), {}), 0);
    CHECK(world.step(2, range(56, 4)));
    world.remove(2);
    world.check();
    CHECK_EQ(world.cache.count_reusable_tokens(range(50, 9), {}), 0);
    CHECK_EQ(world.cache.num_available_blocks(), 8);
}

TEST_CASE("blocks that were promised to admitted sequences can always be reserved") {
    testing::Random random(5);
    for (int round = 0; round < testing::scaled(300); ++round) {
        const std::vector<std::vector<std::int32_t>> windows = {{0}, {0, 9}, {9}, {9, 17}, {5, 0}};
        const std::int32_t block = static_cast<std::int32_t>(testing::pick(random, 1, 8));
        const std::int32_t blocks = static_cast<std::int32_t>(testing::pick(random, 6, 40));
        const std::int32_t host = static_cast<std::int32_t>(testing::pick(random, 0, 8));
        World world(shape_of(block, blocks, host, windows[static_cast<std::size_t>(round) % 5]), {});
        constexpr std::int32_t most_chunk = 5;
        std::map<SequenceId, std::vector<TokenId>> plans;
        const auto owed = [&] {
            std::int32_t sum = 0;
            for (const auto &[id, plan] : plans) {
                const std::int32_t total = world.cache.blocks_for(static_cast<std::int32_t>(plan.size()), most_chunk);
                sum += std::max(0, total - world.cache.held_blocks(id));
            }
            return sum;
        };
        for (SequenceId id = 0; id < 60; ++id) {
            std::vector<TokenId> plan(static_cast<std::size_t>(testing::pick(random, 1, 40)));
            for (TokenId &token : plan) token = static_cast<TokenId>(testing::pick(random, 0, 15) / 15);
            if (owed() + world.cache.blocks_for(static_cast<std::int32_t>(plan.size()), most_chunk) <=
                world.cache.num_available_blocks()) {
                world.add(id, plan);
                plans[id] = plan;
            }
            CHECK(owed() <= world.cache.num_available_blocks());
            for (auto at = plans.begin(); at != plans.end();) {
                const auto &[sequence, tokens] = *at;
                const std::size_t done = static_cast<std::size_t>(world.cache.num_committed(sequence));
                const std::size_t count = std::min<std::size_t>(
                    tokens.size() - done, static_cast<std::size_t>(testing::pick(random, 1, most_chunk)));
                CHECK(world.step(sequence, std::span(tokens).subspan(done, count)));
                if (done + count < tokens.size()) {
                    ++at;
                    continue;
                }
                world.remove(sequence);
                at = plans.erase(at);
            }
            world.check();
        }
    }
}

TEST_CASE("events tell what is kept, with chained hashes") {
    KvCacheOptions options;
    options.event_buffer_max_size = 100;
    World world(shape_of(4, 3, 1), options);
    world.run(1, range(0, 10));
    std::vector<KvCacheEvent> events = world.cache.take_events();
    CHECK_EQ(events.size(), 2u);
    CHECK(events[0].kind == KvCacheEvent::Kind::created);
    CHECK(events[0].num_blocks_per_level == (std::vector<std::int32_t>{3, 1}));
    CHECK(events[1].kind == KvCacheEvent::Kind::stored && !events[1].parent_hash);
    CHECK_EQ(events[1].blocks.size(), 3u);
    CHECK(events[1].blocks[2].tokens == range(8, 2));
    const std::uint64_t tail = events[1].blocks[2].hash, second = events[1].blocks[1].hash;
    world.run(2, range(50, 8));
    events = world.cache.take_events();
    CHECK(events[0].kind == KvCacheEvent::Kind::updated && events[0].hashes[0] == tail);
    CHECK(events[0].level_change == std::pair(0, 1));
    CHECK(events[1].kind == KvCacheEvent::Kind::removed && events[1].hashes[0] == tail);
    CHECK(events[2].kind == KvCacheEvent::Kind::updated && events[2].hashes[0] == second);
    CHECK(events[3].kind == KvCacheEvent::Kind::stored && events[3].blocks.size() == 2);
    for (std::size_t i = 0; i < events.size(); ++i) CHECK_EQ(events[i].event_id, i + 2);
    CHECK(world.cache.take_events().empty());
}

TEST_CASE("hashes depend on the key, and the buffer drops what is oldest") {
    KvCacheOptions options;
    options.event_buffer_max_size = 2;
    World world(shape_of(4, 8), options);
    world.run(1, range(0, 4), {{1, 0}, {}});
    world.run(2, range(0, 4), {{2, 0}, {}});
    const std::vector<KvCacheEvent> events = world.cache.take_events();
    CHECK_EQ(events.size(), 2u);
    CHECK_EQ(events[0].event_id, 1u);
    CHECK(events[0].blocks[0].hash != events[1].blocks[0].hash);
}

TEST_CASE("statistics count blocks, hits and bytes") {
    World world(shape_of(4, 8, 0, {0, 100}), {});
    world.run(1, range(0, 8));
    world.add(2, range(0, 12));
    CHECK(world.step(2, range(8, 4)));
    const KvCacheStats stats = world.cache.stats();
    CHECK_EQ(stats.max_num_blocks, 16);
    CHECK_EQ(stats.used_num_blocks, 6);
    CHECK_EQ(stats.free_num_blocks, 10);
    CHECK_EQ(stats.reused_blocks, 4);
    CHECK_EQ(stats.missed_blocks, 6);
    CHECK_EQ(stats.reused_tokens, 8);
    CHECK_EQ(stats.prompt_tokens, 20);
    CHECK_EQ(stats.alloc_new_blocks, 6);
    CHECK_EQ(stats.used_bytes, 3 * 4 * 100 * 2);
    CHECK_EQ(stats.cache_hit_rate, 0.4);
    CHECK_EQ(world.cache.sequence_stats(2).reused_blocks, 4);
    CHECK_EQ(world.cache.sequence_stats(2).missed_blocks, 2);
    CHECK_EQ(world.cache.sequence_stats(2).alloc_new_blocks, 2);
}

TEST_CASE("mistakes of the caller are named") {
    World world(shape_of(4, 8), {});
    world.add(1, range(0, 8));
    CHECK_THROWS(world.cache.add_sequence(1, range(0, 8), {}, 0), std::logic_error);
    CHECK_THROWS(world.cache.reserve(2, 8, 0), std::logic_error);
    CHECK_THROWS(world.cache.commit(1, range(0, 1), 0), std::logic_error);
    CHECK_THROWS(KvCacheManager(shape_of(0, 8), {}), std::invalid_argument);
}

}  // namespace

int main(int count, char **arguments) { return testing::run(count, arguments); }
