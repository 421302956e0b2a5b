/* Attention in bfloat16 by AVX512-BF16. */

#define TARGET AVX512_BF16
#define HAS_AVX512_BF16

#include "products.h"

INLINE void multiply_bf16(const bf16 *states, long rows, const bf16 *panel, long depth, float *sums,
                          long stride) {
    for (long r = 0; r < rows; r += ROWS)
        multiply_rows(BFLOAT16, left_row((bf16 *)states, depth, r), panel, depth, sums + r * stride,
                      stride);
}

#define ATTENTION bge_avx512_bf16_attention
#define BEGIN() (void)0
#define END() (void)0

#include "bf16_attention.h"
