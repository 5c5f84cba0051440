// The loops of quantized_linear.h, chosen when the library loads: AVX-512 VNNI, AVX2, or portable C++.
#include "runtime/native/quantized_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#endif

namespace trtllm {
namespace {

float half_to_float(std::uint16_t bits) {
    const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16;
    std::uint32_t exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff, word;
    if (exponent == 0) {
        const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -magnitude : magnitude;
    }
    word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

float gated(float x, Gate gate) {
    switch (gate) {
        case Gate::silu: return x / (1.0f + std::exp(-x));
        case Gate::gelu_tanh: return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
        case Gate::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
        default: return x;
    }
}

// Rounds a block of 32 and returns the sum of its integers.
std::int32_t round_block(const float *x, std::int8_t *values, float *scale) {
    float largest = 0.0f;
    for (int i = 0; i < block_length; ++i) largest = std::max(largest, std::fabs(x[i]));
    *scale = largest / 127.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    std::int32_t sum = 0;
    for (int i = 0; i < block_length; ++i) {
        values[i] = static_cast<std::int8_t>(std::nearbyintf(x[i] * inverse));
        sum += values[i];
    }
    return sum;
}

#if defined(__x86_64__)
AVX2_TARGET std::int32_t round_block_avx2(const float *x, std::int8_t *values, float *scale) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 parts[4], largest = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        parts[i] = _mm256_loadu_ps(x + 8 * i);
        largest = _mm256_max_ps(largest, _mm256_and_ps(parts[i], magnitude));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    half = _mm_max_ss(half, _mm_shuffle_ps(half, half, 1));
    const float top = _mm_cvtss_f32(half);
    *scale = top / 127.0f;
    const __m256 inverse = _mm256_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    __m256i integers[4];
    for (int i = 0; i < 4; ++i) integers[i] = _mm256_cvtps_epi32(_mm256_mul_ps(parts[i], inverse));
    __m256i sums = _mm256_add_epi32(_mm256_add_epi32(integers[0], integers[1]),
                                    _mm256_add_epi32(integers[2], integers[3]));
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(integers[0], integers[1]),
                                             _mm256_packs_epi32(integers[2], integers[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(values), _mm256_permutevar8x32_epi32(words, order));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1));
    return _mm_cvtsi128_si32(total);
}

// e^x for eight values, to about one unit in the last place: 2^n by exponent bits, the rest by a polynomial.
AVX2_TARGET __m256 exp_avx2(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

AVX2_TARGET void gate_block_silu_avx2(const float *gate, const float *up, float *result) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
    for (int i = 0; i < block_length; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 sigmoid = _mm256_div_ps(g, _mm256_add_ps(one, exp_avx2(_mm256_sub_ps(zero, g))));
        _mm256_storeu_ps(result + i, _mm256_mul_ps(sigmoid, _mm256_loadu_ps(up + i)));
    }
}

#endif

void gate_block(const float *gate, const float *up, Gate kind, float *result) {
    for (int i = 0; i < block_length; ++i) result[i] = gated(gate[i], kind) * up[i];
}

// As stored: `TiledWeight::zero` more than the integer.
int stored_value(const std::uint8_t *block, int bits, int column, int k) {
    if (bits == 8) return block[((k / 4) * tile_width + column) * 4 + k % 4];
    const std::uint8_t pair = block[(((k % 16) / 4) * tile_width + column) * 4 + k % 4];
    return k < 16 ? pair & 15 : pair >> 4;
}

// What is added to every integer of a block times its scale. The product by a zero point is exact: 11 bits by 11.
float block_offset(const TiledWeight &w, std::int64_t place, float scale) {
    const float offset = half_to_float(w.offsets[place]);
    return w.offset == Offset::zero_point ? -scale * offset : offset;
}

void multiply_portable(const TiledWeight &w, const RoundedRows &a, std::int64_t first, std::int64_t last, float *y) {
    const std::int64_t blocks = w.blocks();
    for (std::int64_t tile = first; tile < last; ++tile) {
        const std::int64_t columns = std::min(tile_width, w.outputs - tile * tile_width);
        for (std::int64_t row = 0; row < a.rows; ++row) {
            for (std::int64_t column = 0; column < columns; ++column) {
                const std::int64_t n = tile * tile_width + column;
                float total = 0.0f;
                for (std::int64_t block = 0; block < blocks; ++block) {
                    const std::uint8_t *values = w.values + (tile * blocks + block) * w.block_bytes();
                    const std::int8_t *x = a.values + row * w.inputs + block * block_length;
                    std::int32_t sum = 0;
                    for (int k = 0; k < block_length; ++k)
                        sum += (stored_value(values, w.bits, int(column), k) - w.zero()) * x[k];
                    const std::int64_t place = (tile * blocks + block) * tile_width + column;
                    const float scale = half_to_float(w.scales[place]);
                    total = std::fma(static_cast<float>(sum), scale * a.scales[row * blocks + block], total);
                    if (w.offsets) total = std::fma(block_offset(w, place, scale), a.sums[row * blocks + block], total);
                }
                float &result = y[a.result(row) * w.outputs + n];
                const bool is_first = row % a.planes == 0;
                result = total + (is_first ? (w.bias ? w.bias[n] : 0.0f) : result);
            }
        }
    }
}

#if defined(__x86_64__)
// ---- AVX2: a tile as two halves of eight outputs

// Sums u8 * s8 products of four neighbours into 32-bit lanes. 4-bit weights (at most 15) cannot overflow 16 bits.
AVX2_TARGET inline __m256i dot_small(__m256i sum, __m256i weight, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(weight, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The same for signed 8-bit weights of at most 127, whose pair sums stay below 2^15 as magnitudes times signed values.
AVX2_TARGET inline __m256i dot_signed(__m256i sum, __m256i weight, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

AVX2_TARGET inline __m256i four_inputs(const std::int8_t *x) {
    std::int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}

template <int Bits>
AVX2_TARGET __m256i block_sum_avx2(const std::uint8_t *values, const std::int8_t *x, std::int32_t correction) {
    if constexpr (Bits == 4) {
        __m256i sum = _mm256_set1_epi32(correction);
        const __m256i mask = _mm256_set1_epi8(15);
        for (int j = 0; j < 4; ++j) {
            const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values + 64 * j));
            sum = dot_small(sum, _mm256_and_si256(pair, mask), four_inputs(x + 4 * j));
            sum = dot_small(sum, _mm256_and_si256(_mm256_srli_epi16(pair, 4), mask), four_inputs(x + 16 + 4 * j));
        }
        return sum;
    } else {
        (void)correction;  // values are made signed here, so that no zero point is left to correct
        __m256i sum = _mm256_setzero_si256();
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
        for (int j = 0; j < 8; ++j) {
            const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values + 64 * j));
            sum = dot_signed(sum, _mm256_xor_si256(stored, flip), four_inputs(x + 4 * j));
        }
        return sum;
    }
}

