// The part of onnxruntime's C interface that our operators use, declared here so that building needs no onnxruntime.
//
// onnxruntime promises that its function table only grows and that a custom operator states the version of the
// structure it fills (docs: "Custom operators", "C API"). Entries are named by their position in the table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trtllm::ort {

struct Status;
struct Session;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct Domain;

inline constexpr std::uint32_t interface_version = 18;  // the first with ParallelFor; onnxruntime 1.18
inline constexpr std::uint32_t operator_version = 16;   // the operator structure below ends with the fields of 16

enum ElementType : int { float32 = 1, uint8 = 2, int32 = 6, int64 = 7, float16 = 10 };
enum Characteristic : int { required = 0, optional = 1 };

struct Api {
    using Function = void (*)();
    Function functions[275];

    template <typename Signature>
    Signature *at(std::size_t index) const {
        return reinterpret_cast<Signature *>(functions[index]);
    }

    Status *create_domain(const char *name, Domain **domain) const {
        return at<Status *(const char *, Domain **)>(26)(name, domain);
    }
    Status *add_operator(Domain *domain, const struct Operator *op) const {
        return at<Status *(Domain *, const Operator *)>(27)(domain, op);
    }
    Status *add_domain(SessionOptions *options, Domain *domain) const {
        return at<Status *(SessionOptions *, Domain *)>(28)(options, domain);
    }
    Status *create_status(int code, const char *message) const {
        return at<Status *(int, const char *)>(0)(code, message);
    }
    void release_status(Status *status) const { at<void(Status *)>(93)(status); }

    Status *data(Value *value, void **data) const { return at<Status *(Value *, void **)>(51)(value, data); }
    Status *info(const Value *value, TensorInfo **info) const {
        return at<Status *(const Value *, TensorInfo **)>(65)(value, info);
    }
    Status *rank(const TensorInfo *info, std::size_t *rank) const {
        return at<Status *(const TensorInfo *, std::size_t *)>(61)(info, rank);
    }
    Status *dimensions(const TensorInfo *info, std::int64_t *values, std::size_t count) const {
        return at<Status *(const TensorInfo *, std::int64_t *, std::size_t)>(62)(info, values, count);
    }
    void release_info(TensorInfo *info) const { at<void(TensorInfo *)>(99)(info); }

    Status *attribute(const KernelInfo *info, const char *name, float *value) const {
        return at<Status *(const KernelInfo *, const char *, float *)>(85)(info, name, value);
    }
    Status *attribute(const KernelInfo *info, const char *name, std::int64_t *value) const {
        return at<Status *(const KernelInfo *, const char *, std::int64_t *)>(86)(info, name, value);
    }
    Status *input_count(const KernelContext *context, std::size_t *count) const {
        return at<Status *(const KernelContext *, std::size_t *)>(88)(context, count);
    }
    Status *input(const KernelContext *context, std::size_t index, const Value **value) const {
        return at<Status *(const KernelContext *, std::size_t, const Value **)>(90)(context, index, value);
    }
    Status *output(KernelContext *context, std::size_t index, const std::int64_t *shape, std::size_t rank,
                   Value **value) const {
        return at<Status *(KernelContext *, std::size_t, const std::int64_t *, std::size_t, Value **)>(91)(
            context, index, shape, rank, value);
    }
    Status *parallel_for(const KernelContext *context, void (*task)(void *, std::size_t), std::size_t total,
                         std::size_t batches, void *data) const {
        return at<Status *(const KernelContext *, void (*)(void *, std::size_t), std::size_t, std::size_t, void *)>(
            274)(context, task, total, batches, data);
    }
};

struct ApiBase {
    const Api *(*get)(std::uint32_t version);
    const char *(*version)();
};

struct Operator {
    std::uint32_t version = operator_version;
    void *(*create)(const Operator *, const Api *, const KernelInfo *) = nullptr;
    const char *(*name)(const Operator *) = nullptr;
    const char *(*provider)(const Operator *) = nullptr;
    ElementType (*input_type)(const Operator *, std::size_t) = nullptr;
    std::size_t (*input_count)(const Operator *) = nullptr;
    ElementType (*output_type)(const Operator *, std::size_t) = nullptr;
    std::size_t (*output_count)(const Operator *) = nullptr;
    void (*compute)(void *, KernelContext *) = nullptr;
    void (*destroy)(void *) = nullptr;
    Characteristic (*input_characteristic)(const Operator *, std::size_t) = nullptr;
    Characteristic (*output_characteristic)(const Operator *, std::size_t) = nullptr;
    int (*input_memory)(const Operator *, std::size_t) = nullptr;
    int (*variadic_input_arity)(const Operator *) = nullptr;
    int (*variadic_input_homogeneity)(const Operator *) = nullptr;
    int (*variadic_output_arity)(const Operator *) = nullptr;
    int (*variadic_output_homogeneity)(const Operator *) = nullptr;
    Status *(*create_v2)(const Operator *, const Api *, const KernelInfo *, void **) = nullptr;
    Status *(*compute_v2)(void *, KernelContext *) = nullptr;
};

}  // namespace trtllm::ort
