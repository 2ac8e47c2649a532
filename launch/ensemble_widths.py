"""Ensembles of models of several widths: what members are worth with more parameters, and where that ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixwright.launch.ensemble_findings import Findings
from mixwright.launch.ensemble_pictures import draw_scaling
from mixwright.launch.ensemble_scaling import Scaling
from mixwright.launch.study_report import markdown

HEADER = ["parameters", "tuned single", "members, mean", "ensemble", "E (K to infinity)", "alpha"]


def write_widths(found: Sequence[Findings], folder: Path) -> tuple[Path, Path]:
    """`ensemble_widths.md` and `.png`, by the number of parameters; returns both."""
    complete = sorted((one for one in found if "rule" in one.ensembles), key=lambda one: one.num_parameters)
    scaling = Scaling.of([one.ensembles["rule"] for one in complete], fitted=False, standard={}, tokens=None)
    page, picture = folder / "ensemble_widths.md", folder / "ensemble_widths.png"
    draw_scaling(scaling, picture)
    parts = [
        "# Ensembles of models of several widths",
        "Written by `python launch/study.py ensemble --widths ...`: every width tuned for itself, members by the rule, "
        "mean of logits at temperature 1, test rows, nats per token. E is extrapolated.",
        f"![laws]({picture.name})",
        markdown(HEADER, [_row(one) for one in complete]),
    ]
    if scaling.over_parameters is not None:
        law = scaling.over_parameters
        doubt = ", too few to trust the exponent" if law.is_thin else ""
        parts.append(
            f"E over parameters N: {law.floor:.4f} + {law.scale:.4g} / N^{law.exponent:.2f} ({law.num_points} widths"
            f"{doubt}); for infinitely many, extrapolated: {law.floor:.4f}."
        )
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page, picture


def _row(found: Findings) -> list[str]:
    points, law = found.ensembles["rule"].curve(fitted=False), found.laws["rule"].law
    return [
        f"{found.num_parameters:,}",
        "" if found.tuned is None else f"{found.tuned.loss(fitted=False):.4f}",
        f"{points[0].loss:.4f}",
        f"{points[-1].loss:.4f} (K = {points[-1].k})",
        f"{law.floor:.4f}",
        f"{law.exponent:.2f}",
    ]
