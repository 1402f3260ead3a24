/* TLS: configurations and their faults, the engine from memory to memory, and streams over it. */
#if defined(TEST_HAS_BEARSSL)
#define TCPSERVER_TLS
#endif
#include "support.h"

#if defined(TCPSERVER_TLS)
#include <bearssl.h>
#include <sys/resource.h>

/* Every look at the clock may take time: then handshakes do. And whose steps those were. */
static uint64_t look_ns, looks_ns;
static const br_ssl_engine_context *stepped;
static int steps;

static int slow_clock(clockid_t id, struct timespec *now) {
    int err = clock_gettime(id, now);
    uint64_t ns;
    looks_ns += look_ns;
    ns = (uint64_t)now->tv_nsec + looks_ns;
    now->tv_sec += (time_t)(ns / 1000000000u);
    now->tv_nsec = (long)(ns % 1000000000u);
    return err;
}

static void note_step(br_ssl_engine_context *core, size_t size) {
    steps += core != stepped;
    stepped = core;
    br_ssl_engine_recvrec_ack(core, size);
}

/* For certificates another day. */
static time_t days_off;

static time_t shifted_time(time_t *at) {
    return time(at) + days_off * 86400;
}

/* A system that has no randomness, and processors of all kinds. */
static int no_random, has_aes = -1, has_pclmul = -1; /* -1: as it is */

static int may_have_no_random(void *memory, size_t size) {
    if (!no_random) return getentropy(memory, size);
    errno = ENOSYS;
    return -1;
}

static const br_block_ctr_class *aes_of_processor(void) {
    return has_aes < 0 ? br_aes_x86ni_ctr_get_vtable() : has_aes ? &br_aes_ct_ctr_vtable : NULL;
}

static br_ghash pclmul_of_processor(void) {
    return has_pclmul < 0 ? br_ghash_pclmul_get() : has_pclmul ? br_ghash_ctmul : NULL;
}

#define getentropy(memory, size) may_have_no_random(memory, size)
#define br_aes_x86ni_ctr_get_vtable() aes_of_processor()
#define br_ghash_pclmul_get() pclmul_of_processor()
#define clock_gettime(id, now) slow_clock(id, now)
#define time(at) shifted_time(at)
#define br_ssl_engine_recvrec_ack(core, size) note_step(core, size)
#endif
#include "test.h"

#if defined(TCPSERVER_TLS)

/* ---- configurations -------------------------------------------------------------------------- */

/* A file that tests/tools/certs.sh made. */
static const char *file(const char *name) {
    static char paths[16][256];
    static unsigned n;
    char *path = paths[n++ % 16];
    snprintf(path, sizeof paths[0], "%s/%s", TEST_CERTIFICATES, name);
    return path;
}

static void need_certificates(void) {
    if (access(file("done"), R_OK) != 0) SKIP("no certificates: openssl is missing");
}

static char last_warning[320];

static void keep_warning(int level, const char *line, void *user) {
    (void)user;
    CHECK_INT(level, TCPSRV_LOG_WARNING);
    snprintf(last_warning, sizeof last_warning, "%s", line);
}

typedef struct config {
    tcpsrv_tls_options options;
    tcpsrv_certificate pairs[6];
} config;

/* NAME.pem and NAME.key, or "" for none; more can be added. */
static void config_add(config *made, const char *name) {
    char pem[64], key[64];
    snprintf(pem, sizeof pem, "%s.pem", name);
    snprintf(key, sizeof key, "%s.key", name);
    made->pairs[made->options.certificate_count].certificate_file = file(pem);
    made->pairs[made->options.certificate_count++].key_file = file(key);
}

static void config_init(config *made, const char *name, const char *ca) {
    need_certificates();
    memset(made, 0, sizeof *made);
    made->options.certificates = made->pairs;
    made->options.log = keep_warning;
    if (*name) config_add(made, name);
    if (ca && *ca) made->options.ca_file = file(ca);
    if (!ca) made->options.no_verify = 1;
}

static tcpsrv_tls *config_make(const config *made) {
    tcpsrv_tls *tls = tcpsrv_tls_new(&made->options);
    if (!tls) printf("    %s\n", tcpsrv_last_error());
    CHECK(tls);
    return tls;
}

static tcpsrv_tls *server_tls(const char *name) {
    config made;
    config_init(&made, name, "");
    return config_make(&made);
}

static tcpsrv_tls *client_tls(const char *ca) {
    config made;
    config_init(&made, "", ca);
    return config_make(&made);
}

/* That a pair of files is refused with this text, in which @ stands for the directory. */
static void refused(const char *certificate, const char *key, const char *text) {
    char expected[400];
    const char *at = strchr(text, '@');
    config made;
    config_init(&made, "", NULL);
    made.pairs[0].certificate_file = *certificate == '/' ? certificate : file(certificate);
    made.pairs[0].key_file = key ? file(key) : NULL;
    made.options.certificate_count = 1;
    snprintf(expected, sizeof expected, "%.*s%s%s", at ? (int)(at - text) : 0, text,
             at ? TEST_CERTIFICATES : "", at ? at + 1 : text);
    CHECK(tcpsrv_tls_new(&made.options) == NULL);
    CHECK_STR(tcpsrv_last_error(), expected);
}

static void every_bad_file_is_named_with_what_is_wrong(void) {
    const char *encrypted = "@/%s: the key is encrypted with a passphrase; decrypt it first "
                            "(openssl pkey -in ...)";
    char text[200];
    refused("nofile.pem", NULL, "@/nofile.pem: No such file or directory");
    refused("/tmp", NULL, "/tmp: Is a directory");
    refused("empty.pem", NULL, "@/empty.pem: no PEM object in the file");
    refused("text.pem", NULL, "@/text.pem: no PEM object in the file");
    refused("ec.der", NULL, "@/ec.der: no PEM object in the file; it looks like DER: convert it "
            "(openssl x509 -inform DER, or openssl pkey -inform DER)");
    refused("ec.pem", "ec-key.der", "@/ec-key.der: no PEM object in the file; it looks like DER: "
            "convert it (openssl x509 -inform DER, or openssl pkey -inform DER)");
    refused("ec.pem", "nofile.key", "@/nofile.key: No such file or directory");
    refused("ec.pem", "garbage.pem", "@/garbage.pem: PEM object 1 (CERTIFICATE) is not valid "
            "base64");
    refused("garbage.pem", NULL, "@/garbage.pem: PEM object 1 (CERTIFICATE) is not valid base64");
    refused("cut.pem", NULL, "@/cut.pem: PEM object 1 (CERTIFICATE) has no END line "
            "(file cut short?)");
    refused("ec.key", NULL, "@/ec.key: no certificate in the file (first object is EC PRIVATE "
            "KEY)");
    refused("ec.pem", "rsa.pem", "@/rsa.pem: no private key in the file");
    refused("ec.pem", NULL, "@/ec.pem: no private key in the file");
    snprintf(text, sizeof text, encrypted, "encrypted.key");
    refused("ec.pem", "encrypted.key", text);
    snprintf(text, sizeof text, encrypted, "legacy.key");
    refused("ec.pem", "legacy.key", text);
    refused("ec.pem", "rsa.key", "private key is RSA but the certificate in @/ec.pem is EC");
    refused("rsa.pem", "ec.key", "private key is EC but the certificate in @/rsa.pem is RSA");
    refused("ec.pem", "alice.key",
            "private key does not belong to the certificate in @/ec.pem");
    refused("ec.pem", "p384.key",
            "private key does not belong to the certificate in @/ec.pem");
    refused("rsa.pem", "bob.key",
            "private key does not belong to the certificate in @/rsa.pem");
    refused("ed25519.pem", "ed25519.key", "@/ed25519.pem: cannot read the first certificate: "
            "unsupported key or signature type (RSA and EC P-256, P-384 and P-521 work)");
    refused("k1.pem", "k1.key", "@/k1.pem: cannot read the first certificate: "
            "unsupported key or signature type (RSA and EC P-256, P-384 and P-521 work)");
    refused("ec.pem", "ed25519.key", "@/ed25519.key: cannot read the private key: unsupported type "
            "(RSA and EC P-256, P-384 and P-521 work)");
    refused("rsa1024.pem", "rsa1024.key", "@/rsa1024.pem: RSA key of 1024 bits; 2048 to 4096 work");
    refused("rsa4224.pem", "rsa4224.key", "@/rsa4224.pem: RSA key of 4224 bits; 2048 to 4096 work");
    refused("disorder.pem", "middle.key", "@/disorder.pem: certificate 2 (deep.test) does not "
            "vouch for the one before it (Middle authority); the server's own comes first, then "
            "its issuers");
    refused("hello.pem", NULL, "@/hello.pem: certificate 1 is none");
}

static char *contents(const char *name) {
    static char texts[4][8192];
    static int n;
    char *text = texts[n++ % 4];
    FILE *from = fopen(file(name), "r");
    CHECK(from);
    text[fread(text, 1, sizeof texts[0] - 1, from)] = 0;
    fclose(from);
    return text;
}

static void pem_is_refused(const tcpsrv_tls_options *options, const char *what) {
    char expected[200];
    snprintf(expected, sizeof expected, "certificate_pem: PEM object 1 (CERTIFICATE) %s", what);
    CHECK(!tcpsrv_tls_new(options));
    CHECK_STR(tcpsrv_last_error(), expected);
}

/* Wherever it is cut: in the midst of a line, or of four letters that belong together, or of the
   dashes; and also where another text follows. */
static void a_text_that_is_cut_short_is_told_from_a_damaged_one(void) {
    static const char begin[] = "-----BEGIN CERTIFICATE-----";
    char text[8192], *at;
    const char *pem, *end;
    config made;
    config_init(&made, "", NULL);
    pem = contents("ec.pem");
    end = strstr(pem, "-----END ");
    CHECK(end);
    made.pairs[0].certificate_pem = text;
    made.pairs[0].key_pem = contents("ec.key");
    made.options.certificate_count = 1;
    strcpy(text, pem);
    for (at = text + (end - pem) + 8; at > text + 22; at--) {
        *at = 0;
        pem_is_refused(&made.options, "has no END line (file cut short?)");
        if (at < text + sizeof begin || at > text + (end - pem)) continue;
        strcpy(at, pem);
        pem_is_refused(&made.options, "has no END line (file cut short?)");
    }
    strcpy(text, pem);
    for (at = text + sizeof begin; at < text + (end - pem); at++) {
        char was = *at;
        *at = was == '\n' ? 'A' : '!';
        pem_is_refused(&made.options, "is not valid base64");
        *at = was;
    }
    tcpsrv_tls_free(config_make(&made));
}

static void every_kind_of_key_in_every_spelling_loads(void) {
    static const char *const names[][2] = {
        { "ec.pem", "ec.key" }, { "ec.pem", "ec-pkcs8.key" }, { "ec.pem", "ec-params.key" },
        { "both.pem", NULL }, { "rsa.pem", "rsa.key" }, { "rsa.pem", "rsa-pkcs8.key" },
        { "rsa.pem", "rsa-pkcs1.key" }, { "p384.pem", "p384.key" }, { "p521.pem", "p521.key" },
        { "rsa4096.pem", "rsa4096.key" }, { "chain.pem", "deep.key" }
    };
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        config made;
        config_init(&made, "", NULL);
        made.pairs[0].certificate_file = file(names[i][0]);
        made.pairs[0].key_file = names[i][1] ? file(names[i][1]) : NULL;
        made.options.certificate_count = 1;
        tcpsrv_tls_free(config_make(&made));
    }
}

static void certificates_load_from_memory(void) {
    config made;
    config_init(&made, "", NULL);
    made.pairs[0].certificate_pem = contents("ec.pem");
    made.pairs[0].key_pem = contents("ec.key");
    made.options.certificate_count = 1;
    made.options.ca_pem = contents("ca.pem");
    tcpsrv_tls_free(config_make(&made));
    made.pairs[0].key_pem = "nothing";
    made.pairs[0].certificate_pem = contents("ec.pem");
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "key_pem: no PEM object in the file");
}

/* That the authority's file is refused: 1 as a client's, 2 as a server's for its clients. */
static void authority_refused(const char *name, const char *text) {
    char expected[400];
    config made;
    int role;
    snprintf(expected, sizeof expected, "%s: %s", file(name), text);
    for (role = 1; role <= 2; role++) {
        config_init(&made, role == 1 ? "" : "ec", name);
        if (role == 2) made.options.client_certificates = TCPSRV_TLS_OPTIONAL;
        CHECK(!tcpsrv_tls_new(&made.options));
        CHECK_STR(tcpsrv_last_error(), expected);
    }
}

static void a_bad_file_of_authorities_is_named_too(void) {
    authority_refused("nofile.pem", "No such file or directory");
    authority_refused("empty.pem", "no PEM object in the file");
    authority_refused("ec.der", "no PEM object in the file; it looks like DER: convert it "
                      "(openssl x509 -inform DER, or openssl pkey -inform DER)");
    authority_refused("garbage.pem", "PEM object 1 (CERTIFICATE) is not valid base64");
    authority_refused("cut.pem", "PEM object 1 (CERTIFICATE) has no END line (file cut short?)");
    authority_refused("hello.pem", "no certificate of an authority with a key that works (RSA, "
                      "EC)");
}

static void a_file_that_may_not_be_read_is_named(void) {
    int fd, bound;
    need_certificates();
    if (geteuid() == 0 && seteuid(65534) != 0) SKIP("root may not become another user here");
    CHECK_INT(seteuid(getuid()), 0);
    unlink(file("closed.pem"));
    fd = open(file("closed.pem"), O_CREAT | O_WRONLY, 0);
    CHECK(fd >= 0);
    close(fd);
    if (geteuid() == 0) CHECK_INT(seteuid(65534), 0);
    fd = open(file("closed.pem"), O_RDONLY);
    bound = fd < 0 && errno == EACCES;
    if (fd >= 0) close(fd);
    if (bound) refused("closed.pem", NULL, "@/closed.pem: Permission denied");
    CHECK_INT(seteuid(getuid()), 0);
    unlink(file("closed.pem"));
    if (!bound) SKIP("no mode keeps this user out");
}

static void what_stands_in_memory_is_refused_by_its_place(void) {
    static char text[20 * 8192];
    const char *pem;
    char *key;
    config made;
    size_t i;
    config_init(&made, "", NULL);
    pem = contents("ec.pem");
    key = contents("ec.key");
    made.options.certificate_count = 1;
    made.pairs[0].certificate_pem = pem;
    made.pairs[0].key_pem = key;
    key[strlen(key) - 1] = 0; /* without its last line end it is whole all the same */
    tcpsrv_tls_free(config_make(&made));
    made.pairs[0].certificate_pem = "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n";
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "certificate_pem: PEM object 1 (CERTIFICATE) is empty");
    for (i = 0; i < 17; i++) strcat(text, pem);
    made.pairs[0].certificate_pem = text;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "certificate_pem: more than 16 certificates");
}

