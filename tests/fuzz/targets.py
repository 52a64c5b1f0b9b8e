"""The fuzzed functions, each with the rules that must hold.

Run by test_fuzz.py, or by hand:

    python tests/fuzz/targets.py npy -max_total_time=60

Whatever else a target raises than its documented error ends the run with a report and the input.
"""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["lifl"]):
    import lifl
    from lifl import tensor
    from lifl.errors import AdmissionError
    from lifl.round import admission
    from lifl.shm import sizes
    from lifl.strategy import npy

MODEL = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array(3, np.int64),
    "h": np.zeros(4, np.float16),
    "e": np.zeros((0, 2), np.float64),
}
SPEC = lifl.TensorSpec.from_arrays(MODEL)


def saved(array: np.ndarray) -> bytes:
    """As np.save writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# ---------------------------------------------------------------- .npy


def fuzz_npy(data: bytes) -> None:
    """A ValueError, or what NumPy reads too: same dtype, shape and bytes, and not one byte beyond those that came."""
    try:
        array = npy.view(data)
    except ValueError:
        return
    assert npy.parse_header(data).offset + array.nbytes == len(data)
    theirs = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=20_000)
    assert (theirs.dtype, theirs.shape) == (array.dtype, array.shape)
    assert theirs.tobytes() == array.tobytes()


def npy_seeds() -> Iterable[bytes]:
    """Good ones, of each dtype and some shapes, and a lie."""
    for dtype in ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "?"):
        yield saved(np.ones(3, dtype))
    for array in MODEL.values():
        yield saved(array)
    yield saved(np.asfortranarray(MODEL["w"]))
    yield saved(np.ones(3, np.float32)).replace(b"(3,)", b"(3000000000,)")


# ---------------------------------------------------------------- a worker's control block


def fuzz_layout(data: bytes) -> None:
    """A ValueError, or segments that lie inside their blocks."""
    try:
        layout, _ = tensor.Layout.decode(data)
    except ValueError:
        return
    for segment in layout.segments:
        assert segment.update_offset + segment.count * tensor.ITEM_BYTES[segment.dtype] <= layout.update_bytes
        assert segment.sum_offset + segment.count * tensor.sum_item_bytes(segment.dtype) <= layout.sum_bytes


def layout_seeds() -> Iterable[bytes]:
    """Real ones."""
    yield SPEC.layout.encode(0)
    yield SPEC.flower_layout.encode(3)


# ---------------------------------------------------------------- admission


def fuzz_admission(data: bytes) -> None:
    """An AdmissionError, or a weight in its bounds and arrays that are the spec's."""
    provider = atheris.FuzzedDataProvider(data)
    weight = any_value(provider)
    try:
        admitted = admission.check_weight("c", weight, 2.0**40)
    except AdmissionError as error:
        check_short(error)
    else:
        assert isinstance(admitted, float)
        assert admission.MIN_WEIGHT <= admitted <= 2.0**40
    update = {name: any_array(provider) if provider.ConsumeBool() else array for name, array in MODEL.items()}
    if provider.ConsumeBool():
        update[provider.ConsumeUnicode(20)] = any_array(provider)
    if provider.ConsumeBool():
        update.pop(provider.PickValueInList(list(MODEL)))
    try:
        admission.check_arrays("c", SPEC, update)
    except AdmissionError as error:
        check_short(error)
    else:
        assert set(update) == set(MODEL)
        for name, array in MODEL.items():
            assert (update[name].dtype, update[name].shape) == (array.dtype, array.shape)


def check_short(error: AdmissionError) -> None:
    """An error quotes a client's bytes, but not all of them."""
    assert len(str(error)) < 1000


def any_value(provider: atheris.FuzzedDataProvider) -> object:
    """Something that might be a weight."""
    kind = provider.ConsumeIntInRange(0, 8)
    if kind == 0:
        return provider.ConsumeInt(12)
    if kind == 1:
        return provider.ConsumeInt(200)
    if kind == 2:
        return provider.ConsumeUnicode(30)
    if kind == 3:
        return np.frombuffer(provider.ConsumeBytes(2).ljust(2), np.float16)[0]
    if kind == 4:
        return np.int64(provider.ConsumeInt(8))
    if kind == 5:
        return [None, True, False, np.bool_(True), 1j, [], {}, b"1", object()][provider.ConsumeIntInRange(0, 8)]
    if kind == 6:
        return any_array(provider)
    return provider.ConsumeFloat()


def any_array(provider: atheris.FuzzedDataProvider) -> np.ndarray:
    """A small array of any dtype and shape."""
    dtype = provider.PickValueInList(["f2", "f4", "f8", "i1", "i8", "?", "c8", "U2", "O", "M8[s]", ">f4", "V3"])
    shape = tuple(provider.ConsumeIntInRange(0, 4) for _ in range(provider.ConsumeIntInRange(0, 4)))
    return np.zeros(shape, dtype)


# ---------------------------------------------------------------- a whole reply, as the strategy lands it


class Landings:
    """A Node for all inputs, made on first use."""

    node: lifl.Node | None = None
    free = 0


