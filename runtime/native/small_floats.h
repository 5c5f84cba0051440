// Conversions between float and the small formats that weights, activations and caches are stored in: float16, e4m3,
// e2m1 and the exponent-only e8m0. Straight-line code, so that loops over them become vectors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace trtllm {

inline constexpr float kLargestE4M3 = 448.0f;
inline constexpr float kLargestE2M1 = 6.0f;

inline float half_value(std::uint16_t bits) {
    const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    const float normal = std::bit_cast<float>((magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u));
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude < 0x400 ? small : normal) | sign);
}

// The nearest float16 of a value that is not negative and not above the largest one; halves go to even.
inline std::uint16_t half_bits(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
    const std::uint32_t small = std::bit_cast<std::uint32_t>(value + 0.5f) - 0x3f000000u;  // steps of 2^-24
    return static_cast<std::uint16_t>(value < 0x1p-14f ? small : std::min(normal, 0x7bffu));
}

// The nearest e4m3 value as a float; halves go to even, what is too large becomes +-448.
inline float nearest_e4m3(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) & 0xfff00000u;
    const float whole = std::bit_cast<float>(magnitude);
    const float small = (whole + 0x1p14f) - 0x1p14f;  // steps of 2^-9
    const float result = whole < 0x1p-6f ? small : std::min(std::bit_cast<float>(rounded), kLargestE4M3);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(result) | (bits & 0x80000000u));
}

// The byte of a float that is an e4m3 value.
inline std::uint8_t e4m3_bits(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t small = static_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 512.0f);
    const std::uint32_t normal = (magnitude >> 20) - (120u << 3);
    return static_cast<std::uint8_t>((std::bit_cast<float>(magnitude) < 0x1p-6f ? small : normal) | bits >> 31 << 7);
}

inline float e4m3_value(std::uint8_t byte) {
    const std::uint32_t magnitude = byte & 0x7f;
    const float normal = std::bit_cast<float>((magnitude << 20) + (120u << 23));
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f;
    const float result = magnitude < 8 ? small : normal;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(result) | std::uint32_t(byte & 0x80) << 24);
}

// The nearest e2m1 value (0, 0.5, 1, 1.5, 2, 3, 4, 6); halves go to even, what is too large becomes +-6.
inline float nearest_e2m1(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t rounded = (magnitude + 0x1fffffu + ((magnitude >> 22) & 1)) & 0xffc00000u;
    const float whole = std::bit_cast<float>(magnitude);
    const float small = (whole + 0x1.8p22f) - 0x1.8p22f;  // steps of 0.5
    const float result = whole < 1.0f ? small : std::min(std::bit_cast<float>(rounded), kLargestE2M1);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(result) | (bits & 0x80000000u));
}

inline constexpr float kE2M1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// 2^(byte - 127), which is no normal float where the byte is 0.
inline float e8m0_value(std::uint8_t byte) {
    return std::bit_cast<float>(std::max(std::uint32_t(byte) << 23, 0x00400000u));
}

}  // namespace trtllm
