// The fuzzed decoders run on one thread: OpenMP's pragmas are not looked at, and its functions say so.
#pragma once

inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
