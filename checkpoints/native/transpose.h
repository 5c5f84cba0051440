// Transposes matrices of 2-byte and 4-byte elements.
#pragma once

#include <cstddef>

namespace trtllm {

// destination[column * stride + row] = source[row * columns + column], for elements of `size` (2 or 4) bytes.
void transpose(const void *source, std::size_t rows, std::size_t columns, std::size_t size, void *destination,
               std::size_t stride);

}  // namespace trtllm
