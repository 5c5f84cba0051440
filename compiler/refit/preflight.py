"""Compares what is given with what an engine needs: architecture, shapes, vocabulary, quantization, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint, LazyTensor
from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.engine import Engine
from trtllm.compiler.refit.given import Given
from trtllm.compiler.refit.recipes import is_calibrated, is_measured, source_specs
from trtllm.compiler.refit.report import RefitReport, listed
from trtllm.compiler.refit.tokenizers import TOKENIZER, tokenizer_difference

_BOOKKEEPING = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "architecture",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range",
    "pretraining_tp", "quantization_config", "_attn_implementation", "unsloth_version",
})  # fmt: skip
"""Keys of config.json that say nothing of the graph."""


def examine(
    engine: Engine,
    recipes: Mapping[str, Recipe],
    given: Given,
    *,
    recalibrates: bool = False,
    keeps_tokenizer: bool = False,
) -> RefitReport:
    """The pre-flight report. Nothing is read but headers and tokenizers.

    `keeps_tokenizer` says that the engine's own stays in use whatever the checkpoint has.
    """
    finding = _Findings(engine, recipes, given, recalibrates, keeps_tokenizer)
    finding.look()
    return finding.report()


def differing_config(engine: Engine, checkpoint: Checkpoint) -> list[str]:
    """Keys of config.json with other values than the engine's, but for those that say nothing of the graph."""
    own, other = dict(engine.config["pretrained_config"]), dict(checkpoint.config)
    keys = (own.keys() | other.keys()) - _BOOKKEEPING
    return sorted(key for key in keys if _plain(own.get(key)) != _plain(other.get(key)))


