/* Attention in float32 by AVX512, of what lies in bfloat16. */

#define TARGET AVX512

#include "attention.h"

enum { ROWS = 8 /* that are multiplied at a time: their sums and 32 numbers fit registers */ };

/* Memory for one head of a pair, in float32. */
struct work {
    float *keys;   /* [keys / 32][head][32 keys] */
    float *values; /* [head / 32][keys][32] */
    float *asking, *scores;
    long stride; /* of scores */
};

static int take_work(long filled, long head, struct work *work) {
    /* A little more than the keys, so that rows do not fall on the same place of the cache. */
    work->stride = filled + 16;
    char *at = take_room(sizeof(float) * (2 * filled * head + ASKED * (head + work->stride)));
    if (!at) return -1;
    work->keys = cut(&at, filled * head, sizeof(float));
    work->values = cut(&at, filled * head, sizeof(float));
    work->asking = cut(&at, ASKED * head, sizeof(float));
    work->scores = cut(&at, ASKED * work->stride, sizeof(float));
    return 0;
}

INLINE __m512 widened(const bf16 *from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Lays out keys so that 32 of them lie side by side; those beyond the last one are zeros. */
KERNEL static void lay_out_keys(const bf16 *keys, long count, long head, float *out) {
    for (long group = 0; group < (count + 31) / 32 * 2; group++)
        for (long j = 0; j < head; j += 16) {
            __m512i v[16];
            for (long i = 0; i < 16; i++) {
                const long key = group * 16 + i;
                v[i] = key < count ? _mm512_castps_si512(widened(keys + key * head + j))
                                   : _mm512_setzero_si512();
            }
            transpose(v);
            float *to = out + (group / 2 * head + j) * 32 + group % 2 * 16;
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, v[i]);
        }
}

/* Lays out values so that 32 numbers of one lie before those of the next. */
KERNEL static void lay_out_values(const bf16 *values, long count, long head, float *out) {
    for (long key = 0; key < count; key++)
        for (long j = 0; j < head; j += 16)
            _mm512_store_ps(out + (j / 32 * count + key) * 32 + j % 32,
                            widened(values + key * head + j));
}

struct sums {
    __m512 of[ROWS][2];
};

/* Multiplies 8 rows, `stride` numbers from each other, with `depth` times 32 numbers. */
INLINE struct sums multiply_rows(const float *rows, long stride, const float *numbers, long depth) {
    struct sums sums;
    for (int r = 0; r < ROWS; r++) sums.of[r][0] = sums.of[r][1] = _mm512_setzero_ps();
    for (long k = 0; k < depth; k++) {
        const __m512 low = _mm512_load_ps(numbers + k * 32);
        const __m512 high = _mm512_load_ps(numbers + k * 32 + 16);
        for (int r = 0; r < ROWS; r++) {
            const __m512 given = _mm512_set1_ps(rows[r * stride + k]);
            sums.of[r][0] = _mm512_fmadd_ps(given, low, sums.of[r][0]);
            sums.of[r][1] = _mm512_fmadd_ps(given, high, sums.of[r][1]);
        }
    }
    return sums;
}

/* Scores keys for 8 queries from the row `r` of those that are asked. */
KERNEL static void score(const struct work *work, long r, long count, long head) {
    for (long key = 0; key < count; key += 32) {
        const struct sums sums =
            multiply_rows(work->asking + r * head, head, work->keys + key * head, head);
        for (int i = 0; i < ROWS; i++) {
            float *to = work->scores + (r + i) * work->stride + key;
            _mm512_store_ps(to, sums.of[i][0]);
            _mm512_store_ps(to + 16, sums.of[i][1]);
        }
    }
}

/* Adds up values for 8 queries, of which `taken` are wanted, from row `r`; `to` is the first one's
 * output. */
KERNEL static void sum_values(const struct attention *all, const struct work *work, long r,
                              long count, long taken, const float *total, bf16 *to) {
    for (long j = 0; j < all->head; j += 32) {
        const struct sums sums = multiply_rows(work->scores + r * work->stride, work->stride,
                                               work->values + j * count, count);
        for (int i = 0; i < ROWS && i < taken; i++) {
            const __m512 share = _mm512_set1_ps(1 / total[r + i]);
            store(to + i * all->heads * all->head + j, _mm512_mul_ps(sums.of[i][0], share),
                  _mm512_mul_ps(sums.of[i][1], share));
        }
    }
}

/* Attends from at most 32 queries. */
KERNEL static void ask(const struct attention *all, const struct part *part,
                       const struct work *work, long from) {
    const long head = all->head, left = part->first + part->asked - from;
    const long taken = left < ASKED ? left : ASKED;
    const bf16 *query = all->query + (part->head * all->asked_rows + from) * head;
    const __m512 scale = scale_of(head);
    float most[ASKED], total[ASKED];
    for (long r = 0; r < taken; r++) load_row(query + r * head, head, work->asking + r * head);
    for (long r = 0; r < taken; r += ROWS) {
        score(work, r, part->count, head);
        const long wanted = taken - r < ROWS ? taken - r : ROWS;
        for (long i = r; i < r + wanted; i++)
            most[i] = largest(work->scores + i * work->stride, part->count);
        for (long i = r; i < r + wanted; i++)
            total[i] =
                weigh(work->scores + i * work->stride, part->count, most[i], scale, IN_PLACE, NULL);
        sum_values(all, work, r, part->count, wanted, total,
                   all->out + ((from + r) * all->heads + part->head) * head);
    }
}

/* As bge_amx_attention. */
EXPORT KERNEL int bge_avx512_vnni_attention(const bf16 *query, const bf16 *key, const bf16 *value,
                                            const int32_t *bounds, int64_t pairs, int64_t heads,
                                            int64_t begin, int64_t end, int64_t head,
                                            int32_t single, bf16 *out) {
    const long rows = bounds[pairs];
    const struct attention all = {query, key,  value,  bounds, rows, single ? pairs : rows,
                                  heads, head, single, out};
    struct work work;
    if (take_work(filled_keys(bounds, pairs), head, &work)) return -1;
    for (long pair = 0; pair < pairs; pair++)
        for (long h = begin; h < end; h++) {
            const struct part part = part_at(&all, pair, h);
            const long before = (h * all.rows + part.start) * head;
            lay_out_keys(key + before, part.count, head, work.keys);
            lay_out_values(value + before, part.count, head, work.values);
            for (long from = part.first; from < part.first + part.asked; from += ASKED)
                ask(&all, &part, &work, from);
        }
    return 0;
}
