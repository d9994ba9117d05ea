// wgmma: descriptors decoded, operands read from shared memory as the hardware would, results written late.
#include "runtime.h"

namespace emu {

namespace {
typedef float Float8 __attribute__((vector_size(32)));
constexpr int kRing = 256;  // ordinals of wgmma per warpgroup that are compared between its warps

struct Descriptor {
    uint32_t start, lead, stride, swizzle;
    explicit Descriptor(uint64_t d)
        : start(uint32_t(d & 0x3fff) << 4), lead(uint32_t(d >> 16 & 0x3fff) << 4),
          stride(uint32_t(d >> 32 & 0x3fff) << 4), swizzle(0) {
        static const uint32_t widths[] = {0, 128, 64, 32};
        swizzle = widths[d >> 62];
    }
    // Where 16 bytes lie: K-major, those of row `mn` and column `chunk` along K.
    uint32_t k_major(uint32_t mn, uint32_t chunk) const {
        uint32_t row = mn / 8 * stride;
        uint32_t a = swizzle ? row + mn % 8 * swizzle + chunk * 16 : row + mn % 8 * 16 + chunk * lead;
        return swizzled(start + a, swizzle);
    }
    // MN-major: those of row `k` and column `chunk` along M or N.
    uint32_t mn_major(uint32_t k, uint32_t chunk) const {
        uint32_t per_atom = swizzle / 16;
        uint32_t a = swizzle ? chunk % per_atom * 16 + chunk / per_atom * lead + k % 8 * swizzle + k / 8 * stride
                             : chunk * stride + k % 8 * 16 + k / 8 * lead;
        return swizzled(start + a, swizzle);
    }
};

void check_descriptor(uint64_t d, const char* which, At at) {
    if (d & 0x3f01c000c000c000ull & ~(uint64_t(7) << 49))
        die(at, "wgmma descriptor of %s: reserved bits are set in %#lx", which, static_cast<unsigned long>(d));
    if (d >> 49 & 7) die(at, "wgmma descriptor of %s: a base offset is not emulated", which);
    Descriptor x(d);
    // The pattern repeats every 8 rows; a tile that starts inside it would need the base offset.
    uint32_t rows = x.swizzle == 128 ? 0x380 : x.swizzle == 64 ? 0x180 : x.swizzle == 32 ? 0x80 : 0;
    if (x.start & rows) die(at, "wgmma descriptor of %s: address %#x lies inside a swizzle atom", which, x.start);
}

struct Operands {
    alignas(64) float a[16][32], b[32][256], c[16][256];
};

// The 16 bytes at a shared address as floats.
void fetch(Block& block, Type type, uint32_t address, const WgmmaOp& op, float* out) {
    if (address < kWindow + block.shift || address - kWindow + 16 > block.used) {
        block.worker->fail(place(op.at) + ": wgmma reads shared address " + std::to_string(address) +
                           ", outside the block's " + std::to_string(block.used - block.shift) + " bytes [" +
                           identity(*self()) + "]");
    }
    const char* p = at_address(block, address);
    addressable(p, 16, "wgmma operand", op.at);
    saw_read(p, 16);
    if (type == Type::E4M3) {
        uint8_t v[16];
        __builtin_memcpy(v, p, 16);
        for (int e = 0; e < 16; e++) out[e] = from_e4m3(v[e]);
    } else {
        uint16_t v[8];
        __builtin_memcpy(v, p, 16);
        for (int e = 0; e < 8; e++) out[e] = from_16(type, v[e]);
    }
}

void read_shared(Warp& warp, const WgmmaOp& op, Operands& x) {
    Block& block = *warp.block;
    uint32_t per_chunk = op.type == Type::E4M3 ? 16 : 8, k_size = 2 * per_chunk;
    float chunk[16];
    if (!op.a_in_registers) {
        Descriptor a(op.da);
        uint32_t m0 = warp.index % 4 * 16;
        if (!op.trans_a) {
            for (uint32_t r = 0; r < 16; r++)
                for (uint32_t c = 0; c < 2; c++) fetch(block, op.type, a.k_major(m0 + r, c), op, &x.a[r][c * per_chunk]);
        } else {
            for (uint32_t k = 0; k < k_size; k++)
                for (uint32_t c = 0; c < 2; c++) {
                    fetch(block, op.type, a.mn_major(k, m0 / 8 + c), op, chunk);
                    for (uint32_t e = 0; e < 8; e++) x.a[c * 8 + e][k] = chunk[e];
                }
        }
    }
    Descriptor b(op.db);
    if (!op.trans_b) {
        for (uint32_t j = 0; j < uint32_t(op.n); j++)
            for (uint32_t c = 0; c < 2; c++) {
                fetch(block, op.type, b.k_major(j, c), op, chunk);
                for (uint32_t e = 0; e < per_chunk; e++) x.b[c * per_chunk + e][j] = chunk[e];
            }
    } else {
        for (uint32_t k = 0; k < k_size; k++)
            for (uint32_t c = 0; c < uint32_t(op.n) / 8; c++) fetch(block, op.type, b.mn_major(k, c), op, &x.b[k][c * 8]);
    }
}

void expand(Type type, uint32_t v, float* out) {
    if (type == Type::E4M3)
        for (int e = 0; e < 4; e++) out[e] = from_e4m3(uint8_t(v >> 8 * e));
    else
        out[0] = from_16(type, uint16_t(v)), out[1] = from_16(type, uint16_t(v >> 16));
}

void carry_out(Warp& warp, const WgmmaOp& op) {
    Operands x;
    int per_register = op.type == Type::E4M3 ? 4 : 2, k_size = 8 * per_register;
    {
        As as(warp.wgmma_memory);
        read_shared(warp, op, x);
    }
    As as(warp.wgmma_registers);
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        if (op.a_in_registers)
            for (int h = 0; h < 2; h++) {
                int column = h * 4 * per_register + t * per_register;
                expand(op.type, op.a[l][2 * h], &x.a[g][column]);
                expand(op.type, op.a[l][2 * h + 1], &x.a[g + 8][column]);
            }
        float* d = op.d[l];
        saw_write(d, size_t(op.n) * 2);
        for (int j = 0; j < op.n / 8; j++)
            for (int e = 0; e < 4; e++)
                x.c[g + e / 2 * 8][j * 8 + 2 * t + e % 2] = op.accumulate ? d[j * 4 + e] : 0.0f;
    }
    for (int i = 0; i < 16; i++) {
        Float8* c = reinterpret_cast<Float8*>(x.c[i]);
        for (int k = 0; k < k_size; k++) {
            float a = x.a[i][k];
            const Float8* b = reinterpret_cast<const Float8*>(x.b[k]);
            for (int j = 0; j < op.n / 8; j++) c[j] += a * b[j];
        }
    }
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int j = 0; j < op.n / 8; j++)
            for (int e = 0; e < 4; e++) op.d[l][j * 4 + e] = x.c[g + e / 2 * 8][j * 8 + 2 * t + e % 2];
    }
    Counters& count = warp.block->worker->counters;
    count.wgmma++, count.multiply_adds += uint64_t(op.n) * 16 * uint64_t(k_size);
}

