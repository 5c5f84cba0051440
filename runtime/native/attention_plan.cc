// Shares a call's work out: a task is one tile of new tokens of one row and one key-value head. Few tokens that look far
// back are split once more, over their keys, so that a batch of one keeps every thread busy.
#include <algorithm>

#include "attention.h"
#include "attention_tiles.h"

namespace trtllm {
namespace {

constexpr int64_t kSplitStep = 64;       // keys: parts begin at multiples of it
constexpr int64_t kSmallestPart = 256;   // keys: below, starting a task costs more than it saves

int64_t cost_of(const AttentionTask& task) { return (task.end - task.begin) * (task.key_end - task.key_begin); }

AttentionTask make_task(const AttentionShape& shape, const AttentionRow& row, int64_t index, int64_t kv_head,
                        int64_t begin) {
  AttentionTask task;
  task.row = index;
  task.kv_head = kv_head;
  task.start = row.start;
  task.past = row.past;
  task.begin = begin;
  task.end = std::min(row.count, begin + tile_positions(shape));
  const int64_t first = row.past + begin;
  task.key_begin = shape.window > 0 ? std::max<int64_t>(0, first - shape.window + 1) : 0;
  task.key_end = row.past + task.end;
  task.partial = -1;
  return task;
}

// Parts of a task whose tokens are all of its row's: as many as even the load, a multiple of the threads.
int64_t parts_of(const AttentionTask& task, int64_t total, int threads) {
  const int64_t cached = task.past - task.key_begin;
  if (threads <= 1 || cached < 2 * kSmallestPart) return 1;
  const int64_t wanted = (cost_of(task) * 2 * threads + total - 1) / total;
  return wanted <= 1 ? 1 : std::min(round_up(wanted, threads), cached / kSmallestPart);
}

// Replaces tasks[index] by `parts` tasks over its keys. The new tokens all belong to the last part, which appends them.
void split_task(AttentionPlan& plan, size_t index, int64_t parts, int64_t& partials) {
  const AttentionTask whole = plan.tasks[index];
  const int64_t keys = whole.key_end - whole.key_begin;
  plan.merges.push_back({whole.kv_head, whole.start + whole.begin, whole.end - whole.begin, partials, parts});
  const auto boundary = [&](int64_t part) { return (whole.key_begin + keys * part / parts) / kSplitStep * kSplitStep; };
  for (int64_t part = 0; part < parts; ++part) {
    AttentionTask task = whole;
    if (part > 0) task.key_begin = boundary(part);
    if (part + 1 < parts) task.key_end = boundary(part + 1);
    task.partial = partials++;
    if (part == 0)
      plan.tasks[index] = task;
    else
      plan.tasks.push_back(task);
  }
}

void split_tasks(AttentionPlan& plan, const std::vector<AttentionRow>& rows, int threads, int64_t& partials) {
  int64_t total = 0;
  for (const AttentionTask& task : plan.tasks) total += cost_of(task);
  for (size_t index = 0, count = plan.tasks.size(); index < count; ++index) {
    const AttentionTask& task = plan.tasks[index];
    if (task.end - task.begin != rows[static_cast<size_t>(task.row)].count) continue;
    const int64_t parts = parts_of(task, total, threads);
    if (parts > 1) split_task(plan, index, parts, partials);
  }
}

}  // namespace

void plan_attention(const AttentionShape& shape, const std::vector<AttentionRow>& rows, int threads,
                    AttentionPlan& plan, int64_t most_lanes) {
  plan.tasks.clear();
  plan.merges.clear();
  plan.append_first = false;
  int64_t tile = 0;
  for (size_t index = 0; index < rows.size(); ++index) {
    const AttentionRow& row = rows[index];
    plan.append_first |= row.count > tile_positions(shape);
    tile = std::max(tile, std::min(row.count, tile_positions(shape)));
    for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head)
      for (int64_t begin = 0; begin < row.count; begin += tile_positions(shape))
        plan.tasks.push_back(make_task(shape, row, static_cast<int64_t>(index), kv_head, begin));
  }
  int64_t partials = 0;
  split_tasks(plan, rows, threads, partials);
  const auto dearer = [](const AttentionTask& a, const AttentionTask& b) { return cost_of(a) > cost_of(b); };
  if (!std::is_sorted(plan.tasks.begin(), plan.tasks.end(), dearer))
    std::sort(plan.tasks.begin(), plan.tasks.end(), dearer);
  plan.tile_rows = round_up(tile * group_size(shape), kMostLanes);
  plan.scratch_floats = scratch_floats(shape, plan.tile_rows);
  plan.partial_floats = static_cast<size_t>(partials * partial_stride(plan, shape));
  plan.lanes = choose_lanes(shape.head_size, most_lanes);
}

}  // namespace trtllm
