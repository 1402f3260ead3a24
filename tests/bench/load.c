/* Load for a TCP server, and what it did with it; every byte that comes back is compared.
 *
 * load port=PORT work=WORK [connections=50] [size=64] [depth=1] [idle=0] [warm=100] [ms=400]
 *      [pids=PID,PID...]
 *
 *   keep      on each connection a burst of depth lines of size bytes goes out with one call, and
 *             the next one when all of it has come back
 *   peer      connect, one line, and the client closes
 *   server    connect, one line, and the client waits for the server's end; both with as few calls
 *             as there can be, since a connect does much of the server's work on the load's
 *             core: the oldest one's answer is waited for, and meanwhile the server has others
 *   download  a short line, and the size bytes of a file come back
 *   file      connects to nobody and writes that file to the standard output
 *
 * idle further connections are opened before and left alone. After warm milliseconds it measures
 * for ms. The answer is a line of JSON: requests a second (the median of windows of 10 ms, so that
 * a moment in which another process took the core away does not count), the servers' CPU a request
 * over the whole time, latencies, and the use of a core by server and client. For downloads a
 * megabyte stands in the place of a request.
 */
#define _GNU_SOURCE 1
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum work { KEEP, PEER, SERVER, DOWNLOAD, MAKE_FILE };
enum {
    EVENTS = 512,
    RECEIVE_SIZE = 1 << 18,
    STALL_MS = 10000,
    WINDOW_NS = 10000000,
    MAX_WINDOWS = 10000,
    MAX_PIDS = 64,
    SOURCES = 200, /* addresses that the connections come from, so that ports do not run out */
    STEPS = 32,    /* of the latency histogram for each power of two */
    STEP_BITS = 5,
    BUCKETS = 48 * STEPS,
    FILE_PERIOD = 65521 /* after so many bytes the file begins anew */
};

typedef struct connection {
    int fd, waits_to_send;
    uint64_t number, sequence, started_ns;
    size_t sent, received;
    char *burst;
} connection;

static enum work work;
static int port, poller;
static long connections = 50, depth = 1, idle, warm_ms = 100, run_ms = 400;
static size_t line_size = 64, burst_size, answer_size;

static struct {
    uint64_t from_ns, requests, window_from_ns, window_requests;
    double server_cpu, client_cpu;
    double rates[MAX_WINDOWS];
    uint64_t latencies[BUCKETS];
    int windows, running;
} measured;
static uint64_t requests; /* answered since the start; bytes of a download */
static long pids[MAX_PIDS];
static int pid_count;

static void fail(const char *step) {
    fprintf(stderr, "load: %s: %s\n", step, errno ? strerror(errno) : "not what was expected");
    exit(1);
}

/* ---- clocks ---------------------------------------------------------------------------------- */

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double cpu_of(clockid_t clock) {
    struct timespec used = { 0, 0 };
    clock_gettime(clock, &used);
    return (double)used.tv_sec + (double)used.tv_nsec * 1e-9;
}

/* Of all threads, exact. */
static double server_cpu(void) {
    double sum = 0;
    clockid_t clock;
    int i;
    for (i = 0; i < pid_count; i++)
        if (clock_getcpuclockid((pid_t)pids[i], &clock) == 0) sum += cpu_of(clock);
    return sum;
}

/* ---- measuring ------------------------------------------------------------------------------- */

static void add_latency(uint64_t ns, uint64_t count) {
    int exponent = 63 - __builtin_clzll(ns | STEPS);
    int bucket = (exponent - STEP_BITS + 1) * STEPS +
                 (int)(ns >> (exponent - STEP_BITS) & (STEPS - 1));
    if (ns < STEPS) bucket = (int)ns;
    if (measured.running) measured.latencies[bucket < BUCKETS ? bucket : BUCKETS - 1] += count;
}

