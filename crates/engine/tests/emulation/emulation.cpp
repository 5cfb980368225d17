// The scheduler of the emulation, and the table of kernels behind its one function, `launch`.
#include "emulation.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call preserves on the stack of `from`, and goes on where `to` was left.
extern "C" void emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
static void* fresh_stack(char* end, void (*entry)()) {
    // As after a call: the return address below an aligned address, then six registers.
    void** top = (void**)end - 2;
    *top = (void*)entry;
    return top - 6;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, %function
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulation_switch, .-emulation_switch
)");
static void* fresh_stack(char* end, void (*entry)()) {
    void** top = (void**)(end - 160);
    top[11] = (void*)entry;
    return top;
}
#else
#error "the emulation switches stacks on x86-64 and aarch64 only"
#endif

#ifdef PLANT_FAULTS
#include "faults.h"
#endif

// The linker sets these around the static shared memory of all kernels.
extern "C" char __start_block_shared[], __stop_block_shared[];

namespace emulation {

Thread* current;
dim3 block_index, block_size, grid_size;
void* dynamic_shared;

namespace {

u32 dynamic_bytes;

constexpr size_t STACK = 128 << 10;

struct Copy {
    void* to;
    const void* from;
    bool zeros;
};

struct Fiber : Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    u32 number = 0;
    bool done = false;
    std::vector<std::vector<Copy>> groups;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
};

struct Warp {
    void* operands[32];
    Collective f;
    u32 arrived;
};

// One launch at a time.
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<u32> ready;
std::vector<u32> at_barrier;
u32 threads;
void* scheduler;
std::function<void()> body;
std::string failure;
u64 random_state;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif

u32 random_below(u32 n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (u32)((random_state >> 32) * n >> 32);
}

// The stacks of all threads that a block can have.
char* stacks() {
    static std::unique_ptr<char[]> all(new char[1024 * STACK]);
    return all.get();
}

Fiber& self() { return *(Fiber*)current; }

// Back to the scheduler.
void leave(bool for_good) {
    Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_bottom, scheduler_size);
#endif
    (void)for_good;
    emulation_switch(&fiber.stack_pointer, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void enter(Fiber& fiber) {
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, STACK);
#endif
    emulation_switch(&scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    body();
    self().done = true;
    leave(true);
}

void fail(std::string message) {
    if (failure.empty()) failure = std::move(message);
    // The scheduler sees the failure and never comes back here.
    for (;;) leave(false);
}

void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = stacks() + (&fiber - fibers.data()) * STACK;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, STACK);
    fiber.fake_stack = nullptr;
#endif
    char* end = fiber.stack + STACK;
    fiber.stack_pointer = fresh_stack((char*)((uintptr_t)end & ~(uintptr_t)15), fiber_entry);
    fiber.done = false;
    fiber.groups.assign(1, {});
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address")))
#endif
void poison(char* from, char* to) {
    for (volatile char* at = from; at < to; at++) *at = (char)0xff;
}

dim3 index_of(u32 i) {
    return {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
}

void run_block(u32 seed) {
    warps.assign(threads / 32, Warp{});
    ready.clear();
    at_barrier.clear();
    for (u32 i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.number = i;
        fiber.index = index_of(i);
        fiber.lane = i % 32;
        start(fiber);
        // Popped from the end: thread 0 first.
        ready.push_back(threads - 1 - i);
    }
    if (seed)
        for (u32 i = threads - 1; i > 0; i--) std::swap(ready[i], ready[random_below(i + 1)]);
    u32 left = threads;
    while (!ready.empty()) {
        // Odd seeds run anyone; others run on who was freed last, so that warps drift far apart.
        if (seed % 2) std::swap(ready.back(), ready[random_below((u32)ready.size())]);
        Fiber& fiber = fibers[ready.back()];
        ready.pop_back();
        enter(fiber);
        if (!failure.empty()) return;
        left -= fiber.done;
    }
    if (left) failure = std::to_string(left) + " of " + std::to_string(threads) + " threads wait for threads that ended";
}

// A kernel whose threads do not wait: all of them in one fiber.
void run_threads(const std::function<void()>& kernel, u32 seed) {
    body = [&] {
        for (u32 i = 0; i < threads; i++) {
            u32 thread = seed % 2 ? threads - 1 - i : i;
            current->index = index_of(thread);
            current->lane = thread % 32;
            kernel();
        }
    };
    start(fibers[0]);
    enter(fibers[0]);
}

bool block_kernel;

Races races;

// An access of the thread that runs. Stacks and fibers are the emulation's.
void touched(const void* at, u32 bytes, bool writes) {
    if (!CHECKS_RACES || !current || (size_t)((const char*)at - stacks()) < 1024 * STACK) return;
    if ((size_t)((const char*)at - (const char*)fibers.data()) < fibers.size() * sizeof(Fiber)) return;
    u32 block = (block_index.z * grid_size.y + block_index.y) * grid_size.x + block_index.x;
    u32 thread = (current->index.z * block_size.y + current->index.y) * block_size.x + current->index.x;
    // Shared memory is another one in each block. Addresses have fewer than 48 bits.
    bool shared = (at >= __start_block_shared && at < __stop_block_shared) ||
                  (at >= dynamic_shared && at < (char*)dynamic_shared + dynamic_bytes);
    uint64_t place = (uintptr_t)at + (shared ? (block + 1ull) << 48 : 0);
    if (!races.access(place, bytes, writes, block, thread)) return;
    fail(races.description());
}

}  // namespace

void block_barrier() {
    if (!block_kernel) fail("a KERNEL that waits for other threads; declare it a BLOCK_KERNEL");
    at_barrier.push_back(self().number);
    if (at_barrier.size() == threads) {
        ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
        at_barrier.clear();
        races.block_epoch++;
    }
    leave(false);
}

void meet(Collective f, void* operand) {
    if (!block_kernel) fail("a KERNEL that waits for other threads; declare it a BLOCK_KERNEL");
    Fiber& fiber = self();
    Warp& warp = warps[fiber.number / 32];
    warp.operands[fiber.lane] = operand;
    if (warp.arrived == 0) warp.f = f;
    else if (warp.f != f) fail("lanes of a warp meet in different operations");
    if (++warp.arrived < 32) return leave(false);
    f(warp.operands);
    warp.arrived = 0;
    for (u32 lane = 0; lane < 32; lane++)
        if (lane != fiber.lane) ready.push_back(fiber.number / 32 * 32 + lane);
}

void warp_barrier() {
    meet([](void**) { races.warp_epochs[self().number / 32]++; }, nullptr);
}

void reads(const void* at, u32 bytes) { touched(at, bytes, false); }

void begin_copy(void* to, const void* from, bool zeros) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("an asynchronous copy to or from an odd address");
    self().groups.back().push_back({to, from, zeros});
}

