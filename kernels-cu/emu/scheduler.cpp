// The worker: places the blocks of a cluster, picks the next fiber, and explains a deadlock.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "runtime.h"

namespace emu {

Worker::Worker() {
    pending.reserve(4096);
    mbarrier_waiters.reserve(4096), cluster_waiters.reserve(4096), grid_waiters.reserve(4096);
    main.worker = this;
}

void Worker::place_block(Block& b, uint64_t index, unsigned rank) {
    const Shape& shape = grid->shape;
    unsigned threads = grid->threads();
    b.worker = this, b.index = index, b.rank = rank, b.alive = threads;
    size_t size = 1024 + shape.smem + kStaticMax + 8192;
    if (b.storage.size() < size + 1024) {
        b.storage.resize(size + 1024);
        b.mbarriers.resize(size / 8);
        b.arena = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(b.storage.data()) + 1023) & ~uintptr_t(1023));
    }
    size_t whole = b.mbarriers.size() * 8;
#if EMU_ASAN
    __asan_unpoison_memory_region(b.arena, whole);
#endif
    // Fresh shared memory is NaN in every type, or now and then a huge number.
    char fill = config().seed > 2 && (index + config().seed) % 3 == 0 ? 0x7f : char(0xff);
    for (volatile char *p = b.arena, *end = b.arena + whole; p != end; p++) *p = fill;
#if EMU_ASAN
    __asan_poison_memory_region(b.arena, whole);
#endif
    b.base = nullptr, b.shift = 0, b.dynamic = shape.smem, b.used = 0, b.array_count = 0, b.placed = false;
    for (NamedBarrier& x : b.barriers) {
        x.arrived = x.votes = 0;
        x.waiting.clear();
        x.waiting.reserve(1024);
    }
    b.register_waiters.clear();
    b.register_waiters.reserve(32);
    b.warps.resize(warps_per_block);
    unsigned per_thread = std::min(255u, kRegisterFile / (warps_per_block * 32)) / 8 * 8;
    b.free_registers = 0;
    b.issued.assign((warps_per_block + 3) / 4 * 256, Block::Issued{});
    for (unsigned i = 0; i < warps_per_block; i++) {
        Warp& w = b.warps[i];
        w.block = &b, w.index = i, w.global = b.slot * warps_per_block + i;
        w.exist = i * 32 + 32 <= threads ? ~0u : (1u << threads % 32) - 1;
        w.exited = 0;
        for (Meeting& m : w.meetings) m.arrived = 0;
        for (auto& x : w.barriers) x.seen = 0;
        w.wgmma.clear();
        w.wgmma.reserve(128);
        w.wgmma_group = w.wgmma_count = 0, w.registers = per_thread, w.wgmma_fenced = false;
        w.gathers.clear();
        w.gathers.reserve(64);
    }
}

