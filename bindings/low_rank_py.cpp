#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/low_rank.hpp"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<Address>;

template <typename T>
std::vector<T*> all(const Addresses& addresses) {
  std::vector<T*> pointers(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) pointers[i] = at<T>(addresses[i]);
  return pointers;
}

// The shapes of matrices that are worked on together; all functions take an address for each.
struct Matrices {
  gck::LowRankShapes shapes;

  explicit Matrices(const std::vector<std::tuple<int64_t, int64_t, int64_t>>& given) {
    for (const auto& [numel, columns, rank] : given) shapes.push_back({numel, columns, rank});
  }
};

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
  py::class_<Matrices>(m, "LowRankMatrices")
      .def(py::init<const std::vector<std::tuple<int64_t, int64_t, int64_t>>&>())
      .def(
          "project",
          [](const Matrices& self, const Addresses& grads, const std::vector<int>& dtypes,
             const Addresses& errs, const Addresses& accs, float decay, Address clip, const Addresses& bases,
             const Addresses& lefts, int threads) {
            std::vector<LowRankInput> inputs;
            for (size_t i = 0; i < self.shapes.size(); ++i)
              inputs.push_back(
                  {at<void>(grads[i]), Dtype{dtypes[i]}, at<float>(errs[i]), at<float>(accs[i])});
            const ResidualOptions options{decay, at<float>(clip), nullptr};
            low_rank_project(self.shapes, inputs, options.reading(), all<const float>(bases),
                             all<float>(lefts), threads);
          },
          nogil)
      .def(
          "orthonormalise",
          [](const Matrices& self, const Addresses& lefts, int threads) {
            low_rank_orthonormalise(self.shapes, all<float>(lefts), threads);
          },
          nogil)
      .def(
          "back_project",
          [](const Matrices& self, const Addresses& accs, const Addresses& lefts, const Addresses& rights,
             int threads) {
            low_rank_back_project(self.shapes, all<const float>(accs), all<const float>(lefts),
                                  all<float>(rights), threads);
          },
          nogil)
      .def(
          "next_basis",
          [](const Matrices& self, const Addresses& bases, const Addresses& rights,
             const Addresses& followings, int threads) {
            low_rank_next_basis(self.shapes, all<const float>(bases), all<const float>(rights),
                                all<float>(followings), threads);
          },
          nogil)
      .def(
          "settle",
          [](const Matrices& self, const Addresses& accs, const Addresses& errs, const Addresses& lefts,
             const Addresses& rights, Address cleared, int threads) {
            low_rank_settle(self.shapes, all<const float>(accs), all<float>(errs), all<const float>(lefts),
                            all<const float>(rights), at<int64_t>(cleared), threads);
          },
          nogil)
      .def(
          "decompress",
          [](const Matrices& self, const Addresses& lefts, const Addresses& rights, const Addresses& outs,
             float alpha, bool add, int threads) {
            low_rank_decompress(self.shapes, all<const float>(lefts), all<const float>(rights),
                                all<float>(outs), alpha, add, threads);
          },
          nogil);
}
