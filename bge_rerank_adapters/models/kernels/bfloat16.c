/* Layers in bfloat16. */

#include "amx.h"

enum {
    LAYER_ROWS = 384, /* whose states, sums and inner numbers fit the second-level cache, nearly */
    INNER = 1024,     /* a feed-forward block's inner numbers that are made at a time */
};

KERNEL static void multiply_bf16(const bf16 *states, long width, long blocks, const bf16 *panel,
                                 long depth, float *sums, long apart, int more, const bf16 *next) {
    multiply_panel(BFLOAT16, states, width, blocks, panel, depth, sums, apart, more, next);
}

/* Adds up one row's sums, a bias and a residual, whose numbers lie 32 by 32: of sums they are a
 * block apart, of the residual as many as told. */
INLINE void add_up(const float *sums, const float *bias, const bf16 *residual, long apart,
                   long hidden, float *row) {
    for (long j = 0; j < hidden / 32; j++) {
        __m512 low, high;
        load(residual + j * apart, &low, &high);
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias + j * 32));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + j * 32 + 16));
        _mm512_store_ps(row + j * 32, _mm512_add_ps(low, _mm512_load_ps(sums + j * BLOCK)));
        _mm512_store_ps(row + j * 32 + 16,
                        _mm512_add_ps(high, _mm512_load_ps(sums + j * BLOCK + 16)));
    }
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
struct rest {
    int64_t hidden, intermediate;
    const bf16 *output, *up, *down;
    const float *output_bias, *up_bias, *down_bias;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* One layer's rest for states and what their attention gave, all of shape (rows, hidden).
 * Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_rest(const struct rest *layer, const bf16 *states, const bf16 *attended,
                               int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, width = hidden / 32, part = part_of(rows, LAYER_ROWS);
    const long inner_all = layer->intermediate, inner_most = inner_all < INNER ? inner_all : INNER;
    const long inner_width = inner_most / 32;
    char *at = take_room(sizeof(bf16) * part * (hidden + inner_most) +
                         sizeof(float) * (part * (hidden + 32) + hidden));
    if (!at) return -1;
    bf16 *left = cut(&at, part * hidden, sizeof(bf16));
    bf16 *inner = cut(&at, part * inner_most, sizeof(bf16));
    float *sums = cut(&at, part * hidden, sizeof(float));
    float *few = cut(&at, part * 32, sizeof(float));
    float *row = cut(&at, hidden, sizeof(float));
    begin_tiles();
    for (long start = 0; start < rows; start += part) {
        const long count = rows - start < part ? rows - start : part, blocks = (count + 31) / 32;
        to_left(attended + start * hidden, hidden, count, width, left);
        for (long n = 0; n < width; n++) {
            const bf16 *panel = layer->output + n * width * 2 * TILE;
            multiply_bf16(left, width, blocks, panel, width, sums + n * BLOCK, width * BLOCK, 0,
                           n + 1 < width ? panel + width * 2 * TILE : layer->up);
        }
        for (long r = 0; r < count; r++) {
            add_up(sums + r / 32 * width * BLOCK + r % 32 * 32, layer->output_bias,
                   states + (start + r) * hidden, 32, hidden, row);
            norm_row(row, hidden, &layer->attention_norm, layer->epsilon);
            store_row(row, hidden, left + r / 16 * width * TILE + r % 16 * 32, TILE);
        }
        for (long from = 0; from < inner_all; from += INNER) {
            const long taken = (inner_all - from < INNER ? inner_all - from : INNER) / 32;
            const bf16 *down = layer->down + from / 32 * 2 * TILE;
            for (long n = 0; n < taken; n++) {
                const bf16 *panel = layer->up + (from / 32 + n) * width * 2 * TILE;
                multiply_bf16(left, width, blocks, panel, width, few, BLOCK, 0,
                               n + 1 < taken ? panel + width * 2 * TILE : down);
                const float *bias = layer->up_bias + from + n * 32;
                const __m512 low = _mm512_loadu_ps(bias), high = _mm512_loadu_ps(bias + 16);
                for (long r = 0; r < blocks * 32; r++)
                    store(inner + (r / 16 * inner_width + n) * TILE + r % 16 * 32,
                          gelu(_mm512_add_ps(_mm512_load_ps(few + r * 32), low)),
                          gelu(_mm512_add_ps(_mm512_load_ps(few + r * 32 + 16), high)));
            }
            for (long n = 0; n < width; n++) {
                const bf16 *panel = down + n * (inner_all / 32) * 2 * TILE;
                const bf16 *further = layer->up + (from / 32 + taken) * width * 2 * TILE;
                multiply_bf16(inner, inner_width, blocks, panel, taken, sums + n * BLOCK,
                               width * BLOCK, from > 0,
                               n + 1 < width ? panel + inner_all / 32 * 2 * TILE : further);
            }
        }
        for (long r = 0; r < count; r++) {
            add_up(sums + r / 32 * width * BLOCK + r % 32 * 32, layer->down_bias,
                   left + r / 16 * width * TILE + r % 16 * 32, TILE, hidden, row);
            norm_row(row, hidden, &layer->output_norm, layer->epsilon);
            store_row(row, hidden, out + (start + r) * hidden, 32);
        }
    }
    end_tiles();
    return 0;
}