/* The lower bound, in microseconds, of the bucket in which that share of the answers is reached. */
static double latency_at(double share) {
    uint64_t total = 0, sum = 0;
    int i, exponent;
    for (i = 0; i < BUCKETS; i++) total += measured.latencies[i];
    if (!total) return 0; /* a download may take longer than the run */
    for (i = 0; i < BUCKETS - 1; i++) {
        sum += measured.latencies[i];
        if ((double)sum > (double)total * share) break;
    }
    if (i < STEPS) return i / 1e3;
    exponent = i / STEPS + STEP_BITS - 1;
    return (double)((uint64_t)(STEPS + i % STEPS) << (exponent - STEP_BITS)) / 1e3;
}

static void start_measuring(uint64_t now) {
    measured.running = 1;
    measured.from_ns = measured.window_from_ns = now;
    measured.requests = measured.window_requests = requests;
    measured.server_cpu = server_cpu();
    measured.client_cpu = cpu_of(CLOCK_PROCESS_CPUTIME_ID);
}

static void end_window(uint64_t now) {
    double seconds = (double)(now - measured.window_from_ns) / 1e9;
    double count = (double)(requests - measured.window_requests);
    if (measured.windows < MAX_WINDOWS) measured.rates[measured.windows++] = count / seconds;
    measured.window_from_ns = now;
    measured.window_requests = requests;
}

static int by_value(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void report(uint64_t now) {
    double seconds = (double)(now - measured.from_ns) / 1e9, unit = work == DOWNLOAD ? 1e6 : 1;
    double count = (double)(requests - measured.requests) / unit;
    double server = server_cpu() - measured.server_cpu;
    double client = cpu_of(CLOCK_PROCESS_CPUTIME_ID) - measured.client_cpu;
    if (!measured.windows || count == 0) fail("measuring");
    qsort(measured.rates, (size_t)measured.windows, sizeof(double), by_value);
    printf("{\"rate\": %.2f, \"mean_rate\": %.2f, \"cpu_us\": %.5f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"p999_us\": %.2f, \"server_use\": %.3f, \"client_use\": %.3f}\n",
           measured.rates[measured.windows / 2] / unit, count / seconds, server * 1e6 / count,
           latency_at(0.5), latency_at(0.99), latency_at(0.999), server / seconds,
           client / seconds);
}

/* ---- bytes ----------------------------------------------------------------------------------- */

/* The head of each line is new in each burst, so that an old answer is not taken for a new one. */
static void number_lines(connection *c) {
    size_t head = line_size - 1 < 8 ? line_size - 1 : 8, i;
    long line;
    for (line = 0; line < depth; line++) {
        uint64_t value = c->sequence++ * 1021 + c->number;
        for (i = 0; i < head; i++, value >>= 4)
            c->burst[(size_t)line * line_size + i] = (char)('a' + (value & 15));
    }
}

static void make_burst(connection *c) {
    size_t i;
    c->burst = malloc(burst_size);
    if (!c->burst) fail("malloc");
    for (i = 0; i < burst_size; i++)
        c->burst[i] = (char)('A' + (i * 7 + i / 61 + c->number) % 57);
    for (i = line_size; i <= burst_size; i += line_size) c->burst[i - 1] = '\n';
}

/* The file from a place on, RECEIVE_SIZE bytes at least: known without reading it. */
static const char *file_bytes(size_t offset) {
    static char bytes[FILE_PERIOD + RECEIVE_SIZE];
    size_t i, place;
    for (i = 0; bytes[sizeof bytes - 1] == 0 && i < sizeof bytes; i++) {
        place = i % FILE_PERIOD;
        bytes[i] = (char)('!' + (place * 31 + place / 89) % 89);
    }
    return bytes + offset % FILE_PERIOD;
}

static void make_file(void) {
    size_t i, n;
    for (i = 0; i < answer_size; i += n) {
        n = answer_size - i < RECEIVE_SIZE ? answer_size - i : RECEIVE_SIZE;
        if (fwrite(file_bytes(i), 1, n, stdout) != n) fail("writing the file");
    }
}

static void compare(const connection *c, const char *data, size_t size) {
    const char *expected = work == DOWNLOAD ? file_bytes(c->received) : c->burst + c->received;
    errno = 0;
    if (c->received + size > answer_size) fail("number of bytes");
    if (memcmp(data, expected, size) != 0) fail("bytes");
}

/* ---- connections ----------------------------------------------------------------------------- */

static int dial(long number) {
    struct sockaddr_in source, target;
    int fd, on = 1, tries = 0;
    memset(&source, 0, sizeof source);
    source.sin_family = AF_INET;
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + (uint32_t)(number % SOURCES));
    target = source;
    target.sin_port = htons((unsigned short)port);
    target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (;;) {
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) fail("socket");
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (work == KEEP || work == DOWNLOAD) /* a first line leaves at once in any case */
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&source, sizeof source) != 0) fail("bind");
        if (connect(fd, (struct sockaddr *)&target, sizeof target) == 0) return fd;
        if (errno != ECONNREFUSED || tries++ == 1000) fail("connect");
        close(fd); /* it does not listen yet */
        usleep(5000);
    }
}

