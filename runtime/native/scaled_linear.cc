// The loops of scaled_linear.h: AVX-512, AVX2, or portable C++, written once over 16 outputs of a tile.
#include "runtime/native/scaled_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/native/small_floats.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header initialises what it leaves undefined by itself

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#endif

namespace trtllm {
namespace {

float scale_at(const ScaledWeight &w, std::int64_t index) {
    switch (w.scale_type) {
        case ScaleType::e4m3: return e4m3_value(w.scales[index]) * w.factor;
        case ScaleType::e8m0: return e8m0_value(w.scales[index]) * w.factor;
        default: {
            float scale;
            std::memcpy(&scale, w.scales + 4 * index, sizeof scale);
            return scale * w.factor;
        }
    }
}

void scales_of(const ScaledWeight &w, std::int64_t tile, std::int64_t block, float *scales) {
    for (std::int64_t c = 0; c < tile_width; ++c) scales[c] = scale_at(w, (tile * w.blocks() + block) * tile_width + c);
}

float weight_at(const ScaledWeight &w, std::int64_t tile, std::int64_t k, std::int64_t column) {
    const std::uint8_t *values = w.values + tile * w.tile_bytes();
    if (w.element == Element::e4m3) return e4m3_value(values[k * tile_width + column]);
    const std::uint8_t pair = values[k / 2 * tile_width + column];
    return kE2M1[k % 2 ? pair >> 4 : pair & 15];
}

void floats_portable(const ScaledWeight &w, const float *x, std::int64_t rows, std::int64_t tile, float *y) {
    const std::int64_t columns = std::min(tile_width, w.outputs - tile * tile_width);
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column) {
            float total = 0;
            for (std::int64_t block = 0; block < w.blocks(); ++block) {
                float part = 0;
                for (std::int64_t k = block * w.block; k < std::min(w.inputs, (block + 1) * w.block); ++k)
                    part += weight_at(w, tile, k, column) * x[row * w.inputs + k];
                total += part * scale_at(w, (tile * w.blocks() + block) * tile_width + column);
            }
            const std::int64_t n = tile * tile_width + column;
            y[row * w.outputs + n] = total + (w.bias ? w.bias[n] : 0.0f);
        }
}

void integers_portable(const ScaledWeight &w, const std::int8_t *x, const float *scales, std::int64_t rows,
                       std::int64_t tile, float *y) {
    const std::int64_t columns = std::min(tile_width, w.outputs - tile * tile_width);
    const std::uint8_t *values = w.values + tile * w.tile_bytes();
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column) {
            std::int32_t total = 0;
            for (std::int64_t k = 0; k < w.inputs; ++k)
                total += (int(values[(k / 4 * tile_width + column) * 4 + k % 4]) - 128) * x[row * w.inputs + k];
            const std::int64_t n = tile * tile_width + column;
            const float scale = scales[row] * scale_at(w, n);
            y[row * w.outputs + n] = static_cast<float>(total) * scale + (w.bias ? w.bias[n] : 0.0f);
        }
}

#if defined(__x86_64__)

// e4m3 with its exponent and fraction moved into a float16 is the value divided by 256.
constexpr float kHalfToE4M3 = 256.0f;

VNNI_TARGET inline __m512 e4m3_wide(const std::uint8_t *from) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(short(0xbf80))));
}

VNNI_TARGET inline __m512 scales_wide(const ScaledWeight &w, std::int64_t tile, std::int64_t block) {
    const std::int64_t index = (tile * w.blocks() + block) * tile_width;
    const __m512 factor = _mm512_set1_ps(w.factor);
    if (w.scale_type == ScaleType::float32) return _mm512_mul_ps(_mm512_loadu_ps(w.scales + 4 * index), factor);
    if (w.scale_type == ScaleType::e4m3)
        return _mm512_mul_ps(_mm512_mul_ps(e4m3_wide(w.scales + index), _mm512_set1_ps(kHalfToE4M3)), factor);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(w.scales + index));
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_set1_epi32(0x00400000))), factor);
}

