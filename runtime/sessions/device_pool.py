"""The memory of a cache on a GPU: the blocks of every layer in a primary pool there and a host pool beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trtllm.errors import UsageError
from trtllm.runtime.cuda.cache_kernels import BlockCopy, CacheKernels, Plane, independent_runs
from trtllm.runtime.cuda.driver import Device, Memory, Stream
from trtllm.runtime.session import CacheShape
from trtllm.runtime.sessions.block_pool import layers_of_groups
from trtllm.runtime.sessions.tensorrt_library import TensorInfo

_ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """The next size at which another tensor may begin: the library wants addresses in such steps."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class DevicePool:
    """Keys and values of every layer as [blocks, kv heads, tokens of a block, head size], in one piece.

    The plan's pool has one block more than the cache: `nowhere`, which stands in tables where a row has no block. It
    stays zero, and tokens written to it are dropped.
    """

    def __init__(
        self, config: Mapping[str, Any], shape: CacheShape, tensors: Mapping[str, TensorInfo], device: Device,
        stream: Stream,
    ) -> None:  # fmt: skip
        self._device, self._shape = device, shape
        names = [
            (group, f"past_{kind}.{layer}")
            for group, layers in enumerate(layers_of_groups(config))
            for layer in layers
            for kind in ("key", "value")
        ]
        self.names = tuple(name for _, name in names)
        """Of the plan's inputs, in the order of the planes."""
        self.num_plan_blocks = tensors[self.names[0]].shape[0]
        self.nowhere = shape.num_blocks
        block_nbytes = {name: int(np.prod(tensors[name].shape[1:])) * tensors[name].item_nbytes for name in self.names}
        plane_nbytes = {name: aligned(self.num_plan_blocks * size) for name, size in block_nbytes.items()}
        self._memory: Memory = device.allocate(sum(plane_nbytes.values()))
        device.clear(self._memory.address, self._memory.nbytes, stream)
        self._host = device.pinned(sum(shape.num_host_blocks * size for size in block_nbytes.values()))
        planes, address, host = [], self._memory.address, self._host.address
        for group, name in names:
            _, heads, _, head_size = tensors[name].shape
            planes.append(Plane(address, host, heads, head_size * tensors[name].item_nbytes, group))
            address += plane_nbytes[name]
            host += shape.num_host_blocks * block_nbytes[name]
        self.addresses = {name: plane.pool for name, plane in zip(self.names, planes, strict=True)}
        self.kernels = CacheKernels(device, planes, shape.num_blocks, shape.tokens_per_block, stream)
        self._copies = np.zeros((0, 4), np.int32)
        self._device_copies = device.allocate(16)

    def copy(self, copies: Sequence[BlockCopy], stream: Stream) -> None:
        """Queues copies of the first tokens of blocks to others, in order.

        Raises UsageError for blocks that do not exist. The stream must have been waited for since the last call.
        """
        total = self._shape.num_blocks + self._shape.num_host_blocks
        groups = len(self._shape.groups)
        for group, source, destination, _ in copies:
            if not (0 <= source < total and 0 <= destination < total and 0 <= group < groups):
                raise UsageError(
                    f"a copy from block {source} to {destination} of group {group} leaves the pool",
                    f"the cache has {total} blocks in each of {groups} groups",
                )
        self._copies = np.array(copies, np.int32)
        np.minimum(self._copies[:, 3], self._shape.tokens_per_block, out=self._copies[:, 3])
        if self._copies.nbytes > self._device_copies.nbytes:
            self._device_copies = self._device.allocate(2 * self._copies.nbytes)
        self._device.to_device(self._device_copies.address, self._copies.ctypes.data, self._copies.nbytes, stream)
        for first, end in independent_runs(copies):
            self.kernels.copy(self._device_copies, first, end - first, stream)
