// Quantization to blocks of 4-bit or 8-bit integers, each block with one scale and, if wanted, a minimum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "checkpoints/native/floats.h"

namespace trtllm {

// A run of blocks, flat: a block never spans two rows, so rows need no mention here.
struct BlockJob {
    const void *source;    // blocks * block_size elements
    Float dtype;           // of the source
    int bits;              // 4 or 8
    std::size_t block_size;  // a multiple of 16
    std::uint8_t *values;  // 4 bits: two a byte, the first in the low nibble; 8 bits: int8
    void *scales;          // one a block
    Float scale_dtype;     // any of the three
    bool search = false;   // 4 bits: scales of least squared error instead of the rule below
    const float *importance = nullptr;  // with search: weighs the squared error of each of a row's `columns`
    std::size_t columns = 0;
    std::uint16_t *minima = nullptr;  // 4 bits: float16, one a block; scales are float16 then
};

enum class Fault { none, not_finite, scale_overflow };

struct Outcome {
    Fault fault = Fault::none;
    std::size_t block = 0;  // the first block at fault
};

// The integers are taken against the scale as stored, after its rounding to scale_dtype.
//   4 bits: scale = m / -8, m the element of largest magnitude (of two, the negative); q in [-8, 7].
//   8 bits: scale = max|w| / 127; q in [-127, 127].
// With minima an element is scale * q + minimum, q in [0, 15] and stored less 8: minimum = the smallest element, scale =
// (the largest - minimum) / 15.
// A block of zeros, or one whose scale rounds to zero, has scale 0 and zeros.
Outcome quantize_blocks(const BlockJob &job, std::size_t blocks, int threads);

// The same of a matrix whose rows have `row_blocks` blocks of 32, the values tiled (checkpoints/native/tiles.h); without
// minima. A tile's values go from one cache line to the other, never to memory in between.
Outcome quantize_tiles(const BlockJob &job, std::size_t rows, std::size_t row_blocks, int threads);

// The two forms of one range; both give the same bits.
Outcome quantize_range_scalar(const BlockJob &job, std::size_t begin, std::size_t end);
Outcome quantize_range_avx2(const BlockJob &job, std::size_t begin, std::size_t end);

// One range with searched scales (checkpoints/native/scale_search.h).
Outcome quantize_range_search(const BlockJob &job, std::size_t begin, std::size_t end);

// One range with minima, plain or searched.
Outcome quantize_range_minima(const BlockJob &job, std::size_t begin, std::size_t end);

}  // namespace trtllm
