// Numbered blocks of one memory level: which are free, and how many sequences use each of the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "trtllm/types.h"

namespace trtllm::executor {

class BlockPool {
public:
    // Blocks first .. first + count - 1, all free.
    BlockPool(BlockId first, std::int32_t count);

    std::int32_t size() const { return static_cast<std::int32_t>(references_.size()); }
    std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
    bool contains(BlockId block) const { return block >= first_ && block < first_ + size(); }

    // Takes a free block, without references; there must be one.
    BlockId take();
    // Puts a block back that has no references.
    void put_back(BlockId block) { free_.push_back(block); }

    std::int32_t references(BlockId block) const { return references_[index(block)]; }
    // Both return how many there are now.
    std::int32_t add_reference(BlockId block) { return ++references_[index(block)]; }
    std::int32_t drop_reference(BlockId block) { return --references_[index(block)]; }

    const std::vector<BlockId> &free_blocks() const { return free_; }

private:
    std::size_t index(BlockId block) const { return static_cast<std::size_t>(block - first_); }

    BlockId first_;
    std::vector<BlockId> free_;  // the last one goes first
    std::vector<std::int32_t> references_;
};

}  // namespace trtllm::executor
