"""Draw the figures of the concept pages, from the packages' own functions on made-up numbers.

python -m tools.figures            # writes docs/figures/*.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
STYLE = {
    "svg.hashsalt": "concord",  # the same picture gives the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.figsize": (6.4, 2.6),
    "savefig.bbox": "tight",
}


def centring(figure) -> None:
    """One channel of two token types on a 4-bit grid, as it is and with each type's mean subtracted."""
    draw = torch.Generator().manual_seed(0)
    text = 0.4 * torch.randn(4000, generator=draw)
    sink = 6 + 0.2 * torch.randn(200, generator=draw)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, parts, title in (
        (left, [text, sink], "as it is"),
        (right, [text - text.mean(), sink - sink.mean()], "each type about its own mean"),
    ):
        low, high = float(torch.cat(parts).min()), float(torch.cat(parts).max())
        for line in torch.linspace(low, high, 16):
            axes.axvline(float(line), color="0.85", linewidth=0.8)
        bins = torch.linspace(low, high, 60).tolist()
        axes.hist(parts[0].tolist(), bins, color="#3366aa", alpha=0.8, label="text")
        axes.hist(parts[1].tolist(), bins, color="#cc5533", alpha=0.8, label="sink")
        axes.set(title=title, yscale="log", xlabel="activation, with the grid of 16 levels")
    left.set_ylabel("tokens")
    left.legend(frameon=False)


def consistency(figure) -> None:
    """The loss of two to ten languages as their states leave a common direction."""
    from trl_mlc.losses import consistency_loss

    axes = figure.subplots()
    share = torch.linspace(0, 1, 60, dtype=torch.float64)
    for k, colour in ((2, "#3366aa"), (4, "#559944"), (10, "#cc5533")):
        own = torch.eye(k, k + 1, dtype=torch.float64)
        common = torch.zeros(k, k + 1, dtype=torch.float64)
        common[:, k] = 1
        groups = torch.stack([(1 - s).sqrt() * common + s.sqrt() * own for s in share])
        axes.plot(share, consistency_loss(groups).per_group, color=colour, label=f"{k} languages")
    axes.set(xlabel="energy outside the common direction", ylabel="loss")
    axes.legend(frameon=False)


def transport(figure) -> None:
    """A donor that is the target with its channels permuted: what each arithmetic makes of the target as alpha grows."""
    from mergekit_ot.transport import interpolate

    draw = torch.Generator().manual_seed(0)
    n = 48
    target = torch.randn(n, n, generator=draw, dtype=torch.float64)
    order = torch.randperm(n, generator=draw)
    donor = target[order][:, order]
    coupling = torch.zeros(n, n, dtype=torch.float64)
    coupling[order, torch.arange(n)] = 1 / n
    ways = {
        "no plan (the donor's own order)": donor,
        "bare couplings, as released": coupling @ donor @ coupling.T,
        "barycentric maps": (n * coupling) @ donor @ (n * coupling.T),
    }
    axes = figure.subplots()
    alphas = torch.linspace(0, 1, 21)
    for (name, transported), colour in zip(ways.items(), ("#888888", "#cc5533", "#3366aa")):
        error = [float((interpolate(target, transported, float(a)) - target).norm() / target.norm()) for a in alphas]
        axes.plot(alphas, error, color=colour, label=name)
    axes.set(xlabel="alpha", ylabel="relative change of the target")
    axes.legend(frameon=False)


def overview(figure) -> None:
    """Which library each package plugs into, by what, and how checkpoints go from one to the next."""
    from matplotlib.patches import FancyBboxPatch

    axes = figure.subplots()
    figure.set_size_inches(8.4, 2.3)
    axes.set(xlim=(0, 12.6), ylim=(0, 3.3))
    axes.axis("off")
    boxes = (
        ("mergekit", "mergekit_ot", "merge_method: transport", "a donor of any size and\nfamily, by transport plans", "#559944"),
        ("TRL", "trl_mlc", "MLCDPOTrainer(...)", "a preference taught in one\nlanguage, carried to others", "#cc5533"),
        ("transformers", "optimum_freeact", "FreeActConfig(...)", "4-bit weights, activations\nand cache, in closed form", "#3366aa"),
    )  # fmt: skip
    for number, (host, package, line, does, colour) in enumerate(boxes):
        left = 0.1 + 4.2 * number
        axes.add_patch(
            FancyBboxPatch((left, 0.15), 3.6, 2.35, "round,pad=0,rounding_size=0.15", fc="white", ec=colour, lw=1.6)
        )
        axes.text(left + 1.8, 2.95, host, ha="center", va="center", color="0.35", fontsize=9)
        axes.plot([left + 1.8] * 2, [2.5, 2.72], color=colour, lw=1.6)
        axes.text(left + 1.8, 2.12, package, ha="center", va="center", color=colour, fontsize=11, weight="bold")
        axes.text(left + 1.8, 1.55, line, ha="center", va="center", family="monospace", fontsize=8)
        axes.text(left + 1.8, 0.75, does, ha="center", va="center", color="0.2", fontsize=8.5)
        if number < 2:
            axes.annotate(
                "", (left + 4.15, 1.35), (left + 3.65, 1.35), arrowprops={"arrowstyle": "->", "color": "0.4"}
            )


FIGURES = {"overview": overview, "centring": centring, "consistency": consistency, "transport": transport}


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Draw all figures, or the named ones."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {sorted(FIGURES)}; all if left out")
    names = parser.parse_args(arguments).names or list(FIGURES)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in names:
            figure = Figure()
            FIGURES[name](figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            print(folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
