/* PROXY headers: who may send them, what they say, and what becomes of those that are none. */
#include "test.h"

static tcpsrv *server;
static tcpsrv_loop *loop;
static int begun;
static char log_text[512];
static int log_lines;

static void log_line(int level, const char *line, void *user) {
    (void)user;
    log_lines++;
    snprintf(log_text, sizeof log_text, "%d %s", level, line);
}

/* Answers a line with the peer's address and the line. */
static int answer(tcpsrv_stream *stream, const tcpsrv_address *peer, tcpsrv_bytes line) {
    char text[TCPSRV_ADDRESS_TEXT], again[TCPSRV_ADDRESS_TEXT];
    tcpsrv_address asked;
    CHECK_INT(tcpsrv_peer(stream, &asked), 0);
    tcpsrv_address_text(peer, text, sizeof text);
    if (peer->family != AF_UNIX)
        CHECK_STR(tcpsrv_address_text(&asked, again, sizeof again), text);
    CHECK_INT(asked.family, peer->family);
    return tcpsrv_printf(stream, "%s %.*s", text, (int)line.size, line.data);
}

static int serve(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)user;
    begun++;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        CHECK_INT(answer(stream, peer, line), 0);
    return err;
}

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    tcpsrv_address *peer = (tcpsrv_address *)user;
    if (err) {
        free(peer);
        tcpsrv_close(stream);
        return;
    }
    CHECK_INT(answer(stream, peer, line), 0);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user), 0);
}

static int serve_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_address *kept = (tcpsrv_address *)malloc(sizeof *kept);
    (void)user;
    begun++;
    *kept = *peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, kept);
}

static tcpsrv_options options_for(int coroutines, int mode) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    if (coroutines) options.handle_stream = serve;
    else options.on_stream = serve_callbacks;
    options.log = log_line;
    options.proxy_protocol = mode;
    options.trusted = "127.0.0.1/32";
    return options;
}

static void begin(const tcpsrv_options *options) {
    begun = log_lines = 0;
    log_text[0] = 0;
    loop = tcpsrv_loop_default();
    server = tcpsrv_new(options);
    CHECK(server != NULL);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
}

