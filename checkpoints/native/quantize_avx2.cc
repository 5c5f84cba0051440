// Quantization to blocks, sixteen elements a step, for machines with AVX2 and F16C.
#include <cstring>

#include "checkpoints/native/quantize.h"
#include "checkpoints/native/vectors.h"

#ifdef TRTLLM_AVX2
namespace trtllm {
namespace {

constexpr std::size_t kGroup = 8;  // blocks whose scales are made together

// Bytes: fresh from the page cache a page is not in the processor's, which looks ahead within a page only.
constexpr std::size_t kAhead = 2048;

template <Float From>
const char *element(const void *source, std::size_t index) {
    return static_cast<const char *>(source) + index * size_of(From);
}

struct Group {
    alignas(32) std::uint32_t magnitudes[kGroup];  // of the largest elements, as bits
    alignas(32) std::uint32_t largests[kGroup];    // the highest bits, sign included: a negative's if there is one
    alignas(32) float scales[kGroup];              // as stored
};

// The two maxima of eight words each.
TRTLLM_AVX2_INLINE void reduce(__m256i magnitudes, __m256i largests, std::uint32_t &magnitude, std::uint32_t &largest) {
    const __m256i low = _mm256_unpacklo_epi64(magnitudes, largests), high = _mm256_unpackhi_epi64(magnitudes, largests);
    const __m256i pairs = _mm256_max_epu32(low, high);
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    magnitude = static_cast<std::uint32_t>(_mm_cvtsi128_si32(four));
    largest = static_cast<std::uint32_t>(_mm_extract_epi32(four, 2));
}

template <Float From>
TRTLLM_AVX2_INLINE void find_extremes(const BlockJob &job, std::size_t block, std::size_t index, Group &group) {
    const __m256i unsign = _mm256_set1_epi32(0x7fffffff);
    __m256i magnitudes = _mm256_setzero_si256(), largests = _mm256_setzero_si256();
    for (std::size_t i = block * job.block_size; i < (block + 1) * job.block_size; i += 8) {
        if (i % (64 / size_of(From)) == 0) _mm_prefetch(element<From>(job.source, i) + kAhead, _MM_HINT_T0);
        const __m256i bits = _mm256_castps_si256(load8<From>(job.source, i));
        magnitudes = _mm256_max_epu32(magnitudes, _mm256_and_si256(bits, unsign));
        largests = _mm256_max_epu32(largests, bits);
    }
    reduce(magnitudes, largests, group.magnitudes[index], group.largests[index]);
}

// As ideal_scale() and store_scale() of the scalar form for eight blocks; the scales are written to `stored`. False when
// one of them is not finite.
template <int Bits>
TRTLLM_AVX2_INLINE bool make_scales(Group &group, Float dtype, void *stored) {
    const __m256i magnitudes = _mm256_load_si256(reinterpret_cast<const __m256i *>(group.magnitudes));
    const __m256i largests = _mm256_load_si256(reinterpret_cast<const __m256i *>(group.largests));
    const __m256 maxima = _mm256_castsi256_ps(magnitudes);
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    __m256 scales;
    if constexpr (Bits == 8) {
        scales = _mm256_div_ps(maxima, _mm256_set1_ps(127.0f));
    } else {
        const __m256i is_negative = _mm256_cmpeq_epi32(largests, _mm256_or_si256(magnitudes, sign));
        const __m256 eighth = _mm256_blendv_ps(_mm256_set1_ps(-0.125f), _mm256_set1_ps(0.125f),
                                               _mm256_castsi256_ps(is_negative));
        scales = _mm256_mul_ps(maxima, eighth);
    }
    scales = _mm256_add_ps(scales, _mm256_setzero_ps());  // a scale that underflowed is no negative zero
    if (dtype == Float::float32) {
        _mm256_storeu_ps(static_cast<float *>(stored), scales);
    } else {
        const __m128i rounded = dtype == Float::float16 ? _mm256_cvtps_ph(scales, _MM_FROUND_TO_NEAREST_INT)
                                                        : to_bfloat16_8(scales);
        const __m128i is_zero =
            _mm_cmpeq_epi16(_mm_and_si128(rounded, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
        const __m128i halves = _mm_andnot_si128(is_zero, rounded);
        _mm_storeu_si128(static_cast<__m128i *>(stored), halves);
        scales = dtype == Float::float16 ? _mm256_cvtph_ps(halves) : load8<Float::bfloat16>(stored, 0);
    }
    _mm256_store_ps(group.scales, scales);
    const __m256 magnitude = _mm256_andnot_ps(_mm256_castsi256_ps(sign), scales);
    const __m256 infinity = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
    const __m256 is_fine = _mm256_and_ps(_mm256_cmp_ps(magnitude, infinity, _CMP_LT_OQ),
                                         _mm256_cmp_ps(maxima, infinity, _CMP_LT_OQ));
    return _mm256_movemask_ps(is_fine) == 0xff;
}

// Sixteen quotients, rounded and narrowed to int16: of elements 0-3 8-11 4-7 12-15.
template <Float From>
TRTLLM_AVX2_INLINE __m256i quantize16(const void *source, std::size_t index, __m256 scale) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_div_ps(load8<From>(source, index), scale));
    const __m256i high = _mm256_cvtps_epi32(_mm256_div_ps(load8<From>(source, index + 8), scale));
    return _mm256_packs_epi32(low, high);
}

// Thirty-two quotients as bytes in order, clamped.
template <int Bits>
TRTLLM_AVX2_INLINE __m256i bytes_of(__m256i first, __m256i second) {
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_max_epi8(_mm256_min_epi8(bytes, _mm256_set1_epi8(Bits == 4 ? 7 : 127)),
                           _mm256_set1_epi8(Bits == 4 ? -8 : -127));
}

// Thirty-two small integers as sixteen bytes, the first of two in the low nibble.
TRTLLM_AVX2_INLINE __m128i nibbles_of(__m256i bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(bytes, _mm256_set1_epi8(0xf)),
                                               _mm256_set1_epi16(0x1001));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    return _mm256_castsi256_si128(packed);
}

template <Float From, int Bits>
TRTLLM_AVX2_INLINE void quantize_block(const BlockJob &job, std::size_t first, float scale) {
    const __m256 divisor = _mm256_set1_ps(scale);
    const std::size_t end = first + job.block_size;
    std::size_t i = first;
    for (; i + 32 <= end; i += 32) {
        const __m256i bytes =
            bytes_of<Bits>(quantize16<From>(job.source, i, divisor), quantize16<From>(job.source, i + 16, divisor));
        if constexpr (Bits == 8)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(job.values + i), bytes);
        else
            _mm_storeu_si128(reinterpret_cast<__m128i *>(job.values + i / 2), nibbles_of(bytes));
    }
    if (i < end) {  // sixteen are left
        const __m256i bytes = bytes_of<Bits>(quantize16<From>(job.source, i, divisor), _mm256_setzero_si256());
        if constexpr (Bits == 8)
            _mm_storeu_si128(reinterpret_cast<__m128i *>(job.values + i), _mm256_castsi256_si128(bytes));
        else
            _mm_storel_epi64(reinterpret_cast<__m128i *>(job.values + i / 2), nibbles_of(bytes));
    }
}

template <Float From, int Bits>
TRTLLM_AVX2 Outcome quantize_range(const BlockJob &job, std::size_t begin, std::size_t end) {
    const std::size_t scale_size = size_of(job.scale_dtype);
    Group group;
    std::size_t block = begin;
    for (; block + kGroup <= end; block += kGroup) {
        for (std::size_t i = 0; i < kGroup; ++i) find_extremes<From>(job, block + i, i, group);
        if (!make_scales<Bits>(group, job.scale_dtype, static_cast<std::uint8_t *>(job.scales) + block * scale_size))
            return quantize_range_scalar(job, block, block + kGroup);  // names the block at fault
        for (std::size_t i = 0; i < kGroup; ++i) {
            const std::size_t first = (block + i) * job.block_size;
            if (group.scales[i] == 0.0f)
                std::memset(job.values + first * Bits / 8, 0, job.block_size * Bits / 8);
            else
                quantize_block<From, Bits>(job, first, group.scales[i]);
        }
    }
    return quantize_range_scalar(job, block, end);
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
