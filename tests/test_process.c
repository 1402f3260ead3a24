/* Forked workers and their parent. The parent exits by itself, so that each test makes a process to
   be that parent; workers tell of themselves by a pipe. */
#include "test.h"
#if defined(__linux__)
#include <sys/prctl.h>
#endif

static int report[2];
static void (*before_fork)(void); /* in the process that becomes the parent */
static int counted;               /* descriptors, where a process had them counted before */

/* What a worker says: its number, its pid, its parent's, and how many descriptors it has. */
typedef struct hello {
    int task_id;
    pid_t pid, parent;
    int descriptors;
} hello;

static void say_hello(void) {
    hello own;
    memset(&own, 0, sizeof own);
    own.task_id = tcpsrv_task_id();
    own.pid = getpid();
    own.parent = getppid();
    own.descriptors = counted ? counted : test_open_descriptors(TEST_FD_SCAN);
    CHECK_INT(write(report[1], &own, sizeof own), (int)sizeof own);
}

static hello next_hello(void) {
    struct pollfd entry;
    hello got;
    memset(&got, 0, sizeof got);
    got.task_id = -100;
    entry.fd = report[0];
    entry.events = POLLIN;
    if (poll(&entry, 1, 5000) == 1 && read(report[0], &got, sizeof got) != (int)sizeof got)
        got.task_id = -200;
    return got;
}

/* Whether the pipe's last writer goes within five seconds: nobody of the family is left. */
static int all_gone(void) {
    struct pollfd entry;
    char byte;
    entry.fd = report[0];
    entry.events = POLLIN;
    return poll(&entry, 1, 5000) == 1 && read(report[0], &byte, 1) == 0;
}

/* What the family says on stderr goes to a file that has no name any more. */
static FILE *said;
static off_t said_before;

static void listen_to_it(void) {
    said = tmpfile();
    CHECK(said != NULL);
}

static void quiet(void) {
    int null = open("/dev/null", O_WRONLY);
    dup2(said ? fileno(said) : null, 2);
    close(null);
    if (said) fclose(said);
}

/* The text, once it says that. */
static const char *what_it_says(const char *part) {
    static char text[8192];
    int tries;
    for (tries = 0; tries < 500; tries++) {
        ssize_t n = pread(fileno(said), text, sizeof text - 1, said_before);
        text[n > 0 ? n : 0] = 0;
        if (strstr(text, part)) return text;
        test_sleep_ms(10);
    }
    test_end(1, TEST_HERE("not said: %s, but: %s"), part, text);
    return text;
}

/* Its end to write is out of the way of sockets that are handed over. */
static void open_report(void) {
    int end;
    CHECK_INT(pipe(report), 0);
    end = fcntl(report[1], F_DUPFD, 50);
    CHECK(end >= 0);
    close(report[1]);
    report[1] = end;
}

/* The process that forks; its children run the body. */
static pid_t family(int count, int restarts, void (*body)(int task_id)) {
    pid_t pid;
    int id;
    open_report();
    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        close(report[0]);
        quiet();
        if (before_fork) before_fork();
        id = tcpsrv_fork_processes(count, restarts);
        if (id < 0) _exit(99);
        body(id);
        _exit(0);
    }
    close(report[1]);
    return pid;
}

