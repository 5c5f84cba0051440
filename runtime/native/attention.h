// Grouped-query attention over a key-value cache of blocks, in float32 on the CPU: appends the new keys and values, then
// attends. The cache holds floats, or 8 bits an element. Knows nothing of onnxruntime: the caller owns the arrays and
// the threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace trtllm {

// How the cache stores the D elements of a head's key or value.
enum class CacheFormat : int {
  float32,
  int8,    // D integers, then the float16 bits of their scale: what the largest element divided by 127 rounds to
  float8,  // D bytes of e4m3, times a scale that is the same for all keys, or all values
};

struct AttentionShape {
  int64_t num_heads;         // Q: a multiple of num_kv_heads
  int64_t num_kv_heads;      // G
  int64_t head_size;         // D
  int64_t tokens_per_block;  // T: a linear cache has one block a row
  int64_t max_blocks;        // columns of the block table
  int64_t rotary_size;       // R: leading elements of a head that rotate, even; 0 = none
  float scale;               // of the scores
  int64_t window;            // newest keys a token sees, itself included; 0 = all
  float softcap;             // c * tanh(score / c); 0 = none
  CacheFormat cache = CacheFormat::float32;
};

// One sequence's part of a call: `count` new tokens that lie at `start` of the packed tokens, after `past` cached ones.
struct AttentionRow {
  int64_t start;
  int64_t count;
  int64_t past;
};

struct AttentionArrays {
  const float* qkv;            // [tokens, (Q + 2G) * D]: queries, keys, values of the new tokens
  void* key_cache;             // [blocks, G, T, cache_row_bytes], extended in place
  void* value_cache;           // the same
  const int32_t* block_table;  // [rows, max_blocks]: token p of a row lies in block p / T of its line
  const float* cos;            // [positions, R / 2] by absolute position; may be null when rotary_size is 0
  const float* sin;
  const float* query_norm;     // [D]: RMSNorm weights of each head, applied before the rotation, or null
  const float* key_norm;
  float norm_epsilon;
  float* output;               // [tokens, Q * D]; tokens of no row are left alone
  float key_scale = 1;         // of a float8 cache
  float value_scale = 1;
};

// Bytes of one head's key or value of one token.
constexpr int64_t cache_row_bytes(const AttentionShape& shape) {
  switch (shape.cache) {
    case CacheFormat::int8: return shape.head_size + 2;
    case CacheFormat::float8: return shape.head_size;
    default: return shape.head_size * static_cast<int64_t>(sizeof(float));
  }
}

// A run of new tokens of one row, one key-value head, and the cached keys that are looked at.
struct AttentionTask {
  int64_t row, kv_head;
  int64_t start, past;          // of the row
  int64_t begin, end;           // new tokens of the row
  int64_t key_begin, key_end;   // absolute
  int64_t partial;              // where its unfinished result goes; -1: it is the only one of its tokens
};

// Tokens whose keys several tasks share out, and whose results are put together at the end.
struct AttentionMerge {
  int64_t kv_head;
  int64_t token, tokens;  // packed
  int64_t partial, parts;
};

// How one call is split. The fields are for the caller to read; only plan_attention fills them.
struct AttentionPlan {
  std::vector<AttentionTask> tasks;  // of each phase, the dearest first; they run in any order and at the same time
  std::vector<AttentionMerge> merges;
  bool append_first;                 // every attention_append must end before the first attention_task begins
  size_t scratch_floats;             // one thread's scratch, reused from task to task
  size_t partial_floats;             // memory that all tasks of the call share
  int64_t tile_rows;                 // most query rows of a task, rounded up
  int64_t lanes;                     // floats of one vector: 16 (AVX-512), 8 (AVX2, FMA), 4 (portable), 1 (odd head sizes)
};

// Plans a call over `rows` for so many threads; `plan` is filled anew and keeps its memory. `most_lanes` bounds the
// vectors, for the tests. The result does not depend on how the cache is cut into blocks.
void plan_attention(const AttentionShape& shape, const std::vector<AttentionRow>& rows, int threads,
                    AttentionPlan& plan, int64_t most_lanes = 16);

// Phase 1, only when plan.append_first: normalises, rotates and stores one task's new keys, and its values.
void attention_append(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                      int64_t task);

// Phase 2, always: one task's rows of the output. Appends by itself unless plan.append_first.
void attention_task(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays, int64_t task,
                    float* scratch, float* partials);

// Phase 3, by one thread, after every task: finishes the tokens of plan.merges.
void attention_merge(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                     const float* partials);

}  // namespace trtllm