template <Element Kind, int Rows>
VNNI_TARGET void floats_wide(const ScaledWeight &w, const float *x, std::int64_t row, std::int64_t tile, float *y) {
    const std::uint8_t *values = w.values + tile * w.tile_bytes();
    const __m512 table = _mm512_loadu_ps(kE2M1);
    constexpr int kChains = 2;  // sums of one output: few rows hide no latency, and every row is summed alike
    __m512 totals[Rows];
    for (auto &total : totals) total = _mm512_setzero_ps();
    x += row * w.inputs;
    for (std::int64_t block = 0, k = 0; block < w.blocks(); ++block) {
        const std::int64_t end = std::min(w.inputs, (block + 1) * w.block);
        __m512 parts[Rows][kChains];
        for (auto &part : parts)
            for (auto &chain : part) chain = _mm512_setzero_ps();
        const auto add = [&](__m512 weight, std::int64_t at, int chain) VNNI_TARGET {
            for (int r = 0; r < Rows; ++r)
                parts[r][chain] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[r * w.inputs + at]), parts[r][chain]);
        };
        if constexpr (Kind == Element::e4m3) {
            for (; k + kChains <= end; k += kChains)
                for (int c = 0; c < kChains; ++c) add(e4m3_wide(values + (k + c) * tile_width), k + c, c);
            for (; k < end; ++k) add(e4m3_wide(values + k * tile_width), k, 0);
        } else {
            for (; k < end; k += 2) {
                const __m512i pair = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i *>(values + k / 2 * tile_width)));
                add(_mm512_permutexvar_ps(pair, table), k, 0);
                add(_mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table), k + 1, 1);
            }
        }
        __m512 scale = scales_wide(w, tile, block);
        if constexpr (Kind == Element::e4m3) scale = _mm512_mul_ps(scale, _mm512_set1_ps(kHalfToE4M3));
        for (int r = 0; r < Rows; ++r) {
            totals[r] = _mm512_fmadd_ps(_mm512_add_ps(parts[r][0], parts[r][1]), scale, totals[r]);
        }
    }
    const std::int64_t n = tile * tile_width, columns = std::min(tile_width, w.outputs - n);
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + n) : _mm512_setzero_ps();
    for (int r = 0; r < Rows; ++r)
        _mm512_mask_storeu_ps(y + (row + r) * w.outputs + n, mask, _mm512_add_ps(totals[r], bias));
}

template <int Rows>
VNNI_TARGET void integers_wide(const ScaledWeight &w, const std::int8_t *x, const float *row_scales, std::int64_t row,
                               std::int64_t tile, float *y) {
    const std::uint8_t *values = w.values + tile * w.tile_bytes();
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), ones = _mm512_set1_epi8(1);
    __m512i sums[Rows], columns_sum = _mm512_setzero_si512();
    for (auto &sum : sums) sum = _mm512_setzero_si512();
    x += row * w.inputs;
    for (std::int64_t k = 0; k < w.inputs; k += 4) {  // activations plus 128 times signed weights
        const __m512i weight = _mm512_xor_si512(_mm512_loadu_si512(values + k * tile_width), flip);
        columns_sum = _mm512_dpbusd_epi32(columns_sum, ones, weight);
        for (int r = 0; r < Rows; ++r) {
            std::int32_t word;
            std::memcpy(&word, x + r * w.inputs + k, sizeof word);
            sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_set1_epi32(word ^ int(0x80808080u)), weight);
        }
    }
    const __m512 scales = scales_wide(w, tile, 0);
    const __m512i correction = _mm512_slli_epi32(columns_sum, 7);
    const std::int64_t n = tile * tile_width, columns = std::min(tile_width, w.outputs - n);
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + n) : _mm512_setzero_ps();
    for (int r = 0; r < Rows; ++r) {
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[row + r]), scales);
        const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r], correction));
        _mm512_mask_storeu_ps(y + (row + r) * w.outputs + n, mask, _mm512_fmadd_ps(total, scale, bias));
    }
}

AVX2_TARGET inline __m256 e4m3_half(const std::uint8_t *from) {
    const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(short(0xbf80))));
}

AVX2_TARGET inline __m256 e2m1_half(__m256i nibbles) {
    const __m256 size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2M1), nibbles);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(nibbles, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(size, _mm256_castsi256_ps(sign));
}

template <Element Kind, int Rows>
AVX2_TARGET void floats_halves(const ScaledWeight &w, const float *x, std::int64_t row, std::int64_t tile, float *y) {
    x += row * w.inputs;
    for (int half = 0; half < 2; ++half) {
        const std::uint8_t *values = w.values + tile * w.tile_bytes() + 8 * half;
        __m256 totals[Rows];
        for (auto &total : totals) total = _mm256_setzero_ps();
        for (std::int64_t block = 0, k = 0; block < w.blocks(); ++block) {
            const std::int64_t end = std::min(w.inputs, (block + 1) * w.block);
            __m256 parts[Rows];
            for (auto &part : parts) part = _mm256_setzero_ps();
            const auto add = [&](__m256 weight, std::int64_t at) AVX2_TARGET {
                for (int r = 0; r < Rows; ++r)
                    parts[r] = _mm256_fmadd_ps(weight, _mm256_set1_ps(x[r * w.inputs + at]), parts[r]);
            };
            if constexpr (Kind == Element::e4m3) {
                for (; k < end; ++k) add(e4m3_half(values + k * tile_width), k);
            } else {
                for (; k < end; k += 2) {
                    const __m256i pair = _mm256_cvtepu8_epi32(
                        _mm_loadl_epi64(reinterpret_cast<const __m128i *>(values + k / 2 * tile_width)));
                    add(e2m1_half(_mm256_and_si256(pair, _mm256_set1_epi32(15))), k);
                    add(e2m1_half(_mm256_srli_epi32(pair, 4)), k + 1);
                }
            }
            alignas(64) float scales[tile_width];
            scales_of(w, tile, block, scales);
            __m256 scale = _mm256_load_ps(scales + 8 * half);
            if constexpr (Kind == Element::e4m3) scale = _mm256_mul_ps(scale, _mm256_set1_ps(kHalfToE4M3));
            for (int r = 0; r < Rows; ++r) totals[r] = _mm256_fmadd_ps(parts[r], scale, totals[r]);
        }
        for (int r = 0; r < Rows; ++r) {
            float results[8];
            _mm256_storeu_ps(results, totals[r]);
            for (std::int64_t c = 0, n = tile * tile_width + 8 * half; c < 8 && n < w.outputs; ++c, ++n)
                y[(row + r) * w.outputs + n] = results[c] + (w.bias ? w.bias[n] : 0.0f);
        }
    }
}

