// Quantization to blocks: the choice of instructions, the threads, and the scalar form.
#include "checkpoints/native/quantize.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "checkpoints/native/parallel.h"
#include "checkpoints/native/scale_search.h"
#include "checkpoints/native/tiles.h"
#include "checkpoints/native/vectors.h"

namespace trtllm {
namespace {

// Elements for which a thread is worth its start: half a millisecond of the plain rules, more of a search.
constexpr std::size_t kGrainElements = std::size_t{1} << 20, kSearchGrainElements = std::size_t{1} << 16;

float load(const void *source, Float dtype, std::size_t index) {
    if (dtype == Float::float32) return static_cast<const float *>(source)[index];
    const auto half = static_cast<const std::uint16_t *>(source)[index];
    return dtype == Float::float16 ? from_float16(half) : from_bfloat16(half);
}

// The block's scale before rounding; NaN or infinity when an element is.
float ideal_scale(const BlockJob &job, std::size_t first) {
    std::uint32_t magnitude = 0, largest = 0;  // as unsigned bits every negative is above every positive
    for (std::size_t i = 0; i < job.block_size; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(load(job.source, job.dtype, first + i));
        magnitude = std::max(magnitude, bits & 0x7fffffffu);
        largest = std::max(largest, bits);
    }
    if (magnitude == 0) return 0.0f;
    const float maximum = std::bit_cast<float>(magnitude);
    if (job.bits == 8) return maximum / 127.0f;
    return largest == (magnitude | 0x80000000u) ? maximum / 8.0f : maximum / -8.0f;
}

float store_scale(const BlockJob &job, std::size_t block, float scale) {
    scale += 0.0f;  // a scale that underflowed is no negative zero
    if (job.scale_dtype == Float::float32) {
        static_cast<float *>(job.scales)[block] = scale;
        return scale;
    }
    const bool is_float16 = job.scale_dtype == Float::float16;
    std::uint16_t half = is_float16 ? to_float16(scale) : to_bfloat16(scale);
    if ((half & 0x7fffu) == 0) half = 0;
    static_cast<std::uint16_t *>(job.scales)[block] = half;
    return is_float16 ? from_float16(half) : from_bfloat16(half);
}

int quantize_one(float value, float scale, int lowest, int highest) {
    if (scale == 0.0f) return 0;
    return std::clamp(static_cast<int>(std::nearbyint(value / scale)), lowest, highest);
}

void quantize_block(const BlockJob &job, std::size_t first, float scale) {
    if (job.bits == 8) {
        for (std::size_t i = first; i < first + job.block_size; ++i)
            job.values[i] = static_cast<std::uint8_t>(quantize_one(load(job.source, job.dtype, i), scale, -127, 127));
        return;
    }
    for (std::size_t i = first; i < first + job.block_size; i += 2) {
        const int low = quantize_one(load(job.source, job.dtype, i), scale, -8, 7);
        const int high = quantize_one(load(job.source, job.dtype, i + 1), scale, -8, 7);
        job.values[i / 2] = static_cast<std::uint8_t>((low & 0xf) | ((high & 0xf) << 4));
    }
}

}  // namespace

Outcome quantize_range_scalar(const BlockJob &job, std::size_t begin, std::size_t end) {
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * job.block_size;
        const float ideal = ideal_scale(job, first);
        if (!std::isfinite(ideal)) return {Fault::not_finite, block};
        const float scale = store_scale(job, block, ideal);
        if (!std::isfinite(scale)) return {Fault::scale_overflow, block};
        quantize_block(job, first, scale);
    }
    return {};
}

