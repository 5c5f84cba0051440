// Compares the attention kernels with a plain double-precision reference over many shapes, and every way of cutting the
// cache into blocks with the cache in one piece, bit for bit; --bench times them instead.
// Exits non-zero when any element strays, or anything outside the promised rows is written.
#include "attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace trtllm;

namespace {

constexpr double kTolerance = 3e-6;  // of the largest element

struct Case {
  AttentionShape shape;
  int64_t capacity;  // tokens that a row's cache holds
  std::vector<AttentionRow> rows;
  std::vector<float> qkv, keys, values, cos, sin, query_norm, key_norm, output;
  std::vector<int32_t> table;
  bool normalised = false;

  int64_t tokens() const { return rows.back().start + rows.back().count; }
};

std::vector<float> random_floats(std::mt19937& random, size_t count, float mean, float spread) {
  std::normal_distribution<float> normal(mean, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

void fill_tables(Case& test) {
  const int64_t half = test.shape.rotary_size / 2;
  for (int64_t position = 0; position < test.capacity; ++position)
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * std::pow(10000.0, -static_cast<double>(i) / half);
      test.cos.push_back(static_cast<float>(std::cos(angle)));
      test.sin.push_back(static_cast<float>(std::sin(angle)));
    }
}

// Unwritten rows of the cache hold NaN, so that a kernel which touches them shows it. Row r is block r.
void fill_cache(Case& test, std::mt19937& random) {
  const AttentionShape& shape = test.shape;
  const int64_t slot = test.capacity * shape.head_size;
  for (std::vector<float>* cache : {&test.keys, &test.values}) {
    *cache = random_floats(random, test.rows.size() * static_cast<size_t>(shape.num_kv_heads * slot), 0, 1);
    for (size_t i = 0; i < test.rows.size() * static_cast<size_t>(shape.num_kv_heads); ++i)
      std::fill(cache->begin() + static_cast<int64_t>(i) * slot +
                    test.rows[i / static_cast<size_t>(shape.num_kv_heads)].past * shape.head_size,
                cache->begin() + static_cast<int64_t>(i + 1) * slot, std::numeric_limits<float>::quiet_NaN());
  }
}

// `rows` have their counts and pasts; they are packed one after the other.
Case make_case(AttentionShape shape, int64_t capacity, std::vector<AttentionRow> rows, bool normalised, unsigned seed) {
  std::mt19937 random(seed);
  Case test;
  shape.tokens_per_block = capacity;
  shape.max_blocks = 1;
  test.shape = shape;
  test.capacity = capacity;
  test.normalised = normalised;
  for (int64_t start = 0; AttentionRow& row : rows) start = (row.start = start) + row.count;
  test.rows = rows;
  test.table.resize(rows.size());
  std::iota(test.table.begin(), test.table.end(), 0);
  const int64_t width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size;
  test.qkv = random_floats(random, static_cast<size_t>(test.tokens() * width), 0, 1);
  test.query_norm = random_floats(random, static_cast<size_t>(shape.head_size), 1, 0.2f);
  test.key_norm = random_floats(random, static_cast<size_t>(shape.head_size), 1, 0.2f);
  test.output.assign(static_cast<size_t>(test.tokens() * shape.num_heads * shape.head_size),
                     std::numeric_limits<float>::quiet_NaN());
  fill_tables(test);
  fill_cache(test, random);
  return test;
}

// Copies every cached token between a linear case and its paged form.
void copy_cache(const Case& from, Case& to) {
  const AttentionShape& shape = from.shape;
  const auto offset = [&](const Case& test, size_t row, int64_t head, int64_t token) {
    const AttentionShape& cut = test.shape;
    const int64_t block = test.table[row * static_cast<size_t>(cut.max_blocks) +
                                     static_cast<size_t>(token / cut.tokens_per_block)];
    return ((block * cut.num_kv_heads + head) * cut.tokens_per_block + token % cut.tokens_per_block) * cut.head_size;
  };
  for (size_t row = 0; row < from.rows.size(); ++row)
    for (int64_t head = 0; head < shape.num_kv_heads; ++head)
      for (int64_t token = 0; token < from.capacity; ++token) {
        const int64_t source = offset(from, row, head, token), target = offset(to, row, head, token);
        std::copy_n(from.keys.begin() + source, shape.head_size, to.keys.begin() + target);
        std::copy_n(from.values.begin() + source, shape.head_size, to.values.begin() + target);
      }
}

// The case with its cache in blocks, shuffled, and blocks between them that nobody owns and that hold NaN.
Case paged(const Case& linear, int64_t tokens_per_block, unsigned seed) {
  Case test = linear;
  AttentionShape& shape = test.shape;
  shape.tokens_per_block = tokens_per_block;
  shape.max_blocks = (linear.capacity + tokens_per_block - 1) / tokens_per_block + static_cast<int64_t>(seed % 2);
  const size_t used = test.rows.size() * static_cast<size_t>(shape.max_blocks), blocks = used + 3;
  std::vector<int32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  test.table.assign(order.begin(), order.begin() + static_cast<int64_t>(used));
  const size_t floats = blocks * static_cast<size_t>(shape.num_kv_heads * tokens_per_block * shape.head_size);
  test.keys.assign(floats, std::numeric_limits<float>::quiet_NaN());
  test.values = test.keys;
  copy_cache(linear, test);
  return test;
}

AttentionArrays arrays_of(Case& test) {
  return {test.qkv.data(), test.keys.data(), test.values.data(), test.table.data(),
          test.shape.rotary_size ? test.cos.data() : nullptr, test.shape.rotary_size ? test.sin.data() : nullptr,
          test.normalised ? test.query_norm.data() : nullptr, test.normalised ? test.key_norm.data() : nullptr, 1e-6f,
          test.output.data()};
}

void run_phase(int64_t tasks, int threads, const std::function<void(int64_t, int)>& run) {
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread)
    pool.emplace_back([=, &run] {
      for (int64_t task = tasks - 1 - thread; task >= 0; task -= threads) run(task, thread);
    });
  for (std::thread& thread : pool) thread.join();
}

AttentionPlan run_kernels(Case& test, int threads, int64_t lanes) {
  AttentionPlan plan;
  plan_attention(test.shape, test.rows, threads, plan, lanes);
  const AttentionArrays arrays = arrays_of(test);
  std::vector<std::vector<float>> scratch(threads, std::vector<float>(plan.scratch_floats));
  std::vector<float> partials(plan.partial_floats, std::numeric_limits<float>::quiet_NaN());
  const int64_t tasks = static_cast<int64_t>(plan.tasks.size());
  if (plan.append_first)
    run_phase(tasks, threads, [&](int64_t task, int) { attention_append(plan, test.shape, arrays, task); });
  run_phase(tasks, threads, [&](int64_t task, int thread) {
    attention_task(plan, test.shape, arrays, task, scratch[thread].data(), partials.data());
  });
  attention_merge(plan, test.shape, arrays, partials.data());
  return plan;
}

std::vector<double> reference_head(const Case& test, const float* head, const std::vector<float>& norm,
                                   int64_t position) {
  const AttentionShape& shape = test.shape;
  std::vector<double> values(head, head + shape.head_size);
  if (test.normalised) {
    const double squares = std::inner_product(values.begin(), values.end(), values.begin(), 0.0);
    for (int64_t d = 0; d < shape.head_size; ++d)
      values[d] *= norm[d] / std::sqrt(squares / shape.head_size + 1e-6f);
  }
  const int64_t half = shape.rotary_size / 2;
  for (int64_t d = 0; d < half; ++d) {
    const double cos = test.cos[position * half + d], sin = test.sin[position * half + d];
    const double first = values[d], second = values[d + half];
    values[d] = first * cos - second * sin;
    values[d + half] = second * cos + first * sin;
  }
  return values;
}

void reference_append(Case& test) {
  const AttentionShape& shape = test.shape;
  const int64_t size = shape.head_size, width = (shape.num_heads + 2 * shape.num_kv_heads) * size;
  for (size_t r = 0; r < test.rows.size(); ++r)
    for (int64_t s = 0; s < test.rows[r].count; ++s)
      for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
        const float* key = &test.qkv[(test.rows[r].start + s) * width + (shape.num_heads + g) * size];
        const int64_t position = test.rows[r].past + s;
        const int64_t to = ((static_cast<int64_t>(r) * shape.num_kv_heads + g) * test.capacity + position) * size;
        const std::vector<double> head = reference_head(test, key, test.key_norm, position);
        std::copy(head.begin(), head.end(), test.keys.begin() + to);
        std::copy_n(key + shape.num_kv_heads * size, size, test.values.begin() + to);
      }
}

