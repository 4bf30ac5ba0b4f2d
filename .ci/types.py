"""`make types`: mypy, strict, over the package; in old files the errors may only become fewer.

`.ci/types.txt` says how many errors a file may have; a file that is not listed may have none. Exits with 1 where a file
has more. Where it has fewer, `--lower` writes the smaller number.
"""

from __future__ import annotations

import collections
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
RATCHET = pathlib.Path(__file__).with_name("types.txt")


def main() -> int:
    allowed = {file: int(count) for file, count in map(str.split, RATCHET.read_text().splitlines())}
    output = subprocess.run([sys.executable, "-m", "mypy", "genft_kernels"], cwd=ROOT, capture_output=True, text=True)
    if output.returncode not in (0, 1):  # mypy itself failed
        print(output.stdout, output.stderr, sep="\n")
        return 1
    errors = [line for line in output.stdout.splitlines() if re.match(r"\S+:\d+: error: ", line)]
    found = collections.Counter(line.partition(":")[0] for line in errors)
    more = [file for file in sorted(found) if found[file] > allowed.get(file, 0)]
    fewer = [file for file in allowed if found[file] < allowed[file]]
    for file in more:
        print(*(line for line in errors if line.startswith(f"{file}:")), sep="\n")
        print(f"{file}: {found[file]} errors, {allowed.get(file, 0)} allowed")
    if fewer and "--lower" in sys.argv[1:]:
        lowered = {file: min(count, found[file]) for file, count in allowed.items() if found[file]}
        RATCHET.write_text("".join(f"{file} {count}\n" for file, count in lowered.items()))
    elif fewer:
        print(f"fewer errors than .ci/types.txt allows in {', '.join(fewer)}: python .ci/types.py --lower")
    print(f"types: {sum(found.values())} errors in {len(found)} old files")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
