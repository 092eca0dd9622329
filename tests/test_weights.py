import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from farcli import weights
from farcli.errors import UsageError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
INTEGERS = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}


class Bag(nn.Module):
    """Parameters and buffers of any shape and dtype."""

    def __init__(self, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
        super().__init__()
        for index, (kind, dtype, shape) in enumerate(tensors):
            if kind == "parameter":
                self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype])))
            else:
                self.register_buffer(f"b{index}", torch.zeros(shape, dtype=(DTYPES | INTEGERS)[dtype]))


def fill(model: nn.Module, seed: int) -> None:
    """Any finite bit pattern, subnormal numbers and signed zeros included."""
    generator = np.random.default_rng(seed)
    for tensor in model.state_dict().values():
        if tensor.numel() == 0:
            continue
        raw = torch.from_numpy(generator.integers(0, 256, tensor.numel() * tensor.element_size(), dtype=np.uint8))
        if tensor.dtype == torch.bool:
            raw = raw % 2
        values = raw.view(tensor.dtype).reshape(tensor.shape)
        if tensor.dtype.is_floating_point:
            values = torch.where(values.isfinite(), values, torch.full_like(values, -0.0))
        tensor.copy_(values)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.one_of(
    st.tuples(st.just("parameter"), st.sampled_from(list(DTYPES)), shapes),
    st.tuples(st.just("buffer"), st.sampled_from([*DTYPES, *INTEGERS]), shapes),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(tensors, max_size=6), st.integers(0, 2**32 - 1))
def test_any_module_survives_the_round_trip_bit_for_bit(specification, seed):
    model, other = Bag(specification), Bag(specification)
    fill(model, seed)
    layout = weights.layout_of_module(model)
    floats, integers = weights.flatten(model, layout)
    assert floats.shape == (layout.size,)
    assert integers.shape == (layout.integers,)
    state = weights.unflatten(floats, integers, layout)
    other.load_state_dict(state, strict=True)
    third = Bag(specification)
    weights.load(third, layout, floats.numpy(), integers.numpy())
    for name, tensor in model.state_dict().items():
        for found in (state[name], other.state_dict()[name], third.state_dict()[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert bits(found) == bits(tensor)


@settings(max_examples=30, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_lockstep_vectors_are_the_vectors_of_single_runs(specification, seed, runs):
    stacked = Bag([(kind, dtype, (runs, *shape)) for kind, dtype, shape in specification])
    fill(stacked, seed)
    layout = weights.layout_of_module(stacked, lead=1)
    assert layout == weights.layout_of_module(Bag(specification))
    floats, integers = weights.flatten(stacked, layout)
    assert floats.shape == (runs, layout.size)
    for run in range(runs):
        single = Bag(specification)
        single.load_state_dict({name: tensor[run] for name, tensor in stacked.state_dict().items()})
        alone = weights.flatten(single, layout, torch.empty(layout.size, dtype=floats.dtype))
        assert bits(alone[0]) == bits(floats[run])
        assert torch.equal(alone[1], integers[run])
    empty = Bag([(kind, dtype, (runs, *shape)) for kind, dtype, shape in specification])
    weights.load(empty, layout, floats, integers)
    for name, tensor in stacked.state_dict().items():
        assert bits(empty.state_dict()[name]) == bits(tensor)
        assert bits(weights.unflatten(floats, integers, layout)[name]) == bits(tensor)


def batch_norm_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_parameters_come_first_then_statistics_then_counts():
    layout = weights.layout_of_module(batch_norm_network())
    assert [(slot.name, slot.role, slot.offset) for slot in layout.slots] == [
        ("0.weight", "parameter", 0),
        ("0.bias", "parameter", 18),
        ("1.weight", "parameter", 20),
        ("1.bias", "parameter", 22),
        ("3.weight", "parameter", 24),
        ("3.bias", "parameter", 48),
        ("1.running_mean", "buffer", 51),
        ("1.running_var", "buffer", 53),
        ("1.num_batches_tracked", "integer", 0),
    ]
    assert (layout.parameters, layout.size, layout.integers) == (51, 55, 1)


def test_batch_norm_statistics_and_counts_travel():
    model, other = batch_norm_network(), batch_norm_network()
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model(images)
    layout = weights.layout_of_module(model)
    weights.load(other, layout, *weights.flatten(model, layout))
    assert int(other.get_buffer("1.num_batches_tracked")) == 1
    assert torch.equal(model.eval()(images), other.eval()(images))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_stay_tied():
    model, other = Tied(), Tied()
    layout = weights.layout_of_module(model)
    assert layout.size == 15
    assert layout.tied == (("head.weight", "embedding.weight"),)
    floats, integers = weights.flatten(model, layout)
    other.load_state_dict(weights.unflatten(floats, integers, layout), strict=True)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)
    weights.load(other, layout, floats * 2)
    assert torch.equal(other.head.weight, model.head.weight * 2)


def test_views_of_other_parts_of_one_memory_are_not_tied():
    model = nn.Module()
    whole = torch.arange(6.0)
    model.register_buffer("first", whole[:3])
    model.register_buffer("second", whole[3:])
    model.register_buffer("crossed", whole.reshape(2, 3).T)
    layout = weights.layout_of_module(model)
    assert layout.tied == ()
    assert weights.flatten(model, layout)[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 3, 1, 4, 2, 5]


def test_loading_keeps_the_tensors_so_that_optimisers_stay_valid():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    layout = weights.layout_of_module(model)
    weights.load(model, layout, np.zeros(6, np.float32))
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert weights.flatten(model, layout)[0].tolist() == [-1.0] * 6
    assert model.weight.requires_grad


def test_vectors_are_copies_and_buffers_are_filled_in_place():
    model = nn.Linear(2, 2)
    layout = weights.layout_of_module(model)
    buffer = np.zeros(6, np.float64)
    floats, _ = weights.flatten(model, layout, buffer)
    assert floats.data_ptr() == torch.from_numpy(buffer).data_ptr()
    before = buffer.copy()
    state = weights.unflatten(buffer, None, layout)
    with torch.no_grad():
        model.weight.zero_()
    state["weight"].zero_()
    assert np.array_equal(buffer, before)
    assert before.any()


def test_non_persistent_buffers_are_left_to_the_constructor():
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.ones(3), persistent=False)
    assert weights.layout_of_module(model).size == 2


def test_what_cannot_be_held_exactly_is_refused_by_name():
    double = nn.Linear(1, 1).double()
    with pytest.raises(UsageError, match=r"'weight': float64 cannot be held exactly in float32"):
        weights.flatten(double, weights.layout_of_module(double), np.empty(2, np.float32))
    model = nn.Module()
    model.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UsageError, match=r"'spectrum'.*complex64"):
        weights.layout_of_module(model)
    model = nn.Module()
    model.register_buffer("hashes", torch.zeros(2, dtype=torch.uint64))
    with pytest.raises(UsageError, match=r"'hashes'.*uint64"):
        weights.layout_of_module(model)
    with pytest.raises(UsageError, match=r"'weight': is lazy"):
        weights.layout_of_module(nn.LazyLinear(3))


