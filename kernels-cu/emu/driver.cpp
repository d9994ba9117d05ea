// Runs the launches of a case file and writes back every buffer: `driver CASE INPUT OUTPUT [LIBRARY]`.
//
// The case is text, one item a line; numbers are decimal:
//     buffer BYTES                      the next bytes of INPUT
//     launch KERNEL GX GY GZ BX BY BZ CX CY CZ SMEM FLAGS     flags: 1 dependent, 2 dependents, 4 resident
//     pointer BUFFER OFFSET             arguments of the last launch, in order
//     bytes HEX
//     map ELEMENT SWIZZLE BUFFER OFFSET RANK DIMS... STRIDES... BOX...
// OUTPUT receives the buffers one after the other. Each is an allocation of its own, of the exact size, so that the
// address checker sees a step outside; the other builds find damaged guard bytes. A failed launch ends with status 1
// and its report on stderr. With LIBRARY the kernels come from a shared object, otherwise they are linked in.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 256;
#endif
constexpr unsigned char kGuardByte = 0xa5;

extern "C" {
struct EmuShape {
    uint32_t grid[3], block[3], cluster[3], smem, dependent, dependents, resident;
};
int emu_launch(const char*, const EmuShape*, void**, char*, size_t) __attribute__((weak));
int emu_synchronize(char*, size_t) __attribute__((weak));
int emu_arguments(const char*, size_t*) __attribute__((weak));
void emu_counters(char*, size_t) __attribute__((weak));
const char* emu_tensor_map(void*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*, int)
    __attribute__((weak));
}

namespace {

struct Api {
    decltype(&emu_launch) launch = emu_launch;
    decltype(&emu_synchronize) synchronize = emu_synchronize;
    decltype(&emu_arguments) arguments = emu_arguments;
    decltype(&emu_counters) counters = emu_counters;
    decltype(&emu_tensor_map) tensor_map = emu_tensor_map;

    void load(const char* library) {
        void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        if (!handle) throw std::runtime_error(dlerror());
        auto find = [&](auto& f, const char* name) {
            f = reinterpret_cast<std::remove_reference_t<decltype(f)>>(dlsym(handle, name));
            if (!f) throw std::runtime_error(std::string(library) + " has no " + name);
        };
        find(launch, "emu_launch"), find(synchronize, "emu_synchronize"), find(arguments, "emu_arguments");
        find(counters, "emu_counters"), find(tensor_map, "emu_tensor_map");
    }
};

struct Buffer {
    size_t bytes;
    char* memory;

