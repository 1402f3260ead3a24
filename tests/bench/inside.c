/* What can only be measured inside a process, through the public calls. One line of JSON for each
 * figure.
 *
 * inside switch              a resume and the yield that ends it: by the switch alone, as the loop
 *                            resumes a coroutine that waits for bytes, and through the loop's turns
 * inside lines PIECE LIMIT   reading lines of 64 to LIMIT bytes that arrive in pieces of PIECE
 */
#define _GNU_SOURCE 1
#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- a kernel that costs nothing ------------------------------------------------------------- */

enum { EMPTY_WAITS = 1000000 };

/* While it is on, each wait for events brings a piece of a line to the descriptor added last. */
static struct {
    int on, fd;
    size_t left, piece, ready; /* of the line, at most at a time, now */
    long empty;
    epoll_data_t data;
} fed;

static int fed_epoll_ctl(int poller, int operation, int fd, struct epoll_event *event) {
    if (operation == EPOLL_CTL_ADD) {
        fed.fd = fd;
        fed.data = event->data;
    }
    return epoll_ctl(poller, operation, fd, event);
}

static int fed_epoll_wait(int poller, struct epoll_event *events, int count, int timeout_ms) {
    if (!fed.on) return epoll_wait(poller, events, count, timeout_ms);
    if (!fed.ready) {
        fed.ready = fed.left < fed.piece ? fed.left : fed.piece;
        fed.left -= fed.ready;
    }
    if (!fed.ready && fed.empty++ == EMPTY_WAITS) abort(); /* all was read: where is the line? */
    events[0].events = EPOLLIN;
    events[0].data = fed.data;
    return fed.ready != 0;
}

static ssize_t fed_readv(int fd, const struct iovec *pieces, int count) {
    size_t total = 0, n;
    int i;
    if (!fed.on || fd != fed.fd) return readv(fd, pieces, count);
    for (i = 0; i < count && fed.ready; i++, total += n) {
        n = fed.ready < pieces[i].iov_len ? fed.ready : pieces[i].iov_len;
        memset(pieces[i].iov_base, 'x', n);
        fed.ready -= n;
        if (!fed.ready && !fed.left) ((char *)pieces[i].iov_base)[n - 1] = '\n';
    }
    errno = EAGAIN;
    return total ? (ssize_t)total : -1;
}

static ssize_t fed_read(int fd, void *memory, size_t size) {
    struct iovec piece;
    piece.iov_base = memory;
    piece.iov_len = size;
    return fed_readv(fd, &piece, 1);
}

#define epoll_ctl(poller, operation, fd, event) fed_epoll_ctl(poller, operation, fd, event)
#define epoll_wait(poller, events, count, timeout) fed_epoll_wait(poller, events, count, timeout)
#define readv(fd, pieces, count) fed_readv(fd, pieces, count)
#define read(fd, memory, size) fed_read(fd, memory, size)
#define recv(fd, memory, size, flags) fed_read(fd, memory, size)
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

static uint64_t cpu_ns(void) {
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

static void need(int holds, const char *step) {
    if (holds) return;
    fprintf(stderr, "%s: %s\n", step, tcpsrv_last_error());
    exit(1);
}

/* ---- switching ------------------------------------------------------------------------------- */

enum { YIELDING = 100, SWITCHES = 20000, REPEATS = 15, HOT_SWITCHES = 2000000 };

static int by_value(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void print_times(const char *name, double *ns) {
    qsort(ns, REPEATS, sizeof *ns, by_value);
    printf("{\"figure\": \"%s\", \"ns\": %.2f, \"least_ns\": %.2f, \"most_ns\": %.2f}\n", name,
           ns[REPEATS / 2], ns[0], ns[REPEATS - 1]);
}

/* Two contexts and nothing else, as libraries measure that only switch. */
static tcpsrv__context bare_main, bare_other;

static void bare_entry(tcpsrv__context *from, tcpsrv__context *to) {
    (void)from, (void)to;
    for (;;) tcpsrv__switch(&bare_other, &bare_main);
}

static void time_bare_switches(void) {
    static char stack[65536];
    double ns[REPEATS];
    int repeat, i;
    tcpsrv__context_make(&bare_other, stack + sizeof stack - 64, bare_entry);
    for (repeat = 0; repeat < REPEATS; repeat++) {
        uint64_t from = cpu_ns();
        for (i = 0; i < HOT_SWITCHES; i++) tcpsrv__switch(&bare_main, &bare_other);
        ns[repeat] = (double)(cpu_ns() - from) / HOT_SWITCHES;
    }
    print_times("switch and switch back", ns);
}

/* What each message that a coroutine waited for costs: the loop resumes it where it waits, and it
   leaves for the loop again. */
static int leaves(void *arg) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    tcpsrv__co *co = loop->current;
    (void)arg;
    while (!loop->ending) tcpsrv__switch(&co->context, &loop->stacks->main);
    return 0;
}

static void time_resumes(void) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    int64_t id = tcpsrv_spawn(loop, leaves, NULL, 0);
    tcpsrv__source *source = tcpsrv__source_by_id(loop, id);
    double ns[REPEATS];
    int repeat, i;
    need(source != NULL, "spawn");
    tcpsrv_loop_poll(loop, 0);
    for (repeat = 0; repeat < REPEATS; repeat++) {
        uint64_t from = cpu_ns();
        for (i = 0; i < HOT_SWITCHES; i++) source->type->run(source);
        ns[repeat] = (double)(cpu_ns() - from) / HOT_SWITCHES;
    }
    print_times("resume and wait, by the loop", ns);
}

