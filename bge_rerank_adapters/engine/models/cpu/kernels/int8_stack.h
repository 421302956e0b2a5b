/* All layers in 8 bits for one pack; stack.h says how threads share them.
 *
 * A source that includes this has included int8.h before, and defined INT8_STACK_MEMORY and
 * INT8_STACK_RUN, the names of what is exported.
 */

#include "stack.h"

/* A product with all rows, or with the first rows of pairs. */
struct int8_projection {
    struct int8_linear linear;
    int64_t outputs;
};

struct int8_stack_layer {
    struct int8_projection of_all, of_first; /* the second one only in the last layer */
    const struct int8_layer *after;
};

/* What threads share. */
struct int8_memory {
    struct codes all, first; /* of a layer's input: of all rows, and of the pairs' first ones */
    bf16 *projected;         /* query, key and value, each of shape (heads, rows, head) */
    bf16 *attended;
    struct work work; /* with all inner numbers; `row` and `sums` belong to each thread */
};

static size_t int8_memory_size(const struct pack *pack) {
    const size_t rows = filled(pack->rows), hidden = pack->hidden, inner = pack->intermediate;
    /* There are as many chunks as 64 inner numbers at most. */
    return rows * (3 * hidden + 3 * hidden * sizeof(bf16) + 2 * hidden * sizeof(bf16) + inner +
                   (inner + 32) * sizeof(bf16) + hidden * sizeof(float) +
                   (3 + inner / 64) * sizeof(struct steps));
}

static struct int8_memory int8_memory_of(const struct pack *pack, long layer) {
    const long rows = filled(pack->rows), hidden = pack->hidden, inner = pack->intermediate;
    const long asked = asked_rows(pack, layer), width = hidden / 64;
    char *at = pack->memory;
    struct int8_memory memory = {.all = {pack->rows, width}, .first = {pack->pairs, width}};
    struct work *work = &memory.work;
    work->stride = inner + 32;
    work->given.count = work->inner_given.count = asked;
    work->given.width = width;
    memory.all.left = cut(&at, rows * hidden, 1);
    memory.first.left = cut(&at, rows * hidden, 1);
    work->given.left = cut(&at, rows * hidden, 1);
    memory.projected = cut(&at, rows * 3 * hidden, sizeof(bf16));
    memory.attended = cut(&at, rows * hidden, sizeof(bf16));
    work->middle = cut(&at, rows * hidden, sizeof(bf16));
    work->inner_given.left = cut(&at, rows * inner, 1);
    work->inner = cut(&at, rows * work->stride, sizeof(bf16));
    work->total = cut(&at, rows * hidden, sizeof(float));
    memory.all.steps = cut(&at, rows, sizeof(struct steps));
    memory.first.steps = cut(&at, rows, sizeof(struct steps));
    work->given.steps = cut(&at, rows, sizeof(struct steps));
    work->inner_given.steps = cut(&at, rows * (inner / 64), sizeof(struct steps));
    return memory;
}

static const struct int8_stack_layer *int8_layer_at(const struct pack *pack, long layer) {
    return (const struct int8_stack_layer *)pack->layer + layer;
}

/* Takes the calling thread's memory for one row and the sums of a panel. */
static int take_own(const struct pack *pack, struct work *work) {
    const long rows = filled(pack->rows), hidden = pack->hidden, inner = pack->intermediate;
    const long longest = hidden > inner ? hidden : inner;
    char *at = take_room(rows * 32 * sizeof(int32_t) + longest * sizeof(float));
    if (!at) return -1;
    work->sums = cut(&at, rows * 32, sizeof(int32_t));
    work->row = cut(&at, longest, sizeof(float));
    return 0;
}

/* The inner numbers of the chunk that begins at `from`: where they are, and their codes. */
static struct work chunk_at(const struct int8_layer *layer, const struct work *work, long from) {
    struct work chunk = *work;
    const long rows = work->inner_given.count, left = layer->intermediate - from;
    chunk.inner += from;
    chunk.inner_given.left += from / 2 * filled(rows);
    chunk.inner_given.steps += from / layer->chunk * rows;
    chunk.inner_given.width = (left < layer->chunk ? left : layer->chunk) / 64;
    return chunk;
}

/* The stage GIVEN; in the last layer the pairs' first rows as well. */
KERNEL static int code_given(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_stack_layer *here = int8_layer_at(pack, layer);
    struct int8_memory memory = int8_memory_of(pack, layer);
    const long hidden = pack->hidden;
    if (take_own(pack, &memory.work)) return -1;
    encode_rows(pack->states, hidden, begin, end, hidden, here->of_all.linear.factor,
                memory.work.row, memory.all.left, memory.all.steps);
    for (long i = 0; is_last(pack, layer) && i < pack->pairs; i++) {
        const long row = pack->bounds[i];
        if (row < begin || row >= end) continue;
        memcpy(pack->first + i * hidden, pack->states + row * hidden, hidden * sizeof(bf16));
        encode_rows(pack->first, hidden, i, i + 1, hidden, here->of_first.linear.factor,
                    memory.work.row, memory.first.left, memory.first.steps);
    }
    return 0;
}

