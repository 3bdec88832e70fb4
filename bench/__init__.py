"""Microbenchmarks: kernels as multiples of the memory floor and of their peers. `python -m bench`."""
