/* The memory of a thread, which is kept from call to call, since new pages are slow. */

#include <stdlib.h>
#include <sys/mman.h>

#include "shared.h"

enum { LARGE_PAGE = 1 << 21 /* bytes */ };

static _Thread_local struct {
    char *at;
    size_t size;
    int is_left_at_end;
} room;

/* Has a function called as this thread ends, and the library kept loaded until then: how compilers
 * destroy C++'s thread_local objects (glibc 2.18). A pthread key would do the same, but its
 * functions got new versions in glibc 2.34, which no wheel for older systems may ask for. */
extern int __cxa_thread_atexit_impl(void (*leave)(void *), void *argument, void *library);
extern char __dso_handle __attribute__((visibility("hidden")));

static void leave_room(void *unused) {
    (void)unused;
    free(room.at);
    room.at = NULL;
    room.size = 0;
    room.is_left_at_end = 0;
}

char *take_room(size_t size) {
    if (!room.is_left_at_end) {
        if (__cxa_thread_atexit_impl(leave_room, NULL, &__dso_handle)) return NULL;
        room.is_left_at_end = 1;
    }
    if (room.size < size) {
        free(room.at);
        room.size = 0;
        size = (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        if (!(room.at = aligned_alloc(LARGE_PAGE, size))) return NULL;
        /* Small pages cost a twentieth of the time; weights gain nothing from large ones. */
        madvise(room.at, size, MADV_HUGEPAGE);
        room.size = size;
    }
    return room.at;
}
