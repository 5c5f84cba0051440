// Products of float activations with weights stored as 4- or 8-bit integers in tiles of 16 outputs.
//
// A weight [N, K] in blocks of 32 inputs is stored tile by tile (16 outputs), block by block, so that one 512-bit
// load holds four consecutive inputs of sixteen outputs:
//   8 bits: byte ((j * 16) + c) * 4 + i of a block is weight[c][4 j + i] + 128, j < 8
//   4 bits: the same byte, j < 4, holds weight[c][4 j + i] + 8 in its low and weight[c][16 + 4 j + i] + 8 in its high nibble
// and its scales as float16 [N/16, K/32, 16]. Activations are rounded to 8 bits by block as they come, or to 16: then
// what the first 8 bits leave is rounded to another 8, with a scale of its own, and multiplied like another row.
//
// A weight may have an offset for each block and output, float16 in the same tiles as the scales: a minimum m, and the
// weight is scale * integer + m, or a zero point z, and it is scale * (integer - z). The integers of a 4-bit weight with
// offsets count from 0 (0 .. 15, stored as they are). What an offset adds to a sum is the offset times the sum of the
// rounded activations of its block, which is known when these are rounded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm {

inline constexpr std::int64_t tile_width = 16;
inline constexpr std::int64_t block_length = 32;

enum class Offset : int { none = 0, minimum = 1, zero_point = 2 };

struct TiledWeight {
    const std::uint8_t *values;
    const std::uint16_t *scales;  // float16 bits
    const float *bias;            // [N] or null
    std::int64_t outputs;         // N; the last tile may be partly padding
    std::int64_t inputs;          // K, a multiple of 32
    int bits;                     // 4 or 8
    const std::uint16_t *offsets = nullptr;  // float16 bits; null without
    Offset offset = Offset::none;            // what the offsets are

    // What is stored for the integer 0.
    int zero() const { return bits == 8 ? 128 : offsets ? 0 : 8; }
    std::int64_t tiles() const { return (outputs + tile_width - 1) / tile_width; }
    std::int64_t blocks() const { return inputs / block_length; }
    std::int64_t block_bytes() const { return tile_width * block_length * bits / 8; }
};

// Rows of activations, rounded to 8 bits: values[r][k] * scales[r][k / 32] is near x[r][k].
struct RoundedRows {
    std::int8_t *values;          // [rows, K]
    float *scales;                // [rows, K/32]
    std::int32_t *corrections;    // [rows, K/32]: minus what the weight stores for 0 times the sum of the block's values
    std::int64_t rows;            // those of the activations, times `planes`
    float *sums = nullptr;        // [rows, K/32]: the block's sum, scaled; for a weight with offsets only
    int planes = 1;               // with 2, row 2 r + 1 holds what rounding left of row 2 r, and both make result r

    // The row of the results that a row adds to.
    std::int64_t result(std::int64_t row) const { return planes == 2 ? row >> 1 : row; }
};

enum class Gate : int { none = 0, silu = 1, gelu_tanh = 2, gelu = 3 };

enum class InstructionSet : int { portable = 0, avx2 = 1, avx512_vnni = 2 };

// The widest set that this machine has and these loops use.
InstructionSet best_instruction_set();

// Rounds one row of activations to its row or two. With a gate, x holds 2K values and the row is gate(x[0:K]) * x[K:2K].
void round_row(const float *x, const TiledWeight &weight, Gate gate, const RoundedRows &rounded, std::int64_t row,
               InstructionSet set = best_instruction_set());

// y[r][n] for every row and the outputs of tiles first .. last - 1; y has `weight.outputs` columns.
void multiply_tiles(const TiledWeight &weight, const RoundedRows &rounded, std::int64_t first, std::int64_t last,
                    float *y, InstructionSet set = best_instruction_set());

}  // namespace trtllm