static void end(void) {
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void turns(int n) {
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
}

/* A client at 127.0.0.host. */
static int client(int host) {
    return test_client(host, tcpsrv_port(server, 0));
}

static void put(int fd, const char *bytes, size_t size) {
    CHECK_INT(send(fd, bytes, size, MSG_NOSIGNAL), (int)size);
}

/* What comes until there is a line's end, or the connection's; "" for that alone. */
static const char *line_from(int fd) {
    static char text[512];
    size_t got = 0;
    int i;
    for (i = 0; i < 2000 && got < sizeof text - 1; i++) {
        ssize_t n = recv(fd, text + got, sizeof text - 1 - got, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
        if (n > 0) got += (size_t)n;
        if (got && text[got - 1] == '\n') break;
        if (n < 0) CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
    }
    CHECK(i < 2000);
    text[got] = 0;
    return text;
}

static const char *own(int fd, const char *rest) {
    static char text[256];
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    CHECK_INT(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    snprintf(text, sizeof text, "%s:%u %s", inet_ntoa(address.sin_addr),
             (unsigned)ntohs(address.sin_port), rest);
    return text;
}

static tcpsrv_stats stats(void) {
    tcpsrv_stats now;
    tcpsrv_get_stats(server, &now);
    return now;
}

/* ---- headers --------------------------------------------------------------------------------- */

typedef struct header {
    const char *bytes;
    size_t size;
    const char *peer;               /* NULL: the connection's own; "": malformed */
} header;

#define HEADER(text, peer) { text, sizeof text - 1, peer }
#define SIGNATURE "\r\n\r\n\0\r\nQUIT\n"
#define IP6 "\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x05"
#define TEN "\0\0\0\0\0\0\0\0\0\0"
#define HUNDRED TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN
#define FULL6 "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

static const header valid[] = {
    HEADER("PROXY TCP4 192.0.2.7 198.51.100.22 56324 443\r\n", "192.0.2.7:56324"),
    HEADER("PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255:65535"),
    HEADER("PROXY TCP4 1.2.3.4 5.6.7.8 0 0\r\n", "1.2.3.4:0"),
    HEADER("PROXY TCP6 2001:db8::5 2001:DB8::6 1024 80\r\n", "[2001:db8::5]:1024"),
    HEADER("PROXY TCP6 " FULL6 " " FULL6 " 65535 65535\r\n", "[" FULL6 "]:65535"),
    HEADER("PROXY UNKNOWN\r\n", NULL),
    HEADER("PROXY UNKNOWN " FULL6 " " FULL6 " 65535 65535\r\n", NULL),
    HEADER("PROXY UNKNOWN what ever  this is\r\n", NULL),
    HEADER(SIGNATURE "\x20\x00\x00\x00", NULL),
    HEADER(SIGNATURE "\x20\xff\x00\x07" "ignored", NULL),
    HEADER(SIGNATURE "\x21\x11\x00\x0c" "\xc0\x00\x02\x07" "\xc6\x33\x64\x16" "\xdc\x04\x01\xbb",
           "192.0.2.7:56324"),
    HEADER(SIGNATURE "\x21\x11\x00\x13" "\xc0\x00\x02\x07" "\xc6\x33\x64\x16" "\xdc\x04\x01\xbb"
           "\x04\x00\x04" "noop", "192.0.2.7:56324"),
    HEADER(SIGNATURE "\x21\x21\x00\x24" IP6 IP6 "\x04\x00\x00\x50", "[2001:db8::5]:1024"),
    HEADER(SIGNATURE "\x21\x31\x00\xd8" "/run/a.sock" HUNDRED HUNDRED "\0\0\0\0\0", NULL),
    HEADER(SIGNATURE "\x21\x00\x00\x00", NULL),
    HEADER(SIGNATURE "\x21\x10\x00\x0c" "\xc0\x00\x02\x07" "\xc6\x33\x64\x16" "\xdc\x04\x01\xbb",
           NULL),
    HEADER(SIGNATURE "\x21\x12\x00\x0c" "\xc0\x00\x02\x07" "\xc6\x33\x64\x16" "\xdc\x04\x01\xbb",
           NULL),
};
enum { VALID = sizeof valid / sizeof *valid, UNIX_PEER = 13 };

static const header malformed[] = {
    HEADER("PROXY \r\n", ""),
    HEADER("PROXY TCP4\r\n", ""),
    HEADER("PROXY TCP5 192.0.2.7 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY tcp4 192.0.2.7 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1 2\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1 2 \r\n", ""),
    HEADER("PROXY TCP4  192.0.2.7 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1 2 3\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 65536 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 1 99999999999999999999\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 01 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 -1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 192.0.2.8 +1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.07 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.256 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7 ::1 1 2\r\n", ""),
    HEADER("PROXY TCP4 ::1 ::1 1 2\r\n", ""),
    HEADER("PROXY TCP6 192.0.2.7 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY TCP6 fe80::1%1 ::1 1 2\r\n", ""),
    HEADER("PROXY TCP6 1::2::3 ::1 1 2\r\n", ""),
    HEADER("PROXY TCP4 192.0.2.7\0 192.0.2.8 1 2\r\n", ""),
    HEADER("PROXY UNKNOWNX\r\n", ""),
    HEADER("PROXY UNKNOWN \r \r\n", ""),
    HEADER("PROXY UNKNOWN " FULL6 " " FULL6 " 65535 65535x\r\n", ""),
    HEADER("PROXY UNKNOWN " FULL6 " " FULL6 " 65535 65535xxxxxxxxxx", ""),
    HEADER("GET / HTTP/1.1\r\n\r\n", ""),
    HEADER("proxy TCP4 192.0.2.7 192.0.2.8 1 2\r\n", ""),
    HEADER("\r\n\r\nGET", ""),
    HEADER(SIGNATURE "\x11\x11\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x31\x11\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x22\x11\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x2f\x11\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x21\x41\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x21\x13\x00\x0c" TEN "\0\0", ""),
    HEADER(SIGNATURE "\x21\x11\x00\x0b" TEN "\0", ""),
    HEADER(SIGNATURE "\x21\x21\x00\x23" TEN TEN TEN "\0\0\0\0\0", ""),
    HEADER(SIGNATURE "\x21\x31\x00\xd7" HUNDRED HUNDRED TEN "\0\0\0\0\0", ""),
    HEADER(SIGNATURE "\x21\x11\xff\xff", ""),
};
enum { MALFORMED = sizeof malformed / sizeof *malformed };

/* The answer to "hi" of a peer that a header told of. */
static const char *expected(int fd, int i) {
    static char text[160];
    if (i == UNIX_PEER) return "unix:/run/a.sock hi\n";
    if (!valid[i].peer) return own(fd, "hi\n");
    snprintf(text, sizeof text, "%s hi\n", valid[i].peer);
    return text;
}

static void both_modes(int coroutines, void (*body)(void)) {
    tcpsrv_options options = options_for(coroutines, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    body();
    end();
    options = options_for(coroutines, TCPSRV_PROXY_OPTIONAL);
    begin(&options);
    body();
    end();
}

static void all(void (*body)(void)) {
    both_modes(1, body);
    both_modes(0, body);
}

static void told_body(void) {
    int i, fd;
    for (i = 0; i < VALID; i++) {
        fd = client(1);
        put(fd, valid[i].bytes, valid[i].size);
        put(fd, "hi\n", 3);
        CHECK_STR(line_from(fd), expected(fd, i));
        put(fd, "hi\n", 3);
        CHECK_STR(line_from(fd), expected(fd, i));
        close(fd);
    }
    turns(3);
    CHECK_INT(begun, VALID);
    CHECK_INT(log_lines, 0);
    CHECK_INT(stats().refused_proxy, 0);
    CHECK_INT(stats().active, 0);
}

static void the_handler_is_told_the_peer_of_the_header(void) {
    all(told_body);
}

static void split_body(void) {
    size_t cut;
    int i, fd;
    for (i = 0; i < VALID; i++)
        for (cut = 1; cut <= valid[i].size; cut++) {
            fd = client(1);
            put(fd, valid[i].bytes, cut);
            turns(2);
            put(fd, valid[i].bytes + cut, valid[i].size - cut);
            put(fd, "hi\n", 3);
            CHECK_STR(line_from(fd), expected(fd, i));
            close(fd);
        }
}

static void a_header_may_come_in_two_pieces_cut_anywhere(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    split_body();
    end();
    options = options_for(0, TCPSRV_PROXY_OPTIONAL);
    begin(&options);
    split_body();
    end();
}

static void a_header_may_come_byte_by_byte(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    size_t at;
    int i, fd;
    begin(&options);
    for (i = 0; i < VALID; i++) {
        fd = client(1);
        for (at = 0; at < valid[i].size; at++) {
            put(fd, valid[i].bytes + at, 1);
            turns(1);
        }
        CHECK_INT(begun, i + (at ? 1 : 0));
        put(fd, "hi\n", 3);
        CHECK_STR(line_from(fd), expected(fd, i));
        close(fd);
    }
    end();
}

static void refused_body(void) {
    int i, fd;
    for (i = 0; i < MALFORMED; i++) {
        fd = client(1);
        if (stats().refused_proxy == 0) log_text[0] = 0;
        put(fd, malformed[i].bytes, malformed[i].size);
        CHECK_STR(line_from(fd), "");
        CHECK_INT(stats().refused_proxy, i + 1);
        if (i == 0) {
            CHECK(strstr(log_text, "1 connection refused from 127.0.0.1:") == log_text);
            CHECK(strstr(log_text, ": not a PROXY header") != NULL);
        }
        close(fd);
    }
    turns(3);
    CHECK_INT(begun, 0);
    CHECK(log_lines >= 1 && log_lines < 10);
    CHECK(loop->slot_count < MALFORMED); /* what was made for them is used again */
    CHECK_INT(stats().active, 0);
    CHECK_INT(stats().accepted, MALFORMED);
    CHECK_INT(stats().closed_by_abort, MALFORMED);
}

static void a_malformed_header_is_refused_and_logged_with_its_sender(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    refused_body();
    end();
    options = options_for(0, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    refused_body();
    end();
}

static void truncated_body(void) {
    uint64_t refused = 0;
    size_t size;
    int i, fd;
    for (i = 0; i < VALID; i++)
        for (size = 1; size < valid[i].size; size++) {
            fd = client(1);
            put(fd, valid[i].bytes, size);
            shutdown(fd, SHUT_WR);
            CHECK_STR(line_from(fd), "");
            CHECK_INT(stats().refused_proxy, ++refused);
            close(fd);
        }
    CHECK_INT(begun, 0);
    turns(3);
    CHECK_INT(stats().active, 0);
}

static void every_truncation_of_a_header_is_refused(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    truncated_body();
    end();
    options = options_for(0, TCPSRV_PROXY_REQUIRED);
    begin(&options);
    truncated_body();
    end();
}

/* ---- mutations ------------------------------------------------------------------------------- */

#define OCTET "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
#define IP4 OCTET "[.]" OCTET "[.]" OCTET "[.]" OCTET
#define PORT "(0|[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|" \
             "6553[0-5])"
static regex_t line4, line6;

static void compile(void) {
    CHECK_INT(regcomp(&line4, "^PROXY TCP4 " IP4 " " IP4 " " PORT " " PORT "\r\n$",
                      REG_EXTENDED | REG_NOSUB), 0);
    CHECK_INT(regcomp(&line6, "^PROXY TCP6 [0-9a-fA-F:]+ [0-9a-fA-F:]+ " PORT " " PORT "\r\n$",
                      REG_EXTENDED | REG_NOSUB), 0);
}

/* An address that inet_pton takes is one; the rest of the line is judged by the expression. */
static int good6(const char *line) {
    char copy[128], *at = copy;
    unsigned char ip[16];
    int i;
    if (regexec(&line6, line, 0, NULL, 0) != 0) return 0;
    snprintf(copy, sizeof copy, "%s", line + 11);
    for (i = 0; i < 2; i++) {
        char *blank = strchr(at, ' ');
        *blank = 0;
        if (inet_pton(AF_INET6, at, ip) != 1) return 0;
        at = blank + 1;
    }
    return 1;
}

static int is_good_1(const char *data, size_t size) {
    char line[128];
    memcpy(line, data, size);
    line[size] = 0;
    if (strlen(line) != size || size > 107) return 0;
    if (strncmp(line, "PROXY UNKNOWN", 13) == 0)
        return (line[13] == ' ' || line[13] == '\r') && strcspn(line, "\r") == size - 2 &&
               strcspn(line, "\n") == size - 1;
    return regexec(&line4, line, 0, NULL, 0) == 0 || good6(line);
}

static int is_good_2(const unsigned char *data, size_t size) {
    int family = data[13] >> 4, transport = data[13] & 15;
    size_t addresses[] = { 0, 12, 36, 216 };
    if (memcmp(data, SIGNATURE, 12) != 0) return 0;
    if (size != 16u + (size_t)(data[14] << 8 | data[15])) return -1; /* not all of it, or more */
    if (data[12] == 0x20) return 1;
    if (data[12] != 0x21 || family > 3 || transport > 2) return 0;
    return family == 0 || transport != 1 || size >= 16 + addresses[family];
}

/* Whether the library takes the whole of it as a header. */
static int is_taken(const char *data, size_t size) {
    tcpsrv_address address;
    tcpsrv_bytes bytes = { data, size };
    if (tcpsrv__proxy_end(data, size, NULL) != (int64_t)size) return 0;
    return tcpsrv__proxy_parse(bytes, &address) >= 0;
}

static void every_mutated_byte_is_judged_as_the_specification_says(void) {
    int i, value, good, taken = 0;
    size_t at;
    compile();
    for (i = 0; i < VALID; i++)
        for (at = 0; at < valid[i].size; at++)
            for (value = 0; value < 256; value++) {
                char *copy = (char *)malloc(valid[i].size); /* its end is the analysers' */
                memcpy(copy, valid[i].bytes, valid[i].size);
                copy[at] = (char)value;
                good = valid[i].bytes[0] == 'P'
                           ? is_good_1(copy, valid[i].size)
                           : is_good_2((unsigned char *)copy, valid[i].size);
                if (good >= 0 && is_taken(copy, valid[i].size) != good)
                    test_end(1, __FILE__, __LINE__, "header %d, byte %d, value %d: %d", i,
                             (int)at, value, good);
                taken += good > 0;
                free(copy);
            }
    CHECK(taken > 10000);
    regfree(&line4);
    regfree(&line6);
}

static void a_mutated_header_never_reaches_a_handler_as_data(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    const char *answer_line;
    char copy[512];
    size_t at;
    int i, fd;
    begin(&options);
    for (i = 0; i < VALID; i++)
        for (at = 0; at < valid[i].size; at++) {
            memcpy(copy, valid[i].bytes, valid[i].size);
            copy[at] = (char)(copy[at] ^ 1);
            fd = client(1);
            put(fd, copy, valid[i].size);
            put(fd, "hi\n", 3);
            shutdown(fd, SHUT_WR);
            answer_line = line_from(fd);
            if (*answer_line) CHECK(strstr(answer_line, " hi\n") || at == 14 || at == 15);
            close(fd);
        }
    turns(3);
    CHECK_INT(stats().active, 0);
    end();
}

/* ---- who is believed ------------------------------------------------------------------------- */

static void where_it_is_required_only_the_trusted_are_served(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    int fd;
    begin(&options);
    fd = client(2);
    put(fd, valid[0].bytes, valid[0].size);
    CHECK_STR(line_from(fd), "");
    close(fd);
    CHECK_INT(begun, 0);
    CHECK_INT(stats().refused_proxy, 1);
    CHECK_INT(stats().accepted, 0);
    CHECK(strstr(log_text, "connection refused from 127.0.0.2:") != NULL);
    CHECK(strstr(log_text, ": not a trusted proxy") != NULL);
    end();
}

static void data_body(void) {
    static const char *const lines[] = {
        "hi\n", "P\n", "PROXY\n", "PROXYX\n", "\r\n", "\r\n\r\n\n", "PRO", "PROXY", "\r\n\r", ""
    };
    size_t i;
    int fd;
    for (i = 0; i < sizeof lines / sizeof *lines; i++) {
        fd = client(1);
        put(fd, lines[i], strlen(lines[i]));
        if (!strchr(lines[i], '\n') || lines[i][0] == '\r') shutdown(fd, SHUT_WR);
        else CHECK_STR(line_from(fd), own(fd, lines[i]));
        while (lines[i][0] == '\r' && *line_from(fd)) continue;
        close(fd);
    }
    turns(5);
    CHECK_INT(begun, (int)i);
    CHECK_INT(stats().refused_proxy, 0);
    CHECK_INT(log_lines, 0);
}

static void where_it_is_optional_what_does_not_begin_as_a_header_is_data(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_OPTIONAL);
    begin(&options);
    data_body();
    end();
    options = options_for(0, TCPSRV_PROXY_OPTIONAL);
    begin(&options);
    data_body();
    end();
}

static void where_it_is_optional_the_bytes_of_strangers_are_data(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_OPTIONAL);
    static const char line[] = "PROXY TCP4 192.0.2.7 198.51.100.22 56324 443\r\n";
    int fd;
    begin(&options);
    fd = client(2);
    put(fd, line, strlen(line));
    CHECK_STR(line_from(fd), own(fd, line));
    close(fd);
    end();
}

static void where_it_is_optional_a_malformed_header_is_refused_all_the_same(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_OPTIONAL);
    static const char *const heads[] = { "PROXY TCP4 1\r\n", SIGNATURE "\x31", "PROXY T" };
    int i, fd;
    begin(&options);
    for (i = 0; i < 3; i++) {
        fd = client(1);
        put(fd, heads[i], i == 1 ? 13 : strlen(heads[i]));
        shutdown(fd, SHUT_WR);
        CHECK_STR(line_from(fd), "");
        CHECK_INT(stats().refused_proxy, i + 1);
        close(fd);
    }
    CHECK_INT(begun, 0);
    end();
}

static void a_probe_that_sends_nothing_is_no_matter(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    int fd;
    begin(&options);
    fd = client(1);
    turns(2);
    close(fd);
    turns(5);
    CHECK_INT(stats().active, 0);
    CHECK_INT(stats().refused_proxy, 0);
    CHECK_INT(stats().closed_in_order, 1);
    CHECK_INT(log_lines, 0);
    end();
}

static void a_header_that_does_not_come_in_time_is_refused(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    int late, trickling, prompt;
    options.handshake_timeout_ms = 100;
    begin(&options);
    late = client(1);
    trickling = client(1);
    prompt = client(1);
    put(prompt, valid[0].bytes, valid[0].size);
    put(trickling, valid[0].bytes, 7);
    turns(3);
    CHECK_INT(begun, 1);
    CHECK_STR(line_from(late), "");
    CHECK_STR(line_from(trickling), "");
    CHECK_INT(stats().timeouts_handshake, 2);
    CHECK_INT(stats().refused_proxy, 2);
    CHECK(strstr(log_text, "connection refused from 127.0.0.1:") != NULL);
    CHECK(strstr(log_text, ": timed out") != NULL);
    test_sleep_ms(150); /* the deadline is not the handler's */
    turns(3);
    put(prompt, "hi\n", 3);
    CHECK_STR(line_from(prompt), expected(prompt, 0));
    close(late);
    close(trickling);
    close(prompt);
    end();
}

static void unix_peers_may_be_trusted(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    struct sockaddr_un name;
    socklen_t size;
    int fd;
    options.trusted = "10.0.0.0/8 unix";
    begin(&options);
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "tcpserver-proxy-%ld", (long)getpid());
    size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name.sun_path + 1));
    name.sun_path[0] = '@';
    CHECK_INT(tcpsrv_add_socket(server, tcpsrv_bind_unix_socket(name.sun_path, 0, 0)), 0);
    name.sun_path[0] = 0;
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK_INT(connect(fd, (struct sockaddr *)&name, size), 0);
    put(fd, valid[0].bytes, valid[0].size);
    put(fd, "hi\n", 3);
    CHECK_STR(line_from(fd), "192.0.2.7:56324 hi\n");
    close(fd);
    fd = client(1);
    CHECK_STR(line_from(fd), "");
    CHECK_INT(stats().refused_proxy, 1);
    close(fd);
    end();
}

