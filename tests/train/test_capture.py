"""Steps from recordings. What records on a CPU runs the step again, on the recording's own inputs: all but the GPU's own part is real."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorabake.adapters import graft
from lorabake.base.cards import find
from lorabake.base.events import Events
from lorabake.families import inspect_model, load_model
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.family import Framing, Model
from lorabake.recipe import check_values
from lorabake.sampling.infotext import save_png
from lorabake.train.bake import Bake
from lorabake.train.beside import Beside
from lorabake.train.capture import Captured, CudaGraphs, Recorder, Step, draws_on_cpu
from lorabake.train.loop import loss_of, optimizer_step, run_loop
from lorabake.train.prepare import prepare
from lorabake.train.text import TextSource

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path, drawings: list[tuple[Any, str]], tiny: Path) -> Path:
    """Pictures for two buckets, and the tiny base beside them."""
    shutil.copytree(tiny, tmp_path / "base", copy_function=os.link)
    for index, (image, caption) in enumerate(drawings):
        path = tmp_path / "mira" / "1_mira" / f"{index:03d}.png"
        save_png(image.resize((192, 64)) if index % 3 == 2 else image, path)
        path.with_suffix(".txt").write_text(caption)
    return tmp_path / "mira"


def bake(dataset: Path, **sections: dict[str, Any]) -> Bake:
    raw: dict[str, dict[str, Any]] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "3 steps"},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return prepare(check_values(raw), Events())


def again(step: Step) -> Step:
    """Records as a GPU does, as far as a CPU can: runs the step for nothing first, then gives something to be run later."""
    for _ in range(2):
        step()
    return step


def capturing(baked: Bake, record: Recorder = again, **options: Any) -> Bake:
    of_inputs = partial(loss_of, baked.model, baked.objective, noted_2B=baked.noted_2B)
    return replace(baked, captured=Captured(of_inputs, baked.groups, CPU, record, around=baked.graft.ahead, **options))


def state(baked: Bake) -> list[Tensor]:
    """Weights and moments."""
    moments = [value for group in baked.groups for value in baked.optimizer.state[group.values].values()]
    return [tensor.detach().clone() for tensor in [*(group.values for group in baked.groups), *moments]]


# ---- equal to the plain way


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"gradient_accumulation": 2}},
        {"train": {"gradient_accumulation": 3, "batch_size": 1}, "data": {"flip": True, "captions": {"shuffle": True}}},
        {"optimizer": {"text_encoder_lr": 0.0}, "data": {"captions": {"shuffle": True}}},
        {"optimizer": {"text_encoder_lr": 0.0}, "train": {"batch_size": 4}},
        {"adapter": {"rank": 2, "dropout": 0.2, "rank_dropout": 0.1, "module_dropout": 0.1}},
        {"train": {"gradient_checkpointing": True}, "adapter": {"rank": 2, "conv_rank": 2, "dropout": 0.2}},
    ],
    ids=["accumulated", "shuffled and mirrored", "ids", "kept text, a short batch", "dropout", "recomputed"],
)
def test_a_run_from_recordings_is_the_same_to_the_last_bit(dataset: Path, sections: dict[str, Any]) -> None:
    results: list[tuple[list[dict[str, Any]], list[Tensor]]] = []
    for wrap in (lambda baked: baked, capturing):
        baked = wrap(bake(dataset, **sections))
        assert len(set(baked.buckets)) == 2
        seen: list[dict[str, Any]] = []
        run_loop(baked, 0, Events(seen.append), lambda step: False)
        results.append((seen, state(baked)))
    (plain_events, plain), (events, captured) = results
    assert events == plain_events and len(events) == 3
    assert all(torch.equal(*pair) for pair in zip(plain, captured, strict=True))


def test_it_continues_as_if_it_had_not_stopped(dataset: Path) -> None:
    """A recording made at step 3 or long before it, the masks of step 3 are the same."""
    sections: dict[str, Any] = {"adapter": {"rank": 2, "dropout": 0.3}}
    whole, rest = capturing(bake(dataset, **sections)), capturing(bake(dataset, **sections))
    batches = [(0, 1), (3, 4), (2, 5), (1, 3)]
    for step, batch in enumerate(batches[:3]):
        optimizer_step(whole, step, [batch])
    for mine, theirs in zip(rest.groups, whole.groups, strict=True):
        mine.values.data.copy_(theirs.values)
    assert optimizer_step(rest, 3, batches[3:]) == optimizer_step(whole, 3, batches[3:])


class Counting:
    """A recorder that counts what it records and what is replayed."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1
        step()

        def replay() -> Tensor:
            self.replayed += 1
            return step()

        return replay


