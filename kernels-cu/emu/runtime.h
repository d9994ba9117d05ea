// The inside of the emulator: threads, warps, blocks, and the worker that runs them.
//
// A CUDA thread is a fiber. The fibers of a cluster live on one OS thread (a Worker), which runs one fiber at a time
// until that has to wait, so nothing here needs locks. Clusters are spread over OS threads. Warp collectives are a
// rendezvous of the lanes in the mask; the last to arrive computes for all. Asynchronous copies and wgmma are queued
// and carried out as late as the program allows, or at a moment that the seed picks, so that a missing wait shows.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"
#include "clocks.h"
#include "counters.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

namespace emu {

// 32-bit address of the first byte of a block's shared memory.
constexpr uint32_t kWindow = 1024;
// Limits of a Hopper multiprocessor.
constexpr size_t kDynamicMax = 227 << 10, kStaticMax = 48 << 10;
constexpr unsigned kRegisterFile = 65536;
constexpr unsigned kStaticArrays = 32;

// Read once from the environment.
struct Config {
    uint64_t seed = 0;     // EMU_SEED; 0: round robin, everything as late as possible
    unsigned threads = 0;  // EMU_THREADS; 0: one per processor
    bool count = false;    // EMU_COUNT: bank conflicts, sectors, rows
};
const Config& config();

struct Worker;
struct Block;
struct Warp;

// A cp.async that was issued. `bytes` is 0 once it is done.
struct CpAsync {
    uint32_t dst;
    const char* src;
    int bytes, src_bytes;
    unsigned group, sequence;
    At at;
};

struct Fiber : Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    Worker* worker = nullptr;
    Block* home = nullptr;
    Warp* warp_state = nullptr;
    void* fake_stack = nullptr;
    unsigned index = 0;         // among the fibers of the worker
    const char* waits = nullptr;  // what it waits for, in the words of a report, and where
    At at;
    bool done = false, cluster_arrived = false;
    uint64_t cluster_phase = 0;
    uint32_t bar = 0, parity = 0;  // while it waits for an mbarrier
    unsigned spins = 0;  // polls in a row while nothing else happened
    uint64_t progress_seen = 0;
    std::vector<CpAsync> copies;
    unsigned copy_group = 0, copy_sequence = 0, copy_covered = 0;  // covered: some mbarrier waits for them
    unsigned bulk_group = 0, bulk_open = 0, bulk_waited = 0;  // committed; stores since; groups known to be done
    At bulk_at;
    // cp.async has one clock per recent group, so that later copies do not vouch for earlier ones.
    Clock seen, proxy, store_reads, store_writes, copy_clock[4];
    Sync fence_sync, store_sync, copy_sync[4], copy_done;
};

// A meeting of some lanes of a warp.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    const char* what = nullptr;
    At at;
    void* operand[32];
};

struct WgmmaOp {
    Type type;
    int n;  // 0 once it is done
    float* d[32];
    uint32_t a[32][4];
    bool a_in_registers;
    uint64_t da, db;
    int trans_a, trans_b, accumulate;
    unsigned group;
    At at;
};

struct Warp {
    Block* block = nullptr;
    unsigned index = 0, global = 0;  // in its block; among the warps of the worker
    uint32_t exist = 0, exited = 0;
    Meeting meetings[4];
    struct {
        uint32_t seen = 0;
        At at;
    } barriers[16];
    std::vector<WgmmaOp> wgmma;
    unsigned wgmma_group = 0, wgmma_count = 0, registers = 0;
    bool wgmma_fenced = false;
    std::vector<Gather> gathers;  // accesses of the lanes, for the counters
    Clock wgmma_memory, wgmma_registers;
    Sync sync, wgmma_sync, wgmma_done;
};

struct NamedBarrier {
    int expected = 0, arrived = 0, votes = 0, result = 0;
    std::vector<Fiber*> waiting;
    Sync sync;
};

// The runtime's side of an mbarrier, one per 8 bytes of shared memory.
struct MbarrierSync {
    Sync phase[2];
    Clock copies, sources;  // what its copies write and read
    Sync issue;
};

