/* The simulated kernel's ground: chance, trace, faults, clock, heap, stacks, and the table of
   descriptors. All that may go one way or another is drawn from one generator, nothing depends on
   addresses or on the real time: a seed gives one run, to the byte. One thread, one process. */
#ifndef SIM_KERNEL_H
#define SIM_KERNEL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <regex.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(__SANITIZE_ADDRESS__)
#define SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIM_ASAN 1
#endif
#endif

#define SIM_PRIVATE static __attribute__((unused))
#define SIM_NEVER UINT64_MAX
#define SIM_MS(n) ((uint64_t)(n) * 1000000u)

enum {
    SIM_FDS = 160,              /* descriptors at most; the seed may set a lower limit */
    SIM_FIRST_FD = 3,
    SIM_OBJECTS = 1024,         /* of one run */
    SIM_LINKS = 256,
    SIM_PEERS = 48,
    SIM_QUEUE = 32,             /* a listener's backlog at most */
    SIM_SPIN = 400              /* turns without progress that are no spin yet */
};

/* ---- the calls that may fail, and how -------------------------------------------------------- */

typedef enum sim_call {
    CALL_READ, CALL_SEND, CALL_ACCEPT, CALL_CONNECT, CALL_SOCKET, CALL_BIND, CALL_LISTEN,
    CALL_SHUTDOWN, CALL_CLOSE, CALL_SETSOCKOPT, CALL_GETSOCKOPT, CALL_NAME, CALL_FCNTL, CALL_DUP,
    CALL_IOCTL, CALL_FSTAT, CALL_OPEN, CALL_EVENTFD, CALL_PIPE, CALL_WAKE, CALL_WRITEV, CALL_PREAD,
    CALL_SENDFILE, CALL_POLLER_OPEN, CALL_POLLER_ADD, CALL_POLLER_WAIT, CALL_MMAP, CALL_GUARD,
    CALL_MPROTECT, CALL_SIGACTION, CALL_RESOLVE, CALL_THREAD, CALL_PATH, CALL_ENTROPY,
    CALL_ALLOC, SIM_CALLS
} sim_call;

/* From the man pages; errors that only a wrong program can get are left out. */
typedef struct sim_call_info {
    const char *name;
    int errnos[14];
} sim_call_info;

static const sim_call_info sim_calls[SIM_CALLS] = {
    { "read", { EINTR, EAGAIN, ECONNRESET, ETIMEDOUT, ENOMEM, ENOBUFS } },
    { "send", { EINTR, EAGAIN, ECONNRESET, EPIPE, ENOBUFS, ENOMEM, ETIMEDOUT } },
    { "accept", { EINTR, EAGAIN, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTO, EPERM,
                  ENETDOWN, EHOSTUNREACH, EOPNOTSUPP, ETIMEDOUT } },
    { "connect", { EINTR, EADDRNOTAVAIL, ECONNREFUSED, ENETUNREACH, ETIMEDOUT, EACCES, EAGAIN } },
    { "socket", { EMFILE, ENFILE, ENOBUFS, ENOMEM } },
    { "bind", { EADDRINUSE, EACCES, EADDRNOTAVAIL, ENOMEM } },
    { "listen", { EADDRINUSE } },
    { "shutdown", { ENOTCONN, ENOBUFS } },
    { "close", { EINTR, EIO } },
    { "setsockopt", { ENOMEM, ENOBUFS, ENOPROTOOPT } },
    { "getsockopt", { ENOBUFS } },
    { "getsockname", { ENOBUFS } },
    { "fcntl", { EPERM } },
    { "fcntl(F_DUPFD)", { EMFILE } },
    { "ioctl", { EINVAL } },
    { "fstat", { ENOMEM } },
    { "open", { EMFILE, ENFILE, ENOMEM } },
    { "eventfd", { EMFILE, ENFILE, ENODEV, ENOMEM } },
    { "pipe", { EMFILE, ENFILE } },
    { "write", { EINTR, EAGAIN } },
    { "writev", { EINTR, EAGAIN, EPIPE, EIO } },
    { "pread", { EINTR, EIO } },
    { "sendfile", { EINTR, EAGAIN, EIO, ENOMEM, EINVAL, ENOSYS, EPIPE, ECONNRESET } },
    { "poller", { EMFILE, ENFILE, ENOMEM } },
    { "poller add", { ENOMEM, ENOSPC } },
    { "poller wait", { EINTR } },
    { "mmap", { ENOMEM, EAGAIN } },
    { "madvise", { EINVAL, ENOMEM } },
    { "mprotect", { ENOMEM } },
    { "sigaction", { EINVAL } },
    { "getaddrinfo", { ENOMEM } },
    { "pthread_create", { EAGAIN } },
    { "lstat, chmod, remove", { EACCES, EIO, ENOMEM } },
    { "getentropy", { EIO, ENOSYS } },
    { "realloc", { ENOMEM } }
};

