// Runs a .cu file of this folder on the CPU, unchanged: g++ -x c++ -include shim.h FILE.cu makes a library whose
// shim_<kernel> takes what cuLaunchKernel takes. For tests; far too slow for anything else.
//
// One OS thread runs one block after another; each CUDA thread is a fiber with its own stack. __syncthreads, __syncwarp and
// shuffles keep their meaning, because a fiber that reaches one gives way until those it waits for are there.
// Stricter than a device where that finds faults:
//   - shared memory is a heap block of exactly the launch's size, filled with 0x7f (3.4e38 as a float) before each block;
//   - a barrier that some threads have left behind by returning is an error, not a barrier of the rest;
//   - so is a shuffle whose mask names a lane that has returned; a lane that is not in the mask reads 0x7f7f7f7f;
//   - where nothing can move any more, the launch stops and names the block.
// Fibers run in thread order, or in reverse with `reversed`: what differs between the two was a race.
// It does not see: threads that share a word with no barrier between (compute-sanitizer does), reordering by a memory model, speed, alignment (build with UBSan), PTX that hosts do not compile.
#ifndef DOCTOR_SHIM_H
#define DOCTOR_SHIM_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(SHIM_UCONTEXT)
#undef SHIM_UCONTEXT
#define SHIM_UCONTEXT 1
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
};
static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum { LANES = 32, STACK_BYTES = 1 << 17 };
enum State { READY, AT_BARRIER, AT_WARP, GONE };

struct Fiber {
    State state;
    dim3 index;
    unsigned mask;                  // of the warp operation it waits in
    uint64_t lane_value;            // what it offers to a shuffle
    char *stack;
#ifdef SHIM_UCONTEXT
    ucontext_t context;
#else
    void *stack_pointer;
#endif
};

struct Block {
    std::vector<Fiber> fibers;
    unsigned running;               // index of the fiber that runs
    char *shared;
    size_t shared_bytes;
    void (*body)(void *);
    void *arguments;
    char error[256];
#ifdef SHIM_UCONTEXT
    ucontext_t scheduler;
#else
    void *scheduler;
#endif
};
static thread_local Block *block;

