/* Attention in bfloat16, for every instruction set that multiplies it.
 *
 * A source that includes this has defined:
 *
 * - multiply_bf16(), which multiplies at most 32 rows of a left operand, `depth` tiles side by
 * side, with as many pairs of tiles of a panel; rows of sums are `stride` numbers apart;
 * - ATTENTION, the name of what is exported;
 * - BEGIN() and END(), around all products of a call.
 */

#include "attention.h"

/* Memory for one head of a pair; but for the last two, operands. */
struct work {
    bf16 *keys, *values, *asking, *weights;
    float *scores, *sums;
    long stride; /* of scores */
};

static int take_work(long filled, long head, struct work *work) {
    /* A little more than the keys, so that rows do not fall on the same place of the cache. */
    work->stride = filled + 16;
    char *at = take_room(sizeof(bf16) * (2 * filled * head + ASKED * head + ASKED * filled) +
                         sizeof(float) * (ASKED * work->stride + BLOCK));
    if (!at) return -1;
    work->keys = cut(&at, filled * head, sizeof(bf16));
    work->values = cut(&at, filled * head, sizeof(bf16));
    work->asking = cut(&at, ASKED * head, sizeof(bf16));
    work->weights = cut(&at, ASKED * filled, sizeof(bf16));
    work->scores = cut(&at, ASKED * work->stride, sizeof(float));
    work->sums = cut(&at, BLOCK, sizeof(float));
    return 0;
}

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

/* Weighs the values of a part for at most 32 queries, from the query `from`. */
KERNEL static void sum_values(const struct attention *all, const struct part *part,
                              const struct work *work, long from, const float *total) {
    const long depth = (part->count + 31) / 32, left = part->first + part->asked - from;
    const long taken = left < ASKED ? left : ASKED;
    for (long w = 0; w < all->head / 32; w++) {
        multiply_bf16(work->weights, taken, work->values + w * depth * 2 * TILE, depth, work->sums,
                      32);
        bf16 *to = all->out + (from * all->heads + part->head) * all->head + w * 32;
        for (long r = 0; r < taken; r++) {
            const float *sums = work->sums + r * 32;
            const __m512 share = _mm512_set1_ps(1 / total[r]);
            store(to + r * all->heads * all->head, _mm512_mul_ps(_mm512_load_ps(sums), share),
                  _mm512_mul_ps(_mm512_load_ps(sums + 16), share));
        }
    }
}

KERNEL static void attend(const struct attention *all, const struct part *part,
                          const struct work *work) {
    const long head = all->head, width = head / 32, depth = (part->count + 31) / 32;
    const long rows_before = part->head * all->rows + part->start;
    const __m512 scale = scale_of(head);
    to_right(all->key + rows_before * head, head, part->count, width, work->keys);
    values_to_right(all->value + rows_before * head, part->count, width, work->values);
    for (long from = part->first; from < part->first + part->asked; from += ASKED) {
        const long left = part->first + part->asked - from, taken = left < ASKED ? left : ASKED;
        float most[ASKED], total[ASKED];
        to_left(all->query + (part->head * all->asked_rows + from) * head, head, taken, width,
                work->asking);
        for (long n = 0; n < depth; n++)
            multiply_bf16(work->asking, taken, work->keys + n * width * 2 * TILE, width,
                          work->scores + n * 32, work->stride);
        /* In a loop of its own, so that a core does not wait for one row's before the next. */
        for (long r = 0; r < taken; r++)
            most[r] = largest(work->scores + r * work->stride, part->count);
        for (long r = 0; r < taken; r++)
            total[r] = weigh(work->scores + r * work->stride, part->count, most[r], scale,
                             LEFT_OPERAND, left_row(work->weights, depth, r));
        sum_values(all, part, work, from, total);
    }
}

/* Lets each pair attend to itself, in the heads from `begin` to `end`; attention.h says what lies
 * where. Returns 0, or -1 where memory is short. */
EXPORT KERNEL int ATTENTION(const bf16 *query, const bf16 *key, const bf16 *value,
                            const int32_t *bounds, int64_t pairs, int64_t heads, int64_t begin,
                            int64_t end, int64_t head, int32_t single, bf16 *out) {
    const long rows = bounds[pairs];
    const struct attention all = {query, key,  value,  bounds, rows, single ? pairs : rows,
                                  heads, head, single, out};
    struct work work;
    if (take_work(filled_keys(bounds, pairs), head, &work)) return -1;
    BEGIN();
    for (long pair = 0; pair < pairs; pair++)
        for (long h = begin; h < end; h++) {
            const struct part part = part_at(&all, pair, h);
            attend(&all, &part, &work);
        }
    END();
    return 0;
}
