// TMA: tensor maps, boxes with swizzle and zero fill, runs of bytes, reduce-adds, bulk groups.
#include "tensor_map.h"

#include "runtime.h"

namespace emu {

uint32_t mbarrier_phase(Block&, uint32_t bar);
bool mbarrier_ready(Block&, uint32_t bar);

namespace {

const MapFields& fields(const void* map) { return *static_cast<const MapFields*>(map); }

uint32_t box_bytes(const MapFields& m) {
    uint32_t n = m.bytes;
    for (int d = 0; d < m.rank; d++) n *= m.box[d];
    return n;
}

[[noreturn]] void fail(Worker& w, const Copy& c, const std::string& what) {
    w.fail(place(c.at) + ": " + what + " [" + identity(*c.owner) + "]");
}

template <class T, class F> void atomic_update(char* p, F&& next) {
    T* at = reinterpret_cast<T*>(p);
    T seen = __atomic_load_n(at, __ATOMIC_RELAXED), value;
    do value = next(seen);
    while (!__atomic_compare_exchange_n(at, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

void add_element(Element e, char* to, const char* from) {
    switch (e) {
        case Element::F32: {
            float v;
            __builtin_memcpy(&v, from, 4);
            atomic_float_add(reinterpret_cast<float*>(to), v);
            break;
        }
        case Element::U32:
        case Element::S32: {
            uint32_t v;
            __builtin_memcpy(&v, from, 4);
            __atomic_fetch_add(reinterpret_cast<uint32_t*>(to), v, __ATOMIC_RELAXED);
            break;
        }
        case Element::F16:
        case Element::BF16: {
            uint16_t v;
            __builtin_memcpy(&v, from, 2);
            atomic_update<uint16_t>(to, [&](uint16_t seen) {
                return e == Element::F16 ? to_f16(from_f16(seen) + from_f16(v)) : to_bf16(from_bf16(seen) + from_bf16(v));
            });
            break;
        }
        default: break;
    }
}

bool can_add(Element e) {
    return e == Element::F32 || e == Element::U32 || e == Element::S32 || e == Element::F16 || e == Element::BF16;
}

// 16 bytes of one row of a box, elements [0, n) of which lie in the tensor from `skip` on.
void move_chunk(const Copy& c, const MapFields& m, char* s, char* g, int first, int last, Clock& reads, Clock& writes) {
    int bytes = m.bytes;
    if (!c.store()) {
        {
            As as(reads);
            if (first < last) saw_read(g + first * bytes, size_t((last - first) * bytes));
        }
        As as(writes);
        saw_write(s, 16);
        char chunk[16] = {};
        if (last - first == 16 / bytes)
            __builtin_memcpy(chunk, g, 16);
        else
            for (int i = first * bytes; i < last * bytes; i++) chunk[i] = g[i];
        __builtin_memcpy(s, chunk, 16);
        return;
    }
    {
        As as(reads);
        saw_read(s, 16);
    }
    if (c.add) {
        for (int e = first; e < last; e++) add_element(m.element, g + e * bytes, s + e * bytes);
        return;
    }
    As as(writes);
    if (first < last) saw_write(g + first * bytes, size_t((last - first) * bytes));
    if (last - first == 16 / bytes)
        __builtin_memcpy(g, s, 16);
    else
        for (int i = first * bytes; i < last * bytes; i++) {
            volatile char* to = g + i;
            *to = s[i];
        }
}

void move_box(Worker& w, const Copy& c, Clock& reads, Clock& writes) {
    const MapFields& m = fields(c.map);
    int per_chunk = 16 / m.bytes;
    uint32_t row_bytes = m.box[0] * m.bytes, rows = 1;
    for (int d = 1; d < m.rank; d++) rows *= m.box[d];
    for (uint32_t r = 0; r < rows; r++) {
        bool inside = true;
        char* g = m.base;
        uint32_t rest = r;
        for (int d = 1; d < m.rank; d++) {
            int64_t x = int64_t(c.c[d]) + rest % m.box[d];
            rest /= m.box[d];
            inside = inside && x >= 0 && uint64_t(x) < m.dim[d];
            g += x * int64_t(m.stride[d - 1]);
        }
        int64_t low = -int64_t(c.c[0]), high = int64_t(m.dim[0]) - c.c[0];  // elements of the row inside the tensor
        if (low < 0) low = 0;
        if (high > int64_t(m.box[0])) high = m.box[0];
        if (!inside || high < low) high = low;
        for (uint32_t b = 0; b < row_bytes; b += 16) {
            int64_t e = b / m.bytes;
            int first = int(low > e ? (low - e < per_chunk ? low - e : per_chunk) : 0);
            int last = int(high - e < 0 ? 0 : high - e < per_chunk ? high - e : per_chunk);
            if (last < first) last = first;
            char* s = at_address(*c.block, swizzled(c.smem + r * row_bytes + b, m.swizzle));
            move_chunk(c, m, s, g + (c.c[0] + e) * int64_t(m.bytes), first, last, reads, writes);
        }
        if (config().count) {
            Quiet quiet;
            w.counters.count_row(c.at, c.add ? "tma-add" : c.store() ? "tma-store" : "tma-load",
                                 uint64_t(g + (c.c[0] + low) * int64_t(m.bytes)), uint32_t(high - low) * m.bytes);
        }
    }
}

void move_run(Worker& w, const Copy& c, Clock& reads, Clock& writes) {
    char* s = at_address(*c.block, c.smem);
    const char* from = c.store() ? s : c.memory;
    char* to = c.store() ? c.memory : s;
    {
        As as(reads);
        saw_read(from, c.bytes);
    }
    if (c.add) {
        for (uint32_t i = 0; i < c.bytes; i += 4) add_element(Element::F32, to + i, from + i);
    } else {
        As as(writes);
        saw_write(to, c.bytes);
        for (uint32_t i = 0; i < c.bytes; i += 4) __builtin_memcpy(to + i, from + i, 4);
    }
    if (config().count && c.kind != Copy::ToCluster) {
        Quiet quiet;
        w.counters.count_row(c.at, c.add ? "bulk-add" : c.store() ? "bulk-store" : "bulk-load",
                             reinterpret_cast<uint64_t>(c.memory), c.bytes);
    }
}

}  // namespace

void run_copy(Worker& w, Copy& c) {
    if (c.store()) {
        if (c.kind == Copy::TensorStore)
            move_box(w, c, c.owner->store_reads, c.owner->store_writes);
        else
            move_run(w, c, c.owner->store_reads, c.owner->store_writes);
        return;
    }
    if (c.block->alive == 0) fail(w, c, "the copy issued here lands in a block that has exited");
    if (!mbarrier_ready(*c.block, c.bar)) fail(w, c, "the barrier of the copy issued here is not initialised");
    MbarrierSync& m = c.block->mbarrier(c.bar);
    Sync& phase = m.phase[mbarrier_phase(*c.block, c.bar)];
    if (c.kind == Copy::CpArrive) {
        finish_cp_async(*c.owner, 0, c.group);
        for (Clock& clock : c.owner->copy_clock)
            if (clock.used()) release(clock, phase.generic);
        mbarrier_complete(*c.block, c.bar, 1, 0);
        return;
    }
    if (c.kind == Copy::TensorLoad) {
        move_box(w, c, m.sources, m.copies);
    } else if (c.kind == Copy::Word) {
        As as(m.copies);
        char* to = at_address(*c.block, c.smem);
        saw_write(to, 4);
        __builtin_memcpy(to, &c.from, 4);
    } else {
        if (c.kind == Copy::ToCluster) c.memory = at_address(*c.source, c.from);
        move_run(w, c, m.sources, m.copies);
    }
    release(m.copies, phase.generic), release(m.copies, phase.async), release(m.sources, phase.generic);
    mbarrier_complete(*c.block, c.bar, 0, c.bytes);
}

namespace {

void queue(const Copy& c) {
    {
        Quiet quiet;
        self()->worker->pending.push_back(c);
    }
    yield_point();
}

void queue_one(Copy& c, Block& to) {
    Fiber* f = self();
    c.block = &to;
    MbarrierSync& m = to.mbarrier(c.bar);
    release(f->seen, m.issue.generic), acquire(m.copies, m.issue.generic);
    release(f->proxy, m.issue.async), acquire(m.sources, m.issue.async);
    queue(c);
}

// Queues a load for each block of the mask, or for the one that `dst` names.
void queue_load(Copy& c, uint32_t dst, uint32_t bar, uint32_t blocks, At at) {
    Fiber* f = self();
    SharedAt to = resolve(dst, c.bytes, at), b = resolve(bar, 8, at);
    if (bar & 7) die(at, "mbarrier %#x is not aligned to 8 bytes", bar);
    if (to.block != b.block) die(at, "destination and barrier lie in different blocks");
    if (!mbarrier_ready(*b.block, b.address)) die(at, "mbarrier %#x is used before mbarrier.init", bar);
    addressable(to.p, c.bytes, "destination of the copy", at);
    c.smem = to.address, c.bar = b.address, c.owner = f, c.at = at;
    if (blocks >> f->cluster_size) die(at, "multicast to blocks %#x of a cluster of %u", blocks, f->cluster_size);
    if (!blocks) return queue_one(c, *to.block);
    for (unsigned rank = 0; rank < f->cluster_size; rank++)
        if (blocks >> rank & 1) queue_one(c, *f->worker->blocks[rank]);
}

void queue_store(Copy& c, uint32_t src, At at) {
    Fiber* f = self();
    SharedAt from = resolve(src, c.bytes, at);
    if (from.block != f->home) die(at, "a bulk store reads the block's own shared memory alone");
    addressable(from.p, c.bytes, "source of the store", at);
    c.smem = from.address, c.block = f->home, c.owner = f, c.group = f->bulk_group, c.at = at;
    f->bulk_open++, f->bulk_at = at;
    // The engine reads what the asynchronous proxy may see of this thread's past.
    release(f->proxy, f->store_sync.async);
    acquire(f->store_reads, f->store_sync.async), acquire(f->store_writes, f->store_sync.async);
    queue(c);
}

void check_box(const MapFields& m, uint32_t smem, int rank, At at) {
    if (m.magic != kMapMagic) die(at, "the argument is no tensor map");
    if (m.rank != rank) die(at, "%d coordinates for a tensor map of rank %d", rank, m.rank);
    if (smem & 127) die(at, "shared address %#x of a box is not aligned to 128 bytes", smem);
}

void check_run(uint32_t smem, const void* p, uint32_t bytes, At at) {
    if (!bytes || (smem | reinterpret_cast<uintptr_t>(p) | bytes) & 15)
        die(at, "bulk copy of %u bytes between %p and %#x: all must be multiples of 16", bytes, p, smem);
}

}  // namespace

void tma_load(uint32_t dst, const TensorMap* map, const int* c, int rank, uint32_t bar, uint32_t blocks, At at) {
    const MapFields& m = fields(map);
    check_box(m, dst & 0xffffff, rank, at);
    Copy copy{};
    copy.kind = Copy::TensorLoad, copy.bytes = box_bytes(m);
    __builtin_memcpy(copy.map, &m, sizeof m);
    for (int d = 0; d < rank; d++) copy.c[d] = c[d];
    queue_load(copy, dst, bar, blocks, at);
}

void tma_store(const TensorMap* map, const int* c, int rank, uint32_t src, bool add, At at) {
    const MapFields& m = fields(map);
    check_box(m, src, rank, at);
    if (add && !can_add(m.element)) die(at, "reduce-add of elements of this type");
    Copy copy{};
    copy.kind = Copy::TensorStore, copy.add = add, copy.bytes = box_bytes(m);
    __builtin_memcpy(copy.map, &m, sizeof m);
    for (int d = 0; d < rank; d++) copy.c[d] = c[d];
    queue_store(copy, src, at);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint32_t blocks, At at) {
    check_run(dst & 0xffffff, src, bytes, at);
    addressable(src, bytes, "source of the copy", at);
    Copy copy{};
    copy.kind = Copy::BulkLoad, copy.bytes = bytes, copy.memory = static_cast<char*>(const_cast<void*>(src));
    queue_load(copy, dst, bar, blocks, at);
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add_f32, At at) {
    check_run(src, dst, bytes, at);
    addressable(dst, bytes, "destination of the store", at);
    Copy copy{};
    copy.kind = Copy::BulkStore, copy.bytes = bytes, copy.add = add_f32, copy.memory = static_cast<char*>(dst);
    queue_store(copy, src, at);
}

void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, At at) {
    check_run((dst | src) & 0xffffff, nullptr, bytes, at);
    SharedAt from = resolve(src, bytes, at);
    Copy copy{};
    copy.kind = Copy::ToCluster, copy.bytes = bytes, copy.source = from.block, copy.from = from.address;
    queue_load(copy, dst, bar, 0, at);
}

void st_async(uint32_t dst, uint32_t v, uint32_t bar, At at) {
    if (dst & 3) die(at, "shared address %#x is not aligned to 4 bytes", dst);
    Copy copy{};
    copy.kind = Copy::Word, copy.bytes = 4, copy.from = v;
    queue_load(copy, dst, bar, 0, at);
}

void bulk_commit(At) {
    Fiber* f = self();
    f->bulk_group++, f->bulk_open = 0;
}

void bulk_wait(int pending, bool read_only, At) {
    Fiber* f = self();
    Worker& w = *f->worker;
    if (f->bulk_group <= unsigned(pending)) return;
    unsigned upto = f->bulk_group - unsigned(pending);
    for (size_t i = 0; i < w.pending.size();) {
        const Copy& c = w.pending[i];
        if (c.store() && c.owner == f && c.group < upto)
            w.run_pending(i);
        else
            i++;
    }
    if (upto > f->bulk_waited) f->bulk_waited = upto;
    release(f->store_reads, f->store_sync.generic);
    if (!read_only) release(f->store_writes, f->store_sync.generic);
    acquire(f->seen, f->store_sync.generic);
}

}  // namespace emu

extern "C" const char* emu_tensor_map(void* map, int element, unsigned rank, void* base, const uint64_t* dims,
                                      const uint64_t* strides, const uint32_t* box, int swizzle) {
    static const uint8_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
    static const uint8_t swizzles[] = {0, 32, 64, 128};
    if (element < 0 || element > 9) return "an element type that the emulator does not know";
    if (rank < 1 || rank > 5) return "a tensor has 1 to 5 dimensions";
    if (swizzle < 0 || swizzle > 3) return "the swizzle is none, 32, 64 or 128 bytes";
    if (reinterpret_cast<uintptr_t>(base) & 15) return "the tensor is not aligned to 16 bytes";
    emu::MapFields m{};
    m.base = static_cast<char*>(base), m.rank = uint8_t(rank), m.bytes = sizes[element];
    m.swizzle = swizzles[swizzle], m.element = emu::Element(element), m.magic = emu::kMapMagic;
    for (unsigned d = 0; d < rank; d++) {
        if (!dims[d] || dims[d] > uint64_t(1) << 32) return "a dimension has 1 to 2^32 elements";
        if (!box[d] || box[d] > 256) return "a box has 1 to 256 elements along each dimension";
        m.dim[d] = dims[d], m.box[d] = box[d];
        if (!d) continue;
        if (strides[d - 1] & 15 || strides[d - 1] >= uint64_t(1) << 40)
            return "a stride is a multiple of 16 below 2^40 bytes";
        m.stride[d - 1] = strides[d - 1];
    }
    uint32_t row = m.box[0] * m.bytes;
    if (row & 15) return "a row of a box is a multiple of 16 bytes";
    if (m.swizzle && row > m.swizzle) return "a row of a box is wider than its swizzle";
    memset(map, 0, 128);
    memcpy(map, &m, sizeof m);
    return nullptr;
}