void Worker::run_group(uint64_t group) {
    const Shape& shape = grid->shape;
    unsigned count = unsigned(grid->blocks_per_group()), threads = grid->threads();
    warps_per_block = (threads + 31) / 32;
    random.state = config().seed * 0x9E3779B97F4A7C15ull + group * 0xD1B54A32D192ED03ull + 1;
    random(), random();
    policy = config().seed == 0 ? Policy::RoundRobin : config().seed % 2 ? Policy::Priority : Policy::Uniform;
    late_copies = late_wgmma = late_cp_async = true;
    if (config().seed) late_cp_async = random() & 1, late_wgmma = random() & 1, late_copies = random() & 1;
#ifdef EMU_TSAN
    late_cp_async = late_wgmma = true;  // the exact choice where races are found from clocks
#endif
    while (blocks.size() < count) {
        blocks.push_back(std::make_unique<Block>());
        blocks.back()->slot = unsigned(blocks.size() - 1);
    }
    unsigned warps = count * warps_per_block;
    ready_lanes.assign(warps, 0), ready_warps.assign((warps + 63) / 64, 0), priority.resize(warps);
    for (uint32_t& p : priority) p = random();
    at_warp = 0, alive = count * threads, live_blocks = count, progress = 0;
    pending.clear(), mbarrier_waiters.clear(), cluster_waiters.clear(), grid_waiters.clear();
    cluster_arrived = 0, cluster_phase = 0;
    before_done = !grid->shape.dependent || !grid->before, wants_before = false;
    // Blocks of a cluster are neighbours in the grid.
    dim3 g = shape.grid, c = shape.cluster;
    uint64_t cx = g.x / c.x, cy = g.y / c.y;
    for (unsigned i = 0; i < count; i++) {
        uint64_t index = i;
        unsigned rank = i;
        if (!shape.resident) {
            uint64_t x = group % cx * c.x + i % c.x, y = group / cx % cy * c.y + i / c.x % c.y,
                     z = group / cx / cy * c.z + i / c.x / c.y;
            index = (z * g.y + y) * g.x + x;
        } else {
            rank = 0;
        }
        Block& b = *blocks[i];
        place_block(b, index, rank);
        for (unsigned t = 0; t < threads; t++) start_fiber(b.slot * warps_per_block * 32 + t, b, b.warps[t / 32], t);
    }
#ifdef EMU_TSAN
    // Threads have seen what this one did up to here, the making of their fibers included.
    main.seen.fiber = __tsan_get_current_fiber();
    __tsan_release(&start_sync);
#endif
    for (;;) {
        swap(&main, pick());
        if (!wants_before || !error.empty()) break;
        wants_before = false;
        try {
            complete(*grid->before);
        } catch (const std::exception& e) {
            error = e.what();
            break;
        }
        before_done = true;
        for (Fiber* f : grid_waiters) {
            acquire(f->seen, &grid->before->end_sync), acquire(f->proxy, &grid->before->end_sync);
            wake(f);
        }
        grid_waiters.clear();
        cur = &main;
    }
    if (config().count)
        for (unsigned i = 0; i < count; i++)
            for (Warp& w : blocks[i]->warps) flush_gathers(w, counters);
    end_group_clocks();
    counters.blocks += count;
}

// The host comes after everything that the group did, also after a group that was abandoned.
void Worker::end_group_clocks() {
#ifdef EMU_TSAN
    auto done = [this](Clock& c) {
        if (c.used()) release(c, &end_sync);
    };
    for (unsigned i = 0; i < live_blocks; i++) {
        for (Warp& w : blocks[i]->warps) done(w.wgmma_memory), done(w.wgmma_registers);
        for (MbarrierSync& m : blocks[i]->mbarriers) done(m.copies), done(m.sources);
    }
    for (auto& f : fibers) {
        done(f->seen), done(f->store_reads), done(f->store_writes);
        for (Clock& c : f->copy_clock) done(c);
    }
    __tsan_acquire(&end_sync);
    __tsan_release(&grid->end_sync);
#endif
}

void Worker::run(Grid& g, unsigned id, unsigned workers) {
    grid = &g;
    error.clear();
    main_stack = nullptr;
    uint64_t n = g.blocks() / g.blocks_per_group(), step = 1, offset = 0;
    if (config().seed && n > 1) {  // any order of blocks is legal
        Random r{config().seed};
        r();
        offset = r.below(uint32_t(n));
        step = 1 + r.below(uint32_t(n - 1));
        while (std::gcd(step, n) != 1) step++;
    }
    // Races between blocks show only on different OS threads: neighbours never share one in the race build.
#ifdef EMU_TSAN
    for (uint64_t i = id; i < n && error.empty() && !g.stop; i += workers) run_group((offset + i * step) % n);
#else
    (void)id, (void)workers;
    for (uint64_t i; error.empty() && !g.stop && (i = g.next++) < n;) run_group((offset + i * step) % n);
#endif
    if (!error.empty()) g.stop = true;
#if EMU_ASAN
    for (auto& b : blocks)
        if (b->arena) __asan_unpoison_memory_region(b->arena, b->mbarriers.size() * 8);
#endif
    cur = nullptr;
}

