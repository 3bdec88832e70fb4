#include <pybind11/pybind11.h>

#include "cpu/low_rank.hpp"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_low_rank(py::module_& m) {
  using namespace gck;
  const py::call_guard<py::gil_scoped_release> nogil;

  m.def(
      "low_rank_basis",
      [](int64_t seed, int64_t count, Address basis) {
        low_rank_basis(static_cast<uint64_t>(seed), count, at<float>(basis));
      },
      nogil);
  m.def(
      "low_rank_project",
      [](int64_t numel, int64_t columns, int64_t rank, Address grad, int grad_dtype, Address err, float decay,
         Address clip, Address basis, Address left, int threads) {
        const ResidualOptions options{decay, at<float>(clip), nullptr};
        low_rank_project({numel, columns, rank}, at<void>(grad), Dtype{grad_dtype}, at<float>(err),
                         options.reading(), at<float>(basis), at<float>(left), threads);
      },
      nogil);
  m.def(
      "low_rank_orthonormalise",
      [](Address left, int64_t rows, int64_t rank, int threads) {
        low_rank_orthonormalise(at<float>(left), rows, rank, threads);
      },
      nogil);
  m.def(
      "low_rank_back_project",
      [](int64_t numel, int64_t columns, int64_t rank, Address acc, Address left, Address right,
         int threads) {
        low_rank_back_project({numel, columns, rank}, at<float>(acc), at<float>(left), at<float>(right),
                              threads);
      },
      nogil);
  m.def(
      "low_rank_next_basis",
      [](Address basis, Address right, Address following, int64_t rank, int64_t columns, int threads) {
        low_rank_next_basis(at<float>(basis), at<float>(right), at<float>(following), rank, columns, threads);
      },
      nogil);
  m.def(
      "low_rank_settle",
      [](int64_t numel, int64_t columns, int64_t rank, Address acc, Address left, Address right,
         int threads) {
        return low_rank_settle({numel, columns, rank}, at<float>(acc), at<float>(left), at<float>(right),
                               threads);
      },
      nogil);
  m.def(
      "low_rank_decompress",
      [](int64_t numel, int64_t columns, int64_t rank, Address left, Address right, Address out, float alpha,
         bool add, int threads) {
        low_rank_decompress({numel, columns, rank}, at<float>(left), at<float>(right), at<float>(out), alpha,
                            add, threads);
      },
      nogil);
}
