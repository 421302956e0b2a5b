/* Layers in bfloat16 by AMX. */

#define TARGET AMX
#define HAS_AVX512_BF16

#include "tiles.h"

enum { INNER = 1024 /* a feed-forward block's inner numbers that are made at a time */ };

KERNEL static void multiply_bf16(const bf16 *states, long width, long blocks, const bf16 *panel,
                                 long depth, float *sums, long apart, int more, const bf16 *next) {
    multiply_panel(BFLOAT16, states, width, blocks, panel, depth, sums, apart, more, next);
}

/* states @ weight.T + bias for the rows from `begin` to `end`, by slices of outputs: the output has
 * shape (outputs / slice, rows, slice). Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_linear(const bf16 *states, int64_t rows, int64_t begin, int64_t end,
                                 int64_t inputs, int64_t outputs, const bf16 *packed,
                                 const float *bias, bf16 *out, int64_t slice) {
    const long width = inputs / 32, part = part_of(end - begin, PROJECTED_ROWS);
    char *at = take_room(part * (inputs * sizeof(bf16) + 32 * sizeof(float)));
    if (!at) return -1;
    bf16 *left = cut(&at, part * inputs, sizeof(bf16));
    float *sums = cut(&at, part * 32, sizeof(float));
    begin_tiles();
    for (long start = begin; start < end; start += part) {
        const long count = end - start < part ? end - start : part;
        to_left(states + start * inputs, inputs, count, width, left);
        for (long n = 0; n < outputs; n += 32) {
            const bf16 *panel = packed + n * inputs;
            multiply_bf16(left, width, (count + 31) / 32, panel, width, sums, BLOCK, 0,
                          panel + 32 * inputs);
            const __m512 low = _mm512_loadu_ps(bias + n), high = _mm512_loadu_ps(bias + n + 16);
            bf16 *to = out + (n / slice * rows + start) * slice + n % slice;
            for (long r = 0; r < count; r++)
                store(to + r * slice, _mm512_add_ps(_mm512_load_ps(sums + r * 32), low),
                      _mm512_add_ps(_mm512_load_ps(sums + r * 32 + 16), high));
        }
    }
    end_tiles();
    return 0;
}

/* What comes after attention: packed weights, and vectors in float32. */
struct layer {
    int64_t hidden, intermediate;
    const bf16 *output, *up, *down;
    const float *output_bias, *up_bias, *down_bias;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* Some rows on their way through it: as left operands what a product is given, and sums. */
struct work {
    long count, blocks; /* of rows, and of blocks of them */
    bf16 *left, *inner;
    float *sums, *few, *row;
};

/* Adds up one row's sums, a bias and a residual, and norms them. Numbers lie 32 by 32: of sums they
 * are a block apart, of residual and output as many as told. */
INLINE void add_and_norm(const struct layer *layer, const struct norm *norm, const float *sums,
                         const float *bias, const bf16 *residual, long apart, float *row, bf16 *out,
                         long out_apart) {
    for (long j = 0; j < layer->hidden / 32; j++) {
        __m512 low, high;
        load(residual + j * apart, &low, &high);
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias + j * 32));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + j * 32 + 16));
        _mm512_store_ps(row + j * 32, _mm512_add_ps(low, _mm512_load_ps(sums + j * BLOCK)));
        _mm512_store_ps(row + j * 32 + 16,
                        _mm512_add_ps(high, _mm512_load_ps(sums + j * BLOCK + 16)));
    }
    norm_row(row, layer->hidden, norm, layer->epsilon);
    store_row(row, layer->hidden, out, out_apart);
}

