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
    "32-deep": "32 lines at a time, 50 connections",
    "64-deep": "64 lines at a time, 50 connections",
    "16-KB-lines": "16 KB lines, 50 connections",
    "bulk": "echo of 64 KB pieces, 4 in flight on 8 connections",
    "peer-closes": "connect, one echo, close by the client",
    "server-closes": "connect, one echo, close by the server",
    "write": "download of 64 MiB by write (MB)",
    "sendfile": "download of 64 MiB by sendfile (MB)",
    "15000-idle": "64-byte lines, 50 connections beside 15,000 idle ones",
    "two-cores": "64-byte lines, 100 connections, two worker processes",
    **{f"{name}-{depth}-deep{place}": f"redis: {name.upper()}{deep}{where}"
       for place, where in (("", ""), ("-together", ""), ("-apart", ", a core for each side"))
       for depth, deep in ((1, ""), (16, ", 16 at a time")) for name in ("ping", "set", "get")},
}
SHORT = {
    "1-connection": "64-byte lines, 1 connection",
    "50-connections": "50 connections",
    "1000-connections": "1,000 connections",
    "10000-connections": "10,000 connections",
    "16-deep": "16 lines at a time",
    "64-deep": "64 lines at a time",
    "16-KB-lines": "16 KB lines",
    "bulk": "256 KB in flight on each",
    "peer-closes": "connect, echo, client closes",
    "server-closes": "connect, echo, server closes",
    "write": "64 MiB by write",
    "sendfile": "64 MiB by sendfile",
    "15000-idle": "50 beside 15,000 idle",
    "two-cores": "two processes",
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
    if not value:
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


REDIS = ("redis-server", "redis.c")


def redis_count_table(rows):
    found = {(row["work"], row["server"]): row for row in rows if row["server"] in REDIS}
    if found:
        yield "\n### redis: instructions in user space and system calls a request\n"
        yield "| | " + " | ".join(map(name_of, REDIS)) + " |\n|---|---|---|"
    for work in in_order(key[0] for key in found):
        both = [found.get((work, server)) for server in REDIS]
        yield f"| {TITLES[work]} | " + " | ".join(
            f"{number(row['instructions'])}, {row['system_calls']:.2f}" if row else ""
            for row in both) + " |"


def count_tables(rows):
    rows = [row for row in rows if row["server"] not in REDIS]
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


def lines_tables(rows):
    for row in rows:
        if row["of"] == "all":
            yield (f"\n### Where the instructions go: {TITLES[row['work']]}, "
                   f"{name_of(row['server'])}\n")
            yield "| instructions a request | | |\n|---|---|---|"
        yield (f"| {row['instructions']:.1f} | {row.get('number', row['of'])} | "
               f"`{row.get('text', '').replace('|', chr(92) + '|')}` |".replace("`` ", ""))


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
            f"{number(statistics.median(cell['cpu_us']))}, {number(cell['instructions'])}"
            for cell in found) + " |"


def lines_table(rows):
    pieces = in_order(row["piece"] for row in rows)
    yield "\n### Growth: µs to read a line that arrives in pieces, without the kernel's part\n"
    yield "| line, bytes | " + " | ".join(f"pieces of {piece:,}" for piece in pieces) + " |"
    yield "|---|" + "---|" * len(pieces)
    for size in in_order(row["size"] for row in rows):
        found = {row["piece"]: row["us"] for row in rows if row["size"] == size}
        yield f"| {size:,} | " + " | ".join(number(found.get(piece)) for piece in pieces) + " |"


