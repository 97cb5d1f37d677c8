"""`megaclass bench head` and `scaling`: implementations side by side, with the floor beside every figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaclass import provenance
from megaclass.bench import measure, ranks
from megaclass.bench.case import Case
from megaclass.bench.others import PEER, check_peer, left_out

Report = dict[str, Any]


def compare(
    case: Case, baselines: Sequence[str] = (), peer: Path | None = None, repeats: int = 20, memory: bool = True
) -> tuple[list[Report], dict[str, str]]:
    """Figures of our head and of others on one case, as in the JSON of `megaclass bench`; and who was left out, why.

    Raises:
        ConfigError: the case or the peer's folder cannot be used.
        PeerError: a rank failed.
    """
    missing = left_out(case, list(baselines))
    names = [measure.OURS, *(name for name in baselines if name not in missing)]
    if peer is None:
        missing[PEER] = "no --peer; give the folder recognition/arcface_torch of a checkout of deepinsight/insightface"
    else:
        check_peer(peer)
        names.append(PEER)
    answers = ranks.run(_measured, case.world_size, case, names, peer, repeats)
    flops = min(answer["rates"][0] for answer in answers)
    copied = min(answer["rates"][1] for answer in answers)
    reports = []
    for name in names:
        weights = ranks.run(measure.weighed, case.world_size, case, name, peer) if memory else None
        reports.append(_report(case, name, [answer["times"][name] for answer in answers], weights, flops, copied))
    return reports, missing


def _measured(world: Any, case: Case, names: list[str], peer: Path | None, repeats: int) -> dict[str, Any]:
    return {
        "rates": measure.calibrated(world, case.dim, case.batch_size * case.world_size, case.row_dtype == "bfloat16"),
        "times": measure.timed(world, case, names, peer, repeats),
    }


def _report(
    case: Case, name: str, times: list[measure.Times], memory: list[measure.Memory] | None, flops: float, copied: float
) -> Report:
    """One entry of `cases`: the slowest rank's times, all ranks' bytes."""
    slowest = max(times, key=lambda rank: statistics.median(rank.cpu))
    if name != measure.OURS:
        # The others know one type of rows and one optimizer.
        case = replace(case, row_dtype="float32", row_update="deferred", row_memory="device", optimizer="sgd")
    report: Report = {
        "case": case.as_dict(),
        "impl": name,
        "repeats": len(slowest.wall),
        "wall_ms": measure.percentiles(max(times, key=lambda rank: statistics.median(rank.wall)).wall),
        "cpu_ms": 1000 * statistics.median(slowest.cpu),
        "cpu_ms_spread": measure.percentiles(slowest.cpu),
        "floor_ms": 1000 * floor_seconds(case, flops, copied),
    }
    if memory is not None:
        report |= {
            "peak_bytes": sum(rank.peak - rank.interpreter for rank in memory),
            "floor_bytes": floor_bytes(case),
        }
        if case.sampling_rate == 1:
            # What a step needs beyond rows and state. With a sample, state that was never touched takes no memory yet,
            # and the difference would flatter.
            report["extra_bytes"] = sum(rank.peak_in_steps - rank.interpreter for rank in memory) - floor_bytes(case)
    return report


def floor_seconds(case: Case, flops: float, copied: float) -> float:
    """The least a step can take on a rank that does so many operations and copies so many bytes a second.

    Three matrix products over the drawn rows, or their rows read twice and written once with the optimizer's state
    read and written: whichever takes longer.
    """
    rows = case.sampling_rate * case.num_classes / case.world_size
    numbers = rows * case.dim
    row_bytes, state_bytes = _bytes_per_number(case)
    return max(
        6 * case.batch_size * case.world_size * numbers / flops, numbers * (3 * row_bytes + 2 * state_bytes) / copied
    )


def floor_bytes(case: Case) -> int:
    """Bytes of all rows and of the state of their optimizer."""
    row_bytes, state_bytes = _bytes_per_number(case)
    return int(case.num_classes * case.dim * (row_bytes + state_bytes))


def _bytes_per_number(case: Case) -> tuple[float, float]:
    """Bytes of a row and of its optimizer's state, for each number of the row."""
    states = {"sgd": 4.0, "adamw": 8.0 + 8.0 / case.dim, "adagrad": 4.0 / case.dim}
    return (2.0 if case.row_dtype == "bfloat16" else 4.0), states[case.optimizer]


def scaling(case: Case, counts: Sequence[int], rows: int, repeats: int) -> list[Report]:
    """Our head over several numbers of classes with so many rows drawn in each: the time should not know the number."""
    reports = []
    for count in counts:
        grown = replace(case, num_classes=count, sampling_rate=rows / count)
        reports += compare(grown, repeats=repeats, memory=False)[0]
    return reports


def document(reports: list[Report]) -> Report:
    """The JSON of `megaclass bench`: where it was measured, and every case."""
    device = torch.cuda.get_device_name() if measure.has_gpu() else provenance.processor()
    return {"device": device, "torch": torch.__version__, "commit": provenance.commit() or "unknown", "cases": reports}