struct Block {
    Worker* worker = nullptr;
    unsigned slot = 0;  // in the worker
    uint64_t index = 0;
    unsigned rank = 0, alive = 0;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    // shared memory
    std::vector<char> storage;
    char *arena = nullptr, *base = nullptr;
    uint32_t shift = 0;
    size_t dynamic = 0, used = 0;
    bool placed = false;
    struct {
        const void* key;
        char* p;
    } arrays[kStaticArrays];
    unsigned array_count = 0;
    std::vector<MbarrierSync> mbarriers;
    unsigned free_registers = 0;
    std::vector<Fiber*> register_waiters;
    // Per warpgroup: descriptors of the last wgmma by ordinal, which its four warps must share.
    struct Issued {
        unsigned ordinal = ~0u;
        uint64_t db = 0;
        int n = 0;
    };
    std::vector<Issued> issued;

    MbarrierSync& mbarrier(uint32_t address) { return mbarriers[(address - kWindow) / 8]; }
};

// A queued copy. Loads go to a barrier, stores belong to a bulk group of their thread.
struct Copy {
    enum Kind { TensorLoad, TensorStore, BulkLoad, BulkStore, ToCluster, Word, CpArrive } kind;
    uint64_t map[16];
    int c[5];
    Block* block;      // whose shared memory
    Block* source;     // ToCluster: whose shared memory is read
    uint32_t smem, from, bar, bytes;
    char* memory;
    bool add;
    Fiber* owner;
    unsigned group;
    At at;
    bool store() const { return kind == TensorStore || kind == BulkStore; }
};

// PCG-like generator: reports must repeat from their seed.
struct Random {
    uint64_t state;
    uint32_t operator()() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return uint32_t(((state ^ state >> 33) * 0xff51afd7ed558ccdull) >> 32);
    }
    uint32_t below(uint32_t n) { return uint32_t(uint64_t((*this)()) * n >> 32); }
};

enum class Policy { RoundRobin, Uniform, Priority };

// A grid: its kernel, arguments and progress. `before` is the grid that it may overtake.
struct Grid {
    const char* name;
    void (*kernel)();
    Invoke invoke;
    Shape shape;
    std::vector<std::vector<char>> values;
    std::vector<void*> args;
    std::shared_ptr<Grid> before;
    std::mutex lock;
    bool done = false;
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> next{0};
    Sync end_sync;

    uint64_t blocks() const { return uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z; }
    unsigned threads() const { return shape.block.x * shape.block.y * shape.block.z; }
    uint64_t blocks_per_group() const {
        return shape.resident ? blocks() : uint64_t(shape.cluster.x) * shape.cluster.y * shape.cluster.z;
    }
};
// Runs a grid, and the one before it if nobody waited for that; an error of the kernel is thrown.
void complete(Grid&);

struct Worker {
    Fiber main;
    Grid* grid = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::unique_ptr<Block>> blocks;
    unsigned live_blocks = 0, warps_per_block = 0, alive = 0;
    // readiness by warp
    std::vector<uint32_t> ready_lanes;
    std::vector<uint64_t> ready_warps;
    std::vector<uint32_t> priority;
    unsigned ready_count = 0, at_warp = 0;
    uint64_t progress = 0;  // counts everything that could let a waiting thread go on
    std::vector<Copy> pending;
    std::vector<Fiber*> mbarrier_waiters, cluster_waiters, grid_waiters;
    unsigned cluster_arrived = 0;
    uint64_t cluster_phase = 0;
    Sync cluster_sync[2], start_sync, end_sync, grid_sync;
    bool before_done = false, wants_before = false;
    Random random{1};
    Policy policy = Policy::RoundRobin;
    bool late_copies = true, late_wgmma = true, late_cp_async = true;
    std::string error;
    Counters counters;
    const void* main_stack = nullptr;
    size_t main_stack_size = 0;