/* ---- descriptors ----------------------------------------------------------------------------- */

typedef enum sim_kind {
    SIM_FREE, SIM_SOCKET, SIM_LISTENER, SIM_COUNTER, SIM_PIPE, SIM_POLLER, SIM_FILE, SIM_NULL
} sim_kind;

/* What poll(2) would say of an object. */
enum { SIM_IN = 1, SIM_OUT = 2, SIM_RDHUP = 4, SIM_HUP = 8, SIM_ERR = 16, SIM_PRI = 32 };

typedef struct sim_dir sim_dir;
typedef struct sim_link sim_link;
typedef struct sim_peer sim_peer;
typedef struct sim_poller sim_poller;

/* What a descriptor names. */
typedef struct sim_object {
    sim_kind kind;
    int refs, fd;               /* its first descriptor */
    int nonblock, error;        /* SO_ERROR */
    unsigned char connecting, shut_wr, nospace, linger_zero, reset, family, bound, told_end;
    unsigned char foreign, was_nonblock; /* made elsewhere: O_NONBLOCK must come back */
    sim_link *link;             /* a socket or pipe: its connection, and which end of it */
    int side;
    int port, backlog, waiting; /* a listener */
    sim_link *queue[SIM_QUEUE];
    uint64_t counter;           /* an eventfd */
    uint64_t size;              /* a file: its bytes are those of a stream from a place on */
    const sim_dir *file_dir;
    uint64_t file_base;
    sim_poller *poller;
    uint64_t told[3];           /* a set: the errors that calls on it have told */
    uint64_t shut_at, swallowed;
} sim_object;

struct sim_options_of_run {
    int trace;
    int fail_call;              /* the n-th call of all fails, with the k-th of its errors */
    int fail_errno;
    int no_memory_from;         /* from the n-th call on no allocation succeeds; 0: not so */
    size_t fault_rate;          /* else one call in so many fails; 0: none */
    size_t alloc_rate;
};

static struct sim_state {
    uint64_t seed, chance, now;
    const unsigned char *bytes; /* of a fuzzer, instead of the generator */
    size_t bytes_left;
    struct sim_options_of_run run;
    const char *what;           /* the workload's name */
    struct tcpsrv_loop *loop;   /* while there is one */
    int calls, last_failed, last_errno, errno_count;
    int faults;                 /* how many calls were made to fail */
    int alloc_failed;           /* how many allocations */
    uint64_t injected[3];       /* a set: the errors of those */
    uint64_t told_connecting[3]; /* those that calls on connecting sockets have told */
    size_t interleave;          /* the network may move at one call in so many */
    size_t spurious;            /* one wait in so many tells something that is not so; 0: none */
    int bsd;                    /* the habits of another family of kernels */
    int waits, idle_waits;      /* turns; those since anything moved */
    uint64_t accept_trouble_at; /* the last failure that may pause a listener */
    uint64_t curve_ns;          /* that one computation on a curve takes */
    uint64_t computed_ns;       /* of this turn: its time stands until it is over */
    uint64_t longest_ns;        /* turn */
    int peers_compute;          /* then it takes none */
    int entropies;              /* how often randomness was asked for */
    int tight;                  /* many buffers are smaller than records */
    int wrong_names;            /* a client wants a name that no certificate has */
    int path_exists, path_inode; /* of the one Unix socket's file */
    uint64_t progress, progress_seen;
    size_t live_bytes, live_blocks, maps;
    int fd_limit, open_fds, fd_top; /* fd_top: behind the highest that was used */
    int sigpipe_blocked, sigpipe_pending;
    struct sim_thread {         /* begun, and not run yet */
        void *(*run)(void *arg);
        void *arg;
        uint64_t at;
    } threads[32];
    int thread_count;
    sim_object *fds[SIM_FDS];
    sim_object objects[SIM_OBJECTS];
    int object_count, object_top;
} sim;

static void net_run(void);      /* network.h */

/* ---- chance ---------------------------------------------------------------------------------- */

