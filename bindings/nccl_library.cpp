#include "nccl_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>

namespace gck::nccl {

namespace {

constexpr const char* kUnavailable = "BackendUnavailableError";
constexpr const char* kName = "libnccl.so.2";

std::string path_of(void* function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : kName;
}

template <typename Signature>
void bind(void* handle, const std::string& path, Symbol<Signature>& symbol, bool optional) {
  symbol.library = &path;
  symbol.address = reinterpret_cast<decltype(symbol.address)>(dlsym(handle, symbol.name));
  if (!optional) symbol.need();
}

}  // namespace

std::string version_text(int code) {
  const int major = code / 10000;
  const auto text = [](int a, int b, int c) {
    return std::to_string(a) + "." + std::to_string(b) + "." + std::to_string(c);
  };
  // Up to 2.8 the major version counted thousands.
  return major == 0 ? text(code / 1000, code / 100 % 10, code % 100)
                    : text(major, code / 100 % 100, code % 100);
}

Library* Library::load(void* handle, const char* origin) {
  std::unique_ptr<Library> library(new Library);
  void* version = dlsym(handle, "ncclGetVersion");
  library->origin = origin;
  library->path = version == nullptr ? "the library" : path_of(version);
  bind(handle, library->path, library->GetVersion, false);
  if (library->GetVersion(&library->version) != abi::Result::Success)
    throw Failure(kUnavailable, library->path + ": ncclGetVersion failed");
  if (library->version < abi::kOldest)
    throw Failure(kUnavailable, library->path + " is NCCL " + version_text(library->version) +
                                    ", older than " + version_text(abi::kOldest));
#define GCK_NCCL_BIND(name, optional, parameters) bind(handle, library->path, library->name, optional);
  GCK_NCCL_FUNCTIONS(GCK_NCCL_BIND)
#undef GCK_NCCL_BIND
  library->error_string_ = reinterpret_cast<abi::GetErrorString>(dlsym(handle, "ncclGetErrorString"));
  library->last_error_ = reinterpret_cast<abi::GetLastError>(dlsym(handle, "ncclGetLastError"));
  return library.release();
}

std::string Library::explain(abi::Result result, abi::CommPtr comm) const {
  std::string text = error_string_ != nullptr ? error_string_(result) : "";
  if (text.empty()) text = "result " + std::to_string(static_cast<int>(result));
  const char* last = last_error_ != nullptr ? last_error_(comm) : nullptr;
  if (last != nullptr && *last != '\0') text += std::string(": ") + last;
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

const Library& Library::open(const std::vector<std::string>& wheels) {
  // Never freed: threads of NCCL's and of ours may outlive static objects. A failure is not remembered, since
  // the user may mend its cause.
  static std::mutex mutex;
  static Library* opened = nullptr;
  const std::lock_guard lock(mutex);
  if (opened != nullptr) return *opened;

  std::string tried;
  const auto attempt = [&](const std::string& file, int flags) {
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
    const char* reason = handle == nullptr ? dlerror() : nullptr;
    if (reason != nullptr && flags == 0) tried += std::string(tried.empty() ? "" : "; ") + reason;
    return handle;
  };
  const char* chosen = std::getenv("GCK_NCCL_LIBRARY");
  if (chosen != nullptr && *chosen != '\0') {
    if (void* handle = attempt(chosen, 0)) return *(opened = load(handle, "GCK_NCCL_LIBRARY"));
    throw Failure(kUnavailable, "GCK_NCCL_LIBRARY cannot be opened: " + tried);
  }
  if (void* handle = attempt(kName, RTLD_NOLOAD)) return *(opened = load(handle, "process"));
  for (const std::string& wheel : wheels)
    if (void* handle = attempt(wheel, 0)) return *(opened = load(handle, "wheel"));
  if (void* handle = attempt(kName, 0)) return *(opened = load(handle, "system"));
  throw Failure(kUnavailable, "NCCL is not installed (" + tried +
                                  "); `pip install nvidia-nccl-cu12`, or -cu13 as your PyTorch needs it");
}

}  // namespace gck::nccl
