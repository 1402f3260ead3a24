/* What the original's own tests claim of its streams, on each kind of descriptor and with both
   kinds of caller, and what it leaves untested: calls that fail, limits, ends. tests/tornado.txt
   says which claim stands for which of its tests. */
#if defined(TEST_HAS_BEARSSL)
#define TCPSERVER_TLS
#endif
#include "support.h"
#include <regex.h>
#include <sys/uio.h>

/* ---- calls that fail ------------------------------------------------------------------------- */

/* Each of these calls is first interrupted, or fails as often as it is told to. */
enum { CALL_READ, CALL_SEND, CALL_ACCEPT, CALL_BIND, CALL_SOCKET, CALLS };
static int interrupts, interrupted[CALLS], fail_times[CALLS], fail_code[CALLS];

static int fails(int call) {
    if (interrupts) {
        interrupted[call] = !interrupted[call];
        errno = EINTR;
        return interrupted[call];
    }
    if (!fail_times[call]) return 0;
    fail_times[call]--;
    errno = fail_code[call];
    return 1;
}

static void let_fail(int call, int times, int code) {
    fail_times[call] = times;
    fail_code[call] = code;
}

#define read(fd, bytes, size) (fails(CALL_READ) ? -1 : read(fd, bytes, size))
#define recv(fd, bytes, size, flags) (fails(CALL_READ) ? -1 : recv(fd, bytes, size, flags))
#define readv(fd, pieces, n) (fails(CALL_READ) ? -1 : readv(fd, pieces, n))
#define send(fd, bytes, size, flags) (fails(CALL_SEND) ? -1 : send(fd, bytes, size, flags))
#define sendmsg(fd, message, flags) (fails(CALL_SEND) ? -1 : sendmsg(fd, message, flags))
#define writev(fd, pieces, n) (fails(CALL_SEND) ? -1 : writev(fd, pieces, n))
#define accept4(fd, name, size, flags) (fails(CALL_ACCEPT) ? -1 : accept4(fd, name, size, flags))
#define bind(fd, name, size) (fails(CALL_BIND) ? -1 : bind(fd, name, size))
#define socket(family, type, protocol) (fails(CALL_SOCKET) ? -1 : socket(family, type, protocol))

#include "test.h"

/* ---- the stage ------------------------------------------------------------------------------- */

enum { TCP, UNIX, PIPE, TLS, KINDS };
static tcpsrv_loop *loop;
static tcpsrv_stream *reader, *writer;

#if defined(TCPSERVER_TLS)
static tcpsrv *tls_server;
static tcpsrv_tls *tls_there, *tls_here;

static int has_tls(void) {
    return access(TEST_CERTIFICATES "/done", R_OK) == 0;
}

static int be_writer(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    writer = stream;
    return 0;
}

static void make_tls(void) {
    tcpsrv_certificate pair;
    tcpsrv_tls_options options;
    memset(&pair, 0, sizeof pair);
    memset(&options, 0, sizeof options);
    pair.certificate_file = TEST_CERTIFICATES "/ec.pem";
    pair.key_file = TEST_CERTIFICATES "/ec.key";
    options.no_verify = 1;
    tls_here = tcpsrv_tls_new(&options);
    options.certificates = &pair;
    options.certificate_count = 1;
    tls_there = tcpsrv_tls_new(&options);
    CHECK(tls_here != NULL && tls_there != NULL);
}

static void serve_tls(void) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    writer = NULL;
    make_tls();
    loop = tcpsrv_loop_default();
    options.on_stream = be_writer;
    options.tls = tls_there;
    tls_server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_listen(tls_server, 0, "127.0.0.1"), 0);
}

static void dial_tls(void) {
    tcpsrv_connect_options target;
    memset(&target, 0, sizeof target);
    target.host = "127.0.0.1";
    target.port = tcpsrv_port(tls_server, 0);
    target.tls = tls_here;
    reader = tcpsrv_connect(loop, &target);
    CHECK(reader != NULL);
}

static void begin_tls(void) {
    serve_tls();
    dial_tls();
    CHECK_INT(tcpsrv_wait_handshake(reader), 0);
    CHECK(writer != NULL);
}

static void end_tls(void) {
    tcpsrv_free(tls_server);
    tcpsrv_tls_free(tls_here);
    tcpsrv_tls_free(tls_there);
    tls_server = NULL;
    tls_here = tls_there = NULL;
}
#else
static int has_tls(void) {
    return 0;
}

static void begin_tls(void) {
}

static void end_tls(void) {
}
#endif

static void begin(int kind) {
    int fds[2];
    if (kind == TLS) {
        begin_tls();
        return;
    }
    if (kind == TCP) CHECK_INT(test_pair(fds), 0);
    if (kind == UNIX) CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    if (kind == PIPE) CHECK_INT(pipe(fds), 0);
    loop = tcpsrv_loop_default();
    reader = tcpsrv_stream_from_fd(loop, fds[0]);
    writer = tcpsrv_stream_from_fd(loop, fds[1]);
    CHECK(reader != NULL && writer != NULL);
}

