"""What every model family promises: facts that agree with each other and with the loaded model, and readers that see what it sees."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch

from lorabake.base.cards import cards
from lorabake.families import caption_readers, family_card, inspect_model, load_model
from lorabake.protocols.family import (
    MOST_T5_TOKENS,
    FamilyCard,
    Framing,
    Model,
    ModelFacts,
    Part,
    Prediction,
    TextOption,
)

FAMILIES = cast("dict[str, FamilyCard]", cards("family"))
LONG = "1girl, red hair, smile, beach, " * 120
CAPTIONS = ["", "1girl, red hair", LONG]


def _tiny_models() -> dict[str, Any]:
    """Those that runs are tested on: how to write one of every family stands once."""
    path = Path(__file__).parents[1] / "train" / "every_family" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_models"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.FAMILIES


TINY = _tiny_models()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a tiny model, once."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name) / "model"
            TINY[name].write(written[name])
        return written[name]

    return folder


@pytest.fixture(scope="module", params=TINY)
def facts(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> ModelFacts:
    """Of a tiny model of every kind."""
    return inspect_model(folders(request.param))


@pytest.fixture(scope="module")
def model(facts: ModelFacts) -> Model:
    return load_model(facts)


def test_every_family_has_a_tiny_model_to_be_tested_on(folders: Callable[[str], Path]) -> None:
    assert {inspect_model(folders(name)).family for name in TINY} == FAMILIES.keys()


def test_a_model_is_recognised_by_one_family_alone(facts: ModelFacts) -> None:
    found = {name: card.recognise(facts.source) for name, card in FAMILIES.items()}
    assert [name for name, known in found.items() if known is not None] == [facts.family]
    assert found[facts.family] == facts, "what is known of it is enough to find it again"


def test_facts_fit_each_other(facts: ModelFacts) -> None:
    assert facts.prediction in get_args(Prediction)
    assert facts.latent_scale > 0 and facts.pixel_step % facts.latent_scale == 0
    assert facts.resolution % facts.pixel_step == 0
    assert facts.latent_channels > 0 and facts.name and facts.base_version
    assert re.fullmatch(r"[a-z0-9.-]+", facts.architecture) and re.fullmatch(r"[0-9a-f]{32,64}", facts.digest)
    assert facts.small and facts.path.is_dir() and facts.vae is None and facts.text_encoders == ()
    assert facts.usual_cfg >= 1
    assert facts.usual_guidance is None or (facts.usual_guidance > 0 and facts.prediction == "flow")
    assert facts.shift is None or (facts.shift > 0 and facts.prediction == "flow")


def test_t5s_length_is_known_where_it_can_be_set(facts: ModelFacts) -> None:
    options = family_card(facts).text_options
    assert options <= set(get_args(TextOption))
    if facts.usual_t5_tokens is not None:
        assert "t5_tokens" in options and 1 <= facts.usual_t5_tokens <= MOST_T5_TOKENS


def test_the_loaded_model_is_what_the_facts_say(facts: ModelFacts, model: Model) -> None:
    assert model.facts == facts
    assert (model.betas_T is None) == (facts.prediction == "flow")
    side = 2 * facts.pixel_step
    with torch.no_grad():
        latents = model.encode_images(torch.rand(1, 3, side, facts.pixel_step) * 2 - 1)
        assert latents.shape == (
            1,
            facts.latent_channels,
            side // facts.latent_scale,
            facts.pixel_step // facts.latent_scale,
        )
        assert model.decode_latents(latents).shape == (1, 3, side, facts.pixel_step)
        told = model.encode_text(model.tokenize(["1girl"]))
        told |= model.frame([Framing((side, side), (0, 0), (facts.pixel_step, side))])
        assert all(len(tensor) == 1 for tensor in told.values())
        assert model.predict(latents, torch.tensor([500.0]), told).shape == latents.shape


def test_the_denoiser_comes_first_then_text_encoders(model: Model) -> None:
    parts: tuple[Part, ...] = get_args(Part)
    assert list(model.parts) == [part for part in parts if part in model.parts]
    assert next(iter(model.parts)) == "denoiser" and len(model.parts) > 1
    assert model.tokenize(["a"]).keys() == model.parts.keys() - {"denoiser"}


def test_layers_have_names_of_their_own(model: Model) -> None:
    layers = model.layers()
    keys = [layer.key for layer in layers]
    assert len(keys) == len(set(keys)) and all(re.fullmatch(r"lora_[A-Za-z0-9_]+", key) for key in keys)
    assert all(model.parts[layer.part].get_submodule(layer.path) is layer.module for layer in layers)
    owners = {(alias.key, layer.key) for layer in layers for alias in layer.aliases}
    assert len({alias for alias, _ in owners}) == len(owners), "no other name is that of two layers"
    assert not {alias for alias, _ in owners} & set(keys)
    assert {layer.part for layer in layers} == model.parts.keys()
    assert "transformer" in {layer.group for layer in layers if layer.part == "denoiser"}
    assert {layer.group for layer in layers} - {"other"} == family_card(model.facts).groups


def test_aliases_of_pieces_cover_their_layer_once(model: Model) -> None:
    for layer in model.layers():
        cut = [alias for alias in layer.aliases if alias.rows is not None]
        rows = [row for alias in cut if alias.rows for row in range(*alias.rows)]
        assert not cut or sorted(rows) == list(range(len(layer.module.get_parameter("weight")))), layer.key


@pytest.mark.parametrize("value", [1, 2])
def test_every_text_option_can_be_set(facts: ModelFacts, value: int) -> None:
    values = {"clip_skip": value, "max_tokens": 75 * value, "t5_tokens": 8 * value}
    options: Any = {name: values[name] for name in family_card(facts).text_options}
    readers = caption_readers(facts, options)
    tokens = load_model(facts, **options).tokenize(CAPTIONS)
    for part, read in readers.items():
        assert read(CAPTIONS)[2].room < tokens[part].shape[1], "starts and ends need room too"


def test_readers_see_what_the_text_encoders_see(facts: ModelFacts, model: Model) -> None:
    readers = caption_readers(facts)
    assert readers and readers.keys() <= model.parts.keys() - {"denoiser"}
    for part, read in readers.items():
        readings = read(CAPTIONS)
        assert len(readings) == len(CAPTIONS) and len({reading.room for reading in readings}) == 1
        assert [readings[0].tokens, readings[0].kept, readings[0].lost] == [0, "", ""]
        assert (readings[1].kept, readings[1].lost) == (CAPTIONS[1], "") and readings[1].tokens > 3
        assert readings[2].tokens > readings[2].room and LONG.startswith(readings[2].kept) and readings[2].lost
        whole, kept, other = (
            model.tokenize([text])[part] for text in (LONG, readings[2].kept, readings[2].kept + " night")
        )
        assert torch.equal(whole, kept), "the end is not seen"
        assert torch.equal(whole, other)
        shorter = model.tokenize([readings[2].kept.rpartition(" ")[0]])[part]
        assert not torch.equal(whole, shorter), "all that is kept is seen"


def test_what_reads_captions_is_read(facts: ModelFacts, model: Model) -> None:
    """Every text encoder has a reader, but for one whose share is a single vector for the whole caption."""
    silent = model.parts.keys() - {"denoiser"} - caption_readers(facts).keys()
    with torch.no_grad():
        plain = model.encode_text(model.tokenize(["1girl"]))
        for part in silent:
            tokens = model.tokenize(["1girl"])
            told = model.encode_text({**tokens, part: model.tokenize(["red hair"])[part]})
            changed = {name for name, tensor in told.items() if not torch.equal(tensor, plain[name])}
            assert changed and all(told[name].dim() == 2 for name in changed), part
