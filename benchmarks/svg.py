"""A line and scatter chart as plain SVG: no dependency, the same bytes every time, transparent, readable on
light and dark pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 210, 40, 74
COLOURS = ("#3b82c4", "#d97b29", "#2f9e6e", "#b0529f", "#c4483e", "#8a7d2f", "#5e72d8", "#5a8f9c")
GREY = "#6e7781"  # readable on white and on black, where a page does not tell a picture its scheme
STYLE = (f"text{{fill:{GREY};font:12px system-ui,sans-serif}}.title{{font-weight:600}}.small{{font-size:11px}}"
         f".axis{{stroke:{GREY};stroke-width:1}}.grid{{stroke:{GREY};stroke-opacity:.25}}"
         "@media(prefers-color-scheme:light){text{fill:#57606a}}@media(prefers-color-scheme:dark){text{fill:#b5bcc4}}")


@dataclass(frozen=True)
class Series:
    """``points`` (x, y), joined by a line or not; "dashed" for ceilings. ``labels``: a text at each point."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True
    dashed: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    caption: str = ""
    log_x: bool = True
    log_y: bool = True
    x_ticks: tuple[tuple[float, str], ...] = field(default=())  # instead of computed ones
    from_zero: bool = False  # the y axis, where it is not logarithmic


def number(v: float) -> str:
    """12000 as 12k, 0.000003 as 3e-6."""
    if v == 0:
        return "0"
    if abs(v) < 1e-3:
        e = math.floor(math.log10(abs(v)) + 1e-9)
        return f"{v / 10**e:.3g}e{e}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= size:
            return f"{v / size:.3g}{unit}"
    return f"{v:.3g}"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values in [low, high]: powers of ten (with their halves and fifths, where few), or steps of 1, 2, 5."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        parts = (1,) if high / low > 1e4 else (1, 2, 5)
        found = [f * 10.0**e for e in decades for f in parts]
    else:
        raw = (high - low) / 5 or 1.0
        step = 10.0 ** math.floor(math.log10(raw))
        step *= next(f for f in (1, 2, 5, 10) if f * step >= raw * (1 - 1e-9))
        found = [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [t for t in found if low * (1 - 1e-9) - 1e-12 <= t <= high * (1 + 1e-9)]


def scale(values: list[float], log: bool, start: float, end: float, from_zero: bool = False):
    """(low, high, value -> coordinate): the values with some room, between two coordinates."""
    low, high = min(values), max(values)
    if log:
        room = max(math.log10(high / low), 0.3) * 0.06
        low, high = low / 10**room, high * 10**room
        return low, high, lambda v: start + (end - start) * math.log(v / low) / math.log(high / low)
    room = (high - low or abs(high) or 1.0) * 0.06
    low, high = 0.0 if from_zero else low - room, high + room
    return low, high, lambda v: start + (end - start) * (v - low) / (high - low)


def at(v: float) -> str:
    return f"{v:.1f}"


def draw(c: Chart) -> str:
    """The chart as the text of an SVG file. Raises ValueError where there is no point."""
    points = [p for s in c.series for p in s.points]
    if not points:
        raise ValueError(f"draw: chart {c.title!r} has no point")
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x_low, x_high, X = scale([p[0] for p in points], c.log_x, LEFT, right)
    y_low, y_high, Y = scale([p[1] for p in points], c.log_y, bottom, TOP, c.from_zero)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
           f'role="img" aria-label="{escape(c.title)}">', f"<style>{STYLE}</style>"]
    text = lambda x, y, s, anchor="middle", more="": out.append(
        f'<text x="{at(x)}" y="{at(y)}" text-anchor="{anchor}"{more}>{escape(s)}</text>')
    line = lambda x1, y1, x2, y2, kind: out.append(
        f'<path class="{kind}" d="M{at(x1)} {at(y1)}L{at(x2)} {at(y2)}"/>'
    )
    text(LEFT, 20, c.title, "start", ' class="title"')
    for v, name in c.x_ticks or [(v, number(v)) for v in ticks(x_low, x_high, c.log_x)]:
        line(X(v), TOP, X(v), bottom, "grid")
        text(X(v), bottom + 17, name)
    for v in ticks(y_low, y_high, c.log_y):
        line(LEFT, Y(v), right, Y(v), "grid")
        text(LEFT - 7, Y(v) + 4, number(v), "end")
    line(LEFT, bottom, right, bottom, "axis")
    line(LEFT, TOP, LEFT, bottom, "axis")
    text((LEFT + right) / 2, bottom + 36, c.x)
    text(16, (TOP + bottom) / 2, c.y, "middle", f' transform="rotate(-90 16 {at((TOP + bottom) / 2)})"')
    text(LEFT, HEIGHT - 12, c.caption, "start", ' class="small"')
    for i, s in enumerate(c.series):
        colour = GREY if s.dashed else COLOURS[i % len(COLOURS)]
        if s.joined:
            path = "M" + "L".join(f"{at(X(x))} {at(Y(y))}" for x, y in s.points)
            dash = ' stroke-dasharray="5 4"' * s.dashed
            out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if not s.dashed:
            out += [f'<circle cx="{at(X(x))}" cy="{at(Y(y))}" r="3" fill="{colour}"/>' for x, y in s.points]
        for (x, y), label in zip(s.points, s.labels):
            text(X(x) + 6, Y(y) - 5, label, "start", ' class="small"')
        key = TOP + 8 + 17 * i
        dash = ' stroke-dasharray="5 4"' * s.dashed
        out.append(f'<path d="M{right + 14} {key}h16" stroke="{colour}" stroke-width="2.5"{dash}/>')
        text(right + 36, key + 4, s.name, "start")
    return "\n".join([*out, "</svg>"]) + "\n"
