// SHA-256 (FIPS 180-4) with the SHA instructions of x86, of one message or of two that have the same blocks.
#include "checkpoints/native/sha256.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define TRTLLM_SHA __attribute__((target("sha,sse4.1,ssse3")))
#endif

namespace trtllm {

#ifdef TRTLLM_SHA
namespace {

constexpr std::size_t kBlock = 64;

alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The eight words as the instructions want them: a b e f and c d g h.
struct Registers {
    __m128i abef, cdgh;
};

TRTLLM_SHA inline Registers loaded(const std::uint32_t *words) {
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words)), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words + 4)), 0x1b);
    return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xf0)};
}

TRTLLM_SHA inline void store(const Registers &registers, std::uint32_t *words) {
    const __m128i feba = _mm_shuffle_epi32(registers.abef, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(registers.cdgh, 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(words), _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(words + 4), _mm_alignr_epi8(dchg, feba, 8));
}

TRTLLM_SHA inline void four_rounds(Registers &registers, __m128i words) {
    registers.cdgh = _mm_sha256rnds2_epu32(registers.cdgh, registers.abef, words);
    registers.abef = _mm_sha256rnds2_epu32(registers.abef, registers.cdgh, _mm_shuffle_epi32(words, 0x0e));
}

template <int Count>
TRTLLM_SHA void compress(std::uint32_t *const (&states)[Count], const std::uint8_t *bytes, std::size_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    Registers registers[Count];
    for (int i = 0; i < Count; ++i) registers[i] = loaded(states[i]);
    for (; blocks > 0; --blocks, bytes += kBlock) {
        Registers before[Count];
        for (int i = 0; i < Count; ++i) before[i] = registers[i];
        __m128i words[16];
#pragma GCC unroll 16
        for (int step = 0; step < 16; ++step) {
            if (step < 4) {
                words[step] = _mm_shuffle_epi8(
                    _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + 16 * step)), swap);
            } else {
                const __m128i expanded = _mm_add_epi32(_mm_sha256msg1_epu32(words[step - 4], words[step - 3]),
                                                       _mm_alignr_epi8(words[step - 1], words[step - 2], 4));
                words[step] = _mm_sha256msg2_epu32(expanded, words[step - 1]);
            }
            const __m128i added =
                _mm_add_epi32(words[step], _mm_load_si128(reinterpret_cast<const __m128i *>(kRound + 4 * step)));
            for (int i = 0; i < Count; ++i) four_rounds(registers[i], added);
        }
        for (int i = 0; i < Count; ++i) {
            registers[i].abef = _mm_add_epi32(registers[i].abef, before[i].abef);
            registers[i].cdgh = _mm_add_epi32(registers[i].cdgh, before[i].cdgh);
        }
    }
    for (int i = 0; i < Count; ++i) store(registers[i], states[i]);
}

// Completes the block that has begun; returns how many bytes that took.
std::size_t complete(Sha256State &state, const std::uint8_t *bytes, std::size_t count) {
    const std::size_t begun = state.length % kBlock;
    const std::size_t taken = begun == 0 ? 0 : std::min(count, kBlock - begun);
    std::memcpy(state.rest.data() + begun, bytes, taken);
    if (begun + taken == kBlock) compress<1>({state.words.data()}, state.rest.data(), 1);
    state.length += taken;
    return taken;
}

}  // namespace

bool has_sha256_instructions() {
    static const bool has = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1") &&
               __builtin_cpu_supports("ssse3");
    }();
    return has;
}

void update(Sha256State &state, const std::uint8_t *bytes, std::size_t count) {
    const std::size_t taken = complete(state, bytes, count);
    bytes += taken, count -= taken;
    compress<1>({state.words.data()}, bytes, count / kBlock);
    std::memcpy(state.rest.data(), bytes + count / kBlock * kBlock, count % kBlock);
    state.length += count;
}

void update_both(Sha256State &one, Sha256State &other, const std::uint8_t *bytes, std::size_t count) {
    if (one.length % kBlock != other.length % kBlock) {
        update(one, bytes, count);
        update(other, bytes, count);
        return;
    }
    const std::size_t taken = complete(one, bytes, count);
    complete(other, bytes, count);
    bytes += taken, count -= taken;
    compress<2>({one.words.data(), other.words.data()}, bytes, count / kBlock);
    for (Sha256State *state : {&one, &other}) {
        std::memcpy(state->rest.data(), bytes + count / kBlock * kBlock, count % kBlock);
        state->length += count;
    }
}

#else

bool has_sha256_instructions() { return false; }

void update(Sha256State &, const std::uint8_t *, std::size_t) {}

void update_both(Sha256State &, Sha256State &, const std::uint8_t *, std::size_t) {}

#endif

std::array<std::uint8_t, 32> Sha256State::digest() const {
    Sha256State last = *this;
    const std::uint8_t padding[72] = {0x80};
    std::uint8_t bits[8];
    for (int i = 0; i < 8; ++i) bits[i] = static_cast<std::uint8_t>(length * 8 >> (56 - 8 * i));
    update(last, padding, 1 + (119 - length % 64) % 64);
    update(last, bits, sizeof bits);
    std::array<std::uint8_t, 32> result{};
    for (int i = 0; i < 32; ++i) result[i] = static_cast<std::uint8_t>(last.words[i / 4] >> (24 - 8 * (i % 4)));
    return result;
}

}  // namespace trtllm
