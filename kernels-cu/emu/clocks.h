// Happens-before bookkeeping for the ThreadSanitizer build; nothing in the others.
//
// Every CUDA thread owns two of the sanitizer's clocks: what the thread has seen, and what of that the asynchronous
// proxy may see. Barriers carry both; fence.proxy.async copies the first into the second; TMA stores and wgmma read
// with the second. A missing proxy fence is then a data race. Each asynchronous engine (a cp.async group, an mbarrier's
// copies, a thread's bulk stores, a warp's wgmma) is one more clock. The runtime itself is not instrumented: it
// reports the accesses that it makes for a kernel.
#pragma once
#include <cstddef>

#ifdef EMU_TSAN
#include <atomic>
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emu {

// Two addresses that stand for an event, one for each clock of a thread.
struct Sync {
    alignas(8) char generic[8], async[8];
};

#ifdef EMU_TSAN

struct Clock {
    void* fiber = nullptr;
    // Made on first use, since each costs memory, and from a clock that has seen nothing: a new one inherits.
    void* get() {
        if (!fiber) {
            static std::atomic_flag busy;
            static void* blank;
            while (busy.test_and_set()) {}
            if (!blank) blank = __tsan_create_fiber(0);
            void* back = __tsan_get_current_fiber();
            __tsan_switch_to_fiber(blank, 1);
            fiber = __tsan_create_fiber(0);
            __tsan_switch_to_fiber(back, 1);
            busy.clear();
        }
        return fiber;
    }
    bool used() const { return fiber != nullptr; }
};
// Acts as another clock for a scope.
struct As {
    void* back = __tsan_get_current_fiber();
    explicit As(Clock& c) { __tsan_switch_to_fiber(c.get(), 1); }
    ~As() { __tsan_switch_to_fiber(back, 1); }
};
// A scope that works on the runtime's own containers: their allocations and copies are intercepted even here.
struct Quiet {
    Quiet() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~Quiet() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
};
inline void release(Clock& c, void* event) {
    As as(c);
    __tsan_release(event);
}
inline void acquire(Clock& c, void* event) {
    As as(c);
    __tsan_acquire(event);
}
inline void saw_read(const void* p, size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
inline void saw_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }

#else

struct Clock {
    bool used() const { return false; }
};
struct As {
    explicit As(Clock&) {}
};
struct Quiet {
    Quiet() {}
};
inline void release(Clock&, void*) {}
inline void acquire(Clock&, void*) {}
inline void saw_read(const void*, size_t) {}
inline void saw_write(void*, size_t) {}

#endif

}  // namespace emu
