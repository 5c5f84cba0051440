// The column loop of GPTQ for a few rows at a time: errors spread within a span at once, beyond it when it is done.
#include "checkpoints/native/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "checkpoints/native/floats.h"
#include "checkpoints/native/parallel.h"
#include "checkpoints/native/scale_search.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRTLLM_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define TRTLLM_CLONES
#endif

namespace trtllm {
namespace {

constexpr std::size_t kSpan = 128;  // columns whose errors are spread beyond them together
constexpr std::size_t kRows = 8;    // rows that share a read of the factor

// y -= error * u, elementwise.
TRTLLM_CLONES void subtract(float *y, const float *u, float error, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) y[i] -= error * u[i];
}

// One row in the order of rounding.
struct Row {
    std::vector<float> weights;
    std::vector<float> errors;
    std::vector<float> integers;
};

class RowQuantizer {
public:
    explicit RowQuantizer(const GptqJob &job) : job_(job), rows_(kRows), forms_(kRows) {
        for (auto &row : rows_) row = {std::vector<float>(job.columns), std::vector<float>(kSpan), {}};
        for (auto &row : rows_) row.integers.resize(job.columns);
        for (auto &forms : forms_) forms.resize(job.columns / job.block_size);
    }

    bool run(std::size_t first, std::size_t count) {
        for (std::size_t r = 0; r < count; ++r)
            if (!load(first + r, r)) return false;
        for (std::size_t begin = 0; begin < job_.columns; begin += kSpan) {
            const std::size_t end = std::min(begin + kSpan, job_.columns);
            for (std::size_t r = 0; r < count; ++r)
                if (!round_span(r, begin, end)) return false;
            for (std::size_t j = begin; j < end; ++j)
                for (std::size_t r = 0; r < count; ++r)
                    subtract(rows_[r].weights.data() + end, job_.factor + j * job_.columns + end,
                             rows_[r].errors[j - begin], job_.columns - end);
        }
        for (std::size_t r = 0; r < count; ++r) store(first + r, r);
        return true;
    }

private:
    bool load(std::size_t index, std::size_t r) {
        const float *source = job_.weights + index * job_.columns;
        for (std::size_t j = 0; j < job_.columns; ++j) rows_[r].weights[j] = source[job_.order[j]];
        if (!job_.static_scales) return true;
        for (std::size_t block = 0; block < forms_[r].size(); ++block)
            if (!choose_scale(r, block, source + block * job_.block_size)) return false;
        return true;
    }

    bool choose_scale(std::size_t r, std::size_t block, const float *elements) {
        const float *importance = job_.importance + block * job_.block_size;
        Affine &form = forms_[r][block];
        if (job_.minima != nullptr) {
            form = plain_affine(elements, job_.block_size);
            if (!std::isfinite(form.scale) || !std::isfinite(form.minimum)) return false;
            form = search_affine4(elements, importance, job_.block_size, form);
            return true;
        }
        form.scale = absmax_scale(elements, job_.block_size, job_.bits, Float::float16);
        if (!std::isfinite(form.scale)) return false;
        if (job_.bits == 4)
            form.scale = search_scale4(elements, importance, job_.block_size, form.scale, Float::float16);
        return true;
    }

    bool round_span(std::size_t r, std::size_t begin, std::size_t end) {
        Row &row = rows_[r];
        for (std::size_t j = begin; j < end; ++j) {
            const std::size_t column = static_cast<std::size_t>(job_.order[j]), block = column / job_.block_size;
            const bool begins_block = !job_.static_scales && j % job_.block_size == 0;
            if (begins_block && !choose_scale(r, block, row.weights.data() + j)) return false;
            const Affine &form = forms_[r][block];
            const float integer = job_.minima != nullptr ? counted_integer(row.weights[j], form)
                                                         : rounded_integer(row.weights[j], form.scale, job_.bits);
            const float *u = job_.factor + j * job_.columns;
            const float error = (row.weights[j] - (integer * form.scale + form.minimum)) / u[j];
            row.integers[column] = job_.minima != nullptr ? integer - 8.0f : integer;
            row.errors[j - begin] = error;
            subtract(row.weights.data() + j + 1, u + j + 1, error, end - j - 1);
        }
        return true;
    }

    void store(std::size_t index, std::size_t r) {
        const std::size_t blocks = forms_[r].size();
        store_integers_of_row(rows_[r].integers, job_.values + index * job_.columns * job_.bits / 8);
        for (std::size_t block = 0; block < blocks; ++block) {
            job_.scales[index * blocks + block] = to_float16(forms_[r][block].scale);
            if (job_.minima != nullptr) job_.minima[index * blocks + block] = to_float16(forms_[r][block].minimum);
        }
    }

    void store_integers_of_row(const std::vector<float> &integers, std::uint8_t *values) const {
        for (std::size_t first = 0; first < job_.columns; first += job_.block_size)
            store_integers(&integers[first], job_.block_size, 1.0f, job_.bits, values + first * job_.bits / 8);
    }

    const GptqJob &job_;
    std::vector<Row> rows_;
    std::vector<std::vector<Affine>> forms_;
};

}  // namespace

bool gptq_rows(const GptqJob &job, std::size_t rows, int threads) {
    std::atomic<bool> is_good = true;
    parallel_ranges(rows, kRows, threads, [&](std::size_t begin, std::size_t end) {
        RowQuantizer quantizer(job);
        for (std::size_t first = begin; first < end && is_good; first += kRows)
            if (!quantizer.run(first, std::min(kRows, end - first))) is_good = false;
    });
    return is_good;
}

}  // namespace trtllm
