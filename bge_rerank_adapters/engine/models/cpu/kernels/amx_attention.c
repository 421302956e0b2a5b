/* Attention in bfloat16 by AMX. */

#define TARGET AMX
#define HAS_AVX512_BF16

#include "tiles.h"

INLINE void multiply_bf16(const bf16 *states, long rows, const bf16 *panel, long depth, float *sums,
                          long stride) {
    (void)rows; /* tiles have all of them */
    const struct product by = {.upper = states,
                               .lower = states + depth * TILE,
                               .states_stay = 1,
                               .panel = panel,
                               .depth = depth,
                               .near = depth,
                               .sums = sums,
                               .stride = stride};
    multiply(BFLOAT16, &by, NULL, NULL);
}

#define ATTENTION bge_amx_attention
#define BEGIN begin_tiles
#define END end_tiles

#include "bf16_attention.h"
