/* Clients that come and go: each connects, has a line echoed, closes, and begins again.
 *
 * visits PORT CLIENTS: until the standard input ends. Every other client thinks for 20 ms before it
 * speaks. Says how many visits there were. One that is refused, reset or answered with other bytes
 * ends the program with 1 and its reason.
 */
#include "tool.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

typedef struct common {
    int stop;
    long visits[64];
} common;

static void visit(int port, long client, long number) {
    char line[64];
    size_t size = (size_t)snprintf(line, sizeof line, "%ld %ld\n", client, number);
    int fd = tool_connect(port);
    if (client % 2) usleep(20000);
    tool_send(fd, line, size);
    tool_expect(fd, line, size);
    close(fd);
}

int main(int argc, char **argv) {
    long clients = argc > 2 ? atol(argv[2]) : 0, i, sum = 0;
    common *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                          -1, 0);
    int status, failed = 0;
    char byte;
    if (argc != 3 || clients < 1 || clients > 64 || shared == MAP_FAILED) return 2;
    for (i = 0; i < clients; i++) {
        if (fork() != 0) continue;
        for (; !__atomic_load_n(&shared->stop, __ATOMIC_RELAXED); shared->visits[i]++)
            visit(atoi(argv[1]), i, shared->visits[i]);
        _exit(0);
    }
    while (read(0, &byte, 1) > 0) continue;
    __atomic_store_n(&shared->stop, 1, __ATOMIC_RELAXED);
    while (wait(&status) > 0) failed += status != 0;
    for (i = 0; i < clients; i++) sum += shared->visits[i];
    printf("visits %ld\n", sum);
    return failed != 0;
}