static uint64_t sim_mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* A fuzzer's bytes come first; behind their end the generator goes on. */
static uint64_t sim_random(size_t bytes) {
    uint64_t x = 0;
    if (sim.bytes_left) {
        for (; bytes && sim.bytes_left; bytes--, sim.bytes_left--) x = x << 8 | *sim.bytes++;
        return x << 32 | x;
    }
    sim.chance ^= sim.chance >> 12;
    sim.chance ^= sim.chance << 25;
    sim.chance ^= sim.chance >> 27;
    return sim.chance * 2685821657736338717u;
}

static size_t sim_below(size_t n) {
    if (n <= 1) return 0;
    if (sim.bytes_left) return (size_t)(sim_random(n <= 256 ? 1 : 3) & 0xffffff) % n;
    return (size_t)((sim_random(4) >> 32) * (uint64_t)n >> 32);
}

/* True once in n. */
static int sim_chance(size_t n) {
    return sim_below(n) == 0;
}

/* Small ones often, large ones sometimes. */
static size_t sim_size(size_t max) {
    size_t bits = 0;
    while (bits < 40 && (size_t)1 << bits <= max) bits++;
    bits = sim_below(bits + 1);
    return bits ? sim_below(((size_t)1 << bits) < max ? (size_t)1 << bits : max + 1) : 0;
}

/* ---- trace, and the end of a run that broke a promise ---------------------------------------- */

#define SIM_TRACE(...) (sim.run.trace ? sim_trace(__VA_ARGS__) : (void)0)

