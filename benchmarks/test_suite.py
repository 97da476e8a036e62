"""Print a table of the tests' time from pytest's reports.

    make test ARGS="-n 3 --dist loadfile --junitxml=test.xml"
    make test-rest ARGS="-n 2 --dist loadfile --junitxml=rest.xml"
    python benchmarks/test_suite.py test.xml rest.xml

The seconds of a file are those of its tests and fixtures, summed over parallel processes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import sides

NUM_FILES = 12


def main() -> None:
    parser = sides.parser(__doc__, rounds=None)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.xml")
    args = parser.parse_args()
    rows = []
    for report in args.reports:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        seconds: Counter[str] = Counter()
        for case in suite.iter("testcase"):
            seconds[case.get("classname", "").replace(".", "/") + ".py"] += float(case.get("time", 0))
        wall, tests = float(suite.get("time", 0)), int(suite.get("tests", 0))
        rows.append(f"| {report.stem} | {tests:,} | {wall / 60:.1f} | {seconds.total() / 60:.1f} | |")
        rows += [f"| | | | {value / 60:.1f} | {file} |" for file, value in seconds.most_common(NUM_FILES)]
    table = ["| suite | tests | minutes | minutes of tests | the longest files |", "|---|---|---|---|---|", *rows]
    command = sides.typed("test_suite.py", *(report.name for report in args.reports))
    sides.record(args.results, "tests", "test suites", "From pytest's JUnit reports.", command, table)


if __name__ == "__main__":
    main()
