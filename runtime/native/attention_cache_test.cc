// Attention over caches of 8 bits an element: stored bytes against an independent rounding, attention against double
// precision over what the bytes mean, and every cut of the cache into blocks bit for bit; --bench times the formats.
#include "attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

using namespace trtllm;

namespace {

constexpr double kTolerance = 3e-6;  // of the largest element, as over a cache of floats

struct Run {
  AttentionShape shape;
  std::vector<AttentionRow> rows;
  std::vector<int32_t> table;
  std::vector<float> qkv, output;
  std::vector<uint8_t> keys, values;
  float key_scale = 1, value_scale = 1;
  int64_t capacity;

  int64_t width() const { return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size; }
  int64_t offset(int64_t row, int64_t head, int64_t token) const {
    const int64_t block = table[row * shape.max_blocks + token / shape.tokens_per_block];
    return ((block * shape.num_kv_heads + head) * shape.tokens_per_block + token % shape.tokens_per_block) *
           cache_row_bytes(shape);
  }
};

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  return exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
}

uint16_t nearest_half(double value) {
  int low = 0, high = 0x7bff;  // the values grow with their bits
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (half_value(static_cast<uint16_t>(middle)) <= value ? low : high) = middle;
  }
  const double below = value - half_value(static_cast<uint16_t>(low)), above = half_value(static_cast<uint16_t>(high)) - value;
  return static_cast<uint16_t>(below < above || (below == above && low % 2 == 0) ? low : high);
}

double e4m3_value(uint8_t byte) {
  const int exponent = byte >> 3 & 15, fraction = byte & 7;
  const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return byte & 0x80 ? -size : size;
}