Outcome quantize_range_search(const BlockJob &job, std::size_t begin, std::size_t end) {
    float block_values[kLongestBlock];
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * job.block_size;
        if (!std::isfinite(ideal_scale(job, first))) return {Fault::not_finite, block};
        for (std::size_t i = 0; i < job.block_size; ++i) block_values[i] = load(job.source, job.dtype, first + i);
        const float plain = absmax_scale(block_values, job.block_size, job.bits, job.scale_dtype);
        if (!std::isfinite(plain)) return {Fault::scale_overflow, block};
        const float *importance = job.importance != nullptr ? job.importance + first % job.columns : nullptr;
        const float scale =
            job.bits == 4 ? search_scale4(block_values, importance, job.block_size, plain, job.scale_dtype) : plain;
        store_scale(job, block, scale);
        store_integers(block_values, job.block_size, scale, job.bits, job.values + first * job.bits / 8);
    }
    return {};
}

Outcome quantize_range_minima(const BlockJob &job, std::size_t begin, std::size_t end) {
    float elements[kLongestBlock];
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * job.block_size;
        if (!std::isfinite(ideal_scale(job, first))) return {Fault::not_finite, block};
        for (std::size_t i = 0; i < job.block_size; ++i) elements[i] = load(job.source, job.dtype, first + i);
        Affine form = plain_affine(elements, job.block_size);
        if (!std::isfinite(form.scale) || !std::isfinite(form.minimum)) return {Fault::scale_overflow, block};
        const float *importance = job.importance != nullptr ? job.importance + first % job.columns : nullptr;
        if (job.search) form = search_affine4(elements, importance, job.block_size, form);
        store_scale(job, block, form.scale);
        job.minima[block] = to_float16(form.minimum);
        store_counted(elements, job.block_size, form, job.values + first / 2);
    }
    return {};
}

namespace {

Outcome quantize_range(const BlockJob &job, std::size_t begin, std::size_t end) {
    if (job.minima != nullptr) return quantize_range_minima(job, begin, end);
    if (job.search) return quantize_range_search(job, begin, end);
#ifdef TRTLLM_AVX2
    if (has_avx2()) return quantize_range_avx2(job, begin, end);
#endif
    return quantize_range_scalar(job, begin, end);
}

// Calls range(begin, end) on parts of [0, count) and returns the first fault.
template <typename Range>
Outcome first_fault(std::size_t count, std::size_t grain, int threads, const Range &range) {
    std::mutex mutex;
    Outcome first;
    parallel_ranges(count, grain, threads, [&](std::size_t begin, std::size_t end) {
        const Outcome outcome = range(begin, end);
        if (outcome.fault == Fault::none) return;
        const std::lock_guard lock(mutex);
        if (first.fault == Fault::none || outcome.block < first.block) first = outcome;
    });
    return first;
}

}  // namespace

Outcome quantize_blocks(const BlockJob &job, std::size_t blocks, int threads) {
    const std::size_t grain = job.search ? kSearchGrainElements : kGrainElements;
    return first_fault(blocks, grain / job.block_size, threads,
                       [&](std::size_t begin, std::size_t end) { return quantize_range(job, begin, end); });
}

Outcome quantize_tiles(const BlockJob &job, std::size_t rows, std::size_t row_blocks, int threads) {
    constexpr std::size_t height = 16;
    const std::size_t tile_blocks = height * row_blocks, block_bytes = job.block_size * job.bits / 8;
    const std::size_t grain = (job.search ? kSearchGrainElements : kGrainElements) / (tile_blocks * job.block_size) + 1;
    return first_fault((rows + height - 1) / height, grain, threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::uint8_t> values(tile_blocks * block_bytes);
        BlockJob part = job;
        part.values = values.data();
        for (std::size_t tile = begin; tile < end; ++tile) {
            const std::size_t first = tile * tile_blocks, height_here = std::min(height, rows - tile * height);
            part.source = static_cast<const std::uint8_t *>(job.source) + first * job.block_size * size_of(job.dtype);
            part.scales = static_cast<std::uint8_t *>(job.scales) + first * size_of(job.scale_dtype);
            const Outcome outcome = quantize_range(part, 0, height_here * row_blocks);
            if (outcome.fault != Fault::none) return Outcome{outcome.fault, first + outcome.block};
            tile_values(values.data(), height_here, row_blocks, job.bits, job.values + first * block_bytes, 0, 1);
        }
        return Outcome{};
    });
}

}  // namespace trtllm
