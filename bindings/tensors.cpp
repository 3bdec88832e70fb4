#include "tensors.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>

namespace py = pybind11;

namespace gck {
namespace {

// Of the tensors that are known: found once, and kept for ever.
const dlpack::ExchangeApi* api = nullptr;
PyObject *tensor_class, *is_neg, *requires_grad, *resize;

bool same(const dlpack::DataType& a, const dlpack::DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

constexpr dlpack::DataType kFloat32{dlpack::Float, 32, 1};

std::optional<Dtype> dtype_of(const dlpack::DataType& dtype) {
  if (same(dtype, kFloat32)) return Dtype::fp32;
  if (same(dtype, {dlpack::Float, 16, 1})) return Dtype::fp16;
  if (same(dtype, {dlpack::Bfloat, 16, 1})) return Dtype::bf16;
  return std::nullopt;
}

// Whether a tensor is what lies in its memory, and nothing else.
bool is_plain(PyObject* tensor) {
  const auto is_false = [](PyObject* answer) {
    if (answer == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer).ptr() == Py_False;
  };
  return is_false(PyObject_CallOneArg(is_neg, tensor)) && is_false(PyObject_GetAttr(tensor, requires_grad));
}

struct Seen {
  dlpack::Tensor tensor;
  char* data;
  int64_t numel, nbytes;
};

std::optional<Seen> look_at(py::handle handle) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(handle.ptr())) != tensor_class) return std::nullopt;
  if (!is_plain(handle.ptr())) return std::nullopt;  // first of all: modes may run anything meanwhile
  dlpack::Tensor t;
  if (api->dltensor_from_py_object_no_sync(handle.ptr(), &t) != 0) {
    PyErr_Clear();  // one without memory, say: whoever is asked next tells what is wrong with it
    return std::nullopt;
  }
  if (t.device.type != dlpack::kCpu) return std::nullopt;
  int64_t numel = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    contiguous = contiguous && (t.strides == nullptr || t.shape[d] == 1 || t.strides[d] == numel);
    numel *= t.shape[d];
  }
  if (numel > 0 && (!contiguous || t.data == nullptr)) return std::nullopt;
  return Seen{t, static_cast<char*>(t.data) + t.byte_offset, numel, numel * t.dtype.bits / 8};
}

bool apart(const Seen& a, const Seen& b) {
  return a.data + a.nbytes <= b.data || b.data + b.nbytes <= a.data;
}

bool fits(const Seen& seen, const BodyField& field) {
  const auto& t = seen.tensor;
  return same(t.dtype, field.dtype) && t.ndim == field.ndim &&
         std::equal(t.shape, t.shape + t.ndim, field.shape.begin());
}

// One number after the other: torch takes twice as long for a tuple.
void resize_to(py::handle tensor, const BodyField& field) {
  const py::int_ rows(field.shape[0]), columns(field.shape[1]);
  PyObject* const given[] = {tensor.ptr(), rows.ptr(), columns.ptr()};
  const auto count = static_cast<size_t>(1 + field.ndim);
  if (!py::reinterpret_steal<py::object>(PyObject_Vectorcall(resize, given, count, nullptr)))
    throw py::error_already_set();
}

// Memory of one body, and the tensors that are views of it.
struct Shared {
  struct View {
    dlpack::ManagedTensor managed;
    std::array<int64_t, 2> shape, strides;
  };

  ResultMemory memory;
  std::atomic<size_t> users;
  std::array<View, kMostFields> views;

  static void drop(dlpack::ManagedTensor* self) { static_cast<Shared*>(self->manager_ctx)->leave(); }

  void leave() {
    if (--users != 0) return;
    give_result(memory);
    delete this;
  }
};

}  // namespace

bool find_tensors(py::handle tensor_type) {
  if (!py::hasattr(tensor_type, dlpack::kAttribute)) return false;
  const py::object capsule = tensor_type.attr(dlpack::kAttribute);
  auto* found = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (found == nullptr) {
    PyErr_Clear();
    return false;
  }
  while (found != nullptr && found->version.major != dlpack::kMajor) found = found->prev_api;
  if (found == nullptr || found->dltensor_from_py_object_no_sync == nullptr) return false;
  tensor_class = tensor_type.inc_ref().ptr();
  is_neg = py::object(tensor_type.attr("is_neg")).release().ptr();
  requires_grad = py::str("requires_grad").release().ptr();
  resize = py::object(tensor_type.attr("resize_")).release().ptr();
  api = found;
  return true;
}

