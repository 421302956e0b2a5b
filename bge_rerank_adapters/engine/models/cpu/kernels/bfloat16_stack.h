/* All layers in bfloat16 by AMX for one pack; stack.h says how threads share them.
 *
 * A part of amx_bfloat16.c.
 */

#include "stack.h"

/* A product with all rows, or with the first rows of pairs. */
struct projection {
    struct linear linear;
    int64_t outputs;
};

struct stack_layer {
    struct projection of_all, of_first; /* the second one only in the last layer */
    const struct layer *after;
};

/* What threads share. */
struct memory {
    struct given all, first; /* a layer's input: all rows, and the pairs' first ones */
    bf16 *projected;         /* query, key and value, each of shape (heads, rows, head) */
    bf16 *attended;
    struct work work; /* with all inner numbers; `row` and `few` belong to each thread */
};

static size_t memory_size(const struct pack *pack) {
    const size_t rows = filled(pack->rows), hidden = pack->hidden, inner = pack->intermediate;
    return rows * ((7 * hidden + inner) * sizeof(bf16) + hidden * sizeof(float));
}

static struct memory memory_of(const struct pack *pack, long layer) {
    const long rows = filled(pack->rows), hidden = pack->hidden, inner = pack->intermediate;
    const long asked = asked_rows(pack, layer), width = hidden / 32;
    char *at = pack->memory;
    struct memory memory = {.all = {pack->rows, width}, .first = {pack->pairs, width}};
    struct work *work = &memory.work;
    work->given.count = work->inner.count = asked;
    work->given.width = width;
    work->inner.width = inner / 32;
    memory.all.left = cut(&at, rows * hidden, sizeof(bf16));
    memory.first.left = cut(&at, rows * hidden, sizeof(bf16));
    work->given.left = cut(&at, rows * hidden, sizeof(bf16));
    memory.projected = cut(&at, rows * 3 * hidden, sizeof(bf16));
    memory.attended = cut(&at, rows * hidden, sizeof(bf16));
    work->inner.left = cut(&at, rows * inner, sizeof(bf16));
    work->sums = cut(&at, rows * hidden, sizeof(float));
    return memory;
}

static const struct stack_layer *layer_at(const struct pack *pack, long layer) {
    return (const struct stack_layer *)pack->layer + layer;
}

/* Takes the calling thread's memory for one row and the sums of a panel. */
static int take_own(const struct pack *pack, struct work *work) {
    const long rows = filled(pack->rows);
    char *at = take_room((rows * 32 + pack->hidden) * sizeof(float));
    if (!at) return -1;
    work->few = cut(&at, rows * 32, sizeof(float));
    work->row = cut(&at, pack->hidden, sizeof(float));
    return 0;
}

/* Lays out the rows from `begin` to `end`; with the last one, zeros up to a multiple of 32. */
KERNEL static void lay_out(const bf16 *states, long hidden, long begin, long end,
                           const struct given *given) {
    const long to = end == given->count ? filled(end) : end;
    for (long r = begin; r < to; r++)
        for (long k = 0; k < given->width; k++)
            _mm512_store_si512(left_row(given->left, given->width, r) + k * TILE,
                               r < end ? _mm512_loadu_si512(states + r * hidden + k * 32)
                                       : _mm512_setzero_si512());
}

/* The stage GIVEN; in the last layer the pairs' first rows as well. */
KERNEL static int lay_out_given(const struct pack *pack, long layer, long begin, long end) {
    const struct memory memory = memory_of(pack, layer);
    const long hidden = pack->hidden;
    lay_out(pack->states, hidden, begin, end, &memory.all);
    for (long i = 0; is_last(pack, layer) && i < pack->pairs; i++) {
        const long row = pack->bounds[i];
        if (row < begin || row >= end) continue;
        memcpy(pack->first + i * hidden, pack->states + row * hidden, hidden * sizeof(bf16));
        lay_out(pack->first, hidden, i, i + 1, &memory.first);
    }
    return 0;
}

KERNEL static int project(const struct pack *pack, long layer, long begin, long end) {
    const struct stack_layer *here = layer_at(pack, layer);
    struct memory memory = memory_of(pack, layer);
    const long head = pack->hidden / pack->heads, of_first = here->of_first.outputs;
    if (take_own(pack, &memory.work)) return -1;
    begin_tiles();
    const long from = begin * 32, to = end * 32, rows = pack->rows;
    const struct slices firsts = {memory.projected, pack->pairs, head};
    const struct slices all = {memory.projected + of_first * rows, rows, head};
    if (from < of_first)
        linear_panels(&here->of_first.linear, &memory.first, from, to < of_first ? to : of_first,
                      memory.work.few, &firsts);
    if (to > of_first)
        linear_panels(&here->of_all.linear, &memory.all, from > of_first ? from - of_first : 0,
                      to - of_first, memory.work.few, &all);
    end_tiles();
    return 0;
}

static int attend(const struct pack *pack, long layer, long begin, long end) {
    const struct memory memory = memory_of(pack, layer);
    return attend_heads(pack, layer, begin, end, memory.projected, memory.attended);
}

KERNEL static int lay_out_attended(const struct pack *pack, long layer, long begin, long end) {
    const struct memory memory = memory_of(pack, layer);
    lay_out(memory.attended, pack->hidden, begin, end, &memory.work.given);
    return 0;
}

KERNEL static int output_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct layer *after = layer_at(pack, layer)->after;
    const struct memory memory = memory_of(pack, layer);
    begin_tiles();
    for (long n = begin; n < end; n++)
        output_panel(after, &memory.work, n, after->output + (n + 1) * pack->hidden * 32);
    end_tiles();
    return 0;
}

KERNEL static int norm_rows(const struct pack *pack, long layer, long begin, long end) {
    struct memory memory = memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    norm_middle(layer_at(pack, layer)->after, &memory.work,
                is_last(pack, layer) ? pack->first : pack->states, begin, end);
    return 0;
}

KERNEL static int up_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct layer *after = layer_at(pack, layer)->after;
    struct memory memory = memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    begin_tiles();
    up_panels(after, &memory.work, 0, begin * 32, end * 32, after->up + end * pack->hidden * 32);
    end_tiles();
    return 0;
}

KERNEL static int down_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct layer *after = layer_at(pack, layer)->after;
    const struct memory memory = memory_of(pack, layer);
    begin_tiles();
    for (long n = begin; n < end; n++)
        down_panel(after, &memory.work, 0, n, after->down + (n + 1) * pack->intermediate * 32);
    end_tiles();
    return 0;
}

KERNEL static int finish_rows(const struct pack *pack, long layer, long begin, long end) {
    struct memory memory = memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    finish(layer_at(pack, layer)->after, &memory.work, begin, end,
           is_last(pack, layer) ? pack->first : pack->states);
    return is_last(pack, layer) ? 0 : lay_out_given(pack, layer + 1, begin, end);
}

/* How many bytes of memory the threads of a pack share. */
EXPORT int64_t bge_amx_stack_memory(const struct pack *pack) { return memory_size(pack); }

/* Runs what is left of a pack, in each thread that calls this; see run_stages(). */
EXPORT int bge_amx_stack_run(struct pack *pack) {
    static stage_work *const stages[STAGES] = {
        [GIVEN] = lay_out_given, [PROJECT] = project,
        [ATTEND] = attend,       [ATTENDED] = lay_out_attended,
        [OUTPUT] = output_stage, [MIDDLE] = norm_rows,
        [UP] = up_stage,         [DOWN] = down_stage,
        [FINISH] = finish_rows,
    };
    return run_stages(pack, stages);
}
