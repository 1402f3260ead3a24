/* epoll, kqueue and poll over the simulated objects, each with its own habits. */
#ifndef SIM_POLLERS_H
#define SIM_POLLERS_H

#include "network.h"

#if defined(TCPSERVER_USE_KQUEUE)
#include <sys/event.h>
#endif

/* The model is asked when everything waits, and told of every turn. */
static void model_turn(void);
static void model_quiet(void);
static void world_stuck(void);

enum { SIM_POLLERS = 4 };

typedef struct sim_entry {      /* what a poller knows of a descriptor, in one direction */
    unsigned char used, ready;  /* ready: something has come about since it was last told */
    uint32_t events;            /* epoll: the mask; kqueue: the flags */
    uint64_t data;
} sim_entry;

struct sim_poller {
    int used;
    sim_entry entry[2][SIM_FDS]; /* kqueue: readers, writers; epoll: the first only */
};

static sim_poller sim_pollers[SIM_POLLERS];

SIM_PRIVATE int sim_poller_open(void) {
    sim_object *object;
    int error = sim_enter(CALL_POLLER_OPEN), fd, i;
    if (error) return sim_fail(error);
    fd = sim_open(SIM_POLLER, &object);
    if (fd < 0) return fd;
    for (i = 0; i < SIM_POLLERS && sim_pollers[i].used; i++) continue;
    if (i == SIM_POLLERS) sim_broken(0, "too many pollers");
    object->poller = &sim_pollers[i];
    memset(object->poller, 0, sizeof *object->poller);
    object->poller->used = 1;
    return fd;
}

/* The last close of an object takes it from every poller; of a poller, the poller itself. */
static void sim_poller_forget(int fd) {
    int i;
    for (i = 0; i < SIM_POLLERS; i++)
        if (sim_pollers[i].used)
            sim_pollers[i].entry[0][fd].used = sim_pollers[i].entry[1][fd].used = 0;
}

SIM_PRIVATE sim_poller *sim_poller_at(int fd) {
    sim_object *object = sim_object_at(fd, CALL_POLLER_WAIT);
    if (object->kind != SIM_POLLER) sim_broken(0, "descriptor %d is no poller", fd);
    return object->poller;
}

/* One wait, with the time going on only when nothing else can happen. */
static int sim_block(int64_t timeout_ns, int (*collect)(void *arg), void *arg) {
    uint64_t until, next;
    int n = sim_enter(CALL_POLLER_WAIT);
    sim.now += sim.computed_ns;
    if (sim.longest_ns < sim.computed_ns) sim.longest_ns = sim.computed_ns;
    sim.computed_ns = 0;
    until = timeout_ns < 0 ? SIM_NEVER : sim.now + (uint64_t)timeout_ns;
    model_turn();
    if (n) return sim_fail(n);
    for (;;) {
        net_run();
        sim_threads_run(0);
        n = collect(arg);
        if (n || timeout_ns == 0) break;
        next = sim_earlier(net_next(), sim_threads_next());
        if (next > sim.now) model_quiet();
        /* For ever, or as good as that: a server may retry something each second. */
        if ((next == SIM_NEVER && until == SIM_NEVER) || sim.now > SIM_MS(100000)) {
            world_stuck();
            return 0;
        }
        sim_moved();
        if (next > until) {
            sim.now = until;
            break;
        }
        if (next > sim.now) sim.now = next;
        if (next == until) timeout_ns = 0;
    }
    SIM_TRACE("wait = %d", n);
    return n;
}

/* Where a scan of the descriptors begins, and which way it goes: the order of events is nobody's
   promise. */
typedef struct sim_scan {
    int at, step, left;
} sim_scan;

SIM_PRIVATE void sim_scan_begin(sim_scan *scan, int count) {
    scan->at = (int)sim_below((size_t)count);
    scan->step = sim_chance(2) ? 1 : count - 1;
    scan->left = count;
}

SIM_PRIVATE int sim_scan_next(sim_scan *scan, int count) {
    int at = scan->at;
    scan->at = (at + scan->step) % count;
    scan->left--;
    return at;
}

#if defined(TCPSERVER_USE_EPOLL)

