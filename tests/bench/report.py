"""What bench.py measured, as tables and as pictures."""

import json
import os
import shutil
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "results")

TITLES = {
    "1-connection": "64-byte lines, 1 connection",
    "50-connections": "64-byte lines, 50 connections",
    "1000-connections": "64-byte lines, 1,000 connections",
    "10000-connections": "64-byte lines, 10,000 connections",
    "16-deep": "16 lines at a time, 50 connections",
    "64-deep": "64 lines at a time, 50 connections",
    "16-KB-lines": "16 KB lines, 50 connections",
    "bulk": "echo of 64 KB pieces, 4 in flight on 8 connections",
    "peer-closes": "connect, one echo, close by the client",
    "server-closes": "connect, one echo, close by the server",
    "write": "download of 64 MiB by write (MB)",
    "sendfile": "download of 64 MiB by sendfile (MB)",
    "15000-idle": "64-byte lines, 50 connections beside 15,000 idle ones",
    "two-cores": "64-byte lines, 100 connections, two worker processes",
    "ping-1-deep": "redis-benchmark: PING",
    "set-1-deep": "redis-benchmark: SET",
    "get-1-deep": "redis-benchmark: GET",
    "ping-16-deep": "redis-benchmark: PING, 16 at a time",
    "set-16-deep": "redis-benchmark: SET, 16 at a time",
    "get-16-deep": "redis-benchmark: GET, 16 at a time",
}
NAMES = {"raw_epoll": "raw epoll", "ours_callbacks": "tcpserver.h, callbacks",
         "ours_coroutines": "tcpserver.h, coroutines", "redis.c": "examples/redis.c",
         "go": "Go", "node": "Node", "tornado": "Tornado"}


def name_of(server):
    return NAMES.get(server, server)


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def in_order(values):
    return list(dict.fromkeys(values))


# ---- statistics ----------------------------------------------------------------------------------

def interval_ranks(n):
    """The ranks between which the median lies with at least 95 %, whatever the distribution: the
    number of values below the median is binomial (n, 1/2)."""
    tail, low, term = 0.0, 0, 0.5 ** n
    while tail + term <= 0.025:
        tail += term
        term *= (n - low) / (low + 1)
        low += 1
    return max(low - 1, 0), n - max(low, 1)


def median_interval(values):
    values = sorted(values)
    low, high = interval_ranks(len(values))
    return statistics.median(values), values[low], values[high]


class Loads:
    """The rows of one work, by server and round."""

    def __init__(self, rows, work):
        self.rows = [row for row in rows if row["work"] == work and "error" not in row]
        self.servers = in_order(row["server"] for row in self.rows)
        self.base = "redis-server" if "redis-server" in self.servers else "raw_epoll"
        self.servers.sort(key=lambda server: ORDER.index(server) if server in ORDER else 99)

    def values(self, server, name):
        return {row["round"]: row[name] for row in self.rows
                if row["server"] == server and name in row}

    def median(self, server, name):
        values = list(self.values(server, name).values())
        return statistics.median(values) if values else None

    def ratio(self, server, name):
        """To the base in the same round: median and 95 % interval. None without a base."""
        own, base = self.values(server, name), self.values(self.base, name)
        both = [own[number] / base[number] for number in own if number in base]
        return median_interval(both) if both else None


ORDER = ["raw_epoll", "ours_callbacks", "ours_coroutines", "libuv", "libevent", "libev", "go",
         "node", "tornado", "redis-server", "redis.c"]


# ---- tables --------------------------------------------------------------------------------------

def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def ratio_text(ratio):
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratio) if ratio else ""


