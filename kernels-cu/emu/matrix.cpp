// ldmatrix, stmatrix, movmatrix and mma.sync.
#include "runtime.h"

namespace emu {

namespace {
typedef float Float8 __attribute__((vector_size(32)));

// Half-row `j` (two elements) of row `i` of a tile is in lane 4i + j.
struct Rows {
    uint32_t* r;
    const uint32_t* source;
    uint32_t address;
    alignas(16) uint16_t row[8];
};

void check_row(Rows& mine, int tiles, const char* what, bool store, At at, char** p) {
    Fiber* f = self();
    *p = nullptr;
    if (int(f->lane) >= 8 * tiles) return;
    if (mine.address & 15) die(at, "%s: row address %#x is not aligned to 16 bytes", what, mine.address);
    *p = resolve(mine.address, 16, at).p;
    addressable(*p, 16, what, at);
    if (store)
        saw_write(*p, 16);
    else
        saw_read(*p, 16);
}

void count_phases(void** all, int tiles, const char* what, At at) {
    if (!config().count) return;
    Quiet quiet;
    for (int i = 0; i < tiles; i++) {
        uint32_t rows[8];
        for (int k = 0; k < 8; k++) rows[k] = static_cast<Rows*>(all[8 * i + k])->address;
        self()->worker->counters.count_phase(at, what, rows, 8);
    }
}
}  // namespace

void ldmatrix(int tiles, bool transposed, uint32_t* r, uint32_t row, At at) {
    Rows mine{r, nullptr, row, {}};
    char* p;
    check_row(mine, tiles, "ldmatrix", false, at, &p);
    if (p) __builtin_memcpy(mine.row, p, 16);
    meet(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "ldmatrix by a warp of %d lanes", __builtin_popcount(lanes));
        Rows** x = reinterpret_cast<Rows**>(all);
        for (int i = 0; i < tiles; i++)
            for (int l = 0; l < 32; l++) {
                int a = l / 4, b = l % 4 * 2;
                x[l]->r[i] = transposed ? x[8 * i + b]->row[a] | uint32_t(x[8 * i + b + 1]->row[a]) << 16
                                        : x[8 * i + a]->row[b] | uint32_t(x[8 * i + a]->row[b + 1]) << 16;
            }
        count_phases(all, tiles, "ldmatrix", at);
    });
}

void stmatrix(int tiles, bool transposed, const uint32_t* r, uint32_t row, At at) {
    Rows mine{nullptr, r, row, {}};
    meet(transposed ? "stmatrix.trans" : "stmatrix", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "stmatrix by a warp of %d lanes", __builtin_popcount(lanes));
        Rows** x = reinterpret_cast<Rows**>(all);
        for (int i = 0; i < tiles; i++)
            for (int l = 0; l < 32; l++) {
                int a = l / 4, b = l % 4 * 2;
                uint16_t lo = uint16_t(x[l]->source[i]), hi = uint16_t(x[l]->source[i] >> 16);
                if (transposed)
                    x[8 * i + b]->row[a] = lo, x[8 * i + b + 1]->row[a] = hi;
                else
                    x[8 * i + a]->row[b] = lo, x[8 * i + a]->row[b + 1] = hi;
            }
        count_phases(all, tiles, "stmatrix", at);
    });
    char* p;
    check_row(mine, tiles, "stmatrix", true, at, &p);
    if (p) __builtin_memcpy(p, mine.row, 16);
}

uint32_t movmatrix(uint32_t v, At at) {
    struct Operand {
        uint32_t v, result;
    } mine{v, 0};
    meet("movmatrix", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "movmatrix by a warp of %d lanes", __builtin_popcount(lanes));
        auto element = [&](int row, int column) {
            uint32_t pair = static_cast<Operand*>(all[row * 4 + column / 2])->v;
            return column & 1 ? pair >> 16 : pair & 0xffff;
        };
        for (int l = 0; l < 32; l++)
            static_cast<Operand*>(all[l])->result =
                element(l % 4 * 2, l / 4) | element(l % 4 * 2 + 1, l / 4) << 16;
    });
    return mine.result;
}