# What ours are to reach: rate at least and CPU at most, to the base's.
RATIO_GOALS = {
    **{work: (0.98, 1.03) for work in ("1-connection", "50-connections", "1000-connections",
                                       "10000-connections", "16-KB-lines")},
    "16-deep": (0.97, None), "64-deep": (0.97, None), "bulk": (1.12, None),
    "peer-closes": (1.05, None), "server-closes": (1.05, None),
    **{f"{one}-{depth}-deep-{place}": (1, None) for place in ("together", "apart")
       for depth in (1, 16) for one in ("ping", "set", "get")},
}
# At most, with callbacks and with coroutines.
COUNT_GOALS = {
    ("50-connections", "instructions"): (200, 250), ("16-deep", "instructions"): (110, 160),
    ("1-connection", "system_calls"): (3, 3), ("50-connections", "system_calls"): (2.05, 2.05),
    ("16-deep", "system_calls"): (0.14, 0.14), ("peer-closes", "system_calls"): (9, 9),
    ("server-closes", "system_calls"): (12, 12),
}
MEMORY_GOALS = {"ours_callbacks": 200, "ours_coroutines": 4200}
RESUMED, RESUMED_NS = "resume and wait, by the loop", 10
OURS = ("ours_callbacks", "ours_coroutines", "redis.c")


def verdict(ratio, goal, at_least):
    """Missed only where the whole interval is on the wrong side; open where it holds the goal."""
    if (ratio[0] >= goal) if at_least else (ratio[0] <= goal):
        return "met"
    return "open" if ratio[1] <= goal <= ratio[2] else "missed"


def ratio_goals(rows):
    for work, goals in RATIO_GOALS.items():
        loads = Loads(rows, work)
        for server in OURS:
            for key, goal, at_least in (("rate", goals[0], True), ("cpu_us", goals[1], False)):
                ratio = loads.ratio(server, key) if goal else None
                if ratio:
                    yield (TITLES[work], server, "rate" if at_least else "CPU", ratio_text(ratio),
                           f"at {'least' if at_least else 'most'} {goal}",
                           verdict(ratio, goal, at_least))


def exact_goals(rows):
    for row in of_kind(rows, "count"):
        for key in ("instructions", "system_calls"):
            goals = COUNT_GOALS.get((row["work"], key))
            if goals and row["server"] in OURS:
                goal = goals[OURS.index(row["server"])]
                yield (TITLES[row["work"]], row["server"], key.replace("_", " "),
                       f"{row[key]:.2f}", f"at most {goal}",
                       "met" if round(row[key], 2) <= goal else "missed")
    for row in of_kind(rows, "memory"):
        if row["server"] in MEMORY_GOALS:
            goal = MEMORY_GOALS[row["server"]]
            yield ("10,000 idle connections", row["server"], "bytes each", f"{row['each']:.0f}",
                   f"at most {goal}", "met" if row["each"] <= goal else "missed")
            yield ("10,000 connections closed", row["server"], "KiB kept",
                   f"{row['kept'] / 1024:.0f}", "at most 1024",
                   "met" if row["kept"] <= 1 << 20 else "missed")
    for row in of_kind(rows, "inside"):
        if row["figure"] == RESUMED:
            yield ("resume and yield, hot", "ours_coroutines", "ns", f"{row['ns']:.1f}",
                   f"at most {RESUMED_NS}", "met" if row["ns"] <= RESUMED_NS else "missed")


def goals_table(rows):
    found = list(ratio_goals(of_kind(rows, "load"))) + list(exact_goals(rows))
    if not found:
        return
    counts = {word: sum(1 for row in found if row[-1] == word) for word in ("met", "open", "missed")}
    yield "\n### Goals: {met} met, {open} open within the noise, {missed} missed\n".format(**counts)
    yield "| | server | of what | measured | goal | |\n|---|---|---|---|---|---|"
    for title, server, *rest in found:
        yield f"| {title} | {name_of(server)} | " + " | ".join(rest) + " |"


def method(rows):
    for row in of_kind(rows, "method"):
        yield (f"{row['processor']}, {row['cores']} cores; {row['system']}; {row['compiler']}, -O2; "
               f"{row['versions']}. {row['rounds']} rounds, {row['peer_rounds']} for the peers, "
               f"network {row['network']}.")


