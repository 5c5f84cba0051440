// Ranges of a file that the page cache holds, mapped, so that they are read without a copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm {

struct MappedRange {
    void *base = nullptr;  // of the whole pages; null when nothing is mapped
    std::size_t length = 0;
    const std::uint8_t *bytes = nullptr;  // the first that was asked for
};

// Maps `count` bytes from `offset` of an open file, every page present. Nothing is mapped where the cache lacks a page
// (reading ahead serves that better), where the file ends before, or where the system cannot do it.
MappedRange map_cached(int descriptor, std::uint64_t offset, std::size_t count);

void unmap(const MappedRange &range);

}  // namespace trtllm
