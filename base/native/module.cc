// The one extension module, trtllm._native: each room binds its own functions into it.
#include <nanobind/nanobind.h>

void bind_checkpoints(nanobind::module_ &module);
void bind_runtime(nanobind::module_ &module);

NB_MODULE(_native, module) {
    module.doc() = "Hot loops in C++: quantization, dtype conversion, and the runtime's core.";
    bind_checkpoints(module);
    bind_runtime(module);
}
