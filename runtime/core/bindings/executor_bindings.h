// Binds the runtime's core into the extension module.
#pragma once

#include <nanobind/nanobind.h>

void bind_runtime(nanobind::module_ &module);
