// A driver for machines without a GPU: devices, memory, streams and events behind the interface of libcuda.
//
// Kernels run on the emulator (modules.cpp). FAKE_VERSION is the CUDA version (12040), FAKE_DEVICES the number of
// devices (1), FAKE_ARCH their compute capability (90), FAKE_MIB their memory in MiB (256), FAKE_LOG a file that gets
// a line for calls worth telling. Wrong use gets the answer of the real driver where that is documented.
#include "driver.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace fake {

Driver& driver() {
    static Driver& d = *new Driver;
    return d;
}

int number(const char* variable, int otherwise) {
    const char* text = getenv(variable);
    return text && *text ? atoi(text) : otherwise;
}

void note(const std::string& line) {
    if (const char* path = getenv("FAKE_LOG")) std::ofstream(path, std::ios::app) << line << "\n";
}

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

thread_local bool current = false;

int ready() {
    Driver& d = driver();
    if (!d.started) return kNotInitialized;
    if (d.failed) return d.failed;
    return current ? kSuccess : kInvalidContext;
}

int ready_to_wait() {
    if (int e = ready()) return e;
    for (Stream* s : driver().streams)
        if (s->capturing) return s->invalid = true, kCaptureUnsupported;
    return kSuccess;
}

bool known(void* handle) { return driver().handles.count(handle) != 0; }

namespace {
bool holds(const std::map<uint64_t, size_t>& blocks, uint64_t address, size_t bytes) {
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return false;
    auto [start, size] = *--after;
    return bytes <= size && address - start <= size - bytes;
}
}  // namespace

bool Driver::inside(uint64_t address, size_t bytes) const { return holds(memory, address, bytes); }
bool Driver::locked(const void* p, size_t bytes) const { return holds(page_locked, uint64_t(p), bytes); }

int Driver::finish() {
    for (Stream* s : streams) {
        std::vector<Work> queue;
        queue.swap(s->queue);
        for (Work& w : queue)
            if (!failed) w();
    }
    return failed;
}

int Driver::put(Stream* s, Work work) {
    (s->capturing ? s->captured : s->queue).push_back(std::move(work));
    return kSuccess;
}

}  // namespace fake

using namespace fake;

#define LOCKED std::lock_guard guard(driver().lock)
#define CHECK(condition, code) \
    if (!(condition)) return code
#define READY                       \
    if (int e = ready()) return e
#define READY_TO_WAIT               \
    if (int e = ready_to_wait()) return e