unsigned Worker::pick_warp() {
    auto ready = [this](unsigned w) { return ready_warps[w / 64] >> w % 64 & 1; };
    unsigned warps = unsigned(ready_lanes.size());
    if (policy == Policy::RoundRobin) {
        // Stay with a warp until it waits, then go to the next.
        unsigned w = at_warp;
        while (!ready(w)) {
            w++;
            if (w >= warps) w = 0;
        }
        return w;
    }
    if (policy == Policy::Uniform) {
        unsigned total = 0;
        for (uint64_t m : ready_warps) total += unsigned(__builtin_popcountll(m));
        unsigned k = random.below(total);
        for (size_t i = 0;; i++) {
            uint64_t m = ready_warps[i];
            unsigned here = unsigned(__builtin_popcountll(m));
            if (k >= here) {
                k -= here;
                continue;
            }
            while (k--) m &= m - 1;
            return unsigned(i * 64) + unsigned(__builtin_ctzll(m));
        }
    }
    // Random priorities that change now and then: some warps run far ahead of others.
    if (random.below(256) == 0) priority[random.below(warps)] = random();
    unsigned best = ~0u;
    for (size_t i = 0; i < ready_warps.size(); i++)
        for (uint64_t m = ready_warps[i]; m; m &= m - 1) {
            unsigned w = unsigned(i * 64) + unsigned(__builtin_ctzll(m));
            if (best == ~0u || priority[w] > priority[best]) best = w;
        }
    return best;
}

Fiber* Worker::pick() {
    for (;;) {
        bool any = std::any_of(ready_warps.begin(), ready_warps.end(), [](uint64_t m) { return m != 0; });
        if (!pending.empty()) {
            bool now = !any || (policy == Policy::Uniform && random.below(4) == 0) ||
                       (policy == Policy::Priority && !late_copies);
            if (now) {
                run_pending(policy == Policy::RoundRobin ? 0 : random.below(uint32_t(pending.size())));
                continue;
            }
        }
        if (!any && !grid_waiters.empty() && !before_done) {
            wants_before = true;
            return &main;
        }
        if (!any) fail(deadlock());
        unsigned w = at_warp = pick_warp();
        uint32_t lanes = ready_lanes[w];
        if (policy != Policy::RoundRobin)
            for (uint32_t k = random.below(uint32_t(__builtin_popcount(lanes))); k; k--) lanes &= lanes - 1;
        unsigned lane = unsigned(__builtin_ctz(lanes));
        ready_lanes[w] &= ~(1u << lane);
        if (!ready_lanes[w]) ready_warps[w / 64] &= ~(uint64_t(1) << w % 64);
        return fibers[w * 32 + lane].get();
    }
}

void Worker::run_pending(size_t i) {
    Copy copy;
    {
        Quiet quiet;
        copy = pending[i];
        pending.erase(pending.begin() + long(i));
    }
    progress++;
    run_copy(*this, copy);
}

std::string Worker::deadlock() {
    Quiet quiet;
    std::map<std::string, std::vector<const Fiber*>> groups;
    for (unsigned b = 0; b < live_blocks; b++)
        for (Warp& w : blocks[b]->warps)
            for (uint32_t m = w.exist; m; m &= m - 1) {
                const Fiber& f = *fibers[w.global * 32 + unsigned(__builtin_ctz(m))];
                std::string what = f.done ? "exited" : std::string(f.waits ? f.waits : "polls") + " at " + place(f.at);
                if (!f.done && f.waits && !strncmp(f.waits, "mbarrier", 8)) {
                    char text[64];
                    snprintf(text, sizeof text, ", barrier %#x parity %u", f.bar, f.parity);
                    what += text;
                }
                if (live_blocks > 1) what += " (block " + std::to_string(blocks[b]->index) + ")";
                groups[what].push_back(&f);
            }
    const Fiber& first = *fibers[0];
    std::string text = "deadlock [kernel " + std::string(grid->name) + ", block (" + std::to_string(first.block.x) +
                       "," + std::to_string(first.block.y) + "," + std::to_string(first.block.z) + ")]";
    for (auto& [what, threads] : groups) {
        text += "\n  " + std::to_string(threads.size()) + " threads, first (" +
                std::to_string(threads[0]->thread.x) + "," + std::to_string(threads[0]->thread.y) + "," +
                std::to_string(threads[0]->thread.z) + "): " + what;
    }
    for (unsigned b = 0; b < live_blocks; b++)
        for (int id = 0; id < 16; id++) {
            const NamedBarrier& x = blocks[b]->barriers[id];
            if (x.arrived) {
                text += "\n  barrier " + std::to_string(id) + ": " + std::to_string(x.arrived) + " of " +
                        std::to_string(x.expected) + " threads arrived";
            }
        }
    return text;
}

}  // namespace emu
