/* Requests in lockstep, for exact counts: in each round every connection sends its burst, and only
 * then the answers are read; the next begins when the server sleeps. Run on the server's core, with
 * a priority by which the server cannot run before this client waits, it gives the server the same
 * batches in every run. Ends the server.
 *
 * lockstep PORT PID keep CONNECTIONS SIZE DEPTH ROUNDS: bursts of DEPTH lines of SIZE bytes.
 * lockstep PORT PID peer SIZE ROUNDS, lockstep PORT PID server SIZE ROUNDS: connect, one line,
 * close; the client closes first, or waits for the server's end.
 */
#include "../tools/tool.h"
#include <fcntl.h>
#include <signal.h>

static pid_t server;
static int server_state = -1; /* its /proc/PID/stat */

/* Until the server waits for events: a process that has something to do is not in state S. */
static void settle(void) {
    char text[512], *state;
    int i;
    for (i = 0; i < 100000; i++) {
        ssize_t n;
        usleep(200);
        n = pread(server_state, text, sizeof text - 1, 0);
        if (n <= 0) tool_fail("the server's state");
        text[n] = 0;
        state = strrchr(text, ')');
        if (state && state[1] == ' ' && state[2] == 'S') return;
    }
    errno = ETIMEDOUT;
    tool_fail("the server's sleep");
}

static char *make_burst(size_t size, size_t depth) {
    char *burst = malloc(size * depth);
    size_t i;
    if (!burst) tool_fail("malloc");
    for (i = 0; i < size * depth; i++) burst[i] = (char)('a' + i * 7 % 26);
    for (i = size; i <= size * depth; i += size) burst[i - 1] = '\n';
    return burst;
}

static int keep(int port, char **arg) {
    long connections = atol(arg[0]), rounds = atol(arg[3]), i;
    size_t size = strtoul(arg[1], NULL, 10), depth = strtoul(arg[2], NULL, 10);
    char *burst = make_burst(size, depth);
    int *fds = malloc((size_t)connections * sizeof *fds);
    if (!fds) tool_fail("malloc");
    for (i = 0; i < connections; i++) {
        settle();
        fds[i] = tool_connect(port);
    }
    while (rounds--) {
        settle();
        for (i = 0; i < connections; i++) tool_send(fds[i], burst, size * depth);
        for (i = 0; i < connections; i++) tool_expect(fds[i], burst, size * depth);
    }
    settle();
    kill(server, SIGTERM); /* before the connections end, whose number would be left to chance */
    free(fds);
    free(burst);
    return 0;
}

static void expect_end(int fd) {
    char byte;
    if (recv(fd, &byte, 1, 0) != 0) tool_fail("the server's end");
}

static int churn(int port, int server_first, char **arg) {
    size_t size = strtoul(arg[0], NULL, 10);
    long rounds = atol(arg[1]);
    char *burst = make_burst(size, 1);
    settle();
    while (rounds--) {
        int fd = tool_connect(port);
        tool_send(fd, burst, size);
        tool_expect(fd, burst, size);
        if (server_first) expect_end(fd);
        settle();
        close(fd);
        settle();
    }
    kill(server, SIGTERM);
    free(burst);
    return 0;
}

int main(int argc, char **argv) {
    int port = argc > 1 ? atoi(argv[1]) : 0;
    char path[64];
    if (argc < 4) return 2;
    server = (pid_t)atol(argv[2]);
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)server);
    server_state = open(path, O_RDONLY);
    if (argc == 8 && strcmp(argv[3], "keep") == 0) return keep(port, argv + 4);
    if (argc == 6 && strcmp(argv[3], "peer") == 0) return churn(port, 0, argv + 4);
    if (argc == 6 && strcmp(argv[3], "server") == 0) return churn(port, 1, argv + 4);
    return 2;
}