static int exit_status(pid_t pid) {
    int status = 0;
    CHECK_INT(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void end(void) {
    close(report[0]);
    if (said) fclose(said);
    said = NULL;
}

/* Until the last writer is gone. */
static int all_of_it_is_read(void) {
    hello got;
    do
        got = next_hello();
    while (got.task_id >= 0);
    return got.task_id == -200;
}

static void hello_only(int task_id) {
    CHECK_INT(task_id, tcpsrv_task_id());
    say_hello();
}

static void each_child_has_its_number_and_the_parent_ends_with_0(void) {
    pid_t parent;
    int i, seen = 0;
    CHECK_INT(tcpsrv_task_id(), -1);
    parent = family(3, -1, hello_only);
    for (i = 0; i < 3; i++) {
        hello got = next_hello();
        CHECK_INT(got.parent, parent);
        seen |= 1 << got.task_id;
    }
    CHECK_INT(seen, 7);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void one_for_each_core(int task_id) {
    (void)task_id;
    say_hello();
}

static void zero_means_one_for_each_core(void) {
    pid_t parent = family(0, -1, one_for_each_core);
    int i;
    for (i = 0; i < tcpsrv_cpu_count(); i++) CHECK(next_hello().task_id >= 0);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void wait_long(int task_id) {
    (void)task_id;
    say_hello();
    test_sleep_ms(20000);
}

static void a_killed_child_is_restarted_with_its_number(void) {
    pid_t parent = family(2, -1, wait_long);
    hello first = next_hello(), second = next_hello(), again;
    kill(first.pid, SIGKILL);
    again = next_hello();
    CHECK_INT(again.task_id, first.task_id);
    CHECK(again.pid != first.pid && again.pid != second.pid);
    CHECK_INT(kill(second.pid, 0), 0);
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void crash_always(int task_id) {
    say_hello();
    if (task_id == 1) _exit(3);
    test_sleep_ms(20000);
}

static void a_crash_loop_ends_the_others_and_the_parent_with_1(void) {
    pid_t parent = family(2, 3, crash_always);
    int i, crashes = 0;
    for (i = 0; i < 5; i++) crashes += next_hello().task_id == 1;
    CHECK_INT(crashes, 4);
    CHECK_INT(exit_status(parent), 1);
    CHECK(all_gone());
    end();
}

static void the_last_words_name_the_child_how_it_ended_and_the_restarts(void) {
    pid_t parent;
    const char *text;
    listen_to_it();
    parent = family(2, 3, crash_always);
    CHECK_INT(exit_status(parent), 1);
    CHECK(all_of_it_is_read());
    text = what_it_says("giving up");
    CHECK(strstr(text, "child 1 crashed: exit status 3: restart 1 in 0 ms") != NULL);
    CHECK(strstr(text, "child 1 crashed: exit status 3: restart 2 in 50 ms") != NULL);
    CHECK(strstr(text, "child 1 crashed: exit status 3: restart 3 in 100 ms") != NULL);
    CHECK(strstr(text, "child 1 crashed: exit status 3: giving up after 3 restarts, "
                       "3 of them its own") != NULL);
    end();
}

static void pauses_between_restarts_grow(void) {
    uint64_t begun = test_ns();
    pid_t parent = family(2, 4, crash_always);
    CHECK_INT(exit_status(parent), 1);
    CHECK(test_ns() - begun >= (uint64_t)(0 + 50 + 100 + 200) * 1000000);
    end();
}

static void no_restarts_allowed_means_the_first_crash_is_the_end(void) {
    pid_t parent = family(2, 0, crash_always);
    CHECK_INT(exit_status(parent), 1);
    end();
}

static void leave(int task_id) {
    say_hello();
    if (task_id == 1) test_sleep_ms(300);
}

static void a_child_that_exits_with_0_is_not_restarted(void) {
    pid_t parent = family(2, -1, leave);
    next_hello();
    next_hello();
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void a_signal_to_the_parent_ends_all(int signo) {
    pid_t parent = family(3, -1, wait_long);
    int i;
    for (i = 0; i < 3; i++) CHECK(next_hello().task_id >= 0);
    kill(parent, signo);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void sigterm_and_sigint_to_the_parent_end_all_in_order(void) {
    a_signal_to_the_parent_ends_all(SIGTERM);
    a_signal_to_the_parent_ends_all(SIGINT);
}

static void stay_stubborn(int task_id) {
    (void)task_id;
    signal(SIGTERM, SIG_IGN);
    say_hello();
    for (;;) test_sleep_ms(1000);
}

static void a_second_signal_kills_those_that_stay(void) {
    pid_t parent = family(2, -1, stay_stubborn);
    next_hello();
    next_hello();
    kill(parent, SIGTERM);
    test_sleep_ms(100);
    CHECK_INT(kill(parent, 0), 0);
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static int never(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)stream, (void)peer, (void)user;
    return 0;
}

static void serve(int task_id) {
    tcpsrv_options options;
    tcpsrv *server;
    (void)task_id;
    memset(&options, 0, sizeof options);
    options.on_stream = never;
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    say_hello();
    tcpsrv_loop_run(tcpsrv_loop_default());
}

static void children_do_not_outlive_a_killed_parent(void) {
    pid_t parent = family(2, -1, serve);
    next_hello();
    next_hello();
    kill(parent, SIGKILL);
    CHECK_INT(exit_status(parent), -SIGKILL);
    CHECK(all_gone());
    end();
}

#if defined(__linux__)
static void serve_on_the_lifeline(int task_id) {
    CHECK_INT(prctl(PR_SET_PDEATHSIG, 0), 0);
    serve(task_id);
}

static void the_lifeline_alone_ends_children_of_a_killed_parent(void) {
    pid_t parent = family(2, -1, serve_on_the_lifeline);
    next_hello();
    next_hello();
    kill(parent, SIGKILL);
    CHECK_INT(exit_status(parent), -SIGKILL);
    CHECK(all_gone());
    end();
}

static void the_kernels_signal_ends_children_that_have_no_loop(void) {
    pid_t parent = family(2, -1, wait_long);
    next_hello();
    next_hello();
    kill(parent, SIGKILL);
    CHECK_INT(exit_status(parent), -SIGKILL);
    CHECK(all_gone());
    end();
}
#else
static void the_lifeline_alone_ends_children_of_a_killed_parent(void) {
    SKIP("PR_SET_PDEATHSIG");
}

static void the_kernels_signal_ends_children_that_have_no_loop(void) {
    SKIP("PR_SET_PDEATHSIG");
}
#endif

static void dispositions(int task_id) {
    struct sigaction action;
    (void)task_id;
    CHECK_INT(sigaction(SIGTERM, NULL, &action), 0);
    CHECK(action.sa_handler == SIG_DFL);
    CHECK_INT(sigaction(SIGCHLD, NULL, &action), 0);
    CHECK(action.sa_handler == SIG_DFL);
    CHECK_INT(sigaction(SIGINT, NULL, &action), 0);
    CHECK(action.sa_handler == SIG_IGN);
    CHECK_INT(tcpsrv_fork_processes(2, -1), TCPSRV_EBUSY);
    say_hello();
}

static void a_child_has_its_dispositions_back_and_may_not_fork_again(void) {
    pid_t parent = family(1, 0, dispositions);
    CHECK_INT(next_hello().task_id, 0);
    CHECK_INT(exit_status(parent), 0);
    end();
}

static void a_loop_made_before_refuses_the_fork(void) {
    tcpsrv_loop *loop = tcpsrv_loop_default();
    CHECK_INT(tcpsrv_fork_processes(2, -1), TCPSRV_EBUSY);
    CHECK(strstr(tcpsrv_last_error(), "fork_processes") != NULL);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void when_fork_fails_nothing_stays(void) {
    struct rlimit none = { 0, 0 };
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        if (geteuid() == 0 && setuid(65534) != 0) _exit(77);
        setrlimit(RLIMIT_NPROC, &none);
        _exit(tcpsrv_fork_processes(3, -1) == -EAGAIN ? 0 : 1);
    }
    CHECK_INT(waitpid(pid, &status, 0), pid);
    if (WEXITSTATUS(status) == 77) SKIP("another user to be");
    CHECK_INT(status, 0);
}

/* One line, one answer with the worker's number; "exit N" makes it end so. */
static int obey(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err = tcpsrv_read_until(stream, "\n", 0, &line);
    (void)peer, (void)user;
    if (!err && strncmp(line.data, "exit ", 5) == 0) _exit(atoi(line.data + 5));
    return err ? err : tcpsrv_printf(stream, "%d\n", tcpsrv_task_id());
}

static int story_listener;
static struct sockaddr_in story_address;

/* "" where the worker ended instead of an answer. */
static const char *story(const char *line) {
    static char text[16];
    ssize_t n = 0, more;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_INT(connect(fd, (struct sockaddr *)&story_address, sizeof story_address), 0);
    CHECK_INT(write(fd, line, strlen(line)), (int)strlen(line));
    while ((more = read(fd, text + n, sizeof text - 1 - (size_t)n)) > 0) n += more;
    text[n] = 0;
    close(fd);
    return text;
}

static void serve_the_story(int task_id) {
    tcpsrv_options options;
    tcpsrv *own;
    (void)task_id;
    memset(&options, 0, sizeof options);
    options.handle_stream = obey;
    own = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_add_socket(own, story_listener), 0);
    say_hello();
    tcpsrv_loop_run(tcpsrv_loop_default());
}

static void workers_that_exit_otherwise_are_restarted_and_serve_until_all_exit_with_0(void) {
    pid_t parent;
    hello first, again;
    int i, answered = 0;
    story_listener = test_listener(&story_address);
    parent = family(2, 3, serve_the_story);
    close(story_listener);
    first = next_hello();
    next_hello();
    for (i = 0; i < 2; i++) {
        CHECK_STR(story("exit 2\n"), "");
        again = next_hello();
        CHECK(again.pid != first.pid && again.task_id >= 0 && again.task_id < 2);
        answered += strlen(story("hello\n")) == 2;
    }
    CHECK_INT(answered, 2);
    CHECK_STR(story("exit 0\n"), ""); /* and one is left */
    CHECK_INT(strlen(story("hello\n")), 2);
    CHECK_STR(story("exit 3\n"), "");
    again = next_hello();
    CHECK_INT(again.parent, parent);
    CHECK_STR(story("exit 0\n"), "");
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

/* ---- reload ---------------------------------------------------------------------------------- */

/* Bound before the fork, in the test itself, so that it may connect whenever it likes. What is
   common lets a generation of workers behave differently from the one before. */
typedef struct common {
    int begun;      /* workers, ever */
    int crash_from; /* this one and later ones crash at once */
    int stall_from; /* this one and later ones do not serve */
} common;

enum { FEW_DESCRIPTORS = 128 };
static common *together;
static struct sockaddr_in address;
static int listener, go[2], own_usr1;
static tcpsrv *server;

static int answer(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_printf(stream, "%d %d\n", (int)getpid(),
                                 test_open_descriptors(FEW_DESCRIPTORS))) != 0)
            break;
    return err;
}

static void drain(int signo, void *arg) {
    (void)signo, (void)arg;
    tcpsrv_drain(server, 20000);
}

static void on_usr1(int signo) {
    (void)signo;
}

static void make_server(void) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = answer;
    options.reload_on_hup = 1;
    server = tcpsrv_new(&options);
    tcpsrv__ready_ms = together->stall_from ? 300 : 20000;
    if (own_usr1) signal(SIGUSR1, on_usr1);
}

static void reloadable(int task_id) {
    int number = __atomic_add_fetch(&together->begun, 1, __ATOMIC_SEQ_CST);
    int fd = dup(listener);
    char byte;
    (void)task_id;
    close(listener);
    CHECK_INT(tcpsrv_add_socket(server, fd), 0);
    CHECK(tcpsrv_on_signal(tcpsrv_loop_default(), SIGTERM, drain, NULL) > 0);
    say_hello();
    if (go[0] >= 0) {
        CHECK_INT(read(go[0], &byte, 1), 1);
        say_hello();
    }
    if (together->crash_from && number >= together->crash_from) _exit(5);
    if (together->stall_from && number >= together->stall_from) test_sleep_ms(20000);
    tcpsrv_loop_run(tcpsrv_loop_default());
    tcpsrv_free(server);
    tcpsrv_loop_free(tcpsrv_loop_default());
}

static pid_t reloadable_family(int count) {
    pid_t parent;
    listener = test_listener(&address);
    before_fork = make_server;
    parent = family(count, -1, reloadable);
    close(listener);
    return parent;
}

/* The stack is made deep first: valgrind cannot extend it for a signal's frame. */
static void set_up(void) {
    volatile char deep[65536];
    deep[0] = deep[sizeof deep - 1] = 0;
    go[0] = go[1] = -1;
    together = (common *)mmap(NULL, sizeof *together, PROT_READ | PROT_WRITE,
                              MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(together, 0, sizeof *together);
}

static void end_family(pid_t parent) {
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_of_it_is_read());
    end();
}

/* Lets so many workers go on that have begun, and sees them go. */
static void let_go(int count) {
    int i;
    for (i = 0; i < count; i++) CHECK_INT(write(go[1], "g", 1), 1);
    for (i = 0; i < count; i++) CHECK(next_hello().task_id >= 0);
}

/* A connection that is never refused; blocking. */
static int dial(void) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_INT(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static int descriptors_there; /* where the last answer came from */

/* Whose answer it is. */
static pid_t ask(int fd) {
    char text[32];
    ssize_t n = 0, more;
    CHECK_INT(write(fd, "\n", 1), 1);
    do {
        more = read(fd, text + n, sizeof text - 1 - (size_t)n);
        CHECK(more > 0);
        n += more;
    } while (text[n - 1] != '\n');
    text[n] = 0;
    descriptors_there = strchr(text, ' ') ? atoi(strchr(text, ' ')) : -1;
    return (pid_t)atoi(text);
}

static pid_t visit(void) {
    int fd = dial();
    pid_t pid = ask(fd);
    close(fd);
    return pid;
}

static void wait_until_collected(pid_t pid) {
    int tries;
    for (tries = 0; tries < 1000 && kill(pid, 0) == 0; tries++) test_sleep_ms(10);
    CHECK_INT(kill(pid, 0), -1);
}

static void sighup_replaces_each_worker_and_no_connection_is_refused(void) {
    hello old[2], fresh;
    pid_t parent, by;
    int i, fd;
    set_up();
    parent = reloadable_family(2);
    for (i = 0; i < 2; i++) old[i] = next_hello();
    for (i = 0; i < 2; i++) CHECK_INT(kill(old[i].pid, 0), 0);
    kill(parent, SIGHUP);
    for (i = 0; i < 2; i++) {
        fresh = next_hello();
        CHECK_INT(fresh.task_id, i);
        CHECK_INT(fresh.parent, parent);
    }
    while (kill(old[0].pid, 0) == 0 || kill(old[1].pid, 0) == 0) {
        fd = dial();
        CHECK(ask(fd) > 0);
        close(fd);
    }
    fd = dial();
    by = ask(fd);
    CHECK(by != old[0].pid && by != old[1].pid);
    close(fd);
    CHECK_INT(together->begun, 4);
    end_family(parent);
}

static void what_a_replaced_worker_serves_goes_on_to_its_end(void) {
    pid_t parent, old, by;
    int fd;
    set_up();
    parent = reloadable_family(1);
    next_hello();
    fd = dial();
    old = ask(fd);
    CHECK_INT(write(fd, "half", 4), 4);
    kill(parent, SIGHUP);
    next_hello();
    do { /* until the new one serves, and the old one does not */
        int other = dial();
        by = ask(other);
        close(other);
    } while (by == old);
    CHECK_INT(ask(fd), old); /* ends the line that was half there */
    close(fd);
    wait_until_collected(old);
    end_family(parent);
}

static void a_worker_serves_before_the_old_one_is_told_to_end(void) {
    hello old, fresh;
    pid_t parent;
    int fd;
    set_up();
    CHECK_INT(pipe(go), 0);
    parent = reloadable_family(1);
    old = next_hello();
    let_go(1);
    fd = dial();
    CHECK_INT(ask(fd), old.pid);
    close(fd);
    kill(parent, SIGHUP);
    fresh = next_hello(); /* and does not serve until it may go */
    fd = dial();
    CHECK_INT(ask(fd), old.pid);
    close(fd);
    let_go(1);
    wait_until_collected(old.pid);
    fd = dial();
    CHECK_INT(ask(fd), fresh.pid);
    close(fd);
    end_family(parent);
    close(go[0]), close(go[1]);
}

static void signals_during_a_reload_make_one_more(void) {
    pid_t parent;
    int i;
    set_up();
    CHECK_INT(pipe(go), 0);
    parent = reloadable_family(2);
    for (i = 0; i < 2; i++) next_hello();
    let_go(2);
    kill(parent, SIGHUP);
    CHECK_INT(next_hello().task_id, 0);
    for (i = 0; i < 3; i++) kill(parent, SIGHUP);
    for (i = 1; i < 4; i++) {
        let_go(1);
        CHECK_INT(next_hello().task_id, i % 2);
    }
    let_go(1);
    i = dial();
    CHECK(ask(i) > 0);
    close(i);
    end_family(parent);
    CHECK_INT(together->begun, 6);
    close(go[0]), close(go[1]);
}

static void a_replacement_that_crashes_leaves_the_old_ones(void) {
    hello old[2];
    pid_t parent, by;
    int i, fd;
    set_up();
    together->crash_from = 3;
    listen_to_it();
    parent = reloadable_family(2);
    for (i = 0; i < 2; i++) old[i] = next_hello();
    kill(parent, SIGHUP);
    CHECK_INT(next_hello().task_id, 0);
    what_it_says("reload: the new child 0 does not serve: exit status 5");
    for (i = 0; i < 2; i++) CHECK_INT(kill(old[i].pid, 0), 0);
    fd = dial();
    by = ask(fd);
    CHECK(by == old[0].pid || by == old[1].pid);
    close(fd);
    together->crash_from = 0; /* mended: the next reload does it */
    kill(parent, SIGHUP);
    for (i = 0; i < 2; i++) CHECK_INT(next_hello().task_id, i);
    for (i = 0; i < 2; i++) wait_until_collected(old[i].pid);
    end_family(parent);
}

static void a_replacement_that_does_not_serve_in_time_is_ended(void) {
    hello old, fresh;
    pid_t parent;
    int fd;
    set_up();
    together->stall_from = 2;
    listen_to_it();
    parent = reloadable_family(1);
    old = next_hello();
    kill(parent, SIGHUP);
    fresh = next_hello();
    what_it_says("reload: the new child 0 does not serve: time is over");
    kill(fresh.pid, SIGKILL);
    wait_until_collected(fresh.pid);
    fd = dial();
    CHECK_INT(ask(fd), old.pid);
    close(fd);
    end_family(parent);
}

static void an_old_worker_that_crashes_during_its_replacement_is_not_restarted_besides(void) {
    hello old, fresh;
    pid_t parent;
    int fd;
    set_up();
    CHECK_INT(pipe(go), 0);
    parent = reloadable_family(1);
    old = next_hello();
    let_go(1);
    kill(parent, SIGHUP);
    fresh = next_hello();
    kill(old.pid, SIGKILL);
    wait_until_collected(old.pid);
    let_go(1);
    fd = dial();
    CHECK_INT(ask(fd), fresh.pid);
    close(fd);
    end_family(parent);
    CHECK_INT(together->begun, 2);
    close(go[0]), close(go[1]);
}

static int forbidden[2];

static void allow_no_more_processes(int signo) {
    struct rlimit none = { 0, 0 };
    (void)signo;
    setrlimit(RLIMIT_NPROC, &none);
    if (write(forbidden[1], "f", 1) != 1) _exit(77);
}

static void make_server_of_a_user(void) {
    make_server();
    signal(SIGUSR1, allow_no_more_processes);
    if (geteuid() == 0 && setuid(65534) != 0) _exit(77);
}

static void a_reload_that_cannot_fork_leaves_the_old_ones(void) {
    hello old;
    pid_t parent;
    char byte;
    set_up();
    listen_to_it();
    listener = test_listener(&address);
    CHECK_INT(pipe(forbidden), 0);
    before_fork = make_server_of_a_user;
    parent = family(1, -1, reloadable);
    close(listener);
    old = next_hello();
    if (old.task_id < 0) SKIP("another user to be");
    kill(parent, SIGUSR1);
    CHECK_INT(read(forbidden[0], &byte, 1), 1);
    kill(parent, SIGHUP);
    what_it_says("reload: the new child 0 does not serve: Resource temporarily unavailable");
    CHECK_INT(visit(), old.pid);
    kill(parent, SIGKILL); /* a leak checker at its end would need a process of its own */
    CHECK_INT(exit_status(parent), -SIGKILL);
    CHECK(all_of_it_is_read());
    close(forbidden[0]), close(forbidden[1]);
    end();
}

static void sigterm_during_a_reload_ends_all(void) {
    pid_t parent;
    set_up();
    CHECK_INT(pipe(go), 0);
    parent = reloadable_family(2);
    next_hello();
    next_hello();
    let_go(2);
    kill(parent, SIGHUP);
    next_hello();
    kill(parent, SIGTERM);
    CHECK_INT(write(go[1], "g", 1), 1);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_of_it_is_read());
    end();
    close(go[0]), close(go[1]);
}

static void no_descriptor_is_left_by_forks_and_reloads(void) {
    hello first, later;
    pid_t parent;
    int i, had, tries;
    set_up();
    parent = reloadable_family(1);
    first = next_hello();
    CHECK_INT(visit(), first.pid);
    had = descriptors_there;
    for (i = 0; i < 5; i++) {
        kill(parent, SIGHUP);
        later = next_hello();
        CHECK_INT(later.task_id, 0);
        CHECK_INT(later.descriptors, first.descriptors + 1); /* to say that it serves */
        for (tries = 0; (visit() != later.pid || descriptors_there != had) && tries < 500; tries++)
            test_sleep_ms(10); /* the last visit's may still be closing */
        CHECK_INT(descriptors_there, had);
    }
    end_family(parent);
}

static void a_worker_ignores_the_sighup_that_a_terminal_sends_to_all(void) {
    hello worker;
    pid_t parent;
    set_up();
    parent = reloadable_family(1);
    worker = next_hello();
    kill(worker.pid, SIGHUP);
    CHECK_INT(visit(), worker.pid);
    end_family(parent);
    CHECK_INT(together->begun, 1);
}

static void without_the_option_sighup_is_left_alone(void) {
    pid_t parent = family(1, -1, wait_long);
    next_hello();
    kill(parent, SIGHUP);
    CHECK_INT(exit_status(parent), -SIGHUP);
    CHECK(all_gone());
    end();
}

/* ---- counters -------------------------------------------------------------------------------- */

static void *look(void *arg) {
    tcpsrv_stats stats;
    int64_t accepted = 0;
    int i, pid, tries;
    for (tries = 0; tries < 1000 && accepted < 3; tries++) {
        for (accepted = i = 0; i < 2; i++) {
            memset(&stats, 0, sizeof stats);
            pid = tcpsrv_worker_stats(i, &stats);
            CHECK(pid > 0 || pid == -ENOENT || pid == -ESRCH);
            accepted += (int64_t)stats.accepted;
        }
        test_sleep_ms(10);
    }
    CHECK_INT(accepted, 3);
    CHECK_INT(tcpsrv_worker_stats(2, &stats), -ENOENT);
    CHECK_INT(write(report[1], "seen", 4), 4);
    return arg;
}

static void make_server_and_look(void) {
    pthread_t thread;
    make_server();
    CHECK_INT(pthread_create(&thread, NULL, look, NULL), 0);
    CHECK_INT(pthread_detach(thread), 0);
}

static void the_parent_reads_the_counters_of_its_workers(void) {
    pid_t parent;
    char seen[4];
    int i, fds[3];
    set_up();
    listener = test_listener(&address);
    before_fork = make_server_and_look;
    parent = family(2, -1, reloadable);
    close(listener);
    for (i = 0; i < 2; i++) CHECK(next_hello().task_id >= 0);
    for (i = 0; i < 3; i++) CHECK(ask(fds[i] = dial()) > 0);
    CHECK_INT(read(report[0], seen, 4), 4);
    CHECK_MEM(seen, 4, "seen");
    for (i = 0; i < 3; i++) close(fds[i]);
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_of_it_is_read());
    end();
}

static int tell_of_all(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_stats stats;
    int i, pid;
    (void)peer, (void)user;
    for (i = 0; (pid = tcpsrv_worker_stats(i, &stats)) != -ENOENT; i++)
        tcpsrv_printf(stream, "%d\n", pid);
    return 0;
}

static void serve_counters(int task_id) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = tell_of_all;
    if (task_id == 1) {
        say_hello();
        _exit(0);
    }
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_add_socket(server, listener), 0);
    say_hello();
    tcpsrv_loop_run(tcpsrv_loop_default());
}

static void a_worker_reads_the_counters_of_the_others(void) {
    pid_t parent, pids[2];
    char text[64], wanted[64];
    hello got;
    int i, tries = 1000;
    set_up();
    listener = test_listener(&address);
    parent = family(2, -1, serve_counters);
    close(listener);
    for (i = 0; i < 2; i++) {
        got = next_hello();
        pids[got.task_id] = got.pid;
    }
    snprintf(wanted, sizeof wanted, "%d\n%d\n", (int)pids[0], -ESRCH);
    do { /* until the parent has collected the one that ended */
        int fd = dial();
        ssize_t n = 0, more;
        while ((more = read(fd, text + n, sizeof text - 1 - (size_t)n)) > 0) n += more;
        text[n] = 0;
        close(fd);
        test_sleep_ms(10);
    } while (strcmp(text, wanted) != 0 && --tries);
    CHECK_STR(text, wanted);
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

static void without_a_family_there_are_no_counters(void) {
    tcpsrv_stats stats;
    CHECK_INT(tcpsrv_worker_stats(0, &stats), -ENOENT);
    CHECK_INT(tcpsrv_worker_stats(-1, &stats), -ENOENT);
}

static void sigusr1_makes_the_parent_tell_of_each_child(void) {
    char wanted[64];
    pid_t parent;
    hello got;
    int fd;
    set_up();
    listen_to_it();
    parent = reloadable_family(1);
    got = next_hello();
    fd = dial();
    CHECK_INT(ask(fd), got.pid);
    kill(parent, SIGUSR1);
    snprintf(wanted, sizeof wanted, "child 0: pid %d for ", (int)got.pid);
    CHECK(strstr(what_it_says(wanted), " 0 restarts, ") != NULL);
    close(fd);
    end_family(parent);
}

static void sigusr1_is_left_to_a_program_that_uses_it(void) {
    pid_t parent;
    char byte;
    set_up();
    own_usr1 = 1;
    listen_to_it();
    parent = reloadable_family(1);
    next_hello();
    kill(parent, SIGUSR1);
    kill(parent, SIGHUP); /* obeyed after it */
    next_hello();
    CHECK_INT(pread(fileno(said), &byte, 1, 0), 0);
    end_family(parent);
}

static void counters_of_several_servers_add_up(void) {
    tcpsrv_stats sum, more;
    memset(&sum, 0, sizeof sum);
    memset(&more, 0, sizeof more);
    sum.active = more.active = 1;
    sum.accepted = UINT32_MAX;
    more.accepted = 2;
    more.bytes_written = 5;
    tcpsrv__stats_add(&sum, &more);
    CHECK_INT(sum.active, 2);
    CHECK_INT(sum.accepted, (int64_t)UINT32_MAX + 2);
    CHECK_INT(sum.bytes_written, 5);
}

/* ---- upgrade --------------------------------------------------------------------------------- */

/* The successor is this program again, told by SUCCESSOR what to be. */
static char *self[2], unix_path[64];

static int tell_names(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    return tcpsrv_printf(stream, "%s %s\n", tcpsrv_systemd_name(0), tcpsrv_systemd_name(1));
}

/* Says that it is ready when it is told to end. */
static int be_late(void) {
    sigset_t end;
    int signo;
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    sigprocmask(SIG_BLOCK, &end, NULL);
    sigwait(&end, &signo);
    return tcpsrv_notify("READY=1") == 0 ? 0 : 9;
}

static int successor(const char *mode) {
    tcpsrv_options options;
    int fds[4], count;
    if (strcmp(mode, "crash") == 0) return 3;
    if (strcmp(mode, "mute") == 0) test_sleep_ms(20000);
    if (strcmp(mode, "late") == 0) return be_late();
    report[1] = atoi(getenv("REPORT"));
    counted = test_open_descriptors(TEST_FD_SCAN);
    memset(&options, 0, sizeof options);
    options.handle_stream = strcmp(mode, "names") == 0 ? tell_names : answer;
    count = tcpsrv_systemd_sockets(fds, 4);
    server = tcpsrv_new(&options);
    if (count < 1 || getenv("TCPSRV_OWNED") || getenv("LISTEN_FDS")) return 4;
    if (tcpsrv_add_sockets(server, fds, count) != 0) return 5;
    if (tcpsrv_drain_on_signal(server, SIGTERM, 5000) != 0) return 6;
    if (tcpsrv_notify("STATUS=begins\nREADY=1") != 0 || getenv("TCPSRV_NOTIFY_SOCKET")) return 7;
    say_hello();
    tcpsrv_loop_run(tcpsrv_loop_default());
    tcpsrv_free(server);
    tcpsrv_loop_free(tcpsrv_loop_default());
    return 0;
}

static void succeed_by(const char *mode) {
    char text[16];
    if (getenv("TEST_EMULATED")) SKIP("no program can be run from an emulated one");
    snprintf(text, sizeof text, "%d", report[1]);
    CHECK_INT(setenv("SUCCESSOR", mode, 1), 0);
    CHECK_INT(setenv("REPORT", text, 1), 0);
}

/* A server in a process without workers, which SIGUSR2 makes start its successor. */
static pid_t upgradable(const char *mode, char *const *argv, int ready_ms) {
    tcpsrv_options options;
    pid_t pid;
    int fd;
    set_up();
    open_report();
    listener = test_listener(&address);
    succeed_by(mode);
    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        close(report[0]);
        quiet();
        counted = test_open_descriptors(TEST_FD_SCAN);
        memset(&options, 0, sizeof options);
        options.handle_stream = answer;
        options.upgrade_on_usr2 = argv;
        tcpsrv__ready_ms = ready_ms;
        server = tcpsrv_new(&options);
        fd = dup(listener);
        close(listener);
        CHECK_INT(tcpsrv_add_socket(server, fd), 0);
        if (unix_path[0]) CHECK_INT(tcpsrv_add_socket(server, tcpsrv_bind_unix_socket(unix_path,
                                                                                      0, 0)), 0);
        say_hello();
        CHECK_INT(tcpsrv_loop_run(tcpsrv_loop_default()), 0);
        tcpsrv_free(server);
        tcpsrv_loop_free(tcpsrv_loop_default());
        CHECK_INT(test_live_bytes, 0);
        exit(0);
    }
    close(report[1]);
    close(listener);
    return pid;
}

static void the_successor_takes_over_and_what_is_open_goes_on_to_its_end(void) {
    hello old, fresh;
    pid_t pid = upgradable("serve", self, 20000);
    int fd;
    old = next_hello();
    CHECK_INT(old.pid, pid);
    fd = dial();
    CHECK_INT(ask(fd), pid);
    CHECK_INT(write(fd, "half", 4), 4);
    kill(pid, SIGUSR2);
    while (visit() == pid) continue; /* nobody is refused */
    fresh = next_hello();
    CHECK_INT(fresh.parent, pid);
    CHECK(fresh.descriptors <= old.descriptors); /* the listening socket, and nothing else */
    CHECK_INT(ask(fd), pid);
    close(fd);
    CHECK_INT(exit_status(pid), 0);
    CHECK_INT(visit(), fresh.pid);
    kill(fresh.pid, SIGTERM);
    CHECK(all_gone());
    end();
}

static void a_successor_that_ends_while_the_old_one_drains_is_collected(void) {
    hello fresh;
    pid_t pid = upgradable("serve", self, 20000);
    int fd;
    next_hello();
    fd = dial();
    CHECK_INT(ask(fd), pid);
    CHECK_INT(write(fd, "half", 4), 4);
    kill(pid, SIGUSR2);
    fresh = next_hello();
    while (visit() == pid) continue;
    kill(fresh.pid, SIGKILL);
    wait_until_collected(fresh.pid);
    CHECK_INT(ask(fd), pid);
    close(fd);
    CHECK_INT(exit_status(pid), 0);
    CHECK(all_gone());
    end();
}

static pid_t pid_in(const char *text) {
    const char *at = strstr(text, "pid ");
    CHECK(at != NULL);
    return (pid_t)atoi(at + 4);
}

static void a_successor_that_crashes_leaves_the_old_one_serving(void) {
    pid_t pid;
    int i;
    listen_to_it();
    pid = upgradable("crash", self, 20000);
    next_hello();
    for (i = 0; i < 2; i++) {
        kill(pid, SIGUSR2);
        wait_until_collected(pid_in(what_it_says("exit status 3: this process goes on")));
        CHECK_INT(visit(), pid);
        said_before = lseek(fileno(said), 0, SEEK_END);
    }
    kill(pid, SIGKILL);
    CHECK_INT(exit_status(pid), -SIGKILL);
    CHECK(all_gone());
    end();
}

static void a_program_that_cannot_be_run_is_named_with_the_cause(void) {
    static char nothing[] = "/no/such/program";
    char *argv[2] = { nothing, NULL };
    pid_t pid;
    listen_to_it();
    pid = upgradable("serve", argv, 20000);
    next_hello();
    kill(pid, SIGUSR2);
    CHECK(strstr(what_it_says("upgrade failed"), "/no/such/program") != NULL);
    CHECK(strstr(what_it_says("upgrade failed"), "No such file or directory") != NULL);
    CHECK_INT(visit(), pid);
    kill(pid, SIGKILL);
    CHECK_INT(exit_status(pid), -SIGKILL);
    end();
}

static void is_told_to_end(const char *mode) {
    pid_t pid;
    listen_to_it();
    pid = upgradable(mode, self, 300);
    next_hello();
    kill(pid, SIGUSR2);
    wait_until_collected(pid_in(what_it_says("not ready in time and told to end")));
    CHECK_INT(visit(), pid);
    kill(pid, SIGKILL);
    CHECK_INT(exit_status(pid), -SIGKILL);
    CHECK(all_gone());
    end();
}

static void a_successor_that_is_not_ready_in_time_is_told_to_end(void) {
    is_told_to_end("mute");
}

static void a_successor_that_has_been_told_to_end_is_not_believed_any_more(void) {
    is_told_to_end("late");
}

static int dial_unix(void) {
    struct sockaddr_un name;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    snprintf(name.sun_path, sizeof name.sun_path, "%s", unix_path);
    if (connect(fd, (struct sockaddr *)&name, sizeof name) == 0) return fd;
    close(fd);
    return -1;
}

static void a_unix_sockets_file_survives_and_is_the_successors_to_unlink(void) {
    struct stat status;
    hello fresh;
    pid_t pid;
    int fd;
    snprintf(unix_path, sizeof unix_path, "/tmp/tcpsrv-test-%ld", (long)getpid());
    pid = upgradable("serve", self, 20000);
    next_hello();
    kill(pid, SIGUSR2);
    fresh = next_hello();
    CHECK_INT(exit_status(pid), 0);
    fd = dial_unix();
    CHECK_INT(ask(fd), fresh.pid);
    close(fd);
    kill(fresh.pid, SIGTERM);
    CHECK(all_gone());
    CHECK_INT(stat(unix_path, &status), -1);
    end();
}

static void sockets_are_named_by_port_and_path_in_their_order(void) {
    char wanted[128], text[128];
    ssize_t n = 0, more;
    hello fresh;
    pid_t pid;
    int fd;
    snprintf(unix_path, sizeof unix_path, "/tmp/tcpsrv-test:%ld", (long)getpid());
    pid = upgradable("names", self, 20000);
    next_hello();
    kill(pid, SIGUSR2);
    fresh = next_hello();
    CHECK_INT(exit_status(pid), 0);
    fd = dial_unix();
    while ((more = read(fd, text + n, sizeof text - 1 - (size_t)n)) > 0) n += more;
    close(fd);
    snprintf(wanted, sizeof wanted, "%d /tmp/tcpsrv-test_%ld\n", ntohs(address.sin_port),
             (long)getpid());
    CHECK_MEM(text, (size_t)n, wanted);
    kill(fresh.pid, SIGTERM);
    CHECK(all_gone());
    end();
}

static int manager_socket(struct sockaddr_un *name) {
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    memset(name, 0, sizeof *name);
    name->sun_family = AF_UNIX;
    snprintf(name->sun_path, sizeof name->sun_path, "/tmp/tcpsrv-test-manager-%ld",
             (long)getpid());
    CHECK_INT(bind(fd, (struct sockaddr *)name, sizeof *name), 0);
    CHECK_INT(setenv("NOTIFY_SOCKET", name->sun_path, 1), 0);
    return fd;
}

static void a_service_manager_learns_the_new_pid(void) {
    struct sockaddr_un name;
    char text[128], wanted[64];
    hello fresh;
    pid_t pid;
    int i, seen = 0, manager = manager_socket(&name);
    pid = upgradable("serve", self, 20000);
    next_hello();
    kill(pid, SIGUSR2);
    fresh = next_hello();
    snprintf(wanted, sizeof wanted, "MAINPID=%d", (int)fresh.pid);
    for (i = 0; i < 2; i++) {
        ssize_t n = read(manager, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        seen += strcmp(text, wanted) == 0 ? 1 : 0;
        seen += strcmp(text, "STATUS=begins\nREADY=1") == 0 ? 10 : 0;
    }
    CHECK_INT(seen, 11);
    CHECK_INT(exit_status(pid), 0);
    kill(fresh.pid, SIGTERM);
    CHECK(all_gone());
    CHECK_INT(read(manager, text, sizeof text), 10); /* of who drains now */
    CHECK_MEM(text, 10, "STOPPING=1");
    unlink(name.sun_path);
    close(manager);
    end();
}

static void a_worker_restarted_later_may_say_again_that_it_is_ready(void) {
    CHECK_INT(setenv("NOTIFY_SOCKET", "/no/such/predecessor", 1), 0);
    CHECK_INT(tcpsrv_notify("READY=1"), -ENOENT);
    CHECK_INT(setenv("TCPSRV_NOTIFY_SOCKET", "", 1), 0);
    CHECK_INT(tcpsrv_notify("READY=1"), 0);
    CHECK(!getenv("NOTIFY_SOCKET") && !getenv("TCPSRV_NOTIFY_SOCKET"));
}

static void an_upgrade_that_makes_no_sense_is_refused(void) {
    static char true_name[] = "true";
    char *argv[2] = { true_name, NULL }, *none[1] = { NULL };
    tcpsrv_options options;
    tcpsrv_loop *loop = tcpsrv_loop_default();
    CHECK_INT(tcpsrv_upgrade(argv, 0), -ENOENT);
    CHECK_INT(tcpsrv_upgrade(none, 0), -EINVAL);
    CHECK_INT(tcpsrv_upgrade(NULL, 0), -EINVAL);
    CHECK(strstr(tcpsrv_last_error(), "upgrade") != NULL);
    memset(&options, 0, sizeof options);
    options.on_stream = never;
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    tcpsrv_stop(server);
    CHECK_INT(tcpsrv_upgrade(argv, 0), -ENOENT);
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void upgrade_in_a_worker(int task_id) {
    (void)task_id;
    if (tcpsrv_upgrade(self, 0) == -EPERM) say_hello();
}

static void a_worker_is_refused_an_upgrade(void) {
    pid_t parent = family(1, 0, upgrade_in_a_worker);
    CHECK_INT(next_hello().task_id, 0);
    CHECK_INT(exit_status(parent), 0);
    end();
}

static int entries_of_tmp(void) {
    char name[64];
    int i, n = 0;
    FILE *list;
    snprintf(name, sizeof name, "ls -d /tmp/tcpsrv-%ld-* 2>/dev/null", (long)getpid());
    list = popen(name, "r");
    while ((i = fgetc(list)) != EOF) n += i == '\n';
    pclose(list);
    return n;
}

static void an_upgrade_without_memory_or_loop_leaves_nothing(void) {
    static char sleep_name[] = "sleep", seconds[] = "20";
    char *argv[3] = { sleep_name, seconds, NULL };
    tcpsrv_loop *loop = tcpsrv_loop_default();
    tcpsrv_options options;
    int err, n;
    memset(&options, 0, sizeof options);
    options.on_stream = never;
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    for (n = 1;; n++) {
        int before = test_open_descriptors(TEST_FD_SCAN);
        test_fail_alloc_at = n;
        err = tcpsrv_upgrade(argv, 0);
        if (!test_fail_alloc_at) CHECK(err == -ENOMEM || err == -ENOENT || err == 0);
        if (err == 0) break;
        CHECK_INT(test_open_descriptors(TEST_FD_SCAN), before);
        CHECK_INT(entries_of_tmp(), 0);
        CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    }
    test_fail_alloc_at = 0;
    CHECK(n > 3);
    CHECK_INT(entries_of_tmp(), 1);
    CHECK_INT(tcpsrv_upgrade(argv, 0), TCPSRV_EBUSY);
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    CHECK_INT(entries_of_tmp(), 0);
}

static void make_upgradable(void) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = answer;
    options.upgrade_on_usr2 = self;
    server = tcpsrv_new(&options);
}

static void workers_that_drain(int task_id) {
    (void)task_id;
    CHECK_INT(tcpsrv_add_socket(server, listener), 0);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 5000), 0);
    say_hello();
    tcpsrv_loop_run(tcpsrv_loop_default());
}

