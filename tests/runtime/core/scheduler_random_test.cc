// Random requests under random configurations: every one ends with the tokens that it must have, whatever was paused,
// shared, guessed, reordered or cancelled on the way, and the books balance after every operation.
#include <memory>
#include <set>
#include <string>

#include "scheduler_world.h"

namespace {

using namespace testing;

// What the pretended model says next: it depends on the sequence's tokens and its number alone.
TokenId next_token(std::span<const TokenId> tokens, std::int32_t sequence) {
    std::uint64_t history = static_cast<std::uint64_t>(sequence);
    for (const TokenId token : tokens) history = mix(history, static_cast<std::uint64_t>(token));
    return static_cast<TokenId>(history % 3);
}

struct Expected {
    SchedulerRequest request;
    std::int32_t max_length = 0;
    std::int32_t early_end = 0;  // output tokens after which its samples end; 0: only at max_length
    bool is_started = false;
    bool was_paused = false;
    std::vector<bool> finished;
};

// What all runs together have met: a run that meets nothing proves nothing.
struct Met {
    std::int64_t pauses = 0, resumptions = 0, accepted_drafts = 0, refused_drafts = 0, reorders = 0, cancellations = 0;
    std::int64_t reused_starts = 0, cut_prompts = 0, samples = 0, refusals = 0;
};

class RandomRun {
public:
    RandomRun(std::uint64_t seed, Met &met) : random_(seed), met_(met) {}

    // The configuration in words, for a failure's message.
    std::string describe() const {
        std::ostringstream text;
        text << "policy " << static_cast<int>(config_.capacity_scheduler_policy) << ", chunking "
             << static_cast<int>(config_.context_chunking_policy) << (config_.enable_chunked_context ? "" : " off")
             << ", batch " << config_.max_batch_size << ", tokens " << config_.max_num_tokens << ", length "
             << config_.max_seq_len << ", unit " << config_.chunk_unit << ", drafts " << config_.max_draft_tokens
             << ", blocks " << shape_.num_blocks << " of " << shape_.tokens_per_block << ", windows";
        for (const CacheGroup &group : shape_.groups) text << " " << group.window;
        text << ", reuse " << options_.enable_block_reuse << options_.enable_partial_reuse
             << options_.copy_on_partial_reuse;
        return text.str();
    }

    void run() {
        choose_config();
        world_ = std::make_unique<SchedulerWorld>(config_, shape_, options_);
        std::int64_t to_add = some(1, 14);
        for (std::int64_t steps = 0; to_add > 0 || !expected_.empty(); ++steps) {
            CHECK(steps <= 200 + 20 * num_tokens_);  // no request waits for ever
            for (; to_add > 0 && (expected_.empty() || some(0, 2) > 0); --to_add) add();
            if (some(0, 30) == 0) cancel_any();
            step();
        }
        CHECK(!world_->scheduler.has_work());
        CHECK_EQ(world_->scheduler.num_queued() + world_->scheduler.num_active(), 0);
        CHECK_EQ(world_->cache.num_available_blocks(), world_->cache.num_blocks());
    }

private:
    std::int64_t some(std::int64_t least, std::int64_t most) { return pick(random_, least, most); }
    bool maybe() { return some(0, 1) == 1; }

    void choose_config() {
        config_.capacity_scheduler_policy = static_cast<CapacitySchedulerPolicy>(some(0, 2));
        config_.context_chunking_policy = static_cast<ContextChunkingPolicy>(some(0, 1));
        config_.enable_chunked_context = some(0, 3) > 0;
        config_.max_batch_size = static_cast<std::int32_t>(some(1, 12));
        config_.max_num_tokens = static_cast<std::int32_t>(some(1, maybe() ? 12 : 60));
        config_.max_seq_len = static_cast<std::int32_t>(some(4, 80));
        config_.chunk_unit = static_cast<std::int32_t>(some(1, 16));
        config_.max_draft_tokens = maybe() ? static_cast<std::int32_t>(some(1, 4)) : 0;
        config_.wait_for_shared_prefix = maybe();
        shape_.tokens_per_block = some(0, 7) == 0 ? config_.max_seq_len : static_cast<std::int32_t>(some(1, 8));
        shape_.num_blocks = static_cast<std::int32_t>(some(4, 50));
        choose_groups();
        options_.enable_block_reuse = some(0, 3) > 0;
        options_.enable_partial_reuse = maybe();
        options_.copy_on_partial_reuse = maybe();
    }

