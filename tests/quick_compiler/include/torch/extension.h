// What DeepSpeed's extensions use of PyTorch's own torch/extension.h, which includes the whole C++ frontend.
#pragma once
#include <torch/types.h>
#include <torch/csrc/utils/pybind.h>
