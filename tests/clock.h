/* A clock of the tests' own, and the pollers' waits by it: included before test.h. */
#ifndef CLOCK_H
#define CLOCK_H

#include "support.h"
#if defined(__linux__)
#include <sys/epoll.h>
#else
#include <sys/event.h>
#endif

/* A clock of the tests' own. While it is set, waiting moves it on and takes no time, so that claims
   about deadlines are exact and quick. */
static uint64_t virtual_ns;
static int counts_waits, wait_count;

TEST_PRIVATE int test_clock(clockid_t id, struct timespec *now) {
    if (!virtual_ns) return clock_gettime(id, now);
    now->tv_sec = (time_t)(virtual_ns / 1000000000u);
    now->tv_nsec = (long)(virtual_ns % 1000000000u);
    return 0;
}

static int test_waited(int ready, int timeout_ms) {
    if (counts_waits) wait_count++;
    if (ready == 0 && virtual_ns && timeout_ms > 0)
        virtual_ns += (uint64_t)timeout_ms * 1000000u;
    return ready;
}

#if defined(__linux__)
TEST_PRIVATE int test_epoll_wait(int poller, struct epoll_event *events, int max, int timeout_ms) {
    int real_ms = virtual_ns && timeout_ms > 0 ? 0 : timeout_ms;
    return test_waited(epoll_wait(poller, events, max, real_ms), timeout_ms);
}
#define epoll_wait(poller, events, max, ms) test_epoll_wait(poller, events, max, ms)
#endif

TEST_PRIVATE int test_poll(struct pollfd *entries, nfds_t count, int timeout_ms) {
    int real_ms = virtual_ns && timeout_ms > 0 ? 0 : timeout_ms;
    return test_waited(poll(entries, count, real_ms), timeout_ms);
}
#define poll(entries, count, ms) test_poll(entries, count, ms)
#define clock_gettime(id, now) test_clock(id, now)

#if !defined(__linux__)
static int test_kevent(int poller, const struct kevent *changes, int change_count,
                       struct kevent *events, int event_count, const struct timespec *limit) {
    static const struct timespec now = { 0, 0 };
    int ms = limit ? (int)(limit->tv_sec * 1000 + limit->tv_nsec / 1000000) : -1;
    int real = !virtual_ns || ms < 0 || event_count == 0;
    int n = kevent(poller, changes, change_count, events, event_count, real ? limit : &now);
    return event_count ? test_waited(n, ms) : n;
}
#define kevent(poller, changes, n, events, max, limit) \
    test_kevent(poller, changes, n, events, max, limit)
#endif

#endif
