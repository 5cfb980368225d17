// Every kernel: its signature, what it computes and how it is launched. The sources include this file, so a
// definition that differs does not compile; the emulation makes its table of kernels from it.
//
// KERNEL        threads are independent of each other
// BLOCK_KERNEL  threads of a block wait for each other (barriers, shuffles, tensor cores)
//
// Matrices are row-major f32. A stride is the distance between the starts of two rows, in elements. "or 0" marks
// pointers that may be null. Flags are 0 or 1. `n` counts elements. An empty operand needs no launch.
//
// Launches (grid, then block):
//   E  (min(ceil(n / 1024), 65536)), (256)                                any grid gives the same bytes
//   R  (min(ceil(width / 128), 256), min(ceil(rows / 8), 65535)), (32, 8)  any grid gives the same bytes
//   W  (min(ceil(rows / 8), 65536)), (32, 8): a warp per row              any grid gives the same bytes
//   C  (ceil(width / 32), chunks), (32, 8): chunk = max(64, ceil(rows / 128)), chunks = ceil(rows / chunk)
//   F  (ceil(width / 32)), (32, 8)
// The bytes of results depend on `chunk`, never on the card.
#pragma once
#include "cuda.cuh"

// ---- elementwise.cu
// x = value. E.
KERNEL fill(f32* x, u64 n, f32 value);
// x = factor · x. E.
KERNEL scale(f32* x, u64 n, f32 factor);
// y = x. R.
KERNEL copy_rows(f32* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width);
// y += share · (x − y). E.
KERNEL blend(f32* y, const f32* x, u64 n, f32 share);
// Exchanges x and y. E.
KERNEL swap(f32* x, f32* y, u64 n);
// y += x. E.
KERNEL add(f32* y, const f32* x, u64 n);
// y[i, :] += b. R.
KERNEL add_row(f32* y, u32 y_stride, const f32* b, u32 rows, u32 width);
// y = a / b. E.
KERNEL divide(f32* y, const f32* a, const f32* b, u64 n);
// y[i, j] (+)= factors[j] · x[i, j] + bias[j]; bias or 0. R.
KERNEL scale_columns(f32* y, u32 y_stride, const f32* x, u32 x_stride, const f32* factors, const f32* bias, u32 rows,
                     u32 width, u32 accumulate);
// x[i, :] = factors[i] · x[i, :]. R.
KERNEL scale_rows(f32* x, const f32* factors, u32 rows, u32 width);
// out[i] = Σ_j a[i, j] · b[i, j]. W.
BLOCK_KERNEL row_dots(f32* out, const f32* a, const f32* b, u32 rows, u32 width);

// ---- columns.cu
// partial[chunk, j] = Σ over the chunk's rows of x[i, j]. C; partial[chunks, width].
BLOCK_KERNEL column_sums(f32* partial, const f32* x, u32 x_stride, u32 rows, u32 width, u32 chunk);
// partial[chunk, j] = Σ over the chunk's rows of a[i, j] · b[i, j]. C.
BLOCK_KERNEL column_dots(f32* partial, const f32* a, u32 a_stride, const f32* b, u32 b_stride, u32 rows, u32 width,
                         u32 chunk);
// out[j] (+)= Σ_c partial[c, j] / divisors[j], in a fixed order; divisors or 0. F.
BLOCK_KERNEL sum_partials(f32* out, const f32* partial, u32 chunks, u32 width, const f32* divisors, u32 accumulate);
// n[i] = ‖w[i, :] + scale · b[i, :] · a‖, w[outputs, inputs] with distances row and column between its elements,
// b[outputs, rank], a[rank, inputs]. Grid ceil(outputs / 8), block 256, shared 8 · rank · 4 bytes.
BLOCK_KERNEL row_norms_f32(f32* n, const f32* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                           u32 inputs, u32 rank, f32 scale);
BLOCK_KERNEL row_norms_bf16(f32* n, const u16* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                            u32 inputs, u32 rank, f32 scale);
BLOCK_KERNEL row_norms_f16(f32* n, const u16* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                           u32 inputs, u32 rank, f32 scale);

