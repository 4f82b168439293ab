"""The audit's histograms as one SVG drawing that takes its colours from the page around it."""

import io
from typing import Any

from llmkit.data.preview.tables import HISTOGRAMS

# Stand for what the page decides; nothing else in the drawing has these colours.
INK, BAR = "#012301", "#012302"
FROM_PAGE = {INK: "currentColor", BAR: "var(--bar)"}


def histograms_svg(audit: dict[str, Any]) -> str:
    """An `<svg>` element: a row for each split, tokens per row beside learnt tokens per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    splits = audit["splits"]
    # Texts stay texts, in the reader's font; the same audit always gives the same drawing.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "llmkit", "font.family": "sans-serif"}
    settings |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "grid.color": INK}
    with plt.rc_context(settings):
        figure, panels = plt.subplots(
            len(splits), len(HISTOGRAMS), figsize=(10, 2.6 * len(splits)), squeeze=False, layout="constrained"
        )
        for (name, split), row in zip(splits.items(), panels, strict=True):
            for (key, words), panel in zip(HISTOGRAMS, row, strict=True):
                panel.stairs(split[key]["counts"], split[key]["edges"], fill=True, color=BAR)
                panel.set(title=f"{words}, {name}", ylabel="rows", ylim=(0, None))
                panel.patch.set_alpha(0)
                panel.grid(axis="y", alpha=0.2)
                panel.spines[["top", "right"]].set_visible(False)
        drawn = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=metadata)
        plt.close(figure)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]  # the prologue names a file on the network
    for stand_in, color in FROM_PAGE.items():
        svg = svg.replace(stand_in, color)
    return svg
