"""Numbers as people read them: "6.3 s", "12 ms", "1,234", "3.4 MB"."""

from typing import Final

__all__ = ["amount", "duration", "nbytes"]

_BYTES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them, with two or three digits: "340 µs", "6.3 s", "2 h 5 min"."""
    if seconds < 999.5e-6:
        return _digits(seconds * 1e6, "µs")
    if seconds < 0.9995:
        return _digits(seconds * 1e3, "ms")
    if seconds < 119.5:
        return _digits(seconds, "s")
    minutes = round(seconds / 60)
    if minutes < 120:
        whole, rest = divmod(round(seconds), 60)
        return f"{whole} min {rest} s" if whole < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes and hours < 100 else f"{hours:,} h"


def amount(value: float) -> str:
    """A count, or a rate: "1,234", "12.3 M"; below 10 with one decimal where it has some."""
    if abs(value) >= 9.995e6:
        return f"{value / 1e6:,.1f} M"
    if value == round(value) or abs(value) >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 0.095 else f"{value:.2g}"


def nbytes(value: float) -> str:
    """A size: "512 B", "3.4 MB"."""
    for factor, unit in _BYTES:
        if value >= 0.9995 * factor:
            return _digits(value / factor, unit)
    return f"{value:.0f} B"


def _digits(value: float, unit: str) -> str:
    if not value:
        return f"0 {unit}"
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
