// Compares the loops of quantized_linear.cc, for every instruction set of this machine, with sums in double precision.
// Exits with 1 and says where at the first difference. `--bench` prints the speed instead.
#include "runtime/native/quantized_linear.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace trtllm;

namespace {

struct Case {
    std::int64_t outputs, inputs, rows;
    int bits;
    Gate gate;
    bool bias;
    Offset offset = Offset::none;
    int planes = 1;
};

// A random weight, tiled, with its values beside it.
struct Weight {
    std::vector<std::uint8_t> tiles;
    std::vector<std::uint16_t> scales;
    std::vector<std::uint16_t> offsets;
    std::vector<float> bias;
    std::vector<double> exact;  // [N, K]: scale * integer
    std::vector<double> added;  // [N, K/32]: what the offset adds to each

    Weight(const Case &c, std::mt19937 &random) {
        const std::int64_t tile_count = (c.outputs + 15) / 16, blocks = c.inputs / 32;
        tiles.assign(tile_count * blocks * 64 * c.bits, c.bits == 8 ? 128 : 0x88);
        scales.assign(tile_count * blocks * 16, 0);
        offsets = scales;
        added.assign(c.outputs * blocks, 0.0);
        exact.resize(c.outputs * c.inputs);
        for (int i = 0; i < c.outputs; ++i) bias.push_back(static_cast<float>(random() % 100) / 10);
        const bool counts_from_zero = c.bits == 4 && c.offset != Offset::none;
        const int lowest = c.bits == 8 ? (c.offset == Offset::none ? -127 : -128) : counts_from_zero ? 0 : -8;
        const int highest = c.bits == 8 ? 127 : counts_from_zero ? 15 : 7;
        for (std::int64_t n = 0; n < c.outputs; ++n)
            for (std::int64_t k = 0; k < c.inputs; ++k) {
                const std::int64_t at = (n / 16) * blocks + k / 32;
                const bool negative = (n + k / 32) % 3 == 0;  // a scale may be negative
                scales[at * 16 + n % 16] = negative ? 0xac00 : 0x2c00;  // -1/16 or 1/16 as float16
                const int value = lowest + static_cast<int>(random() % (highest - lowest + 1));
                exact[n * c.inputs + k] = (negative ? -value : value) / 16.0;
                place(at, n % 16, k % 32, counts_from_zero ? value - 8 : value, c.bits);
                if (k % 32 == 0 && c.offset != Offset::none) offset(c, at, n, k / 32, random, negative ? -0.0625 : 0.0625);
            }
    }

    // Float16 values that are whole numbers or small fractions: 0x3c00 is 1, 0x4800 is 8, 0x4b80 is 15, 0xb266 about -0.2.
    void offset(const Case &c, std::int64_t at, std::int64_t n, std::int64_t block, std::mt19937 &random, double scale) {
        static constexpr std::uint16_t stored[] = {0x0000, 0x3c00, 0x4800, 0x4b80, 0xb266, 0xc500};
        static constexpr double values[] = {0.0, 1.0, 8.0, 15.0, -0.199951171875, -5.0};
        const std::size_t chosen = random() % 6;
        offsets[at * 16 + n % 16] = stored[chosen];
        added[n * (c.inputs / 32) + block] = c.offset == Offset::minimum ? values[chosen] : -scale * values[chosen];
    }

    void place(std::int64_t block, std::int64_t column, std::int64_t k, int value, int bits) {
        if (bits == 8) {
            tiles[block * 512 + ((k / 4) * 16 + column) * 4 + k % 4] = static_cast<std::uint8_t>(value + 128);
            return;
        }
        std::uint8_t &pair = tiles[block * 256 + (((k % 16) / 4) * 16 + column) * 4 + k % 4];
        pair = k < 16 ? (pair & 0xf0) | (value + 8) : (pair & 0x0f) | ((value + 8) << 4);
    }
};

struct Rounded {
    std::vector<std::int8_t> values;
    std::vector<float> scales;
    std::vector<std::int32_t> corrections;
    std::vector<float> sums;
    RoundedRows rows;