/* ---- networks -------------------------------------------------------------------------------- */

static void malformed_networks_are_named(void) {
    static const char *const bad[] = {
        "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "10.0.0/8", "10.0.0.0/08", "10.0.0.256",
        "::/129", "fe80::1%1", "1::2::3/8", "localhost", "unix/1", "10.0.0.0/8/8", "/8", ":",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    };
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    char list[200], text[200];
    size_t i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(list, sizeof list, "127.0.0.1, %s", bad[i]);
        options.trusted = list;
        CHECK(tcpsrv_new(&options) == NULL);
        snprintf(text, sizeof text, "trusted network %.63s: Invalid argument", bad[i]);
        CHECK_STR(tcpsrv_last_error(), text);
    }
    options.trusted = NULL;
    CHECK(tcpsrv_new(&options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "proxy_protocol and trusted") != NULL);
    options.trusted = " , ";
    CHECK(tcpsrv_new(&options) == NULL);
    options.trusted = "::1";
    options.proxy_protocol = 3;
    CHECK(tcpsrv_new(&options) == NULL);
}

static int trusts(const char *list, const char *peer) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    tcpsrv_address name;
    char copy[200];
    int yes;
    snprintf(copy, sizeof copy, "%s", list);
    options.trusted = copy;
    server = tcpsrv_new(&options);
    CHECK(server != NULL);
    memset(copy, 'x', sizeof copy - 1); /* the text was copied */
    CHECK_STR(tcpsrv_get_options(server)->trusted, list);
    memset(&name, 0, sizeof name);
    name.family = strchr(peer, ':') ? AF_INET6 : AF_INET;
    if (strcmp(peer, "unix") == 0) name.family = AF_UNIX;
    else CHECK_INT(inet_pton(name.family, peer, name.ip), 1);
    yes = tcpsrv__trusts(server, &name);
    tcpsrv_free(server);
    return yes;
}

