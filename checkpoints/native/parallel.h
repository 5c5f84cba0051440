// Splits a range over threads; knows nothing of what is done with it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace trtllm {

// Calls work(begin, end) on consecutive parts of [0, count), none smaller than `grain` but the last.
// threads <= 0 means as many as the machine has. The calling thread does one part itself.
template <typename Work>
void parallel_ranges(std::size_t count, std::size_t grain, int threads, const Work &work) {
    const std::size_t wanted = threads > 0 ? static_cast<std::size_t>(threads)
                                           : std::max<std::size_t>(1, std::thread::hardware_concurrency());
    const std::size_t parts = std::clamp<std::size_t>(count / std::max<std::size_t>(grain, 1), 1, wanted);
    const std::size_t step = (count + parts - 1) / parts;
    std::vector<std::jthread> others;
    others.reserve(parts - 1);
    for (std::size_t begin = step; begin < count; begin += step)
        others.emplace_back([&work, begin, end = std::min(begin + step, count)] { work(begin, end); });
    work(std::size_t{0}, std::min(step, count));
}

}  // namespace trtllm