void reference_query(Case& test, int64_t r, int64_t s, int64_t h) {
  const AttentionShape& shape = test.shape;
  const AttentionRow& row = test.rows[r];
  const int64_t size = shape.head_size, width = (shape.num_heads + 2 * shape.num_kv_heads) * size;
  const int64_t position = row.past + s, slot = r * shape.num_kv_heads + h * shape.num_kv_heads / shape.num_heads;
  const int64_t first = shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
  const std::vector<double> query =
      reference_head(test, &test.qkv[(row.start + s) * width + h * size], test.query_norm, position);
  std::vector<double> scores, sum(size);
  for (int64_t j = first; j <= position; ++j) {
    const float* key = &test.keys[(slot * test.capacity + j) * size];
    const double score = shape.scale * std::inner_product(query.begin(), query.end(), key, 0.0);
    scores.push_back(shape.softcap > 0 ? shape.softcap * std::tanh(score / shape.softcap) : score);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (int64_t j = first; j <= position; ++j) {
    const double weight = std::exp(scores[j - first] - top);
    total += weight;
    for (int64_t d = 0; d < size; ++d) sum[d] += weight * test.values[(slot * test.capacity + j) * size + d];
  }
  for (int64_t d = 0; d < size; ++d)
    test.output[((row.start + s) * shape.num_heads + h) * size + d] = static_cast<float>(sum[d] / total);
}

void run_reference(Case& test) {
  reference_append(test);
  for (size_t r = 0; r < test.rows.size(); ++r)
    for (int64_t s = 0; s < test.rows[r].count; ++s)
      for (int64_t h = 0; h < test.shape.num_heads; ++h) reference_query(test, static_cast<int64_t>(r), s, h);
}

// The largest difference, of the largest element; NaN must meet NaN. Infinite when an element is amiss.
double distance(const std::vector<float>& actual, const std::vector<float>& expected) {
  double most = 1e-30, worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) != std::isnan(expected[i])) return INFINITY;
    if (std::isnan(expected[i])) continue;
    most = std::max(most, std::abs(static_cast<double>(expected[i])));
    worst = std::max(worst, std::abs(static_cast<double>(actual[i]) - expected[i]));
  }
  return worst / most;
}

