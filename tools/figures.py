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


FIGURES = {"centring": centring, "consistency": consistency, "transport": transport}


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