@dataclass
class Line:
    """The least there is to train: y = w·x."""

    group: FlatGroup
    losses: Callable[[dict[str, Tensor]], Tensor]
    weight: nn.Parameter


@pytest.fixture
def line() -> Line:
    weight = nn.Parameter(torch.tensor([2.0]))
    return Line(FlatGroup("denoiser", {"w": weight}), lambda inputs: (weight * inputs["x"]).sum(), weight)


def x(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.full(shape, value, dtype=dtype)}


def test_one_recording_for_every_set_of_shapes_types_and_batches(line: Line) -> None:
    count = Counting()
    captured = Captured(line.losses, [line.group], CPU, count)
    cases = [(x(2), 1), (x(3), 1), (x(1, 2), 1), (x(2), 2), (x(2, dtype=torch.float64), 1)]
    for inputs, batches in cases * 2 + [(x(2, value=5.0), 1)]:
        captured(inputs, batches)
    assert (count.recorded, count.replayed) == (5, 11)


def test_each_replay_reads_what_it_is_given_and_adds_to_the_gradient(line: Line) -> None:
    captured = Captured(line.losses, [line.group], CPU, again)
    losses = [float(captured(x(2, value=value), 2)) for value in (1.0, 3.0, 10.0)]
    assert losses == [2.0, 6.0, 20.0]
    assert line.weight.grad is not None and line.group.gradient.tolist() == [14.0]
    assert line.weight.grad.data_ptr() == line.group.gradient.data_ptr(), "the address a recording knows"
    line.weight.data.fill_(4.0)  # as an optimizer does, in place
    assert float(captured(x(2), 1)) == 8.0


def test_recording_leaves_no_trace(line: Line) -> None:
    def noisy(inputs: dict[str, Tensor]) -> Tensor:
        return line.losses(inputs) * torch.rand(())

    line.group.gradient.fill_(7.0)
    torch.manual_seed(3)
    expected = 4.0 * float(torch.rand(()))
    torch.manual_seed(3)
    assert float(Captured(noisy, [line.group], CPU, again)(x(2), 1)) == expected
    assert line.group.gradient.tolist() == pytest.approx([7.0 + expected / 2], rel=1e-6)


def test_of_more_shapes_than_fit_those_used_least_recently_go_without(line: Line) -> None:
    count = Counting()
    captured = Captured(line.losses, [line.group], CPU, count, most=2)

    def takes(size: int) -> tuple[bool, bool]:
        """Whether the step is recorded, and whether it is a replay."""
        before = (count.recorded, count.replayed)
        assert float(captured(x(size), 1)) == 2.0 * size
        return count.recorded > before[0], count.replayed > before[1]

    assert [takes(size) for size in (1, 2, 1)] == [(True, True), (True, True), (False, True)]
    assert takes(3) == (True, True), "2 makes room: 1 was used after it"
    assert [takes(size) for size in (2, 1, 2, 3)] == [(False, False), (False, True), (False, False), (False, True)]
    assert captured.obstacle is None


# ---- where it cannot be


def test_a_failed_recording_is_told_once_and_changes_nothing(dataset: Path) -> None:
    told: list[str] = []

    def fails(step: Step) -> Step:
        step()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")
        finally:
            raise RuntimeError("capture was invalidated")

    plain = bake(dataset, adapter={"rank": 2, "dropout": 0.2})
    broken = capturing(bake(dataset, adapter={"rank": 2, "dropout": 0.2}), fails, told=told.append)
    for step, batches in enumerate([[(0, 1), (2,)], [(3, 4), (5,)]]):
        assert optimizer_step(plain, step, batches) == optimizer_step(broken, step, batches)
    assert all(torch.equal(*pair) for pair in zip(state(plain), state(broken), strict=True))
    assert told == ["operation not permitted when stream is capturing"]
    assert broken.captured is not None and broken.captured.obstacle == told[0]