extern "C" {

// ---- start ----
int cuDriverGetVersion(int* version) { return *version = number("FAKE_VERSION", 12040), kSuccess; }
int cuInit(unsigned flags) {
    LOCKED;
    CHECK(!flags, kInvalidValue);
    CHECK(number("FAKE_DEVICES", 1) > 0, kNoDevice);
    driver().started = true;
    driver().total = size_t(number("FAKE_MIB", 256)) << 20;
    return kSuccess;
}
int cuGetErrorName(int code, const char** text) {
    switch (code) {
#define NAME(code, name) \
    case code: return *text = name, kSuccess
        NAME(kSuccess, "CUDA_SUCCESS");
        NAME(kInvalidValue, "CUDA_ERROR_INVALID_VALUE");
        NAME(kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY");
        NAME(kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED");
        NAME(kNoDevice, "CUDA_ERROR_NO_DEVICE");
        NAME(kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE");
        NAME(kInvalidImage, "CUDA_ERROR_INVALID_IMAGE");
        NAME(kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT");
        NAME(kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU");
        NAME(kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE");
        NAME(kNotFound, "CUDA_ERROR_NOT_FOUND");
        NAME(kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED");
        NAME(kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
        NAME(kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED");
    }
    return *text = nullptr, kInvalidValue;
}
int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

// ---- devices and contexts: the handle of a device is its number ----
int cuDeviceGetCount(int* count) {
    CHECK(driver().started, kNotInitialized);
    return *count = number("FAKE_DEVICES", 1), kSuccess;
}
int cuDeviceGet(int* device, int index) {
    CHECK(driver().started, kNotInitialized);
    CHECK(index >= 0 && index < number("FAKE_DEVICES", 1), kInvalidDevice);
    return *device = index, kSuccess;
}
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, size_t(length), "Fake GPU"), kSuccess; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = driver().total, kSuccess; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    int arch = number("FAKE_ARCH", 90);
    switch (attribute) {
        case 75: return *value = arch / 10, kSuccess;
        case 76: return *value = arch % 10, kSuccess;
        case 16: return *value = 4, kSuccess;
        case 97: return *value = (arch == 80 ? 163 : 227) << 10, kSuccess;
    }
    return kInvalidValue;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    CHECK(driver().started, kNotInitialized);
    return *context = reinterpret_cast<void*>(uintptr_t(device + 1)), kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
int cuCtxSetCurrent(void* context) {
    CHECK(driver().started, kNotInitialized);
    return current = context != nullptr, kSuccess;
}

// ---- memory ----
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    LOCKED;
    READY;
    return *free = driver().total - driver().used, *total = driver().total, kSuccess;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    LOCKED;
    READY_TO_WAIT;
    Driver& d = driver();
    CHECK(bytes, kInvalidValue);
    note("allocate " + std::to_string(bytes));
    CHECK(bytes <= d.total - d.used, kOutOfMemory);
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 512, bytes) == 0, kOutOfMemory);
    memset(memory, 0xff, bytes);
    *address = uint64_t(memory);
    d.memory[*address] = bytes, d.used += bytes;
    return kSuccess;
}
int cuMemFree_v2(uint64_t address) {
    LOCKED;
    READY_TO_WAIT;
    Driver& d = driver();
    CHECK(d.memory.count(address), kInvalidValue);
    int e = d.finish();
    note("free " + std::to_string(d.memory[address]));
    d.used -= d.memory[address];
    d.memory.erase(address);
    free(reinterpret_cast<void*>(address));
    return e;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    LOCKED;
    READY_TO_WAIT;
    CHECK(posix_memalign(memory, 4096, bytes) == 0, kOutOfMemory);
    driver().page_locked[uint64_t(*memory)] = bytes;
    return kSuccess;
}
int cuMemFreeHost(void* memory) {
    LOCKED;
    READY_TO_WAIT;
    CHECK(driver().page_locked.erase(uint64_t(memory)), kInvalidValue);
    return free(memory), kSuccess;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    CHECK(driver().inside(to, bytes), kInvalidValue);
    auto copy = [=](const void* source) { memcpy(reinterpret_cast<void*>(to), source, bytes); };
    if (driver().locked(from, bytes)) return driver().put(static_cast<Stream*>(stream), [=] { copy(from); });
    auto kept = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    return driver().put(static_cast<Stream*>(stream), [=] { copy(kept->data()); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    CHECK(driver().inside(from, bytes), kInvalidValue);
    Stream* s = static_cast<Stream*>(stream);
    driver().put(s, [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
    // Into memory that is not page-locked the copy is done when the call returns.
    return s->capturing || driver().locked(to, bytes) ? kSuccess : driver().finish();
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    CHECK(driver().inside(to, bytes) && driver().inside(from, bytes), kInvalidValue);
    return driver().put(static_cast<Stream*>(stream), [=] {
        memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    });
}
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void* stream) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    CHECK(driver().inside(to, bytes), kInvalidValue);
    return driver().put(static_cast<Stream*>(stream), [=] { memset(reinterpret_cast<void*>(to), byte, bytes); });
}

// ---- streams and events ----
int cuStreamCreate(void** stream, unsigned) {
    LOCKED;
    READY;
    Stream* s = new Stream;
    driver().streams.push_back(s), driver().handles.insert(s);
    return *stream = s, kSuccess;
}
int cuStreamDestroy_v2(void* stream) {
    LOCKED;
    READY;
    CHECK(driver().handles.erase(stream), kInvalidHandle);
    driver().finish();
    std::erase(driver().streams, static_cast<Stream*>(stream));
    return delete static_cast<Stream*>(stream), kSuccess;
}
int cuStreamSynchronize(void* stream) {
    LOCKED;
    READY_TO_WAIT;
    CHECK(known(stream), kInvalidHandle);
    return driver().finish();
}
int cuEventCreate(void** event, unsigned) {
    LOCKED;
    READY;
    *event = new Event;
    return driver().handles.insert(*event), kSuccess;
}
int cuEventRecord(void* event, void* stream) {
    LOCKED;
    READY;
    CHECK(known(event) && known(stream), kInvalidHandle);
    Event* e = static_cast<Event*>(event);
    e->recorded = true, e->done = false;
    return driver().put(static_cast<Stream*>(stream), [e] { e->done = true, e->when = now(); });
}
int cuEventSynchronize(void* event) {
    LOCKED;
    READY_TO_WAIT;
    CHECK(known(event), kInvalidHandle);
    return driver().finish();
}
int cuEventElapsedTime(float* ms, void* start, void* end) {
    LOCKED;
    READY;
    CHECK(known(start) && known(end), kInvalidHandle);
    Event *a = static_cast<Event*>(start), *b = static_cast<Event*>(end);
    CHECK(a->recorded && b->recorded, kInvalidHandle);
    CHECK(a->done && b->done, kNotReady);
    return *ms = float(b->when - a->when), kSuccess;
}
int cuEventDestroy_v2(void* event) {
    LOCKED;
    READY;
    CHECK(driver().handles.erase(event), kInvalidHandle);
    driver().finish();
    return delete static_cast<Event*>(event), kSuccess;
}
}
