// Transposes squares of a cache line, within them by vectors of eight 2-byte elements where the machine has SSE2.
#include "checkpoints/native/transpose.h"

#include <algorithm>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trtllm {
namespace {

constexpr std::size_t kSquare = 32;

template <typename Element>
void transpose_part(const Element *source, std::size_t columns, Element *destination, std::size_t stride,
                    std::size_t height, std::size_t width) {
    for (std::size_t column = 0; column < width; ++column)
        for (std::size_t row = 0; row < height; ++row)
            destination[column * stride + row] = source[row * columns + column];
}

#if defined(__SSE2__)
void transpose_eight(const std::uint16_t *source, std::size_t columns, std::uint16_t *destination, std::size_t stride) {
    __m128i rows[8], pairs[8], fours[8];
    for (std::size_t i = 0; i < 8; ++i)
        rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + i * columns));
    for (std::size_t i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
    }
    for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t i = 0; i < 2; ++i) {
            const __m128i first = pairs[4 * half + i], second = pairs[4 * half + 2 + i];
            fours[4 * half + 2 * i] = _mm_unpacklo_epi32(first, second);
            fours[4 * half + 2 * i + 1] = _mm_unpackhi_epi32(first, second);
        }
    for (std::size_t i = 0; i < 4; ++i) {
        auto *out = destination + 2 * i * stride;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_unpacklo_epi64(fours[i], fours[4 + i]));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + stride), _mm_unpackhi_epi64(fours[i], fours[4 + i]));
    }
}
#endif

template <typename Element>
void transpose_square(const Element *source, std::size_t columns, Element *destination, std::size_t stride,
                      std::size_t height, std::size_t width) {
#if defined(__SSE2__)
    if constexpr (sizeof(Element) == 2) {
        if (height == kSquare && width == kSquare) {
            for (std::size_t column = 0; column < kSquare; column += 8)
                for (std::size_t row = 0; row < kSquare; row += 8)
                    transpose_eight(source + row * columns + column, columns, destination + column * stride + row,
                                    stride);
            return;
        }
    }
#endif
    transpose_part(source, columns, destination, stride, height, width);
}

template <typename Element>
void transpose_all(const Element *source, std::size_t rows, std::size_t columns, Element *destination,
                   std::size_t stride) {
    for (std::size_t row = 0; row < rows; row += kSquare)
        for (std::size_t column = 0; column < columns; column += kSquare)
            transpose_square(source + row * columns + column, columns, destination + column * stride + row, stride,
                             std::min(kSquare, rows - row), std::min(kSquare, columns - column));
}

}  // namespace

void transpose(const void *source, std::size_t rows, std::size_t columns, std::size_t size, void *destination,
               std::size_t stride) {
    if (size == 2)
        transpose_all(static_cast<const std::uint16_t *>(source), rows, columns,
                      static_cast<std::uint16_t *>(destination), stride);
    else
        transpose_all(static_cast<const std::uint32_t *>(source), rows, columns,
                      static_cast<std::uint32_t *>(destination), stride);
}

}  // namespace trtllm