    Worker();
    void run(Grid&, unsigned id, unsigned workers);
    void run_group(uint64_t group);
    void place_block(Block&, uint64_t index, unsigned rank);
    void free_stacks();
    void start_fiber(unsigned index, Block&, Warp&, unsigned thread);
    void end_group_clocks();
    Fiber* pick();
    unsigned pick_warp();
    void wake(Fiber*);
    void swap(Fiber* from, Fiber* to);
    void wait(const char* what, At);
    void requeue();
    void run_pending(size_t i);
    void wake_mbarrier(Block&, uint32_t address);
    void check_cluster_barrier();
    [[noreturn]] void fail(std::string);
    std::string deadlock();
    bool sometimes(unsigned one_in) { return policy != Policy::RoundRobin && random.below(one_in) == 0; }
};

inline Fiber* self() { return static_cast<Fiber*>(cur); }
std::string place(At);
std::string identity(const Fiber&);
inline bool same_site(At a, At b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

// Counts the requests of a warp that not all lanes took part in.
void flush_gathers(Warp&, Counters&);

// Meets the lanes of `mask`; the last to arrive runs `work(operands, mask)`.
template <class F> void meet(const char* what, uint32_t mask, void* operand, At at, F&& work) {
    Fiber* f = self();
    Worker& w = *f->worker;
    Warp& warp = *f->warp_state;
    if (~warp.exist & mask && mask != ~0u) die(at, "%s: mask %08x names lanes that the block has not", what, mask);
    mask &= warp.exist;
    if (!(mask >> f->lane & 1)) die(at, "%s: the calling lane is not in its mask %08x", what, mask);
    if (mask & warp.exited) die(at, "%s: lanes %08x of the mask have exited", what, mask & warp.exited);
    Meeting* m = nullptr;
    for (Meeting& x : warp.meetings) {
        if (!x.arrived) {
            if (!m) m = &x;
        } else if (x.mask == mask) {
            m = &x;
            break;
        } else if (x.mask & mask) {
            die(at, "%s with mask %08x overlaps %s with mask %08x at %s", what, mask, x.what, x.mask,
                place(x.at).c_str());
        }
    }
    if (!m) die(at, "%s: a warp in more than 4 groups", what);
    if (!m->arrived) {
        m->mask = mask, m->what = what, m->at = at;
    } else if (m->what != what || !same_site(m->at, at)) {
        die(at, "warp diverged: this lane is at %s, lanes %08x are at %s (%s)", what, m->arrived, m->what,
            place(m->at).c_str());
    }
    m->operand[f->lane] = operand;
    m->arrived |= 1u << f->lane;
    if (m->arrived != mask) return w.wait(what, at);
    work(m->operand, mask);
    // A whole warp together: what some of its lanes have accessed since the last time is complete.
    if (mask == warp.exist && !warp.gathers.empty()) flush_gathers(warp, w.counters);
    m->arrived = 0;
    for (uint32_t rest = mask & ~(1u << f->lane); rest; rest &= rest - 1)
        w.wake(w.fibers[warp.global * 32 + unsigned(__builtin_ctz(rest))].get());
    if (w.sometimes(4)) w.requeue();
}

// Where a shared address of this block or, with a rank in its top byte, of another of the cluster lies.
struct SharedAt {
    Block* block;
    uint32_t address;
    char* p;
};
SharedAt resolve(uint32_t address, uint32_t bytes, At);
char* at_address(Block&, uint32_t address);
// ASan: dies at the issuing line if a byte is poisoned.
void addressable(const void* p, size_t bytes, const char* what, At);
// An access to global memory, for the counters alone.
void count_global(const void* p, uint32_t bytes, bool store, At);
uint32_t swizzled(uint32_t address, uint32_t swizzle);
void finish_cp_async(Fiber&, unsigned groups, unsigned sequences);
// Counts an arrival and `bytes` landed at a barrier, as the copy engine.
void mbarrier_complete(Block&, uint32_t bar, uint32_t arrivals, uint32_t bytes);
void exit_checks(Fiber&);
void run_copy(Worker&, Copy&);

}  // namespace emu
