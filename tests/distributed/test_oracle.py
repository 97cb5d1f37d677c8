"""The heart of the tests: every loss equals the dense float64 oracle at world sizes 1 to 4, in odd sizes."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaclass.classifier import Monitors
from megaclass.errors import ConfigError
from megaclass.objectives.margin import MARGINS
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from tests.support import cases as support
from tests.support.cases import DIM, DRAW_ID, FACTORS, Case, all_cases, full_cases
from tests.support.spawn import spawn

# What the loss is multiplied by before the backward pass, as one of two micro-batches would.
SHARE = 0.5
FIELDS = ("loss", "intra", "inter", "positive_cosine")
MONITORS = tuple(field.name for field in fields(Monitors))


def run_case(world: World, case: Case) -> dict[str, Any]:
    """On one rank: forward and backward; gradients as they are after the wrapper's division by the number of ranks."""
    embeddings, labels, _ = case.inputs(world.size)
    mine = slice(world.rank * case.batch_size, (world.rank + 1) * case.batch_size)
    shard = ClassShard(case.num_classes, world.rank, world.size)
    classifier = case.build(shard, world.group, grad_divisor=world.size, device=world.device)
    raw = embeddings[mine].to(world.device, copy=True).requires_grad_()
    with case.chunks():
        output = classifier(
            raw, labels[mine].to(world.device), draw_id=DRAW_ID, values=case.values(), monitor=case.monitor
        )
        (SHARE * output.loss).backward()
    gradient = classifier.take_row_gradient()
    assert gradient is not None
    assert classifier.take_row_gradient() is None
    rows = torch.arange(len(classifier.weight)) if gradient.rows is None else gradient.rows.cpu()
    full = torch.zeros_like(classifier.weight, device="cpu")
    full[rows] = gradient.values.cpu()
    classifier.keep_state(True)
    return {
        "scalars": torch.stack([getattr(output, name).detach() for name in FIELDS]).cpu(),
        "embedding": raw.grad.cpu() / world.size,
        "class": full,
        "rows": rows + shard.start * case.rows_per_class,
        "bias": _on_host(classifier.take_bias_gradient()),
        "state": _on_host(classifier.state),
        "monitors": None if output.monitors is None else torch.stack(astuple(output.monitors)).cpu(),
    }


