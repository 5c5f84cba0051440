"""What a `trtllm-prune` command line asks for, as a value; carrying it out loads the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtllm.errors import UsageError, nearest
from trtllm.sizes import format_size
from trtllm.tools.console import Console, checked_level

if TYPE_CHECKING:
    from trtllm.compiler.pruning.rewrite import Rewritten

Method = Literal["magnitude", "wanda"]
Format = Literal["huggingface", "trtllm"]


@dataclass(frozen=True)
class RewriteRequest:
    """What is to become of a model that is pruned for good."""

    method: Method | None
    sparsity: float | None
    structure: tuple[int, int] | None
    heads: int | None
    mlp_channels: int | None
    layers: int | None
    dataset: str | None
    evaluation: str | None
    format: Format

    @classmethod
    def of(
        cls, method: str | None, sparsity: float | None, structure: str | None, heads: int | None,
        mlp_channels: int | None, layers: int | None, dataset: str | None, evaluation: str | None, format: str,
    ) -> RewriteRequest | None:  # fmt: skip
        """None when nothing of it was asked for. Raises UsageError for words that are not known."""
        if method is None and heads is None and mlp_channels is None and layers is None:
            if sparsity is not None or structure is not None:
                raise UsageError("--sparsity and --structure go with --method", "--method magnitude, or wanda")
            return None
        if method not in (None, "magnitude", "wanda"):
            raise UsageError(f"unknown method {nearest(str(method), ('magnitude', 'wanda'))}", "magnitude or wanda")
        if format not in ("huggingface", "trtllm"):
            raise UsageError(f"unknown format '{format}'", "huggingface or trtllm")
        if sparsity is not None and structure is not None:
            raise UsageError("--structure says how many weights stay", "leave out --sparsity")
        parts = structure.split(":") if structure is not None else []
        if structure is not None and (len(parts) != 2 or not all(part.isdigit() for part in parts)):
            raise UsageError(f"--structure '{structure}' is no N:M", "2:4, for example")
        pair = (int(parts[0]), int(parts[1])) if parts else None
        return cls(method, sparsity, pair, heads, mlp_channels, layers, dataset, evaluation, format)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PruneRequest:
    """One run of the command."""

    command: str
    path: Path
    output_dir: Path | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    prune_all: bool
    restore: str | None
    dry_run: bool
    quiet: bool
    log_level: str = "info"
    rewrite: RewriteRequest | None = None

    @property
    def target(self) -> Path:
        """The output directory: the reference's sibling when none is given."""
        if self.output_dir is not None:
            return self.output_dir
        path = self.path.absolute()
        return path.with_name(path.name + (".restored" if self.restore is not None else ".pruned"))

    def perform(self, console: Console) -> int:
        """Strips or restores; returns the exit code."""
        from trtllm.checkpoints.selection import Selection
        from trtllm.compiler.pruning.strip import restore_path, strip_path
        from trtllm.tools.progress_display import display_for

        console.level = checked_level(self.log_level, quiet=self.quiet)
        common = {"command": self.command, "output_dir": str(self.target)}
        if self.rewrite is not None:
            return self._rewrite(self.rewrite, console, common)
        with display_for(console) as display:
            if self.restore is not None:
                count = restore_path(self.path, self.target, self.restore, display)
                self._say(console, f"{self.target}: {count} tensors put back, verified by hash")
                console.result({**common, "restored": count})
                return 0
            selection = Selection(self.include, self.exclude, self.prune_all)
            made = strip_path(self.path, self.target, selection, display, dry_run=self.dry_run)
        if self.dry_run:
            for name in made.names:
                self._say(console, name)
        after = (
            "" if made.bytes_after is None else f", {format_size(made.bytes_before)} -> {format_size(made.bytes_after)}"
        )
        verb = "would be taken out of" if self.dry_run else "taken out of"
        self._say(console, f"{len(made.names)} tensors ({format_size(made.payload_bytes)}) {verb} {self.path}{after}")
        console.result({**common, "dry_run": self.dry_run, **made.to_json()})
        return 0

    def _rewrite(self, request: RewriteRequest, console: Console, common: dict[str, Any]) -> int:
        from trtllm.compiler.pruning.model import PruningScheme
        from trtllm.compiler.pruning.rewrite import PruningText, rewrite_model
        from trtllm.tools.progress_display import display_for

        if self.include or self.exclude or self.prune_all or self.restore is not None or self.dry_run:
            raise UsageError(
                "weights are either taken out, or the model is made smaller",
                "leave out --include, --exclude, --prune-all, --restore and --dry-run",
            )
        sparsity = 0.5 if request.sparsity is None else request.sparsity
        scheme = PruningScheme(
            request.method, sparsity, request.structure, request.heads, request.mlp_channels, request.layers
        )  # fmt: skip
        text = PruningText(request.dataset, evaluation=request.evaluation)
        with display_for(console) as display:
            made = rewrite_model(self.path, self.target, scheme, display, text=text, format=request.format)
        for line in rewrite_lines(made):
            self._say(console, line)
        console.result({**common, **made.to_json()})
        return 0

    def _say(self, console: Console, text: str) -> None:
        if not self.quiet:
            console.say(text)


def rewrite_lines(made: Rewritten) -> list[str]:
    """Size, zeros, speed and perplexity, before and after."""
    rows = [("", "size", "engine", "weights", "zeros", "tokens/s", "perplexity")]
    for name, quality in (("before", made.before), ("after", made.after)):
        rows.append(
            (
                name, format_size(quality.weights_bytes), format_size(quality.engine_bytes),
                f"{quality.parameters:,}", f"{quality.zeros:.1%}",
                f"{quality.tokens_per_second:.1f}", f"{quality.perplexity:.3f}",
            )
        )  # fmt: skip
    return ["  ".join(f"{cell:>14}" for cell in row) for row in rows]
