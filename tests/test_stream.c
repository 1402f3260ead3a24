/* Streams: what each read value gives, how writes are bounded, and in which order things end. Most
   claims are tried twice: as a straight caller that runs the loop, and as a coroutine. */
#include "test.h"
#include <regex.h>

enum { BIG = 8 << 20 };

static tcpsrv_loop *loop;
static tcpsrv_stream *stream;
static int raw;                 /* the peer's end of the stream's connection */

static void begin(void) {
    int fds[2];
    CHECK_INT(test_pair(fds), 0);
    loop = tcpsrv_loop_default();
    CHECK(loop != NULL);
    raw = fds[0];
    stream = tcpsrv_stream_from_fd(loop, fds[1]);
    CHECK(stream != NULL);
}

static void end(void) {
    if (raw >= 0) close(raw);
    raw = -1;
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static int run_body(void *body) {
    void (*fn)(void);
    memcpy(&fn, body, sizeof fn);
    fn();
    return 0;
}

static void both(void (*body)(void)) {
    begin();
    body();
    tcpsrv_close(stream);
    end();
    begin();
    CHECK_INT(tcpsrv_join(tcpsrv_spawn(loop, run_body, &body, 65536)), 0);
    tcpsrv_close(stream);
    end();
}

static void say(const char *text) {
    CHECK_INT(send(raw, text, strlen(text), MSG_NOSIGNAL), (int)strlen(text));
}

static void say_arg(void *text) {
    say((const char *)text);
}

static void say_later(int ms, const char *text) {
    CHECK(tcpsrv_call_later(loop, ms, say_arg, (void *)(uintptr_t)text) > 0);
}

static void finish_arg(void *arg) {
    (void)arg;
    shutdown(raw, SHUT_WR);
}

static void expect_read(tcpsrv_want want, const char *text) {
    tcpsrv_bytes bytes;
    CHECK_INT(tcpsrv_await(stream, want, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, text);
}

static void expect_code(tcpsrv_want want, int code) {
    tcpsrv_bytes bytes;
    CHECK_INT(tcpsrv_await(stream, want, &bytes), code);
    CHECK_INT(bytes.size, 0);
}

static char pattern(size_t at) {
    return (char)(at * 2654435761u >> 13);
}

static char *patterned(size_t size) {
    char *data = (char *)malloc(size);
    size_t i;
    CHECK(data != NULL);
    for (i = 0; i < size; i++) data[i] = pattern(i);
    return data;
}

/* ---- read values ----------------------------------------------------------------------------- */

static void until_body(void) {
    say("a\nbc\n\nrest");
    expect_read(tcpsrv_until("\n", 0), "a\n");
    expect_read(tcpsrv_until("\n", 0), "bc\n");
    expect_read(tcpsrv_until("\n", 0), "\n");
    expect_read(tcpsrv_some(0), "rest");
}

static void read_until_gives_each_message_with_its_delimiter(void) {
    both(until_body);
}

static void split_body(void) {
    static const char *text = "x--=--y--==";
    size_t i, size = strlen(text);
    for (i = 1; i < size; i++) {
        char head[16], tail[16];
        snprintf(head, sizeof head, "%.*s", (int)i, text);
        snprintf(tail, sizeof tail, "%s", text + i);
        say(head);
        say_later(2, tail);
        expect_read(tcpsrv_until("--==", 0), text);
    }
}

static void read_until_finds_a_delimiter_split_across_reads_at_every_place(void) {
    both(split_body);
}

static void nul_body(void) {
    tcpsrv_bytes bytes;
    CHECK_INT(send(raw, "a\0\0b\0\1c", 7, 0), 7);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_until_mem("\0\1", 2, 0), &bytes), 0);
    CHECK_INT(bytes.size, 6);
    CHECK(memcmp(bytes.data, "a\0\0b\0\1", 6) == 0);
    expect_read(tcpsrv_some(0), "c");
}

static void delimiters_and_messages_may_hold_nuls(void) {
    both(nul_body);
}

static void max_body(void) {
    say("12345\n");
    expect_read(tcpsrv_until("\n", 6), "12345\n");
    say("123456\n");
    expect_code(tcpsrv_until("\n", 6), TCPSRV_ETOOBIG);
    CHECK_INT(tcpsrv_closed(stream), 0);
    expect_read(tcpsrv_exactly(7), "123456\n");
    say("123456");
    CHECK_INT(tcpsrv_set_timeout(stream, 20, 0), 0);
    expect_code(tcpsrv_until("\n", 6), TCPSRV_ETIMEDOUT);
    say("7");
    expect_code(tcpsrv_until("\n", 6), TCPSRV_ETOOBIG);
    expect_read(tcpsrv_some(0), "1234567");
    expect_code(tcpsrv_exactly((1u << 20) + 1), TCPSRV_ETOOBIG);
}

static void a_message_over_its_max_is_refused_and_its_bytes_stay(void) {
    both(max_body);
}

static void sizes_body(void) {
    char memory[8];
    tcpsrv_bytes bytes;
    say("abcdefghijkl");
    expect_read(tcpsrv_exactly(0), "");
    expect_read(tcpsrv_exactly(3), "abc");
    expect_read(tcpsrv_some(2), "de");
    CHECK_INT(tcpsrv_peek(stream, &bytes), 7);
    CHECK_MEM(bytes.data, bytes.size, "fghijkl");
    CHECK_INT(tcpsrv_read_into(stream, memory, 4), 0);
    CHECK_MEM(memory, 4, "fghi");
    say_later(2, "mnopqrstuvw");
    CHECK_INT(tcpsrv_read_into(stream, memory, 8), 0);
    CHECK_MEM(memory, 8, "jklmnopq");
    expect_read(tcpsrv_some(0), "rstuvw");
    CHECK_INT(tcpsrv_read_into(stream, memory, 0), 0);
}