/* From what was attended to what the feed-forward block is given, both as left operand. */
KERNEL static void attention_output(const struct layer *layer, const struct work *work,
                                    const bf16 *states) {
    const long width = layer->hidden / 32;
    for (long n = 0; n < width; n++) {
        const bf16 *panel = layer->output + n * width * 2 * TILE;
        multiply_bf16(work->left, width, work->blocks, panel, width, work->sums + n * BLOCK,
                      width * BLOCK, 0, n + 1 < width ? panel + width * 2 * TILE : layer->up);
    }
    for (long r = 0; r < work->count; r++)
        add_and_norm(layer, &layer->attention_norm, work->sums + sums_row(width, r),
                     layer->output_bias, states + r * layer->hidden, 32, work->row,
                     left_row(work->left, width, r), TILE);
}

/* The feed-forward block's inner numbers from one to another, as left operand. */
KERNEL static void go_up(const struct layer *layer, const struct work *work, long from, long to,
                         const bf16 *next) {
    const long width = layer->hidden / 32, inner_width = (to - from) / 32;
    for (long n = from; n < to; n += 32) {
        const bf16 *panel = layer->up + n / 32 * width * 2 * TILE;
        multiply_bf16(work->left, width, work->blocks, panel, width, work->few, BLOCK, 0,
                      n + 32 < to ? panel + width * 2 * TILE : next);
        const float *bias = layer->up_bias + n;
        const __m512 low = _mm512_loadu_ps(bias), high = _mm512_loadu_ps(bias + 16);
        bf16 *out = work->inner + (n - from) / 32 * TILE;
        for (long r = 0; r < work->blocks * 32; r++)
            store(left_row(out, inner_width, r),
                  gelu(_mm512_add_ps(_mm512_load_ps(work->few + r * 32), low)),
                  gelu(_mm512_add_ps(_mm512_load_ps(work->few + r * 32 + 16), high)));
    }
}

/* The sums of these inner numbers, added to those of the ones before. */
KERNEL static void go_down(const struct layer *layer, const struct work *work, long from, long to,
                           const bf16 *next) {
    const long width = layer->hidden / 32, inner_width = (to - from) / 32;
    const long panel_size = layer->intermediate / 32 * 2 * TILE;
    for (long n = 0; n < width; n++) {
        const bf16 *panel = layer->down + n * panel_size + from / 32 * 2 * TILE;
        multiply_bf16(work->inner, inner_width, work->blocks, panel, inner_width,
                      work->sums + n * BLOCK, width * BLOCK, from > 0,
                      n + 1 < width ? panel + panel_size : next);
    }
}

/* What comes after attention for states and what their attention gave, all of shape (rows, hidden).
 * Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_after_attention(const struct layer *layer, const bf16 *states,
                                          const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, width = hidden / 32, part = part_of(rows, LAYER_ROWS);
    const long inner = layer->intermediate, most = inner < INNER ? inner : INNER;
    char *at = take_room(sizeof(bf16) * part * (hidden + most) +
                         sizeof(float) * (part * (hidden + 32) + hidden));
    if (!at) return -1;
    struct work work;
    work.left = cut(&at, part * hidden, sizeof(bf16));
    work.inner = cut(&at, part * most, sizeof(bf16));
    work.sums = cut(&at, part * hidden, sizeof(float));
    work.few = cut(&at, part * 32, sizeof(float));
    work.row = cut(&at, hidden, sizeof(float));
    begin_tiles();
    for (long start = 0; start < rows; start += part) {
        work.count = rows - start < part ? rows - start : part;
        work.blocks = (work.count + 31) / 32;
        to_left(attended + start * hidden, hidden, work.count, width, work.left);
        attention_output(layer, &work, states + start * hidden);
        for (long from = 0; from < inner; from += most) {
            const long to = from + most < inner ? from + most : inner;
            go_up(layer, &work, from, to, layer->down + from / 32 * 2 * TILE);
            go_down(layer, &work, from, to, layer->up + to / 32 * width * 2 * TILE);
        }
        for (long r = 0; r < work.count; r++)
            add_and_norm(layer, &layer->output_norm, work.sums + sums_row(width, r),
                         layer->down_bias, left_row(work.left, width, r), TILE, work.row,
                         out + (start + r) * hidden, 32);
    }
    end_tiles();
    return 0;
}
