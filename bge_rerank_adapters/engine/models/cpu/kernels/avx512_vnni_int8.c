/* Layers in 8 bits by AVX512-VNNI. */

#define TARGET AVX512_VNNI

#include "products.h"

KERNEL static void multiply_int8(const bf16 *states, long width, long rows, const bf16 *panel,
                                 long depth, int32_t *sums, long apart, const bf16 *next) {
    (void)next; /* rows take long enough for the processor to read ahead by itself */
    for (long r = 0; r < rows; r += ROWS)
        multiply_rows(INTEGERS, left_row((bf16 *)states, width, r), panel, depth,
                      sums + r / 32 * apart + r % 32 * 32, 32);
}

#define INT8_LINEAR bge_avx512_vnni_int8_linear
#define INT8_AFTER_ATTENTION bge_avx512_vnni_int8_after_attention
#define INT8_STACK_BEGIN bge_avx512_vnni_int8_stack_begin
#define INT8_STACK_RUN bge_avx512_vnni_int8_stack_run
#define BEGIN() (void)0
#define END() (void)0

#include "int8.h"
#include "int8_stack.h"
