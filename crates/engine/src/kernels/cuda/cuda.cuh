// What CUDA and the emulation on the CPU do in different ways. All else is the same source for both.
#pragma once

typedef float f32;
typedef double f64;
typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__

#define KERNEL extern "C" __global__ void
#define BLOCK_KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define SHARED __shared__
// A table of the device's.
#define TABLE static __device__ const
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// The shared memory whose size a launch gives.
#define DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type* name = (type*)dynamic_shared

DEVICE u32 bits_of(f32 x) { return __float_as_uint(x); }
DEVICE f32 of_bits(u32 x) { return __uint_as_float(x); }

// Rounds to nearest, ties to even.
DEVICE u16 to_bf16(f32 x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// `low` in the lower half.
DEVICE u32 pack_bf16(f32 low, f32 high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

DEVICE f32 from_f16(u16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

template <class T> DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T> DEVICE T shuffle_up(T x, u32 distance) { return __shfl_up_sync(~0u, x, distance); }
template <class T> DEVICE T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }

// d[16, 8] += a[16, 16] · b[16, 8] of a warp, in the fragments of the PTX manual.
DEVICE void mma(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices: lane 8 · m + r gives the address of row r of matrix m in shared memory.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

DEVICE void load_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// Begins to copy 16 bytes to shared memory, or zeros; `from` is valid either way.
DEVICE void copy_async(void* to, const void* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(zeros ? 0 : 16)
                 : "memory");
}

// Ends a group of copies.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last `LEFT`.
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#else
#include "emulation.h"
#endif

// The shape of an attention; see README.md.
struct AttentionShape {
    u32 queries, keys;
    u32 heads, kv_heads, head_dim;
    u32 window;
    f32 scale, softcap;
    u64 key, limit;
    u32 site;
    f32 kept;
    u32 reserved[2];
};
static_assert(sizeof(AttentionShape) == 64, "as Rust lays it out");

// Some outputs of an expert, and where their weights lie: rows `stride` apart, of f32 (kind 0), bf16 (1) or f16 (2).
struct GroupedPiece {
    u64 address;
    u32 start, end;
    u32 stride, kind;
};
static_assert(sizeof(GroupedPiece) == 24, "as Rust lays it out");

#define INFINITY_F32 (of_bits(0x7f800000u))

DEVICE f32 from_bf16(u16 x) { return of_bits((u32)x << 16); }
