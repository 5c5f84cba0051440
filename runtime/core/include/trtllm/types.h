// The small words that every part of the runtime shares.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace trtllm::executor {

using TokenId = std::int32_t;
using RequestId = std::uint64_t;
using SequenceId = std::uint64_t;  // one generated sequence of a request; its cache is booked under this number
using BlockId = std::int32_t;      // a block of a pool; the primary pool's blocks come first, the host's follow

// The caller's mistake: what is wrong, and what to do next.
class RequestError : public std::invalid_argument {
public:
    RequestError(const std::string &what, std::string hint) : std::invalid_argument(what), hint_(std::move(hint)) {}
    const std::string &hint() const noexcept { return hint_; }

private:
    std::string hint_;
};

}  // namespace trtllm::executor
