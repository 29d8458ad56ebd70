"""Tokens/s over base by tenants, from a reading: ``python docs/gpu/plot.py``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
SERIES = (  # label, its column, colour
    ("PEDRO", 4, "#1f77b4"),
    ("vLLM's LoRA, max_loras 32", 6, "#d62728"),
    ("vLLM's LoRA, max_loras 256", 8, "#ff9896"),
)


def main() -> None:
    reading = json.loads((FOLDER / "first_reading.json").read_text())
    rows = [row for row in reading["decode"] if row[0] == 256]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--")
    for label, column, colour in SERIES:
        points = [(row[1], row[column]) for row in rows if row[column] is not None]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        for tenants, ratio in points:
            axes.annotate(
                f"{ratio:.2f}", (tenants, ratio), textcoords="offset points", xytext=(0, 6),
                ha="center", fontsize=8, color=colour,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 8, 32, 64, 128, 256], ["1", "8", "32", "64", "128", "256"])
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("tenants among 256 sequences")
    axes.set_ylabel("tokens/s over base")
    axes.set_title(f"Decode, 8B shape, {reading['card']}", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.62))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "decode_by_tenants.png", dpi=150)


if __name__ == "__main__":
    main()
