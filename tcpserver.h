/* tcpserver.h 0.1.0: a TCP server library in one file.
 *
 * An event loop, buffered streams with read_until and write, coroutines that make a connection's
 * handler read like blocking code, and a server that listens, limits, drains and forks over all
 * cores. Linux (epoll), macOS and the BSDs (kqueue), other POSIX systems (poll). Needs libc alone.
 *
 * USE
 *   Copy this file. In exactly one source file of the project:
 *
 *       #define TCPSERVER_IMPLEMENTATION
 *       #include "tcpserver.h"
 *
 *   and plain #include "tcpserver.h" in the others. In a strict mode such as -std=c99 the first of
 *   these comes before the system's headers. This is a complete line echo server:
 *
 *       #define TCPSERVER_IMPLEMENTATION
 *       #include "tcpserver.h"
 *       #include <stdio.h>
 *
 *       static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
 *           tcpsrv_bytes line;
 *           int err;
 *           (void)peer; (void)user;
 *           while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
 *               if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
 *           return err;
 *       }
 *
 *       int main(void) {
 *           tcpsrv_options options = { 0 };
 *           tcpsrv *server;
 *           options.handle_stream = echo;
 *           server = tcpsrv_new(&options);
 *           if (!server || tcpsrv_listen(server, 8888, NULL) != 0) {
 *               fprintf(stderr, "%s\n", tcpsrv_last_error());
 *               return 1;
 *           }
 *           return tcpsrv_loop_run(tcpsrv_loop_default());
 *       }
 *
 *       cc echo.c -o echo && ./echo
 *
 * RULES THAT HOLD EVERYWHERE
 *   Errors     A function that can fail returns 0 or a negative code: -errno for the system's, a
 *              TCPSRV_E... for the library's own, or NULL where it returns a pointer. Ids are
 *              positive. tcpsrv_last_error() then holds one sentence with the step, the place and
 *              the cause; tcpsrv_strerror() names any code. NULL where an object is required, or
 *              a call from another thread than the loop's, is undefined.
 *   Options    Structs in which zero means the default. They are copied, and so are their strings.
 *   Units      Times are milliseconds in an int64_t or int named ..._ms, -1 for "no limit"; the
 *              clock is monotonic, in nanoseconds. Sizes are bytes in a size_t.
 *   Threads    A loop and all that hangs on it belong to one thread. tcpsrv_post is the one call
 *              for others. Loops in different threads share nothing. Host names to connect to
 *              are looked up in threads of the library's own, which touch nothing of yours.
 *   Callbacks  Run on the loop, one at a time, never inside the call that asked for them. Any
 *              object may be closed, freed or cancelled in any of them.
 *   Coroutines A waiting call parks its coroutine, and the loop goes on with the others. Made
 *              outside a coroutine while the loop does not run, it runs the loop until it is
 *              done, so that a small client is a straight main (tcpsrv_loop_stop ends it with
 *              TCPSRV_ECANCELED); while the loop does run, it is refused with
 *              TCPSRV_ENOTCORO. Calls without a stream or a loop mean the coroutine's loop,
 *              outside coroutines the thread's own.
 *   Streams    Only tcpsrv_close, tcpsrv_abort, the handler's return and tcpsrv_loop_free end a
 *              stream's life. A peer's reset or a failed call makes it dead at once: requests
 *              end, the descriptor closes, tcpsrv_closed is true; the memory stays until one of
 *              those calls. Where only callbacks used it, a dead stream is freed after its
 *              on_close, or, where none is set, after the callback that carried the error;
 *              tcpsrv_close inside either does nothing. After close or abort, once the current
 *              callback has returned or the current coroutine waits next, only tcpsrv_by_id may
 *              be asked about it.
 *   Bytes      A tcpsrv_bytes points into the stream's own buffer. With coroutines it holds until
 *              the next read on that stream, across other waits; with callbacks until the
 *              callback returns or the next read, whichever is first.
 *   Output     What the writes of one callback or coroutine run queued leaves with one system
 *              call when that run ends or waits; above 64 KB the write itself sends. Before a
 *              long computation, tcpsrv_flush.
 *   Memory     Everything comes from TCPSERVER_REALLOC, coroutine stacks from mmap. Out of memory
 *              is -ENOMEM returned, or one connection dropped with a log line.
 *   Signals    No handler is installed unless tcpsrv_on_signal, tcpsrv_drain_on_signal, an option
 *              named ..._on_... or tcpsrv_fork_processes asked for it. SIGPIPE never reaches the
 *              program.
 *
 * SWITCHES (define before the include that has the implementation)
 *   TCPSERVER_IMPLEMENTATION   compile the implementation here
 *   TCPSERVER_STATIC           as a private copy of this file: everything static
 *   TCPSERVER_TLS              with TLS, in every file that includes this; link with -lbearssl
 *   TCPSERVER_NO_COROUTINES    leave out coroutines, handle_stream and the waiting calls' parking
 *   TCPSERVER_USE_EPOLL, TCPSERVER_USE_KQUEUE, TCPSERVER_USE_POLL   instead of the system's best
 *   TCPSERVER_REALLOC(ptr, size)   realloc's contract, also among threads; size 0 frees, and its
 *                                  result is ignored
 *   Where <valgrind/memcheck.h> was included before, valgrind is told of coroutine stacks, and
 *   nothing is read that nobody has written.
 *
 * SECTIONS (search for the tag)
 *   >>api         what a user reads: constants, types, every call and its contract
 *   >>platform    system headers, compiler and processor, thin wrappers of every system call
 *   >>poller      epoll, kqueue and poll behind the same few functions
 *   >>loop        turns, ids, timers, posted calls, signals, watches
 *   >>coroutine   stacks, the context switch, spawn, join, park, wake, sleep
 *   >>buffer      blocks, and the output queue made of them
 *   >>stream      read values, writing, closing, over a transport of three functions
 *   >>waiting     the waiting calls: the callback ones, and parking until they are done
 *   >>tls         TLS as a second transport, over BearSSL; absent unless TCPSERVER_TLS
 *   >>sockets     addresses, listening sockets, connecting
 *   >>server      accepting, limits, stop, drain
 *   >>process     forking, supervising, replacing workers, handing over to a successor
 *
 * MIT licence, see the end of the file.
 */

/* ==== >>api =================================================================================== */

#ifndef TCPSERVER_H
#define TCPSERVER_H

#include <stddef.h>
#include <stdint.h>

#if defined(TCPSERVER_STATIC) && !defined(TCPSERVER_IMPLEMENTATION)
#define TCPSERVER_IMPLEMENTATION
#endif

#if defined(TCPSERVER_STATIC) && defined(__GNUC__)
#define TCPSRV_API static __attribute__((unused))
#elif defined(TCPSERVER_STATIC)
#define TCPSRV_API static
#else
#define TCPSRV_API extern
#endif

#if defined(__GNUC__)
#define TCPSRV_PRINTF(nth, first) __attribute__((format(printf, nth, first)))
#else
#define TCPSRV_PRINTF(nth, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TCPSRV_VERSION_MAJOR 0
#define TCPSRV_VERSION_MINOR 1
#define TCPSRV_VERSION_PATCH 0
#define TCPSRV_VERSION "0.1.0"

/* Codes of the library; all others are -errno. */
enum {
    TCPSRV_EOF = -10001,       /* the peer has finished; part of a message stays readable */
    TCPSRV_ECLOSED = -10002,   /* closed or aborted on this side */
    TCPSRV_ECANCELED = -10003, /* the read was cancelled, or the loop is being freed */
    TCPSRV_EBUSY = -10004,     /* not now: a read waits already, the loop runs already, ... */
    TCPSRV_ETOOBIG = -10005,   /* the message is longer than its max; its bytes stay */
    TCPSRV_EBUFFULL = -10006,  /* no room in the output queue, nothing was queued; memory_limit */
    TCPSRV_ETIMEDOUT = -10007, /* the time given has passed */
    TCPSRV_ENOTCORO = -10008,  /* a waiting call outside a coroutine while the loop runs */
    TCPSRV_EREFUSED = -10009,  /* refused by the caller's own framing */
    TCPSRV_ETLS = -11000,      /* TLS; the engine's own code n is TCPSRV_ETLS - n */
    TCPSRV_ETLS_TRUNCATED = -11801, /* the connection ended without TLS's own end */
    TCPSRV_ETLS_PLAIN = -11802,     /* the peer does not speak TLS */
    TCPSRV_ETLS_NAME = -11803,      /* on_sni refused the server name */
    TCPSRV_ETLS_USAGE = -11804,     /* the peer's certificate is for another use */
    TCPSRV_ETLS_VERSION = -11805,   /* the peer does not know TLS 1.2 */
    TCPSRV_ETLS_BUFFERED = -11806,  /* plain bytes were read before start_tls */
    TCPSRV_ERESOLVE = -12000   /* a host name; the resolver's own code n is TCPSRV_ERESOLVE - |n| */
};

enum { TCPSRV_READ = 1, TCPSRV_WRITE = 2, TCPSRV_HANGUP = 4 }; /* descriptor events */
enum { TCPSRV_LOG_ERROR, TCPSRV_LOG_WARNING, TCPSRV_LOG_INFO, TCPSRV_LOG_DEBUG }; /* log levels */
enum { TCPSRV_PROXY_OFF, TCPSRV_PROXY_OPTIONAL, TCPSRV_PROXY_REQUIRED }; /* proxy_protocol */

typedef struct tcpsrv tcpsrv;
typedef struct tcpsrv_loop tcpsrv_loop;
typedef struct tcpsrv_stream tcpsrv_stream;
typedef struct tcpsrv_tls tcpsrv_tls; /* of use with TCPSERVER_TLS */

typedef struct tcpsrv_bytes {
    const char *data;
    size_t size;
} tcpsrv_bytes;

typedef struct tcpsrv_address {
    int family;           /* AF_INET, AF_INET6, AF_UNIX; 0: not known */
    unsigned scope_id;    /* zone of a link-local IPv6 address */
    unsigned short port;  /* host byte order */
    unsigned char ip[16]; /* network byte order, IPv4 in the first four */
    char path[110];       /* Unix: the path, "@name" for an abstract name, "" for an unnamed peer */
} tcpsrv_address;

/* The last failed call's sentence in this thread, such as "bind 0.0.0.0:80: Permission denied".
   Set when the call returns in its coroutine, valid until the next failure. "" before the first. */
TCPSRV_API const char *tcpsrv_last_error(void);

/* Names any code that a function of this library returned. A static or per-thread string. */
TCPSRV_API const char *tcpsrv_strerror(int code);

/* "192.0.2.1:80", "[2001:db8::1]:80", "unix:/run/app.sock". Cut to size, NUL-terminated; returns
   text. TCPSRV_ADDRESS_TEXT bytes are always enough. */
enum { TCPSRV_ADDRESS_TEXT = 128 };
TCPSRV_API const char *tcpsrv_address_text(const tcpsrv_address *address, char *text, size_t size);

/* ---- loop ------------------------------------------------------------------------------------ */

typedef void tcpsrv_fn(void *arg);
typedef void tcpsrv_signal_fn(int signo, void *arg);
typedef void tcpsrv_watch_fn(int fd, int events, void *arg);

/* This thread's loop, made at first use. NULL: -ENOMEM, -EMFILE and the like. */
TCPSRV_API tcpsrv_loop *tcpsrv_loop_default(void);

/* A further loop of this thread. NULL as above. */
TCPSRV_API tcpsrv_loop *tcpsrv_loop_new(void);

/* Ends a loop and all that hangs on it. Every waiting coroutine resumes with TCPSRV_ECANCELED, and
   from then on every waiting call returns that at once, so that handlers unwind; one that makes
   1,000 more of them is abandoned with a log line. Streams are aborted, their requests end with
   TCPSRV_ECANCELED and their on_close is called; timers and watches are dropped. Servers of the
   loop stay until tcpsrv_free. TCPSRV_EBUSY in a callback or coroutine. */
TCPSRV_API int tcpsrv_loop_free(tcpsrv_loop *loop);

/* Turns until tcpsrv_loop_stop, then 0. Stopped before it began, it returns at once. TCPSRV_EBUSY
   in a callback or coroutine of this thread, and in a process forked after the loop was made. */
TCPSRV_API int tcpsrv_loop_run(tcpsrv_loop *loop);

/* The running turn ends first. From other threads: through tcpsrv_post. */
TCPSRV_API void tcpsrv_loop_stop(tcpsrv_loop *loop);

/* One turn: waits up to timeout_ms (-1: for ever) for something to do, and does what is ready.
   0, or TCPSRV_EBUSY as for tcpsrv_loop_run. */
TCPSRV_API int tcpsrv_loop_poll(tcpsrv_loop *loop, int timeout_ms);

/* For life inside another loop: a descriptor that is readable when the loop has something to do
   (epoll, kqueue; -ENOTSUP with poll), and the milliseconds until it must have a turn all the
   same: 0 when work is ready, -1 for never. To be asked before each wait; after it,
   tcpsrv_loop_poll(loop, 0). */
TCPSRV_API int tcpsrv_loop_fd(const tcpsrv_loop *loop);
TCPSRV_API int tcpsrv_loop_timeout(const tcpsrv_loop *loop);

/* Monotonic time in nanoseconds, read once a turn. */
TCPSRV_API uint64_t tcpsrv_loop_now(const tcpsrv_loop *loop);

/* Timers: fn(arg) once on the next turn, once after delay_ms, or every period_ms (> 0) on the grid
   begun by the call; what a late loop missed is skipped. Equal deadlines run in the order of the
   calls. A timer made by a timer waits for the next turn. Returns an id, -ENOMEM, or -EINVAL. */
TCPSRV_API int64_t tcpsrv_call_later(tcpsrv_loop *loop, int64_t delay_ms, tcpsrv_fn *fn, void *arg);
TCPSRV_API int64_t tcpsrv_call_every(tcpsrv_loop *loop, int64_t period_ms, tcpsrv_fn *fn,
                                     void *arg);
static inline int64_t tcpsrv_call_soon(tcpsrv_loop *loop, tcpsrv_fn *fn, void *arg) {
    return tcpsrv_call_later(loop, 0, fn, arg);
}

/* Calls fn(fd, events, arg) as long as the descriptor is ready (level-triggered); events is a set
   of TCPSRV_READ and TCPSRV_WRITE, a hang-up or error is told as TCPSRV_HANGUP besides. The
   descriptor stays the caller's: cancel before closing it. An id, -EEXIST where it is watched
   already, -EPERM where it cannot be (a regular file), -ENOMEM. */
TCPSRV_API int64_t tcpsrv_watch_fd(tcpsrv_loop *loop, int fd, int events, tcpsrv_watch_fn *fn,
                                   void *arg);

/* Ends a timer, a watch or a signal's call. An id whose object is gone does nothing. */
TCPSRV_API void tcpsrv_cancel(tcpsrv_loop *loop, int64_t id);

/* From any thread: fn(arg) on the loop, in the order of the calls. The loop must not be freed
   meanwhile; calls still queued then are dropped. 0 or -ENOMEM. */
TCPSRV_API int tcpsrv_post(tcpsrv_loop *loop, tcpsrv_fn *fn, void *arg);

/* Calls fn(signo, arg) on the loop, never in the handler; deliveries may merge. The process's
   disposition is restored when the last call for the signal is cancelled. One loop a signal.
   An id, -EINVAL for a signal that cannot be caught, TCPSRV_EBUSY where another loop has it. */
TCPSRV_API int64_t tcpsrv_on_signal(tcpsrv_loop *loop, int signo, tcpsrv_signal_fn *fn, void *arg);

/* ---- coroutines ------------------------------------------------------------------------------ */

/* Runs fn(arg) as a coroutine from the next turn on. stack_size 0: 64 KiB, at least 16 KiB. An id;
   -ENOMEM, or -ENOTSUP where there are no coroutines. Results wait for a join as long as no more
   than 65,536 others have ended since. */
TCPSRV_API int64_t tcpsrv_spawn(tcpsrv_loop *loop, int (*fn)(void *arg), void *arg,
                                size_t stack_size);

/* Waits for a coroutine of this loop and gives its result, once. -ESRCH where the id is unknown or
   was joined before, TCPSRV_EBUSY where another joins it, -EDEADLK for oneself. */
TCPSRV_API int tcpsrv_join(int64_t id);

/* The running coroutine's id; 0 outside. */
TCPSRV_API int64_t tcpsrv_self(void);

TCPSRV_API int tcpsrv_sleep(int64_t delay_ms); /* waits (below 0: as 0); 0, TCPSRV_ECANCELED */
TCPSRV_API int tcpsrv_yield(void);             /* lets everything else that is ready run once */

/* Waits until a foreign descriptor is ready. The events (> 0), TCPSRV_ETIMEDOUT, or the errors of
   tcpsrv_watch_fd. */
TCPSRV_API int tcpsrv_wait_fd(int fd, int events, int64_t timeout_ms);

/* Waits until tcpsrv_wake(id of this coroutine). A wake before the park is remembered once. 0,
   TCPSRV_ETIMEDOUT, TCPSRV_ECANCELED; TCPSRV_ENOTCORO outside a coroutine. */
TCPSRV_API int tcpsrv_park(int64_t timeout_ms);
TCPSRV_API void tcpsrv_wake(tcpsrv_loop *loop, int64_t id); /* a dead id does nothing */

/* ---- streams: reading ------------------------------------------------------------------------ */

/* What a read wants. Made by the functions below, used at once; max 0 means the stream's
   max_buffer_size. */
typedef int64_t tcpsrv_find_end_fn(const char *data, size_t size, void *arg);
typedef union tcpsrv_extent {
    size_t size;                  /* of the delimiter, of the message, of the caller's memory */
    tcpsrv_find_end_fn *find_end;
} tcpsrv_extent;
typedef struct tcpsrv_want {
    int kind;
    size_t max;
    void *memory;                 /* the delimiter, the regex, the caller's memory, or arg */
    tcpsrv_extent extent;
} tcpsrv_want;
enum {
    TCPSRV__WANT_CHAR = 1, TCPSRV__WANT_UNTIL,  /* delimiters, of one byte and of more */
    TCPSRV__WANT_REGEX, TCPSRV__WANT_FRAME,     /* the others with a search, */
    TCPSRV__WANT_SOME,                          /* and that need a byte */
    TCPSRV__WANT_EXACTLY, TCPSRV__WANT_INTO, TCPSRV__WANT_CLOSE, TCPSRV__WANT_READY
};

static inline tcpsrv_want tcpsrv__want(int kind, size_t size, size_t max, const void *memory) {
    tcpsrv_want want;
    want.kind = kind;
    want.extent.size = size;
    want.max = max;
    want.memory = (void *)(uintptr_t)memory;
    return want;
}

/* Up to and with a delimiter, which is borrowed until the read ends. TCPSRV_ETOOBIG when the
   message with its delimiter is longer than max, found or not. */
TCPSRV_API tcpsrv_want tcpsrv_until(const char *delimiter, size_t max);
static inline tcpsrv_want tcpsrv_until_mem(const void *delimiter, size_t size, size_t max) {
    int kind = size > 1 ? TCPSRV__WANT_UNTIL : size ? TCPSRV__WANT_CHAR : 0;
    return tcpsrv__want(kind, size, max, delimiter);
}
/* As tcpsrv_until, for a compiled POSIX regex_t (leftmost match in what has arrived). */
static inline tcpsrv_want tcpsrv_until_regex(const void *regex, size_t max) {
    return tcpsrv__want(TCPSRV__WANT_REGEX, 1, max, regex);
}
/* Exactly so many bytes. TCPSRV_ETOOBIG at once when that is more than max_buffer_size. */
static inline tcpsrv_want tcpsrv_exactly(size_t size) {
    return tcpsrv__want(TCPSRV__WANT_EXACTLY, size, 0, NULL);
}
/* 1 to max bytes, as soon as there are any. */
static inline tcpsrv_want tcpsrv_some(size_t max) {
    return tcpsrv__want(TCPSRV__WANT_SOME, 1, max, NULL);
}
/* Exactly size bytes into the caller's memory, borrowed until the read ends. */
static inline tcpsrv_want tcpsrv_into(void *memory, size_t size) {
    return tcpsrv__want(TCPSRV__WANT_INTO, size, 0, memory);
}
/* All until the peer finishes, possibly nothing. */
static inline tcpsrv_want tcpsrv_until_close(size_t max) {
    return tcpsrv__want(TCPSRV__WANT_CLOSE, 1, max, NULL);
}
/* The caller's own framing: find_end(data, size, arg) gives the message's length, also when it is
   more than size (it is then not asked again until that much is there), 0 for not yet, negative to
   end the read with TCPSRV_EREFUSED. */
static inline tcpsrv_want tcpsrv_frame(tcpsrv_find_end_fn *find_end, void *arg, size_t max) {
    tcpsrv_want want = tcpsrv__want(TCPSRV__WANT_FRAME, 0, max, arg);
    want.extent.find_end = find_end;
    return want;
}
/* No bytes: until the stream is connected, and its TLS handshake over. */
static inline tcpsrv_want tcpsrv_ready(void) {
    return tcpsrv__want(TCPSRV__WANT_READY, 0, 0, NULL);
}

/* Reads with a callback: fn(stream, err, bytes, arg) exactly once, never before this returns. One
   read at a time: TCPSRV_EBUSY, and the first is untouched. err is 0; TCPSRV_EOF, ETOOBIG,
   ETIMEDOUT, ECANCELED, EREFUSED, EBUFFULL (at memory_limit): the bytes stay for the next read;
   TCPSRV_ECLOSED; -ENOMEM; or why the stream died. Above write_high_water of queued output it
   waits for the peer. */
typedef void tcpsrv_read_fn(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg);
TCPSRV_API int tcpsrv_read(tcpsrv_stream *stream, tcpsrv_want want, tcpsrv_read_fn *fn, void *arg);

/* Reads and waits; bytes may be NULL. The codes above, and TCPSRV_ENOTCORO. */
TCPSRV_API int tcpsrv_await(tcpsrv_stream *stream, tcpsrv_want want, tcpsrv_bytes *bytes);
TCPSRV_API int tcpsrv_read_until(tcpsrv_stream *stream, const char *delimiter, size_t max,
                                 tcpsrv_bytes *bytes);
static inline int tcpsrv_read_bytes(tcpsrv_stream *stream, size_t size, tcpsrv_bytes *bytes) {
    return tcpsrv_await(stream, tcpsrv_exactly(size), bytes);
}
static inline int tcpsrv_read_some(tcpsrv_stream *stream, size_t max, tcpsrv_bytes *bytes) {
    return tcpsrv_await(stream, tcpsrv_some(max), bytes);
}
static inline int tcpsrv_read_into(tcpsrv_stream *stream, void *memory, size_t size) {
    return tcpsrv_await(stream, tcpsrv_into(memory, size), NULL);
}
static inline int tcpsrv_read_until_close(tcpsrv_stream *stream, size_t max, tcpsrv_bytes *bytes) {
    return tcpsrv_await(stream, tcpsrv_until_close(max), bytes);
}

/* What is buffered, not consumed; nothing while a read waits. Returns its size. */
TCPSRV_API size_t tcpsrv_peek(const tcpsrv_stream *stream, tcpsrv_bytes *bytes);

/* Ends a waiting read with TCPSRV_ECANCELED, from the loop: until then the next one is
   TCPSRV_EBUSY. Its bytes stay for that. Without a waiting read it does nothing. */
TCPSRV_API void tcpsrv_cancel_read(tcpsrv_stream *stream);

/* ---- streams: writing and closing ------------------------------------------------------------ */

/* In a coroutine: returns when everything is queued or sent and at most write_high_water is queued;
   what is more goes from the caller's memory while the coroutine waits. Outside one: never waits;
   all is queued, or TCPSRV_EBUFFULL (max_write_buffer_size) and nothing. Several writers are served
   whole and in order. The bytes are copied, but for those that a read has just handed out: these
   may leave from where they are and must not be changed any more once they are written.
   0; TCPSRV_ECLOSED; -ENOMEM; why the stream is dead; TCPSRV_ETIMEDOUT. */
TCPSRV_API int tcpsrv_write(tcpsrv_stream *stream, const void *data, size_t size);
TCPSRV_API int tcpsrv_writev(tcpsrv_stream *stream, const tcpsrv_bytes *pieces, int count);
TCPSRV_API int tcpsrv_printf(tcpsrv_stream *stream, const char *format, ...) TCPSRV_PRINTF(2, 3);

/* As tcpsrv_write outside a coroutine, also inside one: for broadcasts. */
TCPSRV_API int tcpsrv_try_write(tcpsrv_stream *stream, const void *data, size_t size);

/* Queues size bytes of a file from offset on, without copies through user space where the system
   can. In a coroutine it waits until they are out; outside one fd may be closed at once. A file
   that is shorter than promised ends the stream with -EIO. */
TCPSRV_API int tcpsrv_sendfile(tcpsrv_stream *stream, int fd, int64_t offset, size_t size);

/* Until the kernel has every byte queued so far: waiting, or fn(stream, err, arg) once. */
typedef void tcpsrv_flush_fn(tcpsrv_stream *stream, int err, void *arg);
TCPSRV_API int tcpsrv_flush(tcpsrv_stream *stream);
TCPSRV_API int tcpsrv_on_flush(tcpsrv_stream *stream, tcpsrv_flush_fn *fn, void *arg);

/* Ends the sending side once all is flushed; never waits; reading goes on. Later writes:
   TCPSRV_ECLOSED. 0; TCPSRV_ECLOSED after tcpsrv_close; why the stream is dead; -ENOTSUP over TLS,
   as TLS 1.2 has no half-close. */
TCPSRV_API int tcpsrv_shutdown(tcpsrv_stream *stream);

/* Ends the stream; never waits, never calls back before it returns. Then, from the loop: requests
   end with TCPSRV_ECLOSED; output is flushed; the sending side is shut; late input is swallowed
   (until the peer's end, 64 KB or 2 s), so that the kernel's reset does not destroy what the peer
   has not read (RFC 1122 4.2.2.13); on_close; all within close_timeout_ms. A write that still waits
   ends with TCPSRV_ECLOSED and makes it an abort: a torn message never ends as if whole. */
TCPSRV_API void tcpsrv_close(tcpsrv_stream *stream);

/* The same at once: queued output is dropped and the peer gets a reset (RFC 9293 3.10.5). */
TCPSRV_API void tcpsrv_abort(tcpsrv_stream *stream);

/* fn(stream, result, unsent, arg) once, when the stream has ended: 0 where it ended in order and
   the kernel took all that was written, else why not, and how many bytes it did not take. Also
   called, from the loop, when set on a stream that is dead already. The last one set counts; NULL
   for none. 0 or -ENOMEM. */
typedef void tcpsrv_close_fn(tcpsrv_stream *stream, int result, size_t unsent, void *arg);
TCPSRV_API int tcpsrv_on_close(tcpsrv_stream *stream, tcpsrv_close_fn *fn, void *arg);

/* ---- streams: the rest ----------------------------------------------------------------------- */

TCPSRV_API int tcpsrv_error(const tcpsrv_stream *stream);   /* why it is dead; 0 while it lives */
TCPSRV_API int tcpsrv_closed(const tcpsrv_stream *stream);  /* 1: dead, closed or closing */
TCPSRV_API int tcpsrv_reading(const tcpsrv_stream *stream); /* 1: a read waits */
TCPSRV_API int tcpsrv_writing(const tcpsrv_stream *stream); /* 1: output is queued */

/* read_ms: the longest that one read may take as a whole, however its bytes trickle; it then ends
   with TCPSRV_ETIMEDOUT and its bytes stay. It counts from the call that reads, so with what is
   left of connecting and the TLS handshake, and holds for the reads made from now on. write_ms: the
   longest in which the kernel takes no byte of what is queued; the stream is then dead. 0 or -1:
   none. 0 or -ENOMEM. */
TCPSRV_API int tcpsrv_set_timeout(tcpsrv_stream *stream, int64_t read_ms, int64_t write_ms);
TCPSRV_API int tcpsrv_set_nodelay(tcpsrv_stream *stream, int on); /* TCP_NODELAY, tcp(7) */

/* While a stream connects, peer is the address tried last, or none yet (family 0), and local and
   set_nodelay give -ENOTCONN; a stream that is closed gives TCPSRV_ECLOSED. */
TCPSRV_API int tcpsrv_peer(const tcpsrv_stream *stream, tcpsrv_address *address);
TCPSRV_API int tcpsrv_local(const tcpsrv_stream *stream, tcpsrv_address *address);
TCPSRV_API int tcpsrv_fd(const tcpsrv_stream *stream); /* its own; -1: connecting, or closed */
TCPSRV_API void *tcpsrv_user(const tcpsrv_stream *stream); /* the server's user until it is set */
TCPSRV_API void tcpsrv_set_user(tcpsrv_stream *stream, void *user);
TCPSRV_API tcpsrv_loop *tcpsrv_stream_loop(const tcpsrv_stream *stream);

/* An id that cannot dangle: a stream that is closed or gone is NULL, never another one. */
TCPSRV_API int64_t tcpsrv_id(const tcpsrv_stream *stream);
TCPSRV_API tcpsrv_stream *tcpsrv_by_id(tcpsrv_loop *loop, int64_t id);

/* A client stream, returned at once and still connecting; its first read, write or flush waits for
   the connection, and a failure ends them with its code: tcpsrv_last_error then names that step,
   such as "resolve no.such.host:80: ..." or "connect 192.0.2.1:80: Connection refused". The
   addresses of a name are tried in the resolver's order, the families in turn, the next when one
   has failed or after 250 ms; the first that is connected stays, and the failure is the last one's
   (RFC 8305). A name is looked up by getaddrinfo(3) in a helper thread of the loop (16 at most);
   numeric addresses need none. A stream or loop that ends before does not wait for its lookup, and
   the thread frees what it has. A connection that meets itself is refused. NULL where
   it fails at once: -EINVAL, a numeric source or host that cannot be used, -ENOMEM, -EMFILE, ...;
   for a name -EAGAIN where no thread can be made, -ENOTSUP where the program was linked without
   threads (-pthread, on glibc before 2.34 and the BSDs). */
typedef struct tcpsrv_connect_options {
    const char *host;             /* a name, or numeric IPv4 or IPv6 */
    int port;
    int family;                   /* AF_INET or AF_INET6; 0: both */
    const char *path;             /* instead: a Unix socket; "@name" for an abstract one */
    const char *source_host;      /* numeric; NULL: the system's choice */
    int source_port;
    int64_t timeout_ms;           /* for lookup, connection and TLS together; 0: the system's own */
    int no_nodelay;
    tcpsrv_tls *tls;              /* what the connection begins with; NULL: no TLS */
    const char *tls_name;         /* whom the server's certificate must name; NULL: host */
    size_t max_buffer_size, max_write_buffer_size, write_high_water;   /* as tcpsrv_options */
} tcpsrv_connect_options;
TCPSRV_API tcpsrv_stream *tcpsrv_connect(tcpsrv_loop *loop, const tcpsrv_connect_options *options);

/* A stream over a pipe, a socketpair, a terminal or a regular file (always ready). It owns fd and
   restores its O_NONBLOCK when it closes it. NULL: -EBADF, -ENOMEM, ... */
TCPSRV_API tcpsrv_stream *tcpsrv_stream_from_fd(tcpsrv_loop *loop, int fd);

/* ---- server ---------------------------------------------------------------------------------- */

/* Serves one connection. As handle_stream it is a coroutine: when it returns, what it wrote is
   flushed and the stream is closed. 0, TCPSRV_EOF, ECLOSED and ECANCELED are silent ends; resets
   and timeouts are logged at debug level, other codes at error level. As on_stream it is a callback
   that starts the first read; non-zero closes the stream. */
typedef int tcpsrv_stream_fn(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user);
typedef void tcpsrv_log_fn(int level, const char *line, void *user); /* line: without newline */
typedef void tcpsrv_drained_fn(tcpsrv *server, void *user);

typedef struct tcpsrv_options {
    tcpsrv_stream_fn *handle_stream; /* exactly one of these two */
    tcpsrv_stream_fn *on_stream;
    void *user;
    tcpsrv_loop *loop;            /* NULL: the thread's own when the server starts */
    tcpsrv_tls *tls;              /* what its connections begin with; NULL: no TLS */
    tcpsrv_log_fn *log;           /* NULL: warnings and errors to stderr */
    size_t max_buffer_size;       /* unread input a stream may hold; 1 MiB */
    size_t max_write_buffer_size; /* queued output of a stream outside coroutines; 1 MiB */
    size_t write_high_water;      /* queued output at which its sender is held back; 64 KB */
    size_t read_chunk_size;       /* first size of a large read, adapting up to 256 KB; 64 KB */
    size_t stack_size;            /* of a handler's coroutine; 64 KiB (256 under ASan) */
    size_t max_connections;       /* RLIMIT_NOFILE - 32; more wait in the backlog */
    size_t max_connections_per_ip; /* see below; none */
    size_t memory_limit;          /* see below; none */
    int64_t idle_timeout_ms;      /* without a byte in either direction; none */
    int64_t handshake_timeout_ms; /* for a PROXY header and the TLS handshake together; 10 s */
    int64_t close_timeout_ms;     /* for all of tcpsrv_close; 5 s */
    int no_nodelay;               /* 1: leave Nagle's algorithm on (RFC 896) */
    int proxy_protocol;           /* see below; TCPSRV_PROXY_OFF */
    const char *trusted;          /* who may send PROXY headers: "10.0.0.0/8, fd00::/8, unix" */
    int reload_on_hup;            /* 1: SIGHUP to the parent of workers replaces them, see there */
    char *const *upgrade_on_usr2; /* argv of the successor that SIGUSR2 starts, see there */
    tcpsrv_drained_fn *on_drained; /* NULL: stop the loop, with the last server of it to drain */
} tcpsrv_options;

/* max_connections_per_ip: a connection from an address that has so many already is closed right
   after accept. IPv6 addresses are taken together by their first 64 bits, which is the least that
   one client is given (RFC 6177); Unix peers are not counted. The address is the one that the
   handler is told, so behind a proxy that of its header.

   memory_limit: of all blocks that the server's streams hold: input that came in part, that nobody
   has read yet, or that a handler looks at; output that peers do not take. Stacks and TLS sessions
   do not count. At the limit accepting stops, and nothing more is received but for the oldest
   message that has come in part, which has a reserve of max_buffer_size; what is there is served.
   All goes on once an eighth of the limit is free. When nothing was freed for a second, the read
   that holds most ends with TCPSRV_EBUFFULL. Above the limit there is at most what one receive
   brings, and the reserve, in blocks of their size. Peers that do not take their output are ended
   by write timeouts alone: see tcpsrv_set_timeout.

   proxy_protocol: HAProxy's PROXY protocol, versions 1 and 2. The header is read before the handler
   starts, which is then told the address in it as the peer's, and so is tcpsrv_peer; what the
   header leaves open (LOCAL, UNKNOWN) is the connection's own. Headers are believed from trusted
   peers only: a list of networks and addresses, and "unix" for Unix sockets, with commas or blanks
   between. Trusted peers must send a whole header within handshake_timeout_ms; where it is
   OPTIONAL, they must send something, and what does not begin as a header is data. Other peers:
   OPTIONAL takes all their bytes as data, REQUIRED refuses them. A connection refused for its
   header is aborted, counted, and logged with its peer. */

/* A server that does not listen yet. Makes no loop, so that it may be made before a fork. NULL:
   -EINVAL (none or both of the handlers; a malformed network; proxy_protocol and nobody trusted),
   -ENOTSUP (no coroutines), -ENOMEM. */
TCPSRV_API tcpsrv *tcpsrv_new(const tcpsrv_options *options);

/* Stops, aborts the server's streams, and goes when the last handler has returned. Allowed
   anywhere, also after its loop was freed. */
TCPSRV_API void tcpsrv_free(tcpsrv *server);

/* The options with every default filled in. */
TCPSRV_API const tcpsrv_options *tcpsrv_get_options(const tcpsrv *server);

/* Binds and accepts at once: tcpsrv_bind, and tcpsrv_start(1) if it has not started yet. May be
   called again for more ports. address NULL or "": all interfaces; port 0: any free one. */
TCPSRV_API int tcpsrv_listen(tcpsrv *server, int port, const char *address);

/* Binds only, or listens at once where the server has started. A host name binds every address it
   has. -EINVAL (port), TCPSRV_ERESOLVE, -EADDRINUSE, -EADDRNOTAVAIL, -EACCES, -EMFILE, ... */
typedef struct tcpsrv_bind_options {
    int family;     /* AF_INET or AF_INET6; 0: both */
    int backlog;    /* 0: the system's most */
    int reuse_port; /* SO_REUSEPORT: several processes bind the same port; -ENOTSUP without it */
} tcpsrv_bind_options;
TCPSRV_API int tcpsrv_bind(tcpsrv *server, int port, const char *address,
                           const tcpsrv_bind_options *options);

/* Starts accepting on what was bound. num_processes 1: in this process; n: forks n; 0 or less: one
   for each core. With forks it returns in the children only, as tcpsrv_fork_processes with 100
   restarts does. TCPSRV_EBUSY when started already, or the errors of tcpsrv_fork_processes. */
TCPSRV_API int tcpsrv_start(tcpsrv *server, int num_processes);

/* Accepts on listening sockets made elsewhere; the server owns them, also when this fails. */
TCPSRV_API int tcpsrv_add_sockets(tcpsrv *server, const int *fds, int count);
static inline int tcpsrv_add_socket(tcpsrv *server, int fd) {
    return tcpsrv_add_sockets(server, &fd, 1);
}

/* Closes the listening sockets; open connections go on. It may listen again. */
TCPSRV_API void tcpsrv_stop(tcpsrv *server);

/* Stops; reads that wait at a message boundary (no byte of the message there) end with TCPSRV_EOF
   as if the peer had finished, now and later; others go on to their end, and a connection that has
   not had a message yet gets a second for its first, which is on its way. After timeout_ms what is
   left is aborted. Then on_drained. Never waits. */
TCPSRV_API void tcpsrv_drain(tcpsrv *server, int64_t timeout_ms);
TCPSRV_API int tcpsrv_draining(const tcpsrv *server);

/* Drains at a signal, and at one more aborts what is left. A process that is no child of
   tcpsrv_fork_processes also tells the service manager STOPPING=1, as the children's parent does.
   Asked for before the server starts, it is kept for the start, in each child. 0, -ENOMEM, or the
   errors of tcpsrv_on_signal. */
TCPSRV_API int tcpsrv_drain_on_signal(tcpsrv *server, int signo, int64_t timeout_ms);

/* The port of the index-th listening socket, the real one after a bind to 0. -ENOENT past the last,
   0 for a Unix socket. */
TCPSRV_API int tcpsrv_port(const tcpsrv *server, int index);

typedef struct tcpsrv_stats {
    size_t active;           /* connections open, closing ones included: those accepted less */
    uint64_t accepted;       /*   those closed */
    uint64_t closed_in_order, closed_by_reset, closed_by_timeout;
    uint64_t closed_by_abort, closed_by_error; /* on this side; every other code */
    uint64_t shed;           /* not accepted: closed at once for lack of descriptors or memory */
    uint64_t refused_per_ip; /* not accepted: closed at once over max_connections_per_ip */
    uint64_t refused_proxy;  /* closed for their PROXY header, or for not being trusted */
    uint64_t accept_pauses;  /* listener paused, for whatever reason */
    uint64_t connection_limits, memory_limits; /* of these: at max_connections, memory_limit */
    uint64_t memory_ends;    /* reads ended at memory_limit */
    uint64_t buffer_memory;  /* bytes that streams hold now, see memory_limit */
    uint64_t longest_turn_ns; /* of the loop, since it was first asked for these counters; in a */
                             /*   child of tcpsrv_fork_processes, since it began */
    uint64_t bytes_read, bytes_written;
    uint64_t timeouts_read, timeouts_write, timeouts_idle, timeouts_close, timeouts_handshake;
} tcpsrv_stats;
TCPSRV_API void tcpsrv_get_stats(const tcpsrv *server, tcpsrv_stats *stats);

/* Calls fn(stream, arg) for each live stream of the server whose handler has begun; any stream may
   be closed in it. */
TCPSRV_API void tcpsrv_foreach(tcpsrv *server, void (*fn)(tcpsrv_stream *stream, void *arg),
                               void *arg);

/* Listening sockets for an address: one for each family, IPV6_V6ONLY always (RFC 3493),
   non-blocking and close-on-exec; port 0 gives all the same port. How many of max, or the codes of
   tcpsrv_bind; -ENOSPC where max is too small. No descriptor is left open on failure. */
TCPSRV_API int tcpsrv_bind_sockets(int port, const char *address,
                                   const tcpsrv_bind_options *options, int *fds, int max);

/* A listening Unix socket with that mode (0: 0600). Replaces a socket file that nobody listens on;
   refuses a live one (-EADDRINUSE) and anything else that is there (-EEXIST). "@name": abstract
   (Linux). backlog 0: the system's most. The file is unlinked by the process that bound it, if it
   still is the one there: when a server closes the socket, or at the end of that process where it
   is the parent of tcpsrv_fork_processes. A descriptor, -ENAMETOOLONG, ... */
TCPSRV_API int tcpsrv_bind_unix_socket(const char *path, unsigned mode, int backlog);

/* ---- the service manager --------------------------------------------------------------------- */

/* The listening sockets that a service manager passed to this process (LISTEN_FDS, LISTEN_PID:
   sd_listen_fds(3)), now close-on-exec, for tcpsrv_add_sockets; the variables are cleared. Call it
   once, before other threads begin. How many of max, 0 where there are none; -ENOSPC where max is
   too small, and nothing was taken; -EINVAL; -EBADF. */
TCPSRV_API int tcpsrv_systemd_sockets(int *fds, int max);

/* The name of the index-th of them (LISTEN_FDNAMES); "" where it has none. Never NULL; up to 1,023
   bytes of all the names are kept. */
TCPSRV_API const char *tcpsrv_systemd_name(int index);

/* Tells the service manager a state such as "READY=1", "STOPPING=1" or "WATCHDOG=1" (sd_notify(3)),
   waiting a second at most for it to listen. 0, also where nobody asked to be told (NOTIFY_SOCKET);
   -ENOTSUP (neither a path nor an abstract name), -ENAMETOOLONG, or why it could not be sent. */
TCPSRV_API int tcpsrv_notify(const char *state);

/* ---- TLS ------------------------------------------------------------------------------------- */

#ifdef TCPSERVER_TLS

/* TLS 1.2 by BearSSL 0.6 (link with -lbearssl): ECDHE with AES-GCM or ChaCha20-Poly1305 alone, keys
   of RSA 2048 to 4096 and EC P-256, P-384, P-521. */

/* A certificate and its key, from files or from memory (NUL-terminated), in PEM. */
typedef struct tcpsrv_certificate {
    const char *certificate_file; /* the certificate, then those that vouch for it */
    const char *key_file;         /* PKCS#1, SEC1 or PKCS#8; NULL: in certificate_file */
    const char *certificate_pem;  /* instead of the files */
    const char *key_pem;          /* NULL: in certificate_pem */
    const char *server_name;      /* name that it is for; NULL: the names in the certificate */
} tcpsrv_certificate;

enum { TCPSRV_TLS_NONE, TCPSRV_TLS_OPTIONAL, TCPSRV_TLS_REQUIRED }; /* client certificates */

typedef struct tcpsrv_tls_options {
    const tcpsrv_certificate *certificates; /* a server's, first the default; or a client's */
    size_t certificate_count;
    const char *ca_file;          /* whom to trust, PEM. NULL on a client: the system's bundle */
    const char *ca_pem;           /* instead of the file */
    int client_certificates;      /* NONE, OPTIONAL (a bad one is refused all the same), REQUIRED */
    const char *const *alpn;      /* protocol names, the most wanted first; NULL at the end */
    int (*on_sni)(void *user, const char *name); /* index of the certificate for a client that asks
                                     for name (NULL: for none); negative: refuse it (alert 112) */
    int session_cache;            /* sessions kept; 0: 1024, none with REQUIRED; -1: none */
    unsigned session_ttl_s;       /* 0: 300 */
    int no_verify;                /* a client accepts any certificate */
    int strict;                   /* an own certificate out of its time and a key file that others
                                     may read are failures, not warnings */
    tcpsrv_log_fn *log;           /* warnings of tcpsrv_tls_new; NULL: to stderr */
    void *user;                   /* of on_sni and log */
} tcpsrv_tls_options;

/* Loads everything; the options and what they point to are not needed afterwards. NULL, and
   tcpsrv_last_error() says which file and what is wrong with it. May be used by several threads. */
TCPSRV_API tcpsrv_tls *tcpsrv_tls_new(const tcpsrv_tls_options *options);

/* Connections and servers that use it keep it as long as they need it. Its end wipes the keys. */
TCPSRV_API void tcpsrv_tls_free(tcpsrv_tls *tls);

/* New certificates for the connections that are accepted from now on; the open ones keep theirs.
   NULL: no TLS any more. TCPSRV_ETLS where tls has no certificate. */
TCPSRV_API int tcpsrv_set_tls(tcpsrv *server, tcpsrv_tls *tls);

/* Waits until the handshake is over (tcpsrv_ready). 0 at once when it is; TCPSRV_EBUSY while a read
   waits; or why it failed. Reads and writes need not ask: they wait by themselves. */
TCPSRV_API int tcpsrv_wait_handshake(tcpsrv_stream *stream);

/* Goes on in TLS: as the server on accepted streams, else as a client that wants hostname (a name
   or an address; NULL with no_verify alone). Returns at once; what was written before goes as it
   was, what is read and written from now on waits for the handshake. Nothing may be buffered
   (TCPSRV_ETLS_BUFFERED: it would be taken for what came encrypted), no read may wait and no file
   be queued (TCPSRV_EBUSY); TCPSRV_EOF: the peer has finished; -EALREADY; -ENOTSOCK; TCPSRV_ETLS:
   tls is not fit for that side. */
TCPSRV_API int tcpsrv_start_tls(tcpsrv_stream *stream, tcpsrv_tls *tls, const char *hostname);

/* What was agreed on: -ENOTCONN before the end of the handshake, and without TLS. The strings live
   as long as the stream. */
typedef struct tcpsrv_tls_info {
    const char *version;          /* "TLSv1.2" */
    const char *suite;            /* IANA's name */
    const char *alpn;             /* "": none */
    const char *server_name;      /* that the client asked for; "": none */
    int resumed;                  /* the client went on with a session */
    int has_peer;                 /* the peer has shown a certificate, */
    int verified;                 /* and an authority vouched for it, now or for the session */
    const char *peer_name;        /* common name of its subject, "" */
    const char *peer_dns;         /* its first DNS name, "" */
    unsigned char peer_sha256[32]; /* of the certificate */
} tcpsrv_tls_info;
TCPSRV_API int tcpsrv_get_tls_info(const tcpsrv_stream *stream, tcpsrv_tls_info *info);

#endif

/* ---- processes ------------------------------------------------------------------------------- */

/* Starts the program that is to take over, such as a new version of this one, while this process
   goes on serving. argv as for execvp(3). The listening sockets of this loop's servers are its
   LISTEN_FDS, in the order in which they were added, named (LISTEN_FDNAMES) as they were passed to
   this process, else by their port or path; it takes them by tcpsrv_systemd_sockets and, when it
   serves, says tcpsrv_notify("READY=1"). Then all servers of the loop drain (drain_ms as
   tcpsrv_drain's timeout_ms), and files of Unix sockets are the successor's to unlink. Where it
   ends before, or is not ready within 30 s, whereupon it gets SIGTERM, this process logs that and
   goes on as if nothing had been tried. (Its end is noticed by SIGCHLD before Linux 5.3, where the
   program leaves that alone.) A service manager (NOTIFY_SOCKET) is told the successor's
   pid as MAINPID, and what the successor says.

   Never waits: 0 means that it was started, not that it will be ready. -EINVAL (no program),
   -ENOENT (no listening socket), TCPSRV_EBUSY (one is on its way), -EPERM in a child of
   tcpsrv_fork_processes, -EAGAIN, -ENOMEM, -EMFILE; its NOTIFY_SOCKET lies in TMPDIR, or /tmp.

   A server with upgrade_on_usr2 does this at SIGUSR2, without a limit to the drain. With workers it
   is the parent that does, if the server was made before the fork: all listening sockets that the
   parent has are handed over, and the children get SIGTERM when the successor is ready. The array
   must live as long as the server. */
TCPSRV_API int tcpsrv_upgrade(char *const *argv, int64_t drain_ms);

/* Forks num_processes children (0 or less: one for each core) and returns in them: the child's
   number, from 0 on. The parent supervises and exits: 0 when all have ended with 0, 1 after giving
   up. A child that crashes or exits otherwise is restarted with the same number after a growing
   pause (0 to 30 s), at most max_restarts times in all (negative: 100); then the others are ended
   and the parent gives up. The parent handles SIGTERM and SIGINT (the children get SIGTERM, once;
   at a second one those that are left are killed) and SIGCHLD, waits for its own children only, and
   restores dispositions in each child; children ignore SIGINT and end when their parent is gone.
   Where the program has no handler of its own for SIGUSR1, the parent logs at that a line for each
   child. TCPSRV_EBUSY where this thread has a loop already or is such a child; -EAGAIN, -ENOMEM
   from fork(2), with no child left behind. On Linux a connection to a socket that they share wakes
   one of them, and they take turns; elsewhere it wakes all, and the quickest gets it.

   A server that was made before may ask for SIGUSR2, see tcpsrv_upgrade.
   If one that was made before has reload_on_hup, the parent also handles SIGHUP, and children
   ignore it. It then replaces the children, one after another: forks the new one, which begins
   where this call returns, waits until a loop with a server turns in it, and sends the old one
   SIGTERM, at which it should drain. What is read after the fork is read anew; what was before, and
   the program itself, stays. Where a new one ends, or does not serve within 30 s, the reload is
   given up with a log line, and those not yet replaced stay. SIGHUP during a reload: one more when
   it is over. */
TCPSRV_API int tcpsrv_fork_processes(int num_processes, int max_restarts);

/* The counters of that child's servers (of the first loop that got one), as they were 100 ms ago at
   most, in *stats; returns its pid. In any process of the family: in a child, about all;
   in the parent, from another thread or a signal handler. -ENOENT where there is no such number,
   -ESRCH while it waits for its restart or has ended for good. Never waits. */
TCPSRV_API int tcpsrv_worker_stats(int task_id, tcpsrv_stats *stats);

TCPSRV_API int tcpsrv_task_id(void);   /* this child's number; -1 elsewhere */
TCPSRV_API int tcpsrv_cpu_count(void); /* processors this process may use, at least 1 */

#ifdef __cplusplus
}
#endif
#endif /* TCPSERVER_H */

#ifdef TCPSERVER_IMPLEMENTATION
#ifndef TCPSERVER_IMPLEMENTED
#define TCPSERVER_IMPLEMENTED

/* ==== >>platform ============================================================================== */

/* Owns every #if on system, compiler or processor, and every system call, each in a thin function.
   A header that the user read before this one may have fixed glibc's feature set in a strict mode:
   reading features.h again with _GNU_SOURCE opens it for all headers that are still to come. */
#if defined(__GLIBC__) && !defined(__USE_GNU)
#ifdef _SYS_SOCKET_H
#define TCPSRV__ACCEPT4_HIDDEN 1
#endif
#if defined(_UNISTD_H) && !defined(__USE_MISC)
#define TCPSRV__SYSCALL_HIDDEN 1
#endif
#if (defined(_STDLIB_H) || defined(_UNISTD_H)) && !defined(__USE_XOPEN2K8)
#define TCPSRV__READ_STRICTLY 1
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#undef _FEATURES_H
#include <features.h>
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#if defined(__NetBSD__) && !defined(_NETBSD_SOURCE)
#define _NETBSD_SOURCE 1
#endif

#if defined(__TINYC__)
#define _REGEX_NELTS(n) /* glibc's regex.h sizes a parameter by another, which tcc does not know */
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
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if !defined(CLOCK_MONOTONIC) || !defined(SA_RESTART) || !defined(MAP_PRIVATE) || \
    !defined(AI_PASSIVE) || !defined(F_DUPFD_CLOEXEC) || !defined(_SC_PAGESIZE) || \
    !defined(WNOHANG) || !defined(S_ISSOCK) || defined(TCPSRV__READ_STRICTLY) || \
    (!defined(MAP_ANON) && !defined(MAP_ANONYMOUS))
#error "tcpserver.h: a system header was read in strict ISO mode before. \
Include tcpserver.h first, or compile with -std=gnu99 or -D_GNU_SOURCE."
#endif

/* The poller: the system's best one unless the user chose. */
#if !defined(TCPSERVER_USE_EPOLL) && !defined(TCPSERVER_USE_KQUEUE) && !defined(TCPSERVER_USE_POLL)
#if defined(__linux__) && !defined(__TINYC__) /* tcc does not pack struct epoll_event */
#define TCPSERVER_USE_EPOLL
#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) || \
    defined(__OpenBSD__) || defined(__DragonFly__)
#define TCPSERVER_USE_KQUEUE
#else
#define TCPSERVER_USE_POLL
#endif
#endif

#if defined(__linux__)
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#define TCPSRV__LINUX 1
#else
#define TCPSRV__LINUX 0
#endif
#if defined(TCPSERVER_USE_EPOLL)
#include <sys/epoll.h>
#elif defined(TCPSERVER_USE_KQUEUE)
#include <sys/event.h>
#endif

#ifdef TCPSERVER_TLS
#include <bearssl.h>
#if defined(__linux__) || defined(__APPLE__)
#include <sys/random.h>
#endif
#define TCPSRV__TLS 1
#else
#define TCPSRV__TLS 0
#endif

#ifdef TCPSRV__ACCEPT4_HIDDEN
extern int accept4(int, struct sockaddr *, socklen_t *, int);
#endif
#ifdef TCPSRV__SYSCALL_HIDDEN
extern long syscall(long, ...);
#endif

#if defined(__linux__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
#define TCPSRV__HAVE_ACCEPT4 1
#else
#define TCPSRV__HAVE_ACCEPT4 0
#endif

/* Where threads are a library of their own, a program that was linked without it has none: a weak
   reference is null then. */
#if (defined(__GLIBC__) && __GLIBC__ == 2 && __GLIBC_MINOR__ < 34) || defined(__FreeBSD__) || \
    defined(__NetBSD__) || defined(__OpenBSD__) || defined(__DragonFly__)
#pragma weak pthread_create
#define TCPSRV__HAVE_THREADS (pthread_create != NULL)
#else
#define TCPSRV__HAVE_THREADS 1
#endif

#ifdef REG_STARTEND
#define TCPSRV__REGEX_FLAGS REG_STARTEND
#else
#define TCPSRV__REGEX_FLAGS 0
#endif
#if defined(__APPLE__)
#include <crt_externs.h>
#define TCPSRV__ENVIRON (*_NSGetEnviron())
#else
#define TCPSRV__ENVIRON environ
extern char **environ;
#endif
#if defined(__GLIBC__)
typedef size_t tcpsrv__iovlen; /* the type of msg_iovlen */
#else
typedef int tcpsrv__iovlen;
#endif
#ifdef MSG_NOSIGNAL
#define TCPSRV__SEND_FLAGS MSG_NOSIGNAL
#else
#define TCPSRV__SEND_FLAGS 0
#endif
#ifdef SO_NOSIGPIPE
#define TCPSRV__NO_SIGPIPE SO_NOSIGPIPE
#else
#define TCPSRV__NO_SIGPIPE (-1)
#endif
#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#ifndef MAP_STACK
#define MAP_STACK 0
#endif
#ifndef POLLRDHUP
#define POLLRDHUP 0
#endif
#ifdef ENONET
#define TCPSRV__ENONET (-ENONET)
#else
#define TCPSRV__ENONET (-EHOSTUNREACH)
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TCPSRV__ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define TCPSRV__TSAN 1
#endif
#if __has_feature(memory_sanitizer)
#define TCPSRV__MSAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(TCPSRV__ASAN)
#define TCPSRV__ASAN 1
#endif
#if defined(__SANITIZE_THREAD__) && !defined(TCPSRV__TSAN)
#define TCPSRV__TSAN 1
#endif
#ifndef TCPSRV__ASAN
#define TCPSRV__ASAN 0
#endif
#ifndef TCPSRV__TSAN
#define TCPSRV__TSAN 0
#endif

/* Which context switch the processor gets; none of them: callbacks only. */
#if defined(TCPSERVER_NO_COROUTINES)
#define TCPSRV__CORO 0
#elif defined(__GNUC__) && defined(__x86_64__) && defined(__LP64__)
#define TCPSRV__CORO_X86_64 1
#if !defined(__TINYC__) && !defined(__APX_F__) /* those that can be told of each register */
#define TCPSRV__INLINE_SWITCH 1
#endif
#elif defined(__GNUC__) && defined(__i386__)
#define TCPSRV__CORO_I386 1
#elif defined(__GNUC__) && defined(__aarch64__)
#define TCPSRV__CORO_AARCH64 1
#elif defined(__GNUC__) && defined(__arm__)
#define TCPSRV__CORO_ARM 1
#elif defined(__GNUC__) && defined(__riscv) && __riscv_xlen == 64
#define TCPSRV__CORO_RISCV 1
#elif defined(__GLIBC__) || defined(__FreeBSD__) || defined(__NetBSD__)
#include <ucontext.h>
#define TCPSRV__CORO_UCONTEXT 1
#else
#define TCPSRV__CORO 0
#if defined(__GNUC__)
#pragma message "tcpserver.h: no coroutines for this processor and C library; use on_stream"
#endif
#endif
#ifndef TCPSRV__CORO
#define TCPSRV__CORO 1
#endif

#if defined(__GNUC__)
#define TCPSRV__LIKELY(x) __builtin_expect(!!(x), 1)
#define TCPSRV__INLINE static inline __attribute__((always_inline)) /* on every message's path, */
                       /* or shorter than a function of its own with its calls */
#define TCPSRV__NOINLINE __attribute__((noinline))
#define TCPSRV__UNUSED __attribute__((unused))
#define TCPSRV__COLD __attribute__((cold)) /* made small; so is what only such functions call, */
#define TCPSRV__COPIES __attribute__((hot)) /* except this, whose copies would go byte by byte */
#else
#define TCPSRV__LIKELY(x) (x)
#define TCPSRV__INLINE static
#define TCPSRV__NOINLINE
#define TCPSRV__UNUSED
#define TCPSRV__COLD
#define TCPSRV__COPIES
#endif

#define TCPSRV__APART TCPSRV__NOINLINE TCPSRV__COLD /* what hot functions seldom call */

/* Before public functions: those of every message, and the others. */
#if defined(TCPSERVER_STATIC)
#define TCPSRV_HOT static TCPSRV__UNUSED
#else
#define TCPSRV_HOT
#endif
#define TCPSRV_IMPL TCPSRV_HOT TCPSRV__COLD
/* And those few whose usual way is shorter than a call; C++ would give such a symbol away only
   where it is used, and clang would have nothing static in it. */
#if defined(__GNUC__) && !defined(__cplusplus) && !defined(__TINYC__) && !defined(__clang__)
#define TCPSRV_FAST TCPSRV_HOT inline
#else
#define TCPSRV_FAST TCPSRV_HOT
#endif

#ifndef TCPSERVER_REALLOC
static void *tcpsrv__realloc(void *memory, size_t size) {
    if (size) return realloc(memory, size);
    free(memory);
    return NULL;
}
#define TCPSERVER_REALLOC(memory, size) tcpsrv__realloc(memory, size)
#endif

#ifdef __cplusplus
extern "C" {
#endif

static void *tcpsrv__alloc(size_t size) {
    void *memory = TCPSERVER_REALLOC(NULL, size);
    if (memory) memset(memory, 0, size);
    return memory;
}

static TCPSRV__NOINLINE void tcpsrv__free(void *memory) {
    void *ignored;
    if (!memory) return;
    ignored = TCPSERVER_REALLOC(memory, 0);
    (void)ignored;
}

/* ---- per thread ------------------------------------------------------------------------------ */

/* The last failure is kept as it came and put into words only when somebody asks: a handler's
   normal end is a failed read, and must not cost a snprintf. */
typedef struct tcpsrv__thread_state {
    tcpsrv_loop *default_loop;
    tcpsrv_loop *turning;          /* the loop that is inside a turn */
    int error;
    const char *step;              /* a string literal; NULL: text is the sentence */
    tcpsrv_address peer;           /* the place, where it is a stream */
    char place[TCPSRV_ADDRESS_TEXT];
    char text[320];
} tcpsrv__thread_state;

#if defined(__TINYC__)
static pthread_key_t tcpsrv__thread_key;
static pthread_once_t tcpsrv__thread_once = PTHREAD_ONCE_INIT;
static tcpsrv__thread_state tcpsrv__first_thread;

static void tcpsrv__thread_setup(void) {
    if (pthread_key_create(&tcpsrv__thread_key, tcpsrv__free) != 0) abort();
    pthread_setspecific(tcpsrv__thread_key, NULL);
}

static tcpsrv__thread_state *tcpsrv__thread(void) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static pthread_t first;
    static int claimed;
    tcpsrv__thread_state *state;
    int mine;
    pthread_once(&tcpsrv__thread_once, tcpsrv__thread_setup);
    state = (tcpsrv__thread_state *)pthread_getspecific(tcpsrv__thread_key);
    if (state) return state;
    pthread_mutex_lock(&lock);
    if (!claimed) first = pthread_self();
    claimed = 1;
    mine = pthread_equal(first, pthread_self());
    pthread_mutex_unlock(&lock);
    if (mine) return &tcpsrv__first_thread;
    state = (tcpsrv__thread_state *)tcpsrv__alloc(sizeof *state);
    if (!state) return &tcpsrv__first_thread;
    pthread_setspecific(tcpsrv__thread_key, state);
    return state;
}
#else
static __thread tcpsrv__thread_state tcpsrv__this_thread;

static tcpsrv__thread_state *tcpsrv__thread(void) {
    return &tcpsrv__this_thread;
}
#endif

/* Records a failure for tcpsrv_last_error and gives its code back. */
static TCPSRV__COLD int tcpsrv__fail(int code, const char *step, const char *place) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    size_t size = place ? strlen(place) : 0;
    if (size >= sizeof thread->place) size = sizeof thread->place - 1;
    thread->error = code;
    thread->step = step;
    thread->peer.family = 0;
    if (size) memcpy(thread->place, place, size);
    thread->place[size] = 0;
    return code;
}

static TCPSRV__APART void tcpsrv__log(const tcpsrv_options *options, int level,
                                      const char *format, ...) TCPSRV_PRINTF(3, 4);

/* NULL: as if log was not set. */
static TCPSRV__APART void tcpsrv__log(const tcpsrv_options *options, int level,
                                      const char *format, ...) {
    tcpsrv_log_fn *fn = options ? options->log : NULL;
    char line[320];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (fn) fn(level, line, options->user);
    else if (level <= TCPSRV_LOG_WARNING) fprintf(stderr, "tcpserver: %s\n", line);
}

/* ---- system calls ---------------------------------------------------------------------------- */

/* A call's result, -1 of which becomes the code. */
static TCPSRV__NOINLINE int tcpsrv__failed(void) {
    return -errno;
}

static TCPSRV__APART int tcpsrv__sys_result(int result) {
    return result < 0 ? tcpsrv__failed() : result;
}

static uint64_t tcpsrv__clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* How long ago that was, where it was in an earlier tick of the system's clock; else 0. To ask for
   the tick costs a fraction of asking for the time. */
#if defined(CLOCK_MONOTONIC_COARSE)
static uint64_t tcpsrv__clock_since(uint64_t before) {
    struct timespec tick;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &tick);
    if ((uint64_t)tick.tv_sec * 1000000000u + (uint64_t)tick.tv_nsec <= before) return 0;
    return tcpsrv__clock_ns() - before;
}
#else
static uint64_t tcpsrv__clock_since(uint64_t before) {
    return tcpsrv__clock_ns() - before;
}
#endif

static long tcpsrv__sys_pid(void) {
    return (long)getpid();
}

/* Whether it was blocking before, or a code. */
static TCPSRV__COLD int tcpsrv__sys_set_blocking(int fd, int on) {
    int flags = fcntl(fd, F_GETFL), blocking = (flags & O_NONBLOCK) == 0;
    if (flags < 0 || (on != blocking && fcntl(fd, F_SETFL, flags ^ O_NONBLOCK) < 0))
        return tcpsrv__failed();
    return blocking;
}

static int tcpsrv__sys_close_on_exec(int fd) {
    return tcpsrv__sys_result(fcntl(fd, F_SETFD, FD_CLOEXEC));
}

static int tcpsrv__sys_option(int fd, int level, int option, int value) {
    return tcpsrv__sys_result(setsockopt(fd, level, option, &value, sizeof value));
}

static void tcpsrv__sys_close(int fd) {
    close(fd); /* after EINTR the descriptor is gone too, or unknowable: never again (close(2)) */
}

static TCPSRV__COLD int tcpsrv__set_cloexec_nonblock(int fd) {
    int err = tcpsrv__sys_set_blocking(fd, 0);
    return err < 0 ? err : tcpsrv__sys_close_on_exec(fd);
}

/* A socket that a call without flags gave, with them; or a code, and it is closed. */
static TCPSRV__COLD int tcpsrv__socket_flagged(int fd) {
    int err = fd < 0 ? tcpsrv__failed() : tcpsrv__set_cloexec_nonblock(fd);
    if (!err && TCPSRV__NO_SIGPIPE >= 0 &&
        tcpsrv__sys_option(fd, SOL_SOCKET, TCPSRV__NO_SIGPIPE, 1) != 0)
        err = -ECONNABORTED; /* EINVAL on macOS: the peer has reset it already */
    if (err && fd >= 0) tcpsrv__sys_close(fd);
    return err ? err : fd;
}

/* Both ends of a pipe. */
static TCPSRV__COLD int tcpsrv__sys_pipe(int fds[2]) {
    int err;
    if (pipe(fds) != 0) return tcpsrv__failed();
    err = tcpsrv__set_cloexec_nonblock(fds[0]);
    if (!err) err = tcpsrv__set_cloexec_nonblock(fds[1]);
    if (!err) return 0;
    tcpsrv__sys_close(fds[0]);
    tcpsrv__sys_close(fds[1]);
    return err;
}

static int tcpsrv__sys_dup(int fd) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return tcpsrv__sys_result(copy);
}

/* A descriptor to give up when there are no others. */
static int tcpsrv__sys_reserve(void) {
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

static size_t tcpsrv__sys_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur > 0x7fffffff) return 0x7fffffff;
    return (size_t)limit.rlim_cur;
}

/* Of a pipe too, which recv refuses. */
static TCPSRV__NOINLINE long tcpsrv__sys_receive_again(int fd, void *memory, size_t size) {
    ssize_t n = -1;
    while (n < 0 && (errno == EINTR || errno == ENOTSOCK)) n = read(fd, memory, size);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

/* Where c is in so many bytes; some number not below size: nowhere. */
static TCPSRV__NOINLINE size_t tcpsrv__find_char_within(const char *data, char c, size_t size) {
    const char *found = (const char *)memchr(data, c, size);
    return found ? (size_t)(found - data) : size;
}

/* The same for what is mostly short: it may look at bytes behind the end, which must be there, but
   need not have been written; none of them counts. */
enum { TCPSRV__FIND_BEHIND = 64 };
#if defined(__GNUC__) && defined(__SSE2__) && !defined(__TINYC__)
typedef char tcpsrv__16 __attribute__((vector_size(16)));
typedef uint32_t tcpsrv__4x4 __attribute__((vector_size(16)));

TCPSRV__INLINE uint64_t tcpsrv__find_in_16(const char *data, tcpsrv__16 wanted) {
    tcpsrv__16 bytes;
    memcpy(&bytes, data, sizeof bytes);
    return (unsigned)__builtin_ia32_pmovmskb128((tcpsrv__16)(bytes == wanted));
}

/* A bit for each of the next 64 bytes that is c. */
TCPSRV__INLINE uint64_t tcpsrv__find_in_64(const char *data, char c) {
    uint32_t four = (unsigned char)c * 0x01010101u;
    tcpsrv__4x4 fours = { four, four, four, four };
    tcpsrv__16 wanted = (tcpsrv__16)fours;
    return tcpsrv__find_in_16(data, wanted) | tcpsrv__find_in_16(data + 16, wanted) << 16 |
           tcpsrv__find_in_16(data + 32, wanted) << 32 |
           tcpsrv__find_in_16(data + 48, wanted) << 48;
}

#define TCPSRV__LOWEST(bits) ((unsigned)__builtin_ctzll(bits))
#else
TCPSRV__INLINE uint64_t tcpsrv__find_in_64(const char *data, char c) {
    (void)data, (void)c;
    return 0;
}

#define TCPSRV__LOWEST(bits) 0u
#endif

/* The same of size bytes, one at least, and none behind them. */
TCPSRV__INLINE uint64_t tcpsrv__find_near(const char *data, char c, size_t size) {
    uint64_t bits = tcpsrv__find_in_64(data, c);
    return size < TCPSRV__FIND_BEHIND ? bits << (-size & 63) >> (-size & 63) : bits;
}

/* Whether c is among so many bytes, and where. */
TCPSRV__INLINE int tcpsrv__find_char(const char *data, char c, size_t size, size_t *at) {
    uint64_t bits = tcpsrv__find_near(data, c, size);
    *at = TCPSRV__LIKELY(bits) ? TCPSRV__LOWEST(bits) : tcpsrv__find_char_within(data, c, size);
    return TCPSRV__LIKELY(bits) || *at < size;
}

/* The kernel has less to do for recv than for read. Once: for a caller who tests for the usual
   result first, and leaves one below 0 to again. */
TCPSRV__INLINE long tcpsrv__sys_receive_once(int fd, void *memory, size_t size) {
    return (long)recv(fd, memory, size, 0);
}

TCPSRV__INLINE long tcpsrv__sys_receive(int fd, void *memory, size_t size) {
    long n = tcpsrv__sys_receive_once(fd, memory, size);
    return TCPSRV__LIKELY(n >= 0) ? n : tcpsrv__sys_receive_again(fd, memory, size);
}

static TCPSRV__NOINLINE long tcpsrv__sys_send_again(int fd, const void *memory, size_t size) {
    ssize_t n = -1;
    while (n < 0 && errno == EINTR) n = send(fd, memory, size, TCPSRV__SEND_FLAGS);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

TCPSRV__INLINE long tcpsrv__sys_send_once(int fd, const void *memory, size_t size) {
    return (long)send(fd, memory, size, TCPSRV__SEND_FLAGS);
}

static long tcpsrv__sys_send_one(int fd, const void *memory, size_t size) {
    long n = tcpsrv__sys_send_once(fd, memory, size);
    return n >= 0 ? n : tcpsrv__sys_send_again(fd, memory, size);
}

static long tcpsrv__sys_readv(int fd, const struct iovec *pieces, int count) {
    ssize_t n;
    do
        n = readv(fd, pieces, count);
    while (n < 0 && errno == EINTR);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

/* To sockets only: nothing can raise SIGPIPE here. */
static long tcpsrv__sys_send(int fd, const struct iovec *pieces, int count) {
    struct msghdr message;
    ssize_t n;
    if (count == 1) return tcpsrv__sys_send_one(fd, pieces[0].iov_base, pieces[0].iov_len);
    memset(&message, 0, sizeof message);
    message.msg_iov = (struct iovec *)(uintptr_t)pieces;
    message.msg_iovlen = (tcpsrv__iovlen)count;
    do
        n = sendmsg(fd, &message, TCPSRV__SEND_FLAGS);
    while (n < 0 && errno == EINTR);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

/* SIGPIPE is blocked for the thread around calls that have no flag against it, and one that they
   raised is taken back, unless one was pending before. */
typedef struct tcpsrv__sigpipe {
    sigset_t mask, before;
    int was_pending;
} tcpsrv__sigpipe;

static void tcpsrv__sigpipe_block(tcpsrv__sigpipe *guard) {
    sigset_t pending;
    sigemptyset(&guard->mask);
    sigaddset(&guard->mask, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &guard->mask, &guard->before);
    guard->was_pending = sigismember(&guard->before, SIGPIPE) == 1 && /* else it would be here */
                         sigpending(&pending) == 0 && sigismember(&pending, SIGPIPE) == 1;
}

static void tcpsrv__sigpipe_restore(tcpsrv__sigpipe *guard, int raised) {
    sigset_t pending;
    int signo, saved = errno;
    if (raised && !guard->was_pending && sigpending(&pending) == 0 &&
        sigismember(&pending, SIGPIPE) == 1)
        sigwait(&guard->mask, &signo);
    pthread_sigmask(SIG_SETMASK, &guard->before, NULL);
    errno = saved;
}

static long tcpsrv__sys_writev(int fd, const struct iovec *pieces, int count) {
    tcpsrv__sigpipe guard;
    ssize_t n;
    tcpsrv__sigpipe_block(&guard);
    do
        n = writev(fd, pieces, count);
    while (n < 0 && errno == EINTR);
    tcpsrv__sigpipe_restore(&guard, n < 0 && errno == EPIPE);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

static long tcpsrv__sys_pread(int fd, void *memory, size_t size, int64_t offset) {
    ssize_t n;
    do
        n = pread(fd, memory, size, (off_t)offset);
    while (n < 0 && errno == EINTR);
    return n < 0 ? tcpsrv__failed() : (long)n;
}

/* Bytes sent, 0 at the file's end, or -errno; -ENOTSUP where the system has no such call. */
#if TCPSRV__LINUX
static long tcpsrv__sys_sendfile(int socket_fd, int file, int64_t offset, size_t size) {
    tcpsrv__sigpipe guard;
    off_t at = (off_t)offset;
    ssize_t n;
    tcpsrv__sigpipe_block(&guard);
    do
        n = sendfile(socket_fd, file, &at, size);
    while (n < 0 && errno == EINTR);
    tcpsrv__sigpipe_restore(&guard, n < 0 && errno == EPIPE);
    if (n < 0 && (errno == EINVAL || errno == ENOSYS)) return -ENOTSUP;
    return n < 0 ? tcpsrv__failed() : (long)n;
}
#elif defined(__APPLE__)
static long tcpsrv__sys_sendfile(int socket_fd, int file, int64_t offset, size_t size) {
    off_t sent = (off_t)size;
    int failed = sendfile(file, socket_fd, (off_t)offset, &sent, NULL, 0);
    if (failed && sent == 0) return errno == EINTR ? -EAGAIN : tcpsrv__failed();
    return (long)sent;
}
#elif defined(__FreeBSD__)
static long tcpsrv__sys_sendfile(int socket_fd, int file, int64_t offset, size_t size) {
    off_t sent = 0;
    int failed = sendfile(file, socket_fd, (off_t)offset, size, NULL, &sent, 0);
    if (failed && sent == 0) return errno == EINTR ? -EAGAIN : tcpsrv__failed();
    return (long)sent;
}
#else
static long tcpsrv__sys_sendfile(int socket_fd, int file, int64_t offset, size_t size) {
    (void)socket_fd, (void)file, (void)offset, (void)size;
    return -ENOTSUP;
}
#endif

/* A new connection, non-blocking and close-on-exec, or -errno. */
#if TCPSRV__HAVE_ACCEPT4
static int tcpsrv__sys_accept(int listener, struct sockaddr *peer, socklen_t *size) {
    int fd = accept4(listener, peer, size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    return tcpsrv__sys_result(fd);
}
#else
static int tcpsrv__sys_accept(int listener, struct sockaddr *peer, socklen_t *size) {
    int fd = accept(listener, peer, size);
    return tcpsrv__socket_flagged(fd);
}
#endif

static void tcpsrv__sys_shutdown_write(int fd) {
    shutdown(fd, SHUT_WR);
}

/* The next close of this socket sends a reset (SO_LINGER, socket(7)). */
static void tcpsrv__sys_reset_on_close(int fd) {
    struct linger now;
    now.l_onoff = 1;
    now.l_linger = 0;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

static int tcpsrv__sys_nodelay(int fd, int on) {
    return tcpsrv__sys_option(fd, IPPROTO_TCP, TCP_NODELAY, on);
}

static int tcpsrv__sys_listens(int fd) {
    int on = 0;
    socklen_t size = sizeof on;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) != 0) return tcpsrv__failed();
    return on ? 0 : -EINVAL;
}

static size_t tcpsrv__sys_unread(int fd) {
    int n = 0;
    return ioctl(fd, FIONREAD, &n) == 0 && n > 0 ? (size_t)n : 0;
}

static int tcpsrv__sys_name(int fd, struct sockaddr_storage *name, socklen_t *size) {
    return tcpsrv__sys_result(getsockname(fd, (struct sockaddr *)name, size));
}

static int tcpsrv__sys_peer_name(int fd, struct sockaddr_storage *name, socklen_t *size) {
    return tcpsrv__sys_result(getpeername(fd, (struct sockaddr *)name, size));
}

/* Whether a connect has come to its end, well. */
static int tcpsrv__sys_connected(int fd) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    return tcpsrv__sys_peer_name(fd, &name, &size) == 0;
}

/* As epoll says it: a file or directory is always ready, and cannot be waited for. */
static TCPSRV__UNUSED int tcpsrv__sys_can_wait(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) return tcpsrv__failed();
    return S_ISREG(status.st_mode) || S_ISDIR(status.st_mode) ? -EPERM : 0;
}

/* Where a match of regex ends in the memory, which has room for a NUL behind it; -1: nowhere yet.
   Without REG_STARTEND the text ends at its first NUL. */
static int64_t tcpsrv__sys_regex_end(const void *regex, char *memory, size_t size) {
    const regex_t *compiled = (const regex_t *)regex;
    char last = memory[size];
    regmatch_t match;
    int missed;
    match.rm_so = 0;
    match.rm_eo = (regoff_t)size;
    memory[size] = 0;
    missed = regexec(compiled, memory, 1, &match, TCPSRV__REGEX_FLAGS);
    memory[size] = last;
    return missed ? -1 : (int64_t)match.rm_eo;
}

/* memmem, which some systems lack or hide. */
static TCPSRV__COLD const char *tcpsrv__find_long(const char *memory, size_t size,
                                                  const char *what, size_t length) {
    const char *at = memory, *end = memory + size;
    while ((size_t)(end - at) >= length) {
        at = (const char *)memchr(at, what[0], (size_t)(end - at) - length + 1);
        if (!at || memcmp(at, what, length) == 0) return at;
        at++;
    }
    return NULL;
}

/* What wakes a waiting poller: readable after a signal or another thread's call. */
typedef struct tcpsrv__waker {
    int read_fd, write_fd; /* the same one where it is an eventfd */
} tcpsrv__waker;

#if TCPSRV__LINUX
static int tcpsrv__waker_open(tcpsrv__waker *waker) {
    waker->read_fd = waker->write_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return waker->read_fd < 0 ? tcpsrv__failed() : 0;
}
#else
static int tcpsrv__waker_open(tcpsrv__waker *waker) {
    int fds[2] = { -1, -1 }, err = tcpsrv__sys_pipe(fds);
    waker->read_fd = fds[0];
    waker->write_fd = fds[1];
    return err;
}
#endif

static void tcpsrv__waker_close(tcpsrv__waker *waker) {
    close(waker->read_fd);
    if (waker->write_fd != waker->read_fd) close(waker->write_fd);
}

/* Async-signal-safe. A full pipe wakes as well as one more byte in it. */
static void tcpsrv__waker_wake(int write_fd) {
    uint64_t one = 1;
    int saved = errno;
    ssize_t n;
    do
        n = write(write_fd, &one, sizeof one);
    while (n < 0 && errno == EINTR);
    errno = saved;
}

static void tcpsrv__waker_drain(tcpsrv__waker *waker) {
    char bytes[256];
    ssize_t n;
    do
        n = read(waker->read_fd, bytes, sizeof bytes);
    while (n == (ssize_t)sizeof bytes || (n < 0 && errno == EINTR));
}

/* ---- signals --------------------------------------------------------------------------------- */

#ifdef NSIG
#define TCPSRV__NSIG NSIG
#else
#define TCPSRV__NSIG 65
#endif

/* Process-wide, as dispositions are: which loop's waker a signal writes to, and the marks that the
   handler leaves. The table of loops is touched under tcpsrv__signal_lock only. */
static volatile int tcpsrv__signal_fd[TCPSRV__NSIG];    /* write end + 1; 0: not ours */
static volatile int tcpsrv__signal_seen[TCPSRV__NSIG];
static struct sigaction tcpsrv__signal_before[TCPSRV__NSIG];
static tcpsrv_loop *tcpsrv__signal_loop[TCPSRV__NSIG];
static pthread_mutex_t tcpsrv__signal_lock = PTHREAD_MUTEX_INITIALIZER;

/* A handler may run on any thread. */
#if defined(__GNUC__) && !defined(__TINYC__)
#define TCPSRV__STORE(mark, value) __atomic_store_n(mark, value, __ATOMIC_SEQ_CST)
#define TCPSRV__LOAD(mark) __atomic_load_n(mark, __ATOMIC_SEQ_CST)
#define TCPSRV__STORE_WORD(word, value) __atomic_store_n(word, value, __ATOMIC_RELEASE)
#define TCPSRV__LOAD_WORD(word) __atomic_load_n(word, __ATOMIC_ACQUIRE)
#else
#define TCPSRV__STORE(mark, value) (*(mark) = (value))
#define TCPSRV__LOAD(mark) (*(mark))
#define TCPSRV__STORE_WORD(word, value) (*(volatile size_t *)(word) = (value))
#define TCPSRV__LOAD_WORD(word) (*(volatile size_t *)(word))
#endif

static TCPSRV__COLD void tcpsrv__signal_handler(int signo) {
    int fd = TCPSRV__LOAD(&tcpsrv__signal_fd[signo]) - 1;
    TCPSRV__STORE(&tcpsrv__signal_seen[signo], 1);
    if (fd >= 0) tcpsrv__waker_wake(fd);
}

static int tcpsrv__signal_take(int signo) {
    int seen = TCPSRV__LOAD(&tcpsrv__signal_seen[signo]);
    if (seen) TCPSRV__STORE(&tcpsrv__signal_seen[signo], 0);
    return seen;
}

static int tcpsrv__sys_catch_signal(int signo, int write_fd) {
    struct sigaction action;
#if TCPSRV__TSAN /* loses one that comes in a thread's first call that may sleep: make it now */
    static const struct timespec none = { 0, 0 };
    nanosleep(&none, NULL);
#endif
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = tcpsrv__signal_handler;
    action.sa_flags = SA_RESTART;
    TCPSRV__STORE(&tcpsrv__signal_seen[signo], 0);
    TCPSRV__STORE(&tcpsrv__signal_fd[signo], write_fd + 1);
    if (sigaction(signo, &action, &tcpsrv__signal_before[signo]) == 0) return 0;
    TCPSRV__STORE(&tcpsrv__signal_fd[signo], 0);
    return tcpsrv__failed();
}

static void tcpsrv__sys_restore_signal(int signo) {
    sigaction(signo, &tcpsrv__signal_before[signo], NULL);
    TCPSRV__STORE(&tcpsrv__signal_fd[signo], 0);
}

/* ---- memory in pages ------------------------------------------------------------------------- */

/* Zeroed; NULL: none. */
static void *tcpsrv__sys_map(size_t size, int flags) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void tcpsrv__sys_unmap(void *memory, size_t size) {
    munmap(memory, size);
}

static size_t tcpsrv__page_size(void) {
    long size = sysconf(_SC_PAGESIZE);
    return size > 0 ? (size_t)size : 4096;
}

/* A page whose first byte is 1, and 0 in a forked child: what tells one without a system call. NULL
   where the system has none. Some emulators take any advice and do nothing, also -1. */
#if defined(MADV_WIPEONFORK)
static TCPSRV__COLD char *tcpsrv__sys_map_mark(void) {
    size_t size = tcpsrv__page_size();
    char *page = (char *)tcpsrv__sys_map(size, MAP_PRIVATE);
    if (!page) return NULL;
    if (madvise(page, size, -1) == 0 || madvise(page, size, MADV_WIPEONFORK) != 0) {
        tcpsrv__sys_unmap(page, size);
        return NULL;
    }
    *page = 1;
    return page;
}
#else
static char *tcpsrv__sys_map_mark(void) {
    return NULL;
}
#endif

static void tcpsrv__sys_unmap_mark(char *mark) {
    if (mark) tcpsrv__sys_unmap(mark, tcpsrv__page_size());
}

/* ---- context switch -------------------------------------------------------------------------- */

/* Inline assembly in a static function: top-level assembly would break two static copies in one
   program, and link-time optimisation. A context is left by a jump, not a return, which a processor
   would always mispredict on another stack. The callee-saved registers go into the context; the
   rest are dead across the call, if the compiler does not look into the function (noipa). On x86-64
   the function that switches does it in its midst, so that no return comes after the jump either:
   two misses are 16 of 18 ns for a resume and the wait that follows it. A fresh context begins in a
   function of two arguments, the contexts that were given to the switch. */

#if defined(__GNUC__) && !defined(__clang__) && !defined(__TINYC__) && __GNUC__ >= 8
#define TCPSRV__OPAQUE __attribute__((noipa))
#else
#define TCPSRV__OPAQUE TCPSRV__NOINLINE
#endif

#if TCPSRV__CORO

typedef struct tcpsrv__context tcpsrv__context;
typedef void tcpsrv__entry(tcpsrv__context *from, tcpsrv__context *to);

#if defined(TCPSRV__CORO_X86_64)

struct tcpsrv__context {
    void *pc, *sp, *bp;
#if !TCPSRV__INLINE_SWITCH
    void *bx, *r12, *r13, *r14, *r15;
#endif
};

#if TCPSRV__INLINE_SWITCH

#if defined(__AVX512F__)
#define TCPSRV__MORE_VECTORS "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", \
    "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", \
    "k3", "k4", "k5", "k6", "k7",
#else
#define TCPSRV__MORE_VECTORS
#endif

/* The compiler saves those registers that it still needs. */
TCPSRV__INLINE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    __asm__ volatile(
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rax, 0(%%rdi)\n\t"
        "movq %%rsp, 8(%%rdi)\n\t"
        "movq %%rbp, 16(%%rdi)\n\t"
        "movq 8(%%rsi), %%rsp\n\t"
        "movq 16(%%rsi), %%rbp\n\t"
        "jmp *0(%%rsi)\n\t"
        "1:\n\t"
        : "+D"(from), "+S"(to)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", TCPSRV__MORE_VECTORS "memory", "cc");
}

#else

static TCPSRV__OPAQUE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    __asm__ volatile(
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rax, 0(%%rdi)\n\t"
        "movq %%rsp, 8(%%rdi)\n\t"
        "movq %%rbp, 16(%%rdi)\n\t"
        "movq %%rbx, 24(%%rdi)\n\t"
        "movq %%r12, 32(%%rdi)\n\t"
        "movq %%r13, 40(%%rdi)\n\t"
        "movq %%r14, 48(%%rdi)\n\t"
        "movq %%r15, 56(%%rdi)\n\t"
        "movq 8(%%rsi), %%rsp\n\t"
        "movq 16(%%rsi), %%rbp\n\t"
        "movq 24(%%rsi), %%rbx\n\t"
        "movq 32(%%rsi), %%r12\n\t"
        "movq 40(%%rsi), %%r13\n\t"
        "movq 48(%%rsi), %%r14\n\t"
        "movq 56(%%rsi), %%r15\n\t"
        "jmp *0(%%rsi)\n\t"
        "1:\n\t"
        : "+D"(from), "+S"(to)
        :
        : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc");
}

#endif

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    uintptr_t *sp = (uintptr_t *)(void *)(top - ((uintptr_t)top & 15)) - 1;
    *sp = 0; /* where a return address would be */
    context->sp = sp;
    context->bp = NULL;
    memcpy(&context->pc, &entry, sizeof context->pc);
}

#elif defined(TCPSRV__CORO_I386)

struct tcpsrv__context {
    void *pc, *sp, *bp, *bx;
};

static TCPSRV__OPAQUE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    __asm__ volatile(
        "call 2f\n\t"
        "2:\n\t"
        "popl %%eax\n\t"
        "addl $(1f - 2b), %%eax\n\t"
        "movl %%eax, 0(%%edi)\n\t"
        "movl %%esp, 4(%%edi)\n\t"
        "movl %%ebp, 8(%%edi)\n\t"
        "movl %%ebx, 12(%%edi)\n\t"
        "movl 4(%%esi), %%esp\n\t"
        "movl 8(%%esi), %%ebp\n\t"
        "movl 12(%%esi), %%ebx\n\t"
        "jmp *0(%%esi)\n\t"
        "1:\n\t"
        : "+D"(from), "+S"(to)
        :
        : "eax", "ecx", "edx", "memory", "cc");
}

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    uintptr_t *sp = (uintptr_t *)(void *)(top - ((uintptr_t)top & 15)) - 5;
    sp[0] = 0; /* the return address, then the two arguments */
    sp[1] = 0;
    sp[2] = (uintptr_t)context;
    context->sp = sp;
    context->bp = NULL;
    context->bx = NULL;
    memcpy(&context->pc, &entry, sizeof context->pc);
}

#elif defined(TCPSRV__CORO_AARCH64)

struct tcpsrv__context {
    void *pc, *sp, *x[12]; /* x19 to x30 */
    double d[8];           /* d8 to d15 */
};

/* br x16 suits the landing pad of an entry function, hint 36 (bti j) is that of the label. */
static TCPSRV__OPAQUE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    register tcpsrv__context *x0 __asm__("x0") = from;
    register tcpsrv__context *x1 __asm__("x1") = to;
    __asm__ volatile(
        "adr x16, 1f\n\t"
        "mov x17, sp\n\t"
        "stp x16, x17, [x0]\n\t"
        "stp x19, x20, [x0, #16]\n\t"
        "stp x21, x22, [x0, #32]\n\t"
        "stp x23, x24, [x0, #48]\n\t"
        "stp x25, x26, [x0, #64]\n\t"
        "stp x27, x28, [x0, #80]\n\t"
        "stp x29, x30, [x0, #96]\n\t"
        "stp d8, d9, [x0, #112]\n\t"
        "stp d10, d11, [x0, #128]\n\t"
        "stp d12, d13, [x0, #144]\n\t"
        "stp d14, d15, [x0, #160]\n\t"
        "ldp x16, x17, [x1]\n\t"
        "ldp x19, x20, [x1, #16]\n\t"
        "ldp x21, x22, [x1, #32]\n\t"
        "ldp x23, x24, [x1, #48]\n\t"
        "ldp x25, x26, [x1, #64]\n\t"
        "ldp x27, x28, [x1, #80]\n\t"
        "ldp x29, x30, [x1, #96]\n\t"
        "ldp d8, d9, [x1, #112]\n\t"
        "ldp d10, d11, [x1, #128]\n\t"
        "ldp d12, d13, [x1, #144]\n\t"
        "ldp d14, d15, [x1, #160]\n\t"
        "mov sp, x17\n\t"
        "br x16\n\t"
        "1:\n\t"
        "hint #36\n\t"
        : "+r"(x0), "+r"(x1)
        :
        : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14",
          "x15", "x16", "x17", "memory", "cc");
}

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    memset(context, 0, sizeof *context);
    context->sp = top - ((uintptr_t)top & 15);
    memcpy(&context->pc, &entry, sizeof context->pc);
}

#elif defined(TCPSRV__CORO_ARM)

struct tcpsrv__context {
    void *pc, *sp, *r[8]; /* r4 to r11 */
    double d[8];          /* d8 to d15 */
};

#if defined(__thumb__)
#define TCPSRV__ARM_STATE "orr r2, r2, #1\n\t"
#else
#define TCPSRV__ARM_STATE ""
#endif
#if defined(__VFP_FP__) && !defined(__SOFTFP__)
#define TCPSRV__ARM_SAVE "vstmia r2!, {d8-d15}\n\t"
#define TCPSRV__ARM_LOAD "vldmia r2!, {d8-d15}\n\t"
#else
#define TCPSRV__ARM_SAVE ""
#define TCPSRV__ARM_LOAD ""
#endif

static TCPSRV__OPAQUE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    register tcpsrv__context *r0 __asm__("r0") = from;
    register tcpsrv__context *r1 __asm__("r1") = to;
    __asm__ volatile(
        "adr r2, 1f\n\t"
        TCPSRV__ARM_STATE
        "str r2, [r0, #0]\n\t"
        "str sp, [r0, #4]\n\t"
        "add r2, r0, #8\n\t"
        "stmia r2!, {r4-r11}\n\t"
        TCPSRV__ARM_SAVE
        "add r2, r1, #8\n\t"
        "ldmia r2!, {r4-r11}\n\t"
        TCPSRV__ARM_LOAD
        "ldr sp, [r1, #4]\n\t"
        "ldr r2, [r1, #0]\n\t"
        "bx r2\n\t"
        ".align 2\n\t"
        "1:\n\t"
        : "+r"(r0), "+r"(r1)
        :
        : "r2", "r3", "r12", "lr", "memory", "cc");
}

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    memset(context, 0, sizeof *context);
    context->sp = top - ((uintptr_t)top & 15);
    memcpy(&context->pc, &entry, sizeof context->pc);
}

#elif defined(TCPSRV__CORO_RISCV)

struct tcpsrv__context {
    void *pc, *sp, *s[12];
    double fs[12];
};

#if defined(__riscv_float_abi_double)
#define TCPSRV__RISCV_SAVE(n, at) "fsd fs" #n ", " #at "(a0)\n\t"
#define TCPSRV__RISCV_LOAD(n, at) "fld fs" #n ", " #at "(a1)\n\t"
#else
#define TCPSRV__RISCV_SAVE(n, at) ""
#define TCPSRV__RISCV_LOAD(n, at) ""
#endif

static TCPSRV__OPAQUE void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    register tcpsrv__context *a0 __asm__("a0") = from;
    register tcpsrv__context *a1 __asm__("a1") = to;
    __asm__ volatile(
        "lla t0, 1f\n\t"
        "sd t0, 0(a0)\n\t" "sd sp, 8(a0)\n\t"
        "sd s0, 16(a0)\n\t" "sd s1, 24(a0)\n\t" "sd s2, 32(a0)\n\t" "sd s3, 40(a0)\n\t"
        "sd s4, 48(a0)\n\t" "sd s5, 56(a0)\n\t" "sd s6, 64(a0)\n\t" "sd s7, 72(a0)\n\t"
        "sd s8, 80(a0)\n\t" "sd s9, 88(a0)\n\t" "sd s10, 96(a0)\n\t" "sd s11, 104(a0)\n\t"
        TCPSRV__RISCV_SAVE(0, 112) TCPSRV__RISCV_SAVE(1, 120) TCPSRV__RISCV_SAVE(2, 128)
        TCPSRV__RISCV_SAVE(3, 136) TCPSRV__RISCV_SAVE(4, 144) TCPSRV__RISCV_SAVE(5, 152)
        TCPSRV__RISCV_SAVE(6, 160) TCPSRV__RISCV_SAVE(7, 168) TCPSRV__RISCV_SAVE(8, 176)
        TCPSRV__RISCV_SAVE(9, 184) TCPSRV__RISCV_SAVE(10, 192) TCPSRV__RISCV_SAVE(11, 200)
        "ld t0, 0(a1)\n\t" "ld sp, 8(a1)\n\t"
        "ld s0, 16(a1)\n\t" "ld s1, 24(a1)\n\t" "ld s2, 32(a1)\n\t" "ld s3, 40(a1)\n\t"
        "ld s4, 48(a1)\n\t" "ld s5, 56(a1)\n\t" "ld s6, 64(a1)\n\t" "ld s7, 72(a1)\n\t"
        "ld s8, 80(a1)\n\t" "ld s9, 88(a1)\n\t" "ld s10, 96(a1)\n\t" "ld s11, 104(a1)\n\t"
        TCPSRV__RISCV_LOAD(0, 112) TCPSRV__RISCV_LOAD(1, 120) TCPSRV__RISCV_LOAD(2, 128)
        TCPSRV__RISCV_LOAD(3, 136) TCPSRV__RISCV_LOAD(4, 144) TCPSRV__RISCV_LOAD(5, 152)
        TCPSRV__RISCV_LOAD(6, 160) TCPSRV__RISCV_LOAD(7, 168) TCPSRV__RISCV_LOAD(8, 176)
        TCPSRV__RISCV_LOAD(9, 184) TCPSRV__RISCV_LOAD(10, 192) TCPSRV__RISCV_LOAD(11, 200)
        "jr t0\n\t"
        "1:\n\t"
        : "+r"(a0), "+r"(a1)
        :
        : "ra", "t0", "t1", "t2", "t3", "t4", "t5", "t6", "a2", "a3", "a4", "a5", "a6", "a7",
          "memory");
}

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    memset(context, 0, sizeof *context);
    context->sp = top - ((uintptr_t)top & 15);
    memcpy(&context->pc, &entry, sizeof context->pc);
}

#else /* ucontext */

struct tcpsrv__context {
    ucontext_t saved;
    tcpsrv__entry *entry;
};

static void tcpsrv__switch(tcpsrv__context *from, tcpsrv__context *to) {
    swapcontext(&from->saved, &to->saved);
}

/* makecontext(3) passes ints only: a pointer goes in two halves. */
static void tcpsrv__context_begin(unsigned high, unsigned low) {
    uintptr_t bits = (uintptr_t)(((uint64_t)high << 32) | low);
    tcpsrv__context *context = (tcpsrv__context *)bits;
    context->entry(NULL, context);
}

static void tcpsrv__context_make(tcpsrv__context *context, char *top, tcpsrv__entry *entry) {
    uint64_t bits = (uint64_t)(uintptr_t)context;
    size_t size = 16384 - 1024; /* the least that a stack has below top */
    getcontext(&context->saved);
    context->entry = entry;
    context->saved.uc_stack.ss_sp = top - size;
    context->saved.uc_stack.ss_size = size;
    context->saved.uc_link = NULL;
    makecontext(&context->saved, (void (*)(void))tcpsrv__context_begin, 2,
                (unsigned)(bits >> 32), (unsigned)(bits & 0xffffffffu));
}

#endif

/* ---- stack memory ---------------------------------------------------------------------------- */

#ifndef MADV_GUARD_INSTALL
#define TCPSRV__GUARD_INSTALL 102 /* Linux 6.13: a guard that does not split the mapping */
#else
#define TCPSRV__GUARD_INSTALL MADV_GUARD_INSTALL
#endif

static char *tcpsrv__sys_map_stacks(size_t size) {
    void *memory = tcpsrv__sys_map(size, MAP_PRIVATE | MAP_NORESERVE | MAP_STACK);
#ifdef MADV_NOHUGEPAGE
    if (memory) madvise(memory, size, MADV_NOHUGEPAGE);
#endif
    return (char *)memory;
}

/* Access to the guard faults from now on. */
#if TCPSRV__LINUX
static int tcpsrv__sys_guard(char *memory, size_t size) {
    if (madvise(memory, size, TCPSRV__GUARD_INSTALL) == 0) return 0;
    return tcpsrv__sys_result(mprotect(memory, size, PROT_NONE));
}
#else
static int tcpsrv__sys_guard(char *memory, size_t size) {
    return tcpsrv__sys_result(mprotect(memory, size, PROT_NONE));
}
#endif

static void tcpsrv__sys_give_back(char *memory, size_t size) {
    madvise(memory, size, MADV_DONTNEED);
}

/* Sanitizers and valgrind must be told of stacks, and of switches between them. */
#if TCPSRV__ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define TCPSRV__ASAN_LEAVE(fake, bottom, size) __sanitizer_start_switch_fiber(fake, bottom, size)
#define TCPSRV__ASAN_ENTER(fake, bottom, size) __sanitizer_finish_switch_fiber(fake, bottom, size)
#define TCPSRV__STACK_FRESH(memory, size) __asan_unpoison_memory_region(memory, size)
#define TCPSRV__STACK_STALE(memory, size) __asan_poison_memory_region(memory, size)
#else
#define TCPSRV__ASAN_LEAVE(fake, bottom, size) ((void)0)
#define TCPSRV__ASAN_ENTER(fake, bottom, size) ((void)0)
#if defined(VALGRIND_MAKE_MEM_DEFINED) /* as a mapping: where frames have ended nobody may write */
#define TCPSRV__STACK_FRESH(memory, size) ((void)VALGRIND_MAKE_MEM_DEFINED(memory, size))
#define TCPSRV__STACK_STALE(memory, size) ((void)VALGRIND_MAKE_MEM_NOACCESS(memory, size))
#else
#define TCPSRV__STACK_FRESH(memory, size) ((void)0)
#define TCPSRV__STACK_STALE(memory, size) ((void)0)
#endif
#endif
#if TCPSRV__TSAN
#ifdef __cplusplus
extern "C" {
#endif
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
#ifdef __cplusplus
}
#endif
#define TCPSRV__TSAN_FROM(fiber) ((fiber) = __tsan_get_current_fiber())
#define TCPSRV__TSAN_NEW() __tsan_create_fiber(0)
#define TCPSRV__TSAN_END(fiber) __tsan_destroy_fiber(fiber)
#define TCPSRV__TSAN_GO(fiber) __tsan_switch_to_fiber(fiber, 0)
#define TCPSRV__TSAN_HOLD(before) sigset_t before = tcpsrv__tsan_hold()
#define TCPSRV__TSAN_LET(before) pthread_sigmask(SIG_SETMASK, &(before), NULL)
/* Holds signals while a coroutine runs, but for those that tell of a mistake: TSan would keep one
   that comes with the fiber, and forget it with that. */
static inline sigset_t tcpsrv__tsan_hold(void) {
    static const int mistakes[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP };
    sigset_t all, before;
    size_t i;
    sigfillset(&all);
    for (i = 0; i < sizeof mistakes / sizeof *mistakes; i++) sigdelset(&all, mistakes[i]);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    return before;
}
#else
#define TCPSRV__TSAN_HOLD(before) ((void)0)
#define TCPSRV__TSAN_LET(before) ((void)0)
#define TCPSRV__TSAN_FROM(fiber) ((void)0)
#define TCPSRV__TSAN_NEW() NULL
#define TCPSRV__TSAN_END(fiber) ((void)0)
#define TCPSRV__TSAN_GO(fiber) ((void)0)
#endif
#if defined(VALGRIND_STACK_REGISTER)
#define TCPSRV__VALGRIND_ADD(low, high) VALGRIND_STACK_REGISTER(low, high)
#define TCPSRV__VALGRIND_END(id) do { if (id) VALGRIND_STACK_DEREGISTER(id); } while (0)
#else
#define TCPSRV__VALGRIND_ADD(low, high) 0u
#define TCPSRV__VALGRIND_END(id) ((void)(id))
#endif

#endif /* TCPSRV__CORO */

/* ---- sockets and processes ------------------------------------------------------------------- */

#if TCPSRV__HAVE_ACCEPT4
static int tcpsrv__sys_socket(int family) {
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return tcpsrv__sys_result(fd);
}
#else
static int tcpsrv__sys_socket(int family) {
    int fd = socket(family, SOCK_STREAM, 0);
    return tcpsrv__socket_flagged(fd);
}
#endif

/* SO_REUSEPORT that shares connections out; other systems give all to the last one bound. */
#if defined(SO_REUSEPORT_LB)
#define TCPSRV__REUSE_PORT SO_REUSEPORT_LB
#elif defined(SO_REUSEPORT)
#define TCPSRV__REUSE_PORT SO_REUSEPORT
#else
#define TCPSRV__REUSE_PORT (-1)
#endif

#ifdef IP_BIND_ADDRESS_NO_PORT
#define TCPSRV__BIND_NO_PORT IP_BIND_ADDRESS_NO_PORT
#else
#define TCPSRV__BIND_NO_PORT (-1)
#endif

TCPSRV__INLINE int tcpsrv__sys_bind(int fd, const struct sockaddr *name, socklen_t size) {
    return tcpsrv__sys_result(bind(fd, name, size));
}

static int tcpsrv__sys_listen(int fd, int backlog) {
    return tcpsrv__sys_result(listen(fd, backlog));
}

/* 0: connected; 1: it goes on in the background, also after EINTR (connect(2)). */
static int tcpsrv__sys_connect(int fd, const struct sockaddr *name, socklen_t size) {
    if (connect(fd, name, size) == 0) return 0;
    return errno == EINPROGRESS || errno == EINTR ? 1 : tcpsrv__failed();
}

static int tcpsrv__socket_error(int fd) {
    int err = 0;
    socklen_t size = sizeof err;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &size) != 0) return tcpsrv__failed();
    return -err;
}

TCPSRV__INLINE int tcpsrv__sys_lstat(const char *path, struct stat *status) {
    return tcpsrv__sys_result(lstat(path, status));
}

static int tcpsrv__sys_chmod(const char *path, unsigned mode) {
    return tcpsrv__sys_result(chmod(path, (mode_t)mode));
}

/* A file, or an empty directory. */
TCPSRV__INLINE int tcpsrv__sys_remove(const char *path) {
    return tcpsrv__sys_result(remove(path));
}

/* The resolver's codes are negative here and positive there. */
static int tcpsrv__sys_resolve(const char *host, const char *port, const struct addrinfo *hints,
                               struct addrinfo **list) {
    int code = getaddrinfo(host, port, hints, list);
    if (code == EAI_SYSTEM) return errno ? tcpsrv__failed() : -EIO;
    if (code == EAI_MEMORY) return -ENOMEM;
    return code == 0 ? 0 : TCPSRV_ERESOLVE - (code < 0 ? -code : code);
}

/* What the resolver says of a name where only a numeric address would do. */
#define TCPSRV__NOT_NUMERIC (TCPSRV_ERESOLVE - (EAI_NONAME < 0 ? -EAI_NONAME : EAI_NONAME))

static void tcpsrv__sys_resolve_free(struct addrinfo *list) {
    freeaddrinfo(list);
}

static const char *tcpsrv__sys_resolve_text(int code) {
    return gai_strerror(EAI_NONAME < 0 ? -code : code);
}

/* A detached thread to which no signal is delivered. */
static TCPSRV__COLD int tcpsrv__sys_thread(void *(*run)(void *arg), void *arg) {
    pthread_t thread;
    sigset_t all, before;
    int err;
    if (!TCPSRV__HAVE_THREADS) return -ENOTSUP;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    err = pthread_create(&thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!err) pthread_detach(thread);
    return -err;
}

#if TCPSRV__LINUX
/* Not by sched.h: whoever read pthread.h before without _GNU_SOURCE has none of cpu_set_t. */
static int tcpsrv__sys_cpu_count(void) {
    unsigned long set[128]; /* 8,192 processors, the most that Linux can have */
    long i, size = syscall(SYS_sched_getaffinity, 0, sizeof set, set);
    int count = 0;
    for (i = 0; i < size / (long)sizeof *set; i++)
        for (; set[i]; set[i] &= set[i] - 1) count++;
    return count ? count : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static void tcpsrv__sys_die_with_parent(void) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
}
#else
static int tcpsrv__sys_cpu_count(void) {
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static void tcpsrv__sys_die_with_parent(void) {
}
#endif

static long tcpsrv__sys_fork(void) {
    pid_t pid;
    fflush(NULL); /* what is buffered must not leave twice */
    pid = fork();
    return pid < 0 ? tcpsrv__failed() : (long)pid;
}

static void tcpsrv__sys_kill(long pid, int signo) {
    kill((pid_t)pid, signo);
}

/* Whether the child has ended, and how. One that is not there has ended too. */
static int tcpsrv__sys_reap(long pid, int *status, int block) {
    pid_t got;
    do
        got = waitpid((pid_t)pid, status, block ? 0 : WNOHANG);
    while (got < 0 && errno == EINTR);
    return got != 0;
}

/* Waits for any of some descriptors; -1 stands for none. */
static void tcpsrv__sys_wait_readable(const int *fds, int count, int timeout_ms) {
    struct pollfd entries[4];
    int i;
    for (i = 0; i < count; i++) {
        entries[i].fd = fds[i];
        entries[i].events = POLLIN;
        entries[i].revents = 0;
    }
    poll(entries, (nfds_t)count, timeout_ms);
}

static long tcpsrv__sys_parent_pid(void) {
    return (long)getppid();
}

/* The signals of a parent, held while a child is made of it. */
static void tcpsrv__sys_hold_signals(const int *signals, int count, int hold) {
    sigset_t set;
    int i;
    sigemptyset(&set);
    for (i = 0; i < count; i++) sigaddset(&set, signals[i]);
    pthread_sigmask(hold ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}

/* Those that a terminal sends to all. */
static void tcpsrv__sys_ignore_signals(int hangup) {
    signal(SIGINT, SIG_IGN);
    if (hangup) signal(SIGHUP, SIG_IGN);
}

/* Whether nobody handles or ignores it. */
static int tcpsrv__sys_signal_is_free(int signo) {
    struct sigaction action;
    return sigaction(signo, NULL, &action) == 0 && !(action.sa_flags & SA_SIGINFO) &&
           action.sa_handler == SIG_DFL;
}

static void tcpsrv__sys_exit(int status) {
    exit(status);
}

static const char *tcpsrv__sys_variable(const char *name) {
    return getenv(name);
}

static void tcpsrv__sys_clear_variable(const char *name) {
    unsetenv(name);
}

/* One datagram; waits a second at most for room in the receiver's queue. */
static int tcpsrv__sys_tell(const struct sockaddr *name, socklen_t size, const char *text) {
    struct timeval limit;
    int err = 0, fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (fd < 0) return tcpsrv__failed();
    limit.tv_sec = 1;
    limit.tv_usec = 0;
    err = tcpsrv__sys_close_on_exec(fd);
    if (!err)
        err = tcpsrv__sys_result(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit));
    while (!err && sendto(fd, text, strlen(text), TCPSRV__SEND_FLAGS, name, size) < 0)
        if (errno != EINTR) err = tcpsrv__failed();
    tcpsrv__sys_close(fd);
    return err;
}

static void tcpsrv__sys_set_variable(const char *name, const char *value) {
    setenv(name, value, 1);
}

static int tcpsrv__sys_mkdir(const char *path) {
    return tcpsrv__sys_result(mkdir(path, 0700));
}

static int tcpsrv__sys_datagrams(void) {
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    return tcpsrv__socket_flagged(fd);
}

/* A descriptor that is readable when that child has ended; -ENOTSUP and the like: not to be had. */
#if TCPSRV__LINUX
#ifdef SYS_pidfd_open
#define TCPSRV__PIDFD_OPEN SYS_pidfd_open
#else
#define TCPSRV__PIDFD_OPEN 434
#endif
static int tcpsrv__sys_watch_exit(long pid) {
    long fd = syscall(TCPSRV__PIDFD_OPEN, pid, 0);
    return fd < 0 ? tcpsrv__failed() : (int)fd;
}
#elif defined(EVFILT_PROC)
static int tcpsrv__sys_watch_exit(long pid) {
    struct kevent change;
    int err = 0, fd = kqueue();
    if (fd < 0) return tcpsrv__failed();
    EV_SET(&change, (uintptr_t)pid, EVFILT_PROC, EV_ADD | EV_ONESHOT, NOTE_EXIT, 0, 0);
    if (kevent(fd, &change, 1, NULL, 0, NULL) < 0) err = tcpsrv__failed();
    if (!err) err = tcpsrv__sys_close_on_exec(fd);
    if (err) tcpsrv__sys_close(fd);
    return err ? err : fd;
}
#else
static int tcpsrv__sys_watch_exit(long pid) {
    (void)pid;
    return -ENOTSUP;
}
#endif

/* What a new program is started with. */
typedef struct tcpsrv__launch {
    char *const *argv;
    char **environment;
    char *number;                   /* in the environment: its pid */
    int *fds, count, first;         /* they become first, first + 1, ... */
    int words_fd;                   /* where it is told if it cannot be run */
    struct sockaddr_storage name;   /* of that */
    socklen_t name_size;
} tcpsrv__launch;

/* From here to its end only what may be called between fork and exec in a process that has threads
   (signal-safety(7)). */
static void tcpsrv__print_number(char *text, long number) {
    char digits[24];
    int n = 0;
    do digits[n++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (n > 0) *text++ = digits[--n];
    *text = 0;
}

/* First out of the way of the numbers that they get, among which they may be. */
static int tcpsrv__launch_fds(tcpsrv__launch *launch) {
    int i, last = launch->first + launch->count;
    launch->words_fd = fcntl(launch->words_fd, F_DUPFD_CLOEXEC, last);
    for (i = 0; i < launch->count; i++) {
        launch->fds[i] = fcntl(launch->fds[i], F_DUPFD_CLOEXEC, last);
        if (launch->fds[i] < 0) return tcpsrv__failed();
    }
    for (i = 0; i < launch->count; i++)
        if (dup2(launch->fds[i], launch->first + i) < 0) return tcpsrv__failed();
    return 0;
}

static void tcpsrv__launch_become(tcpsrv__launch *launch) {
    char words[32] = "ERRNO=";
    int err = tcpsrv__launch_fds(launch);
    tcpsrv__print_number(launch->number, (long)getpid());
    TCPSRV__ENVIRON = launch->environment;
    if (!err) {
        execvp(launch->argv[0], launch->argv);
        err = tcpsrv__failed();
    }
    tcpsrv__print_number(words + 6, -err);
    sendto(launch->words_fd, words, strlen(words), TCPSRV__SEND_FLAGS,
           (const struct sockaddr *)&launch->name, launch->name_size);
    _exit(127);
}

/* The pid of the process that becomes that program; -errno. Signals that come meanwhile find it
   with the dispositions that this process had before the library changed them. */
static long tcpsrv__sys_launch(tcpsrv__launch *launch) {
    sigset_t all, before;
    int signo;
    pid_t pid;
    long err;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid = fork();
    err = -errno;
    for (signo = 1; pid == 0 && signo < TCPSRV__NSIG; signo++)
        if (TCPSRV__LOAD(&tcpsrv__signal_fd[signo]))
            sigaction(signo, &tcpsrv__signal_before[signo], NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid == 0) tcpsrv__launch_become(launch);
    return pid < 0 ? err : (long)pid;
}

/* What a child of tcpsrv_fork_processes knows of itself; -1 elsewhere. */
static int tcpsrv__own_task_id = -1;
static int tcpsrv__lifeline = -1; /* reads the end when the parent is gone */
static int tcpsrv__ready_fd = -1; /* where a replacement says that it serves */

/* One for each number, in memory that the whole family shares. The process whose pid is there
   writes its counters between two steps of the sequence, odd while it does; each word is stored
   after and loaded before the sequence, so that a reader knows a torn copy. */
typedef struct tcpsrv__worker {
    size_t pid, sequence;
    size_t words[sizeof(tcpsrv_stats) / sizeof(size_t)];
} tcpsrv__worker;

static tcpsrv__worker *tcpsrv__workers;
static int tcpsrv__worker_count;
static int tcpsrv__worker_told;   /* one loop of the process tells its counters */
static int tcpsrv__reload_wanted; /* by a server, before the fork */
static char *const *tcpsrv__upgrade_wanted;

/* ---- what TLS needs of the system ------------------------------------------------------------ */

#ifdef TCPSERVER_TLS

static int tcpsrv__sys_random(void *memory, size_t size) {
    return getentropy(memory, size) == 0 ? 0 : tcpsrv__failed();
}

static int64_t tcpsrv__sys_unix_time(void) {
    return (int64_t)time(NULL);
}

/* The size of a regular file, without memory; else up to *size bytes of it, and how many. */
static TCPSRV__COLD int tcpsrv__sys_read_file(const char *path, char *memory, size_t *size,
                                              unsigned *mode) {
    struct stat status;
    size_t most = *size, n = 0;
    ssize_t got = 1;
    int err = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return tcpsrv__failed();
    if (fstat(fd, &status) != 0) err = tcpsrv__failed();
    else if (S_ISDIR(status.st_mode)) err = -EISDIR;
    else if (!S_ISREG(status.st_mode)) err = -EINVAL;
    else if ((uint64_t)status.st_size > most) err = -EFBIG;
    *mode = err ? 0 : (unsigned)status.st_mode;
    if (!err && !memory) n = (size_t)status.st_size;
    while (!err && memory && n < most && got > 0) {
        got = read(fd, memory + n, most - n);
        if (got > 0) n += (size_t)got;
        if (got < 0) err = tcpsrv__failed();
    }
    close(fd);
    *size = n;
    return err;
}

#endif

/* ==== >>poller ================================================================================ */

/* One edge-like contract over three systems. An event names the object's id and says "readable,
   writable, ended since I last told you". For streams the poller tells each once, and again only
   after rearm, which the stream calls when a call has shown that direction to be dry; an end or an
   error is told once. Listeners and watches are level-triggered. forget comes just before close,
   remove leaves the descriptor open. rearm_write gives 1 where edges of writability need no more
   rearming, else 0 or a code. Id 0 is the waker. */

enum {
    TCPSRV__EVENT_READ = 1,
    TCPSRV__EVENT_WRITE = 2,
    TCPSRV__EVENT_END = 4,     /* the peer has finished sending, or hung up */
    TCPSRV__EVENT_ERROR = 8,
    TCPSRV__EVENT_URGENT = 16  /* out-of-band data: a short read proves nothing */
};
enum { TCPSRV__POLLER_BATCH = 512 };

#if defined(TCPSERVER_USE_EPOLL)

typedef struct tcpsrv__poller {
    int fd;
    struct epoll_event events[TCPSRV__POLLER_BATCH];
} tcpsrv__poller;

static int tcpsrv__poller_control(tcpsrv__poller *poller, int op, int fd, uint32_t events,
                                  int64_t id) {
    struct epoll_event event;
    event.events = events;
    event.data.u64 = (uint64_t)id;
    return tcpsrv__sys_result(epoll_ctl(poller->fd, op, fd, &event));
}

static int tcpsrv__poller_open(tcpsrv__poller *poller, int waker_fd) {
    int err;
    poller->fd = epoll_create1(EPOLL_CLOEXEC);
    if (poller->fd < 0) return -errno;
    err = tcpsrv__poller_control(poller, EPOLL_CTL_ADD, waker_fd, EPOLLIN, 0);
    if (err) close(poller->fd);
    return err;
}

static void tcpsrv__poller_close(tcpsrv__poller *poller) {
    close(poller->fd);
}

static int tcpsrv__poller_fd(const tcpsrv__poller *poller) {
    return poller->fd;
}

/* Writability costs an event of its own at once, so it is asked for at the first full buffer only;
   from then on it stays. */
static uint32_t tcpsrv__poller_stream_mask(int directions) {
    uint32_t mask = EPOLLIN | EPOLLPRI | EPOLLRDHUP | (uint32_t)EPOLLET;
    return directions & TCPSRV__EVENT_WRITE ? mask | EPOLLOUT : mask;
}

static int tcpsrv__poller_add_stream(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    uint32_t mask = tcpsrv__poller_stream_mask(directions);
    return tcpsrv__poller_control(poller, EPOLL_CTL_ADD, fd, mask, id);
}

static void tcpsrv__poller_rearm_read(tcpsrv__poller *poller, int fd) {
    (void)poller, (void)fd;
}

static int tcpsrv__poller_rearm_write(tcpsrv__poller *poller, int fd, int64_t id, int armed) {
    uint32_t mask = tcpsrv__poller_stream_mask(TCPSRV__EVENT_WRITE);
    int err = armed ? 0 : tcpsrv__poller_control(poller, EPOLL_CTL_MOD, fd, mask, id);
    return err ? err : 1;
}

/* Level-triggered. A shared listener wakes one process only (EPOLLEXCLUSIVE, epoll_ctl(2)). */
static int tcpsrv__poller_add_listener(tcpsrv__poller *poller, int fd, int64_t id, int shared) {
    uint32_t mask = shared ? EPOLLIN | (uint32_t)EPOLLEXCLUSIVE : EPOLLIN;
    return tcpsrv__poller_control(poller, EPOLL_CTL_ADD, fd, mask, id);
}

static int tcpsrv__poller_add_watch(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    uint32_t mask = 0;
    if (directions & TCPSRV__EVENT_READ) mask |= EPOLLIN;
    if (directions & TCPSRV__EVENT_WRITE) mask |= EPOLLOUT;
    return tcpsrv__poller_control(poller, EPOLL_CTL_ADD, fd, mask, id);
}

static TCPSRV__APART void tcpsrv__poller_remove(tcpsrv__poller *poller, int fd) {
    tcpsrv__poller_control(poller, EPOLL_CTL_DEL, fd, 0, 0);
}

/* close(2) takes the registration with it; one that a forked child still holds open is told under
   an id that nobody has any more. */
static void tcpsrv__poller_forget(tcpsrv__poller *poller, int fd) {
    (void)poller, (void)fd;
}

static int tcpsrv__poller_wait(tcpsrv__poller *poller, int timeout_ms) {
    int n = epoll_wait(poller->fd, poller->events, TCPSRV__POLLER_BATCH, timeout_ms);
    if (n >= 0) return n;
    return errno == EINTR ? 0 : -errno;
}

static TCPSRV__COLD int tcpsrv__poller_translate(uint32_t events) {
    int told = 0;
    if (events & EPOLLIN) told |= TCPSRV__EVENT_READ;
    if (events & EPOLLOUT) told |= TCPSRV__EVENT_WRITE;
    if (events & EPOLLPRI) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_URGENT;
    if (events & EPOLLRDHUP) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_END;
    if (events & EPOLLHUP) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE | TCPSRV__EVENT_END;
    if (events & EPOLLERR) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE | TCPSRV__EVENT_ERROR;
    return told;
}

static int tcpsrv__poller_event(const tcpsrv__poller *poller, int index, int64_t *id) {
    uint32_t events = poller->events[index].events;
    *id = (int64_t)poller->events[index].data.u64;
    return TCPSRV__LIKELY(events == EPOLLIN) ? TCPSRV__EVENT_READ
                                             : tcpsrv__poller_translate(events);
}

#elif defined(TCPSERVER_USE_KQUEUE)

/* Types of struct kevent's members differ between the systems (NetBSD: unsigned filters, size_t
   counts), so that only EV_SET fills one and no filter is compared by sign. */
typedef struct tcpsrv__poller {
    int fd;
    struct kevent events[TCPSRV__POLLER_BATCH];
} tcpsrv__poller;

static int tcpsrv__poller_change(tcpsrv__poller *poller, int fd, int read_side, unsigned flags,
                                 int64_t id) {
    struct kevent change;
    void *key = (void *)(uintptr_t)id;
    if (read_side)
        EV_SET(&change, (uintptr_t)fd, EVFILT_READ, (unsigned short)flags, 0, 0, key);
    else
        EV_SET(&change, (uintptr_t)fd, EVFILT_WRITE, (unsigned short)flags, 0, 0, key);
    while (kevent(poller->fd, &change, 1, NULL, 0, NULL) != 0)
        if (errno != EINTR) return -errno;
    return 0;
}

static int tcpsrv__poller_open(tcpsrv__poller *poller, int waker_fd) {
    int err;
    poller->fd = kqueue();
    if (poller->fd < 0) return -errno;
    fcntl(poller->fd, F_SETFD, FD_CLOEXEC);
    err = tcpsrv__poller_change(poller, waker_fd, 1, EV_ADD, 0);
    if (err) close(poller->fd);
    return err;
}

static void tcpsrv__poller_close(tcpsrv__poller *poller) {
    close(poller->fd);
}

static int tcpsrv__poller_fd(const tcpsrv__poller *poller) {
    return poller->fd;
}

static TCPSRV__APART void tcpsrv__poller_remove(tcpsrv__poller *poller, int fd) {
    tcpsrv__poller_change(poller, fd, 1, EV_DELETE, 0);
    tcpsrv__poller_change(poller, fd, 0, EV_DELETE, 0);
}

/* close(2) removes the filters on the BSDs; deleting them first also suits emulations. */
static void tcpsrv__poller_forget(tcpsrv__poller *poller, int fd) {
    tcpsrv__poller_remove(poller, fd);
}

static int tcpsrv__poller_add(tcpsrv__poller *poller, int fd, int64_t id, int directions,
                              unsigned flags) {
    int err = 0;
    if (directions & TCPSRV__EVENT_READ)
        err = tcpsrv__poller_change(poller, fd, 1, EV_ADD | flags, id);
    if (!err && (directions & TCPSRV__EVENT_WRITE))
        err = tcpsrv__poller_change(poller, fd, 0, EV_ADD | flags, id);
    if (err) tcpsrv__poller_remove(poller, fd);
    return err;
}

static int tcpsrv__poller_add_stream(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    return tcpsrv__poller_add(poller, fd, id, directions | TCPSRV__EVENT_READ, EV_CLEAR);
}

static void tcpsrv__poller_rearm_read(tcpsrv__poller *poller, int fd) {
    (void)poller, (void)fd;
}

static int tcpsrv__poller_rearm_write(tcpsrv__poller *poller, int fd, int64_t id, int armed) {
    int err = armed ? 0 : tcpsrv__poller_change(poller, fd, 0, EV_ADD | EV_CLEAR, id);
    return err ? err : 1;
}

static int tcpsrv__poller_add_listener(tcpsrv__poller *poller, int fd, int64_t id, int shared) {
    (void)shared;
    return tcpsrv__poller_add(poller, fd, id, TCPSRV__EVENT_READ, 0);
}

static int tcpsrv__poller_add_watch(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    int err = tcpsrv__sys_can_wait(fd);
    return err ? err : tcpsrv__poller_add(poller, fd, id, directions, 0);
}

static int tcpsrv__poller_wait(tcpsrv__poller *poller, int timeout_ms) {
    struct timespec limit, *given = NULL;
    int n;
    if (timeout_ms >= 0) {
        limit.tv_sec = timeout_ms / 1000;
        limit.tv_nsec = (long)(timeout_ms % 1000) * 1000000L;
        given = &limit;
    }
    n = kevent(poller->fd, NULL, 0, poller->events, TCPSRV__POLLER_BATCH, given);
    if (n >= 0) return n;
    return errno == EINTR ? 0 : -errno;
}

/* EV_EOF on the read side: unread bytes may remain. On the write side: nobody reads any more, or a
   connect has failed; the next call tells which. */
static int tcpsrv__poller_event(const tcpsrv__poller *poller, int index, int64_t *id) {
    const struct kevent *event = &poller->events[index];
    int told, ended = (event->flags & EV_EOF) != 0;
    *id = (int64_t)(uintptr_t)event->udata;
    if (event->flags & EV_ERROR) return TCPSRV__EVENT_ERROR;
    if (event->filter == EVFILT_READ)
        told = ended ? TCPSRV__EVENT_READ | TCPSRV__EVENT_END : TCPSRV__EVENT_READ;
    else
        told = ended ? TCPSRV__EVENT_WRITE | TCPSRV__EVENT_READ : TCPSRV__EVENT_WRITE;
    return ended && event->fflags ? told | TCPSRV__EVENT_ERROR : told;
}

#else

/* poll(2) is level-triggered: what was told is masked out until rearm. A hang-up or error cannot be
   masked; such an entry is muted by a negative descriptor. */
typedef struct tcpsrv__poller {
    struct pollfd *entries;
    int64_t *ids;           /* of the entries; negative: level-triggered, minus the id */
    int *index_of;          /* a descriptor's entry + 1 */
    int count, capacity, descriptors, from;
    struct {
        int64_t id;
        int events;
    } events[TCPSRV__POLLER_BATCH];
} tcpsrv__poller;

static int tcpsrv__poller_grow_entries(tcpsrv__poller *poller) {
    int capacity = poller->capacity ? poller->capacity * 2 : 16;
    struct pollfd *entries;
    int64_t *ids;
    if (poller->count < poller->capacity) return 0;
    entries = (struct pollfd *)TCPSERVER_REALLOC(poller->entries,
                                                 (size_t)capacity * sizeof *entries);
    if (!entries) return -ENOMEM;
    poller->entries = entries;
    ids = (int64_t *)TCPSERVER_REALLOC(poller->ids, (size_t)capacity * sizeof *ids);
    if (!ids) return -ENOMEM;
    poller->ids = ids;
    poller->capacity = capacity;
    return 0;
}

static int tcpsrv__poller_grow_descriptors(tcpsrv__poller *poller, int fd) {
    int n = poller->descriptors ? poller->descriptors : 16;
    int *index_of;
    if (fd < poller->descriptors) return 0;
    while (n <= fd) n *= 2;
    index_of = (int *)TCPSERVER_REALLOC(poller->index_of, (size_t)n * sizeof *index_of);
    if (!index_of) return -ENOMEM;
    memset(index_of + poller->descriptors, 0,
           (size_t)(n - poller->descriptors) * sizeof *index_of);
    poller->index_of = index_of;
    poller->descriptors = n;
    return 0;
}

static int tcpsrv__poller_add(tcpsrv__poller *poller, int fd, int64_t id, short events) {
    int err = tcpsrv__poller_grow_entries(poller);
    if (!err) err = tcpsrv__poller_grow_descriptors(poller, fd);
    if (err) return err;
    if (poller->index_of[fd]) return -EEXIST;
    poller->entries[poller->count].fd = fd;
    poller->entries[poller->count].events = events;
    poller->entries[poller->count].revents = 0;
    poller->ids[poller->count] = id;
    poller->index_of[fd] = ++poller->count;
    return 0;
}

static void tcpsrv__poller_close(tcpsrv__poller *poller) {
    tcpsrv__free(poller->entries);
    tcpsrv__free(poller->ids);
    tcpsrv__free(poller->index_of);
}

static int tcpsrv__poller_open(tcpsrv__poller *poller, int waker_fd) {
    int err;
    memset(poller, 0, sizeof *poller);
    err = tcpsrv__poller_add(poller, waker_fd, 0, POLLIN);
    if (err) tcpsrv__poller_close(poller);
    return err;
}

static int tcpsrv__poller_fd(const tcpsrv__poller *poller) {
    (void)poller;
    return -ENOTSUP;
}

static short tcpsrv__poller_mask(int directions) {
    int mask = 0;
    if (directions & TCPSRV__EVENT_READ) mask |= POLLIN;
    if (directions & TCPSRV__EVENT_WRITE) mask |= POLLOUT;
    if (directions & TCPSRV__EVENT_URGENT) mask |= POLLPRI;
    return (short)mask;
}

static int tcpsrv__poller_add_stream(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    int mask = tcpsrv__poller_mask(directions | TCPSRV__EVENT_READ | TCPSRV__EVENT_URGENT);
    return tcpsrv__poller_add(poller, fd, id, (short)(mask | POLLRDHUP));
}

static void tcpsrv__poller_rearm_read(tcpsrv__poller *poller, int fd) {
    struct pollfd *entry = &poller->entries[poller->index_of[fd] - 1];
    entry->events = (short)(entry->events | POLLIN | POLLPRI);
}

static int tcpsrv__poller_rearm_write(tcpsrv__poller *poller, int fd, int64_t id, int armed) {
    struct pollfd *entry = &poller->entries[poller->index_of[fd] - 1];
    (void)id, (void)armed;
    entry->events = (short)(entry->events | POLLOUT);
    return 0;
}

static int tcpsrv__poller_add_listener(tcpsrv__poller *poller, int fd, int64_t id, int shared) {
    (void)shared;
    return tcpsrv__poller_add(poller, fd, -id, POLLIN);
}

static int tcpsrv__poller_add_watch(tcpsrv__poller *poller, int fd, int64_t id, int directions) {
    int err = tcpsrv__sys_can_wait(fd);
    return err ? err : tcpsrv__poller_add(poller, fd, -id, tcpsrv__poller_mask(directions));
}

static TCPSRV__APART void tcpsrv__poller_remove(tcpsrv__poller *poller, int fd) {
    int index, last = poller->count - 1, moved;
    if (fd >= poller->descriptors || !poller->index_of[fd]) return;
    index = poller->index_of[fd] - 1;
    poller->index_of[fd] = 0;
    poller->count--;
    if (index == last) return;
    poller->entries[index] = poller->entries[last];
    poller->ids[index] = poller->ids[last];
    moved = poller->entries[index].fd;
    poller->index_of[moved < 0 ? -1 - moved : moved] = index + 1;
}

static void tcpsrv__poller_forget(tcpsrv__poller *poller, int fd) {
    tcpsrv__poller_remove(poller, fd);
}

static int tcpsrv__poller_translate(short revents) {
    int told = 0;
    if (revents & POLLIN) told |= TCPSRV__EVENT_READ;
    if (revents & POLLOUT) told |= TCPSRV__EVENT_WRITE;
    if (revents & POLLPRI) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_URGENT;
    if (revents & POLLRDHUP) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_END;
    if (revents & POLLHUP) told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE | TCPSRV__EVENT_END;
    if (revents & (POLLERR | POLLNVAL))
        told |= TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE | TCPSRV__EVENT_ERROR;
    return told;
}

/* The masking that makes an entry edge-like. */
static void tcpsrv__poller_mask_told(struct pollfd *entry) {
    int told = entry->revents;
    entry->events = (short)(entry->events & ~told);
    if (told & (POLLHUP | POLLERR | POLLNVAL)) entry->fd = -1 - entry->fd;
}

/* Each batch begins behind the entry that ended the last one, so that all have their turn. */
static int tcpsrv__poller_wait(tcpsrv__poller *poller, int timeout_ms) {
    int ready = poll(poller->entries, (nfds_t)poller->count, timeout_ms), i, at, n = 0;
    if (ready < 0) return errno == EINTR ? 0 : -errno;
    if (poller->from >= poller->count) poller->from = 0;
    for (i = 0, at = poller->from; i < poller->count && ready > 0; i++, at++) {
        struct pollfd *entry;
        if (at == poller->count) at = 0;
        entry = &poller->entries[at];
        if (!entry->revents) continue;
        if (n == TCPSRV__POLLER_BATCH) break;
        ready--;
        poller->events[n].id = poller->ids[at] < 0 ? -poller->ids[at] : poller->ids[at];
        poller->events[n++].events = tcpsrv__poller_translate(entry->revents);
        if (poller->ids[at] > 0) tcpsrv__poller_mask_told(entry);
    }
    poller->from = at;
    return n;
}

static int tcpsrv__poller_event(const tcpsrv__poller *poller, int index, int64_t *id) {
    *id = poller->events[index].id;
    return poller->events[index].events;
}

#endif

/* ==== >>loop ================================================================================== */

/* Owns the turn. One turn: wait for events, tell each to its object, run the timers that are due,
   then run once whatever is on the ready list; what these put there waits for the next turn. After
   every callback or coroutine run the flush list is worked off. At the end of the turn, and only
   there, objects that have ended are destroyed and their slots become free, so that pointers and
   events of this batch stay harmless until then.

   Everything that can be told about or named by an id is a source: it has a slot in the loop's
   table, and its id is the slot's generation above the slot's number. */

typedef struct tcpsrv__source tcpsrv__source;
typedef struct tcpsrv__co tcpsrv__co;
typedef struct tcpsrv__block tcpsrv__block;
typedef struct tcpsrv__stack_pool tcpsrv__stack_pool;
typedef struct tcpsrv__upgrade tcpsrv__upgrade;

typedef struct tcpsrv__class {
    void (*event)(tcpsrv__source *source, int events);
    void (*run)(tcpsrv__source *source);      /* its turn on the ready list */
    void (*drop)(tcpsrv__source *source);     /* the loop is being freed, or tcpsrv_cancel */
    void (*destroy)(tcpsrv__source *source);  /* give back its memory; NULL: begins with it */
    size_t size;                              /* of what begins with it; 0: made elsewhere */
    int may_cancel;                           /* that tcpsrv_cancel drops it */
} tcpsrv__class;

struct tcpsrv__source {
    const tcpsrv__class *type;
    tcpsrv_loop *loop;
    int64_t id;
    tcpsrv__source *ready_next; /* on the ready list, or on the list of those to destroy */
    tcpsrv__source *flush_next;
    int fd;
    unsigned char is_ready, is_flushing, is_gone;
};

typedef struct tcpsrv__slot {
    tcpsrv__source *source;     /* who is told; the loop's wake: nobody */
    uint32_t generation;
    uint32_t next;              /* free list; or what else its owner keeps here */
} tcpsrv__slot;

/* A timer that must not fail to be armed keeps its place in the heap with this deadline. */
#define TCPSRV__NEVER UINT64_MAX

typedef struct tcpsrv__timer tcpsrv__timer;
struct tcpsrv__timer {
    void (*fire)(tcpsrv_loop *loop, tcpsrv__timer *timer);
    uint64_t due;
    size_t place;               /* in the heap + 1; 0: not armed */
};

typedef struct tcpsrv__heap_entry {
    uint64_t due, sequence;
    tcpsrv__timer *timer;
} tcpsrv__heap_entry;

typedef struct tcpsrv__posted {
    struct tcpsrv__posted *next;
    tcpsrv_fn *fn;
    void *arg;
} tcpsrv__posted;

typedef struct tcpsrv__signal_call {
    tcpsrv__source source;
    struct tcpsrv__signal_call *next;
    tcpsrv_signal_fn *fn;
    void *arg;
    int signo;
} tcpsrv__signal_call;

enum { TCPSRV__CLASSES = 6 };   /* of pooled blocks */
enum { TCPSRV__TELL_MS = 100 };

struct tcpsrv_loop {
    uint64_t now, turn;
    tcpsrv__co *current;        /* the running coroutine; NULL: a callback, or nothing */
    tcpsrv_fn *errand;          /* what it wants done on the loop's stack */
    void *errand_arg;
    tcpsrv_stream *corked;      /* the stream that is served straight, >>stream, */
    tcpsrv__block *inbox;       /* NULL: made at the next need */
    char *out_from;             /* what is written to the corked stream: from here */
    tcpsrv__block *outbox;      /* as inbox */
    char *out_at;               /* to here, */
    uintptr_t lacking;          /* not 0: a box, or spent is not given back */
    size_t out_room;            /* with so many bytes free behind */
    tcpsrv__source *ready_first, *ready_last, *flush_first, *flush_last, *gone;
    tcpsrv__slot *slots;
    tcpsrv__stack_pool *stacks; /* >>coroutine */
    uint32_t slot_count, slot_capacity, free_slot, released_slot;
    uint64_t longest_turn;      /* since somebody asked, which sets measured */
    tcpsrv__heap_entry *heap;
    size_t heap_count, heap_capacity;
    uint64_t timer_sequence;
    int running, stopping, ending, measured;
    int64_t parent_watch;       /* of a forked child, >>server */
    tcpsrv *servers;            /* those that run here */
    tcpsrv__upgrade *upgrade;   /* >>process */
    void (*turn_end)(tcpsrv_loop *loop); /* of a forked child: makes its counters known, */
    uint64_t told_at;           /* and when it did that last */
    int untold;                 /* more to tell: the next turn comes within TCPSRV__TELL_MS */
    long pid;
    char *mark;                 /* gone in a forked child; NULL: the pid tells */
    tcpsrv__block *spent;       /* was input; what leaves from it may not have left yet */
    tcpsrv__block *pool[TCPSRV__CLASSES]; /* of blocks, the last one given back first, >>buffer */
    unsigned pool_count[TCPSRV__CLASSES];
    void *links;                /* what a transport keeps for its streams */
    void (*links_free)(void *links);
    int64_t *ended;             /* ring of coroutines that nobody has joined */
    size_t ended_capacity, ended_first, ended_count;
    tcpsrv__signal_call *signals;
    struct tcpsrv__helpers *helpers; /* NULL: there was no work for any */
    pthread_mutex_t post_lock;
    tcpsrv__posted *posted_first, *posted_last;
    int post_waking;            /* a wake is on its way; under post_lock */
    tcpsrv__waker waker;
    tcpsrv__source wake;        /* what is told of the waker's events */
    tcpsrv__poller poller;
};

#define TCPSRV__CONTAINER(type, member, pointer) \
    ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

/* ---- slots ----------------------------------------------------------------------------------- */

static TCPSRV__COLD int tcpsrv__slots_grow(tcpsrv_loop *loop) {
    uint32_t capacity = loop->slot_capacity ? loop->slot_capacity * 2 : 64;
    tcpsrv__slot *slots;
    slots = (tcpsrv__slot *)TCPSERVER_REALLOC(loop->slots, (size_t)capacity * sizeof *slots);
    if (!slots) return -ENOMEM;
    loop->slots = slots;
    loop->slot_capacity = capacity;
    return 0;
}

static TCPSRV__COLD int tcpsrv__source_init(tcpsrv__source *source, const tcpsrv__class *type,
                               tcpsrv_loop *loop, int fd) {
    tcpsrv__slot *slot;
    uint32_t number = loop->free_slot;
    if (loop->ending) return TCPSRV_ECANCELED;
    if (!number) {
        number = loop->slot_count;
        if (number >= loop->slot_capacity && tcpsrv__slots_grow(loop) != 0) return -ENOMEM;
        loop->slot_count = number + 1;
        loop->slots[number].generation = 1;
        loop->slots[number].next = 0;
    }
    slot = &loop->slots[number];
    loop->free_slot = slot->next;
    slot->source = source;
    slot->next = 0;
    source->type = type;
    source->loop = loop;
    source->fd = fd;
    source->id = (int64_t)(((uint64_t)slot->generation << 32) | number);
    return 0;
}

/* Zeroed memory that begins with a source; NULL, and *err says why. */
static TCPSRV__COLD void *tcpsrv__source_new(const tcpsrv__class *type, tcpsrv_loop *loop, int fd,
                                             int *err) {
    tcpsrv__source *source = (tcpsrv__source *)tcpsrv__alloc(type->size);
    *err = source ? tcpsrv__source_init(source, type, loop, fd) : -ENOMEM;
    if (!*err) return source;
    tcpsrv__free(source);
    return NULL;
}

static TCPSRV__NOINLINE tcpsrv__slot *tcpsrv__slot_of(const tcpsrv_loop *loop, int64_t id) {
    uint32_t number = (uint32_t)((uint64_t)id & 0xffffffffu);
    tcpsrv__slot *slot;
    if (number == 0 || number >= loop->slot_count) return NULL;
    slot = &loop->slots[number];
    return slot->generation == (uint32_t)((uint64_t)id >> 32) ? slot : NULL;
}

static tcpsrv__source *tcpsrv__slot_source(const tcpsrv_loop *loop, const tcpsrv__slot *slot) {
    return slot->source != &loop->wake ? slot->source : NULL;
}

static TCPSRV__APART tcpsrv__source *tcpsrv__source_by_id(const tcpsrv_loop *loop, int64_t id) {
    tcpsrv__slot *slot = tcpsrv__slot_of(loop, id);
    return slot ? tcpsrv__slot_source(loop, slot) : NULL;
}

/* The id is dead from now on; the slot is reused from the next turn on. */
static TCPSRV__COLD void tcpsrv__slot_release(tcpsrv_loop *loop, int64_t id) {
    tcpsrv__slot *slot = tcpsrv__slot_of(loop, id);
    if (!slot) return;
    slot->source = &loop->wake;
    slot->generation = (slot->generation + 1) & 0x7fffffffu; /* ids stay positive */
    if (slot->generation == 0) slot->generation = 1;
    slot->next = loop->released_slot;
    loop->released_slot = (uint32_t)(slot - loop->slots);
}

static void tcpsrv__slots_recycle(tcpsrv_loop *loop) {
    while (loop->released_slot) {
        tcpsrv__slot *slot = &loop->slots[loop->released_slot];
        uint32_t next = slot->next;
        slot->next = loop->free_slot;
        loop->free_slot = loop->released_slot;
        loop->released_slot = next;
    }
}

/* ---- the ready list, the flush list, the end of sources -------------------------------------- */

enum { TCPSRV__READY = 1, TCPSRV__LISTED }; /* on the ready list; without something to do there */

static TCPSRV__NOINLINE void tcpsrv__make_ready(tcpsrv__source *source) {
    tcpsrv_loop *loop = source->loop;
    int listed = source->is_ready;
    if (source->is_gone) return;
    source->is_ready = TCPSRV__READY | TCPSRV__LISTED;
    if (listed) return;
    source->ready_next = NULL;
    if (loop->ready_last) loop->ready_last->ready_next = source;
    else loop->ready_first = source;
    loop->ready_last = source;
}

static tcpsrv__source *tcpsrv__take_ready(tcpsrv_loop *loop) {
    tcpsrv__source *source = loop->ready_first;
    loop->ready_first = source->ready_next;
    if (!loop->ready_first) loop->ready_last = NULL;
    source->is_ready = 0;
    return source;
}

static TCPSRV__NOINLINE void tcpsrv__make_flushing(tcpsrv__source *source) {
    tcpsrv_loop *loop = source->loop;
    if (source->is_flushing) return;
    source->is_flushing = 1;
    source->flush_next = NULL;
    if (loop->flush_last) loop->flush_last->flush_next = source;
    else loop->flush_first = source;
    loop->flush_last = source;
}

static void tcpsrv__output_step(tcpsrv__source *source); /* of a stream: nothing else flushes */

/* After every callback and coroutine run. */
static TCPSRV__APART void tcpsrv__flush_all(tcpsrv_loop *loop) {
    while (loop->flush_first) {
        tcpsrv__source *source = loop->flush_first;
        loop->flush_first = source->flush_next;
        if (!loop->flush_first) loop->flush_last = NULL;
        source->is_flushing = 0;
        if (!source->is_gone) tcpsrv__output_step(source);
    }
}

/* What was due at a source's turn on the ready list has been done. */
static void tcpsrv__make_idle(tcpsrv__source *source) {
    source->is_ready &= TCPSRV__LISTED;
}

/* Its memory goes at the end of the turn. */
static TCPSRV__COLD void tcpsrv__bury(tcpsrv__source *source) {
    source->ready_next = source->loop->gone;
    source->loop->gone = source;
}

/* Ends a source: its id is dead at once, its memory goes at the end of the turn. One that is on the
   ready list goes when it is taken from there. */
static TCPSRV__APART void tcpsrv__source_end(tcpsrv__source *source) {
    if (source->is_gone) return;
    source->is_gone = 1;
    tcpsrv__slot_release(source->loop, source->id);
    tcpsrv__make_idle(source);
    if (!source->is_ready) tcpsrv__bury(source);
}

static TCPSRV__COLD void tcpsrv__destroy_gone(tcpsrv_loop *loop) {
    while (loop->gone) {
        tcpsrv__source *source = loop->gone;
        loop->gone = source->ready_next;
        if (source->type->destroy) source->type->destroy(source);
        else tcpsrv__free(source);
    }
}

/* Those with nothing to do that come next are taken too: they alone are no need of a next turn. */
static TCPSRV__COLD void tcpsrv__run_ready(tcpsrv_loop *loop) {
    tcpsrv__source *source, *last = loop->ready_last;
    int due;
    while ((source = loop->ready_first) != NULL) {
        due = source->is_ready & TCPSRV__READY;
        if (due && !last) break;
        if (source == last) last = NULL;
        tcpsrv__take_ready(loop);
        if (due) source->type->run(source);
        else if (source->is_gone) tcpsrv__bury(source);
        tcpsrv__flush_all(loop);
    }
}

/* ---- timers ---------------------------------------------------------------------------------- */

static int tcpsrv__heap_before(const tcpsrv__heap_entry *a, const tcpsrv__heap_entry *b) {
    return a->due != b->due ? a->due < b->due : a->sequence < b->sequence;
}

static void tcpsrv__heap_place(tcpsrv_loop *loop, size_t index, tcpsrv__heap_entry entry) {
    loop->heap[index] = entry;
    entry.timer->place = index + 1;
}

static TCPSRV__COLD void tcpsrv__heap_up(tcpsrv_loop *loop, size_t index,
                                         tcpsrv__heap_entry entry) {
    while (index > 0 && tcpsrv__heap_before(&entry, &loop->heap[(index - 1) / 2])) {
        tcpsrv__heap_place(loop, index, loop->heap[(index - 1) / 2]);
        index = (index - 1) / 2;
    }
    tcpsrv__heap_place(loop, index, entry);
}

static TCPSRV__COLD void tcpsrv__heap_down(tcpsrv_loop *loop, size_t index,
                                           tcpsrv__heap_entry entry) {
    size_t child;
    while ((child = 2 * index + 1) < loop->heap_count) {
        if (child + 1 < loop->heap_count &&
            tcpsrv__heap_before(&loop->heap[child + 1], &loop->heap[child]))
            child++;
        if (!tcpsrv__heap_before(&loop->heap[child], &entry)) break;
        tcpsrv__heap_place(loop, index, loop->heap[child]);
        index = child;
    }
    tcpsrv__heap_place(loop, index, entry);
}

static TCPSRV__COLD void tcpsrv__timer_cancel(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    size_t index = timer->place;
    tcpsrv__heap_entry last;
    if (!index--) return;
    timer->place = 0;
    last = loop->heap[--loop->heap_count];
    if (index == loop->heap_count) return;
    if (index > 0 && tcpsrv__heap_before(&last, &loop->heap[(index - 1) / 2]))
        tcpsrv__heap_up(loop, index, last);
    else
        tcpsrv__heap_down(loop, index, last);
}

/* Memory for one more timer, so that arming a reserved one cannot fail. */
static TCPSRV__COLD int tcpsrv__timer_reserve(tcpsrv_loop *loop, size_t more) {
    size_t capacity = loop->heap_capacity ? loop->heap_capacity : 32;
    tcpsrv__heap_entry *heap;
    if (loop->heap_count + more <= loop->heap_capacity) return 0;
    while (capacity < loop->heap_count + more) capacity *= 2;
    heap = (tcpsrv__heap_entry *)TCPSERVER_REALLOC(loop->heap, capacity * sizeof *heap);
    if (!heap) return -ENOMEM;
    loop->heap = heap;
    loop->heap_capacity = capacity;
    return 0;
}

static TCPSRV__COLD int tcpsrv__timer_arm(tcpsrv_loop *loop, tcpsrv__timer *timer, uint64_t due) {
    tcpsrv__heap_entry entry;
    tcpsrv__timer_cancel(loop, timer);
    if (tcpsrv__timer_reserve(loop, 1) != 0) return -ENOMEM;
    timer->due = due;
    entry.due = due;
    entry.sequence = loop->timer_sequence++;
    entry.timer = timer;
    tcpsrv__heap_up(loop, loop->heap_count++, entry);
    return 0;
}

/* Timers that timers arm are due no earlier than all that were due before, and come after them. */
static void tcpsrv__run_timers(tcpsrv_loop *loop) {
    uint64_t limit = loop->timer_sequence;
    while (loop->heap_count && loop->heap[0].due <= loop->now && loop->heap[0].sequence < limit) {
        tcpsrv__timer *timer = loop->heap[0].timer;
        tcpsrv__timer_cancel(loop, timer);
        timer->fire(loop, timer);
        tcpsrv__flush_all(loop);
    }
}

#define TCPSRV__NS(ms) ((uint64_t)(ms) * 1000000u) /* of a constant */

static TCPSRV__COLD uint64_t tcpsrv__ms_to_ns(int64_t ms) {
    if (ms <= 0) return 0;
    return ms > INT64_MAX / 2000000 ? (uint64_t)INT64_MAX / 2 : (uint64_t)ms * 1000000u;
}

/* ---- posted calls and signals ---------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__run_posted(tcpsrv_loop *loop) {
    tcpsrv__posted *first;
    pthread_mutex_lock(&loop->post_lock);
    first = loop->posted_first;
    loop->posted_first = loop->posted_last = NULL;
    loop->post_waking = 0;
    pthread_mutex_unlock(&loop->post_lock);
    while (first) {
        tcpsrv__posted *posted = first;
        first = posted->next;
        posted->fn(posted->arg);
        tcpsrv__free(posted);
        tcpsrv__flush_all(loop);
    }
}

/* The mark is taken before the calls, so that a signal during them is told again. Any call may
   cancel any other: those that ended stay in the list until the turn's end. */
static TCPSRV__COLD void tcpsrv__run_signals(tcpsrv_loop *loop) {
    unsigned char taken[TCPSRV__NSIG];
    tcpsrv__signal_call *call;
    memset(taken, 0, sizeof taken);
    for (call = loop->signals; call; call = call->next)
        if (tcpsrv__signal_take(call->signo)) taken[call->signo] = 1;
    for (call = loop->signals; call; call = call->next) {
        if (!taken[call->signo] || call->source.is_gone) continue;
        call->fn(call->signo, call->arg);
        tcpsrv__flush_all(loop);
    }
}

static void tcpsrv__signal_forget(int signo) {
    pthread_mutex_lock(&tcpsrv__signal_lock);
    tcpsrv__sys_restore_signal(signo);
    tcpsrv__signal_loop[signo] = NULL;
    pthread_mutex_unlock(&tcpsrv__signal_lock);
}

static TCPSRV__COLD void tcpsrv__signal_cancel(tcpsrv__source *source) {
    tcpsrv__signal_call *own = TCPSRV__CONTAINER(tcpsrv__signal_call, source, source);
    tcpsrv__signal_call *call;
    tcpsrv__source_end(source);
    for (call = source->loop->signals; call; call = call->next)
        if (call->signo == own->signo && !call->source.is_gone) return;
    tcpsrv__signal_forget(own->signo);
}

static TCPSRV__COLD void tcpsrv__signal_destroy(tcpsrv__source *source) {
    tcpsrv__signal_call *own = TCPSRV__CONTAINER(tcpsrv__signal_call, source, source);
    tcpsrv__signal_call **at = &source->loop->signals;
    while (*at != own) at = &(*at)->next;
    *at = own->next;
    tcpsrv__free(own);
}

static const tcpsrv__class tcpsrv__signal_class = {
    NULL, NULL, tcpsrv__signal_cancel, tcpsrv__signal_destroy, sizeof(tcpsrv__signal_call), 1
};

static int tcpsrv__signal_claim(tcpsrv_loop *loop, int signo) {
    int err = 0;
    pthread_mutex_lock(&tcpsrv__signal_lock);
    if (tcpsrv__signal_loop[signo] && tcpsrv__signal_loop[signo] != loop) err = TCPSRV_EBUSY;
    if (!err && !tcpsrv__signal_loop[signo])
        err = tcpsrv__sys_catch_signal(signo, loop->waker.write_fd);
    if (!err) tcpsrv__signal_loop[signo] = loop;
    pthread_mutex_unlock(&tcpsrv__signal_lock);
    return err;
}

TCPSRV_IMPL int64_t tcpsrv_on_signal(tcpsrv_loop *loop, int signo, tcpsrv_signal_fn *fn,
                                     void *arg) {
    tcpsrv__signal_call *call;
    int err;
    if (signo <= 0 || signo >= TCPSRV__NSIG) return tcpsrv__fail(-EINVAL, "on_signal", NULL);
    call = (tcpsrv__signal_call *)tcpsrv__source_new(&tcpsrv__signal_class, loop, -1, &err);
    if (!call) return tcpsrv__fail(err, "on_signal", NULL);
    call->signo = signo;
    call->fn = fn;
    call->arg = arg;
    call->next = loop->signals;
    loop->signals = call;
    err = tcpsrv__signal_claim(loop, signo);
    if (!err) return call->source.id;
    tcpsrv__source_end(&call->source);
    return tcpsrv__fail(err, "on_signal", NULL);
}

static TCPSRV__COLD void tcpsrv__post(tcpsrv_loop *loop, tcpsrv__posted *posted) {
    int wake;
    posted->next = NULL;
    pthread_mutex_lock(&loop->post_lock);
    if (loop->posted_last) loop->posted_last->next = posted;
    else loop->posted_first = posted;
    loop->posted_last = posted;
    wake = !loop->post_waking;
    loop->post_waking = 1;
    /* Under the lock, so that the loop cannot be freed between by a call that was posted. */
    if (wake) tcpsrv__waker_wake(loop->waker.write_fd);
    pthread_mutex_unlock(&loop->post_lock);
}

TCPSRV_IMPL int tcpsrv_post(tcpsrv_loop *loop, tcpsrv_fn *fn, void *arg) {
    tcpsrv__posted *posted = (tcpsrv__posted *)tcpsrv__alloc(sizeof *posted);
    if (!posted) return tcpsrv__fail(-ENOMEM, "post", NULL);
    posted->fn = fn;
    posted->arg = arg;
    tcpsrv__post(loop, posted);
    return 0;
}

/* ---- work that blocks ------------------------------------------------------------------------ */

/* A job's work runs in a helper thread; then it is posted to the loop as any call, and freed as
   one. Helpers are made when there is work and end when there is none. What they share belongs to
   one loop, so that a forked child, which makes a loop of its own, never meets a lock that a thread
   it does not have held at the fork; it outlives the loop as long as a helper runs, since nobody
   waits for a call that blocks. */

typedef struct tcpsrv__job tcpsrv__job;
struct tcpsrv__job {
    tcpsrv__posted posted;      /* first: freed as it */
    tcpsrv__job *next;
    tcpsrv_fn *work;            /* of what posted.arg is */
};

typedef struct tcpsrv__helpers {
    pthread_mutex_t lock;       /* of all below; taken before a loop's post_lock */
    tcpsrv_loop *loop;          /* NULL: freed */
    tcpsrv__job *first, *last;  /* nobody works on them yet */
    int threads;
} tcpsrv__helpers;

enum { TCPSRV__MAX_HELPERS = 16 }; /* of one loop */

static TCPSRV__COLD tcpsrv__helpers *tcpsrv__helpers_make(tcpsrv_loop *loop) {
    tcpsrv__helpers *helpers = loop->helpers;
    if (helpers) return helpers;
    helpers = (tcpsrv__helpers *)tcpsrv__alloc(sizeof *helpers);
    if (helpers && pthread_mutex_init(&helpers->lock, NULL) != 0) {
        tcpsrv__free(helpers);
        helpers = NULL;
    }
    if (helpers) helpers->loop = loop;
    loop->helpers = helpers;
    return helpers;
}

static void tcpsrv__helpers_free(tcpsrv__helpers *helpers) {
    pthread_mutex_destroy(&helpers->lock);
    tcpsrv__free(helpers);
}

static TCPSRV__COLD tcpsrv__job *tcpsrv__job_take(tcpsrv__helpers *helpers) {
    tcpsrv__job *job = helpers->first;
    if (!job) return NULL;
    helpers->first = job->next;
    if (!helpers->first) helpers->last = NULL;
    return job;
}

static TCPSRV__COLD void *tcpsrv__helper_run(void *arg) {
    tcpsrv__helpers *helpers = (tcpsrv__helpers *)arg;
    tcpsrv__job *job;
    int last;
    pthread_mutex_lock(&helpers->lock);
    while ((job = tcpsrv__job_take(helpers)) != NULL) {
        pthread_mutex_unlock(&helpers->lock);
        job->work(job->posted.arg);
        pthread_mutex_lock(&helpers->lock);
        if (helpers->loop) tcpsrv__post(helpers->loop, &job->posted);
        else tcpsrv__free(job);
    }
    last = --helpers->threads == 0 && !helpers->loop;
    pthread_mutex_unlock(&helpers->lock);
    if (last) tcpsrv__helpers_free(helpers);
    return NULL;
}

/* 0, or a code, and the job is the caller's still. */
static TCPSRV__COLD int tcpsrv__job_start(tcpsrv_loop *loop, tcpsrv__job *job) {
    tcpsrv__helpers *helpers = tcpsrv__helpers_make(loop);
    int err = 0;
    if (!helpers) return -ENOMEM;
    pthread_mutex_lock(&helpers->lock);
    if (helpers->threads < TCPSRV__MAX_HELPERS) {
        err = tcpsrv__sys_thread(tcpsrv__helper_run, helpers);
        if (!err) helpers->threads++;
    }
    if (helpers->threads) err = 0; /* one that runs will come to it */
    if (!err) {
        job->next = NULL;
        if (helpers->last) helpers->last->next = job;
        else helpers->first = job;
        helpers->last = job;
    }
    pthread_mutex_unlock(&helpers->lock);
    return err;
}

/* One that nobody works on yet is freed; another is posted as if nothing had happened. */
static TCPSRV__COLD void tcpsrv__job_cancel(tcpsrv_loop *loop, tcpsrv__job *job) {
    tcpsrv__helpers *helpers = loop->helpers;
    tcpsrv__job *at, *before = NULL;
    pthread_mutex_lock(&helpers->lock);
    for (at = helpers->first; at && at != job; at = at->next) before = at;
    if (at) {
        if (before) before->next = job->next;
        else helpers->first = job->next;
        if (helpers->last == job) helpers->last = before;
    }
    pthread_mutex_unlock(&helpers->lock);
    if (at) tcpsrv__free(job);
}

/* The loop is being freed: what helpers still have to do is theirs to free. */
static TCPSRV__COLD void tcpsrv__helpers_leave(tcpsrv_loop *loop) {
    tcpsrv__helpers *helpers = loop->helpers;
    int last;
    if (!helpers) return;
    pthread_mutex_lock(&helpers->lock);
    helpers->loop = NULL;
    last = helpers->threads == 0;
    pthread_mutex_unlock(&helpers->lock);
    if (last) tcpsrv__helpers_free(helpers);
}

/* ---- the user's timers and watches ----------------------------------------------------------- */

typedef struct tcpsrv__call {
    tcpsrv__source source;
    tcpsrv__timer timer;
    tcpsrv_fn *fn;
    void *arg;
    uint64_t period;            /* ns; 0: once */
} tcpsrv__call;

static TCPSRV__COLD void tcpsrv__call_cancel(tcpsrv__source *source) {
    tcpsrv__call *call = TCPSRV__CONTAINER(tcpsrv__call, source, source);
    tcpsrv__timer_cancel(source->loop, &call->timer);
    tcpsrv__source_end(source);
}

static const tcpsrv__class tcpsrv__call_class = {
    NULL, NULL, tcpsrv__call_cancel, NULL, sizeof(tcpsrv__call), 1
};

/* The first point of the grid that has not passed. */
static uint64_t tcpsrv__call_next(const tcpsrv__call *call, uint64_t due, uint64_t now) {
    return now < due ? due : due + ((now - due) / call->period + 1) * call->period;
}

/* A periodic call is armed before it runs, in the room that it had in the heap, and again after it
   for what it missed by its own length. */
static TCPSRV__COLD void tcpsrv__call_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv__call *call = TCPSRV__CONTAINER(tcpsrv__call, timer, timer);
    uint64_t next;
    if (!call->period) {
        tcpsrv__source_end(&call->source);
        call->fn(call->arg);
        return;
    }
    tcpsrv__timer_arm(loop, timer, tcpsrv__call_next(call, timer->due, loop->now));
    call->fn(call->arg);
    if (call->source.is_gone) return;
    next = tcpsrv__call_next(call, timer->due, tcpsrv__clock_ns());
    if (next != timer->due) tcpsrv__timer_arm(loop, timer, next);
}

static TCPSRV__COLD int64_t tcpsrv__call_new(tcpsrv_loop *loop, uint64_t delay, uint64_t period,
                                tcpsrv_fn *fn, void *arg) {
    tcpsrv__call *call;
    int err;
    call = (tcpsrv__call *)tcpsrv__source_new(&tcpsrv__call_class, loop, -1, &err);
    if (!call) return tcpsrv__fail(err, "timer", NULL);
    call->fn = fn;
    call->arg = arg;
    call->period = period;
    call->timer.fire = tcpsrv__call_fire;
    err = tcpsrv__timer_arm(loop, &call->timer, tcpsrv__clock_ns() + delay);
    if (!err) return call->source.id;
    tcpsrv__source_end(&call->source);
    return tcpsrv__fail(err, "timer", NULL);
}

/* A delay counts from the call, not from the beginning of its turn. */
TCPSRV_IMPL int64_t tcpsrv_call_later(tcpsrv_loop *loop, int64_t delay_ms, tcpsrv_fn *fn,
                                      void *arg) {
    return tcpsrv__call_new(loop, tcpsrv__ms_to_ns(delay_ms), 0, fn, arg);
}

TCPSRV_IMPL int64_t tcpsrv_call_every(tcpsrv_loop *loop, int64_t period_ms, tcpsrv_fn *fn,
                                      void *arg) {
    uint64_t period = tcpsrv__ms_to_ns(period_ms);
    if (period_ms <= 0) return tcpsrv__fail(-EINVAL, "call_every", NULL);
    return tcpsrv__call_new(loop, period, period, fn, arg);
}

/* Outside a turn the turn's time may be old. */
static TCPSRV__NOINLINE void tcpsrv__refresh_now(tcpsrv_loop *loop) {
    if (tcpsrv__thread()->turning != loop) loop->now = tcpsrv__clock_ns();
}

typedef struct tcpsrv__watch {
    tcpsrv__source source;
    tcpsrv_watch_fn *fn;
    void *arg;
    int events;
} tcpsrv__watch;

static TCPSRV__COLD void tcpsrv__watch_event(tcpsrv__source *source, int events) {
    tcpsrv__watch *watch = TCPSRV__CONTAINER(tcpsrv__watch, source, source);
    int told = events & watch->events & (TCPSRV_READ | TCPSRV_WRITE);
    if (events & (TCPSRV__EVENT_END | TCPSRV__EVENT_ERROR)) told |= TCPSRV_HANGUP;
    if (told) watch->fn(source->fd, told, watch->arg);
}

static TCPSRV__COLD void tcpsrv__watch_cancel(tcpsrv__source *source) {
    tcpsrv__poller_remove(&source->loop->poller, source->fd);
    tcpsrv__source_end(source);
}

static const tcpsrv__class tcpsrv__watch_class = {
    tcpsrv__watch_event, NULL, tcpsrv__watch_cancel, NULL, sizeof(tcpsrv__watch), 1
};

TCPSRV_IMPL int64_t tcpsrv_watch_fd(tcpsrv_loop *loop, int fd, int events, tcpsrv_watch_fn *fn,
                                    void *arg) {
    tcpsrv__watch *watch;
    int err;
    watch = (tcpsrv__watch *)tcpsrv__source_new(&tcpsrv__watch_class, loop, fd, &err);
    if (!watch) return tcpsrv__fail(err, "watch_fd", NULL);
    watch->fn = fn;
    watch->arg = arg;
    watch->events = events;
    err = tcpsrv__poller_add_watch(&loop->poller, fd, watch->source.id, events);
    if (!err) return watch->source.id;
    tcpsrv__source_end(&watch->source);
    return tcpsrv__fail(err, "watch_fd", NULL);
}

TCPSRV_IMPL void tcpsrv_cancel(tcpsrv_loop *loop, int64_t id) {
    tcpsrv__source *source = tcpsrv__source_by_id(loop, id);
    if (source && source->type->may_cancel) source->type->drop(source);
}

/* ---- turns ----------------------------------------------------------------------------------- */

/* Key as the poller keeps it: on kqueue it may be cut to a pointer's size. No slot but the waker's
   own is meant by the waker's id. */
static tcpsrv__source *tcpsrv__source_told(const tcpsrv_loop *loop, int64_t key) {
    uint32_t number = (uint32_t)((uint64_t)key & 0xffffffffu); /* of a slot that was used once */
    tcpsrv__source *source = loop->slots[number].source;
    return (uintptr_t)source->id == (uintptr_t)key ? source : NULL;
}

/* The waker's slot is the first, so that its id is the 0 under which the pollers know it. */
static TCPSRV__COLD void tcpsrv__wake_event(tcpsrv__source *source, int events) {
    (void)events;
    tcpsrv__waker_drain(&source->loop->waker);
    tcpsrv__run_signals(source->loop);
    tcpsrv__run_posted(source->loop);
}

static const tcpsrv__class tcpsrv__wake_class = {
    tcpsrv__wake_event, NULL, NULL, NULL, 0, 0
};

static void tcpsrv__run_events(tcpsrv_loop *loop, int count) {
    tcpsrv__source *source;
    int64_t id;
    int i, events;
    for (i = 0; i < count; i++) {
        events = tcpsrv__poller_event(&loop->poller, i, &id);
        source = tcpsrv__source_told(loop, id);
        if (!source) continue;
        source->type->event(source, events);
        if (loop->flush_first) tcpsrv__flush_all(loop);
    }
}

/* Milliseconds, rounded up, so that a timer is due when the poller returns. */
static int tcpsrv__loop_wait_ms(const tcpsrv_loop *loop, int timeout_ms) {
    uint64_t left, now;
    if (loop->ready_first || loop->flush_first || loop->gone) return 0;
    if (loop->untold && (timeout_ms < 0 || timeout_ms > TCPSRV__TELL_MS))
        timeout_ms = TCPSRV__TELL_MS;
    if (!loop->heap_count || loop->heap[0].due == TCPSRV__NEVER) return timeout_ms;
    now = tcpsrv__clock_ns(); /* not the turn's: what ran in it took time */
    if (loop->heap[0].due <= now) return 0;
    left = (loop->heap[0].due - now + 999999u) / 1000000u;
    if (timeout_ms >= 0 && (uint64_t)timeout_ms < left) return timeout_ms;
    return left > INT_MAX ? INT_MAX : (int)left;
}

static TCPSRV__COLD void tcpsrv__measure_turn(tcpsrv_loop *loop) {
    uint64_t took = tcpsrv__clock_since(loop->now);
    if (took > loop->longest_turn) loop->longest_turn = took;
}

static TCPSRV__COLD int tcpsrv__loop_turn(tcpsrv_loop *loop, int timeout_ms) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    int n;
    thread->turning = loop;
    tcpsrv__flush_all(loop);
    n = tcpsrv__poller_wait(&loop->poller, tcpsrv__loop_wait_ms(loop, timeout_ms));
    loop->now = tcpsrv__clock_ns();
    loop->turn++;
    if (n > 0) tcpsrv__run_events(loop, n);
    tcpsrv__run_timers(loop);
    tcpsrv__run_ready(loop);
    tcpsrv__destroy_gone(loop);
    tcpsrv__slots_recycle(loop);
    if (loop->measured) tcpsrv__measure_turn(loop);
    if (loop->turn_end) loop->turn_end(loop);
    thread->turning = NULL;
    return n < 0 ? n : 0;
}

/* One loop at a time turns in a thread, and never in another process than its own. */
static int tcpsrv__loop_may_turn(const tcpsrv_loop *loop) {
    int own = loop->mark ? *loop->mark : loop->pid == tcpsrv__sys_pid();
    return tcpsrv__thread()->turning || loop->running || !own ? TCPSRV_EBUSY : 0;
}

TCPSRV_IMPL int tcpsrv_loop_run(tcpsrv_loop *loop) {
    int err = tcpsrv__loop_may_turn(loop);
    if (err) return tcpsrv__fail(err, "loop_run", NULL);
    loop->running = 1;
    loop->now = tcpsrv__clock_ns();
    while (!err && !loop->stopping) err = tcpsrv__loop_turn(loop, -1);
    loop->running = loop->stopping = 0;
    return err ? tcpsrv__fail(err, "loop_run", NULL) : 0;
}

TCPSRV_IMPL int tcpsrv_loop_poll(tcpsrv_loop *loop, int timeout_ms) {
    int err = tcpsrv__loop_may_turn(loop);
    if (err) return tcpsrv__fail(err, "loop_poll", NULL);
    loop->running = 1;
    loop->now = tcpsrv__clock_ns();
    err = tcpsrv__loop_turn(loop, timeout_ms);
    loop->running = 0;
    return err ? tcpsrv__fail(err, "loop_poll", NULL) : 0;
}

TCPSRV_IMPL void tcpsrv_loop_stop(tcpsrv_loop *loop) {
    loop->stopping = 1;
}

TCPSRV_IMPL int tcpsrv_loop_fd(const tcpsrv_loop *loop) {
    return tcpsrv__poller_fd(&loop->poller);
}

TCPSRV_IMPL int tcpsrv_loop_timeout(const tcpsrv_loop *loop) {
    return tcpsrv__loop_wait_ms(loop, -1);
}

TCPSRV_HOT uint64_t tcpsrv_loop_now(const tcpsrv_loop *loop) {
    return loop->now;
}

TCPSRV_IMPL tcpsrv_loop *tcpsrv_loop_new(void) {
    tcpsrv_loop *loop = (tcpsrv_loop *)tcpsrv__alloc(sizeof *loop);
    int err = -ENOMEM;
    if (!loop) goto fail;
    err = tcpsrv__waker_open(&loop->waker);
    if (err) goto fail;
    err = tcpsrv__poller_open(&loop->poller, loop->waker.read_fd);
    if (err) goto fail_waker;
    err = tcpsrv__source_init(&loop->wake, &tcpsrv__wake_class, loop, loop->waker.read_fd);
    if (err) goto fail_poller;
    loop->wake.id = 0;
    err = -pthread_mutex_init(&loop->post_lock, NULL);
    if (err) goto fail_slots;
    loop->lacking = 1;
    loop->pid = tcpsrv__sys_pid();
    loop->mark = tcpsrv__sys_map_mark();
    loop->now = tcpsrv__clock_ns();
    return loop;
fail_slots:
    tcpsrv__free(loop->slots);
fail_poller:
    tcpsrv__poller_close(&loop->poller);
fail_waker:
    tcpsrv__waker_close(&loop->waker);
fail:
    tcpsrv__free(loop);
    tcpsrv__fail(err, "loop_new", NULL);
    return NULL;
}

TCPSRV_IMPL tcpsrv_loop *tcpsrv_loop_default(void) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    if (!thread->default_loop) thread->default_loop = tcpsrv_loop_new();
    return thread->default_loop;
}

/* What calls without a loop mean: the one that turns, or the thread's own. */
TCPSRV__INLINE tcpsrv_loop *tcpsrv__loop_here(void) {
    tcpsrv_loop *turning = tcpsrv__thread()->turning;
    return turning ? turning : tcpsrv_loop_default();
}

/* ==== >>coroutine ============================================================================= */

/* Owns stacks and what runs on them. A coroutine runs until it waits: the loop resumes it and gets
   control back, so that coroutines never run inside each other. Its control block, and whatever
   its maker wants beside it (a server: the stream), lie at the top of its stack: an idle one has
   one page.

   Waiting is one mechanism: a tcpsrv__waiter lives on the waiting stack, its result comes from the
   loop, and then whoever waits goes on: a coroutine by the ready list, a call from outside by the
   turns that it makes meanwhile. */

typedef struct tcpsrv__waiter tcpsrv__waiter;
struct tcpsrv__waiter {
    tcpsrv__co *co;             /* NULL: outside a coroutine */
    void (*cancel)(tcpsrv__waiter *waiter); /* take it from where it waits: the loop ends */
    int result;                 /* or TCPSRV__WAITING */
};

#define TCPSRV__WAITING INT_MIN

static void tcpsrv__waiter_init(tcpsrv__waiter *waiter, void (*cancel)(tcpsrv__waiter *waiter)) {
    waiter->co = NULL;
    waiter->cancel = cancel;
    waiter->result = TCPSRV__WAITING;
}

TCPSRV__INLINE int tcpsrv__waits(const tcpsrv__waiter *waiter) {
    return waiter->result == TCPSRV__WAITING;
}

enum {
    TCPSRV__ENDING_CALLS = 1000, /* that a coroutine may make while its loop is being freed */
    TCPSRV__MAX_ENDED = 65536,   /* results kept for a join */
    TCPSRV__SLAB_STACKS = 64,
    TCPSRV__WARM_STACKS = 32,    /* idle ones whose pages are not given back, */
    TCPSRV__WARM = 0x80,         /* and their mark */
    TCPSRV__MIN_STACK = 16384
};

#if TCPSRV__ASAN
enum { TCPSRV__STACK_SIZE = 262144 };
#else
enum { TCPSRV__STACK_SIZE = 65536 };
#endif

#if TCPSRV__CORO

typedef struct tcpsrv__slab {
    struct tcpsrv__slab *next, *previous;
    char *memory;
    size_t stack_size;          /* without the guard below it */
    int count, idle_count;
    unsigned char idle[TCPSRV__SLAB_STACKS]; /* numbers, with TCPSRV__WARM */
    unsigned valgrind_id[TCPSRV__SLAB_STACKS];
} tcpsrv__slab;

struct tcpsrv__stack_pool {
    tcpsrv__context main;       /* the loop's own */
    tcpsrv__slab *with_idle, *full;
    size_t idle_count, warm_count, page;
    const void *main_bottom;    /* for ASan */
    size_t main_size;
    void *main_fake, *main_fiber;
};

struct tcpsrv__co {
    tcpsrv__source source;
    int (*fn)(void *arg);
    void *arg;
    void (*on_end)(tcpsrv__co *co); /* instead of keeping the result for a join */
    struct tcpsrv__join_wait *joiner;
    tcpsrv__slab *slab;
    char *stack;
    void *fake, *fiber;         /* for ASan and TSan */
    int result, refs;
    unsigned short ending_calls;
    unsigned char ended, parked, token;
    tcpsrv__waiter *waiter;     /* what it waits for; in one cache line with what follows, */
    tcpsrv__context context;    /* and with the beginning of a stream beside it */
};

/* ---- stacks ---------------------------------------------------------------------------------- */

static TCPSRV__APART void tcpsrv__slab_unlink(tcpsrv__slab **list, tcpsrv__slab *slab) {
    if (slab->previous) slab->previous->next = slab->next;
    else *list = slab->next;
    if (slab->next) slab->next->previous = slab->previous;
}

static void tcpsrv__slab_link(tcpsrv__slab **list, tcpsrv__slab *slab) {
    slab->previous = NULL;
    slab->next = *list;
    if (*list) (*list)->previous = slab;
    *list = slab;
}

static size_t tcpsrv__slab_stride(const tcpsrv__stack_pool *pool, const tcpsrv__slab *slab) {
    return slab->stack_size + pool->page;
}

static void tcpsrv__slab_free(tcpsrv__stack_pool *pool, tcpsrv__slab *slab) {
    int i;
    size_t size = tcpsrv__slab_stride(pool, slab) * (size_t)slab->count;
    for (i = 0; i < slab->count; i++) TCPSRV__VALGRIND_END(slab->valgrind_id[i]);
    TCPSRV__STACK_FRESH(slab->memory, size);
    tcpsrv__sys_unmap(slab->memory, size);
    tcpsrv__free(slab);
}

/* Guards are the lowest page of each stack. With mprotect they cost mappings, whose number Linux
   limits: the error then names the limit. */
static int tcpsrv__slab_guard(tcpsrv__stack_pool *pool, tcpsrv__slab *slab) {
    int i, err;
    for (i = 0; i < slab->count; i++) {
        char *guard = slab->memory + (size_t)i * tcpsrv__slab_stride(pool, slab);
        err = tcpsrv__sys_guard(guard, pool->page);
        if (err) return err;
        slab->idle[i] = (unsigned char)i;
        slab->valgrind_id[i] = TCPSRV__VALGRIND_ADD(guard + pool->page,
                                                    guard + pool->page + slab->stack_size);
    }
    slab->idle_count = slab->count;
    return 0;
}

static tcpsrv__slab *tcpsrv__slab_new(tcpsrv__stack_pool *pool, size_t stack_size) {
    tcpsrv__slab *slab = (tcpsrv__slab *)tcpsrv__alloc(sizeof *slab);
    size_t stride = stack_size + pool->page, count = ((size_t)8 << 20) / stride;
    if (!slab) return NULL;
    slab->stack_size = stack_size;
    slab->count = count > TCPSRV__SLAB_STACKS ? TCPSRV__SLAB_STACKS : count ? (int)count : 1;
    slab->memory = tcpsrv__sys_map_stacks(stride * (size_t)slab->count);
    if (!slab->memory) {
        tcpsrv__free(slab);
        return NULL;
    }
    if (tcpsrv__slab_guard(pool, slab) != 0) {
        tcpsrv__slab_free(pool, slab);
        return NULL;
    }
    tcpsrv__slab_link(&pool->with_idle, slab);
    pool->idle_count += (size_t)slab->count;
    return slab;
}

static int tcpsrv__stack_pool_make(tcpsrv_loop *loop) {
    if (loop->stacks) return 0;
    loop->stacks = (tcpsrv__stack_pool *)tcpsrv__alloc(sizeof *loop->stacks);
    if (!loop->stacks) return -ENOMEM;
    loop->stacks->page = tcpsrv__page_size();
    return 0;
}

static void tcpsrv__stack_pool_free(tcpsrv_loop *loop) {
    tcpsrv__stack_pool *pool = loop->stacks;
    tcpsrv__slab *slab;
    while (pool && (slab = pool->with_idle ? pool->with_idle : pool->full) != NULL) {
        tcpsrv__slab_unlink(pool->with_idle ? &pool->with_idle : &pool->full, slab);
        tcpsrv__slab_free(pool, slab);
    }
    tcpsrv__free(pool);
    loop->stacks = NULL;
}

static TCPSRV__COLD char *tcpsrv__stack_take(tcpsrv__stack_pool *pool, size_t size,
                                             tcpsrv__slab **from) {
    tcpsrv__slab *slab = pool->with_idle;
    unsigned char number;
    while (slab && slab->stack_size != size) slab = slab->next;
    if (!slab) slab = tcpsrv__slab_new(pool, size);
    if (!slab) return NULL;
    number = slab->idle[--slab->idle_count];
    pool->idle_count--;
    if (number & TCPSRV__WARM) pool->warm_count--;
    number &= (unsigned char)~TCPSRV__WARM;
    if (slab->idle_count == 0) {
        tcpsrv__slab_unlink(&pool->with_idle, slab);
        tcpsrv__slab_link(&pool->full, slab);
    }
    *from = slab;
    return slab->memory + number * tcpsrv__slab_stride(pool, slab) + pool->page;
}

/* A slab without any stack in use goes as a whole while others have enough. */
static TCPSRV__COLD void tcpsrv__slab_leave(tcpsrv__stack_pool *pool, tcpsrv__slab *slab) {
    int i;
    if (slab->idle_count < slab->count ||
        pool->idle_count < (size_t)slab->count + TCPSRV__WARM_STACKS)
        return;
    for (i = 0; i < slab->count; i++)
        if (slab->idle[i] & TCPSRV__WARM) pool->warm_count--;
    pool->idle_count -= (size_t)slab->count;
    tcpsrv__slab_unlink(&pool->with_idle, slab);
    tcpsrv__slab_free(pool, slab);
}

/* Its lowest pages go back to the system once there are enough warm ones. */
static TCPSRV__COLD void tcpsrv__stack_return(tcpsrv__stack_pool *pool, tcpsrv__slab *slab,
                                              char *stack) {
    size_t number = (size_t)(stack - slab->memory) / tcpsrv__slab_stride(pool, slab);
    if (slab->idle_count == 0) {
        tcpsrv__slab_unlink(&pool->full, slab);
        tcpsrv__slab_link(&pool->with_idle, slab);
    }
    if (pool->warm_count < TCPSRV__WARM_STACKS) {
        pool->warm_count++;
        number |= TCPSRV__WARM;
    } else {
        tcpsrv__sys_give_back(stack, slab->stack_size - pool->page);
    }
    slab->idle[slab->idle_count++] = (unsigned char)number;
    pool->idle_count++;
    tcpsrv__slab_leave(pool, slab);
}

/* ---- switching ------------------------------------------------------------------------------- */

/* From the running coroutine back to the loop, until it is resumed. */
TCPSRV__INLINE void tcpsrv__co_leave(tcpsrv_loop *loop, tcpsrv__co *co) {
    tcpsrv__stack_pool *pool = loop->stacks;
    TCPSRV__ASAN_LEAVE(co->ended ? NULL : &co->fake, pool->main_bottom, pool->main_size);
    TCPSRV__TSAN_GO(pool->main_fiber);
    tcpsrv__switch(&co->context, &pool->main);
    TCPSRV__ASAN_ENTER(co->fake, &pool->main_bottom, &pool->main_size);
}

/* Where it is seldom done. */
static TCPSRV__APART void tcpsrv__co_leave_rarely(tcpsrv__co *co) {
    tcpsrv__co_leave(co->source.loop, co);
}

static void tcpsrv__co_end(void *arg);

static TCPSRV__COLD void tcpsrv__co_main(tcpsrv__context *from, tcpsrv__context *to) {
    tcpsrv__co *co = TCPSRV__CONTAINER(tcpsrv__co, context, to);
    (void)from;
    TCPSRV__ASAN_ENTER(NULL, &co->source.loop->stacks->main_bottom,
                       &co->source.loop->stacks->main_size);
    co->result = co->fn(co->arg);
    co->ended = 1;
    co->source.loop->errand = tcpsrv__co_end;
    co->source.loop->errand_arg = co;
    for (;;) tcpsrv__co_leave_rarely(co); /* nobody resumes a coroutine that has ended */
}

static TCPSRV__COLD void tcpsrv__co_unref(tcpsrv__source *source) {
    tcpsrv__co *co = TCPSRV__CONTAINER(tcpsrv__co, source, source);
    tcpsrv__stack_pool *pool = source->loop->stacks;
    tcpsrv__slab *slab;
    char *stack;
    if (--co->refs > 0) return;
    TCPSRV__TSAN_END(co->fiber);
    slab = co->slab;
    stack = co->stack;
    TCPSRV__STACK_STALE(stack, slab->stack_size);
    tcpsrv__stack_return(pool, slab, stack);
}

static void tcpsrv__join_done(struct tcpsrv__join_wait *wait, int result);

/* Twice as large; what had wrapped round to the front goes behind the rest. */
static TCPSRV__COLD void tcpsrv__ended_grow(tcpsrv_loop *loop) {
    size_t full = loop->ended_capacity, capacity = full ? full * 2 : 64;
    int64_t *ring;
    if (capacity > TCPSRV__MAX_ENDED) return;
    ring = (int64_t *)TCPSERVER_REALLOC(loop->ended, capacity * sizeof *ring);
    if (!ring) return;
    memcpy(ring + full, ring, loop->ended_first * sizeof *ring);
    loop->ended = ring;
    loop->ended_capacity = capacity;
}

/* The result stays in the slot, whose id lives on until somebody joins or too many have ended. */
static TCPSRV__COLD void tcpsrv__co_keep_result(tcpsrv__co *co) {
    tcpsrv_loop *loop = co->source.loop;
    tcpsrv__slot *slot = tcpsrv__slot_of(loop, co->source.id);
    if (loop->ended_count == loop->ended_capacity) tcpsrv__ended_grow(loop);
    if (!loop->ended_capacity) return; /* no memory: nobody can join it */
    if (loop->ended_count == loop->ended_capacity) {
        tcpsrv__slot_release(loop, loop->ended[loop->ended_first]);
        loop->ended_first = (loop->ended_first + 1) % loop->ended_capacity;
        loop->ended_count--;
    }
    loop->ended[(loop->ended_first + loop->ended_count++) % loop->ended_capacity] = co->source.id;
    slot->source = &loop->wake;
    slot->next = (uint32_t)co->result;
    co->source.id = 0;
}

static TCPSRV__COLD void tcpsrv__co_end(void *arg) {
    tcpsrv__co *co = (tcpsrv__co *)arg;
    if (co->on_end) co->on_end(co);
    else if (co->joiner) tcpsrv__join_done(co->joiner, co->result);
    else if (!co->source.loop->ending) tcpsrv__co_keep_result(co);
    tcpsrv__source_end(&co->source);
}

TCPSRV__INLINE void tcpsrv__co_enter(tcpsrv__stack_pool *pool, tcpsrv__co *co) {
    TCPSRV__TSAN_HOLD(before);
    TCPSRV__ASAN_LEAVE(&pool->main_fake, co->stack, co->slab->stack_size);
    TCPSRV__TSAN_GO(co->fiber);
    tcpsrv__switch(&pool->main, &co->context);
    TCPSRV__ASAN_ENTER(pool->main_fake, NULL, NULL);
    TCPSRV__TSAN_LET(before);
}

/* What it came back for other than to wait: it goes on then, or has ended. */
static TCPSRV__APART void tcpsrv__co_errands(tcpsrv_loop *loop) {
    tcpsrv__stack_pool *pool = loop->stacks;
    tcpsrv__co *co = loop->current;
    while (loop->errand) {
        tcpsrv_fn *errand = loop->errand;
        loop->errand = NULL;
        if (co->ended) loop->current = NULL;
        errand(loop->errand_arg);
        if (!loop->current) return;
        tcpsrv__co_enter(pool, co);
    }
}

/* Runs it until it waits or ends; what it wants done on the loop's stack is done between. */
TCPSRV__INLINE void tcpsrv__co_resume_here(const tcpsrv__source *source, tcpsrv__co *co) {
    tcpsrv_loop *loop = source->loop;
    loop->current = co;
    TCPSRV__TSAN_FROM(loop->stacks->main_fiber);
    tcpsrv__co_enter(loop->stacks, co);
    loop = source->loop; /* not kept over the switch */
    if (!TCPSRV__LIKELY(!loop->errand)) tcpsrv__co_errands(loop);
    loop->current = NULL;
}

static TCPSRV__NOINLINE void tcpsrv__co_resume(tcpsrv__source *source) {
    tcpsrv__co_resume_here(source, TCPSRV__CONTAINER(tcpsrv__co, source, source));
}

/* The loop is being freed: it unwinds, each further wait refused; one that does not want to end is
   left where it is. */
static TCPSRV__COLD void tcpsrv__co_drop(tcpsrv__source *source) {
    tcpsrv__co *co = TCPSRV__CONTAINER(tcpsrv__co, source, source);
    if (!co->fn) { /* its stream never came so far */
        tcpsrv__source_end(source);
        return;
    }
    if (co->waiter && tcpsrv__waits(co->waiter)) co->waiter->cancel(co->waiter);
    tcpsrv__co_resume(source);
    if (co->ended) return;
    tcpsrv__log(NULL, TCPSRV_LOG_ERROR, "a coroutine waits in a freed loop: left");
    co->result = TCPSRV_ECANCELED;
    tcpsrv__co_end(co);
}

static const tcpsrv__class tcpsrv__co_class = {
    NULL, tcpsrv__co_resume, tcpsrv__co_drop, tcpsrv__co_unref, 0, 0
};

static const tcpsrv__class *const tcpsrv__coroutine_class = &tcpsrv__co_class;

static size_t tcpsrv__stack_round(size_t size) {
    size_t page = tcpsrv__page_size();
    if (size == 0) size = TCPSRV__STACK_SIZE;
    if (size < TCPSRV__MIN_STACK) size = TCPSRV__MIN_STACK;
    return (size + page - 1) / page * page;
}

/* With beside bytes at the very top of its stack, which hold a reference of their own; not
   started. */
static TCPSRV__COLD tcpsrv__co *tcpsrv__co_new(tcpsrv_loop *loop, size_t stack_size, size_t beside,
                                  void **memory) {
    size_t size = stack_size < SIZE_MAX / 8 ? tcpsrv__stack_round(stack_size) : 0;
    size_t room = (sizeof(tcpsrv__co) + beside + 63) / 64 * 64;
    tcpsrv__slab *slab;
    tcpsrv__co *co;
    char *stack;
    if (!size || tcpsrv__stack_pool_make(loop) != 0) return NULL;
    stack = tcpsrv__stack_take(loop->stacks, size, &slab);
    if (!stack) return NULL;
    TCPSRV__STACK_FRESH(stack, size);
    co = (tcpsrv__co *)(void *)(stack + size - room);
    if (memory) *memory = co + 1;
    memset(co, 0, sizeof *co);
    co->slab = slab;
    co->stack = stack;
    if (tcpsrv__source_init(&co->source, &tcpsrv__co_class, loop, -1) != 0) {
        tcpsrv__stack_return(loop->stacks, slab, stack);
        return NULL;
    }
    co->refs = memory ? 2 : 1;
    co->fiber = TCPSRV__TSAN_NEW();
    tcpsrv__context_make(&co->context, (char *)co, tcpsrv__co_main);
    return co;
}

/* fn(arg) on the loop's own stack: for all that needs more stack than a coroutine may have. */
static void tcpsrv__on_loop_stack(tcpsrv_loop *loop, tcpsrv_fn *fn, void *arg) {
    if (!loop->current) {
        fn(arg);
        return;
    }
    loop->errand = fn;
    loop->errand_arg = arg;
    tcpsrv__co_leave_rarely(loop->current);
}

/* ---- waiting --------------------------------------------------------------------------------- */

static TCPSRV__NOINLINE void tcpsrv__waiter_done(tcpsrv__waiter *waiter, int result) {
    waiter->result = result;
    if (waiter->co) tcpsrv__make_ready(&waiter->co->source);
}

/* As done, but the coroutine runs now: only from the loop, as the last thing that is done there. */
static void tcpsrv__waiter_resume(tcpsrv__waiter *waiter, int result) {
    waiter->result = result;
    if (waiter->co) tcpsrv__co_resume(&waiter->co->source);
}

/* Whether a call may wait here: 0 or the code to return. */
static int tcpsrv__may_wait(tcpsrv_loop *loop) {
    tcpsrv__co *co = loop->current;
    if (co && loop->ending) {
        if (++co->ending_calls > TCPSRV__ENDING_CALLS) tcpsrv__co_leave_rarely(co);
        return TCPSRV_ECANCELED;
    }
    if (co) return 0;
    return tcpsrv__loop_may_turn(loop) ? TCPSRV_ENOTCORO : 0;
}

TCPSRV__INLINE void tcpsrv__wait_begin(tcpsrv__waiter *waiter) {
    waiter->co->waiter = waiter;
}

static void tcpsrv__wait_on(const tcpsrv__waiter *waiter) {
    while (tcpsrv__waits(waiter)) tcpsrv__co_leave_rarely(waiter->co);
}

/* Waits until the waiter is done. Outside a coroutine a stop or a failing poller cancels it. */
static int tcpsrv__wait(tcpsrv_loop *loop, tcpsrv__waiter *waiter) {
    tcpsrv__co *co = loop->current;
    int err = 0;
    waiter->co = co;
    if (co) {
        tcpsrv__wait_begin(waiter);
        tcpsrv__wait_on(waiter);
        co->waiter = NULL;
        return waiter->result;
    }
    loop->running = 1;
    while (tcpsrv__waits(waiter) && !loop->stopping && !err) err = tcpsrv__loop_turn(loop, -1);
    loop->running = loop->stopping = 0;
    if (tcpsrv__waits(waiter)) waiter->cancel(waiter);
    return waiter->result;
}

TCPSRV_IMPL int64_t tcpsrv_spawn(tcpsrv_loop *loop, int (*fn)(void *arg), void *arg,
                                 size_t stack_size) {
    tcpsrv__co *co;
    if (loop->ending) return tcpsrv__fail(TCPSRV_ECANCELED, "spawn", NULL);
    co = tcpsrv__co_new(loop, stack_size, 0, NULL);
    if (!co) return tcpsrv__fail(-ENOMEM, "spawn", "stack (vm.max_map_count)");
    co->fn = fn;
    co->arg = arg;
    tcpsrv__make_ready(&co->source);
    return co->source.id;
}

static TCPSRV__COLD void tcpsrv__cancel_plain(tcpsrv__waiter *waiter) {
    waiter->result = TCPSRV_ECANCELED;
}

typedef struct tcpsrv__join_wait {
    tcpsrv__waiter waiter;
    tcpsrv__co *awaited;
    int result;                 /* any number: not the waiter's, which has one for waiting */
} tcpsrv__join_wait;

static TCPSRV__COLD void tcpsrv__join_done(tcpsrv__join_wait *wait, int result) {
    wait->result = result;
    tcpsrv__waiter_done(&wait->waiter, 0);
}

static TCPSRV__COLD void tcpsrv__join_cancel(tcpsrv__waiter *waiter) {
    TCPSRV__CONTAINER(tcpsrv__join_wait, waiter, waiter)->awaited->joiner = NULL;
    tcpsrv__cancel_plain(waiter);
}

/* A coroutine that has ended without a joiner left its result in its slot. */
static int tcpsrv__join_ended(tcpsrv_loop *loop, int64_t id, tcpsrv__slot *slot) {
    int result = (int)slot->next;
    tcpsrv__slot_release(loop, id);
    return result;
}

static int tcpsrv__join_running(tcpsrv_loop *loop, tcpsrv__co *co) {
    tcpsrv__join_wait wait;
    int err = tcpsrv__may_wait(loop);
    if (!err && co == loop->current) err = -EDEADLK;
    if (!err && (co->joiner || co->on_end)) err = TCPSRV_EBUSY;
    if (err) return tcpsrv__fail(err, "join", NULL);
    memset(&wait, 0, sizeof wait);
    tcpsrv__waiter_init(&wait.waiter, tcpsrv__join_cancel);
    wait.awaited = co;
    co->joiner = &wait;
    err = tcpsrv__wait(loop, &wait.waiter);
    return err ? err : wait.result;
}

TCPSRV_IMPL int tcpsrv_join(int64_t id) {
    tcpsrv_loop *loop = tcpsrv__loop_here();
    tcpsrv__slot *slot = loop ? tcpsrv__slot_of(loop, id) : NULL;
    if (!slot) return tcpsrv__fail(-ESRCH, "join", NULL);
    if (slot->source == &loop->wake) return tcpsrv__join_ended(loop, id, slot);
    if (slot->source->type != &tcpsrv__co_class) return tcpsrv__fail(-ESRCH, "join", NULL);
    return tcpsrv__join_running(loop, TCPSRV__CONTAINER(tcpsrv__co, source, slot->source));
}

TCPSRV_HOT int64_t tcpsrv_self(void) {
    tcpsrv_loop *loop = tcpsrv__thread()->turning;
    return loop && loop->current ? loop->current->source.id : 0;
}

TCPSRV_HOT void tcpsrv_wake(tcpsrv_loop *loop, int64_t id) {
    tcpsrv__source *source = tcpsrv__source_by_id(loop, id);
    tcpsrv__co *co;
    if (!source || source->type != &tcpsrv__co_class) return;
    co = TCPSRV__CONTAINER(tcpsrv__co, source, source);
    if (co->parked && tcpsrv__waits(co->waiter)) tcpsrv__waiter_done(co->waiter, 0);
    else co->token = 1;
}

static void tcpsrv__co_yield(tcpsrv__co *co) {
    tcpsrv__make_ready(&co->source);
    tcpsrv__co_leave_rarely(co);
}

/* Whether a wake came before the park. */
static int tcpsrv__co_take_token(tcpsrv__co *co) {
    int token = co->token;
    co->token = 0;
    return token;
}

static void tcpsrv__co_set_parked(tcpsrv__co *co, int parked) {
    co->parked = parked ? 1 : 0;
}

#else /* no coroutines: the waiting calls still run the loop from outside */

struct tcpsrv__co {
    int unused;
};

static const tcpsrv__class tcpsrv__no_class = { NULL, NULL, NULL, NULL, 0, 0 };
static const tcpsrv__class *const tcpsrv__coroutine_class = &tcpsrv__no_class;

static void tcpsrv__stack_pool_free(tcpsrv_loop *loop) {
    (void)loop;
}

static void tcpsrv__on_loop_stack(tcpsrv_loop *loop, tcpsrv_fn *fn, void *arg) {
    (void)loop;
    fn(arg);
}

static TCPSRV__NOINLINE void tcpsrv__waiter_done(tcpsrv__waiter *waiter, int result) {
    waiter->result = result;
}

static void tcpsrv__waiter_resume(tcpsrv__waiter *waiter, int result) {
    tcpsrv__waiter_done(waiter, result);
}

static void tcpsrv__co_leave(tcpsrv_loop *loop, tcpsrv__co *co) {
    (void)loop, (void)co;
}

static void tcpsrv__wait_begin(tcpsrv__waiter *waiter) {
    (void)waiter;
}

static void tcpsrv__wait_on(const tcpsrv__waiter *waiter) {
    (void)waiter;
}

static void tcpsrv__co_resume_here(const tcpsrv__source *source, tcpsrv__co *co) {
    (void)source, (void)co;
}

static TCPSRV__COLD void tcpsrv__cancel_plain(tcpsrv__waiter *waiter) {
    tcpsrv__waiter_done(waiter, TCPSRV_ECANCELED);
}

static int tcpsrv__may_wait(tcpsrv_loop *loop) {
    return tcpsrv__loop_may_turn(loop) ? TCPSRV_ENOTCORO : 0;
}

static int tcpsrv__wait(tcpsrv_loop *loop, tcpsrv__waiter *waiter) {
    int err = 0;
    loop->running = 1;
    while (tcpsrv__waits(waiter) && !loop->stopping && !err) err = tcpsrv__loop_turn(loop, -1);
    loop->running = loop->stopping = 0;
    if (tcpsrv__waits(waiter)) waiter->cancel(waiter);
    return waiter->result;
}

TCPSRV_IMPL int64_t tcpsrv_spawn(tcpsrv_loop *loop, int (*fn)(void *arg), void *arg,
                                 size_t stack_size) {
    (void)loop, (void)fn, (void)arg, (void)stack_size;
    return tcpsrv__fail(-ENOTSUP, "spawn", NULL);
}

TCPSRV_IMPL int tcpsrv_join(int64_t id) {
    (void)id;
    return tcpsrv__fail(-ESRCH, "join", NULL);
}

TCPSRV_HOT int64_t tcpsrv_self(void) {
    return 0;
}

TCPSRV_HOT void tcpsrv_wake(tcpsrv_loop *loop, int64_t id) {
    (void)loop, (void)id;
}

static void tcpsrv__co_yield(tcpsrv__co *co) {
    (void)co;
}

static int tcpsrv__co_take_token(tcpsrv__co *co) {
    (void)co;
    return 0;
}

static void tcpsrv__co_set_parked(tcpsrv__co *co, int parked) {
    (void)co, (void)parked;
}

#endif

/* ---- waiting for time, descriptors and wakes ------------------------------------------------- */

typedef struct tcpsrv__timed_wait {
    tcpsrv__waiter waiter;
    tcpsrv__timer timer;
    int timeout_result;
} tcpsrv__timed_wait;

static TCPSRV__COLD void tcpsrv__timed_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv__timed_wait *wait = TCPSRV__CONTAINER(tcpsrv__timed_wait, timer, timer);
    (void)loop;
    if (tcpsrv__waits(&wait->waiter)) tcpsrv__waiter_done(&wait->waiter, wait->timeout_result);
}

/* Of a call that means the loop here, which is in *loop then. */
static TCPSRV__COLD int tcpsrv__may_wait_here(tcpsrv_loop **loop) {
    *loop = tcpsrv__loop_here();
    return *loop ? tcpsrv__may_wait(*loop) : -ENOMEM;
}

/* Waits until the waiter is done or the time has passed, which gives timeout_result; -1: no
   limit. */
static TCPSRV__COLD int tcpsrv__wait_timed(tcpsrv_loop *loop, tcpsrv__timed_wait *wait,
                                           int64_t timeout_ms, int timeout_result) {
    uint64_t due = timeout_ms < 0 ? 0 : tcpsrv__clock_ns() + tcpsrv__ms_to_ns(timeout_ms);
    int result;
    memset(wait, 0, sizeof *wait);
    tcpsrv__waiter_init(&wait->waiter, tcpsrv__cancel_plain);
    wait->timeout_result = timeout_result;
    wait->timer.fire = tcpsrv__timed_fire;
    if (due && tcpsrv__timer_arm(loop, &wait->timer, due) != 0) return -ENOMEM;
    result = tcpsrv__wait(loop, &wait->waiter);
    tcpsrv__timer_cancel(loop, &wait->timer);
    return result;
}

TCPSRV_IMPL int tcpsrv_sleep(int64_t delay_ms) {
    tcpsrv_loop *loop;
    tcpsrv__timed_wait wait;
    int err = tcpsrv__may_wait_here(&loop);
    if (!err) err = tcpsrv__wait_timed(loop, &wait, delay_ms < 0 ? 0 : delay_ms, 0);
    return err ? tcpsrv__fail(err, "sleep", NULL) : 0;
}

TCPSRV_IMPL int tcpsrv_yield(void) {
    tcpsrv_loop *loop;
    int err = tcpsrv__may_wait_here(&loop);
    if (!err && !loop->current) return tcpsrv_loop_poll(loop, 0);
    if (!err) {
        tcpsrv__co_yield(loop->current);
        if (loop->ending) err = TCPSRV_ECANCELED;
    }
    return err ? tcpsrv__fail(err, "yield", NULL) : 0;
}

TCPSRV_IMPL int tcpsrv_park(int64_t timeout_ms) {
    tcpsrv_loop *loop = tcpsrv__thread()->turning;
    tcpsrv__co *co = loop ? loop->current : NULL;
    tcpsrv__timed_wait wait;
    int err = co ? tcpsrv__may_wait(loop) : TCPSRV_ENOTCORO;
    if (!err && !tcpsrv__co_take_token(co)) {
        tcpsrv__co_set_parked(co, 1);
        err = tcpsrv__wait_timed(loop, &wait, timeout_ms, TCPSRV_ETIMEDOUT);
        tcpsrv__co_set_parked(co, 0);
    }
    return err ? tcpsrv__fail(err, "park", NULL) : 0;
}

static TCPSRV__COLD void tcpsrv__wait_fd_told(int fd, int events, void *arg) {
    tcpsrv__waiter *waiter = (tcpsrv__waiter *)arg;
    (void)fd;
    if (tcpsrv__waits(waiter)) tcpsrv__waiter_done(waiter, events);
}

TCPSRV_IMPL int tcpsrv_wait_fd(int fd, int events, int64_t timeout_ms) {
    tcpsrv_loop *loop;
    tcpsrv__timed_wait wait;
    int64_t watch;
    int result = tcpsrv__may_wait_here(&loop);
    if (result) return tcpsrv__fail(result, "wait_fd", NULL);
    watch = tcpsrv_watch_fd(loop, fd, events, tcpsrv__wait_fd_told, &wait.waiter);
    if (watch < 0) return (int)watch;
    result = tcpsrv__wait_timed(loop, &wait, timeout_ms, TCPSRV_ETIMEDOUT);
    tcpsrv_cancel(loop, watch);
    return result < 0 ? tcpsrv__fail(result, "wait_fd", NULL) : result;
}

/* ==== >>buffer ================================================================================ */

/* Owns blocks of bytes, and queues of them; knows no descriptor. Blocks come in classes, each at
   most four times the one below, so that a block fitted to its bytes is never more than four times
   as large plus the smallest class. The loop keeps a few of each class warm. */

struct tcpsrv__block {
    tcpsrv__block *next;
    char *data;                 /* behind this header; elsewhere where it is borrowed */
    size_t capacity, begin, end; /* without room behind end where it is not the library's own */
    void (*done)(tcpsrv__block *block, int result); /* instead of giving it back, once it is out */
    int64_t offset;             /* of data in the file */
    int file;                   /* -1: memory */
    int pool;                   /* class, or one of those below */
    int awaited;                /* by a writer whose memory it is */
};

enum {
    TCPSRV__POOL_NONE = -1,     /* freed when it is given back */
    TCPSRV__POOL_HOME = -2,     /* part of a larger object: stays where it is */
    TCPSRV__POOL_INBOX = -3,    /* the loop's: a stream has it only while it is served straight */
    TCPSRV__POOL_OUTPUT = 1,    /* for what one run writes */
    TCPSRV__POOL_INPUT = 4,     /* for one receive, and what is written while corked, */
    TCPSRV__POOL_BULK = 5       /* and for one that filled it before */
};
static const size_t tcpsrv__class_size[TCPSRV__CLASSES] = {
    512, 2048, 8192, 32768, 65536, 262144
};
enum { TCPSRV__BLOCK_HEAD = sizeof(struct tcpsrv__block) + 1 }; /* and room for a final NUL */
static const unsigned tcpsrv__class_keep[TCPSRV__CLASSES] = { 65, 17, 9, 5, 2, 1 };

enum {
    TCPSRV__SEND_SIZE = 1048576, /* the most that one call sends: a large write yields. With a
                                    quarter of it a download costs a third more CPU */
    TCPSRV__SEND_PIECES = 32,
    TCPSRV__GATHER_SIZE = 65536 /* queued output above which a write sends by itself */
};

static int tcpsrv__class_for(size_t size) {
    int i = 0;
    while (i < TCPSRV__CLASSES && tcpsrv__class_size[i] - TCPSRV__BLOCK_HEAD < size) i++;
    return i < TCPSRV__CLASSES ? i : TCPSRV__POOL_NONE;
}

static void tcpsrv__block_init(tcpsrv__block *block, size_t total, int pool) {
    block->capacity = total - TCPSRV__BLOCK_HEAD;
    block->pool = pool;
    block->file = -1;
    block->done = NULL;
    block->awaited = 0;
    block->data = (char *)(block + 1);
}

static TCPSRV__COLD tcpsrv__block *tcpsrv__block_new(size_t size, int pool) {
    size_t total = tcpsrv__class_size[pool >= 0 ? pool : TCPSRV__CLASSES - 1];
    tcpsrv__block *block;
    if (size > SIZE_MAX / 4) return NULL;
    while (total - TCPSRV__BLOCK_HEAD < size) total *= 2;
    block = (tcpsrv__block *)TCPSERVER_REALLOC(NULL, total);
    if (block) tcpsrv__block_init(block, total, pool);
    return block;
}

static TCPSRV__NOINLINE tcpsrv__block *tcpsrv__block_take_class(tcpsrv_loop *loop, int pool) {
    tcpsrv__block *block = loop->pool[pool];
    if (block) {
        loop->pool[pool] = block->next;
        loop->pool_count[pool]--;
    } else {
        block = tcpsrv__block_new(0, pool);
    }
    if (block) block->begin = block->end = 0;
    return block;
}

/* A block for at least size bytes, empty; NULL: no memory. */
static TCPSRV__NOINLINE tcpsrv__block *tcpsrv__block_take(tcpsrv_loop *loop, size_t size) {
    int pool = tcpsrv__class_for(size);
    tcpsrv__block *block;
    if (pool >= 0) return tcpsrv__block_take_class(loop, pool);
    block = tcpsrv__block_new(size, pool);
    if (block) block->begin = block->end = 0;
    return block;
}

static TCPSRV__NOINLINE void tcpsrv__block_give(tcpsrv_loop *loop, tcpsrv__block *block) {
    int pool = block->pool;
    if (pool == TCPSRV__POOL_HOME || pool == TCPSRV__POOL_INBOX) return;
    if (pool < 0 || loop->pool_count[pool] >= tcpsrv__class_keep[pool]) {
        tcpsrv__free(block);
        return;
    }
    block->next = loop->pool[pool];
    loop->pool[pool] = block;
    loop->pool_count[pool]++;
}

static void tcpsrv__blocks_free(tcpsrv_loop *loop) {
    int i;
    tcpsrv__free(loop->inbox);
    tcpsrv__free(loop->outbox);
    tcpsrv__free(loop->spent);
    for (i = 0; i < TCPSRV__CLASSES; i++) {
        while (loop->pool[i]) {
            tcpsrv__block *block = loop->pool[i];
            loop->pool[i] = block->next;
            tcpsrv__free(block);
        }
    }
}

TCPSRV__INLINE size_t tcpsrv__block_size(const tcpsrv__block *block) {
    return block->end - block->begin;
}

/* Whether a block holds more than four times what must be kept of it, and the smallest class. */
static int tcpsrv__block_is_loose(const tcpsrv__block *block, size_t kept) {
    return block->capacity + TCPSRV__BLOCK_HEAD > 4 * kept + tcpsrv__class_size[0];
}

/* The bytes from *from on in a block of their own size; the old one stays where there is none. */
static TCPSRV__NOINLINE TCPSRV__COPIES tcpsrv__block *
tcpsrv__block_fit(tcpsrv_loop *loop, tcpsrv__block *block, size_t from, size_t size) {
    size_t kept = block->end - from;
    tcpsrv__block *fit = tcpsrv__block_take(loop, size > kept ? size : kept);
    if (!fit) return NULL;
    memcpy(fit->data, block->data + from, kept);
    fit->begin = block->begin - from;
    fit->end = kept;
    tcpsrv__block_give(loop, block);
    return fit;
}

/* ---- the output queue ------------------------------------------------------------------------ */

/* A queue of blocks: owned ones, borrowed ones that lie with the waiting writer, pieces of files,
   and empty ones that mark a place. A ring, known by its last. size counts the bytes not yet
   sent. */
typedef struct tcpsrv__queue {
    tcpsrv__block *last;
    size_t size;
} tcpsrv__queue;

TCPSRV__INLINE tcpsrv__block *tcpsrv__queue_first(const tcpsrv__queue *queue) {
    return queue->last ? queue->last->next : NULL;
}

/* The one behind it; NULL at the end. */
static tcpsrv__block *tcpsrv__queue_next(const tcpsrv__queue *queue, const tcpsrv__block *block) {
    return block == queue->last ? NULL : block->next;
}

static TCPSRV__NOINLINE void tcpsrv__queue_push(tcpsrv__queue *queue, tcpsrv__block *block) {
    tcpsrv__block *last = queue->last;
    block->next = last ? last->next : block;
    if (last) last->next = block;
    queue->last = block;
    queue->size += tcpsrv__block_size(block);
}

static void tcpsrv__queue_take_first(tcpsrv__queue *queue) {
    tcpsrv__block *first = queue->last->next;
    if (first == queue->last) queue->last = NULL;
    else queue->last->next = first->next;
}

/* What does not fit behind the last block; all or nothing: one allocation at most. */
static TCPSRV__NOINLINE int tcpsrv__queue_append_more(tcpsrv_loop *loop, tcpsrv__queue *queue,
                                                      const void *data, size_t size) {
    tcpsrv__block *last = queue->last, *more;
    size_t room = last ? last->capacity - last->end : 0;
    size_t want = last ? 2 * last->capacity : tcpsrv__class_size[0];
    if (want > TCPSRV__GATHER_SIZE / 4) want = TCPSRV__GATHER_SIZE / 4;
    if (want < size - room) want = size - room;
    more = tcpsrv__block_take(loop, want);
    if (!more) return -ENOMEM;
    if (room) memcpy(last->data + last->end, data, room);
    if (room) last->end += room;
    memcpy(more->data, (const char *)data + room, size - room);
    more->end = size - room;
    tcpsrv__queue_push(queue, more);
    queue->size += room;
    return 0;
}

/* A copy of the bytes; all or nothing. */
static TCPSRV__NOINLINE int tcpsrv__queue_append(tcpsrv_loop *loop, tcpsrv__queue *queue,
                                                 const void *data, size_t size) {
    tcpsrv__block *last = queue->last;
    size_t room;
    if (!last) {
        if (size > tcpsrv__class_size[TCPSRV__POOL_OUTPUT] - TCPSRV__BLOCK_HEAD)
            return tcpsrv__queue_append_more(loop, queue, data, size);
        last = tcpsrv__block_take_class(loop, TCPSRV__POOL_OUTPUT);
        if (!last) return -ENOMEM;
        queue->last = last->next = last;
    }
    room = last->capacity - last->end;
    if (!TCPSRV__LIKELY(size <= room)) return tcpsrv__queue_append_more(loop, queue, data, size);
    queue->size += size;
    last->end += size;
    memcpy(last->data + last->end - size, data, size);
    return 0;
}

static void tcpsrv__queue_pop(tcpsrv_loop *loop, tcpsrv__queue *queue, int result) {
    tcpsrv__block *block = queue->last->next;
    tcpsrv__queue_take_first(queue);
    queue->size -= tcpsrv__block_size(block);
    if (block->done) block->done(block, result);
    else tcpsrv__block_give(loop, block);
}

/* So many bytes are out: takes them off, and the marks behind them. */
static void tcpsrv__queue_consume(tcpsrv_loop *loop, tcpsrv__queue *queue, size_t size) {
    while (queue->last) {
        tcpsrv__block *block = queue->last->next;
        size_t left = tcpsrv__block_size(block), n = left < size ? left : size;
        block->begin += n;
        queue->size -= n;
        size -= n;
        if (n < left) return;
        tcpsrv__queue_pop(loop, queue, 0);
    }
}

static TCPSRV__COLD void tcpsrv__queue_drop(tcpsrv_loop *loop, tcpsrv__queue *queue, int result) {
    while (queue->last) tcpsrv__queue_pop(loop, queue, result);
}

/* The pieces in memory up to the first of a file. */
static int tcpsrv__queue_gather(const tcpsrv__queue *queue, struct iovec *pieces, size_t *total) {
    const tcpsrv__block *block = tcpsrv__queue_first(queue);
    int n = 0;
    *total = 0;
    for (; block && block->file < 0 && n < TCPSRV__SEND_PIECES && *total < TCPSRV__SEND_SIZE;
         block = tcpsrv__queue_next(queue, block)) {
        size_t size = tcpsrv__block_size(block);
        if (!size) continue;
        if (size > TCPSRV__SEND_SIZE - *total) size = TCPSRV__SEND_SIZE - *total;
        pieces[n].iov_base = block->data + block->begin;
        pieces[n++].iov_len = size;
        *total += size;
    }
    return n;
}

/* Whether a writer still waits with bytes of its own. */
static int tcpsrv__queue_has_borrowed(const tcpsrv__queue *queue) {
    const tcpsrv__block *block = tcpsrv__queue_first(queue);
    while (block && !(block->awaited && tcpsrv__block_size(block)))
        block = tcpsrv__queue_next(queue, block);
    return block != NULL;
}

/* Queued bytes that are held in memory: those of files are not. */
static size_t tcpsrv__queue_memory(const tcpsrv__queue *queue) {
    const tcpsrv__block *block = tcpsrv__queue_first(queue);
    size_t size = queue->size;
    for (; block; block = tcpsrv__queue_next(queue, block))
        if (block->file >= 0) size -= tcpsrv__block_size(block);
    return size;
}

/* The memory of the queue's own blocks. */
static TCPSRV__COLD size_t tcpsrv__queue_held(const tcpsrv__queue *queue) {
    const tcpsrv__block *block = tcpsrv__queue_first(queue);
    size_t size = 0;
    for (; block; block = tcpsrv__queue_next(queue, block))
        if (!block->done) size += block->capacity + TCPSRV__BLOCK_HEAD;
    return size;
}

/* What the peer does not take for now is kept in memory of its size. */
static TCPSRV__COLD void tcpsrv__queue_trim(tcpsrv_loop *loop, tcpsrv__queue *queue) {
    tcpsrv__block *block = tcpsrv__queue_first(queue), *next, *fit;
    if (!block || block->done || !tcpsrv__block_is_loose(block, tcpsrv__block_size(block))) return;
    next = block->next;
    fit = tcpsrv__block_fit(loop, block, block->begin, 0);
    if (!fit) return;
    fit->next = next == block ? fit : next;
    if (queue->last == block) queue->last = fit;
    else queue->last->next = fit;
}

/* ==== >>stream ================================================================================ */

/* Owns a descriptor, the bytes that came from it, and those that are to leave by it. One read waits
   at a time: it is tried against the buffer, then one receive a turn, then the poller's next word.
   A view of the buffer lives only while no read waits, so that receiving never moves bytes that
   somebody looks at. Requests end from the loop only: usual messages straight from their event, all
   else in step, which does for a stream whatever its flags say is due, in the order that the
   contract of tcpsrv_close names. */

/* How an event of bytes is served, where nothing but a read of its stream waits. */
enum {
    TCPSRV__LANE_LONG,          /* by all that step looks at */
    TCPSRV__LANE_LINE,          /* callbacks, for lines */
    TCPSRV__LANE_OWN,           /* the stream's own coroutine, for a line */
    TCPSRV__LANE_OTHER          /* whoever waits, for bytes */
};
enum {
    TCPSRV__BURST = 200,            /* messages served from the buffer before others have a turn */
    TCPSRV__SMALL = 8192,           /* a block in which a handler may look at the last of a burst */
    TCPSRV__LINGER_SIZE = 65536,
    TCPSRV__LINGER_MS = 2000
};

/* How bytes come and go where that is not by a plain socket's own calls. */
typedef struct tcpsrv__transport {
    long (*receive)(tcpsrv_stream *stream, const struct iovec *pieces, int count);
    long (*transmit)(tcpsrv_stream *stream, const struct iovec *pieces, int count);
    void (*shut)(tcpsrv_stream *stream);    /* end the sending side */
    void (*prepare)(tcpsrv_stream *stream); /* at events while the stream is connecting; or NULL */
    void (*release)(tcpsrv_stream *stream); /* the stream is gone; or NULL */
    int is_socket, half_closes;
} tcpsrv__transport;

/* What streams of one server have in common; a stream without a server has one of its own. */
typedef struct tcpsrv__owner {
    size_t gather_max;              /* queued output up to which a write only gathers */
    size_t receive_max;             /* of one receive into a block of the usual size, */
    size_t receive_last;            /* less one */
    uint64_t idle_ns, close_ns;
    int draining;                   /* 2: also what has not had a message yet */
    int full;                       /* at memory_limit: nothing is received, */
    int64_t favoured;               /* but by the stream with this id */
    /* What a stream holds has changed; NULL: there is no limit. */
    void (*weigh)(struct tcpsrv__owner *owner, tcpsrv_stream *stream, int freed);
    void (*gone)(struct tcpsrv__owner *owner, tcpsrv_stream *stream); /* NULL: free its memory */
    void (*not_ready)(struct tcpsrv__owner *owner, tcpsrv_stream *stream, int code); /* died so */
    tcpsrv_options options;         /* with the defaults filled in */
    tcpsrv_stats stats;
} tcpsrv__owner;

typedef struct tcpsrv__peer_name { /* tcpsrv_address in 24 bytes */
    unsigned char ip[16];
    uint32_t scope_id;
    uint16_t port;
    uint16_t family;
} tcpsrv__peer_name;

/* A connection in the making, >>sockets: the stream has no descriptor yet. It stays with a stream
   that died in it, for what it says. */
typedef struct tcpsrv__making {
    void (*give_up)(tcpsrv_stream *stream);
    const char *step, *place;       /* what goes on or has failed, and where */
    int secure;                     /* it will be TLS */
} tcpsrv__making;

/* Made at first use: timeouts and what few streams have. */
typedef struct tcpsrv__extra {
    tcpsrv_stream *stream;
    tcpsrv__making *making;
    const tcpsrv__transport *io;    /* NULL: a plain socket */
    void *link;                     /* the transport's own */
    tcpsrv__timer alarm;            /* due no later than the first of the deadlines; 0: none */
    uint64_t active;                /* when the last byte came or went, for the idle timeout */
    uint64_t read_ns, write_ns, read_due, write_due, connect_due, close_due, linger_due;
    uint64_t handshake_due;
    tcpsrv_close_fn *close_fn;
    void *close_arg;
    tcpsrv__block *marks_first, *marks_last; /* flush calls whose bytes are out, or never will be */
    int linger_left;
} tcpsrv__extra;

/* An idle connection is little more than this, so that its size is kept small. */
struct tcpsrv_stream { /* what is used most comes first: there instructions are short */
    tcpsrv__source source;
    tcpsrv__owner *owner;
    tcpsrv__extra *extra;
    tcpsrv__block *in;              /* NULL: nothing buffered, nothing viewed */
    tcpsrv__queue out;
    unsigned dead : 1;              /* the descriptor is closed */
    unsigned closing : 1, cancelled : 1, connecting : 1, unpolled : 1;
    unsigned ended : 1;             /* the peer has finished, the poller says */
    unsigned deep : 1;              /* a short read does not prove it dry */
    unsigned foreign : 1;           /* not a plain socket: extra->io */
    unsigned shut_wanted : 1;
    unsigned blocked : 1;           /* sending, until the poller says that it goes on */
    unsigned bulk : 1;              /* the next receive is into the largest of blocks, */
    unsigned wide : 1;              /* or at least not at home */
    unsigned winding : 1;           /* not served straight: drained, full, or with small limits */
    unsigned timed : 1;             /* with a timeout of single reads or writes */
    unsigned readable : 1;          /* until a call has shown it to be dry */
    unsigned eof : 1;               /* the peer has finished, and all of it was received */
    unsigned in_stack : 1;          /* lies at the top of a coroutine's stack, with a home block */
    unsigned stepping : 1;          /* its callbacks run: new reads are looked at after them */
    unsigned spoke : 1;             /* a read was answered */
    unsigned viewed : 1;            /* a coroutine looks at what lies before in->begin */
    unsigned held : 1;              /* a coroutine or a waiting call uses it */
    unsigned was_blocking : 1, aborting : 1, shut : 1;
    unsigned told : 1;              /* a callback carried the error */
    unsigned close_told : 1;
    unsigned starting : 1;          /* its handler has not begun */
    unsigned counted : 1;           /* for max_connections_per_ip */
    unsigned owes : 1;              /* the transport has bytes of its own to send */
    unsigned armed : 1;             /* the poller tells edges of writability */
    unsigned peer_kind : 2;         /* as tcpsrv__families */
    uint8_t receive_turn;           /* its lowest bits: a read may have to wait one turn more */
    uint8_t burst, want_kind, lane;
    int16_t error;                  /* why it is dead */
    uint16_t peer_port;
    uint32_t charged;               /* what it holds, in units */
    tcpsrv_read_fn *read_fn;        /* NULL: no read waits */
    tcpsrv_extent want;
    size_t progress;                /* bytes searched, or filled, or the length that is awaited;
                                       0 while no read waits */
    size_t want_last;               /* the most bytes that may be, less one; SIZE_MAX: default */
    void *want_memory, *read_arg, *user;
    uint32_t since;                 /* the turn since when it holds something */
    uint32_t peer_ip;               /* IPv4; of IPv6 the zone, its address lies behind the stream */
};

typedef struct tcpsrv__stream6 {    /* what every stream of an IPv6 peer is part of */
    tcpsrv_stream stream;
    unsigned char ip[16];
} tcpsrv__stream6;

/* Where a failure is, copied before a wait: the stream may be gone after it. */
typedef struct tcpsrv__place {
    tcpsrv_loop *loop;
    int64_t id;
    tcpsrv__peer_name peer;
} tcpsrv__place;

/* A read that a waiting call made, >>waiting. */
typedef struct tcpsrv__read_wait {
    tcpsrv__waiter waiter;
    tcpsrv_stream *stream;
    tcpsrv_bytes *bytes;        /* the caller's */
    tcpsrv__place place;        /* of a failed read */
} tcpsrv__read_wait;

enum { /* of one receive, and with the head of its block */
    TCPSRV__HOME_SIZE = 1088,
    TCPSRV__HOME_TOTAL = TCPSRV__HOME_SIZE + TCPSRV__FIND_BEHIND + TCPSRV__BLOCK_HEAD
};

typedef struct tcpsrv__hosted {     /* at the top of a coroutine's stack, in its one page */
    tcpsrv__stream6 base;
    tcpsrv__read_wait own_wait;     /* of the stream's own coroutine, for lines */
    char spare[16];                 /* so that the bytes begin with a cache line on x86-64 */
    tcpsrv__block home;             /* for small messages, its bytes behind it */
    char home_bytes[TCPSRV__HOME_TOTAL - sizeof(tcpsrv__block)];
} tcpsrv__hosted;

TCPSRV__INLINE tcpsrv_stream *tcpsrv__stream_of(tcpsrv__source *source) {
    return TCPSRV__CONTAINER(tcpsrv_stream, source, source);
}

TCPSRV__INLINE tcpsrv__block *tcpsrv__home_of(tcpsrv_stream *stream) {
    return &((tcpsrv__hosted *)(void *)stream)->home;
}

TCPSRV__INLINE char *tcpsrv__home_bytes_of(tcpsrv_stream *stream) {
    return ((tcpsrv__hosted *)(void *)stream)->home_bytes;
}

TCPSRV__INLINE tcpsrv__read_wait *tcpsrv__await_of(tcpsrv_stream *stream) {
    return &((tcpsrv__hosted *)(void *)stream)->own_wait;
}

static const uint16_t tcpsrv__families[4] = { 0, AF_INET, AF_INET6, AF_UNIX };

static TCPSRV__COLD void tcpsrv__name_address(const tcpsrv__peer_name *name,
                                              tcpsrv_address *address) {
    memset(address, 0, sizeof *address);
    address->family = name->family;
    address->port = name->port;
    address->scope_id = name->scope_id;
    memcpy(address->ip, name->ip, sizeof name->ip);
}

static TCPSRV__COLD void tcpsrv__peer_name_of(const tcpsrv_stream *stream,
                                              tcpsrv__peer_name *name) {
    memset(name, 0, sizeof *name);
    name->family = tcpsrv__families[stream->peer_kind];
    name->port = stream->peer_port;
    if (name->family == AF_INET6) {
        memcpy(name->ip, ((const tcpsrv__stream6 *)(const void *)stream)->ip, sizeof name->ip);
        name->scope_id = stream->peer_ip;
    } else {
        memcpy(name->ip, &stream->peer_ip, sizeof stream->peer_ip);
    }
}

static TCPSRV__COLD void tcpsrv__set_peer(tcpsrv_stream *stream, const tcpsrv_address *address) {
    unsigned kind = 3;
    while (kind && tcpsrv__families[kind] != address->family) kind--;
    stream->peer_kind = kind & 3u;
    stream->peer_port = address->port;
    memcpy(&stream->peer_ip, address->ip, sizeof stream->peer_ip);
    if (address->family != AF_INET6) return;
    stream->peer_ip = address->scope_id;
    memcpy(((tcpsrv__stream6 *)(void *)stream)->ip, address->ip, sizeof address->ip);
}

static TCPSRV__COLD tcpsrv__place tcpsrv__place_of(const tcpsrv_stream *stream) {
    tcpsrv__place place;
    place.loop = stream->source.loop;
    place.id = stream->source.id;
    tcpsrv__peer_name_of(stream, &place.peer);
    return place;
}

/* Whether the stream died of this before it was connected: then that is the failure, not what was
   to be done with it. */
static TCPSRV__COLD int tcpsrv__fail_making(const tcpsrv_stream *stream, int code) {
    const tcpsrv__making *making = stream->extra ? stream->extra->making : NULL;
    if (!making || !stream->dead || stream->error != code || code == TCPSRV_ECLOSED ||
        code == TCPSRV_ECANCELED)
        return 0;
    tcpsrv__fail(code, making->step, making->place);
    return 1;
}

/* Records a failure with the peer as its place. */
static TCPSRV__COLD int tcpsrv__fail_there(int code, const char *step,
                                           const tcpsrv__place *place) {
    tcpsrv__source *source = tcpsrv__source_by_id(place->loop, place->id);
    if (source && tcpsrv__fail_making(tcpsrv__stream_of(source), code)) return code;
    tcpsrv__fail(code, step, NULL);
    tcpsrv__name_address(&place->peer, &tcpsrv__thread()->peer);
    return code;
}

static TCPSRV__COLD int tcpsrv__fail_at(int code, const char *step, const tcpsrv_stream *stream) {
    tcpsrv__place place = tcpsrv__place_of(stream);
    return tcpsrv__fail_there(code, step, &place);
}

static int tcpsrv__why_dead(const tcpsrv_stream *stream) {
    int code = stream->error;
    return code ? code : TCPSRV_ECLOSED;
}

/* ---- transports ------------------------------------------------------------------------------ */

static TCPSRV__COLD long tcpsrv__plain_receive(tcpsrv_stream *stream, const struct iovec *pieces,
                                               int count) {
    return tcpsrv__sys_readv(stream->source.fd, pieces, count);
}

static TCPSRV__COLD long tcpsrv__plain_transmit(tcpsrv_stream *stream, const struct iovec *pieces,
                                                int count) {
    return tcpsrv__sys_send(stream->source.fd, pieces, count);
}

static TCPSRV__COLD void tcpsrv__plain_shut(tcpsrv_stream *stream) {
    tcpsrv__sys_shutdown_write(stream->source.fd);
}

static TCPSRV__COLD long tcpsrv__file_transmit(tcpsrv_stream *stream, const struct iovec *pieces,
                                               int count) {
    return tcpsrv__sys_writev(stream->source.fd, pieces, count);
}

static const tcpsrv__transport tcpsrv__plain = {
    tcpsrv__plain_receive, tcpsrv__plain_transmit, tcpsrv__plain_shut, NULL, NULL, 1, 1
};
static const tcpsrv__transport tcpsrv__file = {
    tcpsrv__plain_receive, tcpsrv__file_transmit, NULL, NULL, NULL, 0, 1
};

static TCPSRV__APART const tcpsrv__transport *tcpsrv__io(const tcpsrv_stream *stream) {
    return stream->foreign ? stream->extra->io : &tcpsrv__plain;
}

/* What TLS alone does: whether it has bytes of its own to send, and its way to being connected. */
TCPSRV__INLINE int tcpsrv__owes(const tcpsrv_stream *stream) {
    return TCPSRV__TLS && stream->owes;
}

TCPSRV__INLINE void tcpsrv__prepare(tcpsrv_stream *stream) {
    if (TCPSRV__TLS && stream->connecting && tcpsrv__io(stream)->prepare)
        tcpsrv__io(stream)->prepare(stream);
}

static TCPSRV__COLD void tcpsrv__shut(tcpsrv_stream *stream) {
    const tcpsrv__transport *io = tcpsrv__io(stream);
    stream->shut = 1;
    if (io->shut) io->shut(stream); /* else its close is the end */
}

/* ---- deadlines ------------------------------------------------------------------------------- */

/* Deadlines are moved by a store, that for idleness with the time of the last byte. The alarm is
   armed for the first of them, and when it rings too early it is armed again: no heap operation for
   each message. */

/* 0 is none, and comes last. */
static uint64_t tcpsrv__earlier(uint64_t a, uint64_t b) {
    return b - 1 < a - 1 ? b : a;
}

/* An orderly close has a deadline of its own. */
static uint64_t tcpsrv__idle_deadline(const tcpsrv__extra *extra) {
    uint64_t limit = extra->stream->owner->idle_ns;
    return limit && !extra->close_due ? extra->active + limit : 0;
}

static uint64_t tcpsrv__first_deadline(const tcpsrv__extra *extra) {
    uint64_t due = extra->read_due;
    due = tcpsrv__earlier(due, extra->write_due);
    due = tcpsrv__earlier(due, tcpsrv__idle_deadline(extra));
    due = tcpsrv__earlier(due, extra->connect_due);
    due = tcpsrv__earlier(due, extra->handshake_due);
    due = tcpsrv__earlier(due, extra->close_due);
    return tcpsrv__earlier(due, extra->linger_due);
}

static TCPSRV__COLD int tcpsrv__alarm_arm(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    uint64_t due = tcpsrv__first_deadline(extra);
    if (!due || (extra->alarm.place && extra->alarm.due <= due)) return 0;
    return tcpsrv__timer_arm(stream->source.loop, &extra->alarm, due);
}

static TCPSRV__COLD void tcpsrv__touch_deadlines(tcpsrv_stream *stream, int sent) {
    tcpsrv__extra *extra = stream->extra;
    extra->active = stream->source.loop->now;
    if (sent && extra->write_due) extra->write_due = stream->source.loop->now + extra->write_ns;
}

/* A byte has come, or gone. */
static void tcpsrv__touch(tcpsrv_stream *stream, int sent) {
    if (stream->extra) tcpsrv__touch_deadlines(stream, sent);
}

static void tcpsrv__alarm_fire(tcpsrv_loop *loop, tcpsrv__timer *timer);

static TCPSRV__COLD tcpsrv__extra *tcpsrv__extra_make(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    if (stream->source.is_gone) return NULL; /* nobody comes by any more */
    if (extra) return extra;
    extra = (tcpsrv__extra *)tcpsrv__alloc(sizeof *extra);
    if (!extra) return NULL;
    extra->stream = stream;
    extra->alarm.fire = tcpsrv__alarm_fire;
    stream->extra = extra;
    return extra;
}

/* For all that precedes the handler's first message. */
static TCPSRV__COLD int tcpsrv__handshake_deadline(tcpsrv_stream *stream) {
    int64_t limit = stream->owner->options.handshake_timeout_ms;
    if (limit <= 0) return 0;
    if (!tcpsrv__extra_make(stream)) return -ENOMEM;
    stream->extra->handshake_due = stream->source.loop->now + tcpsrv__ms_to_ns(limit);
    return tcpsrv__alarm_arm(stream);
}

/* ---- the cork -------------------------------------------------------------------------------- */

/* A stream that the loop serves straight from its event is corked: what is written to it leaves
   when the event is done, without ever being queued. Bytes of the messages that are looked at stay
   where they are, as long as they are written one behind the other: whoever moves, overwrites or
   gives up input lets them leave it first. Anything else gathers in the loop's outbox. Whatever
   else has to do with a stream's output uncorks it first. */

/* size bytes at data may be written as they are. */
TCPSRV__INLINE void tcpsrv__cork(tcpsrv_loop *loop, tcpsrv_stream *stream, char *data,
                                 size_t size) {
    loop->corked = stream;
    loop->out_from = loop->out_at = data;
    loop->out_room = size;
}

/* From here on what is written to a corked stream gathers in the outbox, behind what has been
   written so far: that was received in one piece, for which it is large enough. */
static TCPSRV__NOINLINE void tcpsrv__gather(const tcpsrv_stream *stream) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *box = loop->outbox;
    size_t size = (size_t)(loop->out_at - loop->out_from);
    if (loop->corked != stream || loop->out_from == box->data) return;
    memcpy(box->data, loop->out_from, size);
    loop->out_from = box->data;
    loop->out_at = box->data + size;
    loop->out_room = box->capacity - size;
}

static TCPSRV__APART void tcpsrv__uncork_now(tcpsrv_loop *loop) {
    tcpsrv_stream *stream = loop->corked;
    tcpsrv__block *box = loop->outbox;
    tcpsrv__gather(stream);
    loop->corked = NULL;
    if (loop->out_at == loop->out_from) return;
    box->begin = 0;
    box->end = (size_t)(loop->out_at - box->data);
    loop->outbox = NULL;
    loop->lacking = 1;
    tcpsrv__queue_push(&stream->out, box);
    tcpsrv__make_flushing(&stream->source);
}

static TCPSRV__APART void tcpsrv__uncork(const tcpsrv_stream *stream) {
    if (stream->source.loop->corked == stream) tcpsrv__uncork_now(stream->source.loop);
}

/* Where one is missing the next event goes the long way, which makes it. */
static TCPSRV__COLD void tcpsrv__boxes_make(tcpsrv_loop *loop) {
    if (!loop->lacking) return;
    if (loop->spent) tcpsrv__block_give(loop, loop->spent);
    loop->spent = NULL;
    if (!loop->inbox) {
        loop->inbox = tcpsrv__block_take_class(loop, TCPSRV__POOL_INPUT);
        if (loop->inbox) loop->inbox->pool = TCPSRV__POOL_INBOX;
    }
    if (!loop->outbox) loop->outbox = tcpsrv__block_take_class(loop, TCPSRV__POOL_INPUT);
    loop->lacking = !loop->inbox || !loop->outbox;
}

/* ---- what a stream holds --------------------------------------------------------------------- */

/* Counted where a stream comes to rest with bytes of either direction, and where it gives them up:
   a message that comes and is answered in one piece is never counted. */

enum {
    TCPSRV__UNIT = 64,
    TCPSRV__FULL_CHUNK = 4096,      /* of one receive at memory_limit: little of a next message */
    TCPSRV__LARGEST = 262144        /* block of a class: by so much one receive may overshoot */
};

static TCPSRV__COLD void tcpsrv__recharge(tcpsrv_stream *stream) {
    tcpsrv__owner *owner = stream->owner;
    size_t held = stream->blocked ? tcpsrv__queue_held(&stream->out) : 0;
    size_t before = stream->charged;
    if (stream->in && stream->in->pool >= TCPSRV__POOL_NONE)
        held += stream->in->capacity + TCPSRV__BLOCK_HEAD;
    held = (held + TCPSRV__UNIT - 1) / TCPSRV__UNIT;
    if (held > UINT32_MAX) held = UINT32_MAX;
    if (held == before) return;
    if (!before) stream->since = (uint32_t)stream->source.loop->turn;
    stream->charged = (uint32_t)held;
    owner->stats.buffer_memory += (uint64_t)held * TCPSRV__UNIT - (uint64_t)before * TCPSRV__UNIT;
    if (owner->weigh) owner->weigh(owner, stream, held < before);
}

/* While the server is full: whether the stream must not receive. Only the rest of a message may
   come, as far as the reserve goes, and where the others hold no more than they may. */
static TCPSRV__COLD int tcpsrv__must_not_grow(const tcpsrv_stream *stream) {
    const tcpsrv__owner *owner = stream->owner;
    size_t size = stream->in ? tcpsrv__block_size(stream->in) : 0;
    uint64_t others = owner->stats.buffer_memory - (uint64_t)stream->charged * TCPSRV__UNIT;
    return owner->favoured != stream->source.id || !size ||
           size >= owner->options.max_buffer_size ||
           others > (uint64_t)owner->options.memory_limit + TCPSRV__LARGEST;
}

/* ---- life ------------------------------------------------------------------------------------ */

/* A corked stream's block stays until what leaves from it has left. */
static TCPSRV__APART void tcpsrv__input_give_up(tcpsrv_stream *stream) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *in = stream->in;
    if (in && in->pool >= TCPSRV__POOL_NONE) {
        if (loop->corked == stream && !loop->spent) {
            loop->spent = in;
            loop->lacking = 1;
        } else {
            tcpsrv__gather(stream);
            tcpsrv__block_give(loop, in);
        }
    }
    stream->in = NULL;
    stream->viewed = 0;
    if (stream->charged) tcpsrv__recharge(stream);
}

static TCPSRV__COLD void tcpsrv__descriptor_close(tcpsrv_stream *stream) {
    int fd = stream->source.fd;
    if (fd < 0) return;
    if (!stream->unpolled) tcpsrv__poller_forget(&stream->source.loop->poller, fd);
    if (stream->aborting && tcpsrv__io(stream)->is_socket) tcpsrv__sys_reset_on_close(fd);
    if (stream->was_blocking) tcpsrv__sys_set_blocking(fd, 1);
    tcpsrv__sys_close(fd);
    stream->source.fd = -1;
}

/* The stream's connection is over: the descriptor closes now, everything else ends from the loop.
   out.size stays as what was not sent. */
static TCPSRV__COLD void tcpsrv__die(tcpsrv_stream *stream, int code) {
    size_t unsent;
    if (stream->dead) return;
    tcpsrv__uncork(stream);
    unsent = stream->out.size;
    stream->dead = 1;
    stream->error = (int16_t)code;
    if (TCPSRV__TLS && stream->connecting && stream->owner->not_ready)
        stream->owner->not_ready(stream->owner, stream, code);
    stream->connecting = 0;
    if (unsent) stream->aborting = 1; /* a torn message must not end as if whole */
    if (stream->extra && stream->extra->making) stream->extra->making->give_up(stream);
    tcpsrv__descriptor_close(stream);
    tcpsrv__queue_drop(stream->source.loop, &stream->out, code ? code : TCPSRV_ECLOSED);
    stream->out.size = unsent;
    tcpsrv__recharge(stream);
    if (stream->extra) tcpsrv__timer_cancel(stream->source.loop, &stream->extra->alarm);
    tcpsrv__make_ready(&stream->source);
}

static TCPSRV__COLD void tcpsrv__stream_destroy(tcpsrv__source *source) {
    tcpsrv_stream *stream = tcpsrv__stream_of(source);
    tcpsrv__owner *owner = stream->owner;
    if (stream->extra) {
        tcpsrv__timer_cancel(source->loop, &stream->extra->alarm);
        tcpsrv__free(stream->extra->making);
        if (TCPSRV__TLS && tcpsrv__io(stream)->release) tcpsrv__io(stream)->release(stream);
    }
    tcpsrv__free(stream->extra);
    stream->extra = NULL; /* a handler may still ask a stream that others have ended */
    if (owner->gone) owner->gone(owner, stream);
    else tcpsrv__free(stream);
}

/* What a handler looks at stays until it returns, whoever has ended its stream. */
static TCPSRV__COLD void tcpsrv__input_drop(tcpsrv_stream *stream) {
    if (!stream->viewed || !stream->in_stack) tcpsrv__input_give_up(stream);
}

static void tcpsrv__stream_end(tcpsrv_stream *stream) {
    tcpsrv__input_drop(stream);
    tcpsrv__source_end(&stream->source);
}

/* ---- reading: does the buffer have it? ------------------------------------------------------- */

typedef struct tcpsrv__regex_search {
    const void *regex;
    char *data;
    size_t size;
    int64_t end;
} tcpsrv__regex_search;

static TCPSRV__NOINLINE size_t tcpsrv__want_max(const tcpsrv_stream *stream) {
    size_t most = stream->want_last + 1;
    return most ? most : stream->owner->options.max_buffer_size;
}

static TCPSRV__COLD void tcpsrv__regex_errand(void *arg) {
    tcpsrv__regex_search *search = (tcpsrv__regex_search *)arg;
    search->end = tcpsrv__sys_regex_end(search->regex, search->data, search->size);
}

/* Searched when the buffer has doubled, and once more when there is nothing else to receive. */
static TCPSRV__COLD int64_t tcpsrv__match_regex(tcpsrv_stream *stream, char *data, size_t size) {
    tcpsrv__regex_search search;
    int last = !stream->readable || stream->eof || stream->dead || stream->owner->full ||
               size > tcpsrv__want_max(stream);
    if (size == stream->progress || (!last && size < 2 * stream->progress)) return 0;
    search.regex = stream->want_memory;
    search.data = data;
    search.size = size;
    tcpsrv__on_loop_stack(stream->source.loop, tcpsrv__regex_errand, &search);
    stream->progress = size;
    return search.end > 0 ? search.end : 0;
}

/* Only bytes not searched before, and as many before them as a split delimiter may have. */
static int64_t tcpsrv__match_until(tcpsrv_stream *stream, const char *data, size_t size) {
    size_t length = stream->want.size, from = stream->progress;
    const char *found = NULL;
    from = from >= length ? from - length + 1 : 0;
    stream->progress = size;
    if (size - from >= length)
        found = tcpsrv__find_long(data + from, size - from, (const char *)stream->want_memory,
                                  length);
    return found ? (int64_t)((size_t)(found - data) + length) : 0;
}

TCPSRV__INLINE size_t tcpsrv__match_char(tcpsrv_stream *stream, const char *data, size_t size) {
    const char *from = data + stream->progress, *found;
    found = (const char *)memchr(from, *(const char *)stream->want_memory, size - stream->progress);
    if (found) return (size_t)(found - data) + 1;
    stream->progress = size;
    return 0;
}

/* progress is the awaited length, or, inverted, the size that was not enough to know it. */
static int64_t tcpsrv__match_frame(tcpsrv_stream *stream, const char *data, size_t size) {
    int64_t end = stream->progress > SIZE_MAX / 2 ? 0 : (int64_t)stream->progress;
    if (stream->progress == ~size) return 0;
    if (!end) end = stream->want.find_end(data, size, stream->want_memory);
    if (end < 0) return TCPSRV_EREFUSED;
    if ((uint64_t)end > tcpsrv__want_max(stream)) return TCPSRV_ETOOBIG;
    stream->progress = end ? (size_t)end : ~size;
    return (size_t)end <= size ? end : 0;
}

/* Kinds that need no search for an end within max. *empty: an empty message is there. */
static TCPSRV__COLD int64_t tcpsrv__match_size(const tcpsrv_stream *stream, size_t size,
                                               int *empty) {
    size_t wanted = stream->want.size, most = tcpsrv__want_max(stream);
    switch (stream->want_kind) {
    case TCPSRV__WANT_SOME: return (int64_t)(size < most ? size : most);
    case TCPSRV__WANT_READY: *empty = !stream->connecting && !stream->dead; return 0;
    case TCPSRV__WANT_CLOSE:
        if (size > most) return TCPSRV_ETOOBIG;
        *empty = stream->eof && !size;
        return stream->eof ? (int64_t)size : 0;
    default:
        *empty = wanted == 0;
        return size >= wanted ? (int64_t)wanted : 0;
    }
}

/* The length of the wanted message at the buffer's start; 0: not yet; a code. */
static TCPSRV__NOINLINE int64_t tcpsrv__match(tcpsrv_stream *stream, int *empty) {
    tcpsrv__block *in = stream->in;
    char *data = in ? in->data + in->begin : NULL;
    size_t size = in ? tcpsrv__block_size(in) : 0;
    size_t most = tcpsrv__want_max(stream);
    int64_t end = 0;
    if (stream->want_kind >= TCPSRV__WANT_SOME) return tcpsrv__match_size(stream, size, empty);
    if (!size) return 0;
    if (stream->want_kind == TCPSRV__WANT_FRAME) end = tcpsrv__match_frame(stream, data, size);
    else if (stream->want_kind == TCPSRV__WANT_UNTIL) end = tcpsrv__match_until(stream, data, size);
    else end = tcpsrv__match_regex(stream, data, size);
    if (end < 0) return end;
    if ((size_t)end > most || (!end && size > most)) return TCPSRV_ETOOBIG;
    return end;
}

/* ---- reading: receiving ---------------------------------------------------------------------- */

/* Room for more bytes behind those that the stream holds; no view is alive here. */
static TCPSRV__COLD int tcpsrv__input_reserve(tcpsrv_stream *stream, size_t more) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *in = stream->in, *grown;
    size_t held = in ? tcpsrv__block_size(in) : 0;
    if (in && in->capacity - in->end >= more) return 0;
    tcpsrv__gather(stream);
    if (in && in->capacity >= 2 * (held + more)) {
        memmove(in->data, in->data + in->begin, held);
        in->begin = 0;
        in->end = held;
        return 0;
    }
    if (in && in->capacity - held < more && more < held) more = held;
    grown = in ? tcpsrv__block_fit(loop, in, in->begin, held + more)
               : tcpsrv__block_take(loop, more);
    if (!grown) return -ENOMEM;
    stream->in = grown;
    return 0;
}

static TCPSRV__COPIES int tcpsrv__input_put(tcpsrv_stream *stream, const char *data, size_t size) {
    tcpsrv__block *in;
    if (tcpsrv__input_reserve(stream, size) != 0) return -ENOMEM;
    in = stream->in;
    memcpy(in->data + in->end, data, size);
    in->end += size;
    return 0;
}

TCPSRV__INLINE void tcpsrv__read_dry(tcpsrv_stream *stream) {
    stream->readable = 0;
    if (!stream->unpolled)
        tcpsrv__poller_rearm_read(&stream->source.loop->poller, stream->source.fd);
}

/* Nothing came. A transport that says -EALREADY has not seen the end of what there is: it stays
   readable, and tries again in the next turn. */
static TCPSRV__NOINLINE void tcpsrv__receive_none(tcpsrv_stream *stream, long n) {
    if (n == -EALREADY) return;
    if (n == 0) {
        stream->eof = 1;
        stream->readable = 0;
    } else if (n == -EAGAIN || n == -EWOULDBLOCK) {
        tcpsrv__read_dry(stream);
    } else {
        tcpsrv__die(stream, (int)n);
    }
}

/* The block for the next receive is larger after one that was full, and small again after what a
   small one could have held. */
static TCPSRV__NOINLINE void tcpsrv__receive_adapt(tcpsrv_stream *stream, size_t size, int full) {
    if (full) stream->bulk = stream->wide || !stream->in_stack;
    else if (size < tcpsrv__class_size[TCPSRV__POOL_INPUT]) stream->bulk = 0;
    stream->wide = stream->in_stack && (full || size > TCPSRV__HOME_SIZE / 2);
}

static TCPSRV__NOINLINE void tcpsrv__received(tcpsrv_stream *stream, size_t size, size_t asked) {
    stream->owner->stats.bytes_read += size;
    tcpsrv__touch(stream, 0);
    if (size < asked && !stream->deep && !stream->ended) tcpsrv__read_dry(stream);
    if (size == asked || stream->wide) /* behind bytes that were there it is a burst's rest */
        tcpsrv__receive_adapt(stream, stream->in ? size + TCPSRV__HOME_SIZE : size, size == asked);
}

/* Where the next bytes go: the caller's own memory, or behind those that the stream holds; and
   behind that a spare block, so that one call takes whatever has come. */
static TCPSRV__COLD int tcpsrv__receive_pieces(tcpsrv_stream *stream, struct iovec *pieces,
                                               tcpsrv__block *spare) {
    size_t most = stream->owner->full ? (size_t)TCPSRV__FULL_CHUNK
                                      : stream->owner->options.read_chunk_size;
    int n = 0;
    if (stream->want_kind == TCPSRV__WANT_INTO) {
        pieces[n].iov_base = (char *)stream->want_memory + stream->progress;
        pieces[n++].iov_len = stream->want.size - stream->progress;
    } else if (stream->in && stream->in->end < stream->in->capacity) {
        pieces[n].iov_base = stream->in->data + stream->in->end;
        pieces[n++].iov_len = stream->in->capacity - stream->in->end;
    }
    if (n && most < TCPSRV__GATHER_SIZE && pieces[0].iov_len > most) pieces[0].iov_len = most;
    if (n && pieces[0].iov_len >= most) return n;
    if (spare) {
        most -= n ? pieces[0].iov_len : 0;
        pieces[n].iov_base = spare->data;
        pieces[n++].iov_len = most < spare->capacity ? most : spare->capacity;
    }
    return n;
}

/* What came into the spare block goes behind the rest, or becomes the input as it is. */
static TCPSRV__COLD void tcpsrv__receive_spill(tcpsrv_stream *stream, tcpsrv__block *spare,
                                               size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    if (size && !stream->in) {
        spare->end = size;
        stream->in = spare;
        return;
    }
    if (size && tcpsrv__input_put(stream, spare->data, size) != 0) tcpsrv__die(stream, -ENOMEM);
    if (spare) tcpsrv__block_give(loop, spare);
}

/* A receive with bytes before it, into the caller's memory, or not from a plain socket. */
static TCPSRV__COLD int tcpsrv__receive_more(tcpsrv_stream *stream) {
    tcpsrv__block *spare = tcpsrv__block_take_class(stream->source.loop, TCPSRV__POOL_INPUT);
    struct iovec pieces[2];
    int count = tcpsrv__receive_pieces(stream, pieces, spare);
    size_t asked = count ? pieces[0].iov_len + (count > 1 ? pieces[1].iov_len : 0) : 0, size, first;
    long n;
    if (!count) return -ENOMEM;
    n = tcpsrv__io(stream)->receive(stream, pieces, count);
    size = n > 0 ? (size_t)n : 0;
    first = spare && pieces[0].iov_base == spare->data ? 0 : pieces[0].iov_len;
    if (first > size) first = size;
    if (stream->want_kind == TCPSRV__WANT_INTO) stream->progress += first;
    else if (first) stream->in->end += first;
    if (size) tcpsrv__received(stream, size, asked);
    else tcpsrv__receive_none(stream, n);
    tcpsrv__receive_spill(stream, spare, size - first);
    return 0;
}

/* A block to receive into: the one in the stream's own home as long as that suffices. */
TCPSRV__INLINE tcpsrv__block *tcpsrv__receive_block(tcpsrv_stream *stream) {
    tcpsrv__block *block;
    if (stream->in_stack && !stream->wide) {
        block = tcpsrv__home_of(stream);
        block->begin = 0;
        return block;
    }
    return tcpsrv__block_take_class(stream->source.loop,
                                    stream->bulk ? TCPSRV__POOL_BULK : TCPSRV__POOL_INPUT);
}

/* One receive. 0, or -ENOMEM with nothing received; all else is in the stream's flags. */
TCPSRV__INLINE int tcpsrv__receive(tcpsrv_stream *stream) {
    tcpsrv__block *block;
    size_t asked, most = stream->owner->options.read_chunk_size;
    long n;
    stream->receive_turn = (uint8_t)stream->source.loop->turn;
    tcpsrv__gather(stream);
    if (stream->in || stream->foreign || stream->want_kind == TCPSRV__WANT_INTO)
        return tcpsrv__receive_more(stream);
    block = tcpsrv__receive_block(stream);
    if (!block) return -ENOMEM;
    asked = most < block->capacity && !stream->bulk ? most : block->capacity;
    n = tcpsrv__sys_receive(stream->source.fd, block->data, asked);
    if (TCPSRV__LIKELY(n > 0)) {
        tcpsrv__received(stream, (size_t)n, asked);
        block->end = (size_t)n;
        stream->in = block;
        return 0;
    }
    tcpsrv__block_give(stream->source.loop, block);
    tcpsrv__receive_none(stream, n);
    return 0;
}

/* ---- reading: requests ----------------------------------------------------------------------- */

static void tcpsrv__await_done(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg);

/* Who only has callbacks is held back while the peer does not take his answers. */
static int tcpsrv__read_held_back(const tcpsrv_stream *stream) {
    return stream->out.size > stream->owner->options.write_high_water && !stream->dead &&
           stream->read_fn != tcpsrv__await_done;
}

/* Why a read that the buffer cannot answer, and no receive either, ends; 0: it waits. */
static TCPSRV__COLD int tcpsrv__read_end(const tcpsrv_stream *stream) {
    int begun = (stream->in && tcpsrv__block_size(stream->in)) ||
                (stream->want_kind == TCPSRV__WANT_INTO && stream->progress);
    if (stream->dead) return tcpsrv__why_dead(stream);
    if (stream->eof) return TCPSRV_EOF;
    if (stream->owner->draining < 2 - stream->spoke || begun || stream->readable ||
        stream->connecting || stream->want_kind == TCPSRV__WANT_READY)
        return 0;
    return TCPSRV_EOF;
}

/* A drain ends no read whose bytes are in the kernel already, though no event has told of them. */
static TCPSRV__COLD int tcpsrv__read_has_come(tcpsrv_stream *stream) {
    if (stream->dead || stream->eof || !tcpsrv__sys_unread(stream->source.fd)) return 0;
    stream->readable = 1;
    return 1;
}

/* What a stream holds stays within the promise, while somebody looks at it and while it waits: in a
   block of its size. The loop's inbox is given away where it is well filled. */
static TCPSRV__NOINLINE void tcpsrv__input_trim(tcpsrv_stream *stream) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *in = stream->in, *fit = NULL;
    int loose = tcpsrv__block_is_loose(in, tcpsrv__block_size(in));
    if (!loose && in->pool != TCPSRV__POOL_INBOX) return;
    tcpsrv__gather(stream);
    if (loose) fit = tcpsrv__block_fit(loop, in, in->begin, 0);
    if (fit) {
        stream->in = fit;
    } else if (in->pool == TCPSRV__POOL_INBOX) {
        in->pool = TCPSRV__POOL_INPUT;
        loop->inbox = NULL;
        loop->lacking = 1;
    }
}

/* Input that nobody looks at is kept in memory of its size, or not at all. */
static TCPSRV__NOINLINE void tcpsrv__input_settle(tcpsrv_stream *stream) {
    if (!stream->in) return;
    if (!stream->viewed && stream->in->begin == stream->in->end) tcpsrv__input_give_up(stream);
    else if (!stream->viewed) tcpsrv__input_trim(stream);
    if (stream->in && stream->in->pool != TCPSRV__POOL_HOME) tcpsrv__recharge(stream);
}

/* Input may be sent back from where it is now, unless something was written before. */
static void tcpsrv__recork(tcpsrv_stream *stream) {
    tcpsrv_loop *loop = stream->source.loop;
    const tcpsrv__block *in = stream->in;
    if (loop->corked == stream && loop->out_at == loop->out_from)
        tcpsrv__cork(loop, stream, in->data + in->begin, tcpsrv__block_size(in));
}

/* Hands out so many bytes of the buffer. A callback has done with them when it returns; a
   coroutine looks at them as long as it likes. */
static TCPSRV__APART void tcpsrv__view(tcpsrv_stream *stream, size_t size, tcpsrv_bytes *bytes) {
    tcpsrv__block *in;
    if (stream->read_fn == tcpsrv__await_done) {
        tcpsrv__input_trim(stream);
        stream->viewed = 1;
        tcpsrv__recork(stream);
    }
    in = stream->in;
    bytes->data = in->data + in->begin;
    bytes->size = size;
    in->begin += size;
    stream->progress = 0;
}

/* What the buffer has goes to the caller's memory before anything is received there. */
static TCPSRV__COLD void tcpsrv__into_from_buffer(tcpsrv_stream *stream) {
    tcpsrv__block *in = stream->in;
    size_t n = stream->want.size - stream->progress;
    if (!in || stream->want_kind != TCPSRV__WANT_INTO) return;
    if (n > tcpsrv__block_size(in)) n = tcpsrv__block_size(in);
    if (n) memcpy((char *)stream->want_memory + stream->progress, in->data + in->begin, n);
    stream->progress += n;
    in->begin += n;
    if (in->begin == in->end) tcpsrv__input_give_up(stream);
    else tcpsrv__input_trim(stream);
}

static TCPSRV__APART int tcpsrv__read_match_other(tcpsrv_stream *stream, int *err,
                                                     tcpsrv_bytes *bytes) {
    int64_t n;
    int empty = 0;
    *err = 0;
    bytes->data = "";
    bytes->size = 0;
    if (stream->want_kind == TCPSRV__WANT_INTO) {
        tcpsrv__into_from_buffer(stream);
        bytes->data = (const char *)stream->want_memory;
        bytes->size = stream->progress;
        if (stream->progress < stream->want.size) return 0;
        stream->progress = 0;
        return 1;
    }
    n = tcpsrv__match(stream, &empty);
    if (n > 0) tcpsrv__view(stream, (size_t)n, bytes);
    else *err = (int)n;
    return n != 0 || empty;
}

/* Whether the buffer ends the waiting read, by its bytes or by a code. */
TCPSRV__INLINE int tcpsrv__read_match(tcpsrv_stream *stream, int *err, tcpsrv_bytes *bytes) {
    tcpsrv__block *in = stream->in;
    size_t end, size;
    if (!TCPSRV__LIKELY(stream->want_kind == TCPSRV__WANT_CHAR))
        return tcpsrv__read_match_other(stream, err, bytes);
    size = tcpsrv__block_size(in);
    end = tcpsrv__match_char(stream, in->data + in->begin, size);
    *err = 0;
    if (TCPSRV__LIKELY(end && end <= tcpsrv__want_max(stream))) {
        tcpsrv__view(stream, end, bytes);
        return 1;
    }
    if (!end && size <= tcpsrv__want_max(stream)) return 0;
    *err = TCPSRV_ETOOBIG;
    return 1;
}

/* The buffer has no answer, and the stream not a byte more for now. */
static TCPSRV__APART int tcpsrv__read_stuck(tcpsrv_stream *stream, int *err) {
    int full = stream->owner->full;
    *err = tcpsrv__read_end(stream);
    if (*err == TCPSRV_EOF && tcpsrv__read_has_come(stream)) *err = 0;
    if (*err) return 1;
    tcpsrv__input_settle(stream);
    if (stream->readable && !stream->connecting &&
        (!full || !stream->owner->full || !tcpsrv__must_not_grow(stream)))
        tcpsrv__make_ready(&stream->source); /* once more where this has made the server full */
    return 0;
}

/* Tries to end the waiting read: with the buffer, and with what one receive a turn brings. 1: with
   *err and *bytes; 0: it waits. */
static TCPSRV__APART int tcpsrv__read_try(tcpsrv_stream *stream, int *err, tcpsrv_bytes *bytes) {
    for (;;) {
        if ((stream->in || stream->want_kind > TCPSRV__WANT_SOME) &&
            tcpsrv__read_match(stream, err, bytes)) {
            if (stream->want_kind != TCPSRV__WANT_READY) stream->spoke = 1;
            return 1;
        }
        if (!stream->readable || stream->dead || stream->eof || stream->connecting ||
            stream->receive_turn == (uint8_t)stream->source.loop->turn ||
            (stream->owner->full && tcpsrv__must_not_grow(stream)))
            return tcpsrv__read_stuck(stream, err);
        *err = tcpsrv__receive(stream);
        if (*err) return 1;
    }
}

/* Bytes that a failed read put into the caller's memory go back into the buffer, which nobody looks
   at now. */
static TCPSRV__COLD void tcpsrv__read_put_back(tcpsrv_stream *stream) {
    if (stream->want_kind == TCPSRV__WANT_INTO && stream->progress) {
        if (tcpsrv__input_put(stream, (const char *)stream->want_memory, stream->progress) != 0) {
            stream->eof = 0; /* not all of it is here any more */
            tcpsrv__die(stream, -ENOMEM);
        }
    }
    stream->progress = 0;
    if (stream->in) tcpsrv__input_trim(stream);
}

/* What an end without bytes, or with a deadline, has to put in order. */
static TCPSRV__NOINLINE void tcpsrv__read_ended(tcpsrv_stream *stream, int err) {
    stream->cancelled = 0;
    if (stream->extra) stream->extra->read_due = 0;
    if (!err) return;
    tcpsrv__read_put_back(stream);
    if (stream->dead && stream->read_fn != tcpsrv__await_done) stream->told = 1;
}

/* Ends the waiting read: the only place. Its callback may do anything to the stream. */
static TCPSRV__NOINLINE void tcpsrv__read_complete(tcpsrv_stream *stream, int err,
                                                   tcpsrv_bytes bytes) {
    tcpsrv_read_fn *fn = stream->read_fn;
    if (err || stream->timed || stream->cancelled) tcpsrv__read_ended(stream, err);
    if (err) {
        bytes.data = "";
        bytes.size = 0;
        tcpsrv__fail_making(stream, err);
    }
    stream->read_fn = NULL;
    fn(stream, err, bytes, stream->read_arg);
}

static TCPSRV__COLD void tcpsrv__read_fail(tcpsrv_stream *stream, int err) {
    tcpsrv_bytes none = { "", 0 };
    tcpsrv__read_complete(stream, err, none);
}

/* Whether a read that was just begun can only wait. */
TCPSRV__INLINE int tcpsrv__read_must_wait(const tcpsrv_stream *stream) {
    return !stream->readable && !stream->eof && !stream->dead && !stream->closing &&
           (!stream->in || stream->in->begin == stream->in->end) &&
           stream->want_kind <= TCPSRV__WANT_SOME && !stream->owner->draining;
}

/* Serves the stream's reads as long as there is something for them; a busy pipeline yields. A
   coroutine that got its bytes has gone on until it had to wait itself. */
static void tcpsrv__input_step(tcpsrv_stream *stream) {
    tcpsrv_bytes bytes;
    int err, waited, n = 0;
    stream->burst = 0;
    while (stream->read_fn && !stream->closing && !stream->cancelled &&
           !tcpsrv__read_held_back(stream)) {
        if (n++ == TCPSRV__BURST) {
            tcpsrv__make_ready(&stream->source);
            break;
        }
        if (!tcpsrv__read_try(stream, &err, &bytes)) break;
        waited = stream->read_fn == tcpsrv__await_done;
        stream->stepping = !waited && !stream->timed && !stream->in_stack;
        tcpsrv__read_complete(stream, err, bytes);
        stream->stepping = 0;
        if (waited || !stream->read_fn || tcpsrv__read_must_wait(stream)) break;
    }
    tcpsrv__input_settle(stream);
}

static TCPSRV__COLD int tcpsrv__read_deadline(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    if (!extra->read_ns) return 0;
    tcpsrv__refresh_now(stream->source.loop);
    extra->read_due = stream->source.loop->now + extra->read_ns;
    if (tcpsrv__alarm_arm(stream) == 0) return 0;
    stream->read_fn = NULL;
    return -ENOMEM;
}

/* Whether a read may begin; makes it the stream's. */
static TCPSRV__NOINLINE int tcpsrv__read_begin(tcpsrv_stream *stream, const tcpsrv_want *want,
                                               tcpsrv_read_fn *fn, void *arg) {
    size_t most = stream->owner->options.max_buffer_size;
    if (stream->closing) return TCPSRV_ECLOSED;
    if (stream->read_fn) return TCPSRV_EBUSY;
    if (!want->kind) return -EINVAL;
    if (want->kind == TCPSRV__WANT_EXACTLY && want->extent.size > most) return TCPSRV_ETOOBIG;
    if (stream->in && stream->in->begin == stream->in->end && !stream->stepping)
        tcpsrv__input_give_up(stream);
    stream->viewed = 0;
    stream->want_kind = (uint8_t)want->kind;
    stream->lane = want->kind <= TCPSRV__WANT_SOME ? TCPSRV__LANE_OTHER : TCPSRV__LANE_LONG;
    if (want->kind == TCPSRV__WANT_CHAR && fn != tcpsrv__await_done && !stream->in_stack)
        stream->lane = TCPSRV__LANE_LINE;
    stream->want = want->extent;
    stream->want_last = want->max - 1;
    stream->want_memory = want->memory;
    stream->read_fn = fn;
    stream->read_arg = arg;
    return TCPSRV__LIKELY(!stream->extra) ? 0 : tcpsrv__read_deadline(stream);
}

/* Whether there is something to try a read against without waiting for the poller. */
static TCPSRV__NOINLINE int tcpsrv__read_is_due(const tcpsrv_stream *stream) {
    return stream->in || stream->eof || stream->dead || stream->readable ||
           stream->owner->draining || stream->want_kind == TCPSRV__WANT_READY ||
           (stream->want_kind > TCPSRV__WANT_SOME && stream->want.size == 0);
}

static TCPSRV__APART int tcpsrv__read_anyhow(tcpsrv_stream *stream, tcpsrv_want want,
                                                tcpsrv_read_fn *fn, void *arg) {
    int err = tcpsrv__read_begin(stream, &want, fn, arg);
    if (err) return tcpsrv__fail_at(err, "read", stream);
    if ((!stream->stepping || !stream->in) && tcpsrv__read_is_due(stream))
        tcpsrv__make_ready(&stream->source);
    return 0;
}

/* In memory only here: a usual read's want stays in registers. */
TCPSRV__INLINE tcpsrv_want tcpsrv__want_again(const tcpsrv_want *want) {
    tcpsrv_want again = tcpsrv__want(want->kind, 0, want->max, want->memory);
    again.extent = want->extent;
    return again;
}

/* The next read of a callback that was called for the last one: looked at when it returns. */
TCPSRV_FAST int tcpsrv_read(tcpsrv_stream *stream, tcpsrv_want want, tcpsrv_read_fn *fn,
                            void *arg) {
    if (!stream->stepping || stream->read_fn ||
        (unsigned)want.kind - 1u >= (unsigned)TCPSRV__WANT_SOME)
        return tcpsrv__read_anyhow(stream, tcpsrv__want_again(&want), fn, arg);
    stream->want_kind = (uint8_t)want.kind;
    if (want.kind == TCPSRV__WANT_CHAR) {
        stream->lane = TCPSRV__LANE_LINE;
    } else {
        stream->lane = TCPSRV__LANE_OTHER;
        stream->want = want.extent;
    }
    stream->want_last = want.max - 1;
    stream->want_memory = want.memory;
    stream->read_fn = fn;
    stream->read_arg = arg;
    return 0;
}

TCPSRV_IMPL void tcpsrv_cancel_read(tcpsrv_stream *stream) {
    if (!stream->read_fn) return;
    tcpsrv__uncork(stream);
    stream->cancelled = 1;
    tcpsrv__make_ready(&stream->source);
}

TCPSRV_IMPL size_t tcpsrv_peek(const tcpsrv_stream *stream, tcpsrv_bytes *bytes) {
    int any = stream->in && !stream->read_fn;
    bytes->data = any ? stream->in->data + stream->in->begin : "";
    bytes->size = any ? tcpsrv__block_size(stream->in) : 0;
    return bytes->size;
}

TCPSRV_FAST tcpsrv_want tcpsrv_until(const char *delimiter, size_t max) {
    return tcpsrv_until_mem(delimiter, strlen(delimiter), max);
}

/* ---- writing --------------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__write_dry(tcpsrv_stream *stream) {
    int err;
    if (stream->unpolled) return; /* nobody would tell: the next try says why */
    stream->blocked = 1;
    tcpsrv__queue_trim(stream->source.loop, &stream->out);
    err = tcpsrv__poller_rearm_write(&stream->source.loop->poller, stream->source.fd,
                                     stream->source.id, stream->armed);
    if (err > 0) stream->armed = 1;
    if (err < 0) tcpsrv__die(stream, err);
}

/* A piece of a file by way of a block, where the system has nothing better. */
static TCPSRV__COLD long tcpsrv__send_copied(tcpsrv_stream *stream, const tcpsrv__block *block,
                                             size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *spare = tcpsrv__block_take_class(loop, TCPSRV__POOL_INPUT);
    struct iovec piece;
    long n;
    if (!spare) return -ENOMEM;
    if (size > spare->capacity) size = spare->capacity;
    n = tcpsrv__sys_pread(block->file, spare->data, size, block->offset + (int64_t)block->begin);
    piece.iov_base = spare->data;
    piece.iov_len = n > 0 ? (size_t)n : 0;
    if (n > 0) n = tcpsrv__io(stream)->transmit(stream, &piece, 1);
    tcpsrv__block_give(loop, spare);
    return n;
}

static TCPSRV__COLD long tcpsrv__send_file(tcpsrv_stream *stream, size_t *asked) {
    const tcpsrv__block *block = tcpsrv__queue_first(&stream->out);
    size_t size = tcpsrv__block_size(block);
    long n = -ENOTSUP;
    if (size > TCPSRV__SEND_SIZE) size = TCPSRV__SEND_SIZE;
    *asked = 1; /* how much went is no sign of a full buffer: only -EAGAIN is */
    if (!stream->foreign)
        n = tcpsrv__sys_sendfile(stream->source.fd, block->file,
                                 block->offset + (int64_t)block->begin, size);
    if (n == -ENOTSUP) n = tcpsrv__send_copied(stream, block, size);
    return n == 0 ? -EIO : n;
}

static TCPSRV__COLD void tcpsrv__output_emptied(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    if (extra) extra->write_due = 0;
    if (stream->shut_wanted && !stream->shut) tcpsrv__shut(stream);
    if (stream->closing && !(extra && extra->linger_due)) tcpsrv__make_ready(&stream->source);
}

static void tcpsrv__output_sent(tcpsrv_stream *stream, size_t size) {
    size_t high = stream->owner->options.write_high_water;
    int was_held_back = stream->out.size > high;
    stream->owner->stats.bytes_written += size;
    tcpsrv__touch(stream, 1);
    tcpsrv__queue_consume(stream->source.loop, &stream->out, size);
    if (was_held_back && stream->out.size <= high && stream->read_fn)
        tcpsrv__make_ready(&stream->source);
}

/* What a send of so many bytes gave. */
static TCPSRV__APART void tcpsrv__output_result(tcpsrv_stream *stream, long n, size_t asked) {
    if (n > 0) tcpsrv__output_sent(stream, (size_t)n);
    if (n == -EAGAIN || n == -EWOULDBLOCK || (n >= 0 && (size_t)n < asked))
        tcpsrv__write_dry(stream);
    else if (n < 0)
        tcpsrv__die(stream, (int)n);
}

/* One send of what is queued; the rest goes in later turns, so that a large write yields. */
static TCPSRV__APART void tcpsrv__output_step(tcpsrv__source *source) {
    tcpsrv_stream *stream = tcpsrv__stream_of(source);
    struct iovec pieces[TCPSRV__SEND_PIECES];
    tcpsrv__block *first = tcpsrv__queue_first(&stream->out);
    size_t asked;
    long n;
    if (stream->dead || stream->connecting) return;
    if (first && !tcpsrv__block_size(first)) /* marks that are reached */
        tcpsrv__queue_consume(stream->source.loop, &stream->out, 0);
    if ((stream->out.size || tcpsrv__owes(stream)) && !stream->blocked) {
        int count = tcpsrv__queue_gather(&stream->out, pieces, &asked);
        n = count || !stream->out.size ? tcpsrv__io(stream)->transmit(stream, pieces, count)
                                       : tcpsrv__send_file(stream, &asked);
        tcpsrv__output_result(stream, n, asked);
    }
    if (stream->dead) return;
    if (stream->charged || stream->blocked) tcpsrv__recharge(stream);
    if (!stream->out.last && !tcpsrv__owes(stream)) tcpsrv__output_emptied(stream);
    else if (!stream->blocked) tcpsrv__make_ready(&stream->source);
}

/* Before anything is queued, so that a failure leaves nothing behind. Without output it is moot. */
static TCPSRV__COLD int tcpsrv__write_deadline(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    if (!extra->write_ns || extra->write_due) return 0;
    tcpsrv__refresh_now(stream->source.loop);
    extra->write_due = stream->source.loop->now + extra->write_ns;
    return tcpsrv__alarm_arm(stream);
}

/* There will be output, or what comes after it. */
static TCPSRV__NOINLINE int tcpsrv__output_begin(tcpsrv_stream *stream) {
    tcpsrv__make_flushing(&stream->source);
    return stream->extra ? tcpsrv__write_deadline(stream) : 0;
}

/* A copy into the queue; all or nothing. */
static int tcpsrv__output_append(tcpsrv_stream *stream, const void *data, size_t size) {
    int err = tcpsrv__output_begin(stream);
    return err ? err : tcpsrv__queue_append(stream->source.loop, &stream->out, data, size);
}

/* A block that is not copied. */
static int tcpsrv__output_push(tcpsrv_stream *stream, tcpsrv__block *block) {
    int err = tcpsrv__output_begin(stream);
    if (!err) tcpsrv__queue_push(&stream->out, block);
    return err;
}

static TCPSRV__NOINLINE int tcpsrv__may_write(const tcpsrv_stream *stream) {
    if (stream->closing || stream->shut_wanted) return TCPSRV_ECLOSED;
    if (stream->dead) return tcpsrv__why_dead(stream);
    return 0;
}

typedef struct tcpsrv__write_wait {
    tcpsrv__block block;
    tcpsrv__waiter waiter;
    tcpsrv_stream *stream;
} tcpsrv__write_wait;

static TCPSRV__COLD void tcpsrv__write_done(tcpsrv__block *block, int result) {
    tcpsrv__waiter_done(&TCPSRV__CONTAINER(tcpsrv__write_wait, block, block)->waiter, result);
}

/* A write that is given up half-way leaves a torn message: the stream cannot go on. */
static TCPSRV__COLD void tcpsrv__write_cancel(tcpsrv__waiter *waiter) {
    tcpsrv_stream *stream = TCPSRV__CONTAINER(tcpsrv__write_wait, waiter, waiter)->stream;
    stream->aborting = 1;
    tcpsrv__die(stream, TCPSRV_ECANCELED);
}

static void tcpsrv__write_wait_init(tcpsrv__write_wait *wait, tcpsrv_stream *stream,
                                    const void *data, size_t size) {
    memset(wait, 0, sizeof *wait);
    wait->block.data = (char *)(uintptr_t)data;
    wait->block.capacity = wait->block.end = size;
    wait->block.file = -1;
    wait->block.pool = TCPSRV__POOL_NONE;
    wait->block.awaited = size > 0;
    wait->block.done = tcpsrv__write_done;
    tcpsrv__waiter_init(&wait->waiter, tcpsrv__write_cancel);
    wait->stream = stream;
}

/* Queues a block that the caller's stack holds, and sends what goes now. 1: that is all of it, or
   it has failed. */
static TCPSRV__COLD int tcpsrv__write_at_once(tcpsrv__write_wait *wait) {
    int err = tcpsrv__output_push(wait->stream, &wait->block);
    if (err) wait->waiter.result = err;
    else tcpsrv__output_step(&wait->stream->source);
    return !tcpsrv__waits(&wait->waiter);
}

/* The stream may be gone when this returns. */
static TCPSRV__COLD int tcpsrv__write_waiting(tcpsrv__write_wait *wait) {
    wait->stream->held = 1;
    if (tcpsrv__write_at_once(wait)) return wait->waiter.result;
    return tcpsrv__wait(wait->stream->source.loop, &wait->waiter);
}

/* Too much to gather: sends from the caller's memory what goes now, and copies the rest. */
static TCPSRV__COLD int tcpsrv__write_large(tcpsrv_stream *stream, const void *data, size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__queue *out = &stream->out;
    tcpsrv__block *before;
    tcpsrv__write_wait wait;
    size_t sent;
    int err;
    tcpsrv__write_wait_init(&wait, stream, data, size);
    if (tcpsrv__write_at_once(&wait)) return wait.waiter.result;
    sent = wait.block.begin;
    for (before = out->last; before->next != &wait.block;) before = before->next;
    before->next = wait.block.next;
    out->last = before == &wait.block ? NULL : before;
    out->size -= size - sent;
    err = tcpsrv__queue_append(loop, out, (const char *)data + sent, size - sent);
    if (err && sent) {
        out->size += size - sent; /* a torn message: what is lost of it counts as not sent */
        tcpsrv__die(stream, err);
    }
    return err;
}

/* The form that never waits. */
static TCPSRV__COLD int tcpsrv__write_now(tcpsrv_stream *stream, const void *data, size_t size) {
    size_t queued = stream->out.size + size;
    int err = tcpsrv__may_write(stream);
    if (err || !size) return err;
    if (queued > stream->owner->options.max_write_buffer_size &&
        tcpsrv__queue_memory(&stream->out) + size > stream->owner->options.max_write_buffer_size)
        return TCPSRV_EBUFFULL;
    if (queued > TCPSRV__GATHER_SIZE && !stream->blocked && !stream->connecting)
        return tcpsrv__write_large(stream, data, size);
    return tcpsrv__output_append(stream, data, size);
}

static void tcpsrv__marks_push(tcpsrv__extra *extra, tcpsrv__block *block) {
    block->next = NULL;
    if (extra->marks_last) extra->marks_last->next = block;
    else extra->marks_first = block;
    extra->marks_last = block;
}

typedef struct tcpsrv__flush_call {
    tcpsrv__block block;
    tcpsrv_stream *stream;
    tcpsrv_flush_fn *fn;
    void *arg;
    int result;
} tcpsrv__flush_call;

/* Called back from the loop, not from within whatever call has sent or ended this. */
static TCPSRV__COLD void tcpsrv__flush_call_done(tcpsrv__block *block, int result) {
    tcpsrv__flush_call *call = TCPSRV__CONTAINER(tcpsrv__flush_call, block, block);
    call->result = result;
    tcpsrv__marks_push(call->stream->extra, block);
    tcpsrv__make_ready(&call->stream->source);
}

/* Those that the calls themselves add have their turn later. */
static TCPSRV__COLD void tcpsrv__run_marks(tcpsrv_stream *stream) {
    tcpsrv__block *last = stream->extra ? stream->extra->marks_last : NULL, *block = NULL;
    while (last && block != last) {
        tcpsrv__flush_call *call;
        block = stream->extra->marks_first;
        call = TCPSRV__CONTAINER(tcpsrv__flush_call, block, block);
        stream->extra->marks_first = block->next;
        if (!block->next) stream->extra->marks_last = NULL;
        if (call->result && stream->dead) stream->told = 1;
        tcpsrv__fail_making(stream, call->result);
        call->fn(stream, call->result, call->arg);
        tcpsrv__free(call);
    }
}

TCPSRV_IMPL int tcpsrv_on_flush(tcpsrv_stream *stream, tcpsrv_flush_fn *fn, void *arg) {
    tcpsrv__flush_call *call;
    int err = stream->closing ? TCPSRV_ECLOSED : 0;
    if (err) return tcpsrv__fail_at(err, "on_flush", stream);
    tcpsrv__uncork(stream);
    call = (tcpsrv__flush_call *)tcpsrv__alloc(sizeof *call);
    if (!call || !tcpsrv__extra_make(stream)) {
        tcpsrv__free(call);
        return tcpsrv__fail_at(-ENOMEM, "on_flush", stream);
    }
    call->block.file = -1;
    call->block.pool = TCPSRV__POOL_NONE;
    call->block.done = tcpsrv__flush_call_done;
    call->stream = stream;
    call->fn = fn;
    call->arg = arg;
    if (stream->dead) {
        tcpsrv__flush_call_done(&call->block, tcpsrv__why_dead(stream));
        return 0;
    }
    tcpsrv__queue_push(&stream->out, &call->block);
    tcpsrv__make_flushing(&stream->source);
    return 0;
}

TCPSRV_HOT int tcpsrv_try_write(tcpsrv_stream *stream, const void *data, size_t size) {
    int err;
    tcpsrv__uncork(stream);
    err = tcpsrv__write_now(stream, data, size);
    return err ? tcpsrv__fail_at(err, "write", stream) : 0;
}

/* ---- closing --------------------------------------------------------------------------------- */

TCPSRV_IMPL int tcpsrv_shutdown(tcpsrv_stream *stream) {
    int err = stream->closing ? TCPSRV_ECLOSED : stream->dead ? stream->error : 0;
    const tcpsrv__making *making = stream->extra ? stream->extra->making : NULL;
    if (TCPSRV__TLS && !err &&
        (!tcpsrv__io(stream)->half_closes || (making && making->secure)))
        err = -ENOTSUP;
    if (err) return tcpsrv__fail_at(err, "shutdown", stream);
    tcpsrv__uncork(stream);
    stream->shut_wanted = 1;
    tcpsrv__make_flushing(&stream->source);
    return 0;
}

TCPSRV_IMPL void tcpsrv_close(tcpsrv_stream *stream) {
    if (stream->closing) return;
    tcpsrv__uncork(stream);
    stream->closing = 1;
    stream->stepping = 0;
    if (tcpsrv__queue_has_borrowed(&stream->out)) {
        stream->aborting = 1;
        tcpsrv__die(stream, TCPSRV_ECLOSED);
    }
    tcpsrv__make_ready(&stream->source);
}

TCPSRV_IMPL void tcpsrv_abort(tcpsrv_stream *stream) {
    stream->closing = stream->aborting = 1;
    stream->stepping = 0;
    tcpsrv__die(stream, TCPSRV_ECLOSED);
    tcpsrv__make_ready(&stream->source);
}

TCPSRV_IMPL int tcpsrv_on_close(tcpsrv_stream *stream, tcpsrv_close_fn *fn, void *arg) {
    if (!tcpsrv__extra_make(stream)) return tcpsrv__fail_at(-ENOMEM, "on_close", stream);
    stream->extra->close_fn = fn;
    stream->extra->close_arg = arg;
    if (stream->dead) tcpsrv__make_ready(&stream->source);
    return 0;
}

/* Late input is swallowed, so that closing does not answer it with a reset. */
static TCPSRV__COLD void tcpsrv__linger_step(tcpsrv_stream *stream) {
    struct iovec piece;
    char late[TCPSRV__LINGER_SIZE / 4];
    long n;
    piece.iov_base = late;
    piece.iov_len = sizeof late;
    n = tcpsrv__io(stream)->receive(stream, &piece, 1);
    if (n == -EAGAIN || n == -EWOULDBLOCK) {
        tcpsrv__read_dry(stream);
        return;
    }
    stream->extra->linger_left -= (int)n;
    if (n <= 0 || stream->extra->linger_left <= 0) tcpsrv__die(stream, 0);
    else tcpsrv__make_ready(&stream->source);
}

static TCPSRV__COLD void tcpsrv__linger_begin(tcpsrv_stream *stream) {
    stream->extra->linger_left = TCPSRV__LINGER_SIZE;
    stream->extra->linger_due = stream->source.loop->now + TCPSRV__NS(TCPSRV__LINGER_MS);
    tcpsrv__alarm_arm(stream);
    if (stream->readable) tcpsrv__linger_step(stream); /* else the peer has yet to answer */
}

/* An orderly close that cannot end at once gets a deadline; without memory for one it ends now. */
static TCPSRV__COLD int tcpsrv__close_deadline(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = tcpsrv__extra_make(stream);
    if (!extra) return -ENOMEM;
    extra->read_due = extra->handshake_due = 0;
    if (!extra->close_due) extra->close_due = stream->source.loop->now + stream->owner->close_ns;
    return tcpsrv__alarm_arm(stream);
}

static TCPSRV__COLD void tcpsrv__close_step(tcpsrv_stream *stream) {
    int flushed;
    tcpsrv__input_drop(stream);
    if (stream->dead) return;
    if (stream->out.last || tcpsrv__owes(stream)) tcpsrv__output_step(&stream->source);
    if (stream->dead) return;
    flushed = !stream->out.last && !tcpsrv__owes(stream);
    if (flushed && !stream->read_fn) tcpsrv__make_idle(&stream->source); /* no more is due now */
    if (flushed && (stream->eof || stream->connecting || !tcpsrv__io(stream)->is_socket)) {
        tcpsrv__die(stream, 0);
    } else if (tcpsrv__close_deadline(stream) != 0) {
        stream->aborting = stream->out.last != NULL;
        tcpsrv__die(stream, -ENOMEM);
    } else if (stream->extra->linger_due) {
        if (stream->readable) tcpsrv__linger_step(stream);
    } else if (!stream->out.last) {
        if (!stream->shut) tcpsrv__shut(stream);
        if (!stream->dead && !tcpsrv__owes(stream)) tcpsrv__linger_begin(stream);
    }
}

/* What on_close says: a death by our own hand is its reason only where bytes were lost. */
static TCPSRV__COLD void tcpsrv__tell_close(tcpsrv_stream *stream) {
    tcpsrv__extra *extra = stream->extra;
    if (!extra || !extra->close_fn || stream->close_told) return;
    stream->close_told = 1;
    tcpsrv__fail_making(stream, stream->error);
    extra->close_fn(stream, stream->error, stream->out.size, extra->close_arg);
}

/* The last of a dead stream's steps. */
static TCPSRV__COLD void tcpsrv__dead_step(tcpsrv_stream *stream) {
    int has_close_fn = stream->extra && stream->extra->close_fn;
    if (stream->read_fn) return; /* the buffer may still answer it */
    if (stream->extra && stream->extra->marks_first) return; /* told in the next step */
    tcpsrv__tell_close(stream);
    if (stream->closing) tcpsrv__stream_end(stream);
    else if (!stream->held && (has_close_fn ? stream->close_told : stream->told) &&
             !stream->read_fn && !(stream->extra && stream->extra->marks_first))
        tcpsrv__stream_end(stream);
}

/* Its turn on the ready list: everything that the flags say is due. */
static TCPSRV__COLD void tcpsrv__stream_step(tcpsrv__source *source) {
    tcpsrv_stream *stream = tcpsrv__stream_of(source);
    tcpsrv__run_marks(stream);
    tcpsrv__prepare(stream);
    if (stream->read_fn && stream->closing) tcpsrv__read_fail(stream, TCPSRV_ECLOSED);
    else if (stream->read_fn && stream->cancelled) tcpsrv__read_fail(stream, TCPSRV_ECANCELED);
    if (stream->read_fn) tcpsrv__input_step(stream);
    if (stream->closing) tcpsrv__close_step(stream);
    else if (stream->out.last || tcpsrv__owes(stream) || stream->shut_wanted)
        tcpsrv__output_step(&stream->source);
    tcpsrv__run_marks(stream);
    if (stream->dead) tcpsrv__dead_step(stream);
}

/* ---- events ---------------------------------------------------------------------------------- */

/* An error that no waiting call will meet. What came before it stays readable. */
static TCPSRV__COLD void tcpsrv__error_told(tcpsrv_stream *stream) {
    int err;
    if (stream->read_fn || tcpsrv__sys_unread(stream->source.fd) > 0) return;
    err = tcpsrv__io(stream)->is_socket ? tcpsrv__socket_error(stream->source.fd) : -EPIPE;
    if (err) tcpsrv__die(stream, err);
}

static TCPSRV__APART void tcpsrv__stream_told(tcpsrv_stream *stream, int events) {
    tcpsrv__boxes_make(stream->source.loop);
    if (stream->dead) return;
    if (events & TCPSRV__EVENT_READ) stream->readable = 1;
    if (events & (TCPSRV__EVENT_END | TCPSRV__EVENT_ERROR)) stream->ended = 1;
    if (events & TCPSRV__EVENT_URGENT) stream->deep = 1;
    if (events & TCPSRV__EVENT_WRITE) stream->blocked = 0;
    tcpsrv__prepare(stream);
    if ((events & TCPSRV__EVENT_WRITE) && (stream->out.last || tcpsrv__owes(stream)))
        tcpsrv__output_step(&stream->source);
    if (stream->read_fn && !stream->cancelled && !stream->closing) tcpsrv__input_step(stream);
    if ((events & TCPSRV__EVENT_ERROR) && !stream->dead) tcpsrv__error_told(stream);
    if (stream->closing || stream->dead) tcpsrv__make_ready(&stream->source);
}

/* The corked stream's output has not left as a whole, or the call failed. */
static TCPSRV__APART void tcpsrv__uncork_torn(tcpsrv_stream *stream, size_t size, long n) {
    tcpsrv_loop *loop = stream->source.loop;
    if (n < 0) n = tcpsrv__sys_send_again(stream->source.fd, loop->out_from, size);
    tcpsrv__uncork_now(loop);
    tcpsrv__output_result(stream, n, size);
}

/* What the corked stream's callbacks or coroutine have written. */
TCPSRV__INLINE void tcpsrv__uncork_send(tcpsrv_loop *loop, tcpsrv_stream *stream) {
    long size = loop->out_at - loop->out_from, n;
    if (size) {
        n = tcpsrv__sys_send_once(stream->source.fd, loop->out_from, (size_t)size);
        if (!TCPSRV__LIKELY(n == size)) {
            tcpsrv__uncork_torn(stream, (size_t)size, n);
            return;
        }
        stream->owner->stats.bytes_written += (size_t)size;
    }
    loop->corked = NULL;
}

/* A stream with a coroutine of its own is corked only where that one waits: while it is corked, who
   runs is it. */
static int tcpsrv__is_own_wait(const tcpsrv_stream *stream) {
    return stream->read_fn == tcpsrv__await_done &&
           stream->read_arg == tcpsrv__await_of((tcpsrv_stream *)(uintptr_t)stream);
}

/* What is not a message's usual way: the block has bytes from at on. */
static TCPSRV__APART void tcpsrv__serve_long_way(tcpsrv_stream *stream, tcpsrv__block *block,
                                                 const char *at, size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    block->begin = (size_t)(at - block->data);
    block->end = block->begin + size;
    stream->in = size ? block : NULL;
    tcpsrv__input_step(stream);
    if (loop->corked == stream) tcpsrv__uncork_send(loop, stream);
    tcpsrv__boxes_make(loop);
}

/* Nothing came, or as much as there was room for. */
static TCPSRV__APART void tcpsrv__serve_received(tcpsrv_stream *stream, tcpsrv__block *block,
                                                 long n, size_t asked) {
    if (n < 0) n = tcpsrv__sys_receive_again(stream->source.fd, block->data, asked);
    if (n <= 0) {
        tcpsrv__receive_none(stream, n);
        n = 0;
    } else {
        stream->readable = 1;
        stream->receive_turn = (uint8_t)stream->source.loop->turn;
        tcpsrv__received(stream, (size_t)n, asked);
    }
    tcpsrv__serve_long_way(stream, block, block->data, (size_t)n);
}

/* The block with so many bytes from at on. */
TCPSRV__INLINE tcpsrv__block *tcpsrv__block_from(tcpsrv__block *box, const char *at, size_t size) {
    box->begin = (size_t)(at - box->data);
    box->end = box->begin + size;
    return box;
}

/* Calls back for one message after the other, as long as nothing but that happens. */
static TCPSRV__NOINLINE void tcpsrv__serve_callbacks(tcpsrv_stream *stream,
                                                     tcpsrv_loop *loop) {
    char *at = loop->inbox->data;
    size_t size, found, left = TCPSRV__BURST;
    long n = tcpsrv__sys_receive_once(stream->source.fd, at, stream->owner->receive_max);
    size = (size_t)n;
    if (size - 1 >= stream->owner->receive_last) {
        tcpsrv__serve_received(stream, loop->inbox, n, stream->owner->receive_max);
        return;
    }
    tcpsrv__poller_rearm_read(&loop->poller, stream->source.fd);
    stream->owner->stats.bytes_read += size;
    tcpsrv__cork(loop, stream, at, size);
    stream->stepping = stream->spoke = 1;
    do {
        tcpsrv_read_fn *fn = stream->read_fn;
        tcpsrv_bytes bytes;
        bytes.data = at;
        if (!tcpsrv__find_char(at, *(const char *)stream->want_memory, size, &found)) break;
        bytes.size = found + 1;
        if (found > stream->want_last) break;
        at += bytes.size;
        size -= bytes.size;
        stream->in = size ? tcpsrv__block_from(loop->inbox, at, size) : NULL;
        stream->read_fn = NULL;
        fn(stream, 0, bytes, stream->read_arg);
    } while (size && stream->read_fn && stream->lane == TCPSRV__LANE_LINE &&
             loop->corked == stream && --left);
    stream->stepping = 0;
    if (size || loop->corked != stream)
        tcpsrv__serve_long_way(stream, loop->inbox, at, size);
    else
        tcpsrv__uncork_send(loop, stream);
}

/* Other reads, and coroutines with larger messages, gain by the inbox and the cork alone. */
static TCPSRV__APART void tcpsrv__serve_other(tcpsrv_stream *stream, tcpsrv_loop *loop) {
    tcpsrv__block *box = loop->inbox;
    size_t asked = stream->owner->receive_max;
    long n = tcpsrv__sys_receive_once(stream->source.fd, box->data, asked);
    if ((size_t)n - 1 >= asked - 1) {
        tcpsrv__serve_received(stream, box, n, asked);
        return;
    }
    tcpsrv__poller_rearm_read(&loop->poller, stream->source.fd);
    stream->owner->stats.bytes_read += (size_t)n;
    if (stream->wide) tcpsrv__receive_adapt(stream, (size_t)n, 0);
    if (!stream->in_stack || tcpsrv__is_own_wait(stream))
        tcpsrv__cork(loop, stream, box->data, (size_t)n);
    tcpsrv__serve_long_way(stream, box, box->data, (size_t)n);
}

/* A coroutine's usual way: a message in the stream's home, and nothing behind it. It goes on until
   it waits again. */
static TCPSRV__NOINLINE void tcpsrv__serve_coroutine(tcpsrv_stream *stream, tcpsrv_loop *loop) {
    tcpsrv__read_wait *wait = tcpsrv__await_of(stream);
    char *data = tcpsrv__home_bytes_of(stream);
    long n = tcpsrv__sys_receive_once(stream->source.fd, data, TCPSRV__HOME_SIZE);
    size_t came = (size_t)n, found, size;
    if (came - 1 >= TCPSRV__HOME_SIZE - 1) {
        tcpsrv__serve_received(stream, tcpsrv__home_of(stream), n, TCPSRV__HOME_SIZE);
        return;
    }
    tcpsrv__poller_rearm_read(&loop->poller, stream->source.fd);
    stream->owner->stats.bytes_read += came;
    tcpsrv__cork(loop, stream, data, came);
    if (!tcpsrv__find_char(data, *(const char *)stream->want_memory, came, &found) ||
        found > stream->want_last)
        goto long_way;
    size = found + 1;
    if (size < came) { /* what lies behind the message stays in the home */
        stream->in = tcpsrv__block_from(tcpsrv__home_of(stream), data + size, came - size);
        stream->viewed = 1;
    }
    wait->bytes->data = data;
    wait->bytes->size = size;
    stream->spoke = 1;
    stream->read_fn = NULL;
    wait->waiter.result = 0;
    tcpsrv__co_resume_here(&stream->source, wait->waiter.co);
    loop = stream->source.loop;
    if (loop->corked == stream) tcpsrv__uncork_send(loop, stream);
    return;
long_way:
    tcpsrv__serve_long_way(stream, tcpsrv__home_of(stream), data, came);
}

/* A message's usual way in one piece: bytes have come for a stream that has none, whose read waits,
   and that has nothing to send. */
static void tcpsrv__stream_event(tcpsrv__source *source, int events) {
    tcpsrv_stream *stream = tcpsrv__stream_of(source);
    tcpsrv_loop *loop = source->loop;
    if (TCPSRV__LIKELY(events == TCPSRV__EVENT_READ && stream->read_fn &&
                       !((uintptr_t)stream->in | (uintptr_t)stream->out.last | loop->lacking) &&
                       !(stream->dead || stream->closing || stream->cancelled ||
                         stream->connecting || stream->unpolled || stream->ended || stream->deep ||
                         stream->foreign || stream->shut_wanted || stream->blocked ||
                         stream->bulk || stream->winding || stream->timed || stream->readable))) {
        if (stream->extra) stream->extra->active = loop->now;
        if (stream->lane == TCPSRV__LANE_LINE) {
            tcpsrv__serve_callbacks(stream, loop);
        } else if (stream->lane == TCPSRV__LANE_OWN) {
            if (stream->wide) tcpsrv__serve_other(stream, loop);
            else tcpsrv__serve_coroutine(stream, loop);
        } else if (stream->lane == TCPSRV__LANE_OTHER) {
            tcpsrv__serve_other(stream, loop);
        } else {
            tcpsrv__stream_told(stream, events);
        }
        return;
    }
    tcpsrv__stream_told(stream, events);
}

/* 1: the deadline has passed, and is none any more. */
static TCPSRV__NOINLINE int tcpsrv__passed(const tcpsrv_loop *loop, uint64_t *due) {
    if (!*due || *due > loop->now) return 0;
    *due = 0;
    return 1;
}

static TCPSRV__COLD void tcpsrv__alarm_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv__extra *extra = TCPSRV__CONTAINER(tcpsrv__extra, alarm, timer);
    tcpsrv_stream *stream = extra->stream;
    tcpsrv_stats *stats = &stream->owner->stats;
    uint64_t idle = tcpsrv__idle_deadline(extra);
    if (tcpsrv__passed(loop, &extra->close_due)) {
        stats->timeouts_close++;
        stream->aborting = 1;
        tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    } else if (tcpsrv__passed(loop, &extra->linger_due)) {
        tcpsrv__die(stream, 0);
    } else if (tcpsrv__passed(loop, &extra->connect_due)) {
        tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    } else if (tcpsrv__passed(loop, &extra->handshake_due)) {
        stats->timeouts_handshake++;
        tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    } else if (tcpsrv__passed(loop, &extra->write_due) && stream->out.last) {
        stats->timeouts_write++;
        stream->aborting = 1;
        tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    } else if (idle && idle <= loop->now && stream->owner->full && stream->readable) {
        extra->active = loop->now; /* not for what is not received */
    } else if (idle && idle <= loop->now) {
        stats->timeouts_idle++;
        tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    }
    if (!stream->dead) tcpsrv__alarm_arm(stream);
    if (tcpsrv__passed(loop, &extra->read_due) && stream->read_fn) {
        stats->timeouts_read++;
        tcpsrv__read_fail(stream, TCPSRV_ETIMEDOUT);
    }
}

/* The loop is being freed. */
static TCPSRV__COLD void tcpsrv__stream_drop(tcpsrv__source *source) {
    tcpsrv_stream *stream = tcpsrv__stream_of(source);
    stream->closing = 1;
    if (stream->out.size) stream->aborting = 1;
    tcpsrv__die(stream, TCPSRV_ECANCELED);
    tcpsrv__run_marks(stream);
    if (stream->read_fn) tcpsrv__read_fail(stream, TCPSRV_ECANCELED);
    tcpsrv__dead_step(stream);
}

static const tcpsrv__class tcpsrv__stream_class = {
    tcpsrv__stream_event, tcpsrv__stream_step, tcpsrv__stream_drop, tcpsrv__stream_destroy, 0, 0
};

/* ---- making streams -------------------------------------------------------------------------- */

static TCPSRV__COLD int tcpsrv__winds(const tcpsrv__owner *owner) {
    return owner->draining || owner->full || owner->gather_max < TCPSRV__GATHER_SIZE ||
           owner->options.max_buffer_size < TCPSRV__HOME_SIZE;
}

/* Zeroed memory becomes a stream over a connected descriptor, told about from now on, or without
   one yet (-1). On failure the descriptor stays the caller's. */
static TCPSRV__COLD int tcpsrv__stream_init(tcpsrv_stream *stream, tcpsrv_loop *loop,
                                            tcpsrv__owner *owner, int fd, int directions) {
    int err = tcpsrv__source_init(&stream->source, &tcpsrv__stream_class, loop, fd);
    if (err) return err;
    stream->owner = owner;
    stream->winding = tcpsrv__winds(owner) != 0;
    stream->receive_turn = (uint8_t)(loop->turn - 1);
    if (owner->idle_ns) {
        err = tcpsrv__extra_make(stream) ? 0 : -ENOMEM;
        if (!err) stream->extra->active = loop->now;
        if (!err) err = tcpsrv__alarm_arm(stream);
    }
    if (!err && fd >= 0)
        err = tcpsrv__poller_add_stream(&loop->poller, fd, stream->source.id, directions);
    if (err == -EPERM) { /* a regular file: always ready (epoll_ctl(2)) */
        stream->unpolled = 1;
        err = 0;
    }
    if (!err) {
        stream->armed = (directions & TCPSRV__EVENT_WRITE) != 0;
        return 0;
    }
    if (stream->extra) tcpsrv__timer_cancel(loop, &stream->extra->alarm);
    tcpsrv__free(stream->extra);
    stream->extra = NULL;
    tcpsrv__slot_release(loop, stream->source.id);
    return err;
}

/* A connection has been made: the stream is told about its descriptor from now on. */
static TCPSRV__COLD int tcpsrv__stream_adopt(tcpsrv_stream *stream, int fd) {
    int directions = TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE;
    stream->source.fd = fd;
    stream->connecting = 0;
    stream->armed = 1;
    stream->readable = 1;
    stream->blocked = 0;
    tcpsrv__make_ready(&stream->source);
    return tcpsrv__poller_add_stream(&stream->source.loop->poller, fd, stream->source.id,
                                     directions);
}

typedef struct tcpsrv__lone {
    tcpsrv__stream6 base;       /* first: freed as the stream */
    tcpsrv__owner owner;
} tcpsrv__lone;

enum {
    TCPSRV__MAX_BUFFER = 1048576,
    TCPSRV__HIGH_WATER = 65536,
    TCPSRV__CHUNK = 65536,
    TCPSRV__HANDSHAKE_MS = 10000,
    TCPSRV__CLOSE_MS = 5000
};

/* The one place where zero becomes the default. */
static TCPSRV__COLD void tcpsrv__owner_fill(tcpsrv__owner *owner) {
    tcpsrv_options *options = &owner->options;
    size_t descriptors = tcpsrv__sys_descriptor_limit();
    if (!options->max_buffer_size) options->max_buffer_size = TCPSRV__MAX_BUFFER;
    if (!options->max_write_buffer_size) options->max_write_buffer_size = TCPSRV__MAX_BUFFER;
    if (!options->write_high_water) options->write_high_water = TCPSRV__HIGH_WATER;
    if (!options->read_chunk_size) options->read_chunk_size = TCPSRV__CHUNK;
    if (!options->stack_size) options->stack_size = TCPSRV__STACK_SIZE;
    if (!options->close_timeout_ms) options->close_timeout_ms = TCPSRV__CLOSE_MS;
    if (!options->handshake_timeout_ms) options->handshake_timeout_ms = TCPSRV__HANDSHAKE_MS;
    if (!options->max_connections)
        options->max_connections = descriptors > 64 ? descriptors - 32 : descriptors / 2;
    owner->gather_max = TCPSRV__GATHER_SIZE;
    if (owner->gather_max > options->write_high_water)
        owner->gather_max = options->write_high_water;
    if (owner->gather_max > options->max_write_buffer_size)
        owner->gather_max = options->max_write_buffer_size;
    owner->receive_max = tcpsrv__class_size[TCPSRV__POOL_INPUT] - TCPSRV__BLOCK_HEAD -
                         TCPSRV__FIND_BEHIND;
    if (owner->receive_max > options->read_chunk_size)
        owner->receive_max = options->read_chunk_size;
    if (owner->receive_max > options->max_buffer_size)
        owner->receive_max = options->max_buffer_size;
    owner->receive_last = owner->receive_max - 1;
    owner->idle_ns = tcpsrv__ms_to_ns(options->idle_timeout_ms);
    owner->close_ns = tcpsrv__ms_to_ns(options->close_timeout_ms);
}

static tcpsrv__lone *tcpsrv__lone_new(const tcpsrv_connect_options *options) {
    tcpsrv__lone *lone = (tcpsrv__lone *)tcpsrv__alloc(sizeof *lone);
    if (!lone) return NULL;
    if (options) {
        lone->owner.options.max_buffer_size = options->max_buffer_size;
        lone->owner.options.max_write_buffer_size = options->max_write_buffer_size;
        lone->owner.options.write_high_water = options->write_high_water;
    }
    tcpsrv__owner_fill(&lone->owner);
    return lone;
}

/* ---- the rest -------------------------------------------------------------------------------- */

TCPSRV_IMPL int tcpsrv_error(const tcpsrv_stream *stream) {
    return stream->error;
}

TCPSRV_HOT int tcpsrv_closed(const tcpsrv_stream *stream) {
    return stream->dead || stream->closing;
}

TCPSRV_IMPL int tcpsrv_reading(const tcpsrv_stream *stream) {
    return stream->read_fn != NULL;
}

TCPSRV_IMPL int tcpsrv_writing(const tcpsrv_stream *stream) {
    tcpsrv__uncork(stream);
    return stream->out.last != NULL;
}

TCPSRV_IMPL int tcpsrv_set_timeout(tcpsrv_stream *stream, int64_t read_ms, int64_t write_ms) {
    tcpsrv__extra *extra = tcpsrv__extra_make(stream);
    if (!extra) return tcpsrv__fail_at(-ENOMEM, "set_timeout", stream);
    tcpsrv__uncork(stream);
    stream->stepping = 0;
    extra->read_ns = tcpsrv__ms_to_ns(read_ms);
    extra->write_ns = tcpsrv__ms_to_ns(write_ms);
    if (!extra->read_ns) extra->read_due = 0;
    if (!extra->write_ns) extra->write_due = 0;
    stream->timed = extra->read_ns || extra->write_ns;
    if (stream->out.last && tcpsrv__write_deadline(stream) != 0)
        return tcpsrv__fail_at(-ENOMEM, "set_timeout", stream);
    return 0;
}

static int tcpsrv__no_descriptor(const tcpsrv_stream *stream) {
    return stream->source.fd >= 0 ? 0 : stream->connecting ? -ENOTCONN : TCPSRV_ECLOSED;
}

TCPSRV_IMPL int tcpsrv_set_nodelay(tcpsrv_stream *stream, int on) {
    int err = tcpsrv__no_descriptor(stream);
    if (!err) err = tcpsrv__sys_nodelay(stream->source.fd, on);
    return err ? tcpsrv__fail_at(err, "set_nodelay", stream) : 0;
}

TCPSRV_IMPL int tcpsrv_peer(const tcpsrv_stream *stream, tcpsrv_address *address) {
    tcpsrv__peer_name name;
    tcpsrv__peer_name_of(stream, &name);
    tcpsrv__name_address(&name, address);
    return 0;
}

TCPSRV_HOT int tcpsrv_fd(const tcpsrv_stream *stream) {
    return stream->source.fd;
}

TCPSRV_HOT void *tcpsrv_user(const tcpsrv_stream *stream) {
    return stream->user;
}

TCPSRV_IMPL void tcpsrv_set_user(tcpsrv_stream *stream, void *user) {
    stream->user = user;
}

TCPSRV_IMPL tcpsrv_loop *tcpsrv_stream_loop(const tcpsrv_stream *stream) {
    return stream->source.loop;
}

TCPSRV_HOT int64_t tcpsrv_id(const tcpsrv_stream *stream) {
    return stream->source.id;
}

TCPSRV_HOT tcpsrv_stream *tcpsrv_by_id(tcpsrv_loop *loop, int64_t id) {
    tcpsrv__source *source = tcpsrv__source_by_id(loop, id);
    tcpsrv_stream *stream;
    if (!source || source->type != &tcpsrv__stream_class) return NULL;
    stream = tcpsrv__stream_of(source);
    return stream->closing ? NULL : stream;
}

/* ==== >>waiting =============================================================================== */

/* The waiting calls on streams: the callback ones, and a waiter that is done by the callback. After
   a wait the stream may be gone, so that nothing here looks at it then. */

static void tcpsrv__await_done(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    tcpsrv__read_wait *wait = (tcpsrv__read_wait *)arg;
    *wait->bytes = bytes;
    if (err) wait->place = tcpsrv__place_of(stream);
    tcpsrv__waiter_resume(&wait->waiter, err);
}

static TCPSRV__COLD void tcpsrv__await_cancel(tcpsrv__waiter *waiter) {
    tcpsrv__read_wait *wait = TCPSRV__CONTAINER(tcpsrv__read_wait, waiter, waiter);
    tcpsrv__read_ended(wait->stream, TCPSRV_ECANCELED);
    wait->stream->read_fn = NULL;
    wait->place = tcpsrv__place_of(wait->stream);
    tcpsrv__cancel_plain(waiter);
}

static TCPSRV__COLD int tcpsrv__await_failed(int err, const tcpsrv__place *place,
                                             tcpsrv_bytes *bytes) {
    bytes->data = "";
    bytes->size = 0;
    return tcpsrv__fail_there(err, "read", place);
}

static TCPSRV__COLD int tcpsrv__await_refused(int err, const tcpsrv_stream *stream,
                                              tcpsrv_bytes *bytes) {
    tcpsrv__place place = tcpsrv__place_of(stream);
    return tcpsrv__await_failed(err, &place, bytes);
}

/* A read that the buffer or one receive can answer returns without a switch; after a burst of them
   it goes by way of the loop, so that a busy pipeline yields. */
static TCPSRV__APART int tcpsrv__await_anyhow(tcpsrv_stream *stream, tcpsrv_want want,
                                              tcpsrv_bytes *bytes) {
    tcpsrv_loop *loop = stream->source.loop;
    int is_own = stream->in_stack && loop->current &&
                 loop->current == tcpsrv__await_of(stream)->waiter.co;
    tcpsrv__read_wait other, *wait = &other;
    tcpsrv_bytes unused;
    int err = tcpsrv__may_wait(loop);
    if (is_own) wait = tcpsrv__await_of(stream);
    if (!bytes) bytes = &unused;
    if (!err) err = tcpsrv__read_begin(stream, &want, tcpsrv__await_done, wait);
    if (err) return tcpsrv__await_refused(err, stream, bytes);
    stream->held = 1;
    if (tcpsrv__read_is_due(stream)) {
        if (stream->burst == TCPSRV__BURST) {
            tcpsrv__make_ready(&stream->source);
        } else if (stream->burst++, tcpsrv__read_try(stream, &err, bytes)) {
            if (err || stream->timed || stream->cancelled) tcpsrv__read_ended(stream, err);
            stream->read_fn = NULL;
            if (stream->in) tcpsrv__recharge(stream);
            return err ? tcpsrv__await_refused(err, stream, bytes) : 0;
        }
    }
    stream->burst = 0;
    if (is_own && want.kind == TCPSRV__WANT_CHAR) stream->lane = TCPSRV__LANE_OWN;
    tcpsrv__waiter_init(&wait->waiter, tcpsrv__await_cancel);
    wait->stream = stream;
    wait->bytes = bytes;
    err = tcpsrv__wait(loop, &wait->waiter);
    return err ? tcpsrv__await_failed(err, &wait->place, bytes) : 0;
}

/* The coroutine's own wait was not ended by a line of the usual way. */
static TCPSRV__APART int tcpsrv__await_end(tcpsrv_stream *stream) {
    tcpsrv__read_wait *wait = tcpsrv__await_of(stream);
    tcpsrv__wait_on(&wait->waiter);
    return wait->waiter.result
               ? tcpsrv__await_failed(wait->waiter.result, &wait->place, wait->bytes) : 0;
}

static TCPSRV__APART int tcpsrv__await_char_anyhow(tcpsrv_stream *stream, const char *delimiter,
                                                   size_t max, tcpsrv_bytes *bytes) {
    return tcpsrv__await_anyhow(stream, tcpsrv__want(TCPSRV__WANT_CHAR, 1, max, delimiter), bytes);
}

/* The next line of a pipeline, which is longer than what its caller looks at. */
static TCPSRV__APART int tcpsrv__await_long(tcpsrv_stream *stream, const char *delimiter,
                                            size_t max, tcpsrv_bytes *bytes) {
    const tcpsrv__block *in = stream->in;
    size_t size = tcpsrv__block_size(in);
    size_t found = tcpsrv__find_char_within(in->data + in->begin, *delimiter, size);
    if (found == size || found > max - 1 || found >= stream->owner->options.max_buffer_size)
        return tcpsrv__await_char_anyhow(stream, delimiter, max, bytes);
    tcpsrv__view(stream, found + 1, bytes);
    stream->viewed = 1;
    stream->burst++;
    return 0;
}

/* The next line of a pipeline, where it needs neither a wait nor a move of bytes. */
static TCPSRV__NOINLINE int tcpsrv__await_buffered(tcpsrv_stream *stream, const char *delimiter,
                                                   size_t max, tcpsrv_bytes *bytes) {
    tcpsrv__block *in = stream->in;
    uint64_t bits;
    size_t found;
    if (stream->burst >= TCPSRV__BURST || in->capacity - in->end < TCPSRV__FIND_BEHIND ||
        (in->capacity > TCPSRV__SMALL && tcpsrv__block_is_loose(in, tcpsrv__block_size(in))))
        return tcpsrv__await_char_anyhow(stream, delimiter, max, bytes);
    bits = tcpsrv__find_near(in->data + in->begin, *delimiter, tcpsrv__block_size(in));
    found = bits ? TCPSRV__LOWEST(bits) : SIZE_MAX;
    if (found > max - 1 || found >= stream->owner->options.max_buffer_size)
        return tcpsrv__await_long(stream, delimiter, max, bytes);
    bytes->data = in->data + in->begin;
    bytes->size = found + 1;
    in->begin += found + 1;
    stream->viewed = 1;
    stream->burst++;
    return 0;
}

/* Leaves the loop the line to find, and the coroutine's own wait to end. */
static TCPSRV__NOINLINE int tcpsrv__await_line(tcpsrv_stream *stream, const char *delimiter,
                                               size_t max, tcpsrv_bytes *bytes) {
    tcpsrv__read_wait *wait = tcpsrv__await_of(stream);
    stream->want_kind = TCPSRV__WANT_CHAR;
    stream->lane = TCPSRV__LANE_OWN;
    stream->burst = 0;
    stream->want_last = max - 1;
    stream->want_memory = (void *)(uintptr_t)delimiter;
    stream->read_fn = tcpsrv__await_done;
    stream->read_arg = wait;
    wait->bytes = bytes;
    wait->waiter.result = TCPSRV__WAITING;
    tcpsrv__wait_begin(&wait->waiter);
    tcpsrv__co_leave(stream->source.loop, wait->waiter.co);
    return TCPSRV__LIKELY(!wait->waiter.result) ? 0 : tcpsrv__await_end(stream);
}

/* The next line of a corked stream, which its coroutine asks for. */
static TCPSRV__NOINLINE int tcpsrv__await_char(tcpsrv_stream *stream, const char *delimiter,
                                               size_t max, tcpsrv_bytes *bytes) {
    tcpsrv_loop *loop = stream->source.loop;
    const tcpsrv__block *in = stream->in;
    if (loop->corked != stream || stream->read_fn || !stream->in_stack || stream->readable ||
        stream->eof || stream->winding || stream->timed)
        return tcpsrv__await_char_anyhow(stream, delimiter, max, bytes);
    if (!in) return tcpsrv__await_line(stream, delimiter, max, bytes);
    if (in->begin != in->end) return tcpsrv__await_buffered(stream, delimiter, max, bytes);
    tcpsrv__input_give_up(stream);
    return tcpsrv__await_line(stream, delimiter, max, bytes);
}

TCPSRV_FAST int tcpsrv_await(tcpsrv_stream *stream, tcpsrv_want want, tcpsrv_bytes *bytes) {
    if (want.kind == TCPSRV__WANT_CHAR && bytes)
        return tcpsrv__await_char(stream, (const char *)want.memory, want.max, bytes);
    return tcpsrv__await_anyhow(stream, want, bytes);
}

TCPSRV_FAST int tcpsrv_read_until(tcpsrv_stream *stream, const char *delimiter, size_t max,
                                  tcpsrv_bytes *bytes) {
    return tcpsrv_await(stream, tcpsrv_until(delimiter, max), bytes);
}

/* ---- writing --------------------------------------------------------------------------------- */

/* Queued where it fits below the high water; else it goes from where it lies. */
static TCPSRV__NOINLINE int tcpsrv__write(tcpsrv_stream *stream, const void *data, size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__write_wait wait;
    int err;
    if (!loop->current) return tcpsrv__write_now(stream, data, size);
    stream->held = 1;
    err = tcpsrv__may_write(stream);
    if (err || !size) return err;
    if (size <= stream->owner->options.write_high_water &&
        stream->out.size + size <= stream->owner->options.write_high_water)
        return tcpsrv__output_append(stream, data, size);
    err = tcpsrv__may_wait(loop);
    if (err) return err;
    tcpsrv__write_wait_init(&wait, stream, data, size);
    return tcpsrv__write_waiting(&wait);
}

static TCPSRV__NOINLINE int tcpsrv__write_named(tcpsrv_stream *stream, const void *data,
                                                size_t size) {
    tcpsrv__place place = tcpsrv__place_of(stream);
    int err = tcpsrv__write(stream, data, size);
    return err ? tcpsrv__fail_there(err, "write", &place) : 0;
}

/* What only gathers is the same in a coroutine and outside. */
static TCPSRV__NOINLINE int tcpsrv__write_anyhow(tcpsrv_stream *stream, const void *data,
                                                 size_t size) {
    size_t most = stream->owner->gather_max;
    tcpsrv__uncork(stream);
    if (!size || size > most || stream->out.size + size > most || stream->timed || stream->dead ||
        stream->closing || stream->shut_wanted)
        return tcpsrv__write_named(stream, data, size);
    if (tcpsrv__queue_append(stream->source.loop, &stream->out, data, size) != 0)
        return tcpsrv__fail_at(-ENOMEM, "write", stream);
    tcpsrv__make_flushing(&stream->source);
    if (stream->source.loop->current) stream->held = 1;
    return 0;
}

/* To a corked stream, where the bytes must be copied. */
static TCPSRV__NOINLINE int tcpsrv__write_copied(tcpsrv_stream *stream, const void *data,
                                                 size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    if (loop->corked != stream) return tcpsrv__write_anyhow(stream, data, size);
    tcpsrv__gather(stream);
    if (size - 1 >= loop->out_room) return tcpsrv__write_anyhow(stream, data, size);
    memcpy(loop->out_at, data, size);
    loop->out_at += size;
    loop->out_room -= size;
    return 0;
}

TCPSRV_FAST int tcpsrv_write(tcpsrv_stream *stream, const void *data, size_t size) {
    tcpsrv_loop *loop = stream->source.loop;
    if (loop->corked != stream || data != loop->out_at || size > loop->out_room)
        return tcpsrv__write_copied(stream, data, size);
    loop->out_at += size;
    loop->out_room -= size;
    return 0;
}

/* All pieces as one message: copied together, so that no other writer comes between. */
TCPSRV_HOT int tcpsrv_writev(tcpsrv_stream *stream, const tcpsrv_bytes *pieces, int count) {
    tcpsrv_loop *loop = stream->source.loop;
    tcpsrv__block *block;
    size_t size = 0;
    int i, err;
    tcpsrv__uncork(stream);
    for (i = 0; i < count; i++) size += pieces[i].size;
    block = tcpsrv__block_take(loop, size);
    if (!block) return tcpsrv__fail_at(-ENOMEM, "write", stream);
    for (i = 0; i < count; i++) {
        if (pieces[i].size) memcpy(block->data + block->end, pieces[i].data, pieces[i].size);
        block->end += pieces[i].size;
    }
    err = tcpsrv__write_named(stream, block->data, size);
    tcpsrv__block_give(loop, block);
    return err;
}

typedef struct tcpsrv__format {
    tcpsrv_loop *loop;
    const char *format;
    va_list arguments;
    tcpsrv__block *block;
    int err;
} tcpsrv__format;

/* On the loop's stack, since libc's formatting alone may take 10 KB of it. */
static TCPSRV__COLD void tcpsrv__format_errand(void *arg) {
    tcpsrv__format *work = (tcpsrv__format *)arg;
    tcpsrv__block *block;
    va_list again;
    int n = 1023;
    for (;;) {
        work->block = block = tcpsrv__block_take(work->loop, (size_t)n + 1);
        work->err = block ? 0 : -ENOMEM;
        if (!block) return;
        va_copy(again, work->arguments);
        n = vsnprintf(block->data, block->capacity, work->format, again);
        va_end(again);
        if (n < 0) work->err = tcpsrv__failed();
        else block->end = (size_t)n;
        if (n < 0 || (size_t)n < block->capacity) return;
        tcpsrv__block_give(work->loop, block);
    }
}

TCPSRV_IMPL int tcpsrv_printf(tcpsrv_stream *stream, const char *format, ...) {
    tcpsrv__format work;
    work.loop = stream->source.loop;
    work.format = format;
    va_start(work.arguments, format);
    tcpsrv__on_loop_stack(work.loop, tcpsrv__format_errand, &work);
    va_end(work.arguments);
    tcpsrv__uncork(stream);
    if (work.err) tcpsrv__fail_at(work.err, "write", stream);
    else work.err = tcpsrv__write_named(stream, work.block->data, work.block->end);
    if (work.block) tcpsrv__block_give(work.loop, work.block);
    return work.err;
}

/* ---- files ----------------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__file_done(tcpsrv__block *block, int result) {
    (void)result;
    tcpsrv__sys_close(block->file);
    tcpsrv__free(block);
}

/* Outside a coroutine the queue holds a descriptor of its own. */
static TCPSRV__COLD int tcpsrv__sendfile_now(tcpsrv_stream *stream, int fd, int64_t offset,
                                             size_t size) {
    tcpsrv__block *block = (tcpsrv__block *)tcpsrv__alloc(sizeof *block);
    int err;
    if (!block) return -ENOMEM;
    block->file = tcpsrv__sys_dup(fd);
    if (block->file < 0) {
        err = block->file;
        tcpsrv__free(block);
        return err;
    }
    block->offset = offset;
    block->capacity = block->end = size;
    block->pool = TCPSRV__POOL_NONE;
    block->done = tcpsrv__file_done;
    err = tcpsrv__output_push(stream, block);
    if (err) tcpsrv__file_done(block, err);
    return err;
}

TCPSRV_IMPL int tcpsrv_sendfile(tcpsrv_stream *stream, int fd, int64_t offset, size_t size) {
    tcpsrv__place place = tcpsrv__place_of(stream);
    tcpsrv__write_wait wait;
    int err = tcpsrv__may_write(stream);
    tcpsrv__uncork(stream);
    if (!err && !size) return 0;
    if (!err && stream->source.loop->current) {
        err = tcpsrv__may_wait(stream->source.loop);
        tcpsrv__write_wait_init(&wait, stream, NULL, size);
        wait.block.file = fd;
        wait.block.offset = offset;
        if (!err) err = tcpsrv__write_waiting(&wait);
    } else if (!err) {
        err = tcpsrv__sendfile_now(stream, fd, offset, size);
    }
    return err ? tcpsrv__fail_there(err, "sendfile", &place) : 0;
}

static TCPSRV__COLD void tcpsrv__flush_cancel(tcpsrv__waiter *waiter) {
    tcpsrv_stream *stream = TCPSRV__CONTAINER(tcpsrv__write_wait, waiter, waiter)->stream;
    tcpsrv__die(stream, TCPSRV_ECANCELED);
}

TCPSRV_IMPL int tcpsrv_flush(tcpsrv_stream *stream) {
    tcpsrv__place place = tcpsrv__place_of(stream);
    tcpsrv__write_wait wait;
    int err = stream->closing ? TCPSRV_ECLOSED : stream->dead ? stream->error : 0;
    tcpsrv__uncork(stream);
    if (!err) err = tcpsrv__may_wait(stream->source.loop);
    if (!err && (stream->out.last || stream->connecting)) {
        tcpsrv__write_wait_init(&wait, stream, NULL, 0);
        wait.waiter.cancel = tcpsrv__flush_cancel;
        err = tcpsrv__write_waiting(&wait);
    }
    return err ? tcpsrv__fail_there(err, "flush", &place) : 0;
}

/* ---- the end of a loop ----------------------------------------------------------------------- */

/* Coroutines unwind first, while what they wait for still exists; then everything else. */
static void tcpsrv__drop_all(tcpsrv_loop *loop) {
    int others;
    for (others = 0; others < 2; others++) {
        uint32_t i;
        for (i = 1; i < loop->slot_count; i++) {
            tcpsrv__source *source = tcpsrv__slot_source(loop, &loop->slots[i]);
            if (source && (others || source->type == tcpsrv__coroutine_class))
                source->type->drop(source);
        }
    }
}

static void tcpsrv__drop_posted(tcpsrv_loop *loop) {
    while (loop->posted_first) {
        tcpsrv__posted *posted = loop->posted_first;
        loop->posted_first = posted->next;
        tcpsrv__free(posted);
    }
}

static void tcpsrv__drop_ready(tcpsrv_loop *loop) {
    while (loop->ready_first) {
        tcpsrv__source *source = tcpsrv__take_ready(loop);
        if (source->is_gone) tcpsrv__bury(source);
    }
    tcpsrv__destroy_gone(loop);
}

static void tcpsrv__loop_release(tcpsrv_loop *loop) {
    tcpsrv__helpers_leave(loop);
    tcpsrv__drop_posted(loop);
    tcpsrv__stack_pool_free(loop);
    tcpsrv__blocks_free(loop);
    if (loop->links) loop->links_free(loop->links);
    tcpsrv__poller_close(&loop->poller);
    tcpsrv__waker_close(&loop->waker);
    pthread_mutex_destroy(&loop->post_lock);
    tcpsrv__free(loop->slots);
    tcpsrv__free(loop->heap);
    tcpsrv__free(loop->ended);
    tcpsrv__sys_unmap_mark(loop->mark);
    tcpsrv__free(loop);
}

TCPSRV_IMPL int tcpsrv_loop_free(tcpsrv_loop *loop) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    int err = loop ? tcpsrv__loop_may_turn(loop) : 0;
    if (err) return tcpsrv__fail(err, "loop_free", NULL);
    if (!loop) return 0;
    loop->ending = 1;
    thread->turning = loop;
    tcpsrv__drop_all(loop);
    tcpsrv__drop_ready(loop);
    thread->turning = NULL;
    if (thread->default_loop == loop) thread->default_loop = NULL;
    tcpsrv__loop_release(loop);
    return 0;
}

/* ==== >>tls =================================================================================== */

/* A transport that encrypts, over an engine without input or output of its own: feed it what came,
   take from it what must go, write and read in between. The engine is BearSSL's; another one would
   have the same functions. What the file says about keys and certificates is checked when it is
   loaded; what a peer says is read here before the engine sees it. */

#ifdef TCPSERVER_TLS

/* ---- configurations -------------------------------------------------------------------------- */

enum {
    TCPSRV__TLS_FILE_MAX = 4194304, /* a bundle of all public authorities is 200 KB */
    TCPSRV__TLS_CHAIN_MAX = 16,
    TCPSRV__TLS_ALPN_MAX = 32,
    TCPSRV__SESSIONS = 1024,
    TCPSRV__SESSION_TTL_S = 300,
    TCPSRV__SESSION_WAYS = 4
};

typedef struct tcpsrv__pair {       /* a certificate chain and its key */
    br_x509_certificate *chain;     /* leaf first */
    size_t chain_length;
    int type;                       /* BR_KEYTYPE_RSA or BR_KEYTYPE_EC */
    br_skey_decoder_context *key;   /* as it was decoded; wiped at the end */
    char *names;                    /* one after the other, each with its NUL; "" is the last */
} tcpsrv__pair;

typedef struct tcpsrv__identity {   /* of a verified peer, or of one that nobody wanted verified */
    unsigned char sha256[32];       /* of its certificate */
    int verified;
    char name[65];                  /* common name of the subject, X.520's longest */
    char dns[256];                  /* first dNSName of the subject */
} tcpsrv__identity;

typedef struct tcpsrv__session {
    br_ssl_session_parameters parameters; /* session_id_len 0: free */
    uint64_t born_ns;
    unsigned char name[32];         /* hash of the server name it was made for */
    tcpsrv__identity *peer;
} tcpsrv__session;

struct tcpsrv_tls {
    pthread_mutex_t lock;           /* of what follows it up to the templates */
    size_t refs;
    tcpsrv__session *sessions;      /* made at first use */
    size_t session_count;           /* 0: no cache */
    br_x509_trust_anchor *anchors;
    size_t anchor_count;
    uint64_t session_ttl_ns;
    tcpsrv__pair *pairs;
    size_t pair_count;
    const char **alpn;
    size_t alpn_count;
    int client_certificates, no_verify, strict;
    int (*on_sni)(void *user, const char *name);
    tcpsrv_log_fn *log;
    void *user;
    br_ssl_server_context server;   /* templates: looking for what the processor can do is slow */
    br_ssl_client_context client;
};

/* Through a pointer that might change: no compiler sees that nobody reads what it writes. */
static void tcpsrv__wipe(void *memory, size_t size) {
    void *(*volatile set)(void *, int, size_t) = memset;
    set(memory, 0, size);
}

/* Records a sentence of its own. */
static TCPSRV__COLD int tcpsrv__tls_fail(const char *format, ...) TCPSRV_PRINTF(1, 2);
static TCPSRV__COLD int tcpsrv__tls_fail(const char *format, ...) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    va_list arguments;
    thread->error = TCPSRV_ETLS;
    thread->step = NULL;
    va_start(arguments, format);
    vsnprintf(thread->text, sizeof thread->text, format, arguments);
    va_end(arguments);
    return TCPSRV_ETLS;
}

static TCPSRV__COLD void tcpsrv__tls_warn(const tcpsrv_tls *tls, const char *format, ...)
    TCPSRV_PRINTF(2, 3);
static TCPSRV__COLD void tcpsrv__tls_warn(const tcpsrv_tls *tls, const char *format, ...) {
    char line[320];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (tls->log) tls->log(TCPSRV_LOG_WARNING, line, tls->user);
    else tcpsrv__log(NULL, TCPSRV_LOG_WARNING, "%s", line);
}

/* What may be right all the same: 0 and a warning, or a failure where none is wanted. */
static TCPSRV__COLD int tcpsrv__tls_doubt(const tcpsrv_tls *tls, const char *place,
                                          const char *what) {
    if (tls->strict) return tcpsrv__tls_fail("%s: %s", place, what);
    tcpsrv__tls_warn(tls, "%s: %s", place, what);
    return 0;
}

/* ---- DER ------------------------------------------------------------------------------------- */

typedef struct tcpsrv__span {
    const unsigned char *at, *end;
} tcpsrv__span;

enum {
    TCPSRV__DER_INTEGER = 0x02, TCPSRV__DER_BITS = 0x03, TCPSRV__DER_OCTETS = 0x04,
    TCPSRV__DER_OID = 0x06, TCPSRV__DER_SEQUENCE = 0x30, TCPSRV__DER_SET = 0x31
};

static size_t tcpsrv__span_size(const tcpsrv__span *span) {
    return (size_t)(span->end - span->at);
}

/* Takes an unsigned number of so many bytes off the front; -1 and nothing left when it is cut. */
static long tcpsrv__span_number(tcpsrv__span *span, int bytes) {
    long number = 0;
    if (tcpsrv__span_size(span) < (size_t)bytes) {
        span->at = span->end;
        return -1;
    }
    while (bytes--) number = number << 8 | *span->at++;
    return number;
}

/* Takes so many bytes off the front. 0, or -1 and nothing left. */
static int tcpsrv__span_take(tcpsrv__span *span, long size, tcpsrv__span *taken) {
    *taken = *span;
    if (size < 0 || tcpsrv__span_size(span) < (size_t)size) {
        span->at = taken->at = span->end;
        return -1;
    }
    taken->end = span->at += size;
    return 0;
}

/* Takes the next element off: its tag, and what is in it. -1: there is none, or it is cut. */
static int tcpsrv__der_next(tcpsrv__span *from, tcpsrv__span *content) {
    int tag = (int)tcpsrv__span_number(from, 1);
    long size = tcpsrv__span_number(from, 1);
    if (tag < 0 || size < 0 || (tag & 0x1f) == 0x1f) return -1;
    if (size == 0x80 || size > 0x83) return -1;
    if (size > 0x80) size = tcpsrv__span_number(from, (int)size - 0x80);
    return tcpsrv__span_take(from, size, content) == 0 ? tag : -1;
}

/* As above where only one tag is right. 0 or -1. */
static int tcpsrv__der_expect(tcpsrv__span *from, int tag, tcpsrv__span *content) {
    return tcpsrv__der_next(from, content) == tag ? 0 : -1;
}

typedef struct tcpsrv__certificate_parts {
    tcpsrv__span issuer, subject, key, extensions;
    tcpsrv__span name;              /* the subject with its head */
} tcpsrv__certificate_parts;

/* RFC 5280 4.1. 0, or -1 for what is not a certificate. */
static int tcpsrv__certificate_split(const unsigned char *der, size_t size,
                                     tcpsrv__certificate_parts *parts) {
    tcpsrv__span at, in, skipped;
    int tag;
    memset(parts, 0, sizeof *parts);
    at.at = der;
    at.end = der + size;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &in) != 0) return -1;
    if (tcpsrv__der_expect(&in, TCPSRV__DER_SEQUENCE, &at) != 0) return -1;
    if (at.at < at.end && *at.at == 0xa0) tcpsrv__der_next(&at, &skipped);  /* version */
    if (tcpsrv__der_expect(&at, TCPSRV__DER_INTEGER, &skipped) != 0 ||      /* serial number */
        tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &skipped) != 0 ||     /* its signature */
        tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &parts->issuer) != 0 ||
        tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &skipped) != 0)       /* validity */
        return -1;
    parts->name = at;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &parts->subject) != 0) return -1;
    parts->name.end = at.at;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &parts->key) != 0) return -1;
    while ((tag = tcpsrv__der_next(&at, &in)) > 0)
        if (tag == 0xa3) return tcpsrv__der_expect(&in, TCPSRV__DER_SEQUENCE, &parts->extensions);
    return 0;
}

/* Whether an OID is 2.5.class.number. */
static int tcpsrv__oid_is(const tcpsrv__span *oid, int kind, int number) {
    return tcpsrv__span_size(oid) == 3 && oid->at[0] == 0x55 && oid->at[1] == kind &&
           oid->at[2] == number;
}

/* The value of the extension 2.5.29.number. 0, or -1: it is not there. */
static int tcpsrv__certificate_extension(const tcpsrv__certificate_parts *parts, int number,
                                         tcpsrv__span *value) {
    tcpsrv__span at = parts->extensions, one, oid;
    int tag;
    while (tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &one) == 0) {
        if (tcpsrv__der_expect(&one, TCPSRV__DER_OID, &oid) != 0) return -1;
        if (!tcpsrv__oid_is(&oid, 0x1d, number)) continue;
        tag = tcpsrv__der_next(&one, value);
        if (tag == 1) tag = tcpsrv__der_next(&one, value); /* critical or not */
        return tag == TCPSRV__DER_OCTETS ? 0 : -1;
    }
    return -1;
}

enum { TCPSRV__ALT_DNS = 0x82, TCPSRV__ALT_IP = 0x87 };

/* Takes the next alternative name of that kind off the list. 0, or -1: no more. */
static int tcpsrv__alt_name_next(tcpsrv__span *list, int kind, tcpsrv__span *name) {
    int tag;
    while ((tag = tcpsrv__der_next(list, name)) > 0)
        if (tag == kind) return 0;
    return -1;
}

/* The subject's alternative names. 0, or -1: it has none. */
static int tcpsrv__alt_names(const tcpsrv__certificate_parts *parts, tcpsrv__span *list) {
    tcpsrv__span value;
    if (tcpsrv__certificate_extension(parts, 0x11, &value) != 0) return -1;
    return tcpsrv__der_expect(&value, TCPSRV__DER_SEQUENCE, list);
}

/* As text that may be shown and compared: what is no printable ASCII, a NUL above all, becomes a
   question mark. "" where it does not fit. */
static void tcpsrv__span_text(const tcpsrv__span *span, char *text, size_t room) {
    size_t i, size = tcpsrv__span_size(span);
    if (size >= room) size = 0;
    for (i = 0; i < size; i++)
        text[i] = span->at[i] < 32 || span->at[i] == 127 ? '?' : (char)span->at[i];
    text[size] = 0;
}

/* The common name in a distinguished name; "" where it has none. */
static void tcpsrv__common_name(tcpsrv__span name, char *text, size_t room) {
    tcpsrv__span set, pair, oid, value;
    text[0] = 0;
    while (tcpsrv__der_expect(&name, TCPSRV__DER_SET, &set) == 0)
        while (tcpsrv__der_expect(&set, TCPSRV__DER_SEQUENCE, &pair) == 0)
            if (tcpsrv__der_expect(&pair, TCPSRV__DER_OID, &oid) == 0 &&
                tcpsrv__oid_is(&oid, 4, 3) && tcpsrv__der_next(&pair, &value) > 0)
                tcpsrv__span_text(&value, text, room);
}

/* Whether the key may be used that way: 1 as a server, 2 as a client (RFC 5280 4.2.1.12). */
static int tcpsrv__certificate_serves(const tcpsrv__certificate_parts *parts, int purpose) {
    static const unsigned char id_kp[7] = { 0x2b, 6, 1, 5, 5, 7, 3 };
    tcpsrv__span value, list, oid;
    if (tcpsrv__certificate_extension(parts, 0x25, &value) != 0) return 1;
    if (tcpsrv__der_expect(&value, TCPSRV__DER_SEQUENCE, &list) != 0) return 0;
    while (tcpsrv__der_expect(&list, TCPSRV__DER_OID, &oid) == 0) {
        if (tcpsrv__span_size(&oid) == 8 && memcmp(oid.at, id_kp, 7) == 0 && oid.at[7] == purpose)
            return 1;
        if (tcpsrv__span_size(&oid) == 4 && memcmp(oid.at, "\x55\x1d\x25\0", 4) == 0) return 1;
    }
    return 0;
}

/* Bits of an RSA modulus, from the certificate itself: the decoder knows no larger than 4096. 0:
   not RSA. */
static size_t tcpsrv__certificate_rsa_bits(const tcpsrv__certificate_parts *parts) {
    tcpsrv__span at = parts->key, in, number;
    unsigned first;
    size_t bits;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_SEQUENCE, &in) != 0) return 0;
    if (tcpsrv__der_expect(&in, TCPSRV__DER_OID, &number) != 0 ||
        tcpsrv__span_size(&number) != 9 ||
        memcmp(number.at, "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01", 9) != 0)
        return 0;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_BITS, &in) != 0 || tcpsrv__span_number(&in, 1) != 0)
        return 0;
    if (tcpsrv__der_expect(&in, TCPSRV__DER_SEQUENCE, &at) != 0) return 0;
    if (tcpsrv__der_expect(&at, TCPSRV__DER_INTEGER, &number) != 0) return 0;
    while (number.at < number.end && !*number.at) number.at++;
    bits = 8 * tcpsrv__span_size(&number);
    for (first = bits ? *number.at : 0x80u; !(first & 0x80u); first <<= 1) bits--;
    return bits;
}

/* ---- PEM ------------------------------------------------------------------------------------- */

typedef struct tcpsrv__pem {
    br_pem_decoder_context decoder;
    const char *place;              /* the file, or what else the text is called */
    const char *text;
    size_t size, used, begin;       /* begin: behind the BEGIN line */
    char *owned;                    /* the text, where it was read from a file */
    unsigned char *der;             /* of the object that was found last */
    size_t der_size, der_room;
    int number;                     /* of that object, from 1 on */
    int no_memory;
    char name[40];
} tcpsrv__pem;

static TCPSRV__COLD void tcpsrv__pem_close(tcpsrv__pem *pem) {
    if (pem->der) tcpsrv__wipe(pem->der, pem->der_room);
    if (pem->owned) tcpsrv__wipe(pem->owned, pem->size);
    tcpsrv__wipe(&pem->decoder, sizeof pem->decoder);
    tcpsrv__free(pem->der);
    tcpsrv__free(pem->owned);
}

/* Opens a text in memory, or else a file. 0, or the failure recorded and nothing to close. */
static TCPSRV__COLD int tcpsrv__pem_open(tcpsrv__pem *pem, const char *text, const char *place,
                                         unsigned *mode) {
    long n;
    memset(pem, 0, sizeof *pem);
    br_pem_decoder_init(&pem->decoder);
    pem->place = place;
    pem->text = text;
    pem->size = text ? strlen(text) : (size_t)TCPSRV__TLS_FILE_MAX;
    if (text) return 0;
    n = tcpsrv__sys_read_file(place, NULL, &pem->size, mode);
    if (n == 0) {
        pem->owned = (char *)TCPSERVER_REALLOC(NULL, pem->size + 1);
        n = pem->owned ? tcpsrv__sys_read_file(place, pem->owned, &pem->size, mode) : -ENOMEM;
    }
    pem->text = pem->owned;
    if (n == 0) return 0;
    tcpsrv__pem_close(pem);
    return tcpsrv__tls_fail("%s: %s", place, tcpsrv_strerror((int)n));
}

static void tcpsrv__pem_take(void *arg, const void *data, size_t size) {
    tcpsrv__pem *pem = (tcpsrv__pem *)arg;
    unsigned char *grown;
    size_t room = pem->der_room ? pem->der_room : 2048;
    if (pem->no_memory) return;
    while (room - pem->der_size < size) room *= 2;
    if (room > pem->der_room) {
        grown = (unsigned char *)TCPSERVER_REALLOC(NULL, room); /* a copy: the old one is wiped */
        pem->no_memory = !grown;
        if (!grown) return;
        if (pem->der) memcpy(grown, pem->der, pem->der_size);
        if (pem->der) tcpsrv__wipe(pem->der, pem->der_room);
        tcpsrv__free(pem->der);
        pem->der = grown;
        pem->der_room = room;
    }
    memcpy(pem->der + pem->der_size, data, size);
    pem->der_size += size;
}

static TCPSRV__COLD void tcpsrv__pem_begin(tcpsrv__pem *pem) {
    const char *name = br_pem_decoder_name(&pem->decoder);
    size_t size = strlen(name);
    if (size >= sizeof pem->name) size = sizeof pem->name - 1;
    memcpy(pem->name, name, size);
    pem->name[size] = 0;
    pem->number++;
    pem->begin = pem->used;
    pem->der_size = 0;
    br_pem_decoder_setdest(&pem->decoder, tcpsrv__pem_take, pem);
}

static int tcpsrv__pem_is_key(const tcpsrv__pem *pem) {
    size_t size = strlen(pem->name);
    return size >= 11 && strcmp(pem->name + size - 11, "PRIVATE KEY") == 0;
}

/* Whether the dashes that come next are those of an END line. */
static TCPSRV__COLD int tcpsrv__pem_has_end(const tcpsrv__pem *pem) {
    size_t left = pem->begin < pem->size ? pem->size - pem->begin : 0;
    const char *dashes = tcpsrv__find_long(pem->text + pem->size - left, left, "-----", 5);
    return dashes && pem->text + pem->size - dashes >= 9 && memcmp(dashes + 5, "END ", 4) == 0;
}

static TCPSRV__COLD int tcpsrv__pem_bad(const tcpsrv__pem *pem) {
    /* A key encrypted in the old way has header lines, which are no base64 (RFC 1421 4.6.1.1). */
    if (tcpsrv__pem_is_key(pem) && tcpsrv__find_long(pem->text, pem->size, "ENCRYPTED", 9))
        return tcpsrv__tls_fail("%s: the key is encrypted with a passphrase; decrypt it first "
                                "(openssl pkey -in ...)", pem->place);
    return tcpsrv__tls_fail("%s: PEM object %d (%s) %s", pem->place, pem->number, pem->name,
                            tcpsrv__pem_has_end(pem) ? "is not valid base64"
                                                     : "has no END line (file cut short?)");
}

/* The decoder sees an END line only when its own end is there: one more line end is given to it. */
static TCPSRV__COLD size_t tcpsrv__pem_push(tcpsrv__pem *pem) {
    size_t n, left = pem->size - pem->used;
    n = left ? br_pem_decoder_push(&pem->decoder, pem->text + pem->used, left)
             : br_pem_decoder_push(&pem->decoder, "\n", 1);
    if (!left) pem->used++; /* past the end: the line end was given */
    else pem->used += n;
    return n;
}

/* Finds the next object. 1; 0: no more; or the failure recorded. */
static TCPSRV__COLD int tcpsrv__pem_next(tcpsrv__pem *pem) {
    int inside = 0;
    while (pem->used <= pem->size) {
        tcpsrv__pem_push(pem);
        switch (br_pem_decoder_event(&pem->decoder)) {
        case BR_PEM_BEGIN_OBJ:
            tcpsrv__pem_begin(pem);
            inside = 1;
            break;
        case BR_PEM_END_OBJ:
            if (pem->no_memory) return tcpsrv__tls_fail("%s: %s", pem->place, strerror(ENOMEM));
            if (!pem->der_size) return tcpsrv__tls_fail("%s: PEM object %d (%s) is empty",
                                                        pem->place, pem->number, pem->name);
            return 1;
        case BR_PEM_ERROR: return tcpsrv__pem_bad(pem);
        default: break;
        }
    }
    if (inside) return tcpsrv__pem_bad(pem);
    if (pem->number) return 0;
    if (pem->size && (unsigned char)pem->text[0] == TCPSRV__DER_SEQUENCE)
        return tcpsrv__tls_fail("%s: no PEM object in the file; it looks like DER: convert it "
                                "(openssl x509 -inform DER, or openssl pkey -inform DER)",
                                pem->place);
    return tcpsrv__tls_fail("%s: no PEM object in the file", pem->place);
}

static int tcpsrv__pem_is_certificate(const tcpsrv__pem *pem) {
    return strcmp(pem->name, "CERTIFICATE") == 0 || strcmp(pem->name, "X509 CERTIFICATE") == 0;
}

/* ---- certificates and keys ------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__pair_free(tcpsrv__pair *pair) {
    size_t i;
    for (i = 0; i < pair->chain_length; i++) tcpsrv__free(pair->chain[i].data);
    if (pair->key) tcpsrv__wipe(pair->key, sizeof *pair->key);
    tcpsrv__free(pair->key);
    tcpsrv__free(pair->chain);
    tcpsrv__free(pair->names);
}

static TCPSRV__COLD int tcpsrv__chain_add(tcpsrv__pair *pair, const tcpsrv__pem *pem) {
    br_x509_certificate *one;
    if (pair->chain_length == TCPSRV__TLS_CHAIN_MAX)
        return tcpsrv__tls_fail("%s: more than %d certificates", pem->place,
                                TCPSRV__TLS_CHAIN_MAX);
    if (!pair->chain)
        pair->chain = (br_x509_certificate *)tcpsrv__alloc(TCPSRV__TLS_CHAIN_MAX *
                                                           sizeof *pair->chain);
    one = pair->chain ? &pair->chain[pair->chain_length] : NULL;
    if (one) one->data = (unsigned char *)TCPSERVER_REALLOC(NULL, pem->der_size + 1);
    if (!one || !one->data) return tcpsrv__tls_fail("%s: %s", pem->place, strerror(ENOMEM));
    memcpy(one->data, pem->der, pem->der_size);
    one->data_len = pem->der_size;
    pair->chain_length++;
    return 0;
}

/* Each certificate must be followed by the one that vouches for it. */
static TCPSRV__COLD int tcpsrv__chain_check(const tcpsrv__pair *pair, const char *place) {
    tcpsrv__certificate_parts parts, next;
    char name[65], next_name[65];
    size_t i;
    for (i = 0; i < pair->chain_length; i++) {
        const br_x509_certificate *one = &pair->chain[i];
        if (tcpsrv__certificate_split(one->data, one->data_len, &next) != 0)
            return tcpsrv__tls_fail("%s: certificate %d is none", place, (int)i + 1);
        if (i && (tcpsrv__span_size(&parts.issuer) != tcpsrv__span_size(&next.subject) ||
                  memcmp(parts.issuer.at, next.subject.at, tcpsrv__span_size(&next.subject)))) {
            tcpsrv__common_name(parts.subject, name, sizeof name);
            tcpsrv__common_name(next.subject, next_name, sizeof next_name);
            return tcpsrv__tls_fail("%s: certificate %d (%s) does not vouch for the one before it "
                                    "(%s); the server's own comes first, then its issuers",
                                    place, (int)i + 1, next_name, name);
        }
        parts = next;
    }
    return 0;
}

/* The names that a certificate is for; without alternative names its common name. */
static TCPSRV__COLD char *tcpsrv__certificate_names(const br_x509_certificate *leaf) {
    tcpsrv__certificate_parts parts;
    tcpsrv__span list, name;
    size_t used = 0;
    char *names = (char *)tcpsrv__alloc(leaf->data_len + 2); /* they are part of it */
    if (!names || tcpsrv__certificate_split(leaf->data, leaf->data_len, &parts) != 0) return names;
    if (tcpsrv__alt_names(&parts, &list) != 0) {
        tcpsrv__common_name(parts.subject, names, leaf->data_len);
        return names;
    }
    while (tcpsrv__alt_name_next(&list, TCPSRV__ALT_DNS, &name) == 0) {
        tcpsrv__span_text(&name, names + used, tcpsrv__span_size(&name) + 1);
        if (names[used]) used += strlen(names + used) + 1;
    }
    return names;
}

/* What a certificate says about its time, in days of the decoder (from the year 0 on). */
static TCPSRV__COLD int tcpsrv__certificate_dates(const tcpsrv_tls *tls, const char *place,
                                                  const br_x509_decoder_context *decoder) {
    uint64_t now = (uint64_t)tcpsrv__sys_unix_time() + (uint64_t)719528 * 86400;
    if (now > (uint64_t)decoder->notafter_days * 86400 + decoder->notafter_seconds)
        return tcpsrv__tls_doubt(tls, place, "the certificate has expired");
    if (now < (uint64_t)decoder->notbefore_days * 86400 + decoder->notbefore_seconds)
        return tcpsrv__tls_doubt(tls, place, "the certificate is not valid yet");
    return 0;
}

static int tcpsrv__curve_works(int curve) {
    return curve == BR_EC_secp256r1 || curve == BR_EC_secp384r1 || curve == BR_EC_secp521r1;
}

/* The public key of the first certificate, which must be one that this library serves. */
static TCPSRV__COLD int tcpsrv__leaf_check(const tcpsrv_tls *tls, tcpsrv__pair *pair,
                                           const char *place,
                                           br_x509_decoder_context *decoder) {
    const br_x509_certificate *leaf = &pair->chain[0];
    tcpsrv__certificate_parts parts;
    const br_x509_pkey *key;
    size_t bits = 0;
    int err;
    if (tcpsrv__certificate_split(leaf->data, leaf->data_len, &parts) == 0)
        bits = tcpsrv__certificate_rsa_bits(&parts);
    if (bits && (bits < 2048 || bits > 4096))
        return tcpsrv__tls_fail("%s: RSA key of %u bits; 2048 to 4096 work", place,
                                (unsigned)bits);
    br_x509_decoder_init(decoder, NULL, NULL);
    br_x509_decoder_push(decoder, leaf->data, leaf->data_len);
    key = br_x509_decoder_get_pkey(decoder);
    if (!key || (key->key_type == BR_KEYTYPE_EC && !tcpsrv__curve_works(key->key.ec.curve)))
        return tcpsrv__tls_fail("%s: cannot read the first certificate: unsupported key or "
                                "signature type (RSA and EC P-256, P-384 and P-521 work)", place);
    pair->type = key->key_type;
    err = tcpsrv__certificate_dates(tls, place, decoder);
    if (err) return err;
    if (bits > 3072 || (!bits && key->key.ec.curve != BR_EC_secp256r1))
        tcpsrv__tls_warn(tls, "%s: each handshake with this key holds up the loop for 4 to 50 ms; "
                         "EC P-256 takes 1.6", place);
    pair->names = tcpsrv__certificate_names(leaf);
    return pair->names ? 0 : tcpsrv__tls_fail("%s: %s", place, strerror(ENOMEM));
}

/* The chain of a pair, from the PEM that is open. */
static TCPSRV__COLD int tcpsrv__chain_read(tcpsrv__pair *pair, tcpsrv__pem *pem) {
    char first[40] = "";
    int n;
    while ((n = tcpsrv__pem_next(pem)) == 1) {
        if (!first[0]) memcpy(first, pem->name, sizeof first);
        if (!tcpsrv__pem_is_certificate(pem)) continue;
        n = tcpsrv__chain_add(pair, pem);
        if (n) return n;
    }
    if (n < 0) return n;
    if (!pair->chain_length)
        return tcpsrv__tls_fail("%s: no certificate in the file (first object is %s)", pem->place,
                                first);
    return tcpsrv__chain_check(pair, pem->place);
}

static TCPSRV__COLD int tcpsrv__key_read(tcpsrv__pair *pair, tcpsrv__pem *pem) {
    int n;
    while ((n = tcpsrv__pem_next(pem)) == 1)
        if (tcpsrv__pem_is_key(pem)) break;
    if (n < 0) return n;
    if (n == 0) return tcpsrv__tls_fail("%s: no private key in the file", pem->place);
    if (strncmp(pem->name, "ENCRYPTED", 9) == 0) return tcpsrv__pem_bad(pem);
    pair->key = (br_skey_decoder_context *)tcpsrv__alloc(sizeof *pair->key);
    if (!pair->key) return tcpsrv__tls_fail("%s: %s", pem->place, strerror(ENOMEM));
    br_skey_decoder_init(pair->key);
    br_skey_decoder_push(pair->key, pem->der, pem->der_size);
    if (br_skey_decoder_last_error(pair->key) == 0) return 0;
    return tcpsrv__tls_fail("%s: cannot read the private key: unsupported type (RSA and EC P-256, "
                            "P-384 and P-521 work)", pem->place);
}

/* Hashes that sign: SHA-256, SHA-384, SHA-512 by their TLS numbers. */
static const br_hash_class *tcpsrv__hash_of(unsigned id) {
    return id == br_sha512_ID ? &br_sha512_vtable : id == br_sha384_ID ? &br_sha384_vtable
                                                                       : &br_sha256_vtable;
}

static const unsigned char *tcpsrv__hash_oid(unsigned id) {
    return id == br_sha512_ID ? BR_HASH_OID_SHA512 : id == br_sha384_ID ? BR_HASH_OID_SHA384
                                                                        : BR_HASH_OID_SHA256;
}

/* Signs a hash where it lies. The signature's size, or 0. */
static size_t tcpsrv__pair_sign(const tcpsrv__pair *pair, unsigned hash_id, unsigned char *data,
                                size_t room) {
    const br_rsa_private_key *rsa = br_skey_decoder_get_rsa(pair->key);
    const br_ec_private_key *ec = br_skey_decoder_get_ec(pair->key);
    const br_hash_class *hash = tcpsrv__hash_of(hash_id);
    unsigned char digest[64];
    size_t size = (hash->desc >> BR_HASHDESC_OUT_OFF) & BR_HASHDESC_OUT_MASK;
    memcpy(digest, data, size);
    if (ec)
        return room < 160 ? 0 : br_ecdsa_sign_asn1_get_default()(br_ec_get_default(), hash, digest,
                                                                 ec, data);
    if (!rsa || room < (rsa->n_bitlen + 7) / 8) return 0;
    if (!br_rsa_pkcs1_sign_get_default()(tcpsrv__hash_oid(hash_id), digest, size, rsa, data))
        return 0;
    return (rsa->n_bitlen + 7) / 8;
}

/* One signature tells whether the key belongs to the certificate, and is sound in all its parts. */
static TCPSRV__COLD int tcpsrv__pair_matches(const tcpsrv__pair *pair, const br_x509_pkey *key) {
    unsigned char digest[32], signature[512], back[32];
    size_t size;
    memset(digest, 0x5a, sizeof digest);
    memcpy(signature, digest, sizeof digest);
    if (pair->type == BR_KEYTYPE_EC &&
        br_skey_decoder_get_ec(pair->key)->curve != key->key.ec.curve)
        return 0;
    size = tcpsrv__pair_sign(pair, br_sha256_ID, signature, sizeof signature);
    if (!size) return 0;
    if (pair->type == BR_KEYTYPE_EC)
        return br_ecdsa_vrfy_asn1_get_default()(br_ec_get_default(), digest, sizeof digest,
                                                &key->key.ec, signature, size) == 1;
    return br_rsa_pkcs1_vrfy_get_default()(signature, size, BR_HASH_OID_SHA256, sizeof back,
                                           &key->key.rsa, back) == 1 &&
           memcmp(back, digest, sizeof back) == 0;
}

static TCPSRV__COLD int tcpsrv__pair_check(tcpsrv__pair *pair, const char *place,
                                           const br_x509_pkey *key) {
    int type = br_skey_decoder_key_type(pair->key);
    if (type != pair->type)
        return tcpsrv__tls_fail("private key is %s but the certificate in %s is %s",
                                type == BR_KEYTYPE_RSA ? "RSA" : "EC", place,
                                pair->type == BR_KEYTYPE_RSA ? "RSA" : "EC");
    if (!tcpsrv__pair_matches(pair, key))
        return tcpsrv__tls_fail("private key does not belong to the certificate in %s", place);
    return 0;
}

static TCPSRV__COLD int tcpsrv__pair_name(tcpsrv__pair *pair, const char *name) {
    size_t size;
    if (!name) return 0;
    size = strlen(name);
    tcpsrv__free(pair->names);
    pair->names = (char *)tcpsrv__alloc(size + 2);
    if (!pair->names) return tcpsrv__tls_fail("%s: %s", name, strerror(ENOMEM));
    memcpy(pair->names, name, size);
    return 0;
}

static TCPSRV__COLD int tcpsrv__pair_read_key(const tcpsrv_tls *tls, tcpsrv__pair *pair,
                                              const tcpsrv_certificate *from) {
    int in_memory = from->certificate_pem != NULL;
    const char *text = from->key_pem ? from->key_pem : from->certificate_pem;
    const char *place = from->key_file ? from->key_file : from->certificate_file;
    char doubt[64];
    tcpsrv__pem pem;
    unsigned mode = 0;
    int err;
    if (in_memory) place = from->key_pem ? "key_pem" : "certificate_pem";
    err = tcpsrv__pem_open(&pem, text, place, &mode);
    if (err) return err;
    snprintf(doubt, sizeof doubt, "the private key may be read by others (mode %03o)",
             mode & 0777);
    if (mode & 077) err = tcpsrv__tls_doubt(tls, place, doubt);
    if (!err) err = tcpsrv__key_read(pair, &pem);
    tcpsrv__pem_close(&pem);
    return err;
}

static TCPSRV__COLD int tcpsrv__pair_load(const tcpsrv_tls *tls, tcpsrv__pair *pair,
                                          const tcpsrv_certificate *from) {
    const char *place = from->certificate_pem ? "certificate_pem" : from->certificate_file;
    br_x509_decoder_context decoder;
    tcpsrv__pem pem;
    unsigned mode;
    int err;
    if (!place) return tcpsrv__tls_fail("a certificate needs certificate_file or certificate_pem");
    err = tcpsrv__pem_open(&pem, from->certificate_pem, place, &mode);
    if (err) return err;
    err = tcpsrv__chain_read(pair, &pem);
    tcpsrv__pem_close(&pem);
    if (!err) err = tcpsrv__leaf_check(tls, pair, place, &decoder);
    if (!err) err = tcpsrv__pair_read_key(tls, pair, from);
    if (!err) err = tcpsrv__pair_check(pair, place, &decoder.pkey);
    return err ? err : tcpsrv__pair_name(pair, from->server_name);
}

/* ---- whom to trust --------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__anchors_free(tcpsrv_tls *tls) {
    size_t i;
    for (i = 0; i < tls->anchor_count; i++) tcpsrv__free(tls->anchors[i].dn.data);
    tcpsrv__free(tls->anchors);
    tls->anchors = NULL;
    tls->anchor_count = 0;
}

/* A copy that lies behind what is there already. */
static unsigned char *tcpsrv__copy_behind(unsigned char **at, const void *data, size_t size) {
    unsigned char *copy = *at;
    memcpy(copy, data, size);
    *at += size;
    return copy;
}

/* Name and key of an authority in one piece of memory. */
static TCPSRV__COLD int tcpsrv__anchor_fill(br_x509_trust_anchor *anchor, const br_x509_pkey *key,
                                            const tcpsrv__span *name) {
    size_t name_size = tcpsrv__span_size(name);
    unsigned char *memory;
    int rsa = key->key_type == BR_KEYTYPE_RSA;
    size_t key_size = rsa ? key->key.rsa.nlen + key->key.rsa.elen : key->key.ec.qlen;
    memory = (unsigned char *)TCPSERVER_REALLOC(NULL, name_size + key_size);
    if (!memory) return -ENOMEM;
    anchor->dn.data = tcpsrv__copy_behind(&memory, name->at, name_size);
    anchor->dn.len = name_size;
    anchor->pkey = *key;
    if (rsa) {
        anchor->pkey.key.rsa.n = tcpsrv__copy_behind(&memory, key->key.rsa.n, key->key.rsa.nlen);
        anchor->pkey.key.rsa.e = tcpsrv__copy_behind(&memory, key->key.rsa.e, key->key.rsa.elen);
    } else {
        anchor->pkey.key.ec.q = tcpsrv__copy_behind(&memory, key->key.ec.q, key->key.ec.qlen);
    }
    return 0;
}

/* Adds a certificate to those that are trusted; one that the engine cannot use is left out. */
static TCPSRV__COLD int tcpsrv__anchor_add(tcpsrv_tls *tls, const tcpsrv__pem *pem) {
    br_x509_decoder_context decoder;
    tcpsrv__certificate_parts parts;
    const br_x509_pkey *key;
    br_x509_trust_anchor *grown;
    size_t n = tls->anchor_count;
    br_x509_decoder_init(&decoder, NULL, NULL);
    br_x509_decoder_push(&decoder, pem->der, pem->der_size);
    key = br_x509_decoder_get_pkey(&decoder);
    if (!key || tcpsrv__certificate_split(pem->der, pem->der_size, &parts) != 0) return 0;
    if ((n & (n - 1)) == 0) { /* full: rooms are powers of two */
        grown = (br_x509_trust_anchor *)TCPSERVER_REALLOC(tls->anchors,
                                                          (n ? 2 * n : 1) * sizeof *grown);
        if (!grown) return -ENOMEM;
        tls->anchors = grown;
    }
    memset(&tls->anchors[n], 0, sizeof tls->anchors[n]);
    if (tcpsrv__anchor_fill(&tls->anchors[n], key, &parts.name) != 0) return -ENOMEM;
    tls->anchors[n].flags = br_x509_decoder_isCA(&decoder) ? BR_X509_TA_CA : 0;
    tls->anchor_count++;
    return 0;
}

static TCPSRV__COLD int tcpsrv__anchors_load(tcpsrv_tls *tls, const char *text,
                                             const char *place) {
    tcpsrv__pem pem;
    unsigned mode;
    int n = tcpsrv__pem_open(&pem, text, place, &mode), err = 0;
    if (n) return n;
    while (!err && (n = tcpsrv__pem_next(&pem)) == 1)
        if (tcpsrv__pem_is_certificate(&pem) && tcpsrv__anchor_add(tls, &pem) != 0)
            err = tcpsrv__tls_fail("%s: %s", place, strerror(ENOMEM));
    tcpsrv__pem_close(&pem);
    if (err || n < 0) return err ? err : n;
    return tls->anchor_count ? 0 : tcpsrv__tls_fail("%s: no certificate of an authority with a key "
                                                    "that works (RSA, EC)", place);
}

/* A client without a file of its own trusts whom the system trusts. */
static TCPSRV__COLD int tcpsrv__anchors_of_system(tcpsrv_tls *tls) {
    static const char *const places[2] = { "/etc/ssl/certs/ca-certificates.crt",
                                           "/etc/ssl/cert.pem" };
    const char *own = getenv("SSL_CERT_FILE");
    size_t size = 0;
    unsigned mode;
    int i;
    if (own && *own) return tcpsrv__anchors_load(tls, NULL, own);
    for (i = 0; i < 2; i++)
        if (tcpsrv__sys_read_file(places[i], NULL, &size, &mode) == 0)
            return tcpsrv__anchors_load(tls, NULL, places[i]);
    return tcpsrv__tls_fail("no ca_file, and the system has no bundle in %s or %s", places[0],
                            places[1]);
}

/* ---- making a configuration ------------------------------------------------------------------ */

/* What the processor does fast comes first: without its help AES is slower than ChaCha20. */
static const uint16_t tcpsrv__suites_aes[6] = {
    BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
};
static const uint16_t tcpsrv__suites_chacha[6] = {
    BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
};

static const char *tcpsrv__suite_name(unsigned suite) {
    switch (suite) {
    case 0xc02b: return "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
    case 0xc02f: return "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256";
    case 0xc02c: return "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384";
    case 0xc030: return "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384";
    case 0xcca9: return "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256";
    case 0xcca8: return "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256";
    default: return "";
    }
}

/* What both roles have in common. */
static TCPSRV__COLD void tcpsrv__template_fill(const tcpsrv_tls *tls,
                                               br_ssl_engine_context *core) {
    int aes = br_aes_x86ni_ctr_get_vtable() && br_ghash_pclmul_get();
    br_ssl_engine_set_versions(core, BR_TLS12, BR_TLS12);
    br_ssl_engine_set_suites(core, aes ? tcpsrv__suites_aes : tcpsrv__suites_chacha, 6);
    br_ssl_engine_set_default_ec(core);
    br_ssl_engine_set_default_rsavrfy(core);
    br_ssl_engine_set_default_ecdsa(core);
    br_ssl_engine_set_default_aes_gcm(core);
    br_ssl_engine_set_default_chapol(core);
    br_ssl_engine_set_hash(core, br_sha256_ID, &br_sha256_vtable);
    br_ssl_engine_set_hash(core, br_sha384_ID, &br_sha384_vtable);
    br_ssl_engine_set_hash(core, br_sha512_ID, &br_sha512_vtable);
    br_ssl_engine_set_prf_sha256(core, br_tls12_sha256_prf);
    br_ssl_engine_set_prf_sha384(core, br_tls12_sha384_prf);
    br_ssl_engine_set_all_flags(core, BR_OPT_ENFORCE_SERVER_PREFERENCES |
                                          BR_OPT_NO_RENEGOTIATION);
    if (tls->alpn_count) br_ssl_engine_set_protocol_names(core, tls->alpn, tls->alpn_count);
}

static TCPSRV__COLD void tcpsrv__tls_templates(tcpsrv_tls *tls) {
    br_ssl_server_zero(&tls->server);
    tcpsrv__template_fill(tls, &tls->server.eng);
    if (tls->client_certificates != TCPSRV_TLS_NONE)
        br_ssl_server_set_trust_anchor_names_alt(&tls->server, tls->anchors, tls->anchor_count);
    if (tls->client_certificates == TCPSRV_TLS_OPTIONAL)
        br_ssl_engine_add_flags(&tls->server.eng, BR_OPT_TOLERATE_NO_CLIENT_AUTH);
    br_ssl_client_zero(&tls->client);
    tcpsrv__template_fill(tls, &tls->client.eng);
}

static TCPSRV__COLD int tcpsrv__alpn_copy(tcpsrv_tls *tls, const char *const *names) {
    size_t n = 0, size;
    char *copy;
    if (!names) return 0;
    tls->alpn = (const char **)tcpsrv__alloc(TCPSRV__TLS_ALPN_MAX * sizeof *tls->alpn);
    for (; names[n]; n++) {
        size = strlen(names[n]);
        if (!size || size > 255)
            return tcpsrv__tls_fail("alpn: a name has 1 to 255 bytes, name %d has %u", (int)n + 1,
                                    (unsigned)size);
        if (n == TCPSRV__TLS_ALPN_MAX)
            return tcpsrv__tls_fail("alpn: more than %d names", TCPSRV__TLS_ALPN_MAX);
        copy = tls->alpn ? (char *)TCPSERVER_REALLOC(NULL, size + 1) : NULL;
        if (!copy) return tcpsrv__tls_fail("alpn: %s", strerror(ENOMEM));
        memcpy(copy, names[n], size + 1);
        tls->alpn[tls->alpn_count++] = copy;
    }
    return 0;
}

static TCPSRV__COLD int tcpsrv__pairs_load(tcpsrv_tls *tls, const tcpsrv_tls_options *options) {
    size_t i;
    int err = 0;
    if (!options->certificate_count) return 0;
    tls->pairs = (tcpsrv__pair *)tcpsrv__alloc(options->certificate_count * sizeof *tls->pairs);
    if (!tls->pairs) return tcpsrv__tls_fail("certificates: %s", strerror(ENOMEM));
    for (i = 0; i < options->certificate_count && !err; i++) {
        tls->pair_count++; /* also a half-filled one is freed */
        err = tcpsrv__pair_load(tls, &tls->pairs[i], &options->certificates[i]);
    }
    return err;
}

static TCPSRV__COLD int tcpsrv__tls_load(tcpsrv_tls *tls, const tcpsrv_tls_options *options) {
    int err = tcpsrv__alpn_copy(tls, options->alpn);
    if (!err) err = tcpsrv__pairs_load(tls, options);
    if (err) return err;
    if (options->ca_file || options->ca_pem)
        return tcpsrv__anchors_load(tls, options->ca_pem,
                                    options->ca_pem ? "ca_pem" : options->ca_file);
    if (tls->client_certificates != TCPSRV_TLS_NONE)
        return tcpsrv__tls_fail("client certificates need a ca_file, so that they can be verified");
    if (!tls->pair_count && !tls->no_verify) return tcpsrv__anchors_of_system(tls);
    return 0;
}

static TCPSRV__COLD void tcpsrv__session_clear(tcpsrv__session *session) {
    tcpsrv__free(session->peer);
    tcpsrv__wipe(session, sizeof *session);
}

static TCPSRV__COLD void tcpsrv__tls_destroy(tcpsrv_tls *tls) {
    size_t i;
    for (i = 0; i < tls->pair_count; i++) tcpsrv__pair_free(&tls->pairs[i]);
    for (i = 0; i < tls->alpn_count; i++) tcpsrv__free((void *)(uintptr_t)tls->alpn[i]);
    for (i = 0; tls->sessions && i < tls->session_count; i++)
        tcpsrv__session_clear(&tls->sessions[i]);
    tcpsrv__anchors_free(tls);
    tcpsrv__free(tls->sessions);
    tcpsrv__free(tls->pairs);
    tcpsrv__free(tls->alpn);
    pthread_mutex_destroy(&tls->lock);
    tcpsrv__free(tls);
}

static TCPSRV__COLD tcpsrv_tls *tcpsrv__tls_hold(tcpsrv_tls *tls) {
    pthread_mutex_lock(&tls->lock);
    tls->refs++;
    pthread_mutex_unlock(&tls->lock);
    return tls;
}

TCPSRV_IMPL void tcpsrv_tls_free(tcpsrv_tls *tls) {
    size_t left;
    if (!tls) return;
    pthread_mutex_lock(&tls->lock);
    left = --tls->refs;
    pthread_mutex_unlock(&tls->lock);
    if (!left) tcpsrv__tls_destroy(tls);
}

static TCPSRV__COLD size_t tcpsrv__session_room(const tcpsrv_tls_options *options) {
    size_t count = options->session_cache > 0 ? (size_t)options->session_cache : 0;
    if (options->session_cache == 0 && options->client_certificates != TCPSRV_TLS_REQUIRED)
        count = TCPSRV__SESSIONS;
    return (count + TCPSRV__SESSION_WAYS - 1) / TCPSRV__SESSION_WAYS * TCPSRV__SESSION_WAYS;
}

TCPSRV_IMPL tcpsrv_tls *tcpsrv_tls_new(const tcpsrv_tls_options *options) {
    tcpsrv_tls *tls = (tcpsrv_tls *)tcpsrv__alloc(sizeof *tls);
    uint64_t ttl_s = options->session_ttl_s;
    if (!tls || pthread_mutex_init(&tls->lock, NULL) != 0) {
        tcpsrv__free(tls);
        tcpsrv__fail(-ENOMEM, "tls_new", NULL);
        return NULL;
    }
    tls->refs = 1;
    tls->session_count = tcpsrv__session_room(options);
    tls->session_ttl_ns = (ttl_s ? ttl_s : (uint64_t)TCPSRV__SESSION_TTL_S) * 1000000000u;
    tls->client_certificates = options->client_certificates;
    tls->no_verify = options->no_verify;
    tls->strict = options->strict;
    tls->on_sni = options->on_sni;
    tls->log = options->log;
    tls->user = options->user;
    if (tcpsrv__tls_load(tls, options) == 0) {
        tcpsrv__tls_templates(tls);
        return tls;
    }
    tcpsrv__tls_destroy(tls);
    return NULL;
}

/* ---- the first record ------------------------------------------------------------------------ */

enum { TCPSRV__ALPN_NONE, TCPSRV__ALPN_OURS, TCPSRV__ALPN_FOREIGN };

typedef struct tcpsrv__hello {      /* what a ClientHello says, RFC 5246 7.4.1.2 */
    tcpsrv__span name;              /* server name; at NULL: none */
    int version;                    /* the highest that the client takes as its own */
    int knows_tls12;
    int alpn;
    int whole;                      /* all of it was in the record, and well formed */
} tcpsrv__hello;

/* A list behind its size. 0 or -1. */
static int tcpsrv__span_list(tcpsrv__span *from, int size_bytes, tcpsrv__span *list) {
    return tcpsrv__span_take(from, tcpsrv__span_number(from, size_bytes), list);
}

static void tcpsrv__hello_name(tcpsrv__span at, tcpsrv__hello *hello) {
    tcpsrv__span list, name;
    if (tcpsrv__span_list(&at, 2, &list) != 0) return;
    while (tcpsrv__span_size(&list) > 0)
        if (tcpsrv__span_number(&list, 1) == 0 && tcpsrv__span_list(&list, 2, &name) == 0 &&
            tcpsrv__span_size(&name) < 256) {
            hello->name = name;
            return;
        }
}

static int tcpsrv__alpn_has(const tcpsrv_tls *tls, const tcpsrv__span *name) {
    size_t i, size = tcpsrv__span_size(name);
    for (i = 0; i < tls->alpn_count; i++)
        if (strlen(tls->alpn[i]) == size && memcmp(tls->alpn[i], name->at, size) == 0) return 1;
    return 0;
}

/* Foreign as long as no name is ours, and for ever when the extension is there twice. */
static void tcpsrv__hello_alpn(const tcpsrv_tls *tls, tcpsrv__span at, tcpsrv__hello *hello) {
    tcpsrv__span list, name;
    int again = hello->alpn != TCPSRV__ALPN_NONE;
    hello->alpn = TCPSRV__ALPN_FOREIGN;
    if (again || tcpsrv__span_list(&at, 2, &list) != 0 || at.at != at.end) return;
    while (tcpsrv__span_size(&list) > 0) {
        if (tcpsrv__span_list(&list, 1, &name) != 0) {
            hello->alpn = TCPSRV__ALPN_FOREIGN;
            return;
        }
        if (tcpsrv__alpn_has(tls, &name)) hello->alpn = TCPSRV__ALPN_OURS;
    }
}

static void tcpsrv__hello_versions(tcpsrv__span at, tcpsrv__hello *hello) {
    tcpsrv__span list;
    if (tcpsrv__span_list(&at, 1, &list) != 0) return;
    hello->knows_tls12 = 0;
    while (tcpsrv__span_size(&list) > 1)
        if (tcpsrv__span_number(&list, 2) == 0x0303) hello->knows_tls12 = 1;
}

static void tcpsrv__hello_extensions(const tcpsrv_tls *tls, tcpsrv__span *at,
                                     tcpsrv__hello *hello) {
    tcpsrv__span list, one;
    long kind;
    if (tcpsrv__span_list(at, 2, &list) != 0) return;
    while (tcpsrv__span_size(&list) > 0) {
        kind = tcpsrv__span_number(&list, 2);
        if (kind < 0 || tcpsrv__span_list(&list, 2, &one) != 0) return;
        if (kind == 0 && !hello->name.at) tcpsrv__hello_name(one, hello);
        else if (kind == 16) tcpsrv__hello_alpn(tls, one, hello);
        else if (kind == 43) tcpsrv__hello_versions(one, hello);
    }
    hello->whole = at->at == at->end;
}

/* Reads the first record of a connection, of which 5 + its length bytes are there. */
static void tcpsrv__hello_read(const tcpsrv_tls *tls, const unsigned char *record, size_t size,
                               tcpsrv__hello *hello) {
    tcpsrv__span at, body, skipped;
    memset(hello, 0, sizeof *hello);
    at.at = record + 5;
    at.end = record + size;
    if (tcpsrv__span_number(&at, 1) != 1 || tcpsrv__span_list(&at, 3, &body) != 0) {
        hello->version = 0x0303; /* no hello, or a part of one: the engine's matter */
        hello->knows_tls12 = 1;
        return;
    }
    hello->version = (int)tcpsrv__span_number(&body, 2);
    hello->knows_tls12 = 1;
    if (tcpsrv__span_take(&body, 32, &skipped) != 0) return;    /* random */
    if (tcpsrv__span_list(&body, 1, &skipped) != 0) return;     /* session id */
    if (tcpsrv__span_list(&body, 2, &skipped) != 0) return;     /* suites */
    if (tcpsrv__span_list(&body, 1, &skipped) != 0) return;     /* compression */
    hello->whole = body.at == body.end;
    if (!hello->whole) tcpsrv__hello_extensions(tls, &body, hello);
}

/* How many bytes the record has that begins like this; 0: not known yet; -1: it is not TLS. */
static long tcpsrv__record_size(const unsigned char *data, size_t size) {
    long length;
    if (size > 0 && data[0] != 22) return -1;
    if (size > 1 && data[1] != 3) return -1;
    if (size < 5) return 0;
    length = (long)data[3] << 8 | data[4];
    return length < 4 || length > 16384 ? -1 : 5 + length;
}

/* ---- the engine ------------------------------------------------------------------------------ */

enum {
    TCPSRV__ENGINE_DONE = 1,        /* the handshake is over */
    TCPSRV__ENGINE_HAS_OUT = 2,     /* ciphertext to be sent */
    TCPSRV__ENGINE_HAS_PLAIN = 4,   /* plaintext to be read */
    TCPSRV__ENGINE_ENDED = 8,       /* by close_notify; and then nothing can be written either */
    TCPSRV__ENGINE_FAILED = 16,
    TCPSRV__RECORDS_SIZE = BR_SSL_BUFSIZE_BIDI,
    TCPSRV__RECORDS_KEEP = 16
};

typedef struct tcpsrv__records {    /* memory for records, shared by the connections of a loop */
    unsigned char *spare[TCPSRV__RECORDS_KEEP];
    unsigned count;
} tcpsrv__records;

typedef struct tcpsrv__verifier {   /* stands before BearSSL's own verification, for a handshake */
    const br_x509_class *vtable;
    struct tcpsrv__engine *engine;
    unsigned char *leaf;
    size_t leaf_size, leaf_room, count;
    unsigned usages;
    union {
        br_x509_minimal_context minimal;
        br_x509_decoder_context decoder;    /* where nothing is verified */
    } by;
} tcpsrv__verifier;

enum { TCPSRV__ALERT_SIZE = 7, TCPSRV__OWN_SIZE = 192 };

typedef struct tcpsrv__engine {
    br_ssl_engine_context *core;    /* in the context below */
    tcpsrv_tls *tls;
    tcpsrv__records *pool;
    unsigned char *records;         /* NULL while it is idle */
    unsigned char *first;           /* the first record as it comes; NULL once it was read */
    size_t first_size, first_room;
    tcpsrv__verifier *verifier;     /* until the end of the handshake */
    tcpsrv__identity *peer;
    int error;
    int pair;                       /* that on_sni chose; -1: the names decide */
    int refused;                    /* what the verifier found; takes effect with the record */
    unsigned char is_client, started, done, ended, resumed, speaks, asked;
    unsigned char ip_size, ip[16];  /* of the host, where it was given as an address */
    unsigned char own[TCPSRV__OWN_SIZE], own_begin, own_end; /* short records that go first */
    unsigned char name[32];         /* hash of the server name that the client asked for */
    const br_ssl_server_policy_class *policy;
    const br_ssl_session_cache_class *cache;
    union {
        br_ssl_server_context server;
        br_ssl_client_context client;
    } context;
} tcpsrv__engine;

static TCPSRV__COLD void tcpsrv__engine_fail(tcpsrv__engine *engine, int code);

static unsigned char *tcpsrv__records_take(tcpsrv__records *pool) {
    if (pool->count) return pool->spare[--pool->count];
    return (unsigned char *)TCPSERVER_REALLOC(NULL, TCPSRV__RECORDS_SIZE);
}

static void tcpsrv__records_give(tcpsrv__records *pool, unsigned char *records) {
    if (pool->count < TCPSRV__RECORDS_KEEP) pool->spare[pool->count++] = records;
    else tcpsrv__free(records);
}

static TCPSRV__COLD void tcpsrv__records_free(tcpsrv__records *pool) {
    while (pool->count) tcpsrv__free(pool->spare[--pool->count]);
}

/* ---- the engine: which certificate ----------------------------------------------------------- */

static int tcpsrv__lower(int letter) {
    return letter >= 'A' && letter <= 'Z' ? letter + 32 : letter;
}

static int tcpsrv__same_name(const char *a, const char *b) {
    while (*a && tcpsrv__lower(*a) == tcpsrv__lower(*b)) a++, b++;
    return *a == *b;
}

/* "*.example.org" stands for names with one label more (RFC 6125 6.4.3). */
static int tcpsrv__name_matches(const char *pattern, const char *name) {
    const char *dot = strchr(name, '.');
    if (pattern[0] != '*' || pattern[1] != '.') return tcpsrv__same_name(pattern, name);
    return dot && dot != name && tcpsrv__same_name(pattern + 1, dot);
}

static int tcpsrv__pair_is_for(const tcpsrv__pair *pair, const char *name) {
    const char *own = pair->names;
    for (; *own; own += strlen(own) + 1)
        if (tcpsrv__name_matches(own, name)) return 1;
    return 0;
}

/* The best hash that the client takes for a signature of that kind; 0: none. */
static unsigned tcpsrv__signing_hash(const br_ssl_server_context *core, int type) {
    uint32_t hashes = br_ssl_server_get_client_hashes(core) >> (type == BR_KEYTYPE_EC ? 8 : 0);
    unsigned id;
    for (id = br_sha256_ID; id <= br_sha512_ID; id++)
        if (hashes & (uint32_t)1 << id) return id;
    return 0;
}

/* Whether the client can do with that pair; fills in the choice. */
static int tcpsrv__pair_suits(const tcpsrv__pair *pair, const br_ssl_server_context *core,
                              br_ssl_server_choices *choices) {
    unsigned wanted = pair->type == BR_KEYTYPE_EC ? BR_SSLKEYX_ECDHE_ECDSA : BR_SSLKEYX_ECDHE_RSA;
    unsigned hash = tcpsrv__signing_hash(core, pair->type);
    const br_ec_private_key *ec = br_skey_decoder_get_ec(pair->key);
    const br_suite_translated *suites;
    size_t i, count;
    if (!hash) return 0;
    if (ec && !(br_ssl_server_get_client_curves(core) >> ec->curve & 1)) return 0;
    suites = br_ssl_server_get_client_suites(core, &count);
    for (i = 0; i < count && (unsigned)(suites[i][1] >> 12) != wanted; i++) continue;
    if (i == count) return 0;
    choices->cipher_suite = suites[i][0];
    choices->algo_id = 0xff00u + hash;
    choices->chain = pair->chain;
    choices->chain_len = pair->chain_length;
    return 1;
}

/* Asks on_sni, once. 0, or the refusal. */
static TCPSRV__COLD int tcpsrv__engine_ask_name(tcpsrv__engine *engine, const char *name) {
    tcpsrv_tls *tls = engine->tls;
    int index;
    if (engine->asked || !tls->on_sni) return 0;
    engine->asked = 1;
    index = tls->on_sni(tls->user, name);
    if (index < 0 || (size_t)index >= tls->pair_count) return TCPSRV_ETLS_NAME;
    engine->pair = index;
    return 0;
}

static int tcpsrv__policy_choose(const br_ssl_server_policy_class **policy,
                                 const br_ssl_server_context *core,
                                 br_ssl_server_choices *choices) {
    tcpsrv__engine *engine = TCPSRV__CONTAINER(tcpsrv__engine, policy, policy);
    const tcpsrv_tls *tls = engine->tls;
    const char *name = br_ssl_engine_get_server_name(&core->eng);
    int pass, i, count = (int)tls->pair_count;
    if (engine->resumed) { /* the session would not do after all: nor is its peer known */
        tcpsrv__free(engine->peer);
        engine->peer = NULL;
        engine->resumed = 0;
    }
    if (tcpsrv__engine_ask_name(engine, *name ? name : NULL) != 0) return 0;
    for (pass = 0; pass < 2; pass++)
        for (i = 0; i < count; i++) {
            const tcpsrv__pair *pair = &tls->pairs[i];
            if (engine->pair >= 0 && engine->pair != i) continue;
            if (pass == 0 && engine->pair < 0 && !tcpsrv__pair_is_for(pair, name)) continue;
            if (!tcpsrv__pair_suits(pair, core, choices)) continue;
            engine->pair = i;
            return 1;
        }
    return 0;
}

/* Key exchange by the certificate's own key is not offered. */
static uint32_t tcpsrv__policy_exchange(const br_ssl_server_policy_class **policy,
                                        unsigned char *data, size_t *size) {
    (void)policy, (void)data, (void)size;
    return 0;
}

static size_t tcpsrv__policy_sign(const br_ssl_server_policy_class **policy, unsigned hash,
                                  unsigned char *data, size_t hash_size, size_t room) {
    const tcpsrv__engine *engine = TCPSRV__CONTAINER(tcpsrv__engine, policy, policy);
    (void)hash_size;
    return tcpsrv__pair_sign(&engine->tls->pairs[engine->pair], hash & 0xff, data, room);
}

static const br_ssl_server_policy_class tcpsrv__policy_class = {
    sizeof(tcpsrv__engine), tcpsrv__policy_choose, tcpsrv__policy_exchange, tcpsrv__policy_sign
};

/* ---- the engine: sessions -------------------------------------------------------------------- */

static tcpsrv__identity *tcpsrv__identity_copy(const tcpsrv__identity *from) {
    tcpsrv__identity *copy = from ? (tcpsrv__identity *)tcpsrv__alloc(sizeof *copy) : NULL;
    if (copy) *copy = *from;
    return copy;
}

/* By our own reading of the hello: the engine asks for a session before it knows the name. */
static TCPSRV__COLD void tcpsrv__session_name(tcpsrv__engine *engine, const char *name) {
    br_sha256_context sha;
    br_sha256_init(&sha);
    for (; *name; name++) {
        char letter = (char)tcpsrv__lower(*name);
        br_sha256_update(&sha, &letter, 1);
    }
    br_sha256_out(&sha, engine->name);
}

/* The few places where a session with that id may be; under the lock. */
static tcpsrv__session *tcpsrv__session_set(const tcpsrv_tls *tls, const unsigned char *id) {
    uint32_t number = (uint32_t)id[0] << 24 | (uint32_t)id[1] << 16 | (uint32_t)id[2] << 8 | id[3];
    size_t sets = tls->session_count / TCPSRV__SESSION_WAYS;
    return tls->sessions + number % sets * TCPSRV__SESSION_WAYS;
}

static void tcpsrv__session_expire(const tcpsrv_tls *tls, tcpsrv__session *set) {
    uint64_t now = tcpsrv__clock_ns();
    int i;
    for (i = 0; i < TCPSRV__SESSION_WAYS; i++)
        if (set[i].parameters.session_id_len && now - set[i].born_ns > tls->session_ttl_ns)
            tcpsrv__session_clear(&set[i]);
}

/* The oldest of its set makes room. Without memory for the peer's identity there is no session. */
static void tcpsrv__session_save(const br_ssl_session_cache_class **cache,
                                 br_ssl_server_context *core,
                                 const br_ssl_session_parameters *parameters) {
    tcpsrv__engine *engine = TCPSRV__CONTAINER(tcpsrv__engine, cache, cache);
    tcpsrv_tls *tls = engine->tls;
    tcpsrv__identity *peer = tcpsrv__identity_copy(engine->peer);
    tcpsrv__session *set, *oldest;
    int i;
    (void)core;
    pthread_mutex_lock(&tls->lock);
    if (!tls->sessions)
        tls->sessions = (tcpsrv__session *)tcpsrv__alloc(tls->session_count *
                                                         sizeof *tls->sessions);
    if (tls->sessions && !peer == !engine->peer) {
        set = oldest = tcpsrv__session_set(tls, parameters->session_id);
        tcpsrv__session_expire(tls, set);
        for (i = 1; i < TCPSRV__SESSION_WAYS; i++)
            if (set[i].born_ns < oldest->born_ns) oldest = &set[i];
        tcpsrv__session_clear(oldest);
        oldest->parameters = *parameters;
        oldest->born_ns = tcpsrv__clock_ns();
        oldest->peer = peer;
        memcpy(oldest->name, engine->name, sizeof oldest->name);
        peer = NULL;
    }
    pthread_mutex_unlock(&tls->lock);
    tcpsrv__free(peer);
}

/* A session goes on only for the name that it was made for, and keeps its peer's identity. */
static int tcpsrv__session_load(const br_ssl_session_cache_class **cache,
                                br_ssl_server_context *core,
                                br_ssl_session_parameters *parameters) {
    tcpsrv__engine *engine = TCPSRV__CONTAINER(tcpsrv__engine, cache, cache);
    tcpsrv_tls *tls = engine->tls;
    tcpsrv__session *set;
    int i, found = 0;
    (void)core;
    pthread_mutex_lock(&tls->lock);
    set = tls->sessions ? tcpsrv__session_set(tls, parameters->session_id) : NULL;
    if (set) tcpsrv__session_expire(tls, set);
    for (i = 0; set && i < TCPSRV__SESSION_WAYS && !found; i++) {
        tcpsrv__identity *peer;
        if (!set[i].parameters.session_id_len ||
            memcmp(set[i].parameters.session_id, parameters->session_id, 32) != 0 ||
            memcmp(set[i].name, engine->name, sizeof engine->name) != 0)
            continue;
        peer = tcpsrv__identity_copy(set[i].peer);
        if (!peer != !set[i].peer) break;
        *parameters = set[i].parameters;
        engine->peer = peer;
        found = 1;
    }
    pthread_mutex_unlock(&tls->lock);
    engine->resumed = found ? 1 : 0;
    return found;
}

static const br_ssl_session_cache_class tcpsrv__session_class = {
    sizeof(tcpsrv__engine), tcpsrv__session_save, tcpsrv__session_load
};

/* ---- the engine: the peer's certificate ------------------------------------------------------ */

static tcpsrv__verifier *tcpsrv__verifier_of(const br_x509_class *const *vtable) {
    return (tcpsrv__verifier *)(uintptr_t)vtable; /* its first field */
}

static void tcpsrv__verifier_start(const br_x509_class **vtable, const char *host) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    verifier->count = verifier->leaf_size = 0;
    if (!verifier->engine->tls->no_verify)
        verifier->by.minimal.vtable->start_chain(&verifier->by.minimal.vtable, host);
}

static void tcpsrv__verifier_start_one(const br_x509_class **vtable, uint32_t size) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    if (verifier->count++ == 0 && size <= 65536) {
        tcpsrv__free(verifier->leaf);
        verifier->leaf = (unsigned char *)TCPSERVER_REALLOC(NULL, size + 1);
        verifier->leaf_room = verifier->leaf ? size : 0;
    }
    if (!verifier->engine->tls->no_verify)
        verifier->by.minimal.vtable->start_cert(&verifier->by.minimal.vtable, size);
}

static void tcpsrv__verifier_append(const br_x509_class **vtable, const unsigned char *data,
                                    size_t size) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    if (verifier->count == 1 && verifier->leaf_room - verifier->leaf_size >= size) {
        memcpy(verifier->leaf + verifier->leaf_size, data, size);
        verifier->leaf_size += size;
    }
    if (!verifier->engine->tls->no_verify)
        verifier->by.minimal.vtable->append(&verifier->by.minimal.vtable, data, size);
}

static void tcpsrv__verifier_end_one(const br_x509_class **vtable) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    if (!verifier->engine->tls->no_verify)
        verifier->by.minimal.vtable->end_cert(&verifier->by.minimal.vtable);
}

/* Whether the certificate names the address that the client connects to (RFC 6125 B.2). */
static int tcpsrv__certificate_has_ip(const tcpsrv__certificate_parts *parts,
                                      const tcpsrv__engine *engine) {
    tcpsrv__span list, ip;
    if (tcpsrv__alt_names(parts, &list) != 0) return 0;
    while (tcpsrv__alt_name_next(&list, TCPSRV__ALT_IP, &ip) == 0)
        if (tcpsrv__span_size(&ip) == engine->ip_size &&
            memcmp(ip.at, engine->ip, engine->ip_size) == 0)
            return 1;
    return 0;
}

/* What the engine's verification leaves out: usage, and hosts that are addresses. */
static unsigned tcpsrv__verifier_judge(tcpsrv__verifier *verifier) {
    const tcpsrv__engine *engine = verifier->engine;
    tcpsrv__certificate_parts parts;
    unsigned err = verifier->by.minimal.vtable->end_chain(&verifier->by.minimal.vtable);
    if (err) return err;
    if (tcpsrv__certificate_split(verifier->leaf, verifier->leaf_size, &parts) != 0)
        return BR_ERR_X509_UNSUPPORTED;
    if (!tcpsrv__certificate_serves(&parts, engine->is_client ? 1 : 2))
        return (unsigned)(TCPSRV_ETLS - TCPSRV_ETLS_USAGE);
    if (engine->ip_size && !tcpsrv__certificate_has_ip(&parts, engine))
        return BR_ERR_X509_BAD_SERVER_NAME;
    return 0;
}

static tcpsrv__identity *tcpsrv__identity_new(const tcpsrv__verifier *verifier) {
    tcpsrv__identity *peer = (tcpsrv__identity *)tcpsrv__alloc(sizeof *peer);
    tcpsrv__certificate_parts parts;
    tcpsrv__span list, name;
    br_sha256_context sha;
    if (!peer) return NULL;
    peer->verified = !verifier->engine->tls->no_verify;
    br_sha256_init(&sha);
    br_sha256_update(&sha, verifier->leaf, verifier->leaf_size);
    br_sha256_out(&sha, peer->sha256);
    if (tcpsrv__certificate_split(verifier->leaf, verifier->leaf_size, &parts) != 0) return peer;
    tcpsrv__common_name(parts.subject, peer->name, sizeof peer->name);
    if (tcpsrv__alt_names(&parts, &list) == 0 &&
        tcpsrv__alt_name_next(&list, TCPSRV__ALT_DNS, &name) == 0)
        tcpsrv__span_text(&name, peer->dns, sizeof peer->dns);
    return peer;
}

/* Where nothing is verified only the key is wanted. */
static unsigned tcpsrv__verifier_decode(tcpsrv__verifier *verifier) {
    br_x509_decoder_init(&verifier->by.decoder, NULL, NULL);
    br_x509_decoder_push(&verifier->by.decoder, verifier->leaf, verifier->leaf_size);
    return (unsigned)br_x509_decoder_last_error(&verifier->by.decoder);
}

/* The engine goes on with a bad certificate where one is only optional: what was found is kept,
   and the connection ended by it before anything that the peer says is believed. */
static unsigned tcpsrv__verifier_end(const br_x509_class **vtable) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    tcpsrv__engine *engine = verifier->engine;
    unsigned err;
    if (!verifier->count) return BR_ERR_X509_EMPTY_CHAIN;
    if (verifier->leaf && engine->tls->no_verify) err = tcpsrv__verifier_decode(verifier);
    else err = verifier->leaf ? tcpsrv__verifier_judge(verifier) : BR_ERR_X509_LIMIT_EXCEEDED;
    if (!err) {
        tcpsrv__free(engine->peer);
        engine->peer = tcpsrv__identity_new(verifier);
        if (!engine->peer) err = BR_ERR_X509_LIMIT_EXCEEDED;
    }
    if (err) engine->refused = TCPSRV_ETLS - (int)err;
    return err;
}

static const br_x509_pkey *tcpsrv__verifier_key(const br_x509_class *const *vtable,
                                                unsigned *usages) {
    tcpsrv__verifier *verifier = tcpsrv__verifier_of(vtable);
    const br_x509_class *const *own = &verifier->by.minimal.vtable;
    if (!verifier->engine->tls->no_verify) return (*own)->get_pkey(own, usages);
    if (usages) *usages = BR_KEYTYPE_SIGN;
    return br_x509_decoder_get_pkey(&verifier->by.decoder);
}

static const br_x509_class tcpsrv__verifier_class = {
    sizeof(tcpsrv__verifier), tcpsrv__verifier_start, tcpsrv__verifier_start_one,
    tcpsrv__verifier_append, tcpsrv__verifier_end_one, tcpsrv__verifier_end, tcpsrv__verifier_key
};

static TCPSRV__COLD int tcpsrv__verifier_make(tcpsrv__engine *engine) {
    tcpsrv__verifier *verifier = (tcpsrv__verifier *)tcpsrv__alloc(sizeof *verifier);
    br_x509_minimal_context *minimal;
    unsigned id;
    if (!verifier) return -ENOMEM;
    minimal = &verifier->by.minimal;
    verifier->vtable = &tcpsrv__verifier_class;
    verifier->engine = engine;
    engine->verifier = verifier;
    br_ssl_engine_set_x509(engine->core, &verifier->vtable);
    if (engine->tls->no_verify) return 0;
    br_x509_minimal_init(minimal, &br_sha256_vtable, engine->tls->anchors,
                         engine->tls->anchor_count);
    br_x509_minimal_set_rsa(minimal, br_ssl_engine_get_rsavrfy(engine->core));
    br_x509_minimal_set_ecdsa(minimal, br_ssl_engine_get_ec(engine->core),
                              br_ssl_engine_get_ecdsa(engine->core));
    br_x509_minimal_set_minrsa(minimal, 2048 / 8);
    for (id = br_sha256_ID; id <= br_sha512_ID; id++)
        br_x509_minimal_set_hash(minimal, (int)id, tcpsrv__hash_of(id));
    return 0;
}

static TCPSRV__COLD void tcpsrv__verifier_free(tcpsrv__engine *engine) {
    if (engine->verifier) tcpsrv__free(engine->verifier->leaf);
    tcpsrv__free(engine->verifier);
    engine->verifier = NULL;
}

/* ---- the engine: life ------------------------------------------------------------------------ */

/* Memory for its records, before anything else is asked of it; until the first record is whole it
   needs none. 0 or -ENOMEM. */
static int tcpsrv__engine_wake(tcpsrv__engine *engine) {
    if (engine->records || !engine->started) return 0;
    engine->records = tcpsrv__records_take(engine->pool);
    if (!engine->records) return -ENOMEM;
    engine->core->ibuf = engine->records;
    engine->core->obuf = engine->records + BR_SSL_BUFSIZE_INPUT;
    return 0;
}

/* Between two records the engine has nothing in them: they go back to the pool. */
static void tcpsrv__engine_rest(tcpsrv__engine *engine) {
    size_t size = 0;
    if (!engine->records || !engine->started) return;
    if (!engine->error && !engine->ended &&
        (engine->core->ixa || engine->core->ixb || /* how far it is in a record that comes */
         br_ssl_engine_sendrec_buf(engine->core, &size) ||
         br_ssl_engine_recvapp_buf(engine->core, &size)))
        return;
    if (!engine->error && engine->ended && br_ssl_engine_sendrec_buf(engine->core, &size)) return;
    engine->core->ibuf = engine->core->obuf = NULL;
    tcpsrv__records_give(engine->pool, engine->records);
    engine->records = NULL;
}

/* Numeric hosts are no server names (RFC 6066 3): they are looked for in the certificate. */
static TCPSRV__COLD void tcpsrv__engine_set_ip(tcpsrv__engine *engine, const char *host) {
    if (!host) return;
    if (inet_pton(AF_INET, host, engine->ip) == 1) engine->ip_size = 4;
    else if (inet_pton(AF_INET6, host, engine->ip) == 1) engine->ip_size = 16;
}

static TCPSRV__COLD void tcpsrv__engine_show_pair(tcpsrv__engine *engine) {
    br_ssl_client_context *client = &engine->context.client;
    const tcpsrv__pair *pair = &engine->tls->pairs[0];
    const br_ec_private_key *ec = br_skey_decoder_get_ec(pair->key);
    if (ec)
        br_ssl_client_set_single_ec(client, pair->chain, pair->chain_length, ec, BR_KEYTYPE_SIGN,
                                    BR_KEYTYPE_EC, br_ec_get_default(),
                                    br_ecdsa_sign_asn1_get_default());
    else
        br_ssl_client_set_single_rsa(client, pair->chain, pair->chain_length,
                                     br_skey_decoder_get_rsa(pair->key),
                                     br_rsa_pkcs1_sign_get_default());
}

/* Randomness from the system for each connection: also in a child that was forked before it. */
static TCPSRV__COLD int tcpsrv__engine_start(tcpsrv__engine *engine, const char *host,
                                             int resumable) {
    unsigned char seed[32];
    tcpsrv_tls *tls = engine->tls;
    int err = 0, ok;
    if (engine->is_client) engine->context.client = tls->client;
    else engine->context.server = tls->server;
    if (engine->is_client || tls->client_certificates != TCPSRV_TLS_NONE)
        err = tcpsrv__verifier_make(engine);
    engine->records = tcpsrv__records_take(engine->pool);
    if (!err && !engine->records) err = -ENOMEM;
    if (!err && tcpsrv__sys_random(seed, sizeof seed) != 0) err = TCPSRV_ETLS - BR_ERR_NO_RANDOM;
    if (err) return err;
    br_ssl_engine_set_buffers_bidi(engine->core, engine->records, BR_SSL_BUFSIZE_INPUT,
                                   engine->records + BR_SSL_BUFSIZE_INPUT,
                                   BR_SSL_BUFSIZE_OUTPUT);
    br_ssl_engine_inject_entropy(engine->core, seed, sizeof seed);
    tcpsrv__wipe(seed, sizeof seed);
    if (engine->is_client) {
        if (tls->pair_count) tcpsrv__engine_show_pair(engine);
        tcpsrv__engine_set_ip(engine, host);
        ok = br_ssl_client_reset(&engine->context.client, engine->ip_size ? NULL : host, 0);
    } else {
        br_ssl_server_set_policy(&engine->context.server, &engine->policy);
        if (resumable && tls->session_count)
            br_ssl_server_set_cache(&engine->context.server, &engine->cache);
        ok = br_ssl_server_reset(&engine->context.server);
    }
    engine->started = 1;
    return ok ? 0 : TCPSRV_ETLS - br_ssl_engine_last_error(engine->core);
}

static TCPSRV__COLD void tcpsrv__engine_free(tcpsrv__engine *engine) {
    if (!engine) return;
    if (engine->records) tcpsrv__records_give(engine->pool, engine->records);
    tcpsrv__verifier_free(engine);
    tcpsrv__free(engine->first);
    tcpsrv__free(engine->peer);
    tcpsrv_tls_free(engine->tls);
    tcpsrv__wipe(engine, sizeof *engine);
    tcpsrv__free(engine);
}

/* A server's engine begins with the client's first record; a client's has one to send at once. */
static TCPSRV__COLD int tcpsrv__engine_new(tcpsrv_tls *tls, int is_client, const char *host,
                                           tcpsrv__records *pool, tcpsrv__engine **made) {
    tcpsrv__engine *engine = (tcpsrv__engine *)tcpsrv__alloc(sizeof *engine);
    int err = 0;
    *made = engine;
    if (!engine) return -ENOMEM;
    engine->tls = tcpsrv__tls_hold(tls);
    engine->pool = pool;
    engine->is_client = is_client ? 1 : 0;
    engine->pair = -1;
    engine->policy = &tcpsrv__policy_class;
    engine->cache = &tcpsrv__session_class;
    engine->core = is_client ? &engine->context.client.eng : &engine->context.server.eng;
    if (is_client) err = tcpsrv__engine_start(engine, host, 0);
    if (!err) return 0;
    tcpsrv__engine_free(engine);
    *made = NULL;
    return err;
}

/* ---- the engine: in and out ------------------------------------------------------------------ */

/* An alert by our own hand, where the engine sends none: only while nothing is encrypted. */
static TCPSRV__COLD void tcpsrv__engine_alert(tcpsrv__engine *engine, int number) {
    unsigned char record[TCPSRV__ALERT_SIZE] = { 21, 3, 3, 0, 2, 2, 0 };
    record[2] = engine->started ? 3 : 1; /* before a version was agreed on */
    record[6] = (unsigned char)number;
    memcpy(engine->own + engine->own_end, record, sizeof record);
    engine->own_end = (unsigned char)(engine->own_end + sizeof record);
}

static int tcpsrv__alert_for(int code) {
    switch (TCPSRV_ETLS - code) {
    case BR_ERR_X509_EXPIRED: return BR_ALERT_CERTIFICATE_EXPIRED;
    case BR_ERR_X509_NOT_TRUSTED: return BR_ALERT_UNKNOWN_CA;
    case BR_ERR_NO_CLIENT_AUTH: case BR_ERR_X509_EMPTY_CHAIN: return BR_ALERT_HANDSHAKE_FAILURE;
    case TCPSRV_ETLS - TCPSRV_ETLS_USAGE: return BR_ALERT_UNSUPPORTED_CERTIFICATE;
    case TCPSRV_ETLS - TCPSRV_ETLS_NAME: return 112; /* unrecognized_name */
    case TCPSRV_ETLS - TCPSRV_ETLS_VERSION: return BR_ALERT_PROTOCOL_VERSION;
    default: return BR_ALERT_BAD_CERTIFICATE;
    }
}

/* Whether an alert in clear is in place: not after a change of keys, nor inside a record. */
static int tcpsrv__engine_in_clear(const tcpsrv__engine *engine) {
    size_t size;
    if (!engine->started) return 1;
    return engine->core->out.vtable == &br_sslrec_out_clear_vtable && !engine->done &&
           !br_ssl_engine_sendrec_buf(engine->core, &size);
}

static TCPSRV__COLD void tcpsrv__engine_fail(tcpsrv__engine *engine, int code) {
    int number = TCPSRV_ETLS - code;
    int certificate = (number >= BR_ERR_X509_INVALID_VALUE && number <= BR_ERR_X509_NOT_TRUSTED) ||
                      number == BR_ERR_NO_CLIENT_AUTH || code == TCPSRV_ETLS_USAGE;
    if (engine->error) return;
    if ((certificate || code == TCPSRV_ETLS_NAME || code == TCPSRV_ETLS_VERSION) &&
        tcpsrv__engine_in_clear(engine))
        tcpsrv__engine_alert(engine, tcpsrv__alert_for(code));
    engine->error = code;
}

/* What has become of it. The engine says of an optional certificate nothing, of a required one that
   is bad only that there is none that would do. */
static void tcpsrv__engine_settle(tcpsrv__engine *engine) {
    size_t size;
    int number;
    if (engine->refused && !engine->done) {
        tcpsrv__engine_fail(engine, engine->refused);
    } else if (br_ssl_engine_current_state(engine->core) == BR_SSL_CLOSED) {
        number = br_ssl_engine_last_error(engine->core);
        if (number == BR_ERR_OK) engine->ended = 1;
        else tcpsrv__engine_fail(engine, TCPSRV_ETLS - number);
    } else if (!engine->done && br_ssl_engine_sendapp_buf(engine->core, &size)) {
        engine->done = 1;
        tcpsrv__verifier_free(engine);
    }
}

/* Gives it ciphertext. How much it took: less than all where it has plaintext to be read first, or
   something to send. */
/* In a handshake only until there is an answer, which goes out first: a peer may send data right
   behind its Finished (False Start, RFC 7918), and the engine takes none before its own is out. */
static size_t tcpsrv__engine_push(tcpsrv__engine *engine, const unsigned char *data, size_t size) {
    size_t room, taken = 0;
    unsigned char *to;
    while (taken < size && !engine->error && !engine->ended &&
           (engine->done || !br_ssl_engine_sendrec_buf(engine->core, &room))) {
        to = br_ssl_engine_recvrec_buf(engine->core, &room);
        if (!to) break;
        if (room > size - taken) room = size - taken;
        memcpy(to, data + taken, room);
        taken += room;
        br_ssl_engine_recvrec_ack(engine->core, room);
        tcpsrv__engine_settle(engine);
    }
    return taken;
}

/* The first record is whole: reads it, and lets the engine begin with it. BearSSL 0.6 reads outside
   its list of protocols when it resumes a session for a client that offers none of them, or two
   lists: such a client gets no session. */
static TCPSRV__COLD int tcpsrv__engine_begin(tcpsrv__engine *engine) {
    unsigned char *first = engine->first;
    tcpsrv__hello hello;
    char name[256] = "";
    int err = 0, resumable;
    tcpsrv__hello_read(engine->tls, first, engine->first_size, &hello);
    if (hello.version < 0x0303 || !hello.knows_tls12) return TCPSRV_ETLS_VERSION;
    if (hello.name.at) tcpsrv__span_text(&hello.name, name, sizeof name);
    tcpsrv__session_name(engine, name);
    if (hello.whole) err = tcpsrv__engine_ask_name(engine, name[0] ? name : NULL);
    resumable = hello.whole && (!engine->tls->alpn_count || hello.alpn != TCPSRV__ALPN_FOREIGN);
    if (!err) err = tcpsrv__engine_start(engine, NULL, resumable);
    if (err) return err;
    engine->first = NULL;
    tcpsrv__engine_push(engine, first, engine->first_size);
    tcpsrv__free(first);
    return 0;
}

static TCPSRV__COLD int tcpsrv__first_grow(tcpsrv__engine *engine, size_t room) {
    unsigned char *grown;
    if (room <= engine->first_room) return 0;
    grown = (unsigned char *)TCPSERVER_REALLOC(engine->first, room);
    if (!grown) return -ENOMEM;
    engine->first = grown;
    engine->first_room = room;
    return 0;
}

/* Gathers the first record; when it is whole the handshake begins. How much was taken. */
static TCPSRV__COLD size_t tcpsrv__engine_first(tcpsrv__engine *engine, const unsigned char *data,
                                                size_t size) {
    size_t taken = 0, wanted, n;
    long whole = tcpsrv__record_size(engine->first, engine->first_size);
    int err = 0;
    while (!err && taken < size && (!whole || engine->first_size < (size_t)whole)) {
        wanted = whole ? (size_t)whole : 5;
        n = wanted - engine->first_size;
        if (n > size - taken) n = size - taken;
        err = tcpsrv__first_grow(engine, wanted);
        if (err) break;
        memcpy(engine->first + engine->first_size, data + taken, n);
        engine->first_size += n;
        taken += n;
        whole = tcpsrv__record_size(engine->first, engine->first_size);
        if (whole < 0) err = TCPSRV_ETLS_PLAIN;
    }
    if (!err && whole > 0 && engine->first_size == (size_t)whole)
        err = tcpsrv__engine_begin(engine);
    if (err) tcpsrv__engine_fail(engine, err);
    return taken;
}

/* Gives it ciphertext; how much it took. Where it failed or ended, all is taken and dropped. */
static size_t tcpsrv__engine_feed(tcpsrv__engine *engine, const unsigned char *data, size_t size) {
    size_t taken = 0;
    if (size && engine->is_client && !engine->speaks) {
        engine->speaks = 1;
        if (data[0] < 20 || data[0] > 23) tcpsrv__engine_fail(engine, TCPSRV_ETLS_PLAIN);
    }
    if (!engine->started && !engine->error) taken = tcpsrv__engine_first(engine, data, size);
    if (engine->started && !engine->error)
        taken += tcpsrv__engine_push(engine, data + taken, size - taken);
    return engine->error || engine->ended ? size : taken;
}

/* A handshake's short records go together: the engine makes a Finished when what tells of it, six
   bytes, is out, and each would be a call and a segment of its own. */
static TCPSRV__COLD void tcpsrv__engine_gather(tcpsrv__engine *engine) {
    unsigned char *out;
    size_t size;
    while (!engine->done && (out = br_ssl_engine_sendrec_buf(engine->core, &size)) != NULL &&
           size <= (size_t)(TCPSRV__OWN_SIZE - TCPSRV__ALERT_SIZE - engine->own_end)) {
        memcpy(engine->own + engine->own_end, out, size);
        /* An alert before a version was agreed on has none, which clients do not read. */
        if (!engine->core->version_out && size == TCPSRV__ALERT_SIZE && out[0] == 21)
            engine->own[engine->own_end + 1] = 3, engine->own[engine->own_end + 2] = 1;
        engine->own_end = (unsigned char)(engine->own_end + size);
        br_ssl_engine_sendrec_ack(engine->core, size);
        tcpsrv__engine_settle(engine);
    }
}

/* The ciphertext that must go next; NULL: none. */
static const unsigned char *tcpsrv__engine_peek(tcpsrv__engine *engine, size_t *size) {
    int speaks = engine->started && engine->records;
    if (speaks) tcpsrv__engine_gather(engine);
    *size = (size_t)(engine->own_end - engine->own_begin);
    if (*size) return engine->own + engine->own_begin;
    return speaks ? br_ssl_engine_sendrec_buf(engine->core, size) : NULL;
}

static void tcpsrv__engine_took(tcpsrv__engine *engine, size_t size) {
    if (engine->own_end) {
        engine->own_begin = (unsigned char)(engine->own_begin + size);
        if (engine->own_begin == engine->own_end) engine->own_begin = engine->own_end = 0;
        return;
    }
    br_ssl_engine_sendrec_ack(engine->core, size);
    tcpsrv__engine_settle(engine);
}

/* Takes plaintext for one record: how much. The record is made by tcpsrv__engine_flush. */
static size_t tcpsrv__engine_write(tcpsrv__engine *engine, const char *data, size_t size) {
    size_t room;
    unsigned char *to = br_ssl_engine_sendapp_buf(engine->core, &room);
    if (!to) return 0;
    if (room > size) room = size;
    memcpy(to, data, room);
    br_ssl_engine_sendapp_ack(engine->core, room);
    return room;
}

static void tcpsrv__engine_flush(tcpsrv__engine *engine) {
    br_ssl_engine_flush(engine->core, 0);
}

/* The peer has said close_notify; ended is more: the answer to it is out. */
static int tcpsrv__engine_has_all(const tcpsrv__engine *engine) {
    return engine->ended || (engine->done && engine->core->shutdown_recv);
}

/* Hands out plaintext: how much. */
static size_t tcpsrv__engine_read(tcpsrv__engine *engine, char *data, size_t room) {
    size_t size;
    unsigned char *from;
    if (!engine->done || engine->error || !engine->records || !room) return 0;
    from = br_ssl_engine_recvapp_buf(engine->core, &size);
    if (!from) return 0;
    if (size > room) size = room;
    memcpy(data, from, size);
    br_ssl_engine_recvapp_ack(engine->core, size);
    return size;
}

/* Ends it with a close_notify. Plaintext that nobody read would keep the engine from closing. */
static TCPSRV__COLD void tcpsrv__engine_close(tcpsrv__engine *engine) {
    size_t size;
    if (!engine->started || engine->error || engine->ended) return;
    while (br_ssl_engine_recvapp_buf(engine->core, &size))
        br_ssl_engine_recvapp_ack(engine->core, size);
    br_ssl_engine_close(engine->core);
    tcpsrv__engine_settle(engine);
}

static unsigned tcpsrv__engine_state(tcpsrv__engine *engine) {
    unsigned state = engine->done ? TCPSRV__ENGINE_DONE : 0;
    size_t size;
    if (tcpsrv__engine_peek(engine, &size)) state |= TCPSRV__ENGINE_HAS_OUT;
    if (engine->error) return state | TCPSRV__ENGINE_FAILED;
    if (engine->ended) state |= TCPSRV__ENGINE_ENDED;
    if (engine->records && engine->done && br_ssl_engine_recvapp_buf(engine->core, &size))
        state |= TCPSRV__ENGINE_HAS_PLAIN;
    return state;
}

/* ---- the transport --------------------------------------------------------------------------- */

enum {
    TCPSRV__CIPHER_SIZE = 65536,    /* of one read */
    TCPSRV__STEPS_NS = 1000000      /* in a turn a handshake takes no step after that */
};

/* What the connections of a loop share. */
typedef struct tcpsrv__links {
    tcpsrv__records records;
    unsigned char *cipher;          /* what was just read */
    uint64_t turn, spent_ns;        /* on handshakes in that turn */
    size_t waiting;                 /* for their handshake's next step, on the ready list */
} tcpsrv__links;

typedef struct tcpsrv__link {
    tcpsrv__engine *engine;
    tcpsrv__links *links;
    tcpsrv__block *held;            /* ciphertext that the engine has not taken */
    size_t clear_left;              /* queued before start_tls: goes as it is */
    size_t sealed;                  /* plaintext at the queue's head whose record is under way */
    int end;                        /* why no more ciphertext will come; 0: more may */
    unsigned char dry, closing, shut;
    unsigned char deep, more;       /* why the stream is: the socket's nature; what is left here */
    unsigned char waits, begun;     /* is one of those waiting; something of the peer's was taken */
} tcpsrv__link;

static tcpsrv__link *tcpsrv__link_of(const tcpsrv_stream *stream) {
    return (tcpsrv__link *)stream->extra->link;
}

static TCPSRV__COLD void tcpsrv__links_free(void *arg) {
    tcpsrv__links *links = (tcpsrv__links *)arg;
    tcpsrv__records_free(&links->records);
    tcpsrv__free(links->cipher);
    tcpsrv__free(links);
}

static TCPSRV__COLD tcpsrv__links *tcpsrv__links_make(tcpsrv_loop *loop) {
    tcpsrv__links *links = (tcpsrv__links *)loop->links;
    if (links) return links;
    links = (tcpsrv__links *)tcpsrv__alloc(sizeof *links);
    if (!links) return NULL;
    links->cipher = (unsigned char *)TCPSERVER_REALLOC(NULL, TCPSRV__CIPHER_SIZE);
    if (!links->cipher) {
        tcpsrv__free(links);
        return NULL;
    }
    loop->links = links;
    loop->links_free = tcpsrv__links_free;
    return links;
}

typedef struct tcpsrv__link_call {
    tcpsrv_stream *stream;
    const struct iovec *pieces;
    int count;
    size_t got;                     /* bytes of the pieces that are full */
    long result;
} tcpsrv__link_call;

/* Plaintext into what is left of the pieces. */
static void tcpsrv__link_read(tcpsrv__link *link, tcpsrv__link_call *call) {
    size_t before = 0, n = 1;
    int i;
    for (i = 0; i < call->count && n; i++) {
        const struct iovec *piece = &call->pieces[i];
        while (n && call->got < before + piece->iov_len) {
            size_t from = call->got - before;
            n = tcpsrv__engine_read(link->engine, (char *)piece->iov_base + from,
                                    piece->iov_len - from);
            call->got += n;
        }
        before += piece->iov_len;
    }
}

/* The engine takes no more ciphertext while it has plaintext: feeds and reads in turn. How much it
   took. */
static size_t tcpsrv__link_feed(tcpsrv__link *link, tcpsrv__link_call *call, const char *data,
                                size_t size) {
    size_t taken = 0, before, got;
    do {
        before = taken;
        got = call->got;
        taken += tcpsrv__engine_feed(link->engine, (const unsigned char *)data + taken,
                                     size - taken);
        tcpsrv__link_read(link, call);
    } while (taken < size && (taken > before || call->got > got));
    return taken;
}

/* Feeds what was kept: whether the engine took any of it. */
static int tcpsrv__link_feed_held(tcpsrv__link *link, tcpsrv__link_call *call) {
    tcpsrv__block *held = link->held;
    size_t taken = tcpsrv__link_feed(link, call, held->data + held->begin,
                                     tcpsrv__block_size(held));
    held->begin += taken;
    if (held->begin == held->end) {
        tcpsrv__block_give(call->stream->source.loop, held);
        link->held = NULL;
    }
    return taken > 0;
}

/* One read, fed to the engine; what that does not take is kept. As a read's own result. */
static long tcpsrv__link_feed_read(tcpsrv__link *link, tcpsrv__link_call *call) {
    size_t taken;
    long n = tcpsrv__sys_receive(call->stream->source.fd, link->links->cipher, TCPSRV__CIPHER_SIZE);
    link->dry = n < TCPSRV__CIPHER_SIZE && !call->stream->ended && !link->deep;
    if (n <= 0) return n;
    taken = tcpsrv__link_feed(link, call, (const char *)link->links->cipher, (size_t)n);
    if (taken == (size_t)n) return n;
    link->held = tcpsrv__block_take(call->stream->source.loop, (size_t)n - taken);
    if (!link->held) return -ENOMEM;
    memcpy(link->held->data, link->links->cipher + taken, (size_t)n - taken);
    link->held->end = (size_t)n - taken;
    return n;
}

/* Gets more ciphertext into the engine: 1, or 0: there is none now, or no more at all. */
static int tcpsrv__link_fill(tcpsrv__link *link, tcpsrv__link_call *call) {
    long n;
    if (link->held) return tcpsrv__link_feed_held(link, call);
    if (link->end || link->dry) return 0;
    n = tcpsrv__link_feed_read(link, call);
    if (n > 0) return 1;
    if (n == -EAGAIN || n == -EWOULDBLOCK) link->dry = 1;
    else link->end = n ? (int)n : TCPSRV_ETLS_TRUNCATED;
    return 0;
}

/* Sends the engine's ciphertext. 0: all of it; -EAGAIN; or why not. */
static int tcpsrv__link_push(tcpsrv_stream *stream) {
    tcpsrv__engine *engine = tcpsrv__link_of(stream)->engine;
    const unsigned char *out;
    struct iovec piece;
    size_t size;
    long n;
    while ((out = tcpsrv__engine_peek(engine, &size)) != NULL) {
        piece.iov_base = (void *)(uintptr_t)out;
        piece.iov_len = size;
        n = tcpsrv__sys_send(stream->source.fd, &piece, 1);
        if (n < 0) return n == -EWOULDBLOCK ? -EAGAIN : (int)n;
        tcpsrv__engine_took(engine, (size_t)n);
        if ((size_t)n < size) return -EAGAIN;
    }
    return 0;
}

/* What the engine has to say by itself goes when it can. While the stream is blocked that is when
   it is told to go on, and then what was sealed is counted as sent too. */
static TCPSRV__COLD void tcpsrv__link_push_own(tcpsrv_stream *stream) {
    if (stream->blocked) {
        stream->owes = 1;
    } else if (tcpsrv__link_push(stream) == -EAGAIN) {
        stream->owes = 1;
        tcpsrv__write_dry(stream);
    }
}

static long tcpsrv__link_result(const tcpsrv__link *link, size_t got) {
    if (got) return (long)got;
    if (link->engine->error) return link->engine->error;
    if (tcpsrv__engine_has_all(link->engine)) return 0;
    return link->end ? link->end : link->dry ? -EAGAIN : -EALREADY;
}

/* What is left here no event will tell of. */
static void tcpsrv__link_rest(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    tcpsrv__engine *engine = link->engine;
    tcpsrv__engine_rest(engine);
    link->more = !link->dry || link->held || link->end || engine->records || engine->error ||
                 engine->ended;
    stream->deep = link->deep || link->more;
}

static void tcpsrv__link_receive_errand(void *arg) {
    tcpsrv__link_call *call = (tcpsrv__link_call *)arg;
    tcpsrv_stream *stream = call->stream;
    tcpsrv__link *link = tcpsrv__link_of(stream);
    tcpsrv__engine *engine = link->engine;
    int reads = 0;
    call->result = tcpsrv__engine_wake(engine);
    if (call->result) return;
    link->dry = 0;
    if (stream->deep && !link->more) link->deep = 1;
    tcpsrv__link_read(link, call);
    if (link->held && !call->got) tcpsrv__link_fill(link, call);
    while (!call->got && !engine->error && !tcpsrv__engine_has_all(engine) && reads++ < 4)
        if (!tcpsrv__link_fill(link, call)) break;
    if (tcpsrv__engine_state(engine) & TCPSRV__ENGINE_HAS_OUT) tcpsrv__link_push_own(stream);
    tcpsrv__link_rest(stream);
    call->result = tcpsrv__link_result(link, call->got);
}

static void tcpsrv__link_call_init(tcpsrv__link_call *call, tcpsrv_stream *stream,
                                   const struct iovec *pieces, int count) {
    call->stream = stream;
    call->pieces = pieces;
    call->count = count;
    call->got = 0;
}

static long tcpsrv__link_receive(tcpsrv_stream *stream, const struct iovec *pieces, int count) {
    tcpsrv__link_call call;
    if (tcpsrv__link_of(stream)->closing) /* what comes now is swallowed as it is */
        return tcpsrv__sys_readv(stream->source.fd, pieces, count);
    tcpsrv__link_call_init(&call, stream, pieces, count);
    tcpsrv__on_loop_stack(stream->source.loop, tcpsrv__link_receive_errand, &call);
    return call.result;
}

/* Seals one record of the bytes from done on. How many it holds. */
static size_t tcpsrv__link_seal(tcpsrv__link *link, const struct iovec *pieces, int count,
                                size_t done) {
    size_t n, before = 0, sealed = 0;
    int i;
    for (i = 0; i < count; i++) {
        size_t size = pieces[i].iov_len;
        if (done + sealed < before + size) {
            size_t from = done + sealed - before;
            n = tcpsrv__engine_write(link->engine, (const char *)pieces[i].iov_base + from,
                                     size - from);
            sealed += n;
            if (n < size - from) break;
        }
        before += size;
    }
    tcpsrv__engine_flush(link->engine);
    return sealed;
}

/* A record counts as sent when all of it is out: until then its plaintext stays in the queue, and
   the next call goes on with the record as it was sealed. */
static void tcpsrv__link_send_errand(void *arg) {
    tcpsrv__link_call *call = (tcpsrv__link_call *)arg;
    tcpsrv__link *link = tcpsrv__link_of(call->stream);
    size_t total = 0, done = 0;
    int i, err = tcpsrv__engine_wake(link->engine);
    for (i = 0; i < call->count; i++) total += call->pieces[i].iov_len;
    if (!err) err = tcpsrv__link_push(call->stream);
    if (link->sealed && link->engine->error) err = link->engine->error; /* it drops its record */
    while (!err) {
        done += link->sealed;
        link->sealed = 0;
        call->stream->owes = 0;
        if (done >= total) break;
        if (link->engine->error) err = link->engine->error;
        else if (link->engine->ended) err = -EPIPE;
        else link->sealed = tcpsrv__link_seal(link, call->pieces, call->count, done);
        if (!err && !link->sealed) err = -EPIPE;
        if (!err) err = tcpsrv__link_push(call->stream);
    }
    if (link->closing && !err && !link->shut) {
        link->shut = 1;
        tcpsrv__sys_shutdown_write(call->stream->source.fd);
    }
    tcpsrv__engine_rest(link->engine);
    if (err && err != -EAGAIN && done) { /* the failure is told, and what went before it counts */
        tcpsrv__output_sent(call->stream, done);
        done = 0;
    }
    call->result = err == -EAGAIN && done ? (long)done : err ? err : (long)done;
}

static long tcpsrv__link_send(tcpsrv_stream *stream, const struct iovec *pieces, int count) {
    tcpsrv__link_call call;
    tcpsrv__link_call_init(&call, stream, pieces, count);
    tcpsrv__on_loop_stack(stream->source.loop, tcpsrv__link_send_errand, &call);
    return call.result;
}

/* A close_notify, and behind it the end of the connection. */
static TCPSRV__COLD void tcpsrv__link_shut(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    tcpsrv__link_call call;
    int err = tcpsrv__engine_wake(link->engine);
    if (err) {
        tcpsrv__die(stream, err);
        return;
    }
    tcpsrv__engine_close(link->engine);
    link->closing = 1;
    tcpsrv__link_call_init(&call, stream, NULL, 0);
    tcpsrv__link_send_errand(&call);
    stream->owes = call.result == -EAGAIN;
    if (stream->owes) tcpsrv__write_dry(stream);
    else if (call.result < 0) tcpsrv__die(stream, (int)call.result);
}

/* ---- the transport: the handshake ------------------------------------------------------------ */

/* What was queued before start_tls. 0, -EAGAIN, or a code. */
static TCPSRV__COLD int tcpsrv__link_send_clear(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    struct iovec pieces[TCPSRV__SEND_PIECES];
    size_t total;
    long n;
    while (link->clear_left) {
        tcpsrv__queue_gather(&stream->out, pieces, &total);
        if (pieces[0].iov_len > link->clear_left) pieces[0].iov_len = link->clear_left;
        n = tcpsrv__sys_send(stream->source.fd, pieces, 1);
        if (n < 0) return (int)n;
        link->clear_left -= (size_t)n;
        tcpsrv__output_sent(stream, (size_t)n);
        if ((size_t)n < pieces[0].iov_len) return -EAGAIN;
    }
    return 0;
}

/* 1: it is over; 0: it waits for the peer; or a code. */
static TCPSRV__COLD int tcpsrv__link_handshake(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    tcpsrv__engine *engine = link->engine;
    tcpsrv__link_call call;
    int err = tcpsrv__link_send_clear(stream);
    link->dry = !stream->readable;
    if (stream->deep && !link->more) link->deep = 1;
    tcpsrv__link_call_init(&call, stream, NULL, 0);
    if (!err) err = tcpsrv__engine_wake(engine);
    while (!err) {
        err = tcpsrv__link_push(stream);
        if (err) break;
        if (engine->error) return engine->error;
        if (engine->done) return 1; /* and perhaps at its end already */
        if (engine->ended) return TCPSRV_ETLS_TRUNCATED;
        if (tcpsrv__link_fill(link, &call)) {
            link->begun |= engine->started;
        } else if (link->end) {
            return link->end;
        } else {
            tcpsrv__read_dry(stream);
            break;
        }
    }
    if (err == -EAGAIN || err == -EWOULDBLOCK) {
        tcpsrv__write_dry(stream);
        err = 0;
    }
    return err;
}

/* A step computes for a millisecond or many: open streams come between them. Those that have begun
   are ended first, or a crowd of newcomers would end with nobody served; the others go in the order
   of the ready list, no matter what events tell of. */
static TCPSRV__COLD int tcpsrv__link_may_step(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    tcpsrv__links *links = link->links;
    int is_next = link->waits ? !stream->source.is_ready : !links->waiting, may;
    if (links->turn != stream->source.loop->turn) links->spent_ns = 0;
    links->turn = stream->source.loop->turn;
    may = links->spent_ns < TCPSRV__STEPS_NS && (is_next || link->begun);
    links->waiting -= link->waits;
    link->waits = may ? 0 : 1;
    links->waiting += link->waits;
    if (!may) tcpsrv__make_ready(&stream->source);
    return may;
}

static TCPSRV__COLD void tcpsrv__link_prepare(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    uint64_t begin;
    int result;
    if (!tcpsrv__link_may_step(stream)) return;
    begin = tcpsrv__clock_ns();
    result = tcpsrv__link_handshake(stream);
    link->links->spent_ns += tcpsrv__clock_ns() - begin;
    tcpsrv__link_rest(stream);
    if (result < 0) tcpsrv__die(stream, result);
    if (result <= 0) return;
    stream->connecting = 0;
    stream->blocked = 0;
    stream->extra->handshake_due = stream->extra->connect_due = 0;
    if (link->more) stream->readable = 1;
    else tcpsrv__read_dry(stream);
    if (stream->out.last || stream->shut_wanted) tcpsrv__make_ready(&stream->source);
}

static TCPSRV__COLD void tcpsrv__link_release(tcpsrv_stream *stream) {
    tcpsrv__link *link = tcpsrv__link_of(stream);
    link->links->waiting -= link->waits;
    if (link->held) tcpsrv__block_give(stream->source.loop, link->held);
    tcpsrv__engine_free(link->engine);
    tcpsrv__free(link);
}

static const tcpsrv__transport tcpsrv__tls_transport = {
    tcpsrv__link_receive, tcpsrv__link_send, tcpsrv__link_shut, tcpsrv__link_prepare,
    tcpsrv__link_release, 1, 0
};

/* ---- setting it up --------------------------------------------------------------------------- */

/* A configuration with certificates and no file of authorities may still be a client's. */
static TCPSRV__COLD int tcpsrv__tls_trust(tcpsrv_tls *tls) {
    int err = 0;
    pthread_mutex_lock(&tls->lock);
    if (!tls->no_verify && !tls->anchor_count) err = tcpsrv__anchors_of_system(tls);
    pthread_mutex_unlock(&tls->lock);
    return err;
}

typedef struct tcpsrv__secure_call {
    tcpsrv_stream *stream;
    tcpsrv_tls *tls;
    const char *host;
    int is_client, result;
} tcpsrv__secure_call;

/* What has come behind a header in clear is the beginning of the handshake. */
static TCPSRV__COLD int tcpsrv__link_take_input(tcpsrv_stream *stream, tcpsrv__link *link) {
    tcpsrv__block *in = stream->in;
    size_t size = in ? tcpsrv__block_size(in) : 0;
    if (!size) return 0;
    link->held = tcpsrv__block_take(stream->source.loop, size);
    if (!link->held) return -ENOMEM;
    memcpy(link->held->data, in->data + in->begin, size);
    link->held->end = size;
    in->begin = in->end;
    return 0;
}

static TCPSRV__COLD void tcpsrv__secure_errand(void *arg) {
    tcpsrv__secure_call *call = (tcpsrv__secure_call *)arg;
    tcpsrv_stream *stream = call->stream;
    tcpsrv__extra *extra = tcpsrv__extra_make(stream);
    tcpsrv__link *link = extra ? (tcpsrv__link *)tcpsrv__alloc(sizeof *link) : NULL;
    int err = -ENOMEM, timed = extra && (extra->connect_due || extra->handshake_due);
    if (link) link->links = tcpsrv__links_make(stream->source.loop);
    if (link && link->links) err = tcpsrv__link_take_input(stream, link);
    if (!err && !timed) err = tcpsrv__handshake_deadline(stream);
    if (!err) err = tcpsrv__engine_new(call->tls, call->is_client, call->host,
                                       &link->links->records, &link->engine);
    call->result = err;
    if (err) { /* it goes on in clear */
        if (extra && !timed) extra->handshake_due = 0;
        if (link && link->held) tcpsrv__block_give(stream->source.loop, link->held);
        tcpsrv__free(link);
        return;
    }
    link->deep = stream->deep;
    extra->link = link;
    extra->io = &tcpsrv__tls_transport;
    stream->foreign = 1;
    stream->connecting = 1;
    if (stream->eof) stream->readable = 1; /* behind a PROXY header: to TLS it is a cut */
    stream->eof = 0;
    tcpsrv__make_ready(&stream->source);
}

/* Makes TLS the transport of a connected stream, which is connecting again until it is set up. */
static TCPSRV__COLD int tcpsrv__secure(tcpsrv_stream *stream, tcpsrv_tls *tls, int is_client,
                                       const char *host) {
    tcpsrv__secure_call call;
    call.stream = stream;
    call.tls = tls;
    call.host = host;
    call.is_client = is_client;
    tcpsrv__on_loop_stack(stream->source.loop, tcpsrv__secure_errand, &call);
    return call.result;
}

/* Takes a reference, where it can do what is wanted. 0 or the failure recorded. */
static TCPSRV__COLD int tcpsrv__secure_hold(tcpsrv_tls *tls, int is_client, const char *host) {
    int err;
    if (!tls) return 0;
    if (!is_client && !tls->pair_count)
        return tcpsrv__tls_fail("a server's TLS needs a certificate");
    if (is_client && !host && !tls->no_verify)
        return tcpsrv__tls_fail("a host name is needed to verify the server (or no_verify)");
    err = is_client ? tcpsrv__tls_trust(tls) : 0;
    if (!err) tcpsrv__tls_hold(tls);
    return err;
}

static TCPSRV__COLD void tcpsrv__secure_drop(tcpsrv_tls *tls) {
    tcpsrv_tls_free(tls);
}

static TCPSRV__COLD int tcpsrv__may_start_tls(const tcpsrv_stream *stream) {
    const tcpsrv__block *in = stream->in;
    if (stream->closing) return TCPSRV_ECLOSED;
    if (stream->dead) return tcpsrv__why_dead(stream);
    if (stream->connecting || stream->read_fn) return TCPSRV_EBUSY;
    if (tcpsrv__io(stream) == &tcpsrv__tls_transport) return -EALREADY;
    if (!tcpsrv__io(stream)->is_socket) return -ENOTSOCK;
    if (stream->shut_wanted) return TCPSRV_ECLOSED;
    if (stream->eof) return TCPSRV_EOF;
    if (tcpsrv__queue_memory(&stream->out) != stream->out.size) return TCPSRV_EBUSY;
    return in && tcpsrv__block_size(in) ? TCPSRV_ETLS_BUFFERED : 0;
}

TCPSRV_IMPL int tcpsrv_start_tls(tcpsrv_stream *stream, tcpsrv_tls *tls, const char *hostname) {
    int is_client = !stream->owner->gone, err;
    tcpsrv__uncork(stream);
    stream->stepping = 0;
    err = tcpsrv__may_start_tls(stream);
    if (err) return tcpsrv__fail_at(err, "start_tls", stream);
    err = tcpsrv__secure_hold(tls, is_client, hostname);
    if (err) return err;
    err = tcpsrv__secure(stream, tls, is_client, hostname);
    if (!err) tcpsrv__link_of(stream)->clear_left = stream->out.size;
    tcpsrv_tls_free(tls);
    return err ? tcpsrv__fail_at(err, "start_tls", stream) : 0;
}

TCPSRV_IMPL int tcpsrv_wait_handshake(tcpsrv_stream *stream) {
    return tcpsrv_await(stream, tcpsrv_ready(), NULL);
}

TCPSRV_IMPL int tcpsrv_get_tls_info(const tcpsrv_stream *stream, tcpsrv_tls_info *info) {
    const tcpsrv__link *link = stream->extra && tcpsrv__io(stream) == &tcpsrv__tls_transport
                                   ? tcpsrv__link_of(stream) : NULL;
    const tcpsrv__engine *engine = link ? link->engine : NULL;
    br_ssl_session_parameters session;
    memset(info, 0, sizeof *info);
    if (!engine || !engine->done) return -ENOTCONN;
    br_ssl_engine_get_session_parameters(engine->core, &session);
    info->version = "TLSv1.2";
    info->suite = tcpsrv__suite_name(session.cipher_suite);
    tcpsrv__wipe(&session, sizeof session);
    info->alpn = br_ssl_engine_get_selected_protocol(engine->core);
    if (!info->alpn) info->alpn = "";
    info->server_name = br_ssl_engine_get_server_name(engine->core);
    info->resumed = engine->resumed;
    info->peer_name = info->peer_dns = "";
    if (!engine->peer) return 0;
    info->has_peer = 1;
    info->verified = engine->peer->verified;
    info->peer_name = engine->peer->name;
    info->peer_dns = engine->peer->dns;
    memcpy(info->peer_sha256, engine->peer->sha256, sizeof info->peer_sha256);
    return 0;
}

/* ---- texts ----------------------------------------------------------------------------------- */

typedef struct tcpsrv__tls_text {
    int number;                     /* TCPSRV_ETLS - code */
    const char *text;
} tcpsrv__tls_text;

static const tcpsrv__tls_text tcpsrv__tls_texts[] = {
    { 0, "TLS is not set up" },
    { BR_ERR_UNSUPPORTED_VERSION, "the peer speaks another version of TLS" },
    { BR_ERR_BAD_VERSION, "the peer changed the version of TLS" },
    { BR_ERR_BAD_LENGTH, "TLS record of a bad length" },
    { BR_ERR_TOO_LARGE, "TLS record too large" },
    { BR_ERR_BAD_MAC, "TLS record was tampered with or damaged" },
    { BR_ERR_NO_RANDOM, "no randomness from the system" },
    { BR_ERR_UNKNOWN_TYPE, "TLS record of an unknown type" },
    { BR_ERR_UNEXPECTED, "TLS message out of turn" },
    { BR_ERR_BAD_CCS, "bad TLS ChangeCipherSpec" },
    { BR_ERR_BAD_ALERT, "bad TLS alert" },
    { BR_ERR_BAD_HANDSHAKE, "malformed TLS handshake message" },
    { BR_ERR_OVERSIZED_ID, "TLS session id too long" },
    { BR_ERR_BAD_CIPHER_SUITE, "no TLS cipher suite in common" },
    { BR_ERR_BAD_COMPRESSION, "TLS compression asked for" },
    { BR_ERR_BAD_FRAGLEN, "bad TLS fragment length" },
    { BR_ERR_BAD_SECRENEG, "insecure TLS renegotiation" },
    { BR_ERR_EXTRA_EXTENSION, "TLS extension that was not asked for" },
    { BR_ERR_BAD_SNI, "malformed server name" },
    { BR_ERR_BAD_HELLO_DONE, "malformed TLS ServerHelloDone" },
    { BR_ERR_LIMIT_EXCEEDED, "the peer's key is too large" },
    { BR_ERR_BAD_FINISHED, "TLS handshake was tampered with" },
    { BR_ERR_RESUME_MISMATCH, "resumed TLS session does not match" },
    { BR_ERR_INVALID_ALGORITHM, "bad TLS curve or signature algorithm" },
    { BR_ERR_BAD_SIGNATURE, "bad signature in the TLS handshake" },
    { BR_ERR_WRONG_KEY_USAGE, "the peer's key may not be used this way" },
    { BR_ERR_NO_CLIENT_AUTH, "client sent no certificate" },
    { BR_ERR_X509_INVALID_VALUE, "malformed certificate" },
    { BR_ERR_X509_TRUNCATED, "truncated certificate" },
    { BR_ERR_X509_EMPTY_CHAIN, "client sent no certificate" },
    { BR_ERR_X509_BAD_DN, "certificate with a malformed name" },
    { BR_ERR_X509_BAD_TIME, "certificate with a malformed date" },
    { BR_ERR_X509_UNSUPPORTED, "certificate with an unsupported key or signature" },
    { BR_ERR_X509_LIMIT_EXCEEDED, "certificate with too large a key" },
    { BR_ERR_X509_WRONG_KEY_TYPE, "certificate with an unexpected type of key" },
    { BR_ERR_X509_BAD_SIGNATURE, "certificate with a bad signature" },
    { BR_ERR_X509_TIME_UNKNOWN, "the time is not known" },
    { BR_ERR_X509_EXPIRED, "certificate has expired or is not valid yet" },
    { BR_ERR_X509_DN_MISMATCH, "certificate chain is not in order" },
    { BR_ERR_X509_BAD_SERVER_NAME, "certificate is for another host name" },
    { BR_ERR_X509_CRITICAL_EXTENSION, "certificate with an unknown critical extension" },
    { BR_ERR_X509_NOT_CA, "certificate was issued by one that is no authority" },
    { BR_ERR_X509_FORBIDDEN_KEY_USAGE, "certificate may not be used this way" },
    { BR_ERR_X509_WEAK_PUBLIC_KEY, "certificate with a weak key" },
    { BR_ERR_X509_NOT_TRUSTED, "certificate chain leads to no trusted root" },
    { TCPSRV_ETLS - TCPSRV_ETLS_TRUNCATED, "connection ended without close_notify" },
    { TCPSRV_ETLS - TCPSRV_ETLS_PLAIN, "peer does not speak TLS" },
    { TCPSRV_ETLS - TCPSRV_ETLS_NAME, "server name refused" },
    { TCPSRV_ETLS - TCPSRV_ETLS_USAGE, "peer certificate may not be used this way" },
    { TCPSRV_ETLS - TCPSRV_ETLS_VERSION, "peer does not know TLS 1.2" },
    { TCPSRV_ETLS - TCPSRV_ETLS_BUFFERED, "plain data buffered before start_tls" },
    { 256 + 10, "peer sent alert 10 (unexpected message)" },
    { 256 + 20, "peer sent alert 20 (bad record MAC)" },
    { 256 + 22, "peer sent alert 22 (record overflow)" },
    { 256 + 40, "peer sent alert 40 (handshake failure)" },
    { 256 + 42, "peer sent alert 42 (bad certificate)" },
    { 256 + 43, "peer sent alert 43 (unsupported certificate)" },
    { 256 + 44, "peer sent alert 44 (certificate revoked)" },
    { 256 + 45, "peer sent alert 45 (certificate expired)" },
    { 256 + 46, "peer sent alert 46 (certificate unknown)" },
    { 256 + 47, "peer sent alert 47 (illegal parameter)" },
    { 256 + 48, "peer sent alert 48 (unknown authority)" },
    { 256 + 49, "peer sent alert 49 (access denied)" },
    { 256 + 50, "peer sent alert 50 (decode error)" },
    { 256 + 51, "peer sent alert 51 (decrypt error)" },
    { 256 + 70, "peer sent alert 70 (protocol version)" },
    { 256 + 71, "peer sent alert 71 (insufficient security)" },
    { 256 + 80, "peer sent alert 80 (internal error)" },
    { 256 + 86, "peer sent alert 86 (inappropriate fallback)" },
    { 256 + 90, "peer sent alert 90 (user canceled)" },
    { 256 + 112, "peer sent alert 112 (unrecognized name)" },
    { 256 + 116, "peer sent alert 116 (certificate required)" },
    { 256 + 120, "peer sent alert 120 (no application protocol)" },
    { 512 + 40, "nothing in common with the peer (alert 40 sent)" },
    { 512 + 70, "peer does not know TLS 1.2 (alert 70 sent)" },
    { 512 + 100, "peer asked for a renegotiation" },
    { 512 + 120, "no application protocol in common (alert 120 sent)" }
};

static TCPSRV__COLD const char *tcpsrv__secure_text(int code) {
    size_t i;
    for (i = 0; i < sizeof tcpsrv__tls_texts / sizeof tcpsrv__tls_texts[0]; i++)
        if (tcpsrv__tls_texts[i].number == TCPSRV_ETLS - code) return tcpsrv__tls_texts[i].text;
    return code < TCPSRV_ETLS - 512 ? "TLS handshake failed (alert sent)"
           : code < TCPSRV_ETLS - 255 ? "peer sent a TLS alert" : "TLS failure";
}

#else

static TCPSRV__COLD int tcpsrv__secure(tcpsrv_stream *stream, tcpsrv_tls *tls, int is_client,
                                       const char *host) {
    (void)stream, (void)tls, (void)is_client, (void)host;
    return -ENOTSUP;
}

static TCPSRV__COLD int tcpsrv__secure_hold(tcpsrv_tls *tls, int is_client, const char *host) {
    (void)is_client, (void)host;
    return tls ? tcpsrv__fail(-ENOTSUP, "tls", "(without TCPSERVER_TLS)") : 0;
}

static TCPSRV__COLD void tcpsrv__secure_drop(tcpsrv_tls *tls) {
    (void)tls;
}

static TCPSRV__COLD const char *tcpsrv__secure_text(int code) {
    (void)code;
    return "TLS failure";
}

#endif

/* ==== >>sockets =============================================================================== */

/* Owns addresses: as text, as sockets that listen there, as connections begun. */

/* Why a connection is not served, for the log alone. */
enum { TCPSRV__EPROXY = -10101, TCPSRV__EUNTRUSTED, TCPSRV__EPER_IP, TCPSRV__ECONNECTIONS,
       TCPSRV__EMEMORY };

enum {
    TCPSRV__MAX_ADDRESSES = 32,     /* of one host name */
    TCPSRV__PORT_TRIES = 16,        /* for one free port in both families */
    TCPSRV__BACKLOG = 65535         /* the kernel cuts it to the system's most */
};

static void tcpsrv__address_from_unix(tcpsrv_address *address, const struct sockaddr_un *name,
                                      socklen_t size) {
    size_t length = (size_t)size > offsetof(struct sockaddr_un, sun_path)
                        ? (size_t)size - offsetof(struct sockaddr_un, sun_path) : 0;
    if (length > sizeof address->path - 1) length = sizeof address->path - 1;
    memcpy(address->path, name->sun_path, length);
    if (length && !name->sun_path[0]) address->path[0] = '@';
}

static void tcpsrv__address_from_sockaddr(tcpsrv_address *address, const struct sockaddr *name,
                                          socklen_t size) {
    memset(address, 0, sizeof *address);
    if (size < (socklen_t)sizeof name->sa_family) return;
    address->family = name->sa_family;
    if (name->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)name;
        address->port = ntohs(in->sin_port);
        memcpy(address->ip, &in->sin_addr, 4);
    } else if (name->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)name;
        address->port = ntohs(in6->sin6_port);
        address->scope_id = (unsigned)in6->sin6_scope_id;
        memcpy(address->ip, &in6->sin6_addr, 16);
    } else if (name->sa_family == AF_UNIX) {
        tcpsrv__address_from_unix(address, (const struct sockaddr_un *)(const void *)name, size);
    }
}

TCPSRV_IMPL const char *tcpsrv_address_text(const tcpsrv_address *address, char *text,
                                            size_t size) {
    char ip[INET6_ADDRSTRLEN] = "unknown", scope[16] = "";
    if (address->family == AF_UNIX) {
        snprintf(text, size, "unix:%s", address->path);
        return text;
    }
    inet_ntop(address->family, address->ip, ip, sizeof ip);
    if (address->scope_id) snprintf(scope, sizeof scope, "%%%u", address->scope_id);
    snprintf(text, size, address->family == AF_INET6 ? "[%s%s]:%u" : "%s%s:%u", ip, scope,
             (unsigned)address->port);
    return text;
}

static const char *tcpsrv__name_text(const struct sockaddr *name, socklen_t size, char *text) {
    tcpsrv_address address;
    tcpsrv__address_from_sockaddr(&address, name, size);
    return tcpsrv_address_text(&address, text, TCPSRV_ADDRESS_TEXT);
}

/* A socket's own; without a family on failure. */
static TCPSRV__APART int tcpsrv__own_address(int fd, tcpsrv_address *address) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    int err = tcpsrv__sys_name(fd, &name, &size);
    tcpsrv__address_from_sockaddr(address, (const struct sockaddr *)&name, err ? 0 : size);
    return err;
}

static int tcpsrv__local_port(int fd) {
    tcpsrv_address address;
    tcpsrv__own_address(fd, &address);
    return address.port;
}

/* ---- the addresses of a name ----------------------------------------------------------------- */

typedef struct tcpsrv__names {
    int count;
    socklen_t size[TCPSRV__MAX_ADDRESSES];
    struct sockaddr_storage name[TCPSRV__MAX_ADDRESSES];
} tcpsrv__names;

typedef struct tcpsrv__lookup {     /* for an errand: libc's resolver needs much stack */
    const char *host;
    int port, family, flags, err;
    tcpsrv__names names;
} tcpsrv__lookup;

static int tcpsrv__names_have(const tcpsrv__names *names, const struct addrinfo *info) {
    int i;
    for (i = 0; i < names->count; i++)
        if (names->size[i] == info->ai_addrlen &&
            memcmp(&names->name[i], info->ai_addr, (size_t)info->ai_addrlen) == 0)
            return 1;
    return 0;
}

static void tcpsrv__names_add(tcpsrv__names *names, const struct addrinfo *info) {
    if ((info->ai_family != AF_INET && info->ai_family != AF_INET6) ||
        names->count == TCPSRV__MAX_ADDRESSES || info->ai_addrlen > sizeof names->name[0] ||
        tcpsrv__names_have(names, info))
        return;
    memcpy(&names->name[names->count], info->ai_addr, (size_t)info->ai_addrlen);
    names->size[names->count++] = info->ai_addrlen;
}

/* Adds the next that is of that family, or of another one; gives what is behind it. */
static TCPSRV__COLD const struct addrinfo *
tcpsrv__names_take(tcpsrv__names *names, const struct addrinfo *at, int family, int same) {
    while (at && (at->ai_family == family) != same) at = at->ai_next;
    if (!at) return NULL;
    tcpsrv__names_add(names, at);
    return at->ai_next;
}

/* Sorted by family, so that processes that bind the same set meet in the same order. */
static void tcpsrv__names_sort(tcpsrv__names *names, const struct addrinfo *list) {
    const struct addrinfo *at;
    for (at = list; at;) at = tcpsrv__names_take(names, at, AF_INET, 1);
    for (at = list; at;) at = tcpsrv__names_take(names, at, AF_INET6, 1);
}

/* The resolver's order, the families in turn, so that one that does not work costs little (RFC
   8305 4). */
static void tcpsrv__names_weave(tcpsrv__names *names, const struct addrinfo *list) {
    const struct addrinfo *one = list, *other = list;
    while (one || other) {
        one = tcpsrv__names_take(names, one, list->ai_family, 1);
        other = tcpsrv__names_take(names, other, list->ai_family, 0);
    }
}

static TCPSRV__COLD void tcpsrv__lookup_errand(void *arg) {
    tcpsrv__lookup *lookup = (tcpsrv__lookup *)arg;
    struct addrinfo hints, *list = NULL;
    char port[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_family = lookup->family;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = lookup->flags | AI_NUMERICSERV;
    snprintf(port, sizeof port, "%d", lookup->port);
    lookup->names.count = 0;
    lookup->err = tcpsrv__sys_resolve(lookup->host, port, &hints, &list);
    if (lookup->err) return;
    if (lookup->flags & AI_PASSIVE) tcpsrv__names_sort(&lookup->names, list);
    else tcpsrv__names_weave(&lookup->names, list);
    tcpsrv__sys_resolve_free(list);
    if (!lookup->names.count) lookup->err = -EAFNOSUPPORT;
}

/* The errand, by whichever loop runs the calling coroutine; plainly where there is none. */
static int tcpsrv__look_up(tcpsrv__lookup *lookup) {
    tcpsrv_loop *loop = tcpsrv__thread()->turning;
    if (loop) tcpsrv__on_loop_stack(loop, tcpsrv__lookup_errand, lookup);
    else tcpsrv__lookup_errand(lookup);
    return lookup->err;
}

static TCPSRV__COLD void tcpsrv__host_text(const char *host, int port, char *text) {
    snprintf(text, TCPSRV_ADDRESS_TEXT, "%s:%d", host && *host ? host : "*", port);
}

static int tcpsrv__fail_host(int code, const char *step, const char *host, int port) {
    char place[TCPSRV_ADDRESS_TEXT];
    tcpsrv__host_text(host, port, place);
    return tcpsrv__fail(code, step, place);
}

/* ---- listening ------------------------------------------------------------------------------- */

static void tcpsrv__set_port(struct sockaddr_storage *name, int port) {
    uint16_t net = htons((uint16_t)port);
    if (name->ss_family == AF_INET6)
        memcpy((char *)name + offsetof(struct sockaddr_in6, sin6_port), &net, sizeof net);
    else
        memcpy((char *)name + offsetof(struct sockaddr_in, sin_port), &net, sizeof net);
}

/* A listening socket on one address, or a code with *step saying where it failed. */
static int tcpsrv__listen_at(const struct sockaddr *name, socklen_t size,
                             const tcpsrv_bind_options *options, const char **step) {
    int fd = tcpsrv__sys_socket(name->sa_family), err;
    *step = "socket";
    if (fd < 0) return fd;
    *step = "setsockopt";
    err = tcpsrv__sys_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    if (err == -ENOPROTOOPT) err = 0;
    if (!err && options->reuse_port)
        err = tcpsrv__sys_option(fd, SOL_SOCKET, TCPSRV__REUSE_PORT, 1);
    if (!err && name->sa_family == AF_INET6)
        err = tcpsrv__sys_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    if (!err) {
        *step = "bind";
        err = tcpsrv__sys_bind(fd, name, size);
    }
    if (!err) {
        *step = "listen";
        err = tcpsrv__sys_listen(fd, options->backlog > 0 ? options->backlog : TCPSRV__BACKLOG);
    }
    if (err) tcpsrv__sys_close(fd);
    return err ? err : fd;
}

/* A family that this host lacks is left out where nobody named the address itself: a container's
   localhost may have a ::1 that no interface has. */
static TCPSRV__COLD int tcpsrv__may_skip(int err, int family, const char *host) {
    if (err == -EAFNOSUPPORT) return 1;
    return err == -EADDRNOTAVAIL && family == AF_INET6 &&
           (!host || strcmp(host, "localhost") == 0);
}

static void tcpsrv__close_all(const int *fds, int count) {
    while (count > 0) tcpsrv__sys_close(fds[--count]);
}

/* A list grows by so many; without memory it is as before. */
static TCPSRV__COLD int tcpsrv__fds_add(int **list, int *count, const int *fds, int more) {
    int *grown = (int *)TCPSERVER_REALLOC(*list, (size_t)(*count + more) * sizeof *grown);
    if (!grown) return -ENOMEM;
    memcpy(grown + *count, fds, (size_t)more * sizeof *grown);
    *list = grown;
    *count += more;
    return 0;
}

/* One try to bind them all; 0 stands for any port, the same for all. */
static int tcpsrv__bind_names(tcpsrv__lookup *lookup, const tcpsrv_bind_options *options,
                              int *fds, int max) {
    char place[TCPSRV_ADDRESS_TEXT];
    const char *step = "bind";
    int i, fd, n = 0, port = lookup->port, err = -EAFNOSUPPORT;
    for (i = 0; i < lookup->names.count; i++) {
        struct sockaddr_storage *name = &lookup->names.name[i];
        tcpsrv__set_port(name, port);
        fd = n < max ? tcpsrv__listen_at((const struct sockaddr *)name, lookup->names.size[i],
                                         options, &step)
                     : -ENOSPC;
        if (fd >= 0) {
            fds[n++] = fd;
            if (!port) port = tcpsrv__local_port(fd);
            continue;
        }
        err = fd;
        if (tcpsrv__may_skip(err, name->ss_family, lookup->host)) continue;
        tcpsrv__close_all(fds, n);
        tcpsrv__name_text((const struct sockaddr *)name, lookup->names.size[i], place);
        return tcpsrv__fail(err, step, place);
    }
    return n ? n : tcpsrv__fail_host(err, step, lookup->host, lookup->port);
}

TCPSRV_IMPL int tcpsrv_bind_sockets(int port, const char *address,
                                    const tcpsrv_bind_options *options, int *fds, int max) {
    static const tcpsrv_bind_options defaults = { 0, 0, 0 };
    tcpsrv__lookup *lookup;
    int n, tries = 0;
    if (port < 0 || port > 65535) return tcpsrv__fail_host(-EINVAL, "bind", address, port);
    if (!options) options = &defaults;
    if (options->reuse_port && TCPSRV__REUSE_PORT < 0)
        return tcpsrv__fail_host(-ENOTSUP, "reuse_port", address, port);
    lookup = (tcpsrv__lookup *)tcpsrv__alloc(sizeof *lookup);
    if (!lookup) return tcpsrv__fail_host(-ENOMEM, "bind", address, port);
    lookup->host = address && *address ? address : NULL;
    lookup->port = port;
    lookup->family = options->family;
    lookup->flags = AI_PASSIVE;
    n = tcpsrv__look_up(lookup);
    if (n) {
        tcpsrv__fail_host(n, "resolve", address, port);
    } else {
        do
            n = tcpsrv__bind_names(lookup, options, fds, max);
        while (n == -EADDRINUSE && port == 0 && ++tries < TCPSRV__PORT_TRIES);
    }
    tcpsrv__free(lookup);
    return n;
}

/* ---- Unix sockets ---------------------------------------------------------------------------- */

/* Which socket files this process made. An entry goes when a server closes the socket. */
typedef struct tcpsrv__unix_file {
    struct tcpsrv__unix_file *next;
    int fd;
    long pid;
    dev_t device;
    ino_t inode;
    char path[sizeof(struct sockaddr_un)];
} tcpsrv__unix_file;

static tcpsrv__unix_file *tcpsrv__unix_files;
static pthread_mutex_t tcpsrv__unix_lock = PTHREAD_MUTEX_INITIALIZER;

static tcpsrv__unix_file *tcpsrv__unix_take(int fd) {
    tcpsrv__unix_file **at = &tcpsrv__unix_files, *file;
    pthread_mutex_lock(&tcpsrv__unix_lock);
    while (*at && (*at)->fd != fd) at = &(*at)->next;
    file = *at;
    if (file) *at = file->next;
    pthread_mutex_unlock(&tcpsrv__unix_lock);
    return file;
}

/* Closes a listening socket. Its file goes too, if this process made it and it still is the one
   there. */
static TCPSRV__COLD void tcpsrv__listening_close(int fd) {
    tcpsrv__unix_file *file = tcpsrv__unix_take(fd);
    struct stat status;
    if (file && file->pid == tcpsrv__sys_pid() && tcpsrv__sys_lstat(file->path, &status) == 0 &&
        status.st_dev == file->device && status.st_ino == file->inode)
        tcpsrv__sys_remove(file->path);
    tcpsrv__free(file);
    tcpsrv__sys_close(fd);
}

static int tcpsrv__unix_owns(int fd) {
    const tcpsrv__unix_file *file;
    int owns;
    pthread_mutex_lock(&tcpsrv__unix_lock);
    for (file = tcpsrv__unix_files; file && file->fd != fd; file = file->next) continue;
    owns = file && file->pid == tcpsrv__sys_pid();
    pthread_mutex_unlock(&tcpsrv__unix_lock);
    return owns;
}

/* At the end of a process that only bound them, for its children. */
static TCPSRV__COLD void tcpsrv__unix_sockets_forget(void) {
    while (tcpsrv__unix_files) tcpsrv__listening_close(tcpsrv__unix_files->fd);
}

static int tcpsrv__unix_remember(int fd, const char *path) {
    tcpsrv__unix_file *file = (tcpsrv__unix_file *)tcpsrv__alloc(sizeof *file);
    struct stat status;
    int err = file ? tcpsrv__sys_lstat(path, &status) : -ENOMEM;
    tcpsrv__free(tcpsrv__unix_take(fd)); /* of a descriptor that was closed elsewhere */
    if (err) {
        tcpsrv__free(file);
        return err;
    }
    file->fd = fd;
    file->pid = tcpsrv__sys_pid();
    file->device = status.st_dev;
    file->inode = status.st_ino;
    memcpy(file->path, path, strlen(path) + 1);
    pthread_mutex_lock(&tcpsrv__unix_lock);
    file->next = tcpsrv__unix_files;
    tcpsrv__unix_files = file;
    pthread_mutex_unlock(&tcpsrv__unix_lock);
    return 0;
}

/* "@name" is an abstract name, without a file (unix(7)). */
static int tcpsrv__unix_name(const char *path, struct sockaddr_un *name, socklen_t *size) {
    size_t length = strlen(path);
    memset(name, 0, sizeof *name);
    name->sun_family = AF_UNIX;
    if (length == 0) return -EINVAL;
    if (length >= sizeof name->sun_path) return -ENAMETOOLONG;
    memcpy(name->sun_path, path, length);
    *size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    if (path[0] != '@') return 0;
    if (!TCPSRV__LINUX) return -ENOTSUP;
    name->sun_path[0] = 0;
    *size -= 1;
    return 0;
}

/* What is in the way of a bind: 0 where it was a socket that nobody listens on, now removed. */
static int tcpsrv__unix_replace_dead(const char *path, const struct sockaddr_un *name,
                                     socklen_t size) {
    struct stat before, after;
    int fd, err = tcpsrv__sys_lstat(path, &before);
    if (err) return err == -ENOENT ? 0 : err;
    if (!S_ISSOCK(before.st_mode)) return -EEXIST;
    fd = tcpsrv__sys_socket(AF_UNIX);
    if (fd < 0) return fd;
    err = tcpsrv__sys_connect(fd, (const struct sockaddr *)name, size);
    tcpsrv__sys_close(fd);
    if (err != -ECONNREFUSED) return err == -EACCES ? err : -EADDRINUSE;
    err = tcpsrv__sys_lstat(path, &after);
    if (err) return err == -ENOENT ? 0 : err;
    if (after.st_ino != before.st_ino || after.st_dev != before.st_dev) return -EADDRINUSE;
    return tcpsrv__sys_remove(path);
}

/* Nobody can connect before listen, so that the mode is in force from the first. */
static int tcpsrv__unix_bind(int fd, const char *path, unsigned mode) {
    struct sockaddr_un name;
    socklen_t size;
    int err = tcpsrv__unix_name(path, &name, &size);
    if (!err) err = tcpsrv__sys_bind(fd, (const struct sockaddr *)&name, size);
    if (err == -EADDRINUSE && path[0] != '@') {
        err = tcpsrv__unix_replace_dead(path, &name, size);
        if (!err) err = tcpsrv__sys_bind(fd, (const struct sockaddr *)&name, size);
    }
    if (err || path[0] == '@') return err;
    err = tcpsrv__unix_remember(fd, path);
    if (err) tcpsrv__sys_remove(path);
    return err ? err : tcpsrv__sys_chmod(path, mode ? mode : 0600);
}

TCPSRV_IMPL int tcpsrv_bind_unix_socket(const char *path, unsigned mode, int backlog) {
    int err, fd = tcpsrv__sys_socket(AF_UNIX);
    if (fd < 0) return tcpsrv__fail(fd, "socket", path);
    err = tcpsrv__unix_bind(fd, path, mode);
    if (!err) err = tcpsrv__sys_listen(fd, backlog > 0 ? backlog : TCPSRV__BACKLOG);
    if (!err) return fd;
    tcpsrv__listening_close(fd);
    return tcpsrv__fail(err, "bind unix", path);
}

/* ---- networks -------------------------------------------------------------------------------- */

typedef struct tcpsrv__network {
    unsigned char ip[16];
    int family, bits;
} tcpsrv__network;

/* A number as programs write it: digits alone, without leading zeros; -1 for anything else. */
static TCPSRV__COLD long tcpsrv__decimal(const char *text, long most) {
    long number = 0;
    if (!*text || (text[0] == '0' && text[1])) return -1;
    for (; *text; text++) {
        int digit = *text - '0';
        if (digit < 0 || digit > 9 || number > (most - digit) / 10) return -1;
        number = number * 10 + digit;
    }
    return number;
}

/* The bytes of an address, an IPv4-mapped one's as those of IPv4 (RFC 4291 2.5.5.2). Gives their
   family; 0 for none. */
static TCPSRV__COLD int tcpsrv__plain_ip(const tcpsrv_address *name, const unsigned char **ip) {
    static const unsigned char mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255 };
    *ip = name->ip;
    if (name->family != AF_INET6 || memcmp(name->ip, mapped, sizeof mapped) != 0)
        return name->family == AF_INET || name->family == AF_INET6 ? name->family : 0;
    *ip += sizeof mapped;
    return AF_INET;
}

static TCPSRV__COLD int tcpsrv__network_has(const tcpsrv__network *network,
                                            const tcpsrv_address *name) {
    const unsigned char *ip;
    int family = tcpsrv__plain_ip(name, &ip), whole = network->bits / 8, rest = network->bits % 8;
    if (name->family == AF_UNIX) return network->family == AF_UNIX;
    if (family != network->family || memcmp(ip, network->ip, (size_t)whole) != 0) return 0;
    return rest == 0 || (ip[whole] ^ network->ip[whole]) >> (8 - rest) == 0;
}

/* "192.0.2.0/24", "fd00::/8", "192.0.2.1", "unix". */
static TCPSRV__COLD int tcpsrv__network_parse(char *text, tcpsrv__network *network) {
    char *slash = strchr(text, '/');
    int most;
    memset(network, 0, sizeof *network);
    network->family = strchr(text, ':') ? AF_INET6 : AF_INET;
    if (strcmp(text, "unix") == 0) {
        network->family = AF_UNIX;
        return 0;
    }
    if (slash) *slash = 0;
    most = network->family == AF_INET6 ? 128 : 32;
    network->bits = slash ? (int)tcpsrv__decimal(slash + 1, most) : most;
    most = inet_pton(network->family, text, network->ip);
    if (slash) *slash = '/';
    return most == 1 && network->bits >= 0 ? 0 : -EINVAL;
}

/* The next of a list, in text of size 64; 0: no more. *list moves behind it. */
static TCPSRV__COLD int tcpsrv__network_next(const char **list, char *text) {
    const char *at = *list;
    size_t size = 0;
    while (*at && strchr(", \t\n", *at)) at++;
    for (; *at && !strchr(", \t\n", *at); at++)
        if (size < 63) text[size++] = *at;
    text[size] = 0;
    *list = at;
    return size > 0;
}

/* ---- the PROXY header ------------------------------------------------------------------------ */

/* After doc/proxy-protocol.txt of HAProxy. */
enum {
    TCPSRV__PROXY_LINE = 107,       /* the longest of version 1 */
    TCPSRV__PROXY_HEAD = 16,        /* of version 2, before the addresses */
    TCPSRV__PROXY_MOST = 16384      /* of version 2 with all its extensions */
};
static const char tcpsrv__proxy_1[] = "PROXY ";
static const char tcpsrv__proxy_2[] = "\r\n\r\n\0\r\nQUIT\n";

/* Whether the bytes begin as a signature does, as far as they go. */
static TCPSRV__COLD int tcpsrv__proxy_begins(const char *data, size_t size, const char *signature,
                                             size_t length) {
    return memcmp(data, signature, size < length ? size : length) == 0;
}

/* Of a header that begins so; 0: none. Wholly: all of the signature must be there. */
static TCPSRV__COLD int tcpsrv__proxy_version(const char *data, size_t size, int wholly) {
    if ((!wholly || size >= sizeof tcpsrv__proxy_1 - 1) &&
        tcpsrv__proxy_begins(data, size, tcpsrv__proxy_1, sizeof tcpsrv__proxy_1 - 1))
        return 1;
    return (!wholly || size >= sizeof tcpsrv__proxy_2 - 1) &&
           tcpsrv__proxy_begins(data, size, tcpsrv__proxy_2, sizeof tcpsrv__proxy_2 - 1) ? 2 : 0;
}

/* A tcpsrv_find_end_fn: refuses as soon as it cannot become a header any more. */
static TCPSRV__COLD int64_t tcpsrv__proxy_end(const char *data, size_t size, void *arg) {
    const unsigned char *head = (const unsigned char *)data;
    const size_t most = TCPSRV__PROXY_LINE;
    const char *end;
    int64_t length;
    int version = tcpsrv__proxy_version(data, size, 0);
    (void)arg;
    if (version == 1) {
        end = (const char *)memchr(data, '\n', size < most ? size : most);
        if (end) return end[-1] == '\r' ? end - data + 1 : -1;
        return size < most ? 0 : -1;
    }
    if (!version) return -1;
    if (size > 12 && head[12] >> 4 != 2) return -1;
    if (size < TCPSRV__PROXY_HEAD) return 0;
    length = TCPSRV__PROXY_HEAD + (head[14] << 8) + head[15];
    return length <= TCPSRV__PROXY_MOST ? length : -1;
}

static TCPSRV__COLD int tcpsrv__proxy_ip(tcpsrv_address *address, int family,
                                         const unsigned char *ip, const unsigned char *port) {
    memset(address, 0, sizeof *address);
    address->family = family;
    memcpy(address->ip, ip, family == AF_INET ? 4 : 16);
    address->port = (unsigned short)(port[0] << 8 | port[1]);
    return 1;
}

/* 1: the source's address is known now; 0: the header leaves it as it is; a code: malformed. */
static TCPSRV__COLD int tcpsrv__proxy_parse_2(const unsigned char *data, size_t size,
                                              tcpsrv_address *address) {
    const unsigned char *at = data + TCPSRV__PROXY_HEAD;
    int command = data[12] & 15, family = data[13] >> 4, transport = data[13] & 15;
    size -= TCPSRV__PROXY_HEAD;
    if (command == 0) return 0; /* LOCAL: the proxy's own connection */
    if (command != 1 || family > 3 || transport > 2) return TCPSRV__EPROXY;
    if (family == 0 || transport != 1) return 0; /* valid, and says nothing about a stream */
    if (size < (family == 1 ? 12u : family == 2 ? 36u : 216u)) return TCPSRV__EPROXY;
    if (family == 1) return tcpsrv__proxy_ip(address, AF_INET, at, at + 8);
    if (family == 2) return tcpsrv__proxy_ip(address, AF_INET6, at, at + 32);
    memset(address, 0, sizeof *address);
    address->family = AF_UNIX;
    memcpy(address->path, at, 108);
    if (!address->path[0] && address->path[1]) address->path[0] = '@';
    return 1;
}

/* The fields of a line, with exactly one blank between; 0: not so many. */
static TCPSRV__COLD int tcpsrv__proxy_split(char *line, char **fields, int count) {
    int i;
    for (i = 0; i < count; i++) {
        fields[i] = line;
        line = strchr(line, ' ');
        if (!line) return i + 1 == count;
        *line++ = 0;
    }
    return 0;
}

static TCPSRV__COLD int tcpsrv__proxy_parse_1(const char *data, size_t size,
                                              tcpsrv_address *address) {
    char line[TCPSRV__PROXY_LINE], *fields[6];
    unsigned char source[16], target[16], ports[2];
    size_t length = size - 2; /* without CR LF */
    long from, to;
    int family;
    memcpy(line, data, length);
    line[length] = 0;
    if (strlen(line) != length || strchr(line, '\r')) return TCPSRV__EPROXY;
    if (strncmp(line, "PROXY UNKNOWN", 13) == 0 && (!line[13] || line[13] == ' ')) return 0;
    if (!tcpsrv__proxy_split(line, fields, 6)) return TCPSRV__EPROXY;
    family = strcmp(fields[1], "TCP4") == 0 ? AF_INET : AF_INET6;
    if (family == AF_INET6 && strcmp(fields[1], "TCP6") != 0) return TCPSRV__EPROXY;
    from = tcpsrv__decimal(fields[4], 65535);
    to = tcpsrv__decimal(fields[5], 65535);
    if (from < 0 || to < 0 || inet_pton(family, fields[2], source) != 1 ||
        inet_pton(family, fields[3], target) != 1)
        return TCPSRV__EPROXY;
    ports[0] = (unsigned char)(from >> 8);
    ports[1] = (unsigned char)(from & 255);
    return tcpsrv__proxy_ip(address, family, source, ports);
}

static TCPSRV__COLD int tcpsrv__proxy_parse(tcpsrv_bytes header, tcpsrv_address *address) {
    if (header.data[0] == 'P') return tcpsrv__proxy_parse_1(header.data, header.size, address);
    return tcpsrv__proxy_parse_2((const unsigned char *)header.data, header.size, address);
}

/* ---- the service manager --------------------------------------------------------------------- */

enum { TCPSRV__FIRST_FD = 3 }; /* SD_LISTEN_FDS_START */

static char tcpsrv__listen_names[1024]; /* each with a NUL behind it */
static size_t tcpsrv__listen_names_size;

/* How many sockets were passed to this process; a code. */
static TCPSRV__COLD long tcpsrv__passed_count(void) {
    const char *pid = tcpsrv__sys_variable("LISTEN_PID");
    const char *count = tcpsrv__sys_variable("LISTEN_FDS");
    long number;
    if (!pid || !count) return 0;
    number = tcpsrv__decimal(pid, INT_MAX);
    if (number < 0) return -EINVAL;
    if (number != tcpsrv__sys_pid()) return 0; /* meant for who started us */
    number = tcpsrv__decimal(count, INT_MAX - TCPSRV__FIRST_FD);
    return number < 0 ? -EINVAL : number;
}

static TCPSRV__COLD void tcpsrv__keep_names(const char *names) {
    size_t size = 0;
    for (; names && *names && size < sizeof tcpsrv__listen_names - 1; names++)
        tcpsrv__listen_names[size++] = (char)(*names == ':' ? 0 : *names);
    tcpsrv__listen_names[size] = 0;
    tcpsrv__listen_names_size = names ? size + 1 : 0;
}

/* A socket file that was the predecessor's (tcpsrv_upgrade) is this process's. */
static TCPSRV__COLD void tcpsrv__adopt(int fd) {
    tcpsrv_address address;
    tcpsrv__own_address(fd, &address);
    if (address.path[0] && address.path[0] != '@') tcpsrv__unix_remember(fd, address.path);
}

TCPSRV_IMPL int tcpsrv_systemd_sockets(int *fds, int max) {
    const char *owned = tcpsrv__sys_variable("TCPSRV_OWNED");
    long i, n = tcpsrv__passed_count();
    int err = n < 0 ? (int)n : 0;
    if (n > max) return tcpsrv__fail(-ENOSPC, "systemd_sockets", NULL);
    for (i = 0; i < n && !err; i++) {
        fds[i] = (int)(TCPSRV__FIRST_FD + i);
        err = tcpsrv__sys_close_on_exec(fds[i]);
        if (!err && owned && strlen(owned) == (size_t)n && owned[i] == '1') tcpsrv__adopt(fds[i]);
    }
    if (n > 0) tcpsrv__keep_names(tcpsrv__sys_variable("LISTEN_FDNAMES"));
    tcpsrv__sys_clear_variable("LISTEN_PID");
    tcpsrv__sys_clear_variable("LISTEN_FDS");
    tcpsrv__sys_clear_variable("LISTEN_FDNAMES");
    tcpsrv__sys_clear_variable("TCPSRV_OWNED");
    return err ? tcpsrv__fail(err, "systemd_sockets", "LISTEN_FDS") : (int)n;
}

TCPSRV_IMPL const char *tcpsrv_systemd_name(int index) {
    size_t at = 0;
    while (index > 0 && at < tcpsrv__listen_names_size)
        if (!tcpsrv__listen_names[at++]) index--;
    return index == 0 && at < tcpsrv__listen_names_size ? tcpsrv__listen_names + at : "";
}

static TCPSRV__COLD int tcpsrv__tell(const char *path, const char *state) {
    struct sockaddr_un name;
    socklen_t size;
    int err;
    if (!path || !*path) return 0;
    err = *path == '/' || *path == '@' ? tcpsrv__unix_name(path, &name, &size) : -ENOTSUP;
    if (!err) err = tcpsrv__sys_tell((const struct sockaddr *)&name, size, state);
    return err ? tcpsrv__fail(err, "notify", path) : 0;
}

/* Whether one of the lines is READY=1. */
static int tcpsrv__says_ready(const char *words) {
    while (strncmp(words, "READY=1", 7) != 0 || (words[7] && words[7] != '\n')) {
        words = strchr(words, '\n');
        if (!words) return 0;
        words++;
    }
    return 1;
}

/* A successor speaks to its predecessor, until it has said that it is ready or nobody listens there
   any more, and to the service manager that the predecessor had, if any. */
TCPSRV_IMPL int tcpsrv_notify(const char *state) {
    const char *manager = tcpsrv__sys_variable("TCPSRV_NOTIFY_SOCKET");
    int err = tcpsrv__tell(tcpsrv__sys_variable("NOTIFY_SOCKET"), state);
    if (!manager) return err;
    if (err == -ENOENT || err == -ECONNREFUSED) err = 0;
    if (*manager) err = tcpsrv__tell(manager, state);
    if (!tcpsrv__says_ready(state)) return err;
    if (*manager) tcpsrv__sys_set_variable("NOTIFY_SOCKET", manager);
    else tcpsrv__sys_clear_variable("NOTIFY_SOCKET");
    tcpsrv__sys_clear_variable("TCPSRV_NOTIFY_SOCKET");
    return err;
}

/* ---- errors in words ------------------------------------------------------------------------- */

typedef struct tcpsrv__code_name {
    short code;
    char name[36];
} tcpsrv__code_name;

static const tcpsrv__code_name tcpsrv__code_names[] = {
    { 0, "success" },
    { TCPSRV_EOF, "the peer has finished" },
    { TCPSRV_ECLOSED, "closed on this side" },
    { TCPSRV_ECANCELED, "cancelled" },
    { TCPSRV_EBUSY, "another call waits, or came before" },
    { TCPSRV_ETOOBIG, "the message is too long" },
    { TCPSRV_EBUFFULL, "the buffers are full" },
    { TCPSRV_ETIMEDOUT, "timed out" },
    { TCPSRV_ENOTCORO, "only a coroutine can wait here" },
    { TCPSRV_EREFUSED, "refused by the framing" },
    { TCPSRV__EPROXY, "not a PROXY header" },
    { TCPSRV__EUNTRUSTED, "not a trusted proxy" },
    { TCPSRV__EPER_IP, "max_connections_per_ip is reached" },
    { TCPSRV__ECONNECTIONS, "max_connections is reached" },
    { TCPSRV__EMEMORY, "memory_limit is reached" }
};

TCPSRV_IMPL const char *tcpsrv_strerror(int code) {
    size_t i;
    for (i = 0; i < sizeof tcpsrv__code_names / sizeof tcpsrv__code_names[0]; i++)
        if (tcpsrv__code_names[i].code == code) return tcpsrv__code_names[i].name;
    if (code <= TCPSRV_ETLS && code > TCPSRV_ERESOLVE) return tcpsrv__secure_text(code);
    if (code <= TCPSRV_ERESOLVE) return tcpsrv__sys_resolve_text(TCPSRV_ERESOLVE - code);
    return code < 0 && code > TCPSRV_EOF ? strerror(-code) : "unknown code";
}

TCPSRV_IMPL const char *tcpsrv_last_error(void) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    if (!thread->error) return "";
    if (!thread->step) return thread->text; /* a sentence already */
    if (thread->peer.family)
        tcpsrv_address_text(&thread->peer, thread->place, sizeof thread->place);
    snprintf(thread->text, sizeof thread->text, "%.40s%s%.127s: %.120s", thread->step,
             thread->place[0] ? " " : "", thread->place, tcpsrv_strerror(thread->error));
    return thread->text;
}

/* ---- streams that are not accepted ----------------------------------------------------------- */

/* NULL, with the failure recorded. A descriptor that became a stream's is closed with it. */
static TCPSRV__COLD tcpsrv_stream *tcpsrv__lone_start(tcpsrv__lone *lone, tcpsrv_loop *loop, int fd,
                                                      int directions) {
    int err = lone ? 0 : -ENOMEM;
    if (!err) {
        tcpsrv__refresh_now(loop);
        lone->base.stream.readable = 1;
        err = tcpsrv__stream_init(&lone->base.stream, loop, &lone->owner, fd, directions);
    }
    if (!err) return &lone->base.stream;
    if (lone) tcpsrv__free(lone->base.stream.extra);
    tcpsrv__free(lone);
    tcpsrv__fail(err, "stream", NULL);
    return NULL;
}

static void tcpsrv__peer_of(tcpsrv_stream *stream, int fd) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    tcpsrv_address address;
    int err = tcpsrv__sys_peer_name(fd, &name, &size);
    tcpsrv__address_from_sockaddr(&address, (const struct sockaddr *)&name, err ? 0 : size);
    tcpsrv__set_peer(stream, &address);
}

TCPSRV_IMPL tcpsrv_stream *tcpsrv_stream_from_fd(tcpsrv_loop *loop, int fd) {
    tcpsrv__lone *lone;
    tcpsrv_stream *stream;
    tcpsrv_address own;
    int err = tcpsrv__own_address(fd, &own), is_socket = err != -ENOTSOCK;
    int was_blocking = err && is_socket ? err : tcpsrv__sys_set_blocking(fd, 0);
    if (was_blocking < 0) {
        tcpsrv__fail(was_blocking, "stream_from_fd", NULL);
        return NULL;
    }
    lone = tcpsrv__lone_new(NULL);
    if (lone && !is_socket) {
        lone->base.stream.foreign = 1;
        if (tcpsrv__extra_make(&lone->base.stream)) {
            lone->base.stream.extra->io = &tcpsrv__file;
        } else {
            tcpsrv__free(lone);
            lone = NULL;
        }
    }
    stream = tcpsrv__lone_start(lone, loop, fd, TCPSRV__EVENT_READ);
    if (!stream) {
        if (was_blocking) tcpsrv__sys_set_blocking(fd, 1);
        return NULL;
    }
    stream->was_blocking = was_blocking != 0;
    stream->deep = 1;
    if (is_socket) tcpsrv__peer_of(stream, fd);
    return stream;
}

TCPSRV_IMPL int tcpsrv_local(const tcpsrv_stream *stream, tcpsrv_address *address) {
    int err = tcpsrv__no_descriptor(stream);
    if (!err) err = tcpsrv__own_address(stream->source.fd, address);
    return err ? tcpsrv__fail_at(err, "local", stream) : 0;
}

/* ---- connecting ------------------------------------------------------------------------------ */

/* A name's addresses race (RFC 8305): each has its turn when the one before it has failed or had
   its 250 ms, and the first that is connected becomes the stream's. The attempts are sources of
   their own, so that an event for a loser meets nobody. Names are looked up by a helper thread: all
   that /etc and the C library's plugins know of names is known to getaddrinfo(3) alone, which
   blocks; a forked helper would cost a copy of the address space and a child that the program did
   not ask for. */

enum { TCPSRV__ATTEMPT_MS = 250 }; /* the Connection Attempt Delay of RFC 8305 5 */

typedef struct tcpsrv__attempt {
    tcpsrv__source source;
    struct tcpsrv__attempt *next;   /* of the same race */
    tcpsrv_stream *stream;
    int index;                      /* of its name */
} tcpsrv__attempt;

typedef struct tcpsrv__lookup_job {
    tcpsrv__job job;                /* first: freed as it */
    tcpsrv_loop *loop;
    int64_t stream_id;
    tcpsrv__lookup lookup;          /* its host is a copy behind this */
} tcpsrv__lookup_job;

typedef struct tcpsrv__race {
    tcpsrv__making making;          /* first: freed as it */
    tcpsrv_stream *stream;
    tcpsrv__lookup_job *job;        /* NULL: the names are known */
    tcpsrv__attempt *attempts;      /* under way */
    tcpsrv__timer timer;            /* the next one's turn */
    int next;                       /* the first name whose turn has not come */
    int no_nodelay;
    socklen_t source_size;          /* 0: none */
    int source_port;                /* of a source without an address */
    tcpsrv_tls *tls;                /* what the connection begins with; NULL: nothing */
    char *tls_name;                 /* behind this */
    struct sockaddr_storage source_name;
    char place[TCPSRV_ADDRESS_TEXT];
    tcpsrv__names names;
} tcpsrv__race;

static tcpsrv__race *tcpsrv__race_of(const tcpsrv_stream *stream) {
    return TCPSRV__CONTAINER(tcpsrv__race, making, stream->extra->making);
}

/* What goes on now, and where; is_peer: that address is the stream's peer from now on. */
static TCPSRV__COLD void tcpsrv__race_says(tcpsrv__race *race, const char *step, int index,
                                           int is_peer) {
    tcpsrv_address address;
    tcpsrv__address_from_sockaddr(&address, (const struct sockaddr *)&race->names.name[index],
                                  race->names.size[index]);
    race->making.step = step;
    tcpsrv_address_text(&address, race->place, sizeof race->place);
    if (is_peer) tcpsrv__set_peer(race->stream, &address);
}

/* Takes it out of the race; its descriptor is the caller's. */
static TCPSRV__COLD int tcpsrv__attempt_end(tcpsrv__attempt *attempt) {
    tcpsrv__attempt **at = &tcpsrv__race_of(attempt->stream)->attempts;
    while (*at != attempt) at = &(*at)->next;
    *at = attempt->next;
    tcpsrv__poller_remove(&attempt->source.loop->poller, attempt->source.fd);
    tcpsrv__source_end(&attempt->source);
    return attempt->source.fd;
}

static TCPSRV__COLD void tcpsrv__attempt_drop(tcpsrv__source *source) {
    tcpsrv__sys_close(tcpsrv__attempt_end(TCPSRV__CONTAINER(tcpsrv__attempt, source, source)));
}

static TCPSRV__COLD void tcpsrv__race_give_up(tcpsrv_stream *stream) {
    tcpsrv__race *race = tcpsrv__race_of(stream);
    tcpsrv__timer_cancel(stream->source.loop, &race->timer);
    if (race->job) tcpsrv__job_cancel(stream->source.loop, &race->job->job);
    race->job = NULL;
    tcpsrv__secure_drop(race->tls);
    race->tls = NULL;
    while (race->attempts) tcpsrv__attempt_drop(&race->attempts->source);
}

static TCPSRV__COLD void tcpsrv__race_won(tcpsrv_stream *stream, int fd, int index) {
    tcpsrv__race *race = tcpsrv__race_of(stream);
    tcpsrv_tls *tls = TCPSRV__TLS ? race->tls : NULL;
    int err;
    race->tls = NULL;
    tcpsrv__race_give_up(stream);
    tcpsrv__race_says(race, "connect", index, 1);
    stream->deep = race->names.name[index].ss_family == AF_UNIX;
    if (!tls) stream->extra->connect_due = 0;
    err = tcpsrv__stream_adopt(stream, fd);
    if (!err && tls) err = tcpsrv__secure(stream, tls, 1, race->tls_name);
    tcpsrv__secure_drop(tls);
    if (err) tcpsrv__die(stream, err);
    stream->extra->making = NULL;
    tcpsrv__free(race);
}

/* With any port the kernel chooses at connect, where one pair of addresses has 64 K of them, not
   at bind (IP_BIND_ADDRESS_NO_PORT, ip(7)). */
static TCPSRV__COLD int tcpsrv__bind_source(tcpsrv__race *race, int fd, int family) {
    struct sockaddr_storage name = race->source_name;
    socklen_t size = race->source_size;
    if (!size && !race->source_port) return 0;
    if (!size) {
        memset(&name, 0, sizeof name);
        name.ss_family = (sa_family_t)family;
        size = family == AF_INET6 ? (socklen_t)sizeof(struct sockaddr_in6)
                                  : (socklen_t)sizeof(struct sockaddr_in);
    }
    tcpsrv__set_port(&name, race->source_port);
    tcpsrv__name_text((const struct sockaddr *)&name, size, race->place);
    race->making.step = "bind source";
    if (!race->source_port && TCPSRV__BIND_NO_PORT >= 0)
        tcpsrv__sys_option(fd, IPPROTO_IP, TCPSRV__BIND_NO_PORT, 1);
    return tcpsrv__sys_bind(fd, (const struct sockaddr *)&name, size);
}

/* Nobody listens there, and the kernel happened to give this side that very port: the connection
   meets itself (RFC 9293 3.5, simultaneous open). */
static TCPSRV__COLD int tcpsrv__meets_itself(const tcpsrv__race *race, int fd, int index) {
    const struct sockaddr *name = (const struct sockaddr *)&race->names.name[index];
    tcpsrv_address here, there;
    if (name->sa_family == AF_UNIX || tcpsrv__own_address(fd, &here) != 0) return 0;
    tcpsrv__address_from_sockaddr(&there, name, race->names.size[index]);
    return here.port == there.port && here.family == there.family &&
           memcmp(here.ip, there.ip, sizeof here.ip) == 0;
}

/* 1: connected at once; 0: under way; or a code. */
static TCPSRV__COLD int tcpsrv__attempt_connect(tcpsrv__race *race, int fd, int index) {
    const struct sockaddr *name = (const struct sockaddr *)&race->names.name[index];
    int err = 0;
    if (name->sa_family != AF_UNIX) {
        if (!race->no_nodelay) tcpsrv__sys_nodelay(fd, 1);
        err = tcpsrv__bind_source(race, fd, name->sa_family);
    }
    if (err) return err;
    tcpsrv__race_says(race, "connect", index, 0);
    err = tcpsrv__sys_connect(fd, name, race->names.size[index]);
    if (!err && tcpsrv__meets_itself(race, fd, index)) err = -ECONNREFUSED;
    return err < 0 ? err : !err;
}

static void tcpsrv__attempt_event(tcpsrv__source *source, int events);

static const tcpsrv__class tcpsrv__attempt_class = {
    tcpsrv__attempt_event, NULL, tcpsrv__attempt_drop, NULL, sizeof(tcpsrv__attempt), 0
};

/* 0, and the loop tells of it; or a code, and the descriptor is the caller's still. */
static TCPSRV__COLD int tcpsrv__attempt_watch(tcpsrv__race *race, int fd, int index) {
    tcpsrv_loop *loop = race->stream->source.loop;
    tcpsrv__attempt *attempt;
    int err;
    attempt = (tcpsrv__attempt *)tcpsrv__source_new(&tcpsrv__attempt_class, loop, fd, &err);
    if (!attempt) return err;
    attempt->stream = race->stream;
    attempt->index = index;
    attempt->next = race->attempts;
    race->attempts = attempt;
    err = tcpsrv__poller_add_stream(&loop->poller, fd, attempt->source.id,
                                    TCPSRV__EVENT_READ | TCPSRV__EVENT_WRITE);
    if (err) tcpsrv__attempt_end(attempt);
    return err;
}

/* 0: under way, or the race is won already; or a code. */
static TCPSRV__COLD int tcpsrv__attempt_begin(tcpsrv__race *race, int index) {
    int err, fd = tcpsrv__sys_socket(race->names.name[index].ss_family);
    tcpsrv__race_says(race, "socket", index, 1);
    if (fd < 0) return fd;
    err = tcpsrv__attempt_connect(race, fd, index);
    if (err > 0) {
        tcpsrv__race_won(race->stream, fd, index);
        return 0;
    }
    if (!err) err = tcpsrv__attempt_watch(race, fd, index);
    if (err) tcpsrv__sys_close(fd);
    return err;
}

/* The next addresses have their turn, until one is under way. Without memory for the timer the one
   behind it waits for its failure. Gives err, or the last address's failure, when all have failed;
   the race is gone when it was won at once. */
static TCPSRV__COLD int tcpsrv__race_on(tcpsrv__race *race, int err) {
    tcpsrv_stream *stream = race->stream;
    tcpsrv_loop *loop = stream->source.loop;
    int begun = 0;
    tcpsrv__timer_cancel(loop, &race->timer);
    while (!begun && race->next < race->names.count) {
        err = tcpsrv__attempt_begin(race, race->next++);
        begun = !err;
        if (!stream->connecting || !stream->extra->making) return 0;
    }
    if (race->next < race->names.count)
        tcpsrv__timer_arm(loop, &race->timer, loop->now + TCPSRV__NS(TCPSRV__ATTEMPT_MS));
    return race->attempts ? 0 : err;
}

static TCPSRV__COLD void tcpsrv__race_timer(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv__race *race = TCPSRV__CONTAINER(tcpsrv__race, timer, timer);
    tcpsrv_stream *stream = race->stream;
    int err = tcpsrv__race_on(race, 0);
    (void)loop;
    if (err) tcpsrv__die(stream, err);
}

static TCPSRV__COLD void tcpsrv__attempt_event(tcpsrv__source *source, int events) {
    tcpsrv__attempt *attempt = TCPSRV__CONTAINER(tcpsrv__attempt, source, source);
    tcpsrv_stream *stream = attempt->stream;
    tcpsrv__race *race = tcpsrv__race_of(stream);
    int index = attempt->index, err = tcpsrv__socket_error(source->fd);
    (void)events;
    if (!err && !tcpsrv__sys_connected(source->fd)) return; /* not yet */
    if (!err && tcpsrv__meets_itself(race, source->fd, index)) err = -ECONNREFUSED;
    if (!err) {
        tcpsrv__race_won(stream, tcpsrv__attempt_end(attempt), index);
        return;
    }
    tcpsrv__race_says(race, "connect", index, 0);
    tcpsrv__attempt_drop(source);
    err = tcpsrv__race_on(race, err);
    if (err) tcpsrv__die(stream, err);
}

/* ---- what to connect to ---------------------------------------------------------------------- */

/* The stream may have ended meanwhile. */
static TCPSRV__COLD void tcpsrv__looked_up(void *arg) {
    tcpsrv__lookup_job *job = TCPSRV__CONTAINER(tcpsrv__lookup_job, lookup, arg);
    tcpsrv__source *source = tcpsrv__source_by_id(job->loop, job->stream_id);
    tcpsrv_stream *stream = source ? tcpsrv__stream_of(source) : NULL;
    tcpsrv__race *race;
    int err = job->lookup.err;
    if (!stream || stream->dead) return;
    race = tcpsrv__race_of(stream);
    race->job = NULL;
    race->names = job->lookup.names;
    if (!err) err = tcpsrv__race_on(race, 0);
    if (err) tcpsrv__die(stream, err);
}

static TCPSRV__COLD int tcpsrv__look_up_later(tcpsrv__race *race, const tcpsrv__lookup *lookup) {
    size_t length = strlen(lookup->host) + 1;
    tcpsrv__lookup_job *job = (tcpsrv__lookup_job *)tcpsrv__alloc(sizeof *job + length);
    int err;
    if (!job) return -ENOMEM;
    job->lookup.port = lookup->port;
    job->lookup.family = lookup->family;
    job->lookup.host = (const char *)memcpy(job + 1, lookup->host, length);
    job->loop = race->stream->source.loop;
    job->stream_id = race->stream->source.id;
    job->job.work = tcpsrv__lookup_errand;
    job->job.posted.fn = tcpsrv__looked_up;
    job->job.posted.arg = &job->lookup;
    err = tcpsrv__job_start(job->loop, &job->job);
    if (err) tcpsrv__free(job);
    else race->job = job;
    return err;
}

/* A source's family is the only one that can be reached from it. */
static TCPSRV__COLD int tcpsrv__find_source(tcpsrv__race *race, tcpsrv__lookup *lookup,
                                            const tcpsrv_connect_options *options) {
    int err;
    race->source_port = options->source_port;
    if (!options->source_host) return 0;
    lookup->host = options->source_host;
    lookup->port = options->source_port;
    race->making.step = "bind source";
    tcpsrv__host_text(lookup->host, lookup->port, race->place);
    err = tcpsrv__look_up(lookup);
    if (err) return err;
    race->source_name = lookup->names.name[0];
    race->source_size = lookup->names.size[0];
    lookup->family = race->source_name.ss_family;
    return 0;
}

static TCPSRV__COLD int tcpsrv__find_names(tcpsrv__race *race, tcpsrv__lookup *lookup,
                                           const tcpsrv_connect_options *options) {
    int err;
    lookup->family = options->family;
    lookup->flags = AI_NUMERICHOST;
    err = tcpsrv__find_source(race, lookup, options);
    if (err) return err;
    lookup->host = options->host;
    lookup->port = options->port;
    race->making.step = "connect";
    tcpsrv__host_text(options->host, options->port, race->place);
    err = tcpsrv__look_up(lookup);
    race->names = lookup->names;
    if (err != TCPSRV__NOT_NUMERIC) return err;
    race->making.step = "resolve";
    return tcpsrv__look_up_later(race, lookup);
}

static TCPSRV__COLD int tcpsrv__find_path(tcpsrv__race *race, const char *path) {
    struct sockaddr_un name;
    int err = tcpsrv__unix_name(path, &name, &race->names.size[0]);
    snprintf(race->place, sizeof race->place, "unix:%s", path);
    memcpy(&race->names.name[0], &name, sizeof name);
    race->names.count = 1;
    return err;
}

static TCPSRV__COLD int tcpsrv__find_all(tcpsrv__race *race,
                                         const tcpsrv_connect_options *options) {
    tcpsrv__lookup *lookup;
    int err;
    race->making.step = "connect";
    if (options->path) return tcpsrv__find_path(race, options->path);
    tcpsrv__host_text(options->host && *options->host ? options->host : "(no host)", options->port,
                      race->place);
    if (!options->host || !*options->host || options->port <= 0 || options->port > 65535 ||
        options->source_port < 0 || options->source_port > 65535)
        return -EINVAL;
    lookup = (tcpsrv__lookup *)tcpsrv__alloc(sizeof *lookup);
    if (!lookup) return -ENOMEM;
    err = tcpsrv__find_names(race, lookup, options);
    tcpsrv__free(lookup);
    return err;
}

/* The deadline is there before anything begins, so that nothing outlives it. */
static TCPSRV__COLD int tcpsrv__race_begin(tcpsrv__race *race,
                                           const tcpsrv_connect_options *options) {
    tcpsrv_stream *stream = race->stream;
    int err;
    stream->connecting = 1;
    stream->readable = 0;
    stream->blocked = 1;
    stream->extra->making = &race->making;
    race->making.give_up = tcpsrv__race_give_up;
    race->timer.fire = tcpsrv__race_timer;
    race->no_nodelay = options->no_nodelay;
    if (options->timeout_ms > 0)
        stream->extra->connect_due = stream->source.loop->now +
                                     tcpsrv__ms_to_ns(options->timeout_ms);
    err = tcpsrv__alarm_arm(stream);
    if (!err) err = tcpsrv__find_all(race, options);
    return err || race->job ? err : tcpsrv__race_on(race, 0);
}

TCPSRV_IMPL tcpsrv_stream *tcpsrv_connect(tcpsrv_loop *loop,
                                          const tcpsrv_connect_options *options) {
    const char *name = options->tls_name ? options->tls_name : options->host;
    size_t size = TCPSRV__TLS && options->tls && name ? strlen(name) + 1 : 0;
    tcpsrv_stream *stream = tcpsrv__lone_start(tcpsrv__lone_new(options), loop, -1, 0);
    tcpsrv__race *race;
    int err;
    if (!stream) return NULL;
    race = tcpsrv__extra_make(stream) ? (tcpsrv__race *)tcpsrv__alloc(sizeof *race + size) : NULL;
    if (!race) tcpsrv__fail(-ENOMEM, "connect", NULL);
    if (!race || tcpsrv__secure_hold(options->tls, 1, name) != 0) {
        tcpsrv__free(race);
        tcpsrv_abort(stream);
        return NULL;
    }
    race->stream = stream;
    race->making.place = race->place;
    race->making.secure = options->tls != NULL;
    race->tls = options->tls;
    if (size) race->tls_name = (char *)memcpy(race + 1, name, size);
    err = tcpsrv__race_begin(race, options);
    if (!err) return stream;
    tcpsrv__fail(err, race->making.step, race->place);
    tcpsrv_abort(stream);
    return NULL;
}

/* ==== >>server ================================================================================ */

/* Owns listening sockets and what the streams made from them have in common. Accepting never dies:
   whatever goes wrong, a listener is at worst taken out of the poller for a while, and a timer or
   the end of a connection brings it back. */

enum {
    TCPSRV__PAUSE_MS = 50,
    TCPSRV__PAUSE_MAX_MS = 1000,
    TCPSRV__FIRST_MS = 1000,        /* for a first message that a drain meets on its way */
    TCPSRV__ACCEPT_BURST = 64,
    TCPSRV__SHED = 4,               /* connections refused at once when descriptors have run out */
    TCPSRV__READD = 16,             /* accepts after which a shared listener queues up anew */
    TCPSRV__LOG_CAUSES = 8
};

typedef struct tcpsrv__listener {
    tcpsrv__source source;
    struct tcpsrv__listener *next;
    tcpsrv *server;
    uint64_t last_turn;
    int burst, accepted, polled;
} tcpsrv__listener;

typedef struct tcpsrv__log_cause {
    int code;
    uint64_t next;                  /* when it may be logged again */
    unsigned missed;
} tcpsrv__log_cause;

/* How many connections each address has: a hash table with linear probing, at most half full. */
typedef struct tcpsrv__crowd {
    uint64_t key;
    size_t count;                   /* 0: a free slot */
} tcpsrv__crowd;

typedef struct tcpsrv__crowds {
    tcpsrv__crowd *slots;
    size_t capacity, used;          /* a power of two; slots */
    uint64_t seed;                  /* so that nobody can choose addresses that collide */
} tcpsrv__crowds;

typedef struct tcpsrv__drain_signal {
    struct tcpsrv__drain_signal *next;
    tcpsrv *server;
    int64_t id, timeout_ms;         /* id 0: the server has no loop yet */
    int signo;
} tcpsrv__drain_signal;

struct tcpsrv {
    tcpsrv__source source;
    tcpsrv_loop *loop;              /* NULL: not started, or the loop was freed */
    tcpsrv *next;                   /* of the loop's servers */
    tcpsrv__listener *listeners;
    int *bound;                     /* sockets that wait for start */
    int bound_count;
    int reserve_fd;                 /* given up when descriptors have run out; -1: none */
    int started, freed;             /* tcpsrv_free was called: goes as soon as it may */
    int busy;                       /* calls below on the stack that still need it */
    int paused, at_limit;           /* why nothing is accepted, besides owner.full */
    int drain_over, drained_told;   /* its time has passed; on_drained was called */
    size_t handlers;                /* coroutines that have not returned */
    int64_t pause_ms;               /* the next pause: doubles until an accept succeeds */
    tcpsrv__timer pause_timer, drain_timer, memory_timer; /* stay in the heap: arming cannot fail */
    uint64_t freed_at;              /* while it is full: when memory was freed last */
    int full_told;                  /* once for each time that it is full */
    uint64_t drain_due;             /* when a drain aborts what is left */
    int64_t upgrade_call;           /* at SIGUSR2 */
    tcpsrv__drain_signal *drain_signals;
    tcpsrv__network *trusted;       /* and the text they were read from */
    size_t trusted_count;
    tcpsrv__owner owner;            /* streams know their server by it */
    tcpsrv__crowds crowds;
    tcpsrv__log_cause causes[TCPSRV__LOG_CAUSES];
};

static tcpsrv *tcpsrv__server_of(tcpsrv__owner *owner) {
    return TCPSRV__CONTAINER(tcpsrv, owner, owner);
}

/* ---- logging --------------------------------------------------------------------------------- */

/* At most one line a second for each cause; the next one says how many were left out. */
static void tcpsrv__log_limited(tcpsrv *server, int level, int code, const char *what,
                                const tcpsrv_address *peer) {
    uint64_t now = tcpsrv__clock_ns();
    tcpsrv__log_cause *cause = server->causes, *at;
    char place[TCPSRV_ADDRESS_TEXT] = "";
    unsigned missed;
    for (at = server->causes; at < server->causes + TCPSRV__LOG_CAUSES; at++) {
        if (at->code == code) {
            cause = at;
            break;
        }
        if (at->next < cause->next) cause = at;
    }
    if (cause->code == code && now < cause->next) {
        cause->missed++;
        return;
    }
    if (peer) tcpsrv_address_text(peer, place, sizeof place);
    missed = cause->code == code ? cause->missed : 0;
    cause->code = code;
    cause->missed = 0;
    cause->next = now + 1000000000u;
    tcpsrv__log(&server->owner.options, level,
                missed ? "%s%s%s: %s (%u more since)" : "%s%s%s: %s", what, peer ? " " : "", place,
                tcpsrv_strerror(code), missed);
}

/* How a handler ended, where that is not an ordinary end. */
static void tcpsrv__log_result(tcpsrv *server, int result, const tcpsrv_stream *stream) {
    tcpsrv_address address;
    int level = TCPSRV_LOG_ERROR;
    if (result == 0 || result == TCPSRV_EOF || result == TCPSRV_ECLOSED ||
        result == TCPSRV_ECANCELED)
        return;
    if (result == -ECONNRESET || result == -EPIPE || result == -ETIMEDOUT ||
        result == -ECONNABORTED || result == TCPSRV_ETIMEDOUT ||
        (result <= TCPSRV_ETLS && result > TCPSRV_ERESOLVE)) /* told already, or cut short */
        level = TCPSRV_LOG_DEBUG;
    tcpsrv_peer(stream, &address);
    tcpsrv__log_limited(server, level, result, "connection from", &address);
}

/* A connection that never became ready: scanners and broken clients are normal. */
static TCPSRV__COLD void tcpsrv__log_not_ready(tcpsrv__owner *owner, tcpsrv_stream *stream,
                                               int code) {
    char what[80] = "connection from";
    tcpsrv_address address;
    if (code == 0 || code == TCPSRV_ECLOSED || code == TCPSRV_ECANCELED) return;
    if (code == TCPSRV_ETIMEDOUT)
        snprintf(what, sizeof what, "TLS handshake timed out after %u ms, connection from",
                 (unsigned)owner->options.handshake_timeout_ms);
    tcpsrv_peer(stream, &address);
    tcpsrv__log_limited(tcpsrv__server_of(owner), TCPSRV_LOG_INFO, code, what, &address);
}

/* ---- the end of a server --------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__server_destroy(tcpsrv__source *source) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv, source, source);
    while (server->drain_signals) {
        tcpsrv__drain_signal *drain = server->drain_signals;
        server->drain_signals = drain->next;
        tcpsrv__free(drain);
    }
    if (server->reserve_fd >= 0) tcpsrv__sys_close(server->reserve_fd);
    tcpsrv__secure_drop(server->owner.options.tls);
    tcpsrv__free(server->crowds.slots);
    tcpsrv__free(server->trusted);
    tcpsrv__free(server->bound);
    tcpsrv__free(server);
}

static TCPSRV__COLD void tcpsrv__server_leave(tcpsrv *server) {
    tcpsrv **at = &server->loop->servers;
    tcpsrv__timer_cancel(server->loop, &server->pause_timer);
    tcpsrv__timer_cancel(server->loop, &server->drain_timer);
    tcpsrv__timer_cancel(server->loop, &server->memory_timer);
    while (*at && *at != server) at = &(*at)->next;
    if (*at) *at = server->next;
}

/* Gone once it was freed, and nothing of it runs or is open any more. */
static TCPSRV__COLD void tcpsrv__server_settle(tcpsrv *server) {
    tcpsrv_loop *loop = server->loop;
    if (server->busy || server->owner.stats.active) return;
    if (server->handlers && !(server->drain_over && !server->freed)) return;
    if (server->freed && loop) {
        tcpsrv__server_leave(server);
        tcpsrv__source_end(&server->source);
    } else if (server->freed) {
        tcpsrv__server_destroy(&server->source);
    } else if (server->owner.draining && !server->drained_told && loop) {
        tcpsrv__timer_arm(loop, &server->drain_timer, loop->now);
    }
}

/* The loop is being freed: the server goes on without one. */
static TCPSRV__COLD void tcpsrv__server_drop(tcpsrv__source *source) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv, source, source);
    tcpsrv__drain_signal *drain;
    tcpsrv__slot_release(source->loop, source->id);
    tcpsrv__server_leave(server);
    server->loop = NULL;
    server->upgrade_call = 0;
    for (drain = server->drain_signals; drain; drain = drain->next) drain->id = 0;
    tcpsrv__server_settle(server);
}

static const tcpsrv__class tcpsrv__server_class = {
    NULL, NULL, tcpsrv__server_drop, tcpsrv__server_destroy, 0, 0
};

/* ---- pausing --------------------------------------------------------------------------------- */

static void tcpsrv__pause(tcpsrv *server, int64_t ms) {
    server->paused = 1;
    tcpsrv__timer_arm(server->loop, &server->pause_timer,
                      server->loop->now + tcpsrv__ms_to_ns(ms));
}

static void tcpsrv__pause_end(tcpsrv *server) {
    server->paused = 0;
    tcpsrv__timer_arm(server->loop, &server->pause_timer, TCPSRV__NEVER);
}

static void tcpsrv__listener_poll(tcpsrv__listener *listener, int on) {
    tcpsrv__poller *poller = &listener->source.loop->poller;
    int shared = tcpsrv_task_id() >= 0, err;
    if (on == listener->polled) return;
    listener->polled = on;
    if (!on) {
        tcpsrv__poller_remove(poller, listener->source.fd);
        return;
    }
    err = tcpsrv__poller_add_listener(poller, listener->source.fd, listener->source.id, shared);
    if (!err) return;
    listener->polled = 0;
    tcpsrv__pause(listener->server, TCPSRV__PAUSE_MAX_MS);
}

static void tcpsrv__listeners_poll(tcpsrv *server, int on) {
    tcpsrv__listener *listener;
    for (listener = server->listeners; listener; listener = listener->next)
        tcpsrv__listener_poll(listener, on);
}

static int tcpsrv__may_accept(const tcpsrv *server) {
    return !server->at_limit && !server->paused && !server->owner.full;
}

static void tcpsrv__listeners_resume(tcpsrv *server) {
    if (tcpsrv__may_accept(server)) tcpsrv__listeners_poll(server, 1);
}

/* For a growing time, until an accept succeeds. */
static void tcpsrv__accept_pause(tcpsrv *server) {
    server->owner.stats.accept_pauses++;
    tcpsrv__listeners_poll(server, 0);
    tcpsrv__pause(server, server->pause_ms);
    server->pause_ms *= 2;
    if (server->pause_ms > TCPSRV__PAUSE_MAX_MS) server->pause_ms = TCPSRV__PAUSE_MAX_MS;
}

static TCPSRV__COLD void tcpsrv__pause_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv, pause_timer, timer);
    (void)loop;
    tcpsrv__pause_end(server);
    tcpsrv__listeners_resume(server);
}

/* At max_connections new ones wait in the backlog. */
static int tcpsrv__at_limit(tcpsrv *server) {
    if (server->owner.full) return 1; /* which memory_limit will say */
    if (server->owner.stats.active < server->owner.options.max_connections) return 0;
    if (!server->at_limit) {
        server->owner.stats.accept_pauses++;
        server->owner.stats.connection_limits++;
        tcpsrv__log_limited(server, TCPSRV_LOG_WARNING, TCPSRV__ECONNECTIONS, "accept paused",
                            NULL);
    }
    server->at_limit = 1;
    tcpsrv__listeners_poll(server, 0);
    return 1;
}

/* ---- connections of one address -------------------------------------------------------------- */

/* IPv6 by the first 64 bits; IPv4 in what is multicast there. 0: an address that is not counted. */
static TCPSRV__COLD int tcpsrv__crowd_key(const tcpsrv_address *peer, uint64_t *key) {
    const unsigned char *ip;
    int i, family = tcpsrv__plain_ip(peer, &ip);
    *key = family == AF_INET ? 0xffff : 0;
    for (i = 0; i < (family == AF_INET ? 4 : 8); i++) *key = *key << 8 | ip[i];
    return family != 0;
}

static TCPSRV__COLD size_t tcpsrv__crowd_home(const tcpsrv__crowds *crowds, uint64_t key) {
    key ^= crowds->seed;
    key = (key ^ key >> 33) * 0xff51afd7ed558ccdu; /* MurmurHash3's end */
    key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53u;
    return (size_t)(key ^ key >> 33) & (crowds->capacity - 1);
}

/* The slot with the key, or the free one where it belongs. */
static TCPSRV__COLD tcpsrv__crowd *tcpsrv__crowd_find(const tcpsrv__crowds *crowds, uint64_t key) {
    size_t at = tcpsrv__crowd_home(crowds, key);
    while (crowds->slots[at].count && crowds->slots[at].key != key)
        at = (at + 1) & (crowds->capacity - 1);
    return &crowds->slots[at];
}

static TCPSRV__COLD int tcpsrv__crowds_resize(tcpsrv__crowds *crowds, size_t capacity) {
    tcpsrv__crowds old = *crowds;
    size_t i;
    if (!old.seed) crowds->seed = tcpsrv__clock_ns() ^ (uint64_t)(uintptr_t)crowds;
    crowds->slots = (tcpsrv__crowd *)tcpsrv__alloc(capacity * sizeof *crowds->slots);
    if (!crowds->slots) {
        *crowds = old;
        return -ENOMEM;
    }
    crowds->capacity = capacity;
    for (i = 0; i < old.capacity; i++)
        if (old.slots[i].count) *tcpsrv__crowd_find(crowds, old.slots[i].key) = old.slots[i];
    tcpsrv__free(old.slots);
    return 0;
}

/* One more of that address: 0, or why not. */
static TCPSRV__COLD int tcpsrv__crowd_join(tcpsrv__crowds *crowds, const tcpsrv_address *peer,
                                           size_t most) {
    tcpsrv__crowd *crowd;
    uint64_t key;
    if (!tcpsrv__crowd_key(peer, &key)) return 0;
    if (2 * (crowds->used + 1) > crowds->capacity &&
        tcpsrv__crowds_resize(crowds, crowds->capacity ? crowds->capacity * 2 : 16) != 0)
        return -ENOMEM;
    crowd = tcpsrv__crowd_find(crowds, key);
    if (crowd->count >= most) return TCPSRV__EPER_IP;
    crowd->key = key;
    if (!crowd->count++) crowds->used++;
    return 0;
}

/* Those behind a slot that becomes free move up, so that they are still found. */
static TCPSRV__COLD void tcpsrv__crowd_remove(tcpsrv__crowds *crowds, tcpsrv__crowd *crowd) {
    size_t mask = crowds->capacity - 1, hole = (size_t)(crowd - crowds->slots), at = hole;
    crowds->used--;
    while (crowds->slots[at = (at + 1) & mask].count) {
        size_t home = tcpsrv__crowd_home(crowds, crowds->slots[at].key);
        if (((at - home) & mask) < ((at - hole) & mask)) continue;
        crowds->slots[hole] = crowds->slots[at];
        hole = at;
    }
    crowds->slots[hole].count = 0;
}

static TCPSRV__COLD void tcpsrv__crowd_leave(tcpsrv__crowds *crowds,
                                             const tcpsrv_address *peer) {
    tcpsrv__crowd *crowd;
    uint64_t key;
    if (!tcpsrv__crowd_key(peer, &key)) return;
    crowd = tcpsrv__crowd_find(crowds, key);
    if (--crowd->count) return;
    tcpsrv__crowd_remove(crowds, crowd);
    if (crowds->used == 0) {
        tcpsrv__free(crowds->slots);
        crowds->slots = NULL;
        crowds->capacity = 0;
    } else if (crowds->capacity > 16 && crowds->used * 8 < crowds->capacity) {
        tcpsrv__crowds_resize(crowds, crowds->capacity / 2);
    }
}

/* ---- connections ----------------------------------------------------------------------------- */

typedef struct tcpsrv__handler {
    tcpsrv__hosted hosted;
    tcpsrv_address address;
    tcpsrv__co *co;
} tcpsrv__handler;

#if TCPSRV__CORO
static tcpsrv__handler *tcpsrv__handler_of(tcpsrv_stream *stream) {
    return (tcpsrv__handler *)(void *)stream;
}

static void tcpsrv__stream_free(tcpsrv_stream *stream) {
    if (stream->in_stack) tcpsrv__co_unref(&tcpsrv__handler_of(stream)->co->source);
    else tcpsrv__free(stream);
}

static TCPSRV__COLD int tcpsrv__handler_main(void *arg) {
    tcpsrv__handler *handler = (tcpsrv__handler *)arg;
    tcpsrv_stream *stream = &handler->hosted.base.stream;
    const tcpsrv_options *options = &stream->owner->options;
    return options->handle_stream(stream, &handler->address, options->user);
}

/* On the loop's stack. The stream may be closing or gone already; its memory is still there. */
static TCPSRV__COLD void tcpsrv__handler_end(tcpsrv__co *co) {
    tcpsrv_stream *stream = &((tcpsrv__handler *)co->arg)->hosted.base.stream;
    tcpsrv *server = tcpsrv__server_of(stream->owner);
    tcpsrv__log_result(server, co->result, stream);
    server->handlers--;
    tcpsrv_close(stream);
    stream->viewed = 0;
    if (stream->source.is_gone) tcpsrv__input_give_up(stream);
    tcpsrv__server_settle(server);
}

/* Memory for a stream and, not begun, the coroutine of its handler. */
static TCPSRV__COLD tcpsrv_stream *tcpsrv__handler_new(tcpsrv *server) {
    tcpsrv__handler *handler;
    tcpsrv_stream *stream;
    void *memory;
    tcpsrv__co *co = tcpsrv__co_new(server->loop, server->owner.options.stack_size, sizeof *handler,
                                    &memory);
    if (!co) return NULL;
    handler = (tcpsrv__handler *)memory;
    memset(handler, 0, offsetof(tcpsrv__handler, hosted.home));
    handler->co = co;
    tcpsrv__block_init(&handler->hosted.home, TCPSRV__HOME_TOTAL, TCPSRV__POOL_HOME);
    stream = &handler->hosted.base.stream;
    stream->in_stack = 1;
    handler->hosted.own_wait.stream = stream;
    handler->hosted.own_wait.waiter.co = co;
    handler->hosted.own_wait.waiter.cancel = tcpsrv__await_cancel;
    return stream;
}

static TCPSRV__COLD void tcpsrv__handler_begin(tcpsrv *server, tcpsrv_stream *stream,
                                               const tcpsrv_address *address) {
    tcpsrv__handler *handler = tcpsrv__handler_of(stream);
    handler->address = *address;
    stream->held = 1;
    server->handlers++;
    handler->co->fn = tcpsrv__handler_main;
    handler->co->arg = handler;
    handler->co->on_end = tcpsrv__handler_end;
    tcpsrv__co_resume(&handler->co->source);
}

/* A coroutine that will not begin ends; the stream keeps the memory of both as long as it needs. */
static TCPSRV__COLD void tcpsrv__handler_drop(tcpsrv_stream *stream) {
    if (stream->in_stack) tcpsrv__source_end(&tcpsrv__handler_of(stream)->co->source);
}
#else
static void tcpsrv__stream_free(tcpsrv_stream *stream) {
    tcpsrv__free(stream);
}

static tcpsrv_stream *tcpsrv__handler_new(tcpsrv *server) {
    (void)server;
    return NULL;
}

static void tcpsrv__handler_begin(tcpsrv *server, tcpsrv_stream *stream,
                                  const tcpsrv_address *address) {
    (void)server, (void)stream, (void)address;
}

static void tcpsrv__handler_drop(tcpsrv_stream *stream) {
    (void)stream;
}
#endif

static TCPSRV__COLD void tcpsrv__count_closed(tcpsrv_stats *stats, int code) {
    stats->active--;
    if (code == 0 || code == TCPSRV_EOF) stats->closed_in_order++;
    else if (code == TCPSRV_ETIMEDOUT || code == -ETIMEDOUT) stats->closed_by_timeout++;
    else if (code == TCPSRV_ECLOSED || code == TCPSRV_ECANCELED) stats->closed_by_abort++;
    else if (code == -ECONNRESET || code == -EPIPE) stats->closed_by_reset++;
    else stats->closed_by_error++;
}

static TCPSRV__COLD void tcpsrv__stream_gone(tcpsrv__owner *owner, tcpsrv_stream *stream) {
    tcpsrv *server = tcpsrv__server_of(owner);
    tcpsrv_address peer;
    tcpsrv__count_closed(&owner->stats, stream->error);
    if (stream->counted) {
        tcpsrv_peer(stream, &peer);
        tcpsrv__crowd_leave(&server->crowds, &peer);
    }
    tcpsrv__stream_free(stream);
    if (server->at_limit && owner->stats.active < server->owner.options.max_connections) {
        server->at_limit = 0;
        tcpsrv__listeners_resume(server);
    }
    tcpsrv__server_settle(server);
}

/* A stream of the server over an accepted connection; its handler has not begun. */
static TCPSRV__COLD int tcpsrv__stream_new(tcpsrv *server, int fd, const tcpsrv_address *peer,
                                           tcpsrv_stream **made) {
    int is_ip4 = peer->family != AF_INET6 && !server->owner.options.proxy_protocol;
    size_t size = is_ip4 ? sizeof(tcpsrv_stream) : sizeof(tcpsrv__stream6);
    tcpsrv_stream *stream = server->owner.options.handle_stream
                                ? tcpsrv__handler_new(server)
                                : (tcpsrv_stream *)tcpsrv__alloc(size);
    int err = stream ? tcpsrv__stream_init(stream, server->loop, &server->owner, fd,
                                           TCPSRV__EVENT_READ) : -ENOMEM;
    if (err && stream) {
        tcpsrv__handler_drop(stream);
        tcpsrv__stream_free(stream);
    }
    if (err) return err;
    stream->user = server->owner.options.user;
    tcpsrv__set_peer(stream, peer);
    stream->deep = peer->family != AF_INET && peer->family != AF_INET6;
    stream->starting = 1;
    server->owner.stats.active++;
    server->owner.stats.accepted++;
    *made = stream;
    return 0;
}

static TCPSRV__COLD void tcpsrv__stream_begin(tcpsrv *server, tcpsrv_stream *stream,
                                              const tcpsrv_address *address) {
    tcpsrv_tls *tls = TCPSRV__TLS ? server->owner.options.tls : NULL;
    int err;
    tcpsrv__uncork(stream);
    stream->stepping = 0; /* the header's own read is over: what follows is its handler's */
    err = tls ? tcpsrv__secure(stream, tls, 0, NULL) : 0;
    stream->starting = stream->spoke = 0;
    if (!tls && stream->extra) stream->extra->handshake_due = 0;
    if (err) {
        tcpsrv__log_limited(server, TCPSRV_LOG_ERROR, err, "connection dropped", NULL);
        tcpsrv__handler_drop(stream);
        tcpsrv_abort(stream);
        return;
    }
    if (stream->in_stack) {
        tcpsrv__handler_begin(server, stream, address);
        return;
    }
    err = server->owner.options.on_stream(stream, address, server->owner.options.user);
    if (!err) return;
    tcpsrv__log_result(server, err, stream);
    tcpsrv_close(stream);
}

/* ---- who may connect ------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__log_refused(tcpsrv *server, int code,
                                             const tcpsrv_address *peer) {
    tcpsrv_stats *stats = &server->owner.stats;
    if (code == TCPSRV__EPER_IP) stats->refused_per_ip++;
    else stats->refused_proxy++;
    tcpsrv__log_limited(server, TCPSRV_LOG_WARNING, code, "connection refused from", peer);
}

static TCPSRV__COLD int tcpsrv__join_crowd(tcpsrv *server, const tcpsrv_address *peer) {
    size_t most = server->owner.options.max_connections_per_ip;
    return most ? tcpsrv__crowd_join(&server->crowds, peer, most) : 0;
}

static TCPSRV__COLD int tcpsrv__trusts(const tcpsrv *server, const tcpsrv_address *peer) {
    size_t i = 0;
    while (i < server->trusted_count && !tcpsrv__network_has(&server->trusted[i], peer)) i++;
    return i < server->trusted_count;
}

/* Of a stream whose handler will not begin. */
static TCPSRV__COLD void tcpsrv__header_refuse(tcpsrv *server, tcpsrv_stream *stream, int code) {
    tcpsrv_address peer;
    tcpsrv_bytes bytes;
    int silent = code == TCPSRV_ECLOSED || code == TCPSRV_ECANCELED ||
                 (code == TCPSRV_EOF && tcpsrv_peek(stream, &bytes) == 0); /* a probe */
    if (code == TCPSRV_EREFUSED || code == TCPSRV_EOF) code = TCPSRV__EPROXY;
    tcpsrv_peer(stream, &peer);
    if (code == TCPSRV__EPROXY || code == TCPSRV__EPER_IP || code == TCPSRV_ETIMEDOUT) {
        if (!silent) tcpsrv__log_refused(server, code, &peer);
    } else {
        tcpsrv__log_result(server, code, stream);
    }
    tcpsrv__handler_drop(stream);
    if (silent) tcpsrv_close(stream);
    else tcpsrv_abort(stream);
}

/* Whether what a trusted peer sent instead of a header is data. That it sent nothing is, if it has
   finished itself; not where a drain ends the wait. */
static TCPSRV__COLD int tcpsrv__header_is_data(tcpsrv *server, tcpsrv_stream *stream, int err) {
    tcpsrv_bytes bytes;
    if (server->owner.options.proxy_protocol != TCPSRV_PROXY_OPTIONAL) return 0;
    if (err != TCPSRV_EREFUSED && !(err == TCPSRV_EOF && stream->eof)) return 0;
    tcpsrv_peek(stream, &bytes);
    return tcpsrv__proxy_version(bytes.data, bytes.size, 1) == 0;
}

static TCPSRV__COLD void tcpsrv__header_read(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes,
                                             void *arg) {
    tcpsrv *server = (tcpsrv *)arg;
    tcpsrv_address address;
    int known = 0;
    if (tcpsrv__header_is_data(server, stream, err)) err = 0;
    else if (!err) known = tcpsrv__proxy_parse(bytes, &address);
    if (known < 0) err = known;
    if (known > 0) tcpsrv__set_peer(stream, &address);
    else tcpsrv_peer(stream, &address);
    if (!err) err = tcpsrv__join_crowd(server, &address);
    if (err) {
        tcpsrv__header_refuse(server, stream, err);
        return;
    }
    stream->counted = server->owner.options.max_connections_per_ip != 0;
    tcpsrv__stream_begin(server, stream, &address);
}

static TCPSRV__COLD void tcpsrv__header_await(tcpsrv *server, tcpsrv_stream *stream) {
    int err = tcpsrv__handshake_deadline(stream);
    if (!err) err = tcpsrv_read(stream, tcpsrv_frame(tcpsrv__proxy_end, NULL, TCPSRV__PROXY_MOST),
                                tcpsrv__header_read, server);
    if (err) tcpsrv__header_refuse(server, stream, err);
}

/* ---- accepting ------------------------------------------------------------------------------- */

/* Not served, for lack of memory or because it may not be. */
static TCPSRV__COLD void tcpsrv__turn_away(tcpsrv *server, int fd, int code,
                                           const tcpsrv_address *peer) {
    tcpsrv__sys_close(fd);
    if (code == TCPSRV__EPER_IP || code == TCPSRV__EUNTRUSTED) {
        tcpsrv__log_refused(server, code, peer);
        return;
    }
    server->owner.stats.shed++;
    tcpsrv__log_limited(server, TCPSRV_LOG_ERROR, code, "connection dropped", NULL);
}

static TCPSRV__COLD void tcpsrv__serve(tcpsrv *server, int fd, const struct sockaddr *name,
                                       socklen_t size) {
    int mode = server->owner.options.proxy_protocol, err = 0, header;
    tcpsrv_address address;
    tcpsrv_stream *stream = NULL;
    tcpsrv__address_from_sockaddr(&address, name, size);
    if (!TCPSRV__LINUX && !server->owner.options.no_nodelay) tcpsrv__sys_nodelay(fd, 1);
    header = mode != TCPSRV_PROXY_OFF && tcpsrv__trusts(server, &address);
    if (!header && mode == TCPSRV_PROXY_REQUIRED) err = TCPSRV__EUNTRUSTED;
    else if (!header) err = tcpsrv__join_crowd(server, &address);
    if (!err) {
        err = tcpsrv__stream_new(server, fd, &address, &stream);
        if (err && !header && server->owner.options.max_connections_per_ip)
            tcpsrv__crowd_leave(&server->crowds, &address);
    }
    if (err) {
        tcpsrv__turn_away(server, fd, err, &address);
        return;
    }
    stream->counted = !header && server->owner.options.max_connections_per_ip != 0;
    if (header) tcpsrv__header_await(server, stream);
    else tcpsrv__stream_begin(server, stream, &address);
    tcpsrv__flush_all(server->loop);
    tcpsrv__stream_event(&stream->source, TCPSRV__EVENT_READ); /* often they are here already */
    tcpsrv__flush_all(server->loop);
}

/* The reserve is given up to tell a few of those who wait that nobody will serve them. */
static void tcpsrv__shed(tcpsrv *server, int listener_fd) {
    int i, fd;
    if (server->reserve_fd >= 0) tcpsrv__sys_close(server->reserve_fd);
    for (i = 0; i < TCPSRV__SHED; i++) {
        fd = tcpsrv__sys_accept(listener_fd, NULL, NULL);
        if (fd < 0) break;
        tcpsrv__sys_close(fd);
        server->owner.stats.shed++;
    }
    server->reserve_fd = tcpsrv__sys_reserve();
}

/* Errors of one connection, not of the listener (accept(2)). */
static int tcpsrv__accept_skips(int err) {
    return err == -EINTR || err == -ECONNABORTED || err == -EPROTO || err == -ENETDOWN ||
           err == -ENOPROTOOPT || err == -EHOSTDOWN || err == -EHOSTUNREACH ||
           err == -EOPNOTSUPP || err == -ENETUNREACH || err == -EPERM ||
           err == -ETIMEDOUT || err == TCPSRV__ENONET;
}

/* 0: this listener has no more for now. */
static TCPSRV__COLD int tcpsrv__accept_failed(tcpsrv__listener *listener, int err) {
    tcpsrv *server = listener->server;
    if (err == -EAGAIN || err == -EWOULDBLOCK) return 0;
    if (tcpsrv__accept_skips(err)) return 1;
    if (err == -EMFILE || err == -ENFILE) tcpsrv__shed(server, listener->source.fd);
    tcpsrv__accept_pause(server);
    tcpsrv__log_limited(server, TCPSRV_LOG_ERROR, err, "accept paused", NULL);
    return 0;
}

/* Linux wakes the one that queued up first, again and again: queueing up anew now and then shares
   the load. */
static void tcpsrv__listener_requeue(tcpsrv__listener *listener) {
    if (tcpsrv_task_id() < 0 || ++listener->accepted < TCPSRV__READD) return;
    listener->accepted = 0;
    tcpsrv__listener_poll(listener, 0);
    tcpsrv__listener_poll(listener, 1);
}

/* How many to accept at this event: one, and more while the backlog fills turn after turn, so that
   a lone connection does not cost a second call that finds nothing. */
static int tcpsrv__accept_burst(tcpsrv__listener *listener) {
    uint64_t turn = listener->source.loop->turn;
    int busy = turn - listener->last_turn == 1;
    listener->last_turn = turn;
    if (!busy || tcpsrv_task_id() >= 0) listener->burst = 1;
    else if (listener->burst < TCPSRV__ACCEPT_BURST) listener->burst *= 2;
    return listener->burst;
}

static TCPSRV__COLD void tcpsrv__accept_event(tcpsrv__source *source, int events) {
    tcpsrv__listener *listener = TCPSRV__CONTAINER(tcpsrv__listener, source, source);
    tcpsrv *server = listener->server;
    int i, fd, n = tcpsrv__accept_burst(listener);
    (void)events;
    server->busy++;
    for (i = 0; i < n && !source->is_gone && listener->polled; i++) {
        struct sockaddr_storage name;
        socklen_t size = sizeof name;
        if (tcpsrv__at_limit(server)) break;
        fd = tcpsrv__sys_accept(source->fd, (struct sockaddr *)&name, &size);
        if (fd >= 0) {
            server->pause_ms = TCPSRV__PAUSE_MS;
            tcpsrv__serve(server, fd, (const struct sockaddr *)&name, size);
            if (!source->is_gone) tcpsrv__listener_requeue(listener);
        } else if (!tcpsrv__accept_failed(listener, fd)) {
            break;
        }
    }
    server->busy--;
    tcpsrv__server_settle(server);
}

/* ---- listeners ------------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__listener_close(tcpsrv__source *source) {
    tcpsrv__listener *listener = TCPSRV__CONTAINER(tcpsrv__listener, source, source);
    tcpsrv__listener **at = &listener->server->listeners;
    while (*at && *at != listener) at = &(*at)->next;
    if (*at) *at = listener->next;
    if (listener->polled) tcpsrv__poller_remove(&source->loop->poller, source->fd);
    tcpsrv__listening_close(source->fd);
    tcpsrv__source_end(source);
}

static TCPSRV__COLD void tcpsrv__listener_drop(tcpsrv__source *source) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv__listener, source, source)->server;
    tcpsrv__listener_close(source);
    tcpsrv__server_settle(server);
}

static const tcpsrv__class tcpsrv__listener_class = {
    tcpsrv__accept_event, NULL, tcpsrv__listener_drop, NULL, sizeof(tcpsrv__listener), 0
};

static int tcpsrv__listener_add(tcpsrv *server, int fd) {
    tcpsrv__listener *listener, **last = &server->listeners;
    int err;
    listener = (tcpsrv__listener *)tcpsrv__source_new(&tcpsrv__listener_class, server->loop, fd,
                                                      &err);
    if (!listener) return err;
    listener->server = server;
    listener->burst = 1;
    while (*last) last = &(*last)->next;
    *last = listener;
    if (tcpsrv__may_accept(server)) tcpsrv__listener_poll(listener, 1);
    return 0;
}

/* ---- starting -------------------------------------------------------------------------------- */

/* In a forked child whose parent is gone: as if that had sent its last SIGTERM. */
static TCPSRV__COLD void tcpsrv__parent_gone(int fd, int events, void *arg) {
    tcpsrv_loop *loop = (tcpsrv_loop *)arg;
    (void)fd, (void)events;
    tcpsrv_cancel(loop, loop->parent_watch);
    tcpsrv__sys_kill(tcpsrv__sys_pid(), SIGTERM);
}

/* A replacement serves: its loop turns. The parent may have lost its patience before. */
static TCPSRV__COLD void tcpsrv__say_ready(void *arg) {
    struct iovec piece;
    (void)arg;
    if (tcpsrv__ready_fd < 0) return;
    piece.iov_base = &tcpsrv__ready_fd;
    piece.iov_len = 1;
    tcpsrv__sys_writev(tcpsrv__ready_fd, &piece, 1);
    tcpsrv__sys_close(tcpsrv__ready_fd);
    tcpsrv__ready_fd = -1;
}

static TCPSRV__COLD void tcpsrv__worker_write(tcpsrv__worker *worker, const tcpsrv_stats *stats) {
    size_t words[sizeof worker->words / sizeof(size_t)], i, sequence = worker->sequence | 1;
    memcpy(words, stats, sizeof words);
    TCPSRV__STORE_WORD(&worker->sequence, sequence);
    for (i = 0; i < sizeof words / sizeof(size_t); i++)
        TCPSRV__STORE_WORD(&worker->words[i], words[i]);
    TCPSRV__STORE_WORD(&worker->sequence, sequence + 1);
}

/* All that follows active counts in 64 bits. */
static TCPSRV__COLD void tcpsrv__stats_add(tcpsrv_stats *sum, const tcpsrv_stats *more) {
    uint64_t a[(sizeof *sum - offsetof(tcpsrv_stats, accepted)) / sizeof(uint64_t)];
    uint64_t b[sizeof a / sizeof(uint64_t)];
    size_t i;
    memcpy(a, &sum->accepted, sizeof a);
    memcpy(b, &more->accepted, sizeof b);
    for (i = 0; i < sizeof a / sizeof(uint64_t); i++) a[i] += b[i];
    memcpy(&sum->accepted, a, sizeof a);
    sum->active += more->active;
}

/* What the counters are, unless the number has gone to another process. */
static TCPSRV__COLD void tcpsrv__worker_tell(const tcpsrv_loop *loop) {
    tcpsrv__worker *worker = &tcpsrv__workers[tcpsrv__own_task_id];
    const tcpsrv *server = loop->servers;
    tcpsrv_stats sum;
    if (TCPSRV__LOAD_WORD(&worker->pid) != (size_t)loop->pid) return;
    memset(&sum, 0, sizeof sum);
    for (; server; server = server->next) tcpsrv__stats_add(&sum, &server->owner.stats);
    sum.longest_turn_ns = loop->longest_turn;
    tcpsrv__worker_write(worker, &sum);
}

/* At the end of a turn. A busy loop does not pay for it turn after turn. */
static TCPSRV__COLD void tcpsrv__worker_turn(tcpsrv_loop *loop) {
    loop->untold = loop->now - loop->told_at < TCPSRV__NS(TCPSRV__TELL_MS);
    if (loop->untold) return;
    loop->told_at = loop->now;
    tcpsrv__worker_tell(loop);
}

/* What a forked child's first loop does for the family. */
static void tcpsrv__join_family(tcpsrv_loop *loop) {
    if (tcpsrv__lifeline < 0 || loop->parent_watch > 0) return;
    loop->parent_watch = tcpsrv_watch_fd(loop, tcpsrv__lifeline, TCPSRV_READ,
                                         tcpsrv__parent_gone, loop);
    if (!tcpsrv__worker_told) loop->turn_end = tcpsrv__worker_turn;
    tcpsrv__worker_told = 1;
    loop->measured = 1;
    if (tcpsrv__ready_fd >= 0 && tcpsrv_call_soon(loop, tcpsrv__say_ready, NULL) < 0)
        tcpsrv__say_ready(NULL);
}

/* A signal that ends the server, the second one at once. */
static TCPSRV__COLD void tcpsrv__drain_signalled(int signo, void *arg) {
    tcpsrv__drain_signal *drain = (tcpsrv__drain_signal *)arg;
    tcpsrv *server = drain->server;
    (void)signo;
    if (server->owner.draining) {
        server->drain_due = server->loop->now;
        tcpsrv__timer_arm(server->loop, &server->drain_timer, server->drain_due);
        return;
    }
    if (tcpsrv_task_id() < 0) tcpsrv_notify("STOPPING=1");
    tcpsrv_drain(server, drain->timeout_ms);
}

static TCPSRV__COLD int tcpsrv__drain_signals_claim(tcpsrv *server) {
    tcpsrv__drain_signal *drain;
    for (drain = server->drain_signals; drain; drain = drain->next) {
        if (!drain->id)
            drain->id = tcpsrv_on_signal(server->loop, drain->signo, tcpsrv__drain_signalled,
                                         drain);
        if (drain->id < 0) {
            int err = (int)drain->id;
            drain->id = 0;
            return err;
        }
    }
    return 0;
}

static TCPSRV__COLD void tcpsrv__upgrade_signalled(int signo, void *arg) {
    tcpsrv *server = (tcpsrv *)arg;
    int err = tcpsrv_upgrade(server->owner.options.upgrade_on_usr2, -1);
    (void)signo;
    if (err) tcpsrv__log_limited(server, TCPSRV_LOG_ERROR, err, "upgrade", NULL);
}

/* What signals do to it. In a worker SIGUSR2 is the parent's. */
static TCPSRV__COLD int tcpsrv__server_signals(tcpsrv *server) {
    int64_t id;
    if (server->owner.options.upgrade_on_usr2 && tcpsrv_task_id() < 0) {
        id = tcpsrv_on_signal(server->loop, SIGUSR2, tcpsrv__upgrade_signalled, server);
        if (id < 0) return (int)id;
        server->upgrade_call = id;
    }
    return tcpsrv__drain_signals_claim(server);
}

/* The server belongs to a loop from now on. */
static int tcpsrv__server_attach(tcpsrv *server) {
    tcpsrv_loop *loop = server->loop;
    tcpsrv **last;
    int err;
    if (loop) return 0;
    loop = server->owner.options.loop ? server->owner.options.loop : tcpsrv_loop_default();
    if (!loop) return tcpsrv__thread()->error;
    err = tcpsrv__timer_reserve(loop, 3);
    if (!err) err = tcpsrv__source_init(&server->source, &tcpsrv__server_class, loop, -1);
    if (err) return err;
    tcpsrv__join_family(loop);
    server->loop = loop;
    for (last = &loop->servers; *last;) last = &(*last)->next;
    server->next = NULL;
    *last = server;
    tcpsrv__timer_arm(loop, &server->pause_timer, TCPSRV__NEVER);
    tcpsrv__timer_arm(loop, &server->drain_timer, TCPSRV__NEVER);
    tcpsrv__timer_arm(loop, &server->memory_timer, TCPSRV__NEVER);
    if (server->reserve_fd < 0) server->reserve_fd = tcpsrv__sys_reserve();
    return tcpsrv__server_signals(server);
}

static int tcpsrv__prepare_socket(tcpsrv *server, int fd) {
    int err = tcpsrv__sys_listens(fd);
    if (!err) err = tcpsrv__set_cloexec_nonblock(fd);
    if (!err && !server->owner.options.no_nodelay)
        tcpsrv__sys_nodelay(fd, 1); /* inherited on Linux */
    return err;
}

TCPSRV_IMPL int tcpsrv_add_sockets(tcpsrv *server, const int *fds, int count) {
    int i, err = tcpsrv__server_attach(server), done = 0;
    for (i = 0; i < count && !err; i++) {
        err = tcpsrv__prepare_socket(server, fds[i]);
        if (!err) err = tcpsrv__listener_add(server, fds[i]);
        if (!err) done++;
    }
    for (i = done; i < count; i++) tcpsrv__listening_close(fds[i]);
    server->started = 1;
    server->owner.draining = server->drained_told = 0;
    if (server->loop) tcpsrv__timer_arm(server->loop, &server->drain_timer, TCPSRV__NEVER);
    return err ? tcpsrv__fail(err, "add_sockets", NULL) : 0;
}

TCPSRV_IMPL int tcpsrv_bind(tcpsrv *server, int port, const char *address,
                            const tcpsrv_bind_options *options) {
    int fds[TCPSRV__MAX_ADDRESSES];
    int n = tcpsrv_bind_sockets(port, address, options, fds, TCPSRV__MAX_ADDRESSES);
    if (n < 0) return n;
    if (server->started) return tcpsrv_add_sockets(server, fds, n);
    if (tcpsrv__fds_add(&server->bound, &server->bound_count, fds, n) == 0) return 0;
    tcpsrv__close_all(fds, n);
    return tcpsrv__fail(-ENOMEM, "bind", address);
}

static int tcpsrv__fork_family(int num_processes, int max_restarts, const tcpsrv_options *options);

TCPSRV_IMPL int tcpsrv_start(tcpsrv *server, int num_processes) {
    int err = 0, n;
    if (server->started) return tcpsrv__fail(TCPSRV_EBUSY, "start", NULL);
    if (num_processes != 1) {
        err = tcpsrv__fork_family(num_processes, -1, &server->owner.options);
        if (err < 0) return err;
    }
    n = server->bound_count;
    server->bound_count = 0;
    return tcpsrv_add_sockets(server, server->bound, n);
}

TCPSRV_IMPL int tcpsrv_listen(tcpsrv *server, int port, const char *address) {
    int err = tcpsrv_bind(server, port, address, NULL);
    if (!err && !server->started) err = tcpsrv_start(server, 1);
    return err;
}

/* ---- stopping -------------------------------------------------------------------------------- */

TCPSRV_IMPL void tcpsrv_stop(tcpsrv *server) {
    while (server->listeners) tcpsrv__listener_close(&server->listeners->source);
    while (server->bound_count > 0) tcpsrv__listening_close(server->bound[--server->bound_count]);
    if (server->loop) tcpsrv__pause_end(server);
}

/* The server's next live stream behind that slot, 0 for the first; NULL: no more, or no loop. */
static TCPSRV__COLD tcpsrv_stream *tcpsrv__next_stream(const tcpsrv *server, uint32_t *slot) {
    const tcpsrv_loop *loop = server->loop;
    while (loop && ++*slot < loop->slot_count) {
        tcpsrv__source *source = tcpsrv__slot_source(loop, &loop->slots[*slot]);
        if (source && source->type == &tcpsrv__stream_class &&
            tcpsrv__stream_of(source)->owner == &server->owner)
            return tcpsrv__stream_of(source);
    }
    return NULL;
}

/* ---- memory ---------------------------------------------------------------------------------- */

enum { TCPSRV__STUCK_MS = 1000 };

/* Looks at every stream with a message that has come in part: the one that holds most, or the one
   that has held it longest; NULL where there is none. */
static TCPSRV__COLD tcpsrv_stream *tcpsrv__begun_message(tcpsrv *server, int by_weight) {
    uint32_t slot = 0, turn = (uint32_t)server->loop->turn, best = 0;
    tcpsrv_stream *stream, *found = NULL;
    while ((stream = tcpsrv__next_stream(server, &slot)) != NULL) {
        uint32_t rank;
        if (!stream->read_fn || !stream->charged || stream->closing || stream->dead ||
            !stream->in || !tcpsrv__block_size(stream->in))
            continue;
        rank = by_weight ? stream->charged : turn - stream->since;
        if (found && rank <= best) continue;
        found = stream;
        best = rank;
    }
    return found;
}

/* Whether nothing more is received. Streams that were held back then have their turn. */
static TCPSRV__COLD void tcpsrv__set_full(tcpsrv *server, int full) {
    tcpsrv_stream *stream;
    uint32_t slot = 0;
    server->owner.full = full;
    server->owner.favoured = 0;
    while ((stream = tcpsrv__next_stream(server, &slot)) != NULL) {
        stream->winding = tcpsrv__winds(&server->owner) != 0;
        if (!full && stream->read_fn) tcpsrv__make_ready(&stream->source);
    }
}

static TCPSRV__COLD void tcpsrv__full_tell(tcpsrv *server) {
    if (server->full_told) return;
    server->full_told = 1;
    server->owner.stats.accept_pauses++;
    server->owner.stats.memory_limits++;
    tcpsrv__listeners_poll(server, 0);
    tcpsrv__log_limited(server, TCPSRV_LOG_WARNING, TCPSRV__EMEMORY, "accept paused", NULL);
}

static TCPSRV__COLD void tcpsrv__favour(tcpsrv *server) {
    tcpsrv_stream *stream = tcpsrv_by_id(server->loop, server->owner.favoured);
    if (stream && stream->read_fn && stream->charged) return;
    stream = tcpsrv__begun_message(server, 0);
    server->owner.favoured = stream ? stream->source.id : 0;
    if (stream) tcpsrv__make_ready(&stream->source);
}

/* While the server is full: a second after memory was freed last, or at once when some was. */
static TCPSRV__COLD void tcpsrv__memory_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv, memory_timer, timer);
    uint64_t held = server->owner.stats.buffer_memory, limit = server->owner.options.memory_limit;
    int stuck = loop->now - server->freed_at >= TCPSRV__NS(TCPSRV__STUCK_MS);
    tcpsrv_stream *heaviest = NULL;
    tcpsrv__timer_arm(loop, timer, TCPSRV__NEVER);
    if (!server->owner.full) return;
    tcpsrv__full_tell(server);
    if (held <= limit - limit / 8 || (stuck && held < limit)) {
        server->full_told = 0;
        tcpsrv__set_full(server, 0);
        tcpsrv__listeners_resume(server);
        return;
    }
    if (stuck) {
        heaviest = tcpsrv__begun_message(server, 1);
        server->freed_at = loop->now;
    }
    tcpsrv__favour(server);
    tcpsrv__timer_arm(loop, timer, server->freed_at + TCPSRV__NS(TCPSRV__STUCK_MS));
    if (!heaviest) return;
    server->owner.stats.memory_ends++;
    server->busy++;
    tcpsrv__read_fail(heaviest, TCPSRV_EBUFFULL);
    server->busy--;
    tcpsrv__server_settle(server);
}

/* Called from inside whatever a stream does: the rest is the timer's. The favoured one that frees
   something had its turn: it is the youngest now. */
static TCPSRV__COLD void tcpsrv__weigh(tcpsrv__owner *owner, tcpsrv_stream *stream, int freed) {
    tcpsrv *server = tcpsrv__server_of(owner);
    tcpsrv_loop *loop = server->loop;
    size_t limit = owner->options.memory_limit;
    int begins = !owner->full && owner->stats.buffer_memory >= limit;
    if (!loop || (!begins && !(owner->full && freed))) return;
    server->freed_at = loop->now;
    if (begins) {
        tcpsrv__set_full(server, 1);
    } else if (owner->favoured == stream->source.id) {
        owner->favoured = 0;
        stream->since = (uint32_t)loop->turn;
    }
    if (begins || !owner->favoured || owner->stats.buffer_memory <= limit - limit / 8)
        tcpsrv__timer_arm(loop, &server->memory_timer, loop->now);
}

TCPSRV_IMPL void tcpsrv_foreach(tcpsrv *server, void (*fn)(tcpsrv_stream *stream, void *arg),
                                void *arg) {
    tcpsrv_stream *stream;
    uint32_t slot = 0;
    server->busy++;
    while ((stream = tcpsrv__next_stream(server, &slot)) != NULL)
        if (!stream->closing && !stream->starting) fn(stream, arg);
    server->busy--;
    tcpsrv__server_settle(server);
}

static void tcpsrv__abort_all(tcpsrv *server) {
    tcpsrv_stream *stream;
    uint32_t slot = 0;
    while ((stream = tcpsrv__next_stream(server, &slot)) != NULL) tcpsrv_abort(stream);
}

TCPSRV_IMPL void tcpsrv_free(tcpsrv *server) {
    tcpsrv__drain_signal *drain;
    if (!server || server->freed) return;
    server->freed = 1;
    for (drain = server->drain_signals; drain && server->loop; drain = drain->next)
        tcpsrv_cancel(server->loop, drain->id);
    if (server->loop) tcpsrv_cancel(server->loop, server->upgrade_call);
    tcpsrv_stop(server);
    tcpsrv__abort_all(server);
    tcpsrv__server_settle(server);
}

/* The last of the loop's servers that drains is the one that stops it. */
static TCPSRV__COLD int tcpsrv__others_drain(const tcpsrv_loop *loop) {
    const tcpsrv *server = loop->servers;
    while (server && (!server->owner.draining || server->drained_told)) server = server->next;
    return server != NULL;
}

/* Waiting reads are looked at again, and those at a message boundary end. */
static TCPSRV__COLD void tcpsrv__drain_step(tcpsrv *server, int draining, uint64_t next) {
    tcpsrv_stream *stream;
    uint32_t slot = 0;
    server->owner.draining = draining;
    tcpsrv__timer_arm(server->loop, &server->drain_timer, next);
    while ((stream = tcpsrv__next_stream(server, &slot)) != NULL) {
        stream->winding = 1;
        tcpsrv__make_ready(&stream->source);
    }
    tcpsrv__server_settle(server);
}

static TCPSRV__COLD void tcpsrv__drain_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv *server = TCPSRV__CONTAINER(tcpsrv, drain_timer, timer);
    tcpsrv_drained_fn *fn = server->owner.options.on_drained;
    int busy = server->owner.stats.active || (server->handlers && !server->drain_over);
    tcpsrv__timer_arm(loop, timer, TCPSRV__NEVER);
    if (busy && server->owner.draining == 1 && loop->now < server->drain_due) {
        tcpsrv__drain_step(server, 2, server->drain_due);
    } else if (busy) {
        server->drain_over = 1;
        tcpsrv__abort_all(server);
        tcpsrv__server_settle(server);
    } else if (!server->drained_told) {
        server->drained_told = 1;
        if (fn) fn(server, server->owner.options.user);
        else if (!tcpsrv__others_drain(loop)) tcpsrv_loop_stop(loop);
    }
}

TCPSRV_IMPL void tcpsrv_drain(tcpsrv *server, int64_t timeout_ms) {
    tcpsrv_loop *loop = server->loop;
    uint64_t first;
    tcpsrv_stop(server);
    if (!loop) return;
    server->drained_told = server->drain_over = 0;
    tcpsrv__refresh_now(loop);
    first = loop->now + TCPSRV__NS(TCPSRV__FIRST_MS);
    server->drain_due = timeout_ms < 0 ? TCPSRV__NEVER : loop->now + tcpsrv__ms_to_ns(timeout_ms);
    tcpsrv__drain_step(server, 1, first < server->drain_due ? first : server->drain_due);
}

TCPSRV_IMPL int tcpsrv_draining(const tcpsrv *server) {
    return server->owner.draining != 0;
}

TCPSRV_IMPL int tcpsrv_drain_on_signal(tcpsrv *server, int signo, int64_t timeout_ms) {
    tcpsrv__drain_signal *drain = (tcpsrv__drain_signal *)tcpsrv__alloc(sizeof *drain);
    int err = drain ? 0 : -ENOMEM;
    if (err) return tcpsrv__fail(err, "drain_on_signal", NULL);
    drain->server = server;
    drain->signo = signo;
    drain->timeout_ms = timeout_ms;
    drain->next = server->drain_signals;
    server->drain_signals = drain;
    if (server->loop) err = tcpsrv__drain_signals_claim(server);
    if (!err) return 0;
    server->drain_signals = drain->next;
    tcpsrv__free(drain);
    return err;
}

/* ---- making a server ------------------------------------------------------------------------- */

/* A list has no more networks than every other byte is one. Its text lies behind them. */
static TCPSRV__COLD int tcpsrv__trusted_parse(tcpsrv *server) {
    tcpsrv_options *options = &server->owner.options;
    const char *list = options->trusted;
    size_t size = list ? strlen(list) + 1 : 0, most = size / 2;
    char text[64];
    if (list) {
        server->trusted = (tcpsrv__network *)tcpsrv__alloc(most * sizeof *server->trusted + size);
        if (!server->trusted) return tcpsrv__fail(-ENOMEM, "new", NULL);
        options->trusted = (char *)memcpy(server->trusted + most, list, size);
    }
    while (list && tcpsrv__network_next(&list, text))
        if (tcpsrv__network_parse(text, &server->trusted[server->trusted_count++]) != 0)
            return tcpsrv__fail(-EINVAL, "trusted network", text);
    if (options->proxy_protocol < 0 || options->proxy_protocol > TCPSRV_PROXY_REQUIRED ||
        (options->proxy_protocol && !server->trusted_count))
        return tcpsrv__fail(-EINVAL, "new", "proxy_protocol and trusted");
    return 0;
}

TCPSRV_IMPL tcpsrv *tcpsrv_new(const tcpsrv_options *options) {
    tcpsrv *server;
    int err = 0;
    if (!options || !options->handle_stream == !options->on_stream) err = -EINVAL;
    else if (options->handle_stream && !TCPSRV__CORO) err = -ENOTSUP;
    server = err ? NULL : (tcpsrv *)tcpsrv__alloc(sizeof *server);
    if (!server) {
        tcpsrv__fail(err ? err : -ENOMEM, "new", err == -EINVAL ? "one of handle_stream and "
                                                                  "on_stream" : NULL);
        return NULL;
    }
    server->owner.options = *options;
    if (options->reload_on_hup) TCPSRV__STORE(&tcpsrv__reload_wanted, 1);
    if (options->upgrade_on_usr2) TCPSRV__STORE(&tcpsrv__upgrade_wanted, options->upgrade_on_usr2);
    tcpsrv__owner_fill(&server->owner);
    if (tcpsrv__trusted_parse(server) != 0 || tcpsrv__secure_hold(options->tls, 0, NULL) != 0) {
        tcpsrv__free(server->trusted);
        tcpsrv__free(server);
        return NULL;
    }
    server->owner.gone = tcpsrv__stream_gone;
    server->owner.not_ready = TCPSRV__TLS ? tcpsrv__log_not_ready : NULL;
    server->reserve_fd = -1;
    server->pause_ms = TCPSRV__PAUSE_MS;
    server->pause_timer.fire = tcpsrv__pause_fire;
    server->drain_timer.fire = tcpsrv__drain_fire;
    server->memory_timer.fire = tcpsrv__memory_fire;
    if (options->memory_limit) server->owner.weigh = tcpsrv__weigh;
    return server;
}

#ifdef TCPSERVER_TLS
TCPSRV_IMPL int tcpsrv_set_tls(tcpsrv *server, tcpsrv_tls *tls) {
    int err = tcpsrv__secure_hold(tls, 0, NULL);
    if (err) return err;
    tcpsrv__secure_drop(server->owner.options.tls);
    server->owner.options.tls = tls;
    return 0;
}
#endif

TCPSRV_IMPL const tcpsrv_options *tcpsrv_get_options(const tcpsrv *server) {
    return &server->owner.options;
}

TCPSRV_IMPL int tcpsrv_port(const tcpsrv *server, int index) {
    const tcpsrv__listener *listener = server->listeners;
    int i;
    for (i = 0; i < index && listener; i++) listener = listener->next;
    if (index >= 0 && listener) return tcpsrv__local_port(listener->source.fd);
    if (index >= 0 && index < server->bound_count)
        return tcpsrv__local_port(server->bound[index]);
    return tcpsrv__fail(-ENOENT, "port", NULL);
}

TCPSRV_IMPL void tcpsrv_get_stats(const tcpsrv *server, tcpsrv_stats *stats) {
    *stats = server->owner.stats;
    if (!server->loop) return;
    stats->longest_turn_ns = server->loop->longest_turn;
    server->loop->measured = 1;
}

/* ==== >>process =============================================================================== */

/* Owns the children of tcpsrv_fork_processes. The parent has no loop: it sleeps until a signal, a
   replacement's byte or the end of a pause, and every wake-up looks at all children, so that no
   signal can be missed. A child that is replaced goes on as a leaver until it has ended; only its
   pid is remembered, so that it can be collected. */

enum {
    TCPSRV__MAX_RESTARTS = 100,
    TCPSRV__RESTART_MS = 50,
    TCPSRV__RESTART_MAX_MS = 30000,
    TCPSRV__SETTLED_MS = 10000,     /* a child that lived so long is no crash loop */
    TCPSRV__GIVE_UP_MS = 10000,     /* for the others to end when the parent gives up */
    TCPSRV__FAMILY_SIGNALS = 6,
    TCPSRV__MOST_LISTENERS_AT = 65536 /* descriptors of a parent that are looked at */
};

static int tcpsrv__ready_ms = 30000; /* for a new process to begin to serve */

TCPSRV_IMPL int tcpsrv_task_id(void) {
    return tcpsrv__own_task_id;
}

TCPSRV_IMPL int tcpsrv_cpu_count(void) {
    int count = tcpsrv__sys_cpu_count();
    return count > 0 ? count : 1;
}

enum { TCPSRV__STATUS_TEXT = 40 };

static TCPSRV__COLD const char *tcpsrv__status_text(int status, char *text) {
    int killed = WIFSIGNALED(status);
    snprintf(text, TCPSRV__STATUS_TEXT, "%s %d", killed ? "killed by signal" : "exit status",
             killed ? WTERMSIG(status) : WEXITSTATUS(status));
    return text;
}

/* ---- the successor --------------------------------------------------------------------------- */

/* Another program that is to take over the listening sockets. It is spoken to as a service manager
   would do it, so that any program that knows how to be one's service can be a successor. */
typedef struct tcpsrv__successor {
    long pid;                       /* 0: none */
    int *fds, count;                /* the listening sockets, that stay those of this process */
    int words_fd;                   /* its NOTIFY_SOCKET; -1: none */
    int error;                      /* why it could not be run */
    int ready, late;
    uint64_t due;
    char place[sizeof(struct sockaddr_un)]; /* of words_fd, in a directory of its own */
    char program[100];
} tcpsrv__successor;

static TCPSRV__COLD void tcpsrv__successor_close(tcpsrv__successor *successor) {
    if (successor->words_fd >= 0) {
        tcpsrv__sys_close(successor->words_fd);
        tcpsrv__sys_remove(successor->place);
        successor->place[strlen(successor->place) - strlen("/notify")] = 0;
        tcpsrv__sys_remove(successor->place);
    }
    tcpsrv__free(successor->fds);
    successor->fds = NULL;
    successor->words_fd = -1;
}

/* Nobody else may speak there: the directory is this user's alone. */
static TCPSRV__COLD int tcpsrv__successor_listen(tcpsrv__successor *successor) {
    const char *base = tcpsrv__sys_variable("TMPDIR");
    struct sockaddr_un name;
    socklen_t size;
    size_t length;
    int err;
    if (!base || !*base) base = "/tmp";
    length = (size_t)snprintf(successor->place, sizeof successor->place, "%s/tcpsrv-%ld-%llx", base,
                              tcpsrv__sys_pid(), (unsigned long long)tcpsrv__clock_ns());
    if (length + sizeof "/notify" > sizeof name.sun_path) return -ENAMETOOLONG;
    err = tcpsrv__sys_mkdir(successor->place);
    if (err) return err;
    memcpy(successor->place + length, "/notify", sizeof "/notify");
    err = tcpsrv__unix_name(successor->place, &name, &size);
    if (!err) err = successor->words_fd = tcpsrv__sys_datagrams();
    if (err >= 0) err = tcpsrv__sys_bind(err, (const struct sockaddr *)&name, size);
    if (!err) return 0;
    if (successor->words_fd >= 0) tcpsrv__sys_close(successor->words_fd);
    successor->words_fd = -1;
    successor->place[length] = 0;
    tcpsrv__sys_remove(successor->place);
    return err;
}

/* The name that it had when it was passed to this process; else its port, or its path. */
static TCPSRV__COLD void tcpsrv__listener_name(int fd, char *text, size_t size) {
    const char *passed = fd < TCPSRV__FIRST_FD ? "" : tcpsrv_systemd_name(fd - TCPSRV__FIRST_FD);
    tcpsrv_address address;
    char port[24];
    tcpsrv__own_address(fd, &address);
    tcpsrv__print_number(port, address.port);
    snprintf(text, size, "%s", *passed ? passed : address.path[0] ? address.path : port);
    for (; *text; text++)
        if (*text == ':' || (unsigned char)*text < ' ') *text = '_';
}

enum { TCPSRV__NAME_SIZE = 256, TCPSRV__VARIABLES = 6 };

static const char tcpsrv__successor_variables[TCPSRV__VARIABLES][24] = {
    "LISTEN_PID=", "LISTEN_FDS=", "LISTEN_FDNAMES=", "NOTIFY_SOCKET=", "TCPSRV_NOTIFY_SOCKET=",
    "TCPSRV_OWNED="
};

static TCPSRV__COLD int tcpsrv__is_successors(const char *variable) {
    int i;
    for (i = 0; i < TCPSRV__VARIABLES; i++) {
        const char *own = tcpsrv__successor_variables[i];
        if (strncmp(variable, own, strlen(own)) == 0) return 1;
    }
    return 0;
}

/* The values of its variables. Of the text, which is zeroed, the lists of its sockets take twice
   room bytes. */
static TCPSRV__COLD void tcpsrv__successor_values(const tcpsrv__successor *successor, char *text,
                                                  size_t room, const char **values) {
    const char *manager = tcpsrv__sys_variable("TCPSRV_NOTIFY_SOCKET");
    char *owned = text + room;
    int i;
    if (!manager) manager = tcpsrv__sys_variable("NOTIFY_SOCKET");
    values[0] = "                       "; /* room for the pid */
    values[2] = text;
    values[3] = successor->place;
    values[4] = manager ? manager : "";
    values[5] = owned;
    for (i = 0; i < successor->count; i++) {
        owned[i] = tcpsrv__unix_owns(successor->fds[i]) ? '1' : '0';
        if (i) *text++ = ':';
        tcpsrv__listener_name(successor->fds[i], text, TCPSRV__NAME_SIZE);
        text += strlen(text);
    }
}

/* This process's own, with the successor's variables instead of those of their names. One block; in
   *number is where LISTEN_PID's will be written. NULL: no memory. */
static TCPSRV__COLD char **tcpsrv__successor_environment(const tcpsrv__successor *successor,
                                                         char **number) {
    char **own = TCPSRV__ENVIRON, **made, *text, sockets[24];
    const char *values[TCPSRV__VARIABLES];
    size_t room = (size_t)(successor->count + 2) * (TCPSRV__NAME_SIZE + 1), count = 0, i, n = 0;
    while (own && own[count]) count++;
    made = (char **)tcpsrv__alloc((count + TCPSRV__VARIABLES + 1) * sizeof *made +
                                  (TCPSRV__VARIABLES + 2) * room);
    if (!made) return NULL;
    for (i = 0; i < count; i++)
        if (!tcpsrv__is_successors(own[i])) made[n++] = own[i];
    text = (char *)(made + count + TCPSRV__VARIABLES + 1);
    tcpsrv__successor_values(successor, text, room, values);
    tcpsrv__print_number(sockets, successor->count);
    values[1] = sockets;
    *number = text + 2 * room + strlen(tcpsrv__successor_variables[0]);
    for (i = 0; i < TCPSRV__VARIABLES; i++) {
        made[n++] = text += i ? room : 2 * room;
        snprintf(text, room, "%s%s", tcpsrv__successor_variables[i], values[i]);
    }
    return made;
}

static TCPSRV__COLD int tcpsrv__successor_start(tcpsrv__successor *successor, char *const *argv) {
    tcpsrv__launch launch;
    int err;
    memset(&launch, 0, sizeof launch);
    launch.argv = argv;
    launch.first = TCPSRV__FIRST_FD;
    launch.count = successor->count;
    launch.fds = successor->fds; /* the new process changes its own copy */
    launch.environment = tcpsrv__successor_environment(successor, &launch.number);
    launch.words_fd = successor->words_fd;
    launch.name_size = sizeof launch.name;
    err = launch.environment ? tcpsrv__sys_name(successor->words_fd, &launch.name,
                                                &launch.name_size) : -ENOMEM;
    if (!err) successor->pid = tcpsrv__sys_launch(&launch);
    if (successor->pid < 0) err = (int)successor->pid;
    tcpsrv__free(launch.environment);
    snprintf(successor->program, sizeof successor->program, "%.99s", argv[0]);
    successor->due = tcpsrv__clock_ns() + tcpsrv__ms_to_ns(tcpsrv__ready_ms);
    return err;
}

/* Whatever it has said so far. */
static TCPSRV__COLD void tcpsrv__successor_hear(tcpsrv__successor *successor) {
    char words[1024];
    long n;
    while (successor->words_fd >= 0 &&
           (n = tcpsrv__sys_receive(successor->words_fd, words, sizeof words - 1)) >= 0) {
        words[n] = 0;
        if (tcpsrv__says_ready(words) && !successor->late) successor->ready = 1;
        if (strncmp(words, "ERRNO=", 6) == 0)
            successor->error = (int)tcpsrv__decimal(words + 6, 65535);
    }
}

/* It serves: the files of Unix sockets are its own from now on, and a service manager is told whom
   to look at. */
static TCPSRV__COLD void tcpsrv__successor_takes_over(tcpsrv__successor *successor) {
    char state[40];
    int i;
    for (i = 0; i < successor->count; i++) tcpsrv__free(tcpsrv__unix_take(successor->fds[i]));
    snprintf(state, sizeof state, "MAINPID=%ld", successor->pid);
    tcpsrv_notify(state);
    tcpsrv__successor_close(successor);
}

/* Why nothing came of it: what it said itself, or how it ended. */
static TCPSRV__COLD void tcpsrv__successor_failed(const tcpsrv__successor *successor,
                                                  const tcpsrv_options *options, const char *how) {
    if (successor->error > 0) how = tcpsrv_strerror(-successor->error);
    tcpsrv__log(options, TCPSRV_LOG_ERROR, "upgrade failed: %s, pid %ld: %s: this process goes on",
                successor->program, successor->pid, how);
}

/* Its time is over: told to end, it is not believed any more. */
static TCPSRV__COLD void tcpsrv__successor_late(tcpsrv__successor *successor,
                                                const tcpsrv_options *options) {
    successor->late = 1;
    tcpsrv__sys_kill(successor->pid, SIGTERM);
    tcpsrv__successor_failed(successor, options, "not ready in time and told to end");
}

/* It has been collected. */
static TCPSRV__COLD void tcpsrv__successor_ended(tcpsrv__successor *successor,
                                                 const tcpsrv_options *options, int status) {
    char how[TCPSRV__STATUS_TEXT];
    tcpsrv__successor_hear(successor);
    tcpsrv__status_text(status, how);
    if (!successor->ready && !successor->late) tcpsrv__successor_failed(successor, options, how);
}

/* ---- upgrade of a process without workers ---------------------------------------------------- */

struct tcpsrv__upgrade {
    tcpsrv__source source;
    tcpsrv__timer timer;
    tcpsrv__successor successor;
    int polled;
    int exit_fd;                    /* readable when the successor has ended; -1: none */
    int64_t exit_call, drain_ms;    /* what tells of that; 0: nothing does, but its time */
};

/* Whose log hears of it. */
static TCPSRV__COLD const tcpsrv_options *tcpsrv__upgrade_options(const tcpsrv_loop *loop) {
    return loop->servers ? &loop->servers->owner.options : NULL;
}

static TCPSRV__COLD void tcpsrv__upgrade_hush(tcpsrv__upgrade *upgrade) {
    if (upgrade->polled)
        tcpsrv__poller_remove(&upgrade->source.loop->poller, upgrade->successor.words_fd);
    upgrade->polled = 0;
}

static TCPSRV__COLD void tcpsrv__upgrade_end(tcpsrv__source *source) {
    tcpsrv__upgrade *upgrade = TCPSRV__CONTAINER(tcpsrv__upgrade, source, source);
    tcpsrv_loop *loop = source->loop;
    tcpsrv__timer_cancel(loop, &upgrade->timer);
    if (upgrade->exit_call > 0) tcpsrv_cancel(loop, upgrade->exit_call);
    if (upgrade->exit_fd >= 0) tcpsrv__sys_close(upgrade->exit_fd);
    tcpsrv__upgrade_hush(upgrade);
    tcpsrv__successor_close(&upgrade->successor);
    loop->upgrade = NULL;
    tcpsrv__source_end(source);
}

/* Collects the successor if it has ended, which is the end of the upgrade, in vain or not. */
static TCPSRV__COLD int tcpsrv__upgrade_reap(tcpsrv__upgrade *upgrade) {
    int status = 0;
    if (!tcpsrv__sys_reap(upgrade->successor.pid, &status, 0)) return 0;
    tcpsrv__successor_ended(&upgrade->successor, tcpsrv__upgrade_options(upgrade->source.loop),
                            status);
    tcpsrv__upgrade_end(&upgrade->source);
    return 1;
}

static TCPSRV__COLD void tcpsrv__upgrade_exit(int fd, int events, void *arg) {
    (void)fd, (void)events;
    tcpsrv__upgrade_reap((tcpsrv__upgrade *)arg);
}

static TCPSRV__COLD void tcpsrv__upgrade_child(int signo, void *arg) {
    (void)signo;
    tcpsrv__upgrade_reap((tcpsrv__upgrade *)arg);
}

/* Where the system has no descriptor for that, SIGCHLD tells, unless the program uses it. It may
   have come before anybody asked for it. */
static TCPSRV__COLD void tcpsrv__upgrade_watch_exit(tcpsrv__upgrade *upgrade) {
    tcpsrv_loop *loop = upgrade->source.loop;
    upgrade->exit_fd = tcpsrv__sys_watch_exit(upgrade->successor.pid);
    if (upgrade->exit_fd >= 0) {
        upgrade->exit_call = tcpsrv_watch_fd(loop, upgrade->exit_fd, TCPSRV_READ,
                                             tcpsrv__upgrade_exit, upgrade);
    } else if (tcpsrv__sys_signal_is_free(SIGCHLD)) {
        upgrade->exit_call = tcpsrv_on_signal(loop, SIGCHLD, tcpsrv__upgrade_child, upgrade);
        tcpsrv__upgrade_reap(upgrade);
    }
}

static TCPSRV__COLD void tcpsrv__upgrade_fire(tcpsrv_loop *loop, tcpsrv__timer *timer) {
    tcpsrv__upgrade *upgrade = TCPSRV__CONTAINER(tcpsrv__upgrade, timer, timer);
    tcpsrv__timer_arm(loop, timer, loop->now + tcpsrv__ms_to_ns(tcpsrv__ready_ms));
    if (!tcpsrv__upgrade_reap(upgrade))
        tcpsrv__successor_late(&upgrade->successor, tcpsrv__upgrade_options(loop));
}

static TCPSRV__COLD void tcpsrv__upgrade_words(tcpsrv__source *source, int events) {
    tcpsrv__upgrade *upgrade = TCPSRV__CONTAINER(tcpsrv__upgrade, source, source);
    tcpsrv_loop *loop = source->loop;
    tcpsrv *server;
    (void)events;
    tcpsrv__successor_hear(&upgrade->successor);
    if (!upgrade->successor.ready) return;
    tcpsrv__log(tcpsrv__upgrade_options(loop), TCPSRV_LOG_INFO,
                "upgrade: the successor serves: draining");
    tcpsrv__timer_arm(loop, &upgrade->timer, TCPSRV__NEVER);
    tcpsrv__upgrade_hush(upgrade);
    tcpsrv__successor_takes_over(&upgrade->successor);
    for (server = loop->servers; server; server = server->next)
        tcpsrv_drain(server, upgrade->drain_ms);
}

static const tcpsrv__class tcpsrv__upgrade_class = {
    tcpsrv__upgrade_words, NULL, tcpsrv__upgrade_end, NULL, sizeof(tcpsrv__upgrade), 0
};

/* It gets the loop's listening sockets, in the order in which they were added. */
static TCPSRV__COLD int tcpsrv__loop_listeners(const tcpsrv_loop *loop,
                                               tcpsrv__successor *successor) {
    const tcpsrv__listener *listener;
    const tcpsrv *server;
    int err = 0;
    for (server = loop->servers; server; server = server->next)
        for (listener = server->listeners; listener && !err; listener = listener->next)
            err = tcpsrv__fds_add(&successor->fds, &successor->count, &listener->source.fd, 1);
    return err || successor->count ? err : -ENOENT;
}

/* Whatever can fail comes before the successor runs, but for what only tells of its end. */
static TCPSRV__COLD int tcpsrv__upgrade_begin(tcpsrv__upgrade *upgrade, char *const *argv) {
    tcpsrv_loop *loop = upgrade->source.loop;
    tcpsrv__successor *successor = &upgrade->successor;
    int err = tcpsrv__loop_listeners(loop, successor);
    if (err) return tcpsrv__fail(err, "upgrade", argv[0]);
    err = tcpsrv__successor_listen(successor);
    if (err) return tcpsrv__fail(err, "upgrade", successor->place);
    upgrade->source.fd = successor->words_fd;
    err = tcpsrv__timer_arm(loop, &upgrade->timer,
                            tcpsrv__clock_ns() + tcpsrv__ms_to_ns(tcpsrv__ready_ms));
    if (!err) err = tcpsrv__poller_add_watch(&loop->poller, successor->words_fd,
                                             upgrade->source.id, TCPSRV_READ);
    upgrade->polled = !err;
    if (!err) err = tcpsrv__successor_start(successor, argv);
    if (err) return tcpsrv__fail(err, "upgrade", argv[0]);
    tcpsrv__upgrade_watch_exit(upgrade);
    return 0;
}

static TCPSRV__COLD int tcpsrv__upgrade_allowed(const tcpsrv_loop *loop, char *const *argv) {
    if (!argv || !argv[0]) return -EINVAL;
    if (tcpsrv__own_task_id >= 0) return -EPERM;
    return loop->upgrade ? TCPSRV_EBUSY : 0;
}

TCPSRV_IMPL int tcpsrv_upgrade(char *const *argv, int64_t drain_ms) {
    tcpsrv_loop *loop = tcpsrv__loop_here();
    tcpsrv__upgrade *upgrade = NULL;
    int err = loop ? tcpsrv__upgrade_allowed(loop, argv) : tcpsrv__thread()->error;
    if (!err) upgrade = (tcpsrv__upgrade *)tcpsrv__source_new(&tcpsrv__upgrade_class, loop, -1,
                                                              &err);
    if (!upgrade) return tcpsrv__fail(err, "upgrade", argv ? argv[0] : NULL);
    loop->upgrade = upgrade;
    upgrade->drain_ms = drain_ms;
    upgrade->timer.fire = tcpsrv__upgrade_fire;
    upgrade->exit_fd = upgrade->successor.words_fd = -1;
    err = tcpsrv__upgrade_begin(upgrade, argv);
    if (err) tcpsrv__upgrade_end(&upgrade->source);
    return err;
}

/* ---- the family ----------------------------------------------------------------------------- */

typedef struct tcpsrv__child {
    long pid;                       /* 0: not running */
    int ended;                      /* for good */
    int restarts;
    int64_t pause_ms;               /* before the next restart */
    uint64_t started, restart_at;
} tcpsrv__child;

typedef struct tcpsrv__leaver {
    struct tcpsrv__leaver *next;
    long pid;
    int task_id;
} tcpsrv__leaver;

typedef struct tcpsrv__reload {
    int task_id;                    /* whose process is replaced now; -1: no reload */
    int again;                      /* told meanwhile: once more, from the first on */
    long pid;                       /* of the replacement that does not serve yet; 0: none */
    int ready_fd;                   /* where it says that it does; -1: none */
    uint64_t due;
    tcpsrv__leaver *room;           /* for the one that is replaced, who must not be lost */
} tcpsrv__reload;

typedef struct tcpsrv__family {
    tcpsrv__child *children;
    int count, restarts, restarts_left;
    int ending, gave_up, killed;
    uint64_t kill_at;
    tcpsrv__reload reload;
    tcpsrv__successor successor;
    tcpsrv__leaver *leavers;
    int lifeline[2];                /* nobody writes: children see the end of it with the parent */
    tcpsrv__waker waker;
    long pid;
    int signals[TCPSRV__FAMILY_SIGNALS], signal_count;
    const tcpsrv_options *options;  /* whose log hears of it all; NULL: stderr */
} tcpsrv__family;

/* ---- counters -------------------------------------------------------------------------------- */

/* A process that was ended in the middle of telling leaves the sequence odd: not for ever. */
TCPSRV_IMPL int tcpsrv_worker_stats(int task_id, tcpsrv_stats *stats) {
    tcpsrv__worker *workers = TCPSRV__LOAD(&tcpsrv__workers), *worker;
    size_t words[sizeof workers->words / sizeof(size_t)], pid, sequence, i;
    int tries = 1000;
    if (!workers || task_id < 0 || task_id >= tcpsrv__worker_count)
        return tcpsrv__fail(-ENOENT, "worker_stats", NULL);
    worker = &workers[task_id];
    do {
        sequence = TCPSRV__LOAD_WORD(&worker->sequence);
        pid = TCPSRV__LOAD_WORD(&worker->pid);
        for (i = 0; i < sizeof words / sizeof(size_t); i++)
            words[i] = TCPSRV__LOAD_WORD(&worker->words[i]);
    } while ((sequence % 2 || sequence != TCPSRV__LOAD_WORD(&worker->sequence)) && --tries);
    memcpy(stats, words, sizeof *stats);
    return pid ? (int)pid : tcpsrv__fail(-ESRCH, "worker_stats", NULL);
}

static TCPSRV__COLD void tcpsrv__worker_begin(int task_id) {
    tcpsrv__worker *worker = &tcpsrv__workers[task_id];
    tcpsrv_stats none;
    memset(&none, 0, sizeof none);
    TCPSRV__STORE_WORD(&worker->pid, (size_t)tcpsrv__sys_pid());
    tcpsrv__worker_write(worker, &none);
}

static TCPSRV__COLD void tcpsrv__workers_unmap(void) {
    tcpsrv__sys_unmap(tcpsrv__workers, (size_t)tcpsrv__worker_count * sizeof *tcpsrv__workers);
    TCPSRV__STORE(&tcpsrv__workers, NULL);
}

static TCPSRV__COLD int tcpsrv__workers_map(int count) {
    void *memory = tcpsrv__sys_map((size_t)count * sizeof *tcpsrv__workers, MAP_SHARED);
    if (!memory) return -ENOMEM;
    tcpsrv__worker_count = count;
    TCPSRV__STORE(&tcpsrv__workers, (tcpsrv__worker *)memory);
    return 0;
}

/* ---- what the parent says -------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__family_dump(const tcpsrv__family *family) {
    uint64_t now = tcpsrv__clock_ns();
    tcpsrv_stats stats;
    int i;
    for (i = 0; i < family->count; i++) {
        const tcpsrv__child *child = &family->children[i];
        int pid = tcpsrv_worker_stats(i, &stats);
        if (pid < 0) {
            tcpsrv__log(family->options, TCPSRV_LOG_WARNING,
                        "child %d: not running, %d restarts", i, child->restarts);
            continue;
        }
        tcpsrv__log(family->options, TCPSRV_LOG_WARNING,
                    "child %d: pid %d for %llu s, %d restarts, %llu active of %llu accepted,"
                    " %llu bytes read, %llu written", i, pid,
                    (unsigned long long)(now - child->started) / 1000000000u,
                    child->restarts, (unsigned long long)stats.active,
                    (unsigned long long)stats.accepted,
                    (unsigned long long)stats.bytes_read,
                    (unsigned long long)stats.bytes_written);
    }
}

/* ---- signals --------------------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__family_release(tcpsrv__family *family) {
    while (family->signal_count > 0)
        tcpsrv__sys_restore_signal(family->signals[--family->signal_count]);
}

static TCPSRV__COLD int tcpsrv__family_catch(tcpsrv__family *family, int signo) {
    int err = tcpsrv__sys_catch_signal(signo, family->waker.write_fd);
    if (!err) family->signals[family->signal_count++] = signo;
    return err;
}

/* SIGUSR1 only where the program has no use of its own for it. */
static TCPSRV__COLD int tcpsrv__family_signals(tcpsrv__family *family) {
    int err = tcpsrv__family_catch(family, SIGTERM);
    if (!err) err = tcpsrv__family_catch(family, SIGINT);
    if (!err) err = tcpsrv__family_catch(family, SIGCHLD);
    if (!err && TCPSRV__LOAD(&tcpsrv__reload_wanted)) err = tcpsrv__family_catch(family, SIGHUP);
    if (!err && TCPSRV__LOAD(&tcpsrv__upgrade_wanted)) err = tcpsrv__family_catch(family, SIGUSR2);
    if (!err && tcpsrv__sys_signal_is_free(SIGUSR1)) err = tcpsrv__family_catch(family, SIGUSR1);
    if (err) tcpsrv__family_release(family);
    return err;
}

static TCPSRV__COLD int tcpsrv__family_told(const tcpsrv__family *family, int signo) {
    int i;
    for (i = 0; i < family->signal_count; i++)
        if (family->signals[i] == signo) return tcpsrv__signal_take(signo);
    return 0;
}

static TCPSRV__COLD void tcpsrv__family_hold(const tcpsrv__family *family, int hold) {
    tcpsrv__sys_hold_signals(family->signals, family->signal_count, hold);
}

/* ---- the family's own life ------------------------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__family_free(tcpsrv__family *family) {
    while (family->leavers) {
        tcpsrv__leaver *leaver = family->leavers;
        family->leavers = leaver->next;
        tcpsrv__free(leaver);
    }
    tcpsrv__free(family->successor.fds);
    tcpsrv__free(family->reload.room);
    tcpsrv__free(family->children);
    tcpsrv__free(family);
}

/* All but the lifeline's end that children read. */
static TCPSRV__COLD void tcpsrv__family_restore(tcpsrv__family *family) {
    tcpsrv__family_release(family);
    tcpsrv__waker_close(&family->waker);
    tcpsrv__sys_close(family->lifeline[1]);
    if (family->reload.ready_fd >= 0) tcpsrv__sys_close(family->reload.ready_fd);
}

/* In the child: as if nothing had been done to the process, but for the number, the lifeline, and
   the signals that a terminal sends to all and the parent hands on as SIGTERM or heeds. */
static TCPSRV__COLD void tcpsrv__child_begin(tcpsrv__family *family, int task_id, int ready_fd) {
    long parent = family->pid;
    int signals[TCPSRV__FAMILY_SIGNALS], count = family->signal_count;
    memcpy(signals, family->signals, sizeof signals);
    tcpsrv__family_restore(family);
    if (family->successor.words_fd >= 0) tcpsrv__sys_close(family->successor.words_fd);
    tcpsrv__sys_ignore_signals(TCPSRV__LOAD(&tcpsrv__reload_wanted));
    tcpsrv__lifeline = family->lifeline[0];
    tcpsrv__ready_fd = ready_fd;
    tcpsrv__own_task_id = task_id;
    tcpsrv__worker_begin(task_id);
    tcpsrv__sys_die_with_parent();
    tcpsrv__family_free(family);
    tcpsrv__sys_hold_signals(signals, count, 0);
    if (tcpsrv__sys_parent_pid() != parent) tcpsrv__sys_kill(tcpsrv__sys_pid(), SIGTERM);
}

/* 0 in the child; the pid, or a code, in the parent. Signals are held meanwhile: one that comes to
   the child before its dispositions are its own must not meet the parent's handler. */
static TCPSRV__COLD long tcpsrv__child_fork(tcpsrv__family *family, int task_id, int ready_fd) {
    long pid;
    tcpsrv__family_hold(family, 1);
    pid = tcpsrv__sys_fork();
    if (pid == 0) tcpsrv__child_begin(family, task_id, ready_fd);
    else tcpsrv__family_hold(family, 0);
    return pid;
}

/* 1 in the child; 0, or a code, in the parent. */
static TCPSRV__COLD int tcpsrv__child_start(tcpsrv__family *family, int task_id) {
    long pid = tcpsrv__child_fork(family, task_id, -1);
    if (pid <= 0) return pid == 0 ? 1 : (int)pid;
    family->children[task_id].pid = pid;
    family->children[task_id].started = tcpsrv__clock_ns();
    return 0;
}

static TCPSRV__COLD void tcpsrv__family_kill(tcpsrv__family *family, int signo) {
    const tcpsrv__leaver *leaver;
    int i;
    for (i = 0; i < family->count; i++)
        if (family->children[i].pid) tcpsrv__sys_kill(family->children[i].pid, signo);
    if (family->reload.pid) tcpsrv__sys_kill(family->reload.pid, signo);
    if (family->successor.pid && !family->successor.ready)
        tcpsrv__sys_kill(family->successor.pid, signo);
    if (signo != SIGKILL) return; /* leavers had their SIGTERM */
    for (leaver = family->leavers; leaver; leaver = leaver->next)
        tcpsrv__sys_kill(leaver->pid, signo);
}

/* No more restarts; the running ones get SIGTERM once. */
static TCPSRV__COLD void tcpsrv__family_end(tcpsrv__family *family) {
    int i;
    family->ending = 1;
    for (i = 0; i < family->count; i++)
        if (!family->children[i].pid) family->children[i].ended = 1;
    tcpsrv__family_kill(family, SIGTERM);
}

static TCPSRV__COLD int tcpsrv__family_alive(const tcpsrv__family *family) {
    int i, alive = family->leavers != NULL || family->reload.pid != 0;
    for (i = 0; i < family->count; i++) alive += !family->children[i].ended;
    return alive;
}

/* ---- the end of a child, and its restart ----------------------------------------------------- */

static TCPSRV__COLD void tcpsrv__give_up(tcpsrv__family *family, int task_id, const char *how,
                                         int restarts) {
    tcpsrv__log(family->options, TCPSRV_LOG_ERROR,
                "child %d crashed: %s: giving up after %d restarts, %d of them its own",
                task_id, how, restarts, family->children[task_id].restarts);
    family->gave_up = 1;
    family->kill_at = tcpsrv__clock_ns() + TCPSRV__NS(TCPSRV__GIVE_UP_MS);
    tcpsrv__family_end(family);
}

static TCPSRV__COLD void tcpsrv__child_crashed(tcpsrv__family *family, int task_id,
                                               const char *how) {
    tcpsrv__child *child = &family->children[task_id];
    uint64_t now = tcpsrv__clock_ns();
    if (family->restarts_left == 0) {
        tcpsrv__give_up(family, task_id, how, family->restarts);
        return;
    }
    family->restarts_left--;
    family->restarts++;
    child->restarts++;
    if (now - child->started > TCPSRV__NS(TCPSRV__SETTLED_MS)) child->pause_ms = 0;
    tcpsrv__log(family->options, TCPSRV_LOG_WARNING, "child %d crashed: %s: restart %d in %d ms",
                task_id, how, child->restarts, (int)child->pause_ms);
    child->restart_at = now + tcpsrv__ms_to_ns(child->pause_ms);
    child->pause_ms *= 2;
    if (!child->pause_ms) child->pause_ms = TCPSRV__RESTART_MS;
    if (child->pause_ms > TCPSRV__RESTART_MAX_MS) child->pause_ms = TCPSRV__RESTART_MAX_MS;
}

static TCPSRV__COLD int tcpsrv__is_replaced(const tcpsrv__family *family, int task_id) {
    return family->reload.pid && family->reload.task_id == task_id;
}

static TCPSRV__COLD void tcpsrv__child_ended(tcpsrv__family *family, int task_id, int status) {
    tcpsrv__child *child = &family->children[task_id];
    char how[TCPSRV__STATUS_TEXT];
    tcpsrv__status_text(status, how);
    child->pid = 0;
    if (status == 0 || family->ending) {
        child->ended = 1;
        tcpsrv__log(family->options, TCPSRV_LOG_INFO, "child %d ended: %s", task_id, how);
    } else if (tcpsrv__is_replaced(family, task_id)) {
        tcpsrv__log(family->options, TCPSRV_LOG_WARNING, "child %d crashed: %s: replaced already",
                    task_id, how);
    } else {
        tcpsrv__child_crashed(family, task_id, how);
    }
}

/* Restarts those whose pause is over. 1 in a child. */
static TCPSRV__COLD int tcpsrv__family_restart(tcpsrv__family *family) {
    int i, err;
    for (i = 0; i < family->count; i++) {
        tcpsrv__child *child = &family->children[i];
        if (child->pid || child->ended || tcpsrv__is_replaced(family, i)) continue;
        if (child->restart_at > tcpsrv__clock_ns()) continue;
        err = tcpsrv__child_start(family, i);
        if (err == 1) return 1;
        if (err < 0) child->restart_at = tcpsrv__clock_ns() + TCPSRV__NS(1000);
    }
    return 0;
}

/* ---- reload ---------------------------------------------------------------------------------- */

/* The replacement is the child from now on, or is none; the next one's turn, or the end. */
static TCPSRV__COLD void tcpsrv__reload_clear(tcpsrv__family *family, int next) {
    tcpsrv__reload *reload = &family->reload;
    if (reload->ready_fd >= 0) tcpsrv__sys_close(reload->ready_fd);
    tcpsrv__free(reload->room);
    reload->room = NULL;
    reload->ready_fd = -1;
    reload->pid = 0;
    reload->task_id = next;
    if (next >= 0 && next < family->count) return;
    if (next >= 0) tcpsrv__log(family->options, TCPSRV_LOG_INFO, "reload: done");
    reload->task_id = reload->again ? 0 : -1;
    reload->again = 0;
}

static TCPSRV__COLD void tcpsrv__add_leaver(tcpsrv__family *family, long pid) {
    tcpsrv__leaver *leaver = family->reload.room;
    family->reload.room = NULL;
    leaver->pid = pid;
    leaver->task_id = family->reload.task_id;
    leaver->next = family->leavers;
    family->leavers = leaver;
    tcpsrv__sys_kill(pid, SIGTERM);
}

static TCPSRV__COLD void tcpsrv__reload_failed(tcpsrv__family *family, const char *why) {
    int task_id = family->reload.task_id;
    TCPSRV__STORE_WORD(&tcpsrv__workers[task_id].pid, (size_t)family->children[task_id].pid);
    tcpsrv__log(family->options, TCPSRV_LOG_ERROR,
                "reload: the new child %d does not serve: %s: those not yet replaced stay",
                task_id, why);
    tcpsrv__reload_clear(family, -1);
}

/* The one that serves takes over, the old one is told to end. */
static TCPSRV__COLD void tcpsrv__reload_served(tcpsrv__family *family) {
    tcpsrv__child *child = &family->children[family->reload.task_id];
    if (child->pid) tcpsrv__add_leaver(family, child->pid);
    child->pid = family->reload.pid;
    child->ended = 0;
    child->pause_ms = 0;
    child->started = tcpsrv__clock_ns();
    tcpsrv__reload_clear(family, family->reload.task_id + 1);
}

/* A replacement has ended before it served. Where the old one has crashed meanwhile, the number is
   without a process, and restarted as after any crash. */
static TCPSRV__COLD void tcpsrv__replacement_ended(tcpsrv__family *family, int status) {
    int task_id = family->reload.task_id;
    char how[TCPSRV__STATUS_TEXT];
    tcpsrv__status_text(status, how);
    if (family->ending) {
        tcpsrv__reload_clear(family, -1);
        return;
    }
    tcpsrv__reload_failed(family, how);
    if (!family->children[task_id].pid && !family->children[task_id].ended)
        tcpsrv__child_crashed(family, task_id, how);
}

static TCPSRV__COLD void tcpsrv__reload_watch(tcpsrv__family *family) {
    tcpsrv__reload *reload = &family->reload;
    char said;
    long n = -EAGAIN;
    if (reload->ready_fd >= 0) n = tcpsrv__sys_receive(reload->ready_fd, &said, 1);
    if (n == 0) {
        tcpsrv__sys_close(reload->ready_fd); /* it ends; how will be known when it is collected */
        reload->ready_fd = -1;
    }
    if (n == 1) {
        tcpsrv__reload_served(family);
    } else if (tcpsrv__clock_ns() >= reload->due) {
        tcpsrv__add_leaver(family, reload->pid);
        tcpsrv__reload_failed(family, "time is over");
    }
}

/* Starts the replacement of the child whose turn it is. 1 in it. */
static TCPSRV__COLD int tcpsrv__reload_start(tcpsrv__family *family) {
    tcpsrv__reload *reload = &family->reload;
    int ends[2], err;
    long pid;
    reload->room = (tcpsrv__leaver *)tcpsrv__alloc(sizeof *reload->room);
    err = reload->room ? tcpsrv__sys_pipe(ends) : -ENOMEM;
    if (!err) {
        reload->ready_fd = ends[0];
        pid = tcpsrv__child_fork(family, reload->task_id, ends[1]);
        if (pid == 0) return 1;
        tcpsrv__sys_close(ends[1]);
        if (pid > 0) reload->pid = pid;
        else err = (int)pid;
    }
    if (err) tcpsrv__reload_failed(family, tcpsrv_strerror(err));
    else reload->due = tcpsrv__clock_ns() + tcpsrv__ms_to_ns(tcpsrv__ready_ms);
    return 0;
}

/* One that waits for its restart gets it at once: it may have waited for what the reload brings.
   1 in a child. */
static TCPSRV__COLD int tcpsrv__family_reload(tcpsrv__family *family) {
    tcpsrv__reload *reload = &family->reload;
    if (family->ending) return 0;
    if (reload->pid) tcpsrv__reload_watch(family);
    while (reload->task_id >= 0 && !reload->pid) {
        tcpsrv__child *child = &family->children[reload->task_id];
        if (child->pid) {
            if (tcpsrv__reload_start(family)) return 1;
        } else {
            child->restart_at = 0;
            tcpsrv__reload_clear(family, reload->task_id + 1);
        }
    }
    return 0;
}

/* ---- upgrade of the parent ------------------------------------------------------------------- */

/* All that the parent has was made for the children. */
static TCPSRV__COLD int tcpsrv__parent_listeners(tcpsrv__successor *successor) {
    size_t limit = tcpsrv__sys_descriptor_limit();
    int fd, err = 0;
    for (fd = 0; fd < TCPSRV__MOST_LISTENERS_AT && (size_t)fd < limit && !err; fd++)
        if (tcpsrv__sys_listens(fd) == 0)
            err = tcpsrv__fds_add(&successor->fds, &successor->count, &fd, 1);
    return err || successor->count ? err : -ENOENT;
}

static TCPSRV__COLD void tcpsrv__family_upgrade(tcpsrv__family *family) {
    tcpsrv__successor *successor = &family->successor;
    char *const *argv = TCPSRV__LOAD(&tcpsrv__upgrade_wanted);
    int err;
    if (successor->pid || family->ending || !argv[0]) return;
    memset(successor, 0, sizeof *successor);
    successor->words_fd = -1;
    err = tcpsrv__parent_listeners(successor);
    if (!err) err = tcpsrv__successor_listen(successor);
    if (!err) err = tcpsrv__successor_start(successor, argv);
    if (!err) return;
    successor->pid = 0;
    tcpsrv__successor_close(successor);
    tcpsrv__log(family->options, TCPSRV_LOG_ERROR, "upgrade failed: %.100s: %s", argv[0],
                tcpsrv_strerror(err));
}

static TCPSRV__COLD void tcpsrv__family_hear(tcpsrv__family *family) {
    tcpsrv__successor *successor = &family->successor;
    if (!successor->pid || successor->ready || family->ending) return;
    tcpsrv__successor_hear(successor);
    if (successor->ready) {
        tcpsrv__log(family->options, TCPSRV_LOG_INFO, "upgrade: the successor serves: ending");
        tcpsrv__successor_takes_over(successor);
        tcpsrv__family_end(family);
    } else if (!successor->late && tcpsrv__clock_ns() >= successor->due) {
        tcpsrv__successor_late(successor, family->options);
    }
}

/* ---- supervising ----------------------------------------------------------------------------- */

static TCPSRV__COLD int tcpsrv__reaped(long pid, int *status) {
    *status = 0;
    return pid && tcpsrv__sys_reap(pid, status, 0);
}

static TCPSRV__COLD void tcpsrv__family_reap(tcpsrv__family *family) {
    tcpsrv__leaver **at = &family->leavers, *leaver;
    char how[TCPSRV__STATUS_TEXT];
    int i, status;
    if (tcpsrv__reaped(family->successor.pid, &status)) {
        tcpsrv__successor_ended(&family->successor, family->options, status);
        tcpsrv__successor_close(&family->successor);
        family->successor.pid = 0;
    }
    for (i = 0; i < family->count; i++) {
        long pid = family->children[i].pid;
        if (!tcpsrv__reaped(pid, &status)) continue;
        if (TCPSRV__LOAD_WORD(&tcpsrv__workers[i].pid) == (size_t)pid)
            TCPSRV__STORE_WORD(&tcpsrv__workers[i].pid, 0);
        tcpsrv__child_ended(family, i, status);
    }
    if (tcpsrv__reaped(family->reload.pid, &status)) tcpsrv__replacement_ended(family, status);
    while ((leaver = *at) != NULL) {
        if (!tcpsrv__reaped(leaver->pid, &status)) {
            at = &leaver->next;
            continue;
        }
        tcpsrv__log(family->options, TCPSRV_LOG_INFO, "child %d that was replaced ended: %s",
                    leaver->task_id, tcpsrv__status_text(status, how));
        *at = leaver->next;
        tcpsrv__free(leaver);
    }
}

static TCPSRV__COLD int tcpsrv__family_timeout(const tcpsrv__family *family) {
    uint64_t now = tcpsrv__clock_ns(), due = family->killed ? 0 : family->kill_at;
    int i;
    if (family->reload.pid && !family->ending) due = tcpsrv__earlier(due, family->reload.due);
    if (family->successor.pid && !family->successor.ready && !family->successor.late)
        due = tcpsrv__earlier(due, family->successor.due);
    for (i = 0; i < family->count; i++)
        if (!family->children[i].pid && !family->children[i].ended &&
            !tcpsrv__is_replaced(family, i))
            due = tcpsrv__earlier(due, family->children[i].restart_at);
    if (!due) return -1;
    return due <= now ? 0 : (int)((due - now) / 1000000u) + 1;
}

static TCPSRV__COLD void tcpsrv__family_obey(tcpsrv__family *family) {
    int told = tcpsrv__family_told(family, SIGTERM);
    told = tcpsrv__family_told(family, SIGINT) || told;
    if (told && !family->ending) tcpsrv_notify("STOPPING=1");
    if (told && !family->ending) tcpsrv__family_end(family);
    else if (told) tcpsrv__family_kill(family, SIGKILL);
    if (family->kill_at && !family->killed && tcpsrv__clock_ns() >= family->kill_at) {
        family->killed = 1;
        tcpsrv__family_kill(family, SIGKILL);
    }
    if (tcpsrv__family_told(family, SIGHUP)) {
        if (family->reload.task_id < 0) family->reload.task_id = 0;
        else family->reload.again = 1;
    }
    if (tcpsrv__family_told(family, SIGUSR1)) tcpsrv__family_dump(family);
    if (tcpsrv__family_told(family, SIGUSR2)) tcpsrv__family_upgrade(family);
}

/* In the parent. The counters stay: another thread may be reading them. */
static TCPSRV__COLD void tcpsrv__family_close(tcpsrv__family *family) {
    tcpsrv__family_restore(family);
    tcpsrv__sys_close(family->lifeline[0]);
    tcpsrv__successor_close(&family->successor);
    tcpsrv__family_free(family);
}

/* Returns in children that were restarted; the parent exits. */
static TCPSRV__COLD int tcpsrv__supervise(tcpsrv__family *family) {
    int status, fds[3];
    while (tcpsrv__family_alive(family)) {
        fds[0] = family->waker.read_fd;
        fds[1] = family->reload.ready_fd;
        fds[2] = family->successor.words_fd;
        tcpsrv__sys_wait_readable(fds, 3, tcpsrv__family_timeout(family));
        tcpsrv__waker_drain(&family->waker);
        tcpsrv__family_obey(family);
        tcpsrv__family_hear(family);
        tcpsrv__family_reap(family);
        if (tcpsrv__family_reload(family)) return tcpsrv__own_task_id;
        if (tcpsrv__family_restart(family)) return tcpsrv__own_task_id;
    }
    status = family->gave_up;
    tcpsrv__family_close(family);
    tcpsrv__unix_sockets_forget();
    tcpsrv__sys_exit(status);
    return -1;
}

static TCPSRV__COLD tcpsrv__family *tcpsrv__family_new(int count, int restarts, int *err) {
    tcpsrv__family *family = (tcpsrv__family *)tcpsrv__alloc(sizeof *family);
    *err = -ENOMEM;
    if (!family) return NULL;
    family->children = (tcpsrv__child *)tcpsrv__alloc((size_t)count * sizeof *family->children);
    if (!family->children) goto fail;
    family->count = count;
    family->restarts_left = restarts;
    family->reload.task_id = family->reload.ready_fd = family->successor.words_fd = -1;
    family->pid = tcpsrv__sys_pid();
    *err = tcpsrv__workers_map(count);
    if (*err) goto fail;
    *err = tcpsrv__sys_pipe(family->lifeline);
    if (*err) goto fail_map;
    *err = tcpsrv__waker_open(&family->waker);
    if (*err) goto fail_pipe;
    *err = tcpsrv__family_signals(family);
    if (!*err) return family;
    tcpsrv__waker_close(&family->waker);
fail_pipe:
    tcpsrv__sys_close(family->lifeline[0]);
    tcpsrv__sys_close(family->lifeline[1]);
fail_map:
    tcpsrv__workers_unmap();
fail:
    tcpsrv__family_free(family);
    return NULL;
}

/* fork has failed in the middle: nothing of it stays. */
static TCPSRV__COLD void tcpsrv__family_undo(tcpsrv__family *family) {
    int i, status;
    tcpsrv__family_kill(family, SIGKILL);
    for (i = 0; i < family->count; i++)
        if (family->children[i].pid) tcpsrv__sys_reap(family->children[i].pid, &status, 1);
    tcpsrv__workers_unmap();
    tcpsrv__family_close(family);
}

static TCPSRV__COLD int tcpsrv__fork_family(int num_processes, int max_restarts,
                                            const tcpsrv_options *options) {
    tcpsrv__thread_state *thread = tcpsrv__thread();
    tcpsrv__family *family;
    int i, err = 0;
    if (thread->default_loop || thread->turning || tcpsrv__own_task_id >= 0)
        return tcpsrv__fail(TCPSRV_EBUSY, "fork_processes", NULL);
    if (num_processes <= 0) num_processes = tcpsrv_cpu_count();
    if (max_restarts < 0) max_restarts = TCPSRV__MAX_RESTARTS;
    family = tcpsrv__family_new(num_processes, max_restarts, &err);
    if (!family) return tcpsrv__fail(err, "fork_processes", NULL);
    family->options = options;
    for (i = 0; i < num_processes && !err; i++) {
        err = tcpsrv__child_start(family, i);
        if (err == 1) return tcpsrv__own_task_id;
    }
    if (!err) return tcpsrv__supervise(family);
    tcpsrv__family_undo(family);
    return tcpsrv__fail(err, "fork", NULL);
}

TCPSRV_IMPL int tcpsrv_fork_processes(int num_processes, int max_restarts) {
    return tcpsrv__fork_family(num_processes, max_restarts, NULL);
}

#ifdef __cplusplus
}
#endif
#endif /* TCPSERVER_IMPLEMENTED */
#endif /* TCPSERVER_IMPLEMENTATION */

/* MIT License
 *
 * Copyright (c) 2026 The tcpserver.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
 * associated documentation files (the "Software"), to deal in the Software without restriction,
 * including without limitation the rights to use, copy, modify, merge, publish, distribute,
 * sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or
 * substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
 * NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
 * NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
 * DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
