"""The project's compiled kernels with one thing taken out of their PTX: each has to give a fault or a right result.

    python -m ptx.planted sm_80 [--most N]      # JSON lines, with at most N of each thing, spread over the program

The things: a guard of an access to global memory (the mask of a load or store), the mask of the softmax, a barrier, a
wait for asynchronous copies, a fence between the two ways to shared memory (sm_90).
"""

import argparse
import json
import re
import sys

import torch

from .project import TARGETS, cases, measure

# What, its pattern and what stands in its place.
PIECES = {
    "guard": (r"@!?%p\d+ (?=(?:ld|st)\.global)", ""),
    "mask": (r"selp\.f32\s+(%\w+), (%\w+), 0fFF800000, %p\d+;", r"mov.b32 \1, \2;"),
    "barrier": (r"\tbar\.sync \t0;", ""),
    "wait": (r"\tcp\.async\.wait_group \t\d+;", ""),
    "fence": (r"\tfence\.proxy\.async\.shared::cta;", ""),
}


def broken(case, target, things, most):
    """Yield a row per piece that is taken out: as `measure` gives it, with `what` and `which`."""
    texts = []
    right = measure(case, target, edit=lambda text: texts.append(text) or text)
    if right["faults"] or right["failed"] or not right["error"] <= right["limit"]:
        raise RuntimeError(f"{case.name}: wrong before anything is taken out: {right}")
    for what in things:
        pattern, put = PIECES[what]
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in re.finditer(pattern, text)]
        some = {len(pieces) * n // most for n in range(most)} if most < len(pieces) else range(len(pieces))
        for which in sorted(some):
            number, piece = pieces[which]
            launches = iter(range(len(texts)))

            def edit(text, number=number, piece=piece, put=put, launches=launches):
                if next(launches) != number:
                    return text
                return text[: piece.start()] + piece.expand(put) + text[piece.end() :]

            yield dict(measure(case, target, edit=edit), what=what, which=which)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--most", type=int, default=10**9)
    parser.add_argument("--kernel", default="attention window", help="the first of its cases in bfloat16 is taken")
    parser.add_argument("--what", nargs="+", default=list(PIECES), choices=list(PIECES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = next(c for c in cases() if c.kernel == options.kernel and c.dtype == "bfloat16" and c.fits(options.target))
    for row in broken(case, options.target, options.what, options.most):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
