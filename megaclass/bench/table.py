"""Figures of a benchmark as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megaclass.bench.measure import OURS


def show(reports: Sequence[dict[str, Any]], missing: dict[str, str]) -> None:
    """Print what was measured, each beside its floor, and who was left out for what reason."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(box=None, pad_edge=False)
    columns = [
        "classes",
        "rate",
        "rows",
        "implementation",
        "cpu ms",
        "20-80 %",
        "wall ms",
        "floor ms",
        "x",
        "peak",
        "extra",
        "floor",
    ]
    for name in columns:
        table.add_column(name, justify="left" if name == "implementation" else "right")
    first: dict[str, float] = {}
    for report in reports:
        case = report["case"]
        key = str([case.get(name) for name in ("num_classes", "num_rows", "sampling_rate")])
        ours = first.setdefault(key, report["cpu_ms"])
        spread = report["cpu_ms_spread"]
        low, *_, high = spread.values()
        table.add_row(
            f"{case.get('num_classes', case.get('num_rows', 0)):,}",
            f"{case['sampling_rate']:.4g}" if "sampling_rate" in case else "",
            case.get("row_dtype", ""),
            report["impl"] + (f" ({case['preset']}, {case['row_update']})" if report["impl"] == OURS else ""),
            f"{report['cpu_ms']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{report['wall_ms']['p50']:.2f}" if "wall_ms" in report else "",
            f"{report['floor_ms']:.2f}" if "floor_ms" in report else "",
            f"{report['cpu_ms'] / ours:.2f}",
            *(_mebibytes(report.get(name)) for name in ("peak_bytes", "extra_bytes", "floor_bytes")),
        )
    console.print(table)
    for name, reason in missing.items():
        console.print(f"left out: {name} ({reason})", highlight=False)


def show_step(report: dict[str, Any]) -> None:
    """Print a whole training step by part."""
    wall, case = report["wall_ms"], report["case"]
    lines = [
        f"{case['preset']} over {case['num_classes']:,} classes, {case['backbone']}, "
        f"{case['global_batch_size']} samples on {case['world_size']} ranks",
        f"step               {wall['p50']:9.1f} ms  ({wall['p20']:.1f}-{wall['p80']:.1f}), "
        f"{report['samples_per_second']:,.0f} samples/s",
        f"wait for data      {report['data_wait_ms']:9.1f} ms",
        f"processor time     {report['cpu_ms']:9.1f} ms",
        f"class layer of it  {report['head_cpu_ms']:9.1f} ms",
    ]
    if "planned_ms" in report:
        lines.append(f"floor of the plan  {report['planned_ms']:9.1f} ms")
    print("\n".join([*lines, f"memory             {_mebibytes(report['peak_bytes']):>13}"]))


def show_data(reports: Sequence[dict[str, Any]], missing: dict[str, str], verdict: dict[str, Any]) -> None:
    """Print what each way to the images gave, who was left out for what reason, and what holds the run back."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(box=None, pad_edge=False)
    for name in ("source", "images/s", "20-80 %", "of decoding", "20-80 %", "cpu us/image", "cores", "memory"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for report in reports:
        speed, share = report["images_per_second"], report.get("share_of_decoding")
        table.add_row(
            report["impl"],
            f"{speed['p50']:,.0f}",
            f"{speed['p20']:,.0f}-{speed['p80']:,.0f}",
            *(("", "") if share is None else (f"{share['p50']:.2f}", f"{share['p20']:.2f}-{share['p80']:.2f}")),
            f"{report['cpu_us_per_image']:.1f}",
            f"{report['cores']:.2f}",
            _mebibytes(report["resident_bytes"]),
        )
    console.print(table)
    for name, reason in missing.items():
        console.print(f"left out: {name} ({reason})", highlight=False)
    if "growth_bytes_per_1000_images" in verdict:
        print(
            f"memory of the run's reader grows by {verdict['growth_bytes_per_1000_images']:,.0f} bytes in 1,000 images"
        )
    print(verdict["bottleneck"])


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:,.0f} MiB"