template <int Rows>
AVX2_TARGET void integers_halves(const ScaledWeight &w, const std::int8_t *x, const float *row_scales, std::int64_t row,
                                 std::int64_t tile, float *y) {
    x += row * w.inputs;
    const __m128i flip = _mm_set1_epi8(static_cast<char>(0x80));
    alignas(64) float scales[tile_width];
    scales_of(w, tile, 0, scales);
    for (int part = 0; part < 4; ++part) {  // four outputs of four inputs: sixteen 16-bit factors
        const std::uint8_t *values = w.values + tile * w.tile_bytes() + 16 * part;
        __m256i sums[Rows];
        for (auto &sum : sums) sum = _mm256_setzero_si256();
        for (std::int64_t k = 0; k < w.inputs; k += 4) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(values + k * tile_width));
            const __m256i weight = _mm256_cvtepi8_epi16(_mm_xor_si128(bytes, flip));
            for (int r = 0; r < Rows; ++r) {
                std::int32_t word;
                std::memcpy(&word, x + r * w.inputs + k, sizeof word);
                const __m256i four = _mm256_cvtepi8_epi16(_mm_set1_epi32(word));
                sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(weight, four));
            }
        }
        for (int r = 0; r < Rows; ++r) {
            std::int32_t pairs[8];
            std::memcpy(pairs, &sums[r], sizeof pairs);
            for (std::int64_t c = 0, n = tile * tile_width + 4 * part; c < 4 && n < w.outputs; ++c, ++n) {
                const float scale = row_scales[row + r] * scales[4 * part + c];
                const float total = static_cast<float>(pairs[2 * c] + pairs[2 * c + 1]);
                y[(row + r) * w.outputs + n] = __builtin_fmaf(total, scale, w.bias ? w.bias[n] : 0.0f);
            }
        }
    }
}

// Calls run<8> for whole groups of eight rows, then run<4>, run<1> for the rest: a row's sums do not depend on the others.
template <typename Run>
void by_rows(std::int64_t rows, Run &&run) {
    std::int64_t row = 0;
    for (; row + 8 <= rows; row += 8) run(std::integral_constant<int, 8>{}, row);
    for (; row + 4 <= rows; row += 4) run(std::integral_constant<int, 4>{}, row);
    for (; row < rows; ++row) run(std::integral_constant<int, 1>{}, row);
}

template <Element Kind>
void floats_vector(const ScaledWeight &w, const float *x, std::int64_t rows, std::int64_t tile, float *y,
                   InstructionSet set) {
    by_rows(rows, [&]<int Rows>(std::integral_constant<int, Rows>, std::int64_t row) {
        if (set == InstructionSet::avx512_vnni) return floats_wide<Kind, Rows>(w, x, row, tile, y);
        floats_halves<Kind, Rows>(w, x, row, tile, y);
    });
}
#endif

}  // namespace

void multiply_floats(const ScaledWeight &w, const float *x, std::int64_t rows, std::int64_t first, std::int64_t last,
                     float *y, [[maybe_unused]] InstructionSet set) {
    for (std::int64_t tile = first; tile < last; ++tile) {
#if defined(__x86_64__)
        if (set != InstructionSet::portable) {
            if (w.element == Element::e4m3) floats_vector<Element::e4m3>(w, x, rows, tile, y, set);
            else floats_vector<Element::e2m1>(w, x, rows, tile, y, set);
            continue;
        }
#endif
        floats_portable(w, x, rows, tile, y);
    }
}

void multiply_integers(const ScaledWeight &w, const std::int8_t *x, const float *scales, std::int64_t rows,
                       std::int64_t first, std::int64_t last, float *y, [[maybe_unused]] InstructionSet set) {
    for (std::int64_t tile = first; tile < last; ++tile) {
#if defined(__x86_64__)
        if (set != InstructionSet::portable) {
            by_rows(rows, [&]<int Rows>(std::integral_constant<int, Rows>, std::int64_t row) {
                if (set == InstructionSet::avx512_vnni) return integers_wide<Rows>(w, x, scales, row, tile, y);
                integers_halves<Rows>(w, x, scales, row, tile, y);
            });
            continue;
        }
#endif
        integers_portable(w, x, scales, rows, tile, y);
    }
}

}  // namespace trtllm