static void doubtful_files_load_with_a_warning(void) {
    char expected[400];
    config made;
    config_init(&made, "expired", NULL);
    tcpsrv_tls_free(config_make(&made));
    snprintf(expected, sizeof expected, "%s: the certificate has expired", file("expired.pem"));
    CHECK_STR(last_warning, expected);
    config_init(&made, "ec", NULL);
    made.pairs[0].key_file = file("open.key");
    tcpsrv_tls_free(config_make(&made));
    snprintf(expected, sizeof expected, "%s: the private key may be read by others (mode 644)",
             file("open.key"));
    CHECK_STR(last_warning, expected);
    last_warning[0] = 0;
    tcpsrv_tls_free(server_tls("ec"));
    CHECK_STR(last_warning, "");
    tcpsrv_tls_free(server_tls("p384"));
    CHECK(strstr(last_warning, "each handshake with this key holds up the loop"));
}

/* That a pair which loads with a warning otherwise is refused with the same words. */
static void strict_refuses(config *made, const char *name, const char *what) {
    char expected[400];
    snprintf(expected, sizeof expected, "%s: %s", file(name), what);
    last_warning[0] = 0;
    tcpsrv_tls_free(config_make(made));
    CHECK_STR(last_warning, expected);
    last_warning[0] = 0;
    made->options.strict = 1;
    CHECK(!tcpsrv_tls_new(&made->options));
    CHECK_STR(tcpsrv_last_error(), expected);
    CHECK_STR(last_warning, "");
}

static void strict_refuses_what_is_doubtful(void) {
    config made;
    config_init(&made, "expired", NULL);
    strict_refuses(&made, "expired.pem", "the certificate has expired");
    config_init(&made, "ec", NULL);
    days_off = -2;
    strict_refuses(&made, "ec.pem", "the certificate is not valid yet");
    days_off = 0;
    config_init(&made, "ec", NULL);
    made.pairs[0].key_file = file("open.key");
    strict_refuses(&made, "open.key", "the private key may be read by others (mode 644)");
    config_init(&made, "p384", NULL);
    made.options.strict = 1;
    tcpsrv_tls_free(config_make(&made)); /* slow is not wrong */
    CHECK(strstr(last_warning, "each handshake with this key holds up the loop"));
}

static void bad_options_are_refused_in_words(void) {
    static const char *const empty[] = { "h2", "", NULL };
    static char long_name[257];
    const char *names[2] = { long_name, NULL }, *many[34] = { NULL };
    config made;
    int n;
    config_init(&made, "ec", "");
    made.options.client_certificates = TCPSRV_TLS_OPTIONAL;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(),
              "client certificates need a ca_file, so that they can be verified");
    config_init(&made, "ec", "");
    made.options.alpn = empty;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "alpn: a name has 1 to 255 bytes, name 2 has 0");
    memset(long_name, 'a', 256);
    made.options.alpn = names;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "alpn: a name has 1 to 255 bytes, name 1 has 256");
    for (n = 0; n < 33; n++) many[n] = "h2";
    made.options.alpn = many;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "alpn: more than 32 names");
    made.options.alpn = NULL;
    made.options.ca_file = file("ec.key");
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK(strstr(tcpsrv_last_error(), "ec.key: no certificate of an authority"));
    made.pairs[0].certificate_file = NULL;
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK_STR(tcpsrv_last_error(), "a certificate needs certificate_file or certificate_pem");
}

static void every_failing_allocation_of_a_configuration_is_survived(void) {
    config made;
    tcpsrv_tls *tls = NULL;
    int64_t n;
    config_init(&made, "chain", "ca.pem");
    made.pairs[0].key_file = file("deep.key");
    for (n = 1; !tls; n++) {
        CHECK(n < 1000);
        test_fail_alloc_at = n;
        tls = tcpsrv_tls_new(&made.options);
        if (!tls) CHECK(strstr(tcpsrv_last_error(), strerror(ENOMEM)));
    }
    test_fail_alloc_at = 0;
    CHECK(n > 8);
    tcpsrv_tls_free(tls);
}

/* ---- engines --------------------------------------------------------------------------------- */

static tcpsrv__records pool;

typedef struct duplex {             /* a client and a server with nothing between them */
    tcpsrv__engine *client, *server;
    size_t chunk;                   /* bytes that go at a time */
    int rests;                      /* records are given back after each */
} duplex;

static tcpsrv__engine *engine_new(tcpsrv_tls *tls, int is_client, const char *host) {
    tcpsrv__engine *engine;
    CHECK_INT(tcpsrv__engine_new(tls, is_client, host, &pool, &engine), 0);
    return engine;
}

static void duplex_open(duplex *pair, tcpsrv_tls *client, const char *host, tcpsrv_tls *server) {
    pair->client = engine_new(client, 1, host);
    pair->server = engine_new(server, 0, NULL);
    pair->chunk = SIZE_MAX;
    pair->rests = 0;
}

static void duplex_close(duplex *pair) {
    tcpsrv__engine_free(pair->client);
    tcpsrv__engine_free(pair->server);
    tcpsrv__records_free(&pool);
}

/* How many bytes went that way. */
static size_t carry(duplex *pair, tcpsrv__engine *from, tcpsrv__engine *to) {
    const unsigned char *data;
    size_t size, total = 0;
    CHECK_INT(tcpsrv__engine_wake(from), 0);
    CHECK_INT(tcpsrv__engine_wake(to), 0);
    while ((data = tcpsrv__engine_peek(from, &size)) != NULL) {
        if (size > pair->chunk) size = pair->chunk;
        CHECK_INT(tcpsrv__engine_wake(to), 0);
        size = tcpsrv__engine_feed(to, data, size);
        if (!size) break;
        tcpsrv__engine_took(from, size);
        total += size;
        if (pair->rests) tcpsrv__engine_rest(to);
    }
    if (pair->rests) tcpsrv__engine_rest(from);
    return total;
}

static void exchange(duplex *pair) {
    size_t moved = 1;
    while (moved) {
        moved = carry(pair, pair->client, pair->server);
        moved += carry(pair, pair->server, pair->client);
    }
}

static unsigned state(tcpsrv__engine *engine) {
    return tcpsrv__engine_state(engine);
}

static void both_are_done(duplex *pair) {
    if (pair->client->error) printf("    client: %s\n", tcpsrv_strerror(pair->client->error));
    if (pair->server->error) printf("    server: %s\n", tcpsrv_strerror(pair->server->error));
    CHECK(state(pair->client) & TCPSRV__ENGINE_DONE);
    CHECK(state(pair->server) & TCPSRV__ENGINE_DONE);
    CHECK_INT(pair->client->error, 0);
    CHECK_INT(pair->server->error, 0);
}

static void say(duplex *pair, tcpsrv__engine *from, tcpsrv__engine *to, const char *text) {
    char got[256];
    size_t size = strlen(text), n = 0, more;
    CHECK_INT(tcpsrv__engine_wake(from), 0);
    CHECK_INT(tcpsrv__engine_write(from, text, size), size);
    tcpsrv__engine_flush(from);
    while (n < size) {
        CHECK(carry(pair, from, to) || n);
        more = tcpsrv__engine_read(to, got + n, sizeof got - n);
        n += more;
        if (!more) break;
    }
    CHECK_MEM(got, n, text);
}

/* A handshake, a word each way, and a free. The server's engine shows what was agreed on. */
static void talk(tcpsrv_tls *client, const char *host, tcpsrv_tls *server) {
    duplex pair;
    duplex_open(&pair, client, host, server);
    exchange(&pair);
    both_are_done(&pair);
    say(&pair, pair.client, pair.server, "question");
    say(&pair, pair.server, pair.client, "answer");
    duplex_close(&pair);
}

static void handshakes_with_every_kind_of_key(void) {
    static const char *const names[][2] = {
        { "ec", "localhost" }, { "rsa", "b.test" }, { "p384", "c.test" }, { "p521", "d.test" },
        { "rsa4096", "e.test" }
    };
    tcpsrv_tls *client = client_tls("ca.pem"), *server;
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        server = server_tls(names[i][0]);
        talk(client, names[i][1], server);
        tcpsrv_tls_free(server);
    }
    tcpsrv_tls_free(client);
}

