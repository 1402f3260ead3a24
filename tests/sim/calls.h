/* From here on the names of system calls mean the simulated ones. Function-like macros, so that
   types and members of the same name stay what they are. */
#ifndef SIM_CALLS_H
#define SIM_CALLS_H

#include "pollers.h"
#ifdef TCPSERVER_TLS
#include "crypto.h"
#endif

#ifdef TCPSERVER_USE_KQUEUE
#undef __linux__ /* also the ways of systems without accept4, eventfd and sendfile */
#endif

#define TCPSERVER_REALLOC(memory, size) sim_realloc(memory, size)
#define clock_gettime(clock, now) sim_clock_gettime(clock, now)
#define getpid() 42
#define getppid() 41
#define socket(family, type, protocol) sim_socket(family, type, protocol)
#define bind(fd, name, size) ((void)(size), sim_bind(fd, name))
#define listen(fd, backlog) sim_listen(fd, backlog)
#define accept(fd, name, size) sim_accept(fd, name, size, 0)
#define accept4(fd, name, size, flags) sim_accept(fd, name, size, flags)
#define connect(fd, name, size) ((void)(size), sim_connect(fd, name))
#define shutdown(fd, how) sim_shutdown(fd, how)
#define close(fd) sim_close(fd)
#define read(fd, memory, size) sim_read(fd, memory, size)
#define recv(fd, memory, size, flags) ((void)(flags), sim_recv(fd, memory, size))
#define readv(fd, pieces, count) sim_readv(fd, pieces, count)
#define write(fd, data, size) sim_write(fd, data, size)
#define writev(fd, pieces, count) sim_sendv(fd, pieces, count, 0, CALL_WRITEV)
#define send(fd, data, size, flags) sim_send(fd, data, size, flags)
#define sendmsg(fd, message, flags) \
    sim_sendv(fd, (message)->msg_iov, (int)(message)->msg_iovlen, flags, CALL_SEND)
#define sendfile(fd, file, offset, size) sim_sendfile(fd, file, offset, size)
#define pread(fd, memory, size, offset) sim_pread(fd, memory, size, offset)
#define open(path, flags) ((void)(path), sim_open_null())
#define setsockopt(fd, level, option, value, size) \
    ((void)(size), sim_setsockopt(fd, level, option, value))
#define getsockopt(fd, level, option, value, size) \
    ((void)(size), sim_getsockopt(fd, level, option, value))
#define getsockname(fd, name, size) sim_getsockname(fd, name, size)
#define getpeername(fd, name, size) sim_getpeername(fd, name, size)
#define fcntl(...) sim_fcntl(__VA_ARGS__)
#define ioctl(fd, what, value) sim_ioctl_unread(fd, value)
#define fstat(fd, status) sim_fstat(fd, status)
#define lstat(path, status) ((void)(path), sim_lstat(status))
#define chmod(path, mode) ((void)(path), (void)(mode), sim_chmod())
#define remove(path) ((void)(path), sim_unlink())
#define eventfd(value, flags) sim_eventfd()
#define pipe(fds) sim_pipe(fds)
#define getrlimit(what, limit) sim_getrlimit(limit)
#define mmap(at, size, protection, flags, fd, offset) ((void)(flags), sim_mmap(size))
#define munmap(memory, size) sim_munmap(memory, size)
#define mprotect(memory, size, protection) sim_mprotect(memory, size, protection)
#define madvise(memory, size, advice) sim_madvise(memory, size, advice)
#define sigaction(signo, action, old) sim_sigaction(signo, action, old)
#define sigpending(set) sim_sigpending(set)
#define pthread_sigmask(how, set, old) sim_sigmask(how, set, old)
#define sigwait(set, signo) sim_sigwait(signo)
#define pthread_create(thread, attributes, run, arg) \
    ((void)(thread), sim_pthread_create(run, arg))
#define pthread_detach(thread) ((void)(thread))
#define getaddrinfo(host, port, hints, list) sim_getaddrinfo(host, port, hints, list)
#define freeaddrinfo(list) sim_freeaddrinfo(list)

#ifdef TCPSERVER_TLS
#define getentropy(memory, size) sim_getentropy(memory, size)
#define br_ec_get_default() sim_curves()
#define br_ssl_engine_set_default_ec(core) br_ssl_engine_set_ec(core, sim_curves())
#define br_ssl_engine_set_default_ecdsa(core) sim_set_ecdsa(core)
#define br_ssl_engine_inject_entropy(core, seed, size) sim_inject_entropy(core, seed, size)
#define br_ssl_engine_sendapp_ack(core, size) sim_sendapp_ack(core, size)
#define br_ssl_engine_sendrec_ack(core, size) sim_sendrec_ack(core, size)
#define br_ssl_engine_recvapp_ack(core, size) sim_recvapp_ack(core, size)
#define br_ssl_engine_close(core) sim_engine_close(core)
#endif

#if defined(TCPSERVER_USE_EPOLL)
#define epoll_create1(flags) sim_epoll_create()
#define epoll_ctl(poller, op, fd, event) sim_epoll_ctl(poller, op, fd, event)
#define epoll_wait(poller, events, max, timeout) sim_epoll_wait(poller, events, max, timeout)
#elif defined(TCPSERVER_USE_KQUEUE)
#define kqueue() sim_kqueue()
#define kevent(poller, changes, count, events, max, limit) \
    sim_kevent(poller, changes, count, events, max, limit)
#else
#define poll(entries, count, timeout) sim_poll(entries, count, timeout)
#endif

#endif