static void networks_have_the_addresses_that_their_bits_say(void) {
    CHECK_INT(trusts("10.0.0.0/8", "10.255.0.1"), 1);
    CHECK_INT(trusts("10.0.0.0/8", "11.0.0.1"), 0);
    CHECK_INT(trusts("10.1.2.3/8", "10.9.9.9"), 1);
    CHECK_INT(trusts("192.0.2.128/25", "192.0.2.128"), 1);
    CHECK_INT(trusts("192.0.2.128/25", "192.0.2.127"), 0);
    CHECK_INT(trusts("192.0.2.1", "192.0.2.1"), 1);
    CHECK_INT(trusts("192.0.2.1", "192.0.2.2"), 0);
    CHECK_INT(trusts("192.0.2.2/31\n,\t192.0.3.0/24", "192.0.2.3"), 1);
    CHECK_INT(trusts("192.0.2.2/31 192.0.3.0/24", "192.0.3.77"), 1);
    CHECK_INT(trusts("0.0.0.0/0", "203.0.113.9"), 1);
    CHECK_INT(trusts("0.0.0.0/0", "2001:db8::1"), 0);
    CHECK_INT(trusts("::/0", "2001:db8::1"), 1);
    CHECK_INT(trusts("::/0", "203.0.113.9"), 0);
    CHECK_INT(trusts("fd00::/8", "fdff::1"), 1);
    CHECK_INT(trusts("fd00::/8", "fe00::1"), 0);
    CHECK_INT(trusts("2001:db8::/33", "2001:db8:7fff::1"), 1);
    CHECK_INT(trusts("2001:db8::/33", "2001:db8:8000::1"), 0);
    CHECK_INT(trusts("10.0.0.0/8", "::ffff:10.1.1.1"), 1);
    CHECK_INT(trusts("::/0", "::ffff:10.1.1.1"), 0);
    CHECK_INT(trusts("unix", "unix"), 1);
    CHECK_INT(trusts("0.0.0.0/0 ::/0", "unix"), 0);
    CHECK_INT(trusts("unix", "127.0.0.1"), 0);
}

