/* TLS over a network that gives and takes as little as it likes: a seed decides how short each read
   and write is, when the kernel says "not now", and which call or allocation fails. What arrives
   is compared byte by byte, every call must end, and nothing may be left. */
#if defined(TEST_HAS_BEARSSL)
#define TCPSERVER_TLS
#endif
#if !defined(TCPSERVER_USE_POLL)
#define TCPSERVER_USE_POLL /* tells again what a made-up "not now" would lose on an edge */
#endif
#include "support.h"
#include <netdb.h>
#include <regex.h>
#include <sched.h>
#include <sys/uio.h>

static uint64_t net_state;
static int net_shortens;
static int64_t net_fails_at;        /* the call that fails; 0: none */

static unsigned net_random(unsigned below) {
    net_state = net_state * 6364136223846793005u + 1442695040888963407u;
    return below ? (unsigned)(net_state >> 33) % below : 0;
}

/* A kernel that has told of the end has no "not now" to say any more. */
static int net_has_ended(int fd) {
    struct pollfd entry;
    entry.fd = fd;
    entry.events = POLLRDHUP;
    return poll(&entry, 1, 0) > 0;
}

/* How much of a call goes through: -1 and errno for none of it. */
static ssize_t net_allows(int fd, size_t size) {
    if (net_fails_at > 0 && --net_fails_at == 0) {
        errno = ECONNRESET;
        return -1;
    }
    if (!net_shortens || !size) return (ssize_t)size;
    switch (net_random(6)) {
    case 0:
        errno = EAGAIN;
        return net_has_ended(fd) ? (ssize_t)size : -1;
    case 1: return 1;
    case 2: return (ssize_t)(1 + net_random(size < 40 ? (unsigned)size : 40));
    case 3: return (ssize_t)(1 + net_random((unsigned)size));
    default: return (ssize_t)size;
    }
}

static int net_is_socket(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode);
}

static ssize_t net_read(int fd, void *memory, size_t size) {
    ssize_t n = net_is_socket(fd) ? net_allows(fd, size) : (ssize_t)size;
    return n < 0 ? n : read(fd, memory, (size_t)n);
}

static ssize_t net_recv(int fd, void *memory, size_t size, int flags) {
    ssize_t n = net_allows(fd, size);
    return n < 0 ? n : recv(fd, memory, (size_t)n, flags);
}

static ssize_t net_send(int fd, const void *memory, size_t size, int flags) {
    ssize_t n = net_allows(fd, size);
    return n < 0 ? n : send(fd, memory, (size_t)n, flags);
}

static ssize_t net_readv(int fd, const struct iovec *pieces, int count) {
    struct iovec piece = pieces[0];
    ssize_t n = net_allows(fd, piece.iov_len);
    if (n < 0) return n;
    if ((size_t)n == piece.iov_len) return readv(fd, pieces, count);
    piece.iov_len = (size_t)n;
    return readv(fd, &piece, 1);
}

static ssize_t net_sendmsg(int fd, const struct msghdr *message, int flags) {
    ssize_t n = net_allows(fd, message->msg_iov[0].iov_len);
    if (n < 0) return n;
    return send(fd, message->msg_iov[0].iov_base, (size_t)n, flags);
}

static int net_entropy(void *memory, size_t size) {
    if (net_fails_at <= 0 || --net_fails_at > 0) return getentropy(memory, size);
    errno = EIO;
    return -1;
}

#define getentropy(memory, size) net_entropy(memory, size)
#define read(fd, memory, size) net_read(fd, memory, size)
#define recv(fd, memory, size, flags) net_recv(fd, memory, size, flags)
#define send(fd, memory, size, flags) net_send(fd, memory, size, flags)
#define readv(fd, pieces, count) net_readv(fd, pieces, count)
#define sendmsg(fd, message, flags) net_sendmsg(fd, message, flags)
#include "test.h"

#if defined(TCPSERVER_TLS)

enum { CLIENTS = 4, MESSAGES = 6, LARGEST = 40000 };

typedef enum client_end { CLOSES, ABORTS, CUTS, WAITS, ENDS } client_end;

typedef struct client {
    const struct scene *scene;
    int number, upgrades;
    client_end end;
    size_t sizes[MESSAGES];
    int64_t id;
} client;

typedef struct scene {
    tcpsrv_tls *server_tls, *client_tls;
    int port, plain_port, strict;   /* strict: nothing fails, so that nothing may */
    int served, server_ends;
    client clients[CLIENTS];
} scene;

static scene here;
static unsigned playing;
static char pattern[LARGEST + 256];

/* What one message of a client holds. */
static const char *bytes_of(int number, int message) {
    return pattern + (number * 31 + message * 7) % 251;
}

static void fine(int err, const char *what) {
    if (!err || !here.strict) return;
    printf("    SEED=%u %s: %s\n", playing, what, tcpsrv_strerror(err));
    CHECK_INT(err, 0);
}