static pid_t upgradable_family(const char *mode) {
    pid_t parent;
    set_up();
    listener = test_listener(&address);
    open_report(); /* as family() will have it: the same numbers */
    succeed_by(mode);
    close(report[0]);
    close(report[1]);
    before_fork = make_upgradable;
    parent = family(2, -1, workers_that_drain);
    close(listener);
    return parent;
}

static void sigusr2_to_a_parent_hands_over_and_ends_the_family(void) {
    hello fresh;
    pid_t parent = upgradable_family("serve");
    int i;
    for (i = 0; i < 2; i++) CHECK(next_hello().task_id >= 0);
    kill(parent, SIGUSR2);
    do
        CHECK(visit() > 0); /* nobody is refused */
    while (waitpid(parent, &i, WNOHANG) == 0);
    CHECK_INT(i, 0);
    fresh = next_hello();
    CHECK_INT(fresh.task_id, -1);
    CHECK_INT(visit(), fresh.pid);
    kill(fresh.pid, SIGTERM);
    CHECK(all_gone());
    end();
}

static void a_family_goes_on_when_its_successor_crashes(void) {
    pid_t parent, pids[2], by;
    hello got;
    int i;
    listen_to_it();
    parent = upgradable_family("crash");
    for (i = 0; i < 2; i++) {
        got = next_hello();
        pids[got.task_id] = got.pid;
    }
    kill(parent, SIGUSR2);
    what_it_says("exit status 3: this process goes on");
    by = visit();
    CHECK(by == pids[0] || by == pids[1]);
    kill(parent, SIGTERM);
    CHECK_INT(exit_status(parent), 0);
    CHECK(all_gone());
    end();
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(each_child_has_its_number_and_the_parent_ends_with_0),
        TEST(zero_means_one_for_each_core),
        TEST(a_killed_child_is_restarted_with_its_number),
        TEST(a_crash_loop_ends_the_others_and_the_parent_with_1),
        TEST(the_last_words_name_the_child_how_it_ended_and_the_restarts),
        TEST(pauses_between_restarts_grow),
        TEST(no_restarts_allowed_means_the_first_crash_is_the_end),
        TEST(a_child_that_exits_with_0_is_not_restarted),
        TEST(workers_that_exit_otherwise_are_restarted_and_serve_until_all_exit_with_0),
        TEST(sigterm_and_sigint_to_the_parent_end_all_in_order),
        TEST(a_second_signal_kills_those_that_stay),
        TEST(children_do_not_outlive_a_killed_parent),
        TEST(the_lifeline_alone_ends_children_of_a_killed_parent),
        TEST(the_kernels_signal_ends_children_that_have_no_loop),
        TEST(a_child_has_its_dispositions_back_and_may_not_fork_again),
        TEST(a_loop_made_before_refuses_the_fork),
        TEST(when_fork_fails_nothing_stays),
        TEST(sighup_replaces_each_worker_and_no_connection_is_refused),
        TEST(what_a_replaced_worker_serves_goes_on_to_its_end),
        TEST(a_worker_serves_before_the_old_one_is_told_to_end),
        TEST(signals_during_a_reload_make_one_more),
        TEST(a_replacement_that_crashes_leaves_the_old_ones),
        TEST(a_replacement_that_does_not_serve_in_time_is_ended),
        TEST(an_old_worker_that_crashes_during_its_replacement_is_not_restarted_besides),
        TEST(a_reload_that_cannot_fork_leaves_the_old_ones),
        TEST(sigterm_during_a_reload_ends_all),
        TEST(no_descriptor_is_left_by_forks_and_reloads),
        TEST(a_worker_ignores_the_sighup_that_a_terminal_sends_to_all),
        TEST(without_the_option_sighup_is_left_alone),
        TEST(the_parent_reads_the_counters_of_its_workers),
        TEST(a_worker_reads_the_counters_of_the_others),
        TEST(without_a_family_there_are_no_counters),
        TEST(sigusr1_makes_the_parent_tell_of_each_child),
        TEST(sigusr1_is_left_to_a_program_that_uses_it),
        TEST(counters_of_several_servers_add_up),
        TEST(the_successor_takes_over_and_what_is_open_goes_on_to_its_end),
        TEST(a_successor_that_ends_while_the_old_one_drains_is_collected),
        TEST(a_successor_that_crashes_leaves_the_old_one_serving),
        TEST(a_program_that_cannot_be_run_is_named_with_the_cause),
        TEST(a_successor_that_is_not_ready_in_time_is_told_to_end),
        TEST(a_successor_that_has_been_told_to_end_is_not_believed_any_more),
        TEST(a_unix_sockets_file_survives_and_is_the_successors_to_unlink),
        TEST(sockets_are_named_by_port_and_path_in_their_order),
        TEST(a_service_manager_learns_the_new_pid),
        TEST(a_worker_restarted_later_may_say_again_that_it_is_ready),
        TEST(an_upgrade_that_makes_no_sense_is_refused),
        TEST(a_worker_is_refused_an_upgrade),
        TEST(an_upgrade_without_memory_or_loop_leaves_nothing),
        TEST(sigusr2_to_a_parent_hands_over_and_ends_the_family),
        TEST(a_family_goes_on_when_its_successor_crashes),
    };
    self[0] = argv[0];
    if (getenv("SUCCESSOR")) return successor(getenv("SUCCESSOR"));
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