static void exactly_some_into_and_peek_share_one_order_of_bytes(void) {
    both(sizes_body);
}

static int64_t asked;

static int64_t find_end(const char *data, size_t size, void *arg) {
    (void)arg;
    asked++;
    if (data[0] == '!') return -1;
    return size < 2 ? 0 : 2 + (data[0] - '0') * 10 + (data[1] - '0');
}

static void frame_body(void) {
    asked = 0;
    say("0");
    say_later(2, "4ab");
    say_later(4, "c");
    say_later(6, "d03xyz");
    expect_read(tcpsrv_frame(find_end, NULL, 0), "04abcd");
    CHECK_INT(asked, 2);
    expect_read(tcpsrv_frame(find_end, NULL, 0), "03xyz");
    say("99");
    expect_code(tcpsrv_frame(find_end, NULL, 50), TCPSRV_ETOOBIG);
    expect_read(tcpsrv_some(0), "99");
    say("!");
    expect_code(tcpsrv_frame(find_end, NULL, 0), TCPSRV_EREFUSED);
    expect_read(tcpsrv_some(0), "!");
}

static void a_frame_is_asked_for_its_end_only_while_that_is_not_known(void) {
    both(frame_body);
}

static void regex_body(void) {
    regex_t regex;
    CHECK_INT(regcomp(&regex, "\r?\n", REG_EXTENDED), 0);
    say("one\r\ntwo\nthr");
    say_later(3, "ee\r");
    say_later(6, "\n");
    expect_read(tcpsrv_until_regex(&regex, 0), "one\r\n");
    expect_read(tcpsrv_until_regex(&regex, 0), "two\n");
    expect_read(tcpsrv_until_regex(&regex, 0), "three\r\n");
    say("too long");
    expect_code(tcpsrv_until_regex(&regex, 4), TCPSRV_ETOOBIG);
    regfree(&regex);
    expect_read(tcpsrv_some(0), "too long");
}

static void a_regular_expression_ends_a_message(void) {
    both(regex_body);
}

static void eof_body(void) {
    char memory[16];
    say("half a mess");
    tcpsrv_call_later(loop, 5, finish_arg, NULL);
    expect_code(tcpsrv_until("\n", 0), TCPSRV_EOF);
    CHECK_INT(tcpsrv_read_into(stream, memory, 16), TCPSRV_EOF);
    expect_code(tcpsrv_exactly(100), TCPSRV_EOF);
    expect_read(tcpsrv_some(4), "half");
    expect_read(tcpsrv_until_close(0), " a mess");
    expect_read(tcpsrv_until_close(0), "");
    expect_code(tcpsrv_some(0), TCPSRV_EOF);
    CHECK_INT(tcpsrv_closed(stream), 0);
    CHECK_INT(tcpsrv_write(stream, "answer", 6), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(recv(raw, memory, sizeof memory, 0), 6);
}

static void after_the_peer_has_finished_its_bytes_are_readable_and_it_gets_its_answer(void) {
    both(eof_body);
}

/* ---- requests -------------------------------------------------------------------------------- */

static int called, last_err;
static char last_text[64];

static void note_read(tcpsrv_stream *from, int err, tcpsrv_bytes bytes, void *arg) {
    (void)from, (void)arg;
    called++;
    last_err = err;
    snprintf(last_text, sizeof last_text, "%.*s", (int)bytes.size, bytes.data);
}

static void flush_noted(tcpsrv_stream *from, int err, void *arg) {
    (void)from, (void)arg;
    CHECK_INT(err, 0);
    called++;
}

static void turns(int n) {
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
}

static void a_callback_read_ends_once_and_never_inside_the_call(void) {
    begin();
    say("a\nb\n");
    turns(1);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), note_read, NULL), 0);
    CHECK_INT(called, 0);
    CHECK_INT(tcpsrv_reading(stream), 1);
    turns(3);
    CHECK_INT(called, 1);
    CHECK_STR(last_text, "a\n");
    CHECK_INT(tcpsrv_reading(stream), 0);
    tcpsrv_close(stream);
    end();
}

static void a_second_read_is_refused_and_the_first_is_untouched(void) {
    begin();
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), note_read, NULL), 0);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_some(0), note_read, NULL), TCPSRV_EBUSY);
    CHECK(strstr(tcpsrv_last_error(), "read 127.0.0.1:") == tcpsrv_last_error());
    say("line\n");
    turns(3);
    CHECK_INT(called, 1);
    CHECK_STR(last_text, "line\n");
    tcpsrv_close(stream);
    end();
}

static void a_cancelled_read_leaves_its_bytes_for_the_next(void) {
    char memory[8];
    begin();
    CHECK_INT(tcpsrv_read(stream, tcpsrv_into(memory, 8), note_read, NULL), 0);
    say("abc");
    turns(3);
    tcpsrv_cancel_read(stream);
    CHECK_INT(called, 0);
    turns(2);
    CHECK_INT(last_err, TCPSRV_ECANCELED);
    say("d\n");
    expect_read(tcpsrv_until("\n", 0), "abcd\n");
    CHECK_INT(called, 1);
    tcpsrv_close(stream);
    end();
}

