"""What a page of a size can hold, told before anything is computed."""

from .planes import CANVAS, plane_columns

MAX_BYTES = 128_000_000
# Bytes of the page for a pixel, as measured on photographs (docs/labelling.md), a little on the safe side: of each
# direction, and of the photograph.
DIRECTION, PHOTOGRAPH = 0.36, 0.4


def estimated(height, width, count):
    """Bytes that a picture of height x width with `count` directions adds to a page, as a rule."""
    return height * width * (count * DIRECTION + PHOTOGRAPH)


class Budget:
    """Adds up what pictures take, and says what would fit where they don't."""

    def __init__(self, max_bytes, count, pictures):
        """`count`: of directions; `pictures`: how many there are."""
        self.max_bytes, self.count, self.pictures, self.taken, self.fitting = max_bytes, count, pictures, 0, 0

    def add(self, name, height, width):
        """Take one picture more.

        Raises:
            ValueError: it is too large for a browser's canvas, or the page would be larger than `max_bytes`.
        """
        if plane_columns(self.count, height, width) is None:
            side = min(height, width)
            while plane_columns(self.count, *_smaller(height, width, side)) is None:
                side = side * 15 // 16
            raise ValueError(
                f"pictures: {name} has {height}x{width} pixels, whose {self.count} planes fit on no canvas of "
                f"{CANVAS}x{CANVAS}; size={side} would do"
            )
        self.taken += estimated(height, width, self.count)
        if self.taken > self.max_bytes:
            raise ValueError(self._too_much(self.taken * self.pictures / (self.fitting + 1), "some ", height, width))
        self.fitting += 1

    def check(self, taken, done, height, width):
        """Hold the page to `max_bytes` when `done` pictures have taken so many bytes, in truth."""
        if taken > self.max_bytes:
            whole = taken * self.pictures / done
            raise ValueError(self._too_much(whole, "" if done == self.pictures else "some ", height, width))

    def _too_much(self, whole, some, height, width):
        """The sentence for pictures that take `whole` bytes together, the last of height x width."""
        share = self.max_bytes / whole
        side = int(min(height, width) * share**0.5 * 0.97)
        fewer, count = int(self.count * share * 0.97), int(self.pictures * share)
        ways = [f"size={side}"] if side >= 1 else []
        ways += [f"directions={fewer}"] if fewer >= 16 else []
        ways += [f"{count} of the {self.pictures} pictures"] if 1 <= count < self.pictures else []
        return (
            f"pictures: {self.pictures} of {height}x{width} pixels with {self.count} directions make a page of {some}"
            f"{whole / 1e6:.3g} MB, and max_bytes is {self.max_bytes / 1e6:.3g} MB; {' or '.join(ways)} would do, or a "
            f"max_bytes of {int(whole * 1.05)}"
        )


def _smaller(height, width, side):
    short = min(height, width)
    return height * side // short, width * side // short