// The four warps of a warpgroup issue the same wgmma in the same order.
void compare_with_warpgroup(Warp& warp, uint64_t db, int n, At at) {
    unsigned ordinal = warp.wgmma_count++;
    Block::Issued& x = warp.block->issued[warp.index / 4 * kRing + ordinal % kRing];
    if (x.ordinal != ordinal) {
        x = {ordinal, db, n};
    } else if (x.db != db || x.n != n) {
        die(at, "wgmma number %u of this warp differs from that of its warpgroup", ordinal);
    }
}
}  // namespace

void wgmma(Type type, int n, float* d, const uint32_t* a, uint64_t da, uint64_t db, int trans_a, int trans_b,
           int accumulate, At at) {
    struct Mine {
        float* d;
        const uint32_t* a;
        uint64_t da, db;
        int accumulate;
    } mine{d, a, da, db, accumulate};
    Fiber* f = self();
    Warp& warp = *f->warp_state;
    release(f->proxy, warp.wgmma_sync.async), release(f->seen, warp.wgmma_sync.generic);
    meet("wgmma", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "wgmma by a warp of %d lanes", __builtin_popcount(lanes));
        if (warp.index / 4 * 4 + 4 > warp.block->warps.size()) die(at, "wgmma by part of a warpgroup");
        if (!warp.wgmma_fenced)
            die(at, "wgmma without wgmma.fence since the kernel began or the last wait ended all of them");
        if (!a) check_descriptor(da, "A", at);
        check_descriptor(db, "B", at);
        WgmmaOp op{};
        op.type = type, op.n = n, op.a_in_registers = a != nullptr, op.da = da, op.db = db;
        op.trans_a = trans_a, op.trans_b = trans_b, op.accumulate = accumulate, op.group = warp.wgmma_group, op.at = at;
        for (int l = 0; l < 32; l++) {
            Mine& y = *static_cast<Mine*>(all[l]);
            if (y.da != da || y.db != db || !y.accumulate != !accumulate)
                die(at, "wgmma: descriptors or scale differ between lanes");
            op.d[l] = y.d;
            if (a)
                for (int i = 0; i < 4; i++) op.a[l][i] = y.a[i];
        }
        compare_with_warpgroup(warp, db, n, at);
        acquire(warp.wgmma_memory, warp.wgmma_sync.async), acquire(warp.wgmma_registers, warp.wgmma_sync.generic);
        if (!f->worker->late_wgmma) carry_out(warp, op), op.n = 0;
        Quiet quiet;
        warp.wgmma.push_back(op);
    });
}

void wgmma_fence(At at) {
    meet("wgmma.fence", ~0u, nullptr, at, [](void**, uint32_t) { self()->warp_state->wgmma_fenced = true; });
}

void wgmma_commit(At at) {
    meet("wgmma.commit_group", ~0u, nullptr, at, [](void**, uint32_t) { self()->warp_state->wgmma_group++; });
}

void wgmma_wait(int pending, At at) {
    meet("wgmma.wait_group", ~0u, self(), at, [pending](void** all, uint32_t lanes) {
        Warp& warp = *self()->warp_state;
        size_t k = 0;
        for (; k < warp.wgmma.size() && warp.wgmma[k].group + unsigned(pending) < warp.wgmma_group; k++)
            if (warp.wgmma[k].n) carry_out(warp, warp.wgmma[k]);
        {
            Quiet quiet;
            warp.wgmma.erase(warp.wgmma.begin(), warp.wgmma.begin() + long(k));
        }
        if (warp.wgmma.empty()) warp.wgmma_fenced = false;
        release(warp.wgmma_memory, warp.wgmma_done.generic), release(warp.wgmma_registers, warp.wgmma_done.generic);
        for (; lanes; lanes &= lanes - 1)
            acquire(static_cast<Fiber*>(all[__builtin_ctz(lanes)])->seen, warp.wgmma_done.generic);
    });
}

}  // namespace emu
