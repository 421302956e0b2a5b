/* Layers in bfloat16 by AMX. */

#define TARGET AMX
#define HAS_AVX512_BF16

#include "tiles.h"

enum { INNER = 1024 /* a feed-forward block's inner numbers that are made at a time */ };

/* A product: packed weights, and a bias in float32. */
struct linear {
    const bf16 *packed;
    const float *bias;
};

/* Rows as a left operand, `width` tiles side by side. */
struct given {
    long count, width;
    bf16 *left;
};

/* Products of some rows with a panel; its sums are given to `take`. `sums` has room for 32 of each
 * row, up to the next multiple of 32 rows. */
INLINE void multiply_given(const struct given *given, const bf16 *panel, float *sums,
                           const bf16 *next, struct rest *rest, take_sums *take, const void *what) {
    multiply_panel(BFLOAT16, given->left, given->width, given->count, panel, given->width, sums,
                   BLOCK, 0, next, rest, take, what);
}

/* Where the outputs of a panel go: those of a row lie `apart` from those of the row before, or are
 * `apart` tiles side by side. */
struct panel_outputs {
    __m512 bias[2];
    bf16 *out;
    long apart;
};

INLINE struct panel_outputs outputs_of(const float *bias, bf16 *out, long apart) {
    return (struct panel_outputs){{_mm512_loadu_ps(bias), _mm512_loadu_ps(bias + 16)}, out, apart};
}

INLINE __m512 biased(__m512i sums, __m512 bias) {
    return _mm512_add_ps(_mm512_castsi512_ps(sums), bias);
}

INLINE void take_linear(const void *what, long r, __m512i low, __m512i high) {
    const struct panel_outputs *to = what;
    store(to->out + r * to->apart, biased(low, to->bias[0]), biased(high, to->bias[1]));
}

/* The outputs from `begin` to `end` of rows. */
KERNEL static void linear_panels(const struct linear *linear, const struct given *given, long begin,
                                 long end, float *sums, const struct slices *to) {
    const long size = given->width * 2 * TILE;
    struct panel_outputs panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n += 32) {
        const bf16 *packed = linear->packed + n / 32 * size;
        struct panel_outputs *panel = &panels[n / 32 % 2];
        *panel = outputs_of(linear->bias + n, slice_at(to, n), to->width);
        multiply_given(given, packed, sums, packed + size, &rest, take_linear, panel);
    }
    take_rest(&rest, take_linear);
}

/* states @ weight.T + bias for the rows from `begin` to `end`, by slices of outputs: the output has
 * shape (outputs / slice, rows, slice). Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_linear(const bf16 *states, int64_t rows, int64_t begin, int64_t end,
                                 int64_t inputs, int64_t outputs, const bf16 *packed,
                                 const float *bias, bf16 *out, int64_t slice) {
    const struct linear linear = {packed, bias};
    const long part = part_of(end - begin, PART_ROWS);
    char *at = take_room(part * (inputs * sizeof(bf16) + 32 * sizeof(float)));
    if (!at) return -1;
    struct given given = {.width = inputs / 32, .left = cut(&at, part * inputs, sizeof(bf16))};
    float *sums = cut(&at, part * 32, sizeof(float));
    begin_tiles();
    for (long start = begin; start < end; start += part) {
        given.count = end - start < part ? end - start : part;
        to_left(states + start * inputs, inputs, given.count, given.width, given.left);
        const struct slices to = {out + start * slice, rows, slice};
        linear_panels(&linear, &given, 0, outputs, sums, &to);
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

/* Some rows on their way through it: as left operands what products are given, and sums. */
struct work {
    struct given given, inner; /* the inner numbers of a chunk */
    float *sums, *few, *row;
};

/* Adds up one row's sums, a bias and a residual, and norms them. Numbers lie 32 by 32: of sums they
 * are a block apart, of residual and output as many as told. */
INLINE void add_and_norm(const struct layer *layer, const struct norm *norm, const float *sums,
                         const float *bias, const bf16 *residual, long apart, float *row, bf16 *out,
                         long out_apart) {
    __m512 all_low = _mm512_setzero_ps(), all_high = all_low;
    for (long j = 0; j < layer->hidden / 32; j++) {
        __m512 low, high;
        load(residual + j * apart, &low, &high);
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias + j * 32));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + j * 32 + 16));
        low = _mm512_add_ps(low, _mm512_load_ps(sums + j * BLOCK));
        high = _mm512_add_ps(high, _mm512_load_ps(sums + j * BLOCK + 16));
        _mm512_store_ps(row + j * 32, low);
        _mm512_store_ps(row + j * 32 + 16, high);
        all_low = _mm512_add_ps(all_low, low);
        all_high = _mm512_add_ps(all_high, high);
    }
    norm_row(row, layer->hidden, _mm512_add_ps(all_low, all_high), norm, layer->epsilon, out,
             out_apart);
}

/* The sums of the output projection in the panel `n`. */
KERNEL static void output_panel(const struct layer *layer, const struct work *work, long n,
                                const bf16 *next) {
    const struct given *given = &work->given;
    const long width = given->width;
    multiply_panel(BFLOAT16, given->left, width, given->count, layer->output + n * width * 2 * TILE,
                   width, work->sums + n * BLOCK, width * BLOCK, 0, next, NULL, NULL, NULL);
}

