// Compares the loops of scaled_linear.h with double precision over weights that are decoded independently, for every
// instruction set, and every row of a batch with the row alone, bit for bit; --bench times them.
#include "runtime/native/scaled_linear.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace trtllm;

namespace {

double e4m3(int byte) {
    const int exponent = byte >> 3 & 15, fraction = byte & 7;
    const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return byte & 0x80 ? -size : size;
}

double e2m1(int nibble) {
    const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return nibble & 8 ? -sizes[nibble & 7] : sizes[nibble & 7];
}

struct Case {
    std::vector<std::uint8_t> values, scales;
    std::vector<float> bias, x;
    std::vector<std::int8_t> integers;
    std::vector<float> row_scales;
    ScaledWeight weight{};
    std::int64_t rows = 0;
};

Case make_case(Element element, ScaleType type, std::int64_t n, std::int64_t k, std::int64_t block, std::int64_t rows,
               unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    Case test;
    test.weight = {nullptr, nullptr, nullptr, 0.5f, n, k, block, element, type};
    test.values.resize(static_cast<std::size_t>(test.weight.tiles() * test.weight.tile_bytes()));
    for (auto &byte : test.values) {
        byte = static_cast<std::uint8_t>(random());
        if (element == Element::e4m3 && (byte & 0x7f) == 0x7f) byte = 0;  // no NaN
    }
    const auto count = static_cast<std::size_t>(test.weight.tiles() * test.weight.blocks() * tile_width);
    test.scales.resize(count * (type == ScaleType::float32 ? 4 : 1));
    for (std::size_t i = 0; i < count; ++i) {
        const float scale = std::fabs(normal(random)) + 0.1f;
        if (type == ScaleType::float32) std::memcpy(&test.scales[4 * i], &scale, 4);
        else test.scales[i] = static_cast<std::uint8_t>(type == ScaleType::e4m3 ? random() % 0x7f : 120 + random() % 12);
    }
    for (std::int64_t i = 0; i < n; ++i) test.bias.push_back(normal(random));
    for (std::int64_t i = 0; i < rows * k; ++i) {
        test.x.push_back(normal(random));
        test.integers.push_back(static_cast<std::int8_t>(int(random() % 256) - 128));
    }
    for (std::int64_t i = 0; i < rows; ++i) test.row_scales.push_back(std::fabs(normal(random)));
    test.weight.values = test.values.data();
    test.weight.scales = test.scales.data();
    if (seed % 2) test.weight.bias = test.bias.data();
    test.rows = rows;
    return test;
}

double weight_of(const Case &test, std::int64_t n, std::int64_t k) {
    const ScaledWeight &w = test.weight;
    const std::uint8_t *tile = w.values + n / 16 * w.tile_bytes();
    const std::int64_t index = (n / 16 * w.blocks() + k / w.block) * 16 + n % 16;
    double scale = 0;
    if (w.scale_type == ScaleType::float32) {
        float stored;
        std::memcpy(&stored, w.scales + 4 * index, 4);
        scale = stored;
    } else {
        scale = w.scale_type == ScaleType::e4m3 ? e4m3(w.scales[index]) : std::exp2(w.scales[index] - 127);
    }
    scale *= w.factor;
    if (w.element == Element::e4m3) return e4m3(tile[k * 16 + n % 16]) * scale;
    if (w.element == Element::int8) return (int(tile[(k / 4 * 16 + n % 16) * 4 + k % 4]) - 128) * scale;
    return e2m1(k % 2 ? tile[k / 2 * 16 + n % 16] >> 4 : tile[k / 2 * 16 + n % 16] & 15) * scale;
}

void run(const Case &test, std::int64_t first_row, std::int64_t rows, float *y, InstructionSet set) {
    const ScaledWeight &w = test.weight;
    for (std::int64_t tile = 0; tile < w.tiles(); tile += 3) {
        const std::int64_t last = std::min(w.tiles(), tile + 3);
        if (w.element == Element::int8)
            multiply_integers(w, &test.integers[first_row * w.inputs], &test.row_scales[first_row], rows, tile, last, y, set);
        else
            multiply_floats(w, &test.x[first_row * w.inputs], rows, tile, last, y, set);
    }
}

// Each sum may stray by K roundings of its terms' magnitudes, an int8 sum by those of its scale and bias.
bool check(const Case &test, InstructionSet set) {
    const ScaledWeight &w = test.weight;
    std::vector<float> y(test.rows * w.outputs + 1, 12345.0f), alone(w.outputs);
    run(test, 0, test.rows, y.data(), set);
    bool fine = y.back() == 12345.0f;
    for (std::int64_t row = 0; row < test.rows; ++row) {
        run(test, row, 1, alone.data(), set);
        fine = fine && std::memcmp(alone.data(), &y[row * w.outputs], sizeof(float) * w.outputs) == 0;
        for (std::int64_t n = 0; n < w.outputs; ++n) {
            double sum = w.bias ? w.bias[n] : 0.0, size = std::fabs(sum);
            for (std::int64_t k = 0; k < w.inputs; ++k) {
                const double x = w.element == Element::int8
                                     ? double(test.integers[row * w.inputs + k]) * test.row_scales[row]
                                     : test.x[row * w.inputs + k];
                sum += weight_of(test, n, k) * x;
                size += std::fabs(weight_of(test, n, k) * x);
            }
            const double roundings = w.element == Element::int8 ? 6 : static_cast<double>(w.inputs + w.blocks() + 4);
            fine = fine && std::fabs(y[row * w.outputs + n] - sum) <= roundings * 0x1p-24 * size;
        }
    }
    return fine;
}

int check_all() {
    struct Kind { Element element; ScaleType type; std::int64_t n, k, block; };
    const Kind kinds[] = {{Element::e4m3, ScaleType::float32, 40, 96, 96},  {Element::e4m3, ScaleType::float32, 16, 200, 128},
                          {Element::e2m1, ScaleType::e4m3, 33, 64, 16},     {Element::e2m1, ScaleType::e8m0, 17, 96, 32},
                          {Element::int8, ScaleType::float32, 50, 64, 64},  {Element::int8, ScaleType::float32, 16, 4, 4},
                          {Element::e4m3, ScaleType::float32, 7, 33, 33}};
    int cases = 0, failures = 0;
    unsigned seed = 0;
    for (const Kind &kind : kinds)
        for (const std::int64_t rows : {1, 3, 8, 13})
            for (int set = 0; set <= static_cast<int>(best_instruction_set()); ++set) {
                const Case test = make_case(kind.element, kind.type, kind.n, kind.k, kind.block, rows, ++seed);
                ++cases;
                if (check(test, static_cast<InstructionSet>(set))) continue;
                ++failures;
                std::printf("FAILED element %d N %ld K %ld rows %ld set %d\n", static_cast<int>(kind.element), kind.n, kind.k,
                            rows, set);
            }
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures ? 1 : 0;
}

void bench(const char *name, Element element, ScaleType type, std::int64_t block, std::int64_t rows) {
    const std::int64_t n = 1536, k = 576;
    const Case test = make_case(element, type, n, k, block, rows, 1);
    std::vector<float> y(rows * n);
    const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
    double best = 1e30;
    for (const double limit = now() + 0.5; now() < limit;) {
        const double begin = now();
        run(test, 0, rows, y.data(), best_instruction_set());
        best = std::min(best, now() - begin);
    }
    std::printf("%-6s rows %3ld: %9.0f ns, %6.1f GFLOP/s\n", name, rows, best * 1e9, 2e-9 * n * k * rows / best);
}

}  // namespace

int main(int count, char **arguments) {
    if (count > 1 && std::strcmp(arguments[1], "--bench") == 0) {
        for (const std::int64_t rows : {1, 4, 64}) {
            bench("e4m3", Element::e4m3, ScaleType::float32, 576, rows);
            bench("nvfp4", Element::e2m1, ScaleType::e4m3, 16, rows);
            bench("mxfp4", Element::e2m1, ScaleType::e8m0, 32, rows);
            bench("int8", Element::int8, ScaleType::float32, 576, rows);
        }
        return 0;
    }
    return check_all();
}