/* ---- ends ------------------------------------------------------------------------------------ */

static void seen(tcpsrv_stream *stream, void *arg) {
    (void)stream;
    ++*(int *)arg;
}

static void three_wait(int coroutines, int fds[3]) {
    tcpsrv_options options = options_for(coroutines, TCPSRV_PROXY_REQUIRED);
    int i, live = 0;
    begin(&options);
    for (i = 0; i < 3; i++) fds[i] = client(1);
    put(fds[0], valid[0].bytes, valid[0].size);
    put(fds[1], valid[0].bytes, 9);
    turns(5);
    CHECK_INT(begun, 1);
    CHECK_INT(stats().active, 3);
    tcpsrv_foreach(server, seen, &live);
    CHECK_INT(live, 1);
}

static void close_three(int fds[3]) {
    int i;
    for (i = 0; i < 3; i++) close(fds[i]);
}

static void servers_and_loops_may_end_while_headers_are_awaited(void) {
    int fds[3], coroutines;
    for (coroutines = 0; coroutines < 2; coroutines++) {
        three_wait(coroutines, fds);
        end();
        CHECK_INT(begun, 1);
        close_three(fds);
        three_wait(coroutines, fds);
        CHECK_INT(tcpsrv_loop_free(loop), 0);
        tcpsrv_free(server);
        CHECK_INT(begun, 1);
        close_three(fds);
    }
}

