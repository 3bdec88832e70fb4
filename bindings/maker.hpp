// The way from a public function to a kernel and back, for calls that are as they mostly are: of few
// elements, Python alone takes longer for it than the kernel does.
#pragma once

#include <pybind11/pybind11.h>

namespace gck {

// A function of (seed, grad, err, *options), all by position, that compresses grad and err and returns the
// payload; None where the call is for others to look at, and nothing was done.
//
// find: called with (numel, *options) where these were not met before; returns (a Direct, the payload's type,
//   what follows the tensors in it, None standing for the seed), or None.
// watchers: functions of no arguments; one that answers with anything true leaves the call to others.
// num_threads: a function of no arguments.
// written: called with a tuple of the tensors that were written to.
pybind11::object payload_maker(pybind11::object find, const pybind11::tuple& watchers,
                               pybind11::object num_threads, pybind11::object written);

}  // namespace gck
