// What a custom operator's kernel does with onnxruntime: inputs, outputs, attributes and its thread pool.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/native/ort_abi.h"

namespace trtllm {

// Throws when onnxruntime reported an error; operators turn it into a status of their own.
inline void require_ok(const ort::Api &api, ort::Status *status, const char *what) {
    if (status == nullptr) return;
    api.release_status(status);
    throw std::runtime_error(std::string("onnxruntime failed to ") + what);
}

// One call of a kernel.
class KernelCall {
public:
    KernelCall(const ort::Api &api, ort::KernelContext *context) : api_(api), context_(context) {}

    bool has(std::size_t index) const {
        std::size_t count = 0;
        require_ok(api_, api_.input_count(context_, &count), "count inputs");
        return index < count && value(index) != nullptr;
    }

    template <typename T>
    const T *input(std::size_t index) const {
        return static_cast<const T *>(data(const_cast<ort::Value *>(value(index))));
    }

    template <typename T>
    const T *optional_input(std::size_t index) const {
        return has(index) ? input<T>(index) : nullptr;
    }

    std::vector<std::int64_t> shape(std::size_t index) const {
        ort::TensorInfo *info = nullptr;
        require_ok(api_, api_.info(value(index), &info), "describe an input");
        std::size_t rank = 0;
        require_ok(api_, api_.rank(info, &rank), "tell a rank");
        std::vector<std::int64_t> dimensions(rank);
        require_ok(api_, api_.dimensions(info, dimensions.data(), rank), "tell a shape");
        api_.release_info(info);
        return dimensions;
    }

    template <typename T>
    T *output(std::size_t index, const std::vector<std::int64_t> &dimensions) const {
        ort::Value *result = nullptr;
        require_ok(api_, api_.output(context_, index, dimensions.data(), dimensions.size(), &result), "make an output");
        return static_cast<T *>(data(result));
    }

    // Runs task(0) .. task(total - 1) on the session's threads.
    template <typename Task>
    void parallel_for(std::size_t total, Task &task) const {
        if (total == 1) return task(std::size_t{0});
        const auto call = [](void *object, std::size_t index) { (*static_cast<Task *>(object))(index); };
        require_ok(api_, api_.parallel_for(context_, call, total, 0, &task), "run in parallel");
    }

private:
    const ort::Value *value(std::size_t index) const {
        const ort::Value *found = nullptr;
        require_ok(api_, api_.input(context_, index, &found), "give an input");
        return found;
    }

    void *data(ort::Value *value) const {
        void *pointer = nullptr;
        require_ok(api_, api_.data(value, &pointer), "give a tensor's data");
        return pointer;
    }

    const ort::Api &api_;
    ort::KernelContext *context_;
};

// A kernel's attributes, read once when its session loads.
class KernelAttributes {
public:
    KernelAttributes(const ort::Api &api, const ort::KernelInfo *info) : api_(api), info_(info) {}

    std::int64_t integer(const char *name) const {
        std::int64_t value = 0;
        require_ok(api_, api_.attribute(info_, name, &value), (std::string("read attribute ") + name).c_str());
        return value;
    }

    // For an attribute that engines of earlier versions lack.
    std::int64_t integer_or(const char *name, std::int64_t otherwise) const {
        std::int64_t value = otherwise;
        ort::Status *status = api_.attribute(info_, name, &value);
        if (status == nullptr) return value;
        api_.release_status(status);
        return otherwise;
    }

    float number(const char *name) const {
        float value = 0;
        require_ok(api_, api_.attribute(info_, name, &value), (std::string("read attribute ") + name).c_str());
        return value;
    }

private:
    const ort::Api &api_;
    const ort::KernelInfo *info_;
};

}  // namespace trtllm
