/* Forked workers and their parent. The parent exits by itself, so that each test makes a process to
   be that parent; workers tell of themselves by a pipe. */
#include "test.h"

static int report[2];

/* What a worker says: its number, its pid, and its parent's. */
typedef struct hello {
    int task_id;
    pid_t pid, parent;
} hello;

static void say_hello(void) {
    hello own;
    memset(&own, 0, sizeof own);
    own.task_id = tcpsrv_task_id();
    own.pid = getpid();
    own.parent = getppid();
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

static void quiet(void) {
    int null = open("/dev/null", O_WRONLY);
    dup2(null, 2);
    close(null);
}

/* The process that forks; its children run the body. */
static pid_t family(int count, int restarts, void (*body)(int task_id)) {
    pid_t pid;
    int id;
    CHECK_INT(pipe(report), 0);
    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        close(report[0]);
        quiet();
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

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(each_child_has_its_number_and_the_parent_ends_with_0),
        TEST(zero_means_one_for_each_core),
        TEST(a_killed_child_is_restarted_with_its_number),
        TEST(a_crash_loop_ends_the_others_and_the_parent_with_1),
        TEST(no_restarts_allowed_means_the_first_crash_is_the_end),
        TEST(a_child_that_exits_with_0_is_not_restarted),
        TEST(sigterm_and_sigint_to_the_parent_end_all_in_order),
        TEST(a_second_signal_kills_those_that_stay),
        TEST(children_do_not_outlive_a_killed_parent),
        TEST(a_child_has_its_dispositions_back_and_may_not_fork_again),
        TEST(a_loop_made_before_refuses_the_fork),
        TEST(when_fork_fails_nothing_stays),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