KERNEL static int project(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_stack_layer *here = int8_layer_at(pack, layer);
    struct int8_memory memory = int8_memory_of(pack, layer);
    const long head = pack->hidden / pack->heads, of_first = here->of_first.outputs;
    if (take_own(pack, &memory.work)) return -1;
    BEGIN();
    const long from = begin * 32, to = end * 32, rows = pack->rows;
    const struct slices firsts = {memory.projected, pack->pairs, head};
    const struct slices all = {memory.projected + of_first * rows, rows, head};
    if (from < of_first)
        linear_panels(&here->of_first.linear, &memory.first, from, to < of_first ? to : of_first,
                      memory.work.sums, &firsts);
    if (to > of_first)
        linear_panels(&here->of_all.linear, &memory.all, from > of_first ? from - of_first : 0,
                      to - of_first, memory.work.sums, &all);
    END();
    return 0;
}

static int attend(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_memory memory = int8_memory_of(pack, layer);
    return attend_heads(pack, layer, begin, end, memory.projected, memory.attended);
}

KERNEL static int code_attended(const struct pack *pack, long layer, long begin, long end) {
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    encode_rows(memory.attended, pack->hidden, begin, end, pack->hidden,
                int8_layer_at(pack, layer)->after->output.factor, memory.work.row,
                memory.work.given.left, memory.work.given.steps);
    return 0;
}

KERNEL static int output_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_layer *after = int8_layer_at(pack, layer)->after;
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    BEGIN();
    output_panels(after, &memory.work, begin, end,
                  is_last(pack, layer) ? pack->first : pack->states,
                  after->output.packed + end * pack->hidden * 16);
    END();
    return 0;
}

KERNEL static int norm_rows(const struct pack *pack, long layer, long begin, long end) {
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    norm_middle(int8_layer_at(pack, layer)->after, &memory.work, begin, end);
    return 0;
}

KERNEL static int up_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_layer *after = int8_layer_at(pack, layer)->after;
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    BEGIN();
    up_panels(after, &memory.work, 0, begin * 32, end * 32,
              after->up.packed + end * pack->hidden * 16);
    END();
    return 0;
}

KERNEL static int code_inner(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_layer *after = int8_layer_at(pack, layer)->after;
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    for (long from = 0; from < pack->intermediate; from += after->chunk) {
        const struct work chunk = chunk_at(after, &memory.work, from);
        encode_rows(chunk.inner, chunk.stride, begin, end, chunk.inner_given.width * 64, NULL,
                    chunk.row, chunk.inner_given.left, chunk.inner_given.steps);
    }
    return 0;
}

KERNEL static int down_stage(const struct pack *pack, long layer, long begin, long end) {
    const struct int8_layer *after = int8_layer_at(pack, layer)->after;
    struct int8_memory memory = int8_memory_of(pack, layer);
    const long inner = pack->intermediate, chunk = after->chunk;
    if (take_own(pack, &memory.work)) return -1;
    BEGIN();
    for (long n = begin; n < end; n++)
        for (long from = 0; from < inner; from += chunk) {
            const struct work part = chunk_at(after, &memory.work, from);
            down_panels(after, &part, from, n, n + 1,
                        after->down.packed + (n * inner + from + chunk) * 16);
        }
    END();
    return 0;
}

KERNEL static int finish_rows(const struct pack *pack, long layer, long begin, long end) {
    struct int8_memory memory = int8_memory_of(pack, layer);
    if (take_own(pack, &memory.work)) return -1;
    finish(int8_layer_at(pack, layer)->after, &memory.work, begin, end,
           is_last(pack, layer) ? pack->first : pack->states);
    return is_last(pack, layer) ? 0 : code_given(pack, layer + 1, begin, end);
}

/* How many bytes of memory the threads of a pack share. */
EXPORT int64_t INT8_STACK_MEMORY(const struct pack *pack) { return int8_memory_size(pack); }

/* Runs what is left of a pack, in each thread that calls this; see run_stages(). */
EXPORT int INT8_STACK_RUN(struct pack *pack) {
    static stage_work *const stages[STAGES] = {
        [GIVEN] = code_given,    [PROJECT] = project,
        [ATTEND] = attend,       [ATTENDED] = code_attended,
        [OUTPUT] = output_stage, [MIDDLE] = norm_rows,
        [UP] = up_stage,         [INNER_GIVEN] = code_inner,
        [DOWN] = down_stage,     [FINISH] = finish_rows,
    };
    return run_stages(pack, stages);
}
