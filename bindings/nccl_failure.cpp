// How a communicator ends: what is found, said and stopped.
#include "nccl_failure.hpp"

#include <cstdio>
#include <future>
#include <utility>

#include "nccl_communicator.hpp"

namespace gck::nccl {

namespace {

constexpr auto kWatch = std::chrono::milliseconds(100);

}  // namespace

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

std::string Communicator::explain(abi::Result result) const {
  const std::lock_guard lock(state_);
  return library_.explain(result, comm_);
}

void Communicator::check(const char* operation) {
  if (elsewhere()) throw Failure("GroupUnusableError", unusable_text(operation, reason()));
  const std::lock_guard lock(state_);
  if (verdict_.type != nullptr) raise_verdict(operation);
}

void Communicator::raise_verdict(const char* operation) {
  // What was found while nobody waited has not been told to anybody.
  if (!std::exchange(told_, true))
    throw Failure(verdict_.type, std::string(operation) + ": " + verdict_.text);
  throw Failure("GroupUnusableError", unusable_text(operation, verdict_.text));
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
                           seconds_text(std::chrono::duration<double>(Clock::now() - began_).count()) + " (" +
                           detail + ")";
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
    idle_.notify_all();
    // The library must not lose a communicator that an open group refers to: who closes the group aborts.
    if (depth_ > 0) return;
    // A call of another thread's may be about to return; one that hangs is ended by the abort.
    if (holder_ != std::this_thread::get_id()) idle_.wait_for(lock, kPatience, [this] { return !calling_; });
    dead = std::exchange(comm_, nullptr);
  }
  if (dead == nullptr) return;
  quiescent_ = bounded([&library = library_, dead] { library.CommAbort(dead); });
}

void Communicator::abort(const std::string& why) {
  if (elsewhere()) return;
  give_up({"GroupUnusableError", "aborted: " + why});
  const std::lock_guard lock(state_);
  told_ = true;  // to the caller, by itself
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
  give_up({type, std::string(phrase) + " between operations (" + explain(result) + ")"});
  return false;
}

}  // namespace gck::nccl
