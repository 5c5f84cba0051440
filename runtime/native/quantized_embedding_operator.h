// trtllm.cpu::QuantizedEmbedding: rows of a tiled weight by their numbers.
//
// Inputs: ids int64 [...], values uint8 [N/16, K/32, bytes], scales float16 [N/16, K/32, 16], offsets float16 of the same
// shape (optional): the values, scales and offsets of a QuantizedLinear, which may be the same initializers. Output:
// float [..., K]. Attributes: N, K, bits (4 or 8), and with offsets what they are, offset (1 minima, 2 zero points). An
// id that is not below N is an error.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runtime/native/kernel_call.h"
#include "runtime/native/quantized_embedding.h"

namespace trtllm {

class QuantizedEmbeddingKernel {
public:
    static constexpr const char *name = "QuantizedEmbedding";
    static constexpr ort::ElementType inputs[] = {ort::int64, ort::uint8, ort::float16, ort::float16};
    static constexpr ort::ElementType outputs[] = {ort::float32};
    static constexpr std::size_t required_inputs = 3;

    explicit QuantizedEmbeddingKernel(const KernelAttributes &attributes)
        : rows_(attributes.integer("N")),
          width_(attributes.integer("K")),
          bits_(static_cast<int>(attributes.integer("bits"))),
          offset_(static_cast<Offset>(attributes.integer_or("offset", 0))) {}

    void operator()(const KernelCall &call) const {
        auto shape = call.shape(0);
        std::int64_t count = 1;
        for (const std::int64_t extent : shape) count *= extent;
        shape.push_back(width_);
        const std::int64_t *ids = call.input<std::int64_t>(0);
        float *y = call.output<float>(0, shape);
        if (count == 0) return;
        require_rows(ids, count);
        const TiledWeight weight{call.input<std::uint8_t>(1), call.input<std::uint16_t>(2), nullptr, rows_, width_, bits_,
                                 offset_ == Offset::none ? nullptr : call.input<std::uint16_t>(3), offset_};
        const std::int64_t ids_per_task = std::max<std::int64_t>(1, (1 << 15) / width_);
        auto task = [&](std::size_t index) {
            const std::int64_t first = static_cast<std::int64_t>(index) * ids_per_task;
            for (std::int64_t at = first; at < std::min(count, first + ids_per_task); ++at)
                look_up_row(weight, ids[at], y + at * width_);
        };
        call.parallel_for((count + ids_per_task - 1) / ids_per_task, task);
    }

private:
    void require_rows(const std::int64_t *ids, std::int64_t count) const {
        for (std::int64_t at = 0; at < count; ++at)
            if (ids[at] < 0 || ids[at] >= rows_)
                throw std::out_of_range("token " + std::to_string(ids[at]) + " is not in a table of " +
                                        std::to_string(rows_) + " rows");
    }

    std::int64_t rows_, width_;
    int bits_;
    Offset offset_;
};

}  // namespace trtllm
