from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farcli.errors import StoreError
from farcli.layout import Layout, layout_of

tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(["parameter", "buffer", "integer"])),
    min_size=1,
    max_size=8,
).map(lambda items: [(f"t{i}", shape, "float32", role) for i, (shape, role) in enumerate(items)])


@given(tensors)
def test_slots_tile_their_vectors(items):
    layout = layout_of(items)
    assert {slot.name for slot in layout.slots} == {name for name, *_ in items}
    for kind, total in ((("parameter", "buffer"), layout.size), (("integer",), layout.integers)):
        slots = [slot for slot in layout.slots if slot.role in kind]
        assert all(before.stop == after.offset for before, after in pairwise(slots))
        assert sum(slot.size for slot in slots) == total
    assert layout.parameters == sum(slot.size for slot in layout.slots if slot.role == "parameter")


@given(tensors)
def test_json_round_trip(items):
    layout = layout_of(items, {"alias": items[0][0]})
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.digest() == layout.digest()
    assert layout.slice_of("alias") == layout.slice_of(items[0][0])


@given(tensors, st.data())
def test_segments_cover_a_block_exactly(items, data):
    layout = layout_of(items)
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    owner = [None] * (stop - start)
    for segment in layout.segments(start, stop):
        for position in range(segment.start, segment.stop):
            assert owner[position] is None
            owner[position] = segment.slot
    for position, slot in enumerate(owner):
        found = layout.floats[slot]
        assert found.offset <= start + position < found.stop


def slot(**changes):
    plain = {"name": "a", "shape": [2], "dtype": "float32", "offset": 0, "role": "parameter"}
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("slots", "tied", "message"),
    [
        ([slot(), slot(name="b", offset=1)], [], "overlap"),
        ([slot(offset=3)], [], "gap"),
        ([slot(), slot(offset=2)], [], "two tensors"),
        ([slot(role="weight")], [], "role"),
        ([slot(shape=[-1])], [], "shape"),
        ([slot(role="buffer"), slot(name="b", offset=2)], [], "behind a buffer"),
        ([slot()], [["b", "c"]], "tied"),
        ([{"name": "a"}], [], "not readable"),
        (None, [], "not readable"),
    ],
)
def test_layouts_that_lie_are_refused(slots, tied, message):
    with pytest.raises(StoreError, match=message):
        Layout.from_json({"slots": slots, "tied": tied})
