// Grouped-query attention over a key-value cache, in float32 on the CPU: appends the new keys and values, then attends.
// Knows nothing of onnxruntime: the caller owns the arrays and the threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm {

struct AttentionShape {
  int64_t batch;
  int64_t sequence;      // S: new tokens of each row, padding included
  int64_t num_heads;     // Q: a multiple of num_kv_heads
  int64_t num_kv_heads;  // G
  int64_t head_size;     // D
  int64_t capacity;      // T: rows of one slot of the cache
  int64_t rotary_size;   // R: leading elements of a head that rotate, even; 0 = none
  float scale;           // of the scores
  int64_t window;        // newest keys a token sees, itself included; 0 = all
  float softcap;         // c * tanh(score / c); 0 = none
};

struct AttentionArrays {
  const float* qkv;             // [B, S, (Q + 2G) * D]: queries, keys, values of the new tokens
  float* key_cache;             // [B, G, T, D], extended in place
  float* value_cache;           // [B, G, T, D], extended in place
  const int64_t* past_lengths;  // [B]: rows already in the cache
  const int64_t* lengths;       // [B]: valid new tokens; past + length <= T. The rest is padding: its output is zero
  const float* cos;             // [positions, R / 2] by absolute position; may be null when rotary_size is 0
  const float* sin;
  const float* query_norm;      // [D]: RMSNorm weights of each head, applied before the rotation, or null
  const float* key_norm;
  float norm_epsilon;
  float* output;                // [B, S, Q * D]
};

// How one call is split. The fields are for the caller to read; only plan_attention fills them.
struct AttentionPlan {
  int64_t tasks;          // of each phase; the tasks of a phase run in any order and at the same time
  bool append_first;      // every attention_append must end before the first attention_task begins
  size_t scratch_floats;  // one thread's scratch, reused from task to task
  int64_t chunk;          // new tokens of one task
  int64_t lanes;          // floats of one vector: 16 (AVX-512), 8 (AVX2 and FMA), 4 (portable), 1 (odd head sizes)
};

// `most_lanes` bounds the vectors, for the tests.
AttentionPlan plan_attention(const AttentionShape& shape, int threads, int64_t most_lanes = 16);

// Phase 1, only when plan.append_first: normalises, rotates and stores one task's new keys, and its values.
void attention_append(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays,
                      int64_t task);

// Phase 2, always: one task's rows of the output. Appends by itself unless plan.append_first.
void attention_task(const AttentionPlan& plan, const AttentionShape& shape, const AttentionArrays& arrays, int64_t task,
                    float* scratch);

}  // namespace trtllm
