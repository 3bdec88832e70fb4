#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>

#include "fake.hpp"

namespace fake {

namespace {

using Clock = std::chrono::steady_clock;

struct Hello {
  char magic[8] = "FAKENCC";
  int rank, world_size;
};

double number(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atof(text);
}

sockaddr_un address_of(const std::string& name, int rank, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // A leading zero byte: no file, and nothing left behind when the last socket closes.
  const std::string path = name + "/" + std::to_string(rank);
  std::memcpy(address.sun_path + 1, path.data(), path.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  return address;
}

// One direction of a pair: frames are eight bytes of length, then their data.
struct Line {
  std::vector<Frame> frames;
  size_t frame = 0, moved = 0;
  uint64_t header = 0;
  bool done() const { return frame == frames.size(); }
};

enum class Step { kMoved, kWait, kLost, kMismatch };

Step advance(int socket, Line& line, bool out) {
  Frame& frame = line.frames[line.frame];
  if (out) line.header = frame.size;
  char* at =
      line.moved < 8 ? reinterpret_cast<char*>(&line.header) + line.moved : frame.data + (line.moved - 8);
  const size_t left = line.moved < 8 ? 8 - line.moved : frame.size + 8 - line.moved;
  if (left > 0) {
    const ssize_t n =
        out ? send(socket, at, left, MSG_DONTWAIT | MSG_NOSIGNAL) : recv(socket, at, left, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return Step::kWait;
    if (n <= 0) return Step::kLost;
    line.moved += static_cast<size_t>(n);
  }
  if (!out && line.moved == 8 && line.header != frame.size) return Step::kMismatch;
  if (line.moved == frame.size + 8) {
    ++line.frame;
    line.moved = 0;
  }
  return Step::kMoved;
}

}  // namespace

Faults Faults::of_rank(int rank) {
  Faults faults;
  const char* chosen = std::getenv("FAKE_NCCL_RANK");
  if (chosen != nullptr && std::atoi(chosen) != rank) return faults;
  faults.init_seconds = number("FAKE_NCCL_INIT_SECONDS");
  faults.op_seconds = number("FAKE_NCCL_OP_SECONDS");
  faults.init_fails = number("FAKE_NCCL_INIT_FAILS") != 0;
  faults.abort_hangs = number("FAKE_NCCL_ABORT_HANGS") != 0;
  faults.call_fails_at = static_cast<int>(number("FAKE_NCCL_CALL_FAILS_AT"));
  faults.remote_error_at = static_cast<int>(number("FAKE_NCCL_REMOTE_ERROR_AT"));
  faults.stall_at = static_cast<int>(number("FAKE_NCCL_STALL_AT"));
  faults.hang_at = static_cast<int>(number("FAKE_NCCL_HANG_AT"));
  faults.error_after = static_cast<int>(number("FAKE_NCCL_ERROR_AFTER"));
  faults.error_later = static_cast<int>(number("FAKE_NCCL_ERROR_LATER"));
  return faults;
}

Engine::Engine(std::string its_name, int its_rank, int size)
    : name(std::move(its_name)), rank(its_rank), world_size(size), faults(Faults::of_rank(its_rank)) {}

void Engine::start() {
  thread_ = std::thread([self = shared_from_this()] { self->run(); });
}

ncclResult_t Engine::submit(Group group) {
  std::unique_lock lock(mutex_);
  if (result_ != ncclSuccess) return result_ == ncclInProgress ? ncclInvalidUsage : result_;
  if (++submitted_ == faults.hang_at) {
    changed_.wait(lock, [this] { return abort_; });
    return ncclInternalError;
  }
  queue_.push_back(std::move(group));
  changed_.notify_all();
  return ncclInProgress;
}

ncclResult_t Engine::progress() {
  const std::lock_guard lock(mutex_);
  return result_ != ncclSuccess ? result_ : active_ || !queue_.empty() ? ncclInProgress : ncclSuccess;
}

void Engine::stop(bool abort) {
  {
    const std::lock_guard lock(mutex_);
    abort_ = abort_ || abort;
    finish_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

bool Engine::aborted() {
  const std::lock_guard lock(mutex_);
  return abort_;
}

bool Engine::pause(double seconds) {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return abort_; });
}

bool Engine::fail(ncclResult_t result, const std::string& text) {
  const std::lock_guard lock(mutex_);
  error_ = text;
  result_ = result;
  return false;
}

std::string Engine::error() {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Engine::run() {
  const bool met = pause(faults.init_seconds) &&
                   (!faults.init_fails || fail(ncclSystemError, "injected: the initialisation failed")) &&
                   meet();
  std::unique_lock lock(mutex_);
  if (met) result_ = ncclSuccess;
  while (met) {
    changed_.wait(lock, [this] { return abort_ || finish_ || !queue_.empty(); });
    if (abort_ || queue_.empty()) break;
    Group group = std::move(queue_.front());
    queue_.pop_front();
    active_ = true;
    lock.unlock();
    const bool well = move(group);
    lock.lock();
    active_ = false;
    if (!well) break;
    if (done_ == faults.error_later) {  // when whoever waited for the operation is gone
      lock.unlock();
      const bool here = pause(0.3);
      if (here) fail(ncclRemoteError, "injected: an error later");
      lock.lock();
      break;
    }
  }
  lock.unlock();
  for (const int socket : sockets_)
    if (socket >= 0) close(socket);
}

int Engine::connect_to(int peer) {
  socklen_t length = 0;
  const sockaddr_un address = address_of(name, peer, length);
  while (pause(0.002)) {
    const int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(socket, reinterpret_cast<const sockaddr*>(&address), length) == 0) return socket;
    close(socket);
  }
  return -1;
}

bool Engine::meet_peer(int socket) {
  const Hello own{.rank = rank, .world_size = world_size};
  Hello theirs{};
  if (send(socket, &own, sizeof own, MSG_NOSIGNAL) != sizeof own)
    return fail(ncclRemoteError, "a peer closed its connection during the initialisation");
  for (size_t got = 0; got < sizeof theirs;) {
    pollfd ready{socket, POLLIN, 0};
    if (poll(&ready, 1, 5) == 0) {
      if (aborted()) return false;
      continue;
    }
    const ssize_t n = recv(socket, reinterpret_cast<char*>(&theirs) + got, sizeof theirs - got, 0);
    if (n <= 0) return fail(ncclRemoteError, "a peer closed its connection during the initialisation");
    got += static_cast<size_t>(n);
  }
  if (theirs.world_size != world_size)
    return fail(ncclInvalidUsage, "rank " + std::to_string(theirs.rank) + " is one of " +
                                      std::to_string(theirs.world_size) + ", this is one of " +
                                      std::to_string(world_size));
  sockets_[static_cast<size_t>(theirs.rank)] = socket;
  return true;
}

bool Engine::meet() {
  static std::mutex mutex;
  static std::set<std::string> used;
  if (rank == 0) {
    const std::lock_guard lock(mutex);
    if (!used.insert(name).second) return fail(ncclInvalidUsage, "the unique id was used before");
  }
  sockets_.assign(static_cast<size_t>(world_size), -1);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  socklen_t length = 0;
  const sockaddr_un address = address_of(name, rank, length);
  if (bind(listener, reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(listener, 128) != 0) {
    close(listener);
    return fail(ncclInvalidUsage, "rank " + std::to_string(rank) + " of this unique id is taken");
  }
  bool well = true;
  for (int peer = 0; well && peer < rank; ++peer) {
    const int socket = connect_to(peer);
    well = socket >= 0 && meet_peer(socket);
  }
  for (int peer = rank + 1; well && peer < world_size;) {
    const int socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (socket >= 0) {
      well = meet_peer(socket);
      ++peer;
    } else {
      well = pause(0.002);
    }
  }
  close(listener);
  return well;
}

bool Engine::move(Group& group) {
  ++done_;
  if (!pause(faults.op_seconds)) return false;
  if (done_ == faults.remote_error_at) return fail(ncclRemoteError, "injected: a remote process exited");
  if (done_ == faults.stall_at) {
    while (pause(3600)) continue;
    return false;
  }
  const auto size = static_cast<size_t>(world_size);
  std::vector<Line> out(size), in(size);
  for (const Task& task : group) {
    for (const Frame& frame : task.out) out[static_cast<size_t>(frame.peer)].frames.push_back(frame);
    for (const Frame& frame : task.in) in[static_cast<size_t>(frame.peer)].frames.push_back(frame);
  }
  const auto self = static_cast<size_t>(rank);
  if (out[self].frames.size() != in[self].frames.size())
    return fail(ncclInvalidUsage, "a send to itself lacks its receive");
  for (size_t i = 0; i < out[self].frames.size(); ++i)
    std::memmove(in[self].frames[i].data, out[self].frames[i].data, in[self].frames[i].size);

  for (;;) {
    std::vector<pollfd> waiting;
    for (size_t peer = 0; peer < size; ++peer) {
      if (peer == self) continue;
      for (const bool outwards : {true, false}) {
        Line& line = outwards ? out[peer] : in[peer];
        while (!line.done()) {
          const Step step = advance(sockets_[peer], line, outwards);
          if (step == Step::kMoved) continue;
          if (step == Step::kLost)
            return fail(ncclRemoteError, "rank " + std::to_string(peer) + " closed its connection");
          if (step == Step::kMismatch)
            return fail(ncclInvalidUsage, "rank " + std::to_string(peer) + " sent another number of bytes");
          waiting.push_back({sockets_[peer], static_cast<short>(outwards ? POLLOUT : POLLIN), 0});
          break;
        }
      }
    }
    if (waiting.empty()) break;
    poll(waiting.data(), waiting.size(), 5);
    if (aborted()) return false;
  }
  for (Task& task : group)
    if (task.finish) task.finish();
  if (done_ == faults.error_after) return fail(ncclRemoteError, "injected: an error after the operation");
  return true;
}

}  // namespace fake