static void end(void) {
    if (reader) tcpsrv_close(reader);
    if (writer) tcpsrv_close(writer);
    end_tls();
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static int run_body(void *body) {
    void (*fn)(void);
    memcpy(&fn, body, sizeof fn);
    fn();
    return 0;
}

/* On a TCP connection, a Unix one, a pipe, and where BearSSL is there in TLS, by a straight caller
   and by a coroutine. */
static void on_each(void (*body)(void)) {
    int of_kind;
    for (of_kind = 0; of_kind < KINDS; of_kind++) {
        if (of_kind == TLS && !has_tls()) continue;
        begin(of_kind);
        body();
        end();
        begin(of_kind);
        CHECK_INT(tcpsrv_join(tcpsrv_spawn(loop, run_body, &body, 0)), 0);
        end();
    }
}

static void turns(int n) {
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
}

/* Lets the loop do what is ready, from a body of either kind. */
static void settle(void) {
    int i;
    for (i = 0; i < 5; i++) CHECK_INT(tcpsrv_sleep(1), 0);
}

static void say(const char *text) {
    CHECK_INT(tcpsrv_write(writer, text, strlen(text)), 0);
    CHECK_INT(tcpsrv_flush(writer), 0);
}

static void finish(void) {
    tcpsrv_close(writer);
    writer = NULL;
}

static void gives(tcpsrv_want want, const char *text) {
    tcpsrv_bytes bytes;
    CHECK_INT(tcpsrv_await(reader, want, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, text);
}

static void ends(tcpsrv_want want, int code) {
    CHECK_INT(tcpsrv_await(reader, want, NULL), code);
}

/* ---- a client of a small server -------------------------------------------------------------- */

static void whole_reply(void) {
    say("HTTP/1.0 200 OK\r\n\r\nHello");
    finish();
    settle(); /* bytes and end are told in one event */
    gives(tcpsrv_until_close(0), "HTTP/1.0 200 OK\r\n\r\nHello");
}

static void a_reply_that_comes_with_the_end_is_read_whole(void) {
    on_each(whole_reply);
}

static void zero_bytes(void) {
    say("HTTP/1.0 200");
    gives(tcpsrv_exactly(9), "HTTP/1.0 ");
    gives(tcpsrv_exactly(0), "");
    gives(tcpsrv_exactly(3), "200");
}

static void a_read_of_zero_bytes_disturbs_nothing(void) {
    on_each(zero_bytes);
}

static void message(void) {
    say("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nHello");
    gives(tcpsrv_until("\r\n", 0), "HTTP/1.1 200 OK\r\n");
    gives(tcpsrv_until("\r\n\r\n", 0), "Content-Length: 5\r\nX: y\r\n\r\n");
    gives(tcpsrv_exactly(5), "Hello");
}

static void a_line_a_head_and_a_body_are_read_one_by_one(void) {
    on_each(message);
}

static void less_than_asked(void) {
    say("short");
    finish();
    ends(tcpsrv_exactly(1 << 20), TCPSRV_EOF);
    gives(tcpsrv_some(0), "short");
    ends(tcpsrv_some(0), TCPSRV_EOF);
}

static void an_end_before_the_message_is_an_error_and_its_part_stays(void) {
    on_each(less_than_asked);
}

static void until_the_end(void) {
    say("head\r\n\r\nbody");
    finish();
    gives(tcpsrv_until("\r\n\r\n", 0), "head\r\n\r\n");
    gives(tcpsrv_until_close(0), "body");
    ends(tcpsrv_exactly(1), TCPSRV_EOF);
}

static void after_the_rest_was_read_a_read_fails_at_once(void) {
    on_each(until_the_end);
}

/* ---- reading and writing --------------------------------------------------------------------- */

static void empty_write(void) {
    say("");
    CHECK_INT(tcpsrv_writing(writer), 0);
    say("x");
    gives(tcpsrv_some(0), "x");
}

static void an_empty_write_is_done_at_once(void) {
    on_each(empty_write);
}

static void second_byte(void) {
    say("12");
    gives(tcpsrv_exactly(1), "1");
    finish();
    settle();
    gives(tcpsrv_exactly(1), "2");
    ends(tcpsrv_exactly(1), TCPSRV_EOF);
}

static void what_came_before_a_close_is_readable_after_it(void) {
    on_each(second_byte);
}

static void rest_of_four(void) {
    say("1234");
    gives(tcpsrv_exactly(1), "1");
    finish();
    settle();
    gives(tcpsrv_until_close(0), "234");
}

static void read_until_close_after_the_close_gives_what_is_left(void) {
    on_each(rest_of_four);
}

static int write_a_long_line(void *unused) {
    char piece[1024];
    int i;
    (void)unused;
    memset(piece, 'A', sizeof piece);
    for (i = 0; i < 4096; i++) CHECK_INT(tcpsrv_write(writer, piece, sizeof piece), 0);
    CHECK_INT(tcpsrv_write(writer, "\r\n", 2), 0);
    return 0;
}

static void long_line(void) {
    int64_t id = tcpsrv_spawn(loop, write_a_long_line, NULL, 0);
    tcpsrv_bytes bytes;
    CHECK_INT(tcpsrv_read_until(reader, "\r\n", 8 << 20, &bytes), 0);
    CHECK_INT(bytes.size, 4096 * 1024 + 2);
    CHECK(bytes.data[0] == 'A' && bytes.data[4096 * 1024 - 1] == 'A');
    CHECK_INT(tcpsrv_join(id), 0);
}

static void a_line_of_four_mebibytes_is_one_message(void) {
    on_each(long_line);
}

static void partial(void) {
    say("hello");
    gives(tcpsrv_some(50), "hello");
    say("world");
    gives(tcpsrv_some(3), "wor");
    gives(tcpsrv_exactly(0), "");
    gives(tcpsrv_some(50), "ld");
}

static void a_partial_read_gives_what_is_there_up_to_its_maximum(void) {
    on_each(partial);
}

static int write_lines(void *unused) {
    char line[1025];
    int i;
    (void)unused;
    memset(line, 'C', 1022);
    memcpy(line + 1022, "\r\n", 3);
    for (i = 0; i < 100; i++) CHECK_INT(tcpsrv_write(writer, line, 1024), 0);
    return 0;
}

static void small_reads(void) {
    int64_t id = tcpsrv_spawn(loop, write_lines, NULL, 0);
    tcpsrv_bytes bytes;
    int i;
    reader->owner->options.max_buffer_size = 10240;
    for (i = 0; i < 100; i++) {
        CHECK_INT(tcpsrv_read_bytes(reader, 1024, &bytes), 0);
        CHECK_INT(bytes.size, 1024);
    }
    CHECK_INT(tcpsrv_join(id), 0);
}

static void small_reads_from_a_large_stream_do_not_overflow(void) {
    on_each(small_reads);
}

static void small_lines(void) {
    int64_t id = tcpsrv_spawn(loop, write_lines, NULL, 0);
    tcpsrv_bytes bytes;
    int i;
    for (i = 0; i < 100; i++) {
        CHECK_INT(tcpsrv_read_until(reader, "\n", 4096, &bytes), 0);
        CHECK_INT(bytes.size, 1024);
    }
    CHECK_INT(tcpsrv_join(id), 0);
}

static void small_lines_from_a_large_stream_keep_within_their_maximum(void) {
    on_each(small_lines);
}

static void into_memory(void) {
    char memory[10];
    say("hello");
    CHECK_INT(tcpsrv_write(writer, "world!!", 7), 0);
    CHECK_INT(tcpsrv_read_into(reader, memory, 10), 0);
    CHECK_MEM(memory, 10, "helloworld");
    say("1234567890");
    CHECK_INT(tcpsrv_read_into(reader, memory, 4), 0);
    CHECK_MEM(memory, 4, "!!12");
    CHECK_INT(tcpsrv_read_into(reader, memory, 0), 0);
    CHECK_MEM(memory, 4, "!!12");
    gives(tcpsrv_exactly(8), "34567890");
}

static void reads_into_memory_and_others_share_the_bytes_in_order(void) {
    on_each(into_memory);
}

static void note_result(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    (void)stream, (void)bytes;
    *(int *)arg = err ? err : 1;
}

static void a_read_into_memory_says_that_it_waits(void) {
    char memory[10];
    int result = 0;
    begin(TCP);
    CHECK_INT(tcpsrv_read(reader, tcpsrv_into(memory, 10), note_result, &result), 0);
    CHECK_INT(tcpsrv_reading(reader), 1);
    say("hello");
    settle();
    CHECK_INT(tcpsrv_reading(reader), 1);
    say("world");
    settle();
    CHECK_INT(result, 1);
    CHECK_INT(tcpsrv_reading(reader), 0);
    end();
}

/* ---- limits ---------------------------------------------------------------------------------- */

static void until_limits(tcpsrv_want fits, tcpsrv_want exact, tcpsrv_want over) {
    say("abcde\nf");
    gives(fits, "abcde\n");
    gives(tcpsrv_some(0), "f");
    say("abcde\n");
    gives(exact, "abcde\n");
    say("abcdef"); /* no end within its limit */
    ends(over, TCPSRV_ETOOBIG);
    gives(tcpsrv_some(0), "abcdef");
    say("abcde\nmore"); /* an end, behind the limit, in one piece */
    ends(over, TCPSRV_ETOOBIG);
    gives(tcpsrv_until("\n", 0), "abcde\n"); /* the stream is open, its bytes are there */
    gives(tcpsrv_some(0), "more");
}

static void until_limit(void) {
    until_limits(tcpsrv_until("\n", 50), tcpsrv_until("\n", 6), tcpsrv_until("\n", 5));
}

static void a_delimiter_must_end_within_its_maximum(void) {
    on_each(until_limit);
}

static regex_t line_end;

static void regex_limit(void) {
    until_limits(tcpsrv_until_regex(&line_end, 50), tcpsrv_until_regex(&line_end, 6),
                 tcpsrv_until_regex(&line_end, 5));
}

static void a_match_must_end_within_its_maximum(void) {
    CHECK_INT(regcomp(&line_end, "e?\n", REG_EXTENDED), 0);
    on_each(regex_limit);
    regfree(&line_end);
}

static void other_limits(void) {
    say("12345");
    ends(tcpsrv_until_close(4), TCPSRV_ETOOBIG);
    ends(tcpsrv_exactly(((size_t)1 << 20) + 1), TCPSRV_ETOOBIG);
    gives(tcpsrv_exactly(5), "12345");
}

static void read_until_close_and_exactly_have_their_maximum_too(void) {
    on_each(other_limits);
}

static void at_the_limit_without_an_end_one_byte_more_decides(void) {
    int result = 0;
    begin(TCP);
    say("12345");
    CHECK_INT(tcpsrv_read(reader, tcpsrv_until("\n", 5), note_result, &result), 0);
    settle();
    CHECK_INT(result, 0);
    say("6");
    settle();
    CHECK_INT(result, TCPSRV_ETOOBIG);
    end();
}

static void a_limit_passed_already_is_told_to_the_callback_and_not_by_the_call(void) {
    int result = 0;
    begin(TCP);
    say("abcdef");
    settle();
    CHECK_INT(tcpsrv_read(reader, tcpsrv_until("\n", 5), note_result, &result), 0);
    CHECK_INT(result, 0);
    turns(2);
    CHECK_INT(result, TCPSRV_ETOOBIG);
    CHECK_INT(tcpsrv_closed(reader), 0);
    end();
}

static void the_write_limit_is_exact_and_an_empty_write_always_fits(void) {
    struct sockaddr_in address;
    tcpsrv_connect_options options;
    int listener = test_listener(&address);
    tcpsrv_stream *stream;
    char data[1001];
    memset(data, 'x', sizeof data);
    memset(&options, 0, sizeof options);
    options.host = "127.0.0.1";
    options.port = ntohs(address.sin_port);
    options.max_write_buffer_size = 1000;
    begin(TCP);
    stream = tcpsrv_connect(loop, &options);
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_write(stream, data, 1001), TCPSRV_EBUFFULL);
    CHECK_INT(tcpsrv_write(stream, data, 1000), 0);
    CHECK_INT(tcpsrv_write(stream, data, 1), TCPSRV_EBUFFULL);
    CHECK_INT(tcpsrv_write(stream, data, 0), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(tcpsrv_write(stream, data, 1), 0);
    tcpsrv_abort(stream);
    close(listener);
    end();
}

/* ---- ends ------------------------------------------------------------------------------------ */

static char events[32];

static void note(char letter) {
    size_t n = strlen(events);
    if (n + 1 < sizeof events) events[n] = letter;
}

static void note_close(tcpsrv_stream *stream, int result, size_t unsent, void *arg) {
    (void)stream, (void)unsent;
    *(int *)arg = result;
    note('c');
}

static void close_of_waiting(void) {
    int result = 1;
    CHECK_INT(tcpsrv_on_close(reader, note_close, &result), 0);
    say("x");
    gives(tcpsrv_exactly(1), "x");
    CHECK_INT(result, 1);
    finish();
    ends(tcpsrv_until("\n", 0), TCPSRV_EOF); /* who waits learns of the end of an idle peer */
    tcpsrv_close(reader);
    reader = NULL;
    settle();
    CHECK_INT(result, 0);
}

static void a_waiting_read_learns_of_the_end_and_on_close_follows_the_close(void) {
    on_each(close_of_waiting);
}

static void on_second(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    (void)arg;
    note(err ? 'E' : bytes.data[0]);
    if (err) tcpsrv_close(stream);
    else CHECK_INT(tcpsrv_read(stream, tcpsrv_exactly(1), on_second, NULL), 0);
}

static void on_close_comes_after_all_reads_that_can_be_answered(void) {
    int result = 1;
    begin(TCP);
    CHECK_INT(tcpsrv_on_close(reader, note_close, &result), 0);
    CHECK_INT(tcpsrv_read(reader, tcpsrv_exactly(1), on_second, NULL), 0);
    CHECK_INT(tcpsrv_write(writer, "12", 2), 0);
    finish();
    turns(10);
    CHECK_STR(events, "12Ec");
    CHECK_INT(result, 0);
    reader = NULL;
    end();
}

static void error_of_a_read(void) {
    int result = 0;
    say("abc");
    settle();
    CHECK_INT(tcpsrv_on_close(reader, note_close, &result), 0);
    let_fail(CALL_READ, 1, EIO);
    ends(tcpsrv_until_close(0), -EIO);
    CHECK_INT(tcpsrv_error(reader), -EIO);
    settle();
    CHECK_INT(result, -EIO);
}

static void an_error_of_a_receive_ends_the_read_and_is_kept(void) {
    on_each(error_of_a_read);
}

static void a_descriptor_closed_behind_its_back_is_an_error_at_once(void) {
    begin(TCP);
    settle();
    say("x");
    close(tcpsrv_fd(reader));
    ends(tcpsrv_exactly(2), -EBADF);
    end();
}

static void an_error_while_a_read_waits_is_told_once(void) {
    int result = 0, closed = 0;
    begin(TCP);
    CHECK_INT(tcpsrv_on_close(reader, note_close, &closed), 0);
    CHECK_INT(tcpsrv_read(reader, tcpsrv_exactly(5), note_result, &result), 0);
    turns(2);
    let_fail(CALL_READ, 1, ENOTCONN);
    CHECK_INT(tcpsrv_write(writer, "x", 1), 0);
    turns(3);
    CHECK_INT(result, -ENOTCONN);
    CHECK_INT(closed, -ENOTCONN);
    CHECK_STR(events, "c");
    reader = NULL; /* freed after its on_close */
    end();
}

static void unread_then_end(void) {
    tcpsrv_bytes bytes;
    say("unread");
    finish();
    settle();
    gives(tcpsrv_exactly(2), "un");
    settle();
    CHECK_INT(tcpsrv_peek(reader, &bytes), 4);
    CHECK_INT(tcpsrv_closed(reader), 0); /* an end of the peer is not one of the stream */
    gives(tcpsrv_until_close(0), "read");
}

static void the_end_of_an_idle_peer_leaves_what_is_unread(void) {
    on_each(unread_then_end);
}

static void write_to_nobody(void) {
    int i, err = 0;
    tcpsrv_abort(reader);
    reader = NULL;
    settle();
    for (i = 0; i < 10 && !err; i++) {
        err = tcpsrv_write(writer, "x", 1);
        settle();
    }
    CHECK(err == -EPIPE || err == -ECONNRESET);
}

static void writing_to_nobody_is_a_code_and_no_signal(void) {
    CHECK(signal(SIGPIPE, SIG_DFL) != SIG_ERR);
    on_each(write_to_nobody);
}

static void interrupted_exchange(void) {
    char memory[5];
    interrupts = 1;
    say("hello");
    gives(tcpsrv_exactly(5), "hello");
    say("world");
    CHECK_INT(tcpsrv_read_into(reader, memory, 5), 0);
    CHECK_MEM(memory, 5, "world");
    finish();
    gives(tcpsrv_until_close(0), "");
    interrupts = 0;
}

static void interrupted_calls_are_made_again(void) {
    on_each(interrupted_exchange);
}

/* ---- pieces of the body, as they come -------------------------------------------------------- */

static void streaming(void) {
    say("line\n1234");
    gives(tcpsrv_until("\n", 0), "line\n");
    gives(tcpsrv_some(6), "1234"); /* what is buffered comes at once */
    say("5678");
    gives(tcpsrv_some(2), "56");
    gives(tcpsrv_exactly(2), "78");
}

static void a_body_can_be_taken_in_the_pieces_that_come(void) {
    on_each(streaming);
}

static void streaming_to_the_end(void) {
    say("1234");
    gives(tcpsrv_some(0), "1234");
    say("5678");
    finish();
    settle();
    gives(tcpsrv_some(0), "5678");
    ends(tcpsrv_some(0), TCPSRV_EOF);
}

static void pieces_come_until_the_end_and_then_the_end(void) {
    on_each(streaming_to_the_end);
}

/* ---- pipes ----------------------------------------------------------------------------------- */

static void pipe_talk(void) {
    say("hel");
    CHECK_INT(tcpsrv_write(writer, "lo world", 8), 0);
    gives(tcpsrv_until(" ", 0), "hello ");
    gives(tcpsrv_exactly(3), "wor");
    finish();
    gives(tcpsrv_until_close(0), "ld");
}

static void two_writes_are_read_by_other_measures(void) {
    on_each(pipe_talk);
}

static void take(void *counter) { /* a coroutine's reads, by whatever piece */
    tcpsrv_bytes bytes;
    size_t *got = (size_t *)counter;
    while (*got < 1 << 20 && tcpsrv_read_some(reader, 0, &bytes) == 0) *got += bytes.size;
}

static int take_all(void *counter) {
    take(counter);
    return 0;
}

static void big_write(void) {
    static char data[1 << 20];
    size_t got = 0;
    int64_t id = tcpsrv_spawn(loop, take_all, &got, 0);
    CHECK_INT(tcpsrv_write(writer, data, sizeof data), 0);
    CHECK_INT(tcpsrv_flush(writer), 0);
    CHECK_INT(tcpsrv_join(id), 0);
    CHECK_INT(got, sizeof data);
}

static void a_mebibyte_goes_through(void) {
    on_each(big_write);
}

/* ---- the handshake --------------------------------------------------------------------------- */

#if defined(TCPSERVER_TLS)
static void note_suite(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    tcpsrv_tls_info info;
    (void)bytes;
    CHECK_INT(err, 0);
    CHECK_INT(tcpsrv_get_tls_info(stream, &info), 0);
    CHECK_STR(info.version, "TLSv1.2");
    ++*(int *)arg;
}

static void a_handshake_is_waited_for_by_one_at_a_time(void) {
    tcpsrv_tls_info info;
    int done = 0;
    if (!has_tls()) SKIP("no certificates: openssl is missing");
    serve_tls();
    dial_tls();
    CHECK_INT(tcpsrv_get_tls_info(reader, &info), -ENOTCONN);
    CHECK_INT(tcpsrv_read(reader, tcpsrv_ready(), note_suite, &done), 0);
    CHECK_INT(tcpsrv_wait_handshake(reader), TCPSRV_EBUSY);
    CHECK_INT(done, 0);
    while (!done) turns(1);
    CHECK_INT(tcpsrv_wait_handshake(reader), 0);
    CHECK_INT(tcpsrv_wait_handshake(reader), 0);
    CHECK_INT(done, 1);
    end();
}

static void a_reset_in_the_handshake_costs_one_connection(void) {
    struct linger now = { 1, 0 };
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (!has_tls()) SKIP("no certificates: openssl is missing");
    serve_tls();
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)tcpsrv_port(tls_server, 0));
    CHECK_INT(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_INT(send(fd, "\x16\x03\x01", 3, 0), 3);
    while (!writer) turns(1);
    CHECK_INT(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now), 0);
    close(fd);
    while (!tcpsrv_closed(writer)) turns(1);
    tcpsrv_close(writer);
    writer = NULL;
    dial_tls();
    CHECK_INT(tcpsrv_wait_handshake(reader), 0);
    say("hello");
    gives(tcpsrv_exactly(5), "hello");
    end();
}

