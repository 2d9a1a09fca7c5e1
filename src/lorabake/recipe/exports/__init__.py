"""A recipe as the configs of kohya's sd-scripts: ``config.toml`` for ``--config_file``, which names ``dataset.toml`` where there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.places import expanded
from lorabake.recipe.exports import _data, _training
from lorabake.recipe.exports._writing import Writing
from lorabake.recipe.imports._checks import prediction_of, unusual
from lorabake.recipe.imports._paths import is_foreign, is_hub_name
from lorabake.recipe.imports._report import Kind, Line, table
from lorabake.recipe.load import Keep, anchored, parse_sections, read_raw
from lorabake.recipe.recipe import SECTION_NAMES, Recipe
from lorabake.recipe.toml import flat_to_toml

__all__ = ["Exported", "export_recipe"]

CONFIG, DATASET, PROMPTS = "config.toml", "dataset.toml", "prompts.txt"
_TITLES: dict[Kind, str] = {
    "same": "written",
    "converted": "written, in other units or words",
    "left": "not written; what is learnt stays the same",
    "lost": "SD-SCRIPTS CANNOT SAY IT, AND THE TRAINING DIFFERS FOR IT",
}
_LEFT = ("sample", "output", "save", "train.ema", "train.device", "train.threads", "validation", "data.augment.views")
"""Settings without which the same is learnt, or whole sections of them."""
_MODELS = ("model.base", "model.vae", "model.text_encoders")
"""Settings that sd-scripts may also take from a hub."""


@dataclass(frozen=True)
class Exported:
    """A recipe in sd-scripts' words."""

    source: str
    config: Mapping[str, Any]
    """Of the training config."""
    dataset: Mapping[str, Any] | None
    """The dataset config, where the training config alone cannot say what is trained on."""
    prompts: tuple[str, ...]
    """Lines of the file of sample prompts; none if there are none, or they are in a file already."""
    lines: tuple[Line, ...]
    """What became of each setting: ``key`` is ours here, and ``setting`` theirs."""

    def texts(self, into: Path) -> dict[Path, str]:
        """The files' texts by path: into a folder, or beside the config file that ``into`` names."""
        single = into.suffix.lower() == ".toml"
        folder, stem = (into.parent, f"{into.stem}-") if single else (into, "")
        config, files = dict(self.config), {}
        if self.dataset is not None:
            path = folder / f"{stem}{DATASET}"
            config["dataset_config"] = os.path.abspath(path)
            files[path] = _dataset_toml(self.dataset)
        if self.prompts:
            path = folder / f"{stem}{PROMPTS}"
            config["sample_prompts"] = os.path.abspath(path)
            files[path] = "\n".join(self.prompts) + "\n"
        head = f"# From the recipe {self.source}. Train it with sd-scripts: --config_file, and the program for the base model.\n"
        files[into if single else folder / CONFIG] = head + flat_to_toml(dict(sorted(config.items())))
        return files

    def report(self) -> str:
        """For people: a table for each kind."""
        parts: list[str] = []
        for kind, title in _TITLES.items():
            if lines := tuple(line for line in self.lines if line.kind == kind):
                parts += ["", f"{title}:", *table(lines)]
        return "\n".join(parts[1:])

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": self.source,
            "config": dict(self.config),
            "dataset": self.dataset,
            "prompts": list(self.prompts),
            "lines": [line.to_dict() for line in self.lines],
        }


def export_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> Exported:
    """A recipe file, or its plain values by section, in sd-scripts' words. Nothing is written; the base model need not be there.

    Raises:
        UserError: there is no such recipe.
        Problems: settings in it are wrong.
    """
    if isinstance(recipe, Mapping):
        raw, source = anchored(recipe, Path(), _kept_from(Path())), "given as values"
    else:
        path = expanded(recipe)
        if path.is_dir():
            raise UserError(f"{path} is a folder. Give a recipe file. Nothing was written.")
        raw, source = read_raw(path, keep=_kept_from(path.parent)), path.name
    problems: list[Problem] = []
    parsed = parse_sections(raw, problems, prediction_of(raw))
    missing = [
        problem for problem in problems if not problem.what.startswith("'") or "is not installed" not in problem.what
    ]
    if missing:
        raise Problems(source, missing, "`lorabake explain SECTION` lists what a section accepts.")
    plain = Recipe(**parsed).to_dict()
    writing = Writing(plain)
    flow = plain["objective"]["name"] == "flow"
    family = _training.training(writing, flow)
    dataset = _data.data(writing, raw, family)
    prompts = _training.samples(writing)
    _rest(writing, plain)
    return Exported(source, writing.config, dataset, prompts, tuple(writing.lines))


def _kept_from(folder: Path) -> Keep:
    """Paths that are none of this machine's, and sd-scripts may know: those of Windows, and names of models on a hub."""
    return lambda setting, path: is_foreign(path) or (setting in _MODELS and is_hub_name(path, folder))


def _rest(writing: Writing, plain: Mapping[str, Mapping[str, Any]]) -> None:
    """What nobody has taken, if it is not as it is anyway."""
    for section in SECTION_NAMES:
        for setting in unusual(plain[section], section):
            if setting in writing.seen or any(setting.startswith(f"{seen}.") for seen in writing.seen):
                continue
            if any(setting == left or setting.startswith(f"{left}.") for left in _LEFT):
                writing.left(setting)
            else:
                writing.lost(setting)


def _dataset_toml(dataset: Mapping[str, Any]) -> str:
    parts = [f"[general]\n{flat_to_toml(dataset['general'])}"] if dataset["general"] else []
    for one in dataset["datasets"]:
        parts.append(f"[[datasets]]\n{flat_to_toml({key: value for key, value in one.items() if key != 'subsets'})}")
        parts += [f"[[datasets.subsets]]\n{flat_to_toml(subset)}" for subset in one["subsets"]]
    return "\n".join(parts)
