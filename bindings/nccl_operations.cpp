// What a communicator does: each operation is one group of calls.
#include <utility>

#include "nccl_communicator.hpp"

namespace gck::nccl {

namespace {

constexpr auto kBytes = abi::DataType::Uint8;

// Of calls that are all made, so that the library closes the group it opened: the first that failed.
void keep_first(abi::Result& first, abi::Result result) {
  if (first == abi::Result::Success && result != abi::Result::InProgress) first = result;
}

}  // namespace

bool Communicator::grouped() const {
  const std::lock_guard lock(state_);
  return depth_ > 0 && holder_ == std::this_thread::get_id();
}

void Communicator::refuse_group(const char* operation) const {
  if (!elsewhere() && grouped())
    throw Failure("ArgumentError",
                  std::string(operation) + ": a group is open, in which nothing comes before its end");
}

void Communicator::group_start(const char* operation, double timeout) {
  take_turn(operation, timeout);
  group_result_ = abi::Result::Success;
  settle(call([&] { return library_.GroupStart(); }));
  const std::lock_guard lock(state_);
  depth_ = 1;
}

void Communicator::group_end(double timeout) {
  if (!grouped()) throw Failure("ArgumentError", "group: no group is open");
  {
    const std::lock_guard lock(state_);
    depth_ = 0;
    calling_ = true;
    deadline_ =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
  }
  // Whatever has happened: the library counts the groups of each thread.
  const abi::Result result = library_.GroupEnd();
  {
    const std::lock_guard lock(state_);
    calling_ = false;
  }
  idle_.notify_all();
  settle(group_result_ == abi::Result::Success ? result : group_result_);
  end_turn();
}

void Communicator::launch(const char* operation, double timeout,
                          const std::function<abi::Result()>& enqueue) {
  const bool alone = elsewhere() || !grouped();
  if (alone) group_start(operation, timeout);
  keep_first(group_result_, call(enqueue));
  if (alone) group_end(timeout);
}

void Communicator::all_gather(const std::vector<Gather>& fields, abi::Stream stream, double timeout) {
  launch("all_gather", timeout, [&] {
    abi::Result first = abi::Result::Success;
    for (const Gather& field : fields)
      keep_first(first, library_.AllGather(field.send, field.recv, field.bytes, kBytes, comm_, stream));
    return first;
  });
}

void Communicator::all_to_all(const std::vector<Exchange>& peers, abi::Stream stream, double timeout) {
  launch("all_to_all", timeout, [&] {
    abi::Result first = abi::Result::Success;
    for (const Exchange& one : peers) {
      if (one.send_bytes > 0)
        keep_first(first, library_.Send(one.send, one.send_bytes, kBytes, one.peer, comm_, stream));
      if (one.recv_bytes > 0)
        keep_first(first, library_.Recv(one.recv, one.recv_bytes, kBytes, one.peer, comm_, stream));
    }
    return first;
  });
}

void Communicator::all_to_all_rows(const void* send, void* recv, size_t row_bytes, abi::Stream stream,
                                   double timeout) {
  std::vector<Exchange> peers;
  for (int peer = 0; peer < world_size_; ++peer) {
    const size_t row = static_cast<size_t>(peer) * row_bytes;
    peers.push_back(
        {peer, static_cast<const char*>(send) + row, row_bytes, static_cast<char*>(recv) + row, row_bytes});
  }
  all_to_all(peers, stream, timeout);
}

void Communicator::all_reduce(const void* send, void* recv, size_t count, abi::DataType dtype, abi::RedOp op,
                              abi::Stream stream, double timeout) {
  launch("all_reduce", timeout,
         [&] { return library_.AllReduce(send, recv, count, dtype, op, comm_, stream); });
}

void Communicator::reduce_scatter(const void* send, void* recv, size_t recv_count, abi::DataType dtype,
                                  abi::RedOp op, abi::Stream stream, double timeout) {
  library_.ReduceScatter.need();
  launch("reduce_scatter", timeout,
         [&] { return library_.ReduceScatter(send, recv, recv_count, dtype, op, comm_, stream); });
}

void Communicator::broadcast(const void* send, void* recv, size_t bytes, int root, abi::Stream stream,
                             double timeout) {
  library_.Broadcast.need();
  launch("broadcast", timeout,
         [&] { return library_.Broadcast(send, recv, bytes, kBytes, root, comm_, stream); });
}

}  // namespace gck::nccl
