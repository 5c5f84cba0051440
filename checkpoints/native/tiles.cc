// The loops of tiles.h, four rows at a time. Bytes lie in memory as on a little-endian machine.
#include "checkpoints/native/tiles.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trtllm {
namespace {

constexpr std::size_t width = 16, length = 32;

#if defined(__SSE2__)

__m128i load(const std::uint8_t *bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)); }

// Four words of each of four columns, to where the columns' words lie side by side.
void place_words(const __m128i (&columns)[4], std::uint8_t *words) {
    const __m128i low0 = _mm_unpacklo_epi32(columns[0], columns[1]), low1 = _mm_unpacklo_epi32(columns[2], columns[3]);
    const __m128i high0 = _mm_unpackhi_epi32(columns[0], columns[1]), high1 = _mm_unpackhi_epi32(columns[2], columns[3]);
    const __m128i rows[4] = {_mm_unpacklo_epi64(low0, low1), _mm_unpackhi_epi64(low0, low1),
                             _mm_unpacklo_epi64(high0, high1), _mm_unpackhi_epi64(high0, high1)};
    for (std::size_t j = 0; j < 4; ++j) _mm_storeu_si128(reinterpret_cast<__m128i *>(words + 4 * width * j), rows[j]);
}

// One block of one row as vectors of four words: unsigned integers (with their zero point), four a word of 8 bits; of 4
// bits elements 4j .. 4j + 3 in the low nibbles of word j, elements 16 + 4j .. in the high ones.
template <int Bits>
void words_of(const std::uint8_t *block, __m128i (&words)[Bits / 4]) {
    if constexpr (Bits == 8) {
        const __m128i zero_point = _mm_set1_epi8(static_cast<char>(0x80));
        words[0] = _mm_xor_si128(load(block), zero_point);
        words[1] = _mm_xor_si128(load(block + 16), zero_point);
    } else {
        const __m128i nibble = _mm_set1_epi8(0xf);
        const __m128i bytes = _mm_xor_si128(load(block), _mm_set1_epi8(static_cast<char>(0x88)));
        const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        const __m128i low = _mm_unpacklo_epi8(even, odd), high = _mm_unpackhi_epi8(even, odd);
        words[0] = _mm_or_si128(low, _mm_slli_epi16(high, 4));
    }
}

template <int Bits>
void place_column_group(const std::uint8_t *const (&blocks)[4], std::size_t column, std::uint8_t *tile) {
    __m128i words[4][Bits / 4];
    for (std::size_t i = 0; i < 4; ++i) words_of<Bits>(blocks[i], words[i]);
    for (std::size_t part = 0; part < Bits / 4; ++part)
        place_words({words[0][part], words[1][part], words[2][part], words[3][part]},
                    tile + 4 * column + 16 * width * part);
}

#else

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
void place_column_group(const std::uint8_t *const (&blocks)[4], std::size_t column, std::uint8_t *tile) {
    for (std::size_t i = 0; i < 4; ++i) place_block<Bits>(blocks[i], column + i, tile);
}

#endif

template <int Bits>
void tile_rows(const std::uint8_t *values, std::size_t rows, std::size_t blocks, std::uint8_t *tiles,
               std::size_t first, std::size_t last) {
    constexpr std::size_t block_bytes = length * Bits / 8, tile_bytes = width * block_bytes;
    constexpr std::uint8_t zeros[length] = {};
    for (std::size_t tile = first; tile < last; ++tile)
        for (std::size_t block = 0; block < blocks; ++block)
            for (std::size_t column = 0; column < width; column += 4) {
                const std::uint8_t *sources[4];
                for (std::size_t i = 0; i < 4; ++i) {
                    const std::size_t row = tile * width + column + i;
                    sources[i] = row < rows ? values + (row * blocks + block) * block_bytes : zeros;
                }
                place_column_group<Bits>(sources, column, tiles + (tile * blocks + block) * tile_bytes);
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
