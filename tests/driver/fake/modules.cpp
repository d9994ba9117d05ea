// The fake driver's modules, launches and graphs. A module is a shared object of kernels for the emulator.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

using namespace fake;

#define LOCKED std::lock_guard guard(driver().lock)
#define CHECK(condition, code) \
    if (!(condition)) return code
#define READY                       \
    if (int e = ready()) return e

namespace {

// The length of a shared object: its table of sections comes last.
size_t length_of(const unsigned char* elf) {
    if (memcmp(elf, "\177ELF", 4)) return 0;
    uint64_t table;
    uint16_t size, count;
    memcpy(&table, elf + 40, 8), memcpy(&size, elf + 58, 2), memcpy(&count, elf + 60, 2);
    return table + size_t(size) * count;
}

template <class F> void find(F& f, void* library, const char* name) {
    f = reinterpret_cast<F>(dlsym(library, name));
}

}  // namespace

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
    LOCKED;
    if (int e = ready_to_wait()) return e;
    size_t bytes = length_of(static_cast<const unsigned char*>(image));
    CHECK(bytes, kInvalidImage);
    char path[] = "./fake-module-XXXXXX";
    int file = mkstemp(path);
    CHECK(file >= 0 && write(file, image, bytes) == ssize_t(bytes), kOutOfMemory);
    close(file);
    Module m;
    m.library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    CHECK(m.library, kInvalidImage);
    find(m.launch, m.library, "emu_launch"), find(m.arguments, m.library, "emu_arguments");
    find(m.tensor_map, m.library, "emu_tensor_map");
    CHECK(m.launch && m.arguments && m.tensor_map, kNoBinaryForGpu);
    Module* kept = new Module(m);
    driver().handles.insert(kept), driver().any = kept;
    note("module");
    return *module = kept, kSuccess;
}
// The library stays: threads of its emulator may live.
int cuModuleUnload(void* module) {
    LOCKED;
    READY;
    CHECK(driver().handles.erase(module), kInvalidHandle);
    return driver().finish();
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    LOCKED;
    READY;
    CHECK(known(module), kInvalidHandle);
    Module* m = static_cast<Module*>(module);
    size_t sizes[32];
    int count = m->arguments(name, sizes);
    CHECK(count >= 0, kNotFound);
    *function = new Function{m, name, {sizes, sizes + count}};
    return driver().handles.insert(*function), kSuccess;
}
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    LOCKED;
    READY;
    CHECK(known(function), kInvalidHandle);
    auto& sizes = static_cast<Function*>(function)->sizes;
    CHECK(index < sizes.size(), kInvalidValue);
    return *offset = 8 * index, *size = sizes[index], kSuccess;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    LOCKED;
    READY;
    CHECK(known(function), kInvalidHandle);
    CHECK(attribute == 8 && value >= 0 && value <= 227 << 10, kInvalidValue);
    note("shared " + std::to_string(value));
    return static_cast<Function*>(function)->shared = value, kSuccess;
}

int cuTensorMapEncodeTiled(void* map, int element, unsigned rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int, int fill) {
    LOCKED;
    CHECK(driver().any && rank >= 1 && rank <= 5, kInvalidValue);
    CHECK(uintptr_t(map) % 64 == 0 && !interleave && !fill, kInvalidValue);
    for (unsigned i = 0; i < rank; i++) CHECK(steps[i] == 1, kInvalidValue);
    const char* wrong = driver().any->tensor_map(map, element, rank, address, dims, strides, box, swizzle);
    if (wrong) note(std::string("tensor map: ") + wrong);
    return wrong ? kInvalidValue : kSuccess;
}

