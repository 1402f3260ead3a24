/* Many connections at once to a line echo server, each byte of each answer compared.
 *
 * crowd PORT CONNECTIONS ROUNDS DEPTH [PID]: in each round DEPTH lines go out in one piece on every
 * connection, then all answers are read. With the server's PID it says what a connection that is
 * idle afterwards costs there. All are held until the standard input ends, and then reset.
 */
#include "tool.h"
#include <time.h>

enum { MAX_BURST = 4096, SPARE_DESCRIPTORS = 64 };

/* Lines that no other connection, round or place has. */
static size_t make_burst(char *burst, long connection, long round, long depth) {
    size_t size = 0;
    long i;
    for (i = 0; i < depth; i++)
        size += (size_t)snprintf(burst + size, MAX_BURST - size, "%05ld %05ld %02ld\n", connection,
                                 round, i);
    return size;
}

static void sleep_ms(long ms) {
    struct timespec left;
    left.tv_sec = ms / 1000;
    left.tv_nsec = ms % 1000 * 1000000;
    while (nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

static long allowed(long connections) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) tool_fail("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if ((rlim_t)(connections + SPARE_DESCRIPTORS) <= limit.rlim_cur) return connections;
    return (long)limit.rlim_cur - SPARE_DESCRIPTORS;
}

static void run_round(const int *fds, long connections, long round, long depth) {
    char burst[MAX_BURST];
    long i;
    for (i = 0; i < connections; i++)
        tool_send(fds[i], burst, make_burst(burst, i, round, depth));
    for (i = 0; i < connections; i++)
        tool_expect(fds[i], burst, make_burst(burst, i, round, depth));
}

static void hold_and_reset(const int *fds, long connections) {
    struct linger reset = { 1, 0 };
    char byte;
    long i;
    while (read(0, &byte, 1) > 0) continue;
    for (i = 0; i < connections; i++) {
        setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        close(fds[i]);
    }
}

int main(int argc, char **argv) {
    long connections, rounds, depth, pid, before = 0, i;
    int port = argc >= 5 ? atoi(argv[1]) : 0, *fds;
    if (argc < 5) return 2;
    connections = allowed(atol(argv[2]));
    rounds = atol(argv[3]);
    depth = atol(argv[4]);
    pid = argc > 5 ? atol(argv[5]) : 0;
    fds = malloc((size_t)connections * sizeof *fds);
    if (!fds || depth * 16 >= MAX_BURST) return 2;
    if (pid) before = tool_rss(pid);
    for (i = 0; i < connections; i++) fds[i] = tool_connect(port);
    for (i = 0; i < rounds; i++) {
        run_round(fds, connections, i, depth);
        if (pid) sleep_ms(20);
    }
    printf("connections %ld\n", connections);
    if (pid) printf("bytes-each %ld\n", (tool_rss(pid) - before) / connections);
    fflush(stdout);
    hold_and_reset(fds, connections);
    free(fds);
    return 0;
}
