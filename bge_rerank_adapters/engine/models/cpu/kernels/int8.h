/* Layers in 8 bits, for every instruction set that multiplies them.
 *
 * A source that includes this has defined:
 *
 * - multiply_int8(), which multiplies rows of states, `width` tiles side by side, with the first
 *   `depth` pairs of tiles of a panel. Sums of two blocks lie `apart`, and `next` is the panel that
 *   comes after this one;
 * - INT8_LINEAR and INT8_AFTER_ATTENTION, the names of what is exported;
 * - BEGIN() and END(), around all products of a call.
 *
 * Weights have a step per output. States have one per row, that is per token, and the last products
 * of a layer one per row and chunk: a state is about code * step + least, with 255 steps from the
 * row's least number to its largest. So what is multiplied comes to
 * weight step * (step * sum of products + least * sum of weights).
 */

#include <float.h>

#include "avx512.h"

struct int8_linear {
    const bf16 *packed;
    const float *step; /* of the weights of each output */
    const float *sums; /* of these weights; one row of them for each chunk of inputs */
    const float *bias;
    const float *factor; /* of each input, or NULL */
};

/* How the codes of a row are read. */
struct steps {
    float step, least;
};

/* Makes codes of a row times a factor for each number, 64 by 64 into tiles. Where a number is not
 * finite, the step is not, and so is nothing that is read with it. */
INLINE struct steps encode(float *row, const float *factor, long count, bf16 *tiles) {
    __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY);
    __m512 nothing = _mm512_setzero_ps();
    for (long j = 0; j < count; j += 16) {
        __m512 v = _mm512_load_ps(row + j);
        if (factor) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(factor + j));
            _mm512_store_ps(row + j, v);
        }
        least = _mm512_min_ps(least, v);
        most = _mm512_max_ps(most, v);
        nothing = _mm512_fmadd_ps(v, _mm512_setzero_ps(), nothing);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
    const float span = high - low > FLT_MIN * 255 ? high - low : FLT_MIN * 255;
    /* Neither minimum nor maximum knows what is not a number, but this sum of zeros does. */
    const float step = span / 255 + _mm512_reduce_add_ps(nothing);
    const __m512 inverse = _mm512_set1_ps(1 / step), shift = _mm512_set1_ps(low);
    for (long j = 0; j < count; j += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row + j), shift), inverse);
        uint8_t *out = (uint8_t *)(tiles + j / 64 * TILE) + j % 64;
        _mm_store_si128((__m128i *)out, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    return (struct steps){step, low};
}

/* What 16 products of a row come to. */
INLINE __m512 decode(const int32_t *sums, struct steps steps, __m512 step, __m512 weights,
                     __m512 more) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), step);
    const __m512 shifted = _mm512_fmadd_ps(weights, _mm512_set1_ps(steps.least), more);
    return _mm512_fmadd_ps(scaled, _mm512_set1_ps(steps.step), shifted);
}

/* What goes with 32 outputs of a layer. */
struct outputs {
    __m512 step[2], sums[2], bias[2];
};

INLINE struct outputs outputs_of(const struct int8_linear *layer, const float *sums, long from) {
    struct outputs out;
    for (int i = 0; i < 2; i++) {
        out.step[i] = _mm512_loadu_ps(layer->step + from + 16 * i);
        out.sums[i] = _mm512_loadu_ps(sums + from + 16 * i);
        out.bias[i] = _mm512_loadu_ps(layer->bias + from + 16 * i);
    }
    return out;
}

/* Makes codes of the rows from `begin` to `end`, of `count` states each, as a left operand; rows up
 * to the next multiple of 32 keep the codes they have. */
INLINE void encode_rows(const bf16 *states, long stride, long begin, long end, long count,
                        const float *factor, float *row, bf16 *tiles, struct steps *steps) {
    for (long r = begin; r < end; r++) {
        load_row(states + r * stride, count, row);
        steps[r] = encode(row, factor, count, left_row(tiles, count / 64, r));
    }
}

/* The codes of some rows, `width` tiles side by side. */
struct codes {
    long count, width;
    bf16 *left;
    struct steps *steps;
};

/* The outputs from `n` to `n + 32` of coded rows; those of a row lie `apart` from those of the row
 * before. `sums` has room for 32 of each row, up to the next multiple of 32 rows. */
KERNEL static void linear_panel(const struct int8_linear *linear, const struct codes *codes, long n,
                                int32_t *sums, bf16 *out, long apart) {
    const long size = codes->width * 2 * TILE;
    const bf16 *panel = linear->packed + n / 32 * size;
    multiply_int8(codes->left, codes->width, codes->count, panel, codes->width, sums, BLOCK,
                  panel + size);
    const struct outputs which = outputs_of(linear, linear->sums, n);
    for (long r = 0; r < codes->count; r++) {
        const int32_t *from = sums + r * 32;
        const struct steps steps = codes->steps[r];
        store(out + r * apart, decode(from, steps, which.step[0], which.sums[0], which.bias[0]),
              decode(from + 16, steps, which.step[1], which.sums[1], which.bias[1]));
    }
}

