// The runtime in one translation unit: it compiles once per build, in half the time of its parts.
#include "barrier.cpp"
#include "counters.cpp"
#include "cp_async.cpp"
#include "fiber.cpp"
#include "launch.cpp"
#include "matrix.cpp"
#include "mbarrier.cpp"
#include "memory.cpp"
#include "scheduler.cpp"
#include "tma.cpp"
#include "warp.cpp"
#include "wgmma.cpp"

#if EMU_ASAN
// Kernels keep arrays on fibers' stacks, which the checker's own copies of frames would move.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0:detect_leaks=0"; }
#endif
