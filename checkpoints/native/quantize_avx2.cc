// Quantization to blocks, sixteen elements a step, for machines with AVX2 and F16C.
#include <cmath>
#include <cstring>

#include "checkpoints/native/quantize.h"
#include "checkpoints/native/vectors.h"

#ifdef TRTLLM_AVX2
namespace trtllm {
namespace {

TRTLLM_AVX2_INLINE std::uint32_t highest_of(__m256i words) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(half));
}

// As ideal_scale() of the scalar form.
template <Float From, int Bits>
TRTLLM_AVX2_INLINE float ideal_scale8(const void *source, std::size_t first, std::size_t block_size) {
    const __m256i unsign = _mm256_set1_epi32(0x7fffffff);
    __m256i magnitudes = _mm256_setzero_si256();
    __m256i largests = _mm256_setzero_si256();
    for (std::size_t i = first; i < first + block_size; i += 8) {
        const __m256i bits = _mm256_castps_si256(load8<From>(source, i));
        magnitudes = _mm256_max_epu32(magnitudes, _mm256_and_si256(bits, unsign));
        if constexpr (Bits == 4) largests = _mm256_max_epu32(largests, bits);
    }
    const std::uint32_t magnitude = highest_of(magnitudes);
    if (magnitude == 0) return 0.0f;
    const float maximum = std::bit_cast<float>(magnitude);
    if constexpr (Bits == 8) return maximum / 127.0f;
    return highest_of(largests) == (magnitude | 0x80000000u) ? maximum / 8.0f : maximum / -8.0f;
}

TRTLLM_AVX2_INLINE float store_scale8(const BlockJob &job, std::size_t block, float scale) {
    scale += 0.0f;  // a scale that underflowed is no negative zero
    if (job.scale_dtype == Float::float32) {
        static_cast<float *>(job.scales)[block] = scale;
        return scale;
    }
    const bool is_float16 = job.scale_dtype == Float::float16;
    std::uint16_t half = is_float16 ? static_cast<std::uint16_t>(_cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT))
                                    : to_bfloat16(scale);
    if ((half & 0x7fffu) == 0) half = 0;
    static_cast<std::uint16_t *>(job.scales)[block] = half;
    return is_float16 ? _cvtsh_ss(half) : from_bfloat16(half);
}

// Sixteen quotients, rounded, clamped and narrowed to int16 in order.
template <Float From, int Bits>
TRTLLM_AVX2_INLINE __m256i quantize16(const void *source, std::size_t index, __m256 scale) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_div_ps(load8<From>(source, index), scale));
    const __m256i high = _mm256_cvtps_epi32(_mm256_div_ps(load8<From>(source, index + 8), scale));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m256i lowest = _mm256_set1_epi16(Bits == 4 ? -8 : -127);
    const __m256i highest = _mm256_set1_epi16(Bits == 4 ? 7 : 127);
    return _mm256_min_epi16(_mm256_max_epi16(words, lowest), highest);
}

template <int Bits>
TRTLLM_AVX2_INLINE void store16(std::uint8_t *values, std::size_t index, __m256i words) {
    if constexpr (Bits == 8) {
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(values + index), bytes);
    } else {
        const __m256i nibbles = _mm256_and_si256(words, _mm256_set1_epi16(0xf));
        const __m256i joined = _mm256_or_si256(nibbles, _mm256_srli_epi32(nibbles, 12));
        const __m256i pairs = _mm256_and_si256(joined, _mm256_set1_epi32(0xff));
        const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(values + index / 2), _mm_packus_epi16(half, half));
    }
}

template <Float From, int Bits>
TRTLLM_AVX2 Outcome quantize_range(const BlockJob &job, std::size_t begin, std::size_t end) {
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * job.block_size;
        const float ideal = ideal_scale8<From, Bits>(job.source, first, job.block_size);
        if (!std::isfinite(ideal)) return {Fault::not_finite, block};
        const float scale = store_scale8(job, block, ideal);
        if (!std::isfinite(scale)) return {Fault::scale_overflow, block};
        if (scale == 0.0f) {
            std::memset(job.values + first * Bits / 8, 0, job.block_size * Bits / 8);
            continue;
        }
        const __m256 divisor = _mm256_set1_ps(scale);
        for (std::size_t i = first; i < first + job.block_size; i += 16)
            store16<Bits>(job.values, i, quantize16<From, Bits>(job.source, i, divisor));
    }
    return {};
}

template <Float From>
Outcome quantize_range_of(const BlockJob &job, std::size_t begin, std::size_t end) {
    return job.bits == 4 ? quantize_range<From, 4>(job, begin, end) : quantize_range<From, 8>(job, begin, end);
}

}  // namespace

Outcome quantize_range_avx2(const BlockJob &job, std::size_t begin, std::size_t end) {
    switch (job.dtype) {
        case Float::float32: return quantize_range_of<Float::float32>(job, begin, end);
        case Float::float16: return quantize_range_of<Float::float16>(job, begin, end);
        default: return quantize_range_of<Float::bfloat16>(job, begin, end);
    }
}

}  // namespace trtllm
#endif