/* As bge_amx_linear. */
EXPORT KERNEL int INT8_LINEAR(const struct int8_linear *layer, const bf16 *states, int64_t rows,
                              int64_t begin, int64_t end, int64_t inputs, int64_t outputs,
                              bf16 *out, int64_t slice) {
    const long part = part_of(end - begin, PROJECTED_ROWS);
    char *at = take_room(OWN, part * (inputs + 32 * sizeof(int32_t) + sizeof(struct steps)) +
                                  inputs * sizeof(float));
    if (!at) return -1;
    struct codes codes;
    codes.width = inputs / 64;
    codes.left = cut(&at, part * inputs, 1);
    int32_t *sums = cut(&at, part * 32, sizeof(int32_t));
    float *row = cut(&at, inputs, sizeof(float));
    codes.steps = cut(&at, part, sizeof(struct steps));
    BEGIN();
    for (long start = begin; start < end; start += part) {
        codes.count = end - start < part ? end - start : part;
        encode_rows(states + start * inputs, inputs, 0, codes.count, inputs, layer->factor, row,
                    codes.left, codes.steps);
        for (long n = 0; n < outputs; n += 32)
            linear_panel(layer, &codes, n, sums,
                         out + (n / slice * rows + start) * slice + n % slice, slice);
    }
    END();
    return 0;
}

/* What comes after attention in a layer. The feed-forward block's inner numbers are made `chunk` at
 * a time. */
