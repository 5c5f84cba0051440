"""What a `trtllm-prune` command line asks for, as a value; carrying it out loads the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtllm.tools.console import Console


@dataclass(frozen=True)
class PruneRequest:
    """One run of the command."""

    path: Path
    output_dir: Path | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    prune_all: bool
    restore: str | None
    dry_run: bool
    quiet: bool

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
        from trtllm.sizes import format_size
        from trtllm.tools.progress_display import display_for

        console.level = "error" if self.quiet else console.level
        common = {"command": "trtllm-prune", "output_dir": str(self.target)}
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

    def _say(self, console: Console, text: str) -> None:
        if not self.quiet:
            console.say(text)