__attribute__((format(printf, 1, 2))) SIM_PRIVATE void sim_trace(const char *format, ...) {
    va_list arguments;
    printf("%10.3f ", (double)sim.now / 1e6);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

static void sim_print_run(void) {
    printf("seed %llu (%s", (unsigned long long)sim.seed, sim.what ? sim.what : "random");
    if (sim.run.fail_call) printf(", call %d fails, error %d", sim.run.fail_call,
                                  sim.run.fail_errno);
    if (sim.run.no_memory_from) printf(", no memory from call %d on", sim.run.no_memory_from);
    printf("): ");
}

/* The number is that of the promise in the documentation's list; 0: the simulation itself. */
__attribute__((format(printf, 2, 3), noreturn)) SIM_PRIVATE
void sim_broken(int promise, const char *format, ...) {
    va_list arguments;
    sim_print_run();
    if (promise) printf("promise %d broken: ", promise);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    if (sim.last_failed >= 0) printf(" (last failure: %s, %s)", sim_calls[sim.last_failed].name,
                                     strerror(sim.last_errno));
    printf("\n");
    fflush(stdout);
#ifdef SIM_FUZZ
    abort();
#else
    _exit(1);
#endif
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void sim_note(uint64_t set[3], int error) {
    if (error > 0 && error < 192) set[error / 64] |= (uint64_t)1 << (error % 64);
}

static int sim_noted(const uint64_t set[3], int error) {
    return error > 0 && error < 192 && (set[error / 64] >> (error % 64) & 1) != 0;
}

static int sim_errno_count(sim_call call) {
    int n = 0;
    while (n < 14 && sim_calls[call].errnos[n]) n++;
    return n;
}

/* 0, or the error with which this call is to fail. */
static int sim_fault(sim_call call) {
    int n, chosen = -1;
    sim.calls++;
    if (sim.run.fail_call == sim.calls) {
        sim.errno_count = n = sim_errno_count(call);
        chosen = sim.run.fail_errno < n ? sim.run.fail_errno : -1;
    } else if (call == CALL_ALLOC && sim.run.no_memory_from &&
               sim.calls >= sim.run.no_memory_from) {
        chosen = 0;
    } else if (call == CALL_ALLOC ? sim.run.alloc_rate && sim_chance(sim.run.alloc_rate)
                                  : sim.run.fault_rate && sim_chance(sim.run.fault_rate)) {
        chosen = (int)sim_below((size_t)sim_errno_count(call));
    }
    if (chosen < 0 || !sim_calls[call].errnos[chosen]) return 0;
    sim.faults++;
    sim_note(sim.injected, sim_calls[call].errnos[chosen]);
    sim.last_failed = (int)call;
    sim.last_errno = sim_calls[call].errnos[chosen];
    SIM_TRACE("fault: %s fails with %s", sim_calls[call].name, strerror(sim.last_errno));
    return sim.last_errno;
}

/* Every call comes by here: the world may move between any two. */
static int sim_enter(sim_call call) {
    if (sim.interleave && sim_chance(sim.interleave)) net_run();
    return sim_fault(call);
}

static int sim_fail(int error) {
    errno = error;
    return -1;
}

static void sim_moved(void) {
    sim.progress++;
}

/* ---- clock ----------------------------------------------------------------------------------- */

static uint64_t sim_clock(void) {
    return sim.now + sim.computed_ns;
}

SIM_PRIVATE int sim_clock_gettime(clockid_t clock, struct timespec *now) {
    (void)clock;
    now->tv_sec = (time_t)(sim_clock() / 1000000000u);
    now->tv_nsec = (long)(sim_clock() % 1000000000u);
    return 0;
}

/* How late something may be: by the poller's grain, and by a turn. */
static uint64_t sim_late(void) {
    return SIM_MS(1) + sim.longest_ns;
}

/* ---- threads --------------------------------------------------------------------------------- */

/* A thread runs as a whole at some time, while the loop waits: the only ones that the library
   begins are helpers that wait for nothing. */
SIM_PRIVATE int sim_pthread_create(void *(*run)(void *arg), void *arg) {
    struct sim_thread *thread = &sim.threads[sim.thread_count];
    int error = sim_enter(CALL_THREAD);
    if (error || sim.thread_count == 32) return EAGAIN;
    thread->run = run;
    thread->arg = arg;
    thread->at = sim.now + (sim_chance(2) ? 0 : SIM_MS(sim_size(3000)));
    sim.thread_count++;
    return 0;
}

SIM_PRIVATE uint64_t sim_threads_next(void) {
    uint64_t due = SIM_NEVER;
    int i;
    for (i = 0; i < sim.thread_count; i++)
        if (sim.threads[i].at < due) due = sim.threads[i].at;
    return due;
}

/* Those that are due; all: at the end of the run. */
SIM_PRIVATE void sim_threads_run(int all) {
    int i = 0;
    while (i < sim.thread_count) {
        struct sim_thread thread = sim.threads[i];
        if (thread.at > sim.now && !all) {
            i++;
            continue;
        }
        sim.threads[i] = sim.threads[--sim.thread_count];
        SIM_TRACE("a thread runs");
        thread.run(thread.arg);
    }
}

/* ---- heap ------------------------------------------------------------------------------------ */

/* Each block knows its size and ends in a canary; freed and fresh memory is dirty, and a block that
   grows always moves. */
typedef struct sim_chunk {
    size_t size, mark;
} sim_chunk;

#define SIM_LIVE ((size_t)0x51b10c5e51b10c5eu)
#define SIM_DEAD ((size_t)0xdeadb10cdeadb10cu)
enum { SIM_CANARY = 16, SIM_DIRTY = 1024 };

static void sim_chunk_check(const sim_chunk *block, const char *when) {
    const unsigned char *end = (const unsigned char *)(block + 1) + block->size;
    int i;
    if (block->mark == SIM_DEAD) sim_broken(10, "a block was %s after it was freed", when);
    if (block->mark != SIM_LIVE) sim_broken(10, "no block of the heap was %s", when);
    for (i = 0; i < SIM_CANARY; i++)
        if (end[i] != 0xca) sim_broken(10, "%zu bytes were overrun", block->size);
}

static void sim_heap_free(sim_chunk *block) {
    sim_chunk_check(block, "freed");
    sim.live_bytes -= block->size;
    sim.live_blocks--;
    block->mark = SIM_DEAD;
    memset(block + 1, 0xdb, block->size < SIM_DIRTY ? block->size : SIM_DIRTY);
    free(block);
}

static void *sim_heap_take(size_t size) {
    sim_chunk *block = (sim_chunk *)malloc(sizeof *block + size + SIM_CANARY);
    if (!block) sim_broken(0, "no memory for %zu bytes", size);
    block->size = size;
    block->mark = SIM_LIVE;
    sim.live_bytes += size;
    sim.live_blocks++;
    memset(block + 1, 0xa1, size < SIM_DIRTY ? size : SIM_DIRTY);
    memset((char *)(block + 1) + size, 0xca, SIM_CANARY);
    return block + 1;
}

SIM_PRIVATE void *sim_realloc(void *memory, size_t size) {
    sim_chunk *old = memory ? (sim_chunk *)memory - 1 : NULL;
    void *grown;
    if (!size) {
        if (old) sim_heap_free(old);
        return NULL;
    }
    if (old) sim_chunk_check(old, "grown");
    if (sim_fault(CALL_ALLOC)) {
        sim.alloc_failed++;
        return NULL;
    }
    grown = sim_heap_take(size);
    if (old) {
        memcpy(grown, memory, old->size < size ? old->size : size);
        sim_heap_free(old);
    }
    return grown;
}

/* ---- memory for stacks ----------------------------------------------------------------------- */

/* Mappings are kept from run to run by their size, with real guards: a page that was a guard once
   is one in every mapping of that size, since stacks of one size lie alike. */
enum { SIM_MAPS = 16 };
static struct sim_map {
    char *memory;
    size_t size;
    int used, guarded;
} sim_maps[SIM_MAPS];

SIM_PRIVATE void *sim_mmap(size_t size) {
    struct sim_map *map;
    int error = sim_enter(CALL_MMAP);
    if (error) {
        errno = error;
        return MAP_FAILED;
    }
    for (map = sim_maps; map < sim_maps + SIM_MAPS; map++) {
        if (map->used || (map->memory && map->size != size)) continue;
        if (!map->memory) {
            map->memory = (char *)mmap(NULL, size, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (map->memory == MAP_FAILED) sim_broken(0, "no memory for stacks");
            map->size = size;
        }
        map->used = 1;
        sim.maps++;
        return map->memory;
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

static struct sim_map *sim_map_of(const void *memory) {
    struct sim_map *map = sim_maps;
    for (; map < sim_maps + SIM_MAPS; map++)
        if (map->used && (const char *)memory >= map->memory &&
            (const char *)memory < map->memory + map->size)
            return map;
    sim_broken(10, "memory that is not mapped was unmapped or protected");
}

SIM_PRIVATE int sim_munmap(void *memory, size_t size) {
    struct sim_map *map = sim_map_of(memory);
    if (map->memory != memory || map->size != size)
        sim_broken(10, "a part of a mapping was unmapped");
    map->used = 0;
    map->guarded = 1;
    sim.maps--;
    return 0;
}

SIM_PRIVATE int sim_mprotect(void *memory, size_t size, int protection) {
    int error = sim_enter(CALL_MPROTECT);
    struct sim_map *map = sim_map_of(memory);
    if (error) return sim_fail(error);
    return map->guarded ? 0 : mprotect(memory, size, protection);
}

/* Advice 102 installs guards from Linux 6.13 on; an older kernel does not know it. A mapping whose
   first user failed half-way may lack some guards later: no test depends on them. */
SIM_PRIVATE int sim_madvise(void *memory, size_t size, int advice) {
    struct sim_map *map = sim_map_of(memory);
    int error;
    if (advice != 102) return 0;
    error = sim_enter(CALL_GUARD);
    if (error) return sim_fail(error);
    return map->guarded ? 0 : mprotect(memory, size, PROT_NONE);
}

/* ---- the table of descriptors ---------------------------------------------------------------- */

/* The lowest free number, as POSIX has it: numbers are reused at once. */
static int sim_fd_take(sim_object *object) {
    int fd;
    for (fd = SIM_FIRST_FD; fd < sim.fd_limit && sim.fds[fd]; fd++) continue;
    if (fd >= sim.fd_limit) {
        sim_note(sim.injected, EMFILE);
        return sim_fail(EMFILE);
    }
    sim.fds[fd] = object;
    sim.open_fds++;
    if (fd >= sim.fd_top) sim.fd_top = fd + 1;
    if (!object->refs++) object->fd = fd;
    return fd;
}

static sim_object *sim_object_new(sim_kind kind) {
    sim_object *object;
    int i;
    for (i = 0; i < SIM_OBJECTS; i++) {
        object = &sim.objects[sim.object_count];
        if (sim.object_count >= sim.object_top) sim.object_top = sim.object_count + 1;
        sim.object_count = (sim.object_count + 1) % SIM_OBJECTS;
        if (object->kind != SIM_FREE) continue;
        memset(object, 0, sizeof *object);
        object->kind = kind;
        object->fd = -1;
        return object;
    }
    sim_broken(0, "too many objects");
}

/* A descriptor for a new object, or -1. */
static int sim_open(sim_kind kind, sim_object **object) {
    int fd;
    *object = sim_object_new(kind);
    fd = sim_fd_take(*object);
    if (fd < 0) (*object)->kind = SIM_FREE;
    return fd;
}

/* Using a number that is not open is a fault that a correct library never commits. */
static sim_object *sim_object_at(int fd, sim_call call) {
    if (fd < SIM_FIRST_FD || fd >= SIM_FDS || !sim.fds[fd])
        sim_broken(2, "%s of descriptor %d, which is not open", sim_calls[call].name, fd);
    return sim.fds[fd];
}

/* Notes an error as told to the program, which then has a reason for what it reports. */
static int sim_tell(sim_object *object, int error) {
    sim_note(object->told, error);
    if (!object->side) sim_note(sim.told_connecting, error);
    return sim_fail(error);
}

#endif
