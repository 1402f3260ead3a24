/* The echo server on all cores: bind, then start(n). The parent only supervises: a worker that
 * crashes is restarted under its old number, SIGHUP to the parent replaces them one by one, SIGUSR1
 * makes it tell their counters, and SIGTERM ends them all in order.
 *
 *     cc examples/prefork.c -o prefork
 *     ./prefork & printf 'hello\n' | nc -N 127.0.0.1 8888
 *
 * prefork [PORT [WORKERS]]: 8888, 0 for any free one; 0 workers for one on each core.
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
    tcpsrv_options options = { .handle_stream = echo, .reload_on_hup = 1 };
    tcpsrv *server = tcpsrv_new(&options);
    int port = argc > 1 ? atoi(argv[1]) : 8888, workers = argc > 2 ? atoi(argv[2]) : 0;
    if (!server || tcpsrv_bind(server, port, "127.0.0.1", NULL) != 0) return fail();
    /* Bound is as good as listening: who connects now waits for the workers in the backlog. */
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    if (tcpsrv_start(server, workers) != 0) return fail();
    fprintf(stderr, "task %d: pid %ld\n", tcpsrv_task_id(), (long)getpid());
    /* Lines half sent get five seconds to be finished and answered; then the loop stops. */
    if (tcpsrv_drain_on_signal(server, SIGTERM, 5000) != 0) return fail();
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