def test_recordings_from_before_a_failure_are_dropped(line: Line) -> None:
    count, told = Counting(), list[str]()

    def second_fails(step: Step) -> Step:
        if count.recorded:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return count(step)

    captured = Captured(line.losses, [line.group], CPU, second_fails, told.append)
    assert [float(captured(x(size), 1)) for size in (1, 2, 1, 2)] == [2.0, 4.0, 2.0, 4.0]
    assert count.replayed == 1 and told == ["CUDA out of memory."]


@pytest.mark.parametrize(("settings", "draws"), [({}, False), ({"module_dropout": 0.1}, True)], ids=str)
def test_what_draws_on_the_cpu_is_seen(dataset: Path, settings: dict[str, Any], draws: bool) -> None:
    """Layers that are left out by chance are chosen by Python: a recording would leave out the same ones for ever."""
    baked = bake(dataset, adapter={"rank": 2, **settings})
    seen: list[bool] = []

    def record(step: Step) -> Step:
        seen.append(draws_on_cpu(step))
        return step

    optimizer_step(capturing(baked, record), 0, [(0, 1)])
    assert seen == [draws]


def test_draws_of_python_are_seen_too() -> None:
    assert draws_on_cpu(lambda: torch.tensor(random.random())) and not draws_on_cpu(lambda: torch.zeros(()))


def test_a_cpu_records_nothing(dataset: Path) -> None:
    assert bake(dataset).captured is None


# ---- what every family computes on the device


class Traffic(TorchDispatchMode):
    """Lists operations that would make a GPU and the CPU wait for each other, on a device that has no values to wait for.

    Tensors of the meta device take the ways a GPU's take, and reading a value from one is an error in itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_iter((args, kwargs, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "cpu" in devices and (len(devices) > 1 or any(tensor.dim() for tensor in tensors)):
            self.seen.append(str(func))
        return result


class Lists(TorchFunctionMode):
    """Lists tensors that are made of Python's numbers: on a GPU that is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A small model of every family, as a folder."""
    from lorabake.base.places import POCKET_MODEL

    yield {"sd": POCKET_MODEL} | {family: written(family, tmp_path_factory) for family in ("sdxl", "flux", "sd3")}


def written(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by diffusers, as that family's own tests have it."""
    import importlib.util

    path = Path(__file__).parent.parent / "families" / family / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"tiny_{family}", path)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizers, folder = tmp_path_factory.mktemp(family) / "files", tmp_path_factory.mktemp(family)
    kinds: dict[str, Any] = {"flux": True, "sd3": "sd35"}
    pipeline = module.build(tokenizers) if family == "sdxl" else module.pipeline(tokenizers, kinds[family])
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "adapter", "precision", "trained"),
    [
        *((family, "lora", torch.float32, True) for family in ("sd", "sdxl", "flux", "sd3")),
        *((family, "lora", torch.bfloat16, False) for family in ("sd", "flux")),
        *((family, "full", torch.float32, True) for family in ("sd", "flux")),
    ],
)
def test_a_loss_and_its_gradient_never_leave_the_device(
    models: dict[str, Path], family: str, adapter: str, precision: torch.dtype, trained: bool
) -> None:
    facts = inspect_model(models[family])
    model = load_model(facts, dtype=precision, device="meta")
    parts = tuple(model.parts) if trained else ("denoiser",)
    card = find("adapter", adapter)
    grafted = graft(model, adapter, card.settings(), seed=0, parts=parts)
    grafted.training = True
    model.checkpoint_gradients(trained)
    groups = [FlatGroup(part, parameters) for part, parameters in grafted.parameters().items()]
    objective = find("objective", "flow" if facts.prediction == "flow" else "diffusion")
    noted_2B = torch.zeros(2, 4, device="meta")
    losses = partial(loss_of, model, objective.load()(objective.settings(), model), noted_2B=noted_2B)
    inputs = meta_inputs(model, trained)
    with Lists() as lists, Traffic() as traffic:
        loss = losses(inputs)
        loss.backward()
    assert lists.seen + traffic.seen == []
    assert loss.shape == () and all(group.gradient.is_meta for group in groups)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_objectives_offer_never_leaves_the_device(models: dict[str, Path], family: str) -> None:
    facts = inspect_model(models[family])
    model = load_model(facts, dtype=torch.float32, device="meta")
    card = find("objective", "flow" if facts.prediction == "flow" else "diffusion")
    settings = card.settings.model_validate({"weighting": "learned", "loss": "huber", "huber_schedule": "exponential"})
    objective = card.load()(settings, model)
    beside = Beside.of(objective)
    assert beside is not None
    inputs = meta_inputs(model, trained=False)
    inputs["mixed_BCHW"] = torch.zeros_like(inputs["noise_BCHW"])
    with Lists() as lists, Traffic() as traffic:
        loss_of(model, objective, inputs).backward()
    assert lists.seen + traffic.seen == [] and beside.group.gradient.is_meta