def fuzz_landing(data: bytes) -> None:
    """Lands a good reply and one made of the input: the result is of the good one or of both, and no block is lost."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    from lifl.round.admission import Limits
    from lifl.strategy.landing import Landing

    if Landings.node is None:
        Landings.node = lifl.Node("8MiB", workers=0)
        Landings.free = Landings.node.arena.free_bytes
    provider = atheris.FuzzedDataProvider(data)
    arrays = {name: Array(array) for name, array in MODEL.items()}
    for name in MODEL:
        if provider.ConsumeBool():
            payload = bytearray(arrays[name].data)
            for _ in range(provider.ConsumeIntInRange(0, 4)):
                payload[provider.ConsumeIntInRange(0, len(payload) - 1)] = provider.ConsumeIntInRange(0, 255)
            payload = payload[: provider.ConsumeIntInRange(0, len(payload))] if provider.ConsumeBool() else payload
            shape = tuple(provider.ConsumeIntListInRange(provider.ConsumeIntInRange(0, 3), 0, 2**31))
            stype = provider.PickValueInList(["numpy.ndarray", "torch", ""])
            arrays[name] = Array(provider.PickValueInList(["float32", "O", "x"]), shape, stype, bytes(payload))
    if provider.ConsumeBool():
        arrays[provider.ConsumeUnicodeNoSurrogates(10)] = arrays["w"]
    if provider.ConsumeBool():
        del arrays[provider.PickValueInList(list(MODEL))]
    records: dict[str, object] = {"arrays": ArrayRecord(arrays)}
    weight = provider.PickValueInList([1, 2.5, -1, 0, math.nan, math.inf, 1e300, 2**62, [1.0], []])
    metrics = {"num-examples": weight} if provider.ConsumeBool() else {"loss": provider.ConsumeFloat()}
    records["metrics"] = MetricRecord(metrics)
    if provider.ConsumeIntInRange(0, 5) == 0:
        records["more"] = provider.PickValueInList([ArrayRecord({}), MetricRecord({}), ConfigRecord({})])
    if provider.ConsumeIntInRange(0, 9) == 0:
        records.pop(provider.PickValueInList(sorted(records)))
    good = RecordDict(
        {"arrays": ArrayRecord({n: Array(a) for n, a in MODEL.items()}), "m": MetricRecord({"num-examples": 1})}
    )
    landing = Landing(Landings.node, SPEC, 2, "num-examples", "eager", "any", False, Limits(max_weight=2.0**40), None)
    landing.take(reply(good, 1), 1)
    landing.take(reply(RecordDict(records), 2), 2)
    result = landing.result()
    accepted = [one.client_id for one in landing.report().accepted]
    refused = [one.client_id for one in landing.report().rejected]
    assert (accepted, refused) in ((["1"], ["2"]), (["1", "2"], [])), (accepted, refused)
    for name, array in result.arrays.items():
        assert np.isfinite(array).all()
        assert refused == [] or np.array_equal(array, MODEL[name])
    del result, array
    landing.close()
    assert Landings.node.arena.free_bytes == Landings.free


def reply(content: object, node_id: int) -> object:
    """A reply as a Grid hands it over."""
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata

    return make_message(Metadata(1, f"r{node_id}", node_id, 1, f"m{node_id}", "", 1.0, 3600.0, "train"), content)


# ---------------------------------------------------------------- a user's size


def fuzz_sizes(data: bytes) -> None:
    """A ValueError, or a number of bytes."""
    with suppress(ValueError):
        assert sizes.parse_bytes(data.decode(errors="replace")) >= 1


def nothing() -> Iterable[bytes]:
    """The fuzzer's own beginning."""
    yield b"\0" * 64


def size_seeds() -> Iterable[bytes]:
    """Good ones."""
    yield from (b"2GiB", b"512 MB", b"1.5 tb", b"17")


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterable[bytes]]]] = {
    "npy": (fuzz_npy, npy_seeds),
    "layout": (fuzz_layout, layout_seeds),
    "admission": (fuzz_admission, nothing),
    "landing": (fuzz_landing, nothing),
    "sizes": (fuzz_sizes, size_seeds),
}


def bounded(target: Callable[[bytes], None], most: int) -> Callable[[bytes], None]:
    """The same target, which may not take more than `most` bytes of memory for one input."""
    state = {"calls": 0}

    def called(data: bytes) -> None:
        state["calls"] += 1
        if state["calls"] % 16:  # tracemalloc is slow
            return target(data)
        tracemalloc.start()
        try:
            target(data)
            assert tracemalloc.get_traced_memory()[1] < most + 20 * len(data)
        finally:
            tracemalloc.stop()
        return None

    return called


def main() -> None:
    """Writes the seeds into a folder of their own, then fuzzes."""
    target, seeds = TARGETS[sys.argv[1]]
    if sys.argv[1] in ("npy", "layout", "sizes"):
        target = bounded(target, 2**18)
    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{i}").write_bytes(seed)
        os.chdir(folder)  # where libFuzzer leaves the input that broke it
        atheris.Setup([sys.argv[0], folder, *sys.argv[2:]], target)
        atheris.Fuzz()


if __name__ == "__main__":
    assert struct.calcsize("P") == 8
    main()
