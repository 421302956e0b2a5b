/* Whether the kernels run here, the memory of their threads, and how weights are laid out. */

#include <cpuid.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx.h"

/* A checksum of these files, by which amx.py tells an older library. */
EXPORT uint32_t bge_amx_sources(void) { return BGE_AMX_SOURCES; }

/* 1 if this processor has what the functions use and the system lets this process use it. */
EXPORT int bge_amx_supported(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 24) || !(d & 1u << 22) ||
        !(d & 1u << 25))
        return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 0;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* ---- memory of a thread, which is kept from call to call, since new pages are slow ---- */

struct room {
    char *at;
    size_t size;
};

enum { LARGE_PAGE = 1 << 21 /* bytes */ };

static int has_room_key;
static pthread_key_t room_key;
static pthread_once_t room_once = PTHREAD_ONCE_INIT;

static void leave_room(void *room) {
    free(((struct room *)room)->at);
    free(room);
}

static void make_room_key(void) { has_room_key = !pthread_key_create(&room_key, leave_room); }

char *take_room(size_t size) {
    pthread_once(&room_once, make_room_key);
    if (!has_room_key) return NULL;
    struct room *room = pthread_getspecific(room_key);
    if (!room) {
        if (!(room = calloc(1, sizeof *room))) return NULL;
        if (pthread_setspecific(room_key, room)) {
            free(room);
            return NULL;
        }
    }
    if (room->size < size) {
        free(room->at);
        room->size = 0;
        size = (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        if (!(room->at = aligned_alloc(LARGE_PAGE, size))) return NULL;
        /* Small pages cost a twentieth of the time; weights gain nothing from large ones. */
        madvise(room->at, size, MADV_HUGEPAGE);
        room->size = size;
    }
    return room->at;
}

/* Lays out a weight of shape (outputs, inputs) as a right operand of as many pieces of 2 bytes, of
 * which each output has `inputs`. */
EXPORT void bge_amx_pack(const bf16 *weight, int64_t outputs, int64_t inputs, bf16 *packed) {
    to_right(weight, inputs, outputs, inputs / 32, packed);
}
