"""Instructions that the CPU's kernels take on 64-bit ARM, counted where there is none."""