// ---- rows.cu
// y[i, :] = x[rows[i], :], where elements of x are row and column apart. R over [count, width].
KERNEL gather_f32(f32* y, const f32* x, u32 row, u32 column, const u32* rows, u32 count, u32 width);
KERNEL gather_bf16(f32* y, const u16* x, u32 row, u32 column, const u32* rows, u32 count, u32 width);
KERNEL gather_f16(f32* y, const u16* x, u32 row, u32 column, const u32* rows, u32 count, u32 width);
// For scatter_add: next[i] is the next entry with the same row, or count; links[i] has bit 31 set where an entry
// before it has that row. Grid ceil(count / 256), block 256. links[count] is scratch.
BLOCK_KERNEL scatter_links(u32* links, const u32* rows, u32 count);
// y[rows[i], :] += x[i, :], in the order of i. Grid (min(ceil(width / 128), 256), min(count, 65535)), block 128.
KERNEL scatter_add(f32* y, const f32* x, const u32* rows, const u32* links, u32 count, u32 width);
// Rotates the front 2 · half columns of each head of head_dim. Grid min(rows, 65536), block 128.
KERNEL rotate(f32* x, u32 x_stride, u32 rows, u32 heads, u32 head_dim, const f32* table, u32 half,
              const u32* positions, u32 inverse);
// x = x · dropout: words below `limit` drop, others multiply by `kept` (random.rs). Block (32, 8), grid as R with
// ceil(width / 32) · 8 in place of width.
KERNEL dropout(f32* x, u32 rows, u32 width, u64 key, u32 site, u64 limit, f32 kept);
// x[i, :] += sizes[i] · u. As dropout.
KERNEL add_noise(f32* x, const f32* sizes, u32 rows, u32 width, u64 key, u32 site);

// ---- norms.cu
// Groups of `width` columns, `per_row` in a row. Let rows be the number of groups (rows of x · per_row).
// N: width <= 512: grid ceil(groups / 8), block (32, 8); else grid min(groups, 65536), block (256, 1).
// y = x · r · (offset + w), stats[group] = r = 1 / sqrt(mean(x²) + eps); with b (or 0) added. N.
BLOCK_KERNEL rms_norm(f32* y, u32 y_stride, f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                      u32 groups, u32 per_row, u32 width, f32 eps, f32 offset);
// y = (x − mean) · r · w + b, stats[group, 2] = mean, r. N.
BLOCK_KERNEL layer_norm(f32* y, u32 y_stride, f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                        u32 groups, u32 per_row, u32 width, f32 eps);
// The same y from stats: `layer` tells which norm. R over [groups, width].
KERNEL norm_again(f32* y, u32 y_stride, const f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                  u32 groups, u32 per_row, u32 width, f32 offset, u32 layer);
// dx += …; dw_partial[grid, width] and db_partial[grid, width] (each or 0) get sums that sum_partials adds up, with
// chunks = the grid. Grid and block: width <= 512: min(ceil(groups / 8), 256), (32, 8); else min(groups, 256), (256, 1).
// Shared: ((dw ? 1 : 0) + (db ? 1 : 0)) · block.y · width · 4 bytes.
BLOCK_KERNEL norm_backward(f32* dx, u32 dx_stride, f32* dw_partial, f32* db_partial, const f32* dy, u32 dy_stride,
                           const f32* stats, const f32* x, u32 x_stride, const f32* w, u32 groups, u32 per_row,
                           u32 width, f32 offset, u32 layer);

// ---- activations.cu. a[rows, width], up[rows, gate_width · width]. R.
KERNEL swiglu(f32* a, const f32* up, u32 rows, u32 width);
KERNEL geglu_tanh(f32* a, const f32* up, u32 rows, u32 width);
KERNEL gelu_tanh(f32* a, const f32* up, u32 rows, u32 width);
KERNEL gelu(f32* a, const f32* up, u32 rows, u32 width);
KERNEL swiglu_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width);
KERNEL geglu_tanh_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width);
KERNEL gelu_tanh_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width);
KERNEL gelu_backward(f32* dup, const f32* da, const f32* up, u32 rows, u32 width);

// ---- loss.cu
// losses[rows, 4] = nll, top1, entropy, uniform; with weights (or 0) logits become their gradient. softcap 0: none.
// Grid rows, block 512.
BLOCK_KERNEL cross_entropy(f32* losses, f32* logits, const u32* ids, const f32* weights, u32 rows, u32 vocab,
                           f32 softcap, f32 smoothing);

// ---- attention.cu. See README.md for the lists of tiles and the geometry.
// planes[part, row, head, padded] = the parts of x[row, head · head_dim + d] in bf16, zeros from head_dim on: x is
// their sum, to 8 bits with 1 part and to 24 with 3. Grid E with n = rows · heads · padded.
KERNEL attention_split(u16* planes, const f32* x, u32 rows, u32 heads, u32 head_dim, u32 padded, u32 parts);
// delta[query, head] = Σ_d do · o. W over queries · heads.
BLOCK_KERNEL attention_delta(f32* delta, const f32* o, const f32* d_o, u32 queries, u32 heads, u32 head_dim);
#define ATTENTION(suffix)                                                                                             \
    BLOCK_KERNEL attention_forward_##suffix(f32* o, f32* lse, const u16* q, const u16* kv, const u32* rows,           \
                                            const u32* tiles, AttentionShape shape);                                  \
    BLOCK_KERNEL attention_dq_##suffix(f32* dq, const u16* q, const u16* kv, const u16* d_o, const f32* lse,          \
                                       const f32* delta, const u32* rows, const u32* tiles, AttentionShape shape);    \
    BLOCK_KERNEL attention_dkv_##suffix(f32* dkv, const u16* q, const u16* kv, const u16* d_o, const f32* lse,        \
                                        const f32* delta, const u32* rows, const u32* key_tiles, const u32* entries,  \
                                        AttentionShape shape);
