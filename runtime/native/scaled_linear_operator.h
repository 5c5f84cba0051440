// trtllm.cpu::ScaledLinear: y = round(gate(x)) times the transpose of a weight in a small format, plus a bias.
//
// Inputs: x float [..., K] ([..., 2K] with a gate), values uint8 and scales uint8 in the layout of scaled_linear.h (float
// scales as their bytes), factor float [1] of all scales, activation_scale float [1], bias float [N]; the last three are
// optional. Attributes: N, K, block, element, scale_type, rounding (the enumerations of scaled_linear.h) and gate.
#pragma once

#include <algorithm>
#include <vector>

#include "runtime/native/kernel_call.h"
#include "runtime/native/scaled_linear.h"

namespace trtllm {

class ScaledLinearKernel {
public:
    static constexpr const char *name = "ScaledLinear";
    static constexpr ort::ElementType inputs[] = {ort::float32, ort::uint8,   ort::uint8,
                                                  ort::float32, ort::float32, ort::float32};
    static constexpr ort::ElementType outputs[] = {ort::float32};
    static constexpr std::size_t required_inputs = 3;

    explicit ScaledLinearKernel(const KernelAttributes &attributes)
        : outputs_(attributes.integer("N")),
          inputs_(attributes.integer("K")),
          block_(attributes.integer("block")),
          element_(static_cast<Element>(attributes.integer("element"))),
          scale_type_(static_cast<ScaleType>(attributes.integer("scale_type"))),
          rounding_(static_cast<Rounding>(attributes.integer("rounding"))),
          gate_(static_cast<Gate>(attributes.integer("gate"))) {}

    void operator()(const KernelCall &call) const {
        auto shape = call.shape(0);
        std::int64_t rows = 1;
        for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
        shape.back() = outputs_;
        float *y = call.output<float>(0, shape);
        if (rows == 0) return;
        const float *factor = call.optional_input<float>(3);
        const ScaledWeight weight{call.input<std::uint8_t>(1),      call.input<std::uint8_t>(2),
                                  call.optional_input<float>(5),    factor ? *factor : 1.0f, outputs_, inputs_, block_,
                                  element_,                         scale_type_};
        const float *scale = call.optional_input<float>(4);
        multiply(call, weight, round_rows(call, call.input<float>(0), rows, scale ? *scale : 1.0f), y);
    }

private:
    struct Rows {
        const float *values;
        const std::int8_t *integers;
        const float *scales;
        std::int64_t count;
    };

    // Buffers belong to the calling thread: sessions may run on several threads at once.
    Rows round_rows(const KernelCall &call, const float *x, std::int64_t rows, float scale) const {
        if (gate_ == Gate::none && rounding_ == Rounding::none) return {x, nullptr, nullptr, rows};
        thread_local std::vector<float> kept_values, kept_scales;
        thread_local std::vector<std::int8_t> kept_integers;
        const auto count = static_cast<std::size_t>(rows * inputs_);
        kept_values.resize(std::max(kept_values.size(), count));
        kept_scales.resize(std::max(kept_scales.size(), static_cast<std::size_t>(rows)));
        if (element_ == Element::int8) kept_integers.resize(std::max(kept_integers.size(), count));
        float *values = kept_values.data(), *scales = kept_scales.data();
        std::int8_t *integers = kept_integers.data();
        const std::int64_t width = gate_ == Gate::none ? inputs_ : 2 * inputs_;
        const std::int64_t rows_per_task = std::max<std::int64_t>(1, (1 << 14) / width);
        auto task = [&](std::size_t index) {
            const std::int64_t first = static_cast<std::int64_t>(index) * rows_per_task;
            for (std::int64_t row = first; row < std::min(rows, first + rows_per_task); ++row)
                scales[row] = round_activations(x + row * width, inputs_, gate_, element_, rounding_, scale,
                                                values + row * inputs_, integers ? integers + row * inputs_ : nullptr);
        };
        call.parallel_for(static_cast<std::size_t>((rows + rows_per_task - 1) / rows_per_task), task);
        return {values, integers, scales, rows};
    }

    // A task is some 256 K multiplications or more, so that handing it out costs little beside doing it.
    static void multiply(const KernelCall &call, const ScaledWeight &weight, const Rows &rows, float *y) {
        const std::int64_t work = tile_width * weight.inputs * rows.count;
        const std::int64_t tiles_per_task =
            std::clamp<std::int64_t>((1 << 18) / work, 1, std::max<std::int64_t>(1, weight.tiles() / 2));
        auto task = [&](std::size_t index) {
            const std::int64_t first = static_cast<std::int64_t>(index) * tiles_per_task;
            const std::int64_t last = std::min(weight.tiles(), first + tiles_per_task);
            if (weight.element == Element::int8)
                multiply_integers(weight, rows.integers, rows.scales, rows.count, first, last, y);
            else
                multiply_floats(weight, rows.values, rows.count, first, last, y);
        };
        call.parallel_for(static_cast<std::size_t>((weight.tiles() + tiles_per_task - 1) / tiles_per_task), task);
    }

    std::int64_t outputs_, inputs_, block_;
    Element element_;
    ScaleType scale_type_;
    Rounding rounding_;
    Gate gate_;
};

}  // namespace trtllm