class _Findings:
    def __init__(
        self, engine: Engine, recipes: Mapping[str, Recipe], given: Given, recalibrates: bool, keeps_tokenizer: bool
    ) -> None:
        self.engine, self.recipes, self.given, self.recalibrates = engine, recipes, given, recalibrates
        self.keeps_tokenizer = keeps_tokenizer
        self.sources = source_specs(recipes)
        self.problems: list[str] = list(given.problems)
        self.hints: list[str] = ["give with --base the model that the adapter was trained on"] if self.problems else []
        self.notes: list[str] = list(given.notes)
        self.changed = self._changed()
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def _changed(self) -> list[str]:
        """Weights to make: all, or those of which a tensor is given, and those that a stripped engine lacks."""
        stripped = set(self.engine.manifest.stripped)
        return [
            entry.name
            for entry in self.engine.manifest.weights
            if self.given.is_complete
            or entry.name in stripped
            or not self.given.new.isdisjoint(self.recipes[entry.name].sources())
        ]

    def look(self) -> None:
        checkpoint, model = self.given.checkpoint, self.engine.config["model"]
        architecture = self.engine.config["pretrained_config"]["architecture"]
        if checkpoint is not None and checkpoint.architecture != architecture:
            self._problem(
                f"it is a {checkpoint.architecture}, the engine a {architecture}",
                "build an engine of this model: trtllm-build",
            )
        if checkpoint is not None:
            self._look_at_config(checkpoint, model)
        self._look_at_tensors()
        self._look_at_calibration()

    def _look_at_config(self, checkpoint: Checkpoint, model: Mapping[str, Any]) -> None:
        vocabulary = checkpoint.config.get("vocab_size")
        if isinstance(vocabulary, int) and vocabulary != model["vocab_size"]:
            self._problem(
                f"its vocabulary has {vocabulary} tokens, the engine's {model['vocab_size']}",
                "a model with another vocabulary needs an engine of its own: trtllm-build",
            )
        self._look_at_tokenizer(checkpoint)

    def _look_at_tokenizer(self, checkpoint: Checkpoint) -> None:
        """An engine that takes the checkpoint's tokenizer with its weights is sound; one that keeps its own is not."""
        difference = tokenizer_difference(self.engine.path / TOKENIZER, checkpoint.assets.get(TOKENIZER))
        if difference is None:
            return
        if self.given.kind == "checkpoint" and self.given.is_complete and not self.keeps_tokenizer:
            self.notes.append(f"WARNING: another tokenizer: {difference.line}; the engine takes it with the weights")
        elif difference.renumbered:
            keeps = "a running model keeps its own" if self.keeps_tokenizer else "the engine keeps its own"
            self._problem(
                f"it has another tokenizer, and {keeps}: {difference.line}",
                "refit the engine directory from the whole checkpoint (trtllm-refit), which takes its tokenizer too",
            )
        else:
            self.notes.append(f"WARNING: another tokenizer: {difference.line}; the engine keeps its own")

    def _look_at_tensors(self) -> None:
        needed = dict.fromkeys(name for weight in self.changed for name in self.recipes[weight].sources())
        for name in needed:
            source = self.sources.get(name)
            if source is None:
                continue
            tensor = self.given.tensors.get(name)
            if tensor is None:
                self.missing.append(name)
            elif tensor.spec.shape != source.shape:
                self.misshapen.append(f"{name} is {_times(tensor.spec.shape)}, the engine's {_times(source.shape)}")
        if self.missing:
            fused = "" if self.given.is_complete else ", which are fused with what is given"
            self._problem(
                f"{len(self.missing)} tensors are missing{fused}: {listed(self.missing)}",
                "give a complete checkpoint, or with --base MODEL the one that has the rest"
                if not self.given.is_complete
                else "fetch the checkpoint again; --partial takes what is there and keeps the engine's other weights",
            )
        if self.misshapen:
            self._problem(f"tensors of other shapes: {listed(self.misshapen)}", "it is of another model")
        if not self.changed and not self.problems:
            self._problem("no weight of the engine is made of what is given", "check the tensors' names")
        self._look_at_quantization(needed)

    def _look_at_quantization(self, needed: Mapping[str, None]) -> None:
        """Sources that recipes take as stored integers must be stored so; others are read dense, however stored."""
        for weight in self.changed:
            for recipe in _stored_steps(self.recipes[weight]):
                for name in recipe.sources():
                    tensor = self.given.tensors.get(name)
                    reason = _why_not_stored(recipe, tensor) if tensor is not None else ""
                    if reason:
                        self._problem(
                            f"{name} is {reason}, and the engine holds the integers of a checkpoint that was quantized",
                            "give a checkpoint of the same quantization, or build an engine of this one",
                        )
                        return
        read_stored = {
            name
            for weight in self.changed
            for recipe in _stored_steps(self.recipes[weight])
            for name in recipe.sources()
        }
        requantized = {
            tensor.stored.method
            for name in needed
            if name not in read_stored
            and (tensor := self.given.tensors.get(name)) is not None
            and hasattr(tensor, "stored")
        }
        if requantized:
            quantized = self.engine.config["build_config"].get("quantization") or "full precision"
            self.notes.append(f"arrives as {', '.join(sorted(requantized))}: dequantized, then made {quantized}")

    def _look_at_calibration(self) -> None:
        calibrated = [name for name in self.changed if is_calibrated(self.recipes[name])]
        if calibrated and not self.recalibrates:
            scheme = self.engine.config["build_config"].get("quantization")
            self._problem(
                f"{len(calibrated)} weights were chosen by calibration ({scheme}) of other weights and cannot be made "
                f"from new ones: {listed(calibrated, 2)}",
                "--recalibrate calibrates the new weights",
            )
        measured = [name for name in self.changed if is_measured(self.recipes[name])]
        if measured and not self.recalibrates:
            self.notes.append(
                f"{len(measured)} weights keep the ranges that calibration measured on the weights of the build; "
                "--recalibrate measures the new ones"
            )

    def _problem(self, what: str, hint: str) -> None:
        self.problems.append(what)
        self.hints.append(hint)

    def report(self) -> RefitReport:
        engine, manifest = self.engine, self.engine.manifest
        read = {name for weight in self.changed for name in self.recipes[weight].sources()}
        used = set(self.sources)
        changed = set(self.changed)
        dtypes = sorted({self.given.tensors[name].spec.dtype.value for name in read if name in self.given.tensors})
        checkpoint = self.given.checkpoint
        return RefitReport(
            engine=str(engine.path),
            source=self.given.source,
            kind=self.given.kind,
            architecture=engine.config["pretrained_config"]["architecture"],
            source_architecture=checkpoint.architecture if checkpoint is not None else None,
            target=engine.target,
            target_version=manifest.target.version,
            dtypes=tuple(dtypes),
            quantization=engine.config["build_config"].get("quantization"),
            vocab_size=engine.config["model"]["vocab_size"],
            weights=len(manifest.weights),
            changed_weights=tuple(self.changed),
            changed_bytes=sum(entry.nbytes for entry in manifest.weights if entry.name in changed),
            missing=tuple(self.missing),
            unused=tuple(sorted(self.given.new - used)),
            misshapen=tuple(self.misshapen),
            problems=tuple(self.problems),
            hints=tuple(self.hints),
            notes=tuple(self.notes),
        )


def _stored_steps(recipe: Recipe) -> list[Recipe]:
    own = [recipe] if recipe.step in ("kept_values", "kept_scales", "kept_offsets") else []
    return own + [step for operand in recipe.operands for step in _stored_steps(operand)]


def _why_not_stored(recipe: Recipe, tensor: LazyTensor) -> str:
    stored = getattr(tensor, "stored", None)
    if stored is None:
        return f"stored as {tensor.spec.dtype.value}"
    if stored.integers is None:
        return f"stored as {stored.method}"
    bits = getattr(recipe, "bits", None)
    if bits is not None and stored.integers.bits > bits:
        return f"stored as {stored.method}, whose integers need {stored.integers.bits} bits"
    offset = getattr(recipe, "offset", None)
    if offset == "none" and stored.integers.offset.value != "none":
        return f"stored as {stored.method}, with a {stored.integers.offset.value}"
    return ""


def _plain(value: Any) -> Any:
    """Values as JSON has them: tuples are lists, and what is not given is like null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
