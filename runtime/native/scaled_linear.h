// Products with weights of 8 or 4 bits a value and floating scales, after activations were rounded as a scheme says.
//
// A weight [N, K] lies in tiles of 16 outputs, so that one load holds one input (4 bits: two) of sixteen outputs:
//   e4m3: byte [n / 16][k][n % 16]           e2m1: byte [n / 16][k / 2][n % 16], the even k in the low nibble
//   int8: two's complement, byte [n / 16][k / 4][n % 16][k % 4] plus 128, for sums of four products at once
// and its scales [n / 16][k / block][n % 16]; an int8 weight has one block. Products are float32, of int8 exact int32.
#pragma once

#include <cstdint>

#include "runtime/native/quantized_linear.h"

namespace trtllm {

enum class Element : int { e4m3 = 0, e2m1 = 1, int8 = 2 };
enum class ScaleType : int { float32 = 0, e4m3 = 1, e8m0 = 2 };

// What becomes of the activations of a product. `tensor` uses a scale that is given, `token` the row's largest magnitude
// divided by the largest value of the format, `block` that of 128 inputs (e2m1: of 16, itself rounded to e4m3).
enum class Rounding : int { none = 0, tensor = 1, token = 2, block = 3 };

struct ScaledWeight {
    const std::uint8_t *values;
    const std::uint8_t *scales;
    const float *bias;       // [N] or null
    float factor;            // of all scales
    std::int64_t outputs;    // N; the last tile may be partly padding
    std::int64_t inputs;     // K; a multiple of 2 (e2m1) or 4 (int8)
    std::int64_t block;      // inputs of one scale; the last block may be shorter
    Element element;
    ScaleType scale_type;

    std::int64_t tiles() const { return (outputs + tile_width - 1) / tile_width; }
    std::int64_t blocks() const { return (inputs + block - 1) / block; }
    std::int64_t tile_bytes() const { return tile_width * inputs / (element == Element::e2m1 ? 2 : 1); }
};

// Gates and rounds one row. With a gate, x holds 2K values and the row is gate(x[0:K]) * x[K:2K]. `scale` is that of
// Rounding::tensor, or of the scales of e2m1 blocks. Floats: the values themselves, scales applied. Integers: in `integers`
// without their scale, which is returned.
float round_activations(const float *x, std::int64_t inputs, Gate gate, Element element, Rounding rounding, float scale,
                        float *values, std::int8_t *integers);

// y[r][n] for rows of float activations (e4m3, e2m1) and the outputs of tiles first .. last - 1.
void multiply_floats(const ScaledWeight &weight, const float *x, std::int64_t rows, std::int64_t first, std::int64_t last,
                     float *y, InstructionSet set = best_instruction_set());

// The same for int8: row r is integers[r] * scales[r].
void multiply_integers(const ScaledWeight &weight, const std::int8_t *integers, const float *scales, std::int64_t rows,
                       std::int64_t first, std::int64_t last, float *y, InstructionSet set = best_instruction_set());

}  // namespace trtllm
