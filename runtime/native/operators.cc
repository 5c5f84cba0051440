// The custom operators of domain `trtllm.cpu`, registered by onnxruntime when a session loads this library.
#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "runtime/native/attention_operator.h"
#include "runtime/native/kernel_call.h"
#include "runtime/native/quantized_embedding_operator.h"
#include "runtime/native/quantized_linear_operator.h"
#include "runtime/native/scaled_linear_operator.h"

namespace trtllm {
namespace {

constexpr int failure = 1;  // onnxruntime's ORT_FAIL

// Describes `Kernel` to onnxruntime. Kernel gives name, element types of inputs and outputs, the number of inputs that
// must be there, a constructor from attributes and a call operator.
template <typename Kernel>
struct Description : ort::Operator {
    Description() {
        name = [](const ort::Operator *) { return Kernel::name; };
        provider = [](const ort::Operator *) -> const char * { return nullptr; };
        input_count = [](const ort::Operator *) { return std::size(Kernel::inputs); };
        output_count = [](const ort::Operator *) { return std::size(Kernel::outputs); };
        input_type = [](const ort::Operator *, std::size_t index) { return Kernel::inputs[index]; };
        output_type = [](const ort::Operator *, std::size_t index) { return Kernel::outputs[index]; };
        input_characteristic = [](const ort::Operator *, std::size_t index) {
            return index < Kernel::required_inputs ? ort::required : ort::optional;
        };
        output_characteristic = [](const ort::Operator *, std::size_t) { return ort::required; };
        input_memory = [](const ort::Operator *, std::size_t) { return 0; };
        variadic_input_arity = variadic_output_arity = [](const ort::Operator *) { return 0; };
        variadic_input_homogeneity = variadic_output_homogeneity = [](const ort::Operator *) { return 0; };
        destroy = [](void *kernel) { delete static_cast<Instance *>(kernel); };
        create_v2 = [](const ort::Operator *, const ort::Api *api, const ort::KernelInfo *info, void **kernel) {
            return guarded(*api, [&] { *kernel = new Instance{*api, Kernel(KernelAttributes(*api, info))}; });
        };
        compute_v2 = [](void *kernel, ort::KernelContext *context) {
            auto &instance = *static_cast<Instance *>(kernel);
            return guarded(instance.api, [&] { instance.kernel(KernelCall(instance.api, context)); });
        };
    }

    struct Instance {
        const ort::Api &api;
        Kernel kernel;
    };

    template <typename Work>
    static ort::Status *guarded(const ort::Api &api, Work &&work) {
        try {
            work();
            return nullptr;
        } catch (const std::exception &error) {
            return api.create_status(failure, error.what());
        }
    }
};

}  // namespace
}  // namespace trtllm

extern "C" __attribute__((visibility("default"))) trtllm::ort::Status *RegisterCustomOps(
    trtllm::ort::SessionOptions *options, const trtllm::ort::ApiBase *base) {
    using namespace trtllm;
    static const Description<QuantizedLinearKernel> quantized_linear;
    static const Description<QuantizedEmbeddingKernel> quantized_embedding;
    static const Description<ScaledLinearKernel> scaled_linear;
    static const Description<CachedAttentionKernel> cached_attention;
    static const Description<PagedAttentionKernel<CacheFormat::float32>> paged_attention;
    static const Description<PagedAttentionKernel<CacheFormat::int8>> paged_attention_int8;
    static const Description<PagedAttentionKernel<CacheFormat::float8>> paged_attention_float8;
    const ort::Api *api = base->get(ort::interface_version);
    if (api == nullptr) return nullptr;  // an older onnxruntime: the session then reports the operators as unknown
    ort::Domain *domain = nullptr;  // lives as long as the process: sessions may outlive any scope here
    if (auto *status = api->create_domain("trtllm.cpu", &domain)) return status;
    const ort::Operator *operators[] = {&quantized_linear, &cached_attention, &paged_attention,
                                       &paged_attention_int8, &paged_attention_float8, &scaled_linear,
                                       &quantized_embedding};
    for (const auto *op : operators)
        if (auto *status = api->add_operator(domain, op)) return status;
    return api->add_domain(options, domain);
}
