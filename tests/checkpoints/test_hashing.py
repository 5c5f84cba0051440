"""Digests are hashlib's, however the message comes in pieces and whatever the other message of the pair has before."""

import hashlib

import numpy as np
import pytest

from trtllm.checkpoints.hashing import hashes_in_pairs, new_sha256, update_both, update_each, update_in_turn


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_length_make_the_digests_of_the_whole(seed: int) -> None:
    random = np.random.default_rng(seed)
    whole, part = new_sha256(), new_sha256()
    all_bytes, part_bytes = b"", b""
    for _ in range(60):
        length = int(random.choice([0, 1, 55, 56, 63, 64, 65, 128, 1000, random.integers(0, 4000)]))
        piece = random.integers(0, 256, length, np.uint8)
        choice = random.integers(0, 10)
        if choice == 0:
            part, part_bytes = new_sha256(), b""
        if choice == 1:
            whole.update(piece)
        else:
            update_both(whole, part, piece)
            part_bytes += piece.tobytes()
        all_bytes += piece.tobytes()
        assert whole.hexdigest() == hashlib.sha256(all_bytes).hexdigest()
        assert part.hexdigest() == hashlib.sha256(part_bytes).hexdigest()


@pytest.mark.parametrize("length", [*range(0, 130), 1 << 20])
def test_every_length_is_padded_rightly(length: int) -> None:
    data = np.arange(length, dtype=np.uint64).astype(np.uint8)
    digest = new_sha256()
    digest.update(data.data)
    assert digest.hexdigest() == hashlib.sha256(data.tobytes()).hexdigest()


@pytest.mark.parametrize("seed", range(4))
def test_payloads_in_turn_make_the_digest_of_each_and_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    payloads = [random.integers(0, 256, int(random.integers(0, 3000)), np.uint8) for _ in range(30)]
    kinds = random.integers(0, 5, len(payloads))
    whole, parts, each = new_sha256(), [new_sha256() for _ in range(5)], [new_sha256() for _ in range(5)]
    update_in_turn(whole, [parts[kind] for kind in kinds], payloads)
    update_each([each[kind] for kind in kinds], payloads)
    assert whole.hexdigest() == hashlib.sha256(b"".join(map(bytes, payloads))).hexdigest()
    for kind in range(5):
        own = b"".join(bytes(payload) for payload, of in zip(payloads, kinds, strict=True) if of == kind)
        assert parts[kind].hexdigest() == each[kind].hexdigest() == hashlib.sha256(own).hexdigest()


def test_payloads_and_digests_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="not as many"):
        update_in_turn(new_sha256(), [new_sha256()], [])


def test_without_the_instructions_hashlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm.checkpoints import hashing

    class Without:
        has_sha256_instructions = staticmethod(lambda: False)
        Sha256 = type("Never", (), {})

    monkeypatch.setattr(hashing, "_native", Without)
    assert not hashes_in_pairs()
    one, other = new_sha256(), new_sha256()
    update_both(one, other, b"abc")
    assert one.hexdigest() == other.hexdigest() == hashlib.sha256(b"abc").hexdigest()
    whole, third = new_sha256(), new_sha256()
    update_in_turn(whole, [third, one], [b"a", b"d"])
    assert whole.hexdigest() == hashlib.sha256(b"ad").hexdigest()
    assert one.hexdigest() == hashlib.sha256(b"abcd").hexdigest()