static int yields(void *arg) {
    int i;
    (void)arg;
    for (i = 0; i < SWITCHES; i++) tcpsrv_yield();
    return 0;
}

/* Coroutines in pairs: one wakes the other and waits to be woken by it. */
static int64_t ids[YIELDING];

static int wakes(void *arg) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    size_t self = (size_t)((int64_t *)arg - ids);
    int i;
    for (i = 0; i < SWITCHES; i++) {
        if (self % 2) tcpsrv_park(-1);
        tcpsrv_wake(loop, ids[self ^ 1]);
        if (self % 2 == 0) tcpsrv_park(-1);
    }
    return 0;
}

static int join_all(void *arg) {
    int i;
    (void)arg;
    for (i = 0; i < YIELDING; i++) tcpsrv_join(ids[i]);
    tcpsrv_loop_stop(tcpsrv_loop_default());
    return 0;
}

static void time_switches(const char *name, int (*fn)(void *)) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    double ns[REPEATS];
    size_t i;
    int repeat;
    for (repeat = 0; repeat < REPEATS; repeat++) {
        uint64_t from = cpu_ns();
        for (i = 0; i < YIELDING; i++)
            need((ids[i] = tcpsrv_spawn(loop, fn, &ids[i], 0)) > 0, "spawn");
        need(tcpsrv_spawn(loop, join_all, NULL, 0) > 0, "spawn");
        tcpsrv_loop_run(loop);
        ns[repeat] = (double)(cpu_ns() - from) / ((double)YIELDING * SWITCHES);
    }
    print_times(name, ns);
}

/* ---- lines ----------------------------------------------------------------------------------- */

enum { ENOUGH = 8 << 20 }; /* bytes of lines that are timed together */

static size_t received;

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    need(err == 0, tcpsrv_strerror(err));
    received = line.size;
    tcpsrv_loop_stop(tcpsrv_loop_default());
    need(tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, arg) == 0, "read");
}

static int on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, NULL);
}

/* A connection to a server of our own on this loop. */
static void open_line_server(tcpsrv_loop *loop, size_t limit) {
    tcpsrv_options options = { 0 };
    struct sockaddr_in address;
    tcpsrv *server;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    options.on_stream = on_stream;
    options.max_buffer_size = limit;
    server = tcpsrv_new(&options);
    need(server && tcpsrv_listen(server, 0, "127.0.0.1") == 0, "listen");
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)tcpsrv_port(server, 0));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    need(connect(fd, (struct sockaddr *)&address, sizeof address) == 0, "connect");
    need(tcpsrv_loop_poll(loop, 1000) == 0, "poll");
}

static void feed_line(tcpsrv_loop *loop, size_t size, size_t piece) {
    received = 0;
    fed.left = size;
    fed.piece = piece;
    need(tcpsrv_loop_run(loop) == 0, "run");
    need(received == size, "the line");
}

static void time_lines(size_t piece, size_t limit) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    size_t size, rounds, i;
    open_line_server(loop, limit + 1);
    fed.on = 1;
    for (size = 64; size <= limit; size *= 4) {
        uint64_t from;
        if (size <= ENOUGH) feed_line(loop, size, piece); /* so that its memory is there */
        rounds = 1 + ENOUGH / size;
        from = cpu_ns();
        for (i = 0; i < rounds; i++) feed_line(loop, size, piece);
        printf("{\"figure\": \"line\", \"piece\": %zu, \"size\": %zu, \"us\": %.4f}\n", piece, size,
               (double)(cpu_ns() - from) / 1e3 / (double)rounds);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    /* The allocator keeps what it has, so that pages are not given back and taken anew. */
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    if (argc == 2 && strcmp(argv[1], "switch") == 0) {
        time_bare_switches();
        time_resumes();
        time_switches("tcpsrv_yield, one turn for 100 coroutines", yields);
        time_switches("tcpsrv_wake and tcpsrv_park, through a turn", wakes);
    } else if (argc == 4 && strcmp(argv[1], "lines") == 0) {
        time_lines(strtoul(argv[2], NULL, 10), strtoul(argv[3], NULL, 10));
    } else {
        return 2;
    }
    return 0;
}