    void choose_groups() {
        const auto window = static_cast<std::int32_t>(some(4, 30));
        const std::int64_t kind = some(0, 7);
        if (kind == 0) shape_.groups = {CacheGroup{window, 1, 0}};
        if (kind == 1) shape_.groups = {CacheGroup{}, CacheGroup{window, 1, 0}};
    }

    SchedulerRequest choose_request() {
        SchedulerRequest request;
        request.id = ++last_id_;
        const auto length = static_cast<std::size_t>(some(1, std::max(2, config_.max_seq_len * 3 / 4)));
        const TokenId family = static_cast<TokenId>(some(0, 2));  // prompts of a family begin alike
        const auto common = static_cast<std::size_t>(some(0, static_cast<std::int64_t>(length)));
        for (std::size_t i = 0; i < length; ++i) {
            const auto shared = static_cast<TokenId>((i * 5 + static_cast<std::size_t>(family)) % 11);
            request.prompt.push_back(i < common ? shared : static_cast<TokenId>(some(0, 2)));
        }
        request.max_tokens = static_cast<std::int32_t>(some(1, 30));
        request.num_sequences = some(0, 2) == 0 ? static_cast<std::int32_t>(some(1, 4)) : 1;
        request.is_beam_search = request.num_sequences > 1 && maybe();
        request.priority = static_cast<float>(some(0, 2)) / 2.0f;
        request.cache.key.salt = some(0, 5) == 0;
        if (some(0, 5) == 0) request.cache.max_reuse_tokens = static_cast<std::int32_t>(some(0, 20));
        return request;
    }

    void add() {
        SchedulerRequest request = choose_request();
        const RequestId id = request.id;
        const auto length = static_cast<std::int32_t>(request.prompt.size());
        Expected expected{request, std::min(length + request.max_tokens, config_.max_seq_len), 0, false, false, {}};
        if (maybe()) expected.early_end = static_cast<std::int32_t>(some(1, 20));
        try {
            world_->add(std::move(request));
        } catch (const RequestError &) {
            CHECK(!world_->scheduler.contains(id));
            ++met_.refusals;
            return;
        }
        num_tokens_ += static_cast<std::int64_t>(expected.max_length) * expected.request.num_sequences;
        expected_.emplace(id, std::move(expected));
    }

    void cancel_any() {
        if (expected_.empty()) return;
        auto any = expected_.begin();
        std::advance(any, some(0, static_cast<std::int64_t>(expected_.size()) - 1));
        remove(any->first, some(0, 3) > 0);
        ++met_.cancellations;
    }

    void remove(RequestId id, bool keep = true) {
        world_->scheduler.remove(id, world_->now_ms, keep);
        expected_.erase(id);
        CHECK(!world_->scheduler.contains(id));
        world_->check();
    }

    void step() {
        set_drafts();
        const StepPlan plan = world_->plan();
        note(plan);
        for (const PlannedRow &row : plan.rows) world_->compute(row, planned_drafts(row));
        if (some(0, 15) == 0) cancel_any();
        for (const PlannedRow &row : plan.rows) answer(row);
        reorder_beams();
        if (some(0, 20) == 0) finish_any();
        drafts_.clear();
        ++world_->now_ms;
    }

    void note(const StepPlan &plan) {
        for (const RequestId id : plan.started) {
            CHECK(!expected_.at(id).was_paused);
        }
        for (const PlannedRow &row : plan.rows) {
            met_.cut_prompts += !row.reaches_end;
            met_.reused_starts += row.past_length > 0 && !plan.started.empty() && row.request == plan.started.front();
        }
        met_.pauses += static_cast<std::int64_t>(plan.paused.size());
        met_.resumptions += static_cast<std::int64_t>(plan.resumed.size());
        for (const RequestId id : plan.paused) {
            CHECK(config_.capacity_scheduler_policy == CapacitySchedulerPolicy::max_utilization);
            CHECK(!expected_.at(id).request.is_beam_search);
            CHECK(world_->scheduler.stage(id) == RequestStage::queued);
            expected_.at(id).was_paused = true;
        }
        for (const RequestId id : plan.resumed) CHECK(expected_.at(id).was_paused);
    }