static void a_connections_deadline_covers_its_handshake(void) {
    struct sockaddr_in address;
    tcpsrv_connect_options target;
    int mute = test_listener(&address);
    if (!has_tls()) SKIP("no certificates: openssl is missing");
    make_tls();
    memset(&target, 0, sizeof target);
    target.host = "127.0.0.1";
    target.port = ntohs(address.sin_port);
    target.tls = tls_here;
    target.timeout_ms = 100;
    loop = tcpsrv_loop_default();
    reader = tcpsrv_connect(loop, &target);
    CHECK(reader != NULL);
    CHECK_INT(tcpsrv_wait_handshake(reader), TCPSRV_ETIMEDOUT);
    CHECK(strstr(tcpsrv_last_error(), "timed out") != NULL);
    close(mute);
    end();
}
#else
static void a_connections_deadline_covers_its_handshake(void) {
    SKIP("BearSSL is missing");
}

static void a_handshake_is_waited_for_by_one_at_a_time(void) {
    SKIP("BearSSL is missing");
}

static void a_reset_in_the_handshake_costs_one_connection(void) {
    SKIP("BearSSL is missing");
}
#endif

/* ---- children of the program ----------------------------------------------------------------- */

static pid_t child;
static int child_status;
static tcpsrv_stream *child_in, *child_out, *child_err;

