// What the parts of a communicator share in order to fail well.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <utility>

#include "nccl_abi.hpp"

namespace gck::nccl {

// For the library's own way out, beyond a deadline.
constexpr auto kPatience = std::chrono::milliseconds(1000);

// Runs what may block on a thread of its own; false if it has not returned within kPatience. The thread is
// left behind then: the library offers no other way to stop waiting for it.
bool bounded(std::function<void()> function);

std::string seconds_text(double seconds);
std::string unusable_text(const char* operation, const std::string& why);

// The error that a result stands for, and how its text begins.
std::pair<const char*, const char*> meaning(abi::Result result);

}  // namespace gck::nccl
