"""What was measured of the layers, and how sure a cut is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table

from voidprune.planning import intervals
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.intervals import Cut
from voidprune.profiling.profile import LayerStatistics, Profile
from voidprune.schedule import Phase
from voidprune.tables.figures import draw_bar
from voidprune.tables.heat_maps import profile_map

_COLUMNS = (
    ("block-influence", "layer"),
    ("relative-norm", "change"),
    ("attention-cosine", "attn"),
    ("mlp-cosine", "mlp"),
)


def profile_table(profile: Profile) -> Group:
    """A heat map, then a table a phase, layer by layer, and one of the spans; each figure with its interval where there is one."""
    replicates = {phase: intervals.resample_statistics(profile, [phase]) for phase in Phase}
    return Group(
        profile_map(profile),
        *(_layers_table(profile, phase, replicates[phase]) for phase in Phase),
        _spans_table(profile, replicates),
    )


def _layers_table(profile: Profile, phase: Phase, replicates: Sequence[LayerStatistics] | None) -> Table:
    statistics = profile.statistics(phase)
    spread = (
        "±: half the 95 % interval over samples" if replicates else "no intervals: fewer than two blocks of samples"
    )
    table = Table(
        title=f"{profile.model.name}, {phase}: {statistics.num_tokens:,} tokens, "
        f"{profile.calibration.num_samples} samples",
        caption=f"active: share of tokens under LAC, alpha {profile.lac.alpha:g}; change: of the state, relative; "
        f"layer, attn, mlp: 1 - cosine of the states before and after; {spread}",
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("active", no_wrap=True)
    columns: list[list[str]] = []
    for name, label in (("lac", ""), *_COLUMNS):
        criterion = CRITERIA[name]
        assert criterion.score is not None
        shares = name == "lac"
        scores = criterion.score(statistics, 0)
        ranges = intervals.score_intervals(criterion, replicates) if replicates else [None] * len(scores)
        cells = [_figure(score, found, is_share=shares) for score, found in zip(scores, ranges, strict=True)]
        if shares:
            cells = [f"{draw_bar(score)} {cell}" for score, cell in zip(scores, cells, strict=True)]
        else:
            table.add_column(label, justify="right", no_wrap=True)
        columns.append(cells)
    for layer, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *row)
    return table


def _figure(value: float, interval: tuple[float, float] | None, *, is_share: bool) -> str:
    """A value, and half the width of its interval in the same unit; about three digits, at most ten characters but for shares."""
    half = None if interval is None else (interval[1] - interval[0]) / 2
    if is_share:
        return f"{value:6.1%}" if half is None else f"{value:6.1%}±{half * 100:4.1f}"
    largest = max(value, half or 0.0)
    digits = 3 if largest < 1 else 2 if largest < 10 else 1 if largest < 100 else 0
    shown = f"{value:.{digits}f}"
    return shown if half is None else f"{shown}±{f'{half:.{digits}f}'.removeprefix('0' if digits == 3 else '')}"


def _spans_table(profile: Profile, replicates: Mapping[Phase, Sequence[LayerStatistics] | None]) -> Table:
    table = Table(
        title="contiguous layers over which the last token turns least",
        caption="turn: angle in half turns. again: share of resamples that choose the same layers",
    )
    table.add_column("layers", justify="right", no_wrap=True)
    for phase in Phase:
        table.add_column(str(phase), justify="right", no_wrap=True)
        table.add_column("turn", justify="right", no_wrap=True)
        table.add_column("again", justify="right", no_wrap=True)
    num_layers = profile.model.num_layers
    measured = {phase: profile.statistics(phase) for phase in Phase}
    for length in range(1, num_layers // 2 + 1):
        cells: list[str] = []
        for phase, statistics in measured.items():
            kept = CRITERIA["angular"].choose(statistics, num_layers - length)
            first = next(layer for layer in range(num_layers) if layer not in kept)
            some = (replicates[phase] or ())[:200] or None  # a share in whole percent needs no more
            cut = intervals.find_cut(CRITERIA["angular"], statistics, some, kept)
            again = "" if cut is None or cut.confidence is None else f"{cut.confidence:.0%}"
            cells += [f"{first}-{first + length - 1}", f"{statistics.angular_distances(length)[first]:.3f}", again]
        table.add_row(str(length), *cells)
    return table


def cuts_table(cuts: Mapping[Phase, Cut]) -> Table:
    """Where the kept layers of each phase end, and whether other samples would have ended them there."""
    table = Table(
        title="where the kept layers end", caption="order: whether resampled profiles rank or choose the same way"
    )
    for name in ("", "layer", "score", "95 % interval", "order"):
        table.add_column(name, justify="right" if name in ("layer", "score") else "left", no_wrap=True)
    for phase, cut in cuts.items():
        order = cut.verdict if cut.confidence is None else f"{cut.confidence:.0%}: {cut.verdict}"
        if cut.scores is None:
            table.add_row(f"{phase} as a whole", "", "", "", order)
            continue
        sides = zip((cut.last_kept, cut.first_dropped), cut.scores, cut.intervals or (None, None), strict=True)
        for verb, (layer, score, interval) in zip(("keeps", "drops"), sides, strict=True):
            shown = "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
            table.add_row(f"{phase} {verb}", str(layer), f"{score:.3g}", shown, order if verb == "drops" else "")
    return table
