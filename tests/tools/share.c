/* Whom connections go to that are opened one after another and stay: to a server that answers
 * "task N: ..." to a line.
 *
 * share PORT CONNECTIONS PAUSE_MS: each is opened, asked and answered before the next, after a
 * pause. Says how many each task has; all are held until the standard input ends.
 */
#include "tool.h"
#include <time.h>

enum { TASKS = 64 };

static int ask_task(int fd) {
    char answer[64];
    size_t size = 0;
    tool_send(fd, "hello\n", 6);
    do {
        ssize_t n = recv(fd, answer + size, sizeof answer - 1 - size, 0);
        if (n < 0) tool_fail("recv");
        errno = 0;
        if (n == 0) tool_fail("the peer's end");
        size += (size_t)n;
    } while (answer[size - 1] != '\n' && size < sizeof answer - 1);
    answer[size] = 0;
    errno = 0;
    if (strncmp(answer, "task ", 5) != 0) tool_fail("the answer");
    return atoi(answer + 5);
}

static void pause_ms(long ms) {
    struct timespec left;
    left.tv_sec = ms / 1000;
    left.tv_nsec = ms % 1000 * 1000000;
    while (ms && nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

int main(int argc, char **argv) {
    long counts[TASKS] = { 0 }, connections = argc > 2 ? atol(argv[2]) : 0, i;
    struct rlimit limit;
    char byte;
    if (argc != 4 || getrlimit(RLIMIT_NOFILE, &limit) != 0) return 2;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    for (i = 0; i < connections; i++) {
        int task = ask_task(tool_connect(atoi(argv[1])));
        if (task < 0 || task >= TASKS) return 1;
        counts[task]++;
        pause_ms(atol(argv[3]));
    }
    for (i = 0; i < TASKS; i++)
        if (counts[i]) printf("task %ld: %ld\n", i, counts[i]);
    fflush(stdout);
    while (read(0, &byte, 1) > 0) continue;
    return 0;
}
