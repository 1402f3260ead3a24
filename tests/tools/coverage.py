"""What of the header the tests have run. Arguments: the directory with gcc's counters, the header,
and a list of places that no test runs: under each reason, behind "# ", the lines of code that it
holds for, behind their function's name, or that name alone for all of it. Prints percentages, TLS apart, and every line that was not run; the last line
is a sum, in which a line that was not run and has no reason is a failure."""

import glob
import json
import subprocess
import sys

LINES, BRANCHES = 98.0, 90.0  # of the header without TLS, in percent


def read_reasons(path):
    reasons, reason = {}, ""
    for line in open(path, encoding="utf-8"):
        if line.startswith("# "):
            reason += " " + line[2:].strip()
        elif line.startswith(" "):
            reasons[line.strip()] = reason.strip()
        elif not line.strip():
            reason = ""
    return reasons


def sections(source):
    """The section of each line; within a section of its own, TLS."""
    section, found = "head", []
    for line in source:
        if line.startswith("/* ==== >>"):
            section = line.split(">>")[1].split()[0]
        found.append(section)
    return found


def read_counters(directory, header):
    """Each line's count, and its branches' counts, summed over all programs."""
    lines, branches, functions = {}, {}, {}
    for name in sorted(glob.glob(directory + "/**/*.gcda", recursive=True)):
        said = subprocess.run(["gcov", "-b", "--json-format", "--stdout", name], check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        for file in json.loads(said)["files"]:
            if not file["file"].endswith(header):
                continue
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = lines.get(number, 0) + line["count"]
                functions[number] = line.get("function_name", "")
                for index, branch in enumerate(line["branches"]):
                    key = number, line.get("function_name"), index
                    branches[key] = branches.get(key, 0) + branch["count"]
    return lines, branches, functions


def percent(counts):
    return 100.0 * sum(count > 0 for count in counts) / max(len(counts), 1)


def measure(lines, branches, of_section, want_tls):
    run = [count for number, count in lines.items()
           if (of_section[number - 1] == "tls") == want_tls]
    taken = [count for key, count in branches.items()
             if (of_section[key[0] - 1] == "tls") == want_tls]
    name = "TLS" if want_tls else "without TLS"
    print(f"{name}: lines {percent(run):.2f} % of {len(run)}, "
          f"branches {percent(taken):.2f} % of {len(taken)}")
    return percent(run), percent(taken)


def list_missed(lines, functions, of_section, source, reasons):
    used, unexplained = set(), 0
    for number, count in sorted(lines.items()):
        text, function = source[number - 1].strip(), functions[number]
        if count or text == "}" or of_section[number - 1] == "tls":
            continue
        key = function if function in reasons else f"{function}: {text}"
        used.add(key)
        unexplained += key not in reasons
        print(f"{number}: {function}: {text}\n    {reasons.get(key, 'NO REASON IS GIVEN')}")
    for key in reasons:
        if key not in used:
            print(f"is run now, and needs no reason: {key}")
    return unexplained


def main():
    directory, header, explained = sys.argv[1:4]
    source = open(header, encoding="utf-8").read().split("\n")
    of_section = sections(source)
    lines, branches, functions = read_counters(directory, header)
    unexplained = list_missed(lines, functions, of_section, source, read_reasons(explained))
    measure(lines, branches, of_section, True)
    run, taken = measure(lines, branches, of_section, False)
    failed = (run < LINES) + (taken < BRANCHES) + (unexplained > 0)
    if failed:
        print(f"FAIL coverage: {LINES} % of lines and {BRANCHES} % of branches are wanted, and a "
              f"reason for every line that is not run: {unexplained} have none")
    print(f"{3 - failed} passed, {failed} failed, 0 skipped")
    return failed != 0


sys.exit(main())