/* ---- the server: sends each message back ----------------------------------------------------- */

static int64_t frame_end(const char *data, size_t size, void *arg) {
    const unsigned char *head = (const unsigned char *)data;
    (void)arg;
    return size < 3 ? 0 : 3 + ((int64_t)head[0] << 16 | (int64_t)head[1] << 8 | head[2]);
}

static int serve_waiting(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    int err = 0;
    (void)peer;
    here.served++;
    if (user) {
        err = tcpsrv_read_until(stream, "\n", 100, &got);
        if (!err) err = tcpsrv_write(stream, "go\n", 3);
        if (!err) err = tcpsrv_start_tls(stream, here.server_tls, NULL);
    }
    while (!err) {
        err = tcpsrv_await(stream, tcpsrv_frame(frame_end, NULL, 0), &got);
        if (!err) err = tcpsrv_write(stream, got.data, got.size);
    }
    here.server_ends++;
    if (getenv("SEED")) printf("server: %s\n", tcpsrv_strerror(err));
    return err == TCPSRV_ETLS_TRUNCATED || !here.strict ? TCPSRV_EOF : err;
}

static void on_frame(tcpsrv_stream *stream, int err, tcpsrv_bytes got, void *arg) {
    if (!err) err = tcpsrv_write(stream, got.data, got.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_frame(frame_end, NULL, 0), on_frame, arg);
    if (!err) return;
    if (getenv("SEED")) printf("server: %s\n", tcpsrv_strerror(err));
    here.server_ends++;
    tcpsrv_close(stream);
}

static int serve_called(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int err = tcpsrv_read(stream, tcpsrv_frame(frame_end, NULL, 0), on_frame, NULL);
    (void)peer, (void)user;
    here.served++;
    if (err) here.server_ends++;
    return err;
}

/* ---- the clients ----------------------------------------------------------------------------- */

static int send_message(tcpsrv_stream *stream, const client *own, int message) {
    unsigned char head[3];
    size_t size = own->sizes[message];
    tcpsrv_bytes pieces[2];
    head[0] = (unsigned char)(size >> 16);
    head[1] = (unsigned char)(size >> 8);
    head[2] = (unsigned char)size;
    pieces[0].data = (const char *)head;
    pieces[0].size = 3;
    pieces[1].data = bytes_of(own->number, message);
    pieces[1].size = size;
    return tcpsrv_writev(stream, pieces, 2);
}

static int check_message(tcpsrv_stream *stream, const client *own, int message) {
    tcpsrv_bytes got;
    int err = tcpsrv_await(stream, tcpsrv_frame(frame_end, NULL, 0), &got);
    if (err) return err;
    CHECK_INT(got.size, own->sizes[message] + 3);
    CHECK(memcmp(got.data + 3, bytes_of(own->number, message), got.size - 3) == 0);
    return 0;
}

static int upgrade(tcpsrv_stream *stream) {
    tcpsrv_bytes got;
    int err = tcpsrv_write(stream, "please\n", 7);
    if (!err) err = tcpsrv_read_until(stream, "\n", 0, &got);
    if (!err) CHECK_MEM(got.data, got.size, "go\n");
    return err ? err : tcpsrv_start_tls(stream, here.client_tls, "localhost");
}

static void finish(tcpsrv_stream *stream, const client *own, int err) {
    tcpsrv_bytes got;
    if (err || own->end == ABORTS) {
        tcpsrv_abort(stream);
        return;
    }
    if (own->end == CUTS) shutdown(tcpsrv_fd(stream), SHUT_WR);
    if (own->end == CUTS) tcpsrv_read_some(stream, 0, &got);
    if (own->end == WAITS) {
        tcpsrv_set_timeout(stream, 20, 0);
        err = tcpsrv_read_some(stream, 0, &got);
        if (here.strict) CHECK_INT(err, TCPSRV_ETIMEDOUT);
    }
    tcpsrv_close(stream);
}

/* All messages are on their way before the first answer is read, or each waits for its answer. */
static int run_client(void *arg) {
    client *own = (client *)arg;
    int at_once = own->number % 2, i, err = 0;
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    memset(&options, 0, sizeof options);
    options.host = "127.0.0.1";
    options.port = own->upgrades ? here.plain_port : here.port;
    options.timeout_ms = 20000;
    options.tls = own->upgrades ? NULL : here.client_tls;
    options.tls_name = "localhost";
    stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
    if (!stream) {
        CHECK(!here.strict);
        return 0;
    }
    if (own->upgrades) err = upgrade(stream);
    for (i = 0; i < MESSAGES && !err; i++) {
        err = send_message(stream, own, i);
        if (!err && !at_once) err = check_message(stream, own, i);
    }
    for (i = 0; i < MESSAGES && !err && at_once; i++) err = check_message(stream, own, i);
    fine(err, "client");
    finish(stream, own, err);
    return 0;
}

