// GPTQ: rounds a matrix column by column and lets the columns not yet rounded answer for the error so far.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm {

// W [rows, columns] approximates outputs W x; `factor` is U [columns, columns], upper triangular, with U^T U the
// inverse of the inputs' (damped) second moments. Its row and column j speak of column order[j] of W.
struct GptqJob {
    float *weights;            // [rows, columns]: used up
    const float *factor;       // [columns, columns], row-major
    const std::int32_t *order;  // [columns]: columns as they are rounded
    const float *importance;   // [columns]: weighs squared errors in the search for scales
    std::size_t columns;       // a multiple of block_size
    std::size_t block_size;
    int bits;                  // 4 or 8
    bool static_scales;        // scales from the weights as given, needed when `order` is not 0, 1, 2 ...
    std::uint8_t *values;      // as BlockJob's
    std::uint16_t *scales;     // float16 [rows, columns / block_size]
    std::uint16_t *minima = nullptr;  // 4 bits: as the scales; then integers count from 0 and are stored less 8
};

// False when a scale is not finite. Every row goes its own way, so the result does not depend on the threads.
bool gptq_rows(const GptqJob &job, std::size_t rows, int threads);

}  // namespace trtllm
