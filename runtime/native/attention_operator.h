// The attention kernels as operators of domain `trtllm.cpu`: they rotate new queries and keys, append keys and values to
// the cache, and attend.
//
// Both share attributes num_heads, num_kv_heads, head_size, rotary_size, window, scale, softcap and norm_epsilon, the
// optional inputs cos and sin float [positions, R/2], query_norm and key_norm float [D], and outputs y, present_key and
// present_value: the past ones extended in place, when both are bound to the same memory.
//
// CachedAttention: qkv float [B, S, (Q + 2G) * D], past_key and past_value float [B, G, T, D], past_lengths and lengths
//   int64 [B]: row b has lengths[b] new tokens and padding after them, for which y is zero.
// PagedAttention: qkv float [1, tokens, (Q + 2G) * D], past_key and past_value float [blocks, G, T, D], row_starts int64
//   [rows + 1]: where the rows begin in the tokens, past_lengths int64 [rows], block_table int32 [rows, columns].
// PagedAttentionInt8 and PagedAttentionFloat8: the same over past_key and past_value uint8 [blocks, G, T, row bytes] in the
//   formats of attention.h; the second takes cache_scales float [2] (keys, values) after key_norm, 1 where it is absent.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/native/attention.h"
#include "runtime/native/kernel_call.h"

namespace trtllm {

// What the two operators have in common.
class AttentionBase {
public:
    static constexpr ort::ElementType outputs[] = {ort::float32, ort::float32, ort::float32};

    explicit AttentionBase(const KernelAttributes &attributes) {
        shape_.num_heads = attributes.integer("num_heads");
        shape_.num_kv_heads = attributes.integer("num_kv_heads");
        shape_.head_size = attributes.integer("head_size");
        shape_.rotary_size = attributes.integer("rotary_size");
        shape_.window = attributes.integer("window");
        shape_.scale = attributes.number("scale");
        shape_.softcap = attributes.number("softcap");
        norm_epsilon_ = attributes.number("norm_epsilon");
    }

protected:
    // Memory that a thread keeps from call to call.
    struct Workspace {
        AttentionPlan plan;
        std::vector<AttentionRow> rows;
        std::vector<std::int32_t> table;
        std::vector<float> partials;
    };

    static Workspace &workspace() {
        thread_local Workspace kept;
        return kept;
    }

    // The arrays of a call whose optional inputs begin at `optional`; the caller sets the block table and the output.
    AttentionArrays arrays_of(const KernelCall &call, std::size_t optional,
                              const std::vector<std::int64_t> &cache) const {
        return {call.input<float>(0),
                present(call, 1, cache),
                present(call, 2, cache),
                nullptr,
                call.optional_input<float>(optional),
                call.optional_input<float>(optional + 1),
                call.optional_input<float>(optional + 2),
                call.optional_input<float>(optional + 3),
                norm_epsilon_,
                nullptr,
                1.0f,
                1.0f};
    }

    static void run(const KernelCall &call, const AttentionShape &shape, const AttentionArrays &arrays,
                    Workspace &work) {
        static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        AttentionPlan &plan = work.plan;
        plan_attention(shape, work.rows, threads, plan);
        if (work.partials.size() < plan.partial_floats) work.partials.resize(plan.partial_floats);
        float *partials = work.partials.data();
        if (plan.append_first) {
            auto append = [&](std::size_t task) { attention_append(plan, shape, arrays, static_cast<std::int64_t>(task)); };
            call.parallel_for(plan.tasks.size(), append);
        }
        auto attend = [&](std::size_t task) {
            thread_local std::vector<float> scratch;
            if (scratch.size() < plan.scratch_floats) scratch.resize(plan.scratch_floats);
            attention_task(plan, shape, arrays, static_cast<std::int64_t>(task), scratch.data(), partials);
        };
        if (!plan.tasks.empty()) call.parallel_for(plan.tasks.size(), attend);
        attention_merge(plan, shape, arrays, partials);
    }

    AttentionShape shape_{};
    float norm_epsilon_ = 0;

private:
    // The output's memory; it is the input's own when the caller bound them so.
    void *present(const KernelCall &call, std::size_t index, const std::vector<std::int64_t> &shape) const {
        const void *past = call.input<void>(index);
        void *result = call.output<void>(index, shape);
        if (past != result) {
            auto bytes = static_cast<std::size_t>(cache_row_bytes(shape_));
            for (std::size_t axis = 0; axis < 3; ++axis) bytes *= static_cast<std::size_t>(shape[axis]);
            std::memcpy(result, past, bytes);
        }
        return result;
    }
};

class CachedAttentionKernel : AttentionBase {
public:
    static constexpr const char *name = "CachedAttention";
    static constexpr ort::ElementType inputs[] = {ort::float32, ort::float32, ort::float32, ort::int64,  ort::int64,
                                                  ort::float32, ort::float32, ort::float32, ort::float32};
    static constexpr std::size_t required_inputs = 5;
    using AttentionBase::AttentionBase;
    using AttentionBase::outputs;

