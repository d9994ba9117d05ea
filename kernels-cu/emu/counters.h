// What a kernel's accesses cost, by kernel and line: bank conflicts, TMA rows, sectors, bytes through L2.
//
// A warp's accesses at one line are gathered until every lane came, then counted as one request. Shared memory has 32
// banks of 4 bytes; wide accesses go 8 (16 bytes) or 16 lanes (8 bytes) at a time. A sector is 32 bytes.
#pragma once
#include <cstdint>
#include <map>
#include <source_location>
#include <string>
#include <vector>

namespace emu {

struct Gather {
    std::source_location at;
    uint32_t lanes = 0, bytes = 0;
    bool shared = false, store = false;
    uint64_t address[32];
};

struct SiteCount {
    uint64_t requests = 0, cycles = 0, conflicts = 0, sectors = 0, rows = 0, bytes = 0;
    void add(const SiteCount& o) {
        requests += o.requests, cycles += o.cycles, conflicts += o.conflicts;
        sectors += o.sectors, rows += o.rows, bytes += o.bytes;
    }
};

struct Counters {
    uint64_t blocks = 0, switches = 0, mma = 0, wgmma = 0, multiply_adds = 0;
    // file, line, what
    std::map<std::pair<std::pair<const char*, unsigned>, const char*>, SiteCount> sites;
    SiteCount& site(std::source_location at, const char* what) {
        return sites[{{at.file_name(), at.line()}, what}];
    }
    void add(const Counters&);
    void count(const Gather&);
    // Rows of 16 bytes at these addresses, read or written together, as ldmatrix does 8 at a time.
    void count_phase(std::source_location at, const char* what, const uint32_t* addresses, int rows);
    // A row of a TMA box in global memory.
    void count_row(std::source_location at, const char* what, uint64_t address, uint32_t bytes);
};

// Of every launch since the last call, as lines `kernel file:line what name=value ...`; empty unless counting is on.
std::string take_counters();

}  // namespace emu