def test_extra_state_is_refused_by_name():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 1}

    with pytest.raises(UsageError, match="_extra_state"):
        weights.layout_of_module(Extra(1, 1))


def test_another_network_is_refused_by_the_first_tensor_that_differs():
    layout = weights.layout_of_module(nn.Linear(2, 3))
    with pytest.raises(UsageError, match=r"lacks 'bias'"):
        weights.flatten(nn.Linear(2, 3, bias=False), layout)
    scaled = nn.Linear(2, 3)
    scaled.register_buffer("scale", torch.ones(1))
    with pytest.raises(UsageError, match=r"also has 'scale'"):
        weights.flatten(scaled, layout)
    with pytest.raises(UsageError, match=r"'weight': shape \(3, 3\), expected \(3, 2\)"):
        weights.flatten(nn.Linear(3, 3), layout)
    with pytest.raises(UsageError, match=r"'weight': dtype torch.float64"):
        weights.load(nn.Linear(2, 3).double(), layout, np.zeros(9))
    with pytest.raises(UsageError, match=r"weights: shape \(8,\), expected \(9,\)"):
        weights.load(nn.Linear(2, 3), layout, np.zeros(8))
    with pytest.raises(UsageError, match=r"integers: shape \(0,\), expected \(1,\)"):
        weights.unflatten(np.zeros(4), None, weights.layout_of_module(nn.BatchNorm1d(1)))


def test_half_precision_weights_are_rounded_from_a_forecast():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    state = weights.unflatten(np.array([1.001], np.float32), None, weights.layout_of_module(model))
    assert state["weight"].dtype == torch.bfloat16
    assert state["weight"].item() == 1.0
