/* Attention: which rows a pair has, and softmax.
 *
 * Query, key and value have shape (heads, rows, head); pair i has the rows from bounds[i] to
 * bounds[i + 1] of key and value, at least one, and of query as well or, if `single`, row i alone.
 * The output has shape (the query's rows, heads * head).
 */

#ifndef BGE_ATTENTION_H
#define BGE_ATTENTION_H

#include "avx512.h"

enum { ASKED = 32 /* queries that are taken at a time */ };

/* What a call is given. */
struct attention {
    const bf16 *query, *key, *value;
    const int32_t *bounds;
    long rows, asked_rows, heads, head; /* rows of key and value, and of query */
    int single;
    bf16 *out;
};

/* One head of one pair: where its keys and queries begin, and their numbers. */
struct part {
    long head, start, count, first, asked;
};

static inline struct part part_at(const struct attention *all, long pair, long head) {
    const long start = all->bounds[pair], count = all->bounds[pair + 1] - start;
    return (struct part){head, start, count, all->single ? pair : start, all->single ? 1 : count};
}

/* The most keys that a pair has, filled up to a multiple of 32. */
static inline long filled_keys(const int32_t *bounds, long pairs) {
    long longest = 0;
    for (long i = 0; i < pairs; i++)
        if (bounds[i + 1] - bounds[i] > longest) longest = bounds[i + 1] - bounds[i];
    return (longest + 31) / 32 * 32;
}

/* What scores are multiplied by, for weights that are powers of two. */
INLINE __m512 scale_of(long head) {
    return _mm512_set1_ps(1.4426950408889634f / sqrtf((float)head));
}

/* What becomes of a query's weights: a row of a left operand, or numbers in place of the scores. */
enum weights_as { LEFT_OPERAND, IN_PLACE };

/* The keys in the last 32 of a row's scores. */
struct tail {
    __mmask16 low, high;
};

static inline struct tail tail_of(long keys) {
    const long rest = (keys - 1) % 32 + 1;
    return (struct tail){rest >= 16 ? 0xffff : (1u << rest) - 1,
                         rest <= 16 ? 0 : (1u << (rest - 16)) - 1};
}

/* The largest score of a query's keys, at least one. */
INLINE float largest(const float *scores, long keys) {
    const struct tail tail = tail_of(keys);
    __m512 low = _mm512_set1_ps(-INFINITY), high = low;
    for (; keys > 32; keys -= 32, scores += 32) {
        low = _mm512_max_ps(low, _mm512_load_ps(scores));
        high = _mm512_max_ps(high, _mm512_load_ps(scores + 16));
    }
    low = _mm512_mask_max_ps(low, tail.low, low, _mm512_load_ps(scores));
    high = _mm512_mask_max_ps(high, tail.high, high, _mm512_load_ps(scores + 16));
    return _mm512_reduce_max_ps(_mm512_max_ps(low, high));
}

/* Weighs one query's keys, at least one, by softmax, given the largest score; returns what the
 * weights add up to. */
INLINE float weigh(float *scores, long keys, float largest, __m512 scale, enum weights_as as,
                   bf16 *weights) {
    const long depth = (keys + 31) / 32;
    const struct tail tail = tail_of(keys);
    const __m512 most = _mm512_set1_ps(largest);
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long n = 0; n < depth; n++) {
        float *s = scores + n * 32;
        __m512 l = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s), most), scale));
        __m512 h = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + 16), most), scale));
        if (n == depth - 1) {
            l = _mm512_maskz_mov_ps(tail.low, l);
            h = _mm512_maskz_mov_ps(tail.high, h);
        }
        low = _mm512_add_ps(low, l);
        high = _mm512_add_ps(high, h);
        if (as == LEFT_OPERAND) {
            store(weights + n * TILE, l, h);
        } else {
            _mm512_store_ps(s, l);
            _mm512_store_ps(s + 16, h);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(low, high));
}

#endif