// The offsets of eight outputs as what is added to the weights: zero points are multiplied by their scales.
AVX2_TARGET inline __m256 offsets_avx2(const TiledWeight &w, const std::uint16_t *offsets, __m256 scale) {
    const __m256 stored = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(offsets)));
    if (w.offset == Offset::minimum) return stored;
    return _mm256_mul_ps(stored, _mm256_xor_ps(scale, _mm256_set1_ps(-0.0f)));
}

template <int Bits, bool HasOffsets, int Rows>
AVX2_TARGET void tile_rows_avx2(const TiledWeight &w, const RoundedRows &a, std::int64_t tile, std::int64_t row,
                                float *y) {
    const std::int64_t blocks = w.blocks(), columns = std::min(tile_width, w.outputs - tile * tile_width);
    __m256 totals[Rows][2];
    for (auto &total : totals) total[0] = total[1] = _mm256_setzero_ps();
    for (std::int64_t block = 0; block < blocks; ++block) {
        const std::uint8_t *values = w.values + (tile * blocks + block) * w.block_bytes();
        const std::uint16_t *scales = w.scales + (tile * blocks + block) * tile_width;
        for (int half = 0; half < 2; ++half) {
            const __m256 scale =
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + 8 * half)));
            [[maybe_unused]] __m256 offset;
            if constexpr (HasOffsets)
                offset = offsets_avx2(w, w.offsets + (tile * blocks + block) * tile_width + 8 * half, scale);
            for (int r = 0; r < Rows; ++r) {
                const std::int64_t at = (row + r) * blocks + block;
                const __m256i sum = block_sum_avx2<Bits>(
                    values + 32 * half, a.values + (row + r) * w.inputs + block * block_length, a.corrections[at]);
                totals[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                                                  _mm256_mul_ps(scale, _mm256_set1_ps(a.scales[at])), totals[r][half]);
                if constexpr (HasOffsets)
                    totals[r][half] = _mm256_fmadd_ps(offset, _mm256_set1_ps(a.sums[at]), totals[r][half]);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        if constexpr (Rows % 2 == 0)
            if (a.planes == 2) {
                for (int half = 0; half < 2; ++half) totals[r + 1][half] = _mm256_add_ps(totals[r][half], totals[r + 1][half]);
                ++r;
            }
        float results[tile_width];
        _mm256_storeu_ps(results, totals[r][0]);
        _mm256_storeu_ps(results + 8, totals[r][1]);
        float *destination = y + a.result(row + r) * w.outputs + tile * tile_width;
        for (std::int64_t c = 0; c < columns; ++c)
            destination[c] = results[c] + (w.bias ? w.bias[tile * tile_width + c] : 0.0f);
    }
}

