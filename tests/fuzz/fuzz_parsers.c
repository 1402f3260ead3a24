/* What reads bytes of strangers without a stream. The first byte chooses: a PROXY header, a list of
   networks, or a request in the redis example's protocol. All input lies in blocks of its exact
   size, so that the sanitizer sees each byte read beside it. Run by tests/fuzz.sh. */
#define main redis_main
#include "../../examples/redis.c"
#undef main

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size);

static char *exact_copy(const unsigned char *bytes, size_t size) {
    char *copy = (char *)malloc(size ? size : 1);
    if (!copy) abort();
    if (size) memcpy(copy, bytes, size);
    return copy;
}

static void must(int holds) {
    if (!holds) abort();
}

/* Asked with each more byte, the end stays unknown until it is known, and is then the same. */
static void fuzz_proxy(const unsigned char *bytes, size_t size) {
    tcpsrv_address address;
    tcpsrv_bytes header;
    int64_t end = 0, whole;
    char *copy;
    size_t n;
    int known;
    for (n = 1; n <= size && !end; n++) {
        copy = exact_copy(bytes, n);
        end = tcpsrv__proxy_end(copy, n, NULL);
        free(copy);
    }
    if (end <= 0 || (size_t)end > size) return;
    copy = exact_copy(bytes, size);
    whole = tcpsrv__proxy_end(copy, size, NULL);
    free(copy);
    must(whole == end);
    copy = exact_copy(bytes, (size_t)end);
    header.data = copy;
    header.size = (size_t)end;
    known = tcpsrv__proxy_parse(header, &address);
    free(copy);
    must(known <= 1);
    if (known == 1)
        must(address.family == AF_INET || address.family == AF_INET6 || address.family == AF_UNIX);
    if (known == 1 && address.family == AF_UNIX)
        must(memchr(address.path, 0, sizeof address.path) != NULL);
}

static int fuzz_on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)stream, (void)peer, (void)user;
    return 0;
}

/* A list is taken as a whole or refused as a whole. */
static void fuzz_networks(const unsigned char *bytes, size_t size) {
    tcpsrv_options options = { 0 };
    tcpsrv *server;
    char *list = (char *)malloc(size + 1);
    if (!list) abort();
    memcpy(list, bytes, size);
    list[size] = 0;
    options.on_stream = fuzz_on_stream;
    options.proxy_protocol = TCPSRV_PROXY_REQUIRED;
    options.trusted = list;
    server = tcpsrv_new(&options);
    tcpsrv_free(server);
    free(list);
}

/* As tcpsrv_frame asks: with the first bytes, then with what has come, never with less than the
   length that was given. */
static int64_t redis_ask(client *c, const unsigned char *bytes, size_t size, size_t step) {
    int64_t end = 0;
    size_t n = step;
    char *copy;
    c->count = c->at = 0;
    c->missing = -1;
    while (!end || (end > 0 && (size_t)end > n && n < size)) {
        if (n > size) n = size;
        if ((size_t)end <= n) {
            copy = exact_copy(bytes, n);
            end = find_end(copy, n, c);
            free(copy);
        }
        if (n == size) break;
        n += step;
    }
    return end;
}

static void fuzz_redis(const unsigned char *bytes, size_t size) {
    client c;
    int64_t end, again;
    size_t i;
    char *copy;
    if (size < 2) return;
    memset(&c, 0, sizeof c);
    again = redis_ask(&c, bytes + 1, size - 1, 1 + bytes[0]);
    end = redis_ask(&c, bytes + 1, size - 1, size - 1);
    must((end < 0) == (again < 0) || end == 0 || again == 0 || end == again);
    if (end > 0 && (size_t)end <= size - 1) {
        must(again == end);
        copy = exact_copy(bytes + 1, (size_t)end);
        c.data = copy;
        if (*copy != '*') must(split_line(&c, (size_t)end) == 0);
        for (i = 0; i < c.count; i++) must(c.words[i].at + c.words[i].size <= (size_t)end);
        free(copy);
    }
    free(c.words);
}

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size) {
    if (!size) return 0;
    if (bytes[0] % 3 == 0) fuzz_proxy(bytes + 1, size - 1);
    if (bytes[0] % 3 == 1) fuzz_networks(bytes + 1, size - 1);
    if (bytes[0] % 3 == 2) fuzz_redis(bytes + 1, size - 1);
    return 0;
}
