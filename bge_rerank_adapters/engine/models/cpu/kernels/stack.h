/* All layers of an encoder for one pack, run by several threads together.
 *
 * For small packs reading the weights takes longer than multiplying with them. Threads that take
 * rows of their own each read all weights. Threads that share outputs each read a part of them.
 *
 * The layers are divided into stages; each needs all of the one before. A stage is divided into
 * parts. Each thread takes the next part that nobody has taken. Once none is left it waits for the
 * others, first spinning, then asleep. So a thread that comes late, or that the system holds up,
 * delays the others by one part at most. Every row goes through the same steps as it does in the
 * kernels for rows, so results are the same to the last bit.
 */

#ifndef BGE_STACK_H
#define BGE_STACK_H

#include "shared.h"

typedef int attention_kernel(const bf16 *, const bf16 *, const bf16 *, const int32_t *, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int32_t, bf16 *);

/* What threads have done of a pack; all zeros at first. */
struct progress {
    uint64_t next;     /* upper half: the stage; lower half: its next part that nobody has taken */
    uint32_t done;     /* parts of this stage that are done */
    uint32_t sleepers; /* threads that may be asleep */
    int32_t failed;    /* whether memory was short in any part */
};

/* A pack, of at least one row. In the last layer only the first row of each pair is computed beyond
 * key and value. */
struct pack {
    int64_t rows, pairs, heads, hidden, intermediate, layers, threads;
    const void *layer;     /* the layers, one after the other, as their kernels have them */
    const int32_t *bounds; /* as for attention */
    attention_kernel *attention;
    bf16 *states; /* what the first layer is given, shape (rows, hidden); it is overwritten */
    bf16 *first;  /* the output, shape (pairs, hidden) */
    char *memory; /* which all threads share, on a cache line of its own; see ..._stack_memory() */
    struct progress progress;
};

/* The stages of a layer, and over what each is divided. */
enum stage {
    GIVEN,       /* the layer's input as left operand: rows, in the first layer alone */
    PROJECT,     /* query, key and value: panels */
    ATTEND,      /* heads */
    ATTENDED,    /* what was attended to as left operand: rows asked for */
    OUTPUT,      /* the output projection: panels */
    MIDDLE,      /* norm: rows asked for */
    UP,          /* the feed-forward block's first half: panels */
    INNER_GIVEN, /* its inner numbers as left operand: rows asked for */
    DOWN,        /* its second half: panels */
    FINISH,      /* norm, and the next layer's input as left operand: rows asked for */
    STAGES,
};

/* Does a stage of a layer from `begin` to `end`; returns 0, or -1 where memory is short. */
typedef int stage_work(const struct pack *pack, long layer, long begin, long end);

static inline int is_last(const struct pack *pack, long layer) { return layer + 1 == pack->layers; }

/* How many rows a layer gives. */
static inline long asked_rows(const struct pack *pack, long layer) {
    return is_last(pack, layer) ? pack->pairs : pack->rows;
}

static inline long filled(long rows) { return (rows + 31) / 32 * 32; }

/* Runs what is left of a pack, in as many threads as call this. Returns once all of it is done: 0,
 * or -1 where memory was short in any thread. NULL stands for a stage that there is not. */
int run_stages(struct pack *pack, stage_work *const *stages);

/* The stage ATTEND, from what was projected to what was attended to. */
int attend_heads(const struct pack *pack, long layer, long begin, long end, const bf16 *projected,
                 bf16 *attended);

#endif
