// CUDA C on the CPU: what src/kernels/cuda/cuda.cuh needs when it is compiled by a C++ compiler.
//
// A thread of CUDA is a fiber, and blocks run one after the other. A fiber runs until it waits: for its block at
// __syncthreads, for its warp at a shuffle or a tensor-core operation. Who runs next follows from the seed of the
// launch, so each seed is another schedule. Shared memory holds NaNs before a block starts. Where threads wait for
// others that never come, or the lanes of a warp meet in different operations, the launch fails with a message. With
// -fsanitize=thread it also fails where two threads touch the same memory without a barrier between them, whatever the
// schedule; races.h says how.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float f32;
typedef double f64;
typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL extern "C" void
#define BLOCK_KERNEL extern "C" void
#define DEVICE static inline
#define DEVICE_METHOD inline
// One block runs at a time, so that a static is the block's. The section lets the emulation find them all.
#define SHARED static __attribute__((section("block_shared")))
#define TABLE static const
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulation::dynamic_shared
#define BOUNDS(threads, blocks)
// A function of the emulation, whose own memory is no kernel's.
#define UNCHECKED __attribute__((no_sanitize("thread")))
#define __restrict__

struct dim3 {
    u32 x = 1, y = 1, z = 1;
};

namespace emulation {

// What the code of the kernels sees of the thread that runs.
struct Thread {
    dim3 index;
    u32 lane;
};

extern Thread* current;
extern dim3 block_index, block_size, grid_size;
extern void* dynamic_shared;

// Waits for all threads of the block.
void block_barrier();
// Waits for all lanes of the warp, of which the last one calls `f` with the operands of all.
typedef void (*Collective)(void** operands);
void meet(Collective f, void* operand);
// Copies to shared memory that have begun, by this thread.
void begin_copy(void* to, const void* from, bool zeros);
void end_group();
void wait_groups(u32 left);
// Waits for the warp, and orders its memory.
void warp_barrier();
// The thread reads memory in a way that the compiler does not see.
void reads(const void* at, u32 bytes);

template <class T> struct Exchange {
    T value;
    u32 with;
    T result;
};

template <class T> T exchange(T value, u32 lane) {
    Exchange<T> mine = {value, lane, value};
    meet(
        [](void** operands) {
            for (int i = 0; i < 32; i++) {
                auto* e = (Exchange<T>*)operands[i];
                e->result = ((Exchange<T>*)operands[e->with])->value;
            }
        },
        &mine);
    return mine.result;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

DEVICE void __syncthreads() { emulation::block_barrier(); }
DEVICE void __syncwarp() { emulation::warp_barrier(); }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }

template <class T> DEVICE T shuffle_xor(T x, int mask) {
    return emulation::exchange(x, emulation::current->lane ^ (u32)mask);
}
template <class T> DEVICE T shuffle_up(T x, u32 distance) {
    u32 lane = emulation::current->lane;
    return emulation::exchange(x, lane >= distance ? lane - distance : lane);
}
template <class T> DEVICE T shuffle(T x, int lane) { return emulation::exchange(x, (u32)lane); }

struct Vote {
    bool mine;
    u32 all;
};

DEVICE u32 ballot(bool x) {
    Vote vote = {x, 0};
    emulation::meet(
        [](void** operands) {
            u32 all = 0;
            for (int i = 0; i < 32; i++) all |= (u32)((Vote*)operands[i])->mine << i;
            for (int i = 0; i < 32; i++) ((Vote*)operands[i])->all = all;
        },
        &vote);
    return vote.all;
}

DEVICE u32 bits_of(f32 x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}

DEVICE f32 of_bits(u32 x) {
    f32 y;
    memcpy(&y, &x, 4);
    return y;
}

DEVICE u16 to_bf16(f32 x) {
    u32 u = bits_of(x);
    if (x != x) return 0x7fff;
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

DEVICE u32 pack_bf16(f32 low, f32 high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }

// Half precision by hand: the compiler's own type does not exist everywhere.
DEVICE f32 from_f16(u16 x) {
    u32 sign = (u32)(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    f32 size = exponent == 31  ? (mantissa ? NAN : INFINITY)
               : exponent == 0 ? ldexpf((f32)mantissa, -24)
                               : ldexpf((f32)(mantissa | 1024), (int)exponent - 25);
    return of_bits(bits_of(size) | sign);
}

struct Product {
    f32* d;
    const u32* a;
    u32 b[2];
};

// The sum of a product is taken in f32 in the order of k. Real tensor cores keep other bits of the intermediate sums.
UNCHECKED DEVICE void multiply(void** operands) {
    static f32 a[16][16], b[16][8];
    auto half = [](u32 pair, int high) { return of_bits(high ? pair & 0xffff0000 : pair << 16); };
    for (int lane = 0; lane < 32; lane++) {
        auto* p = (Product*)operands[lane];
        int row = lane / 4, at = lane % 4 * 2;
        for (int h = 0; h < 2; h++) {
            a[row][at + h] = half(p->a[0], h);
            a[row + 8][at + h] = half(p->a[1], h);
            a[row][at + 8 + h] = half(p->a[2], h);
            a[row + 8][at + 8 + h] = half(p->a[3], h);
            b[at + h][row] = half(p->b[0], h);
            b[at + 8 + h][row] = half(p->b[1], h);
        }
    }
    for (int i = 0; i < 16; i++) {
        f32 c[8] = {};
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[j] += a[i][k] * b[k][j];
        for (int j = 0; j < 8; j++) ((Product*)operands[i % 8 * 4 + j / 2])->d[i / 8 * 2 + j % 2] += c[j];
    }
}

DEVICE void mma(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Product mine = {d, a, {b0, b1}};
    emulation::meet(multiply, &mine);
}

struct Matrices {
    u32* r;
    const u16* row;
};

template <bool TRANSPOSED> UNCHECKED DEVICE void distribute(void** operands) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++) {
            u32 pair = 0;
            for (int h = 0; h < 2; h++) {
                int row = TRANSPOSED ? lane % 4 * 2 + h : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + h;
                pair |= (u32)((Matrices*)operands[m * 8 + row])->row[column] << 16 * h;
            }
            ((Matrices*)operands[lane])->r[m] = pair;
        }
}

DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    Matrices mine = {r, (const u16*)row};
    emulation::reads(row, 16);
    emulation::meet(distribute<false>, &mine);
}

DEVICE void load_transposed(u32 (&r)[4], const void* row) {
    Matrices mine = {r, (const u16*)row};
    emulation::reads(row, 16);
    emulation::meet(distribute<true>, &mine);
}

DEVICE void copy_async(void* to, const void* from, bool zeros) { emulation::begin_copy(to, from, zeros); }
DEVICE void copies_end() { emulation::end_group(); }
template <int LEFT> DEVICE void copies_wait() { emulation::wait_groups(LEFT); }
