// The loops of tiles.h, a word of four integers at a time. Bytes lie in memory as on a little-endian machine.
#include "checkpoints/native/tiles.h"

#include <cstring>

namespace trtllm {
namespace {

constexpr std::size_t width = 16, length = 32;

std::uint32_t word_at(const std::uint8_t *bytes) {
    std::uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

// The four nibbles of the low 16 bits as four bytes, the lowest first.
std::uint32_t spread(std::uint32_t nibbles) {
    const std::uint32_t bytes = (nibbles | nibbles << 8) & 0x00ff00ff;
    return (bytes | bytes << 4) & 0x0f0f0f0f;
}

// One block of one row: four unsigned integers (with their zero point) of one output make a word of its column.
template <int Bits>
void place_block(const std::uint8_t *block, std::size_t column, std::uint8_t *tile) {
    std::uint8_t *words = tile + 4 * column;
    if constexpr (Bits == 8) {
        for (std::size_t j = 0; j < 8; ++j) {
            const std::uint32_t word = word_at(block + 4 * j) ^ 0x80808080;
            std::memcpy(words + 4 * width * j, &word, sizeof word);
        }
    } else {
        // Elements 4j .. 4j + 3 lie in the low nibbles, elements 16 + 4j .. in the high ones.
        for (std::size_t half = 0; half < 2; ++half) {
            const std::uint32_t low = word_at(block + 4 * half) ^ 0x88888888;
            const std::uint32_t high = word_at(block + 8 + 4 * half) ^ 0x88888888;
            for (std::size_t part = 0; part < 2; ++part) {
                const std::uint32_t word = spread(low >> 16 * part & 0xffff) | spread(high >> 16 * part & 0xffff) << 4;
                std::memcpy(words + 4 * width * (2 * half + part), &word, sizeof word);
            }
        }
    }
}

template <int Bits>
void tile_rows(const std::uint8_t *values, std::size_t rows, std::size_t blocks, std::uint8_t *tiles,
               std::size_t first, std::size_t last) {
    constexpr std::size_t block_bytes = length * Bits / 8, tile_bytes = width * block_bytes;
    constexpr std::uint8_t zeros[length] = {};
    for (std::size_t tile = first; tile < last; ++tile) {
        for (std::size_t column = 0; column < width; ++column) {
            const std::size_t row = tile * width + column;
            for (std::size_t block = 0; block < blocks; ++block) {
                const std::uint8_t *source = row < rows ? values + (row * blocks + block) * block_bytes : zeros;
                place_block<Bits>(source, column, tiles + (tile * blocks + block) * tile_bytes);
            }
        }
    }
}

}  // namespace

void tile_values(const std::uint8_t *values, std::size_t rows, std::size_t blocks, int bits, std::uint8_t *tiles,
                 std::size_t first, std::size_t last) {
    if (bits == 8) tile_rows<8>(values, rows, blocks, tiles, first, last);
    else tile_rows<4>(values, rows, blocks, tiles, first, last);
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
