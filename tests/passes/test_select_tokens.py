"""Only the last valid token of each row reaches the head, unless all logits are asked for."""

import numpy as np

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.select_tokens import SelectLastToken

FEED = {"x": np.random.default_rng(5).normal(size=(3, 4, 8)).astype(np.float32), "lengths": np.array([4, 1, 3])}


def head(small):
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", 8))
    b.input("lengths", DType.INT64, ("batch",))
    b.output(b.dialect("LogitsHead", [x, small.weight("head", 16, 8)], name="head", softcap=5.0), "logits")
    return small.finish()


def test_logits_of_the_last_valid_token_remain(small, context, evaluate) -> None:
    network = head(small)
    every = evaluate(small, network, FEED)[0]
    assert SelectLastToken().run(network, context) == 1
    verify(network.graph, after="select-last-token")
    selected = evaluate(small, network, FEED)[0]
    assert list(network.graph.outputs[0].shape)[1] == 1
    np.testing.assert_allclose(selected[:, 0], every[np.arange(3), FEED["lengths"] - 1], rtol=1e-6)
    assert SelectLastToken().run(network, context) == 0


def test_all_logits_stay_when_the_build_gathers_them(small, context_for) -> None:
    network = head(small)
    assert SelectLastToken().run(network, context_for(gather_context_logits=True)) == 0