    Buffer(size_t n, std::istream& in) : bytes(n), memory(nullptr) {
        void* m = nullptr;
        if (posix_memalign(&m, 256, n + 2 * kGuard + (n == 0))) throw std::runtime_error("no memory for a buffer");
        memory = static_cast<char*>(m);
        memset(memory, kGuardByte, kGuard);
        memset(memory + kGuard + n, kGuardByte, kGuard);
        if (!in.read(data(), std::streamsize(n))) throw std::runtime_error("the input file is too short");
    }
    char* data() const { return memory + kGuard; }
    bool intact() const {
        for (size_t i = 0; i < kGuard; i++) {
            if (static_cast<unsigned char>(memory[i]) != kGuardByte) return false;
            if (static_cast<unsigned char>(memory[kGuard + bytes + i]) != kGuardByte) return false;
        }
        return true;
    }
};

struct alignas(64) Argument {
    unsigned char value[128];
};

struct Launch {
    std::string kernel;
    EmuShape shape{};
    std::vector<size_t> sizes;
    std::vector<Argument> arguments;
};

void run(const Api& api, Launch& l) {
    size_t sizes[32];
    int n = api.arguments(l.kernel.c_str(), sizes);
    if (n < 0) throw std::runtime_error("no kernel is called " + l.kernel);
    if (size_t(n) != l.arguments.size())
        throw std::runtime_error(l.kernel + " takes " + std::to_string(n) + " arguments, the case gives " +
                                 std::to_string(l.arguments.size()));
    std::vector<void*> pointers;
    for (int i = 0; i < n; i++) {
        if (sizes[i] != l.sizes[size_t(i)])
            throw std::runtime_error("argument " + std::to_string(i) + " of " + l.kernel + " has " +
                                     std::to_string(sizes[i]) + " bytes, the case gives " +
                                     std::to_string(l.sizes[size_t(i)]));
        pointers.push_back(l.arguments[size_t(i)].value);
    }
    static char error[65536];
    if (api.launch(l.kernel.c_str(), &l.shape, pointers.data(), error, sizeof error)) throw std::runtime_error(error);
}

template <class T> std::vector<T> numbers(std::istream& in, size_t n) {
    std::vector<T> v(n);
    for (T& x : v) in >> x;
    return v;
}

void work(Api& api, std::istream& text, std::istream& input, std::ostream& output) {
    std::vector<Buffer> buffers;
    std::vector<Launch> launches;
    std::string line, word;
    auto place = [&](std::istream& in) {
        size_t index, offset;
        in >> index >> offset;
        if (index >= buffers.size()) throw std::runtime_error("no such buffer: " + line);
        return buffers[index].data() + offset;
    };
    while (std::getline(text, line)) {
        std::istringstream in(line);
        in >> word;
        if (word == "buffer") {
            size_t n;
            in >> n;
            buffers.emplace_back(n, input);
            continue;
        }
        if (word == "launch") {
            if (!launches.empty()) run(api, launches.back());
            Launch l;
            in >> l.kernel;
            for (auto* three : {l.shape.grid, l.shape.block, l.shape.cluster})
                for (int i = 0; i < 3; i++) in >> three[i];
            unsigned flags;
            in >> l.shape.smem >> flags;
            l.shape.dependent = flags & 1, l.shape.dependents = flags >> 1 & 1, l.shape.resident = flags >> 2 & 1;
            launches.push_back(l);
        } else if (launches.empty()) {
            throw std::runtime_error("an argument before a launch: " + line);
        } else {
            Launch& l = launches.back();
            Argument a{};
            size_t size = 0;
            if (word == "pointer") {
                char* p = place(in);
                size = sizeof p;
                memcpy(a.value, &p, size);
            } else if (word == "bytes") {
                std::string hex;
                in >> hex;
                for (; 2 * size < hex.size() && size < sizeof a.value; size++)
                    a.value[size] = static_cast<unsigned char>(std::stoul(hex.substr(2 * size, 2), nullptr, 16));
            } else if (word == "map") {
                int element, swizzle;
                in >> element >> swizzle;
                char* p = place(in);
                unsigned rank;
                in >> rank;
                if (rank < 1 || rank > 5) throw std::runtime_error("rank: " + line);
                auto dims = numbers<uint64_t>(in, rank);
                auto strides = numbers<uint64_t>(in, rank - 1);
                auto box = numbers<uint32_t>(in, rank);
                size = 128;
                if (const char* e = api.tensor_map(a.value, element, rank, p, dims.data(), strides.data(), box.data(), swizzle))
                    throw std::runtime_error(std::string("tensor map: ") + e);
            } else {
                throw std::runtime_error("unknown item: " + line);
            }
            l.sizes.push_back(size);
            l.arguments.push_back(a);
        }
        if (!in) throw std::runtime_error("cannot be read: " + line);
    }
    if (!launches.empty()) run(api, launches.back());
    static char error[65536];
    if (api.synchronize(error, sizeof error)) throw std::runtime_error(error);
    for (size_t i = 0; i < buffers.size(); i++) {
        if (!buffers[i].intact())
            throw std::runtime_error("memory beside buffer " + std::to_string(i) + " was written");
        output.write(buffers[i].data(), std::streamsize(buffers[i].bytes));
    }
    if (getenv("EMU_COUNT")) {
        static char counters[1 << 20];
        api.counters(counters, sizeof counters);
        std::cout << counters;
    }
}

}  // namespace

int main(int count, char** args) {
    if (count < 4) {
        std::cerr << "usage: driver CASE INPUT OUTPUT [LIBRARY]\n";
        return 2;
    }
    try {
        Api api;
        if (count > 4) api.load(args[4]);
        std::ifstream text(args[1]), input(args[2], std::ios::binary);
        std::ofstream output(args[3], std::ios::binary);
        work(api, text, input, output);
        if (!output.flush()) throw std::runtime_error("the output file cannot be written");
    } catch (const std::exception& e) {
        std::cerr << "emulator: " << e.what() << "\n";
        return 1;
    }
    return 0;
}