def tables(rows):
    loads, counts = of_kind(rows, "load"), of_kind(rows, "count")
    inside = of_kind(rows, "inside")
    yield from method(rows)
    if any(row["server"] == "raw_epoll" for row in loads):
        yield from overview(loads)
    yield from goals_table(rows)
    if counts:
        yield from count_tables(counts)
        yield from redis_count_table(counts)
    yield from lines_tables(of_kind(rows, "lines"))
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


# ---- files that are kept -------------------------------------------------------------------------

def write_tsv(name, head, lines):
    with open(os.path.join(RESULTS, name), "w") as file:
        for words in [head] + list(lines):
            file.write("\t".join(f"{word:.6g}" if isinstance(word, float) else str(word)
                                 for word in words) + "\n")


def read_tsv(name):
    with open(os.path.join(RESULTS, name)) as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    return [dict(zip(lines[0], words)) for words in lines[1:]]


def comparison_lines(rows):
    for work in in_order(row["work"] for row in rows):
        loads = Loads(rows, work)
        for server in loads.servers:
            rates = loads.values(server, "rate")
            rate, cpu = loads.ratio(server, "rate"), loads.ratio(server, "cpu_us")
            nothing = ("", "", "")
            yield (work, server, len(rates), statistics.median(rates.values()),
                   loads.median(server, "cpu_us"), *(rate or nothing), *(cpu or nothing),
                   *(loads.median(server, name) or "" for name in ("p50_us", "p99_us", "p999_us")))


def write_files(rows):
    os.makedirs(RESULTS, exist_ok=True)
    write_tsv("comparison.tsv",
              ["work", "server", "rounds", "rate", "cpu_us", "rate_ratio", "rate_low", "rate_high",
               "cpu_ratio", "cpu_low", "cpu_high", "p50_us", "p99_us", "p999_us"],
              comparison_lines(of_kind(rows, "load")))
    write_tsv("connections.tsv", ["connections", "server", "mode", "cpu_us", "instructions"],
              ((*key, statistics.median(cell["cpu_us"]), cell["instructions"])
               for key, cell in growth_cells(of_kind(rows, "growth")).items()))
    write_tsv("lines.tsv", ["piece", "size", "us"],
              ((row["piece"], row["size"], row["us"]) for row in of_kind(rows, "inside")
               if row["figure"] == "line"))
    write_tsv("method.tsv", ["method"], [[line] for line in method(rows)])
    with open(os.path.join(HERE, "method.md")) as file:
        text = file.read()
    with open(os.path.join(RESULTS, "README.md"), "w") as file:
        file.write(text + "\n" + "\n".join(tables(rows)) + "\n")


# ---- the page at the top -------------------------------------------------------------------------

PERFORMANCE, AFTER = "## Performance\n", "## How it is tested\n"


def figures(rows):
    """A request's exact cost in one table, and the rates in another."""
    counts, memory = of_kind(rows, "count"), of_kind(rows, "memory")
    servers = [server for server in ORDER if server != "tornado" and server not in REDIS and
               any(row["server"] == server for row in counts)]
    yield "| a request costs | " + " | ".join(map(name_of, servers)) + " |"
    yield "|---|" + "---|" * len(servers)
    for key, work, title in (
            ("instructions", "50-connections", "instructions in user space, 50 connections"),
            ("instructions", "16-deep", "instructions, 16 lines at a time"),
            ("system_calls", "1-connection", "system calls, 1 connection"),
            ("system_calls", "50-connections", "system calls, 50 connections"),
            ("system_calls", "16-deep", "system calls, 16 lines at a time"),
            ("system_calls", "peer-closes", "system calls for connect, echo, close by the client")):
        found = {row["server"]: row[key] for row in counts if row["work"] == work}
        yield f"| {title} | " + " | ".join(number(found.get(server)) for server in servers) + " |"
    found = {row["server"]: row["each"] for row in memory}
    yield "| bytes for an idle connection | " + " | ".join(number(found.get(server))
                                                           for server in servers) + " |"
    yield ""
    shown = [row for row in of_kind(rows, "load") if row["server"] in servers + ["go"]]
    yield from list(overview(shown))[1:]
    yield ""
    yield from method(rows)


