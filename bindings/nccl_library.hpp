// libnccl.so.2, opened at run time.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "nccl_abi.hpp"

namespace gck::nccl {

// An error by the name of its class in gck.errors.
struct Failure : std::runtime_error {
  Failure(const char* type_name, const std::string& text) : std::runtime_error(text), type(type_name) {}
  const char* type;
};

// One function of the library; calling one that the library lacks is a BackendUnavailableError.
template <typename Signature>
struct Symbol;
template <typename... Args>
struct Symbol<abi::Result(Args...)> {
  const char* name;
  abi::Result (*address)(Args...) = nullptr;
  const std::string* library = nullptr;

  void need() const {
    if (address == nullptr) throw Failure("BackendUnavailableError", *library + " lacks " + name);
  }
  abi::Result operator()(Args... args) const {
    need();
    return address(args...);
  }
};

struct Library {
  std::string path;
  std::string origin;  // "GCK_NCCL_LIBRARY", "process", "wheel" or "system"
  int version = 0;     // as ncclGetVersion encodes it
#define GCK_NCCL_MEMBER(name, optional, parameters) Symbol<abi::Result parameters> name{"nccl" #name};
  GCK_NCCL_FUNCTIONS(GCK_NCCL_MEMBER)
#undef GCK_NCCL_MEMBER

  // NCCL's name for a result, and what it last wrote about an error (of comm's, where it keeps them apart).
  std::string explain(abi::Result result, abi::CommPtr comm = nullptr) const;

  // The process's library: the first of the environment's GCK_NCCL_LIBRARY (then no other), a libnccl.so.2
  // that is loaded already, the files in `wheels`, the system's. Opened once, never closed.
  //
  // Raises BackendUnavailableError: none opens, it is older than 2.18.1, or a function is missing.
  static const Library& open(const std::vector<std::string>& wheels);

 private:
  Library() = default;
  static Library* load(void* handle, const char* origin);
  abi::GetErrorString error_string_ = nullptr;
  abi::GetLastError last_error_ = nullptr;
};

std::string version_text(int code);  // 21801 -> "2.18.1"

}  // namespace gck::nccl
