// The calls of mapped.h on Linux; elsewhere nothing is mapped.
#include "checkpoints/native/mapped.h"

#ifdef __linux__
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace trtllm {

#ifdef __linux__

MappedRange map_cached(int descriptor, std::uint64_t offset, std::size_t count) {
    static const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
    struct stat status {};
    if (count == 0 || fstat(descriptor, &status) != 0 || offset + count > static_cast<std::uint64_t>(status.st_size))
        return {};
    const std::size_t before = offset % page, length = before + count;
    void *base = mmap(nullptr, length, PROT_READ, MAP_PRIVATE, descriptor, static_cast<off_t>(offset - before));
    if (base == MAP_FAILED) return {};
    const MappedRange range{base, length, static_cast<const std::uint8_t *>(base) + before};
    std::vector<unsigned char> pages((length + page - 1) / page);
    const bool is_cached = mincore(base, length, pages.data()) == 0 &&
                           std::all_of(pages.begin(), pages.end(), [](unsigned char found) { return found & 1; });
    if (is_cached && madvise(base, length, MADV_POPULATE_READ) == 0) return range;
    unmap(range);
    return {};
}

void unmap(const MappedRange &range) {
    if (range.base != nullptr) munmap(range.base, range.length);
}

#else

MappedRange map_cached(int, std::uint64_t, std::size_t) { return {}; }

void unmap(const MappedRange &) {}

#endif

}  // namespace trtllm
