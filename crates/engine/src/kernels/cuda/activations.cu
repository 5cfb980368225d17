// The functions between the two matrices of the MLP (shapes.rs, Activation).
#include "common.cuh"

struct Gate {
    f32 value, slope;
};

struct Silu {
    DEVICE Gate of(f32 x) {
        f32 s = 1.0f / (1.0f + expf(-x));
        return {x * s, s + x * s * (1.0f - s)};
    }
};

struct GeluTanh {
    DEVICE Gate of(f32 x) {
        const f32 c = 0.7978845608028654f;
        f32 t = tanhf(c * (x + 0.044715f * x * x * x)), slope = c * (1.0f + 3.0f * 0.044715f * x * x);
        return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope};
    }
};

struct Gelu {
    DEVICE Gate of(f32 x) {
        // 1 + erf(y) as erfc(-y), which keeps the digits of small tails.
        f32 below = 0.5f * erfcf(-x * 0.7071067811865476f);
        return {x * below, below + x * expf(-0.5f * x * x) * 0.3989422804014327f};
    }
};

template <class G> DEVICE void gated(f32* a, const f32* up, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        const f32* row = up + r * 2 * width;
        Four x = load(row + j, left), y = load(row + width + j, left);
#pragma unroll
        for (int k = 0; k < 4; k++) x.v[k] = G::of(x.v[k]).value * y.v[k];
        store(a + r * width + j, left, x);
    });
}

template <class G> DEVICE void gated_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        const f32* row = up + r * 2 * width;
        Four x = load(row + j, left), y = load(row + width + j, left), d = load(da + r * width + j, left);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Gate gate = G::of(x.v[k]);
            x.v[k] = d.v[k] * y.v[k] * gate.slope;
            y.v[k] = d.v[k] * gate.value;
        }
        store(dup + r * 2 * width + j, left, x);
        store(dup + r * 2 * width + width + j, left, y);
    });
}

template <class G> DEVICE void plain(f32* a, const f32* up, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        Four x = load(up + r * width + j, left);
#pragma unroll
        for (int k = 0; k < 4; k++) x.v[k] = G::of(x.v[k]).value;
        store(a + r * width + j, left, x);
    });
}

template <class G> DEVICE void plain_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        Four x = load(up + r * width + j, left), d = load(da + r * width + j, left);
#pragma unroll
        for (int k = 0; k < 4; k++) x.v[k] = d.v[k] * G::of(x.v[k]).slope;
        store(dup + r * width + j, left, x);
    });
}

KERNEL swiglu(f32* a, const f32* up, u32 rows, u32 width) { gated<Silu>(a, up, rows, width); }
KERNEL geglu_tanh(f32* a, const f32* up, u32 rows, u32 width) { gated<GeluTanh>(a, up, rows, width); }
KERNEL gelu_tanh(f32* a, const f32* up, u32 rows, u32 width) { plain<GeluTanh>(a, up, rows, width); }
KERNEL gelu(f32* a, const f32* up, u32 rows, u32 width) { plain<Gelu>(a, up, rows, width); }

KERNEL swiglu_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    gated_backward<Silu>(dup, da, up, rows, width);
}

KERNEL geglu_tanh_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    gated_backward<GeluTanh>(dup, da, up, rows, width);
}

KERNEL gelu_tanh_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    plain_backward<GeluTanh>(dup, da, up, rows, width);
}

KERNEL gelu_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width) {
    plain_backward<Gelu>(dup, da, up, rows, width);
}
