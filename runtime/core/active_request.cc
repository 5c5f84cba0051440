// Decoding of one request: which tokens its logits give, when its sequences end, and what is said of them.
#include "active_request.h"

#include <algorithm>

namespace trtllm::executor {

namespace {

std::size_t mask_words(std::int32_t vocab_size) { return (static_cast<std::size_t>(vocab_size) + 31) / 32; }

}  // namespace

ActiveRequest::ActiveRequest(RequestId id, Request request, std::int32_t vocab_size, std::int32_t max_seq_len,
                             double now_ms)
    : queued_since_ms(now_ms), id_(id), request_(std::move(request)), vocab_size_(vocab_size) {
    const auto room = max_seq_len - static_cast<std::int32_t>(request_.input_token_ids.size());
    max_generated_ = std::min(request_.max_tokens, room);
    metrics.arrival = now_ms;
    if (request_.return_context_logits) {
        context_logits_ = std::make_shared<LogitsMatrix>();
        context_logits_->columns = vocab_size;
    }
}

std::int32_t ActiveRequest::num_sequences() const {
    if (!is_beam_search()) return request_.num_return_sequences;
    const auto &sampling = request_.decoding->sampling;
    std::int32_t widest = sampling.beam_width;
    for (const auto width : sampling.beam_width_array) widest = std::max(widest, width);
    return widest;
}

bool ActiveRequest::takes_drafts() const {
    return request_.allow_drafts && !is_beam_search() && !request_.apply_batched_logits_processor;
}

std::int32_t ActiveRequest::num_generated() const {
    if (beams_) return beams_->num_beams() == 0 ? 0 : static_cast<std::int32_t>(beams_->tokens(0).size());
    std::int32_t most = 0;
    for (const auto &sequence : sequences_) most = std::max(most, sequence.num_generated);
    return most;
}

void ActiveRequest::take_prompt_rows(const float *logits, std::int32_t first, std::int32_t count,
                                     DecodeScratch &scratch) {
    const auto &prompt = request_.input_token_ids;
    const auto prompt_length = static_cast<std::int32_t>(prompt.size());
    for (std::int32_t row = std::max(num_prompt_rows_, first); row < std::min(first + count, prompt_length); ++row) {
        const float *values = logits + static_cast<std::ptrdiff_t>(row - first) * vocab_size_;
        if (context_logits_) {
            context_logits_->values.insert(context_logits_->values.end(), values, values + vocab_size_);
            ++context_logits_->rows;
        }
        if (request_.num_prompt_logprobs >= 0 && row + 1 < prompt_length) {
            const auto next = prompt[static_cast<std::size_t>(row) + 1];
            auto choice = token_logprobs(values, vocab_size_, next, request_.num_prompt_logprobs, scratch);
            prompt_logprobs_.push_back(*choice.logprob);
            top_prompt_logprobs_.push_back(std::move(choice.top));
        }
        num_prompt_rows_ = row + 1;
    }
}

void ActiveRequest::forget_prompt_rows() {
    num_prompt_rows_ = 0;
    metrics.num_computed_prompt_tokens = 0;
    prompt_logprobs_.clear();
    top_prompt_logprobs_.clear();
    if (!context_logits_) return;
    context_logits_->rows = 0;
    context_logits_->values.clear();
}

void ActiveRequest::start() {
    if (is_beam_search()) {
        beams_.emplace(request_.decoding, request_.input_token_ids, max_generated_, vocab_size_);
        if (request_.constraint) beam_constraints_.push_back(request_.constraint->clone());
        return;
    }
    sequences_.resize(static_cast<std::size_t>(request_.num_return_sequences));
    for (std::size_t index = 0; index < sequences_.size(); ++index) {
        auto &sequence = sequences_[index];
        sequence.decoder.emplace(request_.decoding, request_.input_token_ids, static_cast<std::int32_t>(index),
                                 vocab_size_);
        if (request_.constraint) sequence.constraint = request_.constraint->clone();
        sequence.pending.request_id = id_;
        sequence.pending.sequence_index = static_cast<std::int32_t>(index);
    }
}

void ActiveRequest::run_processor(std::int32_t sequence, std::span<const TokenId> generated, float *logits) {
    if (!request_.logits_processor) return;
    processor_tokens_.assign(request_.input_token_ids.begin(), request_.input_token_ids.end());
    processor_tokens_.insert(processor_tokens_.end(), generated.begin(), generated.end());
    request_.logits_processor(id_, sequence, processor_tokens_, logits, vocab_size_);
}

bool ActiveRequest::wants_whole_rows(std::int32_t sequence, std::int32_t num_drafts,
                                     std::int32_t num_candidates) const {
    if (is_beam_search() || wants_prompt_rows() || request_.return_generation_logits) return true;
    if (request_.logits_processor || request_.apply_batched_logits_processor || request_.constraint) return true;
    const auto &params = *request_.decoding;
    const auto &sampling = params.sampling;
    if (params.num_logprobs >= num_candidates) return true;
    const bool cuts_to_k = sampling.top_k > 0 && sampling.top_k <= num_candidates;
    if (!sampling.is_greedy() && !cuts_to_k && sampling.top_p >= 1.0f && sampling.min_p == 0.0f) return true;
    if (has_started() && num_drafts == 0)
        return sequences_[static_cast<std::size_t>(sequence)].decoder->adjuster().changes_logits();
    const bool has_ends = !params.end_ids.empty() || !params.stop_words.empty();
    return (!has_started() && num_sequences() > 1) || !params.logit_bias.empty() || !params.embedding_bias.empty() ||
           !params.bad_words.empty() || sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f ||
           sampling.frequency_penalty != 0.0f || sampling.no_repeat_ngram_size > 0 ||
           (has_ends && sampling.min_tokens > 0);
}

Choice ActiveRequest::choose(ActiveSequence &sequence, std::int32_t index, const LogitsRows &rows, std::int64_t row,
                             DecodeScratch &scratch) {
    if (!request_.logits_processor && !sequence.constraint && !request_.return_generation_logits) {
        if (const auto known = rows.candidates(row))
            if (auto choice = sequence.decoder->next(*known, scratch)) return *std::move(choice);
    }
    float *logits = rows.whole(row);
    keep_logits(sequence.pending, logits);
    run_processor(index, sequence.decoder->adjuster().generated(), logits);
    const std::uint32_t *allowed = nullptr;
    if (sequence.constraint) {
        mask_.assign(mask_words(vocab_size_), 0);
        if (sequence.constraint->fill(mask_.data())) allowed = mask_.data();
    }
    return sequence.decoder->next(logits, scratch, allowed);
}

void ActiveRequest::keep_logits(Response &response, const float *logits) {
    if (!request_.return_generation_logits) return;
    if (!response.generation_logits) {
        response.generation_logits = std::make_shared<LogitsMatrix>();
        response.generation_logits->columns = vocab_size_;
    }
    auto &matrix = *response.generation_logits;
    matrix.values.insert(matrix.values.end(), logits, logits + vocab_size_);
    ++matrix.rows;
}

ActiveRequest::Progress ActiveRequest::advance(std::int32_t index, const LogitsRows &logits, std::int32_t num_rows,
                                               DecodeScratch &scratch) {
    auto &sequence = sequences_[static_cast<std::size_t>(index)];
    Progress progress;
    const auto num_drafts = static_cast<std::size_t>(num_rows - 1);
    for (std::size_t row = 0; row <= num_drafts; ++row) {
        const Choice choice = choose(sequence, index, logits, static_cast<std::int64_t>(row), scratch);
        emit(sequence, choice);
        progress.tokens.push_back(choice.token);
        if (sequence.is_finished || row == num_drafts || choice.token != sequence.drafts[row]) break;
        ++progress.num_accepted;
    }
    sequence.drafts.clear();
    progress.is_finished = sequence.is_finished;
    return progress;
}

void ActiveRequest::emit(ActiveSequence &sequence, const Choice &choice) {
    auto &pending = sequence.pending;
    sequence.decoder->accept(choice.token);
    if (choice.logprob) sequence.cumulative_logprob += choice.logprob->logprob;
    pending.cumulative_logprob = sequence.cumulative_logprob;
    if (sequence.decoder->adjuster().is_end(choice.token)) {
        if (pending.generation_logits) {  // rows belong to tokens, and an end token is none
            --pending.generation_logits->rows;
            pending.generation_logits->values.resize(pending.generation_logits->values.size() -
                                                     static_cast<std::size_t>(vocab_size_));
        }
        pending.finish_reason = FinishReason::end_id;
        pending.stop_token = choice.token;
        sequence.is_finished = true;
        return;
    }
    if (sequence.constraint) sequence.constraint->accept(choice.token);
    pending.token_ids.push_back(choice.token);
    if (choice.logprob) {
        pending.logprobs.push_back(*choice.logprob);
        pending.top_logprobs.push_back(choice.top);
    }
    ++sequence.num_generated;
    if (const auto length = sequence.decoder->adjuster().matched_stop_word(); length > 0) {
        pending.finish_reason = FinishReason::stop_words;
        pending.stop_word_length = static_cast<std::int32_t>(length);
        sequence.is_finished = true;
    } else if (sequence.num_generated >= max_generated_) {
        pending.finish_reason = FinishReason::length;
        sequence.is_finished = true;
    }
}

ActiveRequest::BeamProgress ActiveRequest::advance_beams(std::span<float *const> rows, DecodeScratch &scratch) {
    const auto num_beams = static_cast<std::size_t>(beams_->num_beams());
    std::vector<const std::uint32_t *> allowed;
    mask_.assign(mask_words(vocab_size_) * num_beams, 0);
    for (std::size_t beam = 0; beam < num_beams; ++beam) {
        run_processor(static_cast<std::int32_t>(beam), beams_->tokens(static_cast<std::int32_t>(beam)), rows[beam]);
        if (beam_constraints_.empty()) continue;
        auto *mask = mask_.data() + beam * mask_words(vocab_size_);
        allowed.push_back(beam_constraints_[beam]->fill(mask) ? mask : nullptr);
    }
    BeamProgress progress;
    progress.parents = beams_->step(rows.first(num_beams), scratch, allowed);
    progress.is_finished = beams_->is_finished();
    if (progress.is_finished) {
        beam_finish_ = FinishReason::end_id;
        return progress;
    }
    std::vector<std::unique_ptr<TokenConstraint>> constraints;
    for (std::size_t beam = 0; beam < progress.parents.size(); ++beam) {
        progress.tokens.push_back(beams_->last_token(static_cast<std::int32_t>(beam)));
        if (beam_constraints_.empty()) continue;
        constraints.push_back(beam_constraints_[static_cast<std::size_t>(progress.parents[beam])]->clone());
        constraints.back()->accept(progress.tokens.back());
    }
    beam_constraints_ = std::move(constraints);
    return progress;
}

void ActiveRequest::finish_sequence(std::int32_t index, FinishReason reason) {
    if (static_cast<std::size_t>(index) >= sequences_.size()) return;
    auto &sequence = sequences_[static_cast<std::size_t>(index)];
    if (sequence.is_finished) return;
    sequence.is_finished = true;
    sequence.pending.finish_reason = reason;
}

void ActiveRequest::finish_all(FinishReason reason) {
    if (!has_started()) start();
    if (beams_) {
        if (!beams_->is_finished()) beams_->stop();
        beam_finish_ = reason;
    }
    for (std::size_t index = 0; index < sequences_.size(); ++index)
        finish_sequence(static_cast<std::int32_t>(index), reason);
}

void ActiveRequest::add_prompt_outputs(Response &response) {
    if (told_prompt_) return;
    told_prompt_ = true;
    response.prompt_logprobs = std::move(prompt_logprobs_);
    response.top_prompt_logprobs = std::move(top_prompt_logprobs_);
    response.context_logits = std::move(context_logits_);
}

void ActiveRequest::collect(std::vector<Response> &responses) {
    if (is_finished_) return;
    if (beams_) return collect_beams(responses);
    const bool all_finished =
        std::all_of(sequences_.begin(), sequences_.end(), [](const auto &sequence) { return sequence.is_finished; });
    for (std::size_t index = 0; index < sequences_.size(); ++index) {
        auto &sequence = sequences_[index];
        auto &pending = sequence.pending;
        if (pending.is_sequence_final) continue;  // told
        if (!sequence.is_finished && (!request_.streaming || pending.token_ids.empty())) continue;
        if (index == 0) add_prompt_outputs(pending);
        Response response = std::move(pending);
        pending = Response{};
        response.is_sequence_final = sequence.is_finished;
        if (!sequence.is_finished) {
            std::swap(pending.generation_logits, response.generation_logits);  // they come whole, at the end
            pending.request_id = id_;
            pending.sequence_index = response.sequence_index;
            pending.cumulative_logprob = sequence.cumulative_logprob;
        }
        pending.is_sequence_final = sequence.is_finished;
        responses.push_back(std::move(response));
    }
    if (!all_finished || sequences_.empty()) return;
    is_finished_ = true;
    responses.back().is_final = true;
    responses.back().perf_metrics = metrics;
}

void ActiveRequest::collect_beams(std::vector<Response> &responses) {
    if (beam_finish_ == FinishReason::not_finished) return;
    auto results = beams_->results();
    const auto wanted = static_cast<std::size_t>(std::max(request_.num_return_sequences, 1));
    results.resize(std::min(results.size(), wanted));
    for (std::size_t index = 0; index < results.size(); ++index) {
        Response response;
        response.request_id = id_;
        response.sequence_index = static_cast<std::int32_t>(index);
        response.token_ids = std::move(results[index].tokens);
        response.cumulative_logprob = results[index].cumulative_logprob;
        if (request_.decoding->num_logprobs >= 0)
            for (std::size_t place = 0; place < response.token_ids.size(); ++place)
                response.logprobs.push_back({response.token_ids[place], results[index].logprobs[place], 0});
        const bool ended = results[index].end_token >= 0;
        if (ended) response.stop_token = results[index].end_token;
        response.finish_reason = beam_finish_ != FinishReason::end_id ? beam_finish_
                                 : ended                              ? FinishReason::end_id
                                                                      : FinishReason::length;
        if (index == 0) add_prompt_outputs(response);
        response.is_sequence_final = true;
        responses.push_back(std::move(response));
    }
    if (results.empty()) {  // stopped before the first token
        Response response;
        response.request_id = id_;
        response.finish_reason = beam_finish_;
        response.is_sequence_final = true;
        add_prompt_outputs(response);
        responses.push_back(std::move(response));
    }
    is_finished_ = true;
    responses.back().is_final = true;
    responses.back().perf_metrics = metrics;
}

}  // namespace trtllm::executor
