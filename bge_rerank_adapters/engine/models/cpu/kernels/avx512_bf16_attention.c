/* Attention in bfloat16 by AVX512-BF16. */

#define TARGET AVX512_BF16
#define HAS_AVX512_BF16

#include "products.h"

INLINE void multiply_bf16(const bf16 *states, long rows, const bf16 *panel, long depth, float *sums,
                          long stride) {
    for (long from = 0; from < rows; from += ROWS) {
        __m512i found[ROWS][2];
        multiply_rows(BFLOAT16, left_row((bf16 *)states, depth, from), panel, depth, found);
        for (int r = 0; r < ROWS; r++) {
            _mm512_store_si512(sums + (from + r) * stride, found[r][0]);
            _mm512_store_si512(sums + (from + r) * stride + 16, found[r][1]);
        }
    }
}

#define ATTENTION bge_avx512_bf16_attention
#define BEGIN() (void)0
#define END() (void)0

#include "bf16_attention.h"
