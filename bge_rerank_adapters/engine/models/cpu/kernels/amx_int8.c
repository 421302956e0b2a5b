/* Layers in 8 bits by AMX. */

#define TARGET AMX
#define HAS_AVX512_BF16

#include "int8_rows.h"
#include "tiles.h"

INLINE void multiply_int8(const struct codes *codes, const bf16 *panel, int32_t *sums,
                          const bf16 *next, struct rest *rest, take_sums *take, const void *what) {
    multiply_panel(INTEGERS, codes->left, codes->width, codes->count, panel, codes->width, sums,
                   BLOCK, 0, next, rest, take, what);
}

#define INT8_LINEAR bge_amx_int8_linear
#define INT8_AFTER_ATTENTION bge_amx_int8_after_attention
#define INT8_STACK_MEMORY bge_amx_int8_stack_memory
#define INT8_STACK_RUN bge_amx_int8_stack_run
#define BEGIN begin_tiles
#define END end_tiles

#include "int8.h"
#include "int8_stack.h"
