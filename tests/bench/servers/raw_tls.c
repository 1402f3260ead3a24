/* The least that handshakes take, for tests/bench/tls.sh: blocking calls, one connection after the
 * other, one engine for all of them, BearSSL's own loop. No limits and no time-outs.
 *
 * raw_tls PORT CERTIFICATE KEY: EC in PEM
 */
#include "peer.h"
#include <bearssl.h>
#include <fcntl.h>

typedef struct object {
    unsigned char data[4096];
    size_t size;
} object;

static void take(void *to, const void *data, size_t size) {
    object *made = (object *)to;
    if (size > sizeof made->data - made->size) exit(2);
    memcpy(made->data + made->size, data, size);
    made->size += size;
}

/* The first object of the file. */
static void load(const char *path, object *made) {
    char text[8192];
    br_pem_decoder_context decoder;
    size_t size, at = 0;
    FILE *file = fopen(path, "r");
    if (!file) {
        perror(path);
        exit(2);
    }
    size = fread(text, 1, sizeof text, file);
    fclose(file);
    br_pem_decoder_init(&decoder);
    while (at < size) {
        at += br_pem_decoder_push(&decoder, text + at, size - at);
        switch (br_pem_decoder_event(&decoder)) {
        case BR_PEM_BEGIN_OBJ: br_pem_decoder_setdest(&decoder, take, made); break;
        case BR_PEM_END_OBJ: return;
        }
    }
    exit(2);
}

static int receive(void *fd, unsigned char *data, size_t size) {
    ssize_t n = recv(*(int *)fd, data, size, 0);
    return n > 0 ? (int)n : -1;
}

static int transmit(void *fd, const unsigned char *data, size_t size) {
    ssize_t n = send(*(int *)fd, data, size, MSG_NOSIGNAL);
    return n > 0 ? (int)n : -1;
}

int main(int argc, char **argv) {
    static const uint16_t suites[] = { BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 };
    static br_ssl_server_context engine;
    static unsigned char records[BR_SSL_BUFSIZE_BIDI];
    static object leaf, key;
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    br_skey_decoder_context decoder;
    br_x509_certificate chain;
    int fd, listener;
    if (argc != 4) return 2;
    load(argv[2], &leaf);
    load(argv[3], &key);
    br_skey_decoder_init(&decoder);
    br_skey_decoder_push(&decoder, key.data, key.size);
    if (br_skey_decoder_key_type(&decoder) != BR_KEYTYPE_EC) return 2;
    chain.data = leaf.data;
    chain.data_len = leaf.size;
    br_ssl_server_init_full_ec(&engine, &chain, 1, BR_KEYTYPE_EC, br_skey_decoder_get_ec(&decoder));
    br_ssl_engine_set_versions(&engine.eng, BR_TLS12, BR_TLS12);
    br_ssl_engine_set_suites(&engine.eng, suites, 1);
    br_ssl_engine_set_buffer(&engine.eng, records, sizeof records, 1);
    listener = peer_listen(atoi(argv[1]));
    fcntl(listener, F_SETFL, 0);
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        br_sslio_context io;
        char got[512];
        if ((fd = accept(listener, NULL, NULL)) < 0) continue;
        br_ssl_server_reset(&engine);
        br_sslio_init(&io, &engine.eng, receive, &fd, transmit, &fd);
        while (br_sslio_read(&io, got, sizeof got) > 0) continue;
        close(fd);
    }
}