struct Attribute {
    int id;
    char pad[4];
    uint32_t value[16];
};
struct Config {
    uint32_t grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    uint32_t count;
};

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
    LOCKED;
    READY;
    CHECK(known(function), kInvalidHandle);
    CHECK(known(config->stream), kInvalidHandle);
    Function* f = static_cast<Function*>(function);
    CHECK(int(config->shared) <= f->shared && !extra, kInvalidValue);
    EmuShape shape{};
    for (int i = 0; i < 3; i++) shape.grid[i] = config->grid[i], shape.block[i] = config->block[i], shape.cluster[i] = 1;
    for (uint32_t i = 0; i < config->count; i++) {
        // Clusters, and launches that may begin before the one before has ended: here every launch waits for its turn.
        CHECK(config->attributes[i].id == 4 || config->attributes[i].id == 6, kInvalidValue);
        if (config->attributes[i].id == 4) memcpy(shape.cluster, config->attributes[i].value, sizeof shape.cluster);
    }
    // The emulator's regions are longer by their red zones.
    shape.smem = config->shared ? std::min(227u << 10, config->shared + 16 * 128) : 0;
    // Arguments are copied at the call, as the real driver does.
    using Value = std::vector<uint64_t>;
    std::vector<Value> values;
    for (size_t i = 0; i < f->sizes.size(); i++) {
        CHECK(arguments[i], kInvalidValue);
        Value v(24);
        memcpy(v.data(), arguments[i], f->sizes[i]);
        values.push_back(v);
    }
    note("launch " + f->name);
    return driver().put(static_cast<Stream*>(config->stream), [f, shape, values]() mutable {
        std::vector<void*> pointers;
        // A tensor map is read where it lies, on a boundary of 64 bytes.
        for (Value& v : values) {
            auto at = (uintptr_t(v.data()) + 63) / 64 * 64;
            size_t bytes = f->sizes[pointers.size()];
            memmove(reinterpret_cast<void*>(at), v.data(), bytes);
            pointers.push_back(reinterpret_cast<void*>(at));
        }
        static char error[65536];
        auto& sizes = f->sizes;
        if (f->module->launch(f->name.c_str(), &shape, pointers.data(), error, sizeof error)) {
            fprintf(stderr, "fake driver: %s\n", error);
            driver().failed = kLaunchFailed;
        }
        // The copies were moved to the boundary; put them back for the next replay.
        for (size_t i = 0; i < values.size(); i++) memmove(values[i].data(), pointers[i], sizes[i]);
    });
}

// ---- capture and graphs ----
int cuStreamBeginCapture_v2(void* stream, int mode) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    Stream* s = static_cast<Stream*>(stream);
    CHECK(mode >= 0 && mode <= 2 && !s->capturing, kInvalidValue);
    return s->capturing = true, s->invalid = false, s->captured.clear(), kSuccess;
}
int cuStreamEndCapture(void* stream, void** graph) {
    LOCKED;
    READY;
    CHECK(known(stream), kInvalidHandle);
    Stream* s = static_cast<Stream*>(stream);
    *graph = nullptr;
    CHECK(s->capturing, kInvalidValue);
    s->capturing = false;
    CHECK(!s->invalid, kCaptureInvalidated);
    *graph = new Graph{std::move(s->captured)};
    return driver().handles.insert(*graph), kSuccess;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
    LOCKED;
    READY;
    CHECK(known(graph), kInvalidHandle);
    CHECK(!flags, kInvalidValue);
    *exec = new Graph(*static_cast<Graph*>(graph));
    return driver().handles.insert(*exec), kSuccess;
}
int cuGraphDestroy(void* graph) {
    LOCKED;
    READY;
    CHECK(driver().handles.erase(graph), kInvalidHandle);
    return delete static_cast<Graph*>(graph), kSuccess;
}
int cuGraphExecDestroy(void* exec) {
    LOCKED;
    READY;
    CHECK(driver().handles.erase(exec), kInvalidHandle);
    driver().finish();
    return delete static_cast<Graph*>(exec), kSuccess;
}
int cuGraphLaunch(void* exec, void* stream) {
    LOCKED;
    READY;
    CHECK(known(exec) && known(stream), kInvalidHandle);
    note("replay");
    for (Work& w : static_cast<Graph*>(exec)->work) driver().put(static_cast<Stream*>(stream), w);
    return kSuccess;
}
}
