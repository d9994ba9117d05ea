// mbarriers and the proxy fence.
#include "runtime.h"

namespace emu {

namespace {
// The 8 bytes in shared memory. Fresh memory has another `magic`, so an uninitialised barrier is noticed.
struct Bits {
    uint64_t pending : 20, count : 20;
    int64_t bytes : 21;
    uint64_t phase : 1, magic : 2;
};
static_assert(sizeof(Bits) == 8);
constexpr uint64_t kMagic = 1;
constexpr uint32_t kCountMax = (1u << 20) - 1;

struct Found {
    Block* block;
    uint32_t address;
    Bits* bits;
};

Found find(uint32_t bar, bool fresh, At at) {
    if (bar & 7) die(at, "mbarrier %#x is not aligned to 8 bytes", bar);
    SharedAt s = resolve(bar, 8, at);
    Bits* bits = reinterpret_cast<Bits*>(s.p);
    addressable(bits, 8, "mbarrier", at);
    if (!fresh) {
        saw_read(bits, 8);
        if (bits->magic != kMagic) die(at, "mbarrier %#x is used before mbarrier.init", bar);
    }
    return {s.block, s.address, bits};
}

void settle(Block& block, uint32_t address, Bits* b) {
    if (b->pending || b->bytes) return;
    b->pending = b->count, b->phase = b->phase ^ 1;
    block.worker->wake_mbarrier(block, address);
}

void passed(Fiber* f, const Found& x, uint32_t parity) {
    Sync& s = x.block->mbarrier(x.address).phase[parity];
    acquire(f->seen, s.generic), acquire(f->proxy, s.async);
}
}  // namespace

void Worker::wake_mbarrier(Block& block, uint32_t address) {
    Quiet quiet;
    const Bits* b = reinterpret_cast<const Bits*>(at_address(block, address));
    for (size_t i = 0; i < mbarrier_waiters.size();) {
        Fiber* f = mbarrier_waiters[i];
        if (f->home == &block && f->bar == address && b->phase != f->parity) {
            wake(f);
            mbarrier_waiters[i] = mbarrier_waiters.back();
            mbarrier_waiters.pop_back();
        } else {
            i++;
        }
    }
}

void mbarrier_init(uint32_t bar, uint32_t count, At at) {
    if (bar >> 24) die(at, "mbarrier.init of another block's barrier");
    Found x = find(bar, true, at);
    if (!count || count > kCountMax) die(at, "mbarrier %#x: a count of %u", bar, count);
    saw_write(x.bits, 8);
    *x.bits = Bits{count, count, 0, 0, kMagic};
}

void mbarrier_inval(uint32_t bar, At at) {
    Found x = find(bar, false, at);
    saw_write(x.bits, 8);
    x.bits->magic = 0;
}

// Arrivals and expected bytes in one; expect_tx alone has no arrival.
void mbarrier_arrive(uint32_t bar, uint32_t arrivals, uint32_t bytes, At at) {
    Fiber* f = self();
    Found x = find(bar, false, at);
    if (x.bits->pending < arrivals)
        die(at, "mbarrier %#x: more arrivals in a phase than its count of %u", bar, unsigned(x.bits->count));
    if (int64_t(x.bits->bytes) + bytes > kCountMax) die(at, "mbarrier %#x: more than 2^20 - 1 bytes in a phase", bar);
    Sync& s = x.block->mbarrier(x.address).phase[x.bits->phase];
    release(f->seen, s.generic), release(f->proxy, s.async);
    x.bits->bytes += bytes, x.bits->pending -= arrivals;
    settle(*x.block, x.address, x.bits);
    yield_point();
}

bool mbarrier_test(uint32_t bar, uint32_t parity, At at) {
    Fiber* f = self();
    if (parity > 1) die(at, "mbarrier parity %u", parity);
    Found x = find(bar, false, at);
    if (x.bits->phase == parity) {
        spin(at);
        if (x.bits->phase == parity) return false;
    }
    passed(f, x, parity);
    return true;
}

void mbarrier_wait(uint32_t bar, uint32_t parity, At at) {
    Fiber* f = self();
    if (parity > 1) die(at, "mbarrier parity %u", parity);
    if (bar >> 24) die(at, "waits at another block's mbarrier; only arrivals may be remote");
    Found x = find(bar, false, at);
    if (x.bits->phase == parity) {
        f->bar = x.address, f->parity = parity;
        {
            Quiet quiet;
            f->worker->mbarrier_waiters.push_back(f);
        }
        f->worker->wait("mbarrier wait", at);
    }
    passed(f, x, parity);
    yield_point();
}

void mbarrier_complete(Block& block, uint32_t bar, uint32_t arrivals, uint32_t bytes) {
    Bits* b = reinterpret_cast<Bits*>(at_address(block, bar));
    b->pending -= arrivals;
    b->bytes -= bytes;
    settle(block, bar, b);
}

uint32_t mbarrier_phase(Block& block, uint32_t bar) {
    return uint32_t(reinterpret_cast<Bits*>(at_address(block, bar))->phase);
}

bool mbarrier_ready(Block& block, uint32_t bar) {
    return reinterpret_cast<Bits*>(at_address(block, bar))->magic == kMagic;
}

// Everything that this thread has seen becomes visible to its asynchronous operations.
void fence_proxy(At) {
    Fiber* f = self();
    release(f->seen, f->fence_sync.generic), acquire(f->proxy, f->fence_sync.generic);
}

}  // namespace emu