    explicit Rounded(const Case &c)
        : values(c.planes * c.rows * c.inputs), scales(values.size() / 32), corrections(values.size() / 32),
          sums(values.size() / 32),
          rows{values.data(), scales.data(), corrections.data(), c.planes * c.rows, sums.data(), c.planes} {}

    double scale(std::int64_t row, std::int64_t k, std::int64_t inputs) const { return scales[(row * inputs + k) / 32]; }

    // What a row of activations has become.
    double value(const Case &c, std::int64_t row, std::int64_t k) const {
        double sum = 0.0;
        for (std::int64_t at = row * c.planes; at < (row + 1) * c.planes; ++at)
            sum += values[at * c.inputs + k] * scale(at, k, c.inputs);
        return sum;
    }
};

std::vector<float> random_rows(const Case &c, std::mt19937 &random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(c.rows * c.inputs * (c.gate == Gate::none ? 1 : 2));
    for (auto &value : x) value = normal(random);
    std::fill_n(x.begin(), 32, 0.0f);  // a block of zeros
    return x;
}

double gate_value(double x, Gate gate) {
    if (gate == Gate::silu) return x / (1 + std::exp(-x));
    if (gate == Gate::gelu_tanh) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
}

// The rounded activations lie within half a step of the exact ones (and a little, for float32 gates). A second plane's
// step is 254 times as small as the first's: its largest element is at most half a step of that.
bool rounds_well(const Case &c, const std::vector<float> &x, const Rounded &rounded) {
    for (std::int64_t row = 0; row < c.rows; ++row)
        for (std::int64_t k = 0; k < c.inputs; ++k) {
            const float *source = x.data() + row * c.inputs * (c.gate == Gate::none ? 1 : 2);
            const double exact = c.gate == Gate::none ? source[k] : gate_value(source[k], c.gate) * source[c.inputs + k];
            const double scale = rounded.scale(row * c.planes + c.planes - 1, k, c.inputs);
            if (c.planes == 2 && scale > rounded.scale(row * 2, k, c.inputs) * 1.001 / 254) return false;
            // subtracting the first plane in float32 errs by an ulp of its largest value
            const double roundings = c.planes == 2 ? 127 * 1.2e-7 * rounded.scale(row * 2, k, c.inputs) : 0.0;
            const double gates = c.gate == Gate::none ? 0.0 : 1e-5;
            if (std::fabs(rounded.value(c, row, k) - exact) > 0.5001 * scale + roundings + gates) return false;
        }
    return true;
}

bool multiplies_well(const Case &c, const Weight &weight, const Rounded &rounded, const std::vector<float> &y) {
    for (std::int64_t row = 0; row < c.rows; ++row)
        for (std::int64_t n = 0; n < c.outputs; ++n) {
            double sum = c.bias ? weight.bias[n] : 0.0, magnitude = std::fabs(sum);
            for (std::int64_t k = 0; k < c.inputs; ++k) {
                const double x = rounded.value(c, row, k);
                const double product = weight.exact[n * c.inputs + k] * x;
                const double offset = weight.added[(n * c.inputs + k) / 32] * x;
                sum += product + offset;
                magnitude += std::fabs(product) + std::fabs(offset);
            }
            // integer sums are exact; each block adds a few float32 roundings of partial sums below the magnitude
            const double bound = magnitude * 1.2e-7 * ((c.offset == Offset::none ? 1 : 2) * (c.inputs / 32) + 4 + c.planes);
            if (!(std::fabs(y[row * c.outputs + n] - sum) <= bound + 1e-12)) return false;
        }
    return true;
}

int check(const Case &c, InstructionSet set) {
    std::mt19937 random(static_cast<unsigned>(c.outputs * 31 + c.inputs + c.rows * 7 + c.bits));
    const Weight weight(c, random);
    const auto x = random_rows(c, random);
    Rounded rounded(c);
    std::vector<float> y(c.rows * c.outputs, -1e30f);
    const TiledWeight tiled{weight.tiles.data(), weight.scales.data(), c.bias ? weight.bias.data() : nullptr,
                            c.outputs, c.inputs, c.bits,
                            c.offset == Offset::none ? nullptr : weight.offsets.data(), c.offset};
    const std::int64_t width = c.inputs * (c.gate == Gate::none ? 1 : 2);
    for (std::int64_t row = 0; row < c.rows; ++row)
        round_row(x.data() + row * width, tiled, c.gate, rounded.rows, row, set);
    const std::int64_t middle = tiled.tiles() / 2;
    multiply_tiles(tiled, rounded.rows, 0, middle, y.data(), set);
    multiply_tiles(tiled, rounded.rows, middle, tiled.tiles(), y.data(), set);
    const bool good = rounds_well(c, x, rounded) && multiplies_well(c, weight, rounded, y);
    if (!good)
        std::printf("wrong: set %d, N %ld, K %ld, rows %ld, bits %d, gate %d, offset %d, planes %d\n", int(set), long(c.outputs),
                    long(c.inputs), long(c.rows), c.bits, int(c.gate), int(c.offset), c.planes);
    return good ? 0 : 1;
}

void bench(const Case &c) {
    std::mt19937 random(1);
    const Weight weight(c, random);
    const auto x = random_rows(c, random);
    Rounded rounded(c);
    std::vector<float> y(c.rows * c.outputs);
    const TiledWeight tiled{weight.tiles.data(), weight.scales.data(), nullptr, c.outputs, c.inputs, c.bits,
                            c.offset == Offset::none ? nullptr : weight.offsets.data(), c.offset};
    double best = 1e9;
    for (int repeat = 0; repeat < 20; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (std::int64_t row = 0; row < c.rows; ++row)
            round_row(x.data() + row * c.inputs, tiled, Gate::none, rounded.rows, row);
        multiply_tiles(tiled, rounded.rows, 0, tiled.tiles(), y.data());
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    const std::size_t offset_bytes = c.offset == Offset::none ? 0 : 2 * weight.offsets.size();
    std::printf("planes %d, offset %d, bits %d, N %5ld, K %4ld, rows %3ld: %8.1f us, %6.1f G multiply-adds/s, %5.1f GB/s of weights\n",
                c.planes, int(c.offset), c.bits,
                long(c.outputs), long(c.inputs), long(c.rows), best * 1e6,
                double(c.outputs) * c.inputs * c.rows / best / 1e9,
                double(weight.tiles.size() + 2 * weight.scales.size() + offset_bytes) / best / 1e9);
}

}  // namespace

int main(int count, char **arguments) {
    if (count > 1 && std::strcmp(arguments[1], "--bench") == 0) {
        for (const int bits : {4, 8})
            for (const std::int64_t rows : {1, 8, 128})
                for (const Offset offset : {Offset::none, Offset::minimum, Offset::zero_point})
                    for (const int planes : {1, 2})
                        bench({3072, 576, rows, bits, Gate::none, false, offset, planes});
        return 0;
    }
    int failures = 0;
    for (int set = 0; set <= int(best_instruction_set()); ++set)
        for (const int bits : {4, 8})
            for (const std::int64_t outputs : {1, 16, 40, 112})
                for (const std::int64_t inputs : {32, 96, 160})
                    for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 19})
                        for (const Gate gate : {Gate::none, Gate::silu, Gate::gelu_tanh, Gate::gelu})
                            for (const Offset offset : {Offset::none, Offset::minimum, Offset::zero_point})
                                for (const int planes : {1, 2})
                                    failures += check({outputs, inputs, rows, bits, gate, rows % 2 == 0, offset, planes},
                                                      InstructionSet(set));
    std::printf("%d failures\n", failures);
    return failures != 0;
}