static void sim_wake(sim_object *object, int bits) {
    int i;
    if (object->fd < 0) return;
    for (i = 0; i < SIM_POLLERS; i++) {
        sim_entry *entry = &sim_pollers[i].entry[0][object->fd];
        uint32_t mask = entry->events | EPOLLERR | EPOLLHUP;
        uint32_t woken = (bits & SIM_IN ? EPOLLIN : 0u) | (bits & SIM_OUT ? EPOLLOUT : 0u) |
                         (bits & SIM_RDHUP ? EPOLLRDHUP : 0u) | (bits & SIM_HUP ? EPOLLHUP : 0u) |
                         (bits & SIM_ERR ? EPOLLERR : 0u);
        if (sim_pollers[i].used && entry->used && (woken & mask)) entry->ready = 1;
    }
}

SIM_PRIVATE int sim_epoll_create(void) {
    return sim_poller_open();
}

/* An exclusive entry cannot be modified, and only some flags go with it (epoll_ctl(2); tried on
   Linux 6.18: EINVAL each time). */
static int sim_epoll_refuses(int op, const sim_entry *entry, uint32_t events) {
    uint32_t with = EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | (uint32_t)EPOLLET |
                    (uint32_t)EPOLLEXCLUSIVE;
    if (op == EPOLL_CTL_ADD && (events & (uint32_t)EPOLLEXCLUSIVE) && (events & ~with)) return 1;
    return op == EPOLL_CTL_MOD &&
           ((events & (uint32_t)EPOLLEXCLUSIVE) || (entry->events & (uint32_t)EPOLLEXCLUSIVE));
}

SIM_PRIVATE int sim_epoll_ctl(int poller_fd, int op, int fd, const struct epoll_event *event) {
    sim_poller *poller = sim_poller_at(poller_fd);
    sim_object *object = sim_object_at(fd, CALL_POLLER_ADD);
    sim_entry *entry = &poller->entry[0][fd];
    int error = op == EPOLL_CTL_DEL ? 0 : sim_enter(CALL_POLLER_ADD);
    if (error) sim.accept_trouble_at = sim.now;
    if (error) return sim_fail(error);
    if (object->kind == SIM_FILE || object->kind == SIM_NULL) return sim_fail(EPERM);
    if (op == EPOLL_CTL_ADD && entry->used) return sim_fail(EEXIST);
    if (op != EPOLL_CTL_ADD && !entry->used) return sim_fail(ENOENT);
    if (op != EPOLL_CTL_DEL && sim_epoll_refuses(op, entry, event->events)) return sim_fail(EINVAL);
    entry->used = op != EPOLL_CTL_DEL;
    if (!entry->used) return 0;
    entry->events = event->events;
    entry->data = event->data.u64;
    entry->ready = 1; /* looked at once in any case */
    SIM_TRACE("epoll_ctl(%d, %s, 0x%x)", fd, op == EPOLL_CTL_ADD ? "add" : "mod", entry->events);
    return 0;
}

static uint32_t sim_epoll_state(int fd, const sim_entry *entry) {
    sim_object *object = sim.fds[fd];
    int state = sim_state_of(object);
    uint32_t told = (state & SIM_IN ? EPOLLIN : 0u) | (state & SIM_OUT ? EPOLLOUT : 0u) |
                    (state & SIM_RDHUP ? EPOLLRDHUP : 0u) | (state & SIM_HUP ? EPOLLHUP : 0u) |
                    (state & SIM_ERR ? EPOLLERR : 0u);
    if ((entry->events & EPOLLOUT) && !(state & SIM_OUT)) object->nospace = 1; /* tcp_poll */
    return told & (entry->events | EPOLLERR | EPOLLHUP);
}

typedef struct sim_epoll_call {
    sim_poller *poller;
    struct epoll_event *events;
    int max;
} sim_epoll_call;

static int sim_epoll_collect(void *arg) {
    sim_epoll_call *call = (sim_epoll_call *)arg;
    sim_scan scan;
    int n = 0, max = call->max;
    if (sim_chance(16)) max = 1 + (int)sim_below(4); /* the rest comes next time */
    for (sim_scan_begin(&scan, sim.fd_top); scan.left && n < max;) {
        int fd = sim_scan_next(&scan, sim.fd_top);
        sim_entry *entry = &call->poller->entry[0][fd];
        uint32_t told;
        if (!entry->used || ((entry->events & (uint32_t)EPOLLET) && !entry->ready)) continue;
        told = sim_epoll_state(fd, entry);
        entry->ready = 0;
        if (!told) continue;
        call->events[n].events = told;
        call->events[n++].data.u64 = entry->data;
        SIM_TRACE("event: %d, 0x%x", fd, told);
    }
    return n;
}