static void reset(int fd) {
    struct linger now = { 1, 0 };
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

static void watch(connection *c, int operation, int waits_to_send) {
    struct epoll_event event;
    event.events = waits_to_send ? EPOLLIN | EPOLLOUT : EPOLLIN;
    event.data.ptr = c;
    c->waits_to_send = waits_to_send;
    if (epoll_ctl(poller, operation, c->fd, &event) != 0) fail("epoll_ctl");
}

static void send_rest(connection *c) {
    ssize_t n = send(c->fd, c->burst + c->sent, burst_size - c->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) fail("send");
    if (n > 0) c->sent += (size_t)n;
    if (c->waits_to_send != (c->sent < burst_size))
        watch(c, EPOLL_CTL_MOD, c->sent < burst_size);
}

static void send_burst(connection *c) {
    number_lines(c);
    c->sent = c->received = 0;
    send_rest(c);
}

static int is_short(void) {
    return work == PEER || work == SERVER;
}

static void open_connection(connection *c) {
    static long turn;
    c->fd = dial(turn++);
    if (!is_short()) watch(c, EPOLL_CTL_ADD, 0);
}

/* ---- the run --------------------------------------------------------------------------------- */

static void next_request(connection *c, uint64_t now) {
    c->started_ns = now;
    if (is_short()) {
        close(c->fd);
        open_connection(c);
    }
    send_burst(c);
}

static void on_alarm(int signo) {
    static const char text[] = "load: the server's answers: none for ten seconds\n";
    (void)signo;
    if (write(2, text, sizeof text - 1) < 0) _exit(2);
    _exit(1);
}

/* A short connection's answer, and for work SERVER its end, with one call. */
static void finish(connection *c, char *buffer, uint64_t *now) {
    size_t most = work == SERVER ? answer_size + 1 : answer_size;
    ssize_t n = recv(c->fd, buffer, most, MSG_WAITALL);
    if (n < 0) fail("recv");
    compare(c, buffer, (size_t)n);
    if ((size_t)n != answer_size) fail("number of bytes");
    *now = now_ns();
    add_latency(*now - c->started_ns, 1);
    requests++;
    next_request(c, *now);
}

static void on_event(connection *c, uint32_t events, char *buffer, uint64_t now) {
    uint64_t answers;
    ssize_t n;
    if (events & EPOLLOUT && c->waits_to_send) send_rest(c);
    if (!(events & ~(uint32_t)EPOLLOUT)) return;
    n = recv(c->fd, buffer, RECEIVE_SIZE, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) fail("recv");
    errno = 0;
    if (n == 0) fail("the server's end");
    compare(c, buffer, (size_t)n);
    answers = c->received;
    c->received += (size_t)n;
    answers = work == KEEP ? c->received / line_size - answers / line_size
                           : c->received == answer_size;
    if (answers) add_latency(now - c->started_ns, answers);
    requests += work == DOWNLOAD ? (uint64_t)n : answers;
    if (answers && c->received == answer_size) next_request(c, now);
}

static uint64_t serve_events(char *buffer) {
    struct epoll_event events[EVENTS];
    int i, n = epoll_wait(poller, events, EVENTS, STALL_MS);
    uint64_t now = now_ns();
    errno = n ? errno : ETIMEDOUT;
    if (n <= 0) fail("the server's answers");
    for (i = 0; i < n; i++) {
        on_event(events[i].data.ptr, events[i].events, buffer, now);
        if (i % 8 == 7) now = now_ns();
    }
    return now_ns();
}

static void run(connection *all) {
    static char buffer[RECEIVE_SIZE];
    uint64_t now = now_ns(), measure_at = now + (uint64_t)warm_ms * 1000000u;
    uint64_t end_at = measure_at + (uint64_t)run_ms * 1000000u;
    long oldest = 0;
    signal(SIGALRM, on_alarm);
    alarm(STALL_MS / 1000);
    while (now < end_at) {
        if (is_short()) finish(&all[oldest++ % connections], buffer, &now);
        else now = serve_events(buffer);
        if (!measured.running && now >= measure_at) start_measuring(now);
        if (!measured.running || now - measured.window_from_ns < WINDOW_NS) continue;
        end_window(now);
        alarm(STALL_MS / 1000);
    }
    report(now);
}

static void parse(const char *word) {
    static const char *const works[] = { "keep", "peer", "server", "download", "file" };
    const char *value = strchr(word, '=');
    size_t i, name;
    if (!value) exit(2);
    name = (size_t)(value++ - word);
#define IS(text) (strlen(text) == name && strncmp(word, text, name) == 0)
    if (IS("port")) port = atoi(value);
    else if (IS("connections")) connections = atol(value);
    else if (IS("size")) line_size = strtoul(value, NULL, 10);
    else if (IS("depth")) depth = atol(value);
    else if (IS("idle")) idle = atol(value);
    else if (IS("warm")) warm_ms = atol(value);
    else if (IS("ms")) run_ms = atol(value);
    else if (IS("work")) {
        for (i = 0; i < sizeof works / sizeof *works; i++)
            if (strcmp(value, works[i]) == 0) work = (enum work)i;
    } else if (IS("pids")) {
        for (; value && pid_count < MAX_PIDS; value = strchr(value, ',')) {
            if (*value == ',') value++;
            pids[pid_count++] = atol(value);
        }
    } else exit(2);
#undef IS
}

static void allow_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) fail("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv) {
    connection *all;
    int *idle_fds;
    long i;
    for (i = 1; i < argc; i++) parse(argv[i]);
    answer_size = burst_size = line_size * (size_t)depth;
    if (work == MAKE_FILE) make_file();
    if (!port || connections < 1 || line_size < 2) return work != MAKE_FILE;
    if (work == DOWNLOAD) line_size = burst_size = 8;
    allow_descriptors();
    poller = epoll_create1(EPOLL_CLOEXEC);
    all = calloc((size_t)connections, sizeof *all);
    idle_fds = malloc((size_t)(idle + 1) * sizeof *idle_fds);
    if (poller < 0 || !all || !idle_fds) fail("setting up");
    for (i = 0; i < idle; i++) idle_fds[i] = dial(i);
    for (i = 0; i < connections; i++) {
        all[i].number = (uint64_t)i;
        make_burst(&all[i]);
        open_connection(&all[i]);
    }
    for (i = 0; i < connections; i++) {
        all[i].started_ns = now_ns();
        send_burst(&all[i]);
    }
    run(all);
    for (i = 0; i < connections; i++) reset(all[i].fd);
    for (i = 0; i < idle; i++) reset(idle_fds[i]);
    return 0;
}
