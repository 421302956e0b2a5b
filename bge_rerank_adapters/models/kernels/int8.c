/* Layers in 8 bits.
 *
 * Weights have a step per output. States have one per row, that is per token, and the last products
 * of a layer one per row and chunk: a state is about code * step + least, with 255 steps from the
 * row's least number to its largest. So what is multiplied comes to
 * weight step * (step * sum of products + least * sum of weights).
 */

#include <float.h>

#include "amx.h"

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

enum { LAYER_ROWS = 384 /* as in bfloat16.c */ };

KERNEL static void multiply_int8(const bf16 *states, long width, long blocks, const bf16 *panel,
                                 long depth, int32_t *sums, long apart, const bf16 *next) {
    multiply_panel(INTEGERS, states, width, blocks, panel, depth, sums, apart, 0, next);
}

INLINE void load_row(const bf16 *from, long count, float *row) {
    for (long j = 0; j < count; j += 32) {
        __m512 low, high;
        load(from + j, &low, &high);
        _mm512_store_ps(row + j, low);
        _mm512_store_ps(row + j + 16, high);
    }
}

/* Makes codes of a row times a factor for each number, 64 by 64 into tiles. Where a number is not
 * finite, the step is not, and so is nothing that is read with it. */
INLINE struct steps encode(float *row, const float *factor, long count, bf16 *tiles) {
    __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY);
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < count; j += 16) {
        __m512 v = _mm512_load_ps(row + j);
        if (factor) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(factor + j));
            _mm512_store_ps(row + j, v);
        }
        least = _mm512_min_ps(least, v);
        most = _mm512_max_ps(most, v);
        sum = _mm512_add_ps(sum, v);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
    const float span = high - low > FLT_MIN * 255 ? high - low : FLT_MIN * 255;
    /* Neither minimum nor maximum knows what is not a number, but the sum does. */
    const float step = span / 255 + 0 * _mm512_reduce_add_ps(sum);
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

/* Makes codes of rows of states as a left operand of `width` tiles; rows up to the next multiple of
 * 32 keep the codes they have. */
INLINE void encode_rows(const bf16 *states, long stride, long rows, long count, const float *factor,
                        float *row, bf16 *tiles, struct steps *steps) {
    for (long r = 0; r < rows; r++) {
        load_row(states + r * stride, count, row);
        steps[r] = encode(row, factor, count, tiles + r / 16 * (count / 64) * TILE + r % 16 * 32);
    }
}

/* As bge_amx_linear. */
EXPORT KERNEL int bge_amx_int8_linear(const struct int8_linear *layer, const bf16 *states,
                                      int64_t rows, int64_t begin, int64_t end, int64_t inputs,
                                      int64_t outputs, bf16 *out, int64_t slice) {
    const long width = inputs / 64, part = part_of(end - begin, PROJECTED_ROWS);
    char *at = take_room(part * (inputs + 32 * sizeof(int32_t) + sizeof(struct steps)) +
                         inputs * sizeof(float) + 64);
    if (!at) return -1;
    bf16 *left = cut(&at, part * inputs, 1);
    int32_t *sums = cut(&at, part * 32, sizeof(int32_t));
    float *row = cut(&at, inputs, sizeof(float));
    struct steps *steps = cut(&at, part, sizeof(struct steps));
    begin_tiles();
    for (long start = begin; start < end; start += part) {
        const long count = end - start < part ? end - start : part;
        encode_rows(states + start * inputs, inputs, count, inputs, layer->factor, row, left, steps);
        for (long n = 0; n < outputs; n += 32) {
            const bf16 *panel = layer->packed + n * width * 32;
            multiply_int8(left, width, (count + 31) / 32, panel, width, sums, BLOCK,
                          panel + width * 2 * TILE);
            __m512 step[2], weights[2], bias[2];
            for (int i = 0; i < 2; i++) {
                step[i] = _mm512_loadu_ps(layer->step + n + 16 * i);
                weights[i] = _mm512_loadu_ps(layer->sums + n + 16 * i);
                bias[i] = _mm512_loadu_ps(layer->bias + n + 16 * i);
            }
            bf16 *to = out + (n / slice * rows + start) * slice + n % slice;
            for (long r = 0; r < count; r++)
                store(to + r * slice,
                      decode(sums + r * 32, steps[r], step[0], weights[0], bias[0]),
                      decode(sums + r * 32 + 16, steps[r], step[1], weights[1], bias[1]));
        }
    }
    end_tiles();
    return 0;
}

