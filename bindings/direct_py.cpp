// Calls that take tensors as they are, and make the payload: of few elements, what Python does about a kernel
// takes longer than the kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/topk.hpp"
#include "tensors.hpp"

namespace py = pybind11;

void bind_direct(py::module_& m) {
  using namespace gck;

  m.def("find_tensors", &find_tensors);
  m.def("drop_results", &drop_results);

  py::class_<BodyLayout>(m, "BodyLayout")
      .def(py::init([](const std::vector<std::tuple<int, int, int64_t, int64_t>>& fields, int64_t nbytes) {
        BodyLayout layout{{}, nbytes};
        for (const auto& [code, bits, count, offset] : fields) {
          layout.fields.push_back(
              {{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}, count, offset});
        }
        return layout;
      }));

  m.def("new_tensor", [](int code, int bits, int64_t numel) -> py::object {
    const BodyField whole{{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}, numel, 0};
    const BodyLayout layout{{whole}, numel * bits / 8};
    return NewBody(layout).tensors()[0];
  });

  m.def("topk_new",
        [](const BodyLayout& layout, int value_dtype, py::handle grad, py::handle err,
           int threads) -> py::object {
          const auto inputs = inputs_of(grad, err);
          if (!inputs) return py::none();
          NewBody body(layout);
          const BodyField &values = layout.fields[0], &indices = layout.fields[1];
          {
            const py::gil_scoped_release nogil;
            topk_compress({{{inputs->grad, inputs->dtype, inputs->err, inputs->numel}},
                           inputs->numel,
                           values.count,
                           body.field<void>(0),
                           Dtype{value_dtype},
                           body.field<void>(1),
                           indices.dtype.bits == 64,
                           nullptr,
                           threads});
          }
          return body.tensors();
        });
}