void end_group() { self().groups.emplace_back(); }

void wait_groups(u32 left) {
    auto& groups = self().groups;
    // The last group is still open.
    while (groups.size() > left + 1) {
        for (const Copy& copy : groups.front()) {
            touched(copy.to, 16, true);
            if (!copy.zeros) touched(copy.from, 16, false);
            if (copy.zeros) memset(copy.to, 0, 16);
            else memcpy(copy.to, copy.from, 16);
        }
        groups.erase(groups.begin());
    }
}

namespace {

typedef std::function<void()> (*Bind)(void** arguments);

struct Entry {
    Bind bind;
    bool waits;
};

template <class... A, size_t... I>
std::function<void()> bind_values(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    std::tuple<A...> values(*(A*)arguments[I]...);
    return [=] { kernel(std::get<I>(values)...); };
}

template <auto K, class... A> std::function<void()> bind_all(void (*kernel)(A...), void** arguments) {
    return bind_values(kernel, arguments, std::index_sequence_for<A...>());
}

template <auto K> std::function<void()> bind_kernel(void** arguments) { return bind_all<K>(K, arguments); }

const std::unordered_map<std::string, Entry>& kernels() {
    static const std::unordered_map<std::string, Entry> all = {
#define ENTRY(name, waits) {#name, {bind_kernel<&::name>, waits}},
#include "registry.inc"
#ifdef PLANT_FAULTS
        ENTRY(fault_half_at_barrier, true) ENTRY(fault_lanes_apart, true) ENTRY(fault_ended_lanes, true)
        ENTRY(fault_undeclared_barrier, false) ENTRY(fault_unwritten, true)
        ENTRY(fault_shuffle_is_no_barrier, true) ENTRY(fault_two_blocks, false)
#endif
#undef ENTRY
    };
    return all;
}

std::mutex one_launch;
thread_local std::string last_error;

}  // namespace
}  // namespace emulation

