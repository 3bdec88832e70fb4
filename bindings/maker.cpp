#include "maker.hpp"

#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "direct.hpp"

namespace py = pybind11;

namespace gck {
namespace {

constexpr size_t kRemembered = 1024;          // answers of `find`
constexpr int64_t kWorthReleasing = 1 << 14;  // elements: the interpreter's lock, for others to run
constexpr const char* kCapsule = "gck.PayloadMaker";

using Arguments = std::span<PyObject* const>;

// How vectors of one length are compressed with some options, and what their payloads are made of.
struct Known {
  std::vector<py::object> options;
  py::object owner;  // of `direct`
  const Direct* direct;
  py::object type;
  py::tuple rest;
};

struct Maker {
  py::object find, num_threads, written;
  std::vector<py::object> watchers;
  std::mutex mutex;  // of what follows
  std::unordered_map<int64_t, std::vector<std::shared_ptr<const Known>>> known;
  size_t count = 0;
};

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Numbers and strings of Python's own, which can be compared without running anything of a user's.
bool is_plain_value(PyObject* option) {
  return PyLong_CheckExact(option) || PyFloat_CheckExact(option) || PyUnicode_CheckExact(option);
}

// True is no number, and no option is 0, so that 0.0 and -0.0 need not be told apart.
bool same_option(PyObject* a, PyObject* b) {
  if (a == b) return true;
  return Py_TYPE(a) == Py_TYPE(b) && is_plain_value(a) && PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

bool same_options(const Known& known, Arguments options) {
  if (known.options.size() != options.size()) return false;
  for (size_t i = 0; i < options.size(); ++i) {
    if (!same_option(known.options[i].ptr(), options[i])) return false;
  }
  return true;
}

std::shared_ptr<const Known> remembered(Maker& maker, int64_t numel, Arguments options) {
  const std::lock_guard lock(maker.mutex);
  const auto found = maker.known.find(numel);
  if (found == maker.known.end()) return nullptr;
  for (const auto& known : found->second) {
    if (same_options(*known, options)) return known;
  }
  return nullptr;
}

// Values are remembered by what they are, dtypes and None by who they are: there is one of each. A number of
// another type would be another object at each call.
bool may_be_met_again(Arguments options) {
  for (PyObject* option : options) {
    if (PyNumber_Check(option) && !is_plain_value(option)) return false;
  }
  return true;
}

std::shared_ptr<const Known> find(Maker& maker, int64_t numel, Arguments options) {
  if (auto known = remembered(maker, numel, options)) return known;
  py::tuple given(1 + options.size());
  given[0] = py::int_(numel);
  for (size_t i = 0; i < options.size(); ++i) given[1 + i] = py::handle(options[i]);
  const py::object answer = checked(PyObject_CallObject(maker.find.ptr(), given.ptr()));
  if (answer.is_none()) return nullptr;
  const auto [owner, type, rest] = answer.cast<std::tuple<py::object, py::object, py::tuple>>();
  auto known = std::make_shared<Known>(Known{{}, owner, owner.cast<const Direct*>(), type, rest});
  for (PyObject* option : options) known->options.push_back(py::reinterpret_borrow<py::object>(option));
  if (!may_be_met_again(options)) return known;
  decltype(maker.known) forgotten;  // dropped without the lock: that may run anything
  {
    const std::lock_guard lock(maker.mutex);
    if (maker.count == kRemembered) {
      std::swap(forgotten, maker.known);
      maker.count = 0;
    }
    maker.known[numel].push_back(known);
    ++maker.count;
  }
  return known;
}

bool is_watched(const Maker& maker) {
  for (const py::object& watcher : maker.watchers) {
    const int seen = PyObject_IsTrue(checked(PyObject_CallNoArgs(watcher.ptr())).ptr());
    if (seen < 0) throw py::error_already_set();
    if (seen) return true;
  }
  return false;
}

std::optional<int64_t> plain_seed(PyObject* seed) {
  if (!PyLong_CheckExact(seed)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(seed, &overflow);
  return overflow ? std::nullopt : std::optional(value);
}

py::object make(Maker& maker, Arguments given) {
  if (given.size() < 3) throw py::type_error("a payload maker takes a seed, a gradient and a residual");
  const auto seed = plain_seed(given[0]);
  if (!seed || is_watched(maker)) return py::none();
  const auto inputs = inputs_of(given[1], given[2]);
  if (!inputs) return py::none();
  const auto known = find(maker, inputs->numel, given.subspan(3));
  if (!known) return py::none();
  const int threads = checked(PyObject_CallNoArgs(maker.num_threads.ptr())).cast<int>();

  // Whatever needs memory of Python's comes before anything is written.
  NewBody body(known->direct->layout);
  const size_t tensors = known->direct->layout.fields.size();
  const py::tuple fields = body.tensors(known->rest.size());
  for (size_t i = 0; i < known->rest.size(); ++i) {
    PyObject* value = PyTuple_GET_ITEM(known->rest.ptr(), static_cast<Py_ssize_t>(i));
    if (value == Py_None) value = given[0];
    PyTuple_SET_ITEM(fields.ptr(), static_cast<Py_ssize_t>(tensors + i), Py_NewRef(value));
  }
  // What a NamedTuple's own `__new__` does, in Python.
  const py::object arguments = checked(PyTuple_Pack(1, fields.ptr()));
  auto* const type = reinterpret_cast<PyTypeObject*>(known->type.ptr());
  py::object payload = checked(PyTuple_Type.tp_new(type, arguments.ptr(), nullptr));
  const py::object changed = checked(PyTuple_Pack(1, given[2]));

  if (!are_still(*inputs, given[1], given[2])) return py::none();
  if (inputs->numel < kWorthReleasing) {
    known->direct->compress(*inputs, body.data(), *seed, threads);
  } else {
    const py::gil_scoped_release nogil;
    known->direct->compress(*inputs, body.data(), *seed, threads);
  }
  checked(PyObject_CallOneArg(maker.written.ptr(), changed.ptr()));
  return payload;
}

PyObject* make_or_raise(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  try {
    auto* maker = static_cast<Maker*>(PyCapsule_GetPointer(self, kCapsule));
    return make(*maker, {given, static_cast<size_t>(count)}).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Not through pybind11, whose way of calling takes as long as looking at a tensor.
PyMethodDef method{"make_payload", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(make_or_raise)),
                   METH_FASTCALL, nullptr};

}  // namespace

py::object payload_maker(py::object find_known, const py::tuple& watchers, py::object num_threads,
                         py::object written) {
  auto maker = std::make_unique<Maker>();
  maker->find = std::move(find_known);
  maker->num_threads = std::move(num_threads);
  maker->written = std::move(written);
  for (const py::handle watcher : watchers)
    maker->watchers.push_back(py::reinterpret_borrow<py::object>(watcher));
  const py::capsule self(maker.release(), kCapsule, [](PyObject* capsule) {
    delete static_cast<Maker*>(PyCapsule_GetPointer(capsule, kCapsule));
  });
  return checked(PyCFunction_NewEx(&method, self.ptr(), nullptr));
}

}  // namespace gck
