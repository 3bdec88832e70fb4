"""`python -m bench.soak`: thousands of all-reduces with faults, and whether any of them went unnoticed."""