static int cancel_and_stop(void *arg) {
    (void)arg;
    tcpsrv_cancel_read(stream);
    tcpsrv_loop_stop(loop);
    return 0;
}

static void a_cancel_that_a_stop_overtakes_ends_no_later_read(void) {
    begin();
    CHECK_INT(tcpsrv_yield(), 0);
    CHECK(tcpsrv_spawn(loop, cancel_and_stop, NULL, 0) > 0);
    expect_code(tcpsrv_until("\n", 0), TCPSRV_ECANCELED);
    say_later(20, "line\n");
    expect_read(tcpsrv_until("\n", 0), "line\n");
    tcpsrv_close(stream);
    end();
}

static int64_t cancel_midway(const char *data, size_t size, void *arg) {
    (void)data, (void)arg;
    tcpsrv_cancel_read(stream);
    return (int64_t)size;
}

static void cancel_midway_body(void) {
    say("one");
    expect_read(tcpsrv_some(1), "o");
    expect_read(tcpsrv_frame(cancel_midway, NULL, 0), "ne");
    say_later(20, "line\n");
    expect_read(tcpsrv_until("\n", 0), "line\n");
}

static void a_cancel_by_the_framing_ends_its_own_read_at_most(void) {
    both(cancel_midway_body);
}

static void trickle_body(void) {
    int i;
    CHECK_INT(tcpsrv_set_timeout(stream, 60, 0), 0);
    for (i = 0; i < 20; i++) say_later(10 * i, "t");
    expect_code(tcpsrv_until("\n", 0), TCPSRV_ETIMEDOUT);
    CHECK_INT(tcpsrv_closed(stream), 0);
    CHECK_INT(tcpsrv_set_timeout(stream, 0, 0), 0);
    expect_read(tcpsrv_exactly(20), "tttttttttttttttttttt");
}

static void a_read_timeout_covers_the_whole_message_and_the_stream_survives_it(void) {
    both(trickle_body);
}

static void a_mark_before_a_file_does_not_hold_it_up(void) {
    char path[] = "/tmp/tcpserver-test-XXXXXX", text[16];
    int file = mkstemp(path);
    begin();
    CHECK_INT(write(file, "file", 4), 4);
    CHECK_INT(tcpsrv_on_flush(stream, flush_noted, NULL), 0);
    CHECK_INT(tcpsrv_sendfile(stream, file, 0, 4), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(recv(raw, text, sizeof text, 0), 4);
    turns(1);
    CHECK_INT(called, 1);
    tcpsrv_close(stream);
    end();
    close(file);
    unlink(path);
}

static void poke(void *arg) {
    (void)arg;
    send(raw, "x", 1, MSG_NOSIGNAL);
}

static void what_the_peer_sends_does_not_keep_a_stalled_write_alive(void) {
    char *data = patterned(BIG);
    tcpsrv_bytes bytes;
    int i, err = 0;
    begin();
    CHECK_INT(tcpsrv_set_timeout(stream, 0, 150), 0);
    for (i = 0; i < 2000 && !err; i++) {
        CHECK(tcpsrv_call_later(loop, 1, poke, NULL) > 0);
        tcpsrv_write(stream, data, 500000);
        err = tcpsrv_read_some(stream, 0, &bytes);
    }
    CHECK_INT(err, TCPSRV_ETIMEDOUT);
    tcpsrv_close(stream);
    end();
    free(data);
}

static int hold_view(void *arg) {
    tcpsrv_bytes view;
    (void)arg;
    say("precious\nmore");
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &view), 0);
    say("flood flood flood");
    CHECK_INT(tcpsrv_sleep(10), 0);
    CHECK_INT(tcpsrv_write(stream, view.data, view.size), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_MEM(view.data, view.size, "precious\n");
    return 0;
}

static void a_view_holds_across_other_waits_until_the_next_read(void) {
    begin();
    CHECK_INT(tcpsrv_join(tcpsrv_spawn(loop, hold_view, NULL, 0)), 0);
    expect_read(tcpsrv_exactly(21), "moreflood flood flood");
    tcpsrv_close(stream);
    end();
}

/* ---- writing --------------------------------------------------------------------------------- */

/* Reads size bytes of the pattern from the descriptor, in a thread beside the loop. */
typedef struct reader {
    pthread_t thread;
    int fd, delay_ms;
    size_t want, got, wrong;
} reader;

