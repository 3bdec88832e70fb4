"""How tensors are described to the compiled kernels."""

from __future__ import annotations

import torch

# enum class Dtype in bindings/cpu/types.hpp
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
