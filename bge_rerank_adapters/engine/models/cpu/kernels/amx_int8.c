/* Layers in 8 bits by AMX. */

#define TARGET AMX
#define HAS_AVX512_BF16

#include "tiles.h"

KERNEL static void multiply_int8(const bf16 *states, long width, long rows, const bf16 *panel,
                                 long depth, int32_t *sums, long apart, const bf16 *next) {
    multiply_panel(INTEGERS, states, width, (rows + 31) / 32, panel, depth, sums, apart, 0, next);
}

#define INT8_LINEAR bge_amx_int8_linear
#define INT8_AFTER_ATTENTION bge_amx_int8_after_attention
#define INT8_STACK_BEGIN bge_amx_int8_stack_begin
#define INT8_STACK_RUN bge_amx_int8_stack_run
#define BEGIN begin_tiles
#define END end_tiles

#include "int8.h"
#include "int8_stack.h"
