// Rearranges quantized weights into tiles of sixteen outputs, the layout of runtime/native/quantized_linear.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm {

// Rows first .. last - 1 of tiles. `values` holds `rows` rows of K = 32 * blocks integers: 8 bits two's complement, or
// 4 bits with the even element in the low nibble. Rows past the last are filled with zeros.
void tile_values(const std::uint8_t *values, std::size_t rows, std::size_t blocks, int bits, std::uint8_t *tiles,
                 std::size_t first, std::size_t last);

// Scales of two bytes [rows, blocks] as [tiles, blocks, 16].
void tile_scales(const std::uint16_t *scales, std::size_t rows, std::size_t blocks, std::uint16_t *tiles,
                 std::size_t first, std::size_t last);

}  // namespace trtllm
