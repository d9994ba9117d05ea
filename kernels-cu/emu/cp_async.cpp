// cp.async: copies of up to 16 bytes, in groups of the thread that issued them.
#include "runtime.h"

namespace emu {

namespace {
void carry_out(Fiber& f, const CpAsync& c) {
    As as(f.copy_clock[c.group % 4]);
    char* to = at_address(*f.home, c.dst);
    saw_write(to, size_t(c.bytes));
    if (c.src_bytes) saw_read(c.src, size_t(c.src_bytes));
    for (int i = 0; i < c.bytes; i += 4) {
        // src_bytes need not be a multiple of 4: the tail is filled byte by byte.
        char word[4] = {};
        for (int b = 0; b < 4; b++)
            if (i + b < c.src_bytes) word[b] = c.src[i + b];
        __builtin_memcpy(to + i, word, 4);
    }
}
}  // namespace

// Carries out the copies of groups below `groups` or with a sequence number below `sequences`.
void finish_cp_async(Fiber& f, unsigned groups, unsigned sequences) {
    size_t k = 0;
    for (; k < f.copies.size() && (f.copies[k].group < groups || f.copies[k].sequence < sequences); k++)
        if (f.copies[k].bytes) carry_out(f, f.copies[k]);
    Quiet quiet;
    f.copies.erase(f.copies.begin(), f.copies.begin() + long(k));
}

void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, At at) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (src_bytes < 0 || src_bytes > bytes) die(at, "cp.async: %d source bytes of %d", src_bytes, bytes);
    if (dst % unsigned(bytes)) die(at, "cp.async: destination %#x is not aligned to %d bytes", dst, bytes);
    if (src_bytes && reinterpret_cast<uintptr_t>(src) % unsigned(bytes))
        die(at, "cp.async: source %p is not aligned to %d bytes", src, bytes);
    if (dst >> 24) die(at, "cp.async writes the block's own shared memory alone");
    SharedAt to = resolve(dst, uint32_t(bytes), at);
    addressable(src, size_t(src_bytes), "cp.async source", at);
    addressable(to.p, size_t(bytes), "cp.async destination", at);
    if (src_bytes) global(src, uint32_t(bytes), false, at);
    unsigned g = f->copy_group % 4;
    release(f->seen, f->copy_sync[g].generic), acquire(f->copy_clock[g], f->copy_sync[g].generic);
    CpAsync c{dst, static_cast<const char*>(src), bytes, src_bytes, f->copy_group, f->copy_sequence++, at};
    if (!w.late_cp_async) carry_out(*f, c), c.bytes = 0;
    {
        Quiet quiet;
        f->copies.push_back(c);
    }
    yield_point();
}

void cp_async_commit(At) { self()->copy_group++; }

void cp_async_wait(int pending, At) {
    Fiber* f = self();
    if (f->copy_group <= unsigned(pending)) return;
    unsigned upto = f->copy_group - unsigned(pending);
    finish_cp_async(*f, upto, 0);
    for (unsigned g = upto > 4 ? upto - 4 : 0; g < upto; g++) release(f->copy_clock[g % 4], f->copy_done.generic);
    acquire(f->seen, f->copy_done.generic);
}

void cp_async_arrive(uint32_t bar, At at) {
    Fiber* f = self();
    resolve(bar, 8, at);
    f->copy_covered = f->copy_sequence;
    Copy c{};
    c.kind = Copy::CpArrive, c.block = f->home, c.bar = bar, c.owner = f, c.group = f->copy_sequence, c.at = at;
    {
        Quiet quiet;
        f->worker->pending.push_back(c);
    }
    yield_point();
}

}  // namespace emu
