"""`anyup-fast check`: every operator on this machine against float64."""

import logging

from .options import add_device, as_device


def add(commands):
    """Add the command to the parser's."""
    text = "every operator on this machine against float64: what to run first on a new card"
    command = commands.add_parser("check", help=text)
    add_device(command)
    command.set_defaults(run=run)


def run(arguments):
    """Print a table; the exit code is 1 where something is off, the output then a report to paste, or nothing ran."""
    from ..examination import examine

    logging.getLogger("anyup_fast").setLevel(logging.WARNING)  # the twin takes the plain layers, which is logged
    found = examine(as_device(arguments.device))
    lines = [*found.machine, "", *found.table()]
    if found.faults:
        details = [
            f"{r.operator}, {r.shape}, {r.dtype}, {r.backend}: {r.verdict} {r.error} {r.reason}" for r in found.faults
        ]
        print("```", *lines, "", *details, "```", sep="\n")
        print(
            f"{len(found.faults)} of {len(found.rows)} comparisons are off: please report what stands between the marks"
        )
        return 1
    judged = sum(row.verdict == "ok" for row in found.rows)
    print(*lines, "", f"{judged} comparisons are right, {len(found.rows) - judged} were not run", sep="\n")
    return 0 if judged else 1
