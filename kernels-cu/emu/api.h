// What the wrappers of kernels-cu/common and the CUDA language surface ask of the runtime.
//
// `At` is the line of the kernel that called; every report names it. Addresses of 32 bits are those of shared memory:
// the block's own from 1024 upwards, those of another block of the cluster with its rank + 1 in the top byte.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "numbers.h"

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace ptx {
struct bf16;
struct f16;
struct e4m3;
struct TensorMap;
}  // namespace ptx

namespace emu {

using At = std::source_location;
using ptx::TensorMap;

template <class T> constexpr Type type_of = Type::E4M3;
template <> inline constexpr Type type_of<ptx::bf16> = Type::BF16;
template <> inline constexpr Type type_of<ptx::f16> = Type::F16;

// What a thread may ask about itself.
struct Thread {
    uint3 thread{}, block{};
    dim3 block_dim, grid_dim;
    unsigned lane = 0, warp = 0, cluster_rank = 0, cluster_size = 1;
};
extern thread_local constinit Thread* cur;

[[noreturn]] void die(At, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- memory ----
unsigned char* smem_dynamic(unsigned align);
void* smem_static(const void* key, size_t bytes, size_t align);
void forbid(void* p, size_t bytes);
uint32_t smem_u32(const void* p, At);
void* shared(uint32_t address, uint32_t bytes, bool store, At);
void global(const void* p, uint32_t bytes, bool store, At);
inline void poison(void* p, size_t bytes) {
    memset(p, 0xff, bytes);
    asm volatile("" ::"r"(p) : "memory");  // the compiler may not reason from "uninitialised"
}
// The accesses themselves stand here, in the kernel's translation unit, where the sanitizers see them.
template <class V> V ld_global(const void* p, At at) {
    global(p, sizeof(V), false, at);
    return *static_cast<const V*>(p);
}
template <class V> void st_global(void* p, V v, At at) {
    global(p, sizeof(V), true, at);
    *static_cast<V*>(p) = v;
}
template <class V> V ld_shared(uint32_t a, At at) { return *static_cast<V*>(shared(a, sizeof(V), false, at)); }
template <class V> void st_shared(uint32_t a, V v, At at) { *static_cast<V*>(shared(a, sizeof(V), true, at)) = v; }
void yield_point();
void spin(At);
inline uint32_t ld_acquire(const uint32_t* p, At at) {
    spin(at);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void st_release(uint32_t* p, uint32_t v, At) {
    yield_point();
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline void red_release_add(uint32_t* p, uint32_t v, At) {
    yield_point();
    __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}
template <class T> T atomic_float_add(T* p, T v) {
    T seen, next;
    __atomic_load(p, &seen, __ATOMIC_RELAXED);
    do next = seen + v;
    while (!__atomic_compare_exchange(p, &seen, &next, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return seen;
}
inline void red_add(float* p, float v, At) {
    yield_point();
    atomic_float_add(p, v);
}

// ---- warps ----
enum class Shuffle { Index, Up, Down, Xor };
uint64_t shuffle(Shuffle, uint32_t mask, uint64_t value, int operand, int width, At);
uint32_t ballot(uint32_t mask, bool predicate, At);
uint32_t match_any(uint32_t mask, uint64_t value, At);
enum class Reduce { Add, Min, Max, And, Or, Xor };
uint32_t reduce(Reduce, bool is_signed, uint32_t mask, uint32_t value, At);
uint32_t active_mask();
bool elect(At);
void syncwarp(uint32_t mask, At);
void ldmatrix(int tiles, bool transposed, uint32_t* r, uint32_t row, At);
void stmatrix(int tiles, bool transposed, const uint32_t* r, uint32_t row, At);
uint32_t movmatrix(uint32_t v, At);
void mma(Type, int k, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, At);
void mma_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, At);

// ---- blocks and clusters ----
void barrier(int id, int threads, bool wait, At);
int barrier_count(bool predicate, At);
void cluster_arrive(At);
void cluster_wait(At);
uint32_t mapa(uint32_t address, uint32_t rank, At);
void set_registers(int registers, bool increase, At);
void grid_wait(At);
void grid_launch_dependents(At);

// ---- asynchronous copies ----
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, At);
void cp_async_commit(At);
void cp_async_wait(int pending, At);
void cp_async_arrive(uint32_t bar, At);
void mbarrier_init(uint32_t bar, uint32_t count, At);
void mbarrier_inval(uint32_t bar, At);
void mbarrier_arrive(uint32_t bar, uint32_t arrivals, uint32_t bytes, At);
bool mbarrier_test(uint32_t bar, uint32_t parity, At);
void mbarrier_wait(uint32_t bar, uint32_t parity, At);
void fence_proxy(At);
void tma_load(uint32_t dst, const TensorMap*, const int* c, int rank, uint32_t bar, uint32_t blocks, At);
void tma_store(const TensorMap*, const int* c, int rank, uint32_t src, bool add, At);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint32_t blocks, At);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add_f32, At);
void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, At);
void st_async(uint32_t dst, uint32_t v, uint32_t bar, At);
void bulk_commit(At);
void bulk_wait(int pending, bool read_only, At);

// ---- wgmma ----
void wgmma_fence(At);
void wgmma_commit(At);
void wgmma_wait(int pending, At);
void wgmma(Type, int n, float* d, const uint32_t* a, uint64_t da, uint64_t db, int trans_a, int trans_b, int accumulate,
           At);

// ---- launches ----

// How a kernel is started. `dependents` holds the grid back until the next launch, which must be `dependent` and then
// starts before it (programmatic dependent launch). `resident` runs all blocks at once, for blocks that wait for each
// other.
struct Shape {
    dim3 grid, block, cluster{1, 1, 1};
    size_t smem = 0;
    bool dependent = false, dependents = false, resident = false;
};
using Invoke = void (*)(void (*kernel)(), void** args);
void launch(const char* name, void (*kernel)(), Invoke, const Shape&, void** args, const size_t* sizes, size_t count);
// Runs what a launch with `dependents` held back.
void synchronize();

template <class... P, size_t... I> void call(void (*kernel)(), void** args, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(P...)>(kernel)(*static_cast<std::remove_cv_t<P>*>(args[I])...);
}
template <class... P> void invoke(void (*kernel)(), void** args) {
    call<P...>(kernel, args, std::index_sequence_for<P...>{});
}
// A kernel in the table of KERNEL_EXPORT.
struct Registered {
    const char* name;
    void (*kernel)();
    Invoke invoke;
    size_t sizes[32], count;
    const Registered* next;
    template <class... P> Registered(const char* name, void (*kernel)(P...))
        : name(name), kernel(reinterpret_cast<void (*)()>(kernel)), invoke(emu::invoke<P...>), sizes{sizeof(P)...},
          count(sizeof...(P)), next(first) {
        first = this;
    }
    static const Registered* first;
};
// A launch from C++, typed: emu::run("name", kernel, shape, arguments...).
template <class... P, class... A> void run(const char* name, void (*kernel)(P...), const Shape& shape, A... a) {
    std::tuple<std::remove_cv_t<P>...> values(a...);
    std::apply(
        [&](auto&... v) {
            void* args[] = {&v..., nullptr};
            const size_t sizes[] = {sizeof(v)..., 0};
            launch(name, reinterpret_cast<void (*)()>(kernel), invoke<P...>, shape, args, sizes, sizeof...(P));
        },
        values);
}

}  // namespace emu