/* Readiness that is gone when somebody looks (select(2), BUGS). */
static int sim_epoll_spurious(sim_epoll_call *call, int n) {
    int fd = (int)sim_below((size_t)sim.fd_top);
    const sim_entry *entry = &call->poller->entry[0][fd];
    if (!entry->used || n >= call->max || !sim.fds[fd] || !sim.fds[fd]->link) return n;
    call->events[n].events = EPOLLIN;
    call->events[n].data.u64 = entry->data;
    SIM_TRACE("event: %d, spurious", fd);
    sim_moved();
    return n + 1;
}

SIM_PRIVATE int sim_epoll_wait(int fd, struct epoll_event *events, int max, int timeout_ms) {
    sim_epoll_call call;
    int n;
    call.poller = sim_poller_at(fd);
    call.events = events;
    call.max = max;
    n = sim_block(timeout_ms < 0 ? -1 : (int64_t)SIM_MS(timeout_ms), sim_epoll_collect, &call);
    return n >= 0 && sim.spurious && sim_chance(sim.spurious) ? sim_epoll_spurious(&call, n) : n;
}

#elif defined(TCPSERVER_USE_KQUEUE)

/* An event on the object makes its filters look (KNOTE): those that find something are active. */
static void sim_wake(sim_object *object, int bits) {
    int i;
    if (object->fd < 0) return;
    for (i = 0; i < SIM_POLLERS; i++) {
        if (!sim_pollers[i].used) continue;
        if (bits & (SIM_IN | SIM_RDHUP | SIM_HUP | SIM_ERR))
            sim_pollers[i].entry[0][object->fd].ready = 1;
        if (bits & (SIM_OUT | SIM_HUP | SIM_ERR)) sim_pollers[i].entry[1][object->fd].ready = 1;
    }
}

SIM_PRIVATE int sim_kqueue(void) {
    return sim_poller_open();
}

static int sim_kqueue_change(sim_poller *poller, const struct kevent *change) {
    int fd = (int)change->ident, write_side = change->filter == EVFILT_WRITE, error;
    sim_object *object = sim_object_at(fd, CALL_POLLER_ADD);
    sim_entry *entry = &poller->entry[write_side][fd];
    if (change->flags & EV_DELETE) {
        if (!entry->used) return sim_fail(ENOENT);
        entry->used = 0;
        return 0;
    }
    error = sim_enter(CALL_POLLER_ADD);
    if (error) {
        sim_note(sim.injected, ENOMEM); /* kevent(2) knows no other */
        sim.accept_trouble_at = sim.now;
        return sim_fail(ENOMEM);
    }
    if (object->kind == SIM_NULL) return sim_fail(EPERM);
    entry->used = entry->ready = 1;
    entry->events = (uint32_t)change->flags;
    entry->data = (uint64_t)(uintptr_t)change->udata;
    SIM_TRACE("kevent(%d, %s)", fd, write_side ? "write" : "read");
    return 0;
}

typedef struct sim_kqueue_call {
    sim_poller *poller;
    struct kevent *events;
    int max;
} sim_kqueue_call;

/* 0: the filter finds nothing. The read side of a socket ends with EV_EOF while unread bytes
   remain; the write side when nobody reads any more. An error comes along in fflags (kqueue(2)). */
static unsigned sim_kqueue_flags(int fd, int write_side, unsigned *fflags) {
    const sim_object *object = sim.fds[fd];
    int state = sim_state_of(object), ended;
    *fflags = 0;
    if (write_side && object->kind == SIM_SOCKET) ended = object->reset || object->shut_wr;
    else if (write_side) ended = (state & SIM_ERR) != 0;
    else ended = (state & (SIM_RDHUP | SIM_HUP)) != 0;
    if (!ended && !(state & (write_side ? SIM_OUT : SIM_IN))) return 0;
    if (ended) *fflags = (unsigned)object->error;
    return ended ? 1u | EV_EOF : 1u;
}