    void operator()(const KernelCall &call) const {
        const auto tokens = call.shape(0), cache = call.shape(1);
        const std::int64_t batch = tokens[0], sequence = tokens[1], width = shape_.num_heads * shape_.head_size;
        AttentionShape shape = shape_;
        shape.tokens_per_block = cache[2];
        shape.max_blocks = 1;
        AttentionArrays arrays = arrays_of(call, 5, cache);
        arrays.output = call.output<float>(0, {batch, sequence, width});
        const std::int64_t *past = call.input<std::int64_t>(3), *lengths = call.input<std::int64_t>(4);
        Workspace &work = workspace();
        work.rows.clear();
        work.table.clear();
        for (std::int64_t row = 0; row < batch; ++row) {
            const std::int64_t count = std::clamp<std::int64_t>(lengths[row], 0, sequence);
            work.rows.push_back({row * sequence, count, past[row]});
            work.table.push_back(static_cast<std::int32_t>(row));
            std::fill_n(arrays.output + (row * sequence + count) * width, (sequence - count) * width, 0.0f);
        }
        arrays.block_table = work.table.data();
        run(call, shape, arrays, work);
    }
};

// The operator over a cache of one format.
template <CacheFormat Format>
class PagedAttentionKernel : AttentionBase {
    static constexpr ort::ElementType element = Format == CacheFormat::float32 ? ort::float32 : ort::uint8;
    static constexpr std::size_t cache_scales = 10;

public:
    static constexpr const char *name = Format == CacheFormat::int8     ? "PagedAttentionInt8"
                                        : Format == CacheFormat::float8 ? "PagedAttentionFloat8"
                                                                        : "PagedAttention";
    static constexpr ort::ElementType inputs[] = {ort::float32, element,      element,      ort::int64,
                                                  ort::int64,   ort::int32,   ort::float32, ort::float32,
                                                  ort::float32, ort::float32, ort::float32};
    static constexpr ort::ElementType outputs[] = {ort::float32, element, element};
    static constexpr std::size_t required_inputs = 6;

    explicit PagedAttentionKernel(const KernelAttributes &attributes) : AttentionBase(attributes) {
        shape_.cache = Format;
    }

    void operator()(const KernelCall &call) const {
        const auto tokens = call.shape(0), cache = call.shape(1), table = call.shape(5);
        AttentionShape shape = shape_;
        shape.tokens_per_block = cache[2];
        shape.max_blocks = table[1];
        AttentionArrays arrays = arrays_of(call, 6, cache);
        arrays.block_table = call.input<std::int32_t>(5);
        if (const float *scales = call.optional_input<float>(cache_scales)) {
            arrays.key_scale = scales[0];
            arrays.value_scale = scales[1];
        }
        arrays.output = call.output<float>(0, {1, tokens[1], shape.num_heads * shape.head_size});
        Workspace &work = workspace();
        const std::int64_t *starts = call.input<std::int64_t>(3), *past = call.input<std::int64_t>(4);
        work.rows.clear();
        for (std::int64_t row = 0; row < table[0]; ++row)
            work.rows.push_back({starts[row], starts[row + 1] - starts[row], past[row]});
        check(work.rows, shape, tokens[1], cache[0], arrays.block_table);
        run(call, shape, arrays, work);
    }

private:
    // A wrong row would write into another sequence's cache, or beyond all of them.
    static void check(const std::vector<AttentionRow> &rows, const AttentionShape &shape, std::int64_t tokens,
                      std::int64_t blocks, const std::int32_t *table) {
        std::int64_t next = 0;
        for (std::size_t index = 0; index < rows.size(); ++index, table += shape.max_blocks) {
            const AttentionRow &row = rows[index];
            const std::int64_t used = (row.past + row.count + shape.tokens_per_block - 1) / shape.tokens_per_block;
            bool fits = row.start == next && row.count >= 0 && row.past >= 0 && used <= shape.max_blocks;
            for (std::int64_t block = 0; fits && block < used; ++block) fits = table[block] >= 0 && table[block] < blocks;
            if (!fits)
                throw std::out_of_range("row " + std::to_string(index) + " of PagedAttention, of " +
                                        std::to_string(row.past) + " + " + std::to_string(row.count) +
                                        " tokens, does not fit its blocks");
            next += row.count;
        }
        if (next != tokens) throw std::out_of_range("the rows of PagedAttention are not all of its tokens");
    }
};

}  // namespace trtllm
