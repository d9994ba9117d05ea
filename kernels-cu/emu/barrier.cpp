// Barriers of a block and of a cluster, registers of a warpgroup, waits for the grid before, and what a thread must
// have waited for when it exits.
#include "runtime.h"

namespace emu {

namespace {
// Arrives at a barrier of the block; with `wait`, returns when all have. `vote` counts a predicate on the way.
int meet_at_barrier(int id, int threads, bool wait, int vote, At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    Block& block = *f->home;
    Warp& warp = *f->warp_state;
    unsigned all = w.grid->threads();
    int rounded = int((all + 31) / 32 * 32);
    if (threads < 0) threads = rounded;
    if (id < 0 || id > 15) die(at, "barrier %d: there are barriers 0 to 15", id);
    if (threads <= 0 || threads % 32 || threads > rounded)
        die(at, "barrier %d with %d threads: a multiple of 32 up to the block's %d is needed", id, threads, rounded);
    if (w.sometimes(4)) w.requeue();
    // A barrier counts warps: all lanes of one come to the same call.
    auto& of_warp = warp.barriers[id];
    if (!of_warp.seen) {
        of_warp.at = at;
    } else if (!same_site(of_warp.at, at)) {
        die(at, "barrier %d: part of a warp comes here, lanes %08x went to %s", id, of_warp.seen,
            place(of_warp.at).c_str());
    }
    if (of_warp.seen >> f->lane & 1) die(at, "barrier %d: a lane comes twice before its warp came once", id);
    of_warp.seen |= 1u << f->lane;
    if (of_warp.seen == warp.exist) of_warp.seen = 0;

    NamedBarrier& b = block.barriers[id];
    if (!b.arrived) {
        b.expected = threads, b.votes = 0;
    } else if (b.expected != threads) {
        die(at, "barrier %d: %d threads expected here, %d by the first to arrive", id, threads, b.expected);
    }
    release(f->seen, b.sync.generic), release(f->proxy, b.sync.async);
    b.arrived++, b.votes += vote;
    // The last warp of a block may be partial.
    int needed = b.expected == rounded ? int(all) : b.expected;
    if (wait) {
        Quiet quiet;
        b.waiting.push_back(f);
    }
    if (b.arrived == needed) {
        b.arrived = 0, b.result = b.votes;
        for (Fiber* x : b.waiting) {
            acquire(x->seen, b.sync.generic), acquire(x->proxy, b.sync.async);
            if (x != f) w.wake(x);
        }
        b.waiting.clear();
    } else if (wait) {
        w.wait(id ? "bar.sync" : "__syncthreads", at);
    }
    return b.result;
}
}  // namespace

void barrier(int id, int threads, bool wait, At at) { meet_at_barrier(id, threads, wait, 0, at); }
int barrier_count(bool predicate, At at) { return meet_at_barrier(0, -1, true, predicate, at); }

// ---- clusters ----

void cluster_arrive(At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (w.grid->shape.resident) die(at, "cluster barrier in a resident launch");
    if (f->cluster_arrived) die(at, "arrives twice at the cluster barrier without a wait");
    f->cluster_arrived = true, f->cluster_phase = w.cluster_phase, f->at = at;
    Sync& s = w.cluster_sync[w.cluster_phase % 2];
    release(f->seen, s.generic), release(f->proxy, s.async);
    w.cluster_arrived++;
    w.check_cluster_barrier();
    yield_point();
}

// Threads that have exited count as arrived.
void Worker::check_cluster_barrier() {
    if (!cluster_arrived || cluster_arrived < alive) return;
    cluster_arrived = 0, cluster_phase++;
    for (Fiber* f : cluster_waiters) wake(f);
    cluster_waiters.clear();
}

void cluster_wait(At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (!f->cluster_arrived) die(at, "waits at the cluster barrier without having arrived");
    while (w.cluster_phase == f->cluster_phase) {
        {
            Quiet quiet;
            w.cluster_waiters.push_back(f);
        }
        w.wait("barrier.cluster.wait", at);
    }
    f->cluster_arrived = false;
    Sync& s = w.cluster_sync[f->cluster_phase % 2];
    acquire(f->seen, s.generic), acquire(f->proxy, s.async);
}

// ---- registers ----

void set_registers(int registers, bool increase, At at) {
    if (registers < 24 || registers > 256 || registers % 8)
        die(at, "setmaxnreg %d: a multiple of 8 from 24 to 256 is needed", registers);
    int mine = registers;
    meet("setmaxnreg", ~0u, &mine, at, [&](void**, uint32_t) {
        Fiber* f = self();
        Warp& warp = *f->warp_state;
        Block& block = *f->home;
        unsigned wanted = unsigned(registers);
        if (increase ? wanted < warp.registers : wanted > warp.registers)
            die(at, "setmaxnreg.%s %u: a thread has %u registers", increase ? "inc" : "dec", wanted, warp.registers);
        if (!increase) {
            block.free_registers += (warp.registers - wanted) * 32;
            warp.registers = wanted;
            for (Fiber* x : block.register_waiters) f->worker->wake(x);
            block.register_waiters.clear();
            return;
        }
        unsigned more = (wanted - warp.registers) * 32;
        while (block.free_registers < more) {
            {
                Quiet quiet;
                block.register_waiters.push_back(f);
            }
            f->worker->wait("setmaxnreg.inc, for registers that other warps must give back", at);
        }
        block.free_registers -= more;
        warp.registers = wanted;
    });
}

// ---- grids ----

void grid_launch_dependents(At) { yield_point(); }

void grid_wait(At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (w.before_done) {
        if (w.grid->before && w.grid->shape.dependent)
            acquire(f->seen, &w.grid->before->end_sync), acquire(f->proxy, &w.grid->before->end_sync);
        return;
    }
    {
        Quiet quiet;
        w.grid_waiters.push_back(f);
    }
    w.wait("griddepcontrol.wait", at);
}

// ---- exits ----

void exit_checks(Fiber& f) {
    At here = f.at;
    auto bad = [&](At at, const std::string& what) {
        f.worker->fail(place(at) + ": " + what + " [" + identity(f) + "]");
    };
    if (!f.copies.empty() && f.copies.back().sequence >= f.copy_covered)
        bad(f.copies.back().at, "exits with cp.async issued here and not waited for");
    if (f.bulk_open) bad(f.bulk_at, "exits with bulk stores issued here and not committed");
    if (f.bulk_waited < f.bulk_group) bad(f.bulk_at, "exits with bulk stores issued here and not waited for");
    if (!f.warp_state->wgmma.empty()) bad(f.warp_state->wgmma[0].at, "exits with wgmma issued here and not waited for");
    if (f.cluster_arrived) bad(here, "exits between the arrival at the cluster barrier and its wait");
    for (Meeting& m : f.warp_state->meetings)
        if (m.arrived && (m.mask >> f.lane & 1))
            bad(m.at, std::string("lanes wait here in ") + m.what + " for a lane that exits");
}

}  // namespace emu
