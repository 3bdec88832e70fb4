"""One folder a compressor: the Compressor, its oracle, its CPU twin and its GPU kernels."""

if __name__ != "gck.kernels":
    raise ImportError(f"import gck.kernels, not {__name__}: this folder belongs to the package gck")