template <int Bits, bool HasOffsets>
void multiply_avx2(const TiledWeight &w, const RoundedRows &a, std::int64_t first, std::int64_t last, float *y) {
    for (std::int64_t tile = first; tile < last; ++tile) {
        std::int64_t row = 0;
        for (; row + 4 <= a.rows; row += 4) tile_rows_avx2<Bits, HasOffsets, 4>(w, a, tile, row, y);
        if (a.planes == 2 && row < a.rows) tile_rows_avx2<Bits, HasOffsets, 2>(w, a, tile, row, y), row += 2;
        for (; row < a.rows; ++row) tile_rows_avx2<Bits, HasOffsets, 1>(w, a, tile, row, y);
    }
}

// ---- AVX-512 VNNI: a tile is one register wide

template <int Bits>
VNNI_TARGET inline void load_block(const std::uint8_t *values, __m512i (&weights)[8]) {
    if constexpr (Bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int j = 0; j < 4; ++j) {
            const __m512i pair = _mm512_loadu_si512(values + 64 * j);
            weights[j] = _mm512_and_si512(pair, mask);
            weights[j + 4] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
        }
    } else {
        for (int j = 0; j < 8; ++j) weights[j] = _mm512_loadu_si512(values + 64 * j);
    }
}

VNNI_TARGET inline __m512i four_inputs_wide(const std::int8_t *x) {
    std::int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

// The offsets of a tile as what is added to the weights: zero points are multiplied by their scales.
VNNI_TARGET inline __m512 offsets_vnni(const std::uint16_t *offsets, __m512 scale, __mmask16 zero_points) {
    const __m512 stored = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(offsets)));
    return _mm512_mask_mul_ps(stored, zero_points, stored, _mm512_xor_ps(scale, _mm512_set1_ps(-0.0f)));
}

