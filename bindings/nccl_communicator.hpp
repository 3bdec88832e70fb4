// One rank's end of an NCCL communicator that cannot hang its caller.
//
// The communicator is non-blocking: a call of NCCL's returns at once, and we ask it until it is done or the
// deadline is over. Whatever fails aborts it, since NCCL leaves a communicator in no known state; every later
// call says why. A thread looks after it while nobody waits.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nccl_library.hpp"

namespace gck::nccl {

// Called now and then during a wait; throws where the user asked to stop.
using Interrupt = std::function<void()>;

// Consecutive bytes that go to one peer and come from it.
struct Exchange {
  int peer;
  const void* send;
  size_t send_bytes;
  void* recv;
  size_t recv_bytes;
};

// The same number of bytes of every rank, gathered in the order of ranks.
struct Gather {
  const void* send;
  void* recv;
  size_t bytes;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Joins the others; every rank must, with the same id and size, within `timeout` seconds. The current CUDA
  // device becomes the communicator's. This and all that follows raises Failure: CollectiveTimeoutError,
  // PeerLostError, CollectiveError with NCCL's text, GroupUnusableError after any of them.
  static std::shared_ptr<Communicator> join(const Library& library, const abi::UniqueId& id, int rank,
                                            int world_size, double timeout, Interrupt interrupt);
  ~Communicator();

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  // Ordinal of the CUDA device; -1 for a library whose ranks exchange host memory, as the tests' does.
  int device() const { return device_; }
  // False after an abort that the library did not finish: its threads may still touch the last buffers.
  bool quiescent() const { return quiescent_; }
  // Why it cannot be used any more; empty while it can.
  std::string reason() const;

  // Between these two, the calling thread's operations are collected and start as one. Nothing else waits.
  void group_start(const char* operation, double timeout);
  void group_end(double timeout);
  // Raises where the calling thread has a group open, for what needs its results before the group's end.
  void refuse_group(const char* operation) const;

  // Each returns once the library has taken the operation into `stream`; counts are elements.
  void all_gather(const std::vector<Gather>& fields, abi::Stream stream, double timeout);
  void all_to_all(const std::vector<Exchange>& peers, abi::Stream stream, double timeout);
  // Row r of `send` goes to rank r, whose row comes into row r of `recv`; rows of one size, one after
  // another.
  void all_to_all_rows(const void* send, void* recv, size_t row_bytes, abi::Stream stream, double timeout);
  void all_reduce(const void* send, void* recv, size_t count, abi::DataType dtype, abi::RedOp op,
                  abi::Stream stream, double timeout);
  void reduce_scatter(const void* send, void* recv, size_t recv_count, abi::DataType dtype, abi::RedOp op,
                      abi::Stream stream, double timeout);
  void broadcast(const void* send, void* recv, size_t bytes, int root, abi::Stream stream, double timeout);

  // Raises what the watch has found, or what ended the communicator; at any time, from any thread.
  void check(const char* operation);
  // Ranks of one colour form a communicator, ordered by key; null for those of kNoColor. All ranks call it.
  std::shared_ptr<Communicator> split(int color, int key, double timeout);
  // Gives up: stops what runs, and peers that wait for this rank fail. At any time, from any thread.
  void abort(const std::string& why);
  // Waits until what was started has ended, then lets go. Nothing where that has been done.
  void close(double timeout);

 private:
  using Clock = std::chrono::steady_clock;
  struct Verdict {
    const char* type = nullptr;
    std::string text;
  };

  Communicator(const Library& library, Interrupt interrupt);
  bool elsewhere() const;  // in a process that was forked from the communicator's
  void take_turn(const char* operation, double timeout);
  void end_turn();
  void launch(const char* operation, double timeout, const std::function<abi::Result()>& enqueue);
  abi::Result call(const std::function<abi::Result()>& function);
  void settle(abi::Result result, const abi::CommPtr* awaited = nullptr);
  void adopt(abi::CommPtr comm);
  bool grouped() const;  // the calling thread has a group open
  std::string explain(abi::Result result) const;
  void watch_over();
  bool watch();
  void raise_if_over();
  [[noreturn]] void raise_verdict(const char* operation);  // with state_ locked
  void give_up(const Verdict& verdict);
  [[noreturn]] void fail(const char* type, const char* phrase, const std::string& detail);

  const Library& library_;
  const Interrupt interrupt_;
  const int pid_;
  int rank_ = 0, world_size_ = 0, device_ = -1;

  // Of the thread that has the turn: it runs an operation, or has a group open.
  const char* operation_ = "";
  Clock::time_point began_;
  abi::Result group_result_ = abi::Result::Success;  // the first failure within the open group

  mutable std::mutex state_;      // of what follows; never held while the library might block
  std::condition_variable idle_;  // the turn is free, or a call has returned
  abi::CommPtr comm_ = nullptr;
  std::thread::id holder_;  // the thread that has the turn
  bool busy_ = false;       // there is one
  bool calling_ = false;    // it is inside the library
  int depth_ = 0;           // 1 while it has a group open
  Clock::time_point deadline_;
  Verdict verdict_;    // why it is over; no type while it is not
  bool told_ = false;  // somebody has had that raised
  std::atomic<bool> quiescent_ = true;
};

}  // namespace gck::nccl
