// Compares the attention kernels with a plain double-precision reference over many shapes; --bench times them instead.
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
  std::vector<float> qkv, keys, values, cos, sin, query_norm, key_norm, output;
  std::vector<int64_t> past, lengths;
  bool normalised = false;
};

std::vector<float> random_floats(std::mt19937& random, size_t count, float mean, float spread) {
  std::normal_distribution<float> normal(mean, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

void fill_tables(Case& test) {
  const int64_t half = test.shape.rotary_size / 2;
  for (int64_t position = 0; position < test.shape.capacity; ++position)
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * std::pow(10000.0, -static_cast<double>(i) / half);
      test.cos.push_back(static_cast<float>(std::cos(angle)));
      test.sin.push_back(static_cast<float>(std::sin(angle)));
    }
}

// Unwritten rows of the cache hold NaN, so that a kernel which touches them shows it.
void fill_cache(Case& test, std::mt19937& random) {
  const AttentionShape& shape = test.shape;
  const size_t slot = static_cast<size_t>(shape.capacity * shape.head_size);
  for (std::vector<float>* cache : {&test.keys, &test.values}) {
    *cache = random_floats(random, shape.batch * shape.num_kv_heads * slot, 0, 1);
    for (int64_t i = 0; i < shape.batch * shape.num_kv_heads; ++i)
      std::fill(cache->begin() + i * slot + test.past[i / shape.num_kv_heads] * shape.head_size,
                cache->begin() + (i + 1) * slot, std::numeric_limits<float>::quiet_NaN());
  }
}

Case make_case(const AttentionShape& shape, bool normalised, unsigned seed) {
  std::mt19937 random(seed);
  Case test;
  test.shape = shape;
  test.normalised = normalised;
  for (int64_t row = 0; row < shape.batch; ++row) {
    test.lengths.push_back(row == 0 ? shape.sequence : static_cast<int64_t>(random() % (shape.sequence + 1)));
    test.past.push_back(row == 0 ? shape.capacity - shape.sequence
                                 : static_cast<int64_t>(random() % (shape.capacity - shape.sequence + 1)));
  }
  const int64_t width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size;
  test.qkv = random_floats(random, shape.batch * shape.sequence * width, 0, 1);
  test.query_norm = random_floats(random, shape.head_size, 1, 0.2f);
  test.key_norm = random_floats(random, shape.head_size, 1, 0.2f);
  test.output.assign(shape.batch * shape.sequence * shape.num_heads * shape.head_size,
                     std::numeric_limits<float>::quiet_NaN());
  fill_tables(test);
  fill_cache(test, random);
  return test;
}

AttentionArrays arrays_of(Case& test) {
  return {test.qkv.data(), test.keys.data(), test.values.data(), test.past.data(), test.lengths.data(),
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
  const AttentionPlan plan = plan_attention(test.shape, threads, lanes);
  const AttentionArrays arrays = arrays_of(test);
  std::vector<std::vector<float>> scratch(threads, std::vector<float>(plan.scratch_floats));
  if (plan.append_first)
    run_phase(plan.tasks, threads, [&](int64_t task, int) { attention_append(plan, test.shape, arrays, task); });
  run_phase(plan.tasks, threads, [&](int64_t task, int thread) {
    attention_task(plan, test.shape, arrays, task, scratch[thread].data());
  });
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
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t s = 0; s < test.lengths[b]; ++s)
      for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
        const float* key = &test.qkv[(b * shape.sequence + s) * width + (shape.num_heads + g) * size];
        const int64_t to = ((b * shape.num_kv_heads + g) * shape.capacity + test.past[b] + s) * size;
        const std::vector<double> head = reference_head(test, key, test.key_norm, test.past[b] + s);
        std::copy(head.begin(), head.end(), test.keys.begin() + to);
        std::copy_n(key + shape.num_kv_heads * size, size, test.values.begin() + to);
      }
}