/* What goes byte by byte, its records given back to the pool wherever the engine says they may. */
static void handshake_and_data_one_byte_at_a_time_with_records_given_back(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    duplex pair;
    int i;
    duplex_open(&pair, client, "localhost", server);
    pair.chunk = 1;
    pair.rests = 1;
    exchange(&pair);
    both_are_done(&pair);
    for (i = 0; i < 3; i++) {
        pair.rests = 0;
        say(&pair, pair.client, pair.server, "question");
        say(&pair, pair.server, pair.client, "answer");
        tcpsrv__engine_rest(pair.client);
        tcpsrv__engine_rest(pair.server);
        CHECK(!pair.client->records && !pair.server->records);
    }
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* A record of which five bytes are still to come is not one that has not begun. */
static void records_are_kept_while_a_part_of_one_is_there(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    unsigned char record[256];
    const unsigned char *out;
    char got[64];
    size_t size, cut;
    unsigned i;
    duplex pair;
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    for (cut = 1; cut < 40; cut++) {
        CHECK_INT(tcpsrv__engine_wake(pair.client), 0);
        CHECK_INT(tcpsrv__engine_write(pair.client, "some plaintext", 14), 14);
        tcpsrv__engine_flush(pair.client);
        out = tcpsrv__engine_peek(pair.client, &size);
        memcpy(record, out, size);
        tcpsrv__engine_took(pair.client, size);
        CHECK_INT(tcpsrv__engine_wake(pair.server), 0);
        CHECK_INT(tcpsrv__engine_feed(pair.server, record, size - cut), size - cut);
        tcpsrv__engine_rest(pair.server);
        for (i = 0; i < pool.count; i++) memset(pool.spare[i], 0xee, TCPSRV__RECORDS_SIZE);
        CHECK_INT(tcpsrv__engine_wake(pair.server), 0);
        CHECK_INT(tcpsrv__engine_feed(pair.server, record + size - cut, cut), cut);
        CHECK_INT(pair.server->error, 0);
        size = tcpsrv__engine_read(pair.server, got, sizeof got);
        CHECK_MEM(got, size, "some plaintext");
    }
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

static size_t next_flight(tcpsrv__engine *engine) {
    size_t size = 0;
    tcpsrv__engine_peek(engine, &size);
    return size;
}

/* Each would be a call and a segment of its own. */
static void the_short_records_of_a_handshake_leave_together(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    br_ssl_session_parameters session;
    duplex pair;
    duplex_open(&pair, client, "localhost", server);
    carry(&pair, pair.client, pair.server);
    carry(&pair, pair.server, pair.client);
    CHECK_INT(next_flight(pair.client), 42 + 6 + 45); /* key exchange, change of keys, Finished */
    CHECK_INT(carry(&pair, pair.client, pair.server), 42 + 6 + 45);
    CHECK_INT(next_flight(pair.server), 6 + 45);
    exchange(&pair);
    both_are_done(&pair);
    br_ssl_engine_get_session_parameters(pair.client->core, &session);
    duplex_close(&pair);
    duplex_open(&pair, client, "localhost", server);
    br_ssl_engine_set_session_parameters(pair.client->core, &session);
    CHECK(br_ssl_client_reset(&pair.client->context.client, "localhost", 1));
    carry(&pair, pair.client, pair.server);
    CHECK_INT(pair.server->resumed, 1);
    CHECK_INT(next_flight(pair.server), 86 + 6 + 45); /* ServerHello before them */
    exchange(&pair);
    both_are_done(&pair);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

static void bulk_data_keeps_its_bytes_and_order(void) {
    static char out[300000], in[300000];
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    size_t sent = 0, got = 0, i;
    duplex pair;
    for (i = 0; i < sizeof out; i++) out[i] = (char)(i * 7 + i / 251);
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    pair.chunk = 1000;
    while (got < sizeof in) {
        CHECK_INT(tcpsrv__engine_wake(pair.client), 0);
        sent += tcpsrv__engine_write(pair.client, out + sent, sizeof out - sent);
        tcpsrv__engine_flush(pair.client);
        do {
            carry(&pair, pair.client, pair.server);
            got += i = tcpsrv__engine_read(pair.server, in + got, sizeof in - got);
        } while (i);
    }
    CHECK(memcmp(out, in, sizeof in) == 0);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* ---- engines: names -------------------------------------------------------------------------- */

/* The index of the certificate that a client gets which asks for that name. */
static int pair_for(tcpsrv_tls *server, const char *name) {
    tcpsrv_tls *client = client_tls(NULL);
    duplex pair;
    int index;
    duplex_open(&pair, client, name, server);
    exchange(&pair);
    both_are_done(&pair);
    CHECK_STR(br_ssl_engine_get_server_name(pair.server->core),
              name && strcmp(name, "127.0.0.1") ? name : "");
    index = pair.server->pair;
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    return index;
}

static void server_name_chooses_the_certificate(void) {
    tcpsrv_tls *server;
    config made;
    config_init(&made, "ec", "");
    config_add(&made, "rsa");
    config_add(&made, "p384");
    made.pairs[2].server_name = "own.test";
    server = config_make(&made);
    CHECK_INT(pair_for(server, NULL), 0);
    CHECK_INT(pair_for(server, "a.test"), 0);
    CHECK_INT(pair_for(server, "b.test"), 1);
    CHECK_INT(pair_for(server, "B.TeSt"), 1);
    CHECK_INT(pair_for(server, "x.wild.test"), 1);
    CHECK_INT(pair_for(server, "x.y.wild.test"), 0);
    CHECK_INT(pair_for(server, "wild.test"), 0);
    CHECK_INT(pair_for(server, "own.test"), 2);
    CHECK_INT(pair_for(server, "c.test"), 0);
    CHECK_INT(pair_for(server, "127.0.0.1"), 0);
    tcpsrv_tls_free(server);
}

static br_ec_impl one_curve;

/* The index of the certificate for a client that lacks suites with EC keys, or P-256; -1: none. */
static int pair_without(tcpsrv_tls *server, int suites, unsigned curves) {
    static const uint16_t rsa = BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256;
    tcpsrv_tls *client = client_tls(NULL);
    duplex pair;
    int index = -1;
    duplex_open(&pair, client, "b.test", server);
    one_curve = *br_ec_get_default();
    one_curve.supported_curves = curves;
    br_ssl_engine_set_ec(pair.client->core, &one_curve);
    if (suites) br_ssl_engine_set_suites(pair.client->core, &rsa, 1);
    CHECK(br_ssl_client_reset(&pair.client->context.client, "b.test", 0));
    exchange(&pair);
    if (!pair.server->error) both_are_done(&pair);
    if (!pair.server->error) index = pair.server->core->session.cipher_suite == rsa;
    if (index < 0) CHECK_INT(pair.client->error, TCPSRV_ETLS - 256 - 40);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    return index;
}

static void a_client_gets_the_certificate_it_can_read(void) {
    const unsigned all = 1u << BR_EC_secp256r1 | 1u << BR_EC_secp384r1;
    tcpsrv_tls *server;
    config made;
    config_init(&made, "rsa-fallback", "");
    config_add(&made, "rsa");
    server = config_make(&made);
    CHECK_INT(pair_without(server, 0, all), 0);
    CHECK_INT(pair_without(server, 1, all), 1);
    CHECK_INT(pair_without(server, 0, 1u << BR_EC_secp384r1), 1);
    tcpsrv_tls_free(server);
    server = server_tls("rsa-fallback");
    CHECK_INT(pair_without(server, 1, all), -1);
    tcpsrv_tls_free(server);
}

static void a_client_with_weak_suites_alone_is_refused(void) {
    static const uint16_t weak[] = { BR_TLS_RSA_WITH_AES_128_GCM_SHA256,
                                     BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256,
                                     BR_TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
                                     BR_TLS_RSA_WITH_3DES_EDE_CBC_SHA,
                                     BR_TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8 };
    tcpsrv_tls *server, *client = client_tls(NULL);
    duplex pair;
    config made;
    config_init(&made, "ec", "");
    config_add(&made, "rsa");
    server = config_make(&made);
    duplex_open(&pair, client, "localhost", server);
    br_ssl_engine_set_suites(pair.client->core, weak, sizeof weak / sizeof weak[0]);
    CHECK(br_ssl_client_reset(&pair.client->context.client, "localhost", 0));
    exchange(&pair);
    CHECK_INT(pair.server->error, TCPSRV_ETLS - 512 - 40);
    CHECK_INT(pair.client->error, TCPSRV_ETLS - 256 - 40);
    CHECK_STR(tcpsrv_strerror(pair.server->error),
              "nothing in common with the peer (alert 40 sent)");
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* The index of the certificate for a client that asks for that name and reads signatures by RSA
   alone, or with that hash alone; -1: none. With which hash the server signs: *hash. */
static int pair_signing(tcpsrv_tls *server, const char *name, int rsa_alone, int only, int *hash) {
    static const uint16_t suites[2] = { BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                                        BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 };
    tcpsrv_tls *client = client_tls(NULL);
    duplex pair;
    int id, index;
    duplex_open(&pair, client, name, server);
    br_ssl_engine_set_suites(pair.client->core, suites, 2);
    if (rsa_alone) br_ssl_engine_set_ecdsa(pair.client->core, NULL);
    for (id = br_sha256_ID; only && id <= br_sha512_ID; id++)
        if (id != only) br_ssl_engine_set_hash(pair.client->core, id, NULL);
    CHECK(br_ssl_client_reset(&pair.client->context.client, name, 0));
    exchange(&pair);
    index = pair.server->error ? -1 : pair.server->pair;
    *hash = (int)pair.server->context.server.sign_hash_id & 0xff;
    if (index >= 0) both_are_done(&pair);
    else CHECK_INT(pair.client->error, TCPSRV_ETLS - 256 - 40);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    return index;
}

static void a_client_gets_the_certificate_whose_signatures_it_can_read(void) {
    tcpsrv_tls *server;
    config made;
    int hash;
    config_init(&made, "ec", "");
    config_add(&made, "rsa-fallback");
    config_add(&made, "rsa");
    server = config_make(&made);
    CHECK_INT(pair_signing(server, "b.test", 0, 0, &hash), 1);
    CHECK_INT(hash, br_sha256_ID);
    CHECK_INT(pair_signing(server, "b.test", 1, 0, &hash), 2); /* of the same name */
    CHECK_INT(pair_signing(server, "localhost", 1, 0, &hash), 2); /* of another name */
    CHECK_INT(hash, br_sha256_ID);
    CHECK_INT(pair_signing(server, "localhost", 0, br_sha384_ID, &hash), 0);
    CHECK_INT(hash, br_sha384_ID);
    CHECK_INT(pair_signing(server, "localhost", 1, br_sha384_ID, &hash), 2);
    CHECK_INT(hash, br_sha384_ID);
    tcpsrv_tls_free(server);
    server = server_tls("ec");
    CHECK_INT(pair_signing(server, "localhost", 1, 0, &hash), -1);
    tcpsrv_tls_free(server);
}

/* What a client and a server agree on, both with such a processor and two kinds of key. */
static void suites_of(int aes, int pclmul, const char *ecdsa, const char *rsa) {
    static const char *const keys[2] = { "ec", "rsa" };
    tcpsrv_tls *client, *server;
    duplex pair;
    int i;
    for (i = 0; i < 2; i++) {
        has_aes = !aes;
        has_pclmul = !pclmul; /* the server decides, not the client */
        client = client_tls(NULL);
        has_aes = aes;
        has_pclmul = pclmul;
        server = server_tls(keys[i]);
        duplex_open(&pair, client, "localhost", server);
        exchange(&pair);
        both_are_done(&pair);
        CHECK_STR(tcpsrv__suite_name(pair.server->core->session.cipher_suite), i ? rsa : ecdsa);
        duplex_close(&pair);
        tcpsrv_tls_free(client);
        tcpsrv_tls_free(server);
    }
}

/* AES-GCM needs both of them to be fast. */
static void the_suite_that_the_servers_processor_does_fast_comes_first(void) {
    int help;
    need_certificates();
    suites_of(1, 1, "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
              "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256");
    for (help = 0; help < 3; help++)
        suites_of(help == 1, help == 2, "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
                  "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256");
}

static const char *asked_name;
static int asked_times;

static int answer_name(void *user, const char *name) {
    asked_times++;
    asked_name = name;
    return name && strcmp(name, "localhost") == 0 ? *(int *)user : -1;
}

static void on_sni_decides_and_refuses_with_alert_112(void) {
    tcpsrv_tls *server, *client = client_tls(NULL);
    duplex pair;
    config made;
    int answer = 1;
    config_init(&made, "ec", "");
    config_add(&made, "rsa");
    made.options.on_sni = answer_name;
    made.options.user = &answer;
    server = config_make(&made);
    CHECK_INT(pair_for(server, "localhost"), 1);
    CHECK_INT(asked_times, 1);
    answer = 2; /* there is no such certificate */
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    CHECK_INT(pair.server->error, TCPSRV_ETLS_NAME);
    duplex_close(&pair);
    duplex_open(&pair, client, "b.test", server);
    exchange(&pair);
    CHECK_INT(pair.server->error, TCPSRV_ETLS_NAME);
    CHECK_INT(pair.client->error, TCPSRV_ETLS - 256 - 112);
    duplex_close(&pair);
    duplex_open(&pair, client, NULL, server);
    exchange(&pair);
    CHECK(asked_name == NULL);
    CHECK_INT(pair.server->error, TCPSRV_ETLS_NAME);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* ---- engines: the first record --------------------------------------------------------------- */

/* The client's first record, to be changed. */
static size_t hello_of(tcpsrv_tls *client, const char *name, unsigned char *hello) {
    tcpsrv__engine *engine = engine_new(client, 1, name);
    const unsigned char *out;
    size_t size;
    CHECK_INT(tcpsrv__engine_wake(engine), 0);
    out = tcpsrv__engine_peek(engine, &size);
    CHECK(out && size < 1024);
    memcpy(hello, out, size);
    tcpsrv__engine_free(engine);
    return size;
}

static void add_to(unsigned char *at, int bytes, size_t more) {
    while (bytes-- > 0) {
        more += at[bytes];
        at[bytes] = (unsigned char)more;
        more >>= 8;
    }
}

/* Where the extensions' size stands in a hello. */
static size_t extensions_at(const unsigned char *hello) {
    size_t at = 5 + 4 + 2 + 32;
    at += 1 + (size_t)hello[at];
    at += 2 + ((size_t)hello[at] << 8 | hello[at + 1]);
    return at + 1 + (size_t)hello[at];
}

static size_t hello_extend(unsigned char *hello, size_t size, const char *extension, size_t more) {
    memcpy(hello + size, extension, more);
    add_to(hello + 3, 2, more);
    add_to(hello + 6, 3, more);
    add_to(hello + extensions_at(hello), 2, more);
    return size + more;
}

/* Feeds a server these bytes, and says with which code it ends; what it answers goes to *reply. */
static int answer_to(tcpsrv_tls *server, const void *data, size_t size, char *reply,
                     size_t *reply_size) {
    tcpsrv__engine *engine = engine_new(server, 0, NULL);
    const unsigned char *out;
    size_t n;
    int error;
    CHECK_INT(tcpsrv__engine_wake(engine), 0);
    tcpsrv__engine_feed(engine, (const unsigned char *)data, size);
    *reply_size = 0;
    while ((out = tcpsrv__engine_peek(engine, &n)) != NULL) {
        if (n > 16 - *reply_size) n = 16 - *reply_size;
        if (!n) break;
        memcpy(reply + *reply_size, out, n);
        *reply_size += n;
        tcpsrv__engine_took(engine, n);
    }
    error = engine->error;
    tcpsrv__engine_free(engine);
    tcpsrv__records_free(&pool);
    return error;
}

/* The first record in pieces of every size, the last of which holds more than the record's rest. */
static void a_hello_comes_in_pieces_with_something_behind_it(void) {
    tcpsrv_tls *client = client_tls(NULL), *server = server_tls("ec");
    unsigned char hello[4096];
    size_t size = hello_of(client, "localhost", hello), piece, at, n;
    memset(hello + size, 23, sizeof hello - size);
    for (piece = 1; piece < size + 200; piece += piece < 20 ? 1 : 13) {
        tcpsrv__engine *engine = engine_new(server, 0, NULL);
        for (at = 0; at < size + 100; at += n) {
            n = size + 100 - at < piece ? size + 100 - at : piece;
            CHECK_INT(tcpsrv__engine_wake(engine), 0);
            tcpsrv__engine_feed(engine, hello + at, n);
        }
        CHECK(engine->started);
        CHECK_INT(engine->first_size, size);
        tcpsrv__engine_free(engine);
    }
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

static void plain_text_on_a_tls_port_is_named_as_such(void) {
    static const char *const texts[] = { "GET / HTTP/1.1\r\n\r\n", "\x80\x2e\x01", "x",
                                         "\x16\x02\x00", "\x16\x03\x01\xff\xff",
                                         "\x17\x03\x03\x00\x10" };
    tcpsrv_tls *server = server_tls("ec");
    char reply[16];
    size_t i, size;
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        CHECK_INT(answer_to(server, texts[i], i == 4 ? 5 : strlen(texts[i]), reply, &size),
                  TCPSRV_ETLS_PLAIN);
        CHECK_INT(size, 0);
    }
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS_PLAIN), "peer does not speak TLS");
    tcpsrv_tls_free(server);
}

static void a_plain_server_is_named_by_the_client(void) {
    tcpsrv_tls *client = client_tls(NULL);
    tcpsrv__engine *engine = engine_new(client, 1, "localhost");
    tcpsrv__engine_feed(engine, (const unsigned char *)"HTTP/1.1 400", 12);
    CHECK_INT(engine->error, TCPSRV_ETLS_PLAIN);
    tcpsrv__engine_free(engine);
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(client);
}

static void old_and_new_versions_get_a_well_formed_alert_70(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls(NULL);
    unsigned char hello[2048];
    size_t reply_size, size = hello_of(client, "localhost", hello);
    char reply[16];
    hello[10] = 2; /* TLS 1.1 */
    CHECK_INT(answer_to(server, hello, size, reply, &reply_size), TCPSRV_ETLS_VERSION);
    CHECK(reply_size == 7 && memcmp(reply, "\x15\x03\x01\x00\x02\x02\x46", 7) == 0);
    hello[10] = 3;
    size = hello_extend(hello, size, "\0\x2b\0\3\2\3\4", 7); /* supported_versions: 1.3 alone */
    CHECK_INT(answer_to(server, hello, size, reply, &reply_size), TCPSRV_ETLS_VERSION);
    CHECK(reply_size == 7 && memcmp(reply, "\x15\x03\x01\x00\x02\x02\x46", 7) == 0);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* The same handshake message in records of 40 bytes: how many bytes they are. */
static size_t split_hello(const unsigned char *hello, size_t size, unsigned char *split) {
    size_t at, n = 0;
    for (at = 5; at < size; at += 40) {
        size_t part = size - at < 40 ? size - at : 40;
        memcpy(split + n, "\x16\x03\x01\0", 4);
        split[n + 4] = (unsigned char)part;
        memcpy(split + n + 5, hello + at, part);
        n += 5 + part;
    }
    return n;
}

/* Such a hello is the engine's to refuse, whose alert has no version. */
static void an_old_version_in_many_records_gets_a_well_formed_alert_too(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls(NULL);
    unsigned char hello[2048], split[4096];
    size_t size = hello_of(client, "localhost", hello), reply_size;
    char reply[16];
    hello[10] = 2;
    size = split_hello(hello, size, split);
    CHECK_INT(answer_to(server, split, size, reply, &reply_size), TCPSRV_ETLS - 512 - 70);
    CHECK(reply_size == 7 && memcmp(reply, "\x15\x03\x01\x00\x02\x02\x46", 7) == 0);
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 512 - 70),
              "peer does not know TLS 1.2 (alert 70 sent)");
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

static void a_hello_in_many_records_still_asks_for_its_name(void) {
    tcpsrv_tls *server, *client = client_tls(NULL);
    unsigned char hello[2048], split[4096];
    size_t size = hello_of(client, "b.test", hello), n, reply_size;
    char reply[16];
    config made;
    int answer = 0;
    config_init(&made, "ec", "");
    made.options.on_sni = answer_name;
    made.options.user = &answer;
    server = config_make(&made);
    n = split_hello(hello, size, split);
    asked_times = 0;
    CHECK(answer_to(server, split, n, reply, &reply_size) != 0);
    CHECK_INT(asked_times, 1);
    CHECK(reply_size == 7 && reply[0] == 21 && reply[6] == 40);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* The list of signature algorithms in a hello, pairs of hash and kind of key, behind its sizes. */
static unsigned char *signatures_in(unsigned char *hello) {
    unsigned char *at = hello + extensions_at(hello) + 2;
    while (at[0] != 0 || at[1] != 13) at += 4 + ((size_t)at[2] << 8 | at[3]);
    return at + 6;
}

/* With which hash the server signs for a client that says so; 0: it is refused. */
static int signs_with(tcpsrv_tls *server, const unsigned char *hello, size_t size) {
    tcpsrv__engine *engine = engine_new(server, 0, NULL);
    int hash = 0;
    CHECK_INT(tcpsrv__engine_feed(engine, hello, size), size);
    tcpsrv__engine_took(engine, next_flight(engine));
    if (!engine->error) hash = (int)engine->context.server.sign_hash_id & 0xff;
    else CHECK_INT(engine->error, TCPSRV_ETLS - 512 - 40);
    tcpsrv__engine_free(engine);
    return hash;
}

/* A client may read other hashes in signatures by EC than in those by RSA. One that says nothing
   means SHA-1 (RFC 5246 7.4.1.4.1), with which nothing is signed here. */
static void each_kind_of_key_signs_with_a_hash_of_its_own(void) {
    static const char *const keys[2] = { "ec", "rsa" };
    static const unsigned char kinds[2] = { 3, 1 };
    tcpsrv_tls *server, *client = client_tls(NULL);
    unsigned char hello[2048], *at, *end;
    size_t size;
    int i;
    for (i = 0; i < 2; i++) {
        server = server_tls(keys[i]);
        size = hello_of(client, "localhost", hello);
        CHECK_INT(signs_with(server, hello, size), br_sha256_ID);
        at = signatures_in(hello);
        end = at + ((size_t)at[-2] << 8 | at[-1]);
        for (; at < end; at += 2)
            if (at[0] == br_sha256_ID && at[1] == kinds[i]) at[0] = br_sha512_ID;
        CHECK_INT(signs_with(server, hello, size), br_sha384_ID);
        for (at = signatures_in(hello); at < end; at += 2)
            if (at[1] == kinds[i]) at[0] = br_sha1_ID;
        CHECK_INT(signs_with(server, hello, size), 0);
        signatures_in(hello)[-5] = 99; /* an extension that nobody knows */
        CHECK_INT(signs_with(server, hello, size), 0);
        tcpsrv_tls_free(server);
    }
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(client);
}

/* ---- engines: randomness --------------------------------------------------------------------- */

enum { NO_RANDOM = TCPSRV_ETLS - BR_ERR_NO_RANDOM };

static void without_randomness_no_handshake_begins(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls("ca.pem");
    tcpsrv__engine *engine;
    unsigned char hello[2048];
    size_t size = hello_of(client, "localhost", hello), reply_size;
    char reply[16];
    no_random = 1;
    CHECK_INT(tcpsrv__engine_new(client, 1, "localhost", &pool, &engine), NO_RANDOM);
    CHECK(!engine);
    CHECK_INT(answer_to(server, hello, size, reply, &reply_size), NO_RANDOM);
    CHECK_INT(reply_size, 0);
    CHECK_STR(tcpsrv_strerror(NO_RANDOM), "no randomness from the system");
    no_random = 0;
    talk(client, "localhost", server);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* A server that has run out of them goes on. */
static void a_handshake_needs_no_descriptor(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls("ca.pem");
    struct rlimit was, none;
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &was), 0);
    none = was;
    none.rlim_cur = 0;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &none), 0);
    CHECK(open("/dev/urandom", O_RDONLY) < 0 && errno == EMFILE);
    talk(client, "localhost", server);
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &was), 0);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* ---- engines: sessions ----------------------------------------------------------------------- */

/* A full handshake; leaves its session for the next. */
static void session_make(tcpsrv_tls *client, const char *host, tcpsrv_tls *server,
                         br_ssl_session_parameters *session) {
    duplex pair;
    duplex_open(&pair, client, host, server);
    exchange(&pair);
    both_are_done(&pair);
    CHECK_INT(pair.server->resumed, 0);
    br_ssl_engine_get_session_parameters(pair.client->core, session);
    duplex_close(&pair);
}

static void session_offer(duplex *pair, const char *host, const br_ssl_session_parameters *old) {
    br_ssl_engine_set_session_parameters(pair->client->core, old);
    CHECK(br_ssl_client_reset(&pair->client->context.client, host, 1));
}

/* Whether the server goes on with the session. */
static int resumes(tcpsrv_tls *client, const char *host, tcpsrv_tls *server,
                   const br_ssl_session_parameters *session) {
    duplex pair;
    int resumed;
    duplex_open(&pair, client, host, server);
    session_offer(&pair, host, session);
    pair.chunk = 50; /* the hello comes in pieces */
    exchange(&pair);
    both_are_done(&pair);
    say(&pair, pair.client, pair.server, "question");
    say(&pair, pair.server, pair.client, "answer");
    resumed = pair.server->resumed;
    duplex_close(&pair);
    return resumed;
}

static void a_session_resumes_for_its_name_and_its_time(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls(NULL), *other = server_tls("ec");
    br_ssl_session_parameters session;
    size_t i;
    session_make(client, "localhost", server, &session);
    CHECK_INT(resumes(client, "localhost", server, &session), 1);
    CHECK_INT(resumes(client, "a.test", server, &session), 0);
    CHECK_INT(resumes(client, "localhost", other, &session), 0);
    CHECK_INT(resumes(client, "localhost", server, &session), 1);
    server->session_ttl_ns = 1;
    CHECK_INT(resumes(client, "localhost", server, &session), 0);
    for (i = 0; i < server->session_count; i++)
        CHECK(memcmp(server->sessions[i].parameters.session_id, session.session_id, 32) != 0);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(other);
}

static void the_session_cache_is_bounded_and_can_be_off(void) {
    tcpsrv_tls *server, *client = client_tls(NULL);
    br_ssl_session_parameters session;
    config made;
    size_t i, used = 0;
    config_init(&made, "ec", "");
    made.options.session_cache = 4;
    server = config_make(&made);
    for (i = 0; i < 7; i++) session_make(client, "localhost", server, &session);
    for (i = 0; i < server->session_count; i++)
        used += server->sessions[i].parameters.session_id_len == 32;
    CHECK_INT(server->session_count, 4);
    CHECK_INT(used, 4);
    CHECK_INT(resumes(client, "localhost", server, &session), 1);
    tcpsrv_tls_free(server);
    made.options.session_cache = -1;
    server = config_make(&made);
    session_make(client, "localhost", server, &session);
    CHECK_INT(resumes(client, "localhost", server, &session), 0);
    tcpsrv_tls_free(server);
    made.options.session_cache = 0;
    made.options.ca_file = file("ca.pem");
    made.options.client_certificates = TCPSRV_TLS_REQUIRED;
    server = config_make(&made);
    CHECK_INT(server->session_count, 0);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
}

/* BearSSL 0.6 reads far outside its list of names when a session is resumed with names of which
   none is the server's, or with two lists. */
static void a_resumed_session_with_foreign_alpn_crashes_nothing(void) {
    static const char *const ours[] = { "h2", "http/1.1", NULL };
    static const char *const foreign[] = { "spdy/1", NULL };
    static const char second_list[] = "\0\x10\0\x09\0\x07\x06spdy/1";
    tcpsrv_tls *server, *client, *stranger;
    br_ssl_session_parameters session;
    unsigned char hello[2048];
    const unsigned char *out;
    char reply[16];
    size_t size, reply_size;
    duplex pair;
    config made;
    config_init(&made, "ec", "");
    made.options.alpn = ours;
    server = config_make(&made);
    config_init(&made, "", NULL);
    made.options.alpn = ours;
    client = config_make(&made);
    made.options.alpn = foreign;
    stranger = config_make(&made);
    session_make(client, "localhost", server, &session);
    CHECK_INT(resumes(client, "localhost", server, &session), 1);
    CHECK_INT(resumes(stranger, "localhost", server, &session), 0);
    duplex_open(&pair, client, "localhost", server);
    session_offer(&pair, "localhost", &session);
    CHECK_INT(tcpsrv__engine_wake(pair.client), 0);
    out = tcpsrv__engine_peek(pair.client, &size);
    memcpy(hello, out, size);
    size = hello_extend(hello, size, second_list, sizeof second_list - 1);
    answer_to(server, hello, size, reply, &reply_size);
    CHECK(reply_size > 5);
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(stranger);
}

static void the_application_protocol_is_the_servers_choice(void) {
    static const char *const servers[] = { "h2", "http/1.1", NULL };
    static const char *const clients[] = { "http/1.1", "h2", NULL };
    tcpsrv_tls *server, *client, *none = client_tls(NULL);
    duplex pair;
    config made;
    config_init(&made, "ec", "");
    made.options.alpn = servers;
    server = config_make(&made);
    config_init(&made, "", NULL);
    made.options.alpn = clients;
    client = config_make(&made);
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    CHECK_STR(br_ssl_engine_get_selected_protocol(pair.server->core), "h2");
    CHECK_STR(br_ssl_engine_get_selected_protocol(pair.client->core), "h2");
    duplex_close(&pair);
    duplex_open(&pair, none, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    CHECK(br_ssl_engine_get_selected_protocol(pair.server->core) == NULL);
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(none);
}

/* ---- engines: certificates of clients -------------------------------------------------------- */

/* A handshake with a client that shows that certificate ("" for none): the server's code, and the
   client's in *client_code. */
static int showing(int wanted, const char *name, int *client_code) {
    tcpsrv_tls *server, *client;
    duplex pair;
    config made;
    int error;
    config_init(&made, "ec", "ca.pem");
    made.options.client_certificates = wanted;
    server = config_make(&made);
    config_init(&made, name, NULL);
    client = config_make(&made);
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    error = pair.server->error;
    *client_code = pair.client->error;
    if (!error) {
        both_are_done(&pair);
        CHECK_INT(pair.server->peer != NULL, *name != 0);
        if (*name) CHECK_INT(pair.server->peer->verified, 1);
        if (*name) CHECK_STR(pair.server->peer->name, name);
        say(&pair, pair.client, pair.server, "question");
    } else {
        CHECK_INT(tcpsrv__engine_read(pair.server, (char *)&made, sizeof made), 0);
        CHECK(!(state(pair.server) & TCPSRV__ENGINE_DONE));
    }
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
    return error;
}

static void optional_client_certificates_are_verified_all_the_same(void) {
    int client;
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "alice", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "bob", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "any.test", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "stray", &client), TCPSRV_ETLS - 62);
    CHECK_INT(client, TCPSRV_ETLS - 256 - 48);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "foreign", &client), TCPSRV_ETLS - 62);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "deep", &client), TCPSRV_ETLS - 62);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "expired", &client), TCPSRV_ETLS - 54);
    CHECK_INT(client, TCPSRV_ETLS - 256 - 45);
    CHECK_INT(showing(TCPSRV_TLS_OPTIONAL, "rsa", &client), TCPSRV_ETLS_USAGE);
    CHECK_INT(client, TCPSRV_ETLS - 256 - 43);
}

