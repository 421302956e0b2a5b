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

/* Makes codes of rows of `count` states as a left operand; rows up to the next multiple of 32 keep
 * the codes they have. */
INLINE void encode_rows(const bf16 *states, long stride, long rows, long count, const float *factor,
                        float *row, bf16 *tiles, struct steps *steps) {
    for (long r = 0; r < rows; r++) {
        load_row(states + r * stride, count, row);
        steps[r] = encode(row, factor, count, left_row(tiles, count / 64, r));
    }
}

/* As bge_amx_linear. */
EXPORT KERNEL int INT8_LINEAR(const struct int8_linear *layer, const bf16 *states, int64_t rows,
                              int64_t begin, int64_t end, int64_t inputs, int64_t outputs,
                              bf16 *out, int64_t slice) {
    const long width = inputs / 64, part = part_of(end - begin, PROJECTED_ROWS);
    char *at = take_room(part * (inputs + 32 * sizeof(int32_t) + sizeof(struct steps)) +
                         inputs * sizeof(float));
    if (!at) return -1;
    bf16 *left = cut(&at, part * inputs, 1);
    int32_t *sums = cut(&at, part * 32, sizeof(int32_t));
    float *row = cut(&at, inputs, sizeof(float));
    struct steps *steps = cut(&at, part, sizeof(struct steps));
    BEGIN();
    for (long start = begin; start < end; start += part) {
        const long count = end - start < part ? end - start : part;
        encode_rows(states + start * inputs, inputs, count, inputs, layer->factor, row, left,
                    steps);
        for (long n = 0; n < outputs; n += 32) {
            const bf16 *panel = layer->packed + n * width * 32;
            multiply_int8(left, width, count, panel, width, sums, BLOCK, panel + width * 2 * TILE);
            const struct outputs which = outputs_of(layer, layer->sums, n);
            bf16 *to = out + (n / slice * rows + start) * slice + n % slice;
            for (long r = 0; r < count; r++)
                store(to + r * slice,
                      decode(sums + r * 32, steps[r], which.step[0], which.sums[0], which.bias[0]),
                      decode(sums + r * 32 + 16, steps[r], which.step[1], which.sums[1],
                             which.bias[1]));
        }
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
    long count;              /* of rows */
    long stride;             /* of inner numbers */
    bf16 *left, *inner_left; /* codes of what a product is given, as left operand */
    struct steps *steps, *inner_steps;
    bf16 *middle, *inner; /* what the feed-forward block is given, and its inner numbers */
    float *total, *row;
    int32_t *sums;
};

/* From the codes of what was attended to what the feed-forward block is given, and its codes. */
KERNEL static void attention_output(const struct int8_layer *layer, const struct work *work,
                                    const bf16 *states) {
    const struct int8_linear *linear = &layer->output;
    const long hidden = layer->hidden, width = hidden / 64, panels = hidden / 32;
    int32_t *sums = (int32_t *)work->total;
    for (long n = 0; n < panels; n++) {
        const bf16 *panel = linear->packed + n * width * 2 * TILE;
        multiply_int8(work->left, width, work->count, panel, width, sums + n * BLOCK,
                      panels * BLOCK, n + 1 < panels ? panel + width * 2 * TILE : layer->up.packed);
    }
    for (long r = 0; r < work->count; r++) {
        const int32_t *from = sums + sums_row(panels, r);
        load_row(states + r * hidden, hidden, work->row);
        for (long j = 0; j < hidden; j += 16) {
            const __m512 more =
                _mm512_add_ps(_mm512_load_ps(work->row + j), _mm512_loadu_ps(linear->bias + j));
            const __m512 v =
                decode(from + j / 32 * BLOCK + j % 32, work->steps[r],
                       _mm512_loadu_ps(linear->step + j), _mm512_loadu_ps(linear->sums + j), more);
            _mm512_store_ps(work->row + j, v);
        }
        norm_row(work->row, hidden, &layer->attention_norm, layer->epsilon);
        store_row(work->row, hidden, work->middle + r * hidden, 32);
        work->steps[r] =
            encode(work->row, layer->up.factor, hidden, left_row(work->left, width, r));
    }
}

/* The block's inner numbers from one to another, and their codes. */
KERNEL static void go_up(const struct int8_layer *layer, const struct work *work, long from,
                         long to, const bf16 *next) {
    const long width = layer->hidden / 64;
    for (long n = from; n < to; n += 32) {
        const bf16 *panel = layer->up.packed + n / 32 * width * 2 * TILE;
        multiply_int8(work->left, width, work->count, panel, width, work->sums, BLOCK,
                      n + 32 < to ? panel + width * 2 * TILE : next);
        const struct outputs outputs = outputs_of(&layer->up, layer->up.sums, n);
        for (long r = 0; r < work->count; r++) {
            const int32_t *sums = work->sums + r * 32;
            store(work->inner + r * work->stride + n - from,
                  gelu(decode(sums, work->steps[r], outputs.step[0], outputs.sums[0],
                              outputs.bias[0])),
                  gelu(decode(sums + 16, work->steps[r], outputs.step[1], outputs.sums[1],
                              outputs.bias[1])));
        }
    }
    encode_rows(work->inner, work->stride, work->count, to - from, NULL, work->row,
                work->inner_left, work->inner_steps);
}

/* What these inner numbers come to, added to what the ones before do. */
KERNEL static void go_down(const struct int8_layer *layer, const struct work *work, long from,
                           long to, const bf16 *next) {
    const long panels = layer->hidden / 32, inner_width = (to - from) / 64;
    const long panel_size = layer->intermediate / 64 * 2 * TILE;
    for (long n = 0; n < panels; n++) {
        const bf16 *panel = layer->down.packed + n * panel_size + from / 64 * 2 * TILE;
        multiply_int8(work->inner_left, inner_width, work->count, panel, inner_width, work->sums,
                      BLOCK, n + 1 < panels ? panel + panel_size : next);
        const float *chunk_sums = layer->down.sums + from / layer->chunk * layer->hidden;
        const struct outputs outputs = outputs_of(&layer->down, chunk_sums, n * 32);
        for (long r = 0; r < work->count; r++) {
            float *total = work->total + n * BLOCK + sums_row(panels, r);
            for (int i = 0; i < 2; i++) {
                const __m512 before = from ? _mm512_load_ps(total + 16 * i) : outputs.bias[i];
                const __m512 after = decode(work->sums + r * 32 + 16 * i, work->inner_steps[r],
                                            outputs.step[i], outputs.sums[i], before);
                _mm512_store_ps(total + 16 * i, after);
            }
        }
    }
}

/* Takes the memory for parts of so many rows. Returns 0, or -1 where it is short. */
static int take_work(const struct int8_layer *layer, long part, struct work *work) {
    const long hidden = layer->hidden, chunk = layer->chunk;
    const long longest = hidden > chunk ? hidden : chunk;
    /* A little longer than a chunk, so that rows do not fall on the same place of the cache. */
    work->stride = chunk + 32;
    char *at = take_room(part * (hidden + chunk + (hidden + work->stride) * sizeof(bf16) +
                                 (hidden + 32) * sizeof(float) + 2 * sizeof(struct steps)) +
                         longest * sizeof(float));
    if (!at) return -1;
    work->left = cut(&at, part * hidden, 1);
    work->inner_left = cut(&at, part * chunk, 1);
    work->steps = cut(&at, part, sizeof(struct steps));
    work->inner_steps = cut(&at, part, sizeof(struct steps));
    work->middle = cut(&at, part * hidden, sizeof(bf16));
    work->inner = cut(&at, part * work->stride, sizeof(bf16));
    work->total = cut(&at, part * hidden, sizeof(float));
    work->row = cut(&at, longest, sizeof(float));
    work->sums = cut(&at, part * 32, sizeof(int32_t));
    return 0;
}

/* The layer's output, from the sums of all inner numbers. */
KERNEL static void finish(const struct int8_layer *layer, const struct work *work, bf16 *out) {
    const long hidden = layer->hidden;
    for (long r = 0; r < work->count; r++) {
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

/* As bge_amx_after_attention. */
EXPORT KERNEL int INT8_AFTER_ATTENTION(const struct int8_layer *layer, const bf16 *states,
                                       const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, inner = layer->intermediate, chunk = layer->chunk;
    const long part = part_of(rows, LAYER_ROWS);
    struct work work;
    if (take_work(layer, part, &work)) return -1;
    BEGIN();
    for (long start = 0; start < rows; start += part) {
        work.count = rows - start < part ? rows - start : part;
        encode_rows(attended + start * hidden, hidden, work.count, hidden, layer->output.factor,
                    work.row, work.left, work.steps);
        attention_output(layer, &work, states + start * hidden);
        for (long from = 0; from < inner; from += chunk) {
            const long to = from + chunk < inner ? from + chunk : inner;
            go_up(layer, &work, from, to, layer->down.packed + from / 64 * 2 * TILE);
            go_down(layer, &work, from, to, layer->up.packed + to / 32 * (hidden / 64) * 2 * TILE);
        }
        finish(layer, &work, out + start * hidden);
    }
    END();
    return 0;
}