static int sim_kqueue_collect(void *arg) {
    sim_kqueue_call *call = (sim_kqueue_call *)arg;
    sim_scan scan;
    int n = 0, count = 2 * sim.fd_top, max = call->max;
    if (sim_chance(16)) max = 1 + (int)sim_below(4);
    for (sim_scan_begin(&scan, count); scan.left && n < max;) {
        int at = sim_scan_next(&scan, count), fd = at / 2, write_side = at % 2;
        sim_entry *entry = &call->poller->entry[write_side][fd];
        unsigned flags, fflags;
        if (!entry->used || ((entry->events & EV_CLEAR) && !entry->ready)) continue;
        flags = sim_kqueue_flags(fd, write_side, &fflags);
        entry->ready = 0;
        if (!flags) continue;
        memset(&call->events[n], 0, sizeof call->events[n]);
        if (write_side) call->events[n].filter = EVFILT_WRITE;
        else call->events[n].filter = EVFILT_READ;
        call->events[n].ident = (uintptr_t)fd;
        call->events[n].flags = (unsigned short)(flags & EV_EOF);
        call->events[n].fflags = fflags;
        call->events[n++].udata = (void *)(uintptr_t)entry->data;
        SIM_TRACE("event: %d, %s%s", fd, write_side ? "write" : "read",
                  flags & EV_EOF ? ", eof" : "");
    }
    return n;
}

static int sim_kqueue_spurious(sim_kqueue_call *call, int n) {
    int fd = (int)sim_below((size_t)sim.fd_top);
    const sim_entry *entry = &call->poller->entry[0][fd];
    if (!entry->used || n >= call->max || !sim.fds[fd] || !sim.fds[fd]->link) return n;
    memset(&call->events[n], 0, sizeof call->events[n]);
    call->events[n].filter = EVFILT_READ;
    call->events[n].ident = (uintptr_t)fd;
    call->events[n].udata = (void *)(uintptr_t)entry->data;
    sim_moved();
    return n + 1;
}

SIM_PRIVATE int sim_kevent(int fd, const struct kevent *changes, int change_count,
                           struct kevent *events, int max, const struct timespec *limit) {
    sim_kqueue_call call;
    int n;
    call.poller = sim_poller_at(fd);
    call.events = events;
    call.max = max;
    if (change_count == 1 && !max) return sim_kqueue_change(call.poller, changes);
    n = sim_block(limit ? (int64_t)limit->tv_sec * 1000000000 + limit->tv_nsec : -1,
                  sim_kqueue_collect, &call);
    return n >= 0 && sim.spurious && sim_chance(sim.spurious) ? sim_kqueue_spurious(&call, n) : n;
}

#else

static void sim_wake(sim_object *object, int bits) {
    (void)object, (void)bits;
}

typedef struct sim_poll_call {
    struct pollfd *entries;
    nfds_t count;
} sim_poll_call;

static int sim_poll_state(const struct pollfd *entry) {
    int state, told;
    if (entry->fd < 0) return 0;
    if (entry->fd >= SIM_FDS || !sim.fds[entry->fd]) return POLLNVAL;
    state = sim_state_of(sim.fds[entry->fd]);
    told = (state & SIM_IN ? POLLIN : 0) | (state & SIM_OUT ? POLLOUT : 0) |
           (state & SIM_RDHUP ? POLLRDHUP : 0) | (state & SIM_HUP ? POLLHUP : 0) |
           (state & SIM_ERR ? POLLERR : 0);
    return told & (entry->events | POLLHUP | POLLERR);
}

static int sim_poll_collect(void *arg) {
    sim_poll_call *call = (sim_poll_call *)arg;
    int n = 0;
    nfds_t i;
    for (i = 0; i < call->count; i++) {
        call->entries[i].revents = (short)sim_poll_state(&call->entries[i]);
        if (!call->entries[i].revents) continue;
        n++;
        SIM_TRACE("event: %d, 0x%x", call->entries[i].fd, (unsigned)call->entries[i].revents);
    }
    return n;
}

static int sim_poll_spurious(sim_poll_call *call, int n) {
    struct pollfd *entry = &call->entries[sim_below((size_t)call->count)];
    if (entry->fd < 0 || entry->revents || !(entry->events & POLLIN)) return n;
    entry->revents = POLLIN;
    sim_moved();
    return n + 1;
}

SIM_PRIVATE int sim_poll(struct pollfd *entries, nfds_t count, int timeout_ms) {
    sim_poll_call call;
    int n;
    call.entries = entries;
    call.count = count;
    n = sim_block(timeout_ms < 0 ? -1 : (int64_t)SIM_MS(timeout_ms), sim_poll_collect, &call);
    return n >= 0 && sim.spurious && sim_chance(sim.spurious) ? sim_poll_spurious(&call, n) : n;
}

#endif
#endif
