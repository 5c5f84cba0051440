// Beam search in the scheduler: caches follow the beams that live on.
#include <stdexcept>
#include <utility>

#include "scheduler_books.h"
#include "scheduler.h"

namespace trtllm::executor {
namespace {

void check_beams(const ScheduledRequest &request, std::span<const std::int32_t> parents,
                 std::span<const TokenId> tokens) {
    if (parents.empty() || parents.size() != tokens.size() ||
        parents.size() > static_cast<std::size_t>(request.max_sequences)) {
        throw std::logic_error("reorder() of no beams, of too many, or with another number of tokens");
    }
    for (const std::int32_t parent : parents) {
        const bool known = parent >= 0 && parent < static_cast<std::int32_t>(request.sequences.size());
        if (!known) throw std::logic_error("reorder() names a beam that does not exist");
        const ScheduledSequence &beam = request.sequences[parent];
        if (!beam.waits_for_tokens() || beam.in_step || beam.size() >= request.max_length) {
            throw std::logic_error("reorder() goes on from a beam that does not wait for a token");
        }
    }
}

// A parent's last child takes its cache and its tokens over; those before fork.
std::vector<ScheduledSequence> descend(RequestBooks &books, std::vector<ScheduledSequence> &beams,
                                       std::span<const std::int32_t> parents, std::vector<std::int32_t> &num_children,
                                       std::int64_t now_ms) {
    std::vector<ScheduledSequence> children(parents.size());
    for (std::size_t i = 0; i < parents.size(); ++i) {
        ScheduledSequence &parent = beams[parents[i]];
        if (--num_children[parents[i]] == 0) {
            children[i] = std::move(parent);
            continue;
        }
        children[i].tokens = parent.tokens;
        if (!books.fork(parent, children[i], parent.num_computed, now_ms)) {
            throw std::logic_error("the cache has no room for a beam, to which it was promised");
        }
        children[i].catch_up_end = parent.num_computed;
    }
    return children;
}

}  // namespace

void Scheduler::reorder(RequestId id, std::span<const std::int32_t> parents, std::span<const TokenId> tokens,
                        std::int64_t now_ms) {
    ScheduledRequest *request = books_->find(id);
    if (request == nullptr || request->place == RequestPlace::ended) return;
    check_beams(*request, parents, tokens);
    std::vector<ScheduledSequence> &beams = request->sequences;
    std::vector<std::int32_t> num_children(beams.size(), 0);
    for (const std::int32_t parent : parents) ++num_children[parent];
    for (std::size_t i = 0; i < beams.size(); ++i) {
        if (num_children[i] == 0) books_->close(beams[i], now_ms);
    }
    beams = descend(*books_, beams, parents, num_children, now_ms);
    for (std::size_t i = 0; i < beams.size(); ++i) beams[i].tokens.push_back(tokens[i]);
}

}  // namespace trtllm::executor