static void required_client_certificates_are_required_and_verified(void) {
    int client;
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "alice", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "any.test", &client), 0);
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "", &client) != 0, 1);
    CHECK_INT(client, TCPSRV_ETLS - 256 - 40);
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "stray", &client), TCPSRV_ETLS - 62);
    CHECK_INT(client, TCPSRV_ETLS - 256 - 48);
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "ec", &client), TCPSRV_ETLS_USAGE);
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 62), "certificate chain leads to no trusted root");
}

static void a_required_certificate_that_is_missing_is_named(void) {
    int client, error = showing(TCPSRV_TLS_REQUIRED, "", &client);
    CHECK_STR(tcpsrv_strerror(error), "client sent no certificate");
}

static void swap_keys(tcpsrv_tls *one, tcpsrv_tls *other) {
    br_skey_decoder_context *key = one->pairs[0].key;
    one->pairs[0].key = other->pairs[0].key;
    other->pairs[0].key = key;
}

/* Certificates are public: who shows one must have its key as well. */
static void a_certificate_without_its_key_proves_nothing(void) {
    tcpsrv_tls *server, *client, *thief = server_tls("ec");
    duplex pair;
    config made;
    int wanted;
    for (wanted = TCPSRV_TLS_OPTIONAL; wanted <= TCPSRV_TLS_REQUIRED; wanted++) {
        config_init(&made, "ec", "ca.pem");
        made.options.client_certificates = wanted;
        server = config_make(&made);
        config_init(&made, "alice", "ca.pem");
        client = config_make(&made);
        swap_keys(client, thief);
        duplex_open(&pair, client, "localhost", server);
        exchange(&pair);
        CHECK_INT(pair.server->error, TCPSRV_ETLS - BR_ERR_BAD_SIGNATURE);
        CHECK(!(state(pair.server) & TCPSRV__ENGINE_DONE));
        duplex_close(&pair);
        swap_keys(client, thief);
        swap_keys(server, client);
        duplex_open(&pair, client, "localhost", server);
        exchange(&pair);
        CHECK_INT(pair.client->error, TCPSRV_ETLS - BR_ERR_BAD_SIGNATURE);
        CHECK(!(state(pair.client) & TCPSRV__ENGINE_DONE));
        duplex_close(&pair);
        tcpsrv_tls_free(server);
        tcpsrv_tls_free(client);
    }
    tcpsrv_tls_free(thief);
}

/* Whether what a server answers a hello, all in clear, has this text in it. */
static int answer_holds(tcpsrv_tls *server, const char *text) {
    tcpsrv_tls *client = client_tls(NULL);
    unsigned char hello[2048];
    size_t size = hello_of(client, "localhost", hello), n;
    tcpsrv__engine *engine = engine_new(server, 0, NULL);
    const unsigned char *out;
    int holds;
    CHECK_INT(tcpsrv__engine_feed(engine, hello, size), size);
    out = tcpsrv__engine_peek(engine, &n);
    CHECK(out);
    holds = tcpsrv__find_long((const char *)out, n, text, strlen(text)) != NULL;
    tcpsrv__engine_free(engine);
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(client);
    return holds;
}

static void clients_are_told_whose_certificates_will_do(void) {
    tcpsrv_tls *server;
    config made;
    int wanted;
    for (wanted = TCPSRV_TLS_NONE; wanted <= TCPSRV_TLS_REQUIRED; wanted++) {
        config_init(&made, "ec", "other-ca.pem");
        made.options.client_certificates = wanted;
        server = config_make(&made);
        CHECK_INT(answer_holds(server, "Test authority"), 1); /* whose the server's own is */
        CHECK_INT(answer_holds(server, "Another authority"), wanted != TCPSRV_TLS_NONE);
        tcpsrv_tls_free(server);
    }
}

static void a_resumed_session_keeps_the_clients_identity(void) {
    tcpsrv_tls *server, *client;
    br_ssl_session_parameters session;
    duplex pair;
    config made;
    config_init(&made, "ec", "ca.pem");
    made.options.client_certificates = TCPSRV_TLS_OPTIONAL;
    server = config_make(&made);
    config_init(&made, "alice", NULL);
    client = config_make(&made);
    session_make(client, "localhost", server, &session);
    duplex_open(&pair, client, "localhost", server);
    session_offer(&pair, "localhost", &session);
    exchange(&pair);
    both_are_done(&pair);
    CHECK_INT(pair.server->resumed, 1);
    CHECK(pair.server->peer && pair.server->peer->verified);
    CHECK_STR(pair.server->peer->name, "alice");
    CHECK_STR(pair.server->peer->dns, "alice.test");
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
}

/* ---- engines: certificates of servers -------------------------------------------------------- */

/* A client that trusts that authority and wants that host, and a server that shows a certificate:
   the client's code, and what the server is told in heard. */
static int heard;

static int trusting(const char *ca, const char *host, const char *chain, const char *key) {
    tcpsrv_tls *server, *client = client_tls(ca);
    duplex pair;
    config made;
    int error;
    config_init(&made, key, "");
    if (chain) made.pairs[0].certificate_file = file(chain);
    server = config_make(&made);
    duplex_open(&pair, client, host, server);
    exchange(&pair);
    error = pair.client->error;
    heard = pair.server->error;
    if (!error) both_are_done(&pair);
    if (!error) CHECK_INT(pair.client->peer->verified, ca != NULL);
    if (error) CHECK(!(state(pair.client) & TCPSRV__ENGINE_DONE));
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
    return error;
}

static void a_client_verifies_chain_host_time_and_usage(void) {
    CHECK_INT(trusting("ca.pem", "localhost", NULL, "ec"), 0);
    CHECK_INT(trusting("ca.pem", "LOCALHOST", NULL, "ec"), 0);
    CHECK_INT(trusting("ca.pem", "x.wild.test", NULL, "rsa"), 0);
    CHECK_INT(trusting("ca.pem", "elsewhere.test", NULL, "ec"), TCPSRV_ETLS - 56);
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 56), "certificate is for another host name");
    CHECK_INT(trusting("other-ca.pem", "localhost", NULL, "ec"), TCPSRV_ETLS - 62);
    CHECK_INT(trusting("ca.pem", "localhost", NULL, "expired"), TCPSRV_ETLS - 54);
    CHECK_INT(trusting("ca.pem", "alice.test", NULL, "alice"), TCPSRV_ETLS_USAGE);
    CHECK_INT(trusting("ca.pem", "plain.test", NULL, "plain"), 0);
    CHECK_INT(trusting("ca.pem", "any.test", NULL, "any.test"), 0);
    CHECK_INT(trusting("ca.pem", "localhost", "chain.pem", "deep"), 0);
    CHECK_INT(trusting("ca.pem", "localhost", NULL, "deep"), TCPSRV_ETLS - 62);
}

