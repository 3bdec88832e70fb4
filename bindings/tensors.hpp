// Tensors without a header of torch: by DLPack's table of functions, which torch has since 2.10. Looking at
// one takes a twentieth of what its attributes take in Python, and making one a third.
#pragma once

#include <pybind11/pybind11.h>

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

// Nothing unless they are on the CPU, contiguous, of fitting dtypes and lengths, not empty, and share no
// memory. Both must be of the type whose table was found.
std::optional<Inputs> inputs_of(pybind11::handle grad, pybind11::handle err);

// Where the fields of a body lie: see gck/wire.py.
struct BodyField {
  dlpack::DataType dtype;
  int64_t count, offset;  // elements, bytes
};

struct BodyLayout {
  std::vector<BodyField> fields;  // none of them empty
  int64_t nbytes;
};

// A new body, its padding zero.
class NewBody {
 public:
  explicit NewBody(const BodyLayout& layout);
  ~NewBody();
  NewBody(const NewBody&) = delete;
  NewBody& operator=(const NewBody&) = delete;

  template <typename T>
  T* field(size_t i) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.data) + layout_.fields[i].offset);
  }

  // A tensor of each field, which share the memory. That of the first one reaches over all of the body: it is
  // for the caller to cut it to its length.
  pybind11::tuple tensors();

 private:
  const BodyLayout& layout_;
  ResultMemory memory_;
  bool given_ = false;
};

}  // namespace gck
