/* A service as operators want it: sockets that a service manager passed, the peer's real address
 * from behind a proxy, and SIGTERM, at which requests that have begun are finished. Each line comes
 * back with its sender's address.
 *
 *     cc examples/service.c -o service
 *     ./service & printf 'hello\n' | nc -N 127.0.0.1 8888
 *     systemd-socket-activate -l 8888 ./service
 *
 * service [PORT [TRUSTED]]: 8888, where no sockets were passed; networks of the proxies in front,
 * such as 10.0.0.0/8, which must then send PROXY headers.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

static int answer(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    char from[TCPSRV_ADDRESS_TEXT];
    tcpsrv_bytes line;
    int err;
    (void)user;
    tcpsrv_address_text(peer, from, sizeof from);
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_printf(stream, "%s: %.*s", from, (int)line.size, line.data)) != 0) break;
    return err;
}

static int fail(void) {
    fprintf(stderr, "%s\n", tcpsrv_last_error());
    return 1;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .handle_stream = answer };
    int port = argc > 1 ? atoi(argv[1]) : 8888, fds[8], passed = tcpsrv_systemd_sockets(fds, 8), i;
    tcpsrv *server;
    if (argc > 2) options.proxy_protocol = TCPSRV_PROXY_REQUIRED;
    if (argc > 2) options.trusted = argv[2];
    server = tcpsrv_new(&options);
    if (!server || passed < 0) return fail();
    if (passed > 0 && tcpsrv_add_sockets(server, fds, passed) != 0) return fail();
    if (passed == 0 && tcpsrv_listen(server, port, "127.0.0.1") != 0) return fail();
    if (tcpsrv_drain_on_signal(server, SIGTERM, 5000) != 0) return fail();
    for (i = 0; (port = tcpsrv_port(server, i)) >= 0; i++)
        if (port > 0) printf("listening on 127.0.0.1:%d\n", port);
    fflush(stdout);
    if (tcpsrv_notify("READY=1") != 0) return fail();
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
