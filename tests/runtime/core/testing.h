// The few lines that a C++ test needs: named cases, checks that say what they saw, and a seeded source of numbers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace testing {

struct Failure : std::exception {
    explicit Failure(std::string text) : text_(std::move(text)) {}
    const char *what() const noexcept override { return text_.c_str(); }

private:
    std::string text_;
};

struct Case {
    const char *name;
    std::function<void()> body;
};

inline std::vector<Case> &cases() {
    static std::vector<Case> all;
    return all;
}

struct Registration {
    Registration(const char *name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

template <typename A, typename B>
void check_equal(const A &left, const B &right, const char *what, const char *file, int line) {
    if (left == right) return;
    std::ostringstream text;
    text << file << ":" << line << ": " << what;
    if constexpr (requires { text << left << right; }) text << " (" << left << " and " << right << ")";
    throw Failure(text.str());
}

inline void check_true(bool holds, const char *what, const char *file, int line) {
    if (holds) return;
    throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

// How often a random test repeats: the factor in $TRTLLM_TEST_SCALE, so that `make sanitize` can run more.
inline int scaled(int count) {
    const char *text = std::getenv("TRTLLM_TEST_SCALE");
    return text == nullptr ? count : static_cast<int>(count * std::atof(text));
}

using Random = std::mt19937_64;

inline std::int64_t pick(Random &random, std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
}

// Runs every case whose name contains the first argument; the exit status is the number of failures.
inline int run(int count, char **arguments) {
    const std::string wanted = count > 1 ? arguments[1] : "";
    int failures = 0;
    for (const auto &item : cases()) {
        if (std::string(item.name).find(wanted) == std::string::npos) continue;
        try {
            item.body();
            std::cout << "ok    " << item.name << std::endl;
        } catch (const std::exception &error) {
            ++failures;
            std::cout << "FAIL  " << item.name << ": " << error.what() << std::endl;
        }
    }
    return failures == 0 ? 0 : 1;
}

}  // namespace testing

#define TEST_NAME_JOIN(a, b) a##b
#define TEST_NAME(a, b) TEST_NAME_JOIN(a, b)
#define TEST_CASE(name) TEST_CASE_AT(name, __COUNTER__)
#define TEST_CASE_AT(name, number)                                                                  \
    static void TEST_NAME(test_body_, number)();                                                    \
    static const testing::Registration TEST_NAME(test_, number)(name, TEST_NAME(test_body_, number)); \
    static void TEST_NAME(test_body_, number)()
#define CHECK(condition) testing::check_true(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define CHECK_EQ(left, right) testing::check_equal((left), (right), #left " == " #right, __FILE__, __LINE__)
#define CHECK_THROWS(expression, type)                                                              \
    do {                                                                                            \
        bool thrown = false;                                                                        \
        try {                                                                                       \
            (void)(expression);                                                                     \
        } catch (const type &) {                                                                    \
            thrown = true;                                                                          \
        }                                                                                           \
        testing::check_true(thrown, #expression " throws " #type, __FILE__, __LINE__);              \
    } while (false)