    void set_drafts() {
        if (config_.max_draft_tokens == 0) return;
        for (const auto &[id, sequence] : world_->scheduler.generating()) {
            if (maybe()) continue;
            const auto known = world_->scheduler.tokens(id, sequence);
            std::vector<TokenId> tokens(known.begin(), known.end()), drafts;
            for (std::int64_t count = some(1, config_.max_draft_tokens); count > 0; --count) {
                tokens.push_back(next_token(tokens, sequence));
                if (some(0, 3) == 0) tokens.back() += 1;
                drafts.push_back(tokens.back());
            }
            world_->scheduler.set_drafts(id, sequence, drafts);
            drafts_[{id, sequence}] = drafts;
        }
    }

    std::span<const TokenId> planned_drafts(const PlannedRow &row) {
        if (row.num_draft_tokens == 0) return {};
        return std::span<const TokenId>(drafts_.at({row.request, row.sequence})).first(row.num_draft_tokens);
    }

    void answer(const PlannedRow &row) {
        const auto found = expected_.find(row.request);
        if (found == expected_.end()) {  // cancelled while the step ran: ignored
            world_->scheduler.complete_row(row, row.num_tokens, world_->now_ms);
            world_->scheduler.append(row.request, row.sequence, std::vector<TokenId>{1});
            return;
        }
        if (!row.reaches_end) return world_->answer(row, row.num_tokens);
        Expected &expected = found->second;
        if (!expected.is_started) return start(row, expected);
        if (expected.request.is_beam_search) return world_->answer(row, row.num_tokens);
        advance(row, expected);
    }

    void start(const PlannedRow &row, Expected &expected) {
        CHECK(row.is_context);
        world_->answer(row, row.num_tokens);
        expected.is_started = true;
        std::int32_t count = expected.request.num_sequences;
        if (expected.request.is_beam_search) count = static_cast<std::int32_t>(some(1, count));
        const auto known = world_->scheduler.tokens(row.request);
        std::vector<TokenId> tokens;
        for (std::int32_t i = 0; i < count; ++i) tokens.push_back(next_token(known, i));
        expected.finished.assign(static_cast<std::size_t>(count), false);
        if (expected.request.num_sequences == 1) {
            world_->scheduler.append(row.request, 0, tokens);
        } else {
            world_->scheduler.start_sequences(row.request, tokens);
            met_.samples += !expected.request.is_beam_search;
        }
        world_->check();
        for (std::int32_t i = 0; i < count; ++i) end_if_long(row.request, i);
    }

    void advance(const PlannedRow &row, const Expected &expected) {
        const auto known = world_->scheduler.tokens(row.request, row.sequence);
        std::vector<TokenId> tokens(known.begin(), known.end());
        const std::size_t num_known = tokens.size();
        for (const TokenId draft : planned_drafts(row)) {
            if (draft != next_token(tokens, row.sequence)) break;
            tokens.push_back(draft);
        }
        const auto num_accepted = static_cast<std::int32_t>(tokens.size() - num_known);
        tokens.push_back(next_token(tokens, row.sequence));
        CHECK(static_cast<std::int32_t>(tokens.size()) <= expected.max_length);
        met_.accepted_drafts += num_accepted;
        met_.refused_drafts += row.num_draft_tokens - num_accepted;
        const auto num_own = row.num_tokens - row.num_draft_tokens;
        world_->answer(row, num_own + num_accepted);
        world_->scheduler.append(row.request, row.sequence, std::span(tokens).subspan(num_known));
        world_->check();
        end_if_long(row.request, row.sequence);
    }

    void end_if_long(RequestId id, std::int32_t sequence) {
        const auto found = expected_.find(id);
        if (found == expected_.end()) return;
        const Expected &expected = found->second;
        const auto size = static_cast<std::int32_t>(world_->scheduler.tokens(id, sequence).size());
        const auto output = size - static_cast<std::int32_t>(expected.request.prompt.size());
        const bool ends_early = expected.early_end > 0 && output >= expected.early_end + sequence;
        if (size < expected.max_length && (!ends_early || expected.request.is_beam_search)) return;
        if (expected.request.is_beam_search) return remove(id);
        finish(id, sequence);
    }

