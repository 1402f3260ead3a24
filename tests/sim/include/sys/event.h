/* What a kqueue system's header has, as far as the library uses it; SIM_NETBSD: with the types of
   NetBSD, where filters are unsigned and counts are sizes. */
#ifndef SIM_SYS_EVENT_H
#define SIM_SYS_EVENT_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#ifdef SIM_NETBSD
struct kevent {
    uintptr_t ident;
    uint32_t filter, flags, fflags;
    int64_t data;
    void *udata;
};
#define EVFILT_READ 0u
#define EVFILT_WRITE 1u
typedef size_t sim_kevent_count;
#else
struct kevent {
    uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned fflags;
    int64_t data;
    void *udata;
};
#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
typedef int sim_kevent_count;
#endif

#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_ENABLE 0x0004
#define EV_DISABLE 0x0008
#define EV_ONESHOT 0x0010
#define EV_CLEAR 0x0020
#define EV_ERROR 0x4000
#define EV_EOF 0x8000

#define EV_SET(event, id, kind, what, detail, amount, user) do { \
        (event)->ident = (id); \
        (event)->filter = (kind); \
        (event)->flags = (what); \
        (event)->fflags = (detail); \
        (event)->data = (amount); \
        (event)->udata = (user); \
    } while (0)

int kqueue(void);
int kevent(int fd, const struct kevent *changes, sim_kevent_count change_count,
           struct kevent *events, sim_kevent_count event_count, const struct timespec *limit);

#endif
