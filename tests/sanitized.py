"""A pytest plugin (`-p tests.sanitized`): gck._C is the module in the folder $GCK_SANITIZED, whatever is
installed. See `make sanitize`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch  # noqa: F401  before gck._C, as gck._native says

(path,) = Path(os.environ["GCK_SANITIZED"]).glob("_C.*.so")
spec = importlib.util.spec_from_file_location("gck._C", path)
if spec is None or spec.loader is None:
    raise ImportError(path)
sys.modules["gck._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["gck._C"])


def pytest_report_header() -> str:
    return f"sanitized: {path}"
