// Compares the rows of quantized_embedding.h with the elements that were tiled, for every form of a weight.
// Exits with 1 and says where at the first difference.
#include "runtime/native/quantized_embedding.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace trtllm;

namespace {

// A random weight, tiled, with what each element is worth beside it. Float16 numbers are whole or halves, so that every
// product and sum is exact.
struct Weight {
    std::vector<std::uint8_t> tiles;
    std::vector<std::uint16_t> scales, offsets;
    std::vector<float> exact;  // [N, K]

    static constexpr std::uint16_t stored[] = {0x0000, 0x3800, 0x3c00, 0x4800, 0x4b80, 0xc500};
    static constexpr float numbers[] = {0.0f, 0.5f, 1.0f, 8.0f, 15.0f, -5.0f};

    Weight(std::int64_t rows, std::int64_t width, int bits, Offset offset, std::mt19937 &random) {
        const std::int64_t blocks = width / block_length, places = (rows + tile_width - 1) / tile_width * blocks;
        tiles.resize(places * 64 * bits);
        scales.resize(places * tile_width);
        offsets.resize(places * tile_width);
        exact.resize(rows * width);
        for (auto &byte : tiles) byte = static_cast<std::uint8_t>(random());  // what lies beside a row is never its own
        const int lowest = bits == 8 ? -128 : offset == Offset::none ? -8 : 0;
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t k = 0; k < width; ++k) {
                const std::int64_t place = row / tile_width * blocks + k / block_length;
                const std::size_t one = (row + k / block_length) % 6, other = (row * 5 + k / block_length) % 6;
                scales[place * tile_width + row % tile_width] = stored[one];
                offsets[place * tile_width + row % tile_width] = stored[other];
                const int cell = static_cast<int>(random() % (1u << bits));
                put(place, row % tile_width, k % block_length, cell, bits);
                const float integer = static_cast<float>(cell + lowest);
                float &element = exact[row * width + k];
                element = numbers[one] * (offset == Offset::zero_point ? integer - numbers[other] : integer);
                if (offset == Offset::minimum) element += numbers[other];
            }
    }

    void put(std::int64_t place, std::int64_t column, std::int64_t k, int cell, int bits) {
        const std::int64_t within = bits == 8 ? k : k % 16;
        std::uint8_t &byte = tiles[place * 64 * bits + (within / 4 * tile_width + column) * 4 + within % 4];
        if (bits == 8) byte = static_cast<std::uint8_t>(cell);
        else byte = k < 16 ? (byte & 0xf0) | cell : (byte & 0x0f) | (cell << 4);
    }
};

int check(std::int64_t rows, std::int64_t width, int bits, Offset offset) {
    std::mt19937 random(static_cast<unsigned>(rows * 31 + width + bits));
    const Weight made(rows, width, bits, offset, random);
    const TiledWeight weight{made.tiles.data(), made.scales.data(), nullptr, rows, width, bits,
                             offset == Offset::none ? nullptr : made.offsets.data(), offset};
    std::vector<float> result(width + 1, -1.0f);
    for (std::int64_t row = 0; row < rows; ++row) {
        look_up_row(weight, row, result.data());
        for (std::int64_t k = 0; k < width; ++k)
            if (result[k] != made.exact[row * width + k]) {
                std::printf("wrong: row %ld, column %ld of %ldx%ld, bits %d, offset %d: %g is not %g\n", long(row), long(k),
                            long(rows), long(width), bits, int(offset), double(result[k]),
                            double(made.exact[row * width + k]));
                return 1;
            }
        if (result[width] != -1.0f) return std::printf("row %ld is written past its end\n", long(row)), 1;
    }
    return 0;
}

}  // namespace

int main() {
    int failures = 0;
    for (const int bits : {4, 8})
        for (const std::int64_t rows : {1, 16, 17, 50})
            for (const std::int64_t width : {32, 96, 160})
                for (const Offset offset : {Offset::none, Offset::minimum, Offset::zero_point})
                    failures += check(rows, width, bits, offset);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
