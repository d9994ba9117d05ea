// Requests of a warp turned into bank cycles and sectors.
#include "counters.h"

#include <algorithm>

namespace emu {

void Counters::add(const Counters& o) {
    blocks += o.blocks, switches += o.switches, mma += o.mma, wgmma += o.wgmma, multiply_adds += o.multiply_adds;
    for (auto& [key, count] : o.sites) sites[key].add(count);
}

namespace {
// Cycles of lanes [first, last): the largest number of different words that one bank must give.
uint64_t bank_cycles(const Gather& g, int first, int last) {
    std::vector<uint64_t> words;
    for (int l = first; l < last; l++)
        if (g.lanes >> l & 1)
            for (uint64_t w = g.address[l] / 4; w <= (g.address[l] + g.bytes - 1) / 4; w++) words.push_back(w);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t banks[32] = {}, most = 0;
    for (uint64_t w : words) most = std::max(most, ++banks[w % 32]);
    return most;
}
}  // namespace

void Counters::count(const Gather& g) {
    if (!g.lanes) return;
    SiteCount& s = site(g.at, g.shared ? (g.store ? "shared-store" : "shared-load") : g.store ? "store" : "load");
    s.requests++;
    s.bytes += uint64_t(__builtin_popcount(g.lanes)) * g.bytes;
    if (g.shared) {
        int at_once = g.bytes <= 4 ? 32 : g.bytes <= 8 ? 16 : 8;
        for (int l = 0; l < 32; l += at_once) {
            uint64_t cycles = bank_cycles(g, l, l + at_once);
            s.cycles += cycles;
            if (cycles) s.conflicts += cycles - 1;
        }
        return;
    }
    std::vector<uint64_t> sectors;
    for (int l = 0; l < 32; l++)
        if (g.lanes >> l & 1)
            for (uint64_t x = g.address[l] / 32; x <= (g.address[l] + g.bytes - 1) / 32; x++) sectors.push_back(x);
    std::sort(sectors.begin(), sectors.end());
    s.sectors += uint64_t(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
}

void Counters::count_phase(std::source_location at, const char* what, const uint32_t* addresses, int rows) {
    Gather g{at, 0, 16, true, false, {}};
    for (int i = 0; i < rows; i++) g.lanes |= 1u << i, g.address[i] = addresses[i];
    uint64_t cycles = bank_cycles(g, 0, rows);
    SiteCount& s = site(at, what);
    s.requests++, s.cycles += cycles, s.conflicts += cycles - 1, s.bytes += uint64_t(rows) * 16;
}

void Counters::count_row(std::source_location at, const char* what, uint64_t address, uint32_t bytes) {
    SiteCount& s = site(at, what);
    s.rows++;
    s.bytes += bytes;
    if (bytes) s.sectors += (address + bytes - 1) / 32 - address / 32 + 1;
}

}  // namespace emu