def meta_inputs(model: Model, trained: bool) -> dict[str, Tensor]:
    """Inputs of the loss for two pictures, without values."""
    channels, framing = model.facts.latent_channels, Framing((64, 64), (0, 0), (64, 64))
    whole = "flow" not in model.facts.prediction
    told: dict[str, Tensor] = dict(TextSource(model, trained=trained, repeating=False)(["1girl", "night, beach"]))
    inputs = {
        "latents_BCHW": torch.zeros(2, channels, 16, 16),
        "noise_BCHW": torch.zeros(2, channels, 16, 16),
        "timesteps_B": torch.zeros(2, dtype=torch.int64 if whole else torch.float32),
        "mask_B1HW": torch.ones(2, 1, 16, 16),
        **told,
        **model.frame([framing, framing]),
    }
    assert {tensor.device.type for tensor in inputs.values()} == {"cpu"}
    return {name: tensor.to("meta") for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda loss: loss * float(loss.detach()),
        lambda loss: loss if loss > 0 else -loss,
        lambda loss: loss + torch.tensor([1.0, 2.0], device=loss.device).sum(),
        lambda loss: loss[None][loss[None] > 0].sum(),
        lambda loss: loss + torch.rand(2).sum().to(loss.device),
    ],
    ids=["a value", "a condition", "a list", "a mask", "a draw"],
)
def test_what_leaves_the_device_is_seen(spoil: Callable[[Tensor], Tensor]) -> None:
    loss = torch.zeros((), device="meta", requires_grad=True)
    failed = False
    with Lists() as lists, Traffic() as traffic:
        try:
            spoil(loss)
        except (RuntimeError, NotImplementedError):
            failed = True
    assert failed or lists.seen or traffic.seen


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dropout": 0.2, "rank_dropout": 0.1}, {"module_dropout": 0.2}, {"conv_rank": 2}],
    ids=["plain", "dropout", "module dropout", "convolutions"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_cuda_graphs_compute_what_launches_one_by_one_compute(
    dataset: Path, precision: str, settings: dict[str, Any], checkpointing: bool
) -> None:
    train = {"device": "cuda", "precision": precision, "gradient_checkpointing": checkpointing}
    captured = bake(dataset, adapter={"rank": 2, **settings}, train=train)
    plain = replace(bake(dataset, adapter={"rank": 2, **settings}, train=train), captured=None)
    assert captured.captured is not None
    for step, batches in enumerate([[(0, 1), (2,)], [(3, 4), (5,)], [(1, 3), (0,)]]):
        ours, theirs = optimizer_step(captured, step, batches), optimizer_step(plain, step, batches)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    assert (captured.captured.obstacle is not None) == ("module_dropout" in settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_waits_for_the_gpu_cannot_be_recorded(line: Line) -> None:
    weight = nn.Parameter(torch.tensor([2.0], device="cuda"))
    group, told = FlatGroup("denoiser", {"w": weight}), list[str]()

    def losses(inputs: dict[str, Tensor]) -> Tensor:
        return (weight * inputs["x"]).sum() * float(inputs["x"].max())

    captured = Captured(losses, [group], torch.device("cuda"), CudaGraphs(torch.device("cuda")), told.append)
    assert [float(captured(x(2, value=value), 1)) for value in (1.0, 3.0)] == [4.0, 36.0]
    assert len(told) == 1 and group.gradient.tolist() == [2.0 + 18.0]
