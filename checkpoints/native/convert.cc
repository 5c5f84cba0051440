// Conversion by vectors of eight where the machine has AVX2 and F16C, one at a time elsewhere.
#include "checkpoints/native/convert.h"

#include <cstring>

#include "checkpoints/native/parallel.h"
#include "checkpoints/native/vectors.h"

namespace trtllm {
namespace {

template <Float From>
float load_one(const void *source, std::size_t index) {
    if constexpr (From == Float::float32) return static_cast<const float *>(source)[index];
    const auto half = static_cast<const std::uint16_t *>(source)[index];
    return From == Float::float16 ? from_float16(half) : from_bfloat16(half);
}

template <Float To>
void store_one(void *destination, std::size_t index, float value) {
    if constexpr (To == Float::float32)
        static_cast<float *>(destination)[index] = value;
    else
        static_cast<std::uint16_t *>(destination)[index] =
            To == Float::float16 ? to_float16(value) : to_bfloat16(value);
}

using Range = void (*)(const void *, void *, std::size_t, std::size_t);

template <Float From, Float To>
void convert_scalar(const void *source, void *destination, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) store_one<To>(destination, i, load_one<From>(source, i));
}

#ifdef TRTLLM_AVX2
template <Float From, Float To>
TRTLLM_AVX2 void convert_avx2(const void *source, void *destination, std::size_t begin, std::size_t end) {
    std::size_t i = begin;
    for (; i + 8 <= end; i += 8) store8<To>(destination, i, load8<From>(source, i));
    convert_scalar<From, To>(source, destination, i, end);
}
#endif

template <Float From, Float To>
Range pick() {
#ifdef TRTLLM_AVX2
    if (has_avx2()) return convert_avx2<From, To>;
#endif
    return convert_scalar<From, To>;
}

template <Float From>
Range pick_to(Float to) {
    switch (to) {
        case Float::float32: return pick<From, Float::float32>();
        case Float::float16: return pick<From, Float::float16>();
        default: return pick<From, Float::bfloat16>();
    }
}

Range pick_range(Float from, Float to) {
    switch (from) {
        case Float::float32: return pick_to<Float::float32>(to);
        case Float::float16: return pick_to<Float::float16>(to);
        default: return pick_to<Float::bfloat16>(to);
    }
}

constexpr std::size_t kGrain = std::size_t{1} << 21;  // half a millisecond

}  // namespace

void convert(const void *source, Float from, void *destination, Float to, std::size_t count, int threads) {
    if (from == to) {
        std::memcpy(destination, source, count * size_of(from));
        return;
    }
    const Range range = pick_range(from, to);
    parallel_ranges(count, kGrain, threads, [&](std::size_t begin, std::size_t end) {
        range(source, destination, begin, end);
    });
}

}  // namespace trtllm