def write_section(rows):
    """The top page's section, anew."""
    path = os.path.join(HERE, "../../README.md")
    with open(path) as file, open(os.path.join(HERE, "performance.md")) as section:
        text, new = file.read(), section.read()
    before, after = text.split(AFTER)
    with open(path, "w") as file:
        file.write(before.split(PERFORMANCE)[0] +
                   new.replace("(figures)", "\n".join(figures(rows))) + AFTER + after)


# ---- pictures ------------------------------------------------------------------------------------

COLOURS = {"raw_epoll": "#777777", "ours_callbacks": "#0050c8", "ours_coroutines": "#00a0e0",
           "libuv": "#e08000", "libevent": "#b04a9c", "libev": "#b89000", "go": "#2a9a5c",
           "node": "#d04040", "tornado": "#806050"}
START = """set terminal svg size {width},{height} font 'sans-serif,13' background '#ffffff' dynamic
set output '{output}'
set tics nomirror
set border 3 lc rgb '#444444'
set key textcolor rgb '#222222'
"""


class Blocks:
    """Data for gnuplot, inline."""

    def __init__(self):
        self.text = ""
        self.count = 0

    def add(self, points):
        self.count += 1
        lines = "\n".join(" ".join(map(str, point)) for point in points)
        self.text += f"$data{self.count} << EOD\n{lines}\nEOD\n"
        return f"$data{self.count}"


def draw(output, width, height, blocks, commands):
    script = START.format(width=width, height=height, output=os.path.join(RESULTS, output))
    subprocess.run(["gnuplot"], input=script + blocks.text + commands, text=True, check=True)
    print(f"drawn: {os.path.relpath(os.path.join(RESULTS, output))}")


def panel(rows, works, servers, columns, blocks):
    """Points with intervals, a line of them for each work, a step lower for each server."""
    parts = []
    middle, low, high = columns
    for place, server in enumerate(servers):
        points = []
        for row in rows:
            if row["server"] != server or not row[middle]:
                continue
            y = len(works) - works.index(row["work"]) + 0.36 - 0.72 * place / (len(servers) - 1)
            values = sorted(float(row[name]) for name in (low, middle, high))
            if middle.startswith("cpu"):
                values = [1 / value for value in reversed(values)]
            points.append((values[1], f"{y:.3f}", values[0], values[2]))
        size = 0.85 if server.startswith("ours") else 0.6
        parts.append(f"{blocks.add(points)} using 1:2:3:4 with xerrorbars pt 7 ps {size} lw 1.6 "
                     f"lc rgb '{COLOURS[server]}' title '{name_of(server)}'")
    return "plot " + ", ".join(parts) + "\n"


def draw_comparison():
    rows = [row for row in read_tsv("comparison.tsv") if row["server"] in COLOURS]
    works = in_order(row["work"] for row in rows)
    servers = [server for server in ORDER if server != "raw_epoll" and server in COLOURS and
               any(row["server"] == server for row in rows)]
    blocks = Blocks()
    titles = ", ".join(f"'{SHORT.get(work, work)}' {len(works) - place}"
                       for place, work in enumerate(works))
    height = 130 + 50 * len(works)
    first = panel(rows, works, servers, ("rate_ratio", "rate_low", "rate_high"), blocks)
    second = panel(rows, works, servers, ("cpu_ratio", "cpu_low", "cpu_high"), blocks)
    lines = "".join(f"set arrow from graph 0, first {place + 0.5} to graph 1, first {place + 0.5} "
                    "nohead lc rgb '#e4e4e4'\n" for place in range(len(works) + 1))
    draw("comparison.svg", 1000, height, blocks, f"""
set multiplot
set yrange [0.5:{len(works) + 0.5}]
set xrange [0:1.4]
set xtics 0, 0.2, 1.2
set grid xtics lc rgb '#e4e4e4' lt 1
set arrow from 1, graph 0 to 1, graph 1 nohead lc rgb '#777777' lw 1.5
{lines}
set tmargin at screen {1 - 88 / height:.4f}
set bmargin at screen {34 / height:.4f}
set ytics ({titles}) scale 0
set lmargin at screen 0.22
set rmargin at screen 0.595
set title 'requests a second, to raw epoll' offset 0,-0.5
set key vertical maxrows 2 at screen 0.97, screen {1 - 8 / height:.4f} right top samplen 2 width -6
{first}
set format y ''
set ytics ('' 0) scale 0
set lmargin at screen 0.61
set rmargin at screen 0.985
set title 'requests for each CPU second, to raw epoll'
unset key
{second}
unset multiplot
""")


