// Proof that the scheduler's books balance.
#pragma once

#include "scheduler_books.h"

namespace trtllm::executor {

// Throws std::logic_error that says what does not balance.
void check_books(const RequestBooks &books);

}  // namespace trtllm::executor