def _on_host(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()


def run_cases(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_case(world, case) for case in cases]


def close(name: str, actual: Tensor, expected: Tensor, case: Case, least: float = 1e-12) -> None:
    """Relative to the largest entry (at least `least`): one that cancels to almost nothing has no digits of its own."""
    # An error in the last digit of a float32 cosine, 6e-8, comes multiplied by the scale, and in the sigmoids of SFace
    # by their steepness: 1e-5 is what that leaves at a scale of 32. With batch-norm these embeddings are up to 6 long.
    steepest = case.values().scale
    if case.settings().objective == "sface":
        # An angle moves faster than its cosine, by 1 / sin; where the sigmoid is steep that is four at the most.
        steepest = max(steepest, 320.0 if MARGINS.find(case.settings().margin_kind).needs_angle else 80.0)
    steepest *= 6.0 if case.normalisation == "batch-norm" else 1.0
    # CurricularFace squares the cosines of hard negatives, which doubles their slope.
    steepest *= 2.0 if case.settings().negative_map == "curricular" else 1.0
    relative = 1e-10 if case.dtype == torch.float64 else 1e-5 * max(1.0, steepest / 32)
    largest = max(float(expected.abs().max()), least)
    worst = float((actual.double() - expected).abs().max()) / largest
    assert worst <= relative, f"{name} is off by {worst:.1e}: {actual}, not {expected}, in {case}"


def compare(case: Case, parts: list[dict[str, Any]]) -> None:
    """What the ranks gave, against the oracle."""
    expected = case.expected(len(parts))
    first = parts[0]
    for part in parts:
        for name in ("scalars", "bias", "state", "monitors"):
            same = (part[name] is None and first[name] is None) or torch.equal(
                torch.nan_to_num(part[name]), torch.nan_to_num(first[name])
            )
            assert same, f"ranks disagree on {name}: {part[name]}, {first[name]} in {case}"
    scalars = torch.stack([getattr(expected, name) for name in FIELDS])
    close("scalars", first["scalars"], scalars, case)
    close("embedding", torch.cat([part["embedding"] for part in parts]), SHARE * expected.embedding_gradient, case)
    close("class", torch.cat([part["class"] for part in parts]), SHARE * expected.class_gradient, case)
    settings = case.settings()
    assert (first["bias"] is not None) == (settings.objective in ("sphereface2", "uniface"))
    if first["bias"] is not None:
        # The pulls of the own classes less the pushes of all others, each up to one: its digits are those of the two.
        close("bias", first["bias"], SHARE * expected.bias_gradient, case, least=0.1)
    assert (first["state"] is not None) == (settings.negative_map == "curricular")
    if first["state"] is not None:
        close("state", first["state"], expected.state, case)
    if case.monitor:
        for name, actual, wanted in zip(MONITORS, first["monitors"], expected.monitors, strict=True):
            assert bool(actual.isnan()) == bool(wanted.isnan()), (name, actual, wanted, case)
            # Cosines, shares and counts: their digits are those of one, also where the number itself is near zero.
            close(name, actual.nan_to_num(), wanted.nan_to_num(), case, least=1.0)
    _compare_rows(case, torch.cat([part["rows"] for part in parts]), len(parts))


def _compare_rows(case: Case, touched: Tensor, world_size: int) -> None:
    """Only drawn rows and the batch's own classes have a gradient at all; of these, which sub-centres is open."""
    labels = case.inputs(world_size)[1]
    rows = case.draw(labels).rows
    allowed = torch.unique(torch.arange(case.num_classes) if rows is None else torch.cat([rows, labels]))
    assert len(touched) == len(torch.unique(touched)), case
    assert torch.equal(torch.unique(touched // case.rows_per_class), allowed), case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_loss_equals_the_dense_oracle(world_size: int) -> None:
    cases = all_cases()
    for case, *parts in zip(cases, *spawn(run_cases, world_size, cases), strict=True):
        compare(case, parts)


@pytest.mark.full
@pytest.mark.timeout(3600)  # a busy machine is no fault of the class layer
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("margin_kind", FACTORS["margin_kind"])
@pytest.mark.parametrize("objective", FACTORS["objective"])
def test_full_grid_equals_the_dense_oracle(objective: str, margin_kind: str, world_size: int) -> None:
    cases = full_cases(objective, margin_kind)
    for case, *parts in zip(cases, *spawn(run_cases, world_size, cases, seconds=3500), strict=True):
        compare(case, parts)


def test_selection_holds_every_pair_of_factor_values() -> None:
    chosen = [{name: getattr(case, name) for name in FACTORS} for case in all_cases() if case.objective is not None]
    assert set().union(*map(support.pairs, chosen)) == support.sensible_pairs()
    assert all(map(support.is_sensible, chosen))


def test_selection_holds_every_margin_objective_map_and_preset() -> None:
    from megaclass.objectives import MARGINS, NEGATIVE_MAPS, OBJECTIVES, PRESETS
    from megaclass.objectives.presets import SAMPLERS

    assert set(FACTORS["objective"]) == set(OBJECTIVES.names())
    assert set(FACTORS["margin_kind"]) == set(MARGINS.names())
    assert set(FACTORS["negative_map"]) == set(NEGATIVE_MAPS.names())
    assert {options.get("sampler", "all") for options in support.SAMPLINGS.values()} == set(SAMPLERS)
    assert {case.preset for case in all_cases()} == set(PRESETS)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"objective": "softmax", "sampling": "batch"}, "its one term is entangled"),
        ({"objective": "uniface", "negative_map": "circle"}, "a sum over classes with a function of its own"),
        ({"margin_kind": "adaface", "normalisation": "batch-norm"}, "without unit length there is no angle"),
    ],
)
def test_what_the_selection_leaves_out_is_refused(parts: dict[str, Any], reason: str) -> None:
    assert not support.is_sensible(parts)
    with pytest.raises(ConfigError, match=reason):
        Case("softmax", 13, 5, "any", **parts).loss()


def _with_and_without_monitors(world: World, cases: list[Case]) -> list[tuple[dict[str, Any], ...]]:
    return [tuple(run_case(world, replace(case, monitor=monitor)) for monitor in (False, True)) for case in cases]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_asking_for_monitors_changes_no_number(world_size: int) -> None:
    cases = [Case(preset, 13, 5, "any") for preset in support.ALL_PRESETS]
    for rank in spawn(_with_and_without_monitors, world_size, cases):
        for case, (without, asked) in zip(cases, rank, strict=True):
            assert without["monitors"] is None
            assert asked["monitors"] is not None
            for name in ("scalars", "embedding", "class", "bias", "state"):
                if without[name] is not None:
                    # A longer message may be summed over the ranks in another order.
                    torch.testing.assert_close(asked[name], without[name], rtol=1e-14, atol=1e-15, msg=f"{name} {case}")


@pytest.mark.distributed
def test_backbone_gradient_is_that_of_the_global_mean() -> None:
    """Through DDP itself: the factor of the gather and DDP's averaging cancel."""
    case = Case("d-softmax-k", 13, 5, "any")
    layer = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    layer(case.inputs(3)[0]).backward(case.expected(3).embedding_gradient)
    for gradient in spawn(_ddp_gradient, 3, case):
        close("backbone", gradient, layer.weight.grad, case)


def _ddp_gradient(world: World, case: Case) -> Tensor:
    layer = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    wrapped = nn.parallel.DistributedDataParallel(layer, process_group=world.group)
    embeddings, labels, _ = case.inputs(world.size)
    mine = slice(world.rank * case.batch_size, (world.rank + 1) * case.batch_size)
    classifier = case.build(ClassShard(13, world.rank, world.size), world.group, grad_divisor=world.size)
    classifier(wrapped(embeddings[mine]), labels[mine], draw_id=DRAW_ID).loss.backward()
    return layer.weight.grad