std::optional<Inputs> inputs_of(py::handle grad, py::handle err) {
  const auto g = look_at(grad), e = look_at(err);
  if (!g || !e || g->numel == 0 || g->numel != e->numel || !apart(*g, *e)) return std::nullopt;
  const auto dtype = dtype_of(g->tensor.dtype);
  if (!dtype || !same(e->tensor.dtype, kFloat32)) return std::nullopt;
  return Inputs{g->data, *dtype, reinterpret_cast<float*>(e->data), g->numel};
}

bool are_still(const Inputs& inputs, py::handle grad, py::handle err) {
  const auto is_at = [](py::handle handle, const void* data) {
    dlpack::Tensor t;
    if (api->dltensor_from_py_object_no_sync(handle.ptr(), &t) != 0) throw py::error_already_set();
    return static_cast<char*>(t.data) + t.byte_offset == data;
  };
  return is_at(grad, inputs.grad) && is_at(err, inputs.err);
}

std::optional<Outputs> outputs_of(const py::list& payloads, const BodyLayout& layout, py::handle out,
                                  int64_t numel) {
  const auto o = look_at(out);
  if (!o || o->numel != numel || !same(o->tensor.dtype, kFloat32)) return std::nullopt;
  Outputs outputs{{}, reinterpret_cast<float*>(o->data)};
  auto& [bodies, offsets] = outputs.received;
  for (const py::handle payload : payloads) {
    if (!PyTuple_Check(payload.ptr())) return std::nullopt;
    if (PyTuple_GET_SIZE(payload.ptr()) < static_cast<py::ssize_t>(layout.fields.size())) return std::nullopt;
    for (size_t i = 0; i < layout.fields.size(); ++i) {
      const auto field = look_at(PyTuple_GET_ITEM(payload.ptr(), static_cast<py::ssize_t>(i)));
      if (!field || !fits(*field, layout.fields[i]) || !apart(*field, *o)) return std::nullopt;
      if (i == 0) bodies.push_back(field->data);
      // Fields may have memory of their own, so that addresses are subtracted.
      const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(field->data) -
                                               reinterpret_cast<uintptr_t>(bodies.back()));
      if (bodies.size() == 1) offsets[i] = offset;
      if (field->numel > 0 && offset != offsets[i]) return std::nullopt;  // what is empty lies nowhere
    }
  }
  return outputs;
}

NewBody::NewBody(const BodyLayout& layout)
    : layout_(layout), memory_(take_result(static_cast<size_t>(layout.nbytes))) {
  int64_t end = layout.nbytes;
  for (auto field = layout.fields.rbegin(); field != layout.fields.rend(); ++field) {
    const int64_t filled = field->offset + field->count * field->dtype.bits / 8;
    std::memset(static_cast<char*>(memory_.data) + filled, 0, static_cast<size_t>(end - filled));
    end = field->offset;
  }
}

NewBody::~NewBody() {
  if (!given_) give_result(memory_);
}

py::tuple NewBody::tensors(size_t more) {
  const auto& fields = layout_.fields;
  auto made = std::make_unique<Shared>();
  made->memory = memory_;
  py::tuple tensors(fields.size() + more);
  // One more until all are made: a tensor that cannot be made must not take the memory of the others along.
  made->users = 1;
  struct Leave {
    Shared* shared;
    ~Leave() { shared->leave(); }
  } leave{made.release()};
  given_ = true;
  for (size_t i = 0; i < fields.size(); ++i) {
    const BodyField& field = fields[i];
    auto& view = leave.shared->views[i];
    // A storage ends where the elements do that its tensor is made with: the first one is cut to its shape.
    const int64_t whole = layout_.nbytes * 8 / field.dtype.bits;
    const bool cut = i == 0 && whole != field.count;
    const int ndim = cut ? 1 : field.ndim;
    view.shape = field.shape;
    if (cut) view.shape[0] = whole;
    view.strides = {ndim == 1 ? 1 : std::max<int64_t>(field.shape[1], 1), 1};
    view.managed = {{dlpack::kMajor, 0},
                    leave.shared,
                    Shared::drop,
                    0,
                    {data() + field.offset,
                     {dlpack::kCpu, 0},
                     ndim,
                     field.dtype,
                     view.shape.data(),
                     view.strides.data(),
                     0}};
    void* tensor = nullptr;
    ++leave.shared->users;
    // Who fails may have dropped it or not: better the memory is lost than freed twice.
    if (api->managed_tensor_to_py_object_no_sync(&view.managed, &tensor) != 0) throw py::error_already_set();
    tensors[i] = py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
    if (cut) resize_to(tensors[0], field);
  }
  return tensors;
}

}  // namespace gck
