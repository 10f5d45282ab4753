"""Results as pictures: SVG and PNG, with nothing in them that changes from run to run. What is shown is measured elsewhere."""

from voidprune.plots.benchmarks import plot_benchmark
from voidprune.plots.drawing import Drawing, paint_inline, paint_png, paint_svg, stylesheet
from voidprune.plots.trade_offs import plot_comparison

__all__ = ["Drawing", "paint_inline", "paint_png", "paint_svg", "plot_benchmark", "plot_comparison", "stylesheet"]
