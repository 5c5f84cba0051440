// Statistics as JSON with the reference field names.
#include "json_writer.h"
#include "trtllm/executor.h"

namespace trtllm::executor {

namespace {

void write_kv_cache(JsonWriter &json, const KvCacheStats &stats) {
    json.begin_object();
    json.field("maxNumBlocks", stats.max_num_blocks).field("freeNumBlocks", stats.free_num_blocks);
    json.field("usedNumBlocks", stats.used_num_blocks).field("tokensPerBlock", stats.tokens_per_block);
    json.field("allocTotalBlocks", stats.alloc_total_blocks).field("allocNewBlocks", stats.alloc_new_blocks);
    json.field("reusedBlocks", stats.reused_blocks).field("missedBlocks", stats.missed_blocks);
    json.field("cacheHitRate", stats.cache_hit_rate).field("reusedTokens", stats.reused_tokens);
    json.field("promptTokens", stats.prompt_tokens).field("evictedBlocks", stats.evicted_blocks);
    json.field("offloadedBlocks", stats.offloaded_blocks).field("onboardedBlocks", stats.onboarded_blocks);
    json.field("hostMaxBlocks", stats.host_max_blocks).field("hostUsedBlocks", stats.host_used_blocks);
    json.field("usedBytes", stats.used_bytes);
    json.end_object();
}

}  // namespace

std::string IterationStats::to_json() const {
    JsonWriter json;
    json.begin_object();
    json.field("timestamp", timestamp_ms).field("iter", iter).field("iterLatencyMS", iter_latency_ms);
    json.field("sessionLatencyMS", session_latency_ms);
    json.field("newActiveRequestsQueueLatencyMS", new_active_requests_queue_latency_ms);
    json.field("numNewActiveRequests", num_new_active_requests).field("numActiveRequests", num_active_requests);
    json.field("numQueuedRequests", num_queued_requests).field("numCompletedRequests", num_completed_requests);
    json.field("maxNumActiveRequests", max_num_active_requests);
    // The static limits are the tuned ones too: nothing tunes them while the executor runs.
    for (const char *kind : {"Static", "TunerRecommended", "Runtime"}) {
        json.field("maxBatchSize" + std::string(kind), max_batch_size_static);
        json.field("maxNumTokens" + std::string(kind), max_num_tokens_static);
    }
    json.field("gpuMemUsage", 0).field("cpuMemUsage", cpu_mem_usage).field("pinnedMemUsage", 0);
    write_kv_cache(json.key("kvCacheStats"), kv_cache);
    json.key("inflightBatchingStats").begin_object();
    json.field("numScheduledRequests", num_scheduled_requests).field("numContextRequests", num_context_requests);
    json.field("numGenRequests", num_gen_requests).field("numPausedRequests", num_paused_requests);
    json.field("numCtxTokens", num_ctx_tokens).field("numGenTokens", num_gen_tokens).field("microBatchId", 0);
    json.field("avgNumDecodedTokensPerIter", avg_num_decoded_tokens_per_iter);
    json.end_object();
    json.key("specDecodingStats").begin_object();
    json.field("numDraftTokens", spec_decoding.num_draft_tokens);
    json.field("numAcceptedTokens", spec_decoding.num_accepted_tokens);
    json.field("numRequestsWithDraftTokens", spec_decoding.num_requests_with_draft_tokens);
    json.field("acceptanceLength", spec_decoding.acceptance_length);
    json.field("iterLatencyMS", spec_decoding.iter_latency_ms);
    json.field("draftOverhead", spec_decoding.draft_overhead);
    json.end_object();
    return json.end_object().take();
}

std::string RequestStatsPerIteration::to_json() const {
    JsonWriter json;
    json.begin_object().field("iter", iter).key("requestStats").begin_array();
    for (const auto &request : request_stats) {
        json.begin_object().field("id", request.id).field("stage", request.stage);
        json.field("contextPrefillPosition", request.context_prefill_position);
        json.field("numGeneratedTokens", request.num_generated_tokens);
        json.field("avgNumDecodedTokensPerIter", request.avg_num_decoded_tokens_per_iter);
        json.field("scheduled", request.scheduled).field("paused", request.paused);
        json.field("allocTotalBlocksPerRequest", request.cache.alloc_total_blocks);
        json.field("allocNewBlocksPerRequest", request.cache.alloc_new_blocks);
        json.field("reusedBlocksPerRequest", request.cache.reused_blocks);
        json.field("missedBlocksPerRequest", request.cache.missed_blocks);
        const auto seen = request.cache.reused_blocks + request.cache.missed_blocks;
        json.field("kvCacheHitRatePerRequest", seen == 0 ? 0.0 : double(request.cache.reused_blocks) / seen);
        json.end_object();
    }
    return json.end_array().end_object().take();
}

}  // namespace trtllm::executor
