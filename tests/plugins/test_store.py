"""A store on disk: parts that are written whole, resumed, checked, and found by their keys."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdgraft import DistillError
from kdgraft.store import HEADER, KEYS, LENGTHS, Index, Store, narrowed, packed_ids, rounded, unpacked_ids

ABOUT = {"samples": 7, "per_part": 3, "taps": {"x": {"per": "token"}}}


def keys(places):
    return np.stack(
        [np.frombuffer(int(place * 2654435761).to_bytes(8, "big") + bytes([place] * 8), np.uint8) for place in places]
    )


def columns(places):
    lengths = [place % 3 + 1 for place in places]
    rows = np.concatenate(
        [np.full((length, 2), place, np.float16) for place, length in zip(places, lengths, strict=True)]
    )
    return {KEYS: keys(places), LENGTHS: np.array(lengths, np.int64), "x": rows}


def filled(folder, about=ABOUT):
    store = Store.create(folder, about)
    for part in store.missing():
        store.write(part, columns(store.samples_of(part)))
    return store


def test_every_sample_is_found_by_its_key(tmp_path):
    store = filled(tmp_path)
    assert store.parts == 3 and not store.missing() and [len(store.samples_of(part)) for part in range(3)] == [3, 3, 1]
    index = Index(Store(tmp_path))
    assert len(index) == 7
    order = [5, 0, 6, 3]
    for place, found in zip(order, index.places(keys(order)), strict=True):
        part, row, start, end = index.of(int(found))
        assert (store.rows(part, "x", start, end) == place).all() and end - start == place % 3 + 1
        assert row == place % 3
    assert index.places(keys([2, 9])).tolist() == [2, -1]


def test_an_interrupted_store_goes_on_and_is_the_same(tmp_path):
    filled(tmp_path / "whole")
    begun = Store.create(tmp_path / "again", ABOUT)
    begun.write(1, columns(begun.samples_of(1)))
    (tmp_path / "again" / "part-000000.safetensors").write_bytes(
        b"half a part"
    )  # killed before its checksum was written
    with pytest.raises(DistillError, match="is not complete: 2 of 3 parts are missing"):
        Index(Store(tmp_path / "again"))
    assert begun.missing() == [0, 2]
    filled(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_damage_is_said(tmp_path):
    filled(tmp_path)
    path = tmp_path / "part-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DistillError, match=r"part-000001\.safetensors is damaged; remove it and part-000001\.sha256"):
        Index(Store(tmp_path))
    with pytest.raises(DistillError, match="is damaged"):
        Store(tmp_path).check()
    path.unlink()  # without its file a part is missing, whatever its checksum says
    assert Store(tmp_path).missing() == [1]
    (tmp_path / HEADER).write_text("[1]")
    with pytest.raises(DistillError, match=r"store\.json is damaged"):
        Store(tmp_path)
    (tmp_path / HEADER).write_text("{")
    with pytest.raises(DistillError, match=r"store\.json is damaged"):
        Store(tmp_path)


def test_a_store_of_something_else_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(DistillError, match=r"has a store of something else \(taps differ\)"):
        Store.create(tmp_path, {**ABOUT, "taps": {}})
    with pytest.raises(DistillError, match=r"there is no store in .*nowhere"):
        Store(tmp_path / "nowhere")
    (tmp_path / HEADER).write_text(json.dumps({**ABOUT, "format": 99}))
    with pytest.raises(DistillError, match="is of format 99"):
        Store(tmp_path)


@pytest.mark.parametrize(("classes", "width"), [(40, 2), (1 << 16, 2), (128_256, 3)])
def test_classes_are_packed_in_few_bytes(classes, width):
    ids = np.random.default_rng(0).integers(0, classes, (5, 7))
    ids[0, 0] = classes - 1
    packed = packed_ids(ids, classes)
    assert packed.nbytes == 35 * width and (unpacked_ids(packed) == ids).all()


# --- smaller numbers


@pytest.mark.parametrize("shape", [(3, 5, 4), (6, 2), (7,), ()])
def test_whole_numbers_are_off_by_at_most_half_their_unit(shape):
    exact = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    whole, unit = rounded(exact)
    assert whole.dtype == np.int8 and unit.shape == ((3, 1, 1) if len(shape) > 2 else (1,) * len(shape))
    assert (np.abs(whole * unit - exact) <= unit * 0.5001).all()
    largest = np.abs(exact).max((1, 2) if len(shape) > 2 else None)
    np.testing.assert_allclose(unit.reshape(-1), np.reshape(largest, -1) / 127, rtol=1e-6)


def test_whole_numbers_by_hand_and_of_nothing_but_zeros():
    whole, unit = rounded(np.array([[[254.0, -127.0]], [[0.0, 0.0]]], np.float32))
    assert whole.tolist() == [[[127, -64]], [[0, 0]]] and unit.reshape(-1).tolist() == [2.0, 0.0]
    assert rounded(np.zeros((2, 0, 3), np.float32))[0].shape == (2, 0, 3)


def test_what_a_type_cannot_say_is_refused():
    with pytest.raises(DistillError, match="not finite, which int8 cannot say"):
        rounded(np.array([1.0, np.inf], np.float32))
    with pytest.raises(DistillError, match="exceed those of float16"):
        narrowed(np.array([1e6], np.float32), "float16")
    assert narrowed(np.array([np.inf, 1.0], np.float32), "float16").tolist() == [np.inf, 1.0]
