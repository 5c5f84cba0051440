// Steps of the draft engine: first what it has not read yet, then one guess after the other, all sequences together.
#include "draft_session_proposer.h"

#include <algorithm>

namespace trtllm::executor {

namespace {

KvCacheOptions private_cache() {
    KvCacheOptions options;
    options.enable_block_reuse = false;
    return options;
}

}  // namespace

DraftSessionProposer::DraftSessionProposer(std::shared_ptr<Session> session)
    : session_(std::move(session)), info_(session_->info()), cache_(info_.cache, private_cache()), builder_(info_) {}

void DraftSessionProposer::forget(SequenceId sequence) {
    if (cached_.erase(sequence) > 0) cache_.remove_sequence(sequence, 0, false);
}

bool DraftSessionProposer::make_room(SequenceId id, std::int32_t num_tokens, std::span<const Query> all) {
    const auto is_needed = [&](SequenceId other) {
        return std::any_of(all.begin(), all.end(), [other](const Query &query) { return query.sequence == other; });
    };
    while (!cache_.reserve(id, num_tokens, 0)) {
        const auto idle = std::find_if(cached_.begin(), cached_.end(),
                                       [&](const auto &entry) { return !is_needed(entry.first); });
        if (idle == cached_.end()) return false;
        forget(SequenceId(idle->first));
    }
    return true;
}

bool DraftSessionProposer::open(const Query &query, std::span<const Query> all, Work &work) {
    const auto room = info_.max_seq_len - static_cast<std::int32_t>(query.tokens.size());
    const auto wanted = std::min(query.max_drafts, room);
    if (wanted <= 0) return false;
    if (!cached_.contains(query.sequence)) {
        SequenceOptions options;
        options.max_reuse_tokens = 0;
        cache_.add_sequence(query.sequence, query.tokens, options, 0);
        cached_[query.sequence];
    }
    auto &cached = cached_[query.sequence];
    const auto most = std::min(cached.size(), query.tokens.size() - 1);
    const auto differ = std::mismatch(cached.begin(), cached.begin() + static_cast<std::ptrdiff_t>(most),
                                      query.tokens.begin());
    const auto common = static_cast<std::size_t>(differ.first - cached.begin());
    if (common < cached.size()) {
        cache_.truncate(query.sequence, static_cast<std::int32_t>(common));
        cached.resize(common);
    }
    if (!make_room(query.sequence, static_cast<std::int32_t>(query.tokens.size()) + wanted - 1, all)) return false;
    work = {query.sequence, {query.tokens.begin(), query.tokens.end()}, query.tokens.size(),
            static_cast<std::size_t>(wanted), common};
    return true;
}

std::vector<std::vector<TokenId>> DraftSessionProposer::propose(std::span<const Query> queries) {
    std::vector<Work> works(queries.size());
    std::vector<Work *> active;
    for (std::size_t index = 0; index < queries.size(); ++index)
        if (open(queries[index], queries, works[index])) active.push_back(&works[index]);
    while (!active.empty()) {
        const auto rows = static_cast<std::size_t>(std::max(info_.max_batch_size, 1));
        for (std::size_t first = 0; first < active.size(); first += rows)
            run(std::span(active).subspan(first, std::min(rows, active.size() - first)));
        std::erase_if(active, [](const Work *work) { return work->tokens.size() >= work->num_given + work->num_wanted; });
    }
    std::vector<std::vector<TokenId>> guesses(queries.size());
    for (std::size_t index = 0; index < queries.size(); ++index)
        guesses[index].assign(works[index].tokens.begin() + static_cast<std::ptrdiff_t>(works[index].num_given),
                              works[index].tokens.end());
    return guesses;
}

// One step: each sequence computes what its cache lacks, within the budget of tokens; who reaches the end guesses one.
void DraftSessionProposer::run(std::span<Work *> works) {
    StepPlan plan;
    std::vector<Work *> planned;
    auto budget = static_cast<std::size_t>(std::max(info_.max_num_tokens, 1));
    for (auto *work : works) {
        const auto count = std::min(work->tokens.size() - work->num_cached, budget);
        if (count == 0) continue;
        budget -= count;
        PlannedRow row;
        row.cache_id = work->sequence;
        row.past_length = static_cast<std::int32_t>(work->num_cached);
        row.num_tokens = static_cast<std::int32_t>(count);
        row.reaches_end = work->num_cached + count == work->tokens.size();
        plan.rows.push_back(row);
        planned.push_back(work);
    }
    std::size_t next = 0;
    const auto lookup = [&](const PlannedRow &) { return StepBuilder::RowContent{planned[next++]->tokens, {}, false}; };
    const float *logits = session_->step(builder_.build(plan, cache_, cache_.take_copies(), lookup));
    for (std::size_t index = 0; index < planned.size(); ++index) {
        auto &work = *planned[index];
        const auto begin = work.tokens.begin() + static_cast<std::ptrdiff_t>(work.num_cached);
        const std::vector<TokenId> computed(begin, begin + plan.rows[index].num_tokens);
        cache_.commit(work.sequence, computed, 0);
        auto &cached = cached_[work.sequence];
        cached.insert(cached.end(), computed.begin(), computed.end());
        work.num_cached += computed.size();
        if (!plan.rows[index].reaches_end) continue;
        const auto guess = argmax(logits + builder_.first_logits()[index] * info_.vocab_size, info_.vocab_size);
        if (guess < 0) work.num_wanted = work.tokens.size() - work.num_given;  // no guess from broken logits
        else work.tokens.push_back(guess);
    }
}

}  // namespace trtllm::executor