static void *read_pattern(void *arg) {
    reader *own = (reader *)arg;
    char bytes[65536];
    struct pollfd entry;
    test_sleep_ms(own->delay_ms);
    entry.fd = own->fd;
    entry.events = POLLIN;
    while (own->got < own->want) {
        ssize_t n, i;
        poll(&entry, 1, 5000);
        n = recv(own->fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
        for (i = 0; i < n; i++) own->wrong += bytes[i] != pattern(own->got + (size_t)i);
        if (n > 0) own->got += (size_t)n;
    }
    return NULL;
}

static void start_reader(reader *own, size_t want, int delay_ms) {
    memset(own, 0, sizeof *own);
    own->fd = raw;
    own->want = want;
    own->delay_ms = delay_ms;
    CHECK_INT(pthread_create(&own->thread, NULL, read_pattern, own), 0);
}

static void check_reader(reader *own, size_t want) {
    CHECK_INT(pthread_join(own->thread, NULL), 0);
    CHECK_INT(own->got, want);
    CHECK_INT(own->wrong, 0);
}

static int write_big(void *data) {
    int64_t before = test_live_bytes;
    CHECK_INT(tcpsrv_write(stream, data, BIG), 0);
    CHECK(test_live_bytes - before < 256 * 1024);
    return 0;
}

static void a_large_write_goes_from_the_callers_memory_and_waits(void) {
    char *data = patterned(BIG);
    reader peer;
    begin();
    start_reader(&peer, BIG, 30);
    CHECK_INT(tcpsrv_join(tcpsrv_spawn(loop, write_big, data, 0)), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    check_reader(&peer, BIG);
    tcpsrv_close(stream);
    end();
    free(data);
}

static void outside_coroutines_all_is_queued_or_nothing(void) {
    char *data = patterned(BIG);
    size_t sent = 0;
    reader peer;
    int err = 0;
    begin();
    while (!err && sent + 100000 < BIG) {
        err = tcpsrv_write(stream, data + sent, 100000);
        if (!err) sent += 100000;
    }
    CHECK_INT(err, TCPSRV_EBUFFULL);
    CHECK_INT(tcpsrv_write(stream, data, 2 << 20), TCPSRV_EBUFFULL);
    CHECK_INT(tcpsrv_writing(stream), 1);
    start_reader(&peer, sent, 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    check_reader(&peer, sent);
    tcpsrv_close(stream);
    end();
    free(data);
}

static int write_letters(void *letter) {
    char *data = (char *)malloc(1 << 20);
    int err;
    memset(data, *(const char *)letter, 1 << 20);
    err = tcpsrv_write(stream, data, 1 << 20);
    free(data);
    return err;
}

static void several_writers_are_served_whole_and_in_order(void) {
    int64_t ids[3];
    char *all = (char *)malloc(3 << 20);
    size_t got = 0;
    int i;
    begin();
    for (i = 0; i < 3; i++)
        ids[i] = tcpsrv_spawn(loop, write_letters, (void *)(uintptr_t)&"abc"[i], 0);
    while (got < 3 << 20) {
        ssize_t n = recv(raw, all + got, (3 << 20) - got, MSG_DONTWAIT);
        if (n > 0) got += (size_t)n;
        else turns(1);
    }
    for (i = 0; i < 3; i++) {
        CHECK_INT(tcpsrv_join(ids[i]), 0);
        CHECK_INT(all[i << 20], "abc"[i]);
        CHECK_INT(all[((i + 1) << 20) - 1], "abc"[i]);
    }
    free(all);
    tcpsrv_close(stream);
    end();
}

static void forms_body(void) {
    tcpsrv_bytes pieces[3] = { { "one ", 4 }, { "", 0 }, { "two ", 4 } };
    char text[80], *big = (char *)malloc(100001), *back = (char *)malloc(100001);
    size_t got = 0;
    memset(big, 'p', 100000);
    big[100000] = 0;
    CHECK_INT(tcpsrv_writev(stream, pieces, 3), 0);
    CHECK_INT(tcpsrv_printf(stream, "%d %s ", 3, "four"), 0);
    CHECK_INT(tcpsrv_write(stream, "", 0), 0);
    CHECK_INT(tcpsrv_try_write(stream, "five", 4), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(recv(raw, text, sizeof text, 0), 19);
    CHECK_MEM(text, 19, "one two 3 four five");
    CHECK_INT(tcpsrv_printf(stream, "%s", big), 0);
    while (got < 100000) {
        ssize_t n = recv(raw, back + got, 100000 - got, 0);
        if (n > 0) got += (size_t)n;
        else CHECK_INT(tcpsrv_sleep(1), 0);
    }
    CHECK(memcmp(big, back, 100000) == 0);
    free(big);
    free(back);
}

static void writev_printf_and_try_write_keep_the_order(void) {
    both(forms_body);
}

static void files_body(void) {
    char path[] = "/tmp/tcpserver-test-XXXXXX", text[32];
    int file = mkstemp(path), copy = dup(file);
    CHECK_INT(write(file, "0123456789", 10), 10);
    CHECK_INT(tcpsrv_write(stream, "<", 1), 0);
    CHECK_INT(tcpsrv_sendfile(stream, copy, 3, 4), 0);
    close(copy);
    CHECK_INT(tcpsrv_write(stream, ">", 1), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(recv(raw, text, sizeof text, 0), 6);
    CHECK_MEM(text, 6, "<3456>");
    if (tcpsrv_sendfile(stream, file, 8, 4) == 0) CHECK_INT(tcpsrv_flush(stream), -EIO);
    CHECK_INT(tcpsrv_error(stream), -EIO);
    CHECK_INT(recv(raw, text, sizeof text, 0), 2);
    CHECK_INT(recv(raw, text, sizeof text, 0), -1);
    CHECK_INT(errno, ECONNRESET);
    close(file);
    unlink(path);
}

static void a_file_is_sent_from_its_offset_and_a_short_one_ends_the_stream(void) {
    both(files_body);
}

static void a_stalled_peer_ends_a_stream_with_a_write_timeout(void) {
    char *data = patterned(BIG);
    int err;
    begin();
    CHECK_INT(tcpsrv_set_timeout(stream, 0, 100), 0);
    do
        while (tcpsrv_write(stream, data, 500000) == 0) continue;
    while ((err = tcpsrv_flush(stream)) == 0); /* until the kernel's buffers are full too */
    CHECK_INT(err, TCPSRV_ETIMEDOUT);
    CHECK_INT(tcpsrv_closed(stream), 1);
    CHECK_INT(tcpsrv_write(stream, "x", 1), TCPSRV_ETIMEDOUT);
    tcpsrv_close(stream);
    end();
    free(data);
}

/* ---- ends ------------------------------------------------------------------------------------ */

static char order[64];
static int close_result;
static size_t close_unsent;

static void note_order(char letter) {
    size_t n = strlen(order);
    if (n + 1 < sizeof order) order[n] = letter;
}

static void closed(tcpsrv_stream *from, int result, size_t unsent, void *arg) {
    (void)from, (void)arg;
    note_order('c');
    close_result = result;
    close_unsent = unsent;
}

static void order_read(tcpsrv_stream *from, int err, tcpsrv_bytes bytes, void *arg) {
    (void)from, (void)bytes, (void)arg;
    note_order(err == TCPSRV_ECLOSED ? 'r' : '?');
}

static void order_flush(tcpsrv_stream *from, int err, void *arg) {
    (void)from, (void)err, (void)arg;
    note_order('f');
}

/* So that no large write goes out as a whole. */
static void make_send_buffer_small(void) {
    int size = 65536;
    CHECK_INT(setsockopt(tcpsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &size, sizeof size), 0);
}

static void closing_ends_requests_flushes_and_calls_on_close_last_and_once(void) {
    char *data = patterned(BIG);
    int64_t id;
    reader peer;
    begin();
    make_send_buffer_small();
    id = tcpsrv_id(stream);
    CHECK(tcpsrv_by_id(loop, id) == stream);
    CHECK_INT(tcpsrv_on_close(stream, closed, NULL), 0);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_some(0), order_read, NULL), 0);
    CHECK_INT(tcpsrv_write(stream, data, 1000000), 0);
    CHECK_INT(tcpsrv_on_flush(stream, order_flush, NULL), 0);
    tcpsrv_close(stream);
    tcpsrv_close(stream);
    CHECK_INT(tcpsrv_write(stream, "x", 1), TCPSRV_ECLOSED);
    CHECK_STR(order, "");
    CHECK(tcpsrv_by_id(loop, id) == NULL);
    start_reader(&peer, 1000001, 20);
    while (!strchr(order, 'c') && peer.got < 1000000) turns(1);
    shutdown(raw, SHUT_WR);
    while (!strchr(order, 'c')) turns(1);
    check_reader(&peer, 1000000);
    turns(3);
    CHECK_STR(order, "rfc");
    CHECK_INT(close_result, 0);
    CHECK_INT(close_unsent, 0);
    end();
    free(data);
}

static void a_reply_survives_input_that_nobody_read(void) {
    char bytes[4096];
    int got = 0;
    ssize_t n;
    begin();
    memset(bytes, 'i', sizeof bytes);
    CHECK_INT(send(raw, bytes, sizeof bytes, 0), (int)sizeof bytes);
    turns(2);
    CHECK_INT(tcpsrv_write(stream, "reply", 5), 0);
    tcpsrv_close(stream);
    turns(3);
    CHECK_INT(send(raw, bytes, sizeof bytes, MSG_NOSIGNAL), (int)sizeof bytes);
    turns(3);
    while ((n = recv(raw, bytes, sizeof bytes, 0)) > 0) got += (int)n;
    CHECK_INT(n, 0);
    CHECK_INT(got, 5);
    end();
}

static void an_abort_resets_and_tells_what_was_not_sent(void) {
    char *data = patterned(BIG), bytes[4096];
    ssize_t n;
    begin();
    CHECK_INT(tcpsrv_on_close(stream, closed, NULL), 0);
    while (tcpsrv_write(stream, data, 300000) == 0) turns(1);
    tcpsrv_abort(stream);
    turns(2);
    CHECK_STR(order, "c");
    CHECK_INT(close_result, TCPSRV_ECLOSED);
    CHECK(close_unsent > 0);
    while ((n = recv(raw, bytes, sizeof bytes, 0)) > 0) continue;
    CHECK(n < 0 && errno == ECONNRESET);
    end();
    free(data);
}

static void on_close_set_on_a_dead_stream_is_called(void) {
    struct linger now = { 1, 0 };
    begin();
    CHECK_INT(tcpsrv_read(stream, tcpsrv_some(0), order_read, NULL), 0);
    CHECK_INT(tcpsrv_on_close(stream, closed, NULL), 0);
    setsockopt(raw, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(raw);
    raw = -1;
    turns(3);
    CHECK_STR(order, "?c");
    CHECK_INT(close_result, -ECONNRESET);
    end();
}

static void closed_and_asks(tcpsrv_stream *from, int result, size_t unsent, void *arg) {
    closed(from, result, unsent, arg);
    CHECK_INT(tcpsrv_on_flush(from, order_flush, NULL), 0);
}

static void a_flush_asked_for_in_on_close_is_told(void) {
    struct linger now = { 1, 0 };
    begin();
    CHECK_INT(tcpsrv_read(stream, tcpsrv_some(0), order_read, NULL), 0);
    CHECK_INT(tcpsrv_on_close(stream, closed_and_asks, NULL), 0);
    setsockopt(raw, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(raw);
    raw = -1;
    turns(4);
    CHECK_STR(order, "?cf");
    end();
}

static void half_closing_sends_all_first_and_reading_goes_on(void) {
    char text[16];
    begin();
    CHECK_INT(tcpsrv_write(stream, "bye", 3), 0);
    CHECK_INT(tcpsrv_shutdown(stream), 0);
    CHECK_INT(tcpsrv_write(stream, "x", 1), TCPSRV_ECLOSED);
    turns(2);
    CHECK_INT(recv(raw, text, sizeof text, 0), 3);
    CHECK_INT(recv(raw, text, sizeof text, 0), 0);
    say("still here\n");
    expect_read(tcpsrv_until("\n", 0), "still here\n");
    tcpsrv_close(stream);
    end();
}

static int write_until_closed(void *data) {
    return tcpsrv_write(stream, data, BIG);
}

static void a_write_cut_off_by_a_close_reports_it_and_the_peer_gets_a_reset(void) {
    char *data = patterned(BIG), bytes[65536];
    int64_t id;
    ssize_t n;
    begin();
    id = tcpsrv_spawn(loop, write_until_closed, data, 0);
    turns(3);
    tcpsrv_close(stream);
    CHECK_INT(tcpsrv_join(id), TCPSRV_ECLOSED);
    turns(2);
    do
        n = recv(raw, bytes, sizeof bytes, 0);
    while (n > 0);
    CHECK(n < 0 && errno == ECONNRESET);
    end();
    free(data);
}

static void pipes_work_and_get_their_blocking_mode_back(void) {
    int fds[2], flags;
    tcpsrv_stream *reading, *writing;
    tcpsrv_bytes bytes;
    CHECK_INT(pipe(fds), 0);
    raw = -1;
    loop = tcpsrv_loop_default();
    flags = dup(fds[1]);
    reading = tcpsrv_stream_from_fd(loop, fds[0]);
    writing = tcpsrv_stream_from_fd(loop, fds[1]);
    CHECK(reading && writing);
    CHECK_INT(tcpsrv_write(writing, "through a pipe\n", 15), 0);
    CHECK_INT(tcpsrv_read_until(reading, "\n", 0, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "through a pipe\n");
    tcpsrv_close(reading);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_write(writing, "x", 1), 0);
    CHECK_INT(tcpsrv_flush(writing), -EPIPE);
    tcpsrv_close(writing);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(fcntl(flags, F_GETFL) & O_NONBLOCK, 0);
    close(flags);
    end();
}

static void a_regular_file_is_always_ready(void) {
    char path[] = "/tmp/tcpserver-test-XXXXXX";
    int file = mkstemp(path);
    tcpsrv_bytes bytes;
    CHECK_INT(write(file, "line 1\nline 2\n", 14), 14);
    lseek(file, 0, SEEK_SET);
    loop = tcpsrv_loop_default();
    raw = -1;
    stream = tcpsrv_stream_from_fd(loop, file);
    CHECK(stream != NULL);
    expect_read(tcpsrv_until("\n", 0), "line 1\n");
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "line 2\n");
    tcpsrv_close(stream);
    unlink(path);
    end();
}

static tcpsrv_stream *connect_to(int port) {
    tcpsrv_connect_options options;
    memset(&options, 0, sizeof options);
    options.host = "127.0.0.1";
    options.port = port;
    return tcpsrv_connect(loop, &options);
}

static void a_connection_carries_what_was_written_while_it_was_begun(void) {
    struct sockaddr_in address;
    int listener = test_listener(&address), fd;
    char text[16];
    loop = tcpsrv_loop_default();
    stream = connect_to(ntohs(address.sin_port));
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_write(stream, "early", 5), 0);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    fd = accept(listener, NULL, NULL);
    CHECK_INT(recv(fd, text, sizeof text, 0), 5);
    close(fd);
    close(listener);
    expect_code(tcpsrv_some(0), TCPSRV_EOF);
    tcpsrv_close(stream);
    raw = -1;
    end();
}

static void a_refused_connection_ends_what_waits_for_it(void) {
    struct sockaddr_in address;
    int listener = test_listener(&address);
    loop = tcpsrv_loop_default();
    close(listener);
    stream = connect_to(ntohs(address.sin_port));
    CHECK(stream != NULL);
    expect_code(tcpsrv_until("\n", 0), -ECONNREFUSED);
    CHECK(strstr(tcpsrv_last_error(), "Connection refused") != NULL);
    CHECK_INT(tcpsrv_closed(stream), 1);
    tcpsrv_close(stream);
    raw = -1;
    end();
}

static void a_half_close_asked_for_while_connecting_is_not_forgotten(void) {
    struct sockaddr_in address;
    int listener = test_listener(&address), fd;
    char byte;
    loop = tcpsrv_loop_default();
    stream = connect_to(ntohs(address.sin_port));
    CHECK_INT(tcpsrv_shutdown(stream), 0);
    turns(3);
    fd = accept(listener, NULL, NULL);
    CHECK_INT(recv(fd, &byte, 1, MSG_DONTWAIT), 0);
    close(fd);
    close(listener);
    tcpsrv_close(stream);
    raw = -1;
    end();
}

static void a_read_timeout_counts_from_the_call_also_outside_the_loop(void) {
    begin();
    turns(1);
    CHECK_INT(tcpsrv_set_timeout(stream, 50, 0), 0);
    test_sleep_ms(80);
    say_later(10, "in time\n");
    expect_read(tcpsrv_until("\n", 0), "in time\n");
    tcpsrv_close(stream);
    end();
}

static int flushes;

static void flush_again(tcpsrv_stream *from, int err, void *arg) {
    (void)arg;
    CHECK_INT(err, TCPSRV_ETIMEDOUT);
    if (flushes++ < 10) CHECK_INT(tcpsrv_on_flush(from, flush_again, NULL), 0);
}

static void a_flush_call_that_asks_again_on_a_dead_stream_has_its_turn_later(void) {
    begin();
    tcpsrv__die(stream, TCPSRV_ETIMEDOUT);
    stream->held = 1;
    CHECK_INT(tcpsrv_on_flush(stream, flush_again, NULL), 0);
    turns(1);
    CHECK(flushes >= 1 && flushes <= 2);
    turns(12);
    CHECK_INT(flushes, 11);
    tcpsrv_close(stream);
    end();
}

static void half_a_message_waits_in_memory_of_its_size(void) {
    char *data = patterned(200000);
    size_t sent = 0, got = 0;
    tcpsrv_bytes bytes;
    begin();
    while (got < 200000) {
        ssize_t n = send(raw, data + sent, 200000 - sent, MSG_DONTWAIT);
        if (n > 0) sent += (size_t)n;
        CHECK_INT(tcpsrv_read_some(stream, 0, &bytes), 0);
        got += bytes.size;
    }
    say("half");
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), note_read, NULL), 0);
    turns(3);
    CHECK(stream->in != NULL && stream->in->capacity <= 512);
    tcpsrv_close(stream);
    end();
    free(data);
}