#ifdef SHIM_UCONTEXT
inline void enter(Fiber &fiber) { swapcontext(&block->scheduler, &fiber.context); }
inline void give_way() { swapcontext(&block->fibers[block->running].context, &block->scheduler); }
#else
// Saves what a call must keep, changes stacks, restores.
extern "C" void shim_switch(void **save, void *load);
asm(".text\n.local shim_switch\n.type shim_switch,@function\nshim_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
inline void enter(Fiber &fiber) { shim_switch(&block->scheduler, fiber.stack_pointer); }
inline void give_way() { shim_switch(&block->fibers[block->running].stack_pointer, block->scheduler); }
#endif

inline void fiber_main()
{
    block->body(block->arguments);
    block->fibers[block->running].state = GONE;
    for (;;)
        give_way();
}

inline void prepare(Fiber &fiber)
{
#ifdef SHIM_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#else
    void **top = reinterpret_cast<void **>(fiber.stack + STACK_BYTES);
    *--top = nullptr;                                       // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void *>(&fiber_main);
    for (int saved = 0; saved < 6; saved++)
        *--top = nullptr;
    fiber.stack_pointer = top;
#endif
}

inline void fail(const char *what)
{
    if (!block->error[0])
        snprintf(block->error, sizeof block->error, "block (%u, %u): %s", blockIdx.x, blockIdx.y, what);
}

inline Fiber &self() { return block->fibers[block->running]; }

inline void wait_in(State state, unsigned mask = 0)
{
    self().mask = mask;
    self().state = state;
    give_way();
}

// Lets go whom nothing holds any more; false if that is nobody.
inline bool release()
{
    std::vector<Fiber> &fibers = block->fibers;
    bool moved = false;
    size_t waiting = 0, gone = 0;
    for (Fiber &fiber : fibers) {
        waiting += fiber.state == AT_BARRIER;
        gone += fiber.state == GONE;
    }
    if (waiting == fibers.size()) {
        for (Fiber &fiber : fibers)
            fiber.state = READY;
        return true;
    }
    if (waiting && waiting + gone == fibers.size())
        fail("some threads wait at __syncthreads and the others have returned");
    for (size_t first = 0; first < fibers.size(); first += LANES) {
        for (size_t lane = first; lane < first + LANES && lane < fibers.size(); lane++) {
            if (fibers[lane].state != AT_WARP)
                continue;
            const unsigned mask = fibers[lane].mask;
            bool all = true;
            for (unsigned other = 0; other < LANES; other++) {
                if (!(mask >> other & 1))
                    continue;
                if (first + other >= fibers.size() || fibers[first + other].state == GONE) {
                    fail("a shuffle or __syncwarp waits for a lane that has returned");
                    return false;
                }
                const Fiber &fiber = fibers[first + other];
                all = all && fiber.state == AT_WARP && fiber.mask == mask;
            }
            if (!all)
                continue;
            for (unsigned other = 0; other < LANES; other++)
                if (mask >> other & 1)
                    fibers[first + other].state = READY;
            moved = true;
        }
    }
    return moved;
}

inline void run_block(bool reversed)
{
    std::vector<Fiber> &fibers = block->fibers;
    memset(block->shared, 0x7f, block->shared_bytes);
    for (Fiber &fiber : fibers) {
        fiber.state = READY;
        prepare(fiber);
    }
    for (;;) {
        size_t gone = 0;
        bool ran = false;
        for (size_t turn = 0; turn < fibers.size(); turn++) {
            Fiber &fiber = fibers[reversed ? fibers.size() - 1 - turn : turn];
            if (fiber.state == READY) {
                block->running = (unsigned)(&fiber - fibers.data());
                threadIdx = fiber.index;
                enter(fiber);
                ran = true;
            }
            gone += fiber.state == GONE;
        }
        if (gone == fibers.size())
            return;
        const bool released = release();
        if (block->error[0])
            return;
        if (!ran && !released) {
            fail("no thread can move: they wait at different barriers");
            return;
        }
    }
}

struct Launch {
    unsigned grid[3], threads[3], shared_bytes;
    int reversed;
    char error[256];  // out: empty, or what went wrong and in which block
};

inline int launch(Launch &l, void (*body)(void *), void *arguments)
{
    Block here;
    here.error[0] = 0;
    here.body = body;
    here.arguments = arguments;
    here.shared_bytes = l.shared_bytes;
    here.shared = static_cast<char *>(malloc(l.shared_bytes ? l.shared_bytes : 1));
    here.fibers.resize((size_t)l.threads[0] * l.threads[1] * l.threads[2]);
    char *stacks = static_cast<char *>(malloc(here.fibers.size() * STACK_BYTES));
    for (size_t i = 0; i < here.fibers.size(); i++) {
        here.fibers[i].stack = stacks + i * STACK_BYTES;
        here.fibers[i].index = {(unsigned)(i % l.threads[0]), (unsigned)(i / l.threads[0] % l.threads[1]),
                                (unsigned)(i / l.threads[0] / l.threads[1])};
    }
    block = &here;
    blockDim = {l.threads[0], l.threads[1], l.threads[2]};
    gridDim = {l.grid[0], l.grid[1], l.grid[2]};
    for (unsigned z = 0; z < l.grid[2] && !here.error[0]; z++)
        for (unsigned y = 0; y < l.grid[1] && !here.error[0]; y++)
            for (unsigned x = 0; x < l.grid[0] && !here.error[0]; x++) {
                blockIdx = {x, y, z};
                run_block(l.reversed != 0);
            }
    block = nullptr;
    free(stacks);
    free(here.shared);
    memcpy(l.error, here.error, sizeof l.error);
    return l.error[0] ? 1 : 0;
}

template <class... A, size_t... I>
int call(Launch *l, void (*kernel)(A...), void **values, std::index_sequence<I...>)
{
    struct Call {
        void (*kernel)(A...);
        void **values;
        static void body(void *self)
        {
            Call &c = *static_cast<Call *>(self);
            c.kernel(*static_cast<A *>(c.values[I])...);
        }
    } all = {kernel, values};
    return launch(*l, &Call::body, &all);
}

template <class... A> int enter_kernel(Launch *l, void (*kernel)(A...), void **values)
{
    return call(l, kernel, values, std::index_sequence_for<A...>());
}

template <class T> T exchange(unsigned mask, T value, int source)
{
    const unsigned running = block->running, lane = running % LANES, first = running - lane;
    self().lane_value = 0;
    memcpy(&self().lane_value, &value, sizeof value);
    wait_in(AT_WARP, mask);
    T out;
    memset(&out, 0x7f, sizeof out);
    if (source >= 0 && source < LANES && (mask >> source & 1))
        memcpy(&out, &block->fibers[first + source].lane_value, sizeof out);
    wait_in(AT_WARP, mask);  // nobody offers anew before all have read
    return out;
}

}  // namespace shim

#define SHARED_MEMORY(T, name) T *name = reinterpret_cast<T *>(shim::block->shared)
#define HOST_ENTRY(kernel) \
    extern "C" int shim_##kernel(shim::Launch *l, void **values) { return shim::enter_kernel(l, kernel, values); }

inline void __syncthreads() { shim::wait_in(shim::AT_BARRIER); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::wait_in(shim::AT_WARP, mask); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits)
{
    return shim::exchange(mask, value, (int)(threadIdx.x % shim::LANES) ^ bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by)
{
    const int lane = (int)(threadIdx.x % shim::LANES), source = lane + by;
    return shim::exchange(mask, value, source < shim::LANES ? source : lane);
}

// Blocks of several launches may run on several OS threads.
template <class T, class Join> T shim_atomic(T *at, T value, Join join)
{
    T before, after;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    do
        after = join(before, value);
    while (!__atomic_compare_exchange(at, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
template <class T> T atomicAdd(T *at, T value) { return shim_atomic(at, value, [](T a, T b) { return a + b; }); }
template <class T> T atomicMin(T *at, T value) { return shim_atomic(at, value, [](T a, T b) { return b < a ? b : a; }); }
template <class T> T atomicMax(T *at, T value) { return shim_atomic(at, value, [](T a, T b) { return a < b ? b : a; }); }

inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

#endif