/* From these sums and the layer's input to what the feed-forward block is given. */
KERNEL static void norm_middle(const struct layer *layer, const struct work *work,
                               const bf16 *states, long begin, long end) {
    const long width = work->given.width;
    for (long r = begin; r < end; r++)
        add_and_norm(layer, &layer->attention_norm, work->sums + sums_row(width, r),
                     layer->output_bias, states + r * layer->hidden, 32, work->row,
                     left_row(work->given.left, width, r), TILE);
}

INLINE void take_up(const void *what, long r, __m512i low, __m512i high) {
    const struct panel_outputs *to = what;
    store(left_row(to->out, to->apart, r), gelu(biased(low, to->bias[0])),
          gelu(biased(high, to->bias[1])));
}

/* The feed-forward block's inner numbers from `begin` to `end`, of a chunk that begins at `from`;
 * `after` is the panel that is needed next. */
KERNEL static void up_panels(const struct layer *layer, const struct work *work, long from,
                             long begin, long end, const bf16 *after) {
    const long size = work->given.width * 2 * TILE;
    struct panel_outputs panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n += 32) {
        const bf16 *packed = layer->up + n / 32 * size;
        struct panel_outputs *panel = &panels[n / 32 % 2];
        *panel = outputs_of(layer->up_bias + n, work->inner.left + (n - from) / 32 * TILE,
                            work->inner.width);
        multiply_given(&work->given, packed, work->few, n + 32 < end ? packed + size : after, &rest,
                       take_up, panel);
    }
    take_rest(&rest, take_up);
}

/* The sums of a chunk of inner numbers that begins at `from` in the panel `n`, added to those of
 * the ones before. */
KERNEL static void down_panel(const struct layer *layer, const struct work *work, long from, long n,
                              const bf16 *next) {
    const struct given *inner = &work->inner;
    const bf16 *panel = layer->down + (n * (layer->intermediate / 32) + from / 32) * 2 * TILE;
    multiply_panel(BFLOAT16, inner->left, inner->width, inner->count, panel, inner->width,
                   work->sums + n * BLOCK, layer->hidden / 32 * BLOCK, from > 0, next, NULL, NULL,
                   NULL);
}

/* The layer's output, from the sums of all inner numbers. */
KERNEL static void finish(const struct layer *layer, const struct work *work, long begin, long end,
                          bf16 *out) {
    const long width = work->given.width;
    for (long r = begin; r < end; r++)
        add_and_norm(layer, &layer->output_norm, work->sums + sums_row(width, r), layer->down_bias,
                     left_row(work->given.left, width, r), TILE, work->row, out + r * layer->hidden,
                     32);
}

/* All that comes after attention, for `work->given.count` rows. */
KERNEL static void after_attention(const struct layer *layer, struct work *work, long most,
                                   const bf16 *states, const bf16 *attended, bf16 *out) {
    const long hidden = layer->hidden, width = hidden / 32, inner = layer->intermediate;
    const long count = work->given.count, size = width * 2 * TILE;
    to_left(attended, hidden, count, width, work->given.left);
    for (long n = 0; n < width; n++)
        output_panel(layer, work, n, n + 1 < width ? layer->output + (n + 1) * size : layer->up);
    norm_middle(layer, work, states, 0, count);
    for (long from = 0; from < inner; from += most) {
        const long to = from + most < inner ? from + most : inner;
        const bf16 *down = layer->down + from / 32 * 2 * TILE;
        work->inner.count = count;
        work->inner.width = (to - from) / 32;
        up_panels(layer, work, from, from, to, down);
        for (long n = 0; n < width; n++)
            down_panel(layer, work, from, n,
                       n + 1 < width ? down + (n + 1) * (inner / 32) * 2 * TILE
                                     : layer->up + to / 32 * size);
    }
    finish(layer, work, 0, count, out);
}

/* What comes after attention for states and what their attention gave, all of shape (rows, hidden).
 * Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_after_attention(const struct layer *layer, const bf16 *states,
                                          const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, part = part_of(rows, PART_ROWS);
    const long most = layer->intermediate < INNER ? layer->intermediate : INNER;
    char *at = take_room(sizeof(bf16) * part * (hidden + most) +
                         sizeof(float) * (part * (hidden + 32) + hidden));
    if (!at) return -1;
    struct work work;
    work.given.width = hidden / 32;
    work.given.left = cut(&at, part * hidden, sizeof(bf16));
    work.inner.left = cut(&at, part * most, sizeof(bf16));
    work.sums = cut(&at, part * hidden, sizeof(float));
    work.few = cut(&at, part * 32, sizeof(float));
    work.row = cut(&at, hidden, sizeof(float));
    begin_tiles();
    for (long start = 0; start < rows; start += part) {
        work.given.count = rows - start < part ? rows - start : part;
        after_attention(layer, &work, most, states + start * hidden, attended + start * hidden,
                        out + start * hidden);
    }
    end_tiles();
    return 0;
}

#include "bfloat16_stack.h"