uint8_t nearest_e4m3(double value) {
  int best = 0;
  for (int byte = 0; byte < 0x7f; ++byte) {
    const double gap = std::fabs(e4m3_value(byte) - std::fabs(value)), least = std::fabs(e4m3_value(best) - std::fabs(value));
    if (gap < least || (gap == least && byte % 2 == 0)) best = byte;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

// A row of the cache as the format says.
std::vector<uint8_t> stored(const AttentionShape& shape, const float* head, float scale) {
  std::vector<uint8_t> row(cache_row_bytes(shape));
  if (shape.cache == CacheFormat::float8) {
    for (int64_t d = 0; d < shape.head_size; ++d) row[d] = nearest_e4m3(head[d] / scale);
    return row;
  }
  float largest = 0;
  for (int64_t d = 0; d < shape.head_size; ++d) largest = std::max(largest, std::fabs(head[d]));
  const uint16_t bits = nearest_half(largest / 127.0f);
  const float step = static_cast<float>(half_value(bits)), factor = step > 0 ? 1.0f / step : 0.0f;
  for (int64_t d = 0; d < shape.head_size; ++d)
    row[d] = static_cast<uint8_t>(std::clamp(static_cast<int>(std::nearbyint(head[d] * factor)), -127, 127));
  std::memcpy(&row[shape.head_size], &bits, 2);
  return row;
}

double element(const Run& run, const std::vector<uint8_t>& cache, int64_t at, int64_t d, float scale) {
  if (run.shape.cache == CacheFormat::float8) return e4m3_value(cache[at + d]) * static_cast<double>(scale);
  uint16_t bits;
  std::memcpy(&bits, &cache[at + run.shape.head_size], 2);
  return static_cast<int8_t>(cache[at + d]) * half_value(bits);
}

Run make_run(AttentionShape shape, std::vector<AttentionRow> rows, int64_t tokens_per_block, unsigned seed) {
  Run run;
  run.capacity = 0;
  int64_t tokens = 0;
  for (AttentionRow& row : rows) {
    row.start = tokens;
    tokens += row.count;
    run.capacity = std::max(run.capacity, row.past + row.count);
  }
  shape.tokens_per_block = tokens_per_block;
  shape.max_blocks = (run.capacity + tokens_per_block - 1) / tokens_per_block;
  run.shape = shape;
  run.rows = rows;
  run.table.resize(rows.size() * static_cast<size_t>(shape.max_blocks));
  for (size_t i = 0; i < run.table.size(); ++i) run.table[i] = static_cast<int32_t>(i);
  std::shuffle(run.table.begin(), run.table.end(), std::mt19937(tokens_per_block));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  run.qkv.resize(tokens * run.width());
  const int64_t keys_end = (shape.num_heads + shape.num_kv_heads) * shape.head_size;
  for (size_t i = 0; i < run.qkv.size(); ++i)  // values have outliers; those of keys would only sharpen the softmax
    run.qkv[i] = normal(random) * (static_cast<int64_t>(i) % run.width() >= keys_end && random() % 97 == 0 ? 600.0f : 1.0f);
  run.output.assign(tokens * shape.num_heads * shape.head_size, NAN);
  run.keys.assign(run.table.size() * shape.num_kv_heads * tokens_per_block * cache_row_bytes(shape), 0xff);
  run.values = run.keys;
  if (shape.cache == CacheFormat::float8) run.key_scale = 0.75f, run.value_scale = 1.25f;
  std::vector<float> head(shape.head_size);
  for (size_t row = 0; row < rows.size(); ++row)
    for (int64_t token = 0; token < rows[row].past; ++token)
      for (int64_t g = 0; g < shape.num_kv_heads; ++g)
        for (auto* cache : {&run.keys, &run.values}) {
          for (float& value : head) value = normal(random);
          const std::vector<uint8_t> bytes = stored(shape, head.data(), cache == &run.keys ? run.key_scale : run.value_scale);
          std::copy(bytes.begin(), bytes.end(), cache->begin() + run.offset(static_cast<int64_t>(row), g, token));
        }
  return run;
}

void attend(Run& run, int threads, int64_t lanes) {
  AttentionPlan plan;
  plan_attention(run.shape, run.rows, threads, plan, lanes);
  const AttentionArrays arrays = {run.qkv.data(), run.keys.data(), run.values.data(), run.table.data(), nullptr, nullptr,
                                  nullptr, nullptr, 0, run.output.data(), run.key_scale, run.value_scale};
  std::vector<float> scratch(plan.scratch_floats), partials(plan.partial_floats);
  const int64_t tasks = static_cast<int64_t>(plan.tasks.size());
  for (int64_t task = 0; plan.append_first && task < tasks; ++task) attention_append(plan, run.shape, arrays, task);
  for (int64_t task = tasks - 1; task >= 0; --task)
    attention_task(plan, run.shape, arrays, task, scratch.data(), partials.data());
  attention_merge(plan, run.shape, arrays, partials.data());
}

// New rows of the cache hold exactly what an independent rounding gives.
bool stores_right(const Run& run) {
  const AttentionShape& shape = run.shape;
  for (size_t r = 0; r < run.rows.size(); ++r)
    for (int64_t s = 0; s < run.rows[r].count; ++s)
      for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
        const float* key = &run.qkv[(run.rows[r].start + s) * run.width() + (shape.num_heads + g) * shape.head_size];
        const int64_t at = run.offset(static_cast<int64_t>(r), g, run.rows[r].past + s);
        const auto first = stored(shape, key, run.key_scale);
        const auto second = stored(shape, key + shape.num_kv_heads * shape.head_size, run.value_scale);
        if (!std::equal(first.begin(), first.end(), run.keys.begin() + at)) return false;
        if (!std::equal(second.begin(), second.end(), run.values.begin() + at)) return false;
      }
  return true;
}

double stray(const Run& run) {
  const AttentionShape& shape = run.shape;
  double most = 1e-30, worst = 0;
  for (size_t r = 0; r < run.rows.size(); ++r)
    for (int64_t s = 0; s < run.rows[r].count; ++s)
      for (int64_t h = 0; h < shape.num_heads; ++h) {
        const int64_t row = static_cast<int64_t>(r), g = h * shape.num_kv_heads / shape.num_heads;
        const int64_t position = run.rows[r].past + s, size = shape.head_size;
        const float* query = &run.qkv[(run.rows[r].start + s) * run.width() + h * size];
        const int64_t oldest = shape.window ? std::max<int64_t>(0, position - shape.window + 1) : 0;
        std::vector<double> scores, sum(size);
        for (int64_t j = oldest; j <= position; ++j) {
          double score = 0;
          for (int64_t d = 0; d < size; ++d)
            score += query[d] * element(run, run.keys, run.offset(row, g, j), d, run.key_scale);
          score *= shape.scale;
          scores.push_back(shape.softcap > 0 ? shape.softcap * std::tanh(score / shape.softcap) : score);
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (int64_t j = oldest; j <= position; ++j) {
          const double weight = std::exp(scores[j - oldest] - top);
          total += weight;
          for (int64_t d = 0; d < size; ++d)
            sum[d] += weight * element(run, run.values, run.offset(row, g, j), d, run.value_scale);
        }
        for (int64_t d = 0; d < size; ++d) {
          most = std::max(most, std::fabs(sum[d] / total));
          const double actual = run.output[((run.rows[r].start + s) * shape.num_heads + h) * size + d];
          worst = std::max(worst, std::isnan(actual) ? INFINITY : std::fabs(actual - sum[d] / total));
        }
      }
  return worst / most;
}

int check_all() {
  const AttentionShape shapes[] = {{9, 3, 64, 0, 0, 0, 0.02f, 0, 0}, {4, 2, 32, 0, 0, 0, 0.03f, 20, 0},
                                   {16, 8, 128, 0, 0, 0, 0.01f, 0, 0}, {6, 2, 20, 0, 0, 0, 0.04f, 0, 0},
                                   {3, 1, 7, 0, 0, 0, 0.05f, 0, 0}, {8, 2, 24, 0, 0, 0, 0.2f, 33, 4}};
  const std::vector<AttentionRow> mixes[] = {
      {{0, 1, 0}}, {{0, 1, 700}}, {{0, 5, 130}, {0, 1, 3}}, {{0, 70, 0}}, {{0, 33, 60}, {0, 1, 90}, {0, 0, 4}}};
  int runs = 0, failures = 0;
  double worst = 0;
  unsigned seed = 0;
  for (AttentionShape shape : shapes)
    for (const CacheFormat format : {CacheFormat::int8, CacheFormat::float8})
      for (const auto& rows : mixes) {
        shape.cache = format;
        ++seed;
        for (const int64_t lanes : {16, 8, 4, 1}) {
          Run whole = make_run(shape, rows, 1024, seed);
          attend(whole, 1 + static_cast<int>(seed % 2) * 3, lanes);
          const double far = stray(whole);
          worst = std::max(worst, far);
          for (const int64_t block : {32, 8}) {
            Run cut = make_run(shape, rows, block, seed);
            attend(cut, 1 + static_cast<int>(seed % 2) * 3, lanes);
            const bool same = std::memcmp(cut.output.data(), whole.output.data(), cut.output.size() * 4) == 0;
            ++runs;
            if (same && far <= kTolerance && stores_right(cut)) continue;
            ++failures;
            std::printf("FAILED D%ld format %d lanes %ld rows %zu first %ld + %ld: strays %.1e, stores %d, same %d\n",
                        shape.head_size, static_cast<int>(format), lanes, rows.size(), rows[0].past, rows[0].count, far,
                        stores_right(cut), same);
          }
        }
      }
  std::printf("%d runs, %d failures, worst %.2e of the largest element\n", runs, failures, worst);
  return failures ? 1 : 0;
}

// Layers in turn, as a model visits them, so that the cache comes from memory.
void bench(CacheFormat format, int64_t batch, int64_t context, int64_t count, int layers) {
  AttentionShape shape = {9, 3, 64, 0, 0, 0, 0.125f, 0, 0};
  shape.cache = format;
  Run run = make_run(shape, std::vector<AttentionRow>(static_cast<size_t>(batch), {0, count, 0}), 32, 1);
  run.capacity = context;
  shape = run.shape;
  shape.max_blocks = (context + 31) / 32;
  std::vector<int32_t> table(static_cast<size_t>(batch * shape.max_blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  for (AttentionRow& row : run.rows) row.past = context - count;
  const size_t bytes = table.size() * static_cast<size_t>(shape.num_kv_heads * 32 * cache_row_bytes(shape));
  std::vector<std::vector<uint8_t>> caches(static_cast<size_t>(2 * layers), std::vector<uint8_t>(bytes, 0));
  std::mt19937 random(1);
  if (format != CacheFormat::float32)
    for (auto& cache : caches)
      for (uint8_t& byte : cache) byte = static_cast<uint8_t>(random() & 0x3f);
  AttentionPlan plan;
  std::vector<float> scratch;
  double best = 1e30;
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  for (const double limit = now() + 1.0; now() < limit;) {
    const double begin = now();
    for (int layer = 0; layer < layers; ++layer) {
      plan_attention(shape, run.rows, 1, plan, 16);
      scratch.resize(plan.scratch_floats);
      const AttentionArrays arrays = {run.qkv.data(), caches[2 * layer].data(), caches[2 * layer + 1].data(), table.data(),
                                      nullptr, nullptr, nullptr, nullptr, 0, run.output.data(), 1, 1};
      for (int64_t task = 0; plan.append_first && task < static_cast<int64_t>(plan.tasks.size()); ++task)
        attention_append(plan, shape, arrays, task);
      for (int64_t task = 0; task < static_cast<int64_t>(plan.tasks.size()); ++task)
        attention_task(plan, shape, arrays, task, scratch.data(), nullptr);
    }
    best = std::min(best, now() - begin);
  }
  const char* names[] = {"float32", "int8", "float8"};
  std::printf("%-8s batch %ld context %5ld new %4ld: %8.0f ns a layer\n", names[static_cast<int>(format)], batch, context,
              count, best / layers * 1e9);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--bench") == 0) {
    for (const int64_t context : {128, 2000})
      for (const CacheFormat format : {CacheFormat::float32, CacheFormat::int8, CacheFormat::float8})
        for (const int64_t batch : {1, 8}) bench(format, batch, context, 1, 30);
    for (const CacheFormat format : {CacheFormat::float32, CacheFormat::int8, CacheFormat::float8})
      bench(format, 1, 1024, 512, 1);
    return 0;
  }
  return check_all();
}