/* What a view pins is bounded: four times its bytes and 512. */
static void a_parked_view_holds_little_memory(void) {
    int64_t before;
    char *data = patterned(60000);
    begin();
    before = test_live_bytes;
    CHECK_INT(send(raw, data, 60000, 0), 60000);
    CHECK_INT(tcpsrv_read_bytes(stream, 59990, NULL), 0);
    CHECK_INT(tcpsrv_read_bytes(stream, 10, NULL), 0);
    CHECK(stream->in == NULL || stream->in->capacity < 512);
    tcpsrv_close(stream);
    CHECK(before > 0);
    end();
    free(data);
}

/* A line that comes in small pieces costs time in proportion to its length: each byte is searched
   once, which the mark of what was searched shows. */
static void a_long_line_in_pieces_is_searched_once(void) {
    enum { PIECES = 4096 };
    char piece[1024];
    tcpsrv_bytes line;
    int i;
    begin();
    stream->owner->options.max_buffer_size = (size_t)PIECES * sizeof piece + 1;
    memset(piece, 'l', sizeof piece);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), note_read, NULL), 0);
    for (i = 0; i < PIECES - 1; i++) {
        CHECK_INT(send(raw, piece, sizeof piece, 0), (int)sizeof piece);
        turns(1);
        CHECK_INT(stream->progress, stream->in ? stream->in->end - stream->in->begin : 0);
    }
    tcpsrv_cancel_read(stream);
    turns(1);
    say("\n");
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    CHECK_INT(line.size, (PIECES - 1) * sizeof piece + 1);
    tcpsrv_close(stream);
    end();
}