namespace {
struct MmaOperand {
    void* d;
    const uint32_t* a;
    uint32_t b[2];
};
// The narrow elements of a register, two or four.
inline void expand(Type type, uint32_t v, float* out, int stride) {
    if (type == Type::E4M3)
        for (int e = 0; e < 4; e++) out[e * stride] = from_e4m3(uint8_t(v >> 8 * e));
    else
        out[0] = from_16(type, uint16_t(v)), out[stride] = from_16(type, uint16_t(v >> 16));
}
}  // namespace

void mma(Type type, int k, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, At at) {
    MmaOperand mine{d, a, {b0, b1}};
    meet("mma.sync", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "mma.sync by a warp of %d lanes", __builtin_popcount(lanes));
        int per_register = type == Type::E4M3 ? 4 : 2, halves = k / (4 * per_register);
        float am[16][32];
        Float8 bm[32], sum[16];
        float(*bf)[8] = reinterpret_cast<float(*)[8]>(bm);
        float(*cf)[8] = reinterpret_cast<float(*)[8]>(sum);
        for (int l = 0; l < 32; l++) {
            const MmaOperand& x = *static_cast<MmaOperand*>(all[l]);
            int g = l / 4, t = l % 4;
            const float* c = static_cast<float*>(x.d);
            for (int h = 0; h < halves; h++) {
                int column = h * 4 * per_register + t * per_register;
                expand(type, x.a[2 * h], &am[g][column], 1);
                expand(type, x.a[2 * h + 1], &am[g + 8][column], 1);
                expand(type, x.b[h], &bf[column][g], 8);
            }
            cf[g][2 * t] = c[0], cf[g][2 * t + 1] = c[1], cf[g + 8][2 * t] = c[2], cf[g + 8][2 * t + 1] = c[3];
        }
        for (int i = 0; i < 16; i++) {
            Float8 s = sum[i];
            for (int j = 0; j < k; j++) s += am[i][j] * bm[j];
            sum[i] = s;
        }
        for (int l = 0; l < 32; l++) {
            float* o = static_cast<float*>(static_cast<MmaOperand*>(all[l])->d);
            int g = l / 4, t = l % 4;
            o[0] = cf[g][2 * t], o[1] = cf[g][2 * t + 1], o[2] = cf[g + 8][2 * t], o[3] = cf[g + 8][2 * t + 1];
        }
        Counters& count = self()->worker->counters;
        count.mma++, count.multiply_adds += uint64_t(128 * k);
    });
}

void mma_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, At at) {
    MmaOperand mine{d, a, {b0, b1}};
    meet("mma.sync.s8", ~0u, &mine, at, [&](void** all, uint32_t lanes) {
        if (lanes != ~0u) die(at, "mma.sync by a warp of %d lanes", __builtin_popcount(lanes));
        int8_t am[16][32], bm[8][32];
        for (int l = 0; l < 32; l++) {
            const MmaOperand& x = *static_cast<MmaOperand*>(all[l]);
            int g = l / 4, t = l % 4;
            for (int h = 0; h < 2; h++)
                for (int e = 0; e < 4; e++) {
                    int column = 16 * h + 4 * t + e;
                    am[g][column] = int8_t(x.a[2 * h] >> 8 * e);
                    am[g + 8][column] = int8_t(x.a[2 * h + 1] >> 8 * e);
                    bm[g][column] = int8_t(x.b[h] >> 8 * e);
                }
        }
        for (int l = 0; l < 32; l++) {
            int32_t* o = static_cast<int32_t*>(static_cast<MmaOperand*>(all[l])->d);
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 4; i++) {
                int row = g + i / 2 * 8, column = 2 * t + i % 2;
                for (int j = 0; j < 32; j++) o[i] += am[row][j] * bm[column][j];
            }
        }
        Counters& count = self()->worker->counters;
        count.mma++, count.multiply_adds += 128 * 32;
    });
}

}  // namespace emu