    void finish(RequestId id, std::int32_t sequence) {
        Expected &expected = expected_.at(id);
        check_tokens(expected, sequence);
        world_->scheduler.finish_sequence(id, sequence, world_->now_ms);
        world_->check();
        expected.finished[sequence] = true;
        if (std::find(expected.finished.begin(), expected.finished.end(), false) == expected.finished.end()) remove(id);
    }

    // A stop string ends a sequence between two steps, in whatever stage it is.
    void finish_any() {
        for (auto &[id, expected] : expected_) {
            if (expected.request.is_beam_search || expected.finished.empty()) continue;
            const auto sequence = static_cast<std::int32_t>(some(0, expected.request.num_sequences - 1));
            if (!expected.finished[sequence]) return finish(id, sequence);
        }
    }

    // The tokens are those that the model would have given this sequence alone.
    void check_tokens(const Expected &expected, std::int32_t sequence) {
        const auto tokens = world_->scheduler.tokens(expected.request.id, sequence);
        const auto prompt = expected.request.prompt.size();
        CHECK(std::equal(expected.request.prompt.begin(), expected.request.prompt.end(), tokens.begin()));
        for (std::size_t i = prompt; i < tokens.size(); ++i) {
            CHECK_EQ(tokens[i], next_token(tokens.first(i), sequence));
        }
    }

    void reorder_beams() {
        std::vector<RequestId> beams;
        for (const auto &[id, expected] : expected_) {
            if (expected.request.is_beam_search && expected.is_started) beams.push_back(id);
        }
        for (const RequestId id : beams) {
            const std::int32_t alive = world_->scheduler.num_sequences(id);
            if (!just_computed(id)) continue;
            std::vector<std::int32_t> parents;
            std::vector<TokenId> tokens;
            for (std::int64_t count = some(1, expected_.at(id).request.num_sequences); count > 0; --count) {
                parents.push_back(static_cast<std::int32_t>(some(0, alive - 1)));
                tokens.push_back(static_cast<TokenId>(some(0, 2)));
            }
            std::vector<std::vector<TokenId>> wanted;
            for (std::size_t i = 0; i < parents.size(); ++i) {
                const auto parent = world_->scheduler.tokens(id, parents[i]);
                wanted.emplace_back(parent.begin(), parent.end()).push_back(tokens[i]);
            }
            ++met_.reorders;
            world_->scheduler.reorder(id, parents, tokens, world_->now_ms);
            world_->check();
            for (std::size_t i = 0; i < wanted.size(); ++i) {
                const auto now = world_->scheduler.tokens(id, static_cast<std::int32_t>(i));
                CHECK(std::equal(now.begin(), now.end(), wanted[i].begin(), wanted[i].end()));
            }
            end_if_long(id, 0);
        }
    }

    // Beams advance together: in the step after the start each has a row.
    bool just_computed(RequestId id) {
        Expected &expected = expected_.at(id);
        if (!expected.finished.empty()) {  // started in this very step
            expected.finished.clear();
            return false;
        }
        return true;
    }

    Random random_;
    Met &met_;
    SchedulerConfig config_;
    CacheShape shape_;
    KvCacheOptions options_;
    std::unique_ptr<SchedulerWorld> world_;
    std::map<RequestId, Expected> expected_;
    std::map<std::pair<RequestId, std::int32_t>, std::vector<TokenId>> drafts_;
    RequestId last_id_ = 0;
    std::int64_t num_tokens_ = 0;
};

TEST_CASE("whatever happens, every request ends with its own tokens and the books balance") {
    const int runs = scaled(1000);
    Met met;
    for (int seed = 0; seed < runs; ++seed) {
        RandomRun run(static_cast<std::uint64_t>(seed), met);
        try {
            run.run();
        } catch (const std::exception &error) {
            throw Failure("run " + std::to_string(seed) + " (" + run.describe() + "): " + error.what());
        }
    }
    CHECK(met.pauses > runs / 20 && met.resumptions > runs / 20);
    CHECK(met.accepted_drafts > runs && met.refused_drafts > runs / 2);
    CHECK(met.reorders > runs && met.samples > runs / 10 && met.cancellations > runs / 10);
    CHECK(met.reused_starts > runs / 10 && met.cut_prompts > runs && met.refusals > runs / 10);
}

}  // namespace

int main(int count, char **arguments) { return testing::run(count, arguments); }
