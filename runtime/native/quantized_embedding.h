// Rows of a weight stored in the tiles of quantized_linear.h, as float: what a vocabulary's head keeps in 8 bits serves
// the look-up of its tokens too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/native/quantized_linear.h"
#include "runtime/native/small_floats.h"

namespace trtllm {

// Writes the `weight.inputs` elements of output `row`. Plain code: the row's part of a tile is strided, and a token is
// looked up once for all the layers that follow. Products of integers by float16 scales are exact in float, so the
// result is rounded once at most, where a minimum is added.
inline void look_up_row(const TiledWeight &weight, std::int64_t row, float *result) {
    const std::int64_t column = row % tile_width, zero = weight.zero();
    const std::int64_t groups = weight.bits == 8 ? block_length / 4 : block_length / 8;  // of 4 bytes each
    for (std::int64_t block = 0; block < weight.blocks(); ++block, result += block_length) {
        const std::int64_t place = row / tile_width * weight.blocks() + block;
        const std::uint8_t *bytes = weight.values + place * weight.block_bytes() + 4 * column;
        const float scale = half_value(weight.scales[place * tile_width + column]);
        const float offset = weight.offsets ? half_value(weight.offsets[place * tile_width + column]) : 0.0f;
        const float shift = static_cast<float>(zero) + (weight.offset == Offset::zero_point ? offset : 0.0f);
        const float minimum = weight.offset == Offset::minimum ? offset : 0.0f;
        const auto element = [&](int stored) { return scale * (static_cast<float>(stored) - shift) + minimum; };
        for (std::int64_t j = 0; j < groups; ++j)
            for (std::int64_t i = 0; i < 4; ++i) {
                const int byte = bytes[4 * tile_width * j + i];
                if (weight.bits == 8) {
                    result[4 * j + i] = element(byte);
                } else {
                    result[4 * j + i] = element(byte & 15);
                    result[block_length / 2 + 4 * j + i] = element(byte >> 4);
                }
            }
    }
}

}  // namespace trtllm
