/* Requests in lockstep, for exact counts: in each round every connection sends its burst, and only
 * then the answers are read; the next begins when the server sleeps. Run on the server's core, with
 * a priority by which the server cannot run before this client waits, it gives the server the same
 * batches in every run. Ends the server.
 *
 * lockstep PORT PID keep CONNECTIONS SIZE DEPTH ROUNDS: bursts of DEPTH lines of SIZE bytes.
 * lockstep PORT PID peer SIZE ROUNDS, lockstep PORT PID server SIZE ROUNDS: connect, one line,
 * close; the client closes first, or waits for the server's end.
 * lockstep PORT PID talk CONNECTIONS DEPTH REQUEST REPLY ROUNDS: bursts of DEPTH of that request.
 */
#include "../tools/tool.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>

static pid_t server;

static int sleeps(const char *stat_path) {
    char text[512], *state;
    int fd = open(stat_path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    state = strrchr(text, ')');
    return state && state[1] == ' ' && state[2] == 'S';
}

/* All threads: who has something to do is not in state S, also when it waits for a core. */
static int server_sleeps(void) {
    char path[300];
    struct dirent *entry;
    int all = 1;
    DIR *tasks;
    snprintf(path, sizeof path, "/proc/%ld/task", (long)server);
    tasks = opendir(path);
    if (!tasks) tool_fail("the server's threads");
    while (all && (entry = readdir(tasks)) != NULL) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/proc/%ld/task/%s/stat", (long)server, entry->d_name);
        all = sleeps(path);
    }
    closedir(tasks);
    return all;
}

static void settle(void) {
    int tries = 100000;
    do
        usleep(200);
    while (!server_sleeps() && --tries);
    errno = ETIMEDOUT;
    if (!tries) tool_fail("the server's sleep");
}

static char *make_burst(size_t size, size_t depth) {
    char *burst = malloc(size * depth);
    size_t i;
    if (!burst) tool_fail("malloc");
    for (i = 0; i < size * depth; i++) burst[i] = (char)('a' + i * 7 % 26);
    for (i = size; i <= size * depth; i += size) burst[i - 1] = '\n';
    return burst;
}

typedef struct text {
    char *data;
    size_t size;
} text;

static void in_rounds(int port, long connections, long rounds, const text *burst) {
    int *fds = malloc((size_t)connections * sizeof *fds);
    long i;
    if (!fds) tool_fail("malloc");
    for (i = 0; i < connections; i++) {
        if (i % (1 + connections / 100) == 0) settle();
        fds[i] = tool_connect(port);
    }
    while (rounds--) {
        settle();
        for (i = 0; i < connections; i++) tool_send(fds[i], burst[0].data, burst[0].size);
        for (i = 0; i < connections; i++) tool_expect(fds[i], burst[1].data, burst[1].size);
    }
    settle();
    kill(server, SIGTERM); /* before the connections end, whose number would be left to chance */
    free(fds);
}

static int keep(int port, char **arg) {
    size_t size = strtoul(arg[1], NULL, 10), depth = strtoul(arg[2], NULL, 10);
    text burst[2]; /* there and back */
    burst[0].data = make_burst(size, depth);
    burst[0].size = size * depth;
    burst[1] = burst[0];
    in_rounds(port, atol(arg[0]), atol(arg[3]), burst);
    free(burst[0].data);
    return 0;
}

static text repeated(const char *once, size_t depth) {
    text all;
    size_t size = strlen(once), i;
    all.size = size * depth;
    all.data = malloc(all.size);
    if (!all.data) tool_fail("malloc");
    for (i = 0; i < depth; i++) memcpy(all.data + i * size, once, size);
    return all;
}

static int talk(int port, char **arg) {
    size_t depth = strtoul(arg[1], NULL, 10);
    text burst[2];
    burst[0] = repeated(arg[2], depth);
    burst[1] = repeated(arg[3], depth);
    in_rounds(port, atol(arg[0]), atol(arg[4]), burst);
    free(burst[0].data);
    free(burst[1].data);
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
    if (argc < 4) return 2;
    server = (pid_t)atol(argv[2]);
    if (argc == 8 && strcmp(argv[3], "keep") == 0) return keep(port, argv + 4);
    if (argc == 6 && strcmp(argv[3], "peer") == 0) return churn(port, 0, argv + 4);
    if (argc == 6 && strcmp(argv[3], "server") == 0) return churn(port, 1, argv + 4);
    if (argc == 9 && strcmp(argv[3], "talk") == 0) return talk(port, argv + 4);
    return 2;
}
