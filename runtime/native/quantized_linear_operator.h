// trtllm.cpu::QuantizedLinear: y = gate(x) times the transpose of a tiled weight, plus a bias.
//
// Inputs: x float [..., K] ([..., 2K] with a gate), values uint8 [N/16, K/32, bytes], scales float16 [N/16, K/32, 16],
// bias float [N] (optional), offsets float16 [N/16, K/32, 16] (optional). Attributes: N, K, bits (4 or 8), gate (0 none,
// 1 silu, 2 gelu_tanh, 3 gelu), with offsets what they are, offset (1 minima, 2 zero points), and activation_bits, what
// activations are rounded to (8, or 16).
#pragma once

#include <algorithm>
#include <vector>

#include "runtime/native/kernel_call.h"
#include "runtime/native/quantized_linear.h"

namespace trtllm {

class QuantizedLinearKernel {
public:
    static constexpr const char *name = "QuantizedLinear";
    static constexpr ort::ElementType inputs[] = {ort::float32, ort::uint8, ort::float16, ort::float32, ort::float16};
    static constexpr ort::ElementType outputs[] = {ort::float32};
    static constexpr std::size_t required_inputs = 3;

    explicit QuantizedLinearKernel(const KernelAttributes &attributes)
        : outputs_(attributes.integer("N")),
          inputs_(attributes.integer("K")),
          bits_(static_cast<int>(attributes.integer("bits"))),
          gate_(static_cast<Gate>(attributes.integer("gate"))),
          offset_(static_cast<Offset>(attributes.integer_or("offset", 0))),
          planes_(attributes.integer_or("activation_bits", 8) == 16 ? 2 : 1) {}

    void operator()(const KernelCall &call) const {
        auto shape = call.shape(0);
        std::int64_t rows = 1;
        for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
        shape.back() = outputs_;
        const float *x = call.input<float>(0);
        float *y = call.output<float>(0, shape);
        if (rows == 0) return;
        const TiledWeight weight{call.input<std::uint8_t>(1), call.input<std::uint16_t>(2),
                                 call.optional_input<float>(3), outputs_, inputs_, bits_,
                                 offset_ == Offset::none ? nullptr : call.input<std::uint16_t>(4), offset_};
        const RoundedRows rounded = round_rows(call, weight, x, rows);
        multiply(call, weight, rounded, y);
    }

private:
    // Buffers belong to the calling thread: sessions may run on several threads at once.
    RoundedRows round_rows(const KernelCall &call, const TiledWeight &weight, const float *x, std::int64_t rows) const {
        thread_local std::vector<std::int8_t> values;
        thread_local std::vector<float> scales;
        thread_local std::vector<std::int32_t> corrections;
        thread_local std::vector<float> sums;
        const std::int64_t rounded_rows = rows * planes_, blocks = rounded_rows * weight.blocks();
        values.resize(std::max<std::size_t>(values.size(), rounded_rows * inputs_));
        scales.resize(std::max<std::size_t>(scales.size(), blocks));
        corrections.resize(std::max<std::size_t>(corrections.size(), blocks));
        if (weight.offsets) sums.resize(std::max<std::size_t>(sums.size(), blocks));
        const RoundedRows rounded{values.data(), scales.data(), corrections.data(), rounded_rows, sums.data(), planes_};
        const std::int64_t width = gate_ == Gate::none ? inputs_ : 2 * inputs_;
        const std::int64_t rows_per_task = std::max<std::int64_t>(1, (1 << 14) / width);
        auto task = [&](std::size_t index) {
            const std::int64_t first = static_cast<std::int64_t>(index) * rows_per_task;
            for (std::int64_t row = first; row < std::min(rows, first + rows_per_task); ++row)
                round_row(x + row * width, weight, gate_, rounded, row);
        };
        call.parallel_for((rows + rows_per_task - 1) / rows_per_task, task);
        return rounded;
    }

    // A task is some 256 K multiplications or more, so that handing it out costs little beside doing it.
    static void multiply(const KernelCall &call, const TiledWeight &weight, const RoundedRows &rounded, float *y) {
        const std::int64_t work = tile_width * weight.inputs * rounded.rows;
        const std::int64_t tiles_per_task =
            std::clamp<std::int64_t>((1 << 18) / work / 4 * 4, 4, std::max<std::int64_t>(4, weight.tiles() / 2));
        auto task = [&](std::size_t index) {
            const std::int64_t first = static_cast<std::int64_t>(index) * tiles_per_task;
            multiply_tiles(weight, rounded, first, std::min(weight.tiles(), first + tiles_per_task), y);
        };
        call.parallel_for((weight.tiles() + tiles_per_task - 1) / tiles_per_task, task);
    }

    std::int64_t outputs_, inputs_;
    int bits_;
    Gate gate_;
    Offset offset_;
    int planes_;
};

}  // namespace trtllm
