// The list of free blocks; the lowest numbers go first while the pool is new.
#include "block_pool.h"

#include <stdexcept>

namespace trtllm::executor {

BlockPool::BlockPool(BlockId first, std::int32_t count)
    : first_(first), references_(static_cast<std::size_t>(count), 0) {
    free_.reserve(static_cast<std::size_t>(count));
    for (BlockId block = first + count; block-- > first;) free_.push_back(block);
}

BlockId BlockPool::take() {
    if (free_.empty()) throw std::logic_error("a block was taken from a pool that has none");
    const BlockId block = free_.back();
    free_.pop_back();
    return block;
}

}  // namespace trtllm::executor
