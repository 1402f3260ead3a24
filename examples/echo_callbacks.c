/* The line echo server without coroutines: no stack for each connection, about 200 bytes instead.
 *
 *     cc examples/echo_callbacks.c -o echo_callbacks
 *     ./echo_callbacks & printf 'hello\n' | nc -N 127.0.0.1 8888
 *
 * echo_callbacks [PORT]: 8888, 0 for any free one.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    if (!err) err = tcpsrv_write(stream, line.data, line.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, arg);
    if (err) tcpsrv_close(stream);
}

static int on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user);
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .on_stream = on_stream };
    tcpsrv *server;
    /* A line is read while up to write_high_water is queued, so both must fit. */
    options.max_write_buffer_size = 2 << 20;
    server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