// `Rows` rows by `Tiles` neighbouring tiles, all sums in registers.
template <int Bits, bool HasOffsets, int Rows, int Tiles>
VNNI_TARGET void tile_rows_vnni(const TiledWeight &w, const RoundedRows &a, std::int64_t tile, std::int64_t row,
                                float *y) {
    const std::int64_t blocks = w.blocks(), bytes = w.block_bytes();
    __m512 totals[Rows][Tiles];
    for (auto &total : totals)
        for (auto &part : total) part = _mm512_setzero_ps();
    [[maybe_unused]] const __mmask16 zero_points = w.offset == Offset::zero_point ? 0xffff : 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (int t = 0; t < Tiles; ++t) {
            const std::int64_t at = (tile + t) * blocks + block;
            __m512i weights[8];
            load_block<Bits>(w.values + at * bytes, weights);
            const __m512 scale = _mm512_cvtph_ps(
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w.scales + at * tile_width)));
            [[maybe_unused]] __m512 offset;
            if constexpr (HasOffsets) offset = offsets_vnni(w.offsets + at * tile_width, scale, zero_points);
            for (int r = 0; r < Rows; ++r) {
                const std::int8_t *x = a.values + (row + r) * w.inputs + block * block_length;
                const std::int64_t place = (row + r) * blocks + block;
                __m512i sum = _mm512_set1_epi32(a.corrections[place]);
                if constexpr (Rows == 1) {  // two chains, since one row alone cannot hide the latency
                    __m512i other = _mm512_setzero_si512();
                    for (int j = 0; j < 4; ++j) {
                        sum = _mm512_dpbusd_epi32(sum, weights[j], four_inputs_wide(x + 4 * j));
                        other = _mm512_dpbusd_epi32(other, weights[j + 4], four_inputs_wide(x + 16 + 4 * j));
                    }
                    sum = _mm512_add_epi32(sum, other);
                } else {
                    for (int j = 0; j < 8; ++j)
                        sum = _mm512_dpbusd_epi32(sum, weights[j], four_inputs_wide(x + 4 * j));
                }
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[place]));
                totals[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, totals[r][t]);
                if constexpr (HasOffsets)
                    totals[r][t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(a.sums[place]), totals[r][t]);
            }
        }
    }
    for (int t = 0; t < Tiles; ++t) {
        const std::int64_t n = (tile + t) * tile_width, columns = std::min(tile_width, w.outputs - n);
        const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
        const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + n) : _mm512_setzero_ps();
        for (int r = 0; r < Rows; ++r) {
            __m512 total = totals[r][t];
            if constexpr (Rows % 2 == 0)
                if (a.planes == 2) total = _mm512_add_ps(total, totals[++r][t]);
            _mm512_mask_storeu_ps(y + a.result(row + r) * w.outputs + n, mask, _mm512_add_ps(total, bias));
        }
    }
}

template <int Bits, bool HasOffsets, int Rows, int Tiles>
void rows_vnni(const TiledWeight &w, const RoundedRows &a, std::int64_t row, std::int64_t first, std::int64_t last,
               float *y) {
    std::int64_t tile = first;
    for (; tile + Tiles <= last; tile += Tiles) tile_rows_vnni<Bits, HasOffsets, Rows, Tiles>(w, a, tile, row, y);
    for (; tile < last; ++tile) tile_rows_vnni<Bits, HasOffsets, Rows, 1>(w, a, tile, row, y);
}

