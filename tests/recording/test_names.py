"""What tensors are called: as the network's own state_dict does, whatever is wrapped round it."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from farcli.recording.names import find_roots, name_tensors, places_of, unwrapped


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 3), nn.PReLU()))


def inner_wrapped(model: nn.Sequential) -> nn.Module:
    model[2] = checkpoint_wrapper(model[2])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        inner_wrapped,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(inner_wrapped(model)), backend="eager"),
    ],
)
def test_wrappers_leave_no_trace(wrap):
    model = net()
    state = dict(model.state_dict(keep_vars=True))
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    places = places_of(wrapped)
    assert [place.name for place in places] == list(state)
    assert all(place.tensor() is state[place.name] for place in places)


def test_tensors_of_no_network_have_their_optimisers_names_or_numbers():
    model, loose = nn.Linear(3, 2), [torch.randn(4, requires_grad=True) for _ in range(3)]
    named = torch.optim.SGD([("scale", loose[0])], lr=0.1)
    plain = torch.optim.SGD([{"params": model.parameters()}, {"params": loose[1:]}], lr=0.1)
    optimizers = [plain, named]
    roots = find_roots(optimizers)
    assert roots == [model]
    places = name_tensors(optimizers, roots, None)
    assert [place.name for place in places] == ["weight", "bias", "group1.0", "group1.1", "scale"]
    assert places[2].tensor() is loose[1]


def test_the_outermost_network_names_and_shared_tensors_count_once():
    student = net()
    distiller = nn.ModuleDict({"student": student, "head": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    assert find_roots([optimizer]) == [distiller]
    alone = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert find_roots([alone]) == []  # nobody holds the network any more


def test_an_object_that_pretends_to_be_a_network_is_not_woken():
    """Lazy imports answer isinstance by importing; what is looked at is an object's type."""
    asked = []

    class Lazy:
        @property
        def __class__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
            asked.append(True)
            return nn.Module

    lazy, model = Lazy(), net()
    assert find_roots([torch.optim.SGD(model.parameters(), lr=0.1)]) == [model]
    assert not asked
    assert isinstance(lazy, nn.Module)
    assert asked