/* One that is no authority is trusted for itself, and vouches for none (RFC 5280 4.2.1.9). */
static void only_an_authority_vouches_for_others(void) {
    int client;
    CHECK_INT(trusting("ec.pem", "localhost", NULL, "ec"), 0);
    CHECK_INT(trusting("ec.pem", "minor.test", NULL, "minor"), TCPSRV_ETLS - 62);
    CHECK_INT(trusting("ec.pem", "minor.test", "minor-chain.pem", "minor"), TCPSRV_ETLS - 58);
    CHECK_INT(trusting("ca.pem", "minor.test", "minor-chain.pem", "minor"), TCPSRV_ETLS - 58);
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 58),
              "certificate was issued by one that is no authority");
    CHECK_INT(trusting("minor.pem", "minor.test", NULL, "minor"), 0);
    CHECK_INT(showing(TCPSRV_TLS_REQUIRED, "minor", &client), TCPSRV_ETLS - 62);
}

/* A server that is refused hears why: BearSSL itself would say nothing. */
static void a_server_hears_in_an_alert_why_it_is_refused(void) {
    trusting("ca.pem", "elsewhere.test", NULL, "ec");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 42);
    trusting("ca.pem", "127.0.0.2", NULL, "ec");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 42);
    trusting("ca.pem", "minor.test", "minor-chain.pem", "minor");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 42);
    trusting("ca.pem", "alice.test", NULL, "alice");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 43);
    trusting("ca.pem", "localhost", NULL, "expired");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 45);
    trusting("other-ca.pem", "localhost", NULL, "ec");
    CHECK_INT(heard, TCPSRV_ETLS - 256 - 48);
}

/* The peer's alerts, those of TLS 1.3 among them: each is named. */
static void every_alert_of_a_peer_has_a_text(void) {
    tcpsrv_tls *client = client_tls(NULL);
    unsigned char record[7] = { 21, 3, 3, 0, 2, 2, 0 };
    char expected[40];
    int number, named = 0;
    for (number = 1; number < 256; number++) { /* 0 is close_notify */
        tcpsrv__engine *engine = engine_new(client, 1, "localhost");
        tcpsrv__engine_took(engine, next_flight(engine));
        record[6] = (unsigned char)number;
        CHECK_INT(tcpsrv__engine_feed(engine, record, sizeof record), sizeof record);
        CHECK_INT(engine->error, TCPSRV_ETLS - 256 - number);
        snprintf(expected, sizeof expected, "peer sent alert %d (", number);
        if (strcmp(tcpsrv_strerror(engine->error), "peer sent a TLS alert") != 0) {
            CHECK(strncmp(tcpsrv_strerror(engine->error), expected, strlen(expected)) == 0);
            named++;
        }
        tcpsrv__engine_free(engine);
    }
    CHECK_INT(named, 22);
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 256 - 42), "peer sent alert 42 (bad certificate)");
    CHECK_STR(tcpsrv_strerror(TCPSRV_ETLS - 256 - 116),
              "peer sent alert 116 (certificate required)");
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(client);
}

static void a_host_that_is_an_address_must_be_in_the_certificate(void) {
    CHECK_INT(trusting("ca.pem", "127.0.0.1", NULL, "ec"), 0);
    CHECK_INT(trusting("ca.pem", "::1", NULL, "ec"), 0);
    CHECK_INT(trusting("ca.pem", "127.0.0.2", NULL, "ec"), TCPSRV_ETLS - 56);
    CHECK_INT(trusting("ca.pem", "127.0.0.1", NULL, "rsa"), TCPSRV_ETLS - 56);
}

static void no_verify_takes_any_certificate_and_says_so(void) {
    CHECK_INT(trusting(NULL, "elsewhere.test", NULL, "ec"), 0);
    CHECK_INT(trusting(NULL, "localhost", NULL, "expired"), 0);
    CHECK_INT(trusting(NULL, "localhost", NULL, "rsa"), 0);
}

static void the_systems_bundle_is_what_a_client_trusts_by_default(void) {
    tcpsrv_tls *client;
    config made;
    need_certificates();
    setenv("SSL_CERT_FILE", file("ca.pem"), 1);
    config_init(&made, "", "");
    client = config_make(&made);
    CHECK_INT(client->anchor_count, 1);
    tcpsrv_tls_free(client);
    setenv("SSL_CERT_FILE", file("nofile.pem"), 1);
    CHECK(!tcpsrv_tls_new(&made.options));
    CHECK(strstr(tcpsrv_last_error(), "nofile.pem: No such file or directory"));
    unsetenv("SSL_CERT_FILE");
}

enum { BULK = 8 << 20 };
static char bulk[BULK];

/* ---- engines: the end ------------------------------------------------------------------------ */

static void close_notify_ends_both_sides_also_with_unread_plaintext(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    duplex pair;
    char got[64];
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    CHECK_INT(tcpsrv__engine_write(pair.client, "unread", 6), 6);
    tcpsrv__engine_flush(pair.client);
    carry(&pair, pair.client, pair.server);
    CHECK(state(pair.server) & TCPSRV__ENGINE_HAS_PLAIN);
    tcpsrv__engine_close(pair.server);
    CHECK(state(pair.server) & TCPSRV__ENGINE_HAS_OUT);
    carry(&pair, pair.server, pair.client);
    CHECK(tcpsrv__engine_has_all(pair.client)); /* though its answer is not out yet */
    CHECK(!(state(pair.client) & TCPSRV__ENGINE_ENDED));
    exchange(&pair);
    CHECK_INT(tcpsrv__engine_read(pair.client, got, sizeof got), 0);
    CHECK(state(pair.client) & TCPSRV__ENGINE_ENDED);
    CHECK(state(pair.server) & TCPSRV__ENGINE_ENDED);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* Which would end in more computing, and has ended in injected plaintext (CVE-2009-3555). */
static void a_renegotiation_is_refused_on_both_sides(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    duplex pair;
    int by_client;
    for (by_client = 0; by_client < 2; by_client++) {
        tcpsrv__engine *asks, *refuses;
        duplex_open(&pair, client, "localhost", server);
        asks = by_client ? pair.client : pair.server;
        refuses = by_client ? pair.server : pair.client;
        exchange(&pair);
        both_are_done(&pair);
        br_ssl_engine_remove_flags(asks->core, BR_OPT_NO_RENEGOTIATION);
        CHECK(br_ssl_engine_renegotiate(asks->core));
        exchange(&pair);
        CHECK_INT(asks->error, TCPSRV_ETLS - 256 - 100); /* no_renegotiation */
        CHECK_INT(refuses->error, 0);
        duplex_close(&pair);
    }
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

static void a_tampered_record_is_refused(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    unsigned char record[256];
    const unsigned char *out;
    size_t size;
    duplex pair;
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    tcpsrv__engine_write(pair.client, "text", 4);
    tcpsrv__engine_flush(pair.client);
    out = tcpsrv__engine_peek(pair.client, &size);
    memcpy(record, out, size);
    record[size - 1] ^= 1;
    tcpsrv__engine_feed(pair.server, record, size);
    CHECK_INT(pair.server->error, TCPSRV_ETLS - BR_ERR_BAD_MAC);
    CHECK_INT(tcpsrv__engine_read(pair.server, (char *)record, sizeof record), 0);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* A record that goes out in parts may go on with the bytes of an alert that has no version. */
static void what_is_left_of_a_record_goes_out_as_it_is(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    const unsigned char *out;
    size_t size, at = 0;
    duplex pair;
    int n = 0;
    memset(bulk, 'x', 16000);
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    while (!at) {
        CHECK(n++ < 2000); /* one record in four has them */
        CHECK_INT(tcpsrv__engine_write(pair.client, bulk, 16000), 16000);
        tcpsrv__engine_flush(pair.client);
        out = tcpsrv__engine_peek(pair.client, &size);
        for (at = 5; at + 7 < size && (out[at] != 21 || out[at + 1] != 0); at++) continue;
        at = at + 7 < size ? at : 0;
        tcpsrv__engine_took(pair.client, at ? at : size);
    }
    out = tcpsrv__engine_peek(pair.client, &size);
    CHECK(out[0] == 21 && out[1] == 0);
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* Hellos with some bytes changed, a live session behind many of them: nothing crashes, and none
   ends up in a finished handshake. */
static void mutated_hellos_crash_nothing(void) {
    static const char *const names[] = { "h2", "http/1.1", NULL };
    tcpsrv_tls *server, *client;
    br_ssl_session_parameters session;
    unsigned char hello[2048], changed[2048];
    const unsigned char *out;
    size_t size, reply_size;
    char reply[16];
    unsigned seed = 12345, i, k;
    duplex pair;
    config made;
    config_init(&made, "ec", "");
    made.options.alpn = names;
    server = config_make(&made);
    config_init(&made, "", NULL);
    made.options.alpn = names;
    client = config_make(&made);
    session_make(client, "localhost", server, &session);
    duplex_open(&pair, client, "localhost", server);
    session_offer(&pair, "localhost", &session);
    CHECK_INT(tcpsrv__engine_wake(pair.client), 0);
    out = tcpsrv__engine_peek(pair.client, &size);
    memcpy(hello, out, size);
    for (i = 0; i < 1000; i++) {
        memcpy(changed, hello, size);
        for (k = 0; k <= i % 5; k++) {
            seed = seed * 1103515245u + 12345u;
            changed[(i % 3 ? 43 : 0) + (seed >> 8) % (size - 43)] = (unsigned char)(seed >> 24);
        }
        answer_to(server, changed, size - (i % 7 == 0 ? seed % 20 : 0), reply, &reply_size);
    }
    duplex_close(&pair);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
}

static void every_failing_allocation_of_a_handshake_is_survived(void) {
    tcpsrv_tls *client = client_tls("ca.pem"), *server = server_tls("ec");
    int64_t n;
    int ok = 0;
    for (n = 1; !ok; n++) {
        tcpsrv__engine *ends[2];
        size_t size;
        const unsigned char *out;
        int err, i, turns;
        CHECK(n < 200);
        test_fail_alloc_at = n;
        err = tcpsrv__engine_new(client, 1, "localhost", &pool, &ends[0]);
        if (!err) err = tcpsrv__engine_new(server, 0, NULL, &pool, &ends[1]);
        else ends[1] = NULL;
        for (turns = 0; !err && turns < 10; turns++)
            for (i = 0; i < 2 && !err; i++) {
                err = tcpsrv__engine_wake(ends[i]);
                if (!err) err = tcpsrv__engine_wake(ends[!i]);
                while (!err && (out = tcpsrv__engine_peek(ends[i], &size)) != NULL)
                    tcpsrv__engine_took(ends[i], tcpsrv__engine_feed(ends[!i], out, size));
                if (!err) err = ends[0]->error ? ends[0]->error : ends[1]->error;
            }
        ok = !err && test_fail_alloc_at > 0;
        test_fail_alloc_at = 0;
        if (!err) CHECK(ends[0]->done && ends[1]->done);
        tcpsrv__engine_free(ends[0]);
        tcpsrv__engine_free(ends[1]);
        tcpsrv__records_free(&pool);
    }
    CHECK(n > 5);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
}

/* ---- streams --------------------------------------------------------------------------------- */

static char log_lines[2000];

static void keep_log(int level, const char *line, void *user) {
    (void)user;
    snprintf(log_lines + strlen(log_lines), sizeof log_lines - strlen(log_lines), "%d %s\n", level,
             line);
}

typedef struct service {            /* a server on the thread's loop, and what clients need */
    tcpsrv *server;
    tcpsrv_tls *tls, *client_tls;
    tcpsrv_options options;
    int port;
} service;

static void service_init(service *made, tcpsrv_stream_fn *handler, tcpsrv_stream_fn *callback) {
    memset(made, 0, sizeof *made);
    made->tls = server_tls("ec");
    made->client_tls = client_tls("ca.pem");
    made->options.handle_stream = handler;
    made->options.on_stream = callback;
    made->options.log = keep_log;
    made->options.tls = made->tls;
}

static void service_start(service *made) {
    made->server = tcpsrv_new(&made->options);
    CHECK(made->server);
    CHECK_INT(tcpsrv_listen(made->server, 0, "127.0.0.1"), 0);
    made->port = tcpsrv_port(made->server, 0);
}

static void service_open(service *made, tcpsrv_stream_fn *handler, tcpsrv_stream_fn *callback) {
    service_init(made, handler, callback);
    service_start(made);
}

static void service_close(service *made) {
    tcpsrv_free(made->server);
    CHECK_INT(tcpsrv_loop_free(tcpsrv_loop_default()), 0);
    tcpsrv_tls_free(made->tls);
    tcpsrv_tls_free(made->client_tls);
}

static tcpsrv_stream *dial(const service *to, tcpsrv_tls *tls) {
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    memset(&options, 0, sizeof options);
    options.host = "127.0.0.1";
    options.port = to->port;
    options.timeout_ms = 20000;
    options.tls = tls;
    stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
    if (!stream) printf("    %s\n", tcpsrv_last_error());
    CHECK(stream);
    return stream;
}

/* A socket of the test's own, in which TLS is not spoken. */
static int dial_plain(const service *to) {
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)to->port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK_INT(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void turns_until(int (*done)(void)) {
    uint64_t end = test_ns() + 20000000000u;
    while (!done()) {
        CHECK(test_ns() < end);
        CHECK_INT(tcpsrv_loop_poll(tcpsrv_loop_default(), 50), 0);
    }
}

static int handler_result, handlers_done;

static int has_handler_ended(void) {
    return handlers_done > 0;
}

static int ended(int result) {
    handler_result = result;
    handlers_done++;
    return result;
}

static int echo_lines(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return ended(err);
}

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    if (err || tcpsrv_write(stream, line.data, line.size) != 0) {
        ended(err);
        tcpsrv_close(stream);
        return;
    }
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user), 0);
}

static int echo_with_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user);
}

static void talk_lines(tcpsrv_stream *stream) {
    tcpsrv_bytes line;
    CHECK_INT(tcpsrv_write(stream, "one\ntwo\n", 8), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    CHECK_MEM(line.data, line.size, "one\n");
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    CHECK_MEM(line.data, line.size, "two\n");
}

static void lines_come_back_from(tcpsrv_stream_fn *handler, tcpsrv_stream_fn *callback) {
    service here;
    tcpsrv_stream *stream;
    service_open(&here, handler, callback);
    stream = dial(&here, here.client_tls);
    talk_lines(stream);
    talk_lines(stream);
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_EOF);
    CHECK_STR(log_lines, "");
    service_close(&here);
}

static void a_handler_echoes_over_tls(void) {
    lines_come_back_from(echo_lines, NULL);
}

static void callbacks_echo_over_tls(void) {
    lines_come_back_from(NULL, echo_with_callbacks);
}

/* The engine as such sends no data before its handshake is over: a record by its keys. */
static size_t seal(tcpsrv__engine *engine, const char *text, unsigned char *record) {
    const br_sslrec_out_class **keys = &engine->core->out.vtable;
    unsigned char room[256], *sealed;
    size_t begin = 5, end = sizeof room, size = strlen(text); /* behind the record's head */
    (*keys)->max_plaintext(keys, &begin, &end);
    memcpy(room + begin, text, size);
    sealed = (*keys)->encrypt(keys, 23, BR_TLS12, room + begin, &size);
    memcpy(record, sealed, size);
    return size;
}