// Rows in groups of eight; each tile meets all of them while it lies in the first cache.
template <int Bits, bool HasOffsets>
void multiply_vnni(const TiledWeight &w, const RoundedRows &a, std::int64_t first, std::int64_t last, float *y) {
    if (a.rows == 1) return rows_vnni<Bits, HasOffsets, 1, 4>(w, a, 0, first, last, y);
    for (std::int64_t tile = first; tile < last; ++tile) {
        std::int64_t row = 0;
        for (; row + 8 <= a.rows; row += 8) tile_rows_vnni<Bits, HasOffsets, 8, 1>(w, a, tile, row, y);
        switch (a.rows - row) {
            case 7: tile_rows_vnni<Bits, HasOffsets, 7, 1>(w, a, tile, row, y); break;
            case 6: tile_rows_vnni<Bits, HasOffsets, 6, 1>(w, a, tile, row, y); break;
            case 5: tile_rows_vnni<Bits, HasOffsets, 5, 1>(w, a, tile, row, y); break;
            case 4: tile_rows_vnni<Bits, HasOffsets, 4, 1>(w, a, tile, row, y); break;
            case 3: tile_rows_vnni<Bits, HasOffsets, 3, 1>(w, a, tile, row, y); break;
            case 2: tile_rows_vnni<Bits, HasOffsets, 2, 1>(w, a, tile, row, y); break;
            case 1: tile_rows_vnni<Bits, HasOffsets, 1, 1>(w, a, tile, row, y); break;
            default: break;
        }
    }
}

bool has_vnni() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
    static const InstructionSet best = has_vnni()   ? InstructionSet::avx512_vnni
                                       : has_avx2() ? InstructionSet::avx2
                                                    : InstructionSet::portable;
    return best;
#else
    return InstructionSet::portable;
#endif
}

namespace {

void gate_values(const float *gate, const float *up, Gate kind, float *result, [[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    if (kind == Gate::silu && set != InstructionSet::portable) return gate_block_silu_avx2(gate, up, result);
#endif
    gate_block(gate, up, kind, result);
}

std::int32_t round_values(const float *x, std::int8_t *values, float *scale, [[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    if (set != InstructionSet::portable) return round_block_avx2(x, values, scale);
#endif
    return round_block(x, values, scale);
}

}  // namespace

void round_row(const float *x, const TiledWeight &weight, Gate gate, const RoundedRows &rounded, std::int64_t row,
               InstructionSet set) {
    const std::int64_t blocks = weight.blocks();
    const std::int32_t zero = weight.zero();
    float gated_values[block_length], left[block_length];
    for (std::int64_t block = 0; block < blocks; ++block) {
        const float *source = x + block * block_length;
        if (gate != Gate::none) {
            gate_values(source, source + weight.inputs, gate, gated_values, set);
            source = gated_values;
        }
        for (std::int64_t at = row * rounded.planes; at < (row + 1) * rounded.planes; ++at) {
            std::int8_t *values = rounded.values + at * weight.inputs + block * block_length;
            const std::int64_t place = at * blocks + block;
            const std::int32_t sum = round_values(source, values, rounded.scales + place, set);
            rounded.corrections[place] = -zero * sum;
            if (weight.offsets) rounded.sums[place] = rounded.scales[place] * static_cast<float>(sum);
            if (rounded.planes == 1) break;
            for (int i = 0; i < block_length; ++i) left[i] = source[i] - rounded.scales[place] * values[i];
            source = left;
        }
    }
}

void multiply_tiles(const TiledWeight &weight, const RoundedRows &rounded, std::int64_t first, std::int64_t last,
                    float *y, [[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    using Multiply = void (*)(const TiledWeight &, const RoundedRows &, std::int64_t, std::int64_t, float *);
    // by instruction set, bits (4, 8), and whether the weight has offsets
    static constexpr Multiply loops[2][2][2] = {
        {{multiply_avx2<4, false>, multiply_avx2<4, true>}, {multiply_avx2<8, false>, multiply_avx2<8, true>}},
        {{multiply_vnni<4, false>, multiply_vnni<4, true>}, {multiply_vnni<8, false>, multiply_vnni<8, true>}},
    };
    if (set != InstructionSet::portable)
        return loops[set == InstructionSet::avx512_vnni][weight.bits == 8][weight.offsets != nullptr](
            weight, rounded, first, last, y);
#endif
    multiply_portable(weight, rounded, first, last, y);
}

}  // namespace trtllm
