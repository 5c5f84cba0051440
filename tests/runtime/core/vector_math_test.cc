// The passes over logits: exact maxima, weights within the stated error, the same bits at every vector width.
#include "vector_math.h"

#include <array>
#include <cfloat>
#include <cstring>

#include "decoding_reference.h"

namespace {

using namespace trtllm::executor;

constexpr float kLog2e = 1.44269504088896341f;

std::vector<const VectorMath *> widths() { return {&vector_math(4), &vector_math(8), &vector_math(16)}; }

bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Rows of all sorts: tails of every length, -inf, denormals, ties, huge values.
std::vector<float> odd_row(testing::Random &random) {
    static constexpr float kSpreads[] = {0.0f, 1e-40f, 0.5f, 8.0f, 1e30f};
    auto row = reference::random_logits(random, testing::pick(random, 1, 1200), kSpreads[testing::pick(random, 0, 4)]);
    const auto bans = testing::pick(random, 0, 3);
    for (float &x : row)
        if (testing::pick(random, 0, 3) < bans) x = -INFINITY;
    return row;
}

TEST_CASE("every vector width gives the same bits") {
    testing::Random random(1);
    for (int round = 0; round < testing::scaled(400); ++round) {
        const auto row = odd_row(random);
        const auto size = static_cast<std::int64_t>(row.size());
        const auto blocks = static_cast<std::size_t>(count_blocks(size));
        const float scale = kLog2e / static_cast<float>(testing::pick(random, 1, 30)) * 10.0f;
        const float threshold = row[static_cast<std::size_t>(testing::pick(random, 0, size - 1))];
        const float reference = std::max(*std::max_element(row.begin(), row.end()), -FLT_MAX);
        struct Results {
            std::vector<float> maxima, block_maxima, sums, weights, lanes, values;
            std::vector<std::int32_t> places;
            std::int64_t count;
            float sum;
        };
        std::vector<Results> results;
        for (const VectorMath *math : widths()) {
            Results r{std::vector<float>(blocks), std::vector<float>(blocks), std::vector<float>(blocks),
                      std::vector<float>(row.size()), std::vector<float>(blocks * kBlockGroups),
                      std::vector<float>(kBlock + kSlack), std::vector<std::int32_t>(kBlock + kSlack), 0, 0.0f};
            const std::int64_t first = std::min<std::int64_t>(size, kBlock);
            CHECK(math->maxima(row.data(), size, r.maxima.data()));
            CHECK(math->maxima_and_sums(row.data(), size, scale, r.block_maxima.data(), r.sums.data()));
            CHECK(same_bits(r.maxima, r.block_maxima));
            math->weights(row.data(), size, reference, scale, r.weights.data());
            math->lane_maxima(row.data(), size, r.lanes.data());
            r.sum = math->sum_at_least(row.data(), first, threshold, reference, scale);
            const auto found = math->gather(row.data(), first, std::max(threshold, -FLT_MAX), 7, r.values.data(),
                                            r.places.data());
            r.values.resize(static_cast<std::size_t>(found));
            r.places.resize(static_cast<std::size_t>(found));
            r.count = math->count_at_least(row.data(), size, threshold);
            results.push_back(r);
        }
        for (const Results &r : results) {
            CHECK(same_bits(r.maxima, results[0].maxima) && same_bits(r.sums, results[0].sums));
            CHECK(same_bits(r.weights, results[0].weights) && same_bits(r.lanes, results[0].lanes));
            CHECK(same_bits(r.values, results[0].values) && r.places == results[0].places);
            CHECK(std::memcmp(&r.sum, &results[0].sum, sizeof(float)) == 0);
            CHECK_EQ(r.count, std::count_if(row.begin(), row.end(), [=](float x) { return x >= threshold; }));
        }
        CHECK_EQ(*std::max_element(results[0].maxima.begin(), results[0].maxima.end()),
                 *std::max_element(row.begin(), row.end()));
    }
}

TEST_CASE("weights are 2 to the power within 2.5e-7, exactly 1 at the reference, 0 far below") {
    std::vector<float> x, weights;
    for (float value = -125.0f; value <= 0.0f; value += 0.00113f) x.push_back(value);
    weights.resize(x.size());
    for (const VectorMath *math : widths()) {
        math->weights(x.data(), static_cast<std::int64_t>(x.size()), 0.0f, 1.0f, weights.data());
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double exact = std::exp2(static_cast<double>(x[i]));
            CHECK(std::abs(weights[i] - exact) <= 2.5e-7 * exact);
        }
        const std::array<float, 5> ends = {0.0f, -125.5f, -1e30f, -FLT_MAX, -INFINITY};
        std::array<float, 5> of_ends{};
        math->weights(ends.data(), 5, 0.0f, 3.0f, of_ends.data());
        CHECK((of_ends == std::array<float, 5>{1.0f, 0.0f, 0.0f, 0.0f, 0.0f}));
    }
}

TEST_CASE("NaN and +inf are noticed wherever they stand, -inf is none of them") {
    for (const VectorMath *math : widths())
        for (const std::int64_t size : {1, 15, 16, 17, 255, 256, 300, 777}) {
            std::vector<float> row(static_cast<std::size_t>(size), -INFINITY), maxima(8), sums(8);
            CHECK(math->maxima(row.data(), size, maxima.data()));
            for (const float bad : {static_cast<float>(NAN), -static_cast<float>(NAN), static_cast<float>(INFINITY)})
                for (std::size_t at = 0; at < row.size(); ++at) {
                    row[at] = bad;
                    CHECK(!math->maxima(row.data(), size, maxima.data()));
                    CHECK(!math->maxima_and_sums(row.data(), size, 1.0f, maxima.data(), sums.data()));
                    row[at] = 3.0f;
                }
        }
}

}  // namespace

int main(int c, char **v) { return testing::run(c, v); }
