/* An echo server that changes its program while it runs and refuses nobody meanwhile: SIGUSR2
 * starts the file that it was started from again, by now perhaps a new version. That takes over the
 * listening socket and says when it serves; then this process answers what it has and ends.
 *
 *     cc examples/upgrade.c -o upgrade
 *     ./upgrade & printf 'hello\n' | nc -N 127.0.0.1 8888; kill -USR2 $!
 *
 * upgrade [PORT [WORKERS]]: 8888, 0 for any free one; 1 worker for one process that has no parent,
 * else SIGUSR2 is for the parent.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

static int fail(void) {
    fprintf(stderr, "%s\n", tcpsrv_last_error());
    return 1;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .handle_stream = echo, .upgrade_on_usr2 = argv };
    tcpsrv *server = tcpsrv_new(&options);
    int port = argc > 1 ? atoi(argv[1]) : 8888, workers = argc > 2 ? atoi(argv[2]) : 1;
    int fds[8], count = tcpsrv_systemd_sockets(fds, 8); /* of the predecessor, if there is one */
    if (count == 0) count = tcpsrv_bind_sockets(port, "127.0.0.1", NULL, fds, 8);
    if (!server || count < 0) return fail();
    if (workers != 1 && tcpsrv_fork_processes(workers, -1) < 0) return fail();
    if (tcpsrv_add_sockets(server, fds, count) != 0) return fail();
    if (tcpsrv_drain_on_signal(server, SIGTERM, 5000) != 0) return fail();
    if (tcpsrv_task_id() <= 0) {
        printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
        fflush(stdout);
        if (tcpsrv_notify("READY=1") != 0) return fail();
    }
    fprintf(stderr, "task %d: pid %ld\n", tcpsrv_task_id(), (long)getpid());
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