def load_table(loads, title):
    base = name_of(loads.base)
    yield f"\n### {title}\n"
    yield (f"| server | a second | least to most | to {base} | CPU µs each | to {base} | p50 µs | "
           "p99 µs | p99.9 µs | cores used by server, client |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for server in loads.servers:
        rates = loads.values(server, "rate").values()
        use = [loads.median(server, name) for name in ("server_use", "client_use")]
        yield "| " + " | ".join([
            name_of(server), number(statistics.median(rates)),
            f"{number(min(rates))} to {number(max(rates))}",
            ratio_text(loads.ratio(server, "rate")), f"{loads.median(server, 'cpu_us'):.3f}",
            ratio_text(loads.ratio(server, "cpu_us")), number(loads.median(server, "p50_us")),
            number(loads.median(server, "p99_us")), number(loads.median(server, "p999_us")),
            ", ".join(f"{one:.2f}" for one in use if one is not None)]) + " |"


def overview(rows):
    """One row a work, one column a server: rate and CPU to the base's, medians of paired rounds."""
    loads = {work: Loads(rows, work) for work in in_order(row["work"] for row in rows)}
    loads = {work: one for work, one in loads.items() if one.base == "raw_epoll"}
    servers = [server for server in ORDER if any(server in one.servers for one in loads.values())]
    yield "\n### Rate and CPU a request, both to raw epoll's\n"
    yield "| | " + " | ".join(map(name_of, servers)) + " |"
    yield "|---|" + "---|" * len(servers)
    for work, one in loads.items():
        cells = []
        for server in servers:
            rate, cpu = one.ratio(server, "rate"), one.ratio(server, "cpu_us")
            if server == one.base:
                cells.append(f"{number(one.median(server, 'rate'))}/s, "
                             f"{one.median(server, 'cpu_us'):.3g} µs")
            else:
                cells.append(f"{rate[0]:.2f}, {cpu[0]:.2f}" if rate else "")
        yield f"| {TITLES.get(work, work)} | " + " | ".join(cells) + " |"


def count_tables(rows):
    works = in_order(row["work"] for row in rows)
    for key, title in (("system_calls", "System calls a request"),
                       ("instructions", "Instructions a request in user space")):
        yield f"\n### {title}\n"
        yield "| server | " + " | ".join(works) + " |"
        yield "|---|" + "---|" * len(works)
        for server in in_order(row["server"] for row in rows):
            found = {row["work"]: row[key] for row in rows if row["server"] == server}
            if any(found.values()):
                yield f"| {name_of(server)} | " + " | ".join(number(found.get(work))
                                                             for work in works) + " |"


def memory_table(rows):
    yield "\n### Memory, 10,000 connections\n"
    yield "| server | bytes for each idle connection | KiB kept after all are closed |"
    yield "|---|---|---|"
    for row in rows:
        yield f"| {name_of(row['server'])} | {row['each']:,.0f} | {row['kept'] / 1024:,.0f} |"


def growth_cells(rows):
    """connections, server, mode: CPU (median of rounds) and instructions a request."""
    cells = {}
    for row in rows:
        key = row["connections"], row["server"], row["mode"]
        cell = cells.setdefault(key, {"cpu_us": [], "instructions": None})
        if "cpu_us" in row:
            cell["cpu_us"].append(row["cpu_us"])
        cell["instructions"] = row.get("instructions", cell["instructions"])
    return cells


def growth_table(rows):
    cells = growth_cells(rows)
    kinds = in_order(key[1:] for key in cells)
    yield "\n### Growth: CPU µs and instructions a request\n"
    yield "| connections | " + " | ".join(
        name_of(server) + (", idle timeout" if mode == "timed" else "")
        for server, mode in kinds) + " |"
    yield "|---|" + "---|" * len(kinds)
    for connections in in_order(key[0] for key in cells):
        found = [cells[(connections,) + kind] for kind in kinds]
        yield f"| {connections:,} | " + " | ".join(
            f"{statistics.median(cell['cpu_us']):.2f}, {cell['instructions']:.0f}"
            for cell in found) + " |"


def lines_table(rows):
    pieces = in_order(row["piece"] for row in rows)
    yield "\n### Growth: µs to read a line that arrives in pieces, without the kernel's part\n"
    yield "| line, bytes | " + " | ".join(f"pieces of {piece:,}" for piece in pieces) + " |"
    yield "|---|" + "---|" * len(pieces)
    for size in in_order(row["size"] for row in rows):
        found = {row["piece"]: row["us"] for row in rows if row["size"] == size}
        yield f"| {size:,} | " + " | ".join(number(found.get(piece)) for piece in pieces) + " |"


def method(rows):
    for row in of_kind(rows, "method"):
        yield (f"{row['processor']}, {row['cores']} cores; {row['system']}; {row['compiler']}, -O2; "
               f"{row['versions']}. {row['rounds']} rounds, network {row['network']}.")


def tables(rows):
    loads, counts = of_kind(rows, "load"), of_kind(rows, "count")
    inside = of_kind(rows, "inside")
    yield from method(rows)
    if any(row["server"] == "raw_epoll" for row in loads):
        yield from overview(loads)
    if counts:
        yield from count_tables(counts)
    if of_kind(rows, "memory"):
        yield from memory_table(of_kind(rows, "memory"))
    switches = [row for row in inside if row["figure"] != "line"]
    if switches:
        yield "\n### Coroutines: ns for a resume and the yield or park that follows it\n"
        yield "| | median | least | most |\n|---|---|---|---|"
        for row in switches:
            yield f"| {row['figure']} | {row['ns']:.1f} | {row['least_ns']:.1f} | {row['most_ns']:.1f} |"
    if of_kind(rows, "growth"):
        yield from growth_table(of_kind(rows, "growth"))
    lines = [row for row in inside if row["figure"] == "line"]
    if lines:
        yield from lines_table(lines)
    for work in in_order(row["work"] for row in loads):
        yield from load_table(Loads(loads, work), TITLES.get(work, work))
    errors = [row for row in loads + of_kind(rows, "growth") if "error" in row]
    yield f"\n{len(loads)} loads, {len(errors)} failed."
    for row in errors:
        yield f"* {row['server']}: {row.get('work', '')}: {row['error']}"


def print_report(rows):
    print("\n".join(tables(rows)))