static int hand_fd;

static int has_hand_input(void) {
    char byte;
    return recv(hand_fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0;
}

/* What the server says next goes into the engine. */
static void hand_feed(tcpsrv__engine *engine) {
    unsigned char data[2048];
    ssize_t n;
    turns_until(has_hand_input);
    n = recv(hand_fd, data, sizeof data, 0);
    CHECK(n > 0);
    CHECK_INT(tcpsrv__engine_feed(engine, data, (size_t)n), n);
}

/* RFC 7918: a client may send before it has the server's Finished. BearSSL takes no data before its
   own Finished is out. */
static void data_right_behind_a_clients_finished_is_answered(void) {
    unsigned char flight[512];
    char answer[16];
    size_t size, got = 0;
    tcpsrv__engine *engine;
    service here;
    service_open(&here, echo_lines, NULL);
    hand_fd = dial_plain(&here);
    engine = engine_new(here.client_tls, 1, "localhost");
    size = next_flight(engine);
    memcpy(flight, tcpsrv__engine_peek(engine, &size), size);
    tcpsrv__engine_took(engine, size);
    CHECK_INT(send(hand_fd, flight, size, 0), size);
    hand_feed(engine);
    memcpy(flight, tcpsrv__engine_peek(engine, &size), size);
    tcpsrv__engine_took(engine, size);
    size += seal(engine, "early\n", flight + size);
    CHECK_INT(send(hand_fd, flight, size, 0), size);
    while (got < 6 && !engine->error) {
        hand_feed(engine);
        got += tcpsrv__engine_read(engine, answer + got, sizeof answer - got);
    }
    CHECK_MEM(answer, got, "early\n");
    CHECK_INT(handlers_done, 0);
    tcpsrv__engine_free(engine);
    tcpsrv__records_free(&pool);
    close(hand_fd);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETLS_TRUNCATED);
    service_close(&here);
}

static int closes;
static int close_result;
static size_t close_unsent;

static void on_closed(tcpsrv_stream *stream, int result, size_t unsent, void *arg) {
    (void)stream, (void)arg;
    closes++;
    close_result = result;
    close_unsent = unsent;
}

static int has_closed(void) {
    return closes > 0;
}

static int say_goodbye(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_on_close(stream, on_closed, NULL), 0);
    return ended(tcpsrv_write(stream, "goodbye", 7));
}

/* A peer that neither answers close_notify nor closes: it is not waited for, but for the moment
   that its last bytes may take. */
static void a_close_that_is_not_answered_ends(void) {
    unsigned char data[2048];
    const unsigned char *out;
    char got[16];
    tcpsrv__engine *engine;
    size_t size, at;
    ssize_t n;
    service here;
    service_open(&here, say_goodbye, NULL);
    hand_fd = dial_plain(&here);
    engine = engine_new(here.client_tls, 1, "localhost");
    while (!tcpsrv__engine_has_all(engine)) {
        while ((out = tcpsrv__engine_peek(engine, &size)) != NULL) {
            CHECK_INT(send(hand_fd, out, size, 0), size);
            tcpsrv__engine_took(engine, size);
        }
        turns_until(has_hand_input);
        n = recv(hand_fd, data, sizeof data, 0);
        CHECK(n > 0);
        for (at = 0; at < (size_t)n; at += size) {
            size = tcpsrv__engine_feed(engine, data + at, (size_t)n - at);
            if (!size) CHECK_INT(tcpsrv__engine_read(engine, got, sizeof got), 7);
        }
    }
    turns_until(has_closed); /* within 20 s */
    CHECK_INT(close_result, 0);
    CHECK_MEM(got, 7, "goodbye");
    tcpsrv__engine_free(engine);
    tcpsrv__records_free(&pool);
    close(hand_fd);
    service_close(&here);
}

static int64_t find_five(const char *data, size_t size, void *arg) {
    (void)arg;
    return size && data[0] == 'f' ? 5 : size ? -1 : 0;
}

static int read_everything(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    regex_t regex;
    char into[8];
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_await(stream, tcpsrv_until_mem("\0\0", 2, 0), &got), 0);
    CHECK(got.size == 5 && memcmp(got.data, "abc\0\0", 5) == 0);
    CHECK_INT(tcpsrv_read_bytes(stream, 4, &got), 0);
    CHECK_MEM(got.data, got.size, "four");
    CHECK_INT(tcpsrv_read_into(stream, into, sizeof into), 0);
    CHECK_MEM(into, sizeof into, "eight888");
    CHECK_INT(tcpsrv_await(stream, tcpsrv_frame(find_five, NULL, 0), &got), 0);
    CHECK_MEM(got.data, got.size, "frame");
    CHECK_INT(regcomp(&regex, "[0-9]+;", REG_EXTENDED), 0);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_until_regex(&regex, 0), &got), 0);
    CHECK_MEM(got.data, got.size, "number 42;");
    regfree(&regex);
    CHECK_INT(tcpsrv_read_some(stream, 3, &got), 0);
    CHECK_MEM(got.data, got.size, "som");
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &got), 0);
    CHECK_MEM(got.data, got.size, "e and the rest");
    return ended(0);
}

static void every_read_value_works_over_tls(void) {
    static const char text[] = "abc\0\0foureight888framenumber 42;some and the rest";
    service here;
    tcpsrv_stream *stream;
    size_t i;
    service_open(&here, read_everything, NULL);
    stream = dial(&here, here.client_tls);
    for (i = 0; i < sizeof text - 1; i++) { /* a record for each byte */
        CHECK_INT(tcpsrv_write(stream, text + i, 1), 0);
        CHECK_INT(tcpsrv_flush(stream), 0);
    }
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, 0);
    service_close(&here);
}


static int send_bulk(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int err = tcpsrv_write(stream, bulk, BULK / 2);
    (void)peer, (void)user;
    if (!err) err = tcpsrv_write(stream, bulk + BULK / 2, BULK / 2);
    return ended(err);
}

static void a_large_write_arrives_whole_and_its_last_byte_too(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    size_t n = 0, i;
    for (i = 0; i < BULK; i++) bulk[i] = (char)(i % 251 + i / 65521);
    service_open(&here, send_bulk, NULL);
    stream = dial(&here, here.client_tls);
    while (n < BULK) {
        CHECK_INT(tcpsrv_read_some(stream, 100000, &got), 0);
        CHECK(memcmp(got.data, bulk + n, got.size) == 0);
        n += got.size;
    }
    CHECK_INT(tcpsrv_read_some(stream, 0, &got), TCPSRV_EOF);
    CHECK_INT(handler_result, 0);
    CHECK_INT(handlers_done, 1);
    tcpsrv_close(stream);
    service_close(&here);
}

static int take_bulk(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    char *memory = (char *)malloc(BULK);
    int err = tcpsrv_read_into(stream, memory, BULK);
    (void)peer, (void)user;
    if (!err) CHECK(memcmp(memory, bulk, BULK) == 0);
    free(memory);
    if (!err) err = tcpsrv_write(stream, "thanks", 6);
    return ended(err);
}

static void a_large_upload_arrives_whole(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    size_t i, n = 0;
    int err;
    for (i = 0; i < BULK; i++) bulk[i] = (char)(i % 247 + i / 65521);
    service_open(&here, take_bulk, NULL);
    stream = dial(&here, here.client_tls);
    while (n < BULK) {
        err = tcpsrv_write(stream, bulk + n, 65536);
        if (err == TCPSRV_EBUFFULL) CHECK_INT(tcpsrv_flush(stream), 0);
        else CHECK_INT(err, 0);
        if (!err) n += 65536;
    }
    CHECK_INT(tcpsrv_read_bytes(stream, 6, &got), 0);
    CHECK_MEM(got.data, got.size, "thanks");
    tcpsrv_close(stream);
    service_close(&here);
}

static int send_file(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int fd = open(file("ec.pem"), O_RDONLY), err;
    (void)peer, (void)user;
    CHECK(fd >= 0);
    err = tcpsrv_sendfile(stream, fd, 2, 300);
    close(fd);
    return ended(err);
}

static void a_file_goes_encrypted(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    service_open(&here, send_file, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &got), 0);
    CHECK_INT(got.size, 300);
    CHECK(memcmp(got.data, contents("ec.pem") + 2, 300) == 0);
    tcpsrv_close(stream);
    service_close(&here);
}

/* ---- streams: the handshake ------------------------------------------------------------------ */

static int look_around(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_tls_info info;
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_get_tls_info(stream, &info), -ENOTCONN); /* it has not begun */
    CHECK_INT(tcpsrv_write(stream, "queued ", 7), 0);
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_get_tls_info(stream, &info), 0);
    CHECK_STR(info.version, "TLSv1.2");
    CHECK_STR(info.alpn, "h2");
    CHECK_STR(info.server_name, "localhost");
    CHECK_INT(info.has_peer, 1);
    CHECK_INT(info.verified, 1);
    CHECK_STR(info.peer_name, "alice");
    CHECK_STR(info.peer_dns, "alice.test");
    CHECK_INT(tcpsrv_start_tls(stream, NULL, NULL), -EALREADY);
    CHECK_INT(tcpsrv_shutdown(stream), -ENOTSUP);
    return ended(tcpsrv_write(stream, "and ready", 9));
}

static void check_digest(const unsigned char *digest, const char *name) {
    unsigned char whole[8192], own[32];
    FILE *from = fopen(file(name), "rb");
    br_sha256_context sha;
    CHECK(from);
    br_sha256_init(&sha);
    br_sha256_update(&sha, whole, fread(whole, 1, sizeof whole, from));
    br_sha256_out(&sha, own);
    fclose(from);
    CHECK(memcmp(digest, own, sizeof own) == 0);
}

static void a_handler_begins_before_the_handshake_and_learns_who_is_there(void) {
    static const char *const protocols[] = { "h2", NULL };
    service here;
    config made;
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    tcpsrv_tls_info info;
    tcpsrv_bytes got;
    service_init(&here, look_around, NULL);
    tcpsrv_tls_free(here.tls);
    tcpsrv_tls_free(here.client_tls);
    config_init(&made, "ec", "ca.pem");
    made.options.client_certificates = TCPSRV_TLS_REQUIRED;
    made.options.alpn = protocols;
    here.options.tls = here.tls = config_make(&made);
    config_init(&made, "alice", "ca.pem");
    made.options.alpn = protocols;
    here.client_tls = config_make(&made);
    service_start(&here);
    memset(&options, 0, sizeof options);
    options.host = "127.0.0.1";
    options.port = here.port;
    options.tls = here.client_tls;
    options.tls_name = "localhost";
    stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
    CHECK(stream);
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_get_tls_info(stream, &info), 0);
    CHECK_STR(info.peer_name, "localhost");
    check_digest(info.peer_sha256, "ec.der");
    CHECK_STR(info.suite, strstr(info.suite, "AES") ? "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
                                      : "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256");
    CHECK_INT(info.verified, 1);
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &got), 0);
    CHECK_MEM(got.data, got.size, "queued and ready");
    tcpsrv_close(stream);
    service_close(&here);
}

static int close_at_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    tcpsrv_close(stream);
    return ended(0);
}

static void a_close_before_the_handshake_sends_nothing(void) {
    service here;
    char byte;
    int fd;
    service_open(&here, close_at_once, NULL);
    fd = dial_plain(&here);
    turns_until(has_handler_ended);
    tcpsrv_loop_poll(tcpsrv_loop_default(), 0);
    CHECK_INT(read(fd, &byte, 1), 0);
    close(fd);
    service_close(&here);
}

static int say_and_leave(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    return ended(tcpsrv_write(stream, "hello and goodbye", 17));
}

static int say_and_close(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    say_and_leave(stream, peer, user);
    tcpsrv_close(stream);
    return 0;
}

/* Its close waits for the handshake, for the words, and then says so. */
static void a_handler_may_be_gone_before_the_handshake(void) {
    int callbacks;
    for (callbacks = 0; callbacks < 2; callbacks++) {
        service here;
        tcpsrv_stream *stream;
        tcpsrv_bytes got;
        service_open(&here, callbacks ? NULL : say_and_leave, callbacks ? say_and_close : NULL);
        stream = dial(&here, here.client_tls);
        CHECK_INT(tcpsrv_read_until_close(stream, 0, &got), 0);
        CHECK_MEM(got.data, got.size, "hello and goodbye");
        tcpsrv_close(stream);
        service_close(&here);
    }
}

static void a_plain_client_ends_its_stream_and_is_logged_with_its_address(void) {
    service here;
    tcpsrv_stats stats;
    int fd;
    service_open(&here, echo_lines, NULL);
    fd = dial_plain(&here);
    CHECK_INT(write(fd, "GET / HTTP/1.1\r\n\r\n", 18), 18);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETLS_PLAIN);
    CHECK(strncmp(log_lines, "2 connection from 127.0.0.1:", 28) == 0);
    CHECK(strstr(log_lines, ": peer does not speak TLS\n"));
    tcpsrv_loop_poll(tcpsrv_loop_default(), 0);
    tcpsrv_get_stats(here.server, &stats);
    CHECK_INT(stats.active, 0);
    close(fd);
    service_close(&here);
}

static void a_silent_client_is_dropped_at_the_handshake_timeout(void) {
    service here;
    tcpsrv_stats stats;
    int fd;
    service_init(&here, echo_lines, NULL);
    here.options.handshake_timeout_ms = 50;
    service_start(&here);
    fd = dial_plain(&here);
    CHECK_INT(write(fd, "\x16\x03\x01", 3), 3);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETIMEDOUT);
    CHECK(strstr(log_lines, "2 TLS handshake timed out after 50 ms, connection from 127.0.0.1:"));
    tcpsrv_get_stats(here.server, &stats);
    CHECK_INT(stats.timeouts_handshake, 1);
    close(fd);
    service_close(&here);
}

static void a_connection_without_randomness_says_so_and_the_next_one_works(void) {
    unsigned char hello[2048];
    size_t size;
    service here;
    tcpsrv_stream *stream;
    int fd;
    service_open(&here, echo_lines, NULL);
    size = hello_of(here.client_tls, "localhost", hello);
    no_random = 1;
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_wait_handshake(stream), NO_RANDOM);
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    handlers_done = 0;
    log_lines[0] = 0;
    fd = dial_plain(&here);
    CHECK_INT(send(fd, hello, size, 0), size);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, NO_RANDOM);
    CHECK(strncmp(log_lines, "2 connection from 127.0.0.1:", 28) == 0);
    CHECK(strstr(log_lines, ": no randomness from the system\n"));
    close(fd);
    no_random = 0;
    stream = dial(&here, here.client_tls);
    talk_lines(stream);
    tcpsrv_close(stream);
    tcpsrv__records_free(&pool);
    service_close(&here);
}

static void a_server_that_is_not_trusted_fails_the_clients_first_read(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_tls *other;
    tcpsrv_bytes got;
    service_open(&here, echo_lines, NULL);
    other = client_tls("other-ca.pem");
    stream = dial(&here, other);
    CHECK_INT(tcpsrv_write(stream, "secret\n", 7), 0);
    CHECK_INT(tcpsrv_read_some(stream, 0, &got), TCPSRV_ETLS - 62);
    CHECK(strstr(tcpsrv_last_error(), ": certificate chain leads to no trusted root"));
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETLS - 256 - 48);
    CHECK(strstr(log_lines, "peer sent alert 48"));
    tcpsrv_tls_free(other);
    service_close(&here);
}

