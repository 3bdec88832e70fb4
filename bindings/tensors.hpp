// Tensors without a header of torch: by DLPack's table of functions, which torch has since 2.10. Looking at
// one takes a twentieth of what its attributes take in Python, and making one a third.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/types.hpp"
#include "dlpack.hpp"
#include "results.hpp"

namespace gck {

// Finds the table of this tensor type; false where it has none that is known here.
bool find_tensors(pybind11::handle tensor_type);

// A gradient and its residual on the CPU.
struct Inputs {
  const void* grad;
  Dtype dtype;
  float* err;
  int64_t numel;
};

// Nothing unless they are on the CPU, contiguous, of fitting dtypes and lengths, not empty, share no memory,
// and are of no other class than that whose table was found, not negated lazily, and without requires_grad.
std::optional<Inputs> inputs_of(pybind11::handle grad, pybind11::handle err);

// Whether they still lie where they did: Python may have run since, and have given their memory away.
bool are_still(const Inputs& inputs, pybind11::handle grad, pybind11::handle err);

// Where the fields of a body lie: see gck/wire.py.
struct BodyField {
  dlpack::DataType dtype;
  int64_t count, offset;  // elements, bytes
  int ndim;               // 1 or 2
  std::array<int64_t, 2> shape;
};

struct BodyLayout {
  std::vector<BodyField> fields;  // at most kMostFields, the first one not empty
  int64_t nbytes;
};

constexpr size_t kMostFields = 3;

// Payloads of one layout, which lie anywhere.
struct Received {
  std::vector<const char*> bodies;  // the first field of each
  // Of every field from there, in bytes: the same for all payloads.
  std::array<int64_t, kMostFields> offsets;

  int64_t ranks() const { return static_cast<int64_t>(bodies.size()); }
};

// Them, and the vector that they are decoded to.
struct Outputs {
  Received received;
  float* out;
};

// Nothing unless each payload is a tuple that begins with tensors of this layout's dtypes and shapes, `out`
// is fp32 and of `numel` elements and shares no memory with them, and all are otherwise as `inputs_of` wants
// them. Nobody else may hold the list.
std::optional<Outputs> outputs_of(const pybind11::list& payloads, const BodyLayout& layout,
                                  pybind11::handle out, int64_t numel);

// A new body, its padding zero.
class NewBody {
 public:
  explicit NewBody(const BodyLayout& layout);
  ~NewBody();
  NewBody(const NewBody&) = delete;
  NewBody& operator=(const NewBody&) = delete;

  char* data() const { return static_cast<char*>(memory_.data); }

  // A tensor of each field, which share the memory; behind them `more` items that are yet to be set. The
  // storage of the first tensor is all of the body.
  pybind11::tuple tensors(size_t more = 0);

 private:
  const BodyLayout& layout_;
  ResultMemory memory_;
  bool given_ = false;
};

}  // namespace gck