ATTENTION(bf16_32)
ATTENTION(bf16_64)
ATTENTION(bf16_128)
ATTENTION(bf16_256)
ATTENTION(f32_32)
ATTENTION(f32_64)
ATTENTION(f32_128)
ATTENTION(f32_256)

// ---- optimizers.cu
// partial[block] = Σ x² in f64. Grid min(ceil(n / 4096), 1024), block 256; then sum_f64 over the grid's partials.
BLOCK_KERNEL sum_squares(f64* partial, const f32* x, u64 n);
// out = Σ partial, in a fixed order. Grid 1, block 256.
BLOCK_KERNEL sum_f64(f64* out, const f64* partial, u32 count);
// One step; scalars are those of cpu/optimizer.rs `Scalars`. p16 (or 0) gets p in bf16. E.
KERNEL adamw(f32* p, u16* p16, const f32* g, f32* m, f32* v, u64 n, f32 keep, f32 lerp1, f32 beta2, f32 lerp2,
             f32 root2, f32 eps, f32 rate, f32 scale);
// Moments in blocks of 256 codes; signed_values and unsigned_values are quantised::values(true / false), 256 each.
// Grid min(ceil(n / 256), 65536), block 256.
BLOCK_KERNEL adamw_8bit(f32* p, u16* p16, const f32* g, u8* m_codes, f32* m_scales, u8* v_codes, f32* v_scales, u64 n,
                        const f32* signed_values, const f32* unsigned_values, f32 keep, f32 beta1, f32 lerp1,
                        f32 beta2, f32 lerp2, f32 root2, f32 eps, f32 rate, f32 scale);
// Adafactor for a matrix [height, width], in this order (scratch: sums[chunks, width], partial[256] f64, scalars[2] f64):
//   adafactor_rows, adafactor_columns (C), adafactor_blend, adafactor_mean, adafactor_squares,
//   sum_f64(scalars + 1, partial, grid), adafactor_apply.
// rows[i] = beta2 · rows[i] + (1 − beta2) · mean_j((scale · g)² + 1e-30). W.
BLOCK_KERNEL adafactor_rows(f32* rows, const f32* g, u32 height, u32 width, f32 beta2, f32 scale);
// sums[chunk, j] = Σ over the chunk's rows of (scale · g)² + 1e-30. C.
BLOCK_KERNEL adafactor_columns(f32* sums, const f32* g, u32 height, u32 width, u32 chunk, f32 scale);
// columns[j] = beta2 · columns[j] + (1 − beta2) · Σ_c sums[c, j] / height. F.
BLOCK_KERNEL adafactor_blend(f32* columns, const f32* sums, u32 chunks, u32 height, u32 width, f32 beta2);
// scalars[0] = mean of rows. Grid 1, block 256.
BLOCK_KERNEL adafactor_mean(f64* scalars, const f32* rows, u32 height);
// partial[block] = Σ of squares of the update. Grid min(ceil(height / 8), 256), block (32, 8).
BLOCK_KERNEL adafactor_squares(f64* partial, const f32* g, const f32* rows, const f32* columns, const f64* scalars,
                               u32 height, u32 width, f32 scale);
// p = keep · p − lr / max(1, rms) · update, rms² = scalars[1] / (height · width). p16 or 0. R.
KERNEL adafactor_apply(f32* p, u16* p16, const f32* g, const f32* rows, const f32* columns, const f64* scalars,
                       u32 height, u32 width, f32 keep, f64 lr, f32 scale);
// Adafactor for a vector: adafactor_vector (grid min(ceil(n / 1024), 256), block 256), sum_f64(scalars + 1, partial,
// grid), adafactor_vector_apply (E).
BLOCK_KERNEL adafactor_vector(f64* partial, f32* v, const f32* g, u64 n, f32 beta2, f32 scale);
KERNEL adafactor_vector_apply(f32* p, u16* p16, const f32* g, const f32* v, const f64* scalars, u64 n, f32 keep,
                              f64 lr, f32 scale);
