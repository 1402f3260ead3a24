/* A line echo server whose handler reads like blocking code; each connection runs it as a
 * coroutine of its own.
 *
 *     cc examples/echo.c -o echo
 *     ./echo & printf 'hello\n' | nc -N 127.0.0.1 8888
 *
 * echo [PORT]: 8888, 0 for any free one. It listens on this machine's own address only; NULL in
 * its place would be all interfaces.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .handle_stream = echo };
    tcpsrv *server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