static int drained;

static void on_drained(tcpsrv *which, void *user) {
    (void)which, (void)user;
    drained++;
}

static void a_drain_ends_those_that_have_sent_nothing(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    int silent, half;
    options.on_drained = on_drained;
    begin(&options);
    silent = client(1);
    half = client(1);
    put(half, valid[0].bytes, 9);
    turns(3);
    tcpsrv_drain(server, 10000);
    CHECK_STR(line_from(silent), "");
    CHECK_INT(drained, 0);
    put(half, valid[0].bytes + 9, valid[0].size - 9);
    put(half, "hi\n", 3);
    CHECK_STR(line_from(half), expected(half, 0));
    CHECK_STR(line_from(half), "");
    close(silent);
    close(half);
    while (!drained) turns(1);
    end();
}

/* Nobody knows yet whether data comes instead of a header; the drain's end is no data. */
static void where_it_is_optional_a_drain_begins_no_silent_connection(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_OPTIONAL);
    int fd;
    options.on_drained = on_drained;
    drained = 0;
    begin(&options);
    fd = client(1);
    turns(3);
    tcpsrv_drain(server, -1);
    while (!drained) turns(1);
    CHECK_INT(begun, 0);
    CHECK_STR(line_from(fd), "");
    close(fd);
    end();
}

