#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "nccl_communicator.hpp"

namespace py = pybind11;

namespace gck::nccl {

namespace {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise(const Failure& failure) {
  const py::object type = py::module_::import("gck.errors").attr(failure.type);
  PyErr_SetString(type.ptr(), failure.what());
}

// Ctrl-C ends a wait of the main thread's.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

abi::UniqueId id_of(const std::string& bytes) {
  abi::UniqueId id;
  if (bytes.size() != sizeof id.internal)
    throw Failure("ArgumentError", "unique_id must be 128 bytes, got " + std::to_string(bytes.size()));
  std::memcpy(id.internal, bytes.data(), bytes.size());
  return id;
}

void bind(py::module_& m) {
  using Wheels = const std::vector<std::string>&;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Failure& failure) {
      raise(failure);
    }
  });

  m.def(
      "nccl_open",
      [](Wheels wheels) {
        const Library& library = Library::open(wheels);
        return std::tuple(library.version, library.path, library.origin);
      },
      nogil);
  m.def("nccl_unique_id", [](Wheels wheels) {
    abi::UniqueId id;
    {
      const py::gil_scoped_release released;
      const Library& library = Library::open(wheels);
      const abi::Result result = library.GetUniqueId(&id);
      if (result != abi::Result::Success)
        throw Failure("CollectiveError", "unique_id: failed (" + library.explain(result) + ")");
    }
    return py::bytes(id.internal, sizeof id.internal);
  });

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "NcclCommunicator")
      .def(
          py::init([](Wheels wheels, const std::string& unique_id, int rank, int world_size, double timeout) {
            return Communicator::join(Library::open(wheels), id_of(unique_id), rank, world_size, timeout,
                                      check_signals);
          }),
          nogil)
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("device", &Communicator::device)
      .def_property_readonly("reason", &Communicator::reason)
      .def_property_readonly("quiescent", &Communicator::quiescent)
      .def(
          "group_start", [](Communicator& self, double timeout) { self.group_start("group", timeout); },
          nogil)
      .def("group_end", &Communicator::group_end, nogil)
      .def(
          "all_gather",
          [](Communicator& self, const std::vector<std::tuple<Address, Address, size_t>>& fields,
             Address stream, double timeout) {
            std::vector<Gather> gathers;
            for (const auto& [send, recv, bytes] : fields) gathers.push_back({at(send), at(recv), bytes});
            self.all_gather(gathers, at(stream), timeout);
          },
          nogil)
      .def(
          "all_to_all",
          [](Communicator& self, const std::vector<std::tuple<int, Address, size_t, Address, size_t>>& peers,
             Address stream, double timeout) {
            std::vector<Exchange> exchanges;
            for (const auto& [peer, send, send_bytes, recv, recv_bytes] : peers)
              exchanges.push_back({peer, at(send), send_bytes, at(recv), recv_bytes});
            self.all_to_all(exchanges, at(stream), timeout);
          },
          nogil)
      .def(
          "all_reduce",
          [](Communicator& self, Address send, Address recv, size_t count, int dtype, int op, Address stream,
             double timeout) {
            self.all_reduce(at(send), at(recv), count, abi::DataType{dtype}, abi::RedOp{op}, at(stream),
                            timeout);
          },
          nogil)
      .def(
          "reduce_scatter",
          [](Communicator& self, Address send, Address recv, size_t recv_count, int dtype, int op,
             Address stream, double timeout) {
            self.reduce_scatter(at(send), at(recv), recv_count, abi::DataType{dtype}, abi::RedOp{op},
                                at(stream), timeout);
          },
          nogil)
      .def(
          "broadcast",
          [](Communicator& self, Address send, Address recv, size_t bytes, int root, Address stream,
             double timeout) { self.broadcast(at(send), at(recv), bytes, root, at(stream), timeout); },
          nogil)
      .def(
          "check", [](Communicator& self, const std::string& operation) { self.check(operation.c_str()); },
          nogil)
      .def("split", &Communicator::split, nogil)
      .def("abort", &Communicator::abort, nogil)
      .def("close", &Communicator::close, nogil);
}

}  // namespace

}  // namespace gck::nccl

void bind_nccl(py::module_& m) { gck::nccl::bind(m); }
