// The fuzzed decoders run on one thread: nothing of OpenMP is called, and its pragmas are not looked at.
#pragma once
