#include <sys/random.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "fake.hpp"

using fake::Engine;
using fake::Frame;
using fake::Group;
using fake::Task;

namespace {

constexpr char kPrefix[] = "fake-nccl-";

thread_local int depth = 0;
thread_local ncclResult_t refused = ncclSuccess;  // of the open group
thread_local std::vector<std::pair<std::shared_ptr<Engine>, Task>> pending;

std::atomic<int> launches{0}, sends{0}, gathers{0};

std::mutex error_mutex;
std::string last_error;

ncclResult_t start_pending() {
  if (refused != ncclSuccess) {
    pending.clear();
    return std::exchange(refused, ncclSuccess);
  }
  std::vector<std::pair<std::shared_ptr<Engine>, Group>> groups;
  for (auto& [engine, task] : pending) {
    auto place = groups.begin();
    while (place != groups.end() && place->first != engine) ++place;
    if (place == groups.end()) place = groups.insert(place, {engine, {}});
    place->second.push_back(std::move(task));
  }
  pending.clear();
  launches += static_cast<int>(groups.size());
  ncclResult_t result = ncclSuccess;
  for (auto& [engine, group] : groups) {
    const ncclResult_t started = engine->submit(std::move(group));
    if (result == ncclSuccess || result == ncclInProgress) result = started;
  }
  return result;
}

ncclResult_t add(ncclComm_t comm, Task task) {
  if (++comm->engine->calls == comm->engine->faults.call_fails_at) {
    fake::set_last_error("injected: a call within a group");
    refused = ncclInternalError;
  }
  if (refused != ncclSuccess) return depth > 0 ? refused : start_pending();
  pending.emplace_back(comm->engine, std::move(task));
  return depth > 0 ? ncclSuccess : start_pending();
}

char* bytes(const void* address) { return static_cast<char*>(const_cast<void*>(address)); }

ncclComm_t begin(std::string name, int rank, int world_size) {
  auto* comm = new ncclComm{std::make_shared<Engine>(std::move(name), rank, world_size)};
  comm->engine->start();
  return comm;
}

ncclResult_t end(ncclComm_t comm, bool abort) {
  if (comm == nullptr) return ncclInvalidArgument;
  while (abort && comm->engine->faults.abort_hangs) std::this_thread::sleep_for(std::chrono::hours(1));
  comm->engine->stop(abort);
  delete comm;
  return ncclSuccess;
}

}  // namespace

void fake::set_last_error(const std::string& text) {
  const std::lock_guard lock(error_mutex);
  last_error = text;
}

extern "C" {

// Of this process since it began, all communicators together.
void fakeNcclCounts(int* counts) {
  counts[0] = launches;
  counts[1] = sends;
  counts[2] = gathers;
}

ncclResult_t ncclGetVersion(int* version) {
  const char* chosen = std::getenv("FAKE_NCCL_VERSION");
  *version = chosen == nullptr ? NCCL_VERSION_CODE : std::atoi(chosen);
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  unsigned char random[16];
  if (getrandom(random, sizeof random, 0) != sizeof random) return ncclSystemError;
  std::memset(id->internal, 0, sizeof id->internal);
  std::string text = kPrefix;
  for (const unsigned char byte : random) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  std::memcpy(id->internal, text.data(), text.size());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  const std::string name(id.internal, strnlen(id.internal, sizeof id.internal));
  if (size < 1 || rank < 0 || rank >= size || config->magic != 0xcafebeef || config->blocking != 0 ||
      name.rfind(kPrefix, 0) != 0) {
    fake::set_last_error("a rank, a size, a configuration or a unique id is none");
    return ncclInvalidArgument;
  }
  *comm = begin(name, rank, size);
  return ncclInProgress;
}

#ifndef FAKE_NCCL_WITHOUT_SPLIT
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* child, ncclConfig_t*) {
  Engine* parent = comm->engine.get();
  struct Choice {
    int color, key;
  };
  Task task;
  auto* rows =
      reinterpret_cast<Choice*>(task.allocate(sizeof(Choice) * static_cast<size_t>(parent->world_size)));
  rows[parent->rank] = {color, key};
  for (int peer = 0; peer < parent->world_size; ++peer) {
    if (peer == parent->rank) continue;
    task.out.push_back({peer, reinterpret_cast<char*>(&rows[parent->rank]), sizeof(Choice)});
    task.in.push_back({peer, reinterpret_cast<char*>(&rows[peer]), sizeof(Choice)});
  }
  const std::string name =
      parent->name + "." + std::to_string(parent->splits++) + "." + std::to_string(color);
  task.finish = [=] {
    int rank = 0, size = 0;
    for (int peer = 0; peer < parent->world_size; ++peer) {
      if (rows[peer].color != color) continue;
      ++size;
      rank += rows[peer].key < key || (rows[peer].key == key && peer < parent->rank);
    }
    if (color != NCCL_SPLIT_NOCOLOR) __atomic_store_n(child, begin(name, rank, size), __ATOMIC_RELEASE);
  };
  return add(comm, std::move(task));
}
#endif

