// SHA-256 of two messages of which one is the end of the other so far: a weight, and the file that it is written to.
//
// The instructions of x86 wait for each other within one message. Where both messages have the same blocks, those are
// expanded once and the rounds of both are interleaved, so that two digests cost about what one does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace trtllm {

// Whether the processor has the instructions that this is written with.
bool has_sha256_instructions();

struct Sha256State {
    std::array<std::uint32_t, 8> words{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::uint8_t, 64> rest{};  // bytes of a block that is not complete
    std::uint64_t length = 0;             // bytes

    std::array<std::uint8_t, 32> digest() const;
};

// The message goes on with these bytes.
void update(Sha256State &state, const std::uint8_t *bytes, std::size_t count);

// Both messages go on with these bytes.
void update_both(Sha256State &one, Sha256State &other, const std::uint8_t *bytes, std::size_t count);

}  // namespace trtllm
