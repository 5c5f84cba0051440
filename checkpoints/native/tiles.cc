// The loops of tiles.h.
#include "checkpoints/native/tiles.h"

#include <algorithm>
#include <cstring>

namespace trtllm {
namespace {

constexpr std::size_t width = 16, length = 32;

// One block of one row, as 32 unsigned bytes: the integer plus its zero point.
void unsigned_block(const std::uint8_t *row, std::size_t block, int bits, std::uint8_t *out) {
    if (bits == 8) {
        for (std::size_t k = 0; k < length; ++k) out[k] = row[block * length + k] ^ 0x80;
        return;
    }
    for (std::size_t k = 0; k < length; k += 2) {
        const std::uint8_t pair = row[(block * length + k) / 2] ^ 0x88;
        out[k] = pair & 15;
        out[k + 1] = pair >> 4;
    }
}

void place_block(const std::uint8_t *block, std::size_t column, int bits, std::uint8_t *tile) {
    if (bits == 8) {
        for (std::size_t j = 0; j < 8; ++j) std::memcpy(tile + (j * width + column) * 4, block + 4 * j, 4);
        return;
    }
    for (std::size_t j = 0; j < 4; ++j)
        for (std::size_t i = 0; i < 4; ++i)
            tile[(j * width + column) * 4 + i] =
                static_cast<std::uint8_t>(block[4 * j + i] | (block[16 + 4 * j + i] << 4));
}

}  // namespace

void tile_values(const std::uint8_t *values, std::size_t rows, std::size_t blocks, int bits, std::uint8_t *tiles,
                 std::size_t first, std::size_t last) {
    const std::size_t row_bytes = blocks * length * bits / 8, block_bytes = width * length * bits / 8;
    for (std::size_t tile = first; tile < last; ++tile) {
        for (std::size_t column = 0; column < width; ++column) {
            const std::size_t row = tile * width + column;
            for (std::size_t block = 0; block < blocks; ++block) {
                std::uint8_t unpacked[length];
                if (row < rows) unsigned_block(values + row * row_bytes, block, bits, unpacked);
                else std::fill_n(unpacked, length, bits == 8 ? 0x80 : 8);
                place_block(unpacked, column, bits, tiles + (tile * blocks + block) * block_bytes);
            }
        }
    }
}

void tile_scales(const std::uint16_t *scales, std::size_t rows, std::size_t blocks, std::uint16_t *tiles,
                 std::size_t first, std::size_t last) {
    for (std::size_t tile = first; tile < last; ++tile)
        for (std::size_t column = 0; column < width; ++column) {
            const std::size_t row = tile * width + column;
            for (std::size_t block = 0; block < blocks; ++block)
                tiles[(tile * blocks + block) * width + column] = row < rows ? scales[row * blocks + block] : 0;
        }
}

}  // namespace trtllm