ncclResult_t ncclCommFinalize(ncclComm_t comm) { return comm->engine->progress(); }
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end(comm, false); }
#ifndef FAKE_NCCL_WITHOUT_ABORT
ncclResult_t ncclCommAbort(ncclComm_t comm) { return end(comm, true); }
#endif

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSystemError:
      return "unhandled system error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "some other error";
  }
}

const char* ncclGetLastError(ncclComm_t comm) {
  thread_local std::string copy;
  copy = comm == nullptr ? "" : comm->engine->error();
  const std::lock_guard lock(error_mutex);
  if (copy.empty()) copy = last_error;
  return copy.c_str();
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* result) {
  *result = comm->engine->progress();
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->engine->world_size;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->engine->rank;
  return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t, int* device) {
  *device = -1;  // host memory
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (depth == 0) return ncclInvalidUsage;
  return --depth > 0 ? ncclSuccess : start_pending();
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t) {
  ++sends;
  return add(comm, {{{peer, bytes(send), count * fake::size_of(dtype)}}, {}, {}, {}});
}

ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t) {
  return add(comm, {{}, {{peer, bytes(recv), count * fake::size_of(dtype)}}, {}, {}});
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclComm_t comm,
                           cudaStream_t) {
  ++gathers;
  Task task;
  const size_t size = count * fake::size_of(dtype);
  for (int peer = 0; peer < comm->engine->world_size; ++peer) {
    task.out.push_back({peer, bytes(send), size});
    task.in.push_back({peer, bytes(recv) + static_cast<size_t>(peer) * size, size});
  }
  return add(comm, std::move(task));
}

#ifndef FAKE_NCCL_WITHOUT_BROADCAST
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t dtype, int root,
                           ncclComm_t comm, cudaStream_t) {
  Task task;
  const size_t size = count * fake::size_of(dtype);
  task.in.push_back({root, bytes(recv), size});
  for (int peer = 0; comm->engine->rank == root && peer < comm->engine->world_size; ++peer)
    task.out.push_back({peer, bytes(send), size});
  return add(comm, std::move(task));
}
#endif

// Every rank has count elements for each of `shards`, of which this one gets its own.
static ncclResult_t reduce_shards(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                                  ncclRedOp_t op, ncclComm_t comm, bool scattered) {
  Task task;
  const size_t size = count * fake::size_of(dtype);
  std::vector<const char*> rows;
  for (int peer = 0; peer < comm->engine->world_size; ++peer) {
    char* row = task.allocate(size);
    rows.push_back(row);
    task.out.push_back({peer, bytes(send) + (scattered ? static_cast<size_t>(peer) * size : 0), size});
    task.in.push_back({peer, row, size});
  }
  task.finish = [=] { fake::reduce(bytes(recv), rows, count, dtype, op); };
  return add(comm, std::move(task));
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t) {
  return reduce_shards(send, recv, count, dtype, op, comm, false);
}

#ifndef FAKE_NCCL_WITHOUT_REDUCE_SCATTER
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t) {
  return reduce_shards(send, recv, count, dtype, op, comm, true);
}
#endif

}  // extern "C"
