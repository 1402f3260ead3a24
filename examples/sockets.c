/* The steps that prefork.c leaves to the library, one by one: bind_sockets, fork_processes, and in
 * each worker a server of its own on the shared sockets. What must be done with privileges or
 * once for all belongs between the first two.
 *
 *     cc examples/sockets.c -o sockets
 *     ./sockets & printf 'hello\n' | nc -N 127.0.0.1 8888
 *
 * sockets [PORT [WORKERS]]: 8888, 0 for any free one; 0 workers for one on each core.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int tell_task(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0) {
        err = tcpsrv_printf(stream, "task %d: %.*s", tcpsrv_task_id(), (int)line.size, line.data);
        if (err) break;
    }
    return err;
}

static int fail(void) {
    fprintf(stderr, "%s\n", tcpsrv_last_error());
    return 1;
}

static int bound_port(int fd) {
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    return getsockname(fd, (struct sockaddr *)&address, &size) == 0 ? ntohs(address.sin_port) : 0;
}

int main(int argc, char **argv) {
    tcpsrv_bind_options ipv4 = { .family = AF_INET };
    tcpsrv_options options = { .handle_stream = tell_task };
    tcpsrv *server;
    int port = argc > 1 ? atoi(argv[1]) : 8888, workers = argc > 2 ? atoi(argv[2]) : 0;
    int fds[8], count = tcpsrv_bind_sockets(port, "127.0.0.1", &ipv4, fds, 8);
    if (count < 0) return fail();
    printf("listening on 127.0.0.1:%d\n", bound_port(fds[0]));
    fflush(stdout);
    if (tcpsrv_fork_processes(workers, -1) < 0) return fail();
    server = tcpsrv_new(&options);
    if (!server || tcpsrv_add_sockets(server, fds, count) != 0) return fail();
    fprintf(stderr, "task %d: pid %ld\n", tcpsrv_task_id(), (long)getpid());
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
