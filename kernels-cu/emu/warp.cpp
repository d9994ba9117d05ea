// Collectives of a warp: shuffles, votes, reductions, election, __syncwarp.
#include "runtime.h"

namespace emu {

namespace {
// Calls `f(lane)` for every lane of the mask.
template <class F> void each_lane(uint32_t mask, F&& f) {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}
}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width, At at) {
    static const char* const names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
    const char* name = names[int(kind)];
    if (width < 1 || width > 32 || (width & (width - 1))) die(at, "%s: width %d is no power of two up to 32", name, width);
    struct Operand {
        uint64_t value;
        int operand, width;
        uint64_t result;
    } mine{value, operand, width, 0};
    meet(name, mask, &mine, at, [&](void** all, uint32_t lanes) {
        each_lane(lanes, [&](int l) {
            Operand& x = *static_cast<Operand*>(all[l]);
            int first = l & ~(x.width - 1), last = first + x.width - 1, from = l;
            switch (kind) {
                case Shuffle::Index: from = first | (x.operand & (x.width - 1)); break;
                case Shuffle::Up: from = l - x.operand < first ? l : l - x.operand; break;
                case Shuffle::Down: from = l + x.operand > last ? l : l + x.operand; break;
                case Shuffle::Xor: from = (l ^ x.operand) > last ? l : l ^ x.operand; break;
            }
            if (from < 0 || from > 31 || !(lanes >> from & 1))
                die(at, "%s: lane %d reads lane %d, which is not in mask %08x", name, l, from, lanes);
            x.result = static_cast<Operand*>(all[from])->value;
        });
    });
    return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, At at) {
    struct Operand {
        bool predicate;
        uint32_t result;
    } mine{predicate, 0};
    meet("vote", mask, &mine, at, [](void** all, uint32_t lanes) {
        uint32_t result = 0;
        each_lane(lanes, [&](int l) { result |= uint32_t(static_cast<Operand*>(all[l])->predicate) << l; });
        each_lane(lanes, [&](int l) { static_cast<Operand*>(all[l])->result = result; });
    });
    return mine.result;
}

uint32_t match_any(uint32_t mask, uint64_t value, At at) {
    struct Operand {
        uint64_t value;
        uint32_t result;
    } mine{value, 0};
    meet("match.any", mask, &mine, at, [](void** all, uint32_t lanes) {
        each_lane(lanes, [&](int l) {
            Operand& x = *static_cast<Operand*>(all[l]);
            each_lane(lanes, [&](int k) {
                if (static_cast<Operand*>(all[k])->value == x.value) x.result |= 1u << k;
            });
        });
    });
    return mine.result;
}

uint32_t reduce(Reduce kind, bool is_signed, uint32_t mask, uint32_t value, At at) {
    struct Operand {
        uint32_t value, result;
    } mine{value, 0};
    meet("redux", mask, &mine, at, [=](void** all, uint32_t lanes) {
        uint32_t r = static_cast<Operand*>(all[__builtin_ctz(lanes)])->value;
        each_lane(lanes & (lanes - 1), [&](int l) {
            uint32_t v = static_cast<Operand*>(all[l])->value;
            bool less = is_signed ? int32_t(v) < int32_t(r) : v < r;
            switch (kind) {
                case Reduce::Add: r += v; break;
                case Reduce::Min: r = less ? v : r; break;
                case Reduce::Max: r = less ? r : v; break;
                case Reduce::And: r &= v; break;
                case Reduce::Or: r |= v; break;
                case Reduce::Xor: r ^= v; break;
            }
        });
        each_lane(lanes, [&](int l) { static_cast<Operand*>(all[l])->result = r; });
    });
    return mine.result;
}

// Lanes that have not exited: the hardware may name fewer, so nothing may depend on it but the masks of collectives.
uint32_t active_mask() {
    const Warp& w = *self()->warp_state;
    return w.exist & ~w.exited;
}

bool elect(At at) {
    bool mine = false;
    meet("elect", ~0u, &mine, at, [](void** all, uint32_t lanes) {
        const Warp& w = *self()->warp_state;
        unsigned chosen = unsigned(__builtin_ctz(lanes));
        // Which lane is elected is the hardware's choice.
        if (config().seed) chosen = unsigned(config().seed * 7 + w.index) & 31;
        if (!(lanes >> chosen & 1)) chosen = unsigned(__builtin_ctz(lanes));
        *static_cast<bool*>(all[chosen]) = true;
    });
    return mine;
}

void syncwarp(uint32_t mask, At at) {
    Fiber* f = self();
    Warp& warp = *f->warp_state;
    release(f->seen, warp.sync.generic), release(f->proxy, warp.sync.async);
    meet("__syncwarp", mask, f, at, [&](void** all, uint32_t lanes) {
        each_lane(lanes, [&](int l) {
            Fiber& x = *static_cast<Fiber*>(all[l]);
            acquire(x.seen, warp.sync.generic), acquire(x.proxy, warp.sync.async);
        });
    });
}

}  // namespace emu
