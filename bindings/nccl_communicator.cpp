#include "nccl_communicator.hpp"

#include <unistd.h>

#include <cstdio>
#include <future>
#include <utility>

namespace gck::nccl {

namespace {

using std::chrono::duration;
using std::chrono::milliseconds;

constexpr auto kPatience = milliseconds(1000);  // for the library's own way out, beyond the deadline
constexpr auto kWatch = milliseconds(100);
constexpr auto kSignals = milliseconds(20);

// Runs what may block on a thread of its own; false if it has not returned in time. The thread is left
// behind then: the library offers no other way to stop waiting for it.
bool bounded(std::function<void()> function) {
  auto done = std::make_shared<std::promise<void>>();
  auto ended = done->get_future();
  std::thread([done, function = std::move(function)] {
    function();
    done->set_value();
  }).detach();
  return ended.wait_for(kPatience) == std::future_status::ready;
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

std::string unusable_text(const char* operation, const std::string& why) {
  return std::string(operation) + ": the group cannot be used any more (" + why + "); make a new one";
}

// The error that a result stands for, and how its text begins.
std::pair<const char*, const char*> meaning(abi::Result result) {
  switch (result) {
    case abi::Result::RemoteError:
      return {"PeerLostError", "a peer was lost"};
    case abi::Result::Timeout:
      return {"CollectiveTimeoutError", "no answer"};
    default:
      return {"CollectiveError", "failed"};
  }
}

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
  settle(call([&] { return library_.CommSplit(comm_, color, key, slot, &config); }));
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
  child->settle(comm == nullptr ? abi::Result::InternalError : abi::Result::InProgress);
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
  const auto began = Clock::now();
  const auto deadline = began + std::chrono::duration_cast<Clock::duration>(duration<double>(timeout));
  if (!turn_.try_lock_until(deadline))
    throw Failure("CollectiveTimeoutError",
                  std::string(operation) + ": another thread had the group for " + seconds_text(timeout));
  const std::lock_guard lock(state_);
  if (verdict_.type != nullptr) {
    turn_.unlock();
    // What was found while nobody waited has not been told to anybody.
    if (!std::exchange(told_, true))
      throw Failure(verdict_.type, std::string(operation) + ": " + verdict_.text);
    throw Failure("GroupUnusableError", unusable_text(operation, verdict_.text));
  }
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
  turn_.unlock();
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

void Communicator::settle(abi::Result result) {
  auto signals = Clock::now() + kSignals;
  for (int polls = 0;; ++polls) {
    raise_if_over();
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
  fail(type, phrase, library_.explain(result));
}

void Communicator::raise_if_over() {
  Verdict verdict;
  {
    const std::lock_guard lock(state_);
    if (verdict_.type == nullptr) return;
    told_ = true;
    verdict = verdict_;
  }
  give_up(verdict);  // where the one that found it could not, because this thread had a group open
  const std::string operation = operation_;
  end_turn();
  throw Failure(verdict.type, operation + ": " + verdict.text);
}

void Communicator::fail(const char* type, const char* phrase, const std::string& detail) {
  const std::string text = std::string(operation_) + " on rank " + std::to_string(rank_) + " of " +
                           std::to_string(world_size_) + ": " + phrase + " after " +
                           seconds_text(duration<double>(Clock::now() - began_).count()) + " (" + detail +
                           ")";
  give_up({type, text});
  {
    const std::lock_guard lock(state_);
    told_ = true;
  }
  end_turn();
  throw Failure(type, text);
}

void Communicator::give_up(const Verdict& verdict) {
  abi::CommPtr dead = nullptr;
  {
    std::unique_lock lock(state_);
    if (verdict_.type == nullptr) verdict_ = verdict;
    if (holder_ != std::this_thread::get_id()) {
      // The library must not lose a communicator that an open group refers to: who closes the group aborts.
      if (depth_ > 0) return;
      // A call of another thread's may be about to return; one that hangs is ended by the abort.
      idle_.wait_for(lock, kPatience, [this] { return !calling_; });
    }
    dead = std::exchange(comm_, nullptr);
  }
  if (dead == nullptr) return;
  const bool ended = bounded([&library = library_, dead] { library.CommAbort(dead); });
  const std::lock_guard lock(state_);
  quiescent_ = ended;
}

void Communicator::abort(const std::string& why) {
  if (elsewhere()) return;
  give_up({"GroupUnusableError", "aborted: " + why});
  const std::lock_guard lock(state_);
  told_ = true;  // to the caller, by itself
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

void Communicator::check(const char* operation) {
  take_turn(operation, 1.0);
  settle(abi::Result::InProgress);
  end_turn();
}

void Communicator::watch_over() {
  std::thread([weak = weak_from_this()] {
    for (;;) {
      std::this_thread::sleep_for(kWatch);
      const auto self = weak.lock();
      if (self == nullptr || !self->watch()) return;
    }
  }).detach();
}

bool Communicator::watch() {
  abi::Result result = abi::Result::Success;
  bool stuck = false;
  {
    const std::lock_guard lock(state_);
    if (comm_ == nullptr) return false;
    stuck = busy_ && calling_ && depth_ == 0 && Clock::now() > deadline_ + kWatch;
    // Whoever has the turn asks, and says it in its own words.
    if (!busy_ && library_.CommGetAsyncError(comm_, &result) != abi::Result::Success) return true;
  }
  if (stuck) {
    give_up({"CollectiveTimeoutError", "the library did not return from a call in time; it was aborted"});
    return false;
  }
  if (result == abi::Result::Success || result == abi::Result::InProgress) return true;
  const auto [type, phrase] = meaning(result);
  give_up({type, std::string(phrase) + " between operations (" + library_.explain(result) + ")"});
  return false;
}

}  // namespace gck::nccl
