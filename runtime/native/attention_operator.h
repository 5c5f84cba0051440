// trtllm.cpu::CachedAttention: rotates new queries and keys, appends keys and values to the cache, attends.
//
// Inputs: qkv float [B, S, (Q + 2G) * D], past_key and past_value float [B, G, T, D], past_lengths and lengths int64
// [B], and optionally cos and sin float [positions, R/2], query_norm and key_norm float [D]. Outputs: y float
// [B, S, Q * D], present_key and present_value, which are past_key and past_value extended in place when both are bound
// to the same memory. Attributes: num_heads, num_kv_heads, head_size, rotary_size, window, scale, softcap, norm_epsilon.
#pragma once

#include <cstring>
#include <thread>
#include <vector>

#include "runtime/native/attention.h"
#include "runtime/native/kernel_call.h"

namespace trtllm {

class AttentionKernel {
public:
    static constexpr const char *name = "CachedAttention";
    static constexpr ort::ElementType inputs[] = {ort::float32, ort::float32, ort::float32, ort::int64,  ort::int64,
                                                  ort::float32, ort::float32, ort::float32, ort::float32};
    static constexpr ort::ElementType outputs[] = {ort::float32, ort::float32, ort::float32};
    static constexpr std::size_t required_inputs = 5;

    explicit AttentionKernel(const KernelAttributes &attributes) {
        shape_.num_heads = attributes.integer("num_heads");
        shape_.num_kv_heads = attributes.integer("num_kv_heads");
        shape_.head_size = attributes.integer("head_size");
        shape_.rotary_size = attributes.integer("rotary_size");
        shape_.window = attributes.integer("window");
        shape_.scale = attributes.number("scale");
        shape_.softcap = attributes.number("softcap");
        norm_epsilon_ = attributes.number("norm_epsilon");
    }

    void operator()(const KernelCall &call) const {
        const auto tokens = call.shape(0), cache = call.shape(1);
        AttentionShape shape = shape_;
        shape.batch = tokens[0];
        shape.sequence = tokens[1];
        shape.capacity = cache[2];
        float *y = call.output<float>(0, {shape.batch, shape.sequence, shape.num_heads * shape.head_size});
        const AttentionArrays arrays{call.input<float>(0),
                                     present(call, 1, cache),
                                     present(call, 2, cache),
                                     call.input<std::int64_t>(3),
                                     call.input<std::int64_t>(4),
                                     call.optional_input<float>(5),
                                     call.optional_input<float>(6),
                                     call.optional_input<float>(7),
                                     call.optional_input<float>(8),
                                     norm_epsilon_,
                                     y};
        if (shape.batch * shape.sequence > 0) run(call, shape, arrays);
    }

private:
    // The output's memory; it is the input's own when the caller bound them so.
    static float *present(const KernelCall &call, std::size_t index, const std::vector<std::int64_t> &shape) {
        const float *past = call.input<float>(index);
        float *result = call.output<float>(index, shape);
        if (past != result) {
            std::size_t elements = 1;
            for (const auto extent : shape) elements *= static_cast<std::size_t>(extent);
            std::memcpy(result, past, elements * sizeof(float));
        }
        return result;
    }

    static void run(const KernelCall &call, const AttentionShape &shape, const AttentionArrays &arrays) {
        static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        const AttentionPlan plan = plan_attention(shape, threads);
        if (plan.append_first) {
            auto append = [&](std::size_t task) { attention_append(plan, shape, arrays, static_cast<std::int64_t>(task)); };
            call.parallel_for(static_cast<std::size_t>(plan.tasks), append);
        }
        auto attend = [&](std::size_t task) {
            thread_local std::vector<float> scratch;
            if (scratch.size() < plan.scratch_floats) scratch.resize(plan.scratch_floats);
            attention_task(plan, shape, arrays, static_cast<std::int64_t>(task), scratch.data());
        };
        call.parallel_for(static_cast<std::size_t>(plan.tasks), attend);
    }

    AttentionShape shape_{};
    float norm_epsilon_ = 0;
};

}  // namespace trtllm
