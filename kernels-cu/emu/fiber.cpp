// Fibers: the stack switch, the life of a CUDA thread, waiting and waking.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "runtime.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif

namespace emu {

thread_local constinit Thread* cur = nullptr;

namespace {

// The sanitizer's frames are larger.
constexpr size_t kStack = EMU_ASAN ? 512 << 10 : 128 << 10;
constexpr size_t kGuardPage = 4096;

// Saves the registers that a call preserves, changes stacks, restores.
extern "C" void emu_switch_stack(void** save, void* to);
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emu_switch_stack,.-emu_switch_stack
)");

void fiber_main() {
    Fiber* f = self();
    Worker& w = *f->worker;
#if EMU_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    // The first fiber is entered from the stack of the OS thread.
    if (!w.main_stack) w.main_stack = bottom, w.main_stack_size = size;
#endif
    acquire(f->seen, &w.start_sync);
    acquire(f->proxy, &w.start_sync);
    w.grid->invoke(w.grid->kernel, w.grid->args.data());
    exit_checks(*f);
    f->warp_state->exited |= 1u << f->lane;
    f->done = true;
    release(f->seen, &w.end_sync);
    w.alive--, f->home->alive--, w.progress++;
    w.check_cluster_barrier();
    if (w.alive == 0) {
        if (!w.pending.empty()) {
            w.fail(place(w.pending[0].at) + ": the block ends with " + std::to_string(w.pending.size()) +
                   " copies in flight, the first issued here");
        }
        w.swap(f, &w.main);
    }
    w.wait("exited", At::current());
    abort();
}

}  // namespace

std::string place(At at) {
    std::string file = at.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

std::string identity(const Fiber& f) {
    char text[256];
    snprintf(text, sizeof text, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u), warp %u lane %u",
             f.worker->grid ? f.worker->grid->name : "?", f.block.x, f.block.y, f.block.z, f.thread.x, f.thread.y,
             f.thread.z, f.warp, f.lane);
    return text;
}

void Worker::free_stacks() {
    for (auto& f : fibers) munmap(f->stack - kGuardPage, kStack + kGuardPage);
    fibers.clear();
}

void Worker::start_fiber(unsigned index, Block& b, Warp& warp, unsigned thread) {
    while (fibers.size() <= index) {
        auto f = std::make_unique<Fiber>();
        f->copies.reserve(256);
        void* m = mmap(nullptr, kStack + kGuardPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of a block");
        mprotect(m, kGuardPage, PROT_NONE);
        f->stack = static_cast<char*>(m) + kGuardPage;
        f->index = unsigned(fibers.size());
        fibers.push_back(std::move(f));
    }
    Fiber& f = *fibers[index];
    dim3 shape = grid->shape.block, g = grid->shape.grid;
    f.thread = {thread % shape.x, thread / shape.x % shape.y, thread / shape.x / shape.y};
    f.block = {unsigned(b.index % g.x), unsigned(b.index / g.x % g.y), unsigned(b.index / g.x / g.y)};
    f.block_dim = shape, f.grid_dim = g;
    f.lane = thread % 32, f.warp = thread / 32;
    f.cluster_rank = b.rank;
    f.cluster_size = grid->shape.cluster.x * grid->shape.cluster.y * grid->shape.cluster.z;
    f.worker = this, f.home = &b, f.warp_state = &warp;
    f.waits = nullptr, f.fake_stack = nullptr;
    f.done = f.cluster_arrived = false;
    f.cluster_phase = f.progress_seen = 0, f.spins = 0;
    f.copies.clear();
    f.copy_group = f.copy_sequence = f.copy_covered = f.bulk_group = f.bulk_open = f.bulk_waited = 0;
#if EMU_ASAN
    __asan_unpoison_memory_region(f.stack, kStack);
#endif
    // The first switch pops six registers and returns into fiber_main with the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(f.stack + kStack) - 2;
    *top = reinterpret_cast<void*>(fiber_main);
    f.stack_pointer = top - 6;
    wake(&f);
}

void Worker::swap(Fiber* from, Fiber* to) {
    cur = to;
    counters.switches++;
#if EMU_ASAN
    if (to == &main)
        __sanitizer_start_switch_fiber(&from->fake_stack, main_stack, main_stack_size);
    else
        __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, kStack);
#endif
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(to->seen.get(), 1);
#endif
    emu_switch_stack(&from->stack_pointer, to->stack_pointer);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void Worker::wait(const char* what, At at) {
    Fiber* f = self();
    f->waits = what, f->at = at;
    Fiber* next = pick();
    if (next != f) swap(f, next);
    f->waits = nullptr;
}

// Lets others run; a thread that only asks again is no progress.
void Worker::requeue() {
    Fiber* f = self();
    uint64_t before = progress;
    wake(f);
    at_warp = (f->warp_state->global + 1) % unsigned(ready_lanes.size());
    progress = before;
    Fiber* next = pick();
    if (next != f) swap(f, next);
}

void Worker::wake(Fiber* f) {
    unsigned warp = f->warp_state->global;
    ready_lanes[warp] |= 1u << f->lane;
    ready_warps[warp / 64] |= uint64_t(1) << warp % 64;
    progress++;
}

void Worker::fail(std::string message) {
    {
        Quiet quiet;
        error = std::move(message);
    }
    swap(self(), &main);
    abort();
}

void die(At at, const char* format, ...) {
    Quiet quiet;
    char text[768];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    self()->worker->fail(place(at) + ": " + text + " [" + identity(*self()) + "]");
}

void yield_point() {
    Worker& w = *self()->worker;
    if (w.sometimes(8)) w.requeue();
}

// A load that a loop may repeat: others run, and a wait for a block that is not there ends.
void spin(At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (w.progress != f->progress_seen) f->progress_seen = w.progress, f->spins = 0;
    f->at = at;
    if (++f->spins > 20000)
        w.fail(w.deadlock() + "\n  polled at " + place(at) +
               "; blocks that wait for each other need a resident launch");
    w.requeue();
}

}  // namespace emu
