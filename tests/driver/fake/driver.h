// The inside of the fake driver: what it knows, and the queue of its streams.
//
// Everything that the interface calls asynchronous is done as late as the interface allows: when somebody waits. A
// transfer from page-locked memory reads it then, one from other memory reads it at the call, as the real one does.
// A missing wait, a buffer that is used again too early and an order that only luck kept thus show as wrong values.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace fake {

// The numbers of CUresult.
enum Result {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kLaunchFailed = 719,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
    kCaptureUnmatched = 903,
};

// The emulator's interface (kernels-cu/emu/launch.cpp).
struct EmuShape {
    uint32_t grid[3], block[3], cluster[3], smem, dependent, dependents, resident;
};

struct Module {
    void* library = nullptr;
    int (*launch)(const char*, const EmuShape*, void**, char*, size_t) = nullptr;
    int (*arguments)(const char*, size_t*) = nullptr;
    const char* (*tensor_map)(void*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                              int) = nullptr;
};

struct Function {
    Module* module;
    std::string name;
    std::vector<size_t> sizes;
    int shared = 48 << 10;
};

using Work = std::function<void()>;

struct Stream {
    std::vector<Work> queue;
    bool capturing = false, invalid = false;
    std::vector<Work> captured;
};

struct Graph {
    std::vector<Work> work;
};

struct Event {
    bool recorded = false, done = true;
    double when = 0;
};

struct Driver {
    std::mutex lock;
    bool started = false;
    int failed = 0;  // sticky: the answer of every call after a failed kernel
    size_t total = 0, used = 0;
    std::map<uint64_t, size_t> memory;      // live allocations
    std::map<uint64_t, size_t> page_locked;
    std::set<void*> handles;                // live streams, events, modules, functions, graphs
    std::vector<Stream*> streams;
    Module* any = nullptr;                  // for tensor maps

    bool inside(uint64_t address, size_t bytes) const;
    bool locked(const void* p, size_t bytes) const;
    // Does everything that is queued on any stream.
    int finish();
    // Puts work on a stream, or in the graph that it captures.
    int put(Stream*, Work);
};

Driver& driver();
int number(const char* variable, int otherwise);
void note(const std::string& line);
double now();

// What most calls check first: started, no failed kernel, a context on this thread.
int ready();
// As `ready`, for what a capturing stream of this thread may not see.
int ready_to_wait();
bool known(void* handle);

}  // namespace fake