static void a_host_name_is_needed_to_verify(void) {
    tcpsrv_connect_options options;
    tcpsrv_tls *tls = client_tls("ca.pem");
    tcpsrv_options server;
    memset(&options, 0, sizeof options);
    options.path = "/nowhere";
    options.tls = tls;
    CHECK(!tcpsrv_connect(tcpsrv_loop_default(), &options));
    CHECK_STR(tcpsrv_last_error(), "a host name is needed to verify the server (or no_verify)");
    memset(&server, 0, sizeof server);
    server.handle_stream = echo_lines;
    server.tls = tls;
    CHECK(!tcpsrv_new(&server));
    CHECK_STR(tcpsrv_last_error(), "a server's TLS needs a certificate");
    tcpsrv_tls_free(tls);
    CHECK_INT(tcpsrv_loop_free(tcpsrv_loop_default()), 0);
}

static void new_certificates_serve_new_connections_and_old_ones_go_on(void) {
    service here;
    tcpsrv_stream *before, *after;
    tcpsrv_tls *renewed, *any;
    tcpsrv_tls_info info;
    service_open(&here, echo_lines, NULL);
    any = client_tls(NULL);
    before = dial(&here, any);
    talk_lines(before);
    renewed = server_tls("rsa");
    CHECK_INT(tcpsrv_set_tls(here.server, renewed), 0);
    tcpsrv_tls_free(renewed);
    CHECK_INT(tcpsrv_set_tls(here.server, any), TCPSRV_ETLS);
    after = dial(&here, any);
    talk_lines(after);
    talk_lines(before);
    CHECK_INT(tcpsrv_get_tls_info(after, &info), 0);
    CHECK_STR(info.peer_name, "b.test");
    CHECK_INT(tcpsrv_get_tls_info(before, &info), 0);
    CHECK_STR(info.peer_name, "localhost");
    CHECK_INT(info.verified, 0);
    tcpsrv_close(before);
    tcpsrv_close(after);
    tcpsrv_tls_free(any);
    service_close(&here);
}

/* A crowd at once: no turn does more of their computing than its share. */
static int one_turn(void) {
    stepped = NULL;
    steps = 0;
    return tcpsrv_loop_poll(tcpsrv_loop_default(), 100);
}

static int count_ready(tcpsrv_stream **streams, int count) {
    int i, ready = 0;
    for (i = 0; i < count; i++) ready += !streams[i]->connecting;
    return ready;
}

/* Both ends live here. */
static void handshakes_share_a_millisecond_of_each_turn(void) {
    enum { CROWD = 24 };
    tcpsrv_stream *streams[CROWD];
    service here;
    int i, turns = 0;
    service_open(&here, NULL, echo_with_callbacks);
    for (i = 0; i < CROWD; i++) streams[i] = dial(&here, here.client_tls);
    look_ns = TCPSRV__STEPS_NS;
    while (count_ready(streams, CROWD) < CROWD) {
        CHECK(turns++ < 10000);
        CHECK_INT(one_turn(), 0);
        CHECK(steps <= 1);
    }
    look_ns = 0;
    for (i = 0; i < CROWD; i++) {
        talk_lines(streams[i]);
        tcpsrv_close(streams[i]);
    }
    service_close(&here);
}

/* Each turn has time for one step and brings another client: the first ones come first. */
static void newcomers_starve_no_handshake(void) {
    enum { FIRST = 3, CROWD = 200 };
    tcpsrv_stream *streams[CROWD];
    service here;
    int i, count = 0;
    service_open(&here, NULL, echo_with_callbacks);
    while (count < FIRST) streams[count++] = dial(&here, here.client_tls);
    look_ns = TCPSRV__STEPS_NS;
    while (count_ready(streams, FIRST) < FIRST) {
        CHECK(count < CROWD);
        streams[count++] = dial(&here, here.client_tls);
        CHECK_INT(one_turn(), 0);
    }
    look_ns = 0;
    for (i = 0; i < count; i++) tcpsrv_abort(streams[i]);
    service_close(&here);
}

/* ---- streams: the end ------------------------------------------------------------------------ */

static int read_to_the_end(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    int err = tcpsrv_read_until_close(stream, 0, &got);
    (void)peer, (void)user;
    if (err) {
        CHECK_INT(tcpsrv_read_some(stream, 0, &got), 0); /* what came is still there */
        CHECK_MEM(got.data, got.size, "half a mess");
    }
    return ended(err);
}

static void an_end_without_close_notify_is_told_from_a_whole_one(void) {
    service here;
    tcpsrv_stream *stream;
    service_open(&here, read_to_the_end, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_write(stream, "half a mess", 11), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(shutdown(tcpsrv_fd(stream), SHUT_WR), 0);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETLS_TRUNCATED);
    CHECK_STR(tcpsrv_strerror(handler_result), "connection ended without close_notify");
    CHECK(strncmp(log_lines, "3 ", 2) == 0 && !strstr(log_lines, "\n0 "));
    tcpsrv_abort(stream);
    service_close(&here);
}

static int answer_without_reading(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    int err = tcpsrv_read_bytes(stream, 3, &got);
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_on_close(stream, on_closed, NULL), 0);
    if (!err) err = tcpsrv_write(stream, "enough", 6);
    return ended(err);
}

/* The engine holds plaintext that nobody will read, the socket more of it. */
static void a_close_with_unread_plaintext_ends_and_its_answer_arrives(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    memset(bulk, 'x', 50000);
    service_open(&here, answer_without_reading, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_write(stream, bulk, 50000), 0);
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &got), 0);
    CHECK_MEM(got.data, got.size, "enough");
    tcpsrv_close(stream);
    turns_until(has_closed);
    CHECK_INT(close_result, 0);
    service_close(&here);
}

static tcpsrv_stream *filled;

static int fill_and_wait(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    (void)peer, (void)user;
    filled = stream;
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_on_close(stream, on_closed, NULL), 0);
    CHECK_INT(tcpsrv_try_write(stream, bulk, BULK), 0);
    return ended(tcpsrv_read_some(stream, 0, &got));
}

static int is_filled(void) {
    return filled && filled->blocked && tcpsrv__link_of(filled)->sealed;
}

/* A client whose server has filled the connection, with a record half out. */
static tcpsrv_stream *open_and_fill(service *here) {
    tcpsrv_stream *stream;
    service_init(here, fill_and_wait, NULL);
    here->options.max_write_buffer_size = 2 * (size_t)BULK;
    service_start(here);
    stream = dial(here, here->client_tls);
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    turns_until(is_filled);
    CHECK_INT(tcpsrv__engine_wake(tcpsrv__link_of(stream)->engine), 0);
    CHECK_INT(tcpsrv__engine_wake(tcpsrv__link_of(filled)->engine), 0);
    return stream;
}

/* Whoever does not read holds up the sender, and hears all when he begins. */
static void a_late_reader_holds_up_the_sender_and_gets_all(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    size_t n = 0, i;
    for (i = 0; i < BULK; i++) bulk[i] = (char)(i % 241 + i / 65521);
    stream = open_and_fill(&here);
    for (i = 0; i < 20; i++) CHECK_INT(tcpsrv_loop_poll(tcpsrv_loop_default(), 1), 0);
    CHECK(filled->blocked && filled->out.size > BULK / 4);
    while (n < BULK) {
        CHECK_INT(tcpsrv_read_some(stream, 0, &got), 0);
        CHECK(got.size <= BULK - n && memcmp(got.data, bulk + n, got.size) == 0);
        n += got.size;
    }
    tcpsrv_close(stream);
    turns_until(has_closed);
    CHECK_INT(close_result, 0);
    service_close(&here);
}

/* While the stream waits to be told that it may send, an answer of the engine does not push out
   what is in front of it: nobody would count that as sent, or tell of it. */
static void what_was_sealed_goes_out_where_it_is_counted(void) {
    service here;
    tcpsrv_stream *stream = open_and_fill(&here);
    tcpsrv__engine *engine = tcpsrv__link_of(filled)->engine;
    size_t before, after;
    CHECK(tcpsrv__engine_peek(engine, &before));
    while (recv(tcpsrv_fd(stream), bulk, BULK, MSG_DONTWAIT) > 0) continue;
    tcpsrv__link_push_own(filled);
    CHECK(tcpsrv__engine_peek(engine, &after));
    CHECK_INT(after, before);
    CHECK(filled->owes);
    tcpsrv_abort(stream);
    turns_until(has_closed);
    service_close(&here);
}

/* The engine drops what it has sealed; the stream does not count it as sent. */
static void a_failure_with_a_record_half_out_tells_of_all_that_is_lost(void) {
    static const char junk[] = "This is no record, nor anything else that would be one.";
    service here;
    tcpsrv_stream *stream = open_and_fill(&here);
    size_t queued = filled->out.size;
    tcpsrv__engine_feed(tcpsrv__link_of(filled)->engine, (const unsigned char *)junk, sizeof junk);
    filled->blocked = 0;
    tcpsrv__output_step(&filled->source);
    turns_until(has_closed);
    CHECK(close_result < TCPSRV_ETLS && close_result > TCPSRV_ERESOLVE);
    CHECK_INT(close_unsent, queued);
    CHECK_INT(handler_result, close_result);
    tcpsrv_abort(stream);
    service_close(&here);
}

/* When the peer ends, the record under way goes out as a whole, and nothing after it. */
static void an_end_with_a_record_half_out_tells_of_no_more_than_is_lost(void) {
    service here;
    tcpsrv_stream *stream = open_and_fill(&here);
    tcpsrv__engine *engine = tcpsrv__link_of(stream)->engine;
    size_t queued = filled->out.size, sealed = tcpsrv__link_of(filled)->sealed, size;
    const unsigned char *out;
    tcpsrv__engine_close(engine);
    out = tcpsrv__engine_peek(engine, &size);
    tcpsrv__engine_feed(tcpsrv__link_of(filled)->engine, out, size);
    while (!filled->dead) {
        if (recv(tcpsrv_fd(stream), bulk, BULK, MSG_DONTWAIT) < 0) CHECK_INT(errno, EAGAIN);
        filled->blocked = 0;
        tcpsrv__output_step(&filled->source);
    }
    turns_until(has_closed);
    CHECK_INT(close_result, -EPIPE);
    CHECK_INT(close_unsent, queued - sealed);
    tcpsrv_abort(stream);
    service_close(&here);
}

static int write_too_much(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_set_timeout(stream, 0, 500), 0);
    return ended(tcpsrv_write(stream, bulk, BULK));
}

static void a_peer_that_takes_nothing_ends_a_write_at_its_timeout(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    service_open(&here, write_too_much, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_read_bytes(stream, 10, &got), 0);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETIMEDOUT);
    tcpsrv_abort(stream);
    service_close(&here);
}

static int read_with_a_timeout(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_wait_handshake(stream), 0);
    CHECK_INT(tcpsrv_set_timeout(stream, 100, 0), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &got), TCPSRV_ETIMEDOUT);
    CHECK_INT(tcpsrv_set_timeout(stream, 0, 0), 0);
    CHECK_INT(tcpsrv_write(stream, "late\n", 5), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &got), 0);
    CHECK_MEM(got.data, got.size, "part and rest\n");
    return ended(tcpsrv_write(stream, "whole\n", 6));
}

static void a_read_timeout_leaves_its_bytes_and_the_stream(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    service_open(&here, read_with_a_timeout, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_write(stream, "part ", 5), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &got), 0);
    CHECK_MEM(got.data, got.size, "late\n");
    CHECK_INT(tcpsrv_write(stream, "and rest\n", 9), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &got), 0);
    CHECK_MEM(got.data, got.size, "whole\n");
    tcpsrv_close(stream);
    service_close(&here);
}

/* ---- streams: start_tls ---------------------------------------------------------------------- */

static tcpsrv_tls *upgrade;

static int upgrade_on_request(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes got;
    int err = tcpsrv_read_until(stream, "\n", 0, &got);
    (void)peer, (void)user;
    if (err) return ended(err);
    CHECK_MEM(got.data, got.size, "STARTTLS\n");
    CHECK_INT(tcpsrv_write(stream, "go ahead\n", 9), 0);
    err = tcpsrv_start_tls(stream, upgrade, NULL);
    if (err) return ended(err);
    return echo_lines(stream, peer, user);
}

static void both_sides_go_on_in_tls(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    service_init(&here, upgrade_on_request, NULL);
    here.options.tls = NULL;
    upgrade = here.tls;
    service_start(&here);
    stream = dial(&here, NULL);
    CHECK_INT(tcpsrv_write(stream, "STARTTLS\n", 9), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &got), 0);
    CHECK_MEM(got.data, got.size, "go ahead\n");
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, NULL), TCPSRV_ETLS);
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), 0);
    talk_lines(stream);
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), -EALREADY);
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_EOF);
    service_close(&here);
}

/* What follows the request in clear would be taken for something said under encryption
   (CVE-2011-0411). */
static void start_tls_refuses_plain_data_that_came_before_it(void) {
    service here;
    tcpsrv_stream *stream;
    service_init(&here, upgrade_on_request, NULL);
    here.options.tls = NULL;
    upgrade = here.tls;
    service_start(&here);
    stream = dial(&here, NULL);
    CHECK_INT(tcpsrv_write(stream, "STARTTLS\nDELETE EVERYTHING\n", 27), 0);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_ETLS_BUFFERED);
    CHECK_STR(tcpsrv_strerror(handler_result), "plain data buffered before start_tls");
    tcpsrv_close(stream);
    service_close(&here);
}

static int leave_at_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)stream, (void)peer, (void)user;
    return 0;
}

static void start_tls_wants_a_host_name_to_verify(void) {
    service here;
    tcpsrv_stream *stream;
    service_init(&here, echo_lines, NULL);
    here.options.tls = NULL;
    service_start(&here);
    stream = dial(&here, NULL);
    talk_lines(stream);
    CHECK(tcpsrv_start_tls(stream, here.client_tls, NULL) != 0);
    CHECK_STR(tcpsrv_last_error(), "a host name is needed to verify the server (or no_verify)");
    talk_lines(stream);
    tcpsrv_abort(stream);
    service_close(&here);
}

static void never_read(tcpsrv_stream *stream, int err, tcpsrv_bytes got, void *arg) {
    (void)stream, (void)got, (void)arg;
    CHECK_INT(err, TCPSRV_ECANCELED);
}

static void start_tls_wants_a_socket_on_which_nobody_reads(void) {
    service here;
    tcpsrv_stream *stream, *pipes;
    int fds[2];
    service_init(&here, echo_lines, NULL);
    here.options.tls = NULL;
    service_start(&here);
    stream = dial(&here, NULL);
    talk_lines(stream);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), never_read, NULL), 0);
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_wait_handshake(stream), TCPSRV_EBUSY);
    tcpsrv_close(stream);
    CHECK_INT(pipe(fds), 0);
    pipes = tcpsrv_stream_from_fd(tcpsrv_loop_default(), fds[0]);
    CHECK(pipes);
    CHECK_INT(tcpsrv_start_tls(pipes, here.client_tls, "localhost"), -ENOTSOCK);
    tcpsrv_abort(pipes);
    close(fds[1]);
    service_close(&here);
}

