// Conversion of contiguous runs among float32, float16 and bfloat16.
#pragma once

#include <cstddef>

#include "checkpoints/native/floats.h"

namespace trtllm {

// Converts `count` elements, round to nearest even; what a float16 cannot hold becomes infinity, as IEEE 754 says.
void convert(const void *source, Float from, void *destination, Float to, std::size_t count, int threads);

}  // namespace trtllm
