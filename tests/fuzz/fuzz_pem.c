/* What a certificate file, a key file or a file of authorities may hold. Run by tests/fuzz.sh. */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

static void ignore(int level, const char *line, void *user) {
    (void)level, (void)line, (void)user;
}

/* The parts of a certificate, from bytes that are no PEM: what a peer sends. */
static void read_der(const uint8_t *data, size_t size) {
    tcpsrv__certificate_parts parts;
    tcpsrv__span list, name;
    unsigned char *der = (unsigned char *)malloc(size + 1);
    char text[65];
    if (!der) abort();
    memcpy(der, data, size);
    if (tcpsrv__certificate_split(der, size, &parts) == 0) {
        tcpsrv__common_name(parts.subject, text, sizeof text);
        tcpsrv__certificate_serves(&parts, 1);
        tcpsrv__certificate_rsa_bits(&parts);
        if (tcpsrv__alt_names(&parts, &list) == 0)
            while (tcpsrv__alt_name_next(&list, TCPSRV__ALT_DNS, &name) == 0)
                tcpsrv__span_text(&name, text, sizeof text);
    }
    free(der);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *text = (char *)malloc(size + 1);
    tcpsrv_certificate pair;
    tcpsrv_tls_options options;
    if (!text) abort();
    memcpy(text, data, size);
    text[size] = 0;
    memset(&pair, 0, sizeof pair);
    memset(&options, 0, sizeof options);
    options.log = ignore;
    options.ca_pem = text;
    tcpsrv_tls_free(tcpsrv_tls_new(&options));
    pair.certificate_pem = text;
    options.certificates = &pair;
    options.certificate_count = 1;
    tcpsrv_tls_free(tcpsrv_tls_new(&options));
    read_der(data, size);
    free(text);
    return 0;
}
