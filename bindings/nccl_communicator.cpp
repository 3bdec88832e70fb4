#include "nccl_communicator.hpp"

#include <unistd.h>

#include <utility>

#include "nccl_failure.hpp"

namespace gck::nccl {

using std::chrono::duration;

namespace {

constexpr auto kSignals = std::chrono::milliseconds(20);

}  // namespace

Communicator::Communicator(const Library& library, Interrupt interrupt)
    : library_(library), interrupt_(std::move(interrupt)), pid_(getpid()) {}

Communicator::~Communicator() {
  // In a forked process nothing of the library's works, and locks may be held by threads that are not there.
  if (!elsewhere()) give_up({"GroupUnusableError", "it was dropped without being closed"});
}

std::shared_ptr<Communicator> Communicator::join(const Library& library, const abi::UniqueId& id, int rank,
                                                 int world_size, double timeout, Interrupt interrupt) {
  std::shared_ptr<Communicator> self(new Communicator(library, std::move(interrupt)));
  self->rank_ = rank;
  self->world_size_ = world_size;
  // Threads of the library's write here as long as the initialisation goes on, which may outlive us.
  auto* slot = new abi::CommPtr(nullptr);
  abi::Config config;
  config.blocking = 0;
  self->take_turn("init", timeout);
  const abi::Result result =
      self->call([&] { return library.CommInitRankConfig(slot, world_size, id, rank, &config); });
  {
    const std::lock_guard lock(self->state_);
    self->comm_ = *slot;
  }
  self->settle(result);
  self->adopt(*slot);
  delete slot;
  self->end_turn();
  self->watch_over();
  return self;
}

std::shared_ptr<Communicator> Communicator::split(int color, int key, double timeout) {
  library_.CommSplit.need();
  take_turn("split", timeout);
  auto* slot = new abi::CommPtr(nullptr);
  abi::Config config;
  config.blocking = 0;
  // The library writes the child when it is made, and may call the parent done before.
  settle(call([&] { return library_.CommSplit(comm_, color, key, slot, &config); }),
         color == abi::kNoColor ? nullptr : slot);
  const abi::CommPtr comm = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
  const double left = duration<double>(deadline_ - Clock::now()).count();
  end_turn();
  if (color == abi::kNoColor) return nullptr;
  std::shared_ptr<Communicator> child(new Communicator(library_, interrupt_));
  child->take_turn("split", left);
  {
    const std::lock_guard lock(child->state_);
    child->comm_ = comm;
  }
  child->settle(abi::Result::InProgress);
  child->adopt(comm);
  delete slot;
  child->end_turn();
  child->watch_over();
  return child;
}

void Communicator::adopt(abi::CommPtr comm) {
  settle(call([&] { return library_.CommUserRank(comm, &rank_); }));
  settle(call([&] { return library_.CommCount(comm, &world_size_); }));
  settle(call([&] { return library_.CommCuDevice(comm, &device_); }));
}

bool Communicator::elsewhere() const { return getpid() != pid_; }

std::string Communicator::reason() const {
  if (elsewhere()) return "it was made in process " + std::to_string(pid_) + ", before a fork";
  const std::lock_guard lock(state_);
  return verdict_.text;
}

void Communicator::take_turn(const char* operation, double timeout) {
  if (elsewhere()) throw Failure("GroupUnusableError", unusable_text(operation, reason()));
  if (grouped()) throw Failure("ArgumentError", std::string(operation) + ": not while a group is open");
  const auto began = Clock::now();
  const auto deadline = began + std::chrono::duration_cast<Clock::duration>(duration<double>(timeout));
  std::unique_lock lock(state_);
  const bool came = idle_.wait_until(lock, deadline, [this] { return !busy_ || verdict_.type != nullptr; });
  if (verdict_.type != nullptr) raise_verdict(operation);
  if (!came)
    throw Failure("CollectiveTimeoutError",
                  std::string(operation) + ": another thread had the group for " + seconds_text(timeout));
  holder_ = std::this_thread::get_id();
  operation_ = operation;
  began_ = began;
  deadline_ = deadline;
  busy_ = true;
}

void Communicator::end_turn() {
  {
    const std::lock_guard lock(state_);
    holder_ = {};
    busy_ = false;
    calling_ = false;
  }
  idle_.notify_all();
}

abi::Result Communicator::call(const std::function<abi::Result()>& function) {
  {
    const std::lock_guard lock(state_);
    if (verdict_.type != nullptr) return abi::Result::Success;  // settle says what happened
    calling_ = true;
  }
  const abi::Result result = function();
  {
    const std::lock_guard lock(state_);
    calling_ = false;
  }
  idle_.notify_all();
  return result;
}

void Communicator::settle(abi::Result result, const abi::CommPtr* awaited) {
  auto signals = Clock::now() + kSignals;
  for (int polls = 0;; ++polls) {
    raise_if_over();
    if (result == abi::Result::Success && awaited && __atomic_load_n(awaited, __ATOMIC_ACQUIRE) == nullptr)
      result = abi::Result::InProgress;
    if (result != abi::Result::InProgress) break;
    const auto now = Clock::now();
    if (now > deadline_) fail("CollectiveTimeoutError", "no answer", "the deadline is over");
    if (now > signals) {
      try {
        interrupt_();
      } catch (...) {
        give_up({"GroupUnusableError", std::string(operation_) + " was interrupted"});
        end_turn();
        throw;
      }
      signals = now + kSignals;
    }
    if (polls < 100)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(polls < 1000 ? 50 : 500));
    const std::lock_guard lock(state_);
    if (comm_ == nullptr) continue;
    const abi::Result asked = library_.CommGetAsyncError(comm_, &result);
    if (asked != abi::Result::Success) result = asked;
  }
  if (result == abi::Result::Success) return;
  const auto [type, phrase] = meaning(result);
  fail(type, phrase, explain(result));
}

void Communicator::close(double timeout) {
  if (elsewhere() || !reason().empty()) return;
  take_turn("close", timeout);
  settle(call([&] { return library_.CommFinalize(comm_); }));
  abi::CommPtr done = nullptr;
  {
    const std::lock_guard lock(state_);
    done = std::exchange(comm_, nullptr);
    verdict_ = {"GroupUnusableError", "it was closed"};
    told_ = true;
  }
  end_turn();
  if (done != nullptr) bounded([&library = library_, done] { library.CommDestroy(done); });
}

}  // namespace gck::nccl
