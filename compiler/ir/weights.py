"""A weight of the graph: an initializer whose payload is a recipe, not an array."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe
from trtllm.dtypes import DType
from trtllm.errors import GraphError

IR_TYPES: dict[DType, ir.DataType] = {
    DType.FLOAT32: ir.DataType.FLOAT,
    DType.FLOAT16: ir.DataType.FLOAT16,
    DType.BFLOAT16: ir.DataType.BFLOAT16,
    DType.FLOAT64: ir.DataType.DOUBLE,
    DType.FLOAT8_E4M3: ir.DataType.FLOAT8E4M3FN,
    DType.FLOAT8_E5M2: ir.DataType.FLOAT8E5M2,
    DType.INT64: ir.DataType.INT64,
    DType.INT32: ir.DataType.INT32,
    DType.INT16: ir.DataType.INT16,
    DType.INT8: ir.DataType.INT8,
    DType.UINT8: ir.DataType.UINT8,
    DType.BOOL: ir.DataType.BOOL,
    DType.INT4: ir.DataType.INT4,
}
DTYPES: dict[ir.DataType, DType] = {value: key for key, value in IR_TYPES.items()}


class Weight(ir.LazyTensor):
    """A tensor that knows how it is made.

    It is a tensor to onnx_ir, so shapes and types are read by passes as of any initializer; its payload exists only
    while an emitter streams it (`numpy()` needs `bind` first and is for tests and small graphs).
    """

    def __init__(self, name: str, recipe: Recipe) -> None:
        super().__init__(self._payload, IR_TYPES[recipe.dtype], ir.Shape(recipe.shape), cache=False, name=name)
        self.recipe = recipe
        self._recipe_reader: RecipeReader | None = None

    def bind(self, reader: RecipeReader) -> None:
        """Gives it the checkpoint to read from when its payload is asked for."""
        self._recipe_reader = reader

    def _payload(self) -> ir.TensorProtocol:
        if self._recipe_reader is None:
            raise GraphError(f"weight '{self.name}' is read before it is bound to a checkpoint")
        stored = self._recipe_reader.read(self.recipe)
        if self.recipe.dtype is DType.INT4:
            return ir.Tensor(unpack_int4(stored), dtype=self.dtype, name=self.name)
        return ir.Tensor(stored, dtype=self.dtype, name=self.name)


def unpack_int4(stored: np.ndarray) -> np.ndarray:
    """uint8 pairs [..., K/2] as ml_dtypes.int4 [..., K]."""
    import ml_dtypes

    low = (stored << 4).view(np.int8) >> 4
    high = stored.view(np.int8) >> 4
    return np.stack([low, high], axis=-1).reshape(*stored.shape[:-1], -1).astype(ml_dtypes.int4)


def weight_of(value: ir.Value | None) -> Weight | None:
    """The weight behind an initializer value, None when the value is no weight."""
    if value is not None and isinstance(value.const_value, Weight):
        return value.const_value
    return None