std::string describe(const Case& test, const AttentionPlan& plan, int threads) {
  const AttentionShape& shape = test.shape;
  char text[256];
  std::snprintf(text, sizeof text,
                "%zu rows, first %ld + %ld, Q%ld G%ld D%ld T%ld R%ld window %ld cap %g lanes %ld threads %d parts %zu",
                test.rows.size(), test.rows[0].past, test.rows[0].count, shape.num_heads, shape.num_kv_heads,
                shape.head_size, shape.tokens_per_block, shape.rotary_size, shape.window, shape.softcap, plan.lanes,
                threads, plan.merges.size());
  return text;
}

struct Tally {
  int cases = 0, failures = 0, split = 0;
  double worst = 0;

  void count(bool fine, const char* what, const std::string& description) {
    ++cases;
    if (fine) return;
    ++failures;
    std::printf("FAILED %s: %s\n", description.c_str(), what);
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The paged run of `original` equals its linear run to the last bit, and writes nothing else.
void check_paged(const Case& original, const Case& linear, int threads, int64_t lanes, unsigned seed, Tally& tally) {
  for (const int64_t tokens_per_block : {1, 8, 32, 128}) {
    if (tokens_per_block != 32 && (lanes < 16 || threads > 2)) continue;
    Case actual = paged(original, tokens_per_block, seed), expected = actual;
    const AttentionPlan plan = run_kernels(actual, threads, lanes);
    copy_cache(linear, expected);
    const bool fine = same_bits(actual.output, linear.output) && same_bits(actual.keys, expected.keys) &&
                      same_bits(actual.values, expected.values);
    tally.count(fine, "not what the linear cache gives", describe(actual, plan, threads));
  }
}

void check_case(const Case& original, unsigned seed, Tally& tally) {
  Case expected = original;
  run_reference(expected);
  for (const int64_t lanes : {16, 8, 4, 1})
    for (const int threads : {1, 2, 5}) {
      if (threads == 5 && lanes < 16) continue;
      Case actual = original;
      const AttentionPlan plan = run_kernels(actual, threads, lanes);
      const double worst = std::max({distance(actual.output, expected.output), distance(actual.keys, expected.keys),
                                     distance(actual.values, expected.values)});
      tally.worst = std::max(tally.worst, worst);
      tally.split += !plan.merges.empty();
      tally.count(worst <= kTolerance, "strays from the reference", describe(actual, plan, threads));
      check_paged(original, actual, threads, lanes, seed, tally);
    }
}

// The first row is as long as the cache allows; the others have any past and count, none at all included.
std::vector<AttentionRow> random_rows(unsigned seed, int64_t rows, int64_t sequence, int64_t capacity) {
  std::mt19937 random(seed);
  std::vector<AttentionRow> result = {{0, sequence, capacity - sequence}};
  while (static_cast<int64_t>(result.size()) < rows) {
    const int64_t count = static_cast<int64_t>(random() % static_cast<unsigned>(sequence + 1));
    result.push_back({0, count, static_cast<int64_t>(random() % static_cast<unsigned>(capacity - count + 1))});
  }
  return result;
}

// Rows that look back far enough to be shared out over their keys, alone and among others.
void check_long_rows(Tally& tally) {
  const std::vector<AttentionRow> mixes[] = {
      {{0, 1, 1100}}, {{0, 5, 900}}, {{0, 1, 1100}, {0, 1, 3}, {0, 40, 0}}, {{0, 33, 60}, {0, 9, 1000}, {0, 1, 700}}};
  unsigned seed = 1000;
  for (const std::vector<AttentionRow>& rows : mixes)
    for (const int64_t window : {0, 600}) {
      const AttentionShape shape = {9, 3, 64, 0, 0, 64, 0.125f, window, ++seed % 3 ? 0.0f : 5.0f};
      check_case(make_case(shape, 1101, rows, seed % 2 == 0, seed), seed, tally);
    }
}

int check_all() {
  struct Heads { int64_t queries, groups, size; };
  struct Lengths { int64_t sequence, capacity; };
  const Heads heads[] = {{9, 3, 64}, {3, 3, 64},  {14, 2, 64}, {32, 2, 128}, {16, 8, 128}, {8, 1, 256}, {5, 1, 80},
                         {4, 2, 32}, {6, 2, 96},  {4, 4, 40},  {6, 3, 20},   {6, 2, 18},   {3, 1, 7},   {100, 1, 16}};
  const Lengths lengths[] = {{1, 1}, {1, 17}, {1, 128}, {1, 300}, {2, 33}, {3, 70}, {5, 5}, {33, 33}, {40, 110}, {130, 150}};
  Tally tally;
  unsigned seed = 0;
  for (const Heads& head : heads)
    for (const Lengths& length : lengths)
      for (const int64_t window : {0, 1, 20}) {
        const bool capped = ++seed % 3 == 0;
        const int64_t rotary = seed % 4 == 0 ? 0 : head.size / (seed % 4 == 1 ? 2 : 1) / 2 * 2;
        const AttentionShape shape = {head.queries, head.groups, head.size, 0, 0, rotary,
                                      1.0f / std::sqrt(static_cast<float>(head.size)), window, capped ? 5.0f : 0.0f};
        const std::vector<AttentionRow> rows = random_rows(seed, 1 + seed % 3, length.sequence, length.capacity);
        check_case(make_case(shape, length.capacity, rows, seed % 2 == 0, seed), seed, tally);
      }
  check_long_rows(tally);
  std::printf("%d runs, %d failures, worst %.2e of the largest element, %d with shared out keys\n", tally.cases,
              tally.failures, tally.worst, tally.split);
  return tally.failures || !tally.split ? 1 : 0;
}

double seconds_of(const std::function<void()>& run) {
  double best = 1e30;
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  for (const double limit = now() + 1.0; now() < limit;) {
    const double start = now();
    run();
    best = std::min(best, now() - start);
  }
  return best;
}

// `layers` copies of the cache are visited in turn, as a model does, so that they come from memory as they would there.
void bench_case(const char* name, AttentionShape shape, int64_t batch, int64_t sequence, int64_t past, int64_t layers,
                int64_t lanes, int64_t tokens_per_block) {
  const std::vector<AttentionRow> rows(static_cast<size_t>(batch), {0, sequence, past});
  const Case linear = make_case(shape, past + sequence, rows, false, 1);
  std::vector<Case> copies(layers, tokens_per_block ? paged(linear, tokens_per_block, 1) : linear);
  for (Case& test : copies) {
    for (float& value : test.keys) if (std::isnan(value)) value = 0.1f;
    for (float& value : test.values) if (std::isnan(value)) value = 0.1f;
  }
  AttentionPlan plan;
  std::vector<float> scratch;
  const double seconds = seconds_of([&] {
    for (Case& test : copies) {
      plan_attention(test.shape, test.rows, 1, plan, lanes);
      scratch.resize(plan.scratch_floats);
      const AttentionArrays arrays = arrays_of(test);
      const int64_t tasks = static_cast<int64_t>(plan.tasks.size());
      for (int64_t task = 0; plan.append_first && task < tasks; ++task) attention_append(plan, test.shape, arrays, task);
      for (int64_t task = 0; task < tasks; ++task) attention_task(plan, test.shape, arrays, task, scratch.data(), nullptr);
    }
  }) / layers;
  const double pairs = batch * sequence * (past + (sequence + 1) / 2.0);
  const double bytes = batch * shape.num_kv_heads * (past + sequence) * shape.head_size * 8.0;
  std::printf("%-24s layers %2ld lanes %2ld block %4ld: %10.0f ns a layer, %6.1f GFLOP/s, %6.1f GB/s of cache\n", name,
              layers, plan.lanes, tokens_per_block, seconds * 1e9,
              4e-9 * pairs * shape.num_heads * shape.head_size / seconds, bytes * 1e-9 / seconds);
}

void bench_all() {
  const AttentionShape small = {9, 3, 64, 0, 0, 64, 0.125f, 0, 0}, wide = {16, 8, 128, 0, 0, 128, 0.088f, 0, 0};
  for (const int64_t lanes : {16, 8, 4})
    for (const int64_t block : {0, 32})
      for (const int64_t layers : {1, 30}) {
        for (const int64_t batch : {1, 8})
          for (const int64_t context : {128, 1024})
            bench_case(("decode B" + std::to_string(batch) + " context " + std::to_string(context)).c_str(), small,
                       batch, 1, context - 1, layers, lanes, block);
        if (layers > 1) continue;
        for (const int64_t context : {16, 128, 1024})
          bench_case(("prefill " + std::to_string(context)).c_str(), small, 1, context, 0, layers, lanes, block);
        bench_case("prefill 1024 D128", wide, 1, 1024, 0, layers, lanes, block);
      }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--bench") == 0) return bench_all(), 0;
  return check_all();
}