/* ---- no memory ------------------------------------------------------------------------------- */

static int exchange(void *arg) {
    tcpsrv_bytes bytes;
    int err = tcpsrv_on_close(stream, closed, NULL);
    (void)arg;
    if (!err) err = tcpsrv_set_timeout(stream, 1000, 1000);
    if (!err) err = tcpsrv_read_until(stream, "\n", 0, &bytes);
    if (!err) err = tcpsrv_printf(stream, "%s", "answer\n");
    if (!err) err = tcpsrv_write(stream, bytes.data, bytes.size);
    if (!err) err = tcpsrv_flush(stream);
    return err;
}

static void any_failed_allocation_is_a_code(void) {
    int n, err = -1;
    for (n = 1; err && n < 100; n++) {
        int64_t id;
        begin();
        say("question\n");
        test_fail_alloc_at = n;
        id = tcpsrv_spawn(loop, exchange, NULL, 0);
        err = id < 0 ? (int)id : tcpsrv_join(id);
        if (test_fail_alloc_at) err = 0; /* it came through without that many */
        else CHECK(err == -ENOMEM || err == 0);
        if (test_fail_alloc_at == 0 && err == 0) err = -1;
        test_fail_alloc_at = 0;
        tcpsrv_close(stream);
        end();
    }
    CHECK(n > 5 && n < 100);
}

