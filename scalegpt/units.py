"""Formats numbers for people: bytes with their unit, seconds, counts. GB is 10⁹, GiB is 2³⁰."""

SECONDS_OF_A_YEAR = 365.25 * 86400
DAYS_IN_YEARS = 1000
"""A time of at least this number of days is given in years."""

GIB, GB = 2**30, 10**9

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Dtype → the bytes of one number."""

_DECIMAL_UNITS = ("kB", "MB", "GB", "TB")
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """Write a size in decimal and in binary units: GB is 10⁹ bytes, GiB is 2³⁰.

    >>> format_bytes(610_765_824)
    '610.77 MB (582.47 MiB)'
    """
    return f"{_scaled(count, 1000, _DECIMAL_UNITS)} ({_scaled(count, 1024, _BINARY_UNITS)})"


def _scaled(count: int, base: int, units: tuple[str, ...]) -> str:
    if count < base:
        return f"{count} B"
    power = 1
    # The rounded number is compared: 999.999 MB would be printed as 1000.00 MB, so it becomes 1.00 GB.
    while power < len(units) and round(count / base**power, 2) >= base:
        power += 1
    return f"{count / base**power:.2f} {units[power - 1]}"


def gib(count: int) -> str:
    """A size in bytes as text in GiB, or in MiB if it is below 0.1 GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def human_time(seconds: float) -> str:
    """A time in seconds as text: ``3.2 years``, ``2 d 3 h``, ``1 h 05 min``, ``3 min 20 s`` or ``12 s``; ``?`` for NaN."""
    if seconds != seconds:  # NaN
        return "?"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days >= DAYS_IN_YEARS:
        return f"{seconds / SECONDS_OF_A_YEAR:,.1f} years"
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def human_count(number: float) -> str:
    """A number as short text: ``950``, ``12.3k`` or ``1.25M``; ``?`` for NaN."""
    if number != number:
        return "?"
    if number >= 1e6:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.1f}k" if number >= 1e4 else f"{number:.0f}"
