/* An HTTP server over TLS for tests/bench/tls.sh: GET /n answers with n bytes. Without files it is
 * a plain one, for a TLS proxy to stand before it.
 *
 * ours_tls PORT [CERTIFICATE KEY]
 */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../../../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 1 << 20 };
static char piece[PIECE];

static int serve(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes head;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\r\n\r\n", 8192, &head)) == 0) {
        long left = 0;
        if (sscanf(head.data, "GET /%ld", &left) != 1 || left < 0) left = 0;
        err = tcpsrv_printf(stream, "HTTP/1.1 200 OK\r\nContent-Length: %ld\r\n\r\n", left);
        for (; !err && left > 0; left -= PIECE)
            err = tcpsrv_write(stream, piece, left < PIECE ? (size_t)left : PIECE);
        if (err) break;
    }
    return err;
}

int main(int argc, char **argv) {
    tcpsrv_certificate pair = { .certificate_file = argc > 2 ? argv[2] : NULL,
                                .key_file = argc > 3 ? argv[3] : NULL };
    tcpsrv_tls_options secure = { .certificates = &pair, .certificate_count = 1 };
    tcpsrv_options options = { .handle_stream = serve };
    tcpsrv *server = NULL;
    if (argc > 3) options.tls = tcpsrv_tls_new(&secure);
    if (argc < 4 || options.tls) server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 0, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