/* What comes after attention. The feed-forward block's inner numbers are made `chunk` at a time. */
struct int8_rest {
    int64_t hidden, intermediate, chunk;
    struct int8_linear output, up, down;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* As bge_amx_rest. */
EXPORT KERNEL int bge_amx_int8_rest(const struct int8_rest *layer, const bf16 *states,
                                    const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, width = hidden / 64, panels = hidden / 32;
    const long inner_all = layer->intermediate, chunk = layer->chunk;
    const long part = part_of(rows, LAYER_ROWS);
    /* A little longer than the chunk, so that rows do not fall on the same place of the cache. */
    const long stride = chunk + 32, row_size = hidden > chunk ? hidden : chunk;
    char *at = take_room(part * (hidden + chunk + (hidden + stride) * sizeof(bf16) +
                                 (hidden + 32) * sizeof(float) + 2 * sizeof(struct steps)) +
                         row_size * sizeof(float) + 128);
    if (!at) return -1;
    bf16 *left = cut(&at, part * hidden, 1);
    bf16 *inner_left = cut(&at, part * chunk, 1);
    bf16 *middle = cut(&at, part * hidden, sizeof(bf16));
    bf16 *inner = cut(&at, part * stride, sizeof(bf16));
    float *total = cut(&at, part * hidden, sizeof(float));
    int32_t *sums = cut(&at, part * 32, sizeof(int32_t));
    float *row = cut(&at, row_size, sizeof(float));
    struct steps *steps = cut(&at, part, sizeof(struct steps));
    struct steps *inner_steps = cut(&at, part, sizeof(struct steps));
    begin_tiles();
    for (long start = 0; start < rows; start += part) {
        const long count = rows - start < part ? rows - start : part, blocks = (count + 31) / 32;
        encode_rows(attended + start * hidden, hidden, count, hidden, layer->output.factor, row,
                    left, steps);
        int32_t *products = (int32_t *)total;
        for (long n = 0; n < panels; n++) {
            const bf16 *panel = layer->output.packed + n * width * 2 * TILE;
            multiply_int8(left, width, blocks, panel, width, products + n * BLOCK, panels * BLOCK,
                          n + 1 < panels ? panel + width * 2 * TILE : layer->up.packed);
        }
        for (long r = 0; r < count; r++) {
            const int32_t *from = products + r / 32 * panels * BLOCK + r % 32 * 32;
            for (long n = 0; n < hidden; n += 32) {
                __m512 residual[2];
                load(states + (start + r) * hidden + n, residual, residual + 1);
                for (int i = 0; i < 2; i++) {
                    const long j = n + 16 * i;
                    const __m512 more =
                        _mm512_add_ps(residual[i], _mm512_loadu_ps(layer->output.bias + j));
                    _mm512_store_ps(row + j,
                                    decode(from + n / 32 * BLOCK + 16 * i, steps[r],
                                           _mm512_loadu_ps(layer->output.step + j),
                                           _mm512_loadu_ps(layer->output.sums + j), more));
                }
            }
            norm_row(row, hidden, &layer->attention_norm, layer->epsilon);
            store_row(row, hidden, middle + r * hidden, 32);
            steps[r] = encode(row, layer->up.factor, hidden,
                              left + r / 16 * width * TILE + r % 16 * 32);
        }
        for (long from = 0; from < inner_all; from += chunk) {
            const long taken = inner_all - from < chunk ? inner_all - from : chunk;
            const bf16 *down = layer->down.packed + from / 64 * 2 * TILE;
            for (long n = from; n < from + taken; n += 32) {
                const bf16 *panel = layer->up.packed + n / 32 * width * 2 * TILE;
                multiply_int8(left, width, blocks, panel, width, sums, BLOCK,
                              n + 32 < from + taken ? panel + width * 2 * TILE : down);
                __m512 step[2], weights[2], bias[2];
                for (int i = 0; i < 2; i++) {
                    step[i] = _mm512_loadu_ps(layer->up.step + n + 16 * i);
                    weights[i] = _mm512_loadu_ps(layer->up.sums + n + 16 * i);
                    bias[i] = _mm512_loadu_ps(layer->up.bias + n + 16 * i);
                }
                for (long r = 0; r < count; r++)
                    store(inner + r * stride + n - from,
                          gelu(decode(sums + r * 32, steps[r], step[0], weights[0], bias[0])),
                          gelu(decode(sums + r * 32 + 16, steps[r], step[1], weights[1], bias[1])));
            }
            encode_rows(inner, stride, count, taken, NULL, row, inner_left, inner_steps);
            const float *chunk_sums = layer->down.sums + from / chunk * hidden;
            for (long n = 0; n < panels; n++) {
                const bf16 *panel = down + n * (inner_all / 64) * 2 * TILE;
                const bf16 *further = layer->up.packed + (from + taken) / 32 * width * 2 * TILE;
                multiply_int8(inner_left, taken / 64, blocks, panel, taken / 64, sums, BLOCK,
                              n + 1 < panels ? panel + inner_all / 64 * 2 * TILE : further);
                __m512 step[2], weights[2];
                for (int i = 0; i < 2; i++) {
                    step[i] = _mm512_loadu_ps(layer->down.step + n * 32 + 16 * i);
                    weights[i] = _mm512_loadu_ps(chunk_sums + n * 32 + 16 * i);
                }
                for (long r = 0; r < count; r++) {
                    float *to = total + (r / 32 * panels + n) * BLOCK + r % 32 * 32;
                    for (int i = 0; i < 2; i++) {
                        const __m512 before =
                            from ? _mm512_load_ps(to + 16 * i)
                                 : _mm512_loadu_ps(layer->down.bias + n * 32 + 16 * i);
                        _mm512_store_ps(to + 16 * i, decode(sums + r * 32 + 16 * i, inner_steps[r],
                                                            step[i], weights[i], before));
                    }
                }
            }
        }
        for (long r = 0; r < count; r++) {
            const float *from = total + r / 32 * panels * BLOCK + r % 32 * 32;
            load_row(middle + r * hidden, hidden, row);
            for (long j = 0; j < hidden; j += 16)
                _mm512_store_ps(row + j, _mm512_add_ps(_mm512_load_ps(row + j),
                                                       _mm512_load_ps(from + j / 32 * BLOCK + j % 32)));
            norm_row(row, hidden, &layer->output_norm, layer->epsilon);
            store_row(row, hidden, out + (start + r) * hidden, 32);
        }
    }
    end_tiles();
    return 0;
}
