// Sizes that the attention kernels and their planning share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace trtllm {

constexpr int64_t kTileRows = 48;       // query rows of a prefill tile
constexpr int64_t kDirectRows = 8;      // up to here the scores are dot products
constexpr int64_t kDirectKeys = 256;    // keys of a tile of dot products
constexpr int64_t kPackedKeys = 64;     // keys of a tile otherwise
constexpr int64_t kMostLanes = 16;
constexpr int64_t kScoreStride = kDirectKeys + kMostLanes;  // the last vector of a row may reach past its keys

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Keys of a tile of dot products: fewer where they are made floats first, so that these stay in the first cache.
inline int64_t direct_keys(const AttentionShape& shape) {
  return shape.cache == CacheFormat::float32 ? kDirectKeys : kPackedKeys;
}

inline int64_t group_size(const AttentionShape& shape) { return shape.num_heads / shape.num_kv_heads; }

inline int64_t tile_positions(const AttentionShape& shape) {
  return std::max<int64_t>(1, kTileRows / group_size(shape));
}

// Widest vectors that this machine has and that divide a head.
int64_t choose_lanes(int64_t head_size, int64_t most_lanes);

// An unfinished result: totals [tile_rows, D], maxima [tile_rows], sums [tile_rows].
inline int64_t partial_stride(const AttentionPlan& plan, const AttentionShape& shape) {
  return plan.tile_rows * (shape.head_size + 2);
}

inline size_t scratch_floats(const AttentionShape& shape, int64_t rows) {
  const int64_t scores = std::max(kPackedKeys * rows, kScoreStride * kDirectRows);
  const int64_t widened =
      shape.cache == CacheFormat::float32 ? 0 : 2 * kPackedKeys * round_up(shape.head_size, kMostLanes);
  return static_cast<size_t>(widened + scores + (2 * rows + kMostLanes) * round_up(shape.head_size, kMostLanes) + 4 * rows +
                             kMostLanes);
}

}  // namespace trtllm