/* ---- scenes ---------------------------------------------------------------------------------- */

static const char *file(const char *name) {
    static char paths[4][256];
    static unsigned n;
    char *path = paths[n++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", TEST_CERTIFICATES, name);
    return path;
}

static void set_up(void) {
    tcpsrv_certificate pair;
    tcpsrv_tls_options options;
    size_t i;
    if (access(file("done"), R_OK) != 0) SKIP("no certificates: openssl is missing");
    for (i = 0; i < sizeof pattern; i++) pattern[i] = (char)(i % 251 + i / 251);
    memset(&pair, 0, sizeof pair);
    memset(&options, 0, sizeof options);
    options.ca_file = file("ca.pem");
    here.client_tls = tcpsrv_tls_new(&options);
    pair.certificate_file = file("ec.pem");
    pair.key_file = file("ec.key");
    options.certificates = &pair;
    options.certificate_count = 1;
    here.server_tls = tcpsrv_tls_new(&options);
    CHECK(here.client_tls && here.server_tls);
}

static void take_down(void) {
    tcpsrv_tls_free(here.client_tls);
    tcpsrv_tls_free(here.server_tls);
}

static void no_log(int level, const char *line, void *user) {
    (void)level, (void)line, (void)user;
}

static tcpsrv *serve(tcpsrv_options *options, int *port) {
    tcpsrv *server = tcpsrv_new(options);
    CHECK(server);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    *port = tcpsrv_port(server, 0);
    return server;
}

/* One seed: a server with coroutines or callbacks, one that upgrades, and clients of all kinds. */
static void play(unsigned seed, int strict) {
    tcpsrv_options options, plain;
    tcpsrv *server, *plain_server;
    int i, k;
    net_state = seed * 7919u + 1;
    memset(&options, 0, sizeof options);
    options.log = no_log;
    options.write_high_water = 1 + net_random(70000);
    plain = options;
    options.tls = here.server_tls;
    if (net_random(2)) options.handle_stream = serve_waiting;
    else options.on_stream = serve_called;
    plain.handle_stream = serve_waiting;
    plain.user = &here;
    here.strict = strict;
    here.served = here.server_ends = 0;
    server = serve(&options, &here.port);
    plain_server = serve(&plain, &here.plain_port);
    net_shortens = 1;
    for (i = 0; i < CLIENTS; i++) {
        client *one = &here.clients[i];
        one->number = i;
        one->upgrades = net_random(3) == 0;
        one->end = (client_end)net_random(ENDS);
        for (k = 0; k < MESSAGES; k++)
            one->sizes[k] = net_random(net_random(2) ? 60 : LARGEST);
    }
    if (!strict && net_random(2)) net_fails_at = 1 + net_random(400);
    else if (!strict) test_fail_alloc_at = 1 + net_random(150);
    for (i = 0; i < CLIENTS; i++)
        here.clients[i].id = tcpsrv_spawn(tcpsrv_loop_default(), run_client, &here.clients[i], 0);
    for (i = 0; i < CLIENTS; i++)
        if (here.clients[i].id > 0) tcpsrv_join(here.clients[i].id);
    net_shortens = 0;
    net_fails_at = test_fail_alloc_at = 0;
    for (i = 0; i < 2000 && here.server_ends < here.served; i++) /* 10 s */
        tcpsrv_loop_poll(tcpsrv_loop_default(), 5);
    if (here.server_ends != here.served) printf("    SEED=%u\n", seed);
    CHECK_INT(here.server_ends, here.served);
    tcpsrv_free(server);
    tcpsrv_free(plain_server);
    CHECK_INT(tcpsrv_loop_free(tcpsrv_loop_default()), 0);
}

static void play_seeds(unsigned first, unsigned count, int strict) {
    const char *only = getenv("SEED");
    unsigned seed;
    set_up();
    if (only) {
        play((unsigned)atoi(only), strict);
    } else {
        for (seed = first; seed < first + count; seed++) {
            int64_t bytes = test_live_bytes;
            playing = seed;
            play(seed, strict);
            if (seed == first) continue; /* makes room for sessions, which stays */
            if (test_live_bytes != bytes) printf("    SEED=%u\n", seed);
            CHECK_INT(test_live_bytes, bytes);
        }
    }
    take_down();
}

static void every_byte_arrives_however_the_network_cuts_it(void) {
    play_seeds(0, 30, 1);
}

static void a_failing_call_or_allocation_ends_no_more_than_its_connection(void) {
    play_seeds(1000, 60, 0);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(every_byte_arrives_however_the_network_cuts_it),
        TEST(a_failing_call_or_allocation_ends_no_more_than_its_connection),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}

#else

static void tls_is_tested(void) {
    SKIP("no bearssl.h here");
}

int main(int argc, char **argv) {
    static const test_case tests[] = { TEST(tls_is_tested) };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}

#endif
