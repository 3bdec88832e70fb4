#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& m);
void bind_direct(pybind11::module_& m);
void bind_low_rank(pybind11::module_& m);
void bind_nccl(pybind11::module_& m);

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of gck. They see addresses, sizes and thread counts, never a tensor.";
  bind_cpu(m);
  bind_direct(m);
  bind_low_rank(m);
  bind_nccl(m);
}
