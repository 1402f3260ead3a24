/* The line echo server over TLS: the handler is the plain one. Its first read waits for the end of
 * the handshake.
 *
 *     cc examples/tls_echo.c -o tls_echo -lbearssl
 *     make certs && ./tls_echo & openssl s_client -quiet -connect 127.0.0.1:8443
 *
 * tls_echo [PORT [CERTIFICATE [KEY]]]: 8443, 0 for any free one; the files that make certs made.
 */
#define TCPSERVER_TLS
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
    tcpsrv_certificate own = { .certificate_file = argc > 2 ? argv[2] : "build/certificate.pem",
                               .key_file = argc > 3 ? argv[3] : "build/key.pem" };
    tcpsrv_tls *tls = tcpsrv_tls_new(&(tcpsrv_tls_options){ .certificates = &own,
                                                            .certificate_count = 1 });
    tcpsrv_options options = { .handle_stream = echo, .tls = tls };
    tcpsrv *server = tls ? tcpsrv_new(&options) : NULL;
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8443, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