static void note_unsent(tcpsrv_stream *of, int err, size_t unsent, void *arg) {
    (void)of;
    CHECK_INT(err, -ENOMEM);
    *(size_t *)arg = unsent;
}

static void a_write_torn_by_lack_of_memory_ends_the_stream_with_a_reset(void) {
    static char big[900000], back[65536];
    size_t unsent = 0;
    ssize_t n;
    begin();
    make_send_buffer_small();
    CHECK_INT(tcpsrv_on_close(stream, note_unsent, &unsent), 0);
    test_fail_alloc_at = 1;
    CHECK_INT(tcpsrv_write(stream, big, sizeof big), -ENOMEM);
    CHECK_INT(test_fail_alloc_at, 0);
    CHECK(tcpsrv_closed(stream));
    CHECK_INT(tcpsrv_error(stream), -ENOMEM);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK(unsent > 0 && unsent < sizeof big);
    while ((n = recv(raw, back, sizeof back, MSG_DONTWAIT)) > 0) continue;
    CHECK(n < 0 && errno == ECONNRESET);
    end();
}

static void a_formatted_text_of_any_length_is_whole(void) {
    enum { CAPACITY = 2048 - TCPSRV__BLOCK_HEAD };
    char back[CAPACITY + 16];
    int size;
    begin();
    for (size = CAPACITY - 2; size < CAPACITY + 3; size++) {
        CHECK_INT(tcpsrv_printf(stream, "%*s", size, "x"), 0);
        CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
        CHECK_INT(recv(raw, back, sizeof back, 0), size);
        CHECK_INT(back[size - 1], 'x');
    }
    end();
}