struct int8_layer {
    int64_t hidden, intermediate, chunk;
    struct int8_linear output, up, down;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* Some rows on their way through it. */
struct work {
    long stride;        /* of inner numbers */
    struct codes given; /* of what a product is given */
    struct codes inner_given;
    bf16 *middle, *inner; /* what the feed-forward block is given, and its inner numbers */
    float *total, *row;
    int32_t *sums;
};

/* Sums of the output projection, in integers in place of the total, for the panel at `n`. */
KERNEL static void output_panel(const struct int8_layer *layer, const struct work *work, long n,
                                const bf16 *next) {
    const long width = work->given.width, panels = layer->hidden / 32;
    multiply_int8(work->given.left, width, work->given.count,
                  layer->output.packed + n * width * 2 * TILE, width,
                  (int32_t *)work->total + n * BLOCK, panels * BLOCK, next);
}

/* From these sums and the layer's input to what the feed-forward block is given, and its codes. */
KERNEL static void norm_middle(const struct int8_layer *layer, const struct work *work,
                               const bf16 *states, long begin, long end) {
    const struct int8_linear *linear = &layer->output;
    const long hidden = layer->hidden;
    for (long r = begin; r < end; r++) {
        const int32_t *from = (int32_t *)work->total + sums_row(hidden / 32, r);
        load_row(states + r * hidden, hidden, work->row);
        for (long j = 0; j < hidden; j += 16) {
            const __m512 more =
                _mm512_add_ps(_mm512_load_ps(work->row + j), _mm512_loadu_ps(linear->bias + j));
            const __m512 v =
                decode(from + j / 32 * BLOCK + j % 32, work->given.steps[r],
                       _mm512_loadu_ps(linear->step + j), _mm512_loadu_ps(linear->sums + j), more);
            _mm512_store_ps(work->row + j, v);
        }
        norm_row(work->row, hidden, &layer->attention_norm, layer->epsilon);
        store_row(work->row, hidden, work->middle + r * hidden, 32);
        work->given.steps[r] = encode(work->row, layer->up.factor, hidden,
                                      left_row(work->given.left, work->given.width, r));
    }
}

/* The block's inner numbers from `n` to `n + 32`, of a chunk that begins at `from`. */
KERNEL static void up_panel(const struct int8_layer *layer, const struct work *work, long from,
                            long n, const bf16 *next) {
    const long width = work->given.width, count = work->given.count;
    multiply_int8(work->given.left, width, count, layer->up.packed + n / 32 * width * 2 * TILE,
                  width, work->sums, BLOCK, next);
    const struct outputs outputs = outputs_of(&layer->up, layer->up.sums, n);
    for (long r = 0; r < count; r++) {
        const int32_t *sums = work->sums + r * 32;
        const struct steps steps = work->given.steps[r];
        store(work->inner + r * work->stride + n - from,
              gelu(decode(sums, steps, outputs.step[0], outputs.sums[0], outputs.bias[0])),
              gelu(decode(sums + 16, steps, outputs.step[1], outputs.sums[1], outputs.bias[1])));
    }
}

/* What a chunk of inner numbers that begins at `from` comes to in the panel at `n`, added to what
 * the ones before do. */
KERNEL static void down_panel(const struct int8_layer *layer, const struct work *work, long from,
                              long n, const bf16 *next) {
    const long panels = layer->hidden / 32, width = work->inner_given.width;
    const bf16 *panel =
        layer->down.packed + (n * (layer->intermediate / 64) + from / 64) * 2 * TILE;
    multiply_int8(work->inner_given.left, width, work->inner_given.count, panel, width, work->sums,
                  BLOCK, next);
    const float *chunk_sums = layer->down.sums + from / layer->chunk * layer->hidden;
    const struct outputs outputs = outputs_of(&layer->down, chunk_sums, n * 32);
    for (long r = 0; r < work->inner_given.count; r++) {
        float *total = work->total + n * BLOCK + sums_row(panels, r);
        for (int i = 0; i < 2; i++) {
            const __m512 before = from ? _mm512_load_ps(total + 16 * i) : outputs.bias[i];
            const __m512 after = decode(work->sums + r * 32 + 16 * i, work->inner_given.steps[r],
                                        outputs.step[i], outputs.sums[i], before);
            _mm512_store_ps(total + 16 * i, after);
        }
    }
}

/* The layer's output, from the sums of all inner numbers. */
KERNEL static void finish(const struct int8_layer *layer, const struct work *work, long begin,
                          long end, bf16 *out) {
    const long hidden = layer->hidden;
    for (long r = begin; r < end; r++) {
        const float *from = work->total + sums_row(hidden / 32, r);
        load_row(work->middle + r * hidden, hidden, work->row);
        for (long j = 0; j < hidden; j += 16) {
            const __m512 more = _mm512_load_ps(from + j / 32 * BLOCK + j % 32);
            _mm512_store_ps(work->row + j, _mm512_add_ps(_mm512_load_ps(work->row + j), more));
        }
        norm_row(work->row, hidden, &layer->output_norm, layer->epsilon);
        store_row(work->row, hidden, out + r * hidden, 32);
    }
}

/* Takes the memory for parts of so many rows. Returns 0, or -1 where it is short. */
static int take_work(const struct int8_layer *layer, long part, struct work *work) {
    const long hidden = layer->hidden, chunk = layer->chunk;
    const long longest = hidden > chunk ? hidden : chunk;
    /* A little longer than a chunk, so that rows do not fall on the same place of the cache. */
    work->stride = chunk + 32;
    char *at = take_room(OWN, part * (hidden + chunk + (hidden + work->stride) * sizeof(bf16) +
                                      (hidden + 32) * sizeof(float) + 2 * sizeof(struct steps)) +
                                  longest * sizeof(float));
    if (!at) return -1;
    work->given.width = hidden / 64;
    work->given.left = cut(&at, part * hidden, 1);
    work->inner_given.left = cut(&at, part * chunk, 1);
    work->given.steps = cut(&at, part, sizeof(struct steps));
    work->inner_given.steps = cut(&at, part, sizeof(struct steps));
    work->middle = cut(&at, part * hidden, sizeof(bf16));
    work->inner = cut(&at, part * work->stride, sizeof(bf16));
    work->total = cut(&at, part * hidden, sizeof(float));
    work->row = cut(&at, longest, sizeof(float));
    work->sums = cut(&at, part * 32, sizeof(int32_t));
    return 0;
}

/* All that comes after attention, for `work->given.count` rows. */
KERNEL static void after_attention(const struct int8_layer *layer, struct work *work,
                                   const bf16 *states, const bf16 *attended, bf16 *out) {
    const long hidden = layer->hidden, count = work->given.count, chunk = layer->chunk;
    const long panels = hidden / 32, inner = layer->intermediate, size = hidden * 16;
    encode_rows(attended, hidden, 0, count, hidden, layer->output.factor, work->row,
                work->given.left, work->given.steps);
    for (long n = 0; n < panels; n++)
        output_panel(layer, work, n,
                     n + 1 < panels ? layer->output.packed + (n + 1) * size : layer->up.packed);
    norm_middle(layer, work, states, 0, count);
    for (long from = 0; from < inner; from += chunk) {
        const long to = from + chunk < inner ? from + chunk : inner;
        const bf16 *down = layer->down.packed + from * 16;
        for (long n = from; n < to; n += 32)
            up_panel(layer, work, from, n,
                     n + 32 < to ? layer->up.packed + (n / 32 + 1) * size : down);
        work->inner_given.count = count;
        work->inner_given.width = (to - from) / 64;
        encode_rows(work->inner, work->stride, 0, count, to - from, NULL, work->row,
                    work->inner_given.left, work->inner_given.steps);
        for (long n = 0; n < panels; n++)
            down_panel(
                layer, work, from, n,
                n + 1 < panels ? down + (n + 1) * inner * 16 : layer->up.packed + to / 32 * size);
    }
    finish(layer, work, 0, count, out);
}

/* As bge_amx_after_attention. */
EXPORT KERNEL int INT8_AFTER_ATTENTION(const struct int8_layer *layer, const bf16 *states,
                                       const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, part = part_of(rows, LAYER_ROWS);
    struct work work;
    if (take_work(layer, part, &work)) return -1;
    BEGIN();
    for (long start = 0; start < rows; start += part) {
        work.given.count = rows - start < part ? rows - start : part;
        after_attention(layer, &work, states + start * hidden, attended + start * hidden,
                        out + start * hidden);
    }
    END();
    return 0;
}