static void failing(int coroutines) {
    tcpsrv_options options = options_for(coroutines, TCPSRV_PROXY_REQUIRED);
    int n, fd;
    options.max_connections_per_ip = 100;
    begin(&options);
    for (n = 1; n < 30; n++) {
        fd = client(1);
        put(fd, valid[0].bytes, valid[0].size);
        put(fd, "hi\n", 3);
        test_fail_alloc_at = n;
        turns(3);
        test_fail_alloc_at = 0;
        close(fd);
        turns(3);
        fd = client(1);
        put(fd, valid[0].bytes, valid[0].size);
        put(fd, "hi\n", 3);
        CHECK_STR(line_from(fd), expected(fd, 0));
        close(fd);
        turns(3);
    }
    CHECK_INT(stats().active, 0);
    end();
}

static void a_failed_allocation_costs_one_connection_at_most(void) {
    failing(1);
    failing(0);
}

static void new_without_memory_says_so(void) {
    tcpsrv_options options = options_for(1, TCPSRV_PROXY_REQUIRED);
    test_fail_alloc_at = 2;
    CHECK(tcpsrv_new(&options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "Cannot allocate memory") != NULL);
    test_fail_alloc_at = 0;
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(the_handler_is_told_the_peer_of_the_header),
        TEST(a_header_may_come_in_two_pieces_cut_anywhere),
        TEST(a_header_may_come_byte_by_byte),
        TEST(a_malformed_header_is_refused_and_logged_with_its_sender),
        TEST(every_truncation_of_a_header_is_refused),
        TEST(every_mutated_byte_is_judged_as_the_specification_says),
        TEST(a_mutated_header_never_reaches_a_handler_as_data),
        TEST(where_it_is_required_only_the_trusted_are_served),
        TEST(where_it_is_optional_what_does_not_begin_as_a_header_is_data),
        TEST(where_it_is_optional_the_bytes_of_strangers_are_data),
        TEST(where_it_is_optional_a_malformed_header_is_refused_all_the_same),
        TEST(a_probe_that_sends_nothing_is_no_matter),
        TEST(a_header_that_does_not_come_in_time_is_refused),
        TEST(unix_peers_may_be_trusted),
        TEST(malformed_networks_are_named),
        TEST(networks_have_the_addresses_that_their_bits_say),
        TEST(servers_and_loops_may_end_while_headers_are_awaited),
        TEST(a_drain_ends_those_that_have_sent_nothing),
        TEST(where_it_is_optional_a_drain_begins_no_silent_connection),
        TEST(a_failed_allocation_costs_one_connection_at_most),
        TEST(new_without_memory_says_so),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
