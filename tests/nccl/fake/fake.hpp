// A libnccl.so.2 that moves bytes between threads and processes of one machine, in host memory.
//
// Ranks meet at Unix sockets in the abstract namespace, named after the unique id: every pair has one. A
// communicator has a thread that runs its groups one after another, each as frames to and from peers. As in
// NCCL, calls return at once and ncclCommGetAsyncError says what has become of them; unlike there, an
// operation that is done has moved its bytes, since there is no stream.
//
// The environment makes it misbehave, on every rank or on the one that FAKE_NCCL_RANK names:
//   FAKE_NCCL_VERSION           what ncclGetVersion says
//   FAKE_NCCL_INIT_SECONDS      initialisation takes so long
//   FAKE_NCCL_INIT_FAILS        it fails
//   FAKE_NCCL_OP_SECONDS        every group takes so long
//   FAKE_NCCL_CALL_FAILS_AT     the n-th call that adds to a group is refused, and with it the group
//   FAKE_NCCL_REMOTE_ERROR_AT   the n-th group of a communicator is a remote error
//   FAKE_NCCL_STALL_AT          it never ends
//   FAKE_NCCL_HANG_AT           the call that starts it does not return before an abort
//   FAKE_NCCL_ERROR_AFTER       the n-th group succeeds, and then an asynchronous error follows
//   FAKE_NCCL_ERROR_LATER       the same half a second later, when nobody waits
//   FAKE_NCCL_ABORT_HANGS       ncclCommAbort does not return
#pragma once

#include <nccl.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fake {

struct Frame {
  int peer;
  char* data;
  size_t size;
};

// Frames of one operation, in the order in which each peer sends and expects them.
struct Task {
  std::vector<Frame> out, in;
  std::vector<std::shared_ptr<std::vector<char>>> scratch;
  std::function<void()> finish;  // once all frames have moved

  char* allocate(size_t size) {
    scratch.push_back(std::make_shared<std::vector<char>>(size));
    return scratch.back()->data();
  }
};

using Group = std::vector<Task>;

struct Faults {
  double init_seconds = 0, op_seconds = 0;
  bool init_fails = false, abort_hangs = false;
  int call_fails_at = 0, remote_error_at = 0, stall_at = 0, hang_at = 0, error_after = 0, error_later = 0;

  static Faults of_rank(int rank);
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(std::string name, int rank, int world_size);
  void start();
  ncclResult_t submit(Group group);
  ncclResult_t progress();  // what ncclCommGetAsyncError reports
  std::string error();      // and in words: ranks that are threads of one process keep theirs apart
  void stop(bool abort);    // after what was submitted has ended, or at once

  const std::string name;
  const int rank, world_size;
  const Faults faults;
  int splits = 0, calls = 0;

 private:
  void run();
  bool meet();
  bool meet_peer(int socket);
  int connect_to(int peer);
  bool move(Group& group);
  bool pause(double seconds);  // false if it was stopped
  bool aborted();
  bool fail(ncclResult_t result, const std::string& text);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Group> queue_;
  std::string error_;
  ncclResult_t result_ = ncclInProgress;  // of the initialisation; then success, until something fails
  bool active_ = false, abort_ = false, finish_ = false;
  int submitted_ = 0, done_ = 0;
  std::vector<int> sockets_;
  std::thread thread_;
};

void set_last_error(const std::string& text);
// recv = rows[0] op rows[1] op ..., in that order, so that all ranks have the same bits.
void reduce(char* recv, const std::vector<const char*>& rows, size_t count, ncclDataType_t dtype,
            ncclRedOp_t op);
size_t size_of(ncclDataType_t dtype);

}  // namespace fake

struct ncclComm {
  std::shared_ptr<fake::Engine> engine;
};
