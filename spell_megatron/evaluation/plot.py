"""The plot of an evaluation: pass@k over k, as an SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from spell_megatron.evaluation.results import COLUMNS

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")


def plot(results: Mapping[str, Any]) -> str:
    """pass@k over k with intervals, as an SVG: the average, the columns, and benchmarks that belong to none."""
    in_columns = {name for column in results["columns"] for name in COLUMNS[column]}
    curves = {name: about["score"] for name, about in results["benchmarks"].items() if name not in in_columns}
    curves = {column: about["score"] for column, about in results["columns"].items()} | curves
    if results["average"]:
        curves = {"Avg": results["average"]["score"]} | curves
    ks = sorted({int(k.removeprefix("pass@")) for curve in curves.values() for k in curve})
    width, height, left, top, right, bottom = 640, 400, 50, 20, 150, 45
    step = (width - left - right) / max(1, len(ks) - 1)

    def x(k: int) -> float:
        return left + step * ks.index(k)

    def y(share: float) -> float:
        return top + (height - top - bottom) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<path d="M{left} {at:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{percent}%</text>')
    parts += [f'<text x="{x(k):.1f}" y="{height - bottom + 18}" text-anchor="middle">{k}</text>' for k in ks]
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">k of pass@k</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(int(k.removeprefix("pass@")), estimate) for k, estimate in curve.items()]
        offset = 2 * (number - len(curves) / 2)  # so that bars do not hide each other
        line = " ".join(f"{x(k) + offset:.1f},{y(e['mean']):.1f}" for k, e in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for k, e in points:
            at = x(k) + offset
            parts.append(f'<path d="M{at:.1f} {y(e["low"]):.1f}V{y(e["high"]):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(e["mean"]):.1f}" r="3" fill="{colour}"/>')
        label = top + 14 + 18 * number
        parts.append(f'<rect x="{width - right + 16}" y="{label - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{width - right + 32}" y="{label}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
