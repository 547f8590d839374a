"""Pictures of projections, by Matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from xccl.cli.options import check_writable
from xccl.errors import UsageError

_SUFFIXES: Final = (".png", ".svg")


def require_plot(path: str) -> None:
    """Check, before anything is computed, that a picture can be drawn and written there.

    Raises:
        UsageError: it cannot; says what to do.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise UsageError(f"--plot {path}: must end in {' or '.join(_SUFFIXES)}", value=path)
    check_writable(path)
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs Matplotlib: pip install 'xccl[plot]'", value=path) from None


def draw(path: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Stacked stages of each projection, with its interval, into a file; UsageError if it cannot be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    places = list(range(len(rows)))  # not the labels, which need not be different
    figure = Figure(figsize=(1.6 + 1.1 * max(len(rows), 3), 4.8), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for row in rows for name in row["projected"]["stages"]))
    bottom = [0.0] * len(rows)
    for name in names:
        heights = [row["projected"]["stages"].get(name, 0.0) for row in rows]
        if max(heights) > 0.005 * max(row["projected"]["time_us"] for row in rows):  # what cannot be seen has no legend
            axes.bar(places, heights, bottom=bottom, label=name, width=0.7)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    times = [row["projected"]["time_us"] for row in rows]
    below = [row["projected"]["time_us"] - row["projected"]["low_us"] for row in rows]
    above = [row["projected"]["high_us"] - row["projected"]["time_us"] for row in rows]
    axes.errorbar(places, times, [below, above], fmt="none", ecolor="black", capsize=3, label="interval")
    axes.set_xticks(places, [_label(row) for row in rows])
    axes.set_ylabel("projected time, us")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    is_svg = Path(path).suffix == ".svg"
    try:
        with mpl.rc_context({"svg.hashsalt": "xccl", "svg.fonttype": "none"}):  # the same picture is the same file
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", value=path) from error


def _label(row: dict[str, Any]) -> str:
    if "lanes" in row:
        return f"{row['bytes']} B\n{row['lanes']} lanes"
    if "bytes" in row:
        return f"{row['bytes']} B"
    tokens = f"\n{row['tokens']} tokens" if "tokens" in row else ""
    return f"{row['attention']} + {row['experts']}{tokens}" if "attention" in row else f"EP{row['ranks']}{tokens}"