static void start_tls_wants_a_peer_that_still_speaks(void) {
    service here;
    tcpsrv_stream *stream;
    tcpsrv_bytes got;
    service_init(&here, leave_at_once, NULL);
    here.options.tls = NULL;
    service_start(&here);
    stream = dial(&here, NULL);
    CHECK_INT(tcpsrv_read_some(stream, 0, &got), TCPSRV_EOF);
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), TCPSRV_EOF);
    tcpsrv_close(stream);
    service_close(&here);
}

static void a_failed_start_tls_leaves_the_stream_as_it_was(void) {
    service here;
    tcpsrv_stream *stream;
    int err = -1, n;
    service_init(&here, echo_lines, NULL);
    here.options.tls = NULL;
    service_start(&here);
    stream = dial(&here, NULL);
    talk_lines(stream);
    no_random = 1;
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), NO_RANDOM);
    CHECK(strstr(tcpsrv_last_error(), "no randomness from the system"));
    no_random = 0;
    talk_lines(stream);
    for (n = 1; err; n++) {
        CHECK(n < 100);
        test_fail_alloc_at = n;
        err = tcpsrv_start_tls(stream, here.client_tls, "localhost");
        if (err) CHECK_INT(err, -ENOMEM);
        if (err && stream->extra) CHECK_INT(stream->extra->handshake_due, 0);
    }
    test_fail_alloc_at = 0;
    CHECK(n > 4);
    tcpsrv_abort(stream);
    service_close(&here);
}

static void a_stream_that_will_be_tls_is_not_half_closed(void) {
    service here;
    tcpsrv_stream *stream;
    service_open(&here, echo_lines, NULL);
    stream = dial(&here, here.client_tls);
    CHECK_INT(tcpsrv_shutdown(stream), -ENOTSUP);
    talk_lines(stream);
    CHECK_INT(tcpsrv_shutdown(stream), -ENOTSUP);
    tcpsrv_close(stream);
    service_close(&here);
}

static void a_proxy_header_comes_before_tls(void) {
    static const char header[] = "PROXY TCP4 192.0.2.7 192.0.2.8 4000 443\r\n";
    service here;
    tcpsrv_stream *stream;
    service_init(&here, echo_lines, NULL);
    here.options.proxy_protocol = TCPSRV_PROXY_REQUIRED;
    here.options.trusted = "127.0.0.0/8";
    service_start(&here);
    stream = dial(&here, NULL);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), 0);
    CHECK_INT(tcpsrv_write(stream, header, sizeof header - 1), 0);
    CHECK_INT(tcpsrv_start_tls(stream, here.client_tls, "localhost"), 0);
    talk_lines(stream);
    tcpsrv_close(stream);
    turns_until(has_handler_ended);
    CHECK_INT(handler_result, TCPSRV_EOF);
    service_close(&here);
}

static void an_end_behind_a_proxy_header_is_no_end_of_tls(void) {
    service here;
    int fd, told, i;
    service_init(&here, echo_lines, NULL);
    here.options.proxy_protocol = TCPSRV_PROXY_OPTIONAL;
    here.options.trusted = "127.0.0.0/8";
    service_start(&here);
    for (told = 0; told < 2; told++) { /* found by the first look, or told of by an event */
        handlers_done = 0;
        fd = dial_plain(&here);
        for (i = 0; told && i < 3; i++) tcpsrv_loop_poll(tcpsrv_loop_default(), 10);
        CHECK_INT(shutdown(fd, SHUT_WR), 0);
        turns_until(has_handler_ended);
        CHECK_INT(handler_result, TCPSRV_ETLS_TRUNCATED);
        close(fd);
    }
    service_close(&here);
}

/* ---- streams: memory ------------------------------------------------------------------------- */

static size_t served;

static int count_served(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    served++;
    return echo_with_callbacks(stream, peer, user);
}

/* Both ends live here: a client's engine is 400 bytes smaller than a server's. */
static void an_idle_connection_holds_at_most_six_kilobytes(void) {
    enum { CROWD = 100 };
    tcpsrv_stream *streams[CROWD];
    service here;
    int64_t before, each;
    int i;
    service_open(&here, NULL, count_served);
    streams[0] = dial(&here, here.client_tls);
    talk_lines(streams[0]);
    before = test_live_bytes;
    for (i = 1; i < CROWD; i++) {
        streams[i] = dial(&here, here.client_tls);
        talk_lines(streams[i]);
    }
    CHECK_INT(tcpsrv_loop_poll(tcpsrv_loop_default(), 0), 0);
    each = (test_live_bytes - before) / (2 * (CROWD - 1));
    if (each > 6144) printf("    %d bytes each\n", (int)each);
    CHECK(each <= 6144);
    for (i = 0; i < CROWD; i++) {
        talk_lines(streams[i]);
        tcpsrv_close(streams[i]);
    }
    service_close(&here);
}

/* From the first byte to the last, each allocation fails once: the connection may end, and nothing
   else happens; when none fails any more it works. */
static void every_failing_allocation_of_a_connection_is_survived(void) {
    int64_t n, left = 0;
    service here;
    service_open(&here, echo_lines, NULL);
    for (n = 1; left <= 0; n++) {
        tcpsrv_connect_options options;
        tcpsrv_stream *stream;
        tcpsrv_bytes got;
        int err = -ENOMEM;
        CHECK(n < 500);
        memset(&options, 0, sizeof options);
        options.host = "127.0.0.1";
        options.port = here.port;
        options.timeout_ms = 10000;
        options.tls = here.client_tls;
        handlers_done = 0;
        test_fail_alloc_at = n;
        stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
        if (stream) err = tcpsrv_write(stream, "line\n", 5);
        if (!err) err = tcpsrv_read_until(stream, "\n", 0, &got);
        left = test_fail_alloc_at;
        test_fail_alloc_at = 0;
        if (left > 0) CHECK_INT(err, 0);
        if (stream) tcpsrv_abort(stream);
        tcpsrv_loop_poll(tcpsrv_loop_default(), 0);
    }
    CHECK(n > 10);
    service_close(&here);
}

/* Whether the heap holds those bytes, which are given inverted so that they are no find. */
static int heap_holds(const unsigned char *inverted, size_t size) {
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long from = 0, to = 0;
    const unsigned char *at;
    char line[512];
    size_t i;
    if (!maps) return 0;
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "[heap]")) sscanf(line, "%lx-%lx", &from, &to);
    fclose(maps);
    for (; from + size <= to; from++) {
        at = (const unsigned char *)from;
        for (i = 0; i < size && (at[i] ^ inverted[i]) == 0xff; i++) continue;
        if (i == size) return 1;
    }
    return 0;
}

static void keys_and_secrets_are_wiped(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls(NULL);
    unsigned char key[32], secret[48];
    int seen;
    duplex pair;
    size_t i;
    for (i = 0; i < sizeof key; i++)
        key[i] = 0xff ^ br_skey_decoder_get_ec(server->pairs[0].key)->x[i];
    duplex_open(&pair, client, "localhost", server);
    exchange(&pair);
    both_are_done(&pair);
    for (i = 0; i < sizeof secret; i++)
        secret[i] = 0xff ^ pair.server->core->session.master_secret[i];
    seen = heap_holds(key, sizeof key) && heap_holds(secret, sizeof secret);
    /* sanitizers have their heap elsewhere */
    CHECK(seen || TCPSRV__ASAN || TCPSRV__TSAN || getenv("RUNNER"));
    duplex_close(&pair);
    tcpsrv_tls_free(client);
    tcpsrv_tls_free(server);
    CHECK(!heap_holds(key, sizeof key));
    CHECK(!heap_holds(secret, sizeof secret));
}

/* Two children of one process, forked after the configuration was made: their randomness is their
   own. */
static void forked_processes_have_randomness_of_their_own(void) {
    tcpsrv_tls *server = server_tls("ec"), *client = client_tls(NULL);
    unsigned char randoms[2][32];
    unsigned char hello[2048];
    size_t size = hello_of(client, "localhost", hello);
    int i;
    for (i = 0; i < 2; i++) {
        int fds[2], status;
        pid_t pid;
        CHECK_INT(pipe(fds), 0);
        pid = fork();
        if (pid == 0) {
            tcpsrv__engine *engine = engine_new(server, 0, NULL);
            const unsigned char *out;
            size_t n;
            tcpsrv__engine_wake(engine);
            tcpsrv__engine_feed(engine, hello, size);
            out = tcpsrv__engine_peek(engine, &n);
            _exit(!out || n < 43 || write(fds[1], out + 11, 32) != 32);
        }
        CHECK_INT(waitpid(pid, &status, 0), pid);
        CHECK_INT(status, 0);
        CHECK_INT(read(fds[0], randoms[i], 32), 32);
        close(fds[0]);
        close(fds[1]);
    }
    CHECK(memcmp(randoms[0], randoms[1], 32) != 0);
    tcpsrv__records_free(&pool);
    tcpsrv_tls_free(server);
    tcpsrv_tls_free(client);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(every_bad_file_is_named_with_what_is_wrong),
        TEST(a_text_that_is_cut_short_is_told_from_a_damaged_one),
        TEST(a_bad_file_of_authorities_is_named_too),
        TEST(a_file_that_may_not_be_read_is_named),
        TEST(what_stands_in_memory_is_refused_by_its_place),
        TEST(every_kind_of_key_in_every_spelling_loads),
        TEST(certificates_load_from_memory),
        TEST(doubtful_files_load_with_a_warning),
        TEST(strict_refuses_what_is_doubtful),
        TEST(bad_options_are_refused_in_words),
        TEST(every_failing_allocation_of_a_configuration_is_survived),
        TEST(handshakes_with_every_kind_of_key),
        TEST(handshake_and_data_one_byte_at_a_time_with_records_given_back),
        TEST(a_hello_comes_in_pieces_with_something_behind_it),
        TEST(records_are_kept_while_a_part_of_one_is_there),
        TEST(the_short_records_of_a_handshake_leave_together),
        TEST(bulk_data_keeps_its_bytes_and_order),
        TEST(server_name_chooses_the_certificate),
        TEST(a_client_gets_the_certificate_it_can_read),
        TEST(a_client_with_weak_suites_alone_is_refused),
        TEST(a_client_gets_the_certificate_whose_signatures_it_can_read),
        TEST(the_suite_that_the_servers_processor_does_fast_comes_first),
        TEST(on_sni_decides_and_refuses_with_alert_112),
        TEST(plain_text_on_a_tls_port_is_named_as_such),
        TEST(a_plain_server_is_named_by_the_client),
        TEST(old_and_new_versions_get_a_well_formed_alert_70),
        TEST(an_old_version_in_many_records_gets_a_well_formed_alert_too),
        TEST(a_hello_in_many_records_still_asks_for_its_name),
        TEST(each_kind_of_key_signs_with_a_hash_of_its_own),
        TEST(without_randomness_no_handshake_begins),
        TEST(a_handshake_needs_no_descriptor),
        TEST(a_session_resumes_for_its_name_and_its_time),
        TEST(the_session_cache_is_bounded_and_can_be_off),
        TEST(a_resumed_session_with_foreign_alpn_crashes_nothing),
        TEST(the_application_protocol_is_the_servers_choice),
        TEST(optional_client_certificates_are_verified_all_the_same),
        TEST(required_client_certificates_are_required_and_verified),
        TEST(a_required_certificate_that_is_missing_is_named),
        TEST(a_certificate_without_its_key_proves_nothing),
        TEST(clients_are_told_whose_certificates_will_do),
        TEST(a_resumed_session_keeps_the_clients_identity),
        TEST(a_client_verifies_chain_host_time_and_usage),
        TEST(only_an_authority_vouches_for_others),
        TEST(a_server_hears_in_an_alert_why_it_is_refused),
        TEST(every_alert_of_a_peer_has_a_text),
        TEST(a_host_that_is_an_address_must_be_in_the_certificate),
        TEST(no_verify_takes_any_certificate_and_says_so),
        TEST(the_systems_bundle_is_what_a_client_trusts_by_default),
        TEST(close_notify_ends_both_sides_also_with_unread_plaintext),
        TEST(a_renegotiation_is_refused_on_both_sides),
        TEST(a_tampered_record_is_refused),
        TEST(what_is_left_of_a_record_goes_out_as_it_is),
        TEST(mutated_hellos_crash_nothing),
        TEST(every_failing_allocation_of_a_handshake_is_survived),
        TEST(a_handler_echoes_over_tls),
        TEST(callbacks_echo_over_tls),
        TEST(data_right_behind_a_clients_finished_is_answered),
        TEST(a_close_that_is_not_answered_ends),
        TEST(every_read_value_works_over_tls),
        TEST(a_large_write_arrives_whole_and_its_last_byte_too),
        TEST(a_large_upload_arrives_whole),
        TEST(a_file_goes_encrypted),
        TEST(a_handler_begins_before_the_handshake_and_learns_who_is_there),
        TEST(a_close_before_the_handshake_sends_nothing),
        TEST(a_handler_may_be_gone_before_the_handshake),
        TEST(a_plain_client_ends_its_stream_and_is_logged_with_its_address),
        TEST(a_silent_client_is_dropped_at_the_handshake_timeout),
        TEST(a_connection_without_randomness_says_so_and_the_next_one_works),
        TEST(a_server_that_is_not_trusted_fails_the_clients_first_read),
        TEST(a_host_name_is_needed_to_verify),
        TEST(new_certificates_serve_new_connections_and_old_ones_go_on),
        TEST(handshakes_share_a_millisecond_of_each_turn),
        TEST(newcomers_starve_no_handshake),
        TEST(an_end_without_close_notify_is_told_from_a_whole_one),
        TEST(a_close_with_unread_plaintext_ends_and_its_answer_arrives),
        TEST(a_late_reader_holds_up_the_sender_and_gets_all),
        TEST(what_was_sealed_goes_out_where_it_is_counted),
        TEST(a_failure_with_a_record_half_out_tells_of_all_that_is_lost),
        TEST(an_end_with_a_record_half_out_tells_of_no_more_than_is_lost),
        TEST(a_peer_that_takes_nothing_ends_a_write_at_its_timeout),
        TEST(a_read_timeout_leaves_its_bytes_and_the_stream),
        TEST(both_sides_go_on_in_tls),
        TEST(start_tls_refuses_plain_data_that_came_before_it),
        TEST(start_tls_wants_a_host_name_to_verify),
        TEST(start_tls_wants_a_socket_on_which_nobody_reads),
        TEST(start_tls_wants_a_peer_that_still_speaks),
        TEST(a_failed_start_tls_leaves_the_stream_as_it_was),
        TEST(a_stream_that_will_be_tls_is_not_half_closed),
        TEST(a_proxy_header_comes_before_tls),
        TEST(an_end_behind_a_proxy_header_is_no_end_of_tls),
        TEST(an_idle_connection_holds_at_most_six_kilobytes),
        TEST(every_failing_allocation_of_a_connection_is_survived),
        TEST(keys_and_secrets_are_wiped),
        TEST(forked_processes_have_randomness_of_their_own),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}

#else

static void tls_is_tested(void) {
    SKIP("no bearssl.h here");
}

int main(int argc, char **argv) {
    static const test_case tests[] = { TEST(tls_is_tested) };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}

#endif
