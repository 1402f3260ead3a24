/* What a client may send first: our own reading of it, then the engine, in pieces as the first byte
 * says. Run by tests/fuzz.sh. */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

static tcpsrv__records pool;

static tcpsrv_tls *make(void) {
    static const char *const names[] = { "h2", "http/1.1", NULL };
    tcpsrv_certificate pair;
    tcpsrv_tls_options options;
    tcpsrv_tls *tls;
    memset(&pair, 0, sizeof pair);
    memset(&options, 0, sizeof options);
    pair.certificate_file = TEST_CERTIFICATES "/ec.pem";
    pair.key_file = TEST_CERTIFICATES "/ec.key";
    options.certificates = &pair;
    options.certificate_count = 1;
    options.alpn = names;
    tls = tcpsrv_tls_new(&options);
    if (!tls) abort();
    return tls;
}

/* Not in an array of ours: a read past the end is then seen. */
static void read_record(tcpsrv_tls *tls, const uint8_t *data, size_t size) {
    unsigned char *record = (unsigned char *)malloc(size + 1);
    tcpsrv__hello hello;
    if (!record) abort();
    memcpy(record, data, size);
    if (size > 5) tcpsrv__hello_read(tls, record, size, &hello);
    free(record);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static tcpsrv_tls *tls;
    tcpsrv__engine *engine;
    const unsigned char *out;
    size_t at = 1, n, chunk;
    if (!tls) tls = make();
    if (size < 2) return 0;
    chunk = data[0] ? data[0] : size;
    read_record(tls, data + 1, size - 1);
    if (tcpsrv__engine_new(tls, 0, NULL, &pool, &engine) != 0) abort();
    while (at < size && !engine->error) {
        n = size - at < chunk ? size - at : chunk;
        if (tcpsrv__engine_wake(engine) != 0) abort();
        n = tcpsrv__engine_feed(engine, data + at, n);
        if (engine->done) abort(); /* nobody guesses a Finished */
        at += n;
        while ((out = tcpsrv__engine_peek(engine, &n)) != NULL) tcpsrv__engine_took(engine, n);
        tcpsrv__engine_rest(engine);
    }
    tcpsrv__engine_free(engine);
    return 0;
}
