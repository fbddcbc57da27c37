"""Numbers for a person."""

from __future__ import annotations


def megabytes(nbytes: float) -> str:
    """A number of bytes."""
    return f"{nbytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """A time, as 12 s, 3:07 or 2 d 4:05:06."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days} d {text}" if days else text


def short(number: float) -> str:
    """A number in at most five characters: 3.2, 120, 4.5k, 1.2M."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G"), (1e15, 1e12, "T")):
        if abs(number) < limit:
            scaled = number / divisor
            return f"{scaled:.1f}{unit}" if abs(scaled) < 100 and scaled != int(scaled) else f"{scaled:.0f}{unit}"
    return f"{number:.0e}"