/* sh -c script, its three descriptors as streams here. */
static void start_child(const char *script) {
    int in[2], out[2], err[2];
    CHECK_INT(pipe(in) | pipe(out) | pipe(err), 0);
    child = fork();
    if (child == 0) {
        dup2(in[0], 0), dup2(out[1], 1), dup2(err[1], 2);
        close(in[0]), close(in[1]), close(out[0]), close(out[1]), close(err[0]), close(err[1]);
        execl("/bin/sh", "sh", "-c", script, (char *)NULL);
        _exit(127);
    }
    close(in[0]), close(out[1]), close(err[1]);
    loop = tcpsrv_loop_default();
    child_in = tcpsrv_stream_from_fd(loop, in[1]);
    child_out = tcpsrv_stream_from_fd(loop, out[0]);
    child_err = tcpsrv_stream_from_fd(loop, err[0]);
    CHECK(child_in && child_out && child_err);
}

static void on_sigchld(int signo, void *arg) {
    (void)arg;
    CHECK_INT(signo, SIGCHLD);
    if (waitpid(child, &child_status, WNOHANG) == child) tcpsrv_loop_stop(loop);
}

static void end_child(void) {
    CHECK(tcpsrv_on_signal(loop, SIGCHLD, on_sigchld, NULL) > 0);
    if (waitpid(child, &child_status, WNOHANG) == 0) CHECK_INT(tcpsrv_loop_run(loop), 0);
    tcpsrv_close(child_in);
    tcpsrv_close(child_out);
    tcpsrv_close(child_err);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void a_child_is_driven_through_its_pipes(void) {
    tcpsrv_bytes bytes;
    start_child("while read -r line; do echo \"got $line\"; done; echo tail; echo oops >&2");
    reader = child_out;
    CHECK_INT(tcpsrv_write(child_in, "one\n", 4), 0);
    gives(tcpsrv_until("\n", 0), "got one\n");
    CHECK_INT(tcpsrv_write(child_in, "two\n", 4), 0);
    gives(tcpsrv_until("\n", 0), "got two\n");
    CHECK_INT(tcpsrv_shutdown(child_in), 0);
    tcpsrv_close(child_in); /* its end of input: a pipe has no half */
    gives(tcpsrv_until_close(0), "tail\n");
    CHECK_INT(tcpsrv_read_until(child_err, "\n", 0, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "oops\n");
    child_in = tcpsrv_stream_from_fd(loop, open("/dev/null", O_WRONLY | O_CLOEXEC));
    end_child();
    CHECK(WIFEXITED(child_status) && WEXITSTATUS(child_status) == 0);
}

static void a_childs_end_is_told_by_its_signal(void) {
    start_child("read -r line; exit 1");
    CHECK_INT(tcpsrv_write(child_in, "\n", 1), 0);
    CHECK_INT(tcpsrv_flush(child_in), 0);
    end_child();
    CHECK(WIFEXITED(child_status) && WEXITSTATUS(child_status) == 1);
}

static void a_killed_child_tells_the_signal(void) {
    start_child("exec cat");
    CHECK_INT(kill(child, SIGTERM), 0);
    end_child();
    CHECK(WIFSIGNALED(child_status) && WTERMSIG(child_status) == SIGTERM);
}

/* ---- servers --------------------------------------------------------------------------------- */

static char logged[512];
static int log_count;

static void note_log(int level, const char *line, void *user) {
    (void)user;
    if (level > TCPSRV_LOG_WARNING) return;
    log_count++;
    snprintf(logged, sizeof logged, "%s", line);
}

static tcpsrv *serve(tcpsrv_stream_fn *handler) {
    tcpsrv_options options;
    tcpsrv *server;
    memset(&options, 0, sizeof options);
    options.handle_stream = handler;
    options.log = note_log;
    loop = tcpsrv_loop_default();
    server = tcpsrv_new(&options);
    CHECK(server != NULL);
    return server;
}

static tcpsrv_stream *connect_to(const char *host, int port, const char *path) {
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    memset(&options, 0, sizeof options);
    options.host = host;
    options.port = port;
    options.path = path;
    stream = tcpsrv_connect(loop, &options);
    CHECK(stream != NULL);
    return stream;
}

static void end_server(tcpsrv *server) {
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static int close_and_fail(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes bytes;
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_read_bytes(stream, 5, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "hello");
    return -EDOM;
}

static void a_failing_handler_is_logged_and_its_client_sees_an_orderly_end(void) {
    tcpsrv *server = serve(close_and_fail);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    reader = connect_to("127.0.0.1", tcpsrv_port(server, 0), NULL);
    CHECK_INT(tcpsrv_write(reader, "hello", 5), 0);
    gives(tcpsrv_until_close(0), "");
    CHECK(strstr(logged, strerror(EDOM)) != NULL);
    tcpsrv_close(reader);
    end_server(server);
}

static int say_data(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    return tcpsrv_write(stream, "data", 4);
}

static void a_handler_that_writes_and_returns_is_heard(void) {
    tcpsrv *server = serve(say_data);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    reader = connect_to("127.0.0.1", tcpsrv_port(server, 0), NULL);
    gives(tcpsrv_until_close(0), "data");
    tcpsrv_close(reader);
    end_server(server);
}

static int refuse_nameless(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)user;
    CHECK_INT(peer->family, AF_UNIX);
    CHECK_STR(peer->path, "");
    CHECK_INT(tcpsrv_read_until(stream, "\r\n\r\n", 0, NULL), 0);
    return tcpsrv_write(stream, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
}

static void refused_at(const char *path) {
    tcpsrv *server = serve(refuse_nameless);
    int fd = tcpsrv_bind_unix_socket(path, 0, 0);
    CHECK(fd >= 0);
    CHECK_INT(tcpsrv_add_socket(server, fd), 0);
    reader = connect_to(NULL, 0, path);
    CHECK_INT(tcpsrv_write(reader, "garbage\r\n\r\n", 11), 0);
    gives(tcpsrv_until_close(0), "HTTP/1.1 400 Bad Request\r\n\r\n");
    tcpsrv_close(reader);
    end_server(server);
}

static void a_refusal_over_a_unix_socket_is_readable_and_the_peer_has_no_name(void) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/tcpserver-test-%ld", (long)getpid());
    refused_at(path);
    snprintf(path, sizeof path, "@tcpserver-test-%ld", (long)getpid());
    refused_at(path);
}

static int is_served(tcpsrv *server) {
    tcpsrv_bytes bytes;
    int err;
    reader = connect_to("127.0.0.1", tcpsrv_port(server, 0), NULL);
    err = tcpsrv_read_until_close(reader, 0, &bytes);
    err = !err && bytes.size == 4;
    tcpsrv_close(reader);
    return err;
}

/* A failure that passes costs no connection. A lack is logged once and pauses; without a descriptor
   one connection is shed, so that it does not come again and again. */
static void accept_survives(int code, int times, int lines) {
    tcpsrv *server = serve(say_data);
    log_count = 0;
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    let_fail(CALL_ACCEPT, times, code);
    CHECK_INT(is_served(server), code != ENFILE);
    CHECK_INT(log_count, lines);
    CHECK_INT(fail_times[CALL_ACCEPT], 0);
    CHECK_INT(is_served(server), 1);
    end_server(server);
}

static void accepting_survives_its_failures(void) {
    static const int passing[] = { EINTR, ECONNABORTED, EPROTO, ENETDOWN, EHOSTUNREACH };
    static const int lacking[] = { ENFILE, ENOBUFS, ENOMEM };
    size_t i;
    for (i = 0; i < sizeof passing / sizeof *passing; i++) accept_survives(passing[i], 3, 0);
    for (i = 0; i < sizeof lacking / sizeof *lacking; i++) accept_survives(lacking[i], 1, 1);
}

static int ticks_seen, accepted_at_tick;

static void count_accepted(void *arg) {
    tcpsrv_stats stats;
    tcpsrv_get_stats((tcpsrv *)arg, &stats);
    if (!ticks_seen++) accepted_at_tick = (int)stats.accepted;
}

static void timers_run_between_batches_of_accepted_connections(void) {
    tcpsrv *server = serve(say_data);
    tcpsrv_stats stats;
    int fds[300], i;
    struct sockaddr_in address;
    int listener = test_listener(&address);
    for (i = 0; i < 300; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM, 0);
        CHECK_INT(connect(fds[i], (struct sockaddr *)&address, sizeof address), 0);
    }
    CHECK_INT(test_set_nonblocking(listener), 0);
    CHECK_INT(tcpsrv_add_socket(server, listener), 0);
    CHECK(tcpsrv_call_soon(loop, count_accepted, server) > 0);
    for (i = 0; i < 20; i++) turns(1);
    tcpsrv_get_stats(server, &stats);
    CHECK_INT(stats.accepted, 300);
    CHECK(ticks_seen == 1 && accepted_at_tick < 300);
    for (i = 0; i < 300; i++) close(fds[i]);
    end_server(server);
}

static void a_second_stop_leaves_a_reused_descriptor_alone(void) {
    tcpsrv *server = serve(say_data);
    int fd, other;
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    other = dup(0);
    tcpsrv_stop(server);
    fd = dup(0); /* the listener's number, most likely */
    tcpsrv_stop(server);
    CHECK(fcntl(fd, F_GETFD) >= 0);
    close(fd);
    close(other);
    end_server(server);
}

static void ten_thousand_connections_leave_nothing_open(void) {
    tcpsrv *server = serve(say_data);
    tcpsrv_stats stats;
    int i;
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    for (i = 0; i < 10000; i++) {
        reader = connect_to("127.0.0.1", tcpsrv_port(server, 0), NULL);
        gives(tcpsrv_until_close(0), "data");
        tcpsrv_abort(reader);
    }
    turns(3);
    tcpsrv_get_stats(server, &stats);
    CHECK_INT(stats.accepted, 10000);
    CHECK_INT(stats.active, 0);
    end_server(server);
}

/* ---- sockets --------------------------------------------------------------------------------- */

static void when_the_second_family_has_not_the_port_another_is_tried(void) {
    int fds[8], n = tcpsrv_bind_sockets(0, NULL, NULL, fds, 8), i;
    for (i = 0; i < n; i++) close(fds[i]);
    if (n < 2) SKIP("a host with one address family");
    let_fail(CALL_BIND, 1, EADDRINUSE); /* the first bind of the first try */
    n = tcpsrv_bind_sockets(0, NULL, NULL, fds, 8);
    CHECK(n >= 2);
    CHECK_INT(tcpsrv__local_port(fds[0]), tcpsrv__local_port(fds[1]));
    for (i = 0; i < n; i++) close(fds[i]);
    let_fail(CALL_BIND, 1000, EADDRINUSE);
    CHECK_INT(tcpsrv_bind_sockets(0, NULL, NULL, fds, 8), -EADDRINUSE);
    let_fail(CALL_BIND, 0, 0);
}

static void a_host_without_any_family_is_an_error(void) {
    int fds[8];
    let_fail(CALL_SOCKET, 1000, EAFNOSUPPORT);
    CHECK_INT(tcpsrv_bind_sockets(0, NULL, NULL, fds, 8), -EAFNOSUPPORT);
    let_fail(CALL_SOCKET, 0, 0);
}

static void an_ipv6_listener_takes_no_ipv4(void) {
    tcpsrv_bind_options options;
    struct sockaddr_in address;
    int fds[2], fd;
    memset(&options, 0, sizeof options);
    options.family = AF_INET6;
    if (tcpsrv_bind_sockets(0, NULL, &options, fds, 2) != 1) SKIP("a host without IPv6");
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)tcpsrv__local_port(fds[0]));
    fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_INT(connect(fd, (struct sockaddr *)&address, sizeof address), -1);
    CHECK_INT(errno, ECONNREFUSED);
    close(fd);
    close(fds[0]);
}

