/* The memory of a thread, which is kept from call to call, since new pages are slow. */

#include <stdlib.h>
#include <sys/mman.h>

#include "shared.h"

enum { LARGE_PAGE = 1 << 21 /* bytes */ };

static _Thread_local struct {
    struct {
        char *at;
        size_t size;
    } rooms[ROOMS];
    int are_left_at_end;
} thread;

/* Has a function called as this thread ends, and the library kept loaded until then: how compilers
 * destroy C++'s thread_local objects (glibc 2.18). A pthread key would do the same, but its
 * functions got new versions in glibc 2.34, which no wheel for older systems may ask for. */
extern int __cxa_thread_atexit_impl(void (*leave)(void *), void *argument, void *library);
extern char __dso_handle __attribute__((visibility("hidden")));

static void leave_rooms(void *unused) {
    (void)unused;
    for (int i = 0; i < ROOMS; i++) {
        free(thread.rooms[i].at);
        thread.rooms[i].at = NULL;
        thread.rooms[i].size = 0;
    }
    thread.are_left_at_end = 0;
}

char *take_room(enum room which, size_t size) {
    if (!thread.are_left_at_end) {
        if (__cxa_thread_atexit_impl(leave_rooms, NULL, &__dso_handle)) return NULL;
        thread.are_left_at_end = 1;
    }
    if (thread.rooms[which].size < size) {
        free(thread.rooms[which].at);
        thread.rooms[which].size = 0;
        size = (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        thread.rooms[which].at = aligned_alloc(LARGE_PAGE, size);
        if (!thread.rooms[which].at) return NULL;
        /* Small pages cost a twentieth of the time; weights gain nothing from large ones. */
        madvise(thread.rooms[which].at, size, MADV_HUGEPAGE);
        thread.rooms[which].size = size;
    }
    return thread.rooms[which].at;
}