// m (or 0) = momentum · m + scale · g + decay · p; p −= rate · m. p16 or 0. E.
KERNEL sgd(f32* p, u16* p16, const f32* g, f32* m, u64 n, f32 rate, f32 momentum, f32 decay, f32 scale);

// ---- convert.cu. Columns of y from width up to y_stride become 0 where y is bf16. R over [rows, y_stride].
KERNEL f32_to_bf16(u16* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width);
KERNEL f16_to_bf16(u16* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width);
// R over [rows, width].
KERNEL bf16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width);
KERNEL f16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width);
// bitsandbytes' blocks: element i is values[code] · scales[i / block]. Two NF4 codes share a byte, the first in the
// high half; NF4's 16 values are in the kernel. E.
BLOCK_KERNEL nf4_to_bf16(u16* y, const u8* codes, const f32* scales, u64 n, u32 block);
BLOCK_KERNEL nf4_to_f32(f32* y, const u8* codes, const f32* scales, u64 n, u32 block);
KERNEL int8_to_f32(f32* y, const u8* codes, const f32* values, const f32* scales, u64 n, u32 block);
// LLM.int8: q[i, j] · scales[i] / 127. R.
KERNEL int8_rows_to_bf16(u16* y, const i8* q, const f32* scales, u32 rows, u32 width);
KERNEL int8_rows_to_f32(f32* y, const i8* q, const f32* scales, u32 rows, u32 width);

// ---- experts.cu
// probabilities become their softmax; chosen[row, per_row] experts, the likeliest first, and their weights. W.
BLOCK_KERNEL route_choose(f32* probabilities, u32* chosen, f32* chosen_weights, u32 rows, u32 experts, u32 per_row,
                          u32 normalise);
// counts[e] = how often e was chosen. n = rows · per_row. Grid experts, block 256.
BLOCK_KERNEL route_count(u32* counts, const u32* chosen, u32 n);
// slot_rows[n], offsets[experts + 1], weights[n]: the slots sorted by expert, then by row. Grid experts, block 256.
BLOCK_KERNEL route_place(u32* slot_rows, u32* offsets, f32* weights, const u32* chosen, const f32* chosen_weights,
                         const u32* counts, u32 n, u32 experts, u32 per_row);
// d_logits from the gradient of the slots' weights. W.
BLOCK_KERNEL route_backward(f32* d_logits, const f32* probabilities, const f32* d_weights, const u32* slot_rows,
                            const u32* offsets, u32 rows, u32 experts, u32 normalise);

// ---- grouped.cu. Linear layers that differ by expert: the slots of expert e are rows offsets[e] to offsets[e + 1].
// Offsets are at most `slots`; where they do not ascend an expert has no slot. Tiles are 64 × 64, of bf16 or, for f32, of
// three parts. Block 128, shared 8192 · parts bytes.
// weights[experts][pieces] are runs of an expert's outputs: a GroupedPiece each, ends ascending, the last one `outputs`.
// y[slots, outputs] = x[slots, inputs] · w[expert]ᵀ. Grid (ceil(slots / 64) + experts, ceil(outputs / 64)).
BLOCK_KERNEL grouped_linear_bf16(f32* y, const f32* x, const GroupedPiece* weights, u32 pieces, const u32* offsets,
                                 u32 experts, u32 outputs, u32 inputs);
BLOCK_KERNEL grouped_linear_f32(f32* y, const f32* x, const GroupedPiece* weights, u32 pieces, const u32* offsets,
                                u32 experts, u32 outputs, u32 inputs);
// dx[slots, inputs] = dy[slots, outputs] · w[expert]. Grid (ceil(slots / 64) + experts, ceil(inputs / 64)).
BLOCK_KERNEL grouped_dx_bf16(f32* dx, const f32* dy, const GroupedPiece* weights, u32 pieces, const u32* offsets,
                             u32 experts, u32 outputs, u32 inputs);
BLOCK_KERNEL grouped_dx_f32(f32* dx, const f32* dy, const GroupedPiece* weights, u32 pieces, const u32* offsets,
                            u32 experts, u32 outputs, u32 inputs);
// dw[rows, inputs] (+)= dyᵀ · x, of rows `first` to `first + rows` of the weights of all experts. Grid
// (ceil(inputs / 64), ceil(min(outputs, rows) / 64), experts that the rows reach).
BLOCK_KERNEL grouped_dw_bf16(f32* dw, u32 first, u32 rows, u32 accumulate, const f32* dy, const f32* x,
                             const u32* offsets, u32 experts, u32 outputs, u32 inputs);
BLOCK_KERNEL grouped_dw_f32(f32* dw, u32 first, u32 rows, u32 accumulate, const f32* dy, const f32* x,
                            const u32* offsets, u32 experts, u32 outputs, u32 inputs);