static void a_path_that_is_too_long_is_refused(void) {
    char path[200];
    memset(path, 'x', sizeof path);
    path[0] = '/';
    path[sizeof path - 1] = 0;
    CHECK_INT(tcpsrv_bind_unix_socket(path, 0, 0), -ENAMETOOLONG);
}

/* One of three processes that share a port by SO_REUSEPORT. */
static int listen_in_child(int port) {
    tcpsrv_bind_options options;
    tcpsrv *server = serve(say_data);
    int err;
    memset(&options, 0, sizeof options);
    options.reuse_port = 1;
    err = tcpsrv_bind(server, port, "127.0.0.1", &options);
    if (!err) err = tcpsrv_start(server, 1);
    turns(1);
    end_server(server);
    return err;
}

static void processes_with_reuse_port_listen_on_one_port(void) {
    tcpsrv_bind_options options;
    int fds[2], i, status, port;
    pid_t pids[3];
    memset(&options, 0, sizeof options);
    options.reuse_port = 1;
    CHECK_INT(tcpsrv_bind_sockets(0, "127.0.0.1", &options, fds, 2), 1);
    port = tcpsrv__local_port(fds[0]);
    for (i = 0; i < 3; i++) {
        pids[i] = fork();
        if (pids[i] == 0) _exit(listen_in_child(port) != 0);
    }
    for (i = 0; i < 3; i++) {
        CHECK_INT(waitpid(pids[i], &status, 0), pids[i]);
        CHECK_INT(status, 0);
    }
    close(fds[0]);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(a_reply_that_comes_with_the_end_is_read_whole),
        TEST(a_read_of_zero_bytes_disturbs_nothing),
        TEST(a_line_a_head_and_a_body_are_read_one_by_one),
        TEST(an_end_before_the_message_is_an_error_and_its_part_stays),
        TEST(after_the_rest_was_read_a_read_fails_at_once),
        TEST(an_empty_write_is_done_at_once),
        TEST(what_came_before_a_close_is_readable_after_it),
        TEST(read_until_close_after_the_close_gives_what_is_left),
        TEST(a_line_of_four_mebibytes_is_one_message),
        TEST(a_partial_read_gives_what_is_there_up_to_its_maximum),
        TEST(small_reads_from_a_large_stream_do_not_overflow),
        TEST(small_lines_from_a_large_stream_keep_within_their_maximum),
        TEST(reads_into_memory_and_others_share_the_bytes_in_order),
        TEST(a_read_into_memory_says_that_it_waits),
        TEST(a_delimiter_must_end_within_its_maximum),
        TEST(a_match_must_end_within_its_maximum),
        TEST(read_until_close_and_exactly_have_their_maximum_too),
        TEST(at_the_limit_without_an_end_one_byte_more_decides),
        TEST(a_limit_passed_already_is_told_to_the_callback_and_not_by_the_call),
        TEST(the_write_limit_is_exact_and_an_empty_write_always_fits),
        TEST(a_waiting_read_learns_of_the_end_and_on_close_follows_the_close),
        TEST(on_close_comes_after_all_reads_that_can_be_answered),
        TEST(an_error_of_a_receive_ends_the_read_and_is_kept),
        TEST(a_descriptor_closed_behind_its_back_is_an_error_at_once),
        TEST(an_error_while_a_read_waits_is_told_once),
        TEST(the_end_of_an_idle_peer_leaves_what_is_unread),
        TEST(writing_to_nobody_is_a_code_and_no_signal),
        TEST(interrupted_calls_are_made_again),
        TEST(a_body_can_be_taken_in_the_pieces_that_come),
        TEST(pieces_come_until_the_end_and_then_the_end),
        TEST(two_writes_are_read_by_other_measures),
        TEST(a_mebibyte_goes_through),
        TEST(a_handshake_is_waited_for_by_one_at_a_time),
        TEST(a_reset_in_the_handshake_costs_one_connection),
        TEST(a_connections_deadline_covers_its_handshake),
        TEST(a_child_is_driven_through_its_pipes),
        TEST(a_childs_end_is_told_by_its_signal),
        TEST(a_killed_child_tells_the_signal),
        TEST(a_failing_handler_is_logged_and_its_client_sees_an_orderly_end),
        TEST(a_handler_that_writes_and_returns_is_heard),
        TEST(a_refusal_over_a_unix_socket_is_readable_and_the_peer_has_no_name),
        TEST(accepting_survives_its_failures),
        TEST(timers_run_between_batches_of_accepted_connections),
        TEST(a_second_stop_leaves_a_reused_descriptor_alone),
        TEST(ten_thousand_connections_leave_nothing_open),
        TEST(when_the_second_family_has_not_the_port_another_is_tried),
        TEST(a_host_without_any_family_is_an_error),
        TEST(an_ipv6_listener_takes_no_ipv4),
        TEST(a_path_that_is_too_long_is_refused),
        TEST(processes_with_reuse_port_listen_on_one_port),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
