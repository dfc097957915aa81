"""Write the counted rows of README's table of costs anew, from the ledger: `python docs/costs.py`."""

import csv
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, LEDGER = ROOT / "README.md", ROOT / "benchmarks" / "results" / "ledger.csv"


def sums(dtype, target="sm_90"):
    """Expected milliseconds of a whole forward by the ledger, by shape."""
    with open(LEDGER, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "sum"]
    return {row["shape"]: float(row["expected_ms"]) for row in rows if (row["dtype"], row["target"]) == (dtype, target)}


def rounded(milliseconds):
    """With two decimals, from ten milliseconds on with one."""
    places = Decimal("0.01") if milliseconds < 10 else Decimal("0.1")
    return f"{Decimal(str(milliseconds)).quantize(places, ROUND_HALF_UP)} ms"


def page(text):
    """`text` of README with its counted rows made anew."""
    head = re.search(r"^\| \| ([\d/ |]+) \|$", text, re.M)
    shapes = head[1].replace(" ", "").split("|")

    def row(match):
        counted = sums(match[2])
        return f"{match[1]}{' | '.join(rounded(counted[shape]) for shape in shapes)} |"

    return re.sub(r"^(\| one H100, (\w+): counted, never run \| ).*$", row, text, flags=re.M)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
