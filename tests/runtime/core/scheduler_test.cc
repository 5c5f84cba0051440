// Each rule of the scheduler by itself.
#include <numeric>

#include "scheduler_world.h"

namespace {

using namespace testing;

CacheShape blocks(std::int32_t count, std::int32_t size = 4) {
    CacheShape shape;
    shape.num_blocks = count;
    shape.tokens_per_block = size;
    return shape;
}

SchedulerConfig config(CapacitySchedulerPolicy policy = CapacitySchedulerPolicy::guaranteed_no_evict) {
    SchedulerConfig config;
    config.capacity_scheduler_policy = policy;
    config.max_num_tokens = 64;
    config.max_seq_len = 128;
    config.chunk_unit = 4;
    return config;
}

KvCacheOptions without_reuse() {
    KvCacheOptions options;
    options.enable_block_reuse = false;
    return options;
}

// A prompt that no other id's prompt begins like.
SchedulerRequest request(RequestId id, std::int32_t prompt, std::int32_t max_tokens = 8) {
    SchedulerRequest request;
    request.id = id;
    request.max_tokens = max_tokens;
    request.prompt.resize(static_cast<std::size_t>(prompt));
    std::iota(request.prompt.begin(), request.prompt.end(), static_cast<TokenId>(1000 * id));
    return request;
}

std::vector<std::int32_t> chunks(const StepPlan &plan) {
    std::vector<std::int32_t> sizes;
    for (const PlannedRow &row : plan.rows) {
        if (row.is_context) sizes.push_back(row.num_tokens);
    }
    return sizes;
}

using Ids = std::vector<RequestId>;
using Sizes = std::vector<std::int32_t>;

TEST_CASE("a request that can never be served is refused and changes nothing") {
    auto limited = config();
    limited.max_queue_size = 1;
    SchedulerWorld world(limited, blocks(8));
    CHECK_THROWS(world.add(request(1, 0)), RequestError);
    CHECK_THROWS(world.add(request(1, 128)), RequestError);
    CHECK_THROWS(world.add(request(1, 4, 0)), RequestError);
    CHECK_THROWS(world.add(request(1, 26, 8)), RequestError);  // 33 tokens are cached at its end: 9 blocks
    auto wide = request(1, 4);
    wide.num_sequences = 9;
    CHECK_THROWS(world.add(wide), RequestError);
    auto urgent = request(1, 4);
    urgent.priority = 2.0f;
    CHECK_THROWS(world.add(urgent), RequestError);
    CHECK(!world.scheduler.has_work());
    world.add(request(1, 25, 8));  // 32 tokens, 8 blocks
    CHECK_THROWS(world.add(request(1, 4)), RequestError);
    CHECK_THROWS(world.add(request(2, 4)), RequestError);  // the queue is full
    CHECK_EQ(world.scheduler.num_queued(), 1);
}

TEST_CASE("without chunking a prompt longer than a step is refused") {
    auto whole = config();
    whole.enable_chunked_context = false;
    SchedulerWorld world(whole, blocks(64));
    CHECK_THROWS(world.add(request(1, 65)), RequestError);
    world.add(request(1, 64));
}

TEST_CASE("configurations that contradict themselves are refused") {
    KvCacheManager cache(blocks(8), {});
    for (auto member : {&SchedulerConfig::max_batch_size, &SchedulerConfig::max_num_tokens,
                        &SchedulerConfig::max_seq_len, &SchedulerConfig::chunk_unit}) {
        auto wrong = config();
        wrong.*member = 0;
        CHECK_THROWS(Scheduler(wrong, cache), RequestError);
    }
    auto wrong = config();
    wrong.max_queue_size = 0;
    CHECK_THROWS(Scheduler(wrong, cache), RequestError);
}

TEST_CASE("max_tokens is capped so that prompt and output stay within max_seq_len") {
    SchedulerWorld world(config(), blocks(32));
    world.add(request(1, 126, 1000));
    world.step();
    world.step();
    world.step();
    CHECK_EQ(world.scheduler.tokens(1).size(), 128u);
    CHECK_THROWS(world.scheduler.append(1, 0, std::vector<TokenId>{1}), std::logic_error);
}

TEST_CASE("the queue goes by priority, then by arrival") {
    auto narrow = config();
    narrow.max_batch_size = 1;
    SchedulerWorld world(narrow, blocks(64));
    for (RequestId id = 1; id <= 4; ++id) {
        auto next = request(id, 4);
        next.priority = id == 3 ? 0.9f : 0.5f;
        world.add(next);
    }
    Ids order;
    while (world.scheduler.has_work()) {
        const StepPlan plan = world.step();
        order.insert(order.end(), plan.started.begin(), plan.started.end());
        world.scheduler.remove(order.back(), 0);
    }
    CHECK(order == Ids({3, 1, 2, 4}));
}

TEST_CASE("the head of the queue blocks those behind it that would fit") {
    SchedulerWorld world(config(), blocks(10), without_reuse());
    world.add(request(1, 17, 4));  // 5 blocks
    world.add(request(2, 21, 4));  // 6 blocks
    world.add(request(3, 4, 1));   // 1 block
    CHECK(world.step().started == Ids({1}));
    CHECK(world.step().started.empty());
    world.scheduler.remove(1, 0);
    CHECK(world.step().started == Ids({2, 3}));
}

TEST_CASE("guaranteed_no_evict starts as many as the cache holds to their very end") {
    SchedulerWorld world(config(), blocks(10), without_reuse());
    for (RequestId id = 1; id <= 3; ++id) world.add(request(id, 4, 13));  // 16 tokens at the end: 4 blocks, 1 now
    CHECK(world.step().started == Ids({1, 2}));
    for (int i = 0; i < 12; ++i) CHECK(world.step().started.empty());
    CHECK_EQ(world.cache.num_available_blocks(), 2);
}

TEST_CASE("blocks found for reuse need not be promised again") {
    SchedulerWorld world(config(), blocks(8));
    world.add(request(1, 17, 4));  // 20 tokens: 5 blocks
    world.step();
    auto same = request(2, 17, 4);
    same.prompt = request(1, 17).prompt;
    world.add(same);
    CHECK(world.step().started == Ids({2}));  // 4 of its 5 blocks are shared
}

TEST_CASE("samples share the prompt's blocks, and are promised no more than they need") {
    SchedulerWorld world(config(), blocks(8), without_reuse());
    auto samples = request(1, 16, 5);  // 20 tokens: 4 blocks shared, and 1 for each of 4 samples
    samples.num_sequences = 4;
    world.add(samples);
    for (const PlannedRow &row : world.plan().rows) world.run(row);
    world.scheduler.start_sequences(1, std::vector<TokenId>{1, 2, 3, 4});
    const StepPlan plan = world.plan();
    CHECK_EQ(plan.rows.size(), 4u);
    for (const PlannedRow &row : plan.rows) {
        CHECK(!row.is_context);
        CHECK_EQ(row.past_length, 16);
        world.run(row);
    }
    CHECK_EQ(world.cache.num_available_blocks(), 0);
}

TEST_CASE("a finished first sample stays until the others have forked from it") {
    SchedulerWorld world(config(), blocks(16), without_reuse());
    auto samples = request(1, 10, 5);
    samples.num_sequences = 3;
    world.add(samples);
    for (const PlannedRow &row : world.plan().rows) world.run(row);
    world.scheduler.start_sequences(1, std::vector<TokenId>{1, 2, 3});
    world.scheduler.finish_sequence(1, 0, 0);
    world.check();
    CHECK_EQ(world.cache.num_available_blocks(), 13);
    const StepPlan plan = world.plan();
    CHECK_EQ(plan.rows.size(), 2u);
    CHECK_EQ(plan.num_generation_tokens, 2);  // the prompt is not computed again
    for (const PlannedRow &row : plan.rows) world.run(row);
    CHECK_EQ(world.cache.num_available_blocks(), 12);
}

TEST_CASE("max_utilization starts what fits now, and pauses the least important when space ends") {
    SchedulerWorld world(config(CapacitySchedulerPolicy::max_utilization), blocks(4));
    auto important = request(1, 4, 12);
    important.priority = 0.9f;
    world.add(request(2, 4, 12));
    world.add(request(3, 4, 12));
    world.add(important);
    CHECK(world.step().started == Ids({1, 2, 3}));  // a block each now, and a fourth is free
    const StepPlan plan = world.step();             // each wants a second one
    CHECK(plan.paused == Ids({3}));
    CHECK_EQ(plan.rows.size(), 2u);
    CHECK_EQ(world.scheduler.num_paused(), 1);
    CHECK(world.scheduler.stage(3) == RequestStage::queued);
    CHECK_EQ(world.scheduler.tokens(3).size(), 5u);  // its token is kept
}

TEST_CASE("a paused request resumes before later ones, and computes again only what is lost") {
    for (const bool reuse : {true, false}) {
        KvCacheOptions options;
        options.enable_block_reuse = reuse;
        SchedulerWorld world(config(CapacitySchedulerPolicy::max_utilization), blocks(4), options);
        world.add(request(1, 8, 8));
        world.add(request(2, 8, 8));
        world.step();
        CHECK(world.step().paused == Ids({2}));
        world.add(request(3, 4, 4));
        world.scheduler.remove(1, 0);
        const StepPlan plan = world.step();
        CHECK(plan.resumed == Ids({2}));
        CHECK(plan.started == Ids({3}));
        CHECK(plan.rows[0].is_context && plan.rows[0].reaches_end);
        // Its two blocks were kept; request 1 had taken one of them if there had been no other.
        CHECK_EQ(plan.rows[0].past_length, reuse ? 4 : 0);
        CHECK_EQ(plan.rows[0].past_length + plan.rows[0].num_tokens, 9);
    }
}

TEST_CASE("samples pause and resume together, and compute their prompt once") {
    SchedulerWorld world(config(CapacitySchedulerPolicy::max_utilization), blocks(8), without_reuse());
    auto samples = request(2, 8, 9);
    samples.num_sequences = 2;
    world.add(request(1, 8, 20));
    world.add(samples);
    for (const PlannedRow &row : world.plan().rows) world.run(row);
    world.scheduler.append(1, 0, std::vector<TokenId>{5});
    world.scheduler.start_sequences(2, std::vector<TokenId>{6, 7});
    for (TokenId token = 0; token < 4; ++token) {
        const StepPlan plan = world.plan();
        CHECK_EQ(plan.num_generation_tokens, 3);
        for (const PlannedRow &row : plan.rows) world.run(row);
        for (const PlannedRow &row : plan.rows) world.scheduler.append(row.request, row.sequence, std::span(&token, 1));
    }
    CHECK_EQ(world.cache.num_available_blocks(), 1);  // and each of the three wants one more
    StepPlan plan = world.plan();
    CHECK(plan.paused == Ids({2}));
    CHECK_EQ(plan.rows.size(), 1u);
    world.run(plan.rows[0]);
    world.scheduler.remove(1, 0);
    plan = world.plan();
    CHECK(plan.resumed == Ids({2}));
    CHECK(chunks(plan) == Sizes({13}));  // the second sample waits for the prompt
    world.run(plan.rows[0]);
    world.scheduler.append(2, 0, std::vector<TokenId>{9});
    plan = world.plan();
    CHECK(chunks(plan) == Sizes({5}));  // and computes only its own tokens
    CHECK_EQ(plan.num_generation_tokens, 1);
    for (const PlannedRow &row : plan.rows) {
        CHECK(row.reaches_end);
        world.run(row);
    }
}

TEST_CASE("a beam search is never paused, and is promised its end among those that may be") {
    SchedulerWorld world(config(CapacitySchedulerPolicy::max_utilization), blocks(9), without_reuse());
    auto beams = request(1, 4, 13);  // 16 tokens: 1 block shared, 3 for each of 2 beams
    beams.num_sequences = 2;
    beams.is_beam_search = true;
    beams.priority = 0.1f;
    world.add(beams);
    for (const PlannedRow &row : world.plan().rows) world.run(row);
    world.scheduler.start_sequences(1, std::vector<TokenId>{1, 2});
    for (const RequestId id : {2, 3}) world.add(request(id, 4, 20));
    std::int64_t pauses = 0;
    while (world.scheduler.tokens(1).size() < 17) {
        const StepPlan plan = world.plan();
        std::int32_t num_beam_rows = 0;
        for (const PlannedRow &row : plan.rows) world.run(row);
        for (const PlannedRow &row : plan.rows) {
            num_beam_rows += row.request == 1;
            if (row.request == 1 || !row.reaches_end) continue;
            world.scheduler.append(row.request, 0, std::vector<TokenId>{3});
        }
        CHECK_EQ(num_beam_rows, 2);
        for (const RequestId id : plan.paused) CHECK(id != 1);
        pauses += static_cast<std::int64_t>(plan.paused.size());
        world.scheduler.reorder(1, std::vector<std::int32_t>{1, 1}, std::vector<TokenId>{4, 5}, 0);
        world.check();
    }
    CHECK(pauses > 0);
}

TEST_CASE("beams go on from their parents' caches without computing anything again") {
    SchedulerWorld world(config(), blocks(32), without_reuse());
    auto beams = request(1, 6, 8);
    beams.num_sequences = 3;
    beams.is_beam_search = true;
    world.add(beams);
    for (const PlannedRow &row : world.plan().rows) world.run(row);
    world.scheduler.start_sequences(1, std::vector<TokenId>{1, 2});
    StepPlan plan = world.plan();
    CHECK_EQ(plan.num_generation_tokens, 2);
    const SequenceId only_child = plan.rows[1].cache_id;
    for (const PlannedRow &row : plan.rows) world.run(row);
    world.scheduler.reorder(1, std::vector<std::int32_t>{0, 1, 0}, std::vector<TokenId>{3, 4, 5}, 0);
    plan = world.plan();
    CHECK_EQ(plan.num_generation_tokens, 3);
    CHECK_EQ(plan.rows[1].cache_id, only_child);
    for (const PlannedRow &row : plan.rows) world.run(row);
    CHECK(std::ranges::equal(world.scheduler.tokens(1, 2).last(2), std::vector<TokenId>{1, 5}));
    const std::vector<std::int32_t> unknown = {3};
    CHECK_THROWS(world.scheduler.reorder(1, unknown, std::vector<TokenId>{1}, 0), std::logic_error);
}

TEST_CASE("static_batch starts nothing while anything is in flight") {
    SchedulerWorld world(config(CapacitySchedulerPolicy::static_batch), blocks(64));
    world.add(request(1, 4));
    world.add(request(2, 4));
    CHECK(world.step().started == Ids({1, 2}));
    world.add(request(3, 4));
    CHECK(world.step().started.empty());
    world.scheduler.remove(1, 0);
    CHECK(world.step().started.empty());
    world.scheduler.remove(2, 0);
    CHECK(world.step().started == Ids({3}));
}

TEST_CASE("generation goes before context, and context rows come first in the plan") {
    auto small = config();
    small.max_num_tokens = 10;
    SchedulerWorld world(small, blocks(64));
    world.add(request(1, 4));
    world.step();
    world.add(request(2, 30));
    const StepPlan plan = world.step();
    CHECK_EQ(plan.rows.size(), 2u);
    CHECK(plan.rows[0].is_context && plan.rows[0].request == 2 && !plan.rows[1].is_context);
    CHECK_EQ(plan.rows[0].num_tokens, 8);  // 9 are left, and a chunk is a multiple of 4
}

TEST_CASE("first come first served gives the earliest prompt all it can take") {
    auto served = config();
    served.max_num_tokens = 20;
    SchedulerWorld world(served, blocks(64));
    world.add(request(1, 26));
    world.add(request(2, 26));
    CHECK(chunks(world.step()) == Sizes({20}));
    CHECK(chunks(world.step()) == Sizes({6, 12}));
}

TEST_CASE("equal progress gives every prompt one unit in turn") {
    auto equal = config();
    equal.context_chunking_policy = ContextChunkingPolicy::equal_progress;
    equal.max_num_tokens = 20;
    SchedulerWorld world(equal, blocks(64));
    for (RequestId id = 1; id <= 3; ++id) world.add(request(id, 16));
    CHECK(chunks(world.step()) == Sizes({8, 8, 4}));
    const StepPlan second = world.step();  // the turn goes on where it ended: with the third
    CHECK_EQ(second.rows[0].request, 3u);
    CHECK(chunks(second) == Sizes({8, 8, 4}));
}

TEST_CASE("without chunking a prompt is computed whole or waits") {
    auto whole = config();
    whole.enable_chunked_context = false;
    whole.max_num_tokens = 20;
    SchedulerWorld world(whole, blocks(64));
    for (RequestId id = 1; id <= 3; ++id) world.add(request(id, 9));
    CHECK(chunks(world.step()) == Sizes({9, 9}));
    CHECK(chunks(world.step()) == Sizes({9}));
}

TEST_CASE("a step smaller than a chunk unit still computes prompts") {
    auto tiny = config();
    tiny.max_num_tokens = 3;
    SchedulerWorld world(tiny, blocks(64));
    world.add(request(1, 7));
    CHECK(chunks(world.step()) == Sizes({3}));
    CHECK(chunks(world.step()) == Sizes({3}));
    CHECK(chunks(world.step()) == Sizes({1}));
}

TEST_CASE("accepted drafts are in the cache before they are appended") {
    auto drafting = config();
    drafting.max_draft_tokens = 3;
    SchedulerWorld world(drafting, blocks(64));
    world.add(request(1, 4, 20));
    world.step();
    const std::vector<TokenId> drafts = {20, 21, 22};
    world.scheduler.set_drafts(1, 0, drafts);
    PlannedRow row = world.plan().rows.front();
    CHECK_EQ(row.num_tokens, 4);
    CHECK_EQ(row.num_draft_tokens, 3);
    world.compute(row, drafts);
    world.answer(row, 3);  // the third is refused
    CHECK_EQ(world.cache.num_committed(row.cache_id), 7);
    CHECK_THROWS(world.scheduler.append(1, 0, std::vector<TokenId>{20, 99, 50}), std::logic_error);
    world.scheduler.append(1, 0, std::vector<TokenId>{20, 21, 50});
    row = world.plan().rows.front();
    CHECK_EQ(row.past_length, 7);
    CHECK_EQ(row.num_tokens, 1);  // drafts count for one step
    world.run(row);
}

TEST_CASE("drafts are trimmed before prompts, and never beyond max_tokens") {
    auto drafting = config();
    drafting.max_draft_tokens = 8;
    drafting.max_num_tokens = 10;
    SchedulerWorld world(drafting, blocks(64));
    world.add(request(1, 4, 20));
    world.add(request(3, 4, 4));
    world.step();
    world.scheduler.set_drafts(1, 0, std::vector<TokenId>(8, 1));
    world.scheduler.set_drafts(3, 0, std::vector<TokenId>(8, 1));
    world.add(request(2, 20));
    const StepPlan plan = world.plan();
    CHECK_EQ(plan.num_context_tokens, 4);  // a unit of the prompt comes before drafts
    CHECK_EQ(plan.rows[1].num_draft_tokens, 4);
    CHECK_EQ(plan.rows[2].num_draft_tokens, 0);
    world.scheduler.remove(1, 0);
    world.scheduler.remove(2, 0);
    world.run(plan.rows[2]);
    world.scheduler.append(3, 0, std::vector<TokenId>{7});
    world.scheduler.set_drafts(3, 0, std::vector<TokenId>(8, 1));
    CHECK_EQ(world.plan().rows[0].num_draft_tokens, 1);  // it has 6 of 8 tokens: one draft and one more end it
}

TEST_CASE("a request may be removed while its row is computed, and late answers are ignored") {
    SchedulerWorld world(config(), blocks(64));
    world.add(request(1, 4));
    const StepPlan plan = world.plan();
    CHECK_THROWS(world.scheduler.schedule(0), std::logic_error);  // the row is not answered yet
    world.scheduler.remove(1, 0);
    world.check();
    world.scheduler.complete_row(plan.rows[0], 4, 0);
    world.scheduler.append(1, 0, std::vector<TokenId>{1});
    world.scheduler.start_sequences(1, std::vector<TokenId>{1});
    world.scheduler.remove(1, 0);
    CHECK(!world.scheduler.has_work());
    CHECK_EQ(world.cache.num_available_blocks(), 64);
}

TEST_CASE("requests that begin alike wait until the common part is computed once") {
    for (const bool waits : {true, false}) {
        auto waiting = config();
        waiting.max_batch_size = 64;
        waiting.max_num_tokens = 4096;
        waiting.wait_for_shared_prefix = waits;
        SchedulerWorld world(waiting, blocks(1024));
        for (RequestId id = 1; id <= 64; ++id) {
            auto next = request(0, 60, 4);
            next.id = id;
            next.prompt.push_back(static_cast<TokenId>(id));
            world.add(next);
        }
        std::size_t started = world.step().started.size();
        CHECK_EQ(started, waits ? 1u : 64u);
        if (waits) CHECK_EQ(world.step().started.size(), 63u);
        CHECK_EQ(world.num_computed_tokens, waits ? 61 + 63 + 1 : 64 * 61);
    }
}

TEST_CASE("nobody waits for a prefix that is not worth a chunk, or of another cache key") {
    auto waiting = config();
    SchedulerWorld world(waiting, blocks(64));
    world.add(request(1, 20));
    auto barely = request(2, 20);
    std::copy_n(request(1, 3).prompt.begin(), 3, barely.prompt.begin());
    world.add(barely);
    auto salted = request(1, 20);
    salted.id = 3;
    salted.cache.key.salt = 1;
    world.add(salted);
    CHECK(world.step().started == Ids({1, 2, 3}));
}

}  // namespace

int main(int count, char **arguments) { return testing::run(count, arguments); }
