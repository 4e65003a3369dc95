"""``python -m benchmarks.reliability COMMAND``, from the project's root; ``--help`` lists the commands."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fuzzing = commands.add_parser("fuzz", help="read damaged inputs of all kinds; exits with 1 on a defect")
    fuzzing.add_argument("--minutes", type=float, default=2.0)
    fuzzing.add_argument("--seed", type=int, default=0)
    fuzzing.add_argument("--case", type=int, default=None, metavar="N", help="run only this case, as named by a defect")
    child = commands.add_parser("child")
    for name, kind in (("seed", int), ("start", int), ("stop", int), ("seconds", float)):
        child.add_argument(name, type=kind)
    killing = commands.add_parser("kills", help="kill processes while they write; exits with 1 on a defect")
    killing.add_argument("--times", type=int, default=200)
    killing.add_argument("--seed", type=int, default=0)
    commands.add_parser("faults", help="full disks, too little memory, changed inputs; exits with 1 on a defect")
    soaking = commands.add_parser("soak", help="many prompts on one ComfyUI server; exits with 1 on a defect")
    soaking.add_argument("--prompts", type=int, default=300)
    soaking.add_argument("--seed", type=int, default=0)
    soaking.add_argument("--plot", type=Path, default=None, metavar="FILE", help="plot the memory curve")
    matrix = commands.add_parser("versions", help="run the tests with the oldest and newest supported packages; hours")
    matrix.add_argument(
        "environments",
        nargs="*",
        metavar="ENVIRONMENT",
        help="environments, default all: oldest-core, oldest, newest-10 ..",
    )
    commands.add_parser("licences", help="list the licences of all dependencies; exits with 1 if one is unknown")
    hashing = commands.add_parser("hashes", help="hash merges and gates; exits with 1 if --check finds a change")
    hashing.add_argument("--write", type=Path, default=None, metavar="FILE")
    hashing.add_argument("--check", type=Path, default=None, metavar="FILE")
    chosen = parser.parse_args()
    if chosen.command == "child":
        fuzz.child(chosen.seed, chosen.start, chosen.stop, chosen.seconds)
        return
    if chosen.command == "kills":
        from . import kills

        result = kills.kills(chosen.times, chosen.seed)
        print(result.text(), flush=True)
        trained = kills.training(max(1, chosen.times // 5), chosen.seed)
        print(trained)
        sys.exit(bool(result.defects) or ", 0 trainings" not in trained)
    if chosen.command == "faults":
        from . import faults

        lines = faults.faults()
        print("\n".join(lines))
        sys.exit(not all(line.endswith((": ok", "ended by SIGBUS")) for line in lines))
    if chosen.command == "soak":
        from . import soak

        result = soak.soak(chosen.prompts, chosen.seed)
        print(result.text())
        if chosen.plot is not None:
            soak.draw(result, chosen.plot)
        sys.exit(bool(result.defects))
    if chosen.command == "licences":
        from . import licences

        installed, missing = licences.licences()
        print(licences.text(installed, missing))
        sys.exit(bool(missing) or not all(licence.is_free for licence in installed))
    if chosen.command == "hashes":
        from . import hashes

        now = hashes.hashes()
        if chosen.write is not None:
            chosen.write.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        changed = [] if chosen.check is None else hashes.differences(json.loads(chosen.check.read_text()), now)
        print("\n".join([f"{len(now)} cases, {len(changed)} changed", *changed]))
        sys.exit(bool(changed))
    if chosen.command == "versions":
        from . import versions

        lines = []
        for line in versions.versions(chosen.environments):
            print(line, flush=True)
            lines.append(line)
        sys.exit(not all(line.endswith(" 0 |") for line in lines[2:]))
    only = None if chosen.case is None else 1
    tally = fuzz.fuzz(chosen.minutes, chosen.seed, first=chosen.case or 0, count_only=only)
    print(tally.text())
    sys.exit(bool(tally.defects))


if __name__ == "__main__":
    main()
