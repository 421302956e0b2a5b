/* The memory of a thread, which is kept from call to call, since new pages are slow. */

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "shared.h"

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