static void a_hung_up_stream_is_found_after_others_have_gone(void) {
    tcpsrv_stream *other;
    int fds[4], i;
    begin();
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    other = tcpsrv_stream_from_fd(loop, fds[0]);
    CHECK(other != NULL);
    tcpsrv_set_user(other, fds);
    CHECK(tcpsrv_user(other) == fds);
    CHECK(tcpsrv_stream_loop(other) == loop);
    close(fds[1]);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    tcpsrv_abort(stream);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_abort(other);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    for (i = 0; i < 4; i += 2) CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, fds + i), 0);
    for (i = 0; i < 4; i++) CHECK(tcpsrv_stream_from_fd(loop, fds[i]) != NULL);
    end();
}

static int closed_read, reads_before_close;

static void on_read_of_closed(tcpsrv_stream *own, int err, tcpsrv_bytes bytes, void *arg) {
    (void)own, (void)bytes, (void)arg;
    closed_read = err;
}

static void answer_and_close(tcpsrv_stream *own, int err, tcpsrv_bytes line, void *arg) {
    CHECK_INT(err, 0);
    CHECK_INT(tcpsrv_write(own, line.data, line.size), 0);
    if (reads_before_close)
        CHECK_INT(tcpsrv_read(own, tcpsrv_until("\n", 0), on_read_of_closed, arg), 0);
    else
        closed_read = TCPSRV_ECLOSED;
    tcpsrv_close(own);
}

/* Until the peer's end is waited for no more. */
static void a_close_has_no_turn_too_many_and_none_too_few(void) {
    char answer[4];
    int i;
    for (reads_before_close = 0; reads_before_close < 2; reads_before_close++) {
        begin();
        closed_read = 0;
        say("a\none\n");
        expect_read(tcpsrv_until("\n", 0), "a\n"); /* so that no event brings the other one */
        CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), answer_and_close, NULL), 0);
        for (i = 0; i < 500 && !closed_read; i++) CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
        CHECK_INT(closed_read, TCPSRV_ECLOSED);
        CHECK(tcpsrv_loop_timeout(loop) > 0);
        for (i = 0; i < 500 && recv(raw, answer, sizeof answer, MSG_PEEK) <= 0; i++)
            CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
        CHECK_INT(recv(raw, answer, sizeof answer, 0), 4);
        end();
    }
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(read_until_gives_each_message_with_its_delimiter),
        TEST(a_close_has_no_turn_too_many_and_none_too_few),
        TEST(read_until_finds_a_delimiter_split_across_reads_at_every_place),
        TEST(delimiters_and_messages_may_hold_nuls),
        TEST(a_message_over_its_max_is_refused_and_its_bytes_stay),
        TEST(exactly_some_into_and_peek_share_one_order_of_bytes),
        TEST(a_frame_is_asked_for_its_end_only_while_that_is_not_known),
        TEST(a_regular_expression_ends_a_message),
        TEST(after_the_peer_has_finished_its_bytes_are_readable_and_it_gets_its_answer),
        TEST(a_callback_read_ends_once_and_never_inside_the_call),
        TEST(a_second_read_is_refused_and_the_first_is_untouched),
        TEST(a_cancelled_read_leaves_its_bytes_for_the_next),
        TEST(a_cancel_that_a_stop_overtakes_ends_no_later_read),
        TEST(a_cancel_by_the_framing_ends_its_own_read_at_most),
        TEST(a_read_timeout_covers_the_whole_message_and_the_stream_survives_it),
        TEST(a_mark_before_a_file_does_not_hold_it_up),
        TEST(what_the_peer_sends_does_not_keep_a_stalled_write_alive),
        TEST(a_view_holds_across_other_waits_until_the_next_read),
        TEST(a_large_write_goes_from_the_callers_memory_and_waits),
        TEST(outside_coroutines_all_is_queued_or_nothing),
        TEST(several_writers_are_served_whole_and_in_order),
        TEST(writev_printf_and_try_write_keep_the_order),
        TEST(a_file_is_sent_from_its_offset_and_a_short_one_ends_the_stream),
        TEST(a_stalled_peer_ends_a_stream_with_a_write_timeout),
        TEST(closing_ends_requests_flushes_and_calls_on_close_last_and_once),
        TEST(a_reply_survives_input_that_nobody_read),
        TEST(an_abort_resets_and_tells_what_was_not_sent),
        TEST(on_close_set_on_a_dead_stream_is_called),
        TEST(a_flush_asked_for_in_on_close_is_told),
        TEST(half_closing_sends_all_first_and_reading_goes_on),
        TEST(a_write_cut_off_by_a_close_reports_it_and_the_peer_gets_a_reset),
        TEST(pipes_work_and_get_their_blocking_mode_back),
        TEST(a_regular_file_is_always_ready),
        TEST(a_connection_carries_what_was_written_while_it_was_begun),
        TEST(a_refused_connection_ends_what_waits_for_it),
        TEST(a_half_close_asked_for_while_connecting_is_not_forgotten),
        TEST(a_read_timeout_counts_from_the_call_also_outside_the_loop),
        TEST(a_flush_call_that_asks_again_on_a_dead_stream_has_its_turn_later),
        TEST(half_a_message_waits_in_memory_of_its_size),
        TEST(a_parked_view_holds_little_memory),
        TEST(a_long_line_in_pieces_is_searched_once),
        TEST(any_failed_allocation_is_a_code),
        TEST(a_write_torn_by_lack_of_memory_ends_the_stream_with_a_reset),
        TEST(a_formatted_text_of_any_length_is_whole),
        TEST(a_hung_up_stream_is_found_after_others_have_gone),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
