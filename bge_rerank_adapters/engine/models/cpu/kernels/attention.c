/* Attention in bfloat16. */

#include "amx.h"

/* Lays out a pair's values, (keys, 32 * width), as a right operand whose inputs are the keys. */
KERNEL static void values_to_right(const bf16 *values, long keys, long width, bf16 *tiles) {
    const __m512i even =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    const __m512i zero = _mm512_setzero_si512();
    const long depth = (keys + 31) / 32;
    for (long r = 0; r < depth * 32; r += 2)
        for (long w = 0; w < width; w++) {
            const bf16 *from = values + (r * width + w) * 32;
            const __m512i first = r < keys ? _mm512_loadu_si512(from) : zero;
            const __m512i second = r + 1 < keys ? _mm512_loadu_si512(from + width * 32) : zero;
            bf16 *out = tiles + (w * depth + r / 32) * 2 * TILE + r % 32 / 2 * 32;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(first, even, second));
            _mm512_store_si512(out + TILE, _mm512_permutex2var_epi16(first, odd, second));
        }
}

/* Weighs one query's keys by softmax; returns what the weights, which become a row of a left
 * operand, add up to. */
INLINE float weigh(const float *scores, long keys, __m512 scale, bf16 *weights) {
    const long depth = (keys + 31) / 32, rest = keys - (depth - 1) * 32;
    const __mmask16 in_low = rest >= 16 ? 0xffff : (1u << rest) - 1;
    const __mmask16 in_high = rest <= 16 ? 0 : (1u << (rest - 16)) - 1;
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (long n = 0; n < depth - 1; n++) {
        const float *s = scores + n * 32;
        top = _mm512_max_ps(top, _mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16)));
    }
    const float *tail = scores + (depth - 1) * 32;
    top = _mm512_mask_max_ps(top, in_low, top, _mm512_load_ps(tail));
    top = _mm512_mask_max_ps(top, in_high, top, _mm512_load_ps(tail + 16));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long n = 0; n < depth; n++) {
        const float *s = scores + n * 32;
        __m512 l = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s), most), scale));
        __m512 h = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + 16), most), scale));
        if (n == depth - 1) {
            l = _mm512_maskz_mov_ps(in_low, l);
            h = _mm512_maskz_mov_ps(in_high, h);
        }
        low = _mm512_add_ps(low, l);
        high = _mm512_add_ps(high, h);
        store(weights + n * TILE, l, h);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(low, high));
}

/* Lets each pair attend to itself. Query, key and value have shape (heads, rows, head); pair i has
 * the rows from bounds[i] to bounds[i + 1] of key and value, and of query as well or, if `single`,
 * row i alone. The output has shape (the query's rows, heads * head); that of the heads from
 * `begin` to `end` is made. Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_attention(const bf16 *query, const bf16 *key, const bf16 *value,
                                    const int32_t *bounds, int64_t pairs, int64_t heads,
                                    int64_t begin, int64_t end, int64_t head, int32_t single,
                                    bf16 *out) {
    const long rows = bounds[pairs], width = head / 32;
    long longest = 0;
    for (long i = 0; i < pairs; i++)
        if (bounds[i + 1] - bounds[i] > longest) longest = bounds[i + 1] - bounds[i];
    const long filled = (longest + 31) / 32 * 32;
    /* A little more than the keys, so that rows do not fall on the same place of the cache. */
    const long stride = filled + 16;
    char *at = take_room(sizeof(bf16) * (2 * filled * head + 32 * head + 32 * filled) +
                         sizeof(float) * (32 * stride + BLOCK));
    if (!at) return -1;
    bf16 *keys = cut(&at, filled * head, sizeof(bf16));
    bf16 *values = cut(&at, filled * head, sizeof(bf16));
    bf16 *asking = cut(&at, 32 * head, sizeof(bf16));
    bf16 *weights = cut(&at, 32 * filled, sizeof(bf16));
    float *scores = cut(&at, 32 * stride, sizeof(float));
    float *sums = cut(&at, BLOCK, sizeof(float));
    const __m512 scale = _mm512_set1_ps(1.4426950408889634f / sqrtf((float)head));
    begin_tiles();
    for (long pair = 0; pair < pairs; pair++) {
        const long start = bounds[pair], count = bounds[pair + 1] - start;
        const long depth = (count + 31) / 32;
        const long first = single ? pair : start, asked = single ? 1 : count;
        for (long h = begin; h < end; h++) {
            to_right(key + (h * rows + start) * head, head, count, width, keys);
            values_to_right(value + (h * rows + start) * head, count, width, values);
            for (long q = first; q < first + asked; q += 32) {
                const long taken = first + asked - q < 32 ? first + asked - q : 32;
                to_left(query + (h * (single ? pairs : rows) + q) * head, head, taken, width,
                        asking);
                for (long n = 0; n < depth; n++)
                    multiply(BFLOAT16, asking, asking + width * TILE, keys + n * width * 2 * TILE,
                             width, scores + n * 32, stride, 0, NULL, 0);
                float total[32];
                for (long r = 0; r < taken; r++)
                    total[r] = weigh(scores + r * stride, count, scale,
                                     weights + r / 16 * depth * TILE + r % 16 * 32);
                for (long w = 0; w < width; w++) {
                    multiply(BFLOAT16, weights, weights + depth * TILE,
                             values + w * depth * 2 * TILE, depth, sums, 32, 0, NULL, 0);
                    bf16 *to = out + q * heads * head + h * head + w * 32;
                    for (long r = 0; r < taken; r++) {
                        const __m512 share = _mm512_set1_ps(1 / total[r]);
                        store(to + r * heads * head,
                              _mm512_mul_ps(_mm512_load_ps(sums + r * 32), share),
                              _mm512_mul_ps(_mm512_load_ps(sums + r * 32 + 16), share));
                    }
                }
            }
        }
    }
    end_tiles();
    return 0;
}
