/* Layers in 8 bits by AVX512-VNNI. */

#define TARGET AVX512_VNNI

#include "int8_rows.h"
#include "products.h"

/* There is none: sums are taken from registers, at once. */
struct rest {
    char nothing;
};

INLINE void take_rest(const struct rest *rest, take_sums *take) { (void)rest, (void)take; }

INLINE void multiply_int8(const struct codes *codes, const bf16 *panel, int32_t *sums,
                          const bf16 *next, struct rest *rest, take_sums *take, const void *what) {
    (void)sums, (void)rest;
    /* So many cache lines of the next panel are brought to the second level with each 8 rows. */
    const long lines = (codes->width * 32 * ROWS + codes->count - 1) / codes->count;
    const char *ahead = (const char *)next, *last = ahead + codes->width * 2048;
    for (long from = 0; from < codes->count; from += ROWS) {
        __m512i found[ROWS][2];
        for (long i = 0; i < lines && ahead < last; i++, ahead += 64)
            _mm_prefetch(ahead, _MM_HINT_T1);
        multiply_rows(INTEGERS, left_row(codes->left, codes->width, from), panel, codes->width,
                      found);
        const long left = codes->count - from;
        for (int r = 0; r < ROWS; r++)
            if (r < left) take(what, from + r, found[r][0], found[r][1]);
    }
}

#define INT8_LINEAR bge_avx512_vnni_int8_linear
#define INT8_AFTER_ATTENTION bge_avx512_vnni_int8_after_attention
#define INT8_STACK_MEMORY bge_avx512_vnni_int8_stack_memory
#define INT8_STACK_RUN bge_avx512_vnni_int8_stack_run
#define BEGIN() (void)0
#define END() (void)0

#include "int8.h"
#include "int8_stack.h"
