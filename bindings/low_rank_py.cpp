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

// The shapes of matrices that are worked on together; all functions take an address for each.
struct Matrices {
  gck::LowRankShapes shapes;

  explicit Matrices(const std::vector<std::tuple<int64_t, int64_t, int64_t>>& given) {
    for (const auto& [numel, columns, rank] : given) {
      if (numel < 1 || columns < 1 || rank < 1 || rank > gck::kMostRank)
        throw std::invalid_argument("LowRankMatrices: a shape is out of range");
      shapes.push_back({numel, columns, rank});
    }
  }

  template <typename T>
  std::vector<T*> all(const Addresses& addresses) const {
    check(addresses.size());
    std::vector<T*> pointers(addresses.size());
    for (size_t i = 0; i < addresses.size(); ++i) pointers[i] = at<T>(addresses[i]);
    return pointers;
  }

  void check(size_t count) const {
    if (count != shapes.size())
      throw std::invalid_argument("LowRankMatrices: there must be an address for each matrix");
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
            for (size_t count : {grads.size(), dtypes.size(), errs.size(), accs.size()}) self.check(count);
            std::vector<LowRankInput> inputs;
            for (size_t i = 0; i < self.shapes.size(); ++i)
              inputs.push_back(
                  {at<void>(grads[i]), Dtype{dtypes[i]}, at<float>(errs[i]), at<float>(accs[i])});
            const ResidualOptions options{decay, at<float>(clip), nullptr};
            low_rank_project(self.shapes, inputs, options.reading(), self.all<const float>(bases),
                             self.all<float>(lefts), threads);
          },
          nogil)
      .def(
          "orthonormalise",
          [](const Matrices& self, const Addresses& lefts, int threads) {
            low_rank_orthonormalise(self.shapes, self.all<float>(lefts), threads);
          },
          nogil)
      .def(
          "back_project",
          [](const Matrices& self, const Addresses& accs, const Addresses& lefts, const Addresses& rights,
             int threads) {
            low_rank_back_project(self.shapes, self.all<const float>(accs), self.all<const float>(lefts),
                                  self.all<float>(rights), threads);
          },
          nogil)
      .def(
          "next_basis",
          [](const Matrices& self, const Addresses& bases, const Addresses& rights,
             const Addresses& followings, int threads) {
            low_rank_next_basis(self.shapes, self.all<const float>(bases), self.all<const float>(rights),
                                self.all<float>(followings), threads);
          },
          nogil)
      .def(
          "settle",
          [](const Matrices& self, const Addresses& accs, const Addresses& errs, const Addresses& lefts,
             const Addresses& rights, Address cleared, int threads) {
            low_rank_settle(self.shapes, self.all<const float>(accs), self.all<float>(errs),
                            self.all<const float>(lefts), self.all<const float>(rights), at<int64_t>(cleared),
                            threads);
          },
          nogil)
      .def(
          "decompress",
          [](const Matrices& self, const Addresses& lefts, const Addresses& rights, const Addresses& outs,
             float alpha, bool add, int threads) {
            low_rank_decompress(self.shapes, self.all<const float>(lefts), self.all<const float>(rights),
                                self.all<float>(outs), alpha, add, threads);
          },
          nogil);
}
