// The random numbers of decoding: Philox4x32-10, a counter-based generator, so that every draw has an address.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace trtllm::executor {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

constexpr PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(second),
                   static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(first)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter;
}

// In [0, 1), a multiple of 2^-53.
constexpr double uniform_draw(std::uint64_t seed, std::int32_t sequence_index, std::uint64_t token_number) {
    const PhiloxCounter counter = {static_cast<std::uint32_t>(token_number),
                                   static_cast<std::uint32_t>(token_number >> 32),
                                   static_cast<std::uint32_t>(sequence_index), 0};
    const auto bits = philox4x32(counter, {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
    const std::uint64_t wide = (std::uint64_t{bits[1]} << 32 | bits[0]) >> 11;
    return static_cast<double>(wide) * 0x1p-53;
}

}  // namespace trtllm::executor