// Runs a kernel to its end: 0, or 1 with a message in `launch_error`. `arguments` are the addresses of its arguments,
// as the driver's cuLaunchKernel takes them. Seed 0 runs threads and blocks in their order.
extern "C" __attribute__((visibility("default"))) int launch(const char* name, const u32 grid[3], const u32 block[3],
                                                             u32 shared_bytes, void** arguments, u32 seed) {
    using namespace emulation;
    std::lock_guard<std::mutex> guard(one_launch);
    auto found = kernels().find(name);
    if (found == kernels().end()) return last_error = std::string("no kernel ") + name, 1;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    u64 count = (u64)block[0] * block[1] * block[2], blocks = (u64)grid[0] * grid[1] * grid[2];
    if (count == 0 || count % 32 || count > 1024 || blocks == 0 || grid[1] > 65535 || grid[2] > 65535)
        return last_error = std::string(name) + ": blocks of " + std::to_string(count) + " threads, a grid of " +
                            std::to_string(blocks),
               1;
    if (shared_bytes > 99 << 10) return last_error = std::string(name) + ": too much shared memory", 1;
    threads = (u32)count;
    if (fibers.empty()) fibers.resize(1024);
    random_state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    block_kernel = found->second.waits;
    failure.clear();
    races.clear();
    auto kernel = found->second.bind(arguments);
    if (block_kernel) body = kernel;
    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; i++) order[i] = i;
    if (seed)
        for (u64 i = blocks - 1; i > 0; i--) std::swap(order[i], order[random_below((u32)i + 1)]);
    void* memory = nullptr;
    if (shared_bytes && posix_memalign(&memory, 128, shared_bytes)) return last_error = "out of memory", 1;
    dynamic_shared = memory;
    dynamic_bytes = shared_bytes;
    for (u64 i : order) {
        races.new_block();
        block_index = {(u32)(i % grid[0]), (u32)(i / grid[0] % grid[1]), (u32)(i / grid[0] / grid[1])};
        if (block_kernel) {
            poison(__start_block_shared, __stop_block_shared);
            if (memory) memset(memory, 0xff, shared_bytes);
            run_block(seed);
        } else {
            run_threads(kernel, seed);
        }
        if (!failure.empty()) break;
    }
    free(memory);
    current = nullptr;
    if (failure.empty()) return 0;
    last_error = std::string(name) + ": " + failure;
    return 1;
}

#if CHECKS_RACES
// What the compiler calls with -fsanitize=thread.
#define ACCESSES(bytes)                                                                                                \
    extern "C" void __tsan_read##bytes(void* at) { emulation::touched(at, bytes, false); }                             \
    extern "C" void __tsan_write##bytes(void* at) { emulation::touched(at, bytes, true); }                             \
    extern "C" void __tsan_unaligned_read##bytes(void* at) { emulation::touched(at, bytes, false); }                   \
    extern "C" void __tsan_unaligned_write##bytes(void* at) { emulation::touched(at, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { emulation::touched(at, (u32)bytes, false); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { emulation::touched(at, (u32)bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif

extern "C" __attribute__((visibility("default"))) const char* launch_error() {
    return emulation::last_error.c_str();
}