void reference_query(Case& test, int64_t b, int64_t s, int64_t h) {
  const AttentionShape& shape = test.shape;
  const int64_t size = shape.head_size, width = (shape.num_heads + 2 * shape.num_kv_heads) * size;
  const int64_t position = test.past[b] + s, slot = b * shape.num_kv_heads + h * shape.num_kv_heads / shape.num_heads;
  const int64_t first = shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
  const std::vector<double> query =
      reference_head(test, &test.qkv[(b * shape.sequence + s) * width + h * size], test.query_norm, position);
  std::vector<double> scores, sum(size);
  for (int64_t j = first; j <= position; ++j) {
    const float* key = &test.keys[(slot * shape.capacity + j) * size];
    const double score = shape.scale * std::inner_product(query.begin(), query.end(), key, 0.0);
    scores.push_back(shape.softcap > 0 ? shape.softcap * std::tanh(score / shape.softcap) : score);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (int64_t j = first; j <= position; ++j) {
    const double weight = std::exp(scores[j - first] - top);
    total += weight;
    for (int64_t d = 0; d < size; ++d) sum[d] += weight * test.values[(slot * shape.capacity + j) * size + d];
  }
  for (int64_t d = 0; d < size; ++d)
    test.output[((b * shape.sequence + s) * shape.num_heads + h) * size + d] = static_cast<float>(sum[d] / total);
}

void run_reference(Case& test) {
  std::fill(test.output.begin(), test.output.end(), 0.0f);
  reference_append(test);
  for (int64_t b = 0; b < test.shape.batch; ++b)
    for (int64_t s = 0; s < test.lengths[b]; ++s)
      for (int64_t h = 0; h < test.shape.num_heads; ++h) reference_query(test, b, s, h);
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

std::string describe(const AttentionShape& shape, const AttentionPlan& plan, int threads) {
  char text[256];
  std::snprintf(text, sizeof text, "B%ld S%ld Q%ld G%ld D%ld T%ld R%ld window %ld cap %g lanes %ld threads %d",
                shape.batch, shape.sequence, shape.num_heads, shape.num_kv_heads, shape.head_size, shape.capacity,
                shape.rotary_size, shape.window, shape.softcap, plan.lanes, threads);
  return text;
}

struct Tally {
  int cases = 0, failures = 0;
  double worst = 0;
};

void check_case(const Case& original, Tally& tally) {
  Case expected = original;
  run_reference(expected);
  for (const int64_t lanes : {16, 8, 4, 1})
    for (const int threads : {1, 2}) {
      Case actual = original;
      const AttentionPlan plan = run_kernels(actual, threads, lanes);
      const double worst = std::max({distance(actual.output, expected.output), distance(actual.keys, expected.keys),
                                     distance(actual.values, expected.values)});
      ++tally.cases;
      tally.worst = std::max(tally.worst, worst);
      if (worst <= kTolerance) continue;
      ++tally.failures;
      std::printf("FAILED %s: off by %g of the largest\n", describe(actual.shape, plan, threads).c_str(), worst);
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
        const AttentionShape shape = {1 + static_cast<int64_t>(seed % 3), length.sequence, head.queries, head.groups,
                                      head.size, length.capacity, rotary,
                                      1.0f / std::sqrt(static_cast<float>(head.size)), window, capped ? 5.0f : 0.0f};
        check_case(make_case(shape, seed % 2 == 0, seed), tally);
      }
  std::printf("%d runs, %d failures, worst %.2e of the largest element\n", tally.cases, tally.failures, tally.worst);
  return tally.failures ? 1 : 0;
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
void bench_case(const char* name, AttentionShape shape, int64_t past, int64_t layers, int64_t lanes) {
  std::vector<Case> copies(layers, make_case(shape, false, 1));
  for (Case& test : copies) {
    test.past.assign(shape.batch, past);
    test.lengths.assign(shape.batch, shape.sequence);
    for (float& value : test.keys) if (std::isnan(value)) value = 0.1f;
    for (float& value : test.values) if (std::isnan(value)) value = 0.1f;
  }
  const AttentionPlan plan = plan_attention(shape, 1, lanes);
  std::vector<float> scratch(plan.scratch_floats);
  const double seconds = seconds_of([&] {
    for (Case& test : copies) {
      const AttentionArrays arrays = arrays_of(test);
      for (int64_t task = 0; plan.append_first && task < plan.tasks; ++task) attention_append(plan, shape, arrays, task);
      for (int64_t task = 0; task < plan.tasks; ++task) attention_task(plan, shape, arrays, task, scratch.data());
    }
  }) / layers;
  const double pairs = shape.batch * shape.sequence * (past + (shape.sequence + 1) / 2.0);
  const double bytes = shape.batch * shape.num_kv_heads * (past + shape.sequence) * shape.head_size * 8.0;
  std::printf("%-24s layers %2ld lanes %2ld: %10.0f ns a layer, %6.1f GFLOP/s, %6.1f GB/s of cache\n", name, layers,
              plan.lanes, seconds * 1e9, 4e-9 * pairs * shape.num_heads * shape.head_size / seconds, bytes * 1e-9 / seconds);
}

void bench_all() {
  const auto shape = [](int64_t batch, int64_t sequence, int64_t capacity) {
    return AttentionShape{batch, sequence, 9, 3, 64, capacity, 64, 0.125f, 0, 0};
  };
  for (const int64_t lanes : {16, 8, 4})
    for (const int64_t layers : {1, 30}) {
      for (const int64_t batch : {1, 8})
        for (const int64_t context : {128, 1024})
          bench_case(("decode B" + std::to_string(batch) + " context " + std::to_string(context)).c_str(),
                     shape(batch, 1, context), context - 1, layers, lanes);
      if (layers > 1) continue;
      for (const int64_t context : {16, 128, 1024})
        bench_case(("prefill " + std::to_string(context)).c_str(), shape(1, context, context), 0, layers, lanes);
      bench_case("prefill 1024 D128", {1, 1024, 16, 8, 128, 1024, 128, 0.088f, 0, 0}, 0, layers, lanes);
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--bench") == 0) return bench_all(), 0;
  return check_all();
}