def connections_plot(rows, column, blocks):
    parts = []
    for server, mode in in_order((row["server"], row["mode"]) for row in rows):
        points = [(row["connections"], row[column]) for row in rows
                  if (row["server"], row["mode"]) == (server, mode)]
        title = name_of(server).replace("tcpserver.h, ", "")
        title += ", idle timeout" if mode == "timed" else ""
        look = "dt 2 pt 6" if mode == "timed" else "pt 7"
        parts.append(f"{blocks.add(points)} using 1:2 with linespoints {look} lw 2 ps 0.6 "
                     f"lc rgb '{COLOURS[server]}' title '{title}'")
    return "plot " + ", ".join(parts) + "\n"


def lines_plot(rows, blocks):
    parts = []
    colours = ["#d04040", "#e08000", "#00a0e0", "#0050c8"]
    for place, piece in enumerate(in_order(row["piece"] for row in rows)):
        points = [(row["size"], float(row["us"])) for row in rows if row["piece"] == piece]
        size = f"{int(piece) // 1024} KB" if int(piece) >= 1024 else f"{piece} B"
        parts.append(f"{blocks.add(points)} using 1:2 with linespoints pt 7 lw 2 ps 0.5 "
                     f"lc rgb '{colours[place % 4]}' title '{size}'")
    return "plot " + ", ".join(parts) + "\n"


def above(rows, column):
    """Room for the key above the lines."""
    return 1.7 * max(float(row[column]) for row in rows)


def draw_growth():
    rows, blocks = read_tsv("connections.tsv"), Blocks()
    cpu = connections_plot(rows, "cpu_us", blocks)
    instructions = connections_plot(rows, "instructions", blocks)
    lines = lines_plot(read_tsv("lines.tsv"), blocks)
    draw("growth.svg", 1000, 380, blocks, f"""
set multiplot layout 1,3 margins 0.05,0.985,0.17,0.9 spacing 0.06
set grid lc rgb '#e4e4e4' lt 1
set logscale x
set xrange [7:22000]
set yrange [0:{above(rows, "cpu_us"):.3g}]
set xtics ('10' 10, '100' 100, '1,000' 1000, '10,000' 10000)
set xlabel 'connections'
set title 'CPU µs a request'
set key top left font ',11'
{cpu}
set title 'instructions a request in user space'
set yrange [0:{above(rows, "instructions"):.3g}]
{instructions}
set title 'µs for a line that arrives in pieces'
set xrange [40:100000000]
set yrange [0.05:*]
set logscale y
set format y '10^{{%T}}'
set xtics ('64 B' 64, '4 KB' 4096, '256 KB' 262144, '16 MB' 16777216)
set xlabel 'length of the line'
set key top left title 'pieces of'
{lines}
unset multiplot
""")


def plot(results):
    if os.path.exists(results):
        rows = read(results)
        write_files(rows)
        if of_kind(rows, "count") and of_kind(rows, "load"):
            write_section(rows)
    if not shutil.which("gnuplot"):
        sys.exit("no gnuplot here")
    if not os.path.exists(os.path.join(RESULTS, "comparison.tsv")):
        sys.exit("nothing is measured yet: make bench")
    if read_tsv("comparison.tsv"):
        draw_comparison()
    if read_tsv("connections.tsv") and read_tsv("lines.tsv"):
        draw_growth()
