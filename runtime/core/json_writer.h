// Writes JSON objects and arrays as text, one value after the other.
#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

namespace trtllm::executor {

class JsonWriter {
public:
    JsonWriter &begin_object() { return open('{'); }
    JsonWriter &end_object() { return close('}'); }
    JsonWriter &begin_array() { return open('['); }
    JsonWriter &end_array() { return close(']'); }

    JsonWriter &key(std::string_view name) {
        separate();
        quote(name);
        text_ += ':';
        after_key_ = true;
        return *this;
    }

    JsonWriter &value(bool truth) { return raw(truth ? "true" : "false"); }
    JsonWriter &value(std::integral auto number) { return raw(std::to_string(number)); }
    JsonWriter &value(std::floating_point auto number) {
        if (!std::isfinite(number)) return raw("null");
        char digits[32];
        const auto end = std::to_chars(digits, digits + sizeof digits, static_cast<double>(number)).ptr;
        return raw(std::string_view(digits, static_cast<std::size_t>(end - digits)));
    }
    JsonWriter &value(std::string_view string) {
        separate();
        quote(string);
        return *this;
    }
    JsonWriter &value(const char *string) { return value(std::string_view(string)); }
    JsonWriter &null() { return raw("null"); }
    // Text that is JSON already.
    JsonWriter &raw(std::string_view json) {
        separate();
        text_ += json;
        return *this;
    }

    template <typename T>
    JsonWriter &field(std::string_view name, const T &content) {
        return key(name).value(content);
    }

    std::string take() { return std::move(text_); }

private:
    JsonWriter &open(char bracket) {
        separate();
        text_ += bracket;
        first_ = true;
        return *this;
    }

    JsonWriter &close(char bracket) {
        text_ += bracket;
        first_ = false;
        return *this;
    }

    void separate() {
        if (!after_key_ && !first_) text_ += ',';
        after_key_ = false;
        first_ = false;
    }

    void quote(std::string_view string) {
        text_ += '"';
        for (const char letter : string) {
            const auto code = static_cast<unsigned char>(letter);
            if (letter == '"' || letter == '\\') {
                text_ += '\\';
                text_ += letter;
            } else if (code < 0x20) {
                constexpr char hex[] = "0123456789abcdef";
                text_ += "\\u00";
                text_ += hex[code >> 4];
                text_ += hex[code & 15];
            } else {
                text_ += letter;
            }
        }
        text_ += '"';
    }

    std::string text_;
    bool first_ = true;      // nothing stands before the next value
    bool after_key_ = false;
};

}  // namespace trtllm::executor
