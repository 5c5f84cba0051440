"""A graph written as text reads back as the same graph, at every stage of every architecture's build."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.compiler.ir.text import dump, from_text, to_text
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.pipeline import compile_network, read_model
from trtllm.config import build_config
from trtllm.progress import Silent


@pytest.fixture(scope="module", params=[None, "W4A16"], ids=["plain", "W4A16"])
def build_dump(
    request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ir.Model, Path]:
    """A legalized graph, and the folder with the text of every stage it went through."""
    folder = tmp_path_factory.mktemp("dump")
    build = build_config({"max_seq_len": 16, "quantization": request.param})
    compiled = compile_network(read_model(model, progress=Silent()), build, dump_dir=folder)
    return compiled.network.model, folder


def stages(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and text of each stage that changed something."""
    before = ""
    for path in sorted(folder.iterdir()):
        text = path.read_text(encoding="utf-8")
        if text != before:
            yield path.name, text
        before = text


def test_the_text_of_every_stage_reads_back_to_itself(build_dump: tuple[ir.Model, Path]) -> None:
    names = []
    for name, text in stages(build_dump[1]):
        assert to_text(from_text(text)) == text, name
        names.append(name)
    assert names[0] == "00-model.onnxtxt"
    assert len(names) > 3


def test_a_graph_that_was_read_back_has_its_nodes_attributes_and_constants(build_dump: tuple[ir.Model, Path]) -> None:
    graph, again = build_dump[0].graph, from_text(to_text(build_dump[0])).graph
    assert len(graph) == len(again)
    for node, copy in zip(graph, again, strict=True):
        assert (node.domain, node.op_type, node.name) == (copy.domain, copy.op_type, copy.name)
        assert [value and value.name for value in node.inputs] == [value and value.name for value in copy.inputs]
        assert attributes(node) == attributes(copy), node.name
    for name, value in graph.initializers.items():
        read = again.initializers[name]
        assert (value.dtype, value.shape) == (read.dtype, read.shape)
        if not isinstance(value.const_value, Weight):
            np.testing.assert_array_equal(value.const_value.numpy(), read.const_value.numpy(), err_msg=name)


def attributes(node: ir.Node) -> dict[str, Any]:
    """Attribute values, floats as the float32 that ONNX stores."""
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in values.items()}


def test_a_dump_is_named_by_its_place_and_stage(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="empty")
    path = dump(ir.Model(graph, ir_version=11), tmp_path / "new" / "folder", 3, "fuse-add-norm")
    assert path == tmp_path / "new" / "folder" / "03-fuse-add-norm.onnxtxt"
    verify(from_text(path.read_text(encoding="utf-8")).graph, after="reading")
