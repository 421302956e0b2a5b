/* Rows of states in 8 bits: how they become codes, and what sums of products of codes come to.
 *
 * Weights have a step per output. States have one per row, that is per token, and the last products
 * of a layer one per row and chunk: a state is about code * step + least, with 255 steps from the
 * row's least number to its largest. So what is multiplied comes to
 * weight step * (step * sum of products + least * sum of weights).
 */

#ifndef BGE_INT8_ROWS_H
#define BGE_INT8_ROWS_H

#include <float.h>

#include "avx512.h"

/* How the codes of a row are read. */
struct steps {
    float step, least;
};

/* The range of a row's numbers, of which each 32 are taken as two halves: one alone would have to
 * wait for itself. */
struct range {
    __m512 least[2], most[2];
    __m512 nothing[2]; /* not a number, where there is what is not finite; otherwise zero */
};

INLINE struct range no_range(void) {
    const __m512 most = _mm512_set1_ps(-INFINITY), least = _mm512_set1_ps(INFINITY);
    return (struct range){{least, least}, {most, most}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
}

/* Multiplies half of 32 numbers by factors, if there are any, and widens the range by them. */
INLINE __m512 widen(struct range *range, int half, __m512 v, const float *factor) {
    if (factor) v = _mm512_mul_ps(v, _mm512_loadu_ps(factor + 16 * half));
    range->least[half] = _mm512_min_ps(range->least[half], v);
    range->most[half] = _mm512_max_ps(range->most[half], v);
    range->nothing[half] = _mm512_fmadd_ps(v, _mm512_setzero_ps(), range->nothing[half]);
    return v;
}

/* Makes codes of a row, 64 by 64 into tiles. Where a number is not finite, the step is not, and so
 * is nothing that is read with it. */
INLINE struct steps encode(const struct range *range, const float *row, long count, bf16 *tiles) {
    const float low = _mm512_reduce_min_ps(_mm512_min_ps(range->least[0], range->least[1]));
    const float high = _mm512_reduce_max_ps(_mm512_max_ps(range->most[0], range->most[1]));
    const float span = high - low > FLT_MIN * 255 ? high - low : FLT_MIN * 255;
    /* Neither minimum nor maximum knows what is not a number, but this sum of zeros does. */
    const __m512 nothing = _mm512_add_ps(range->nothing[0], range->nothing[1]);
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
INLINE __m512 decode(__m512i sums, struct steps steps, __m512 step, __m512 weights, __m512 more) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), step);
    const __m512 shifted = _mm512_fmadd_ps(weights, _mm512_set1_ps(steps.least), more);
    return _mm512_fmadd_ps(scaled, _mm512_set1_ps(steps.step), shifted);
}

/* Makes codes of the rows from `begin` to `end`, of `count` states each, as a left operand; rows up
 * to the next multiple of 32 keep the codes they have. */
INLINE void encode_rows(const bf16 *states, long stride, long begin, long end, long count,
                        const float *factor, float *row, bf16 *tiles, struct steps *steps) {
    for (long r = begin; r < end; r++) {
        struct range range = no_range();
        for (long j = 0; j < count; j += 32) {
            __m512 low, high;
            load(states + r * stride + j, &low, &high);
            _mm512_store_ps(row + j, widen(&range, 0, low, factor ? factor + j : NULL));
            _mm512_store_ps(row + j + 16, widen(&range, 1, high, factor ? factor + j : NULL));
        }
        steps[r] = encode(&range, row, count, left_row(tiles, count / 64, r));
    }
}

/* The codes of some rows, `width` tiles side by side. */
struct codes {
    long count, width;
    bf16 *left;
    struct steps *steps;
};

#endif
