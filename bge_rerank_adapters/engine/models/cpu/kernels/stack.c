/* How threads divide a pack's stages among themselves. */

#include "stack.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    PARTS = 4,    /* of a stage, for each thread: the fewer, the longer all wait for the last one */
    SPINS = 2000, /* before a thread sleeps; a tenth of a millisecond */
};

/* Half of a 64-bit number, on which threads sleep. */
static uint32_t *upper_half(uint64_t *number) { return (uint32_t *)number + 1; }

/* Returns the next part of a stage that nobody has taken, or -1 if there is none. */
static long take_part(struct progress *progress, uint32_t stage, long parts) {
    uint64_t next = __atomic_load_n(&progress->next, __ATOMIC_ACQUIRE);
    while (next >> 32 == stage && (long)(uint32_t)next < parts)
        if (__atomic_compare_exchange_n(&progress->next, &next, next + 1, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
            return (uint32_t)next;
    return -1;
}

/* Counts a part as done; with the last one the next stage begins. */
static void end_part(struct progress *progress, uint32_t stage, long parts) {
    if (__atomic_add_fetch(&progress->done, 1, __ATOMIC_ACQ_REL) < parts) return;
    progress->done = 0;
    __atomic_store_n(&progress->next, (uint64_t)(stage + 1) << 32, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&progress->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, upper_half(&progress->next), FUTEX_WAKE_PRIVATE, INT_MAX);
}

static int is_over(struct progress *progress, uint32_t stage) {
    return __atomic_load_n(&progress->next, __ATOMIC_SEQ_CST) >> 32 != stage;
}

static void await_end(struct progress *progress, uint32_t stage) {
    for (int i = 0; i < SPINS; i++) {
        if (is_over(progress, stage)) return;
        __builtin_ia32_pause();
    }
    __atomic_add_fetch(&progress->sleepers, 1, __ATOMIC_SEQ_CST);
    /* The system compares once more before it lets the thread sleep. */
    while (!is_over(progress, stage))
        syscall(SYS_futex, upper_half(&progress->next), FUTEX_WAIT_PRIVATE, stage, NULL);
    __atomic_sub_fetch(&progress->sleepers, 1, __ATOMIC_SEQ_CST);
}

static void run_stage(struct pack *pack, stage_work *work, uint32_t stage, long layer, long count) {
    struct progress *progress = &pack->progress;
    const long most = PARTS * pack->threads, parts = count < most ? count : most;
    for (long part; (part = take_part(progress, stage, parts)) >= 0;) {
        const long begin = count * part / parts, end = count * (part + 1) / parts;
        /* What would come of it is of no use, once memory was short. */
        if (!__atomic_load_n(&progress->failed, __ATOMIC_RELAXED) && work(pack, layer, begin, end))
            __atomic_store_n(&progress->failed, 1, __ATOMIC_RELAXED);
        end_part(progress, stage, parts);
    }
    await_end(progress, stage);
}

int run_stages(struct pack *pack, stage_work *const *stages) {
    uint32_t stage = 0;
    const long panels = pack->hidden / 32;
    for (long layer = 0; layer < pack->layers; layer++) {
        const long asked = asked_rows(pack, layer);
        const long counts[STAGES] = {
            [GIVEN] = layer ? 0 : pack->rows,
            [PROJECT] = 3 * panels,
            [ATTEND] = pack->heads,
            [ATTENDED] = asked,
            [OUTPUT] = panels,
            [MIDDLE] = asked,
            [UP] = pack->intermediate / 32,
            [INNER_GIVEN] = asked,
            [DOWN] = panels,
            [FINISH] = asked,
        };
        for (int i = 0; i < STAGES; i++)
            if (stages[i] && counts[i]) run_stage(pack, stages[i], stage++, layer, counts[i]);
    }
    return __atomic_load_n(&pack->progress.failed, __ATOMIC_RELAXED) ? -1 : 0;
}

int attend_heads(const struct pack *pack, long layer, long begin, long end, const bf16 *projected,
                 bf16 *attended) {
    const long size = pack->rows * pack->hidden;
    return pack->attention(projected, projected + size, projected + 2 * size, pack->bounds,
                           pack->pairs, pack->heads, begin, end, pack->hidden / pack->heads,
                           is_last(pack, layer), attended);
}
