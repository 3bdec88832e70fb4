#include "tensors.hpp"

#include <atomic>
#include <cstring>
#include <memory>

namespace py = pybind11;

namespace gck {
namespace {

const dlpack::ExchangeApi* api = nullptr;

std::optional<Dtype> dtype_of(const dlpack::DataType& dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == dlpack::Float && dtype.bits == 32) return Dtype::fp32;
  if (dtype.code == dlpack::Float && dtype.bits == 16) return Dtype::fp16;
  if (dtype.code == dlpack::Bfloat && dtype.bits == 16) return Dtype::bf16;
  return std::nullopt;
}

struct Seen {
  char* data;
  Dtype dtype;
  int64_t numel, nbytes;
};

std::optional<Seen> look_at(py::handle tensor) {
  dlpack::Tensor t;
  if (api->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) {
    PyErr_Clear();  // one without memory, say: whoever is asked next tells what is wrong with it
    return std::nullopt;
  }
  const auto dtype = dtype_of(t.dtype);
  if (t.device.type != dlpack::kCpu || !dtype) return std::nullopt;
  int64_t numel = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.strides != nullptr && t.shape[d] != 1 && t.strides[d] != numel) return std::nullopt;
    numel *= t.shape[d];
  }
  return Seen{static_cast<char*>(t.data) + t.byte_offset, *dtype, numel,
              numel * (*dtype == Dtype::fp32 ? 4 : 2)};
}

// Memory of one body, and the tensors that are views of it.
struct Shared {
  struct View {
    dlpack::ManagedTensor managed;
    int64_t shape, stride;
  };

  ResultMemory memory;
  std::atomic<size_t> users;
  std::unique_ptr<View[]> views;

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
  api = found;
  return true;
}

std::optional<Inputs> inputs_of(py::handle grad, py::handle err) {
  const auto g = look_at(grad), e = look_at(err);
  const bool fit = g && e && e->dtype == Dtype::fp32 && g->numel == e->numel && g->numel > 0 &&
                   (g->data + g->nbytes <= e->data || e->data + e->nbytes <= g->data);
  if (!fit) return std::nullopt;
  return Inputs{g->data, g->dtype, reinterpret_cast<float*>(e->data), g->numel};
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

py::tuple NewBody::tensors() {
  const auto& fields = layout_.fields;
  auto made = std::make_unique<Shared>();
  made->views = std::make_unique<Shared::View[]>(fields.size());
  made->memory = memory_;
  py::tuple tensors(fields.size());
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
    view.shape = i == 0 ? layout_.nbytes / (field.dtype.bits / 8) : field.count;
    view.stride = 1;
    char* start = static_cast<char*>(memory_.data) + field.offset;
    view.managed = {{dlpack::kMajor, 0},
                    leave.shared,
                    Shared::drop,
                    0,
                    {start, {dlpack::kCpu, 0}, 1, field.dtype, &view.shape, &view.stride, 0}};
    void* tensor = nullptr;
    ++leave.shared->users;
    // Who fails may have dropped it or not: better the memory is lost than freed twice.
    if (api->managed_tensor_to_py_object_no_sync(&view.managed, &tensor) != 0) throw py::error_already_set();
    tensors[i] = py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
  }
  return tensors;
}

}  // namespace gck
