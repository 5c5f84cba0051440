// How the activations of scaled_linear.h are gated and rounded, in loops that the compiler makes vectors of.
#include <algorithm>
#include <cmath>

#include "runtime/native/scaled_linear.h"
#include "runtime/native/small_floats.h"

#if defined(__x86_64__)
#define WIDE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define HALF_TARGET __attribute__((target("avx2,fma")))
#endif
#define INLINE inline __attribute__((always_inline))

namespace trtllm {
namespace {

constexpr std::int64_t kTokenBlock = 128;  // inputs of one e4m3 scale
constexpr std::int64_t kSmallBlock = 16;   // inputs of one e2m1 scale

// e^x to about one unit in the last place, in straight-line code.
INLINE float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * (r * r) + (r + 1.0f);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(sum) + (std::bit_cast<std::uint32_t>(shifted) << 23));
}

INLINE void apply_gate(const float *__restrict x, std::int64_t inputs, Gate gate, float *__restrict values) {
    switch (gate) {
        case Gate::silu:
            for (std::int64_t k = 0; k < inputs; ++k) values[k] = x[k] / (1.0f + exponential(-x[k])) * x[inputs + k];
            break;
        case Gate::gelu_tanh:
            for (std::int64_t k = 0; k < inputs; ++k)
                values[k] = 0.5f * x[k] * (1.0f + std::tanh(0.7978845608f * (x[k] + 0.044715f * x[k] * x[k] * x[k]))) *
                            x[inputs + k];
            break;
        case Gate::gelu:
            for (std::int64_t k = 0; k < inputs; ++k)
                values[k] = 0.5f * x[k] * (1.0f + std::erf(x[k] * 0.70710678f)) * x[inputs + k];
            break;
        default: std::copy_n(x, inputs, values);
    }
}

INLINE float largest(const float *values, std::int64_t count) {
    std::uint32_t most = 0;  // magnitudes of floats are ordered as their bits are
    for (std::int64_t k = 0; k < count; ++k) most = std::max(most, std::bit_cast<std::uint32_t>(values[k]) & 0x7fffffffu);
    return std::bit_cast<float>(most);
}

INLINE void round_e4m3(float *values, std::int64_t count, float scale) {
    if (!(scale > 0)) return;
    for (std::int64_t k = 0; k < count; ++k) values[k] = nearest_e4m3(values[k] / scale) * scale;
}

INLINE void round_e2m1(float *values, std::int64_t inputs, float factor) {
    for (std::int64_t k = 0; k < inputs; k += kSmallBlock) {
        const std::int64_t count = std::min(kSmallBlock, inputs - k);
        const float scale = nearest_e4m3(largest(values + k, count) / kLargestE2M1 / factor) * factor;
        for (std::int64_t i = k; i < k + count; ++i) values[i] = scale > 0 ? nearest_e2m1(values[i] / scale) * scale : 0.0f;
    }
}

INLINE float round_int8(const float *values, std::int64_t inputs, float scale, std::int8_t *__restrict integers) {
    if (!(scale > 0)) return std::fill_n(integers, inputs, std::int8_t{0}), 0.0f;
    for (std::int64_t k = 0; k < inputs; ++k) {
        const float value = std::min(std::max(values[k] / scale, -128.0f), 127.0f);
        integers[k] = static_cast<std::int8_t>(static_cast<std::int32_t>((value + 12582912.0f) - 12582912.0f));
    }
    return scale;
}

INLINE float round_all(const float *x, std::int64_t inputs, Gate gate, Element element, Rounding rounding, float scale,
                       float *values, std::int8_t *integers) {
    apply_gate(x, inputs, gate, values);
    if (rounding == Rounding::none) return 1.0f;
    if (element == Element::int8) {
        if (rounding == Rounding::token) scale = largest(values, inputs) / 127.0f;
        return round_int8(values, inputs, scale, integers);
    }
    if (element == Element::e2m1) return round_e2m1(values, inputs, scale), 1.0f;
    const std::int64_t block = rounding == Rounding::block ? kTokenBlock : inputs;
    for (std::int64_t k = 0; k < inputs; k += block) {
        const std::int64_t count = std::min(block, inputs - k);
        const bool given = rounding == Rounding::tensor;
        round_e4m3(values + k, count, given ? scale : largest(values + k, count) / kLargestE4M3);
    }
    return 1.0f;
}

#if defined(__x86_64__)
WIDE_TARGET float round_wide(const float *x, std::int64_t inputs, Gate gate, Element element, Rounding rounding,
                             float scale, float *values, std::int8_t *integers) {
    return round_all(x, inputs, gate, element, rounding, scale, values, integers);
}

HALF_TARGET float round_half(const float *x, std::int64_t inputs, Gate gate, Element element, Rounding rounding,
                             float scale, float *values, std::int8_t *integers) {
    return round_all(x, inputs, gate, element, rounding, scale, values, integers);
}
#endif

}  // namespace

float round_activations(const float *x, std::int64_t inputs, Gate gate, Element element, Rounding rounding, float scale,
                        float *values, std::int8_t *integers) {
#if defined(__x86_64__)
    switch (best_instruction_set()) {
        case InstructionSet::avx512_vnni: return round_wide(x, inputs, gate, element, rounding, scale, values, integers);
        case InstructionSet::avx2: return round_half(x, inputs, gate, element, rounding, scale, values, integers);
        default: break;
    }
#endif
    return round_all(x, inputs, gate, element, rounding, scale, values, integers);
}

}  // namespace trtllm
