// Launches: checks of the shape, OS threads, grids held back for dependent launches, and the C interface.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "runtime.h"

namespace emu {

const Registered* Registered::first = nullptr;

namespace {
Config& chosen_config() {
    static Config chosen = [] {
        Config c;
        if (const char* s = getenv("EMU_SEED")) c.seed = strtoull(s, nullptr, 0);
        if (const char* s = getenv("EMU_THREADS")) c.threads = unsigned(atoi(s));
        c.count = getenv("EMU_COUNT") != nullptr;
        return c;
    }();
    return chosen;
}
}  // namespace

const Config& config() { return chosen_config(); }

namespace {

// Workers are kept for later launches and never destroyed.
std::mutex pool_lock;
auto& idle = *new std::vector<Worker*>;
auto& totals = *new std::map<std::string, Counters>;
std::shared_ptr<Grid> held_back;

Worker* take_worker() {
    std::lock_guard lock(pool_lock);
    if (idle.empty()) return new Worker;
    Worker* w = idle.back();
    idle.pop_back();
    return w;
}

void give_worker(const char* kernel, Worker* w) {
    std::lock_guard lock(pool_lock);
    totals[kernel].add(w->counters);
    w->counters = Counters{};
    // A failed worker's stacks hold whatever they held; it starts afresh with the next launch all the same.
    idle.push_back(w);
}

void release_stacks() {
    std::lock_guard lock(pool_lock);
    for (Worker* w : idle) w->free_stacks();
}

void check(const char* name, const Shape& s) {
    auto bad = [name](const std::string& what) {
        throw std::runtime_error(std::string("launch of ") + name + ": " + what);
    };
    uint64_t threads = uint64_t(s.block.x) * s.block.y * s.block.z;
    uint64_t cluster = uint64_t(s.cluster.x) * s.cluster.y * s.cluster.z;
    if (!threads || threads > 1024) bad("a block has 1 to 1024 threads, not " + std::to_string(threads));
    if (!s.grid.x || !s.grid.y || !s.grid.z || s.grid.y > 65535 || s.grid.z > 65535)
        bad("a grid has 1 to 2^31-1 blocks along x, 1 to 65535 along y and z");
    if (!cluster || cluster > 8) bad("a cluster has 1 to 8 blocks, not " + std::to_string(cluster));
    if (s.grid.x % s.cluster.x || s.grid.y % s.cluster.y || s.grid.z % s.cluster.z)
        bad("the grid is no multiple of the cluster");
    if (s.smem > kDynamicMax)
        bad(std::to_string(s.smem) + " bytes of shared memory; " + std::to_string(kDynamicMax) + " is the limit");
    if (s.resident && cluster > 1) bad("a resident launch has no clusters here");
    if (s.resident && threads * s.grid.x * s.grid.y * s.grid.z > 16384) bad("more than 16384 resident threads");
}

void run_grid(Grid& g) {
    unsigned n = config().threads ? config().threads : std::max(1u, std::thread::hardware_concurrency());
    n = unsigned(std::min<uint64_t>(n, g.blocks() / g.blocks_per_group()));
    std::vector<Worker*> workers;
    for (unsigned i = 0; i < n; i++) workers.push_back(take_worker());
    std::vector<std::thread> threads;
    for (unsigned i = 1; i < n; i++) threads.emplace_back([&, i] { workers[i]->run(g, i, n); });
    workers[0]->run(g, 0, n);
    for (std::thread& t : threads) t.join();
    std::string error;
    for (Worker* w : workers) {
        if (error.empty()) error = w->error;
        give_worker(g.name, w);
    }
    if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

void complete(Grid& g) {
    std::lock_guard lock(g.lock);
    if (g.done) return;
    g.done = true;
    run_grid(g);
}

void launch(const char* name, void (*kernel)(), Invoke invoke, const Shape& shape, void** args, const size_t* sizes,
            size_t count) {
    check(name, shape);
    auto g = std::make_shared<Grid>();
    g->name = name, g->kernel = kernel, g->invoke = invoke, g->shape = shape;
    for (size_t i = 0; i < count; i++) {
        const char* p = static_cast<const char*>(args[i]);
        g->values.emplace_back(p, p + sizes[i]);
    }
    for (auto& v : g->values) g->args.push_back(v.data());
    std::shared_ptr<Grid> before = std::move(held_back);
    held_back = nullptr;
    if (shape.dependent) {
        g->before = before;
    } else if (before) {
        complete(*before);
    }
    if (shape.dependents) {
        held_back = g;
        return;
    }
    run_grid(*g);
    g->done = true;
    for (Grid* b = g->before.get(); b; b = b->before.get()) complete(*b);
}

void synchronize() {
    std::shared_ptr<Grid> g = std::move(held_back);
    held_back = nullptr;
    for (Grid* b = g.get(); b; b = b->before.get()) complete(*b);
}

std::string take_counters() {
    std::lock_guard lock(pool_lock);
    std::string text;
    for (auto& [kernel, c] : totals) {
        char line[512];
        snprintf(line, sizeof line, "%s total blocks=%lu switches=%lu mma=%lu wgmma=%lu multiply_adds=%lu\n",
                 kernel.c_str(), c.blocks, c.switches, c.mma, c.wgmma, c.multiply_adds);
        text += line;
        for (auto& [key, s] : c.sites) {
            const char* slash = strrchr(key.first.first, '/');
            snprintf(line, sizeof line,
                     "%s %s:%u %s requests=%lu cycles=%lu conflicts=%lu sectors=%lu rows=%lu bytes=%lu\n",
                     kernel.c_str(), slash ? slash + 1 : key.first.first, key.first.second, key.second, s.requests,
                     s.cycles, s.conflicts, s.sectors, s.rows, s.bytes);
            text += line;
        }
    }
    totals.clear();
    return text;
}

}  // namespace emu

// ---- the C interface of a shared object of kernels ----

extern "C" {

// As emu::Shape.
struct EmuShape {
    uint32_t grid[3], block[3], cluster[3], smem, dependent, dependents, resident;
};

// Runs an exported kernel; `args` are pointers to its arguments as for cuLaunchKernel. 0, or 1 with the report in
// `error`.
int emu_launch(const char* kernel, const EmuShape* s, void** args, char* error, size_t capacity) {
    try {
        for (const emu::Registered* r = emu::Registered::first; r; r = r->next) {
            if (strcmp(r->name, kernel)) continue;
            emu::Shape shape;
            shape.grid = {s->grid[0], s->grid[1], s->grid[2]};
            shape.block = {s->block[0], s->block[1], s->block[2]};
            shape.cluster = {s->cluster[0], s->cluster[1], s->cluster[2]};
            shape.smem = s->smem;
            shape.dependent = s->dependent, shape.dependents = s->dependents, shape.resident = s->resident;
            emu::launch(r->name, r->kernel, r->invoke, shape, args, r->sizes, r->count);
            return 0;
        }
        throw std::runtime_error(std::string("no kernel is called ") + kernel);
    } catch (const std::exception& e) {
        snprintf(error, capacity, "%s", e.what());
        return 1;
    }
}

// The seed of the launches that follow, in place of EMU_SEED.
void emu_seed(uint64_t seed) { emu::chosen_config().seed = seed; }

// Whether the launches that follow are counted, in place of EMU_COUNT.
void emu_count(int on) { emu::chosen_config().count = on != 0; }

// Gives back the stacks that are kept for later launches: a process that loads many objects has only so many maps.
void emu_release() { emu::release_stacks(); }

// Runs a grid that is held back for a dependent one.
int emu_synchronize(char* error, size_t capacity) {
    try {
        emu::synchronize();
        return 0;
    } catch (const std::exception& e) {
        snprintf(error, capacity, "%s", e.what());
        return 1;
    }
}

// Number of arguments of a kernel and their sizes (at most 32); -1 where there is no such kernel.
int emu_arguments(const char* kernel, size_t* sizes) {
    for (const emu::Registered* r = emu::Registered::first; r; r = r->next) {
        if (strcmp(r->name, kernel)) continue;
        for (size_t i = 0; i < r->count; i++) sizes[i] = r->sizes[i];
        return int(r->count);
    }
    return -1;
}

// What the launches since the last call counted, as text; cut at `capacity`.
void emu_counters(char* text, size_t capacity) { snprintf(text, capacity, "%s", emu::take_counters().c_str()); }

}
