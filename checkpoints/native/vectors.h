// Loads and stores of eight floats for machines with AVX2 and F16C; empty elsewhere. Pick with has_avx2().
#pragma once

#include "checkpoints/native/floats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TRTLLM_AVX2 __attribute__((target("avx2,f16c")))
#define TRTLLM_AVX2_INLINE __attribute__((target("avx2,f16c"), always_inline)) inline

namespace trtllm {

inline bool has_avx2() {
    static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    return has;
}

template <Float From>
TRTLLM_AVX2_INLINE __m256 load8(const void *source, std::size_t index) {
    if constexpr (From == Float::float32) return _mm256_loadu_ps(static_cast<const float *>(source) + index);
    const auto *halves = static_cast<const std::uint16_t *>(source) + index;
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i *>(halves));
    if constexpr (From == Float::float16) return _mm256_cvtph_ps(packed);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}

TRTLLM_AVX2_INLINE __m128i to_bfloat16_8(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <Float To>
TRTLLM_AVX2_INLINE void store8(void *destination, std::size_t index, __m256 values) {
    if constexpr (To == Float::float32) {
        _mm256_storeu_ps(static_cast<float *>(destination) + index, values);
    } else {
        const __m128i packed =
            To == Float::float16 ? _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16_8(values);
        auto *halves = static_cast<std::uint16_t *>(destination) + index;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(halves), packed);
    }
}

}  // namespace trtllm
#endif
