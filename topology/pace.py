"""Pace: how fast something long goes, and when it will be through, as lines for people who look at a file."""

from __future__ import annotations

LINE_S = 5.0
"""Between two lines about one thing. What is through before has none."""


class Pace:
    """Of one thing after the other. Time is an argument: seconds of a clock that never goes back."""

    def __init__(self) -> None:
        self._what = ""
        self._begun = 0
        self._begun_s = self._told_s = 0.0

    def line(self, what: str, unit: str, done: int, total: int, now_s: float) -> str | None:
        """What to say now, if anything. ``total`` 0: not known."""
        if what != self._what:
            self._what, self._begun, self._begun_s, self._told_s = what, done, now_s, now_s
        if now_s - self._told_s < LINE_S:
            return None
        self._told_s = now_s
        rate = (done - self._begun) / (now_s - self._begun_s)
        if not total or rate <= 0:
            return f"{what}: {done:,} {unit}, {rate:,.0f}/s"
        left_s = max(total - done, 0) / rate
        return f"{what}: {done:,} of {total:,} {unit}, {100 * done / total:.0f}%, {rate:,.0f}/s, {left_s:,.0f} s left"
