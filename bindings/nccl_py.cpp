#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "nccl_communicator.hpp"

namespace py = pybind11;

namespace gck::nccl {

namespace {

using Address = uintptr_t;
using Wheels = const std::vector<std::string>&;

unsigned long main_thread = 0;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs `function` without the interpreter's lock. Not by a guard object: at the end of the interpreter,
// taking the lock back ends this thread by unwinding its stack, which must not begin in a destructor.
template <typename Function>
auto without_lock(Function function) {
  PyThreadState* const thread = PyEval_SaveThread();
  std::exception_ptr failure;
  if constexpr (std::is_void_v<decltype(function())>) {
    try {
      function();
    } catch (...) {
      failure = std::current_exception();
    }
    PyEval_RestoreThread(thread);
    if (failure) std::rethrow_exception(failure);
  } else {
    decltype(function()) result{};
    try {
      result = function();
    } catch (...) {
      failure = std::current_exception();
    }
    PyEval_RestoreThread(thread);
    if (failure) std::rethrow_exception(failure);
    return result;
  }
}

template <typename Result, typename... Args>
auto unlocked(Result (*function)(Args...)) {
  return [function](Args... args) -> Result { return without_lock([&] { return function(args...); }); };
}

template <typename Result, typename... Args>
auto unlocked(Result (Communicator::*method)(Args...)) {
  return [method](Communicator& self, Args... args) -> Result {
    return without_lock([&] { return (self.*method)(args...); });
  };
}

void raise(const Failure& failure) {
  const py::object type = py::module_::import("gck.errors").attr(failure.type);
  PyErr_SetString(type.ptr(), failure.what());
}

// Ctrl-C ends a wait of the main thread's; signals are nothing to other threads.
void check_signals() {
  if (PyThread_get_thread_ident() != main_thread) return;
  const py::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::tuple<int, std::string, std::string> open(Wheels wheels) {
  const Library& library = Library::open(wheels);
  return {library.version, library.path, library.origin};
}

std::string unique_id(Wheels wheels) {
  const Library& library = Library::open(wheels);
  abi::UniqueId id;
  const abi::Result result = library.GetUniqueId(&id);
  if (result != abi::Result::Success)
    throw Failure("CollectiveError", "unique_id: failed (" + library.explain(result) + ")");
  return std::string(id.internal, sizeof id.internal);
}

std::shared_ptr<Communicator> join(Wheels wheels, const std::string& bytes, int rank, int world_size,
                                   double timeout) {
  abi::UniqueId id;
  if (bytes.size() != sizeof id.internal)
    throw Failure("ArgumentError", "unique_id must be 128 bytes, got " + std::to_string(bytes.size()));
  std::memcpy(id.internal, bytes.data(), bytes.size());
  return Communicator::join(Library::open(wheels), id, rank, world_size, timeout, check_signals);
}

void all_gather(Communicator& self, const std::vector<std::tuple<Address, Address, size_t>>& fields,
                Address stream, double timeout) {
  std::vector<Gather> gathers;
  for (const auto& [send, recv, bytes] : fields) gathers.push_back({at(send), at(recv), bytes});
  self.all_gather(gathers, at(stream), timeout);
}

void all_to_all(Communicator& self,
                const std::vector<std::tuple<int, Address, size_t, Address, size_t>>& peers, Address stream,
                double timeout) {
  std::vector<Exchange> exchanges;
  for (const auto& [peer, send, send_bytes, recv, recv_bytes] : peers)
    exchanges.push_back({peer, at(send), send_bytes, at(recv), recv_bytes});
  self.all_to_all(exchanges, at(stream), timeout);
}

void all_to_all_rows(Communicator& self, Address send, Address recv, size_t row_bytes, Address stream,
                     double timeout) {
  self.all_to_all_rows(at(send), at(recv), row_bytes, at(stream), timeout);
}

// Both phases of a packed all-reduce: row r of `send` goes to rank r; `reduce` puts into `stream` what makes
// one message of the rows that came, and returns (send, recv, bytes) of an all-gather of it. Python runs with
// no frame of ours below it that could catch: the end of the interpreter unwinds threads that come back to
// it.
void packed_all_reduce(Communicator& self, Address send, Address recv, size_t row_bytes,
                       const py::function& reduce, Address stream, double timeout) {
  without_lock([&] { self.all_to_all_rows(at(send), at(recv), row_bytes, at(stream), timeout); });
  const auto [from, to, bytes] = reduce().cast<std::tuple<Address, Address, size_t>>();
  if (bytes == 0) return;
  without_lock([&] { self.all_gather({{at(from), at(to), bytes}}, at(stream), timeout); });
}

void all_reduce(Communicator& self, Address send, Address recv, size_t count, int dtype, int op,
                Address stream, double timeout) {
  self.all_reduce(at(send), at(recv), count, abi::DataType{dtype}, abi::RedOp{op}, at(stream), timeout);
}

void reduce_scatter(Communicator& self, Address send, Address recv, size_t recv_count, int dtype, int op,
                    Address stream, double timeout) {
  self.reduce_scatter(at(send), at(recv), recv_count, abi::DataType{dtype}, abi::RedOp{op}, at(stream),
                      timeout);
}

void broadcast(Communicator& self, Address send, Address recv, size_t bytes, int root, Address stream,
               double timeout) {
  self.broadcast(at(send), at(recv), bytes, root, at(stream), timeout);
}

void group_start(Communicator& self, double timeout) { self.group_start("group", timeout); }

void check(Communicator& self, const std::string& operation) { self.check(operation.c_str()); }

}  // namespace

}  // namespace gck::nccl

void bind_nccl(py::module_& m) {
  using namespace gck::nccl;
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Failure& failure) {
      raise(failure);
    }
  });

  m.def("nccl_open", unlocked(gck::nccl::open));
  m.def("nccl_unique_id",
        [](Wheels wheels) { return py::bytes(without_lock([&] { return unique_id(wheels); })); });
  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "NcclCommunicator")
      .def(py::init(unlocked(join)))
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("device", &Communicator::device)
      .def_property_readonly("reason", &Communicator::reason)
      .def_property_readonly("quiescent", &Communicator::quiescent)
      .def("group_start", unlocked(group_start))
      .def("refuse_group",
           [](Communicator& self, const std::string& operation) { self.refuse_group(operation.c_str()); })
      .def("group_end", unlocked(&Communicator::group_end))
      .def("all_gather", unlocked(all_gather))
      .def("all_to_all", unlocked(all_to_all))
      .def("all_to_all_rows", unlocked(all_to_all_rows))
      .def("packed_all_reduce", packed_all_reduce)
      .def("all_reduce", unlocked(all_reduce))
      .def("reduce_scatter", unlocked(reduce_scatter))
      .def("broadcast", unlocked(broadcast))
      .def("check", check)
      .def("split", unlocked(&Communicator::split))
      .def("abort", unlocked(&Communicator::abort))
      .def("close", unlocked(&Communicator::close));
}
